//! The gradient kernel: a task walks backwards through the segments of a group with a block of channels.
//!
//! For a chunk and a vector of channels it computes the states again from the one kept at the chunk's start, then walks
//! back. With g[t] = ∂L/∂Re h[t] + i ∂L/∂Im h[t], * for the conjugate and · for the sum over pairs:
//!
//! ```text
//! g[t]  = p[t] + 2 c* dy[t]                    p: what comes from the steps after t; the final state's gradient at the end
//! dx[t] = D dy[t] + Re(b̄* · g[t])             dw[t] = Re(u* · g[t])             w[t] = 2 Re(v · h[t−1])
//! p[t−1] = ā* g[t] + 2 v* dw[t]
//! dā = Σ_t h[t−1]* g[t]    db̄ = Σ_t x[t] g[t]    dc = Σ_t 2 dy[t] h[t]*    du = Σ_t w[t] g[t]    dv = Σ_t 2 dw[t] h[t−1]*
//! ```
//!
//! Sums over time are kept per group of segments and added up in a fixed order at the end.

use std::ops::Range;

use super::cpu::{BLOCK, Inputs, load_states, rank_one_sum, step, store_states};
use super::{A, B, C, D, Forward, Gradient, INITIAL_STATE, SEGMENTS, U, V, X, chunk_len, chunk_row};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots, vectors};
use crate::ops::vectors::{load, store};

/// Rows of the final sums that a task forms.
const SUM_ROWS: usize = 16;

/// Values of scratch memory of a task: for a block of channels the coefficients, the sums over time and p; for a vector
/// the states of a chunk and w of its steps.
fn scratch_len(forward: &Forward) -> usize {
    let (pairs, chunk) = (forward.pairs, chunk_len(forward.pairs));
    (2 * pairs * (2 * forward.coefficients() + 1) + 1) * BLOCK + ((chunk + 1) * 2 * pairs + chunk) * MAX_LANES
}

/// Rows of the sums over time of a group of segments: two for each pair and coefficient, one for D.
fn sum_rows(forward: &Forward) -> usize {
    2 * forward.pairs * forward.coefficients() + 1
}

pub(super) fn workspace(forward: &Forward, channels: usize, segments: usize, cpu: &Cpu) -> usize {
    let blocks = ChannelBlocks::new(channels, 1, BLOCK);
    let groups = SegmentGroups::new(segments, blocks.count()).count();
    Scratch::bytes(cpu.pool.threads(), scratch_len(forward)) + Scratch::bytes(groups * sum_rows(forward), channels)
}

pub(super) fn run(gradient: &Gradient, io: &Io<'_>, cpu: &Cpu) {
    let forward = &gradient.forward;
    let inputs = Inputs::new(io);
    let channels = inputs.x.cols;
    let segments = Segments::new(io.segments(SEGMENTS), inputs.x.rows);
    let blocks = ChannelBlocks::new(channels, 1, BLOCK);
    let groups = SegmentGroups::new(segments.len(), blocks.count());
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(cpu.pool.threads(), scratch_len(forward));
    let sums = memory.take(groups.count() * sum_rows(forward), channels);
    let task = Task {
        forward,
        inputs,
        segments,
        dy: io.optional_input(Gradient::DY),
        d_final: io.optional_input(Gradient::D_FINAL),
        chunk_states: io.input(Gradient::CHUNK_STATES),
        dx: io.optional_output(X),
        d_initial: io.optional_output(INITIAL_STATE),
    };
    run_with_slots(&cpu.pool, groups.count() * blocks.count(), |slot, i| {
        let (_, channels) = blocks.block(i % blocks.count());
        let group = i / blocks.count();
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        let sums = sums.rows(group * sum_rows(forward), sum_rows(forward));
        cpu.isa.run(Walk { task: &task, channels, segments: groups.segments(group), sums, scratch });
    });
    add_up(forward, io, sums, groups.count(), cpu);
    if let Some(dx) = task.dx {
        segments.clear_rest(dx);
    }
}

/// Adds up the sums over time of all groups and writes the gradients of the coefficients and of D.
fn add_up(forward: &Forward, io: &Io<'_>, sums: Mat, groups: usize, cpu: &Cpu) {
    let rows = sum_rows(forward);
    let mut outputs: Vec<Option<Mat>> = [A, B, C, U, V].map(|i| io.optional_output(i)).to_vec();
    outputs.truncate(forward.coefficients());
    outputs.push(io.optional_output(D));
    cpu.pool.chunks(rows, SUM_ROWS, |block| {
        for row in block {
            let Some(out) = outputs[row / (2 * forward.pairs)] else { continue };
            // SAFETY: this task alone writes the row; those that wrote the sums are done.
            unsafe {
                let out = out.row_mut::<f32>(row % (2 * forward.pairs));
                out.fill(0.0);
                for group in 0..groups {
                    out.iter_mut().zip(sums.row::<f32>(group * rows + row)).for_each(|(o, s)| *o += s);
                }
            }
        }
    });
}

