//! Running a model: packs of tokens in, logits out, states kept on the device.

use std::collections::HashMap;

use hognose_core::{Buffer, Device, Graph, Pack, Plan, Slice};

use crate::config::{Mixer, ModelConfig};
use crate::error::Error;
use crate::network::{IDS, ROWS, Recorder, SEGMENTS, States, has_step};
use crate::state::{State, StatePool};
use crate::weights::{Form, Weights};

/// Tokens of a prompt that are processed at once, about: enough to keep matrix products busy, little memory.
const PREFILL_TOKENS: usize = 512;
/// The same on a GPU, which needs more of them to be busy.
const PREFILL_TOKENS_GPU: usize = 2048;
/// Name of the external that receives the logits.
const LOGITS: &str = "logits";

/// A model in the memory of a device.
#[derive(Debug)]
pub struct Model {
    /// What it is made of.
    pub config: ModelConfig,
    /// Its parameters, in the form for inference.
    pub weights: Weights,
    /// Where they are and where it runs.
    pub device: Device,
}

/// A model with the states of `slots` sequences and the plans that its calls need.
///
/// Segment s of every pack continues slot s. The same tokens give the same logits however they are cut into calls:
/// bit for bit on the CPU for Mamba-1, and for Mamba-2 where the cuts fall on its chunk grid.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    plans: HashMap<Shape, Compiled>,
    arena: Buffer,
    pool: StatePool,
    positions: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    tokens: usize,
    rows: usize,
    /// One token of every slot, with all logits.
    step: bool,
}

#[derive(Debug)]
struct Compiled {
    plan: Plan,
    /// Ids, segment offsets, row numbers and logits, one after another.
    io: Buffer,
    sources: Vec<Source>,
    logits: usize,
}

/// Where the memory of an external lies: byte offsets.
#[derive(Clone, Copy, Debug)]
enum Source {
    Weights(usize),
    State(usize),
    Io(usize),
}

