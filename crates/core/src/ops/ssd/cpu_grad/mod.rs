//! The gradient on the CPU.
//!
//! First the states before each block are computed again, one task for some heads of a segment. Then the blocks are
//! walked backwards, some segments at a time: for the last, last but one, … block of each, tasks for sets of heads
//! leave their parts of dB and dC, which are then added up in the order of the sets. With dS the gradient of the state
//! after a block, u = Δ x, M and G as in the forward pass, and dy before the gate:
//!
//! du_j = exp(cum_last − cum_j) dS B_j + Σ_{t ≥ j} M_tj dy_t,  dx_j = Δ_j du_j + D dy_j
//! dG_tj = exp(cum_t − cum_j) Δ_j (dy_t · x_j)
//! dC_t = exp(cum_t) Sᵀ dy_t + Σ_{j ≤ t} dG_tj B_j,  dB_j = exp(cum_last − cum_j) dSᵀ u_j + Σ_{t ≥ j} dG_tj C_t
//! dS ← exp(cum_last) dS + Σ_t exp(cum_t) dy_t ⊗ C_t
//!
//! The gradient of log a_t is the sum of all terms that decay through row t: pairs (j < t ≤ s), the old state seen by
//! rows s ≥ t, rows j < t in the new state, the old state in the new one. It is added up as such, not as a difference
//! of sums over rows and columns, which would cancel.
//!
//! Memory: one state a block of all heads (for blocks of 128 rows, P · N · H / 128 values a token), and parts of dB and
//! dC of one block for a bounded number of sets of heads.

mod block;
mod steps;

use super::product::{Band, Init, Product};
use super::steps::{CopyRows, Decay, decays};
use super::workspace::{Bump, Slots};
use super::{Dims, GRADIENT_BLOCK, inputs};
use crate::cpu::simd::MAX_LANES;
use crate::cpu::{Cpu, Isa};
use crate::graph::{Io, Mat};
use steps::GradientInputs;

/// Sets of heads of a group, at most: each leaves a partial sum of dB and dC for a block.
const SETS_PER_GROUP: usize = 8;
/// Partial sums that are kept at a time, about; bounds memory and gives many cores work.
const PARTIALS: usize = 32;
/// Rows of dB and dC that one task adds up.
const ROWS_PER_SUM: usize = 16;

/// How the work is cut. It depends on the shapes only, since sums over heads do.
struct Cut {
    heads_per_set: usize,
    sets_per_group: usize,
    /// Segments walked together.
    batch: usize,
}

impl Cut {
    fn new(dims: &Dims, segments: usize) -> Cut {
        let heads_per_set = dims.heads_per_group().div_ceil(SETS_PER_GROUP);
        let sets_per_group = dims.heads_per_group().div_ceil(heads_per_set);
        let batch = (PARTIALS / (dims.groups * sets_per_group)).clamp(1, segments.max(1));
        Cut { heads_per_set, sets_per_group, batch }
    }

    fn sets(&self, dims: &Dims) -> usize {
        dims.groups * self.sets_per_group
    }

    /// The group and the heads of a set.
    fn set(&self, dims: &Dims, set: usize) -> (usize, std::ops::Range<usize>) {
        let (group, part) = (set / self.sets_per_group, set % self.sets_per_group);
        let first = group * dims.heads_per_group() + part * self.heads_per_set;
        (group, first..(first + self.heads_per_set).min((group + 1) * dims.heads_per_group()))
    }
}

/// Multiply-adds of the products, twice.
pub(super) fn flops(dims: &Dims, tokens: usize) -> f64 {
    let (block, state) = (dims.block(GRADIENT_BLOCK).min(tokens) as f64, dims.state() as f64);
    let cut = Cut::new(dims, 1);
    let head = 10.0 * state + 2.0 * block * dims.headdim as f64;
    let set = 3.0 * block * dims.d_state as f64;
    tokens as f64 * (dims.heads as f64 * head + cut.sets(dims) as f64 * set)
}

pub(super) fn workspace(dims: &Dims, tokens: usize, segments: usize, cpu: &Cpu) -> usize {
    let mut slot = Bump::measure();
    Scratch::take(&mut slot, dims);
    let mut shared = Bump::measure();
    Shared::take(&mut shared, dims, tokens, segments);
    shared.used() + slot.used() * cpu.pool.threads()
}

