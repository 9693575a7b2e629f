//! One training step as two plans: loss and gradients of a micro-batch, and the update of the parameters.

use std::ops::Range;
use std::sync::Arc;

use hognose_core::graph::{Cost, Recompute};
use hognose_core::ops::adamw::{self, AdamW, Hyper};
use hognose_core::ops::all_reduce::all_reduce;
use hognose_core::ops::elementwise;
use hognose_core::{Buffer, DType, Device, Graph, Member, Pack, Plan, Slice, TensorId};
use hognose_model::config::ModelConfig;
use hognose_model::network::{DROPOUT_SEED, IDS, LOSS_SCALE, Recorder, SEGMENTS, States, TARGETS};
use hognose_model::state::StatePool;
use hognose_model::weights::{Form, Weights};

use crate::error::Error;

const LOSS: &str = "loss";
const NORM: &str = "norm";
const CULPRIT: &str = "culprit";
/// Prefix of the externals that receive gradients.
const GRAD: &str = "grad.";
/// Bytes of gradients that several devices sum at once: enough to use their connection well, few enough to begin early.
const BUCKET: usize = 25 << 20;
/// Bytes behind the gradients, for the loss: it is added up over micro-batches and devices as they are.
const LOSS_BYTES: usize = 64;
/// Where the update's hyper-parameters, the norm and the place of the first gradient that is not finite are.
const UPDATE_AT: [usize; 3] = [0, 64, 72];

/// What decides the shape of a gradient plan.
#[derive(Clone, Debug, PartialEq)]
pub struct StepShape {
    /// In which form the weights are; it decides the type of activations.
    pub form: Form,
    /// Rows of the pack.
    pub tokens: usize,
    /// Segments of the pack, empty ones included.
    pub segments: usize,
    /// Segments start from carried states, and final states are kept.
    pub carry_state: bool,
    /// Gradients are computed (and with [`StepShape::accumulate`] added to those that are there).
    pub gradients: bool,
    /// Gradients are added to those that are there.
    pub accumulate: bool,
    /// Probability of dropping a value that a mixer or MLP adds to the residual stream, in `[0, 1)`.
    pub dropout: f32,
    /// Which layers are computed again in the backward pass.
    pub recompute: Recompute,
}

/// The inputs of one micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs<'a> {
    /// Token ids, one for each row of the pack.
    pub ids: &'a [u32],
    /// The next token at each position; −1 where nothing is to be predicted.
    pub targets: &'a [i32],
    /// How the rows are cut into segments.
    pub pack: &'a Pack,
    /// The loss is this times the sum over the targets: one over the number of targets in the whole batch.
    pub loss_scale: f32,
    /// With `carry_state`: where segments start, and where their final states go.
    pub states: Option<(&'a StatePool, &'a StatePool)>,
    /// Seed of the step's dropout masks: the run's seed and the number of the micro-batch; and how many tokens of the
    /// micro-batch other devices have before these.
    pub dropout_seed: [i32; 3],
}

/// The plan that computes loss and gradients of a micro-batch.
#[derive(Debug)]
pub struct GradientPlan {
    plan: Plan,
    shape: StepShape,
    /// Ids, offsets, targets, scale, seed and loss.
    io: Buffer,
}

impl GradientPlan {
    /// Records a micro-batch of this shape. Fails where the configuration's ops refuse its sizes.
    pub fn graph(config: &ModelConfig, shape: &StepShape) -> Result<Graph, Error> {
        GradientPlan::record(config, shape, None)
    }