impl<'m> Session<'m> {
    /// States of `slots` sequences, all at their beginning.
    ///
    /// # Errors
    /// No memory for the states.
    pub fn new(model: &'m Model, slots: usize) -> Result<Session<'m>, Error> {
        let pool = StatePool::new(&model.device, &model.config, slots)?;
        let arena = model.device.alloc(0)?;
        Ok(Session { model, plans: HashMap::new(), arena, pool, positions: vec![0; slots] })
    }

    /// The model that it runs.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Bytes in use beside the parameters: states, arena, inputs and outputs.
    pub fn bytes(&self) -> usize {
        self.pool.bytes() + self.arena.bytes() + self.plans.values().map(|c| c.io.bytes()).sum::<usize>()
    }

    /// Bytes of the states.
    pub fn state_bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// Floating-point operations that a token needs, about: those of the largest plan so far.
    pub fn flops_per_token(&self) -> f64 {
        let largest = self.plans.iter().max_by_key(|(shape, _)| shape.tokens);
        largest.map_or(0.0, |(shape, compiled)| compiled.plan.cost().flops / shape.tokens.max(1) as f64)
    }

    /// The state of a slot.
    pub fn state(&self, slot: usize) -> State {
        let mut state = State::zero(&self.model.config, self.model.weights.fingerprint());
        self.pool.read(slot, &mut state);
        state.position = self.positions[slot];
        state
    }

    /// Tokens that a slot remembers.
    pub fn position(&self, slot: usize) -> u64 {
        self.positions[slot]
    }

    /// Continues a slot from a state of the same model.
    ///
    /// # Errors
    /// [`Error::ForeignState`] for a state that other parameters made.
    pub fn set_state(&mut self, slot: usize, state: &State) -> Result<(), Error> {
        if state.model != self.model.weights.fingerprint() {
            return Err(Error::ForeignState { found: state.model.clone(), expected: self.model.weights.fingerprint() });
        }
        self.pool.write(slot, state);
        self.positions[slot] = state.position;
        Ok(())
    }

    /// Puts a slot back to its beginning.
    pub fn reset(&mut self, slot: usize) {
        self.pool.clear_slot(slot);
        self.positions[slot] = 0;
    }

    /// Tokens that are processed at once: a multiple of every chunk grid, so that prompts are cut on it.
    pub fn prefill_tokens(&self) -> usize {
        let chunk = |l: &crate::config::LayerConfig| match &l.mixer {
            Mixer::Mamba1(_) => 1,
            Mixer::Mamba2(m) => m.chunk_size,
        };
        let grid = self.model.config.layers.iter().map(chunk).fold(1, lcm);
        let tokens = match self.model.device {
            Device::Cpu(_) => PREFILL_TOKENS,
            Device::Cuda(_) => PREFILL_TOKENS_GPU,
        };
        grid * tokens.div_ceil(grid).max(1)
    }

    /// Processes a pack: segment s continues slot s. Returns the logits of the given rows of the pack, row-major
    /// `[rows.len(), padded vocabulary]`.
    ///
    /// # Errors
    /// [`Error::TokenId`], [`Error::Pack`] and [`Error::Row`] for inputs that do not fit; [`Error::Core`] where memory
    /// is short. The states are unchanged then.
    pub fn run(&mut self, ids: &[u32], pack: &Pack, rows: &[usize]) -> Result<Vec<f32>, Error> {
        let vocabulary = self.model.config.padded_vocab;
        if let Some((at, &id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= vocabulary) {
            return Err(Error::TokenId { id, at, vocabulary });
        }
        if pack.tokens() != ids.len() || pack.segments() != self.pool.slots() {
            return Err(Error::Pack {
                ids: ids.len(),
                pack: pack.tokens(),
                segments: pack.segments(),
                slots: self.pool.slots(),
            });
        }
        if let Some(&row) = rows.iter().find(|&&r| r >= ids.len()) {
            return Err(Error::Row { row, rows: ids.len() });
        }
        let shape = self.shape(pack, rows);
        if !self.plans.contains_key(&shape) {
            let compiled = self.compile(shape)?;
            if compiled.plan.arena_bytes() > self.arena.bytes() {
                self.arena = self.model.device.alloc(0)?;
                self.arena = self.model.device.arena(&compiled.plan)?;
            }
            self.plans.insert(shape, compiled);
        }
        let compiled = &self.plans[&shape];
        let bindings = self.bindings(compiled, ids, pack, rows);
        self.model.device.run(&compiled.plan, &self.arena, &bindings)?;
        for (position, ends) in self.positions.iter_mut().zip(pack.offsets().windows(2)) {
            *position += (ends[1] - ends[0]) as u64;
        }
        Ok(self.plans[&shape].io.to_vec(self.plans[&shape].logits, rows.len() * vocabulary))
    }

    /// Seconds that each op of a call takes by itself, with the op's name. The call must have been made once; the
    /// states go on.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn profile(&mut self, ids: &[u32], pack: &Pack, rows: &[usize]) -> Result<Vec<(&'static str, f64)>, Error> {
        self.run(ids, pack, rows)?;
        let compiled = &self.plans[&self.shape(pack, rows)];
        let bindings = self.bindings(compiled, ids, pack, rows);
        Ok(self.model.device.profile(&compiled.plan, &self.arena, &bindings)?)
    }

    /// Which plan a call needs.
    fn shape(&self, pack: &Pack, rows: &[usize]) -> Shape {
        let Model { config, weights, .. } = self.model;
        let tokens = pack.tokens();
        let one_each = rows.len() == tokens
            && tokens == pack.segments()
            && pack.offsets().iter().enumerate().all(|(i, &offset)| i as i32 == offset)
            && rows.iter().enumerate().all(|(i, &row)| i == row);
        Shape { tokens, rows: rows.len(), step: one_each && has_step(config, weights.form(), tokens) }
    }

    /// Writes the inputs of a call and says where the memory of its externals is.
    fn bindings<'a>(&'a self, compiled: &'a Compiled, ids: &[u32], pack: &Pack, rows: &[usize]) -> Vec<Slice<'a>> {
        let (plan, io) = (&compiled.plan, &compiled.io);
        let as_i32 = |values: &mut dyn Iterator<Item = usize>| values.map(|v| v as i32).collect::<Vec<i32>>();
        let mut bindings = Vec::with_capacity(compiled.sources.len());
        for (external, source) in plan.graph().externals().iter().zip(&compiled.sources) {
            bindings.push(match *source {
                Source::Weights(offset) => self.model.weights.buffer().at(offset),
                Source::State(offset) => self.pool.buffer().at(offset),
                Source::Io(offset) => {
                    match external.name.as_str() {
                        IDS => io.write(offset, &as_i32(&mut ids.iter().map(|&i| i as usize))),
                        SEGMENTS => io.write(offset, pack.offsets()),
                        ROWS => io.write(offset, &as_i32(&mut rows.iter().copied())),
                        _ => {}
                    }
                    io.at(offset)
                }
            });
        }
        bindings
    }

    /// Processes the tokens of slot 0 in chunks, so that memory does not grow with their number, and returns the
    /// logits after the last one. `progress` is told how many tokens are done. The session must have one slot.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn prefill(&mut self, ids: &[u32], mut progress: impl FnMut(usize)) -> Result<Vec<f32>, Error> {
        let mut logits = Vec::new();
        let mut done = 0;
        // After a state that was saved off the grid, the first chunk completes it.
        let step = self.prefill_tokens();
        let mut next = step - (self.positions.first().copied().unwrap_or(0) % step as u64) as usize;
        while done < ids.len() {
            let chunk = &ids[done..ids.len().min(done + next)];
            done += chunk.len();
            next = step;
            let rows: &[usize] = if done == ids.len() { &[chunk.len() - 1] } else { &[] };
            logits = self.run(chunk, &Pack::from_lengths([chunk.len()])?, rows)?;
            progress(done);
        }
        Ok(logits)
    }

