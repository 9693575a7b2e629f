//! The forward kernel: a task computes some rows, whole ones, since rows follow each other in memory.
//!
//! Final states are written after all outputs, so they may replace the initial ones.

use std::ops::Range;

use super::{BIAS, Forward, INITIAL_STATE, SEGMENTS, WEIGHT, X};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{Simd, Twice};
use crate::graph::{Io, Mat};
use crate::ops::tasks::{Scratch, Segments, run_with_slots, transpose_rows, vectors};
use crate::ops::vectors::{each, load, store};

/// Rows of a task.
const ROWS: usize = 64;
/// Taps that are multiplied in one pass over a row.
const TAPS: usize = 4;
/// Elements of states that one task writes, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

pub(super) fn workspace(forward: &Forward, channels: usize, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), (forward.width + 1) * channels)
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(forward.width, io);
    let (rows, channels) = (inputs.x.rows, inputs.x.cols);
    let scratch = Scratch::new(io.workspace()).take(cpu.pool.threads(), (forward.width + 1) * channels);
    if let Some(y) = io.optional_output(0) {
        run_with_slots(&cpu.pool, rows.div_ceil(ROWS), |slot, task| {
            // SAFETY: no other task uses the slot's row meanwhile.
            let taps = unsafe { scratch.row_mut::<f32>(slot) };
            let rows = task * ROWS..((task + 1) * ROWS).min(rows);
            cpu.isa.run(Rows { inputs: &inputs, silu: forward.silu, taps, y, rows });
        });
        inputs.segments.clear_rest(y);
    }
    if let Some(states) = io.optional_output(1) {
        let each = (ELEMENTS_PER_TASK / (forward.width * channels).max(1)).max(1);
        cpu.pool.chunks(inputs.segments.len(), each, |segments| {
            segments.for_each(|segment| cpu.isa.run(Keep { inputs: &inputs, segment, states }));
        });
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

/// Some rows of y.
struct Rows<'a> {
    inputs: &'a Inputs<'a>,
    silu: bool,
    /// Room for W values of each channel, and for zeros.
    taps: &'a mut [f32],
    y: Mat,
    rows: Range<usize>,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (inputs, channels) = (self.inputs, self.inputs.x.cols);
        let (taps, zeros) = self.taps.split_at_mut(inputs.width * channels);
        zeros.fill(0.0);
        for channel in 0..channels {
            // SAFETY: the builder checked the shape of the weight.
            let weight = unsafe { inputs.weight.row::<f32>(channel) };
            weight.iter().enumerate().for_each(|(k, &tap)| taps[k * channels + channel] = tap);
        }
        for row in self.rows {
            let Some(segment) = inputs.segments.of(row) else { continue };
            let start = inputs.segments.rows(segment).start;
            // SAFETY: inputs of the row lie in the segment, its initial state or the zeros; this task alone writes it.
            unsafe {
                let input = |k: usize| match (row + k + 1).checked_sub(start + inputs.width) {
                    Some(t) => inputs.x.at::<f32>(start + t, 0).cast_const(),
                    None => {
                        let col = (row - start + k) * channels;
                        inputs.initial.map_or(zeros.as_ptr(), |m| m.at::<f32>(segment, col).cast_const())
                    }
                };
                let y = self.y.at::<f32>(row, 0);
                let mut sums = inputs.bias.map(|m| m.at::<f32>(0, 0).cast_const());
                for first in (0..inputs.width).step_by(TAPS) {
                    let silu = self.silu && first + TAPS >= inputs.width;
                    let pass = Pass { channels, taps: taps.as_ptr().add(first * channels), sums, silu, y };
                    match inputs.width - first {
                        1 => pass.run(s, [input(first)]),
                        2 => pass.run(s, [0, 1].map(|k| input(first + k))),
                        3 => pass.run(s, [0, 1, 2].map(|k| input(first + k))),
                        _ => pass.run(s, [0, 1, 2, 3].map(|k| input(first + k))),
                    }
                    sums = Some(y.cast_const());
                }
            }
        }
    }
}

/// The part of a row's sums that a few taps contribute.
struct Pass {
    channels: usize,
    /// The taps, each a row of all channels.
    taps: *const f32,
    /// What the sums start from, 0 if nothing.
    sums: Option<*const f32>,
    /// Whether the activation follows.
    silu: bool,
    y: *mut f32,
}

impl Pass {
    /// # Safety
    /// Everything has a value for each channel, and nobody else uses y.
    #[inline(always)]
    unsafe fn run<S: Simd, const K: usize>(self, s: S, x: [*const f32; K]) {
        let s = Twice(s);
        each(s, self.channels, |i, lanes| {
            // SAFETY: as the caller says.
            unsafe {
                let mut sum = self.sums.map_or(s.zero(), |sums| load(s, sums.add(i), lanes));
                for (k, x) in x.iter().enumerate() {
                    let tap = load(s, self.taps.add(k * self.channels + i), lanes);
                    sum = s.fma(tap, load(s, x.add(i), lanes), sum);
                }
                store(s, self.y.add(i), if self.silu { math::silu(s, sum) } else { sum }, lanes);
            }
        });
    }
}

/// Writes the final state of a segment. Over the initial one, too: oldest input first, each is read before it is
/// replaced.
struct Keep<'a> {
    inputs: &'a Inputs<'a>,
    segment: usize,
    states: Mat,
}

impl Kernel for Keep<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (inputs, channels) = (self.inputs, self.inputs.x.cols);
        let length = inputs.segments.rows(self.segment).len();
        for j in 0..inputs.width - 1 {
            each(s, channels, |i, lanes| {
                // SAFETY: the position lies in the segment or its initial state; this task alone has the final one.
                unsafe {
                    let value = inputs.at(s, self.segment, length + j, i, lanes);
                    store(s, self.states.at::<f32>(self.segment, j * channels + i), value, lanes);
                }
            });
        }
    }
}
