//! The gradient kernel: a task walks backwards through the segments of a group with a block of channels.
//!
//! Per chunk, and for a few states at a time, it recomputes the states from the one kept at the chunk's start, keeps
//! them and the decays in scratch memory, then walks back with g = ∂L/∂h:
//!
//! ```text
//! g[t] = C[t] dy[t] + exp(Δ[t+1] A) g[t+1]                   dy: of y before the gate
//! dx[t] = D dy[t] + Σ_n g B̄                 dB[t] = Σ_d g (B̄/B) x            dC[t] = Σ_d h[t] dy[t]
//! dΔ[t] = Σ_n g (A exp(ΔA) h[t−1] + x ∂B̄/∂Δ)    dA = Σ_t g (Δ exp(ΔA) h[t−1] + x ∂B̄/∂A)
//! ```
//!
//! with ∂B̄/∂Δ = B and ∂B̄/∂A = 0 (Euler), exp(ΔA) B and [`zoh_slope`] · B (zero-order hold).
//! Sums over channels (dB, dC) are kept per block of channels, those over time (dA, dD, the bias) per group of
//! segments; both are added up in a fixed order at the end. Where the former would take more than T·D values, the rows
//! are handled in slabs, last one first.

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use super::cpu::{Block, Coefficients, Inputs, biased_dt, per_channel, zoh_factor};
use super::decay::{exp2, exp2_and_m1, zoh_slope};
use super::{A, B, C, D, DT, DT_BIAS, Discretisation, Forward, Gradient, SEGMENTS, X, Z, chunk_len, chunk_row};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots, vectors};
use crate::ops::vectors::{load, store};

/// Channels of a task, whole vectors at every level.
const BLOCK: usize = 64;
/// States that walk through a chunk together.
const STATES: usize = 4;
/// States from which on dB and dC of all blocks would take more than T·D values.
const STATES_A_SLAB: usize = BLOCK / 2;
/// Fields kept per step for each vector of a block.
const STEP: usize = 7;
/// Fields kept per step and state for one vector of a block at a time.
const STATE_STEP: usize = 5;
/// Rows and channels of a task of the final sums.
const SUM_ROWS: usize = 64;
const SUM_CHANNELS: usize = 64;

/// How the work and the scratch memory are cut.
pub(super) struct Layout {
    blocks: ChannelBlocks,
    segment_groups: SegmentGroups,
    tokens: usize,
    channels: usize,
    segments: usize,
    d_state: usize,
    slots: usize,
    slot_len: usize,
    /// Rows of a slab, whole chunks.
    slab: usize,
}

impl Layout {
    pub fn new(forward: &Forward, tokens: usize, channels: usize, segments: usize, cpu: &Cpu) -> Layout {
        let d_state = forward.shape.d_state;
        let chunk = chunk_len(d_state);
        let blocks = ChannelBlocks::new(channels, forward.shape.groups, BLOCK);
        let slabs = if blocks.per_group() > 1 { d_state.div_ceil(STATES_A_SLAB) } else { 1 };
        let slot_len = Coefficients::values_a_channel(forward) * BLOCK
            + STEP * chunk * BLOCK
            + STATE_STEP * (chunk + 1) * STATES * MAX_LANES;
        Layout {
            blocks,
            segment_groups: SegmentGroups::new(segments, blocks.count()),
            tokens,
            channels,
            segments,
            d_state,
            slots: cpu.pool.threads(),
            slot_len,
            slab: tokens.div_ceil(slabs).next_multiple_of(chunk).max(chunk),
        }
    }

    /// Rows and columns of the sums over channels: one matrix of rows per block. A chunk belongs to the slab it starts
    /// in, so the last one may reach beyond it. With one block a group, they are the outputs themselves.
    fn row_sums(&self) -> (usize, usize) {
        match self.blocks.per_group() {
            1 => (0, 0),
            _ => (self.blocks.count() * self.slab_rows(), 2 * self.d_state),
        }
    }

