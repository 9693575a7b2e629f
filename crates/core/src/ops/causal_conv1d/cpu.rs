//! The forward kernel: a task walks through the segments of a group with a block of channels.
//!
//! A segment's final state is written after its outputs, by the same task, so it may replace the initial state.

use std::ops::Range;

use super::{BIAS, Forward, INITIAL_STATE, SEGMENTS, WEIGHT, X};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots, transpose_rows, vectors};
use crate::ops::vectors::{each, load, store};

/// Channels of a task, whole vectors at every level: 512 bytes of a row.
const BLOCK: usize = 128;

pub(super) fn workspace(forward: &Forward, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), forward.width * BLOCK)
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(forward.width, io);
    let scratch = Scratch::new(io.workspace()).take(cpu.pool.threads(), forward.width * BLOCK);
    let (y, final_state) = (io.optional_output(0), io.optional_output(1));
    let blocks = ChannelBlocks::new(inputs.x.cols, 1, BLOCK);
    let groups = SegmentGroups::new(inputs.segments.len(), blocks.count());
    run_with_slots(&cpu.pool, groups.count() * blocks.count(), |slot, task| {
        let (_, channels) = blocks.block(task % blocks.count());
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        let filters = Filters { inputs: &inputs, first: channels.start, count: channels.len(), taps: scratch };
        let segments = groups.segments(task / blocks.count());
        cpu.isa.run(Walk { filters, segments, silu: forward.silu, y, final_state });
    });
    if let Some(y) = y {
        inputs.segments.clear_rest(y);
    }
}

/// The operands that the forward pass and its repetition in the gradient read.
pub(super) struct Inputs<'a> {
    pub width: usize,
    pub x: Mat,
    pub weight: Mat,
    pub bias: Option<Mat>,
    pub initial: Option<Mat>,
    pub segments: Segments<'a>,
}

impl<'a> Inputs<'a> {
    pub fn new(width: usize, io: &'a Io<'_>) -> Inputs<'a> {
        let x = io.input(X);
        Inputs {
            width,
            x,
            weight: io.input(WEIGHT),
            bias: io.optional_input(BIAS),
            initial: io.optional_input(INITIAL_STATE),
            segments: Segments::new(io.segments(SEGMENTS), x.rows),
        }
    }

    /// A vector of one segment's inputs, counted from the oldest one of its initial state: `position` W−1 is the
    /// segment's first row.
    ///
    /// # Safety
    /// The position lies in the segment or its state; `lanes` channels follow `channel`.
    #[inline(always)]
    pub unsafe fn at<S: Simd>(&self, s: S, segment: usize, position: usize, channel: usize, lanes: usize) -> S::V {
        // SAFETY: the caller vouches for position and channels.
        unsafe {
            if position + 1 >= self.width {
                let row = self.segments.rows(segment).start + position + 1 - self.width;
                load(s, self.x.at::<f32>(row, channel), lanes)
            } else {
                let col = position * self.x.cols + channel;
                self.initial.map_or(s.zero(), |m| load(s, m.at::<f32>(segment, col), lanes))
            }
        }
    }
}

/// The filters of a block of channels.
#[derive(Clone, Copy)]
pub(super) struct Filters<'a> {
    pub inputs: &'a Inputs<'a>,
    /// The first channel.
    pub first: usize,
    /// Their number.
    pub count: usize,
    /// Room for W values of each channel, rounded up to whole vectors.
    pub taps: *mut f32,
}

impl Filters<'_> {
    /// The first channel and the number of channels of vector `v`.
    #[inline(always)]
    pub fn vector<S: Simd>(&self, v: usize) -> (usize, usize) {
        (self.first + v * S::LANES, S::LANES.min(self.count - v * S::LANES))
    }

    /// Puts the channels side by side: W vectors for each vector of the block.
    ///
    /// # Safety
    /// The channels lie in the weight, and `taps` has the room it says.
    #[inline(always)]
    pub unsafe fn prepare<S: Simd>(&self, s: S) {
        for v in 0..vectors::<S>(self.count) {
            let (channel, lanes) = self.vector::<S>(v);
            // SAFETY: as the caller says.
            unsafe { transpose_rows(s, self.inputs.weight, channel, lanes, self.of::<S>(v)) }
        }
    }

    /// The taps of vector `v`.
    ///
    /// # Safety
    /// `v` is a vector of the block.
    #[inline(always)]
    pub unsafe fn of<S: Simd>(&self, v: usize) -> *mut f32 {
        // SAFETY: inside the room for the taps.
        unsafe { self.taps.add(v * self.inputs.width * S::LANES) }
    }

    /// The sum before the activation for vector `v` at step `t` of a segment. `W` is the filters' width, or 0 for any.
    ///
    /// # Safety
    /// The step lies in the segment, `v` in the block, and the filters are prepared.
    #[inline(always)]
    pub unsafe fn sum<S: Simd, const W: usize>(&self, s: S, segment: usize, t: usize, v: usize) -> S::V {
        let inputs = self.inputs;
        let width = if W > 0 { W } else { inputs.width };
        let (channel, lanes) = self.vector::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let taps = self.of::<S>(v);
            let mut sum = inputs.bias.map_or(s.zero(), |m| load(s, m.at::<f32>(0, channel), lanes));
            if t + 1 >= width {
                let oldest = inputs.segments.rows(segment).start + t + 1 - width;
                for k in 0..width {
                    let x = load(s, inputs.x.at::<f32>(oldest + k, channel), lanes);
                    sum = s.fma(s.load(taps.add(k * S::LANES)), x, sum);
                }
            } else {
                for k in 0..width {
                    let x = inputs.at(s, segment, t + k, channel, lanes);
                    sum = s.fma(s.load(taps.add(k * S::LANES)), x, sum);
                }
            }
            sum
        }
    }
}

