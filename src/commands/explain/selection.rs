//! `hognose explain selection`: what Δ does, in a trained model and by itself.

use hognose_core::ops::selective_scan::Discretisation;
use hognose_core::ops::selective_scan::reference::{Operands, selective_scan};
use hognose_plot::{Axis, Chart, Figure, Heat, Legend, Mark, Palette, Panel, Series};
use hognose_theory::random::Random;
use hognose_theory::relative_error;
use serde_json::json;

use super::look::{Layer, Reading, read};
use super::report::{Check, Explanation, Table, short};
use crate::args::ExplainArgs;

const TEXT: &str =
    "The captain said: \"We sail at dawn.\" Nobody spoke. The old whale rose, white as snow, beside the ship.";
/// Rows of the heat map at most: beyond, a row is the mean of a layer.
const ROWS: usize = 48;
/// Steps of the small examples.
const STEPS: usize = 60;

/// Kinds of tokens, by what they look like.
const KINDS: [&str; 5] = ["space", "new word", "first letter", "inside", "punctuation"];

/// A row of the heat map: log₂ of Δ over its median, token by token.
struct Row {
    name: String,
    relative: Vec<f64>,
}

pub fn explain(args: &ExplainArgs) -> anyhow::Result<Explanation> {
    let reading = read(args, TEXT)?;
    let rows = rows(&reading.layers);
    let kinds = kinds(&reading.pieces);
    // The row that tells kinds of tokens apart best: whose means by kind are spread most.
    let means = |row: &Row| -> Vec<Option<f64>> {
        let mean = |kind: usize| {
            let of: Vec<f64> =
                kinds.iter().zip(&row.relative).filter(|(k, _)| **k == Some(kind)).map(|(_, v)| *v).collect();
            (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
        };
        (0..KINDS.len()).map(mean).collect()
    };
    let spread = |row: &Row| {
        let found: Vec<f64> = means(row).into_iter().flatten().collect();
        found.iter().copied().fold(f64::NEG_INFINITY, f64::max) - found.iter().copied().fold(f64::INFINITY, f64::min)
    };
    let chosen = rows.iter().max_by(|a, b| spread(a).total_cmp(&spread(b))).expect("a model has layers");
    let by_kind = means(chosen);

    // The gate theorem, through the reference of the op that models run.
    let mut random = Random::new(12);
    let x: Vec<f64> = (0..STEPS).map(|k| (k as f64 / 5.0).sin() + 0.4 * random.normal()).collect();
    let raw: Vec<f64> = (0..STEPS).map(|k| if k % 20 < 10 { -3.0 } else { 1.0 } + random.normal()).collect();
    let (one, minus) = (vec![1.0; STEPS], [-1.0]);
    let through_s6 = scalar_s6(&x, &raw, &one, &minus, Discretisation::Zoh);
    let gates: Vec<f64> = raw.iter().map(|r| 1.0 / (1.0 + (-r).exp())).collect();
    let mut h = 0.0;
    let gated: Vec<f64> = x
        .iter()
        .zip(&gates)
        .map(|(x, g)| {
            h = (1.0 - g) * h + g * x;
            h
        })
        .collect();
    // A state that starts at 1 decays by exp(−Δ): with x = 0 a step gives exp(−softplus(0.7)).
    let decayed = decay(0.7);

    // Two pasts, then a step with a large Δ, or with a small one.
    let reset = STEPS / 2;
    let (here, there): (Vec<f64>, Vec<f64>) = (0..STEPS)
        .map(|k| {
            if k < reset {
                (1.0 + (k as f64 / 4.0).sin(), -1.0)
            } else {
                ((k as f64 / 6.0).cos() * 0.6, (k as f64 / 6.0).cos() * 0.6)
            }
        })
        .unzip();
    let with = |at: f64| -> Vec<f64> { (0..STEPS).map(|k| if k == reset { at } else { -2.0 }).collect() };
    let run = |x: &[f64], at: f64| scalar_s6(x, &with(at), &one, &minus, Discretisation::Zoh);
    let (large, small) = (30.0, -30.0);
    let pasts = [run(&here, large), run(&there, large), run(&here, small)];
    let apart = |a: &[f64], b: &[f64], k: usize| (a[k] - b[k]).abs();
    let others =
        run(&here.iter().enumerate().map(|(k, x)| if k == reset { x + 100.0 } else { *x }).collect::<Vec<_>>(), small);

    let (mut off, mut smallest) = (0.0f64, f64::INFINITY);
    for layer in &reading.layers {
        for unit in (0..layer.units).step_by(layer.units.div_ceil(8)) {
            off = off.max(layer.off(unit, &layer.attention(unit)));
        }
        smallest = layer.delta.iter().copied().fold(smallest, f64::min);
    }
    let checks = vec![
        Check::at_most(
            "N = 1, A = −1, B = 1, zero-order hold: S6 and h = (1 − g) h + g x differ by",
            relative_error(&through_s6, &gated),
            1e-12,
        ),
        Check::at_most("exp(−softplus(0.7)), against 0.3318122278", (decayed - 0.331_812_227_8).abs(), 1e-10),
        Check::at_least("two pasts before a large Δ are apart by", apart(&pasts[0], &pasts[1], reset - 1), 0.1),
        Check::at_most(format!("and at it, Δ = {large}, by"), apart(&pasts[0], &pasts[1], reset), 1e-12),
        Check::at_most(
            "an input 100 larger at a step with Δ = e⁻³⁰ changes the state by",
            apart(&pasts[2], &others, reset),
            1e-10,
        ),
        Check::at_least("the model: smallest Δ", smallest, f64::MIN_POSITIVE),
        Check::at_most("the model: its outputs, and those worked out from these Δ, differ by", off, 1e-4),
    ];

    let strongest = |sign: f64| {
        let best = chosen.relative.iter().enumerate().max_by(|a, b| (sign * a.1).total_cmp(&(sign * b.1)));
        best.map_or(("", 0.0), |(t, v)| (reading.pieces[t].as_str(), *v))
    };
    let (opened, closed) = (strongest(1.0), strongest(-1.0));
    let text = format!(
        "A linear time-invariant model treats all tokens alike. S6 lets the step Δ depend on the token (and B and C, too), while A stays:

  h_t = exp(Δ_t A) h_(t−1) + Δ_t B_t x_t         Δ_t = softplus(W x_t + bias)

What Δ means is exact in the smallest case. With N = 1, A = −1, B = 1 and the zero-order hold (theorem 1 of the Mamba paper):

  g_t = σ(W x_t + bias)            h_t = (1 − g_t) h_(t−1) + g_t x_t

So Δ is the gate of a recurrent network: σ(z) = 1 − exp(−softplus(z)), and exp(−softplus(0.7)) = {decayed:.10}. A large Δ forgets the past and \
takes the input: after it two different pasts are {:.0e} apart. A Δ near 0 leaves the state alone and ignores the input. \
Nothing here is an attention score or a nonlinearity on the state: S6 is linear in h; selection acts through Δ, B and C alone.

Below, {} reads {} tokens. In each {} Δ is shown over its median; in {} Δ rises to {} times it at \"{}\" and falls to {} times it at \"{}\".",
        apart(&pasts[0], &pasts[1], reset),
        reading.model,
        reading.pieces.len(),
        if rows.len() > reading.layers.len() { reading.layers[0].unit() } else { "layer (mean of the logarithms)" },
        chosen.name,
        short(opened.1.exp2()),
        opened.0,
        short(closed.1.exp2()),
        closed.0,
    );
    let kind_rows = KINDS.iter().zip(&by_kind).enumerate().filter_map(|(i, (kind, mean))| {
        let count = kinds.iter().filter(|k| **k == Some(i)).count();
        mean.map(|m| vec![json!(kind), json!(count), json!(m.exp2())])
    });
    let table = Table {
        title: format!("Δ over its median by kind of token, in {}", chosen.name),
        columns: ["token", "how many", "Δ / median"].map(String::from).into(),
        rows: kind_rows.collect(),
    };
    let examples = [&through_s6, &gated, &gates];
    let figure = figure(&reading, &rows, chosen, &by_kind, examples, &pasts, reset);
    Ok(Explanation { text, checks, tables: vec![table], figure })
}

fn rows(layers: &[Layer]) -> Vec<Row> {
    let units: usize = layers.iter().map(|l| l.units).sum();
    let relative = |layer: &Layer, unit: usize| -> Vec<f64> {
        let deltas = layer.deltas(unit);
        let mut sorted = deltas.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[sorted.len() / 2].max(f64::MIN_POSITIVE);
        deltas.iter().map(|d| (d.max(f64::MIN_POSITIVE) / median).log2()).collect()
    };
    let mut rows = Vec::new();
    for layer in layers {
        let number = layer.number + 1;
        if units <= ROWS {
            let row = |unit| Row {
                name: format!("layer {number}, {} {}", layer.unit(), unit + 1),
                relative: relative(layer, unit),
            };
            rows.extend((0..layer.units).map(row));
        } else {
            let mut mean = vec![0.0; layer.steps()];
            for unit in 0..layer.units {
                mean.iter_mut().zip(relative(layer, unit)).for_each(|(m, v)| *m += v / layer.units as f64);
            }
            rows.push(Row { name: format!("layer {number}"), relative: mean });
        }
    }
    rows
}

/// The kind of each token; `None` for what stands before the text.
fn kinds(pieces: &[String]) -> Vec<Option<usize>> {
    let letter = |piece: &str| piece.chars().next_back().is_some_and(char::is_alphanumeric);
    let kind = |t: usize| {
        let piece = pieces[t].as_str();
        let blank = |c: char| c == '␣' || c == '⏎';
        Some(match piece {
            "·" => return None,
            p if p.chars().all(blank) => 0,
            p if p.starts_with(blank) && letter(p) => 1,
            p if letter(p) && !(t > 0 && letter(&pieces[t - 1])) => 2,
            p if letter(p) => 3,
            _ => 4,
        })
    };
    (0..pieces.len()).map(kind).collect()
}

/// One channel with one state: y = h, from rest; B of each step given.
fn scalar_s6(x: &[f64], raw: &[f64], b: &[f64], a: &[f64], discretisation: Discretisation) -> Vec<f64> {
    let whole = 0..x.len();
    let operands = Operands {
        channels: 1,
        d_state: 1,
        groups: 1,
        x,
        dt: raw,
        a,
        b,
        c: &vec![1.0; x.len()],
        d: None,
        z: None,
        dt_bias: None,
        initial_state: None,
        segments: std::slice::from_ref(&whole),
        softplus: true,
        discretisation,
    };
    selective_scan(&operands).0
}

/// What is left of a state 1 after a step without input, with A = −1 and Δ = softplus(raw).
fn decay(raw: f64) -> f64 {
    let first = scalar_s6(&[1.0, 0.0], &[0.0, raw], &[1.0, 1.0], &[-1.0], Discretisation::Zoh);
    first[1] / first[0]
}

fn figure(
    reading: &Reading,
    rows: &[Row],
    chosen: &Row,
    by_kind: &[Option<f64>],
    [through_s6, gated, gates]: [&Vec<f64>; 3],
    pasts: &[Vec<f64>; 3],
    reset: usize,
) -> Figure {
    let per_layer = rows.len() / reading.layers.len();
    let tick = |(i, layer): (usize, &Layer)| (i * per_layer + per_layer / 2, format!("layer {}", layer.number + 1));
    let heat = Heat {
        values: rows.iter().map(|row| row.relative.iter().map(|v| Some(*v)).collect()).collect(),
        palette: Palette::Diverging,
        range: (-2.0, 2.0),
        bar_label: "log₂ (Δ / its median)".into(),
        x_ticks: reading.pieces.iter().cloned().enumerate().collect(),
        y_ticks: reading.layers.iter().enumerate().map(tick).collect(),
        blocks: (if per_layer > 1 { per_layer } else { 0 }, 0),
        ..Heat::default()
    };
    let curve = |y: &[f64]| y.iter().enumerate().map(|(k, y)| (k as f64, *y)).collect::<Vec<_>>();
    let present: Vec<(usize, f64)> = by_kind.iter().enumerate().filter_map(|(i, m)| Some((i, (*m)?))).collect();
    let bar = |(at, (_, mean)): (usize, &(usize, f64))| {
        Series::line("", if *mean > 0.0 { 0 } else { 1 }, [(at as f64, *mean)]).mark(Mark::Bars(1.4))
    };
    let by_kind = Chart {
        x: Axis::linear("")
            .from(-0.6, present.len() as f64 - 0.4)
            .ticks(present.iter().enumerate().map(|(at, (i, _))| (at as f64, KINDS[*i].to_string()))),
        y: Axis::linear("log₂ (Δ / its median)"),
        series: present.iter().enumerate().map(bar).collect(),
        ..Chart::default()
    };
    let theorem = Chart {
        x: Axis::linear("step"),
        y: Axis::linear(""),
        series: vec![
            Series::line("gate g", 3, curve(gates)).mark(Mark::Faint),
            Series::line("(1 − g) h + g x", 0, curve(gated)),
            Series::line("S6", 1, curve(through_s6)).mark(Mark::Dots),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let forgets = Chart {
        x: Axis::linear("step"),
        y: Axis::linear("h"),
        series: vec![
            Series::line("one past", 0, curve(&pasts[0])),
            Series::line("another", 1, curve(&pasts[1])),
            Series::line("the first, Δ near 0", 2, curve(&pasts[2])).mark(Mark::Dashed),
        ],
        legend: Some(Legend::Above),
        bands: vec![(reset as f64 - 0.5, reset as f64 + 0.5)],
        ..Chart::default()
    };
    Figure {
        title: "Selection: the step Δ depends on the token".into(),
        subtitle: format!(
            "{} reads a text; blue: the state turns to this token; red: it keeps what it has",
            reading.model
        ),
        rows: vec![
            (1.15, vec![Panel::heat("Δ, token by token", heat)]),
            (
                1.0,
                vec![
                    Panel::chart(format!("By kind of token: {}", chosen.name), by_kind).weight(1.1),
                    Panel::chart("N = 1: Δ is a gate", theorem),
                    Panel::chart(format!("A large Δ at step {reset} forgets"), forgets),
                ],
            ),
        ],
    }
}