    fn slab_rows(&self) -> usize {
        (self.slab + chunk_len(self.d_state)).min(self.tokens)
    }

    /// Values of the sums over time of a group of segments: dA by states, dD, the bias.
    fn time_sums(&self) -> usize {
        (self.d_state + 2) * self.channels
    }

    pub fn bytes(&self) -> usize {
        let (rows, cols) = self.row_sums();
        Scratch::bytes(self.slots, self.slot_len)
            + Scratch::bytes(self.segment_groups.count(), self.time_sums())
            + Scratch::bytes(rows, cols)
            + Scratch::bytes(self.segments, self.d_state * self.channels)
    }
}

pub(super) fn run(gradient: &Gradient, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let (tokens, channels) = (inputs.x.rows, inputs.x.cols);
    let segments = Segments::new(io.segments(SEGMENTS), tokens);
    let layout = Layout::new(&gradient.forward, tokens, channels, segments.len(), cpu);
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(layout.slots, layout.slot_len);
    let time_sums = memory.take(layout.segment_groups.count(), layout.time_sums());
    let (rows, cols) = layout.row_sums();
    let task = Task {
        forward: &gradient.forward,
        layout: &layout,
        inputs,
        segments,
        dy: io.optional_input(Gradient::DY),
        d_final: io.optional_input(Gradient::D_FINAL),
        chunk_states: io.input(Gradient::CHUNK_STATES),
        dx: io.optional_output(X),
        d_dt: io.optional_output(DT),
        dz: io.optional_output(Z),
        // One task at a time has a block of them, so what it leaves there is what it finds for the slab before.
        time_sums,
        row_sums: memory.take(rows, cols),
        db: io.optional_output(B),
        dc: io.optional_output(C),
        // Between chunks g rests where the initial states' gradient goes; in scratch memory, if nobody wants that.
        g: io
            .optional_output(Forward::INITIAL_STATE)
            .unwrap_or_else(|| memory.take(segments.len(), layout.d_state * channels)),
    };
    let blocks = layout.blocks.count();
    for slab in (0..tokens.div_ceil(layout.slab).max(1)).rev() {
        let rows = slab * layout.slab..(slab + 1) * layout.slab;
        run_with_slots(&cpu.pool, layout.segment_groups.count() * blocks, |slot, i| {
            // SAFETY: no other task uses the slot's row meanwhile.
            let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
            let is_first = rows.end >= tokens;
            cpu.isa.run(task.walk(i % blocks, i / blocks, rows.clone(), is_first, scratch));
        });
        if layout.blocks.per_group() > 1 {
            task.add_up_rows(rows, cpu);
        }
    }
    add_up_time(io, &layout, time_sums, cpu);
    for rows in [task.dx, task.d_dt, task.dz, task.db, task.dc].into_iter().flatten() {
        segments.clear_rest(rows);
    }
}

struct Task<'a> {
    forward: &'a Forward,
    layout: &'a Layout,
    inputs: Inputs,
    segments: Segments<'a>,
    dy: Option<Mat>,
    d_final: Option<Mat>,
    chunk_states: Mat,
    dx: Option<Mat>,
    d_dt: Option<Mat>,
    dz: Option<Mat>,
    time_sums: Mat,
    row_sums: Mat,
    db: Option<Mat>,
    dc: Option<Mat>,
    g: Mat,
}

