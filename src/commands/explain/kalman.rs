//! `hognose explain kalman`: the same model with noise; what filter and smoother know of it.

use hognose_plot::{Axis, Chart, Figure, Legend, Mark, Panel, Series};
use hognose_theory::discretise::Method;
use hognose_theory::kalman::{Estimate, Noisy};
use hognose_theory::nalgebra::{DMatrix, DVector};
use hognose_theory::random::Random;
use hognose_theory::ssm::Continuous;
use serde_json::json;

use super::report::{Check, Explanation, Table};
use crate::args::ExplainArgs;

const DELTA: f64 = 0.1;
const STEPS: usize = 160;
/// Steps over which averages are taken.
const LONG: usize = 8000;

/// A run of the system: what was pushed, what happened, what was measured.
struct Run {
    x: Vec<f64>,
    truth: Vec<DVector<f64>>,
    y: Vec<f64>,
}

pub fn explain(_: &ExplainArgs) -> anyhow::Result<Explanation> {
    let spring = Continuous::spring(1.0, 0.3, 2.0)?;
    let (drift, wobble, blur) = (0.02, 0.12, 0.35);
    let system = Noisy {
        model: spring.discretise(Method::ZeroOrderHold, DELTA)?,
        q: DMatrix::from_diagonal(&DVector::from_vec(vec![drift * drift, wobble * wobble])),
        r: blur * blur,
        start: DMatrix::identity(2, 2) * 0.25,
    };
    let run = simulate(&system, STEPS, 21);
    let filtered = system.filter(&run.x, &run.y)?;
    let smoothed = system.smooth(&filtered)?;
    let noiseless = open_loop(&system, &run.x);

    let long = simulate(&system, LONG, 4);
    let long_filter = system.filter(&long.x, &long.y)?;
    let long_smooth = system.smooth(&long_filter)?;
    let long_open = open_loop(&system, &long.x);
    let rmse = |found: &dyn Fn(usize) -> f64, part: usize| {
        ((0..LONG).map(|k| (found(k) - long.truth[k][part]).powi(2)).sum::<f64>() / LONG as f64).sqrt()
    };
    let position = [
        rmse(&|k| long_open[k][0], 0),
        rmse(&|k| long.y[k], 0),
        rmse(&|k| long_filter.updated[k].mean[0], 0),
        rmse(&|k| long_smooth[k].mean[0], 0),
    ];
    let velocity = [
        rmse(&|k| long_open[k][1], 1),
        rmse(&|k| long_filter.updated[k].mean[1], 1),
        rmse(&|k| long_smooth[k].mean[1], 1),
    ];
    let inside = |estimates: &[Estimate]| {
        let held =
            (0..LONG).filter(|&k| (estimates[k].mean[0] - long.truth[k][0]).abs() < 2.0 * deviation(&estimates[k], 0));
        held.count() as f64 / LONG as f64
    };
    let surprise = long_filter.surprise.iter().sum::<f64>() / LONG as f64;
    let short = 40;
    let likeliest = system.likeliest(&run.x[..short], &run.y[..short])?;
    let short_filter = system.filter(&run.x[..short], &run.y[..short])?;
    let short_smooth = system.smooth(&short_filter)?;
    let off = |estimates: &[Estimate], k: usize| (&estimates[k].mean - &likeliest[k]).amax();
    let (gain, after) = system.steady_gain()?;
    let riccati = {
        // One more step must change nothing.
        let a = &system.model.a;
        let before = a * &after * a.transpose() + &system.q;
        let c = &system.model.c;
        let again = &before - &before * c * c.transpose() * &before / (c.dot(&(&before * c)) + system.r);
        (again - &after).amax()
    };
    let deaf = Noisy { r: 1e18, ..system.clone() };
    let deaf_states = deaf.filter(&run.x, &run.y)?;
    let deaf_off = (0..STEPS).map(|k| (&deaf_states.updated[k].mean - &noiseless[k]).amax()).fold(0.0, f64::max);
    let normal = 0.9545;
    let checks = vec![
        Check::at_most(
            format!("smoother and the likeliest {short} states (least squares) differ by"),
            (0..short).map(|k| off(&short_smooth, k)).fold(0.0, f64::max),
            1e-10,
        ),
        Check::at_most("filter and they differ at the last step by", off(&short_filter.updated, short - 1), 1e-10),
        Check::at_most("the settled filter solves the Riccati equation, up to", riccati, 1e-12),
        Check::at_most("a filter that trusts no measurement is the noiseless model, up to", deaf_off, 1e-12),
        Check::at_most(
            format!("squared surprise over its variance, mean of {LONG} steps, off 1 by"),
            (surprise - 1.0).abs(),
            0.06,
        ),
        Check::at_most(
            "share of true positions within 2σ of the filter, off 95.45 % by",
            (inside(&long_filter.updated) - normal).abs(),
            0.02,
        ),
        Check::at_most("the same of the smoother", (inside(&long_smooth) - normal).abs(), 0.02),
        Check::at_most("error of the filter over that of the measurements", position[2] / position[1], 0.9),
        Check::at_most("error of the smoother over that of the filter", position[3] / position[2], 0.95),
    ];
    let text = format!(
        "Control theory asks more of the same model: the state is disturbed, and only seen through noise.

  h_k = Ā h_(k−1) + B̄ x_k + w_k,  w ~ N(0, Q)          y_k = C h_k + v_k,  v ~ N(0, R)

The Kalman filter keeps the mean and the covariance P of what can be known of h_k from y_1 … y_k:

  predict   h⁻ = Ā h + B̄ x_k            P⁻ = Ā P Āᵀ + Q
  update    K = P⁻ Cᵀ (C P⁻ Cᵀ + R)⁻¹   h = h⁻ + K (y_k − C h⁻)    P = (I − K C) P⁻

The Rauch–Tung–Striebel smoother walks back and adds what came after; it finds the likeliest path of all. (Both here with \
the input visible at once, as in the rest of hognose.)

The gain settles, here at K = ({:.3}, {:.3}). From then on the filter is itself a linear time-invariant state space model with the \
inputs x and y, and the transition (I − K C) Ā. Trust no measurement, and it is the noiseless model, which never \
learns of a disturbance.

A mass on a spring, {LONG} steps. Error (RMSE) of the position: noiseless model {:.3}, measurements alone {:.3}, filter {:.3}, \
smoother {:.3}. Of the velocity, which nobody measures: {:.3}, filter {:.3}, smoother {:.3}.",
        gain[0], gain[1], position[0], position[1], position[2], position[3], velocity[0], velocity[1], velocity[2],
    );
    let rows = vec![
        vec![json!("noiseless model"), json!(position[0]), json!(velocity[0])],
        vec![json!("measurements alone"), json!(position[1]), json!(null)],
        vec![json!("filter"), json!(position[2]), json!(velocity[1])],
        vec![json!("smoother"), json!(position[3]), json!(velocity[2])],
    ];
    let table = Table {
        title: format!("RMSE over {LONG} steps"),
        columns: ["estimate", "position", "velocity"].map(String::from).into(),
        rows,
    };
    let figure = figure(&run, &noiseless, &filtered.updated, &smoothed, &position);
    Ok(Explanation { text, checks, tables: vec![table], figure })
}

