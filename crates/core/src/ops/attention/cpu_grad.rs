//! The gradient: a task has a segment and a key and value head, so all sums are its own.
//!
//! It walks through the blocks of keys and, for each, through the queries that see it, whose weights it computes again:
//! with P = exp(scores − ln Σ exp) and δ = Σ y · dy of a query, dV = Pᵀ dY, dS = P ⊙ (dY Vᵀ − δ), dQ = dS K / √P and
//! dK = dSᵀ Q / √P (Dao et al., algorithm 4).

use std::ops::Range;

use super::cpu::{Inputs, KEYS, Sequence, seen_of_block, task_values};
use super::{Gradient, Shape};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::ssd::lanes::Transpose;
use crate::ops::ssd::product::{Band, Init, Product, TILE_ROWS};
use crate::ops::ssd::workspace::Bump;
use crate::ops::tasks::{Scratch, run_with_slots};

pub(super) fn workspace(shape: &Shape, cpu: &Cpu) -> usize {
    Scratch::bytes(cpu.pool.threads(), task_values(|bump| _ = Block::take(bump, shape)))
}

pub(super) fn run(shape: &Shape, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(*shape, io);
    let values = task_values(|bump| _ = Block::take(bump, shape));
    let scratch = Scratch::new(io.workspace()).take(cpu.pool.threads(), values);
    let outputs = [0, 1, 2].map(|i| io.optional_output(i));
    let known = Known { dy: io.input(Gradient::DY), y: io.input(Gradient::Y), log_sums: io.input(Gradient::LOG_SUMS) };
    run_with_slots(&cpu.pool, inputs.segments.len() * shape.kv_heads, |slot, task| {
        // SAFETY: no other task uses the slot's row meanwhile.
        let memory = unsafe { scratch.row_mut::<f32>(slot) }.as_mut_ptr();
        let block = Block::take(&mut Bump::new(memory.cast()), shape);
        let (segment, head) = (task / shape.kv_heads, task % shape.kv_heads);
        let rows = inputs.segments.rows(segment);
        // SAFETY: this task alone writes this head's columns of the segment's rows.
        unsafe { block.run(&inputs.sequence(segment, head), rows, known, outputs, cpu) };
    });
    outputs.into_iter().flatten().for_each(|out| inputs.segments.clear_rest(out));
}

/// What the forward pass left, and the gradient of its output.
#[derive(Clone, Copy)]
struct Known {
    dy: Mat,
    y: Mat,
    log_sums: Mat,
}

/// Scratch memory of a task: a block of keys and a tile of queries.
struct Block {
    keys: *mut f32,
    values: *mut f32,
    keys_t: *mut f32,
    values_t: *mut f32,
    d_keys: *mut f32,
    d_values: *mut f32,
    q: *mut f32,
    dy: *mut f32,
    dq: *mut f32,
    /// Scores, then P.
    weights: *mut f32,
    /// dY Vᵀ, then dS.
    d_scores: *mut f32,
    log_sums: *mut f32,
    deltas: *mut f32,
}

impl Block {
    fn take(bump: &mut Bump, shape: &Shape) -> Block {
        let (rows, p) = (shape.tile_rows(), shape.headdim);
        let mut keys = || bump.take(KEYS * p);
        let (k, v, keys_t, values_t, d_keys, d_values) = (keys(), keys(), keys(), keys(), keys(), keys());
        let mut tile = |cols| bump.take(rows * cols);
        Block {
            keys: k,
            values: v,
            keys_t,
            values_t,
            d_keys,
            d_values,
            q: tile(p),
            dy: tile(p),
            dq: tile(p),
            weights: tile(KEYS + TILE_ROWS),
            d_scores: tile(KEYS + TILE_ROWS),
            log_sums: tile(1),
            deltas: tile(1),
        }
    }

    /// # Safety
    /// The rows are the segment's; nobody else writes the head's columns of them.
    unsafe fn run(
        &self,
        sequence: &Sequence<'_>,
        rows: Range<usize>,
        known: Known,
        [dq, dk, dv]: [Option<Mat>; 3],
        cpu: &Cpu,
    ) {
        let shape = sequence.inputs.shape;
        let (p, width) = (shape.headdim, shape.group() * shape.headdim);
        if rows.is_empty() {
            return;
        }
        let (first, end) = (sequence.position(rows.start), sequence.position(rows.end - 1) + 1);
        let seen = sequence.first_seen(first)..end;
        let grid = KEYS as u64;
        // SAFETY: as the caller says; the arrays have the sizes that `take` gave them.
        unsafe {
            if let Some(dq) = dq {
                for row in rows.clone() {
                    std::slice::from_raw_parts_mut(dq.at::<f32>(row, sequence.head * width), width).fill(0.0);
                }
            }
            for block in (seen.start / grid * grid..end).step_by(KEYS) {
                sequence.copy_block(block, &seen, self.keys, self.values);
                for (from, to) in [(self.keys, self.keys_t), (self.values, self.values_t)] {
                    cpu.isa.run(Transpose { from, from_row: p, rows: KEYS, cols: p, to, to_row: KEYS });
                }
                std::ptr::write_bytes(self.d_keys, 0, KEYS * p);
                std::ptr::write_bytes(self.d_values, 0, KEYS * p);
                // The queries that see some key of the block.
                let last = (block + grid - 1 + shape.window as u64).min(end);
                let queries = block.max(first)..last;
                for query in queries.clone().step_by(shape.queries()) {
                    let Some(row) = sequence.row(query) else { continue };
                    let count = shape.queries().min((queries.end - query) as usize);
                    self.tile(sequence, row..row + count, block, known, dq, cpu);
                }
                for (i, position) in (block..block + grid).enumerate() {
                    let Some(row) = sequence.row(position).filter(|row| rows.contains(row)) else { continue };
                    for (out, from) in [(dk, self.d_keys), (dv, self.d_values)] {
                        if let Some(out) = out {
                            std::ptr::copy_nonoverlapping(from.add(i * p), out.at::<f32>(row, sequence.head * p), p);
                        }
                    }
                }
            }
        }
    }