/// What the tasks leave for each other.
struct Shared {
    /// The states `[P, N]` before the second and later blocks of each segment: of all heads for a block.
    states: *mut f32,
    /// dS of the segments of a batch, `[P, N]` for each head.
    d_states: *mut f32,
    /// Parts of dB and dC, `[q, N]` each, for each segment of a batch and each set.
    partials: *mut f32,
    /// Parts of da and of the bias's gradient, one for each segment and head.
    da: *mut f32,
    d_bias: *mut f32,
    /// Parts of D's gradient, one for each segment and channel.
    dd: *mut f32,
    /// Elements from one state to the next.
    state_step: usize,
    /// Elements from one partial sum to the next.
    partial_step: usize,
}

impl Shared {
    fn take(bump: &mut Bump, dims: &Dims, tokens: usize, segments: usize) -> Shared {
        let cut = Cut::new(dims, segments);
        let block = dims.block(GRADIENT_BLOCK);
        let state_step = (dims.state() + MAX_LANES).next_multiple_of(MAX_LANES);
        let partial_step = (block * dims.d_state).next_multiple_of(MAX_LANES);
        Shared {
            states: bump.take(most_later_blocks(dims, tokens) * dims.heads * state_step),
            d_states: bump.take(cut.batch * dims.heads * state_step),
            partials: bump.take(cut.batch * cut.sets(dims) * 2 * partial_step),
            da: bump.take(segments * dims.heads),
            d_bias: bump.take(segments * dims.heads),
            dd: bump.take(segments * dims.heads * dims.headdim),
            state_step,
            partial_step,
        }
    }
}

/// How many blocks that are not the first of their segment `tokens` can have, however they are cut into segments.
fn most_later_blocks(dims: &Dims, tokens: usize) -> usize {
    // One long segment has the most: cutting it moves the grid, but turns a later block into a first one.
    dims.block_count(tokens, GRADIENT_BLOCK).saturating_sub(1)
}

/// What a task keeps, for blocks of q rows; matrices of q columns have rows of whole vectors.
struct Scratch {
    decay: Decay,
    /// `[q, N]`
    b: *mut f32,
    c: *mut f32,
    /// `[N, q]`
    c_transposed: *mut f32,
    /// `[q, q]`, rows j, columns t: C_t · B_j, dy_t · x_j, the decays times G, and the gradient of G over the set.
    g: *mut f32,
    k: *mut f32,
    m: *mut f32,
    dg: *mut f32,
    /// `[q, P]`: x, exp(cum_last − cum) Δ x, dy, exp(cum) dy, the gradient of u, y.
    x: *mut f32,
    x_until_end: *mut f32,
    dy: *mut f32,
    dy_since_start: *mut f32,
    du: *mut f32,
    y: *mut f32,
    /// `[P, q]`
    dy_transposed: *mut f32,
    /// `[N, P]`
    transposed: *mut f32,
    /// `[P, N]`, the state before the block.
    state: *mut f32,
    /// `[q, N]`
    dc: *mut f32,
    /// `q` values each: C_t · dC_t of the old state, x · du of the new one, x · du, pairs astride t, a running sum.
    old: *mut f32,
    new: *mut f32,
    d_delta: *mut f32,
    astride: *mut f32,
    prefix: *mut f32,
    /// `P` values.
    dd: *mut f32,
    /// Elements of a row of q columns.
    row: usize,
}

impl Scratch {
    fn take(bump: &mut Bump, dims: &Dims) -> Scratch {
        let (q, p, n) = (dims.block(GRADIENT_BLOCK), dims.headdim, dims.d_state);
        let row = q.next_multiple_of(MAX_LANES);
        // A product reads rows of A as far as those of a tile.
        let tall = q + super::product::TILE_ROWS;
        Scratch {
            decay: Decay::take(bump, q),
            b: bump.take(tall * n),
            c: bump.take(tall * n),
            c_transposed: bump.take(n * row),
            g: bump.take(q * row),
            k: bump.take(q * row),
            m: bump.take(tall * row),
            dg: bump.take(tall * row),
            x: bump.take(tall * p),
            x_until_end: bump.take(tall * p),
            dy: bump.take(tall * p),
            dy_since_start: bump.take(tall * p),
            du: bump.take(q * p),
            y: bump.take(q * p),
            dy_transposed: bump.take(p * row),
            transposed: bump.take(n * p),
            state: bump.take(p * n),
            dc: bump.take(q * n),
            old: bump.take(q),
            new: bump.take(q),
            d_delta: bump.take(q),
            astride: bump.take(q),
            prefix: bump.take(row),
            dd: bump.take(p),
            row,
        }
    }
}

