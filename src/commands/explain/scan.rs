//! `hognose explain scan`: four scans that give the same, and why a fused one is fast.

use std::hint::black_box;

use hognose_core::graph::Recompute;
use hognose_core::ops::selective_scan::{Discretisation, SelectiveScan, selective_scan};
use hognose_core::{DType, Device, Graph, Plan, TensorId};
use hognose_plot::{Axis, Chart, Figure, Legend, Mark, Panel, Series};
use hognose_theory::random::Random;
use hognose_theory::relative_error;
use hognose_theory::scan::{Affine, Algorithm};
use serde_json::json;

use super::report::{Check, Explanation, Table, seconds};
use crate::args::ExplainArgs;

const ALGORITHMS: [(&str, Algorithm); 4] = [
    ("sequential", Algorithm::Sequential),
    ("Hillis–Steele", Algorithm::HillisSteele),
    ("Blelloch", Algorithm::Blelloch),
    ("chunks of 64", Algorithm::Chunked(64)),
];
/// Sizes of the scan of a Mamba layer: steps, channels, states of a channel.
const T: usize = 1024;
const D: usize = 512;
const N: usize = 16;

/// A scan of one length by one algorithm.
struct Count {
    length: usize,
    work: usize,
    depth: usize,
    seconds: f64,
}

