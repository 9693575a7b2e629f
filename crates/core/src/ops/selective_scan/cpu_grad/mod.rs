//! The gradient kernel: a task walks backwards through the segments of a group with a block of channels.
//!
//! Per chunk, and for a few states at a time, it recomputes the states from the one kept at the chunk's start, keeps
//! them and the decays in scratch memory, then walks back with g = ∂L/∂h:
//!
//! ```text
//! g[t] = C[t] dy[t] + exp(Δ[t+1] A) g[t+1]                   dy: of y before the gate
//! dx[t] = D dy[t] + Σ_n g B̄                 dB[t] = Σ_d g (B̄/B) x            dC[t] = Σ_d h[t] dy[t]
//! dΔ[t] = Σ_n g (A exp(ΔA) h[t−1] + x ∂B̄/∂Δ)    dA = Σ_t g (Δ exp(ΔA) h[t−1] + x ∂B̄/∂A)
//! ```
//!
//! with ∂B̄/∂Δ = B and ∂B̄/∂A = 0 (Euler), exp(ΔA) B and [`zoh_slope`](super::decay::zoh_slope) · B (zero-order hold).
//! Sums over channels (dB, dC) are kept per block of channels, those over time (dA, dD, the bias) per group of
//! segments; both are added up in a fixed order at the end. Where the former would take more than T·D values, the rows
//! are handled in slabs, last one first.

mod walk;

use std::ops::Range;

use super::cpu::{Block, Coefficients, Inputs};
use super::{A, B, C, D, DT, DT_BIAS, Forward, Gradient, SEGMENTS, X, Z, chunk_len};
use crate::cpu::Cpu;
use crate::cpu::simd::MAX_LANES;
use crate::graph::{Io, Mat};
use crate::ops::tasks::{ChannelBlocks, Scratch, SegmentGroups, Segments, run_with_slots};
use walk::Walk;

/// Channels of a task, whole vectors at every level.
const BLOCK: usize = 64;
/// States that walk through a chunk together.
const STATES: usize = 4;
/// States from which on dB and dC of all blocks would take more than T·D values.
const STATES_A_SLAB: usize = BLOCK / 2;
/// Rows and channels of a task of the final sums.
const SUM_ROWS: usize = 64;
const SUM_CHANNELS: usize = 64;

/// How the work and the scratch memory are cut.
pub(super) struct Layout {
    blocks: ChannelBlocks,
    segment_groups: SegmentGroups,
    tokens: usize,
    channels: usize,
    segments: usize,
    d_state: usize,
    slots: usize,
    slot_len: usize,
    /// Rows of a slab, whole chunks.
    slab: usize,
}

impl Layout {
    pub fn new(forward: &Forward, tokens: usize, channels: usize, segments: usize, cpu: &Cpu) -> Layout {
        let d_state = forward.shape.d_state;
        let chunk = chunk_len(d_state);
        let blocks = ChannelBlocks::new(channels, forward.shape.groups, BLOCK);
        let slabs = if blocks.per_group() > 1 { d_state.div_ceil(STATES_A_SLAB) } else { 1 };
        let slot_len = Coefficients::values_a_channel(forward) * BLOCK
            + walk::STEP * chunk * BLOCK
            + walk::STATE_STEP * (chunk + 1) * STATES * MAX_LANES;
        Layout {
            blocks,
            segment_groups: SegmentGroups::new(segments, blocks.count()),
            tokens,
            channels,
            segments,
            d_state,
            slots: cpu.pool.threads(),
            slot_len,
            slab: tokens.div_ceil(slabs).next_multiple_of(chunk).max(chunk),
        }
    }

    /// Rows and columns of the sums over channels: one matrix of rows per block. A chunk belongs to the slab it starts
    /// in, so the last one may reach beyond it. With one block a group, they are the outputs themselves.
    fn row_sums(&self) -> (usize, usize) {
        match self.blocks.per_group() {
            1 => (0, 0),
            _ => (self.blocks.count() * self.slab_rows(), 2 * self.d_state),
        }
    }

