//! One device's part of training: its parameters, its windows of every batch, and the plans that it runs.
//!
//! A step is enqueued and its results come later: a GPU has the next step to do before anybody has seen the last one's
//! loss. A CPU computes while it enqueues.

use std::collections::{HashMap, VecDeque};
use std::path::Path;

use hognose_core::ops::adamw::Hyper;
use hognose_core::{Buffer, Device, Readback};
use hognose_model::config::ModelConfig;
use hognose_model::session::Model;
use hognose_model::state::State;
use hognose_model::weights::Weights;

use crate::checkpoint::{OptimizerState, Progress, read_optimizer};
use crate::config::TrainConfig;
use crate::data::{Batch, Cursor, Loader, Mode, Prefetch, Shape};
use crate::error::Error;
use crate::evaluate::{Lanes, SEGMENT_GRID, grow, padded_pack};
use crate::memory::{self, Need};
use crate::ranks::{Order, Rank, Shown};
use crate::setup::Setup;
use crate::step::{GradientPlan, StepInputs, StepShape, UpdatePlan};

/// Batches that are prepared ahead.
const PREFETCH: usize = 4;

/// A step whose results are there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// Its number, from 1.
    pub step: u64,
    /// Its learning rate.
    pub lr: f64,
    /// Mean cross-entropy of the predicted tokens of all devices.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// The number of the first gradient that is not finite, if the norm is not.
    pub culprit: Option<usize>,
    /// Floating-point operations of this device.
    pub flops: f64,
    /// Where the training data goes on after it, also as passes over the text.
    pub cursor: Cursor,
    pub epochs: f64,
}

/// What decides a gradient plan: segments, whether gradients are added to those that are there, and whether they are
/// summed over the group.
type PlanKey = (usize, bool, bool);

/// Everything that a rank holds in memory.
#[derive(Debug)]
pub(crate) struct Worker {
    pub config: TrainConfig,
    pub model: Model,
    pub rank: Rank,
    pub loader: Prefetch,
    pub arena: Buffer,
    /// Steps enqueued.
    pub step: u64,
    /// Memory that it needs, and that was free before any of it was taken.
    pub need: Need,
    pub available: u64,
    gradients: Buffer,
    m: Buffer,
    v: Buffer,
    plans: HashMap<PlanKey, GradientPlan>,
    update: UpdatePlan,
    lanes: Option<Lanes>,
    /// Steps whose results were not looked at yet, oldest first; numbers beside the results are not known yet.
    under_way: VecDeque<(Done, Readback)>,
    idle: Vec<Readback>,
    finished: bool,
}

/// A rank that did not finish has failed, or another one has: its GPU may wait for sums for ever, and must be told
/// before its memory goes.
impl Drop for Worker {
    fn drop(&mut self) {
        if !self.finished {
            self.rank.leave();
        }
    }
}

