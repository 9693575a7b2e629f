//! The forward kernel: a task walks through the segments of a group with a block of channels.
//!
//! Time is cut into tiles. In each, Δ, Δx and y of a vector of channels lie side by side in scratch memory, and a few
//! states at a time walk through the tile in registers, after the decays of all its steps: these depend on nothing
//! before them, so the processor overlaps them, and the constants stay in registers. Nothing depends on where a tile
//! starts: every step does the same operations in the same order.

use std::ops::Range;

use super::decay::{NEAR, ZOH_LIMIT, decay, decay_near, exp2_and_m1};
use super::{A, B, C, D, DT, DT_BIAS, Discretisation, Forward, SEGMENTS, X, Z, chunk_len, chunk_row};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{MAX_LANES, Simd, Twice};
use crate::graph::{Io, Mat};
use crate::ops::tasks::{
    ChannelBlocks, Scratch, SegmentGroups, Segments, prefetch, prefetch_rows, run_with_slots, transpose_rows, vectors,
};
use crate::ops::vectors::{load, store};

/// Channels of a task, whole vectors at every level: 256 bytes of a row.
const BLOCK: usize = 64;
/// Channels of a task where every segment has one token at most: long runs of the states' memory.
const STEP_BLOCK: usize = 128;
/// How far ahead states are asked for in a step, in channels.
const AHEAD: usize = 64;
/// Steps of a tile; divides every chunk.
const TILE: usize = 32;
/// States that walk through a tile together.
const STATES: usize = 4;

/// Values of scratch memory of a task: the coefficients of A, tiles of Δ, Δx (or x) and y, the largest |Δ| of tiles, and
/// the decays of a few states of a vector.
fn scratch_len(forward: &Forward) -> usize {
    (Coefficients::values_a_channel(forward) + 3 * TILE + 1) * BLOCK + TILE * STATES * MAX_LANES
}

pub(super) fn workspace(forward: &Forward, channels: usize, segments: usize, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), scratch_len(forward))
        + Scratch::bytes(segments, forward.shape.d_state * channels)
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let (tokens, channels) = (inputs.x.rows, inputs.x.cols);
    let segments = Segments::new(io.segments(SEGMENTS), tokens);
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(cpu.pool.threads(), scratch_len(forward));
    let scan = Scan {
        forward,
        inputs,
        segments,
        initial: io.optional_input(Forward::INITIAL_STATE),
        y: io.optional_output(0),
        // Between tiles the states rest where the final ones go; in scratch memory, if nobody wants those.
        states: io.optional_output(1).unwrap_or_else(|| memory.take(segments.len(), forward.shape.d_state * channels)),
        chunk_states: io.optional_output(2),
    };
    let steps = forward.discretisation == Discretisation::Euler
        && scan.chunk_states.is_none()
        && (0..segments.len()).all(|s| segments.rows(s).len() <= 1);
    let blocks = ChannelBlocks::new(channels, forward.shape.groups, if steps { STEP_BLOCK } else { BLOCK });
    let groups = SegmentGroups::new(segments.len(), blocks.count());
    run_with_slots(&cpu.pool, groups.count() * blocks.count(), |slot, task| {
        let (group, channels) = blocks.block(task % blocks.count());
        let block = Block { first: channels.start, width: channels.len(), column: group * forward.shape.d_state };
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        let walk = Walk { scan: &scan, block, segments: groups.segments(task / blocks.count()), scratch };
        if steps { cpu.isa.run(Step(walk)) } else { cpu.isa.run(walk) }
    });
    if let Some(y) = scan.y {
        segments.clear_rest(y);
    }
}

/// The operands that the forward pass and its repetition in the gradient read.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub x: Mat,
    pub dt: Mat,
    pub a: Mat,
    pub b: Mat,
    pub c: Mat,
    pub d: Option<Mat>,
    pub z: Option<Mat>,
    pub dt_bias: Option<Mat>,
}

impl Inputs {
    pub fn new(io: &Io<'_>) -> Inputs {
        Inputs {
            x: io.input(X),
            dt: io.input(DT),
            a: io.input(A),
            b: io.input(B),
            c: io.input(C),
            d: io.optional_input(D),
            z: io.optional_input(Z),
            dt_bias: io.optional_input(DT_BIAS),
        }
    }
}

/// The channels of a task.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// The first channel.
    pub first: usize,
    /// Their number.
    pub width: usize,
    /// The first column of B and C of their group.
    pub column: usize,
}