/// One task.
struct Walk<'a> {
    filters: Filters<'a>,
    segments: Range<usize>,
    silu: bool,
    y: Option<Mat>,
    final_state: Option<Mat>,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: the builder checked the shapes; this task alone has these channels of these segments.
        unsafe {
            self.filters.prepare(s);
            match self.filters.inputs.width {
                4 => self.walk::<S, 4>(s),
                _ => self.walk::<S, 0>(s),
            }
        }
    }
}

impl Walk<'_> {
    /// # Safety
    /// This task alone has these channels of these segments; the filters are prepared.
    #[inline(always)]
    unsafe fn walk<S: Simd, const W: usize>(&self, s: S) {
        for segment in self.segments.clone() {
            let rows = self.filters.inputs.segments.rows(segment);
            if let Some(y) = self.y {
                for t in 0..rows.len() {
                    if W > 0 && t + 1 >= W {
                        // SAFETY: as the caller says.
                        unsafe { self.row::<S, W>(s, rows.start + t, y) };
                        continue;
                    }
                    for v in 0..vectors::<S>(self.filters.count) {
                        let (channel, lanes) = self.filters.vector::<S>(v);
                        // SAFETY: as the caller says.
                        unsafe {
                            let sum = self.filters.sum::<S, W>(s, segment, t, v);
                            let value = if self.silu { math::silu(s, sum) } else { sum };
                            store(s, y.at::<f32>(rows.start + t, channel), value, lanes);
                        }
                    }
                }
            }
            if let Some(states) = self.final_state {
                // SAFETY: as the caller says.
                unsafe { self.keep(s, segment, rows.len(), states) };
            }
        }
    }

    /// Row `row` of y, whose W inputs all lie in the segment.
    ///
    /// # Safety
    /// As [`Walk::walk`].
    #[inline(always)]
    unsafe fn row<S: Simd, const W: usize>(&self, s: S, row: usize, y: Mat) {
        let Filters { inputs, first, count, taps } = self.filters;
        // SAFETY: as the caller says; the taps of a vector follow those of the one before.
        unsafe {
            let mut x = [std::ptr::null(); W];
            for (k, x) in x.iter_mut().enumerate() {
                *x = inputs.x.at::<f32>(row + 1 + k - W, first).cast_const();
            }
            let bias = inputs.bias.map(|m| m.at::<f32>(0, first).cast_const());
            let (y, silu) = (y.at::<f32>(row, first), self.silu);
            each(s, count, |i, lanes| {
                let mut sum = bias.map_or(s.zero(), |bias| load(s, bias.add(i), lanes));
                for (k, x) in x.iter().enumerate() {
                    sum = s.fma(s.load(taps.add(i * W + k * S::LANES)), load(s, x.add(i), lanes), sum);
                }
                store(s, y.add(i), if silu { math::silu(s, sum) } else { sum }, lanes);
            });
        }
    }

    /// Writes the final state. Over the initial one, too: oldest input first, each is read before it is replaced.
    ///
    /// # Safety
    /// As [`Walk::walk`].
    #[inline(always)]
    unsafe fn keep<S: Simd>(&self, s: S, segment: usize, length: usize, states: Mat) {
        let inputs = self.filters.inputs;
        for j in 0..inputs.width - 1 {
            for v in 0..vectors::<S>(self.filters.count) {
                let (channel, lanes) = self.filters.vector::<S>(v);
                // SAFETY: as the caller says.
                unsafe {
                    let value = inputs.at(s, segment, length + j, channel, lanes);
                    store(s, states.at::<f32>(segment, j * inputs.x.cols + channel), value, lanes);
                }
            }
        }
    }
}
