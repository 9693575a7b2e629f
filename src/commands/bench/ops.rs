//! `hognose bench --op NAME`: one op at a model's sizes, forward and forward + backward.

use std::io::Write;
use std::time::Instant;

use hognose::{DType, Device, ModelConfig};
use hognose_core::cpu::ceiling::Ceiling;
use hognose_core::graph::Recompute;
use hognose_core::ops::adamw::{AdamW, HYPER_LEN, adamw, global_norm};
use hognose_core::ops::causal_conv1d::{CausalConv1d, causal_conv1d};
use hognose_core::ops::cross_entropy::{CrossEntropy, cross_entropy};
use hognose_core::ops::elementwise::{add, silu};
use hognose_core::ops::embedding::embedding;
use hognose_core::ops::gated_rms_norm::gated_rms_norm;
use hognose_core::ops::linear::linear;
use hognose_core::ops::norm::{layer_norm, rms_norm};
use hognose_core::ops::selective_scan::{Discretisation, SelectiveScan, selective_scan};
use hognose_core::ops::ssd::{Ssd, ssd};
use hognose_core::ops::swiglu::swiglu;
use hognose_core::{Error, Graph, Plan, Slice, TensorId, rng};
use hognose_model::config::{Mamba1Config, Mamba2Config, Mixer};
use hognose_model::presets;

use super::{Profile, profile_json, show_profile, spread};
use crate::args::{BenchArgs, DTypeArg, Usage};
use crate::terminal::si;

/// An op's bench: its name, the preset whose sizes it takes by default, and how it is recorded.
struct Bench {
    name: &'static str,
    preset: &'static str,
    /// Whether its gradient is measured, too.
    differentiable: bool,
    record: Record,
}

const BENCHES: [Bench; 14] = [
    bench("linear", "mamba-130m", record_linear),
    bench("selective_scan", "mamba-130m", record_selective_scan),
    bench("ssd", "mamba2-130m", record_ssd),
    bench("causal_conv1d", "mamba-130m", record_causal_conv1d),
    bench("rms_norm", "mamba-130m", record_rms_norm),
    bench("layer_norm", "mamba-130m", record_layer_norm),
    bench("gated_rms_norm", "mamba2-130m", record_gated_rms_norm),
    bench("swiglu", "mamba-130m", record_swiglu),
    bench("embedding", "mamba-130m", record_embedding),
    bench("cross_entropy", "mamba-130m", record_cross_entropy),
    bench("silu", "mamba-130m", record_silu),
    bench("add", "mamba-130m", record_add),
    Bench { differentiable: false, ..bench("global_norm", "mamba-130m", record_global_norm) },
    Bench { differentiable: false, ..bench("adamw", "mamba-130m", record_adamw) },
];

const fn bench(name: &'static str, preset: &'static str, record: Record) -> Bench {
    Bench { name, preset, differentiable: true, record }
}

type Record = fn(&mut Inputs, &Sizes) -> Result<TensorId, Error>;

/// Sizes that the benches take from a model and the arguments.
struct Sizes {
    model: ModelConfig,
    tokens: usize,
    segments: usize,
    /// Channels of the mixer, if they are not those of the model.
    width: Option<usize>,
}

impl Sizes {
    fn mamba1(&self) -> Result<&Mamba1Config, Error> {
        match &self.model.layers[0].mixer {
            Mixer::Mamba1(m) => Ok(m),
            _ => Err(unsupported("a Mamba-1 model's sizes; choose --model mamba-130m or the like")),
        }
    }

    fn mamba2(&self) -> Result<&Mamba2Config, Error> {
        match &self.model.layers[0].mixer {
            Mixer::Mamba2(m) => Ok(m),
            _ => Err(unsupported("a Mamba-2 model's sizes; choose --model mamba2-130m or the like")),
        }
    }

    fn d_inner(&self) -> usize {
        self.width.unwrap_or(self.model.layers[0].mixer.d_inner())
    }
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported { op: "bench", message: format!("this op needs {what}") }
}

/// Inputs of a bench: external tensors with the range of their random values.
struct Inputs {
    graph: Graph,
    /// Type of activations and of the weights of products.
    dtype: DType,
    ranges: Vec<(f32, f32)>,
    ints: Vec<Option<Vec<i32>>>,
    differentiable: Vec<TensorId>,
}

impl Inputs {
    fn new(dtype: DType) -> Inputs {
        Inputs { graph: Graph::new(), dtype, ranges: Vec::new(), ints: Vec::new(), differentiable: Vec::new() }
    }