impl<'a> Task<'a> {
    fn walk(
        &'a self,
        block: usize,
        segment_group: usize,
        slab: Range<usize>,
        is_first: bool,
        scratch: *mut f32,
    ) -> Walk<'a> {
        let (group, channels) = self.layout.blocks.block(block);
        let column = group * self.layout.d_state;
        let (db, dc) = if self.layout.blocks.per_group() == 1 {
            let columns = |m: Option<Mat>| m.map(|m| m.columns(column, self.layout.d_state));
            (columns(self.db), columns(self.dc))
        } else {
            let sums = self.row_sums.rows(block * self.layout.slab_rows(), self.layout.slab_rows());
            let columns = |m: Option<Mat>, i| m.map(|_| sums.columns(i * self.layout.d_state, self.layout.d_state));
            (columns(self.db, 0), columns(self.dc, 1))
        };
        Walk {
            task: self,
            block: Block { first: channels.start, width: channels.len(), column },
            segment_group,
            slab,
            is_first,
            db,
            dc,
            scratch,
        }
    }

    /// The rows that the chunks which start in the slab cover: they follow one another, since chunks fill segments.
    fn covered(&self, slab: Range<usize>) -> Range<usize> {
        let mut covered: Option<Range<usize>> = None;
        for segment in 0..self.segments.len() {
            let rows = self.segments.rows(segment);
            let chunk = chunk_len(self.layout.d_state);
            let chunks = chunks_in(&rows, &slab, chunk);
            if !chunks.is_empty() {
                let start = covered.map_or(rows.start + chunks.start * chunk, |c| c.start);
                covered = Some(start..(rows.start + chunks.end * chunk).min(rows.end));
            }
        }
        covered.unwrap_or_default()
    }

    /// Adds up dB and dC over the blocks of each group.
    fn add_up_rows(&self, slab: Range<usize>, cpu: &Cpu) {
        let covered = self.covered(slab.clone());
        let (d_state, per_group) = (self.layout.d_state, self.layout.blocks.per_group());
        cpu.pool.chunks(covered.len(), SUM_ROWS, |rows| {
            for row in rows.start + covered.start..rows.end + covered.start {
                for (i, out) in [self.db, self.dc].into_iter().enumerate() {
                    let Some(out) = out else { continue };
                    for group in 0..self.forward.shape.groups {
                        // SAFETY: this task alone writes the row; those that wrote the sums are done.
                        unsafe {
                            let out = &mut out.row_mut::<f32>(row)[group * d_state..][..d_state];
                            for block in group * per_group..(group + 1) * per_group {
                                let row = block * self.layout.slab_rows() + row - slab.start;
                                let part = &self.row_sums.row::<f32>(row)[i * d_state..][..d_state];
                                if block == group * per_group {
                                    out.copy_from_slice(part);
                                } else {
                                    out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
                                }
                            }
                        }
                    }
                }
            }
        });
    }
}

/// The chunks of a segment with these rows that start in the slab.
fn chunks_in(rows: &Range<usize>, slab: &Range<usize>, chunk: usize) -> Range<usize> {
    let chunks_before = |row: usize| row.clamp(rows.start, rows.end).saturating_sub(rows.start).div_ceil(chunk);
    chunks_before(slab.start)..chunks_before(slab.end)
}

/// Adds up the sums over time of all groups of segments and writes dA, dD and the bias's gradient.
fn add_up_time(io: &Io<'_>, layout: &Layout, sums: Mat, cpu: &Cpu) {
    let (da, dd, d_bias) = (io.optional_output(A), io.optional_output(D), io.optional_output(DT_BIAS));
    let (channels, d_state) = (layout.channels, layout.d_state);
    let total = |col: usize| {
        // SAFETY: the tasks that wrote the sums are done.
        (0..sums.rows).fold(0.0f32, |sum, group| sum + unsafe { *sums.at::<f32>(group, col) })
    };
    cpu.pool.chunks(channels, SUM_CHANNELS, |block| {
        for channel in block {
            // SAFETY: this task alone writes what belongs to its channels.
            unsafe {
                if let Some(da) = da {
                    for n in 0..d_state {
                        *da.at::<f32>(channel, n) = total(n * channels + channel);
                    }
                }
                for (i, out) in [dd, d_bias].into_iter().enumerate() {
                    if let Some(out) = out {
                        *out.at::<f32>(0, channel) = total((d_state + i) * channels + channel);
                    }
                }
            }
        }
    });
}

