//! `hognose explain representations`: one model, computed in three ways, with what each of them costs.

use std::hint::black_box;

use hognose_plot::{Axis, Chart, Figure, Legend, Mark, Panel, Series};
use hognose_theory::convolution;
use hognose_theory::discretise::Method;
use hognose_theory::hippo::Measure;
use hognose_theory::nalgebra::DVector;
use hognose_theory::random::Random;
use hognose_theory::relative_error;
use hognose_theory::ssm::{Continuous, Discrete};
use serde_json::json;

use super::report::{Check, Explanation, Table, seconds};
use crate::HEAP;
use crate::args::ExplainArgs;

const STATES: usize = 16;
const DELTA: f64 = 0.02;
/// Runge-Kutta substeps between samples.
const FINE: usize = 16;
/// Samples of the picture's curves.
const SHOWN: usize = 200;
/// Up to here the convolution is also computed by its definition.
const DIRECT: usize = 1 << 13;

/// What was measured at one length.
struct Costs {
    length: usize,
    /// Seconds for the whole sequence: continuous, recurrent, by FFT, by definition.
    whole: [Option<f64>; 4],
    /// Seconds for one more sample: recurrent, by convolution.
    next: [f64; 2],
    /// Bytes at the peak, beside input and output: continuous, recurrent, by FFT.
    bytes: [f64; 3],
    /// Relative distance from the recurrence in f64: continuous, by FFT, recurrent in f32, by FFT in f32.
    off: [f64; 4],
}

pub fn explain(_: &ExplainArgs) -> anyhow::Result<Explanation> {
    let (a, b) = Measure::LegS.transition(STATES)?;
    let c = DVector::from_vec(Random::new(9).normals(STATES));
    let continuous = Continuous::new(a, b, c, 0.0)?;
    let model = continuous.discretise(Method::ZeroOrderHold, DELTA)?;
    let x = signal(1 << 14);
    let lengths: Vec<usize> = (6..=14).map(|i| 1 << i).collect();
    let costs: Vec<Costs> =
        lengths.iter().map(|&length| measure(&continuous, &model, &x[..length])).collect::<anyhow::Result<_>>()?;

    // The same continuous model, sampled twice as often.
    let finer = continuous.discretise(Method::ZeroOrderHold, DELTA / 2.0)?;
    let twice: Vec<f64> = x[..1024].iter().flat_map(|&x| [x, x]).collect();
    let resampled: Vec<f64> = finer.run(&twice).into_iter().skip(1).step_by(2).collect();
    let resampled = relative_error(&resampled, &model.run(&x[..1024]));
    let worst = |i: usize| costs.iter().map(|c| c.off[i]).fold(0.0, f64::max);
    let (first, last) = (&costs[0], &costs[costs.len() - 1]);
    let direct = costs.iter().rev().find_map(|c| Some((c.length, c.whole[3]? / c.whole[2]?))).unwrap_or_default();
    let checks = vec![
        Check::at_most("convolution (FFT) and recurrence differ by, at any length", worst(1), 1e-12),
        Check::at_most("the differential equation (Runge-Kutta) and the recurrence, by", worst(0), 1e-6),
        Check::at_most("recurrence in f32 and in f64 differ by", worst(2), 1e-4),
        Check::at_most("convolution in f32 and recurrence in f64 differ by", worst(3), 1e-4),
        Check::at_most("half the step, each input twice: every other output differs by", resampled, 1e-12),
        Check::at_most(
            format!("bytes of the recurrence at {} samples over those at {}", last.length, first.length),
            last.bytes[1] / first.bytes[1],
            1.0,
        ),
        Check::at_least(
            "the same ratio of the convolution",
            last.bytes[2] / first.bytes[2],
            0.5 * last.length as f64 / first.length as f64,
        ),
        Check::at_least(format!("convolution by definition over FFT at {} samples: time", direct.0), direct.1, 2.0),
    ];
    let micro = |s: f64| super::report::short(1e6 * s);
    let text = format!(
        "A linear time-invariant model is the same map in three forms:

  continuous       h'(t) = A h(t) + B x(t)             meaning: any step, any sampling rate
  recurrent        h_k = Ā h_(k−1) + B̄ x_k             memory and work of a step do not grow
  convolutional    y = K̄ * x,  K̄_k = C Ā^k B̄           all outputs at once, in parallel

Trained as a convolution, generating as a recurrence: that is how S4 and its kin work. The continuous form says what becomes of \
the parameters when the sampling rate changes: Δ changes, nothing else.

Here the model is HiPPO-LegS with N = {STATES} states and a random C. All forms agree to rounding, in f64 and in f32. What one more sample \
costs differs: the recurrence takes {} µs whether {} or {} came before; the convolution has to look at all of them again, {} and \
{} µs. In memory the recurrence needs {} bytes at any length, the convolution {} bytes a sample.

A selective model has Ā and B̄ that change with the input. It has no kernel, and keeps two forms: a differential equation whose \
coefficients follow the input, and the recurrence. That is why Mamba needs a scan.",
        micro(last.next[0]),
        first.length,
        last.length,
        micro(first.next[1]),
        micro(last.next[1]),
        last.bytes[1],
        super::report::short(last.bytes[2] / last.length as f64),
    );
    let rows = costs.iter().map(|c| {
        let milli = |s: Option<f64>| json!(s.map(|s| 1e3 * s));
        vec![
            json!(c.length),
            milli(c.whole[0]),
            milli(c.whole[1]),
            milli(c.whole[2]),
            milli(c.whole[3]),
            json!(c.bytes[1]),
            json!(c.bytes[2]),
        ]
    });
    let columns = ["samples", "continuous", "recurrent", "FFT", "definition", "recurrent, bytes", "FFT, bytes"];
    let table = Table {
        title: "Milliseconds for a sequence (f64, one core), and bytes at the peak beside input and output".into(),
        columns: columns.map(String::from).into(),
        rows: rows.collect(),
    };
    let held = |t: f64| x[((t / DELTA) as usize).min(SHOWN - 1)];
    let curve = continuous.simulate(held, DELTA / 5.0, SHOWN * 5, 2)?;
    let figure = figure(&curve, &model.run(&x[..SHOWN]), &model.convolve(&x[..SHOWN]), &costs);
    Ok(Explanation { text, checks, tables: vec![table], figure })
}