    fn record(config: &ModelConfig, shape: &StepShape, member: Option<&Arc<Member>>) -> Result<Graph, Error> {
        let states = if shape.carry_state { States::Carried } else { States::None };
        let mut recorder = Recorder::new(config, &shape.form, shape.tokens, shape.segments, states);
        if shape.gradients {
            recorder = recorder.with_dropout(shape.dropout);
        }
        let hidden = recorder.hidden()?;
        let loss = recorder.loss(hidden, shape.gradients)?.loss;
        let params: Vec<(String, TensorId)> = recorder.params().iter().map(|(n, &t)| (n.clone(), t)).collect();
        let mut graph = recorder.graph;
        if !shape.gradients {
            graph.output(LOSS, loss)?;
            return Ok(graph);
        }
        let one = elementwise::fill(&mut graph, DType::F32, 1, 1, 1.0)?;
        let wrt: Vec<TensorId> = params.iter().map(|p| p.1).collect();
        let gradients = graph.backward(&[(loss, one)], &wrt, shape.recompute)?;
        let first = graph.nodes().len();
        let mut sums = Vec::new();
        for ((name, param), gradient) in params.iter().zip(gradients) {
            let dest = graph.external(format!("{GRAD}{name}"), DType::F32, graph.rows(*param), graph.cols(*param));
            sums.extend(store_gradient(&mut graph, dest, gradient, shape.accumulate)?);
        }
        let dest = graph.external(LOSS, DType::F32, 1, 1);
        sums.extend(store_gradient(&mut graph, dest, Some(loss), shape.accumulate)?);
        // What is added to gradients runs as they come, so that they need not be kept.
        graph.hoist(first);
        if let Some(member) = member {
            sum_over_group(&mut graph, member, sums)?;
        }
        Ok(graph)
    }

    /// Records and plans a micro-batch of this shape.
    ///
    /// # Errors
    /// As [`GradientPlan::graph`]; no memory for its inputs.
    pub fn new(device: &Device, config: &ModelConfig, shape: StepShape) -> Result<GradientPlan, Error> {
        GradientPlan::in_group(device, config, shape, None)
    }

    /// As [`GradientPlan::new`]; gradients and loss are summed over the group that `member` belongs to, if there is
    /// one: for the last micro-batch of a step.
    ///
    /// # Errors
    /// As [`GradientPlan::new`].
    pub fn in_group(
        device: &Device,
        config: &ModelConfig,
        shape: StepShape,
        member: Option<&Arc<Member>>,
    ) -> Result<GradientPlan, Error> {
        let plan = device.plan(GradientPlan::record(config, &shape, member)?)?;
        let inputs = plan.graph().externals().iter().filter(|e| is_io(&e.name));
        let io = device.alloc(inputs.map(|e| device.external_bytes(&plan, e.tensor).next_multiple_of(64)).sum())?;
        Ok(GradientPlan { plan, shape, io })
    }

    /// Bytes of the gradients of parameters that take this many, and of the loss behind them.
    pub fn gradient_bytes(weights: usize) -> usize {
        weights + LOSS_BYTES
    }

    /// The plan itself, for its sizes and costs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The shape that it was made for.
    pub fn shape(&self) -> &StepShape {
        &self.shape
    }

    /// Work and traffic of one run.
    pub fn cost(&self) -> Cost {
        self.plan.cost()
    }

    /// Enqueues a run. Gradients go to `gradients`, which has the layout of the weights and the loss behind them
    /// ([`GradientPlan::gradient_bytes`]).
    ///
    /// # Errors
    /// Something that the plan needs is not there; what the device refuses.
    pub fn enqueue(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        gradients: Option<&Buffer>,
        inputs: &StepInputs<'_>,
    ) -> Result<(), Error> {
        self.write(device, inputs);
        Ok(device.run(&self.plan, arena, &self.bindings(device, weights, gradients, inputs.states)?)?)
    }

    /// As [`GradientPlan::enqueue`], and waits for the loss.
    ///
    /// # Errors
    /// As [`GradientPlan::enqueue`].
    pub fn run(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        gradients: Option<&Buffer>,
        inputs: &StepInputs<'_>,
    ) -> Result<f32, Error> {
        self.enqueue(device, arena, weights, gradients, inputs)?;
        let Slice { buffer, offset } = self.loss(device, weights, gradients);
        Ok(buffer.to_vec::<f32>(offset, 1)[0])
    }

