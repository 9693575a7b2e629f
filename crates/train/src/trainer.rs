//! The training loop.

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use hognose_core::error::human_bytes;
use hognose_core::graph::Recompute;
use hognose_core::ops::adamw::Hyper;
use hognose_core::{Buffer, DType, Device};
use hognose_model::config::ModelConfig;
use hognose_model::session::Model;
use hognose_model::weights::{Form, Weights};

use crate::atomic;
use crate::baseline;
use crate::checkpoint::{Best, OptimizerState, Progress, RunFolder, read_optimizer, read_progress};
use crate::config::{Dtype, TrainConfig};
use crate::data::{Batch, Document, Evaluation, Loader, Mode, Prefetch, Shape};
use crate::error::Error;
use crate::evaluate::{Evaluator, Lanes, grow, padded_pack};
use crate::records::Records;
use crate::report::{Baselines, EvaluationReport, Observer, Outcome, PlanReport, StepReport};
use crate::setup::Setup;
use crate::step::{GradientPlan, StepInputs, StepShape, UpdatePlan};

/// Weight of the newest step in the mean time of a step.
const TIME_SMOOTHING: f64 = 0.05;
/// Batches that are prepared ahead.
const PREFETCH: usize = 4;
/// Name of the resolved configuration in a run's folder.
const CONFIG: &str = "config.toml";

/// Trains a model as `config` says, in the new folder `folder`. With `plan_only`, tells the observer the plan and
/// stops: nothing is written.
pub fn train(
    config: TrainConfig,
    device: Device,
    folder: &Path,
    plan_only: bool,
    observer: &mut dyn Observer,
) -> Result<Option<Outcome>, Error> {
    let config = config.resolve()?;
    if !plan_only {
        // Said now rather than after the text was read and the plan made; `create` says it for certain.
        RunFolder::check_free(folder)?;
    }
    let setup = Setup::new(&config, !plan_only)?;
    let mut trainer = Trainer::new(config, setup, device, None)?;
    trainer.announce(observer)?;
    if plan_only {
        return Ok(None);
    }
    let run = RunFolder::create(folder)?;
    atomic::write(&folder.join(CONFIG), trainer.config.to_toml()?.as_bytes())?;
    trainer.run(&run, observer).map(Some)
}

/// The resolved configuration of the run in `folder`.
pub fn read_config(folder: &Path) -> Result<TrainConfig, Error> {
    RunFolder::open(folder)?;
    Ok(TrainConfig::load(&folder.join(CONFIG))?)
}

/// Goes on with the run in `folder` from its latest checkpoint, as if it had never stopped. `config` is the run's own
/// ([`read_config`]); it may have another number of threads, which changes no result, another time budget and more
/// steps, which start the schedule's decay later.
pub fn resume(
    folder: &Path,
    config: TrainConfig,
    device: Device,
    observer: &mut dyn Observer,
) -> Result<Outcome, Error> {
    let run = RunFolder::open(folder)?.lock()?;
    let steps = read_config(folder)?.steps;
    let config = config.resolve()?;
    let checkpoint = run.latest()?;
    let mut progress = read_progress(&checkpoint)?;
    if config.steps < progress.step {
        let message = format!("has done {} steps already; give at least as many as --steps", progress.step);
        return Err(Error::Resume { path: folder.into(), message });
    }
    // The second: a session with more steps that ended before its first checkpoint.
    let other_steps = config.steps != steps || (progress.schedule.steps != steps && !progress.decay_fixed);
    if other_steps {
        progress.schedule = config.learning_rate();
        progress.decay_fixed = false;
    }
    let setup = Setup::new(&config, true)?;
    if setup.training.fingerprint() != progress.data {
        let message = "was trained on other data than is there now; put the data back, or start a new run from it with \
                       --model";
        return Err(Error::Resume { path: folder.into(), message: message.into() });
    }
    let mut trainer = Trainer::new(config, setup, device, Some((&checkpoint, progress)))?;
    trainer.announce(observer)?;
    if other_steps {
        atomic::write(&folder.join(CONFIG), trainer.config.to_toml()?.as_bytes())?;
    }
    trainer.run(&run, observer)
}