fn measure(continuous: &Continuous, model: &Discrete<f64>, x: &[f64]) -> anyhow::Result<Costs> {
    let length = x.len();
    let held = |t: f64| x[((t / DELTA) as usize).min(length - 1)];
    let simulate = || continuous.simulate(held, DELTA, length, FINE);
    let kernel = model.kernel(length);
    let stepped = model.run(x);
    let simulated = simulate()?;
    let narrow_x: Vec<f32> = x.iter().map(|&x| x as f32).collect();
    let narrow = model.narrow();
    let wide = |y: Vec<f32>| y.into_iter().map(f64::from).collect::<Vec<f64>>();

    // States alone, as when outputs are handed on as they come.
    let stream = || {
        let mut h = model.rest();
        x.iter().for_each(|&x| {
            black_box(model.step(&mut h, x));
        });
    };
    let output = 8.0 * length as f64;
    let bytes = [
        peak(|| drop(black_box(simulate()))) - output,
        peak(stream),
        peak(|| drop(black_box(model.convolve(x)))) - output,
    ];
    let direct = || seconds(|| drop(black_box(convolution::direct(&kernel, x))));
    let mut h = model.rest();
    let newest = || x.iter().rev().zip(&kernel).map(|(x, k)| x * k).sum::<f64>();
    Ok(Costs {
        length,
        whole: [
            Some(seconds(|| drop(black_box(simulate())))),
            Some(seconds(stream)),
            Some(seconds(|| drop(black_box(convolution::fft(&kernel, x))))),
            (length <= DIRECT).then(direct),
        ],
        next: [
            seconds(|| {
                black_box(model.step(&mut h, black_box(0.5)));
            }),
            seconds(|| {
                black_box(newest());
            }),
        ],
        bytes,
        off: [
            relative_error(&simulated, &stepped),
            relative_error(&convolution::fft(&kernel, x), &stepped),
            relative_error(&wide(narrow.run(&narrow_x)), &stepped),
            relative_error(&wide(narrow.convolve(&narrow_x)), &stepped),
        ],
    })
}