impl Block {
    /// The first channel and the number of channels of vector `v`.
    #[inline(always)]
    pub fn vector<S: Simd>(&self, v: usize) -> (usize, usize) {
        (self.first + v * S::LANES, S::LANES.min(self.width - v * S::LANES))
    }
}

/// One value per channel of a vector, `or` where the operand is not given.
///
/// # Safety
/// The `lanes` columns from `channel` on lie in the operand's row.
#[inline(always)]
pub(super) unsafe fn per_channel<S: Simd>(s: S, m: Option<Mat>, channel: usize, lanes: usize, or: f32) -> S::V {
    match m {
        // SAFETY: the caller vouches for the columns.
        Some(m) => unsafe { load(s, m.at::<f32>(0, channel), lanes) },
        None => s.splat(or),
    }
}

/// dt + dt_bias of a vector of channels at one step.
///
/// # Safety
/// As [`per_channel`], in row `row` of dt.
#[inline(always)]
pub(super) unsafe fn biased_dt<S: Simd>(s: S, inputs: &Inputs, row: usize, channel: usize, lanes: usize) -> S::V {
    // SAFETY: the caller vouches for row and columns.
    unsafe {
        let dt = load(s, inputs.dt.at::<f32>(row, channel), lanes);
        s.add(dt, per_channel(s, inputs.dt_bias, channel, lanes, 0.0))
    }
}

/// What the steps need of A, one vector per state: A · log₂ e, and for the zero-order hold 1/A (0 below
/// [`ZOH_LIMIT`]) and 1 where A is below it, else 0.
#[derive(Clone, Copy)]
pub(super) struct Coefficients {
    pub scaled: *const f32,
    pub inverse: *const f32,
    pub at_limit: *const f32,
}

impl Coefficients {
    /// Values of memory per channel.
    pub fn values_a_channel(forward: &Forward) -> usize {
        forward.shape.d_state
            * match forward.discretisation {
                Discretisation::Euler => 1,
                Discretisation::Zoh => 3,
            }
    }

    /// Computes the coefficients of vector `v` of a block at `at`, which holds them for all its vectors in turn.
    ///
    /// # Safety
    /// The block's channels lie in A; `at` has room for [`Coefficients::values_a_channel`] times the block's channels,
    /// rounded up to whole vectors.
    #[inline(always)]
    pub unsafe fn prepare<S: Simd, const ZOH: bool>(s: S, at: *mut f32, a: Mat, block: Block) {
        let n = a.cols;
        for v in 0..vectors::<S>(block.width) {
            let (channel, lanes) = block.vector::<S>(v);
            // SAFETY: the caller vouches for channels and room.
            unsafe {
                let Coefficients { scaled, inverse, at_limit } = Coefficients::of::<S, ZOH>(at, v, n);
                transpose_rows(s, a, channel, lanes, scaled.cast_mut());
                for i in (0..n * S::LANES).step_by(S::LANES) {
                    let value = s.load(scaled.add(i));
                    s.store(scaled.cast_mut().add(i), s.mul(value, s.splat(std::f32::consts::LOG2_E)));
                    if ZOH {
                        let tiny = s.lt(s.abs(value), s.splat(ZOH_LIMIT));
                        let one = s.splat(1.0);
                        let quotient = s.div(one, s.select(tiny, one, value));
                        s.store(inverse.cast_mut().add(i), s.select(tiny, s.zero(), quotient));
                        s.store(at_limit.cast_mut().add(i), s.select(tiny, one, s.zero()));
                    }
                }
            }
        }
    }

    /// Where [`Coefficients::prepare`] put those of vector `v`.
    ///
    /// # Safety
    /// `at` is what `prepare` was given, and `v` a vector of the block.
    #[inline(always)]
    pub unsafe fn of<S: Simd, const ZOH: bool>(at: *const f32, v: usize, d_state: usize) -> Coefficients {
        let each = d_state * S::LANES;
        // SAFETY: inside the memory given to `prepare`.
        unsafe {
            if ZOH {
                let scaled = at.add(3 * v * each);
                Coefficients { scaled, inverse: scaled.add(each), at_limit: scaled.add(2 * each) }
            } else {
                let scaled = at.add(v * each);
                Coefficients { scaled, inverse: scaled, at_limit: scaled }
            }
        }
    }

