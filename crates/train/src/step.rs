//! One training step as two plans: loss and gradients of a micro-batch, and the update of the parameters.

use std::ops::Range;

use hognose_core::graph::{Cost, Recompute};
use hognose_core::ops::adamw::{self, AdamW, Hyper};
use hognose_core::ops::elementwise;
use hognose_core::{Buffer, DType, Device, Graph, Pack, Plan, Slice, TensorId};
use hognose_model::config::ModelConfig;
use hognose_model::network::{DROPOUT_SEED, IDS, LOSS_SCALE, Recorder, SEGMENTS, States, TARGETS};
use hognose_model::state::StatePool;
use hognose_model::weights::{Form, Weights};

use crate::error::Error;

const LOSS: &str = "loss";
const NORM: &str = "norm";
/// Prefix of the externals that receive gradients.
const GRAD: &str = "grad.";

/// What decides the shape of a gradient plan.
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// Seed of the step's dropout masks: the run's seed and the number of the micro-batch.
    pub dropout_seed: [i32; 2],
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
        let states = if shape.carry_state { States::Carried } else { States::None };
        let mut recorder = Recorder::new(config, shape.form, shape.tokens, shape.segments, states);
        if shape.gradients {
            recorder = recorder.with_dropout(shape.dropout);
        }
        let hidden = recorder.hidden()?;
        let loss = recorder.loss(hidden, shape.gradients)?.loss;
        let params: Vec<(String, TensorId)> = recorder.params().iter().map(|(n, &t)| (n.clone(), t)).collect();
        let mut graph = recorder.graph;
        if shape.gradients {
            let one = elementwise::fill(&mut graph, DType::F32, 1, 1, 1.0)?;
            let wrt: Vec<TensorId> = params.iter().map(|p| p.1).collect();
            let gradients = graph.backward(&[(loss, one)], &wrt, shape.recompute)?;
            for ((name, param), gradient) in params.iter().zip(gradients) {
                store_gradient(&mut graph, name, *param, gradient, shape.accumulate)?;
            }
        }
        graph.output(LOSS, loss)?;
        Ok(graph)
    }

    /// Records and plans a micro-batch of this shape.
    ///
    /// # Errors
    /// As [`GradientPlan::graph`]; no memory for its inputs.
    pub fn new(device: &Device, config: &ModelConfig, shape: StepShape) -> Result<GradientPlan, Error> {
        let plan = device.plan(GradientPlan::graph(config, &shape)?)?;
        let inputs = plan.graph().externals().iter().filter(|e| is_io(&e.name));
        let io = device.alloc(inputs.map(|e| device.external_bytes(&plan, e.tensor).next_multiple_of(64)).sum())?;
        Ok(GradientPlan { plan, shape, io })
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

    /// Runs the plan and returns the loss. Gradients go to `gradients`, which has the layout of the weights.
    pub fn run(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        gradients: Option<&Buffer>,
        inputs: &StepInputs<'_>,
    ) -> Result<f32, Error> {
        let (bindings, loss_at) = self.bindings(device, weights, gradients, inputs)?;
        device.run(&self.plan, arena, &bindings)?;
        Ok(self.io.to_vec::<f32>(loss_at, 1)[0])
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
        let (bindings, _) = self.bindings(device, weights, gradients, inputs)?;
        Ok(device.profile(&self.plan, arena, &bindings)?)
    }

    /// Writes the inputs; returns where the memory of the externals is, and at which byte of `io` the loss.
    fn bindings<'a>(
        &'a self,
        device: &Device,
        weights: &'a Weights,
        gradients: Option<&'a Buffer>,
        inputs: &StepInputs<'a>,
    ) -> Result<(Vec<Slice<'a>>, usize), Error> {
        let io = &self.io;
        let mut offset = 0;
        let mut loss_at = 0;
        let mut bindings: Vec<Slice<'_>> = Vec::new();
        for external in self.plan.graph().externals() {
            let name = external.name.as_str();
            if is_io(name) {
                match name {
                    IDS => io.write(offset, &inputs.ids.iter().map(|&i| i as i32).collect::<Vec<i32>>()),
                    SEGMENTS => io.write(offset, inputs.pack.offsets()),
                    TARGETS => io.write(offset, inputs.targets),
                    LOSS_SCALE => io.write(offset, &[inputs.loss_scale]),
                    DROPOUT_SEED => io.write(offset, &inputs.dropout_seed),
                    _ => loss_at = offset,
                }
                bindings.push(io.at(offset));
                offset += device.external_bytes(&self.plan, external.tensor).next_multiple_of(64);
                continue;
            }
            let missing = || Error::Internal(format!("nothing is bound to {name}"));
            let bound = match (name.strip_prefix(GRAD), inputs.states) {
                (Some(param), _) => {
                    let offset = weights.slice(param).ok_or_else(missing)?.offset;
                    gradients.map(|buffer| buffer.at(offset))
                }
                (None, Some((start, end))) => {
                    weights.slice(name).or_else(|| start.slice(name, false)).or_else(|| end.slice(name, true))
                }
                (None, None) => weights.slice(name),
            };
            bindings.push(bound.ok_or_else(missing)?);
        }
        Ok((bindings, loss_at))
    }
}