    fn input(&mut self, dtype: DType, rows: usize, cols: usize, range: (f32, f32)) -> TensorId {
        let t = self.graph.external(format!("input {}", self.ranges.len()), dtype, rows, cols);
        self.ranges.push(range);
        self.ints.push(None);
        self.differentiable.push(t);
        t
    }

    /// A parameter that stays f32.
    fn f32(&mut self, rows: usize, cols: usize, range: (f32, f32)) -> TensorId {
        self.input(DType::F32, rows, cols, range)
    }

    /// An activation, or the weight of a product.
    fn normal(&mut self, rows: usize, cols: usize) -> TensorId {
        self.input(self.dtype, rows, cols, (-1.0, 1.0))
    }

    fn i32(&mut self, values: Vec<i32>) -> TensorId {
        let t = self.graph.external(format!("input {}", self.ranges.len()), DType::I32, 1, values.len());
        self.ranges.push((0.0, 0.0));
        self.ints.push(Some(values));
        t
    }

    fn segments(&mut self, sizes: &Sizes) -> TensorId {
        let length = sizes.tokens / sizes.segments;
        self.i32((0..=sizes.segments).map(|s| (s * length) as i32).collect())
    }
}

pub fn run(name: &str, args: &BenchArgs) -> anyhow::Result<()> {
    let Some(bench) = BENCHES.iter().find(|b| b.name == name) else {
        let known: Vec<&str> = BENCHES.iter().map(|b| b.name).collect();
        return Err(Usage(format!("there is no bench of an op \"{name}\"; there are {}", known.join(", "))).into());
    };
    args.compute.dtype.map_or(Ok(()), DTypeArg::check_trains)?;
    let dtype = args.compute.dtype.map_or(DType::F32, DTypeArg::dtype);
    let model = presets::preset(args.model.as_deref().unwrap_or(bench.preset))?;
    let sizes = Sizes { model, tokens: args.batch * args.length, segments: args.batch, width: args.width };
    let device = args.compute.device()?;
    if let (DType::BF16, Device::Cpu(_)) = (dtype, &device) {
        return Err(Usage("ops on the CPU compute in f32; leave out --dtype bf16".into()).into());
    }
    let ceiling = device.measure_ceiling();
    let mut reports = Vec::new();
    for &gradient in &[false, true][..1 + usize::from(bench.differentiable)] {
        let mut inputs = Inputs::new(dtype);
        let out = (bench.record)(&mut inputs, &sizes)?;
        if gradient {
            let (rows, cols) = (inputs.graph.rows(out), inputs.graph.cols(out));
            let wrt = inputs.differentiable.clone();
            // A loss is the end of a graph: its gradient is 1. Anything else gets a random one.
            let seed = if rows * cols == 1 {
                hognose_core::ops::elementwise::fill(&mut inputs.graph, DType::F32, 1, 1, 1.0)?
            } else {
                let dtype = inputs.graph.dtype(out);
                inputs.input(dtype, rows, cols, (-1.0, 1.0))
            };
            let gradients = inputs.graph.backward(&[(out, seed)], &wrt, Recompute::Nothing)?;
            for (i, gradient) in gradients.into_iter().enumerate() {
                if let Some(gradient) = gradient {
                    inputs.graph.output(format!("gradient {i}"), gradient)?;
                }
            }
        }
        inputs.graph.output("output", out)?;
        let Inputs { graph, ranges, ints, .. } = inputs;
        reports.push(measure(&device, graph, &ranges, &ints, args)?);
    }
    show(bench.name, &sizes, args, &device, &ceiling, &reports)
}

struct Report {
    seconds: (f64, f64, f64),
    flops: f64,
    bytes: f64,
    profile: Profile,
}

fn measure(
    device: &Device,
    graph: Graph,
    ranges: &[(f32, f32)],
    ints: &[Option<Vec<i32>>],
    args: &BenchArgs,
) -> anyhow::Result<Report> {
    let plan: Plan = device.plan(graph)?;
    let arena = device.arena(&plan)?;
    let externals = plan.graph().externals();
    let mut buffers = Vec::new();
    let mut given = 0;
    for external in externals {
        let mut buffer = device.alloc(device.external_bytes(&plan, external.tensor))?;
        if external.name.starts_with("input") {
            match &ints[given] {
                Some(values) => buffer.write(0, values),
                None => {
                    let (low, high) = ranges[given];
                    let tensor = plan.graph().tensor(external.tensor);
                    let (rows, cols) = (tensor.rows, tensor.cols);
                    let values = uniform(rows * cols, given as u32, low, high);
                    device.write_matrix(&mut buffer, 0, (tensor.dtype, tensor.layout), (rows, cols), &values);
                }
            }
            given += 1;
        }
        buffers.push(buffer);
    }
    let bindings: Vec<Slice<'_>> = buffers.iter().map(|b| b.slice()).collect();
    device.run(&plan, &arena, &bindings)?;
    device.synchronize()?;
    let profile = if args.profile { device.profile(&plan, &arena, &bindings)? } else { Vec::new() };
    // Runs on a GPU are enqueued, several for one measurement, so that the time of enqueuing them is hidden.
    let runs = if matches!(device, Device::Cuda(_)) { 10 } else { 1 };
    let mut seconds = Vec::new();
    let begin = Instant::now();
    // Short ops are repeated for half a second, however few measurements were asked for.
    while seconds.len() < args.repeat || begin.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        for _ in 0..runs {
            device.run(&plan, &arena, &bindings)?;
        }
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64() / f64::from(runs));
    }
    let cost = plan.cost();
    Ok(Report { seconds: spread(&seconds), flops: cost.flops, bytes: cost.bytes, profile })
}