struct Task<'a> {
    forward: &'a Forward,
    inputs: Inputs,
    segments: Segments<'a>,
    dy: Option<Mat>,
    d_final: Option<Mat>,
    chunk_states: Mat,
    dx: Option<Mat>,
    d_initial: Option<Mat>,
}

struct Walk<'a> {
    task: &'a Task<'a>,
    channels: Range<usize>,
    segments: Range<usize>,
    /// Where the group's sums over time go.
    sums: Mat,
    scratch: *mut f32,
}

/// What belongs to a vector of channels in the scratch memory, one vector a number.
#[derive(Clone, Copy)]
struct Places {
    coefficients: *mut f32,
    /// Sums over time in the order of the coefficients.
    sums: *mut f32,
    /// The sum for D.
    d: *mut f32,
    p: *mut f32,
    /// The states of a chunk, step after step.
    states: *mut f32,
    w: *mut f32,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.task.forward.rank_one { self.walk::<S, true>(s) } else { self.walk::<S, false>(s) }
    }
}

impl Walk<'_> {
    /// The first channel and the number of channels of vector `v`.
    #[inline(always)]
    fn vector<S: Simd>(&self, v: usize) -> (usize, usize) {
        let channel = self.channels.start + v * S::LANES;
        (channel, S::LANES.min(self.channels.end - channel))
    }

    #[inline(always)]
    fn places<S: Simd>(&self, v: usize) -> Places {
        let (pairs, chunk) = (self.task.forward.pairs, chunk_len(self.task.forward.pairs));
        let numbers = 2 * pairs * self.task.forward.coefficients();
        // As `scratch_len` has it: arrays of a whole block, each with its vectors one after another.
        let mut next = self.scratch;
        let mut take = |numbers: usize, whole_block: bool| {
            let at = next.wrapping_add(if whole_block { v * numbers * S::LANES } else { 0 });
            next = next.wrapping_add(numbers * if whole_block { BLOCK } else { MAX_LANES });
            at
        };
        Places {
            coefficients: take(numbers, true),
            sums: take(numbers, true),
            d: take(1, true),
            p: take(2 * pairs, true),
            states: take((chunk + 1) * 2 * pairs, false),
            w: take(chunk, false),
        }
    }

    #[inline(always)]
    fn walk<S: Simd, const RANK_ONE: bool>(&self, s: S) {
        let task = self.task;
        let (pairs, chunk) = (task.forward.pairs, chunk_len(task.forward.pairs));
        let numbers = 2 * pairs * task.forward.coefficients();
        let shape = (task.inputs.x.cols, pairs);
        let count = vectors::<S>(self.channels.len());
        for v in 0..count {
            let at = self.places::<S>(v);
            // SAFETY: the builder checked the shapes, and the scratch memory has room.
            unsafe {
                task.inputs.pack(s, self.vector::<S>(v), at.coefficients);
                for i in 0..numbers {
                    s.store(at.sums.add(i * S::LANES), s.zero());
                }
                s.store(at.d, s.zero());
            }
        }
        for segment in self.segments.clone().rev() {
            let rows = task.segments.rows(segment);
            for v in 0..count {
                // SAFETY: as above, and this task alone has these channels of this segment.
                unsafe {
                    load_states(s, task.d_final, segment, shape, self.vector::<S>(v), self.places::<S>(v).p);
                }
            }
            for i in (0..rows.len().div_ceil(chunk)).rev() {
                let first = rows.start + i * chunk;
                let steps = chunk.min(rows.end - first);
                let kept = chunk_row(pairs, segment, rows.start, i);
                for v in 0..count {
                    let (place, at) = (self.vector::<S>(v), self.places::<S>(v));
                    // SAFETY: rows and channels lie in the operands, and this task alone writes them.
                    unsafe {
                        load_states(s, Some(task.chunk_states), kept, shape, place, at.states);
                        self.forward::<S, RANK_ONE>(s, place, at, (first, steps));
                        self.back::<S, RANK_ONE>(s, place, at, (first, steps));
                    }
                }
            }
            for v in 0..count {
                // SAFETY: as above.
                unsafe { store_states(s, task.d_initial, segment, shape, self.vector::<S>(v), self.places::<S>(v).p) };
            }
        }
        for v in 0..count {
            let ((channel, lanes), at) = (self.vector::<S>(v), self.places::<S>(v));
            // SAFETY: no other task has these channels of this group's sums.
            unsafe {
                for i in 0..numbers {
                    // Pairs, coefficients and parts in the scratch memory; coefficients, pairs and parts in the sums.
                    let (pair, k, part) =
                        (i / 2 / task.forward.coefficients(), i / 2 % task.forward.coefficients(), i % 2);
                    let to = self.sums.at::<f32>((k * pairs + pair) * 2 + part, channel);
                    store(s, to, s.load(at.sums.add(i * S::LANES)), lanes);
                }
                store(s, self.sums.at::<f32>(numbers, channel), s.load(at.d), lanes);
            }
        }
    }

    /// The states of a chunk from its first one, and w of its steps.
    ///
    /// # Safety
    /// Rows `first .. first + steps` are rows of x; the scratch memory is this task's.
    #[inline(always)]
    unsafe fn forward<S: Simd, const RANK_ONE: bool>(
        &self,
        s: S,
        (channel, lanes): (usize, usize),
        at: Places,
        (first, steps): (usize, usize),
    ) {
        let pairs = self.task.forward.pairs;
        // SAFETY: as the caller says.
        unsafe {
            let mut w = s.zero();
            if RANK_ONE {
                w = rank_one_sum(s, at.coefficients, at.states, pairs);
            }
            for i in 0..steps {
                let x = load(s, self.task.inputs.x.at::<f32>(first + i, channel), lanes);
                let from = at.states.add(i * 2 * pairs * S::LANES);
                s.store(at.w.add(i * S::LANES), w);
                let to = from.add(2 * pairs * S::LANES);
                (_, w) = step::<S, RANK_ONE>(s, at.coefficients, pairs, (x, w), (from, to));
            }
        }
    }

    /// The way back through a chunk: p of its last step becomes that of the step before its first one.
    ///
    /// # Safety
    /// As [`Walk::forward`], which was called for this chunk; no other task writes these rows and channels of dx.
    #[inline(always)]
    unsafe fn back<S: Simd, const RANK_ONE: bool>(
        &self,
        s: S,
        (channel, lanes): (usize, usize),
        at: Places,
        (first, steps): (usize, usize),
    ) {
        let (task, pairs) = (self.task, self.task.forward.pairs);
        let each = if RANK_ONE { 10 } else { 6 };
        // SAFETY: as the caller says.
        unsafe {
            let skip = task.inputs.d.map_or(s.zero(), |d| load(s, d.at::<f32>(0, channel), lanes));
            for i in (0..steps).rev() {
                let x = load(s, task.inputs.x.at::<f32>(first + i, channel), lanes);
                let dy = task.dy.map_or(s.zero(), |dy| load(s, dy.at::<f32>(first + i, channel), lanes));
                let (dy2, w) = (s.add(dy, dy), s.load(at.w.add(i * S::LANES)));
                let before = at.states.add(i * 2 * pairs * S::LANES);
                let after = before.add(2 * pairs * S::LANES);
                s.store(at.d, s.fma(dy, x, s.load(at.d)));
                let (mut dx, mut dx_im, mut dw, mut dw_im) = (s.mul(skip, dy), s.zero(), s.zero(), s.zero());
                for m in 0..pairs {
                    let coefficient = |k: usize| s.load(at.coefficients.add((m * each + k) * S::LANES));
                    let add = |k: usize, a: S::V, b: S::V| {
                        let sum = at.sums.add((m * each + k) * S::LANES);
                        s.store(sum, s.fma(a, b, s.load(sum)));
                    };
                    let [re, im] = [2 * m, 2 * m + 1].map(|n| n * S::LANES);
                    let (p_re, p_im) = (s.load(at.p.add(re)), s.load(at.p.add(im)));
                    let g_re = s.fma(coefficient(4), dy2, p_re);
                    let g_im = s.fma(s.neg(coefficient(5)), dy2, p_im);
                    (dx, dx_im) = (s.fma(coefficient(2), g_re, dx), s.fma(coefficient(3), g_im, dx_im));
                    let (h_re, h_im) = (s.load(before.add(re)), s.load(before.add(im)));
                    let sum = at.sums.add(m * each * S::LANES);
                    let da_re = s.fma(g_im, h_im, s.fma(g_re, h_re, s.load(sum)));
                    let da_im = s.fma(s.neg(g_re), h_im, s.fma(g_im, h_re, s.load(sum.add(S::LANES))));
                    s.store(sum, da_re);
                    s.store(sum.add(S::LANES), da_im);
                    add(2, g_re, x);
                    add(3, g_im, x);
                    add(4, dy2, s.load(after.add(re)));
                    add(5, s.neg(dy2), s.load(after.add(im)));
                    let (a_re, a_im) = (coefficient(0), coefficient(1));
                    s.store(at.p.add(re), s.fma(a_im, g_im, s.mul(a_re, g_re)));
                    s.store(at.p.add(im), s.fma(s.neg(a_im), g_re, s.mul(a_re, g_im)));
                    if RANK_ONE {
                        (dw, dw_im) = (s.fma(coefficient(6), g_re, dw), s.fma(coefficient(7), g_im, dw_im));
                        add(6, g_re, w);
                        add(7, g_im, w);
                    }
                }
                if RANK_ONE {
                    let dw = s.add(dw, dw_im);
                    let dw2 = s.add(dw, dw);
                    for m in 0..pairs {
                        for part in 0..2 {
                            let (n, k) = ((2 * m + part) * S::LANES, (m * each + 8 + part) * S::LANES);
                            let factor = if part == 0 { dw2 } else { s.neg(dw2) };
                            s.store(at.p.add(n), s.fma(s.load(at.coefficients.add(k)), factor, s.load(at.p.add(n))));
                            let sum = at.sums.add(k);
                            s.store(sum, s.fma(factor, s.load(before.add(n)), s.load(sum)));
                        }
                    }
                }
                if let Some(out) = task.dx {
                    store(s, out.at::<f32>(first + i, channel), s.add(dx, dx_im), lanes);
                }
            }
        }
    }
}
