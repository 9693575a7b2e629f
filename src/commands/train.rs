//! `hognose train`: a run from text to checkpoint, with everything a person wants to know on the way.

use std::io::{IsTerminal, Write};
use std::path::Path;

use hognose::{Device, GenerateOptions, Sampling, Session, Tokenizer, TrainConfig};
use hognose_core::error::human_bytes;
use hognose_engine::generate::{Event, generate};
use hognose_engine::text::TextStream;
use hognose_model::session::Model;
use hognose_train::config::{DeviceKind, Dtype};
use hognose_train::report::{Baselines, EvaluationReport, Observer, Outcome, PlanReport, StepReport};
use hognose_train::{setup, trainer};
use indicatif::ProgressBar;

use crate::args::{Compute, DTypeArg, DeviceArg, RecomputeArg, TrainArgs, Usage, say_cpu};
use crate::terminal::{self, duration, si, thousands};

/// Tokens of a line that the model writes on the way.
const SAMPLE_TOKENS: usize = 120;

pub fn run(args: TrainArgs) -> anyhow::Result<()> {
    terminal::catch_interrupts()?;
    let mut watcher = Watcher::default();
    let outcome = match &args.resume {
        Some(folder) => {
            let config = trainer::read_config(folder)?;
            let config = TrainConfig {
                threads: args.compute.threads.map(|n| n as usize).or(config.threads),
                steps: args.steps.unwrap_or(config.steps),
                minutes: args.minutes.or(config.minutes),
                devices: if args.devices.is_empty() { config.devices } else { args.devices.clone() },
                ..config
            };
            let config = config.resolve().map_err(|e| Usage(e.to_string()))?;
            Some(trainer::resume(folder, config.clone(), devices(&config)?, &mut watcher)?)
        }
        None => {
            let config = configuration(&args)?;
            let name = config.init.as_ref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
            let folder = args.out.clone().unwrap_or_else(|| setup::free_folder(&name.unwrap_or(config.preset.clone())));
            let devices = devices(&config)?;
            trainer::train(config, devices, &folder, args.plan_only, &mut watcher)?
        }
    };
    if let Some(outcome) = outcome {
        watcher.finish(&outcome)?;
    }
    Ok(())
}

/// The devices that the configuration names.
fn devices(config: &TrainConfig) -> anyhow::Result<Vec<Device>> {
    let (devices, why_not) = setup::devices(config)?;
    if let Some(why) = why_not {
        say_cpu(&why);
    }
    Ok(devices)
}

/// The configuration file, then what the command line says.
fn configuration(args: &TrainArgs) -> anyhow::Result<TrainConfig> {
    let mut config = match &args.config {
        Some(path) => TrainConfig::load(path)?,
        None => TrainConfig::default(),
    };
    let plain = args.config.is_none() && args.preset.is_none() && args.model.is_none() && args.steps.is_none();
    if plain && args.data.is_empty() && args.minutes.is_none() {
        config.minutes = Some(setup::DEFAULT_MINUTES);
    }
    if let Some(preset) = &args.preset {
        hognose_model::presets::preset(preset).map_err(|e| Usage(e.to_string()))?;
        config.preset.clone_from(preset);
    }
    if let Some(model) = &args.model {
        config.init = Some(model.into());
    }
    if !args.data.is_empty() {
        config.data.paths = args.data.iter().map(Into::into).collect();
    }
    if let Some(field) = &args.field {
        config.data.field.clone_from(field);
    }
    config.data.tokenizer = args.tokenizer.clone().or(config.data.tokenizer);
    config.steps = args.steps.unwrap_or(config.steps);
    config.length = args.length.unwrap_or(config.length);
    config.batch = args.batch.unwrap_or(config.batch);
    config.accumulation = args.accumulate.unwrap_or(config.accumulation);
    config.optimizer.lr = args.lr.unwrap_or(config.optimizer.lr);
    config.minutes = args.minutes.or(config.minutes);
    config.seed = args.seed.unwrap_or(config.seed);
    config.recompute = args.recompute.map_or(config.recompute, RecomputeArg::recomputation);
    if !args.devices.is_empty() {
        config.devices.clone_from(&args.devices);
    }
    args.compute.dtype.map_or(Ok(()), DTypeArg::check_trains)?;
    apply(&args.compute, &mut config);
    config.resolve().map_err(|e| Usage(e.to_string()).into())
}