    /// Does what a run with this memory needs memory for itself (see [`Device::prepare`]).
    ///
    /// # Errors
    /// As [`GradientPlan::enqueue`].
    pub fn prepare(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        gradients: &Buffer,
        states: Option<(&StatePool, &StatePool)>,
    ) -> Result<(), Error> {
        Ok(device.prepare(&self.plan, arena, &self.bindings(device, weights, Some(gradients), states)?)?)
    }

    /// Where the loss is after a run.
    pub fn loss<'a>(&'a self, device: &Device, weights: &Weights, gradients: Option<&'a Buffer>) -> Slice<'a> {
        match gradients {
            Some(gradients) => gradients.at(weights.bytes()),
            None => {
                let io = self.io_externals(device).find(|(name, _)| *name == LOSS);
                self.io.at(io.map_or(0, |(_, offset)| offset))
            }
        }
    }

    /// Seconds that each op takes by itself, with the op's name.
    ///
    /// # Errors
    /// As [`GradientPlan::run`].
    pub fn profile(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        gradients: Option<&Buffer>,
        inputs: &StepInputs<'_>,
    ) -> Result<Vec<(&'static str, f64)>, Error> {
        self.write(device, inputs);
        Ok(device.profile(&self.plan, arena, &self.bindings(device, weights, gradients, inputs.states)?)?)
    }

    /// The externals in the plan's own memory: name and first byte there.
    fn io_externals<'a>(&'a self, device: &'a Device) -> impl Iterator<Item = (&'a str, usize)> {
        let mut offset = 0;
        self.plan.graph().externals().iter().filter(|e| is_io(&e.name)).map(move |e| {
            let at = offset;
            offset += device.external_bytes(&self.plan, e.tensor).next_multiple_of(64);
            (e.name.as_str(), at)
        })
    }

    /// Writes the inputs.
    fn write(&self, device: &Device, inputs: &StepInputs<'_>) {
        let io = &self.io;
        for (name, at) in self.io_externals(device) {
            match name {
                IDS => io.write(at, &inputs.ids.iter().map(|&i| i as i32).collect::<Vec<i32>>()),
                SEGMENTS => io.write(at, inputs.pack.offsets()),
                TARGETS => io.write(at, inputs.targets),
                LOSS_SCALE => io.write(at, &[inputs.loss_scale]),
                DROPOUT_SEED => io.write(at, &inputs.dropout_seed),
                _ => {}
            }
        }
    }

    /// Where the memory of the externals is.
    fn bindings<'a>(
        &'a self,
        device: &'a Device,
        weights: &'a Weights,
        gradients: Option<&'a Buffer>,
        states: Option<(&'a StatePool, &'a StatePool)>,
    ) -> Result<Vec<Slice<'a>>, Error> {
        let mut own = self.io_externals(device);
        let bound = |name: &str| {
            if is_io(name) {
                let place = own.next().map(|(_, at)| self.io.at(at));
                return if name == LOSS { Some(self.loss(device, weights, gradients)) } else { place };
            }
            match (name.strip_prefix(GRAD), states) {
                (Some(param), _) => weights.slice(param).and_then(|slice| gradients.map(|b| b.at(slice.offset))),
                (None, Some((start, end))) => {
                    weights.slice(name).or_else(|| start.slice(name, false)).or_else(|| end.slice(name, true))
                }
                (None, None) => weights.slice(name),
            }
        };
        let names = self.plan.graph().externals().iter().map(|e| e.name.as_str());
        let found: Vec<Option<Slice<'_>>> = names.clone().map(bound).collect();
        let missing = |name| Error::Internal(format!("nothing is bound to {name}"));
        names.zip(found).map(|(name, slice)| slice.ok_or_else(|| missing(name))).collect()
    }
}

fn is_io(name: &str) -> bool {
    [IDS, SEGMENTS, TARGETS, LOSS_SCALE, DROPOUT_SEED, LOSS].contains(&name)
}

