//! Bits per byte on held-out text: every token predicted once, from everything before it in its document.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use hognose_core::graph::Recompute;
use hognose_core::{Buffer, Device, Pack, Plan};
use hognose_model::config::ModelConfig;
use hognose_model::state::StatePool;
use hognose_model::weights::Weights;

use crate::data::{Batch, Evaluation};
use crate::error::Error;
use crate::step::{GradientPlan, StepInputs, StepShape};

/// Segments are padded with empty ones to a multiple of this, so that few plans are needed.
pub const SEGMENT_GRID: usize = 8;

/// A batch's segments as a pack, padded with empty segments.
pub fn padded_pack(batch: &Batch) -> Result<Pack, Error> {
    let mut offsets: Vec<i32> = batch.cu_seqlens.iter().map(|&o| o as i32).collect();
    let total = *offsets.last().unwrap_or(&0);
    offsets.resize(batch.segments().next_multiple_of(SEGMENT_GRID) + 1, total);
    Ok(Pack::from_offsets(offsets)?)
}

/// The states that lanes carry from one batch to the next, and the pools in which a batch's segments start and end.
#[derive(Debug)]
pub struct Lanes {
    /// One slot a lane.
    pub pool: StatePool,
    /// Start and end states by number of segments.
    segments: HashMap<usize, (StatePool, StatePool)>,
}

impl Lanes {
    /// Lanes whose states are zero.
    pub fn new(device: &Device, config: &ModelConfig, lanes: usize) -> Result<Lanes, Error> {
        Ok(Lanes { pool: StatePool::new(device, config, lanes)?, segments: HashMap::new() })
    }

    /// Makes sure that there are start and end states for that many segments.
    pub fn make_room(&mut self, device: &Device, config: &ModelConfig, segments: usize) -> Result<(), Error> {
        if let Entry::Vacant(place) = self.segments.entry(segments) {
            let pool = || StatePool::new(device, config, segments);
            place.insert((pool()?, pool()?));
        }
        Ok(())
    }

    /// Start and end states for that many segments, if there is room.
    pub fn pools(&self, segments: usize) -> Option<(&StatePool, &StatePool)> {
        self.segments.get(&segments).map(|(start, end)| (start, end))
    }

    /// Start and end states for a batch; the start states are those that its segments carry on. `None` where no room
    /// was made.
    pub fn start(&self, batch: &Batch, segments: usize) -> Option<(&StatePool, &StatePool)> {
        let (start, end) = self.pools(segments)?;
        start.clear();
        for (segment, lane) in batch.carried.iter().enumerate() {
            if let Some(lane) = lane {
                self.pool.copy(*lane, start, segment);
            }
        }
        Some((start, end))
    }

    /// Keeps the states in which the lanes' last segments ended.
    pub fn finish(&self, batch: &Batch, segments: usize) {
        if let Some((_, end)) = self.segments.get(&segments) {
            for (lane, segment) in batch.carry_out.iter().enumerate() {
                if let Some(segment) = segment {
                    end.copy(*segment, &self.pool, lane);
                }
            }
        }
    }
}

/// The evaluation of a model on held-out documents.
#[derive(Debug)]
pub struct Evaluator {
    lanes: Lanes,
    plans: HashMap<(usize, usize), GradientPlan>,
}

impl Evaluator {
    /// An evaluator for evaluations of `lanes` lanes; plans are made when they are needed.
    pub fn new(device: &Device, config: &ModelConfig, lanes: usize) -> Result<Evaluator, Error> {
        Ok(Evaluator { lanes: Lanes::new(device, config, lanes)?, plans: HashMap::new() })
    }

    /// Bits per byte. `arena` grows if need be; `progress` is told the share that is done and may end it early
    /// (`None` is returned then).
    pub fn run(
        &mut self,
        device: &Device,
        config: &ModelConfig,
        weights: &Weights,
        arena: &mut Buffer,
        evaluation: &Evaluation,
        mut progress: impl FnMut(f64) -> bool,
    ) -> Result<Option<f64>, Error> {
        let mut nats = 0.0;
        let mut predicted = 0u64;
        for batch in evaluation.batches() {
            let pack = padded_pack(&batch)?;
            let key = (pack.tokens(), pack.segments());
            let plan = match self.plans.entry(key) {
                Entry::Occupied(plan) => plan.into_mut(),
                Entry::Vacant(place) => {
                    let shape = StepShape {
                        form: weights.form().clone(),
                        tokens: key.0,
                        segments: key.1,
                        carry_state: true,
                        gradients: false,
                        accumulate: false,
                        dropout: 0.0,
                        recompute: Recompute::Nothing,
                    };
                    place.insert(GradientPlan::new(device, config, shape)?)
                }
            };
            grow(device, arena, plan.plan())?;
            self.lanes.make_room(device, config, pack.segments())?;
            let states = self.lanes.start(&batch, pack.segments());
            let inputs = StepInputs {
                ids: &batch.tokens,
                targets: &batch.targets,
                pack: &pack,
                loss_scale: 1.0,
                states,
                dropout_seed: [0; 3],
            };
            nats += f64::from(plan.run(device, arena, weights, None, &inputs)?);
            self.lanes.finish(&batch, pack.segments());
            predicted += batch.predicted() as u64;
            if progress(predicted as f64 / evaluation.predicted().max(1) as f64) {
                return Ok(None);
            }
        }
        Ok(Some(evaluation.bits_per_byte(nats)))
    }
}

/// Makes the arena large enough for a plan.
pub fn grow(device: &Device, arena: &mut Buffer, plan: &Plan) -> Result<(), Error> {
    if plan.arena_bytes() > arena.bytes() {
        // The old arena goes first, so that both need not fit at once.
        *arena = device.alloc(0)?;
        *arena = device.arena(plan)?;
    }
    Ok(())
}
