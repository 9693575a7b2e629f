//! The forward pass on the CPU: a task walks the blocks of a segment for some heads of a group.
//!
//! The products G = C Bᵀ of a block serve all heads of a task. The state lies transposed, `[N, P]`, between blocks, so
//! that all products have their vectors along contiguous columns. Heads do not influence each other, so how many of
//! them a task takes changes no bits and may depend on the number of threads.

use super::lanes::Transpose;
use super::product::{Band, Init, Product, TILE_ROWS};
use super::steps::{CopyRows, Decay, Finish, MaskedDecay, Recurrence, decays};
use super::workspace::{Bump, Slots};
use super::{BLOCK, Dims, SHORT, inputs};
use crate::cpu::simd::MAX_LANES;
use crate::cpu::{Cpu, Isa};
use crate::graph::{Io, Mat};

/// Tasks that a thread gets, about: enough for an even load, few enough to share G between heads.
const TASKS_PER_THREAD: usize = 4;

/// Heads of one task.
fn heads_per_task(dims: &Dims, segments: usize, cpu: &Cpu) -> usize {
    let all = dims.heads * segments.max(1);
    all.div_ceil(TASKS_PER_THREAD * cpu.pool.threads()).min(dims.heads_per_group())
}

pub(super) fn workspace(dims: &Dims, segments: usize, cpu: &Cpu) -> usize {
    let mut bump = Bump::measure();
    Scratch::take(&mut bump, dims, heads_per_task(dims, segments, cpu));
    bump.used() * cpu.pool.threads()
}

/// What a task keeps, for blocks of q rows; matrices of q columns have rows of whole vectors.
struct Scratch {
    /// B and C of the block, `[q, N]`.
    b: *mut f32,
    c: *mut f32,
    /// B transposed, `[N, q]`.
    b_transposed: *mut f32,
    /// C Bᵀ, `[q, q]`, its lower half.
    g: *mut f32,
    /// G with the decays, `[q, q]`.
    m: *mut f32,
    /// Δ x, `[q, P]`.
    u: *mut f32,
    decay: Decay,
    /// One state `[N, P]` for each head of the task.
    states: *mut f32,
    /// A state `[P, N]`.
    natural: *mut f32,
    /// Elements of a row of q columns.
    row: usize,
    /// Elements from one state to the next, with room behind each.
    state_step: usize,
}

impl Scratch {
    fn take(bump: &mut Bump, dims: &Dims, heads: usize) -> Scratch {
        let (q, p, n) = (dims.block(BLOCK), dims.headdim, dims.d_state);
        let row = q.next_multiple_of(MAX_LANES);
        let state_step = (p * n + MAX_LANES).next_multiple_of(MAX_LANES);
        Scratch {
            b: bump.take(q * n),
            c: bump.take((q + TILE_ROWS) * n),
            b_transposed: bump.take(n * row),
            g: bump.take(q * row),
            m: bump.take((q + TILE_ROWS) * row),
            u: bump.take(q * p),
            decay: Decay::take(bump, q),
            states: bump.take(heads * state_step),
            natural: bump.take(p * n),
            row,
            state_step,
        }
    }
}

/// Where the state of a task's heads is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// Still where the segment's initial state is, or zero without one.
    Initial,
    /// In the scratch memory, `[N, P]` each.
    Scratch,
}

struct Forward<'a> {
    dims: &'a Dims,
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
    y: Option<Mat>,
    last: Option<Mat>,
    segments: &'a [i32],
}

pub(super) fn forward(dims: &Dims, io: &Io<'_>, cpu: &Cpu) {
    let forward = Forward {
        dims,
        isa: cpu.isa,
        x: io.input(inputs::X),
        dt: io.input(inputs::DT),
        a: io.input(inputs::A),
        b: io.input(inputs::B),
        c: io.input(inputs::C),
        d: io.optional_input(inputs::D),
        z: io.optional_input(inputs::Z),
        bias: io.optional_input(inputs::DT_BIAS),
        initial: io.optional_input(inputs::INITIAL_STATE),
        y: io.optional_output(0),
        last: io.optional_output(1),
        segments: io.segments(inputs::SEGMENTS),
    };
    let segments = forward.segments.len() - 1;
    let heads = heads_per_task(dims, segments, cpu);
    let per_group = dims.heads_per_group().div_ceil(heads);
    let (base, bytes) = io.workspace();
    let slots = Slots::new(base, bytes / cpu.pool.threads() / 64 * 64, cpu.pool.threads());
    cpu.pool.run(segments * dims.groups * per_group, |task| {
        let (segment, rest) = (task / (dims.groups * per_group), task % (dims.groups * per_group));
        let (group, part) = (rest / per_group, rest % per_group);
        let first = group * dims.heads_per_group() + part * heads;
        let end = (first + heads).min((group + 1) * dims.heads_per_group());
        slots.with(|mut bump| {
            let scratch = Scratch::take(&mut bump, dims, heads);
            // SAFETY: the scratch memory is this task's own and has the size that `workspace` asked for; no other task
            // writes these heads of this segment.
            unsafe { forward.heads(segment, group, first..end, &scratch) }
        });
    });
}

