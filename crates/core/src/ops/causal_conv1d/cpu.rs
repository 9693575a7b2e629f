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
use crate::ops::tasks::{Scratch, Segments, run_with_slots};
use crate::ops::vectors::{load, store};

/// Rows of a task.
const ROWS: usize = 64;
/// Taps that are multiplied in one pass over a row.
pub(super) const TAPS: usize = 4;
/// Elements of states that one task writes, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

pub(super) fn workspace(forward: &Forward, channels: usize, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), Filters::len(forward.width, channels))
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(forward.width, io);
    let (rows, channels) = (inputs.x.rows, inputs.x.cols);
    let scratch = Scratch::new(io.workspace()).take(cpu.pool.threads(), Filters::len(forward.width, channels));
    if let Some(y) = io.optional_output(0) {
        run_with_slots(&cpu.pool, rows.div_ceil(ROWS), |slot, task| {
            // SAFETY: no other task uses the slot's row meanwhile.
            let memory = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
            let rows = task * ROWS..((task + 1) * ROWS).min(rows);
            cpu.isa.run(Rows { inputs: &inputs, silu: forward.silu, memory, y, rows });
        });
        inputs.segments.clear_rest(y);
    }
    if let Some(states) = io.optional_output(1) {
        let each = (ELEMENTS_PER_TASK / (forward.width * channels).max(1)).max(1);
        cpu.pool.chunks(inputs.segments.len(), each, |segments| {
            // SAFETY: this task alone has these states.
            segments.for_each(|segment| unsafe { inputs.keep(segment, states) });
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

    /// Writes the final state of a segment. Over the initial one, too: oldest input first, each is read before it is
    /// replaced.
    ///
    /// # Safety
    /// Nobody else uses these states.
    unsafe fn keep(&self, segment: usize, states: Mat) {
        let (rows, channels) = (self.segments.rows(segment), self.x.cols);
        for j in 0..self.width - 1 {
            // SAFETY: the builder checked the shapes; the row lies in the segment.
            unsafe {
                let to = states.at::<f32>(segment, j * channels);
                let from = match (rows.len() + j + 1).checked_sub(self.width) {
                    Some(t) => Some(self.x.at::<f32>(rows.start + t, 0)),
                    None => self.initial.map(|m| m.at::<f32>(segment, (rows.len() + j) * channels)),
                };
                match from {
                    // The state in its own place is copied onto itself where the segment is empty.
                    Some(from) => std::ptr::copy(from, to, channels),
                    None => std::slice::from_raw_parts_mut(to, channels).fill(0.0),
                }
            }
        }
    }
}

/// The filters of some neighbouring channels, a row of taps for each position.
#[derive(Clone, Copy)]
pub(super) struct Filters {
    /// The first channel.
    pub first: usize,
    /// Their number.
    pub count: usize,
    /// Tap k of all channels is row k, `count` values; a row of zeros follows.
    taps: *const f32,
}

/// What becomes of a sum over taps.
#[derive(Clone, Copy)]
pub(super) enum Then {
    Nothing,
    Silu,
    /// The derivative of SiLU, times these values.
    Slope(*const f32),
}

impl Filters {
    /// Values of memory that the filters of `count` channels need.
    pub const fn len(width: usize, count: usize) -> usize {
        (width + 1) * count
    }

    /// Puts the filters of `count` channels from `first` on side by side.
    ///
    /// # Safety
    /// The channels lie in the weight; `memory` has room for [`Filters::len`] values and belongs to the filters.
    pub unsafe fn new(inputs: &Inputs<'_>, first: usize, count: usize, memory: *mut f32) -> Filters {
        // SAFETY: as the caller says.
        unsafe {
            for channel in 0..count {
                let weight = inputs.weight.row::<f32>(first + channel);
                weight.iter().enumerate().for_each(|(k, &tap)| *memory.add(k * count + channel) = tap);
            }
            std::slice::from_raw_parts_mut(memory.add(inputs.width * count), count).fill(0.0);
        }
        Filters { first, count, taps: memory }
    }

    /// The channels of a segment's input at `position`, counted from the oldest one of its initial state: `position`
    /// W−1 is the segment's first row.
    ///
    /// # Safety
    /// The position lies in the segment or its state.
    #[inline(always)]
    pub unsafe fn input(&self, inputs: &Inputs<'_>, segment: usize, position: usize) -> *const f32 {
        // SAFETY: as the caller says; the row of zeros follows the taps.
        unsafe {
            match ((position + 1).checked_sub(inputs.width), inputs.initial) {
                (Some(t), _) => inputs.x.at::<f32>(inputs.segments.rows(segment).start + t, self.first).cast_const(),
                (None, Some(initial)) => initial.at::<f32>(segment, position * inputs.x.cols + self.first).cast_const(),
                (None, None) => self.taps.add(inputs.width * self.count),
            }
        }
    }

    /// to = then(start + Σ_k tap k · input(k)) over the first `taps` taps, for all channels; 0 without a start.
    ///
    /// # Safety
    /// The inputs, `start`, and what `then` needs have a value for each channel; nobody else uses `to`.
    #[inline(always)]
    pub unsafe fn sum<S: Simd>(
        &self,
        s: S,
        taps: usize,
        mut start: Option<*const f32>,
        input: impl Fn(usize) -> *const f32,
        then: Then,
        to: *mut f32,
    ) {
        for first in (0..taps).step_by(TAPS) {
            let then = if first + TAPS < taps { Then::Nothing } else { then };
            // SAFETY: as the caller says.
            unsafe {
                let pass = Pass { count: self.count, taps: self.taps.add(first * self.count), start, then, to };
                match taps - first {
                    1 => pass.run(s, [input(first)]),
                    2 => pass.run(s, [input(first), input(first + 1)]),
                    3 => pass.run(s, [input(first), input(first + 1), input(first + 2)]),
                    _ => pass.run(s, [input(first), input(first + 1), input(first + 2), input(first + 3)]),
                }
            }
            start = Some(to.cast_const());
        }
    }
}

/// A few taps' part of a sum.
struct Pass {
    count: usize,
    taps: *const f32,
    start: Option<*const f32>,
    then: Then,
    to: *mut f32,
}

impl Pass {
    /// # Safety
    /// As [`Filters::sum`].
    #[inline(always)]
    unsafe fn run<S: Simd, const K: usize>(self, s: S, x: [*const f32; K]) {
        let s = Twice(s);
        // A loop, not a closure: one of this size is not inlined, and loses its vector instructions.
        let mut i = 0;
        while i < self.count {
            let lanes = (self.count - i).min(<Twice<S> as Simd>::LANES);
            // SAFETY: as the caller says.
            unsafe {
                let mut sum = self.start.map_or(s.zero(), |start| load(s, start.add(i), lanes));
                for (k, x) in x.iter().enumerate() {
                    let tap = load(s, self.taps.add(k * self.count + i), lanes);
                    sum = s.fma(tap, load(s, x.add(i), lanes), sum);
                }
                let value = match self.then {
                    Then::Nothing => sum,
                    Then::Silu => math::silu(s, sum),
                    Then::Slope(d) => s.mul(load(s, d.add(i), lanes), math::dsilu(s, sum)),
                };
                store(s, self.to.add(i), value, lanes);
            }
            i += lanes;
        }
    }
}

/// Some rows of y.
struct Rows<'a> {
    inputs: &'a Inputs<'a>,
    silu: bool,
    /// Room for the filters of all channels.
    memory: *mut f32,
    y: Mat,
    rows: Range<usize>,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.inputs;
        // SAFETY: the builder checked the shapes; inputs of a row lie in its segment or the initial state, and this task
        // alone writes the row.
        unsafe {
            let filters = Filters::new(inputs, 0, inputs.x.cols, self.memory);
            let bias = inputs.bias.map(|m| m.at::<f32>(0, 0).cast_const());
            let then = if self.silu { Then::Silu } else { Then::Nothing };
            for row in self.rows {
                let Some(segment) = inputs.segments.of(row) else { continue };
                let t = row - inputs.segments.rows(segment).start;
                let input = |k: usize| filters.input(inputs, segment, t + k);
                filters.sum(s, inputs.width, bias, input, then, self.y.at::<f32>(row, 0));
            }
        }
    }
}
