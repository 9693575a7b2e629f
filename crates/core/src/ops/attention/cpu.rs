//! The forward kernel: a task computes the queries of some rows of the pack with one key and value head.
//!
//! The query heads that share these are rows of one tile, so their products with a block of keys are one. Final states
//! are written after all outputs, so they may replace the initial ones.

use std::ops::Range;

use super::{K, KV, POSITION_UNIT, POSITIONS, Q, SEGMENTS, Shape, V, position};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::ssd::lanes::Transpose;
use crate::ops::ssd::product::{Band, Init, Product, TILE_ROWS};
use crate::ops::ssd::workspace::Bump;
use crate::ops::tasks::{Scratch, Segments, run_with_slots};

/// Keys of a block, whole vectors at every level; blocks begin at its multiples.
pub(super) const KEYS: usize = 64;
/// Rows of a tile, about: queries times the heads that share their keys.
const ROWS: usize = 32;

impl Shape {
    /// Queries of a tile.
    pub(super) fn queries(&self) -> usize {
        (ROWS / self.group()).max(1)
    }

    /// Rows of a tile, with room for those that a product reads beyond.
    pub(super) fn tile_rows(&self) -> usize {
        self.queries() * self.group() + TILE_ROWS
    }
}

/// Bytes of a task's scratch memory: what `take` takes.
pub(super) fn task_values(take: impl FnOnce(&mut Bump)) -> usize {
    let mut bump = Bump::measure();
    take(&mut bump);
    bump.used() / size_of::<f32>()
}

pub(super) fn workspace(shape: &Shape, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), task_values(|bump| _ = Tile::take(bump, shape)))
}

pub(super) fn run(shape: &Shape, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(*shape, io);
    if let Some(y) = io.optional_output(0) {
        let log_sums = io.optional_output(1);
        let values = task_values(|bump| _ = Tile::take(bump, shape));
        let scratch = Scratch::new(io.workspace()).take(cpu.pool.threads(), values);
        let blocks = inputs.q.rows.div_ceil(shape.queries());
        run_with_slots(&cpu.pool, blocks * shape.kv_heads, |slot, task| {
            // SAFETY: no other task uses the slot's row meanwhile.
            let memory = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
            let tile = Tile::take(&mut Bump::new(memory.cast()), shape);
            let (block, head) = (task / shape.kv_heads, task % shape.kv_heads);
            let end = inputs.q.rows.min((block + 1) * shape.queries());
            let mut row = block * shape.queries();
            while row < end {
                let Some(segment) = inputs.segments.of(row) else { break };
                let rows = row..end.min(inputs.segments.rows(segment).end);
                row = rows.end;
                // SAFETY: the rows lie in the segment; this task alone writes them for this head's group.
                unsafe { tile.attend(&inputs.sequence(segment, head), rows, y, log_sums, cpu) };
            }
        });
        inputs.segments.clear_rest(y);
        if let Some(log_sums) = log_sums {
            inputs.segments.clear_rest(log_sums);
        }
    }
    let (final_position, final_kv) = (io.optional_output(2), io.optional_output(3));
    cpu.pool.run(inputs.segments.len(), |segment| {
        // SAFETY: this task alone has these states, and all queries are done.
        unsafe { inputs.keep(segment, final_position, final_kv) }
    });
}

/// The operands that the forward pass and the gradient read.
pub(super) struct Inputs<'a> {
    pub shape: Shape,
    pub q: Mat,
    k: Mat,
    v: Mat,
    positions: Option<Mat>,
    kv: Option<Mat>,
    pub segments: Segments<'a>,
}

impl<'a> Inputs<'a> {
    pub fn new(shape: Shape, io: &'a Io<'_>) -> Inputs<'a> {
        let q = io.input(Q);
        Inputs {
            shape,
            q,
            k: io.input(K),
            v: io.input(V),
            positions: io.optional_input(POSITIONS),
            kv: io.optional_input(KV),
            segments: Segments::new(io.segments(SEGMENTS), q.rows),
        }
    }

    /// One segment as one key and value head sees it.
    pub fn sequence(&self, segment: usize, head: usize) -> Sequence<'_> {
        // SAFETY: the builder checked the shape of the positions.
        let start = unsafe { position(self.positions, segment) };
        Sequence { inputs: self, segment, head, first: self.segments.rows(segment).start, start }
    }

    /// Writes the final state of a segment, over the initial one where they are the same.
    ///
    /// # Safety
    /// Nobody else uses these states.
    unsafe fn keep(&self, segment: usize, positions: Option<Mat>, kv: Option<Mat>) {
        let (rows, sequence) = (self.segments.rows(segment), self.sequence(segment, 0));
        let end = sequence.start + rows.len() as u64;
        // SAFETY: the builder checked the shapes; slots lie below the window, rows in the segment.
        unsafe {
            if let Some(positions) = positions {
                let times = (end as f64 / POSITION_UNIT).floor();
                positions.row_mut::<f32>(segment)[0] = (end as f64 - times * POSITION_UNIT) as f32;
                positions.row_mut::<f32>(segment)[1] = times as f32;
            }
            let Some(kv) = kv else { return };
            match self.kv {
                None => kv.row_mut::<f32>(segment).fill(0.0),
                Some(from) if from.address() != kv.address() => {
                    kv.row_mut::<f32>(segment).copy_from_slice(from.row::<f32>(segment));
                }
                Some(_) => {}
            }
            let width = self.k.cols;
            for row in rows.end.saturating_sub(self.shape.window).max(rows.start)..rows.end {
                let slot = (sequence.start + (row - rows.start) as u64) % self.shape.window as u64;
                let to = kv.at::<f32>(segment, slot as usize * 2 * width);
                std::ptr::copy_nonoverlapping(self.k.at::<f32>(row, 0), to, width);
                std::ptr::copy_nonoverlapping(self.v.at::<f32>(row, 0), to.add(width), width);
            }
        }
    }
}