    /// Those of the states from `n` on.
    ///
    /// # Safety
    /// `n` is below the number of states.
    #[inline(always)]
    pub unsafe fn at_state<S: Simd>(self, n: usize) -> Coefficients {
        // SAFETY: the caller keeps n inside.
        unsafe {
            Coefficients {
                scaled: self.scaled.add(n * S::LANES),
                inverse: self.inverse.add(n * S::LANES),
                at_limit: self.at_limit.add(n * S::LANES),
            }
        }
    }
}

/// B̄ / B of the zero-order hold from exp(ΔA) − 1: the latter over A, Δ at the limit.
#[inline(always)]
pub(super) fn zoh_factor<S: Simd>(s: S, m1: S::V, delta: S::V, inverse: S::V, at_limit: S::V) -> S::V {
    s.fma(at_limit, delta, s.mul(m1, inverse))
}

struct Scan<'a> {
    forward: &'a Forward,
    inputs: Inputs,
    segments: Segments<'a>,
    initial: Option<Mat>,
    y: Option<Mat>,
    states: Mat,
    chunk_states: Option<Mat>,
}

/// One task.
struct Walk<'a> {
    scan: &'a Scan<'a>,
    block: Block,
    segments: Range<usize>,
    scratch: *mut f32,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.scan.forward.discretisation {
            Discretisation::Euler => self.walk::<S, false>(s),
            Discretisation::Zoh => self.walk::<S, true>(s),
        }
    }
}

/// A task whose segments have one token at most: as [`Walk`] with the same bits, but a vector of channels at a time, whose
/// sum over the states stays in a register, without tiles.
struct Step<'a>(Walk<'a>);

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (walk, scan, block) = (&self.0, self.0.scan, self.0.block);
        for v in 0..vectors::<S>(block.width) {
            let (first, width) = block.vector::<S>(v);
            // SAFETY: the builder checked the shapes; the scratch memory holds the coefficients of a vector, and this
            // task alone has these channels of its segments.
            unsafe {
                Coefficients::prepare::<S, false>(s, walk.scratch, scan.inputs.a, Block { first, width, ..block });
                let a = Coefficients::of::<S, false>(walk.scratch, 0, scan.forward.shape.d_state).scaled;
                let mut largest = s.zero();
                for n in 0..scan.forward.shape.d_state {
                    largest = s.max(s.abs(s.load(a.add(n * S::LANES))), largest);
                }
                for segment in walk.segments.clone() {
                    let rows = scan.segments.rows(segment);
                    if !rows.is_empty() {
                        walk.step(s, (segment, rows.start), (first, width), a, largest);
                    }
                }
            }
        }
        for segment in self.0.segments.clone().filter(|&segment| scan.segments.rows(segment).is_empty()) {
            // SAFETY: as above.
            unsafe { walk.pass_on(s, segment) };
        }
    }
}

/// A vector's part of a tile: one vector per step in each array.
#[derive(Clone, Copy)]
struct Tile {
    delta: *mut f32,
    /// Δx; x for the zero-order hold.
    input: *mut f32,
    y: *mut f32,
    /// One vector: the largest |Δ|, NaN where a Δ is not finite.
    largest: *mut f32,
}

