//! `hognose explain zoh`: from a differential equation to steps, and what each way costs in accuracy.

use hognose_plot::{Axis, Chart, Figure, Legend, Mark, Panel, Series};
use hognose_theory::discretise::{Method, dense, scalar};
use hognose_theory::nalgebra::{DMatrix, DVector};
use serde_json::json;

use super::report::{Check, Explanation, Table};
use crate::args::ExplainArgs;

// The equation h' = A h + B x.
const A: f64 = -3.0;
const B: f64 = 1.0;
/// Frequency of the smooth input sin(ωt).
const OMEGA: f64 = 4.0;
/// Seconds over which errors are taken.
const END: f64 = 2.0;

const METHODS: [(&str, Method); 5] = [
    ("zero-order hold", Method::ZeroOrderHold),
    ("bilinear", Method::BILINEAR),
    ("forward Euler", Method::EULER),
    ("backward Euler", Method::BACKWARD_EULER),
    ("Mamba: exp(ΔA), ΔB", Method::Mamba),
];

pub fn explain(_: &ExplainArgs) -> anyhow::Result<Explanation> {
    let hold = step(Method::ZeroOrderHold, 0.1)?;
    let bilinear = step(Method::BILINEAR, 0.1)?;
    let euler = step(Method::EULER, 0.1)?;
    let sizes: Vec<f64> = (2..=14).map(|i| END / f64::from(1 << i)).collect();
    let errors = |input: Input| -> anyhow::Result<Vec<Vec<f64>>> {
        METHODS.iter().map(|m| sizes.iter().map(|&d| error(m.1, d, input)).collect()).collect()
    };
    let (constant, smooth) = (errors(Input::Constant)?, errors(Input::Smooth)?);
    let mean: Vec<f64> =
        sizes.iter().map(|&d| error(Method::BILINEAR, d, Input::SmoothMean)).collect::<anyhow::Result<_>>()?;
    // The exponent with which an error falls, at the smallest steps.
    let order = |errors: &[f64]| (errors[errors.len() - 3] / errors[errors.len() - 1]).log2() / 2.0;

    let off = |value: f64, expected: f64| (value - expected).abs();
    let limit = scalar(Method::ZeroOrderHold, 0.0.into(), B.into(), 0.1)?.1.re;
    let dense_hold = {
        let (a, b) = (DMatrix::from_element(1, 1, A), DVector::from_element(1, B));
        let (a, b) = dense(Method::ZeroOrderHold, &a, &b, 0.1)?;
        off(a[(0, 0)], hold.0).max(off(b[0], hold.1))
    };
    let checks = vec![
        Check::at_most(
            "Ā and B̄ of the hold, against 0.7408182207 and 0.0863939264",
            off(hold.0, 0.740_818_220_7).max(off(hold.1, 0.086_393_926_4)),
            1e-10,
        ),
        Check::at_most(
            "the same, bilinear, against 0.7391304348 and 0.0869565217",
            off(bilinear.0, 0.739_130_434_8).max(off(bilinear.1, 0.086_956_521_7)),
            1e-10,
        ),
        Check::at_most("the hold through the matrix exponential and by the formula differ by", dense_hold, 1e-15),
        Check::at_most("B̄ of the hold at A = 0, against its limit ΔB", off(limit, 0.1 * B), 1e-15),
        Check::at_most(
            "constant input: the largest error of the hold at any step",
            constant[0].iter().copied().fold(0.0, f64::max),
            1e-12,
        ),
        Check::at_most("constant input: the order of bilinear is 2, up to", off(order(&constant[1]), 2.0), 0.05),
        Check::at_most("constant input: the order of forward Euler is 1, up to", off(order(&constant[2]), 1.0), 0.05),
        Check::at_most("smooth input: the order of the hold is 1, up to", off(order(&smooth[0]), 1.0), 0.05),
        Check::at_most(
            "smooth input: bilinear of means of two inputs has order 2, up to",
            off(order(&mean), 2.0),
            0.05,
        ),
        Check::at_least(
            "forward Euler at Δ|A| = 2.1 grows by this factor a step",
            step(Method::EULER, 2.1 / A.abs())?.0.abs(),
            1.0,
        ),
        Check::at_most(
            "bilinear at Δ|A| = 1000 does not grow: |Ā|",
            step(Method::BILINEAR, 1000.0 / A.abs())?.0.abs(),
            1.0,
        ),
    ];
    let gain = |method: Method, size: f64| -> anyhow::Result<f64> {
        let (a, b) = step(method, size / A.abs())?;
        Ok(b / (1.0 - a) / (B / A.abs()))
    };
    let text = format!(
        "A computer takes steps: h' = A h + B x becomes h_k = Ā h_(k−1) + B̄ x_k. Solved exactly over a step of Δ, with the input \
         held at x_k, the equation gives the zero-order hold; approximations avoid the exponential:

  zero-order hold        Ā = exp(ΔA)                       B̄ = A⁻¹ (exp(ΔA) − I) B,  → ΔB as A → 0
  generalised bilinear   Ā = (I − αΔA)⁻¹ (I + (1 − α)ΔA)   B̄ = (I − αΔA)⁻¹ ΔB
                         α = 0 forward Euler, ½ bilinear (Tustin), 1 backward Euler
  Mamba                  Ā = exp(ΔA)                       B̄ = ΔB

With A = {A}, B = {B} and Δ = 0.1:

  zero-order hold        Ā = {:.10}   B̄ = {:.10}
  bilinear               Ā = {:.10}   B̄ = {:.10}
  forward Euler          Ā = {:.10}   B̄ = {:.10}

Where the input really is constant the hold is exact at any step, bilinear errs by Δ² and both Eulers by Δ. For a smooth input, \
of which only the sample at the step's end is used, all of them err by Δ, the hold too: what it holds is not what was there. \
Bilinear reaches Δ² again if it is given the mean of the samples at both ends, as Tustin meant it.

Forward Euler grows without bound where Δ|A| > 2; bilinear and backward Euler never do. Mamba's Ā is the hold's, but its B̄ = ΔB is \
Euler's: every released checkpoint computes so, although the paper prints the hold. For an input that stays, its output is too \
large by the factor Δ|A| / (1 − exp(−Δ|A|)): {:.3} at Δ|A| = 0.1, {:.2} at 1, {:.2} at 4. A trained B has learned to live with it, so a \
checkpoint must be run with the formula with which it was trained.",
        hold.0,
        hold.1,
        bilinear.0,
        bilinear.1,
        euler.0,
        euler.1,
        gain(Method::Mamba, 0.1)?,
        gain(Method::Mamba, 1.0)?,
        gain(Method::Mamba, 4.0)?,
    );

    let row = |(i, (name, _)): (usize, &(&str, Method))| {
        let at = |errors: &[f64]| json!(errors[5]);
        let order_of =
            |errors: &[f64]| if errors[errors.len() - 1] < 1e-12 { json!("exact") } else { json!(order(errors)) };
        vec![json!(name), at(&constant[i]), order_of(&constant[i]), at(&smooth[i]), order_of(&smooth[i])]
    };
    let columns = [
        "method".to_string(),
        format!("constant, Δ = {}", sizes[5]),
        "order".into(),
        format!("sin {OMEGA}t, Δ = {}", sizes[5]),
        "order".into(),
    ];
    let table = Table {
        title: "Largest error against the exact solution, and its order in Δ".into(),
        columns: columns.into(),
        rows: METHODS.iter().enumerate().map(row).collect(),
    };
    Ok(Explanation { text, checks, tables: vec![table], figure: figure(&sizes, &constant, &smooth, &mean)? })
}

