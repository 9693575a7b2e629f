//! `hognose bench`: speed of a model or an op, and the share of the machine's measured ceiling that it is.

mod ops;

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use hognose::{DType, Device, ModelConfig, Session};
use hognose_core::Pack;
use hognose_core::cpu::ceiling::Ceiling;
use hognose_core::error::human_bytes;
use hognose_core::graph::Recompute;
use hognose_core::ops::adamw::Hyper;
use hognose_engine::{Sampler, Sampling};
use hognose_model::checkpoint::{Checkpoint, is_gguf};
use hognose_model::presets;
use hognose_model::session::Model;
use hognose_model::weights::{Form, Weights, matrix_shape};
use hognose_train::step::{GradientPlan, StepInputs, StepShape, UpdatePlan};

use crate::args::{BenchArgs, DTypeArg, Mode, Usage};
use crate::terminal::{si, thousands};

/// Tokens of each sequence before decoding is measured.
const DECODE_PROMPT: usize = 16;
/// Steps that a GPU is ahead of what was read of it, as in the engine.
const DECODE_AHEAD: usize = 4;

pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    for (name, value) in [("batch", args.batch), ("length", args.length), ("repeat", args.repeat)] {
        if value == 0 {
            return Err(Usage(format!("--{name} is 0; expected a whole number from 1 up")).into());
        }
    }
    if args.batch.checked_mul(args.length).is_none_or(|tokens| tokens > i32::MAX as usize) {
        let text = format!("--batch {} times --length {} is more than 2³¹ − 1 tokens", args.batch, args.length);
        return Err(Usage(text).into());
    }
    if let Some(op) = &args.op {
        return ops::run(op, &args);
    }
    let Some(name) = &args.model else {
        return Err(Usage("give --model PRESET|PATH, or --op NAME".into()).into());
    };
    let device = args.compute.device()?;
    let dtype = args.compute.dtype.map_or(DType::F32, DTypeArg::dtype);
    let form = if args.mode == Mode::Train { Form::training(&device, dtype) } else { Form::inference(&device, dtype) };
    if let (Mode::Train, Some(dtype)) = (args.mode, args.compute.dtype) {
        dtype.check_trains()?;
    }
    // What a GGUF file holds is what its user wants to know about.
    let as_stored = args.mode != Mode::Train && args.compute.dtype.is_none() && is_gguf(Path::new(name));
    let model = load(name, device, (!as_stored).then_some(form))?;
    let dtype = if as_stored { "as stored".to_string() } else { dtype.to_string() };
    eprintln!("{name}: {} parameters on {}", thousands(model.config.parameter_count()), model.device.describe());
    let ceiling = model.device.measure_ceiling();
    let found = match args.mode {
        Mode::Prefill => prefill(&model, &args)?,
        Mode::Decode => decode(&model, &args)?,
        Mode::Train => train(&model, &args)?,
    };
    report(&args, name, &model, &dtype, &ceiling, &found)
}

/// A preset with random weights, or a checkpoint; without a form in the one that it has by itself.
fn load(name: &str, device: Device, form: Option<Form>) -> anyhow::Result<Model> {
    if !Path::new(name).exists()
        && let Ok(config) = presets::preset(name)
    {
        let form = form.unwrap_or_else(|| Form::inference(&device, DType::F32));
        let weights = Weights::initialise(&device, &config, form, 0)?;
        return Ok(Model { config, weights, device });
    }
    if !Path::new(name).exists() && !name.contains('/') {
        presets::preset(name).map_err(|e| Usage(e.to_string()))?;
    }
    let checkpoint = Checkpoint::open(hognose_model::hub::resolve(name)?)?;
    let form = form.unwrap_or_else(|| Form::of_checkpoint(&device, &checkpoint));
    let weights = Weights::load(&device, &checkpoint, form)?;
    Ok(Model { config: checkpoint.config, weights, device })
}

/// What was measured.
struct Found {
    seconds: Vec<f64>,
    /// Tokens of one measurement.
    tokens: usize,
    /// Bytes in use at the peak: parameters, states, arena, inputs and outputs.
    peak_bytes: usize,
    /// Operations and bytes of one measurement that cannot be avoided.
    flops: f64,
    bytes: f64,
    /// Seconds of each op of one run, if asked for.
    profile: Profile,
}