    fn slab_rows(&self) -> usize {
        (self.slab + chunk_len(self.d_state)).min(self.tokens)
    }

    /// Values of the sums over time of a group of segments: dA by states, dD, the bias.
    fn time_sums(&self) -> usize {
        (self.d_state + 2) * self.channels
    }

    pub fn bytes(&self) -> usize {
        let (rows, cols) = self.row_sums();
        Scratch::bytes(self.slots, self.slot_len)
            + Scratch::bytes(self.segment_groups.count(), self.time_sums())
            + Scratch::bytes(rows, cols)
            + Scratch::bytes(self.segments, self.d_state * self.channels)
    }
}

pub(super) fn run(gradient: &Gradient, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let (tokens, channels) = (inputs.x.rows, inputs.x.cols);
    let segments = Segments::new(io.segments(SEGMENTS), tokens);
    let layout = Layout::new(&gradient.forward, tokens, channels, segments.len(), cpu);
    let mut memory = Scratch::new(io.workspace());
    let scratch = memory.take(layout.slots, layout.slot_len);
    let time_sums = memory.take(layout.segment_groups.count(), layout.time_sums());
    let (rows, cols) = layout.row_sums();
    let task = Task {
        forward: &gradient.forward,
        layout: &layout,
        inputs,
        segments,
        dy: io.optional_input(Gradient::DY),
        d_final: io.optional_input(Gradient::D_FINAL),
        chunk_states: io.input(Gradient::CHUNK_STATES),
        dx: io.optional_output(X),
        d_dt: io.optional_output(DT),
        dz: io.optional_output(Z),
        // One task at a time has a block of them, so what it leaves there is what it finds for the slab before.
        time_sums,
        row_sums: memory.take(rows, cols),
        db: io.optional_output(B),
        dc: io.optional_output(C),
        // Between chunks g rests where the initial states' gradient goes; in scratch memory, if nobody wants that.
        g: io
            .optional_output(Forward::INITIAL_STATE)
            .unwrap_or_else(|| memory.take(segments.len(), layout.d_state * channels)),
    };
    let blocks = layout.blocks.count();
    for slab in (0..tokens.div_ceil(layout.slab).max(1)).rev() {
        let rows = slab * layout.slab..(slab + 1) * layout.slab;
        run_with_slots(&cpu.pool, layout.segment_groups.count() * blocks, |slot, i| {
            // SAFETY: no other task uses the slot's row meanwhile.
            let scratch = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
            let is_first = rows.end >= tokens;
            cpu.isa.run(task.walk(i % blocks, i / blocks, rows.clone(), is_first, scratch));
        });
        if layout.blocks.per_group() > 1 {
            task.add_up_rows(rows, cpu);
        }
    }
    add_up_time(io, &layout, time_sums, cpu);
    for rows in [task.dx, task.d_dt, task.dz, task.db, task.dc].into_iter().flatten() {
        segments.clear_rest(rows);
    }
}

struct Task<'a> {
    forward: &'a Forward,
    layout: &'a Layout,
    inputs: Inputs,
    segments: Segments<'a>,
    dy: Option<Mat>,
    d_final: Option<Mat>,
    chunk_states: Mat,
    dx: Option<Mat>,
    d_dt: Option<Mat>,
    dz: Option<Mat>,
    time_sums: Mat,
    row_sums: Mat,
    db: Option<Mat>,
    dc: Option<Mat>,
    g: Mat,
}