/// `n` random numbers in [low, high), drawn by all cores.
fn uniform(n: usize, seed: u32, low: f32, high: f32) -> Vec<f32> {
    let mut values = vec![0.0; n];
    let part = n.div_ceil(std::thread::available_parallelism().map_or(1, |n| n.get())).max(1);
    std::thread::scope(|scope| {
        for (p, values) in values.chunks_mut(part).enumerate() {
            let first = (p * part) as u64;
            scope.spawn(move || {
                for (i, value) in (first..).zip(values) {
                    *value = low + (high - low) * rng::uniform(seed, i);
                }
            });
        }
    });
    values
}

fn show(
    name: &str,
    sizes: &Sizes,
    args: &BenchArgs,
    device: &Device,
    ceiling: &Ceiling,
    reports: &[Report],
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut passes = Vec::new();
    for (pass, report) in ["forward", "forward + backward"].iter().zip(reports) {
        let (min, median, max) = report.seconds;
        let (by_flops, by_bytes) = (report.flops / ceiling.flops, report.bytes / ceiling.bandwidth);
        let bound = if by_bytes > by_flops { "bandwidth" } else { "flops" };
        let share = by_flops.max(by_bytes) / median;
        let rate = sizes.tokens as f64 / median;
        show_profile(&report.profile);
        if args.json {
            passes.push(serde_json::json!({
                "pass": pass, "tokens_per_second": rate, "seconds": { "min": min, "median": median, "max": max },
                "flops": report.flops, "bytes": report.bytes, "ceiling": { "bound": bound, "share": share },
                "profile": profile_json(&report.profile),
            }));
        } else {
            writeln!(
                out,
                "{name} {pass}: {:.1} µs, {rate:.0} tokens/s, {}, {}, {:.0}% of the measured {bound}",
                1e6 * median,
                si(report.flops / median, "FLOP/s"),
                si(report.bytes / median, "B/s"),
                100.0 * share
            )?;
        }
    }
    if args.json {
        let object = serde_json::json!({
            "op": name, "device": device.describe(), "dtype": args.compute.dtype.map_or(DType::F32, DTypeArg::dtype).to_string(),
            "width": args.width, "batch": args.batch, "length": args.length,
            "passes": passes, "ceiling": { "flops": ceiling.flops, "bandwidth": ceiling.bandwidth },
        });
        writeln!(out, "{object}")?;
    }
    Ok(())
}

fn record_linear(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let x = i.normal(s.tokens, s.model.d_model);
    let weight = i.normal(2 * s.d_inner(), s.model.d_model);
    linear(&mut i.graph, x, weight, None)
}

fn record_selective_scan(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let m = s.mamba1()?;
    let scan = SelectiveScan {
        x: i.normal(s.tokens, s.d_inner()),
        dt: i.normal(s.tokens, s.d_inner()),
        a: i.f32(s.d_inner(), m.d_state, (-16.0, -1.0)),
        b: i.normal(s.tokens, m.d_state),
        c: i.normal(s.tokens, m.d_state),
        d: Some(i.f32(1, s.d_inner(), (-1.0, 1.0))),
        z: Some(i.normal(s.tokens, s.d_inner())),
        dt_bias: Some(i.f32(1, s.d_inner(), (-6.0, -2.0))),
        initial_state: None,
        segments: i.segments(s),
        softplus: true,
        discretisation: Discretisation::Euler,
    };
    Ok(selective_scan(&mut i.graph, scan)?.y)
}