pub fn explain(args: &ExplainArgs) -> anyhow::Result<Explanation> {
    let device = args.compute.device()?;
    let (equal, counts) = count()?;
    let steps = random_steps(3);
    let (left, right) = (steps[0].then(steps[1]).then(steps[2]), steps[0].then(steps[1].then(steps[2])));
    let swapped = (steps[0].then(steps[1]).b - steps[1].then(steps[0]).b).abs();

    let layer = Layer::new();
    let mut buffers = Unfused::new();
    let (mut plain, mut y) = (vec![0.0; T * D], vec![0.0; T * D]);
    let unfused = seconds(|| buffers.run(&layer, &mut plain));
    let fused = seconds(|| layer.fused(&mut y));
    let wide = |y: &[f32]| y.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let (plain, y) = (wide(&plain), wide(&y));
    let one = Op::new(&Device::cpu(Some(1))?, &layer)?;
    let all = Op::new(&device, &layer)?;
    let (one_seconds, all_seconds) = (one.time()?, all.time()?);
    let op = wide(&all.output()?);

    let values = 4.0 * (T * D * N) as f64;
    let ends = 4.0 * (3 * T * D + 2 * T * N) as f64;
    // Ā and B̄x are written and read, h is written and read.
    let traffic = [ends + 6.0 * values, ends];
    let lengths: Vec<usize> = (8..=14).map(|i| 1 << i).collect();
    let kept: Vec<(usize, [f64; 3])> = lengths
        .iter()
        .map(|&t| {
            let states = 4.0 * (t * D * N) as f64;
            let recomputed = gradient_bytes(&device, t)?;
            Ok((t, [3.0 * states, states, recomputed]))
        })
        .collect::<anyhow::Result<_>>()?;
    let longest = kept[kept.len() - 1];

    let mut checks: Vec<Check> = ALGORITHMS[1..]
        .iter()
        .zip(&equal)
        .map(|((name, _), off)| {
            Check::at_most(format!("{name} and sequential differ by, lengths 1 to 65536"), *off, 1e-12)
        })
        .collect();
    checks.extend([
        Check::at_most("(s∘t)∘u and s∘(t∘u) differ by", (left.a - right.a).abs().max((left.b - right.b).abs()), 1e-14),
        Check::at_least("s∘t and t∘s differ by", swapped, 0.1),
        Check::at_most("fused and unfused (plain Rust, f32) differ by", relative_error(&y, &plain), 1e-5),
        Check::at_most("hognose's selective_scan and they differ by", relative_error(&op, &plain), 1e-5),
        Check::at_least("memory for the gradient, states kept over recomputed", longest.1[1] / longest.1[2], 1.5),
    ]);
    let mega = |bytes: f64| format!("{:.1} MB", bytes / 1e6);
    let last = |i: usize| &counts[i][counts[i].len() - 1];
    let text = format!(
        "The recurrence h_t = a_t h_(t−1) + b_t looks sequential. But a step is the map h ↦ a h + b, and maps in a row are one map:

  (a₂, b₂) ∘ (a₁, b₁) = (a₂ a₁, a₂ b₁ + b₂)        identity (1, 0)

This ∘ is associative, so neighbours may be joined in any grouping; it is not commutative, so their order stays. With as many \
processors as one likes, L steps take log L rounds:

  sequential       work L − 1           depth L − 1
  Hillis–Steele    work ~ L log₂ L      depth log₂ L
  Blelloch         work ~ 3 L           depth 2 log₂ L + 1
  chunked          work ~ 2 L           depth of a chunk + number of chunks

On one core work is what counts: at L = {} the sequential scan takes {} µs, Hillis–Steele {} and Blelloch {}.

A selective scan has {D} channels of {N} states here, and each state its own a_t = exp(Δ_t A) and b_t = Δ_t B_t x_t. Written as separate \
steps, Ā, B̄x and h are arrays of T·D·N numbers that go to memory and come back: {} for {T} steps. Fused, they live in registers and \
caches; x, Δ, B, C and y alone move: {}. On this machine, plain Rust on one core, that is {:.1} ms against {:.1} ms; hognose's op takes {:.1} ms \
on one core and {:.1} ms on {}.

The gradient needs the states again. Keeping them takes {} at {} steps; hognose keeps one state a chunk and computes the others \
again on the way back: {} for everything the forward and backward pass of the scan need beside inputs and gradients.",
        last(0).length,
        super::report::short(1e6 * last(0).seconds),
        super::report::short(1e6 * last(1).seconds),
        super::report::short(1e6 * last(2).seconds),
        mega(traffic[0]),
        mega(traffic[1]),
        1e3 * unfused,
        1e3 * fused,
        1e3 * one_seconds,
        1e3 * all_seconds,
        device.describe(),
        mega(longest.1[1]),
        longest.0,
        mega(longest.1[2]),
    );
    let rows = ALGORITHMS.iter().enumerate().map(|(i, (name, _))| {
        let c = last(i);
        vec![json!(name), json!(c.work), json!(c.depth), json!(1e6 * c.seconds)]
    });
    let algorithms = Table {
        title: format!("Scans of {} steps", last(0).length),
        columns: ["algorithm", "work", "depth", "µs on one core"].map(String::from).into(),
        rows: rows.collect(),
    };
    let times = [unfused, fused, one_seconds, all_seconds];
    let names = ["unfused, plain Rust", "fused, plain Rust", "hognose, one core", "hognose, all of the device"];
    let rows = names.iter().zip(times).enumerate().map(|(i, (name, time))| {
        let bytes = traffic[usize::from(i > 0)];
        vec![json!(name), json!(bytes / 1e6), json!(1e3 * time), json!((T * D * N) as f64 / time / 1e9)]
    });
    let fusion = Table {
        title: format!("A selective scan of {T} steps, {D} channels, {N} states (f32)"),
        columns: ["", "MB moved", "ms", "10⁹ states/s"].map(String::from).into(),
        rows: rows.collect(),
    };
    let figure = figure(&counts, &traffic, &times, &kept);
    Ok(Explanation { text, checks, tables: vec![algorithms, fusion], figure })
}