impl<'a> Task<'a> {
    fn walk(
        &'a self,
        block: usize,
        segment_group: usize,
        slab: Range<usize>,
        is_first: bool,
        scratch: *mut f32,
    ) -> Walk<'a> {
        let (group, channels) = self.layout.blocks.block(block);
        let column = group * self.layout.d_state;
        let (db, dc) = if self.layout.blocks.per_group() == 1 {
            let columns = |m: Option<Mat>| m.map(|m| m.columns(column, self.layout.d_state));
            (columns(self.db), columns(self.dc))
        } else {
            let sums = self.row_sums.rows(block * self.layout.slab_rows(), self.layout.slab_rows());
            let columns = |m: Option<Mat>, i| m.map(|_| sums.columns(i * self.layout.d_state, self.layout.d_state));
            (columns(self.db, 0), columns(self.dc, 1))
        };
        Walk {
            task: self,
            block: Block { first: channels.start, width: channels.len(), column },
            segment_group,
            slab,
            is_first,
            db,
            dc,
            scratch,
        }
    }

    /// The rows that the chunks which start in the slab cover: they follow one another, since chunks fill segments.
    fn covered(&self, slab: Range<usize>) -> Range<usize> {
        let mut covered: Option<Range<usize>> = None;
        for segment in 0..self.segments.len() {
            let rows = self.segments.rows(segment);
            let chunk = chunk_len(self.layout.d_state);
            let chunks = chunks_in(&rows, &slab, chunk);
            if !chunks.is_empty() {
                let start = covered.map_or(rows.start + chunks.start * chunk, |c| c.start);
                covered = Some(start..(rows.start + chunks.end * chunk).min(rows.end));
            }
        }
        covered.unwrap_or_default()
    }

    /// Adds up dB and dC over the blocks of each group.
    fn add_up_rows(&self, slab: Range<usize>, cpu: &Cpu) {
        let covered = self.covered(slab.clone());
        let (d_state, per_group) = (self.layout.d_state, self.layout.blocks.per_group());
        cpu.pool.chunks(covered.len(), SUM_ROWS, |rows| {
            for row in rows.start + covered.start..rows.end + covered.start {
                for (i, out) in [self.db, self.dc].into_iter().enumerate() {
                    let Some(out) = out else { continue };
                    for group in 0..self.forward.shape.groups {
                        // SAFETY: this task alone writes the row; those that wrote the sums are done.
                        unsafe {
                            let out = &mut out.row_mut::<f32>(row)[group * d_state..][..d_state];
                            for block in group * per_group..(group + 1) * per_group {
                                let row = block * self.layout.slab_rows() + row - slab.start;
                                let part = &self.row_sums.row::<f32>(row)[i * d_state..][..d_state];
                                if block == group * per_group {
                                    out.copy_from_slice(part);
                                } else {
                                    out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
                                }
                            }
                        }
                    }
                }
            }
        });
    }
}

/// The chunks of a segment with these rows that start in the slab.
fn chunks_in(rows: &Range<usize>, slab: &Range<usize>, chunk: usize) -> Range<usize> {
    let chunks_before = |row: usize| row.clamp(rows.start, rows.end).saturating_sub(rows.start).div_ceil(chunk);
    chunks_before(slab.start)..chunks_before(slab.end)
}

/// Adds up the sums over time of all groups of segments and writes dA, dD and the bias's gradient.
fn add_up_time(io: &Io<'_>, layout: &Layout, sums: Mat, cpu: &Cpu) {
    let (da, dd, d_bias) = (io.optional_output(A), io.optional_output(D), io.optional_output(DT_BIAS));
    let (channels, d_state) = (layout.channels, layout.d_state);
    let total = |col: usize| {
        // SAFETY: the tasks that wrote the sums are done.
        (0..sums.rows).fold(0.0f32, |sum, group| sum + unsafe { *sums.at::<f32>(group, col) })
    };
    cpu.pool.chunks(channels, SUM_CHANNELS, |block| {
        for channel in block {
            // SAFETY: this task alone writes what belongs to its channels.
            unsafe {
                if let Some(da) = da {
                    for n in 0..d_state {
                        *da.at::<f32>(channel, n) = total(n * channels + channel);
                    }
                }
                for (i, out) in [dd, d_bias].into_iter().enumerate() {
                    if let Some(out) = out {
                        *out.at::<f32>(0, channel) = total((d_state + i) * channels + channel);
                    }
                }
            }
        }
    });
}
