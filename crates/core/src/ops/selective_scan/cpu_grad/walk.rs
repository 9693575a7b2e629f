//! One task of the gradient: recomputing the states of a chunk, and walking back through it.

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use super::{BLOCK, STATES, Task, chunks_in};
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::graph::Mat;
use crate::ops::selective_scan::cpu::{Block, Coefficients, biased_dt, decay_steps, per_channel, zoh_factor};
use crate::ops::selective_scan::decay::{exp2_and_m1, zoh_slope};
use crate::ops::selective_scan::{Discretisation, chunk_len, chunk_row};
use crate::ops::tasks::vectors;
use crate::ops::vectors::{load, store};

/// Fields kept per step for each vector of a block.
pub(super) const STEP: usize = 7;
/// Fields kept per step and state for one vector of a block at a time.
pub(super) const STATE_STEP: usize = 5;

/// One task: a block of channels through the chunks of a slab that belong to a group of segments.
pub(super) struct Walk<'a> {
    pub task: &'a Task<'a>,
    pub block: Block,
    pub segment_group: usize,
    pub slab: Range<usize>,
    /// Whether this is the first slab that is handled, the last one in time.
    pub is_first: bool,
    /// Where this block's dB and dC go, N columns.
    pub db: Option<Mat>,
    pub dc: Option<Mat>,
    pub scratch: *mut f32,
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

/// What is kept of the steps of a chunk in scratch memory: `fields` vectors per step, side by side.
#[derive(Clone, Copy)]
struct Steps {
    start: *mut f32,
    fields: usize,
}

impl Steps {
    /// Field `field` of the first step.
    #[inline(always)]
    fn field<S: Simd>(self, field: usize) -> *mut f32 {
        self.start.wrapping_add(field * S::LANES)
    }

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
            if !ZOH {
                let (mut largest, mut rest) = (s.zero(), s.zero());
                for t in 0..chunk.steps {
                    let delta = of.get(s, t, DELTA);
                    largest = s.max(s.abs(delta), largest);
                    rest = s.fma(delta, s.zero(), rest);
                }
                let largest = s.add(largest, rest);
                for i in 0..COUNT {
                    let a = s.load(a.scaled.add(i * S::LANES));
                    let delta = (of.field::<S>(DELTA).cast_const(), of.fields);
                    let to = (states.field::<S>(i * states.fields + DECAY), COUNT * states.fields);
                    decay_steps(s, a, largest, chunk.steps, delta, to);
                }
            }
            for t in 0..chunk.steps {
                let (delta, x) = (of.get(s, t, DELTA), of.get(s, t, INPUT));
                let input = if ZOH { x } else { s.mul(delta, x) };
                let b = task.inputs.b.at::<f32>(chunk.first + t, self.block.column + n);
                for (i, h) in h.iter_mut().enumerate() {
                    let at = t * COUNT + i;
                    states.set(s, at, H, *h);
                    let b = s.splat(*b.add(i));
                    if ZOH {
                        let (decay, m1) = exp2_and_m1(s, s.mul(delta, s.load(a.scaled.add(i * S::LANES))));
                        let (inverse, at_limit) = (a.inverse.add(i * S::LANES), a.at_limit.add(i * S::LANES));
                        let factor = zoh_factor(s, m1, delta, s.load(inverse), s.load(at_limit));
                        states.set(s, at, DECAY, decay);
                        states.set(s, at, M1, m1);
                        *h = s.fma(decay, *h, s.mul(s.mul(factor, input), b));
                    } else {
                        *h = s.fma(states.get(s, at, DECAY), *h, s.mul(input, b));
                    }
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