/// How far each algorithm is from the sequential one, and what each does at each length.
fn count() -> anyhow::Result<([f64; 3], [Vec<Count>; 4])> {
    let mut equal = [0.0f64; 3];
    let mut counts = [const { Vec::new() }; 4];
    for length in (0..=16).map(|i| 1usize << i) {
        let steps = random_steps(length);
        let states = |algorithm: Algorithm| -> anyhow::Result<Vec<f64>> {
            Ok(algorithm.scan(&steps)?.prefixes.iter().map(|p| p.b).collect())
        };
        let expected = states(Algorithm::Sequential)?;
        for (i, (_, algorithm)) in ALGORITHMS.into_iter().enumerate() {
            if i > 0 {
                equal[i - 1] = equal[i - 1].max(relative_error(&states(algorithm)?, &expected));
            }
            if length >= 16 {
                let scanned = algorithm.scan(&steps)?;
                let seconds = seconds(|| drop(black_box(algorithm.scan(&steps))));
                counts[i].push(Count { length, work: scanned.work, depth: scanned.depth, seconds });
            }
        }
    }
    Ok((equal, counts))
}

fn random_steps(length: usize) -> Vec<Affine> {
    let mut random = Random::new(length as u64);
    (0..length).map(|_| Affine { a: random.uniform(), b: random.normal() }).collect()
}

/// Operands of a selective scan, row-major.
struct Layer {
    /// `[T, D]`
    x: Vec<f32>,
    /// Δ `[T, D]`
    delta: Vec<f32>,
    /// A `[N, D]`, state-major.
    a: Vec<f32>,
    /// `[T, N]`
    b: Vec<f32>,
    /// `[T, N]`
    c: Vec<f32>,
}

impl Layer {
    fn new() -> Layer {
        let mut random = Random::new(2);
        let mut normals = |n: usize| random.normals(n).iter().map(|&v| v as f32).collect::<Vec<f32>>();
        let (x, b, c) = (normals(T * D), normals(T * N), normals(T * N));
        let delta = normals(T * D).iter().map(|v| 0.02 * (0.5 * v).exp()).collect();
        Layer { x, delta, a: (0..N * D).map(|i| -((i / D + 1) as f32)).collect(), b, c }
    }

    /// One pass: decays and states stay where they are computed.
    fn fused(&self, y: &mut [f32]) {
        let mut h = vec![0.0f32; N * D];
        for (t, y) in y.chunks_exact_mut(D).enumerate() {
            let (x, delta) = (&self.x[t * D..][..D], &self.delta[t * D..][..D]);
            y.fill(0.0);
            for (n, (h, a)) in h.chunks_exact_mut(D).zip(self.a.chunks_exact(D)).enumerate() {
                let (b, c) = (self.b[t * N + n], self.c[t * N + n]);
                for ((((h, a), x), delta), y) in h.iter_mut().zip(a).zip(x).zip(delta).zip(&mut *y) {
                    *h = exp(delta * a) * *h + delta * b * x;
                    *y += c * *h;
                }
            }
        }
    }
}

/// What separate steps write down, `[T, N, D]` each.
struct Unfused {
    a_bar: Vec<f32>,
    b_x: Vec<f32>,
    h: Vec<f32>,
}

impl Unfused {
    fn new() -> Unfused {
        let whole = || vec![0.0; T * N * D];
        Unfused { a_bar: whole(), b_x: whole(), h: whole() }
    }

    /// Discretise, scan, read out: each from memory to memory.
    fn run(&mut self, layer: &Layer, y: &mut [f32]) {
        for (i, (a_bar, b_x)) in self.a_bar.chunks_exact_mut(D).zip(self.b_x.chunks_exact_mut(D)).enumerate() {
            let (t, n) = (i / N, i % N);
            let (x, delta, a) = (&layer.x[t * D..][..D], &layer.delta[t * D..][..D], &layer.a[n * D..][..D]);
            let b = layer.b[t * N + n];
            for ((((a_bar, b_x), x), delta), a) in a_bar.iter_mut().zip(b_x).zip(x).zip(delta).zip(a) {
                *a_bar = exp(delta * a);
                *b_x = delta * b * x;
            }
        }
        self.h[..N * D].copy_from_slice(&self.b_x[..N * D]);
        for t in 1..T {
            let (before, now) = self.h.split_at_mut(t * N * D);
            let before = &before[(t - 1) * N * D..];
            let (a_bar, b_x) = (&self.a_bar[t * N * D..], &self.b_x[t * N * D..]);
            for (((h, before), a), b) in now[..N * D].iter_mut().zip(before).zip(a_bar).zip(b_x) {
                *h = a * before + b;
            }
        }
        for (t, y) in y.chunks_exact_mut(D).enumerate() {
            y.fill(0.0);
            for (n, h) in self.h[t * N * D..][..N * D].chunks_exact(D).enumerate() {
                let c = layer.c[t * N + n];
                y.iter_mut().zip(h).for_each(|(y, h)| *y += c * h);
            }
        }
    }
}

