//! The forward kernel: a task walks through the segments of a group with a block of channels, a vector of them at a time.
//!
//! The coefficients of a vector are copied together once, pair after pair, and the states lie beside them, so that a step
//! reads both from the first-level cache in order. Where the transition has a part of rank one, the sum that it needs at
//! the next step is formed in the same pass over the states.

use std::ops::Range;

use super::{A, B, C, D, Forward, INITIAL_STATE, SEGMENTS, U, V, X, chunk_len, chunk_row};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots, vectors};
use crate::ops::vectors::{load, store};

/// Channels of a task, whole vectors at every level: 256 bytes of a row.
pub(super) const BLOCK: usize = 64;
/// Steps that a vector of channels takes before the next one does: their rows stay in the cache. Divides every chunk.
const TILE: usize = 32;

/// Numbers a channel of the coefficients and of the states.
fn numbers(forward: &Forward) -> usize {
    2 * forward.pairs * (forward.coefficients() + 1)
}

pub(super) fn workspace(forward: &Forward, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), numbers(forward) * BLOCK)
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let segments = Segments::new(io.segments(SEGMENTS), inputs.x.rows);
    let scratch = Scratch::new(io.workspace()).take(cpu.pool.threads(), numbers(forward) * BLOCK);
    let scan = Scan {
        forward,
        inputs,
        segments,
        initial: io.optional_input(INITIAL_STATE),
        y: io.optional_output(0),
        last: io.optional_output(1),
        chunk_states: io.optional_output(2),
    };
    let blocks = ChannelBlocks::new(inputs.x.cols, 1, BLOCK);
    let groups = SegmentGroups::new(segments.len(), blocks.count());
    run_with_slots(&cpu.pool, groups.count() * blocks.count(), |slot, task| {
        let (_, channels) = blocks.block(task % blocks.count());
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        cpu.isa.run(Walk { scan: &scan, channels, segments: groups.segments(task / blocks.count()), scratch });
    });
    if let Some(y) = scan.y {
        segments.clear_rest(y);
    }
}

/// The operands that the forward pass and its repetition in the gradient read.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub x: Mat,
    /// ā, b̄, c, u, v.
    pub coefficients: [Option<Mat>; 5],
    pub d: Option<Mat>,
}

impl Inputs {
    pub fn new(io: &Io<'_>) -> Inputs {
        let coefficients = [A, B, C, U, V].map(|i| io.optional_input(i));
        Inputs { x: io.input(X), coefficients, d: io.optional_input(D) }
    }

    /// Copies the coefficients of `lanes` channels from `channel` on to `to`: for each pair two vectors a coefficient.
    ///
    /// # Safety
    /// The channels exist; there is room.
    #[inline(always)]
    pub unsafe fn pack<S: Simd>(&self, s: S, (channel, lanes): (usize, usize), to: *mut f32) {
        let given = self.coefficients.iter().flatten().count();
        for (k, m) in self.coefficients.iter().flatten().enumerate() {
            for row in 0..m.rows {
                let place = (row / 2 * given + k) * 2 + row % 2;
                // SAFETY: as the caller says.
                unsafe { s.store(to.add(place * S::LANES), load(s, m.at::<f32>(row, channel), lanes)) }
            }
        }
    }
}

/// The `lanes` channels from `channel` on of a row of states, as vectors one after another at `at`.
///
/// # Safety
/// The row has these channels for every pair; there is room for all vectors; no other task uses them.
#[inline(always)]
pub(super) unsafe fn load_states<S: Simd>(
    s: S,
    m: Option<Mat>,
    row: usize,
    (channels, pairs): (usize, usize),
    (channel, lanes): (usize, usize),
    at: *mut f32,
) {
    for n in 0..2 * pairs {
        // SAFETY: as the caller says.
        unsafe {
            let h = m.map_or(s.zero(), |m| load(s, m.at::<f32>(row, n * channels + channel), lanes));
            s.store(at.add(n * S::LANES), h);
        }
    }
}

/// The inverse of [`load_states`].
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn store_states<S: Simd>(
    s: S,
    m: Option<Mat>,
    row: usize,
    (channels, pairs): (usize, usize),
    (channel, lanes): (usize, usize),
    at: *const f32,
) {
    let Some(m) = m else { return };
    for n in 0..2 * pairs {
        // SAFETY: as the caller says.
        unsafe { store(s, m.at::<f32>(row, n * channels + channel), s.load(at.add(n * S::LANES)), lanes) }
    }
}

/// 2 Re(row · h) from the sums of both products, which are chains of their own.
#[inline(always)]
fn twice_real<S: Simd>(s: S, (re, im): (S::V, S::V)) -> S::V {
    let difference = s.sub(re, im);
    s.add(difference, difference)
}

/// w = 2 Re(v · h), in the order in which [`step`] forms it.
///
/// # Safety
/// `coefficients` and `h` hold those of `pairs` pairs.
#[inline(always)]
pub(super) unsafe fn rank_one_sum<S: Simd>(s: S, coefficients: *const f32, h: *const f32, pairs: usize) -> S::V {
    let mut w = (s.zero(), s.zero());
    for m in 0..pairs {
        // SAFETY: as the caller says.
        unsafe {
            let at = |i: usize| s.load(coefficients.add((m * 10 + i) * S::LANES));
            w.0 = s.fma(at(8), s.load(h.add(2 * m * S::LANES)), w.0);
            w.1 = s.fma(at(9), s.load(h.add((2 * m + 1) * S::LANES)), w.1);
        }
    }
    twice_real(s, w)
}