fn figure(run: &Run, noiseless: &[DVector<f64>], filter: &[Estimate], smooth: &[Estimate], rmse: &[f64; 4]) -> Figure {
    let time = |k: usize| (k + 1) as f64 * DELTA;
    let curve = |value: &dyn Fn(usize) -> f64| (0..STEPS).map(|k| (time(k), value(k))).collect::<Vec<_>>();
    let band = |estimates: &[Estimate], part: usize| {
        let edge =
            |k: usize, sign: f64| (time(k), estimates[k].mean[part] + sign * 2.0 * deviation(&estimates[k], part));
        let upper = (0..STEPS).map(|k| edge(k, 1.0));
        upper.chain((0..STEPS).rev().map(|k| edge(k, -1.0))).collect::<Vec<_>>()
    };
    let states = |part: usize, label: &str| {
        let mut series = vec![
            Series::line("smoother ± 2σ", 2, band(smooth, part)).mark(Mark::Area),
            Series::line("noiseless model", 4, curve(&|k| noiseless[k][part])).mark(Mark::Dashed),
            Series::line("truth", 6, curve(&|k| run.truth[k][part])),
            Series::line("filter", 0, curve(&|k| filter[k].mean[part])),
            Series::line("smoother", 2, curve(&|k| smooth[k].mean[part])),
        ];
        if part == 0 {
            series.insert(1, Series::line("measured", 1, curve(&|k| run.y[k])).mark(Mark::Dots));
        }
        Chart {
            x: Axis::linear("time in s").from(0.0, DELTA * STEPS as f64),
            y: Axis::linear(label),
            series,
            legend: Some(Legend::Above),
            ..Chart::default()
        }
    };
    let knowledge = Chart {
        x: Axis::linear("time in s").from(0.0, DELTA * STEPS as f64),
        y: Axis::linear("σ of the position").from(0.0, 0.32),
        series: vec![
            Series::line("filter", 0, curve(&|k| deviation(&filter[k], 0))),
            Series::line("smoother", 2, curve(&|k| deviation(&smooth[k], 0))),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let names = ["noiseless", "measured", "filter", "smoother"];
    let bar = |(i, color): (usize, usize)| Series::line("", color, [(i as f64, rmse[i])]).mark(Mark::Bars(2.0));
    let bars = Chart {
        x: Axis::linear("").from(-0.6, 3.6).ticks(names.iter().enumerate().map(|(i, n)| (i as f64, (*n).to_string()))),
        y: Axis::linear("RMSE of the position"),
        series: [4, 1, 0, 2].into_iter().enumerate().map(bar).collect(),
        ..Chart::default()
    };
    Figure {
        title: "A state space model with noise: Kalman filter and smoother".into(),
        subtitle: "a mass on a spring is disturbed and seen through noise; the filter knows the past, the smoother also what came after".into(),
        rows: vec![
            (1.15, vec![Panel::chart("Position", states(0, "position"))]),
            (
                1.0,
                vec![
                    Panel::chart("Velocity, which nobody measures", states(1, "velocity")).weight(1.5),
                    Panel::chart("What they think they know", knowledge),
                    Panel::chart(format!("Error over {LONG} steps"), bars).weight(1.1),
                ],
            ),
        ],
    }
}

fn deviation(estimate: &Estimate, part: usize) -> f64 {
    estimate.covariance[(part, part)].sqrt()
}

fn simulate(system: &Noisy, steps: usize, seed: u64) -> Run {
    let mut random = Random::new(seed);
    let mut noise = |covariance: &DMatrix<f64>| DVector::from_fn(2, |i, _| covariance[(i, i)].sqrt() * random.normal());
    let mut h = noise(&system.start);
    let x: Vec<f64> = (0..steps).map(|k| if (30..55).contains(&(k % 160)) { 3.0 } else { 0.0 }).collect();
    let truth: Vec<DVector<f64>> = x
        .iter()
        .map(|x| {
            h = &system.model.a * &h + &system.model.b * *x + noise(&system.q);
            h.clone()
        })
        .collect();
    let y = truth.iter().map(|h| system.model.c.dot(h) + system.r.sqrt() * random.normal()).collect();
    Run { x, truth, y }
}

/// The states of the model without noise, from rest.
fn open_loop(system: &Noisy, x: &[f64]) -> Vec<DVector<f64>> {
    let mut h = system.model.rest();
    x.iter()
        .map(|x| {
            system.model.step(&mut h, *x);
            h.clone()
        })
        .collect()
}
