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

use super::cpu::{Filters, Inputs, TAPS, Then};
use super::{BIAS, Forward, Gradient, INITIAL_STATE, WEIGHT, X};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, run_with_slots};
use crate::ops::vectors::{load, store};

/// Channels of a task, whole vectors at every level.
const BLOCK: usize = 128;
/// Rows of a tile.
const TILE: usize = 32;

/// Values of scratch memory of a task: the filters, and ds of a tile and the W−1 rows after it.
fn scratch_len(forward: &Forward) -> usize {
    Filters::len(forward.width, BLOCK) + (TILE + forward.width - 1) * BLOCK
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
            inputs: &inputs,
            // SAFETY: the channels lie in the weight, and the scratch memory starts with room for their filters.
            filters: unsafe { Filters::new(&inputs, channels.start, channels.len(), scratch) },
            segments: groups.segments(group),
            silu: forward.silu,
            dy,
            d_final,
            dx,
            d_initial,
            sums: sums.rows(group, 1),
            // SAFETY: after the filters, as `scratch_len` counts.
            ds: unsafe { scratch.add(Filters::len(forward.width, BLOCK)) },
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
    inputs: &'a Inputs<'a>,
    filters: Filters,
    segments: Range<usize>,
    silu: bool,
    dy: Option<Mat>,
    d_final: Option<Mat>,
    dx: Option<Mat>,
    d_initial: Option<Mat>,
    /// The row of sums of this group of segments.
    sums: Mat,
    /// ds: a row of the block's channels for each row of the tile, then for the W−1 rows after it.
    ds: *mut f32,
}

impl Kernel for Walk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (inputs, Filters { first, count, .. }) = (self.inputs, self.filters);
        // SAFETY: the builder checked the shapes; this task alone has these channels of these segments and of the sums.
        // Tiles and the rows after them fit the scratch memory.
        unsafe {
            for i in 0..=inputs.width {
                std::slice::from_raw_parts_mut(self.sums.at::<f32>(0, i * inputs.x.cols + first), count).fill(0.0);
            }
            for segment in self.segments.clone().rev() {
                let length = inputs.segments.rows(segment).len();
                // Nothing comes after the last row.
                std::ptr::write_bytes(self.ds, 0, (TILE + inputs.width - 1) * count);
                for first in (0..length).step_by(TILE).rev() {
                    let steps = TILE.min(length - first);
                    std::ptr::copy(self.ds, self.ds.add(steps * count), (inputs.width - 1) * count);
                    self.tile(s, segment, first, steps, length);
                }
                if let Some(d_initial) = self.d_initial {
                    for position in 0..inputs.width - 1 {
                        let to = d_initial.at::<f32>(segment, position * inputs.x.cols + first);
                        self.through(s, segment, length, position, position, to);
                    }
                }
            }
        }
    }
}

impl Walk<'_> {
    /// Rows `first .. first + steps` of a segment of `length` rows.
    ///
    /// # Safety
    /// This task alone has the block's channels of the segment and of the sums; ds of the rows after the tile are in
    /// their place.
    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, s: S, segment: usize, first: usize, steps: usize, length: usize) {
        let (inputs, filters, count) = (self.inputs, self.filters, self.filters.count);
        let row = inputs.segments.rows(segment).start + first;
        // SAFETY: as the caller says.
        unsafe {
            match self.dy {
                Some(dy) => {
                    let bias = inputs.bias.map(|m| m.at::<f32>(0, filters.first).cast_const());
                    for t in 0..steps {
                        let (dy, ds) = (dy.at::<f32>(row + t, filters.first), self.ds.add(t * count));
                        if self.silu {
                            let input = |k: usize| filters.input(inputs, segment, first + t + k);
                            filters.sum(s, inputs.width, bias, input, Then::Slope(dy), ds);
                        } else {
                            std::ptr::copy_nonoverlapping(dy, ds, count);
                        }
                    }
                    for k in (0..inputs.width).step_by(TAPS) {
                        match inputs.width - k {
                            1 => self.weight_of_tile::<S, 1>(s, segment, first, steps, k),
                            2 => self.weight_of_tile::<S, 2>(s, segment, first, steps, k),
                            3 => self.weight_of_tile::<S, 3>(s, segment, first, steps, k),
                            _ => self.weight_of_tile::<S, TAPS>(s, segment, first, steps, k),
                        }
                    }
                }
                None => std::ptr::write_bytes(self.ds, 0, steps * count),
            }
            if let Some(dx) = self.dx {
                for t in 0..steps {
                    let to = dx.at::<f32>(row + t, filters.first);
                    self.through(s, segment, length, first + t + inputs.width - 1, t + inputs.width - 1, to);
                }
            }
        }
    }

    /// Adds a tile to dw of `K` taps from `tap` on and, with the first ones, to dbias.
    ///
    /// # Safety
    /// As [`Walk::tile`], ds of the tile computed.
    #[inline(always)]
    unsafe fn weight_of_tile<S: Simd, const K: usize>(
        &self,
        s: S,
        segment: usize,
        first: usize,
        steps: usize,
        tap: usize,
    ) {
        let (inputs, filters, count) = (self.inputs, self.filters, self.filters.count);
        let sum = |of: usize| {
            let col = of * inputs.x.cols + filters.first;
            // SAFETY: `of` is a tap, or W for the bias.
            unsafe { self.sums.at::<f32>(0, col) }
        };
        for i in (0..count).step_by(S::LANES) {
            let lanes = S::LANES.min(count - i);
            // SAFETY: as the caller says; lanes i .. i + lanes are channels of the block.
            unsafe {
                let (mut dw, mut d_bias) = ([s.zero(); K], s.zero());
                for t in 0..steps {
                    let ds = load(s, self.ds.add(t * count + i), lanes);
                    for (k, dw) in dw.iter_mut().enumerate() {
                        let x = filters.input(inputs, segment, first + t + tap + k);
                        *dw = s.fma(ds, load(s, x.add(i), lanes), *dw);
                    }
                    d_bias = s.add(d_bias, ds);
                }
                for (k, dw) in dw.into_iter().enumerate() {
                    let to = sum(tap + k).add(i);
                    store(s, to, s.add(load(s, to, lanes), dw), lanes);
                }
                if tap == 0 {
                    let to = sum(inputs.width).add(i);
                    store(s, to, s.add(load(s, to, lanes), d_bias), lanes);
                }
            }
        }
    }

    /// The gradient of the input at `position`: through the outputs, of which the latest has row `latest` of ds, and
    /// through the final state, which holds the segment's last W−1 positions.
    ///
    /// # Safety
    /// The position lies in the segment or its initial state; ds of the outputs that it reaches are in their place.
    #[inline(always)]
    unsafe fn through<S: Simd>(
        &self,
        s: S,
        segment: usize,
        length: usize,
        position: usize,
        latest: usize,
        to: *mut f32,
    ) {
        let (inputs, Filters { first, count, .. }) = (self.inputs, self.filters);
        // SAFETY: as the caller says.
        unsafe {
            let start = match (self.d_final, position.checked_sub(length)) {
                (Some(d_final), Some(j)) => Some(d_final.at::<f32>(segment, j * inputs.x.cols + first).cast_const()),
                _ => None,
            };
            let ds = |k: usize| self.ds.add((latest - k) * count).cast_const();
            self.filters.sum(s, inputs.width.min(latest + 1), start, ds, Then::Nothing, to);
        }
    }
}