impl Worker {
    /// Takes the memory and fills it with starting values, or with those of a checkpoint. What does not fit is refused
    /// before anything is taken.
    pub fn new(
        config: &TrainConfig,
        setup: &Setup,
        device: Device,
        rank: Rank,
        from: Option<&(&Path, Progress)>,
    ) -> Result<Worker, Error> {
        let windows = rank.share(config.batch).len();
        if windows == 0 {
            let (batch, count) = (config.batch, rank.count);
            return Err(Error::Unsupported(format!(
                "a batch of {batch} cannot be shared by {count} devices; choose a --batch of at least {count}"
            )));
        }
        let form = memory::form(&device, config);
        let mode = if config.carry_state { Mode::CarryState } else { Mode::Packed };
        let shape = Shape { length: config.length, batch: config.batch };
        let mut loader = Loader::new(setup.training.clone(), shape, mode, config.seed)?;
        let available = device.available_memory();
        let need = memory::check(&device, &setup.model, config, rank.count, available)?;
        let weights = match (from, setup.open_init()?) {
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
        let gradients = device.alloc(GradientPlan::gradient_bytes(bytes))?;
        let [mut m, mut v] = [device.alloc(bytes)?, device.alloc(bytes)?];
        let mut lanes = if config.carry_state { Some(Lanes::new(&device, &setup.model, config.batch)?) } else { None };
        if let Some((checkpoint, progress)) = from {
            let lanes = lanes.as_mut().map(|l: &mut Lanes| l.pool.buffer_mut());
            read_optimizer(checkpoint, OptimizerState { m: &mut m, v: &mut v, lanes })?;
            loader.seek(progress.cursor)?;
        }
        let update = UpdatePlan::new(&device, &weights)?;
        let arena = device.alloc(update.plan().arena_bytes())?;
        let mut worker = Worker {
            config: config.clone(),
            loader: Prefetch::new(loader, PREFETCH)?,
            model: Model { config: setup.model.clone(), weights, device },
            rank,
            arena,
            step: from.map_or(0, |(_, progress)| progress.step),
            need,
            available,
            gradients,
            m,
            v,
            plans: HashMap::new(),
            update,
            lanes,
            under_way: VecDeque::new(),
            idle: Vec::new(),
            finished: false,
        };
        let key = worker.plan_for(windows, worker.config.accumulation - 1)?;
        grow(&worker.model.device, &mut worker.arena, worker.plans[&key].plan())?;
        Ok(worker)
    }

    /// The plan of the largest micro-batch.
    pub fn largest_plan(&mut self) -> Result<&GradientPlan, Error> {
        let windows = self.rank.share(self.config.batch).len();
        let key = self.plan_for(windows, self.config.accumulation - 1)?;
        Ok(&self.plans[&key])
    }

    /// Makes sure that there is a plan for that many segments in micro-batch number `i` of a step; returns its key.
    fn plan_for(&mut self, segments: usize, i: usize) -> Result<PlanKey, Error> {
        let sum = self.rank.count > 1 && i + 1 == self.config.accumulation;
        // Segments are padded to a multiple, so that few plans are needed.
        let key = (segments.next_multiple_of(SEGMENT_GRID), i > 0, sum);
        if !self.plans.contains_key(&key) {
            let windows = self.rank.share(self.config.batch).len();
            let shape = StepShape {
                segments: key.0,
                accumulate: key.1,
                ..memory::shape(memory::form(&self.model.device, &self.config), &self.config, windows)
            };
            let member = self.rank.member.as_ref().filter(|_| sum);
            let plan = GradientPlan::in_group(&self.model.device, &self.model.config, shape, member)?;
            self.plans.insert(key, plan);
        }
        Ok(key)
    }

    /// Enqueues a step: gradients of all its micro-batches, then the update.
    pub fn step(&mut self, lr: f64) -> Result<(), Error> {
        let accumulation = self.config.accumulation;
        let whole: Vec<Batch> = (0..accumulation).map(|_| self.loader.next_batch()).collect::<Result<_, _>>()?;
        let predicted: usize = whole.iter().map(Batch::predicted).sum();
        let loss_scale = if predicted == 0 { 0.0 } else { 1.0 / predicted as f32 };
        let windows = self.rank.share(self.config.batch);
        let batches: Vec<Batch> = whole.iter().map(|b| b.share(windows.clone(), self.config.length)).collect();

        // Everything that may need memory comes first; then the ranks wait for each other, and then all enqueue.
        let mut packs = Vec::with_capacity(accumulation);
        for (i, batch) in batches.iter().enumerate() {
            let pack = padded_pack(batch)?;
            let key = self.plan_for(pack.segments(), i)?;
            let device = &self.model.device;
            grow(device, &mut self.arena, self.plans[&key].plan())?;
            if let Some(lanes) = &mut self.lanes {
                lanes.make_room(device, &self.model.config, pack.segments())?;
            }
            packs.push((pack, key));
        }
        let device = &self.model.device;
        let (weights, buffers) = (&self.model.weights, [&self.gradients, &self.m, &self.v]);
        for (pack, key) in &packs {
            let states = self.lanes.as_ref().and_then(|lanes| lanes.pools(pack.segments()));
            self.plans[key].prepare(device, &self.arena, weights, &self.gradients, states)?;
        }
        self.update.prepare(device, &self.arena, weights, buffers)?;
        let mut readback = match self.idle.pop() {
            Some(readback) => readback,
            None => Readback::new(device, 16)?,
        };
        self.rank.ready()?;

        let mut flops = 0.0;
        for (i, (batch, (pack, key))) in batches.iter().zip(&packs).enumerate() {
            let plan = &self.plans[key];
            flops += plan.cost().flops;
            let states = self.lanes.as_ref().and_then(|lanes| lanes.start(batch, pack.segments()));
            let micro_batch = self.step * accumulation as u64 + i as u64;
            let inputs = StepInputs {
                ids: &batch.tokens,
                targets: &batch.targets,
                pack,
                loss_scale,
                states,
                dropout_seed: [
                    self.config.seed as i32,
                    micro_batch as i32,
                    (windows.start * self.config.length) as i32,
                ],
            };
            plan.enqueue(device, &self.arena, weights, Some(&self.gradients), &inputs)?;
            if let Some(lanes) = &self.lanes {
                lanes.finish(batch, pack.segments());
            }
        }
        let optimizer = &self.config.optimizer;
        let hyper = Hyper {
            lr: lr as f32,
            beta1: optimizer.betas[0] as f32,
            beta2: optimizer.betas[1] as f32,
            eps: optimizer.eps as f32,
            weight_decay: optimizer.weight_decay as f32,
            max_norm: optimizer.clip as f32,
        };
        self.step += 1;
        self.update.enqueue(device, &self.arena, weights, buffers, &hyper, self.step)?;
        let results = self.update.results();
        readback.fetch(0, &self.gradients, weights.bytes(), 4)?;
        readback.fetch(4, results.buffer, results.offset, 12)?;
        let (cursor, epochs) = (self.loader.cursor(), self.loader.epochs());
        let done = Done { step: self.step, lr, loss: 0.0, norm: 0.0, culprit: None, flops, cursor, epochs };
        self.under_way.push_back((done, readback));
        Ok(())
    }

    /// Steps that may be under way while the next one is prepared.
    pub fn ahead(&self) -> usize {
        match self.model.device {
            Device::Cpu(_) => 0,
            Device::Cuda(_) => 1,
        }
    }

    /// Waits for the oldest step's results, if more than `left` steps are under way.
    pub fn finish_step(&mut self, left: usize) -> Result<Option<Done>, Error> {
        if self.under_way.len() <= left {
            return Ok(None);
        }
        let Some((mut done, readback)) = self.under_way.pop_front() else { return Ok(None) };
        let here = readback.wait(|| self.rank.is_hopeless())?;
        if !here {
            return Err(Error::Abandoned);
        }
        done.loss = f64::from(readback.get::<f32>(0));
        done.norm = f64::from(readback.get::<f32>(1));
        let place = [2, 3].map(|i| u64::from(readback.get::<i32>(i) as u32));
        let place = place[1] << 32 | place[0];
        done.culprit = (place != u64::MAX).then_some(place as usize);
        self.idle.push(readback);
        Ok(Some(done))
    }

    /// Does what the first rank says until that is to stop.
    pub fn follow(mut self) -> Result<(), Error> {
        loop {
            match self.rank.follow()? {
                Order::Step { lr } => {
                    self.step(lr)?;
                    while self.finish_step(self.ahead())?.is_some() {}
                }
                Order::Show => {
                    let shown = self.shown();
                    self.rank.show(shown)?;
                }
                Order::Stop => {
                    while self.finish_step(0)?.is_some() {}
                    self.finished = true;
                    return Ok(());
                }
            }
        }
    }

    /// Tells the others that it is over.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.rank.lead(Order::Stop)?;
        self.finished = true;
        Ok(())
    }