/// One step of a vector of channels: the states at `from` become those at `to`, which may be the same. `w` is
/// [`rank_one_sum`] of `from`. Returns 2 Re(c · h) and w of the new states.
///
/// # Safety
/// As [`rank_one_sum`]; `to` has room.
#[inline(always)]
pub(super) unsafe fn step<S: Simd, const RANK_ONE: bool>(
    s: S,
    coefficients: *const f32,
    pairs: usize,
    (x, w): (S::V, S::V),
    (from, to): (*const f32, *mut f32),
) -> (S::V, S::V) {
    let each = if RANK_ONE { 10 } else { 6 };
    let (mut y, mut next) = ((s.zero(), s.zero()), (s.zero(), s.zero()));
    for m in 0..pairs {
        // SAFETY: as the caller says.
        unsafe {
            let at = |i: usize| s.load(coefficients.add((m * each + i) * S::LANES));
            let (h_re, h_im) = (s.load(from.add(2 * m * S::LANES)), s.load(from.add((2 * m + 1) * S::LANES)));
            let (a_re, a_im) = (at(0), at(1));
            let (mut re, mut im) = (s.mul(at(2), x), s.mul(at(3), x));
            if RANK_ONE {
                (re, im) = (s.fma(at(6), w, re), s.fma(at(7), w, im));
            }
            re = s.fma(s.neg(a_im), h_im, s.fma(a_re, h_re, re));
            im = s.fma(a_im, h_re, s.fma(a_re, h_im, im));
            s.store(to.add(2 * m * S::LANES), re);
            s.store(to.add((2 * m + 1) * S::LANES), im);
            y = (s.fma(at(4), re, y.0), s.fma(at(5), im, y.1));
            if RANK_ONE {
                next = (s.fma(at(8), re, next.0), s.fma(at(9), im, next.1));
            }
        }
    }
    (twice_real(s, y), twice_real(s, next))
}

struct Scan<'a> {
    forward: &'a Forward,
    inputs: Inputs,
    segments: Segments<'a>,
    initial: Option<Mat>,
    y: Option<Mat>,
    last: Option<Mat>,
    chunk_states: Option<Mat>,
}

/// One task.
struct Walk<'a> {
    scan: &'a Scan<'a>,
    channels: Range<usize>,
    segments: Range<usize>,
    scratch: *mut f32,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.scan.forward.rank_one { self.walk::<S, true>(s) } else { self.walk::<S, false>(s) }
    }
}

impl Walk<'_> {
    #[inline(always)]
    fn walk<S: Simd, const RANK_ONE: bool>(&self, s: S) {
        let scan = self.scan;
        let (pairs, chunk) = (scan.forward.pairs, chunk_len(scan.forward.pairs));
        let shape = (scan.inputs.x.cols, pairs);
        let each = 2 * pairs * scan.forward.coefficients() * S::LANES;
        let count = vectors::<S>(self.channels.len());
        let vector = |v: usize| {
            let channel = self.channels.start + v * S::LANES;
            (channel, S::LANES.min(self.channels.end - channel))
        };
        // SAFETY: the scratch memory holds `numbers` values a channel of a block: coefficients, then states.
        let (coefficients, states) = unsafe { (self.scratch, self.scratch.add(count * each)) };
        let coefficients_of = |v: usize| coefficients.wrapping_add(v * each);
        let states_of = |v: usize| states.wrapping_add(v * 2 * pairs * S::LANES);
        for v in 0..count {
            // SAFETY: the builder checked the shapes.
            unsafe { scan.inputs.pack(s, vector(v), coefficients_of(v)) };
        }
        for segment in self.segments.clone() {
            let rows = scan.segments.rows(segment);
            for v in 0..count {
                // SAFETY: as above, and this task alone has these channels of this segment.
                unsafe { load_states(s, scan.initial, segment, shape, vector(v), states_of(v)) };
            }
            for first in rows.clone().step_by(TILE) {
                let done = first - rows.start;
                let keep = scan.chunk_states.filter(|_| done.is_multiple_of(chunk));
                let keep_row = chunk_row(pairs, segment, rows.start, done / chunk);
                for v in 0..count {
                    let (channel, lanes) = vector(v);
                    let (coefficients, h) = (coefficients_of(v), states_of(v));
                    // SAFETY: rows and channels lie in the operands, and this task alone writes them.
                    unsafe {
                        store_states(s, keep, keep_row, shape, (channel, lanes), h);
                        let skip = scan.inputs.d.map_or(s.zero(), |d| load(s, d.at::<f32>(0, channel), lanes));
                        let mut w = s.zero();
                        if RANK_ONE {
                            w = rank_one_sum(s, coefficients, h, pairs);
                        }
                        for t in first..rows.end.min(first + TILE) {
                            let x = load(s, scan.inputs.x.at::<f32>(t, channel), lanes);
                            let (sum, next) = step::<S, RANK_ONE>(s, coefficients, pairs, (x, w), (h, h));
                            w = next;
                            if let Some(y) = scan.y {
                                store(s, y.at::<f32>(t, channel), s.fma(skip, x, sum), lanes);
                            }
                        }
                    }
                }
            }
            for v in 0..count {
                // SAFETY: as above.
                unsafe { store_states(s, scan.last, segment, shape, vector(v), states_of(v)) };
            }
        }
    }
}