/// A segment and a key and value head.
pub(super) struct Sequence<'a> {
    pub inputs: &'a Inputs<'a>,
    segment: usize,
    pub head: usize,
    /// Its first row in the pack, and the position of that row.
    first: usize,
    pub start: u64,
}

impl Sequence<'_> {
    /// The position of a row of the segment.
    pub fn position(&self, row: usize) -> u64 {
        self.start + (row - self.first) as u64
    }

    /// The first position that a query sees.
    pub fn first_seen(&self, position: u64) -> u64 {
        (position + 1).saturating_sub(self.inputs.shape.window as u64)
    }

    /// The row of a position that lies in the segment.
    pub fn row(&self, position: u64) -> Option<usize> {
        Some(self.first + usize::try_from(position.checked_sub(self.start)?).ok()?)
    }

    /// Copies keys and values of positions `from .. from + KEYS`, as far as they are in `seen`; the rest is zero.
    ///
    /// # Safety
    /// Positions in `seen` lie in the segment or in its state's window; there is room for KEYS · P values each.
    pub unsafe fn copy_block(&self, from: u64, seen: &Range<u64>, keys: *mut f32, values: *mut f32) {
        let Shape { headdim, kv_heads, window, .. } = self.inputs.shape;
        let col = self.head * headdim;
        for (i, p) in (from..from + KEYS as u64).enumerate() {
            // SAFETY: as the caller says.
            unsafe {
                let (keys, values) = (keys.add(i * headdim), values.add(i * headdim));
                let found = match (self.row(p), self.inputs.kv) {
                    _ if !seen.contains(&p) => None,
                    (Some(row), _) => Some((self.inputs.k.at::<f32>(row, col), self.inputs.v.at::<f32>(row, col))),
                    (None, Some(kv)) => {
                        let slot = (p % window as u64) as usize * 2 * kv_heads * headdim;
                        let key = kv.at::<f32>(self.segment, slot + col);
                        Some((key, key.add(kv_heads * headdim)))
                    }
                    (None, None) => None,
                };
                match found {
                    Some((key, value)) => {
                        std::ptr::copy_nonoverlapping(key, keys, headdim);
                        std::ptr::copy_nonoverlapping(value, values, headdim);
                    }
                    None => {
                        std::ptr::write_bytes(keys, 0, headdim);
                        std::ptr::write_bytes(values, 0, headdim);
                    }
                }
            }
        }
    }

    /// Copies the columns of this head's group of some rows into a tile: row t·group + r holds head r of row t. Times
    /// `factor`.
    ///
    /// # Safety
    /// The rows lie in the matrix, which has H·P columns; the tile has room for them.
    pub unsafe fn copy_tile(&self, from: Mat, rows: Range<usize>, factor: f32, to: *mut f32) {
        let width = self.inputs.shape.group() * self.inputs.shape.headdim;
        for (i, row) in rows.enumerate() {
            for col in 0..width {
                // SAFETY: as the caller says.
                unsafe { *to.add(i * width + col) = factor * *from.at::<f32>(row, self.head * width + col) };
            }
        }
    }

    /// 1/√P.
    pub fn scale(&self) -> f32 {
        (1.0 / (self.inputs.shape.headdim as f64).sqrt()) as f32
    }
}

/// Scratch memory of a task.
struct Tile {
    q: *mut f32,
    keys: *mut f32,
    keys_t: *mut f32,
    values: *mut f32,
    /// Scores of a block, then their exponentials.
    scores: *mut f32,
    /// Sums of values, not yet divided.
    out: *mut f32,
    /// For each row the largest score so far, the sum of exponentials, and what the last block multiplies both sums by.
    top: *mut f32,
    sum: *mut f32,
    fade: *mut f32,
}

