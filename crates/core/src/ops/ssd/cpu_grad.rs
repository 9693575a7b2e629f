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

use super::lanes::Transpose;
use super::product::{Band, Init, Product};
use super::steps::{
    AddTo, CopyRows, Decay, Dot, Finish, GateGradient, GradientInputs, InputGradient, PairGradient, RowDots, decays,
};
use super::workspace::{Bump, Slots};
use super::{Dims, GRADIENT_BLOCK, inputs};
use crate::cpu::simd::MAX_LANES;
use crate::cpu::{Cpu, Isa};
use crate::graph::{Io, Mat};

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
        // Rows that a product reads as A go up to a multiple of 8.
        let tall = q.next_multiple_of(super::product::ROW_MULTIPLE);
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

    /// One block for a set of heads: `back` blocks from the segment's end, `(first row, rows, index)`.
    ///
    /// # Safety
    /// The scratch memory is the caller's own, and nobody else has these heads of this segment.
    unsafe fn walk_back(
        &self,
        first: usize,
        of_batch: usize,
        set: usize,
        back: usize,
        (t, q, index): (usize, usize, usize),
        scratch: &Scratch,
    ) {
        let (dims, isa, n, row) = (self.dims, self.isa, self.dims.d_state, scratch.row);
        let (group, heads) = self.cut.set(dims, set);
        let [db, dc] = self.partials(of_batch, set);
        let Scratch { b, c, c_transposed, g, dg, .. } = *scratch;
        // SAFETY: the caller's promises; the scratch arrays hold blocks of q rows.
        unsafe {
            self.copy_rows(self.b, group * n, t, q, b);
            self.copy_rows(self.c, group * n, t, q, c);
            isa.run(Transpose { from: c, from_row: n, rows: q, cols: n, to: c_transposed, to_row: row });
            isa.run(Product {
                m: q,
                n: q,
                k: n,
                a: b,
                a_row: n,
                a_col: 1,
                b: c_transposed,
                b_row: row,
                out: g,
                out_row: row,
                init: Init::Zero,
                band: Band::UpperResult,
            });
            for (i, head) in heads.enumerate() {
                let block = Block { segment: first + of_batch, of_batch, head, t, q, index, back, is_first: i == 0 };
                self.head(&block, db, dc, scratch);
            }
            // Within the block: dB += dG C, dC += dGᵀ B, dG having rows j.
            let add = |m| Init::Scaled { from: m, row: n, by: 1.0 };
            let common = Product {
                m: q,
                n,
                k: q,
                a: dg,
                a_row: row,
                a_col: 1,
                b: c,
                b_row: n,
                out: db,
                out_row: n,
                init: add(db.cast_const()),
                band: Band::UpperA,
            };
            if self.dc.is_some() {
                let init = add(dc.cast_const());
                isa.run(Product { a_row: 1, a_col: row, b, out: dc, init, band: Band::LowerA, ..common });
            }
            if self.db.is_some() {
                isa.run(common);
            }
        }
    }

    /// One block of one head. Adds to the set's dB and dC (or sets them), and to dG in the scratch memory.
    ///
    /// # Safety
    /// As [`Gradient::walk_back`], which has filled b, c and g.
    unsafe fn head(&self, block: &Block, db: *mut f32, dc: *mut f32, scratch: &Scratch) {
        let Block { segment, of_batch, head, t, q, index, back, is_first } = *block;
        let (dims, isa, p, n, row) = (self.dims, self.isa, self.dims.headdim, self.dims.d_state, scratch.row);
        let Scratch { decay, b, c, g, k, m, dg, x, x_until_end, dy, dy_since_start, du, dy_transposed, .. } = *scratch;
        let d_state = self.d_state(of_batch, head);
        // Without these, terms of the old or of the new state are zero.
        let has_new = back > 0 || self.d_last.is_some();
        let has_old = index > 0 || self.initial.is_some();
        // SAFETY: the caller's promises; the scratch arrays hold blocks of q rows.
        unsafe {
            let step = dims.step(self.a, self.bias, head);
            decays(isa, step, self.dt, t, head, q, decay);
            let at = |m: Mat| (m.at::<f32>(t, head * p).cast_const(), m.stride);
            let at_mut = |m: Mat| (m.at::<f32>(t, head * p), m.stride);
            isa.run(GradientInputs {
                rows: q,
                cols: p,
                decay,
                x: at(self.x),
                dy: self.dy.map(at),
                z: self.z.map(at),
                x_copy: x,
                x_until_end,
                dy_copy: dy,
                dy_since_start,
            });
            let old_state = self.load_state(block, scratch);

            isa.run(Transpose { from: dy, from_row: p, rows: q, cols: p, to: dy_transposed, to_row: row });
            isa.run(Product {
                m: q,
                n: q,
                k: p,
                a: x,
                a_row: p,
                a_col: 1,
                b: dy_transposed,
                b_row: row,
                out: k,
                out_row: row,
                init: Init::Zero,
                band: Band::UpperResult,
            });
            let (prefix, astride) = (scratch.prefix, scratch.astride);
            isa.run(PairGradient { q, decay, g, k, m, dg, first: is_first, prefix, astride, row });
            if let (Some(z), Some(dz)) = (self.z, self.dz) {
                self.gate(head, at(z), at_mut(dz), t, q, has_old.then_some(old_state), scratch);
            }

            let mut init = Init::Zero;
            if has_new {
                let transposed = scratch.transposed;
                isa.run(Transpose { from: d_state, from_row: n, rows: p, cols: n, to: transposed, to_row: p });
                isa.run(Product {
                    m: q,
                    n: p,
                    k: n,
                    a: b,
                    a_row: n,
                    a_col: 1,
                    b: transposed,
                    b_row: p,
                    out: du,
                    out_row: p,
                    init: Init::Zero,
                    band: Band::Full,
                });
                isa.run(RowDots { rows: q, cols: p, a: x_until_end, b: du, out: scratch.new });
                init = Init::ScaledRows { from: du, row: p, by: decay.until_end };
            }
            isa.run(Product {
                m: q,
                n: p,
                k: q,
                a: m,
                a_row: row,
                a_col: 1,
                b: dy,
                b_row: p,
                out: du,
                out_row: p,
                init,
                band: Band::UpperA,
            });
            let (d, dx) = (dims.skip(self.d, head), self.dx.map(at_mut));
            isa.run(InputGradient {
                rows: q,
                cols: p,
                decay,
                x,
                dy,
                du,
                d,
                dx,
                d_delta: scratch.d_delta,
                dd: scratch.dd,
            });

            self.state_terms(old_state, has_old, d_state, has_new, is_first, q, db, dc, scratch);
            let through = if has_old && has_new {
                decay.whole(q) * isa.run(Dot { a: d_state, b: old_state, len: dims.state() })
            } else {
                0.0
            };
            if index > 0 || self.d_initial.is_some() {
                let by = decay.whole(q);
                isa.run(Product {
                    m: p,
                    n,
                    k: q,
                    a: dy_since_start,
                    a_row: 1,
                    a_col: p,
                    b: c,
                    b_row: n,
                    out: d_state,
                    out_row: n,
                    init: if has_new { Init::Scaled { from: d_state, row: n, by } } else { Init::Zero },
                    band: Band::Full,
                });
            }
            self.step_sizes(segment, head, t, q, step.a, (has_old, has_new, through), scratch);
        }
    }

    /// The state before a block, where products may read it; garbage if it is zero.
    ///
    /// # Safety
    /// As [`Gradient::walk_back`].
    unsafe fn load_state(&self, block: &Block, scratch: &Scratch) -> *const f32 {
        if block.index > 0 {
            return self.state_before(block.segment, block.index, block.head);
        }
        if let Some(initial) = self.initial {
            let len = self.dims.state();
            // SAFETY: the segment and the head exist, and the scratch memory holds a state.
            unsafe {
                let from = initial.at::<f32>(block.segment, block.head * len).cast_const();
                std::ptr::copy_nonoverlapping(from, scratch.state, len);
            }
        }
        scratch.state
    }

    /// Computes y before the gate again, and the gradient of the gate.
    ///
    /// # Safety
    /// As [`Gradient::head`]; the rows' `m` is filled.
    #[allow(clippy::too_many_arguments)]
    unsafe fn gate(
        &self,
        head: usize,
        z: (*const f32, usize),
        dz: (*mut f32, usize),
        t: usize,
        q: usize,
        old_state: Option<*const f32>,
        scratch: &Scratch,
    ) {
        let (dims, isa, p, n) = (self.dims, self.isa, self.dims.headdim, self.dims.d_state);
        // u lies where the gradient of u will be.
        let Scratch { decay, c, m, x, y, du: u, transposed, row, .. } = *scratch;
        // SAFETY: the caller's promises.
        unsafe {
            let mut init = Init::Zero;
            if let Some(from) = old_state {
                isa.run(Transpose { from, from_row: n, rows: p, cols: n, to: transposed, to_row: p });
                isa.run(Product {
                    m: q,
                    n: p,
                    k: n,
                    a: c,
                    a_row: n,
                    a_col: 1,
                    b: transposed,
                    b_row: p,
                    out: y,
                    out_row: p,
                    init,
                    band: Band::Full,
                });
                init = Init::ScaledRows { from: y, row: p, by: decay.since_start };
            }
            isa.run(CopyRows { from: x, from_row: p, rows: q, cols: p, factor: Some(decay.delta), to: u });
            isa.run(Product {
                m: q,
                n: p,
                k: q,
                a: m,
                a_row: 1,
                a_col: row,
                b: u,
                b_row: p,
                out: y,
                out_row: p,
                init,
                band: Band::LowerA,
            });
            let d = dims.skip(self.d, head);
            isa.run(Finish { rows: q, cols: p, y: (y, p), x: (x, p), d, z: None });
            let dy = self.dy.map(|dy| (dy.at::<f32>(t, head * p).cast_const(), dy.stride));
            match dy {
                Some(dy) => isa.run(GateGradient { rows: q, cols: p, y, dy, z, dz }),
                None => {
                    for r in 0..q {
                        std::slice::from_raw_parts_mut(dz.0.add(r * dz.1), p).fill(0.0);
                    }
                }
            }
        }
    }

    /// What the states before and after a block say of C and B.
    ///
    /// # Safety
    /// As [`Gradient::head`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn state_terms(
        &self,
        old_state: *const f32,
        has_old: bool,
        d_state: *const f32,
        has_new: bool,
        is_first: bool,
        q: usize,
        db: *mut f32,
        dc: *mut f32,
        scratch: &Scratch,
    ) {
        let (isa, p, n) = (self.isa, self.dims.headdim, self.dims.d_state);
        // SAFETY: the caller's promises.
        unsafe {
            let product = Product {
                m: q,
                n,
                k: p,
                a: scratch.dy_since_start,
                a_row: p,
                a_col: 1,
                b: old_state,
                b_row: n,
                out: if is_first { dc } else { scratch.dc },
                out_row: n,
                init: Init::Zero,
                band: Band::Full,
            };
            if has_old {
                let out = product.out;
                isa.run(Product { ..product });
                isa.run(RowDots { rows: q, cols: n, a: scratch.c, b: out, out: scratch.old });
                if !is_first {
                    isa.run(AddTo { from: out, to: dc, len: q * n });
                }
            } else if is_first {
                std::slice::from_raw_parts_mut(dc, q * n).fill(0.0);
            }
            if has_new {
                let init = if is_first { Init::Zero } else { Init::Scaled { from: db, row: n, by: 1.0 } };
                isa.run(Product { a: scratch.x_until_end, b: d_state, out: db, init, ..product });
            } else if is_first {
                std::slice::from_raw_parts_mut(db, q * n).fill(0.0);
            }
        }
    }

    /// The gradients of Δ, dt, its bias and a, from the terms of log a.
    ///
    /// # Safety
    /// As [`Gradient::head`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn step_sizes(
        &self,
        segment: usize,
        head: usize,
        t: usize,
        q: usize,
        a: f32,
        (has_old, has_new, through): (bool, bool, f32),
        scratch: &Scratch,
    ) {
        // SAFETY: the caller's promises; all arrays hold q values.
        unsafe {
            let slice = |from: *mut f32| std::slice::from_raw_parts_mut(from, q);
            let (delta, slope) = (slice(scratch.decay.delta), slice(scratch.decay.slope));
            let (old, new, astride) = (slice(scratch.old), slice(scratch.new), slice(scratch.astride));
            let d_delta = slice(scratch.d_delta);
            // The new state's terms of rows before t, and, walking back, the old state's of rows from t on.
            let mut before = 0.0f64;
            for i in 0..q {
                let here = if has_new { f64::from(new[i]) } else { 0.0 };
                astride[i] += (before + f64::from(through)) as f32;
                before += here;
            }
            let (mut after, mut da, mut d_bias) = (0.0f64, 0.0f64, 0.0f64);
            for i in (0..q).rev() {
                if has_old {
                    after += f64::from(old[i]);
                }
                let d_log_a = f64::from(astride[i]) + after;
                let d_dt = (f64::from(d_delta[i]) + f64::from(a) * d_log_a) * f64::from(slope[i]);
                da += f64::from(delta[i]) * d_log_a;
                d_bias += d_dt;
                if let Some(to) = self.d_dt {
                    *to.at::<f32>(t + i, head) = d_dt as f32;
                }
            }
            let place = segment * self.dims.heads + head;
            *self.shared.da.add(place) += da as f32;
            *self.shared.d_bias.add(place) += d_bias as f32;
            let p = self.dims.headdim;
            if self.d.is_some() {
                let sums = std::slice::from_raw_parts_mut(self.shared.dd.add(place * p), p);
                let block = std::slice::from_raw_parts(scratch.dd, p);
                sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
            }
        }
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

/// A block of one head.
#[derive(Clone, Copy)]
struct Block {
    segment: usize,
    /// The segment's place in its batch.
    of_batch: usize,
    head: usize,
    /// First row and rows.
    t: usize,
    q: usize,
    /// The block's number from the segment's start and from its end.
    index: usize,
    back: usize,
    /// Whether the head is its set's first.
    is_first: bool,
}