fn record_ssd(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let m = s.mamba2()?;
    let heads = s.d_inner() / m.headdim;
    let scan = Ssd {
        x: i.normal(s.tokens, heads * m.headdim),
        dt: i.normal(s.tokens, heads),
        a: i.f32(1, heads, (-16.0, -1.0)),
        b: i.normal(s.tokens, m.ngroups * m.d_state),
        c: i.normal(s.tokens, m.ngroups * m.d_state),
        d: Some(i.f32(1, heads, (-1.0, 1.0))),
        z: None,
        dt_bias: Some(i.f32(1, heads, (-6.0, -2.0))),
        initial_state: None,
        segments: i.segments(s),
        headdim: m.headdim,
        d_state: m.d_state,
        chunk: m.chunk_size,
        softplus: true,
        dt_limit: m.dt_limit,
    };
    Ok(ssd(&mut i.graph, scan)?.y)
}

fn record_causal_conv1d(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let m = s.mamba1()?;
    let conv = CausalConv1d {
        x: i.normal(s.tokens, s.d_inner()),
        weight: i.f32(s.d_inner(), m.d_conv, (-1.0, 1.0)),
        bias: Some(i.f32(1, s.d_inner(), (-1.0, 1.0))),
        initial_state: None,
        segments: i.segments(s),
        silu: true,
    };
    Ok(causal_conv1d(&mut i.graph, conv)?.y)
}

fn record_rms_norm(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let d = s.model.d_model;
    let (x, residual) = (i.normal(s.tokens, d), i.f32(s.tokens, d, (-1.0, 1.0)));
    let weight = i.f32(1, d, (-1.0, 1.0));
    Ok(rms_norm(&mut i.graph, x, Some(residual), Some(weight), 1e-5)?.y)
}

fn record_layer_norm(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let d = s.model.d_model;
    let (x, residual) = (i.normal(s.tokens, d), i.f32(s.tokens, d, (-1.0, 1.0)));
    let (weight, bias) = (i.f32(1, d, (-1.0, 1.0)), i.f32(1, d, (-1.0, 1.0)));
    Ok(layer_norm(&mut i.graph, x, Some(residual), weight, bias, 1e-5)?.y)
}

fn record_gated_rms_norm(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let d = s.d_inner();
    let (x, z) = (i.normal(s.tokens, d), i.normal(s.tokens, d));
    let weight = i.f32(1, d, (-1.0, 1.0));
    gated_rms_norm(&mut i.graph, x, z, Some(weight), d, 1e-5, false)
}

fn record_swiglu(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let x = i.normal(s.tokens, 2 * s.d_inner());
    swiglu(&mut i.graph, x)
}

fn record_embedding(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let weight = i.normal(s.model.padded_vocab, s.model.d_model);
    let ids = i.i32((0..s.tokens).map(|t| (t * 7919 % s.model.vocab_size) as i32).collect());
    embedding(&mut i.graph, ids, weight)
}

fn record_cross_entropy(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let h = i.normal(s.tokens, s.model.d_model);
    let weight = i.input(i.dtype, s.model.padded_vocab, s.model.d_model, (-0.02, 0.02));
    let targets = i.i32((0..s.tokens).map(|t| (t * 7919 % s.model.vocab_size) as i32).collect());
    let scale = i.f32(1, 1, (0.5, 1.0));
    // The scale is no parameter.
    i.differentiable.pop();
    let inputs = CrossEntropy { h, weight, targets, scale, with_gradient: true };
    Ok(cross_entropy(&mut i.graph, inputs)?.loss)
}

fn record_silu(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let x = i.normal(s.tokens, s.d_inner());
    silu(&mut i.graph, x)
}

fn record_add(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let (a, b) = (i.normal(s.tokens, s.d_inner()), i.normal(s.tokens, s.d_inner()));
    add(&mut i.graph, a, b)
}

fn record_global_norm(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let grads = i.f32(1, s.model.parameter_count() as usize, (-1e-3, 1e-3));
    global_norm(&mut i.graph, grads)
}

/// The update of all parameters of the model, whatever the number of tokens.
fn record_adamw(i: &mut Inputs, s: &Sizes) -> Result<TensorId, Error> {
    let n = s.model.parameter_count() as usize;
    let params = i.f32(1, n, (-0.02, 0.02));
    let grads = i.f32(1, n, (-1e-3, 1e-3));
    let m = i.f32(1, n, (-1e-3, 1e-3));
    let v = i.f32(1, n, (1e-7, 1e-6));
    let hyper = i.f32(1, HYPER_LEN, (0.1, 0.2));
    let norm = i.f32(1, 1, (0.5, 1.0));
    let decayed = std::iter::once(0..n / 2).collect();
    adamw(&mut i.graph, AdamW { params, grads, m, v, hyper, norm, decayed, rounded: None })?;
    // What it updates is in place already.
    Ok(norm)
}