fn apply(compute: &Compute, config: &mut TrainConfig) {
    config.threads = compute.threads.map(|n| n as usize).or(config.threads);
    match compute.device {
        DeviceArg::Auto => {}
        DeviceArg::Cpu => config.device = DeviceKind::Cpu,
        DeviceArg::Cuda => config.device = DeviceKind::Cuda,
    }
    match compute.dtype {
        // Others were refused.
        None | Some(DTypeArg::Q8 | DTypeArg::Q4K) => {}
        Some(DTypeArg::F32) => config.dtype = Dtype::F32,
        Some(DTypeArg::Bf16) => config.dtype = Dtype::Bf16,
    }
}

/// Shows a run on stderr.
#[derive(Default)]
struct Watcher {
    bar: Option<ProgressBar>,
    /// The last bits per byte on held-out text.
    held_out: Option<f64>,
    baselines: Option<Baselines>,
    shown: u64,
}

impl Watcher {
    /// Prints a line above the bar.
    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => eprintln!("{text}"),
        }
    }

    fn finish(&self, outcome: &Outcome) -> anyhow::Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let folder = outcome.folder.display();
        if outcome.interrupted {
            eprintln!("\nstopped after {} of {} steps; go on with", outcome.step, outcome.steps);
            eprintln!("  hognose train --resume {}", terminal::quoted(&outcome.folder));
            return Ok(());
        }
        eprintln!("\ndone: {} steps in {}", thousands(outcome.step), duration(outcome.elapsed));
        if let Some(bits) = outcome.bits_per_byte {
            eprintln!("\n  held-out text, bits per byte");
            eprintln!("  {:<10} {bits:.3}", "hognose");
            if let Some(b) = &outcome.baselines {
                eprintln!("  {:<10} {:.3}", "xz -9", b.xz.bits_per_byte);
                eprintln!("  {:<10} {:.3}", "gzip -9", b.gzip.bits_per_byte);
                eprintln!("  (compressors: what the held-out text adds to the size of the training text)");
            }
        }
        let path = |name: &str| outcome.folder.join(name).display().to_string();
        eprintln!("\n  model      {folder}  (Hugging Face layout)");
        eprintln!("  metrics    {}", path("metrics.jsonl"));
        eprintln!("  curves     {}", path("loss.png"));
        eprintln!("\nnow try\n  {}", generate_command(&outcome.folder));
        Ok(())
    }
}

/// The command to type next. Run through cargo, the program is not on the path.
fn generate_command(folder: &Path) -> String {
    let arguments = format!("generate --model {} --prompt \"Call me \"", terminal::quoted(folder));
    if std::env::var_os("CARGO").is_some() {
        format!("cargo run --release -- {arguments}")
    } else {
        format!("hognose {arguments}")
    }
}

impl Observer for Watcher {
    fn plan(&mut self, plan: &PlanReport) {
        let layers = plan.model.n_layer();
        eprintln!(
            "model    {} parameters, {layers} layers of width {}, {} token ids ({})",
            thousands(plan.parameters),
            plan.model.d_model,
            plan.model.vocab_size,
            plan.tokenizer
        );
        eprintln!(
            "data     {} in {} documents for training, {} in {} held out",
            human_bytes(plan.training_bytes),
            thousands(plan.training_documents as u64),
            human_bytes(plan.held_out_bytes),
            thousands(plan.held_out_documents as u64)
        );
        eprintln!("         {}", plan.data);
        let passes = plan.step_tokens as f64 * plan.steps as f64 / plan.training_tokens.max(1) as f64;
        eprintln!(
            "steps    {} of {} tokens ({passes:.1} passes over the text), {} each",
            thousands(plan.steps),
            thousands(plan.step_tokens),
            si(plan.step_flops, "FLOP")
        );
        // What does not fit was refused before.
        let each = if plan.devices > 1 { format!(" on each of {} devices", plan.devices) } else { String::new() };
        eprintln!(
            "memory   {} of parameters, gradients and moments + arena of {} (without sharing {}): fits into {} free{each}",
            human_bytes(plan.persistent_bytes),
            human_bytes(plan.arena_bytes),
            human_bytes(plan.unshared_bytes),
            human_bytes(plan.available_bytes)
        );
        let seconds = plan.step_flops * (plan.steps - plan.start_step) as f64 / plan.peak_flops;
        eprintln!(
            "machine  {}{}, {}: {} at the very least",
            if plan.devices > 1 { format!("{} × ", plan.devices) } else { String::new() },
            plan.device,
            si(plan.peak_flops, "FLOP/s"),
            duration(seconds)
        );
        let bar = terminal::bar(plan.steps, "{wide_bar} {pos}/{len}  {msg}");
        bar.set_position(plan.start_step);
        self.bar = Some(bar);
    }

