//! `hognose explain ssm`: a mass on a spring, and what a selective model keeps of linearity and time invariance.

use hognose_core::ops::selective_scan::Discretisation;
use hognose_core::ops::selective_scan::reference::{Operands, selective_scan};
use hognose_plot::{Axis, Chart, Figure, Legend, Mark, Panel, Series};
use hognose_theory::discretise::Method;
use hognose_theory::random::Random;
use hognose_theory::relative_error;
use hognose_theory::ssm::Continuous;

use super::report::{Check, Explanation};
use crate::args::ExplainArgs;

const DELTA: f64 = 0.1;
const STEPS: usize = 140;
/// Steps by which inputs are delayed.
const DELAY: usize = 30;

pub fn explain(_: &ExplainArgs) -> anyhow::Result<Explanation> {
    let (mass, friction, stiffness) = (1.0, 0.6, 9.0);
    let spring = Continuous::spring(mass, friction, stiffness)?;
    let model = spring.discretise(Method::ZeroOrderHold, DELTA)?;
    let push = pushes();
    let held = |t: f64| push[((t / DELTA) as usize).min(STEPS - 1)];
    let fine = 10;
    let continuous = spring.simulate(held, DELTA / fine as f64, STEPS * fine, 4)?;
    let (stepped, convolved) = (model.run(&push), model.convolve(&push));
    let sampled: Vec<f64> = continuous.iter().skip(fine - 1).step_by(fine).copied().collect();

    // The kernel is the impulse response of the held input: of a push of height 1 and width Δ.
    let omega = (stiffness / mass - (friction / mass / 2.0).powi(2)).sqrt();
    let physics = |t: f64| (-friction / mass * t / 2.0).exp() * (omega * t).sin() / (omega * mass);
    let times: Vec<f64> = (0..STEPS).map(|k| k as f64 * DELTA).collect();
    let response: Vec<f64> = times.iter().map(|&t| spring.impulse_response(t)).collect();
    let expected: Vec<f64> = times.iter().map(|&t| physics(t)).collect();

    let (u, v) = (wave(1, STEPS), wave(2, STEPS));
    let linear = |x: &[f64]| model.run(x);
    let selective = S6::new();
    let s6 = |x: &[f64]| selective.run(x);
    let (spring_sum, spring_parts) = (linear(&sum(&u, &v)), sum(&linear(&u), &linear(&v)));
    let (s6_sum, s6_parts) = (s6(&sum(&u, &v)), sum(&s6(&u), &s6(&v)));
    let late = delayed(&u);
    let (spring_late, s6_now, s6_late) = (linear(&late), s6(&u), s6(&late));
    let arrivals = [20, 45, 70];
    let responses = |y: &dyn Fn(&[f64]) -> Vec<f64>| arrivals.map(|at| added_impulse(y, &u, at));
    let (spring_impulses, s6_impulses) = (responses(&linear), responses(&s6));

    let checks = vec![
        Check::at_most(
            "spring: stepped and continuous (Runge-Kutta) differ by",
            relative_error(&stepped, &sampled),
            1e-8,
        ),
        Check::at_most("spring: convolved and stepped differ by", relative_error(&convolved, &stepped), 1e-12),
        Check::at_most(
            "spring: C exp(tA) B and the physics of a spring differ by",
            relative_error(&response, &expected),
            1e-12,
        ),
        Check::at_most(
            "spring: superposition, y(u + v) and y(u) + y(v) differ by",
            relative_error(&spring_sum, &spring_parts),
            1e-13,
        ),
        Check::at_most(
            "spring: a delayed input delays the output, up to",
            relative_error(&spring_late, &delayed(&linear(&u))),
            1e-13,
        ),
        Check::at_most("spring: responses to an impulse sooner or later differ by", spread(&spring_impulses), 1e-12),
        Check::at_most(
            "S6: a delayed input delays the output, up to",
            relative_error(&s6_late, &delayed(&s6_now)),
            1e-13,
        ),
        Check::at_least("S6: superposition fails, by", relative_error(&s6_sum, &s6_parts), 0.1),
        Check::at_least(
            "S6: twice the input is not twice the output, but off by",
            relative_error(&s6(&sum(&u, &u)), &sum(&s6_now, &s6_now)),
            0.1,
        ),
        Check::at_least("S6: responses to an impulse sooner or later differ by", spread(&s6_impulses), 0.1),
    ];

    let text = format!(
        "A state space model turns an input x(t) into an output y(t) through a state h(t), which is all that it \
         remembers:

  h'(t) = A h(t) + B x(t)         y(t) = C h(t) + D x(t)

A mass m on a spring of stiffness k with friction c, pushed by x, obeys m s'' = x − c s' − k s. With the state h = (s, s'):

  A = [0, 1; −k/m, −c/m]    B = [0; 1/m]    C = [1, 0]    D = 0

For inputs that are constant for Δ = {DELTA} s at a time there is an exact recurrence, and written out it is a convolution:

  h_k = Ā h_(k−1) + B̄ x_k         y_k = C h_k                   (recurrent)
  y = K̄ * x                       K̄ = (C B̄, C Ā B̄, C Ā² B̄, …)   (convolutional)

Here Ā = [{:.4}, {:.4}; {:.4}, {:.4}] and B̄ = [{:.4}; {:.4}].

The model is linear (superposition) and time-invariant (what an impulse does depends on how long ago it came, not on when). \
Only therefore one kernel K̄ tells everything about it.

The selective model S6 (one channel, {} states) lets Δ, B and C depend on the input:

  h_t = exp(Δ_t A) h_(t−1) + Δ_t B_t x_t          y_t = C_t h_t
  Δ_t = softplus(w x_t + b)      B_t = x_t β      C_t = x_t γ

It stays linear in h, but not in x: superposition fails by {:.0} % here, and what an impulse does depends on what \
comes with it. So there is no kernel. One thing stays true, although it is often denied: the parameters depend on the \
input alone, so an input that comes later, into a state at rest, gives the same output later.",
        model.a[(0, 0)],
        model.a[(0, 1)],
        model.a[(1, 0)],
        model.a[(1, 1)],
        model.b[0],
        model.b[1],
        S6::STATES,
        100.0 * relative_error(&s6_sum, &s6_parts),
    );

    let step_time = |k: usize| (k + 1) as f64 * DELTA;
    let every = |y: &[f64], first: usize| -> Vec<(f64, f64)> {
        y.iter().enumerate().skip(first).step_by(2).map(|(k, y)| (step_time(k), *y)).collect()
    };
    let motion = Chart {
        x: Axis::linear("time in s"),
        y: Axis::linear("position, push"),
        series: vec![
            Series::line(
                "push x / 8",
                5,
                push.iter().zip(&times).flat_map(|(x, t)| [(*t, x / 8.0), (t + DELTA, x / 8.0)]),
            )
            .mark(Mark::Faint),
            Series::line(
                "continuous: Runge-Kutta",
                0,
                continuous.iter().enumerate().map(|(i, y)| ((i + 1) as f64 * DELTA / fine as f64, *y)),
            ),
            Series::line("recurrent (every other step)", 1, every(&stepped, 0)).mark(Mark::Dots),
            Series::line("convolution (the others)", 2, every(&convolved, 1)).mark(Mark::Dots),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let kernel = model.kernel(80);
    let shown = Chart {
        x: Axis::linear("step k"),
        y: Axis::linear("weight"),
        series: vec![
            Series::line("the kernel of steps", 1, kernel.iter().enumerate().map(|(k, v)| (k as f64, *v)))
                .mark(Mark::Bars(0.7)),
            Series::line(
                "Δ · response to an impulse",
                0,
                (0..80).map(|k| (k as f64, DELTA * physics((k as f64 + 0.5) * DELTA))),
            ),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let curve = |y: &[f64]| y.iter().enumerate().map(|(k, y)| (k as f64, *y)).collect::<Vec<_>>();
    let step_axis = || Axis::linear("step");
    let superposition = Chart {
        x: step_axis(),
        y: Axis::linear("output"),
        series: vec![Series::line("y(u + v)", 0, curve(&s6_sum)), Series::line("y(u) + y(v)", 1, curve(&s6_parts))],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let delay = Chart {
        x: step_axis(),
        y: Axis::linear("output"),
        series: vec![
            Series::line("y(u)", 0, curve(&s6_now)),
            Series::line(format!("y(u delayed by {DELAY})"), 1, curve(&s6_late)),
            Series::line("y(u) moved by as much", 6, every_fourth(&delayed(&s6_now))).mark(Mark::Dots),
        ],
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let largest = spring_impulses[0].iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let s6_largest = s6_impulses.iter().flatten().fold(0.0f64, |m, v| m.max(v.abs()));
    let mut impulse_series: Vec<Series> = arrivals
        .iter()
        .zip(&s6_impulses)
        .enumerate()
        .map(|(i, (at, r))| {
            Series::line(
                format!("S6, impulse at step {at}"),
                i,
                curve(&r.iter().map(|v| v / s6_largest).collect::<Vec<_>>()),
            )
        })
        .collect();
    let scaled: Vec<f64> = spring_impulses[0].iter().map(|v| v / largest).collect();
    impulse_series.push(Series::line("spring, any step", 6, curve(&scaled)).mark(Mark::Dotted));
    let impulses = Chart {
        x: Axis::linear("steps after it"),
        y: Axis::linear("response / largest"),
        series: impulse_series,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let figure = Figure {
        title: "A state space model: one motion, three ways to compute it".into(),
        subtitle: "h' = A h + B x, y = C h, for a mass on a spring; below, the selective model S6: linear in its state, not in its input".into(),
        rows: vec![
            (1.0, vec![Panel::chart("Spring: continuous, stepped, convolved", motion).weight(1.5), Panel::chart("Its kernel", shown)]),
            (
                1.0,
                vec![
                    Panel::chart("S6: superposition fails", superposition),
                    Panel::chart("S6: a later input, a later output", delay),
                    Panel::chart("What one more impulse changes", impulses),
                ],
            ),
        ],
    };
    Ok(Explanation { text, checks, tables: Vec::new(), figure })
}

/// The push at each step: held, then a kick the other way.
fn pushes() -> Vec<f64> {
    (0..STEPS)
        .map(|k| {
            if (10..30).contains(&k) {
                1.0
            } else if (70..73).contains(&k) {
                -3.0
            } else {
                0.0
            }
        })
        .collect()
}

/// A smooth signal that begins and ends at rest.
fn wave(seed: u64, length: usize) -> Vec<f64> {
    let mut random = Random::new(seed);
    let phases: Vec<f64> = (0..4).map(|_| std::f64::consts::TAU * random.uniform()).collect();
    let signal = |k: usize| {
        let t = k as f64 / length as f64;
        let waves = phases.iter().enumerate().map(|(i, p)| (std::f64::consts::TAU * (i + 2) as f64 * t + p).sin());
        waves.sum::<f64>() * (std::f64::consts::PI * t).sin() / 2.0
    };
    (0..length).map(signal).collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn delayed(x: &[f64]) -> Vec<f64> {
    (0..x.len()).map(|k| if k < DELAY { 0.0 } else { x[k - DELAY] }).collect()
}

fn every_fourth(y: &[f64]) -> Vec<(f64, f64)> {
    y.iter().enumerate().step_by(4).map(|(k, y)| (k as f64, *y)).collect()
}

/// y(x + impulse) − y(x) from the step after the impulse on: what it leaves in the state.
fn added_impulse(y: &dyn Fn(&[f64]) -> Vec<f64>, x: &[f64], at: usize) -> Vec<f64> {
    let mut with = x.to_vec();
    with[at] += 1.0;
    y(&with).iter().zip(y(x)).map(|(a, b)| a - b).skip(at + 1).take(60).collect()
}

/// How far the others are from the first, by the largest of all.
fn spread(responses: &[Vec<f64>; 3]) -> f64 {
    responses[1..].iter().map(|r| relative_error(r, &responses[0])).fold(0.0, f64::max)
}

/// One channel of a selective model with random projections.
struct S6 {
    beta: Vec<f64>,
    gamma: Vec<f64>,
}

impl S6 {
    const STATES: usize = 4;

    fn new() -> S6 {
        let mut random = Random::new(11);
        let mut sizes = || random.normals(S6::STATES).iter().map(|v| v.abs()).collect();
        S6 { beta: sizes(), gamma: sizes() }
    }

    /// By the reference of the op that models run.
    fn run(&self, x: &[f64]) -> Vec<f64> {
        let a: Vec<f64> = (1..=S6::STATES).map(|n| -(n as f64)).collect();
        let project = |w: &[f64]| x.iter().flat_map(|x| w.iter().map(move |w| w * x)).collect::<Vec<f64>>();
        let whole = 0..x.len();
        let operands = Operands {
            channels: 1,
            d_state: S6::STATES,
            groups: 1,
            x,
            dt: &x.iter().map(|x| x - 4.0).collect::<Vec<_>>(),
            a: &a,
            b: &project(&self.beta),
            c: &project(&self.gamma),
            d: None,
            z: None,
            dt_bias: None,
            initial_state: None,
            segments: std::slice::from_ref(&whole),
            softplus: true,
            discretisation: Discretisation::Euler,
        };
        selective_scan(&operands).0
    }
}