/// One task: a block of channels through the chunks of a slab that belong to a group of segments.
struct Walk<'a> {
    task: &'a Task<'a>,
    block: Block,
    segment_group: usize,
    slab: Range<usize>,
    /// Whether this is the first slab that is handled, the last one in time.
    is_first: bool,
    /// Where this block's dB and dC go, N columns.
    db: Option<Mat>,
    dc: Option<Mat>,
    scratch: *mut f32,
}

/// Steps `first .. first + steps` of a segment.
#[derive(Clone, Copy)]
struct Chunk {
    segment: usize,
    first: usize,
    steps: usize,
    /// The row of the state kept at the start.
    kept: usize,
    is_last: bool,
}

/// What is kept of the steps of a chunk in scratch memory: `fields` vectors per step, side by side, since arrays of
/// their own would compete for the same lines of the first-level cache.
#[derive(Clone, Copy)]
struct Steps {
    start: *mut f32,
    fields: usize,
}

impl Steps {
    /// # Safety
    /// The step's memory is this task's, and the field was written before.
    #[inline(always)]
    unsafe fn get<S: Simd>(self, s: S, step: usize, field: usize) -> S::V {
        // SAFETY: as the caller says.
        unsafe { s.load(self.start.add((step * self.fields + field) * S::LANES)) }
    }

    /// # Safety
    /// The step's memory is this task's.
    #[inline(always)]
    unsafe fn set<S: Simd>(self, s: S, step: usize, field: usize, value: S::V) {
        // SAFETY: as the caller says.
        unsafe { s.store(self.start.add((step * self.fields + field) * S::LANES), value) }
    }
}

// Fields of a step, for each vector of a block.
const DELTA: usize = 0;
const INPUT: usize = 1;
/// The gradient of y before the gate.
const DY: usize = 2;
/// y before the gate.
const Y: usize = 3;
/// Σ_n g B (Euler), Σ_n g B̄ (zero-order hold).
const INPUT_SUM: usize = 4;
/// dΔ · log₂ e, for Euler without x · Σ_n g B.
const DELTA_SUM: usize = 5;
/// dz / y before the gate.
const GATE: usize = 6;

// Fields of a step and state, for one vector of a block at a time.
/// The state before the step.
const H: usize = 0;
const DECAY: usize = 1;
/// dB and dC of the vectors so far, one lane per channel.
const DB: usize = 2;
const DC: usize = 3;
/// exp(ΔA) − 1, for the zero-order hold only.
const M1: usize = 4;

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.task.forward.discretisation {
            Discretisation::Euler => self.walk::<S, false>(s),
            Discretisation::Zoh => self.walk::<S, true>(s),
        }
    }
}