fn figure(sizes: &[f64], constant: &[Vec<f64>], smooth: &[Vec<f64>], mean: &[f64]) -> anyhow::Result<Figure> {
    let coarse = 0.5;
    let exact = (0..=200).map(|i| f64::from(i) * 0.02).map(|t| (t, Input::Constant.solution(t)));
    let mut example = vec![Series::line("exact", 6, exact)];
    for (i, (name, method)) in METHODS.iter().enumerate() {
        let steps = run(*method, coarse, 8, Input::Constant)?;
        let points = steps.iter().enumerate().map(|(k, h)| ((k + 1) as f64 * coarse, *h));
        example.push(Series::line(*name, i, [(0.0, 0.0)].into_iter().chain(points)).mark(Mark::LineDots));
    }
    let example = Chart {
        x: Axis::linear("time in s"),
        y: Axis::linear("h").from(0.0, 0.82),
        series: example,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let products: Vec<f64> = (1..=160).map(|i| f64::from(i) * 0.025).collect();
    let over = |f: &dyn Fn(Method, f64) -> anyhow::Result<f64>, methods: &[usize]| -> anyhow::Result<Vec<Series>> {
        let series = |&i: &usize| {
            let (name, method) = METHODS[i];
            let points =
                products.iter().map(|&p| Ok((p, f(method, p / A.abs())?))).collect::<anyhow::Result<Vec<_>>>()?;
            Ok(Series::line(name, i, points))
        };
        methods.iter().map(series).collect()
    };
    let decay = Chart {
        x: Axis::linear("Δ|A|"),
        y: Axis::linear("Ā").from(-2.0, 2.0),
        series: over(&|method, delta| Ok(step(method, delta)?.0), &[0, 1, 2, 3])?,
        legend: Some(Legend::Above),
        notes: vec![(0.15, -1.25, "below −1: unstable".into())],
        ..Chart::default()
    };
    let gain = |method, delta| {
        let (a, b) = step(method, delta)?;
        Ok(b / (1.0 - a) / (B / A.abs()))
    };
    let mut gains = over(&gain, &[0, 4])?;
    gains[0].name = "hold, bilinear, Euler".into();
    let gain = Chart {
        x: Axis::linear("Δ|A|"),
        y: Axis::linear("stationary output / exact").from(0.0, 4.2),
        series: gains,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let errors = |errors: &[Vec<f64>], names: bool| -> Vec<Series> {
        let line = |(i, e): (usize, &Vec<f64>)| {
            let name = if names { METHODS[i].0 } else { "" };
            Series::line(name, i, sizes.iter().zip(e).map(|(d, e)| (*d, *e))).mark(Mark::LineDots)
        };
        errors.iter().enumerate().map(line).collect()
    };
    let error_chart = |series: Vec<Series>, range: (f64, f64)| Chart {
        x: Axis::log("step Δ in s"),
        y: Axis::log("largest error").from(range.0, range.1),
        series,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let constant_chart = error_chart(errors(constant, false), (1e-17, 1.0));
    let mut smooth = errors(smooth, false);
    smooth.push(
        Series::line("bilinear, mean of two inputs", 5, sizes.iter().zip(mean).map(|(d, e)| (*d, *e)))
            .mark(Mark::LineDots),
    );
    let smooth_chart = error_chart(smooth, (1e-10, 1.0));
    let alphas: Vec<f64> = (0..=100).map(|i| f64::from(i) / 100.0).collect();
    let mut series = Vec::new();
    for (i, delta) in [0.1, 0.05, 0.025].into_iter().enumerate() {
        let points =
            alphas.iter().map(|&alpha| Ok((alpha, error(Method::Generalised(alpha), delta, Input::Constant)?)));
        series.push(Series::line(format!("Δ = {delta}"), i, points.collect::<anyhow::Result<Vec<_>>>()?));
    }
    let alpha = Chart {
        x: Axis::linear("α"),
        y: Axis::log("largest error"),
        series,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    Ok(Figure {
        title: "From a differential equation to steps".into(),
        subtitle: format!("h' = −{} h + x; zero-order hold, bilinear, Euler, and what Mamba computes", A.abs()),
        rows: vec![
            (
                1.1,
                vec![
                    Panel::chart(format!("A constant input, Δ = {coarse} s"), example).weight(1.25),
                    Panel::chart("How a state decays", decay),
                    Panel::chart("An input that stays", gain),
                ],
            ),
            (
                1.0,
                vec![
                    Panel::chart("Error, constant input (colours as above)", constant_chart).weight(1.1),
                    Panel::chart(format!("Error, input sin {OMEGA}t"), smooth_chart).weight(1.1),
                    Panel::chart("Between the Eulers: α", alpha),
                ],
            ),
        ],
    })
}

/// (Ā, B̄) of the equation.
fn step(method: Method, delta: f64) -> anyhow::Result<(f64, f64)> {
    let (a, b) = scalar(method, A.into(), B.into(), delta)?;
    Ok((a.re, b.re))
}

#[derive(Clone, Copy, PartialEq)]
enum Input {
    /// 1 from t = 0 on.
    Constant,
    /// sin(ωt), sampled at the end of the step.
    Smooth,
    /// The mean of the samples at both ends.
    SmoothMean,
}

impl Input {
    fn sample(self, t: f64, delta: f64) -> f64 {
        match self {
            Input::Constant => 1.0,
            Input::Smooth => (OMEGA * t).sin(),
            Input::SmoothMean => ((OMEGA * t).sin() + (OMEGA * (t - delta)).sin()) / 2.0,
        }
    }

    /// h(t) from rest.
    fn solution(self, t: f64) -> f64 {
        match self {
            Input::Constant => B / A * ((A * t).exp() - 1.0),
            Input::Smooth | Input::SmoothMean => {
                let transient = OMEGA * (A * t).exp();
                B * (transient - A * (OMEGA * t).sin() - OMEGA * (OMEGA * t).cos()) / (A * A + OMEGA * OMEGA)
            }
        }
    }
}

/// h after 1, 2, … steps from rest.
fn run(method: Method, delta: f64, steps: usize, input: Input) -> anyhow::Result<Vec<f64>> {
    let (a, b) = step(method, delta)?;
    let mut h = 0.0;
    let next = |k: usize| {
        h = a * h + b * input.sample((k + 1) as f64 * delta, delta);
        h
    };
    Ok((0..steps).map(next).collect())
}

/// The largest error at the steps up to [`END`].
fn error(method: Method, delta: f64, input: Input) -> anyhow::Result<f64> {
    let states = run(method, delta, (END / delta).round() as usize, input)?;
    let off = states.iter().enumerate().map(|(k, h)| (h - input.solution((k + 1) as f64 * delta)).abs());
    Ok(off.fold(0.0, f64::max))
}