struct Gradient<'a> {
    dims: &'a Dims,
    cut: Cut,
    shared: Shared,
    isa: Isa,
    x: Mat,
    dt: Mat,
    a: Mat,
    b: Mat,
    c: Mat,
    d: Option<Mat>,
    z: Option<Mat>,
    bias: Option<Mat>,
    initial: Option<Mat>,
    dy: Option<Mat>,
    d_last: Option<Mat>,
    dx: Option<Mat>,
    d_dt: Option<Mat>,
    db: Option<Mat>,
    dc: Option<Mat>,
    dz: Option<Mat>,
    d_initial: Option<Mat>,
    segments: &'a [i32],
    /// For each segment, how many later blocks the segments before it have.
    later_blocks: Vec<usize>,
}

// SAFETY: the matrices and the shared memory are split between tasks by segment and head; see the tasks.
unsafe impl Sync for Gradient<'_> {}

pub(super) fn gradient(dims: &Dims, io: &Io<'_>, cpu: &Cpu) {
    let segments = io.segments(inputs::SEGMENTS);
    let count = segments.len() - 1;
    let x = io.input(inputs::X);
    let mut later_blocks = Vec::with_capacity(count);
    let mut sum = 0;
    for pair in segments.windows(2) {
        later_blocks.push(sum);
        sum += dims.block_count((pair[1] - pair[0]) as usize, GRADIENT_BLOCK).saturating_sub(1);
    }
    let mut bump = Bump::new(io.workspace().0);
    let shared = Shared::take(&mut bump, dims, x.rows, count);
    let used = bump.used();
    let mut slot = Bump::measure();
    Scratch::take(&mut slot, dims);
    let slots = Slots::new(io.workspace().0.wrapping_add(used), slot.used(), cpu.pool.threads());
    let gradient = Gradient {
        dims,
        cut: Cut::new(dims, count),
        shared,
        isa: cpu.isa,
        x,
        dt: io.input(inputs::DT),
        a: io.input(inputs::A),
        b: io.input(inputs::B),
        c: io.input(inputs::C),
        d: io.optional_input(inputs::D),
        z: io.optional_input(inputs::Z),
        bias: io.optional_input(inputs::DT_BIAS),
        initial: io.optional_input(inputs::INITIAL_STATE),
        dy: io.optional_input(inputs::D_Y),
        d_last: io.optional_input(inputs::D_FINAL_STATE),
        dx: io.optional_output(inputs::X),
        d_dt: io.optional_output(inputs::DT),
        db: io.optional_output(inputs::B),
        dc: io.optional_output(inputs::C),
        dz: io.optional_output(inputs::Z),
        d_initial: io.optional_output(inputs::INITIAL_STATE),
        segments,
        later_blocks,
    };
    let sets = gradient.cut.sets(dims);
    cpu.pool.run(count * sets, |task| {
        // SAFETY: the slot's memory is this task's own; no other task has this set of heads of this segment.
        slots.with(|mut bump| unsafe {
            gradient.walk_forwards(task / sets, task % sets, &Scratch::take(&mut bump, dims))
        });
    });
    for first in (0..count).step_by(gradient.cut.batch) {
        gradient.batch(first, gradient.cut.batch.min(count - first), &slots, cpu);
    }
    gradient.add_parameters(io);
}

