//! The gradient kernel: a task walks backwards through the segments of a group with a block of channels.
//!
//! Per tile of rows it forms the sums again and keeps their gradients ds = dy · act'(sum), with those of the W−1 rows
//! after the tile. With positions counted from the oldest input of the initial state, so that row t has position
//! t + W−1:
//!
//! ```text
//! dx[p] = Σ_k w[k] ds[p − k] + (the final state's gradient, if it holds p)
//! dw[k] = Σ_t ds[t] x[t + k]            dbias = Σ_t ds[t]
//! ```
//!
//! The last two are kept per group of segments and added up in a fixed order at the end.

use std::ops::Range;

use super::cpu::{Filters, Inputs};
use super::{BIAS, Forward, Gradient, INITIAL_STATE, WEIGHT, X};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, run_with_slots, vectors};
use crate::ops::vectors::{load, store};

/// Channels of a task, whole vectors at every level.
const BLOCK: usize = 128;
/// Rows of a tile.
const TILE: usize = 32;

/// Values of scratch memory of a task: the filters, and ds of a tile and the W−1 rows after it.
fn scratch_len(forward: &Forward) -> usize {
    (forward.width + TILE + forward.width - 1) * BLOCK
}

fn groups(channels: usize, segments: usize) -> (ChannelBlocks, SegmentGroups) {
    let blocks = ChannelBlocks::new(channels, 1, BLOCK);
    (blocks, SegmentGroups::new(segments, blocks.count()))
}

pub(super) fn workspace(forward: &Forward, channels: usize, segments: usize, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), scratch_len(forward))
        + Scratch::bytes(groups(channels, segments).1.count(), (forward.width + 1) * channels)
}

pub(super) fn run(gradient: &Gradient, io: &Io<'_>, cpu: &Cpu) {
    let forward = &gradient.forward;
    let inputs = Inputs::new(forward.width, io);
    let channels = inputs.x.cols;
    let (blocks, groups) = groups(channels, inputs.segments.len());
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(cpu.pool.threads(), scratch_len(forward));
    // Of a group of segments: dw by taps, dbias.
    let sums = memory.take(groups.count(), (forward.width + 1) * channels);
    let (dy, d_final) = (io.optional_input(Gradient::DY), io.optional_input(Gradient::D_FINAL));
    let (dx, d_initial) = (io.optional_output(X), io.optional_output(INITIAL_STATE));
    run_with_slots(&cpu.pool, groups.count() * blocks.count(), |slot, task| {
        let (_, channels) = blocks.block(task % blocks.count());
        let group = task / blocks.count();
        // SAFETY: no other task uses the slot's row meanwhile.
        let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        cpu.isa.run(Walk {
            filters: Filters { inputs: &inputs, first: channels.start, count: channels.len(), taps: scratch },
            segments: groups.segments(group),
            silu: forward.silu,
            dy,
            d_final,
            dx,
            d_initial,
            sums: sums.rows(group, 1),
            // SAFETY: after the filters, as `scratch_len` counts.
            ds: unsafe { scratch.add(forward.width * BLOCK) },
        });
    });
    let (dw, d_bias) = (io.optional_output(WEIGHT), io.optional_output(BIAS));
    let total = |col: usize| {
        // SAFETY: the tasks that wrote the sums are done.
        (0..sums.rows).fold(0.0f32, |sum, group| sum + unsafe { *sums.at::<f32>(group, col) })
    };
    for channel in 0..channels {
        // SAFETY: no task runs; channels and taps lie in the outputs.
        unsafe {
            if let Some(dw) = dw {
                (0..forward.width).for_each(|k| *dw.at::<f32>(channel, k) = total(k * channels + channel));
            }
            if let Some(d_bias) = d_bias {
                *d_bias.at::<f32>(0, channel) = total(forward.width * channels + channel);
            }
        }
    }
    if let Some(dx) = dx {
        inputs.segments.clear_rest(dx);
    }
}