    /// What the queries of some rows add to the gradients of a block, and it to theirs.
    ///
    /// # Safety
    /// As [`Block::run`]; the block is loaded.
    unsafe fn tile(
        &self,
        sequence: &Sequence<'_>,
        rows: Range<usize>,
        block: u64,
        known: Known,
        dq: Option<Mat>,
        cpu: &Cpu,
    ) {
        let shape = sequence.inputs.shape;
        let (p, group, m) = (shape.headdim, shape.group(), rows.len() * shape.group());
        let width = group * p;
        // SAFETY: as the caller says.
        unsafe {
            sequence.copy_tile(sequence.inputs.q, rows.clone(), sequence.scale(), self.q);
            sequence.copy_tile(known.dy, rows.clone(), 1.0, self.dy);
            for i in 0..m {
                let (row, head) = (rows.start + i / group, sequence.head * group + i % group);
                let y = std::slice::from_raw_parts(known.y.at::<f32>(row, head * p), p);
                let dy = std::slice::from_raw_parts(self.dy.add(i * p), p);
                *self.deltas.add(i) = y.iter().zip(dy).map(|(y, dy)| y * dy).sum();
                *self.log_sums.add(i) = *known.log_sums.at::<f32>(row, head);
            }
            // (rows, n, k), A with the steps of its rows and columns, B with that of its rows, the result.
            let product =
                |(m, n, k), (a, a_row, a_col): (*mut f32, _, _), (b, b_row): (*mut f32, _), out, out_row, add| {
                    let from = out as *const f32;
                    let init = if add { Init::Scaled { from, row: out_row, by: 1.0 } } else { Init::Zero };
                    let (a, b, band) = (a.cast_const(), b.cast_const(), Band::Full);
                    cpu.isa.run(Product { m, n, k, a, a_row, a_col, b, b_row, out, out_row, init, band });
                };
            product((m, KEYS, p), (self.q, p, 1), (self.keys_t, KEYS), self.weights, KEYS, false);
            product((m, KEYS, p), (self.dy, p, 1), (self.values_t, KEYS), self.d_scores, KEYS, false);
            cpu.isa.run(Weights { block: self, sequence, m, group, first: sequence.position(rows.start), at: block });
            product((KEYS, p, m), (self.weights, 1, KEYS), (self.dy, p), self.d_values, p, true);
            product((KEYS, p, m), (self.d_scores, 1, KEYS), (self.q, p), self.d_keys, p, true);
            if let Some(dq) = dq {
                product((m, p, KEYS), (self.d_scores, KEYS, 1), (self.keys, p), self.dq, p, false);
                for (i, row) in rows.enumerate() {
                    let to = std::slice::from_raw_parts_mut(dq.at::<f32>(row, sequence.head * width), width);
                    let from = std::slice::from_raw_parts(self.dq.add(i * width), width);
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += sequence.scale() * from);
                }
            }
        }
    }
}

/// Scores become P, and dY Vᵀ becomes dS.
struct Weights<'a> {
    block: &'a Block,
    sequence: &'a Sequence<'a>,
    m: usize,
    group: usize,
    /// Position of the tile's first query, and of the block's first key.
    first: u64,
    at: u64,
}

impl Kernel for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { weights, d_scores, log_sums, deltas, .. } = *self.block;
        for i in 0..self.m {
            let (from, to) = seen_of_block(self.sequence, self.first + (i / self.group) as u64, self.at);
            // SAFETY: the tile has room for `m` rows of KEYS values.
            unsafe {
                let (row, d_row) = (weights.add(i * KEYS), d_scores.add(i * KEYS));
                (0..from).chain(to..KEYS).for_each(|j| *row.add(j) = f32::NEG_INFINITY);
                let (log_sum, delta) = (s.splat(*log_sums.add(i)), s.splat(*deltas.add(i)));
                for j in (0..KEYS).step_by(S::LANES) {
                    let weight = math::exp(s, s.sub(s.load(row.add(j)), log_sum));
                    let d = s.mul(weight, s.sub(s.load(d_row.add(j)), delta));
                    s.store(row.add(j), weight);
                    s.store(d_row.add(j), d);
                }
            }
        }
    }
}