impl Gradient<'_> {
    fn length(&self, segment: usize) -> usize {
        (self.segments[segment + 1] - self.segments[segment]) as usize
    }

    /// First row, rows and index of block `back`, counted from the segment's last one.
    fn block_from_end(&self, segment: usize, back: usize) -> Option<(usize, usize, usize)> {
        let length = self.length(segment);
        let index = self.dims.block_count(length, GRADIENT_BLOCK).checked_sub(back + 1)?;
        let (t, q) = self.dims.nth_block(length, GRADIENT_BLOCK, index);
        Some((self.segments[segment] as usize + t, q, index))
    }

    /// The state before block `index > 0` of a segment.
    fn state_before(&self, segment: usize, index: usize, head: usize) -> *mut f32 {
        let block = self.later_blocks[segment] + index - 1;
        self.shared.states.wrapping_add((block * self.dims.heads + head) * self.shared.state_step)
    }

    /// Computes the states before the second and later blocks of a segment for a set of heads.
    ///
    /// # Safety
    /// The scratch memory is the caller's own, and nobody else has these heads of this segment.
    unsafe fn walk_forwards(&self, segment: usize, set: usize, scratch: &Scratch) {
        let (dims, isa, p, n) = (self.dims, self.isa, self.dims.headdim, self.dims.d_state);
        let (group, heads) = self.cut.set(dims, set);
        let start = self.segments[segment] as usize;
        let length = self.length(segment);
        for index in 0..dims.block_count(length, GRADIENT_BLOCK).saturating_sub(1) {
            let (t, q) = dims.nth_block(length, GRADIENT_BLOCK, index);
            let t = start + t;
            // SAFETY: the caller's promises; the rows are of the segment.
            unsafe {
                self.copy_rows(self.b, group * n, t, q, scratch.b);
                for head in heads.clone() {
                    decays(isa, dims.step(self.a, self.bias, head), self.dt, t, head, q, scratch.decay);
                    isa.run(GradientInputs {
                        rows: q,
                        cols: p,
                        decay: scratch.decay,
                        x: (self.x.at::<f32>(t, head * p), self.x.stride),
                        dy: None,
                        z: None,
                        x_copy: scratch.x,
                        x_until_end: scratch.x_until_end,
                        dy_copy: scratch.dy,
                        dy_since_start: scratch.dy_since_start,
                    });
                    let from = if index == 0 {
                        self.initial.map(|m| m.at::<f32>(segment, head * dims.state()).cast_const())
                    } else {
                        Some(self.state_before(segment, index, head).cast_const())
                    };
                    let by = scratch.decay.whole(q);
                    isa.run(Product {
                        m: p,
                        n,
                        k: q,
                        a: scratch.x_until_end,
                        a_row: 1,
                        a_col: p,
                        b: scratch.b,
                        b_row: n,
                        out: self.state_before(segment, index + 1, head),
                        out_row: n,
                        init: from.map_or(Init::Zero, |from| Init::Scaled { from, row: n, by }),
                        band: Band::Full,
                    });
                }
            }
        }
    }

    /// Walks the blocks of `count` segments from `first` on backwards.
    fn batch(&self, first: usize, count: usize, slots: &Slots, cpu: &Cpu) {
        let dims = self.dims;
        let sets = self.cut.sets(dims);
        let blocks = |s| dims.block_count(self.length(s), GRADIENT_BLOCK);
        let most = (first..first + count).map(blocks).max().unwrap_or(0);
        cpu.pool.run(count * dims.heads, |task| {
            // SAFETY: no other task has this head of this segment.
            unsafe { self.start(first, task / dims.heads, task % dims.heads) }
        });
        for back in 0..most {
            cpu.pool.run(count * sets, |task| {
                let Some(block) = self.block_from_end(first + task / sets, back) else { return };
                // SAFETY: the slot's memory is this task's own; no other task has this set of heads of this segment.
                slots.with(|mut bump| unsafe {
                    let scratch = Scratch::take(&mut bump, dims);
                    self.walk_back(first, task / sets, task % sets, back, block, &scratch);
                });
            });
            let stripes = dims.block(GRADIENT_BLOCK).div_ceil(ROWS_PER_SUM);
            cpu.pool.run(count * dims.groups * stripes, |task| {
                let (of_batch, rest) = (task / (dims.groups * stripes), task % (dims.groups * stripes));
                let (group, row) = (rest / stripes, rest % stripes * ROWS_PER_SUM);
                let Some((t, q, _)) = self.block_from_end(first + of_batch, back) else { return };
                for i in row..(row + ROWS_PER_SUM).min(q) {
                    // SAFETY: the tasks that wrote the parts are done; no other task has this row of this group.
                    unsafe { self.add_partials(of_batch, group, i, t + i) };
                }
            });
        }
        cpu.pool.run(count * dims.heads, |task| {
            // SAFETY: no other task has this head of this segment.
            unsafe { self.end(first, task / dims.heads, task % dims.heads) }
        });
    }

    /// dS of a head of a segment of the batch.
    fn d_state(&self, of_batch: usize, head: usize) -> *mut f32 {
        self.shared.d_states.wrapping_add((of_batch * self.dims.heads + head) * self.shared.state_step)
    }

    /// Parts of dB and dC that a set leaves.
    fn partials(&self, of_batch: usize, set: usize) -> [*mut f32; 2] {
        let place = (of_batch * self.cut.sets(self.dims) + set) * 2;
        [place, place + 1].map(|i| self.shared.partials.wrapping_add(i * self.shared.partial_step))
    }

    /// Sets dS to the gradient of the final state, and the parts of the parameters' gradients to zero.
    ///
    /// # Safety
    /// Nobody else has this head of this segment.
    unsafe fn start(&self, first: usize, of_batch: usize, head: usize) {
        let (segment, len, p) = (first + of_batch, self.dims.state(), self.dims.headdim);
        let place = segment * self.dims.heads + head;
        // SAFETY: the caller's promise; the arrays have room for all segments and heads.
        unsafe {
            let to = self.d_state(of_batch, head);
            match self.d_last {
                Some(m) => std::ptr::copy_nonoverlapping(m.at::<f32>(segment, head * len), to, len),
                None => std::slice::from_raw_parts_mut(to, len).fill(0.0),
            }
            *self.shared.da.add(place) = 0.0;
            *self.shared.d_bias.add(place) = 0.0;
            std::slice::from_raw_parts_mut(self.shared.dd.add(place * p), p).fill(0.0);
        }
    }

    /// Hands out dS as the gradient of the initial state.
    ///
    /// # Safety
    /// Nobody else has this head of this segment.
    unsafe fn end(&self, first: usize, of_batch: usize, head: usize) {
        let (Some(to), len) = (self.d_initial, self.dims.state()) else { return };
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.at::<f32>(first + of_batch, head * len);
            std::ptr::copy_nonoverlapping(self.d_state(of_batch, head).cast_const(), to, len);
        }
    }

    /// Copies columns `col .. col + N` of rows `t .. t + q`.
    ///
    /// # Safety
    /// They exist, and `to` has room for them.
    unsafe fn copy_rows(&self, from: Mat, col: usize, t: usize, q: usize, to: *mut f32) {
        // SAFETY: the caller's promise.
        let at = unsafe { from.at::<f32>(t, col) };
        let cols = self.dims.d_state;
        self.isa.run(CopyRows { from: at, from_row: from.stride, rows: q, cols, factor: None, to });
    }

    /// Adds up the sets' parts of row `i` of a block, which is row `t` of dB and dC.
    ///
    /// # Safety
    /// The parts are complete, and nobody else has this row of this group.
    unsafe fn add_partials(&self, of_batch: usize, group: usize, i: usize, t: usize) {
        let n = self.dims.d_state;
        for (which, out) in [self.db, self.dc].into_iter().enumerate() {
            let Some(out) = out else { continue };
            // SAFETY: the caller's promises; the parts have n columns.
            unsafe {
                let out = std::slice::from_raw_parts_mut(out.at::<f32>(t, group * n), n);
                for s in 0..self.cut.sets_per_group {
                    let part = self.partials(of_batch, group * self.cut.sets_per_group + s)[which];
                    let part = std::slice::from_raw_parts(part.add(i * n), n);
                    if s == 0 {
                        out.copy_from_slice(part);
                    } else {
                        out.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                    }
                }
            }
        }
    }

    /// Adds up the segments' parts of the gradients of a, the bias and D.
    fn add_parameters(&self, io: &Io<'_>) {
        let (heads, p) = (self.dims.heads, self.dims.headdim);
        let segments = self.segments.len() - 1;
        let sum = |from: *mut f32, step: usize, i: usize| {
            // SAFETY: all tasks are done; there are `segments` parts of `step` values.
            (0..segments).map(|s| unsafe { f64::from(*from.add(s * step + i)) }).sum::<f64>()
        };
        for (place, from) in [(inputs::A, self.shared.da), (inputs::DT_BIAS, self.shared.d_bias)] {
            let Some(out) = io.optional_output(place) else { continue };
            // SAFETY: the op writes its own output.
            let out = unsafe { out.row_mut::<f32>(0) };
            out.iter_mut().enumerate().for_each(|(h, value)| *value = sum(from, heads, h) as f32);
        }
        if let Some(out) = io.optional_output(inputs::D) {
            // SAFETY: the op writes its own output.
            let out = unsafe { out.row_mut::<f32>(0) };
            let channel = |i: usize| sum(self.shared.dd, heads * p, i);
            for (i, value) in out.iter_mut().enumerate() {
                *value = if self.dims.d_per_channel {
                    channel(i) as f32
                } else {
                    (i * p..(i + 1) * p).map(channel).sum::<f64>() as f32
                };
            }
        }
    }
}