    fn step(&mut self, step: &StepReport) {
        let held_out = self.held_out.map(|b| format!("  held out {b:.3}")).unwrap_or_default();
        let message = format!(
            "loss {:.3}  {:.3} bits/byte{held_out}  {} tokens/s  {:.0}% of peak  {} left",
            step.loss,
            step.bits_per_byte,
            thousands(step.tokens_per_second as u64),
            100.0 * step.utilisation,
            duration(step.left)
        );
        let Some(bar) = &self.bar else { return };
        bar.set_length(step.steps);
        bar.set_position(step.step);
        bar.set_message(message.clone());
        // Where nobody watches a bar, a line now and then tells the same.
        let every = (step.steps / 20).max(1);
        if bar.is_hidden() && step.step / every > self.shown / every {
            self.shown = step.step;
            eprintln!("step {}/{}  {message}", step.step, step.steps);
        }
    }

    fn evaluation(&mut self, evaluation: &EvaluationReport) {
        self.held_out = Some(evaluation.bits_per_byte);
        if evaluation.step > 0 && !std::io::stderr().is_terminal() {
            let text = if evaluation.full { "all" } else { "part" };
            self.line(&format!(
                "step {}: {:.3} bits/byte on {text} of the held-out text ({:.1} s)",
                evaluation.step, evaluation.bits_per_byte, evaluation.seconds
            ));
        }
    }

    fn evaluating(&mut self, done: f64) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("evaluating on held-out text: {:.0}%", 100.0 * done));
        }
    }

    fn sample(&mut self, step: u64, model: &Model, tokenizer: &Tokenizer) {
        if let Some(text) = write_line(model, tokenizer, step) {
            self.line(&format!("  ✎ {text}"));
        }
    }

    fn saved(&mut self, step: u64, folder: &Path) {
        if self.bar.as_ref().is_some_and(|b| !b.is_hidden()) {
            return;
        }
        eprintln!("step {step}: saved {}", folder.display());
    }

    fn note(&mut self, text: &str) {
        self.line(&format!("note: {text}"));
    }

    fn baselines(&mut self, baselines: &Baselines) {
        if self.baselines.is_none() {
            let (xz, gzip) = (baselines.xz.bits_per_byte, baselines.gzip.bits_per_byte);
            self.line(&format!("to beat on the held-out text: xz -9 {xz:.3} bits/byte, gzip -9 {gzip:.3}"));
        }
        self.baselines = Some(*baselines);
    }

    fn interrupted(&mut self) -> bool {
        terminal::interrupted()
    }
}

/// A line that the model writes from the beginning of a text; `None` where it cannot.
fn write_line(model: &Model, tokenizer: &Tokenizer, step: u64) -> Option<String> {
    let start = tokenizer.boundary().or(model.config.bos_token_id)?;
    let vocabulary = Some(tokenizer.vocab_size());
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, vocabulary, seed: step, ..Sampling::default() };
    let options = GenerateOptions { max_new_tokens: SAMPLE_TOKENS, sampling, eos: model.config.eos_token_ids.clone() };
    let mut session = Session::new(model, 1).ok()?;
    let mut text = TextStream::new(tokenizer, &[]);
    generate(&mut session, None, &[start], &options, |event| {
        if let Event::Token(id) = event {
            let _ = text.push(id);
        }
        std::ops::ControlFlow::Continue(())
    })
    .ok()?;
    let line: Vec<&str> = text.text().split_whitespace().collect();
    (!line.is_empty()).then(|| line.join(" "))
}

/// Keeps the progress bar's last line from running into the shell's prompt.
impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let _ = std::io::stderr().flush();
    }
}