impl Forward<'_> {
    /// # Safety
    /// Nobody else uses the scratch memory or the outputs of these heads in this segment; the heads are of `group`.
    unsafe fn heads(&self, segment: usize, group: usize, heads: std::ops::Range<usize>, scratch: &Scratch) {
        let (start, end) = (self.segments[segment] as usize, self.segments[segment + 1] as usize);
        // SAFETY: the caller's promises; blocks lie inside the segment.
        unsafe {
            if start == end {
                heads.for_each(|head| self.keep(segment, head));
                return;
            }
            let mut held = Held::Initial;
            for (t, q) in self.dims.blocks(end - start, BLOCK) {
                let is_last = start + t + q == end;
                if q <= SHORT {
                    for (i, head) in heads.clone().enumerate() {
                        let state = scratch.states.add(i * scratch.state_step);
                        self.short(segment, group, head, start + t, q, held, state, is_last, scratch);
                    }
                } else {
                    self.load_block(group, start + t, q, scratch);
                    for (i, head) in heads.clone().enumerate() {
                        let state = scratch.states.add(i * scratch.state_step);
                        self.block(segment, head, start + t, q, held, state, is_last, scratch);
                    }
                }
                held = Held::Scratch;
            }
        }
    }

    /// The final state of an empty segment is its initial one.
    ///
    /// # Safety
    /// As [`Forward::heads`].
    unsafe fn keep(&self, segment: usize, head: usize) {
        let Some(last) = self.last else { return };
        let len = self.dims.state();
        // SAFETY: the head's state lies inside the row; an initial state in the same place is copied onto itself.
        unsafe {
            let to = last.at::<f32>(segment, head * len);
            match self.initial {
                Some(initial) => std::ptr::copy(initial.at::<f32>(segment, head * len), to, len),
                None => std::slice::from_raw_parts_mut(to, len).fill(0.0),
            }
        }
    }

    /// The head's initial state, null if zero.
    ///
    /// # Safety
    /// Segment and head exist.
    unsafe fn initial(&self, segment: usize, head: usize) -> *const f32 {
        // SAFETY: the builder checked the shape.
        self.initial
            .map_or(std::ptr::null(), |m| unsafe { m.at::<f32>(segment, head * self.dims.state()).cast_const() })
    }

    /// Rows `t .. t + q` of one head by the recurrence. The state is carried `[P, N]` here.
    ///
    /// # Safety
    /// As [`Forward::heads`]; the rows are of the segment, and `state` belongs to the head.
    #[allow(clippy::too_many_arguments)]
    unsafe fn short(
        &self,
        segment: usize,
        group: usize,
        head: usize,
        t: usize,
        q: usize,
        held: Held,
        state: *mut f32,
        is_last: bool,
        scratch: &Scratch,
    ) {
        let (dims, p, n) = (self.dims, self.dims.headdim, self.dims.d_state);
        // SAFETY: the caller's promises.
        unsafe {
            let step = dims.step(self.a, self.bias, head);
            decays(self.isa, step, self.dt, t, head, q, scratch.decay);
            let work = match self.last {
                Some(last) if is_last => last.at::<f32>(segment, head * dims.state()),
                _ => scratch.natural,
            };
            let from = if held == Held::Scratch {
                self.isa.run(Transpose { from: state, from_row: p, rows: n, cols: p, to: work, to_row: n });
                work.cast_const()
            } else {
                self.initial(segment, head)
            };
            let y = self.y.map(|y| (y.at::<f32>(t, head * p), y.stride));
            self.isa.run(Recurrence {
                rows: q,
                headdim: p,
                d_state: n,
                step,
                decay: scratch.decay,
                from,
                state: work,
                x: (self.x.at::<f32>(t, head * p), self.x.stride),
                b: (self.b.at::<f32>(t, group * n), self.b.stride),
                c: (self.c.at::<f32>(t, group * n), self.c.stride),
                y,
            });
            self.finish(head, t, q);
            if !is_last {
                self.isa.run(Transpose { from: work, from_row: n, rows: p, cols: n, to: state, to_row: p });
            }
        }
    }

    /// B, C and G of a block, for all heads of the task.
    ///
    /// # Safety
    /// As [`Forward::heads`]; the rows are of the segment.
    unsafe fn load_block(&self, group: usize, t: usize, q: usize, scratch: &Scratch) {
        let n = self.dims.d_state;
        // SAFETY: the caller's promises; the scratch arrays hold blocks of q rows.
        unsafe {
            let (b, c) = (self.b.at::<f32>(t, group * n), self.c.at::<f32>(t, group * n));
            self.isa.run(CopyRows { from: b, from_row: self.b.stride, rows: q, cols: n, factor: None, to: scratch.b });
            if self.y.is_none() {
                return;
            }
            self.isa.run(CopyRows { from: c, from_row: self.c.stride, rows: q, cols: n, factor: None, to: scratch.c });
            self.isa.run(Transpose {
                from: scratch.b,
                from_row: n,
                rows: q,
                cols: n,
                to: scratch.b_transposed,
                to_row: scratch.row,
            });
            self.isa.run(Product {
                m: q,
                n: q,
                k: n,
                a: scratch.c,
                a_row: n,
                a_col: 1,
                b: scratch.b_transposed,
                b_row: scratch.row,
                out: scratch.g,
                out_row: scratch.row,
                init: Init::Zero,
                band: Band::LowerResult,
            });
        }
    }

    /// Rows `t .. t + q` of one head by products.
    ///
    /// # Safety
    /// As [`Forward::heads`]; the rows are of the segment, `state` belongs to the head, and
    /// [`Forward::load_block`] was called for the rows.
    #[allow(clippy::too_many_arguments)]
    unsafe fn block(
        &self,
        segment: usize,
        head: usize,
        t: usize,
        q: usize,
        held: Held,
        state: *mut f32,
        is_last: bool,
        scratch: &Scratch,
    ) {
        let (dims, isa, p, n) = (self.dims, self.isa, self.dims.headdim, self.dims.d_state);
        let decay = scratch.decay;
        // SAFETY: the caller's promises; the scratch arrays hold blocks of q rows.
        unsafe {
            decays(isa, dims.step(self.a, self.bias, head), self.dt, t, head, q, decay);
            let initial = self.initial(segment, head);
            if held == Held::Initial && !initial.is_null() {
                isa.run(Transpose { from: initial, from_row: n, rows: p, cols: n, to: state, to_row: p });
            }
            let is_zero = held == Held::Initial && initial.is_null();
            isa.run(CopyRows {
                from: self.x.at::<f32>(t, head * p),
                from_row: self.x.stride,
                rows: q,
                cols: p,
                factor: Some(decay.delta),
                to: scratch.u,
            });
            if let Some(y) = self.y {
                let out = y.at::<f32>(t, head * p);
                let mut init = Init::Zero;
                if !is_zero {
                    isa.run(Product {
                        m: q,
                        n: p,
                        k: n,
                        a: scratch.c,
                        a_row: n,
                        a_col: 1,
                        b: state,
                        b_row: p,
                        out,
                        out_row: y.stride,
                        init: Init::Zero,
                        band: Band::Full,
                    });
                    init = Init::ScaledRows { from: out, row: y.stride, by: decay.since_start };
                }
                isa.run(MaskedDecay { q, decay, g: scratch.g, m: scratch.m, row: scratch.row });
                isa.run(Product {
                    m: q,
                    n: p,
                    k: q,
                    a: scratch.m,
                    a_row: scratch.row,
                    a_col: 1,
                    b: scratch.u,
                    b_row: p,
                    out,
                    out_row: y.stride,
                    init,
                    band: Band::LowerA,
                });
                self.finish(head, t, q);
            }
            if is_last && self.last.is_none() {
                return;
            }
            isa.run(CopyRows {
                from: scratch.u,
                from_row: p,
                rows: q,
                cols: p,
                factor: Some(decay.until_end),
                to: scratch.u,
            });
            isa.run(Product {
                m: n,
                n: p,
                k: q,
                a: scratch.b,
                a_row: 1,
                a_col: n,
                b: scratch.u,
                b_row: p,
                out: state,
                out_row: p,
                init: if is_zero { Init::Zero } else { Init::Scaled { from: state, row: p, by: decay.whole(q) } },
                band: Band::Full,
            });
            if let (Some(last), true) = (self.last, is_last) {
                let to = last.at::<f32>(segment, head * dims.state());
                isa.run(Transpose { from: state, from_row: p, rows: n, cols: p, to, to_row: n });
            }
        }
    }

    /// D x and the gate on rows `t .. t + q` of one head.
    ///
    /// # Safety
    /// As [`Forward::heads`]; the rows are of the segment.
    unsafe fn finish(&self, head: usize, t: usize, q: usize) {
        let Some(y) = self.y else { return };
        if self.d.is_none() && self.z.is_none() {
            return;
        }
        let p = self.dims.headdim;
        // SAFETY: the caller's promises.
        unsafe {
            self.isa.run(Finish {
                rows: q,
                cols: p,
                y: (y.at::<f32>(t, head * p), y.stride),
                x: (self.x.at::<f32>(t, head * p), self.x.stride),
                d: self.dims.skip(self.d, head),
                z: self.z.map(|z| (z.at::<f32>(t, head * p).cast_const(), z.stride)),
            });
        }
    }
}