/// e^x for x ≤ 0 and not far below −80, in a form that compilers make vectors of: 2^k e^r with k the nearest whole number
/// to x / ln 2, and six terms of the series of e^r.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding it leaves a whole number in the last bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = x - k * std::f32::consts::LN_2;
    let series = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r / 720.0)))));
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    series * power
}

/// hognose's own op on a device.
struct Op {
    device: Device,
    plan: Plan,
    arena: hognose_core::Buffer,
    buffers: Vec<hognose_core::Buffer>,
}

impl Op {
    fn new(device: &Device, layer: &Layer) -> anyhow::Result<Op> {
        let mut graph = Graph::new();
        let (y, _) = record(&mut graph, T)?;
        graph.output("y", y)?;
        let plan = device.plan(graph)?;
        let arena = device.arena(&plan)?;
        let mut buffers = Vec::new();
        // The op has A as [D, N].
        let a: Vec<f32> = (0..D * N).map(|i| layer.a[i % N * D + i / N]).collect();
        for external in plan.graph().externals() {
            let buffer = device.alloc(device.external_bytes(&plan, external.tensor))?;
            match external.name.as_str() {
                "x" => buffer.write(0, &layer.x),
                "dt" => buffer.write(0, &layer.delta),
                "A" => buffer.write(0, &a),
                "B" => buffer.write(0, &layer.b),
                "C" => buffer.write(0, &layer.c),
                "segments" => buffer.write(0, &[0, T as i32]),
                _ => {}
            }
            buffers.push(buffer);
        }
        Ok(Op { device: device.clone(), plan, arena, buffers })
    }

    fn run(&self) -> anyhow::Result<()> {
        let bindings: Vec<_> = self.buffers.iter().map(|b| b.slice()).collect();
        self.device.run(&self.plan, &self.arena, &bindings)?;
        Ok(self.device.synchronize()?)
    }

    fn time(&self) -> anyhow::Result<f64> {
        self.run()?;
        let mut result = Ok(());
        let time = seconds(|| result = self.run());
        result.map(|()| time)
    }

    /// y of the last run.
    fn output(&self) -> anyhow::Result<Vec<f32>> {
        let at = self.plan.graph().externals().iter().position(|e| e.name == "y");
        let at = at.ok_or_else(|| anyhow::anyhow!("the scan has no output"))?;
        Ok(self.buffers[at].to_vec(0, T * D))
    }
}

/// A scan of `tokens` steps: y, and the operands that have a gradient.
fn record(graph: &mut Graph, tokens: usize) -> anyhow::Result<(TensorId, [TensorId; 5])> {
    let mut external = |name: &str, rows, cols| graph.external(name, DType::F32, rows, cols);
    let operands @ [x, dt, a, b, c] = [
        external("x", tokens, D),
        external("dt", tokens, D),
        external("A", D, N),
        external("B", tokens, N),
        external("C", tokens, N),
    ];
    let segments = graph.external("segments", DType::I32, 1, 2);
    let scan = SelectiveScan {
        x,
        dt,
        a,
        b,
        c,
        d: None,
        z: None,
        dt_bias: None,
        initial_state: None,
        segments,
        softplus: false,
        discretisation: Discretisation::Euler,
    };
    Ok((selective_scan(graph, scan)?.y, operands))
}