impl Walk<'_> {
    #[inline(always)]
    fn walk<S: Simd, const ZOH: bool>(&self, s: S) {
        let task = self.task;
        let chunk = chunk_len(task.layout.d_state);
        // SAFETY: the builder checked the shapes; the scratch memory holds `slot_len` values; this task alone has
        // these channels of the segments of its group.
        unsafe {
            Coefficients::prepare::<S, ZOH>(s, self.scratch, task.inputs.a, self.block);
            if self.is_first {
                self.clear_time_sums();
            }
            for segment in task.layout.segment_groups.segments(self.segment_group).rev() {
                let rows = task.segments.rows(segment);
                if rows.is_empty() && self.is_first {
                    self.pass_on(s, segment);
                }
                for i in chunks_in(&rows, &self.slab, chunk).rev() {
                    let first = rows.start + i * chunk;
                    let steps = chunk.min(rows.end - first);
                    let kept = chunk_row(task.layout.d_state, segment, rows.start, i);
                    self.chunk::<S, ZOH>(s, Chunk { segment, first, steps, kept, is_last: first + steps == rows.end });
                }
            }
        }
    }

    /// # Safety
    /// This task alone has these channels of the group's sums.
    #[inline(always)]
    unsafe fn clear_time_sums(&self) {
        for i in 0..self.task.layout.d_state + 2 {
            let col = i * self.task.layout.channels + self.block.first;
            // SAFETY: the block's channels lie inside each of the rows' parts.
            unsafe {
                std::slice::from_raw_parts_mut(self.task.time_sums.at(self.segment_group, col), self.block.width)
                    .fill(0.0f32);
            }
        }
    }

    /// The gradient of an empty segment's initial state is that of its final one.
    ///
    /// # Safety
    /// This task alone has these channels of the segment's states.
    #[inline(always)]
    unsafe fn pass_on<S: Simd>(&self, s: S, segment: usize) {
        for v in 0..vectors::<S>(self.block.width) {
            let (channel, lanes) = self.block.vector::<S>(v);
            for n in 0..self.task.layout.d_state {
                let col = n * self.task.layout.channels + channel;
                // SAFETY: the builder checked the shapes of the states.
                unsafe {
                    let g = self.task.d_final.map_or(s.zero(), |m| load(s, m.at::<f32>(segment, col), lanes));
                    store(s, self.task.g.at::<f32>(segment, col), g, lanes);
                }
            }
        }
    }

    /// The steps of vector `v`.
    #[inline(always)]
    fn steps<S: Simd>(&self, v: usize) -> Steps {
        let start = Coefficients::values_a_channel(self.task.forward) * BLOCK;
        let before = v * chunk_len(self.task.layout.d_state) * STEP * S::LANES;
        // SAFETY: `slot_len` has room for the steps of all vectors of a block.
        Steps { start: unsafe { self.scratch.add(start + before) }, fields: STEP }
    }

    /// The steps of a few states: those of a step one after another.
    #[inline(always)]
    fn state_steps<const ZOH: bool>(&self) -> Steps {
        let chunk = chunk_len(self.task.layout.d_state);
        let start = (Coefficients::values_a_channel(self.task.forward) + STEP * chunk) * BLOCK;
        // SAFETY: `slot_len` has room for these after the steps of the channels.
        Steps { start: unsafe { self.scratch.add(start) }, fields: if ZOH { STATE_STEP } else { STATE_STEP - 1 } }
    }

    /// # Safety
    /// The chunk lies in its segment; this task alone has these channels of it.
    #[inline(always)]
    unsafe fn chunk<S: Simd, const ZOH: bool>(&self, s: S, chunk: Chunk) {
        let d_state = self.task.layout.d_state;
        // SAFETY: as the caller says.
        unsafe {
            for v in 0..vectors::<S>(self.block.width) {
                self.load(s, chunk, v);
            }
            let whole = d_state - d_state % STATES;
            for n in (0..whole).step_by(STATES) {
                self.states::<S, ZOH, STATES>(s, chunk, n);
            }
            for n in whole..d_state {
                self.states::<S, ZOH, 1>(s, chunk, n);
            }
            for v in 0..vectors::<S>(self.block.width) {
                self.finish::<S, ZOH>(s, chunk, v);
            }
        }
    }

    /// Computes Δ and the gradient of y before the gate, and clears the sums.
    ///
    /// # Safety
    /// As [`Walk::chunk`].
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, chunk: Chunk, v: usize) {
        let task = self.task;
        let (channel, lanes) = self.block.vector::<S>(v);
        let to = self.steps::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let skip = per_channel(s, task.inputs.d, channel, lanes, 0.0);
            for t in 0..chunk.steps {
                let row = chunk.first + t;
                let dt = biased_dt(s, &task.inputs, row, channel, lanes);
                let x = load(s, task.inputs.x.at::<f32>(row, channel), lanes);
                let mut dy = task.dy.map_or(s.zero(), |m| load(s, m.at::<f32>(row, channel), lanes));
                if let Some(z) = task.inputs.z {
                    let z = load(s, z.at::<f32>(row, channel), lanes);
                    let (p, q) = math::sigmoid_pair(s, z);
                    to.set(s, t, GATE, s.mul(dy, s.mul(p, s.fma(z, q, s.splat(1.0)))));
                    dy = s.mul(dy, s.mul(z, p));
                }
                to.set(s, t, DELTA, if task.forward.softplus { math::softplus(s, dt) } else { dt });
                to.set(s, t, INPUT, x);
                to.set(s, t, DY, dy);
                to.set(s, t, Y, s.mul(skip, x));
                to.set(s, t, INPUT_SUM, s.zero());
                to.set(s, t, DELTA_SUM, s.zero());
            }
        }
    }

    /// Takes `COUNT` states from `n` on through the chunk and back, for all vectors of the block.
    ///
    /// # Safety
    /// As [`Walk::chunk`], after [`Walk::load`].
    #[inline(always)]
    unsafe fn states<S: Simd, const ZOH: bool, const COUNT: usize>(&self, s: S, chunk: Chunk, n: usize) {
        // SAFETY: as the caller says; the arrays have room for all steps and states.
        unsafe {
            let states = self.state_steps::<ZOH>();
            for i in 0..chunk.steps * COUNT {
                states.set(s, i, DB, s.zero());
                states.set(s, i, DC, s.zero());
            }
            for v in 0..vectors::<S>(self.block.width) {
                self.forth::<S, ZOH, COUNT>(s, chunk, n, v);
                self.back::<S, ZOH, COUNT>(s, chunk, n, v);
            }
            for (field, out) in [(DB, self.db), (DC, self.dc)] {
                if let Some(out) = out {
                    let row = if self.task.layout.blocks.per_group() == 1 { 0 } else { self.slab.start };
                    add_lanes::<S, COUNT>(s, states, field, chunk.steps, out, chunk.first - row, n);
                }
            }
        }
    }

    /// Computes the states of a vector again.
    ///
    /// # Safety
    /// As [`Walk::states`].
    #[inline(always)]
    unsafe fn forth<S: Simd, const ZOH: bool, const COUNT: usize>(&self, s: S, chunk: Chunk, n: usize, v: usize) {
        let task = self.task;
        let (channel, lanes) = self.block.vector::<S>(v);
        let (of, states) = (self.steps::<S>(v), self.state_steps::<ZOH>());
        // SAFETY: as the caller says.
        unsafe {
            let a = Coefficients::of::<S, ZOH>(self.scratch, v, task.layout.d_state).at_state::<S>(n);
            let mut h = [s.zero(); COUNT];
            for (i, h) in h.iter_mut().enumerate() {
                let col = (n + i) * task.layout.channels + channel;
                *h = load(s, task.chunk_states.at::<f32>(chunk.kept, col), lanes);
            }
            for t in 0..chunk.steps {
                let (delta, x) = (of.get(s, t, DELTA), of.get(s, t, INPUT));
                let input = if ZOH { x } else { s.mul(delta, x) };
                let b = task.inputs.b.at::<f32>(chunk.first + t, self.block.column + n);
                for (i, h) in h.iter_mut().enumerate() {
                    let at = t * COUNT + i;
                    states.set(s, at, H, *h);
                    let b = s.splat(*b.add(i));
                    let exponent = s.mul(delta, s.load(a.scaled.add(i * S::LANES)));
                    let decay = if ZOH {
                        let (decay, m1) = exp2_and_m1(s, exponent);
                        let (inverse, at_limit) = (a.inverse.add(i * S::LANES), a.at_limit.add(i * S::LANES));
                        let factor = zoh_factor(s, m1, delta, s.load(inverse), s.load(at_limit));
                        states.set(s, at, M1, m1);
                        *h = s.fma(decay, *h, s.mul(s.mul(factor, input), b));
                        decay
                    } else {
                        let decay = exp2(s, exponent);
                        *h = s.fma(decay, *h, s.mul(input, b));
                        decay
                    };
                    states.set(s, at, DECAY, decay);
                }
            }
            for (i, &h) in h.iter().enumerate() {
                states.set(s, chunk.steps * COUNT + i, H, h);
            }
        }
    }

    /// Walks back through the chunk with the states' gradients.
    ///
    /// # Safety
    /// As [`Walk::states`], after [`Walk::forth`].
    #[inline(always)]
    unsafe fn back<S: Simd, const ZOH: bool, const COUNT: usize>(&self, s: S, chunk: Chunk, n: usize, v: usize) {
        let task = self.task;
        let (channel, lanes) = self.block.vector::<S>(v);
        let (of, states) = (self.steps::<S>(v), self.state_steps::<ZOH>());
        let state_col = |i: usize| (n + i) * task.layout.channels + channel;
        // SAFETY: as the caller says.
        unsafe {
            let a = Coefficients::of::<S, ZOH>(self.scratch, v, task.layout.d_state).at_state::<S>(n);
            let later = if chunk.is_last { task.d_final } else { Some(task.g) };
            let (mut g, mut da) = ([s.zero(); COUNT], [s.zero(); COUNT]);
            for i in 0..COUNT {
                if let Some(later) = later {
                    g[i] = load(s, later.at::<f32>(chunk.segment, state_col(i)), lanes);
                }
                da[i] = load(s, task.time_sums.at::<f32>(self.segment_group, state_col(i)), lanes);
            }
            for t in (0..chunk.steps).rev() {
                let (delta, x, dy) = (of.get(s, t, DELTA), of.get(s, t, INPUT), of.get(s, t, DY));
                let mut y = of.get(s, t, Y);
                let (mut input_sum, mut delta_sum) = (of.get(s, t, INPUT_SUM), of.get(s, t, DELTA_SUM));
                let input = s.mul(delta, x);
                let b = task.inputs.b.at::<f32>(chunk.first + t, self.block.column + n);
                let c = task.inputs.c.at::<f32>(chunk.first + t, self.block.column + n);
                for i in 0..COUNT {
                    let at = t * COUNT + i;
                    let (before, after) = (states.get(s, at, H), states.get(s, at + COUNT, H));
                    let decay = states.get(s, at, DECAY);
                    let (db, dc) = (states.get(s, at, DB), states.get(s, at, DC));
                    let (b, c) = (s.splat(*b.add(i)), s.splat(*c.add(i)));
                    let a_scaled = s.load(a.scaled.add(i * S::LANES));
                    states.set(s, at, DC, s.fma(after, dy, dc));
                    y = s.fma(c, after, y);
                    let here = s.fma(dy, c, g[i]);
                    g[i] = s.mul(here, decay);
                    if ZOH {
                        let m1 = states.get(s, at, M1);
                        let (inverse, at_limit) = (a.inverse.add(i * S::LANES), a.at_limit.add(i * S::LANES));
                        let inverse = s.load(inverse);
                        let factor = zoh_factor(s, m1, delta, inverse, s.load(at_limit));
                        states.set(s, at, DB, s.fma(s.mul(here, factor), x, db));
                        let here_b = s.mul(here, b);
                        input_sum = s.fma(here_b, factor, input_sum);
                        let xb = s.mul(s.mul(x, s.splat(LOG2_E)), b);
                        delta_sum = s.fma(g[i], s.fma(before, a_scaled, xb), delta_sum);
                        let u = s.mul(s.mul(delta, a_scaled), s.splat(LN_2));
                        let slope = zoh_slope(s, delta, u, decay, m1, inverse);
                        da[i] = s.fma(s.mul(here_b, x), slope, da[i]);
                        da[i] = s.fma(s.mul(g[i], before), delta, da[i]);
                    } else {
                        states.set(s, at, DB, s.fma(here, input, db));
                        input_sum = s.fma(here, b, input_sum);
                        let through = s.mul(g[i], before);
                        delta_sum = s.fma(through, a_scaled, delta_sum);
                        da[i] = s.fma(through, delta, da[i]);
                    }
                }
                of.set(s, t, Y, y);
                of.set(s, t, INPUT_SUM, input_sum);
                of.set(s, t, DELTA_SUM, delta_sum);
            }
            for i in 0..COUNT {
                store(s, task.g.at::<f32>(chunk.segment, state_col(i)), g[i], lanes);
                store(s, task.time_sums.at::<f32>(self.segment_group, state_col(i)), da[i], lanes);
            }
        }
    }

    /// Writes dx, d dt and dz, and adds to the sums of dD and the bias.
    ///
    /// # Safety
    /// As [`Walk::chunk`], after all states have been through it.
    #[inline(always)]
    unsafe fn finish<S: Simd, const ZOH: bool>(&self, s: S, chunk: Chunk, v: usize) {
        let task = self.task;
        let (channel, lanes) = self.block.vector::<S>(v);
        let of = self.steps::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let skip = per_channel(s, task.inputs.d, channel, lanes, 0.0);
            let sum = |i: usize| {
                task.time_sums.at::<f32>(self.segment_group, (task.layout.d_state + i) * task.layout.channels + channel)
            };
            let (mut dd, mut d_bias) = (load(s, sum(0), lanes), load(s, sum(1), lanes));
            for t in 0..chunk.steps {
                let row = chunk.first + t;
                let (delta, x, dy) = (of.get(s, t, DELTA), of.get(s, t, INPUT), of.get(s, t, DY));
                let input_sum = of.get(s, t, INPUT_SUM);
                let through_states = if ZOH { input_sum } else { s.mul(delta, input_sum) };
                let dx = s.fma(skip, dy, through_states);
                let mut d_dt = s.mul(s.splat(LN_2), of.get(s, t, DELTA_SUM));
                if !ZOH {
                    d_dt = s.fma(x, input_sum, d_dt);
                }
                if task.forward.softplus {
                    // The slope of softplus is the logistic function, 1 − e^−Δ.
                    d_dt = s.mul(d_dt, s.neg(math::exp_m1(s, s.neg(delta))));
                }
                dd = s.fma(x, dy, dd);
                d_bias = s.add(d_dt, d_bias);
                if let Some(out) = task.dx {
                    store(s, out.at::<f32>(row, channel), dx, lanes);
                }
                if let Some(out) = task.d_dt {
                    store(s, out.at::<f32>(row, channel), d_dt, lanes);
                }
                if let Some(out) = task.dz {
                    let dz = s.mul(of.get(s, t, Y), of.get(s, t, GATE));
                    store(s, out.at::<f32>(row, channel), dz, lanes);
                }
            }
            store(s, sum(0), dd, lanes);
            store(s, sum(1), d_bias, lanes);
        }
    }
}

