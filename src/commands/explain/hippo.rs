//! `hognose explain hippo`: states that remember functions.

use hognose_plot::{Axis, Chart, Figure, Heat, Mark, Palette, Panel, Series};
use hognose_theory::hippo::{Measure, Memory};
use hognose_theory::{relative_error, relative_rmse};
use serde_json::json;

use super::report::{Check, Explanation, Table, percent};
use crate::args::ExplainArgs;

/// Samples of the signal.
const LENGTH: usize = 1024;
/// Numbers in the state.
const STATES: usize = 64;
/// Samples between two measurements of the error.
const EVERY: usize = 32;

/// A memory and by what its recollection is judged.
struct Case {
    name: &'static str,
    memory: Memory,
    /// The last so many samples.
    span: usize,
    /// Weight e^(−age/width) of a sample, where the measure has one.
    width: f64,
    /// What it recalls at the end, oldest first.
    recalled: Vec<f64>,
    /// (samples seen, relative error).
    errors: Vec<(f64, f64)>,
    /// The state after every sample.
    states: Vec<Vec<f64>>,
}

pub fn explain(_: &ExplainArgs) -> anyhow::Result<Explanation> {
    let signal: Vec<f64> = (0..LENGTH).map(|k| wave((k as f64 + 0.5) / LENGTH as f64)).collect();
    let (window, decay) = (LENGTH / 2, LENGTH as f64 / 4.0);
    let invariant = |measure, width| Memory::invariant(measure, STATES, width);
    // A constant and pairs of sine and cosine: an odd number.
    let fourier = Memory::invariant(Measure::FouT, STATES - 1, window as f64)?;
    let mut cases = vec![
        case("LegS, all alike", Memory::scaled(STATES)?, LENGTH, f64::INFINITY),
        case("LegS, decaying", invariant(Measure::LegS, decay)?, LENGTH, decay),
        case("LegT", invariant(Measure::LegT, window as f64)?, window, f64::INFINITY),
        case("FouT", fourier, window, f64::INFINITY),
        case("LagT", invariant(Measure::LagT, 6.0)?, window, f64::INFINITY),
        case("a random matrix", invariant(Measure::Random(7), 32.0)?, window, f64::INFINITY),
    ];
    for case in &mut cases {
        case.listen(&signal)?;
    }
    let last = |i: usize| cases[i].errors.last().map_or(f64::NAN, |e| e.1);

    let (a, b) = Measure::LegS.transition(4)?;
    let published = [
        -1.0, 0.0, 0.0, 0.0, -1.732_051, -2.0, 0.0, 0.0, -2.236_068, -3.872_983, -3.0, 0.0, -2.645_751, -4.582_576,
        -5.916_080, -4.0,
    ];
    let rows: Vec<f64> = a.transpose().iter().copied().collect();
    let off_matrix = rows.iter().zip(published).map(|(a, p)| (a - p).abs()).fold(0.0, f64::max);
    let off_vector =
        b.iter().zip([1.0, 1.732_051, 2.236_068, 2.645_751]).map(|(b, p)| (b - p).abs()).fold(0.0, f64::max);
    let response = |measure: Measure, weight: &dyn Fn(f64) -> f64| -> anyhow::Result<f64> {
        let (a, b) = measure.transition(12)?;
        let mut worst: f64 = 0.0;
        for u in [0.0, 0.2, 1.0, 3.0] {
            let found: Vec<f64> = ((&a * u).exp() * &b).iter().copied().collect();
            let expected: Vec<f64> = measure.basis(12, u).iter().map(|v| v * weight(u)).collect();
            worst = worst.max(relative_error(&found, &expected));
        }
        Ok(worst)
    };
    let stable = {
        let mut largest = f64::NEG_INFINITY;
        for measure in [Measure::LegS, Measure::LegT, Measure::LagT, Measure::FouT] {
            let (a, _) = measure.transition(16)?;
            largest = a.complex_eigenvalues().iter().map(|e| e.re).fold(largest, f64::max);
        }
        largest
    };
    let checks = vec![
        Check::at_most("LegS, N = 4: A and B against the published numbers", off_matrix.max(off_vector), 5e-7),
        Check::at_most(
            "exp(uA) B of LegS is its basis times exp(−u), up to",
            response(Measure::LegS, &|u| (-u).exp())?,
            1e-10,
        ),
        Check::at_most("exp(uA) B of LagT is its basis, up to", response(Measure::LagT, &|_| 1.0)?, 1e-10),
        Check::at_most("largest real part of an eigenvalue of any measure, N = 16", stable, 1e-9),
        Check::at_most(format!("LegS over all {LENGTH} samples: relative RMSE"), last(0), 0.04),
        Check::at_most("LegS, decaying: weighted relative RMSE", last(1), 0.05),
        Check::at_most(format!("LegT over its window of {window}: relative RMSE"), last(2), 0.02),
        Check::at_most("FouT over its window: relative RMSE", last(3), 0.2),
        Check::at_least(
            "the random matrix is worse than LegT in the same window, by the factor",
            last(5) / last(2),
            5.0,
        ),
    ];
    let text = format!(
        "HiPPO (high-order polynomial projection operators) asks: which N numbers say most about everything heard so far, and how do they \
         change with the next sample? If the state c holds the coefficients of the past in a basis that is orthonormal under some \
         measure, it obeys a linear differential equation, whose matrices follow from measure and basis:

  c'(t) = A c(t) + B f(t)                  f(t − u) ≈ Σ c_n(t) · basis_n(u)

  LegS   A_nk = −{{ √((2n+1)(2k+1)) for n > k;  n+1 for n = k;  0 for n < k }}    B_n = √(2n+1)

LegS comes with two dynamics. c' = (1/t)(A c + B f) weighs the whole past alike, however long: no time scale is built in. \
c' = A c + B f, which S4 uses, weighs it by exp(−age). LegT and FouT remember a sliding window, by Legendre polynomials and \
Fourier series (whose ends must meet, hence its error at a window's ends); LagT by Laguerre functions.

Below, states of {STATES} numbers listen to {LENGTH} samples. At the end LegS gives back all of them with a relative error of {}, the \
decaying one {} under its weight; of the last {window}, LegT errs by {}, FouT by {}, LagT by {}. A random stable matrix of the same size, \
read out as well as possible, errs by {} there: it is the matrix that remembers, not the number of states.",
        percent(last(0)),
        percent(last(1)),
        percent(last(2)),
        percent(last(3)),
        percent(last(4)),
        percent(last(5)),
    );
    let rows = cases.iter().map(|case| {
        let judged = if case.width.is_finite() {
            format!("all, weight exp(−age/{})", case.width)
        } else if case.span == LENGTH {
            "all".into()
        } else {
            format!("the last {}", case.span)
        };
        vec![json!(case.name), json!(judged), json!(case.errors.last().map(|e| e.1))]
    });
    let table = Table {
        title: format!("Relative RMSE after {LENGTH} samples, {STATES} states"),
        columns: ["memory", "samples", "error"].map(String::from).into(),
        rows: rows.collect(),
    };
    Ok(Explanation { text, checks, tables: vec![table], figure: figure(&cases, &signal) })
}

fn figure(cases: &[Case], signal: &[f64]) -> Figure {
    let points = |y: &[f64]| y.iter().enumerate().map(|(k, y)| (k as f64, *y)).collect::<Vec<_>>();
    let remembered = |(i, case): (usize, &Case)| {
        let from = signal.len() - case.recalled.len();
        let recalled = case.recalled.iter().enumerate().map(|(k, y)| ((from + k) as f64, *y));
        let error = case.errors.last().map_or(f64::NAN, |e| e.1);
        let chart = Chart {
            x: Axis::linear(if i < 3 { "" } else { "sample" }),
            y: Axis::linear("").from(-3.6, 3.6),
            series: vec![Series::line("", 6, points(signal)).mark(Mark::Faint), Series::line("", i, recalled)],
            ..Chart::default()
        };
        Panel::chart(format!("{}: {} off", case.name, percent(error)), chart)
    };
    let coefficients = |case: &Case, title: &str| {
        let columns: Vec<&Vec<f64>> = case.states.iter().step_by(4).collect();
        let row = |n: usize| columns.iter().map(|c| Some(c[n].signum() * c[n].abs().sqrt())).collect();
        let tick = |at: usize| (at / 4, at.to_string());
        Panel::heat(
            title,
            Heat {
                values: (0..STATES).map(row).collect(),
                palette: Palette::Diverging,
                range: (-1.0, 1.0),
                bar_label: "√|c|, signed".into(),
                x_label: "sample".into(),
                y_label: "n".into(),
                x_ticks: [256, 512, 768].map(tick).into(),
                y_ticks: [0, 20, 40, 60].map(|n| (n, n.to_string())).into(),
                ..Heat::default()
            },
        )
    };
    let errors = Chart {
        x: Axis::linear("samples heard").from(0.0, LENGTH as f64),
        y: Axis::log("relative RMSE").from(1e-5, 2.0),
        series: cases.iter().enumerate().map(|(i, c)| Series::line("", i, c.errors.clone())).collect(),
        ..Chart::default()
    };
    let mut panels: Vec<Panel> = cases.iter().enumerate().map(remembered).collect();
    let lower = panels.split_off(3);
    Figure {
        title: format!("HiPPO: {STATES} numbers that remember a function, updated sample by sample"),
        subtitle: "grey: what was heard; in colour: what the last state tells of it, and by how much (relative RMSE) that is off".into(),
        rows: vec![
            (1.0, panels),
            (1.0, lower),
            (
                1.25,
                vec![
                    coefficients(&cases[0], "State over time: LegS, all alike"),
                    coefficients(&cases[2], "State over time: LegT"),
                    Panel::chart("Error over time (colours as above)", errors),
                ],
            ),
        ],
    }
}

fn case(name: &'static str, memory: Memory, span: usize, width: f64) -> Case {
    Case { name, memory, span, width, recalled: Vec::new(), errors: Vec::new(), states: Vec::new() }
}

impl Case {
    fn listen(&mut self, signal: &[f64]) -> anyhow::Result<()> {
        for (k, &f) in signal.iter().enumerate() {
            self.memory.push(f)?;
            self.states.push(self.memory.coefficients().iter().copied().collect());
            let seen = k + 1;
            if seen % EVERY == 0 {
                let span = self.span.min(seen);
                // What a matrix without a basis recalls depends on how far back it is asked.
                self.recalled = self.memory.recall(seen).split_off(seen - span);
                // Weighted as the measure weighs.
                let weigh = |y: &[f64]| -> Vec<f64> {
                    y.iter().rev().enumerate().map(|(age, y)| y * (-(age as f64) / self.width / 2.0).exp()).collect()
                };
                let error = relative_rmse(&weigh(&self.recalled), &weigh(&signal[seen - span..seen]));
                self.errors.push((seen as f64, error));
            }
        }
        Ok(())
    }
}

/// Eight harmonics.
fn wave(t: f64) -> f64 {
    let harmonic = |k: u32| {
        let k = f64::from(k);
        (std::f64::consts::TAU * k * t + 0.7 * k * k).sin() / k.sqrt()
    };
    (1..=8).map(harmonic).sum()
}