/// Everything that a run holds in memory.
struct Trainer {
    config: TrainConfig,
    setup: Setup,
    model: Model,
    gradients: Buffer,
    m: Buffer,
    v: Buffer,
    arena: Buffer,
    plans: HashMap<(usize, bool), GradientPlan>,
    update: UpdatePlan,
    lanes: Option<Lanes>,
    evaluator: Evaluator,
    loader: Prefetch,
    progress: Progress,
    peak_flops: f64,
    /// Seconds of training before this session.
    elapsed_before: f64,
    begin: Instant,
    seconds_per_step: Option<f64>,
    /// Seconds that the last evaluation needed per byte.
    evaluation_speed: Option<f64>,
    baselines: Option<Receiver<std::io::Result<Baselines>>>,
}

impl Trainer {
    fn new(
        config: TrainConfig,
        setup: Setup,
        device: Device,
        from: Option<(&Path, Progress)>,
    ) -> Result<Trainer, Error> {
        let begin = Instant::now();
        let form = Form::Training(match config.dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
        });
        if let (Form::Training(DType::BF16), Device::Cpu(_)) = (form, &device) {
            return Err(Error::Unsupported("training in bf16 needs a GPU; use dtype f32 on the CPU".into()));
        }
        // Parameters, gradients and two moments, before the first of them takes memory.
        let f32_bytes = Weights::required_bytes(&device, &setup.model, Form::Training(DType::F32)) as u64;
        device.require(3 * f32_bytes + Weights::required_bytes(&device, &setup.model, form) as u64)?;
        let mode = if config.carry_state { Mode::CarryState } else { Mode::Packed };
        let shape = Shape { length: config.length, batch: config.batch };
        let mut loader = Loader::new(setup.training.clone(), shape, mode, config.seed)?;
        let weights = match (&from, setup.open_init()?) {
            (Some((path, _)), _) => {
                let checkpoint = hognose_model::checkpoint::Checkpoint::open(path)?;
                let shapes =
                    |c: &ModelConfig| c.parameters().into_iter().map(|p| (p.name, p.shape)).collect::<Vec<_>>();
                if shapes(&checkpoint.config) != shapes(&setup.model) {
                    let message = "holds a model of other sizes than the run's config.toml describes; put that file \
                                   back as it was";
                    return Err(Error::Resume { path: path.into(), message: message.into() });
                }
                Weights::load(&device, &checkpoint, form)?
            }
            (None, Some(init)) => Weights::load(&device, &init, form)?,
            (None, None) => Weights::initialise(&device, &setup.model, form, config.seed)?,
        };
        let bytes = weights.bytes();
        let [gradients, mut m, mut v] = [device.alloc(bytes)?, device.alloc(bytes)?, device.alloc(bytes)?];
        let mut lanes = if config.carry_state { Some(Lanes::new(&device, &setup.model, config.batch)?) } else { None };
        let progress = match from {
            Some((checkpoint, progress)) => {
                let lanes = lanes.as_mut().map(|l: &mut Lanes| l.pool.buffer_mut());
                read_optimizer(checkpoint, OptimizerState { m: &mut m, v: &mut v, lanes })?;
                loader.seek(progress.cursor)?;
                progress
            }
            None => Progress {
                step: 0,
                cursor: loader.cursor(),
                schedule: config.learning_rate(),
                decay_fixed: false,
                elapsed: 0.0,
                best: None,
                data: setup.training.fingerprint(),
            },
        };
        let update = UpdatePlan::new(&device, &weights)?;
        let evaluator = Evaluator::new(&device, &setup.model, config.batch)?;
        let arena = device.alloc(update.plan().arena_bytes())?;
        let peak_flops = device.measure_ceiling().flops;
        let model = Model { config: setup.model.clone(), weights, device };
        Ok(Trainer {
            loader: Prefetch::new(loader, PREFETCH)?,
            elapsed_before: progress.elapsed,
            config,
            setup,
            model,
            gradients,
            m,
            v,
            arena,
            plans: HashMap::new(),
            update,
            lanes,
            evaluator,
            progress,
            peak_flops,
            begin,
            seconds_per_step: None,
            evaluation_speed: None,
            baselines: None,
        })
    }

    fn step_shape(&self, segments: usize, accumulate: bool) -> StepShape {
        StepShape {
            form: self.model.weights.form(),
            tokens: self.config.length * self.config.batch,
            segments,
            carry_state: self.config.carry_state,
            gradients: true,
            accumulate,
            dropout: self.config.dropout as f32,
            recompute: if self.config.recompute { Recompute::All } else { Recompute::Nothing },
        }
    }

    /// Plans a step and tells the observer, before anything runs: what does not fit is refused here.
    fn announce(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        self.setup.warnings.iter().for_each(|w| observer.note(w));
        let key = self.gradient_plan_for(self.config.batch, self.config.accumulation > 1)?;
        let found = &self.plans[&key];
        let held_out = self.setup.evaluation.as_ref().map(|e| e.0.bytes()).unwrap_or(0);
        let persistent = 4 * self.model.weights.bytes() as u64;
        let device = &self.model.device;
        observer.plan(&PlanReport {
            parameters: self.model.config.parameter_count(),
            model: self.model.config.clone(),
            persistent_bytes: persistent,
            arena_bytes: found.plan().arena_bytes() as u64,
            unshared_bytes: found.plan().unshared_bytes() as u64,
            available_bytes: device.available_memory(),
            step_flops: found.cost().flops * self.config.accumulation as f64,
            peak_flops: self.peak_flops,
            step_tokens: self.config.tokens_per_step(),
            steps: self.progress.schedule.steps,
            start_step: self.progress.step,
            training_documents: self.setup.training.documents(),
            training_bytes: self.setup.training.bytes(),
            training_tokens: self.setup.training.tokens(),
            held_out_documents: self.setup.held_out_documents,
            held_out_bytes: held_out,
            data: self.setup.source.clone(),
            tokenizer: if self.setup.tokenizer.is_bytes() { "bytes".into() } else { "tokenizer.json".into() },
        });
        // Memory that was not touched yet still counts as free: gradients and moments come on top of the arena.
        let (needed, available) =
            (3 * self.model.weights.bytes() + found.plan().arena_bytes(), device.available_memory());
        if needed as u64 > available {
            let [needed, available] = [needed as u64, available].map(human_bytes);
            return Err(hognose_core::Error::Memory { needed, available }.into());
        }
        grow(device, &mut self.arena, found)
    }

    /// Makes sure that there is a plan for that many segments; returns its key.
    fn gradient_plan_for(&mut self, segments: usize, accumulate: bool) -> Result<(usize, bool), Error> {
        let key = plan_key(segments, accumulate);
        if !self.plans.contains_key(&key) {
            let plan = GradientPlan::new(&self.model.device, &self.model.config, self.step_shape(key.0, key.1))?;
            self.plans.insert(key, plan);
        }
        Ok(key)
    }

    fn run(&mut self, run: &RunFolder, observer: &mut dyn Observer) -> Result<Outcome, Error> {
        let mut records = Records::open(run.path(), self.progress.step, self.config.tokens_per_step())?;
        if let Some((training, held_out)) = self.setup.documents.take() {
            self.baselines = (!held_out.is_empty()).then(|| compress(training, held_out));
        }
        let mut interrupted = false;
        while self.progress.step < self.progress.schedule.steps && !self.out_of_time() {
            let report = self.step(run)?;
            records.step(&report)?;
            observer.step(&report);
            self.receive_baselines(&mut records, observer)?;
            let step = self.progress.step;
            let due = |every: u64| every > 0 && step.is_multiple_of(every);
            if observer.interrupted() {
                interrupted = true;
                break;
            }
            let last = step >= self.progress.schedule.steps;
            if due(self.config.eval_every) && !last {
                self.evaluate(run, &mut records, observer, false)?;
            }
            if due(self.config.sample_every) && !last {
                observer.sample(step, &self.model, &self.setup.tokenizer);
            }
            if due(self.config.checkpoint_every) && !last {
                self.save(run, observer)?;
            }
            self.begin_decay_in_time(observer);
        }
        let mut bits_per_byte = None;
        if !interrupted {
            bits_per_byte = self.evaluate(run, &mut records, observer, true)?;
            interrupted = self.setup.evaluation.is_some() && bits_per_byte.is_none();
        }
        self.save(run, observer)?;
        let mut baselines = None;
        if !interrupted {
            observer.sample(self.progress.step, &self.model, &self.setup.tokenizer);
            if let Some(receiver) = self.baselines.take() {
                baselines = receiver.recv().ok().transpose().map_err(|e| Error::io(run.path(), e))?;
            }
            baselines = baselines.or(records.baselines());
            if let Some(found) = &baselines {
                records.set_baselines(found)?;
                observer.baselines(found);
            }
        }
        records.finish()?;
        Ok(Outcome {
            folder: run.path().into(),
            step: self.progress.step,
            steps: self.progress.schedule.steps,
            interrupted,
            bits_per_byte,
            baselines,
            elapsed: self.elapsed(),
        })
    }

    /// One optimizer step: gradients of all its micro-batches, then the update.
    fn step(&mut self, run: &RunFolder) -> Result<StepReport, Error> {
        let start = Instant::now();
        let step = self.progress.step;
        let batches: Vec<Batch> =
            (0..self.config.accumulation).map(|_| self.loader.next_batch()).collect::<Result<_, _>>()?;
        let predicted: usize = batches.iter().map(Batch::predicted).sum();
        let loss_scale = if predicted == 0 { 0.0 } else { 1.0 / predicted as f32 };
        let mut loss = 0.0;
        let mut flops = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            let pack = padded_pack(batch)?;
            let key = self.gradient_plan_for(pack.segments(), i > 0)?;
            let plan = &self.plans[&key];
            flops += plan.cost().flops;
            let device = &self.model.device;
            grow(device, &mut self.arena, plan)?;
            let states = match &mut self.lanes {
                Some(lanes) => Some(lanes.start(device, &self.model.config, batch, pack.segments())?),
                None => None,
            };
            let micro_batch = step * self.config.accumulation as u64 + i as u64;
            let inputs = StepInputs {
                ids: &batch.tokens,
                targets: &batch.targets,
                pack: &pack,
                loss_scale,
                states,
                dropout_seed: [self.config.seed as i32, micro_batch as i32],
            };
            loss += f64::from(plan.run(device, &self.arena, &self.model.weights, Some(&self.gradients), &inputs)?);
            if let Some(lanes) = &self.lanes {
                lanes.finish(batch, pack.segments());
            }
        }
        if !loss.is_finite() {
            return Err(self.not_finite(run, "the loss"));
        }
        let lr = self.progress.schedule.rate(step);
        let optimizer = &self.config.optimizer;
        let hyper = Hyper {
            lr: lr as f32,
            beta1: optimizer.betas[0] as f32,
            beta2: optimizer.betas[1] as f32,
            eps: optimizer.eps as f32,
            weight_decay: optimizer.weight_decay as f32,
            max_norm: optimizer.clip as f32,
        };
        let (Model { device, weights, .. }, buffers) = (&self.model, [&self.gradients, &self.m, &self.v]);
        let norm = self.update.run(device, &self.arena, weights, buffers, &hyper, step + 1)?;
        if !norm.is_finite() {
            return Err(self.not_finite(run, "the gradient"));
        }
        self.progress.step += 1;
        self.progress.cursor = self.loader.cursor();
        self.progress.elapsed = self.elapsed();

        let seconds = start.elapsed().as_secs_f64();
        let smoothed = match self.seconds_per_step {
            Some(mean) => mean + TIME_SMOOTHING * (seconds - mean),
            None => seconds,
        };
        self.seconds_per_step = Some(smoothed);
        let steps = self.progress.schedule.steps;
        let mut left = (steps - self.progress.step) as f64 * smoothed + self.final_seconds();
        if let Some(minutes) = self.config.minutes {
            left = left.min((60.0 * minutes - self.elapsed()).max(0.0));
        }
        // Boundary tokens are given, not predicted.
        let training = &self.setup.training;
        let tokens = training.tokens() - training.documents() as u64;
        let tokens_per_byte = tokens as f64 / training.bytes().max(1) as f64;
        Ok(StepReport {
            step: self.progress.step,
            steps,
            loss,
            bits_per_byte: loss / std::f64::consts::LN_2 * tokens_per_byte,
            lr,
            gradient_norm: f64::from(norm),
            tokens: self.progress.step * self.config.tokens_per_step(),
            tokens_per_second: self.config.tokens_per_step() as f64 / seconds,
            utilisation: flops / seconds / self.peak_flops,
            epochs: self.loader.epochs(),
            elapsed: self.elapsed(),
            left,
        })
    }

    /// Bits per byte on held-out text: all of it, or a part on the way. `None` where nothing is held out or the
    /// evaluation was interrupted.
    fn evaluate(
        &mut self,
        run: &RunFolder,
        records: &mut Records,
        observer: &mut dyn Observer,
        full: bool,
    ) -> Result<Option<f64>, Error> {
        let Some((all, quick)) = &self.setup.evaluation else { return Ok(None) };
        let evaluation: &Evaluation = if full { all } else { quick };
        let start = Instant::now();
        let model = &self.model;
        let progress = |done| {
            observer.evaluating(done);
            observer.interrupted()
        };
        let found =
            self.evaluator.run(&model.device, &model.config, &model.weights, &mut self.arena, evaluation, progress)?;
        let Some(bits_per_byte) = found else { return Ok(None) };
        if !bits_per_byte.is_finite() {
            return Err(self.not_finite(run, "the loss on held-out text"));
        }
        let seconds = start.elapsed().as_secs_f64();
        self.evaluation_speed = Some(seconds / evaluation.bytes().max(1) as f64);
        let step = self.progress.step;
        // A part and the whole are not compared with each other: then the last evaluation decides for itself.
        let other = full && all.bytes() > quick.bytes();
        let best = self.progress.best.is_none_or(|b| bits_per_byte < b.bits_per_byte || other);
        if best {
            self.progress.best = Some(Best { step, bits_per_byte });
        }
        let full = evaluation.bytes() == all.bytes();
        let report = EvaluationReport { step, bits_per_byte, bytes: evaluation.bytes(), seconds, best, full };
        records.evaluation(&report)?;
        observer.evaluation(&report);
        Ok(Some(bits_per_byte))
    }

    fn save(&mut self, run: &RunFolder, observer: &mut dyn Observer) -> Result<(), Error> {
        self.progress.elapsed = self.elapsed();
        let lanes = self.lanes.as_mut().map(|l| l.pool.buffer_mut());
        let optimizer = OptimizerState { m: &mut self.m, v: &mut self.v, lanes };
        let files = self.setup.tokenizer.files();
        let extra: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (*n, b.as_slice())).collect();
        let folder = run.save(&self.model.config, &mut self.model.weights, optimizer, &self.progress, &extra)?;
        observer.saved(self.progress.step, &folder);
        Ok(())
    }

    fn elapsed(&self) -> f64 {
        self.elapsed_before + self.begin.elapsed().as_secs_f64()
    }

    fn out_of_time(&self) -> bool {
        self.config.minutes.is_some_and(|m| self.elapsed() + self.final_seconds() > 60.0 * m)
    }

    /// Seconds that the evaluation at the end will need: as the last one, or half of what training on it would take.
    fn final_seconds(&self) -> f64 {
        let bytes = self.setup.evaluation.as_ref().map_or(0, |e| e.0.bytes()) as f64;
        let per_token = self.seconds_per_step.unwrap_or(0.0) / self.config.tokens_per_step() as f64;
        self.evaluation_speed.unwrap_or(0.5 * per_token) * bytes
    }

    /// With a time budget: begins the decay when what is left of it is just enough for the decay's share of the steps.
    fn begin_decay_in_time(&mut self, observer: &mut dyn Observer) {
        let (Some(minutes), Some(seconds)) = (self.config.minutes, self.seconds_per_step) else { return };
        let schedule = self.progress.schedule;
        let step = self.progress.step;
        if self.progress.decay_fixed || step >= schedule.decay_start || step < 10 {
            return;
        }
        let left = (60.0 * minutes - self.elapsed() - self.final_seconds()) / seconds;
        let share = self.config.schedule.decay_fraction.min(0.99);
        let decay = step as f64 * share / (1.0 - share);
        if left <= decay.max(1.0) {
            let steps = step + left.max(1.0) as u64;
            self.progress.schedule = schedule.with_decay(step, steps);
            self.progress.decay_fixed = true;
            observer.note(&format!(
                "the time budget of {minutes} minutes allows {steps} of {} steps; the learning rate falls from now on",
                schedule.steps
            ));
        }
    }

    fn receive_baselines(&mut self, records: &mut Records, observer: &mut dyn Observer) -> Result<(), Error> {
        let Some(receiver) = &self.baselines else { return Ok(()) };
        if let Ok(found) = receiver.try_recv() {
            self.baselines = None;
            let found = found.map_err(|e| Error::io(Path::new("compressing the text"), e))?;
            records.set_baselines(&found)?;
            observer.baselines(&found);
        }
        Ok(())
    }

    /// The error of a step whose numbers went astray: names the first tensor that is not finite.
    fn not_finite(&self, run: &RunFolder, what: &'static str) -> Error {
        let is_bad = |buffer: &Buffer| {
            let entries = self.model.weights.entries();
            entries
                .filter(|(offset, spec)| buffer.to_vec::<f32>(*offset, spec.numel()).iter().any(|v| !v.is_finite()))
                .map(|(_, spec)| spec.name.clone())
                .next()
        };
        let tensor = match (is_bad(self.model.weights.buffer()), is_bad(&self.gradients)) {
            (Some(name), _) => format!(": the parameter {name} is not"),
            (None, Some(name)) => format!(": the gradient of {name} is not"),
            (None, None) => String::new(),
        };
        let advice = match run.latest() {
            Ok(folder) => format!(
                "the last good checkpoint is {}; a smaller --lr, a longer warm-up or clipping may help",
                folder.display()
            ),
            Err(_) => "there was no checkpoint yet; a smaller --lr, a longer warm-up or clipping may help".into(),
        };
        Error::NotFinite { step: self.progress.step + 1, what, tensor, advice }
    }
}

/// Segments are padded to a multiple, so that few plans are needed.
fn plan_key(segments: usize, accumulate: bool) -> (usize, bool) {
    (segments.next_multiple_of(crate::evaluate::SEGMENT_GRID), accumulate)
}

/// Compresses the texts on a thread of their own.
fn compress(training: Vec<Document>, held_out: Vec<Document>) -> Receiver<std::io::Result<Baselines>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let both = baseline::gzip(&training, &held_out)
            .and_then(|gzip| Ok(Baselines { gzip, xz: baseline::xz(&training, &held_out)? }));
        // The run may have ended meanwhile.
        let _ = sender.send(both);
    });
    receiver
}