impl Walk<'_> {
    #[inline(always)]
    fn walk<S: Simd, const ZOH: bool>(&self, s: S) {
        let (scan, block) = (self.scan, self.block);
        let d_state = scan.forward.shape.d_state;
        let chunk = chunk_len(d_state);
        // SAFETY: the builder checked the shapes; the scratch memory holds `scratch_len` values.
        unsafe { Coefficients::prepare::<S, ZOH>(s, self.scratch, scan.inputs.a, block) };
        for segment in self.segments.clone() {
            let rows = scan.segments.rows(segment);
            if rows.is_empty() {
                // SAFETY: this task alone has these channels of this segment.
                unsafe { self.pass_on(s, segment) };
            }
            for first in rows.clone().step_by(TILE) {
                let steps = TILE.min(rows.end - first);
                let from = if first == rows.start { scan.initial } else { Some(scan.states) };
                let done = first - rows.start;
                let keep = scan.chunk_states.filter(|_| done.is_multiple_of(chunk));
                let keep_row = chunk_row(d_state, segment, rows.start, done / chunk);
                // SAFETY: rows and channels lie in the operands, and this task alone writes them.
                unsafe {
                    for v in 0..vectors::<S>(block.width) {
                        self.load_tile::<S, ZOH>(s, v, first, steps);
                    }
                    let next = rows.end.min(first + TILE)..rows.end.min(first + 2 * TILE);
                    for m in [Some(scan.inputs.x), Some(scan.inputs.dt), scan.inputs.z, scan.y] {
                        prefetch_rows(m, next.clone(), block.first, block.width);
                    }
                    for v in 0..vectors::<S>(block.width) {
                        let advance = Advance { walk: self, v, first, steps, segment, from, keep, keep_row };
                        let whole = d_state - d_state % STATES;
                        for n in (0..whole).step_by(STATES) {
                            advance.run::<S, ZOH, STATES>(s, n);
                        }
                        for n in whole..d_state {
                            advance.run::<S, ZOH, 1>(s, n);
                        }
                    }
                    if let Some(y) = scan.y {
                        for v in 0..vectors::<S>(block.width) {
                            self.store_tile(s, v, first, steps, y);
                        }
                    }
                }
            }
        }
    }

    /// The final state of an empty segment is its initial one.
    ///
    /// # Safety
    /// No other task uses these channels of the segment's states.
    #[inline(always)]
    unsafe fn pass_on<S: Simd>(&self, s: S, segment: usize) {
        let (scan, channels) = (self.scan, self.scan.inputs.x.cols);
        for v in 0..vectors::<S>(self.block.width) {
            let (channel, lanes) = self.block.vector::<S>(v);
            for n in 0..scan.forward.shape.d_state {
                let col = n * channels + channel;
                // SAFETY: the builder checked the shapes of the states.
                unsafe {
                    let h = scan.initial.map_or(s.zero(), |m| load(s, m.at::<f32>(segment, col), lanes));
                    store(s, scan.states.at::<f32>(segment, col), h, lanes);
                }
            }
        }
    }

    /// One token of a segment, for `lanes` channels from `channel` on: their coefficients of A, and the largest |A|.
    ///
    /// # Safety
    /// The token is a row of all operands, and no other task uses these channels of the segment's states.
    #[inline(always)]
    unsafe fn step<S: Simd>(
        &self,
        s: S,
        (segment, token): (usize, usize),
        (channel, lanes): (usize, usize),
        a: *const f32,
        largest: S::V,
    ) {
        let (scan, inputs) = (self.scan, &self.scan.inputs);
        // SAFETY: as the caller says; the builder checked the shapes.
        unsafe {
            let mut delta = biased_dt(s, inputs, token, channel, lanes);
            if scan.forward.softplus {
                delta = math::softplus(s, delta);
            }
            let x = load(s, inputs.x.at::<f32>(token, channel), lanes);
            let input = s.mul(delta, x);
            let mut y = s.mul(per_channel(s, inputs.d, channel, lanes, 0.0), x);
            let near = s.lt(s.mul(s.abs(delta), largest), s.splat(NEAR));
            let near = s.reduce_max(s.select(near, s.zero(), s.splat(1.0))) == 0.0;
            let b = inputs.b.at::<f32>(token, self.block.column);
            let c = inputs.c.at::<f32>(token, self.block.column);
            for n in 0..scan.forward.shape.d_state {
                let column = n * inputs.x.cols + channel;
                let state = scan.states.at::<f32>(segment, column);
                let h = match scan.initial {
                    Some(initial) => {
                        let from = initial.at::<f32>(segment, column);
                        prefetch(from.wrapping_add(AHEAD));
                        load(s, from, lanes)
                    }
                    None => s.zero(),
                };
                let a = s.load(a.add(n * S::LANES));
                let decay = if near { decay_near(s, delta, a) } else { decay(s, delta, a) };
                let h = s.fma(decay, h, s.mul(input, s.splat(*b.add(n))));
                y = s.fma(s.splat(*c.add(n)), h, y);
                store(s, state, h, lanes);
            }
            if let Some(out) = scan.y {
                if let Some(z) = inputs.z {
                    y = s.mul(y, math::silu(s, load(s, z.at::<f32>(token, channel), lanes)));
                }
                store(s, out.at::<f32>(token, channel), y, lanes);
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, v: usize) -> Tile {
        let coefficients = Coefficients::values_a_channel(self.scan.forward) * BLOCK;
        // SAFETY: `scratch_len` has room for three tiles of all vectors of a block after the coefficients.
        unsafe {
            let delta = self.scratch.add(coefficients + v * TILE * S::LANES);
            let largest = self.scratch.add(coefficients + 3 * TILE * BLOCK + v * S::LANES);
            Tile { delta, input: delta.add(TILE * BLOCK), y: delta.add(2 * TILE * BLOCK), largest }
        }
    }

    /// Room for the decays of a tile: those of a step one after another.
    #[inline(always)]
    fn decays(&self) -> *mut f32 {
        // SAFETY: `scratch_len` has room for them at the end.
        unsafe { self.scratch.add((Coefficients::values_a_channel(self.scan.forward) + 3 * TILE + 1) * BLOCK) }
    }

    /// Computes Δ, the input and D·x of a vector's part of a tile.
    ///
    /// # Safety
    /// The rows lie in the operands; the slot's scratch memory is this task's.
    #[inline(always)]
    unsafe fn load_tile<S: Simd, const ZOH: bool>(&self, s: S, v: usize, first: usize, steps: usize) {
        let inputs = &self.scan.inputs;
        let (channel, lanes) = self.block.vector::<S>(v);
        let tile = self.tile::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let skip = per_channel(s, inputs.d, channel, lanes, 0.0);
            let (mut largest, mut rest) = (s.zero(), s.zero());
            for t in (0..steps).step_by(2) {
                // Two steps at a time; at an odd end the last one twice.
                let steps = [t, (t + 1).min(steps - 1)];
                let mut delta = [
                    biased_dt(s, inputs, first + steps[0], channel, lanes),
                    biased_dt(s, inputs, first + steps[1], channel, lanes),
                ];
                if self.scan.forward.softplus {
                    delta = math::softplus(Twice(s), delta);
                }
                for (t, delta) in steps.into_iter().zip(delta) {
                    largest = s.max(s.abs(delta), largest);
                    rest = s.fma(delta, s.zero(), rest);
                    let x = load(s, inputs.x.at::<f32>(first + t, channel), lanes);
                    s.store(tile.delta.add(t * S::LANES), delta);
                    s.store(tile.input.add(t * S::LANES), if ZOH { x } else { s.mul(delta, x) });
                    s.store(tile.y.add(t * S::LANES), s.mul(skip, x));
                }
            }
            s.store(tile.largest, s.add(largest, rest));
        }
    }

    /// Writes a vector's part of a tile of y, gated if there is a gate.
    ///
    /// # Safety
    /// As [`Walk::load_tile`]; no other task writes these rows and channels of y.
    #[inline(always)]
    unsafe fn store_tile<S: Simd>(&self, s: S, v: usize, first: usize, steps: usize, y: Mat) {
        let (channel, lanes) = self.block.vector::<S>(v);
        let tile = self.tile::<S>(v);
        for t in (0..steps).step_by(2) {
            // Two steps at a time; at an odd end the last one twice.
            let steps = [t, (t + 1).min(steps - 1)];
            // SAFETY: as the caller says.
            unsafe {
                let mut values = [s.load(tile.y.add(steps[0] * S::LANES)), s.load(tile.y.add(steps[1] * S::LANES))];
                if let Some(z) = self.scan.inputs.z {
                    let z = [
                        load(s, z.at::<f32>(first + steps[0], channel), lanes),
                        load(s, z.at::<f32>(first + steps[1], channel), lanes),
                    ];
                    values = Twice(s).mul(values, math::silu(Twice(s), z));
                }
                for (t, value) in steps.into_iter().zip(values) {
                    store(s, y.at::<f32>(first + t, channel), value, lanes);
                }
            }
        }
    }
}