/// One task.
struct Walk<'a> {
    filters: Filters<'a>,
    segments: Range<usize>,
    silu: bool,
    dy: Option<Mat>,
    d_final: Option<Mat>,
    dx: Option<Mat>,
    d_initial: Option<Mat>,
    /// The row of sums of this group of segments.
    sums: Mat,
    ds: *mut f32,
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
    /// ds of vector `v`: one vector per row of the tile, then of the W−1 rows after it.
    ///
    /// # Safety
    /// `v` is a vector of the block.
    #[inline(always)]
    unsafe fn ds<S: Simd>(&self, v: usize) -> *mut f32 {
        // SAFETY: inside the scratch memory.
        unsafe { self.ds.add(v * (TILE + self.filters.inputs.width - 1) * S::LANES) }
    }

    /// Adds to the sums of vector `v` from column `of` on.
    ///
    /// # Safety
    /// `of` is the first column of a tap or of the bias; this task alone has these channels of the sums.
    #[inline(always)]
    unsafe fn add_to_sums<S: Simd>(&self, s: S, of: usize, v: usize, value: S::V) {
        let (channel, lanes) = self.filters.vector::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let sum = self.sums.at::<f32>(0, of + channel);
            store(s, sum, s.add(load(s, sum, lanes), value), lanes);
        }
    }

    /// # Safety
    /// This task alone has these channels of these segments and of the sums; the filters are prepared.
    #[inline(always)]
    unsafe fn walk<S: Simd, const W: usize>(&self, s: S) {
        let inputs = self.filters.inputs;
        let width = if W > 0 { W } else { inputs.width };
        // SAFETY: as the caller says; tiles and the rows after them fit the scratch memory.
        unsafe {
            for i in 0..=width {
                let col = i * inputs.x.cols + self.filters.first;
                std::slice::from_raw_parts_mut(self.sums.at::<f32>(0, col), self.filters.count).fill(0.0);
            }
            for segment in self.segments.clone().rev() {
                let length = inputs.segments.rows(segment).len();
                // Nothing comes after the last row.
                let ds = self.ds::<S>(0);
                std::ptr::write_bytes(ds, 0, (TILE + width - 1) * vectors::<S>(self.filters.count) * S::LANES);
                for first in (0..length).step_by(TILE).rev() {
                    let steps = TILE.min(length - first);
                    for v in 0..vectors::<S>(self.filters.count) {
                        let ds = self.ds::<S>(v);
                        std::ptr::copy(ds, ds.add(steps * S::LANES), (width - 1) * S::LANES);
                    }
                    self.tile::<S, W>(s, segment, first, steps, length);
                }
                if let Some(d_initial) = self.d_initial {
                    self.initial(s, segment, length, d_initial);
                }
            }
        }
    }

    /// Rows `first .. first + steps` of a segment of `length` rows.
    ///
    /// # Safety
    /// As [`Walk::walk`]; ds of the rows after the tile are in their place.
    #[inline(always)]
    unsafe fn tile<S: Simd, const W: usize>(&self, s: S, segment: usize, first: usize, steps: usize, length: usize) {
        let inputs = self.filters.inputs;
        let width = if W > 0 { W } else { inputs.width };
        let start = inputs.segments.rows(segment).start;
        let count = vectors::<S>(self.filters.count);
        // SAFETY: as the caller says.
        unsafe {
            if let Some(dy) = self.dy {
                for t in 0..steps {
                    for v in 0..count {
                        let (channel, lanes) = self.filters.vector::<S>(v);
                        let mut ds = load(s, dy.at::<f32>(start + first + t, channel), lanes);
                        if self.silu {
                            let sum = self.filters.sum::<S, W>(s, segment, first + t, v);
                            ds = s.mul(ds, math::dsilu(s, sum));
                        }
                        s.store(self.ds::<S>(v).add(t * S::LANES), ds);
                    }
                }
                for v in 0..count {
                    self.sums_of_tile::<S, W>(s, segment, first, steps, v);
                }
            } else {
                for v in 0..count {
                    std::ptr::write_bytes(self.ds::<S>(v), 0, steps * S::LANES);
                }
            }
            let Some(dx) = self.dx else { return };
            for t in 0..steps {
                for v in 0..count {
                    let (channel, lanes) = self.filters.vector::<S>(v);
                    let taps = self.filters.of::<S>(v);
                    let position = first + t + width - 1;
                    let mut sum = self.through_final(s, segment, length, position, channel, lanes);
                    for k in 0..width {
                        let ds = s.load(self.ds::<S>(v).add((t + width - 1 - k) * S::LANES));
                        sum = s.fma(s.load(taps.add(k * S::LANES)), ds, sum);
                    }
                    store(s, dx.at::<f32>(start + first + t, channel), sum, lanes);
                }
            }
        }
    }

    /// Adds a tile to dw and dbias of vector `v`.
    ///
    /// # Safety
    /// As [`Walk::tile`], ds of the tile computed.
    #[inline(always)]
    unsafe fn sums_of_tile<S: Simd, const W: usize>(&self, s: S, segment: usize, first: usize, steps: usize, v: usize) {
        let inputs = self.filters.inputs;
        let width = if W > 0 { W } else { inputs.width };
        let (channel, lanes) = self.filters.vector::<S>(v);
        // SAFETY: as the caller says.
        unsafe {
            let ds = self.ds::<S>(v);
            for k in 0..width {
                let mut dw = s.zero();
                for t in 0..steps {
                    let x = inputs.at(s, segment, first + t + k, channel, lanes);
                    dw = s.fma(s.load(ds.add(t * S::LANES)), x, dw);
                }
                self.add_to_sums(s, k * inputs.x.cols, v, dw);
            }
            let mut d_bias = s.zero();
            for t in 0..steps {
                d_bias = s.add(d_bias, s.load(ds.add(t * S::LANES)));
            }
            self.add_to_sums(s, width * inputs.x.cols, v, d_bias);
        }
    }

    /// The gradient that reaches the input at `position` through the final state, which holds the last W−1 positions.
    ///
    /// # Safety
    /// The position lies in the segment or its initial state.
    #[inline(always)]
    unsafe fn through_final<S: Simd>(
        &self,
        s: S,
        segment: usize,
        length: usize,
        position: usize,
        channel: usize,
        lanes: usize,
    ) -> S::V {
        match self.d_final {
            Some(d_final) if position >= length => {
                let col = (position - length) * self.filters.inputs.x.cols + channel;
                // SAFETY: as the caller says.
                unsafe { load(s, d_final.at::<f32>(segment, col), lanes) }
            }
            _ => s.zero(),
        }
    }

    /// Writes the gradient of the initial state.
    ///
    /// # Safety
    /// As [`Walk::tile`], ds of the segment's first rows in their place.
    #[inline(always)]
    unsafe fn initial<S: Simd>(&self, s: S, segment: usize, length: usize, d_initial: Mat) {
        let inputs = self.filters.inputs;
        for position in 0..inputs.width - 1 {
            for v in 0..vectors::<S>(self.filters.count) {
                let (channel, lanes) = self.filters.vector::<S>(v);
                // SAFETY: as the caller says.
                unsafe {
                    let taps = self.filters.of::<S>(v);
                    let mut sum = self.through_final(s, segment, length, position, channel, lanes);
                    for k in 0..=position {
                        let ds = s.load(self.ds::<S>(v).add((position - k) * S::LANES));
                        sum = s.fma(s.load(taps.add(k * S::LANES)), ds, sum);
                    }
                    let col = position * inputs.x.cols + channel;
                    store(s, d_initial.at::<f32>(segment, col), sum, lanes);
                }
            }
        }
    }
}