impl Tile {
    fn take(bump: &mut Bump, shape: &Shape) -> Tile {
        let (rows, p) = (shape.tile_rows(), shape.headdim);
        Tile {
            q: bump.take(rows * p),
            keys: bump.take(KEYS * p),
            keys_t: bump.take(KEYS * p),
            values: bump.take(KEYS * p),
            scores: bump.take(rows * KEYS),
            out: bump.take(rows * p),
            top: bump.take(rows),
            sum: bump.take(rows),
            fade: bump.take(rows),
        }
    }

    /// # Safety
    /// The rows lie in the segment, and nobody else writes them in the outputs for the head's group.
    unsafe fn attend(&self, sequence: &Sequence<'_>, rows: Range<usize>, y: Mat, log_sums: Option<Mat>, cpu: &Cpu) {
        let shape = sequence.inputs.shape;
        let (p, group, m) = (shape.headdim, shape.group(), rows.len() * shape.group());
        let first = sequence.position(rows.start);
        let seen = sequence.first_seen(first)..first + rows.len() as u64;
        // SAFETY: as the caller says; the arrays have the sizes that `take` gave them.
        unsafe {
            sequence.copy_tile(sequence.inputs.q, rows.clone(), sequence.scale(), self.q);
            std::ptr::write_bytes(self.out, 0, m * p);
            for i in 0..m {
                (*self.top.add(i), *self.sum.add(i)) = (f32::NEG_INFINITY, 0.0);
            }
            let grid = KEYS as u64;
            for block in (seen.start / grid * grid..seen.end).step_by(KEYS) {
                sequence.copy_block(block, &seen, self.keys, self.values);
                let (from, to) = (self.keys.cast_const(), self.keys_t);
                cpu.isa.run(Transpose { from, from_row: p, rows: KEYS, cols: p, to, to_row: KEYS });
                cpu.isa.run(Product {
                    m,
                    n: KEYS,
                    k: p,
                    a: self.q,
                    a_row: p,
                    a_col: 1,
                    b: self.keys_t,
                    b_row: KEYS,
                    out: self.scores,
                    out_row: KEYS,
                    init: Init::Zero,
                    band: Band::Full,
                });
                cpu.isa.run(Softmax { tile: self, sequence, m, group, first, block });
                cpu.isa.run(Product {
                    m,
                    n: p,
                    k: KEYS,
                    a: self.scores,
                    a_row: KEYS,
                    a_col: 1,
                    b: self.values,
                    b_row: p,
                    out: self.out,
                    out_row: p,
                    init: Init::ScaledRows { from: self.out, row: p, by: self.fade },
                    band: Band::Full,
                });
            }
            for i in 0..m {
                let (row, head) = (rows.start + i / group, sequence.head * group + i % group);
                let sum = *self.sum.add(i);
                for col in 0..p {
                    *y.at::<f32>(row, head * p + col) = *self.out.add(i * p + col) / sum;
                }
                if let Some(log_sums) = log_sums {
                    *log_sums.at::<f32>(row, head) = *self.top.add(i) + sum.ln();
                }
            }
        }
    }
}

/// The places of a block that a query sees: from `.0` up to `.1`.
pub(super) fn seen_of_block(sequence: &Sequence<'_>, position: u64, block: u64) -> (usize, usize) {
    let within = |p: u64| p.clamp(block, block + KEYS as u64) - block;
    (within(sequence.first_seen(position)) as usize, within(position + 1) as usize)
}

/// Turns the scores of a block into exponentials beside the largest so far.
struct Softmax<'a> {
    tile: &'a Tile,
    sequence: &'a Sequence<'a>,
    m: usize,
    group: usize,
    /// Position of the tile's first query.
    first: u64,
    block: u64,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Tile { scores, top, sum, fade, .. } = *self.tile;
        for i in 0..self.m {
            let (from, to) = seen_of_block(self.sequence, self.first + (i / self.group) as u64, self.block);
            // SAFETY: the tile has room for `m` rows, of KEYS scores each.
            unsafe {
                let row = scores.add(i * KEYS);
                if from >= to {
                    std::ptr::write_bytes(row, 0, KEYS);
                    *fade.add(i) = 1.0;
                    continue;
                }
                (0..from).chain(to..KEYS).for_each(|j| *row.add(j) = f32::NEG_INFINITY);
                let mut largest = s.load(row);
                for j in (S::LANES..KEYS).step_by(S::LANES) {
                    largest = s.max(largest, s.load(row.add(j)));
                }
                let largest = s.reduce_max(largest).max(*top.add(i));
                let mut total = s.zero();
                for j in (0..KEYS).step_by(S::LANES) {
                    let e = math::exp_not_positive(s, s.sub(s.load(row.add(j)), s.splat(largest)));
                    s.store(row.add(j), e);
                    total = s.add(total, e);
                }
                let rest = math::scalar(s, *top.add(i) - largest, math::exp_not_positive);
                *fade.add(i) = rest;
                *sum.add(i) = *sum.add(i) * rest + s.reduce_add(total);
                *top.add(i) = largest;
            }
        }
    }
}