/// A vector of channels on its way through a tile.
struct Advance<'a, 'b> {
    walk: &'a Walk<'b>,
    v: usize,
    first: usize,
    steps: usize,
    segment: usize,
    /// Where the states are before the tile; zero if nowhere.
    from: Option<Mat>,
    /// Where to keep those states for the gradient, too.
    keep: Option<Mat>,
    keep_row: usize,
}

impl Advance<'_, '_> {
    /// Walks through the tile with the states `n .. n + COUNT`.
    ///
    /// # Safety
    /// The tile is loaded; no other task uses these channels of the states.
    #[inline(always)]
    unsafe fn run<S: Simd, const ZOH: bool, const COUNT: usize>(&self, s: S, n: usize) {
        let scan = self.walk.scan;
        let (channel, lanes) = self.walk.block.vector::<S>(self.v);
        let state_col = |i: usize| (n + i) * scan.inputs.x.cols + channel;
        let tile = self.walk.tile::<S>(self.v);
        let column = self.walk.block.column + n;
        // SAFETY: the builder checked the shapes, and rows, states and channels lie inside them.
        unsafe {
            let all = Coefficients::of::<S, ZOH>(self.walk.scratch, self.v, scan.forward.shape.d_state);
            let a = all.at_state::<S>(n);
            let mut h = [s.zero(); COUNT];
            for (i, h) in h.iter_mut().enumerate() {
                if let Some(from) = self.from {
                    *h = load(s, from.at::<f32>(self.segment, state_col(i)), lanes);
                }
                if let Some(keep) = self.keep {
                    store(s, keep.at::<f32>(self.keep_row, state_col(i)), *h, lanes);
                }
            }
            let decays = self.walk.decays();
            if !ZOH {
                let largest = s.load(tile.largest);
                for i in 0..COUNT {
                    let a = s.load(a.scaled.add(i * S::LANES));
                    let to = (decays.add(i * S::LANES), COUNT);
                    decay_steps(s, a, largest, self.steps, (tile.delta.cast_const(), 1), to);
                }
            }
            for t in 0..self.steps {
                let input = s.load(tile.input.add(t * S::LANES));
                let mut y = s.load(tile.y.add(t * S::LANES));
                let b = scan.inputs.b.at::<f32>(self.first + t, column);
                let c = scan.inputs.c.at::<f32>(self.first + t, column);
                for (i, h) in h.iter_mut().enumerate() {
                    let b = s.splat(*b.add(i));
                    if ZOH {
                        let delta = s.load(tile.delta.add(t * S::LANES));
                        let (decay, m1) = exp2_and_m1(s, s.mul(delta, s.load(a.scaled.add(i * S::LANES))));
                        let (inverse, at_limit) = (a.inverse.add(i * S::LANES), a.at_limit.add(i * S::LANES));
                        let factor = zoh_factor(s, m1, delta, s.load(inverse), s.load(at_limit));
                        *h = s.fma(decay, *h, s.mul(s.mul(factor, input), b));
                    } else {
                        let decay = s.load(decays.add((t * COUNT + i) * S::LANES));
                        *h = s.fma(decay, *h, s.mul(input, b));
                    }
                    y = s.fma(s.splat(*c.add(i)), *h, y);
                }
                s.store(tile.y.add(t * S::LANES), y);
            }
            for (i, &h) in h.iter().enumerate() {
                store(s, scan.states.at::<f32>(self.segment, state_col(i)), h, lanes);
            }
        }
    }
}