fn is_io(name: &str) -> bool {
    [IDS, SEGMENTS, TARGETS, LOSS_SCALE, DROPOUT_SEED, LOSS].contains(&name)
}

/// Makes the gradient of a parameter end up in its external, added to what is there if `accumulate`.
fn store_gradient(
    graph: &mut Graph,
    name: &str,
    param: TensorId,
    gradient: Option<TensorId>,
    accumulate: bool,
) -> Result<(), Error> {
    let (rows, cols) = (graph.rows(param), graph.cols(param));
    let dest = graph.external(format!("{GRAD}{name}"), DType::F32, rows, cols);
    let value = match (gradient, accumulate) {
        (Some(gradient), false) => gradient,
        (Some(gradient), true) => graph.plus(gradient, dest)?,
        (None, false) => elementwise::fill(graph, DType::F32, rows, cols, 0.0)?,
        (None, true) => return Ok(()),
    };
    Ok(graph.store(value, dest)?)
}

/// AdamW over all parameters: the gradient's norm, clipping and the update, in one pass over flat memory.
#[derive(Debug)]
pub struct UpdatePlan {
    plan: Plan,
    /// Hyper-parameters and the norm.
    io: Buffer,
}

impl UpdatePlan {
    /// Plans the update of these parameters, which must be in [`Form::Training`].
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
        let rounded = rounded.then(|| graph.external("rounded", DType::BF16, 1, n));
        adamw::adamw(&mut graph, AdamW { params, grads, m, v, hyper, norm, decayed, rounded })?;
        Ok(graph)
    }

    /// The plan itself, for its size.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Does update number `step` (from 1) on the parameters with the buffers of gradients, first and second moments, and
    /// returns the gradient's norm before clipping. If that is not finite, nothing changes.
    pub fn run(
        &self,
        device: &Device,
        arena: &Buffer,
        weights: &Weights,
        buffers: [&Buffer; 3],
        hyper: &Hyper,
        step: u64,
    ) -> Result<f32, Error> {
        self.io.write(0, &hyper.row(step));
        let [grads, m, v] = buffers.map(Buffer::slice);
        let bindings: Vec<Slice<'_>> = self
            .plan
            .graph()
            .externals()
            .iter()
            .map(|e| match e.name.as_str() {
                "params" => weights.buffer().slice(),
                "rounded" => weights.rounded().unwrap_or(&self.io).slice(),
                "grads" => grads,
                "m" => m,
                "v" => v,
                "hyper" => self.io.at(0),
                _ => self.io.at(64),
            })
            .collect();
        device.run(&self.plan, arena, &bindings)?;
        Ok(self.io.to_vec::<f32>(64, 1)[0])
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
/// The weights must be in [`Form::Training`].
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
        form: weights.form(),
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
    let buffer = device.alloc(weights.bytes())?;
    let inputs = StepInputs {
        ids,
        targets: &targets,
        pack,
        loss_scale: 1.0 / (predicted.max(1) as f32),
        states: None,
        dropout_seed: [0; 2],
    };
    let loss = plan.run(device, &arena, weights, Some(&buffer), &inputs)?;
    let tensors = weights
        .entries()
        .map(|(offset, spec)| (spec.name.clone(), spec.shape.clone(), buffer.to_vec(offset, spec.numel())))
        .collect();
    Ok(Gradients { loss, tensors })
}