/// Makes a gradient end up in its external, added to what is there if `accumulate`. Returns it as it stands there and
/// the external, if anything was stored.
fn store_gradient(
    graph: &mut Graph,
    dest: TensorId,
    gradient: Option<TensorId>,
    accumulate: bool,
) -> Result<Option<(TensorId, TensorId)>, Error> {
    let value = match (gradient, accumulate) {
        (Some(gradient), false) => gradient,
        (Some(gradient), true) => graph.plus(gradient, dest)?,
        (None, false) => elementwise::fill(graph, DType::F32, graph.rows(dest), graph.cols(dest), 0.0)?,
        (None, true) => return Ok(None),
    };
    Ok(Some((graph.store(value, dest)?, dest)))
}

/// Sums what was stored over a group of devices, in buckets that are filled in the order in which the backward pass
/// makes them ready, and each as soon as its last part is: the rest of the pass runs meanwhile.
fn sum_over_group(graph: &mut Graph, member: &Arc<Member>, mut parts: Vec<(TensorId, TensorId)>) -> Result<(), Error> {
    parts.sort_by_cached_key(|part| graph.last_touch(part.0));
    let first = graph.nodes().len();
    let mut bucket = Vec::new();
    let mut bytes = 0;
    for (i, part) in parts.iter().enumerate() {
        bucket.push(*part);
        bytes += graph.tensor(part.1).bytes();
        if bytes >= BUCKET || i + 1 == parts.len() {
            all_reduce(graph, member, &bucket)?;
            bucket.clear();
            bytes = 0;
        }
    }
    graph.hoist(first);
    Ok(())
}

/// AdamW over all parameters: the gradient's norm, clipping and the update, in one pass over flat memory.
#[derive(Debug)]
pub struct UpdatePlan {
    plan: Plan,
    /// Hyper-parameters and results ([`UPDATE_AT`]).
    io: Buffer,
}

impl UpdatePlan {
    /// Plans the update of these parameters, which must be in a form for training.
    pub fn new(device: &Device, weights: &Weights) -> Result<UpdatePlan, Error> {
        let decayed: Vec<Range<usize>> = weights
            .entries()
            .filter(|(_, spec)| spec.weight_decay)
            .map(|(offset, spec)| offset / 4..offset / 4 + spec.numel())
            .collect();
        let graph = UpdatePlan::graph(weights.bytes() / 4, decayed, weights.rounded().is_some())?;
        Ok(UpdatePlan { plan: device.plan(graph)?, io: device.alloc(128)? })
    }

    /// Records the update of `n` parameters, of which some decay and which may have a copy rounded to bf16.
    ///
    /// # Errors
    /// Ranges outside of the parameters.
    pub fn graph(n: usize, decayed: Vec<Range<usize>>, rounded: bool) -> Result<Graph, Error> {
        let mut graph = Graph::new();
        let mut external = |name: &str, cols| graph.external(name, DType::F32, 1, cols);
        let (params, grads, m, v) = (external("params", n), external("grads", n), external("m", n), external("v", n));
        let hyper = external("hyper", 8);
        let norm = adamw::global_norm(&mut graph, grads)?;
        // The norm is read by the update and by the caller.
        graph.output(NORM, norm)?;
        let culprit = adamw::first_not_finite(&mut graph, grads, norm)?;
        graph.output(CULPRIT, culprit)?;
        let rounded = rounded.then(|| graph.external("rounded", DType::BF16, 1, n));
        adamw::adamw(&mut graph, AdamW { params, grads, m, v, hyper, norm, decayed, rounded })?;
        Ok(graph)
    }