/// Writes the decays 2^(Δ·A) of some steps of a vector of channels and one state. Between steps lie `delta.1` and `to.1`
/// vectors. `largest` is the largest |Δ| of each channel, NaN where one is not finite.
///
/// # Safety
/// Δ has a vector for each step, and there is room for the decays.
#[inline(always)]
pub(super) unsafe fn decay_steps<S: Simd>(
    s: S,
    a: S::V,
    largest: S::V,
    steps: usize,
    delta: (*const f32, usize),
    to: (*mut f32, usize),
) {
    let near = s.lt(s.mul(largest, s.abs(a)), s.splat(NEAR));
    let all_near = s.reduce_max(s.select(near, s.zero(), s.splat(1.0))) == 0.0;
    let (from, to, from_step, to_step) = (delta.0, to.0, delta.1 * S::LANES, to.1 * S::LANES);
    // No closures here: one that is not inlined loses its vector instructions.
    let (four, a_four) = (Twice(Twice(s)), [[a; 2]; 2]);
    // SAFETY: as the caller says.
    unsafe {
        let mut t = 0;
        if all_near {
            while t + 4 <= steps {
                let (from, to) = (from.add(t * from_step), to.add(t * to_step));
                let low = [s.load(from), s.load(from.add(from_step))];
                let high = [s.load(from.add(2 * from_step)), s.load(from.add(3 * from_step))];
                let [low, high] = decay_near(four, [low, high], a_four);
                s.store(to, low[0]);
                s.store(to.add(to_step), low[1]);
                s.store(to.add(2 * to_step), high[0]);
                s.store(to.add(3 * to_step), high[1]);
                t += 4;
            }
        }
        while t < steps {
            s.store(to.add(t * to_step), decay(s, s.load(from.add(t * from_step)), a));
            t += 1;
        }
    }
}