/// Bytes that a call needs at most, beyond those in use before it.
fn peak(call: impl FnOnce()) -> f64 {
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    call();
    HEAP.peak_usage().saturating_sub(before) as f64
}

/// Smooth, with a few jumps.
fn signal(length: usize) -> Vec<f64> {
    let mut random = Random::new(3);
    let jumps: Vec<f64> = random.normals(length / 50 + 1);
    (0..length).map(|k| (k as f64 * 0.11).sin() + jumps[k / 50]).collect()
}

fn figure(continuous: &[f64], recurrent: &[f64], convolved: &[f64], costs: &[Costs]) -> Figure {
    let every = |y: &[f64], first: usize| -> Vec<(f64, f64)> {
        y.iter().enumerate().skip(first).step_by(4).map(|(k, y)| ((k + 1) as f64 * DELTA, *y)).collect()
    };
    let fine = DELTA / 5.0;
    let outputs = Chart {
        x: Axis::linear("time").from(0.0, SHOWN as f64 * DELTA),
        y: Axis::linear("y"),
        series: vec![
            Series::line("continuous", 6, continuous.iter().enumerate().map(|(i, y)| ((i + 1) as f64 * fine, *y))),
            Series::line("recurrent (every 4th)", 1, every(recurrent, 0)).mark(Mark::Dots),
            Series::line("convolutional (every 4th)", 0, every(convolved, 2)).mark(Mark::Dots),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let over = |name: &str, color: usize, value: &dyn Fn(&Costs) -> Option<f64>| {
        let points = costs.iter().filter_map(|c| Some((c.length as f64, value(c)?)));
        Series::line(name, color, points).mark(Mark::LineDots)
    };
    let chart = |label: &str, series: Vec<Series>| Chart {
        x: Axis::log("samples"),
        y: Axis::log(label),
        series,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let agreement = chart(
        "relative difference",
        vec![
            over("continuous", 6, &|c| Some(c.off[0])),
            over("FFT, f64", 0, &|c| Some(c.off[1])),
            over("recurrent, f32", 1, &|c| Some(c.off[2])),
            over("FFT, f32", 5, &|c| Some(c.off[3])),
        ],
    );
    let time = chart(
        "ms",
        vec![
            over("continuous", 6, &|c| Some(1e3 * c.whole[0]?)),
            over("recurrent", 1, &|c| Some(1e3 * c.whole[1]?)),
            over("FFT", 0, &|c| Some(1e3 * c.whole[2]?)),
            over("definition", 2, &|c| Some(1e3 * c.whole[3]?)),
        ],
    );
    let next = chart(
        "μs",
        vec![over("recurrent", 1, &|c| Some(1e6 * c.next[0])), over("convolutional", 0, &|c| Some(1e6 * c.next[1]))],
    );
    let memory = chart(
        "bytes",
        vec![
            over("continuous", 6, &|c| Some(c.bytes[0])),
            over("recurrent", 1, &|c| Some(c.bytes[1])),
            over("FFT", 0, &|c| Some(c.bytes[2])),
        ],
    );
    Figure {
        title: "One model, three representations".into(),
        subtitle: format!(
            "continuous = recurrent = convolutional, for HiPPO-LegS with {STATES} states; what each of them costs"
        ),
        rows: vec![
            (
                1.0,
                vec![
                    Panel::chart("One output", outputs).weight(1.5),
                    Panel::chart("Difference from the recurrence in f64", agreement),
                ],
            ),
            (
                1.0,
                vec![
                    Panel::chart("Time for a sequence", time),
                    Panel::chart("Time for one sample more", next),
                    Panel::chart("Memory beside input and output", memory),
                ],
            ),
        ],
    }
}