    fn compile(&self, shape: Shape) -> Result<Compiled, Error> {
        let Model { config, weights, device } = self.model;
        let plan = device.plan(match shape.step {
            true => step_graph(config, weights.form(), self.pool.slots(), shape.tokens)?,
            false => graph(config, weights.form(), self.pool.slots(), shape.tokens, shape.rows)?,
        })?;
        let mut io_bytes = 0;
        let mut logits = 0;
        let mut sources = Vec::new();
        for external in plan.graph().externals() {
            let source = if let Some(slice) = weights.slice(&external.name) {
                Source::Weights(slice.offset)
            } else if let Some(slice) = self.pool.slice(&external.name, false) {
                Source::State(slice.offset)
            } else {
                let offset = io_bytes;
                if external.name == LOGITS {
                    logits = offset;
                }
                io_bytes += device.external_bytes(&plan, external.tensor).next_multiple_of(64);
                Source::Io(offset)
            };
            sources.push(source);
        }
        let io = device.alloc(io_bytes)?;
        Ok(Compiled { plan, io, sources, logits })
    }
}

/// Records a call that processes `tokens` tokens of `slots` sequences and gives the logits of `rows` of them.
///
/// # Errors
/// Sizes that the configuration's ops refuse.
pub fn graph(config: &ModelConfig, form: Form, slots: usize, tokens: usize, rows: usize) -> Result<Graph, Error> {
    let mut recorder = Recorder::new(config, form, tokens, slots, States::InPlace);
    let mut hidden = recorder.hidden()?;
    if rows > 0 {
        if rows < tokens {
            hidden = recorder.gather(hidden, rows)?;
        }
        let logits = recorder.logits(hidden)?;
        recorder.graph.output(LOGITS, logits)?;
    }
    Ok(recorder.graph)
}

/// Records a step of `tokens` of `slots` sequences on a GPU, with the logits of all of them.
///
/// # Errors
/// Sizes that the ops refuse; [`has_step`] says beforehand whether they do.
pub fn step_graph(config: &ModelConfig, form: Form, slots: usize, tokens: usize) -> Result<Graph, Error> {
    let mut recorder = Recorder::new(config, form, tokens, slots, States::InPlace);
    let logits = recorder.step_logits()?;
    recorder.graph.output(LOGITS, logits)?;
    Ok(recorder.graph)
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// Mean next-token cross-entropy (nats) of each position but the last, summed over one sequence in f64.
pub fn next_token_loss(logits: &[f32], ids: &[u32], vocabulary: usize) -> f64 {
    let rows = logits.chunks_exact(vocabulary);
    rows.zip(ids.iter().skip(1))
        .map(|(row, &next)| {
            let max = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
            let sum: f64 = row.iter().map(|&v| f64::from(v - max).exp()).sum();
            f64::from(max) + sum.ln() - f64::from(row[next as usize])
        })
        .sum()
}
