//! `hognose explain ssd`: state space duality, and the hidden attention of a trained model.

use hognose_core::ops::ssd::reference;
use hognose_plot::{Axis, Chart, Figure, Heat, Legend, Mark, Palette, Panel, Series};
use hognose_theory::nalgebra::DMatrix;
use hognose_theory::random::Random;
use hognose_theory::relative_error;
use hognose_theory::ssd::Head;
use serde_json::json;

use super::look::{Reading, read};
use super::report::{Check, Explanation, Table, seconds};
use crate::args::ExplainArgs;

const TEXT: &str = "The old whale rose beside the ship, and the captain saw the whale.";
// The head that is drawn.
const T: usize = 48;
const N: usize = 4;
const P: usize = 8;
const CHUNK: usize = 16;

/// Heads of the model that are looked at for the most different ones, at most.
const LOOKED_AT: usize = 64;

/// A unit of the model with the matrix by which it mixes tokens.
struct Mixing {
    name: String,
    m: DMatrix<f64>,
    /// Mean number of tokens that it looks back, weighted by |M|.
    distance: f64,
}

pub fn explain(args: &ExplainArgs) -> anyhow::Result<Explanation> {
    let head = random_head(T);
    let (recurrent, attention) = (head.recurrence(), head.attention());
    let mut chunked: f64 = 0.0;
    for length in [1, 5, CHUNK, T] {
        chunked = chunked.max(relative_error(head.chunked(length)?.as_slice(), recurrent.as_slice()));
    }
    let m = head.matrix();
    let half = m.view((T / 2, 0), (T / 2, T / 2)).into_owned();
    let mut values: Vec<f64> = half.singular_values().iter().map(|v| v / half.norm()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    let mut forgetful = random_head(T);
    forgetful.log_a.iter_mut().step_by(7).for_each(|a| *a = -800.0);
    let stable = relative_error(forgetful.attention().as_slice(), forgetful.recurrence().as_slice());

    let reading = read(args, TEXT)?;
    let mut mixings = Vec::new();
    let mut off: f64 = 0.0;
    let units: usize = reading.layers.iter().map(|l| l.units).sum();
    for layer in &reading.layers {
        for unit in (0..layer.units).step_by(units.div_ceil(LOOKED_AT)) {
            let m = layer.attention(unit);
            off = off.max(layer.off(unit, &m));
            let weight: f64 = m.iter().map(|v| v.abs()).sum();
            let mut back = 0.0;
            for t in 0..m.nrows() {
                back += (0..t).map(|s| (t - s) as f64 * m[(t, s)].abs()).sum::<f64>();
            }
            let name = format!("layer {}, {} {}", layer.number + 1, layer.unit(), unit + 1);
            mixings.push(Mixing { name, distance: back / weight.max(f64::MIN_POSITIVE), m });
        }
    }
    mixings.sort_by(|a, b| a.distance.total_cmp(&b.distance));
    let (near, far) = (&mixings[mixings.len() / 4], &mixings[mixings.len() - 1]);

    let lengths = [64, 128, 256, 512, 1024];
    let mut times = Vec::new();
    for length in lengths {
        let head = random_head(length);
        times.push([
            seconds(|| drop(head.recurrence())),
            seconds(|| drop(head.attention())),
            seconds(|| drop(head.chunked(64))),
        ]);
    }
    let checks = vec![
        Check::at_most(
            "masked linear attention and recurrence differ by",
            relative_error(attention.as_slice(), recurrent.as_slice()),
            1e-12,
        ),
        Check::at_most(format!("chunks of 1, 5, {CHUNK} and {T}, and the recurrence differ by"), chunked, 1e-12),
        Check::at_most("hognose's op (its f64 reference) and they differ by", against_core(&head, &recurrent), 1e-12),
        Check::at_most("steps that forget everything: attention and recurrence differ by", stable, 1e-12),
        Check::at_most(
            format!("a block below the diagonal: singular value {} over the first", N + 1),
            values[N] / values[0],
            1e-12,
        ),
        Check::at_least(format!("and number {N} over the first"), values[N - 1] / values[0], 1e-6),
        Check::at_most("the model: its outputs, and M x + D x from what it read, differ by", off, 1e-4),
    ];
    let text = format!(
        "A head of Mamba-2 decays all its states alike, by one number a_t = exp(Δ_t A) a step:

  S_t = a_t S_(t−1) + x_t ⊗ B_t          y_t = S_t C_t             (x stands for Δ x here)

Written out, y_t = Σ_(s ≤ t) (a_t … a_(s+1)) (C_t · B_s) x_s. So the same map is one matrix product under a mask:

  y = M x,   M = L ∘ (C Bᵀ),   L_ts = a_t … a_(s+1) for s ≤ t, else 0

That is linear attention, without softmax, with C as queries, B as keys and x as values; the mask L says how much is left of step s at \
step t. M is semiseparable: every block below the diagonal has rank N at most ({N} here), since all that passes from the past to the future \
goes through a state of N numbers a channel.

  recurrence    T P N                 step after step
  attention     T² (N + P)            products of matrices, all at once
  chunks        T (P N + Q (N + P))   products inside of chunks of Q, one state from each to the next

All three give the same to {:.0e}. The products of decays in L are taken as exponentials of differences of sums of log a, masked before \
the exponential: so a step that forgets everything is no division by zero.

Every trained model of this kind has such a matrix for each head, whether it looks at it or not: its hidden attention. Here {} reads \
{} tokens. {} looks back {:.1} tokens on average, {} {:.1}. (Mamba-1 has one for every channel: there each state decays by itself.)",
        chunked.max(relative_error(attention.as_slice(), recurrent.as_slice())),
        reading.model,
        reading.pieces.len(),
        near.name,
        near.distance,
        far.name,
        far.distance,
    );
    let milli = |s: f64| json!(1e3 * s);
    let rows = lengths.iter().zip(&times).map(|(l, t)| vec![json!(l), milli(t[0]), milli(t[1]), milli(t[2])]);
    let table = Table {
        title: format!("Milliseconds for a head of width {P} with {N} states (f64, plain, one core)"),
        columns: ["T", "recurrence", "attention", "chunks of 64"].map(String::from).into(),
        rows: rows.collect(),
    };
    let figure = figure(&head, &m, &values, &reading, [near, far]);
    Ok(Explanation { text, checks, tables: vec![table], figure })
}

fn random_head(steps: usize) -> Head {
    let mut random = Random::new(8);
    // Mostly slow, now and then a step that forgets.
    let log_a = (0..steps).map(|t| if t % 19 == 11 { -1.6 } else { -0.12 * random.uniform() }).collect();
    let mut matrix = |cols: usize| DMatrix::from_fn(steps, cols, |_, _| random.normal());
    let (b, c, x) = (matrix(N), matrix(N), matrix(P));
    Head { log_a, b, c, x }
}

/// The reference of the op that models run, on the same head: Δ = −log a, A = −1, and x over Δ.
fn against_core(head: &Head, expected: &DMatrix<f64>) -> f64 {
    let delta: Vec<f64> = head.log_a.iter().map(|a| -a).collect();
    let rows = |m: &DMatrix<f64>| m.transpose().as_slice().to_vec();
    let x: Vec<f64> = rows(&head.x).iter().enumerate().map(|(i, x)| x / delta[i / P]).collect();
    let limits = (0.0, f64::INFINITY);
    let shape = reference::Shape { heads: 1, headdim: P, d_state: N, groups: 1, softplus: false, dt_limit: limits };
    let inputs = reference::Inputs {
        x: &x,
        dt: &delta,
        a: &[-1.0],
        b: &rows(&head.b),
        c: &rows(&head.c),
        d: None,
        z: None,
        dt_bias: None,
        initial_state: None,
        segments: &[0, head.log_a.len()],
    };
    relative_error(&reference::ssd(&shape, &inputs).0, &rows(expected))
}

fn figure(head: &Head, m: &DMatrix<f64>, values: &[f64], reading: &Reading, shown: [&Mixing; 2]) -> Figure {
    let cells = |m: &DMatrix<f64>| -> Vec<Vec<Option<f64>>> {
        (0..m.nrows()).map(|t| (0..m.ncols()).map(|s| (s <= t).then(|| m[(t, s)])).collect()).collect()
    };
    let mask = Heat {
        values: cells(&head.mask(0, T)),
        range: (0.0, 1.0),
        x_label: "from step".into(),
        y_label: "to step".into(),
        square: true,
        blocks: (CHUNK, CHUNK),
        ..Heat::default()
    };
    let range = m.iter().fold(0.0f64, |r, v| r.max(v.abs())).ceil();
    let matrix = Heat { values: cells(m), palette: Palette::Diverging, range: (-range, range), ..mask.clone() };
    let count = 12.min(values.len());
    let ranks = Chart {
        x: Axis::linear("number").from(0.5, count as f64 + 0.5),
        y: Axis::log("singular value").from(1e-20, 3.0),
        series: vec![
            Series::line(
                format!("the lower left quarter of M, N = {N}"),
                0,
                values.iter().take(count).enumerate().map(|(i, v)| ((i + 1) as f64, *v)),
            )
            .mark(Mark::LineDots),
        ],
        legend: Some(Legend::Above),
        bands: vec![(0.5, N as f64 + 0.5)],
        ..Chart::default()
    };
    let words = words(&reading.pieces);
    let hidden = |mixing: &Mixing| {
        // Each token's share of its row: the rows of large outputs would hide the others.
        let row = |t: usize| {
            let largest = (0..=t).map(|s| mixing.m[(t, s)].abs()).fold(f64::MIN_POSITIVE, f64::max);
            (0..mixing.m.ncols()).map(|s| (s <= t).then(|| mixing.m[(t, s)] / largest)).collect()
        };
        let heat = Heat {
            values: (0..mixing.m.nrows()).map(row).collect(),
            palette: Palette::Diverging,
            range: (-1.0, 1.0),
            bar_label: "weight / largest of its row".into(),
            x_label: "looks at".into(),
            x_ticks: words.clone(),
            y_ticks: words.clone(),
            square: true,
            ..Heat::default()
        };
        Panel::heat(format!("{}: {:.1} tokens back", mixing.name, mixing.distance), heat)
    };
    Figure {
        title: "State space duality: a recurrence is a masked linear attention".into(),
        subtitle: format!("above: one head of {T} steps; below: hidden attention of {}", reading.model),
        rows: vec![
            (
                1.0,
                vec![
                    Panel::heat("The mask L: what is left", mask),
                    Panel::heat("M = L ∘ C Bᵀ, y = M x", matrix),
                    Panel::chart("Rank of what passes", ranks),
                ],
            ),
            (1.45, shown.map(hidden).into()),
        ],
    }
}

/// The words of a text of tokens, at the middle of each.
fn words(pieces: &[String]) -> Vec<(usize, String)> {
    let mut words: Vec<(usize, usize, String)> = Vec::new();
    for (t, piece) in pieces.iter().enumerate() {
        let fresh = t == 0 || piece.starts_with(['␣', '⏎', '·']) || pieces[t - 1].ends_with(['␣', '⏎', '·']);
        match words.last_mut().filter(|_| !fresh) {
            Some((_, to, word)) => {
                *to = t;
                word.push_str(piece);
            }
            None => words.push((t, t, piece.clone())),
        }
    }
    let told = words.into_iter().filter(|w| w.2.chars().any(char::is_alphanumeric));
    told.map(|(from, to, word)| (usize::midpoint(from, to), word.replace('␣', ""))).collect()
}