/// Names of ops in their order, and the seconds that each took by itself.
type Profile = Vec<(&'static str, f64)>;

fn prefill(model: &Model, args: &BenchArgs) -> anyhow::Result<Found> {
    let mut session = Session::new(model, args.batch)?;
    let step = session.prefill_tokens();
    let mut seconds = Vec::new();
    // The first pass makes the plans and warms the caches.
    for pass in 0..=args.repeat {
        (0..args.batch).for_each(|slot| session.reset(slot));
        let start = Instant::now();
        let mut done = 0;
        while done < args.length {
            let part = step.min(args.length - done);
            let pack = Pack::from_lengths(std::iter::repeat_n(part, args.batch))?;
            let ids = random_ids(part * args.batch, &model.config, done as u64);
            done += part;
            let rows: Vec<usize> =
                if done == args.length { (1..=args.batch).map(|b| b * part - 1).collect() } else { Vec::new() };
            session.run(&ids, &pack, &rows)?;
        }
        if pass > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let mut profile = Vec::new();
    if args.profile {
        let part = step.min(args.length);
        let pack = Pack::from_lengths(std::iter::repeat_n(part, args.batch))?;
        let ids = random_ids(part * args.batch, &model.config, 0);
        let rows: Vec<usize> = (1..=args.batch).map(|b| b * part - 1).collect();
        profile = session.profile(&ids, &pack, &rows)?;
    }
    let tokens = args.batch * args.length;
    let peak_bytes = model.weights.bytes() + session.bytes();
    let flops = session.flops_per_token() * tokens as f64;
    Ok(Found { seconds, tokens, peak_bytes, flops, bytes: 0.0, profile })
}

fn decode(model: &Model, args: &BenchArgs) -> anyhow::Result<Found> {
    let mut session = Session::new(model, args.batch)?;
    let one = Pack::from_lengths(std::iter::repeat_n(1, args.batch))?;
    let rows: Vec<usize> = (0..args.batch).collect();
    let mut seconds = Vec::new();
    for pass in 0..=args.repeat {
        (0..args.batch).for_each(|slot| session.reset(slot));
        let prompt = random_ids(DECODE_PROMPT * args.batch, &model.config, 0);
        for ids in prompt.chunks_exact(args.batch) {
            session.run(ids, &one, &rows)?;
        }
        let ids = random_ids(args.batch, &model.config, 1);
        let elapsed = if session.has_steps(args.batch) {
            decode_on_device(&mut session, &ids, args.length)?
        } else {
            decode_on_host(&mut session, ids, args.length)?
        };
        if pass > 0 {
            seconds.push(elapsed);
        }
    }
    let profile = match args.profile {
        true => session.profile(&random_ids(args.batch, &model.config, 1), &one, &rows)?,
        false => Vec::new(),
    };
    let tokens = args.batch * args.length;
    let peak_bytes = model.weights.bytes() + session.bytes();
    // Each step reads the weights once, and reads and writes every state.
    let read = model.weights.bytes() - untouched_bytes(model) + 2 * session.state_bytes();
    let bytes = (read * args.length) as f64;
    let flops = session.flops_per_token() * tokens as f64;
    Ok(Found { seconds, tokens, peak_bytes, flops, bytes, profile })
}

/// Seconds of `length` steps as a GPU takes them when it generates: it chooses each token itself.
fn decode_on_device(session: &mut Session<'_>, ids: &[u32], length: usize) -> anyhow::Result<f64> {
    let samplers = vec![Sampler::new(Sampling::greedy())?; ids.len()];
    let starts: Vec<_> = samplers.iter().zip(ids).enumerate().map(|(slot, (s, &id))| s.start(slot, id)).collect();
    let mut steps = session.steps(&starts, false)?;
    let start = Instant::now();
    for done in 0..length {
        steps.launch(DECODE_AHEAD.min(length - done))?;
        anyhow::ensure!(steps.read()?.iter().all(Option::is_some), "the logits are not finite");
    }
    let elapsed = start.elapsed().as_secs_f64();
    steps.finish()?;
    Ok(elapsed)
}

/// Seconds of `length` steps, the likeliest tokens chosen by the host.
fn decode_on_host(session: &mut Session<'_>, mut ids: Vec<u32>, length: usize) -> anyhow::Result<f64> {
    let vocabulary = session.model().config.padded_vocab;
    let one = Pack::from_lengths(std::iter::repeat_n(1, ids.len()))?;
    let rows: Vec<usize> = (0..ids.len()).collect();
    let start = Instant::now();
    for _ in 0..length {
        let logits = session.run(&ids, &one, &rows)?;
        ids = logits.chunks_exact(vocabulary).map(hognose_engine::sampling::argmax).collect();
    }
    Ok(start.elapsed().as_secs_f64())
}

/// What each kind of op takes, largest first: name, number of ops, seconds together.
fn sums_by_op(profile: &Profile) -> Vec<(&'static str, usize, f64)> {
    let mut sums: Vec<(&str, usize, f64)> = Vec::new();
    for &(name, seconds) in profile {
        match sums.iter_mut().find(|s| s.0 == name) {
            Some(sum) => (sum.1, sum.2) = (sum.1 + 1, sum.2 + seconds),
            None => sums.push((name, 1, seconds)),
        }
    }
    sums.sort_by(|a, b| b.2.total_cmp(&a.2));
    sums
}

/// Prints what each kind of op takes; nothing, if there is no profile.
fn show_profile(profile: &Profile) {
    let total: f64 = profile.iter().map(|op| op.1).sum();
    if !profile.is_empty() {
        eprintln!("  each op by itself, {:.3} ms together:", 1e3 * total);
    }
    for (name, count, seconds) in sums_by_op(profile) {
        let (each, share) = (1e6 * seconds / count as f64, 100.0 * seconds / total);
        eprintln!("  {name:28} {count:5} x {each:9.1} µs = {:9.3} ms {share:5.1}%", 1e3 * seconds);
    }
}

/// A profile for the JSON of a measurement.
fn profile_json(profile: &Profile) -> Vec<serde_json::Value> {
    let object = |(op, count, seconds)| serde_json::json!({ "op": op, "count": count, "seconds": seconds });
    sums_by_op(profile).into_iter().map(object).collect()
}

/// Bytes of an untied embedding, of which a step reads a row a sequence only.
fn untouched_bytes(model: &Model) -> usize {
    if model.config.tie_embeddings {
        return 0;
    }
    let embedding = model.weights.entries().find(|(_, spec)| spec.name == "backbone.embedding.weight");
    embedding.map_or(0, |(_, spec)| {
        let (rows, cols) = matrix_shape(&spec.shape);
        rows * model.weights.form().of(spec, &model.config).0.row_bytes(cols)
    })
}

fn train(model: &Model, args: &BenchArgs) -> anyhow::Result<Found> {
    let Model { config, weights, device } = model;
    let tokens = args.batch * args.length;
    let shape = StepShape {
        form: model.weights.form().clone(),
        tokens,
        segments: args.batch,
        carry_state: false,
        gradients: true,
        accumulate: false,
        dropout: 0.0,
        recompute: args.recompute.map_or(Recompute::Nothing, |r| r.recomputation().into()),
    };
    let plan = GradientPlan::new(device, config, shape)?;
    let update = UpdatePlan::new(device, weights)?;
    let persistent = 4 * weights.bytes();
    let arena_bytes = plan.plan().arena_bytes().max(update.plan().arena_bytes());
    eprintln!(
        "plan: {} of parameters, gradients and moments, arena {} (without sharing {}), {} free",
        human_bytes(persistent as u64),
        human_bytes(arena_bytes as u64),
        human_bytes(plan.plan().unshared_bytes() as u64),
        human_bytes(device.available_memory())
    );
    let arena = if plan.plan().arena_bytes() == arena_bytes {
        device.arena(plan.plan())?
    } else {
        device.arena(update.plan())?
    };
    let gradients = device.alloc(GradientPlan::gradient_bytes(weights.bytes()))?;
    let [m, v] = [device.alloc(weights.bytes())?, device.alloc(weights.bytes())?];
    let pack = Pack::from_lengths(std::iter::repeat_n(args.length, args.batch))?;
    let mut seconds = Vec::new();
    for pass in 0..=args.repeat as u64 {
        let ids = random_ids(tokens, config, pass);
        let targets: Vec<i32> = random_ids(tokens, config, pass + 1000).into_iter().map(|i| i as i32).collect();
        let inputs = StepInputs {
            ids: &ids,
            targets: &targets,
            pack: &pack,
            loss_scale: 1.0 / tokens as f32,
            states: None,
            dropout_seed: [0; 3],
        };
        let start = Instant::now();
        let loss = plan.run(device, &arena, weights, Some(&gradients), &inputs)?;
        let hyper = Hyper { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 };
        update.run(device, &arena, weights, [&gradients, &m, &v], &hyper, pass + 1)?;
        anyhow::ensure!(loss.is_finite(), "the loss is not finite");
        if pass > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let mut profile = Vec::new();
    if args.profile {
        let ids = random_ids(tokens, config, 0);
        let targets: Vec<i32> = ids.iter().map(|&i| i as i32).collect();
        let inputs = StepInputs {
            ids: &ids,
            targets: &targets,
            pack: &pack,
            loss_scale: 1.0 / tokens as f32,
            states: None,
            dropout_seed: [0; 3],
        };
        profile = plan.profile(device, &arena, weights, Some(&gradients), &inputs)?;
        let hyper = Hyper { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_norm: 1.0 };
        profile.extend(update.profile(device, &arena, weights, [&gradients, &m, &v], &hyper, 1)?);
    }
    let peak_bytes = persistent + arena.bytes();
    Ok(Found { seconds, tokens, peak_bytes, flops: plan.cost().flops, bytes: 0.0, profile })
}

fn report(
    args: &BenchArgs,
    name: &str,
    model: &Model,
    dtype: &str,
    ceiling: &Ceiling,
    found: &Found,
) -> anyhow::Result<()> {
    let (min, median, max) = spread(&found.seconds);
    let rate = found.tokens as f64 / median;
    // What bounds it: the slower of computing at the peak and reading at the bandwidth.
    let by_flops = found.flops / ceiling.flops;
    let by_bytes = found.bytes / ceiling.bandwidth;
    let (bound, share) =
        if by_bytes > by_flops { ("bandwidth", by_bytes / median) } else { ("flops", by_flops / median) };
    let mode = format!("{:?}", args.mode).to_lowercase();
    show_profile(&found.profile);
    if args.json {
        let mut object = serde_json::json!({
            "model": name, "mode": mode, "device": model.device.describe(), "dtype": dtype,
            "batch": args.batch, "length": args.length, "tokens_per_second": rate,
            "seconds": { "min": min, "median": median, "max": max }, "peak_bytes": found.peak_bytes,
            "ceiling": { "bound": bound, "share": share, "flops": ceiling.flops, "bandwidth": ceiling.bandwidth },
        });
        if args.profile {
            object["profile"] = profile_json(&found.profile).into();
        }
        writeln!(std::io::stdout(), "{object}")?;
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{mode}, batch {}, length {}, {dtype}", args.batch, args.length)?;
    writeln!(out, "  {rate:.1} tokens/s (median of {}; {min:.3} / {median:.3} / {max:.3} s)", found.seconds.len())?;
    let measured = match bound {
        "bandwidth" => si(ceiling.bandwidth, "B/s"),
        _ => si(ceiling.flops, "FLOP/s"),
    };
    writeln!(out, "  {:.0}% of what {measured} of measured {bound} allow", 100.0 * share)?;
    writeln!(out, "  {} at the peak", human_bytes(found.peak_bytes as u64))?;
    Ok(())
}

/// Smallest, middle and largest.
fn spread(seconds: &[f64]) -> (f64, f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[0], (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0, sorted[n - 1])
}

fn random_ids(n: usize, config: &ModelConfig, seed: u64) -> Vec<u32> {
    let draw = |i: u64| hognose_core::rng::philox(seed as u32, i) % config.vocab_size as u64;
    (0..n as u64).map(|i| draw(i) as u32).collect()
}