    /// What this rank has for a checkpoint.
    fn shown(&mut self) -> Shown {
        let checksum = self.model.weights.with_tensors(|tensors| {
            tensors.iter().fold(0, |sum, (_, values)| crc32c::crc32c_append(sum, bytemuck::cast_slice(values)))
        });
        let fingerprint = self.model.weights.fingerprint();
        let lanes = self.lanes.as_ref().map(|lanes| {
            let state = |lane: usize| {
                let mut state = State::zero(&self.model.config, fingerprint.clone());
                lanes.pool.read(lane, &mut state);
                (lane, state)
            };
            self.rank.share(self.config.batch).map(state).collect()
        });
        Shown { checksum, lanes: lanes.unwrap_or_default() }
    }

    /// Makes sure that all ranks have the same parameters, and brings the states of all lanes here.
    pub fn gather(&mut self) -> Result<(), Error> {
        if self.rank.count == 1 {
            return Ok(());
        }
        self.rank.lead(Order::Show)?;
        let own = self.shown();
        let checksum = own.checksum;
        for (number, other) in self.rank.show(own)?.iter().enumerate() {
            if other.checksum != checksum {
                let device = format!("device {} of {}", number + 1, self.rank.count);
                return Err(Error::Diverged { step: self.step, device });
            }
            if let Some(lanes) = &self.lanes {
                other.lanes.iter().for_each(|(lane, state)| lanes.pool.write(*lane, state));
            }
        }
        Ok(())
    }

    /// The weights and, for a checkpoint, the optimizer's memory. Call [`Worker::gather`] before.
    pub fn checkpoint(&mut self) -> (&ModelConfig, &mut Weights, OptimizerState<'_>) {
        let lanes = self.lanes.as_mut().map(|l| l.pool.buffer_mut());
        let optimizer = OptimizerState { m: &mut self.m, v: &mut self.v, lanes };
        (&self.model.config, &mut self.model.weights, optimizer)
    }

    /// The name of the parameter that has gradient number `place`.
    pub fn parameter_at(&self, place: usize) -> Option<String> {
        let entries = self.model.weights.entries();
        entries.take_while(|(offset, _)| offset / 4 <= place).last().map(|(_, spec)| spec.name.clone())
    }

    /// The first parameter that holds a number that is not finite.
    pub fn bad_parameter(&mut self) -> Option<String> {
        self.model.weights.with_tensors(|tensors| {
            let bad = tensors.iter().find(|(_, values)| values.iter().any(|v| !v.is_finite()));
            bad.map(|(name, _)| name.to_string())
        })
    }
}
