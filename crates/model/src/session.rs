//! Running a model: packs of tokens in, logits out, states kept on the device.

use std::collections::HashMap;

use hognose_core::{Buffer, Device, Graph, Pack, Plan, Slice};

use crate::config::{Mixer, ModelConfig};
use crate::error::Error;
use crate::network::{IDS, MAILBOX, ROWS, Recorder, SEGMENTS, States, has_step};
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
    pub(crate) model: &'m Model,
    plans: HashMap<Shape, Compiled>,
    pub(crate) arena: Buffer,
    pub(crate) pool: StatePool,
    pub(crate) positions: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub tokens: usize,
    pub rows: usize,
    pub kind: Kind,
}

/// What a plan computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Any pack.
    Pack,
    /// One token of each sequence, on a GPU.
    Step,
    /// The same and the choice of the next tokens, perhaps with a penalty on those that occurred.
    Choice { penalty: bool },
}

#[derive(Debug)]
pub(crate) struct Compiled {
    pub plan: Plan,
    /// Inputs and logits, one after another.
    pub io: Buffer,
    pub sources: Vec<Source>,
    /// Where chosen ids are left.
    pub mailbox: Option<Buffer>,
    logits: usize,
}

/// Where the memory of an external lies: byte offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    Weights(usize),
    State(usize),
    Io(usize),
    Mailbox,
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
    /// A model that is not causal takes any sequence at once.
    pub fn prefill_tokens(&self) -> usize {
        if !self.model.config.is_causal() {
            return i32::MAX as usize;
        }
        let chunk = |l: &crate::config::LayerConfig| match &l.mixer {
            Mixer::Mamba2(m) => m.chunk_size,
            _ => 1,
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
        let goes_on = |(&position, ends): (&u64, &[i32])| position > 0 && ends[0] < ends[1];
        if self.positions.iter().zip(pack.offsets().windows(2)).any(goes_on) {
            self.model
                .config
                .expect_causal("a sequence is one call and cannot go on; reset the session before another")?;
        }
        let shape = self.shape(pack, rows);
        self.prepare(shape)?;
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

    /// Makes sure of the plan for a shape and of memory to run it in.
    pub(crate) fn prepare(&mut self, shape: Shape) -> Result<(), Error> {
        if !self.plans.contains_key(&shape) {
            let compiled = self.compile(shape)?;
            if compiled.plan.arena_bytes() > self.arena.bytes() {
                self.arena = self.model.device.alloc(0)?;
                self.arena = self.model.device.arena(&compiled.plan)?;
            }
            self.plans.insert(shape, compiled);
        }
        Ok(())
    }

    /// The plan that [`Session::prepare`] made.
    pub(crate) fn compiled(&self, shape: Shape) -> &Compiled {
        &self.plans[&shape]
    }

    /// Which plan a call needs.
    fn shape(&self, pack: &Pack, rows: &[usize]) -> Shape {
        let Model { config, weights, .. } = self.model;
        let tokens = pack.tokens();
        let one_each = rows.len() == tokens
            && tokens == pack.segments()
            && pack.offsets().iter().enumerate().all(|(i, &offset)| i as i32 == offset)
            && rows.iter().enumerate().all(|(i, &row)| i == row);
        let step = one_each && has_step(config, weights.form(), tokens);
        Shape { tokens, rows: rows.len(), kind: if step { Kind::Step } else { Kind::Pack } }
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
                Source::Mailbox => unreachable!("only plans that choose have a mailbox"),
            });
        }
        bindings
    }

    /// Processes prompts of several slots in packs of about [`Session::prefill_tokens`] tokens, and returns the logits
    /// after the last token of each. No prompt may be empty.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn prefill_all(&mut self, prompts: &[(usize, &[u32])]) -> Result<Vec<Vec<f32>>, Error> {
        let (budget, vocabulary) = (self.prefill_tokens(), self.model.config.padded_vocab);
        let mut logits = vec![Vec::new(); prompts.len()];
        let mut done = vec![0; prompts.len()];
        while done.iter().zip(prompts).any(|(&done, (_, ids))| done < ids.len()) {
            let mut parts: Vec<&[u32]> = vec![&[]; self.pool.slots()];
            let (mut room, mut ends) = (budget, Vec::new());
            for (i, &(slot, ids)) in prompts.iter().enumerate() {
                let part = &ids[done[i]..ids.len().min(done[i] + room)];
                room -= part.len();
                done[i] += part.len();
                parts[slot] = part;
                if !part.is_empty() && done[i] == ids.len() {
                    ends.push((slot, i));
                }
            }
            let pack = Pack::from_lengths(parts.iter().map(|p| p.len()))?;
            let rows: Vec<usize> = ends.iter().map(|&(slot, _)| pack.offsets()[slot + 1] as usize - 1).collect();
            let found = self.run(&parts.concat(), &pack, &rows)?;
            for (row, &(_, i)) in found.chunks_exact(vocabulary).zip(&ends) {
                logits[i] = row.to_vec();
            }
        }
        Ok(logits)
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
        let (form, slots) = (weights.form(), self.pool.slots());
        let plan = device.plan(match shape.kind {
            Kind::Pack => graph(config, form, slots, shape.tokens, shape.rows)?,
            Kind::Step => step_graph(config, form, slots, shape.tokens)?,
            Kind::Choice { penalty } => choice_graph(config, form, slots, shape.tokens, penalty)?,
        })?;
        let mut mailbox = None;
        let mut io_bytes = 0;
        let mut logits = 0;
        let mut sources = Vec::new();
        for external in plan.graph().externals() {
            let source = if let Some(slice) = weights.slice(&external.name) {
                Source::Weights(slice.offset)
            } else if let Some(slice) = self.pool.slice(&external.name, false) {
                Source::State(slice.offset)
            } else if external.name == MAILBOX {
                mailbox = Some(device.alloc_mailbox(device.external_bytes(&plan, external.tensor))?);
                Source::Mailbox
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
        Ok(Compiled { plan, io, sources, mailbox, logits })
    }
}

/// Records a call that processes `tokens` tokens of `slots` sequences and gives the logits of `rows` of them.
///
/// # Errors
/// Sizes that the configuration's ops refuse.
pub fn graph(config: &ModelConfig, form: &Form, slots: usize, tokens: usize, rows: usize) -> Result<Graph, Error> {
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
pub fn step_graph(config: &ModelConfig, form: &Form, slots: usize, tokens: usize) -> Result<Graph, Error> {
    let mut recorder = Recorder::new(config, form, tokens, slots, States::InPlace);
    let logits = recorder.step_logits()?;
    recorder.graph.output(LOGITS, logits)?;
    Ok(recorder.graph)
}

/// Records a step of `tokens` of `slots` sequences on a GPU and the choice of the next token of each, which replaces
/// the one that was read.
///
/// # Errors
/// As [`step_graph`].
pub fn choice_graph(
    config: &ModelConfig,
    form: &Form,
    slots: usize,
    tokens: usize,
    penalty: bool,
) -> Result<Graph, Error> {
    let mut recorder = Recorder::new(config, form, tokens, slots, States::InPlace);
    recorder.step_choice(penalty)?;
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