/// Adds up the lanes of a field of each step and state and writes the sums to rows `row ..`, columns `col ..`.
///
/// # Safety
/// There is room for whole groups of `LANES` steps; no other task writes these elements of `out`.
#[inline(always)]
unsafe fn add_lanes<S: Simd, const COUNT: usize>(
    s: S,
    states: Steps,
    field: usize,
    steps: usize,
    out: Mat,
    row: usize,
    col: usize,
) {
    for first in (0..steps * COUNT).step_by(S::LANES) {
        let mut rows = [s.zero(); MAX_LANES];
        for (i, row) in rows.iter_mut().enumerate().take(S::LANES) {
            // SAFETY: the caller vouches for whole groups.
            *row = unsafe { states.get(s, first + i, field) };
        }
        let columns = s.transpose(rows);
        let mut total = columns[0];
        for column in &columns[1..S::LANES] {
            total = s.add(total, *column);
        }
        let mut totals = [0.0f32; MAX_LANES];
        // SAFETY: `totals` holds a vector; rows and columns lie in `out`.
        unsafe {
            s.store(totals.as_mut_ptr(), total);
            for (i, total) in totals.iter().enumerate().take(S::LANES.min(steps * COUNT - first)) {
                *out.at::<f32>(row + (first + i) / COUNT, col + (first + i) % COUNT) = *total;
            }
        }
    }
}