/// Bytes of everything between inputs and gradients, forward and backward, as hognose plans them.
fn gradient_bytes(device: &Device, tokens: usize) -> anyhow::Result<f64> {
    let mut graph = Graph::new();
    let (y, operands) = record(&mut graph, tokens)?;
    let dy = graph.external("dy", DType::F32, tokens, D);
    let gradients = graph.backward(&[(y, dy)], &operands, Recompute::Nothing)?;
    graph.output("y", y)?;
    for (i, gradient) in gradients.into_iter().flatten().enumerate() {
        graph.output(format!("gradient {i}"), gradient)?;
    }
    Ok(device.plan(graph)?.arena_bytes() as f64)
}

fn figure(counts: &[Vec<Count>; 4], traffic: &[f64; 2], times: &[f64; 4], kept: &[(usize, [f64; 3])]) -> Figure {
    let lines = |value: &dyn Fn(&Count) -> f64| -> Vec<Series> {
        let line = |(i, counts): (usize, &Vec<Count>)| {
            let points = counts.iter().map(|c| (c.length as f64, value(c)));
            Series::line(ALGORITHMS[i].0, i, points).mark(Mark::LineDots)
        };
        counts.iter().enumerate().map(line).collect()
    };
    let chart = |label: &str, series: Vec<Series>| Chart {
        x: Axis::log("steps L"),
        y: Axis::log(label),
        series,
        legend: Some(Legend::Above),
        ..Chart::default()
    };
    let bars = |label: &str, values: &[f64], names: &[&str]| {
        let bar = |(i, v): (usize, &f64)| Series::line("", [1, 0, 2, 2][i], [(i as f64, *v)]).mark(Mark::Bars(2.0));
        let highest = values.iter().fold(0.0f64, |m, v| m.max(*v));
        let note = |(i, v): (usize, &f64)| (i as f64 - 0.22, v + 0.05 * highest, super::report::short(*v));
        Chart {
            x: Axis::linear("")
                .from(-0.6, names.len() as f64 - 0.4)
                .ticks(names.iter().enumerate().map(|(i, n)| (i as f64, (*n).to_string()))),
            y: Axis::linear(label).from(0.0, 1.12 * highest),
            series: values.iter().enumerate().map(bar).collect(),
            notes: values.iter().enumerate().map(note).collect(),
            ..Chart::default()
        }
    };
    let memory = |name: &str, color: usize, i: usize| {
        Series::line(name, color, kept.iter().map(|k| (k.0 as f64, k.1[i] / 1e6))).mark(Mark::LineDots)
    };
    let milli: Vec<f64> = times.iter().map(|t| 1e3 * t).collect();
    Figure {
        title: "Scans: any grouping gives the same; fusion decides the speed".into(),
        subtitle: format!(
            "above: h_t = a_t h_(t−1) + b_t in four ways; below: a selective scan of {T} steps, {D} channels and {N} states"
        ),
        rows: vec![
            (
                1.0,
                vec![
                    Panel::chart("Work: applications of ∘", chart("work", lines(&|c| c.work as f64))),
                    Panel::chart("Depth: one after another", chart("depth", lines(&|c| c.depth as f64))),
                    Panel::chart("Time on one core", chart("μs", lines(&|c| 1e6 * c.seconds))),
                ],
            ),
            (
                1.0,
                vec![
                    Panel::chart(
                        "Bytes moved",
                        bars("MB", &[traffic[0] / 1e6, traffic[1] / 1e6], &["unfused", "fused"]),
                    )
                    .weight(0.7),
                    Panel::chart("Time", bars("ms", &milli, &["unfused", "fused", "hognose, 1 core", "all cores"]))
                        .weight(1.3),
                    Panel::chart(
                        "Kept for the gradient",
                        chart(
                            "MB",
                            vec![
                                memory("Ā, Bx and h", 1, 0),
                                memory("h", 3, 1),
                                memory("recomputed from chunks", 2, 2),
                            ],
                        ),
                    ),
                ],
            ),
        ],
    }
}