    /// The plan itself, for its size.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Enqueues update number `step` (from 1) of the parameters with the buffers of gradients, first and second moments.
    /// If the gradient's norm is not finite, nothing changes.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn enqueue(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        buffers: [&Buffer; 3],
        hyper: &Hyper,
        step: u64,
    ) -> Result<(), Error> {
        self.io.write(UPDATE_AT[0], &hyper.row(step));
        Ok(device.run(&self.plan, arena, &self.bindings(weights, buffers))?)
    }

    /// As [`UpdatePlan::enqueue`]; waits for the gradient's norm before clipping and returns it.
    ///
    /// # Errors
    /// As [`UpdatePlan::enqueue`].
    pub fn run(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        buffers: [&Buffer; 3],
        hyper: &Hyper,
        step: u64,
    ) -> Result<f32, Error> {
        self.enqueue(device, arena, weights, buffers, hyper, step)?;
        Ok(self.io.to_vec::<f32>(UPDATE_AT[1], 1)[0])
    }

    /// Seconds that each op takes by itself, with the op's name. Parameters and moments go on.
    ///
    /// # Errors
    /// As [`UpdatePlan::enqueue`].
    pub fn profile(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        buffers: [&Buffer; 3],
        hyper: &Hyper,
        step: u64,
    ) -> Result<Vec<(&'static str, f64)>, Error> {
        self.io.write(UPDATE_AT[0], &hyper.row(step));
        Ok(device.profile(&self.plan, arena, &self.bindings(weights, buffers))?)
    }

    /// Does what a run with this memory needs memory for itself (see [`Device::prepare`]).
    ///
    /// # Errors
    /// As [`UpdatePlan::enqueue`].
    pub fn prepare(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        buffers: [&Buffer; 3],
    ) -> Result<(), Error> {
        Ok(device.prepare(&self.plan, arena, &self.bindings(weights, buffers))?)
    }

    /// After a run: the gradient's norm, f32, and behind it 8 bytes with the number of the first gradient that is not
    /// finite, all ones where there is none.
    pub fn results(&self) -> Slice<'_> {
        self.io.at(UPDATE_AT[1])
    }

    fn bindings<'a>(&'a self, weights: &'a Weights, buffers: [&'a Buffer; 3]) -> Vec<Slice<'a>> {
        let [grads, m, v] = buffers.map(Buffer::slice);
        let bind = |name: &str| match name {
            "params" => weights.buffer().slice(),
            "rounded" => weights.rounded().unwrap_or(&self.io).slice(),
            "grads" => grads,
            "m" => m,
            "v" => v,
            "hyper" => self.io.at(UPDATE_AT[0]),
            NORM => self.io.at(UPDATE_AT[1]),
            _ => self.io.at(UPDATE_AT[2]),
        };
        self.plan.graph().externals().iter().map(|e| bind(&e.name)).collect()
    }
}

/// Loss and gradients of a whole batch.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Mean next-token cross-entropy of all positions but the last of each segment, in nats.
    pub loss: f32,
    /// Canonical name, shape and values of each parameter's gradient.
    pub tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

/// The loss of predicting each next token inside the segments of a pack, and its gradient for every parameter.
///
/// The weights must be in a form for training.
pub fn gradients(
    device: &Device,
    config: &ModelConfig,
    weights: &Weights,
    ids: &[u32],
    pack: &Pack,
) -> Result<Gradients, Error> {
    if let Some((at, &id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= config.padded_vocab) {
        return Err(hognose_model::Error::TokenId { id, at, vocabulary: config.padded_vocab }.into());
    }
    let mut targets = vec![-1; ids.len()];
    let mut predicted = 0;
    for ends in pack.offsets().windows(2) {
        for row in ends[0] as usize + 1..ends[1] as usize {
            targets[row - 1] = ids[row] as i32;
            predicted += 1;
        }
    }
    let shape = StepShape {
        form: weights.form().clone(),
        tokens: pack.tokens(),
        segments: pack.segments(),
        carry_state: false,
        gradients: true,
        accumulate: false,
        dropout: 0.0,
        recompute: Recompute::Nothing,
    };
    let plan = GradientPlan::new(device, config, shape)?;
    let arena = device.arena(plan.plan())?;
    let buffer = device.alloc(GradientPlan::gradient_bytes(weights.bytes()))?;
    let inputs = StepInputs {
        ids,
        targets: &targets,
        pack,
        loss_scale: 1.0 / (predicted.max(1) as f32),
        states: None,
        dropout_seed: [0; 3],
    };
    let loss = plan.run(device, &arena, weights, Some(&buffer), &inputs)?;
    let tensors = weights
        .entries()
        .map(|(offset, spec)| (spec.name.clone(), spec.shape.clone(), buffer.to_vec(offset, spec.numel())))
        .collect();
    Ok(Gradients { loss, tensors })
}
