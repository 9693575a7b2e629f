//! The gradient of the norms on the CPU.
//!
//! A task takes a block of rows. It writes their dx, and the block's part of dweight and dbias into the workspace; the
//! parts are summed afterwards, in the order of the blocks. How many rows a block has depends on their number only.

use std::ops::Range;

use super::cpu::statistics;
use super::{Kind, Norm};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::Partials;
use crate::ops::vectors::{each, load, splat, store, sum};

/// Rows of a block: at least so many …
const ROWS_PER_BLOCK: usize = 32;
/// … and enough that there are no more blocks than this, which bounds the workspace.
const BLOCKS: usize = 256;
/// Columns whose partial sums one task adds up.
const COLS_PER_TASK: usize = 256;

fn rows_per_block(rows: usize) -> usize {
    rows.div_ceil(BLOCKS).max(ROWS_PER_BLOCK)
}

/// Bytes of the partial sums, of which there are none if neither weight nor bias has a gradient.
pub(super) fn workspace(rows: usize, cols: usize, has_partials: bool) -> usize {
    if has_partials { rows.div_ceil(rows_per_block(rows)) * 2 * cols * size_of::<f32>() } else { 0 }
}

pub(super) fn run(op: &Norm, io: &Io<'_>, cpu: &Cpu) {
    let s = io.input(0);
    let (n, blocks) = (s.cols, s.rows.div_ceil(rows_per_block(s.rows)));
    let sums = [io.optional_output(1), io.optional_output(2)];
    let partials = sums.iter().any(Option::is_some).then(|| Partials::new(io.workspace(), blocks, 2 * n));
    let [weight, ds] = [1, 3].map(|i| io.optional_input(i));
    let (dy, dx) = (io.input(2), io.optional_output(0));
    cpu.pool.chunks(s.rows, rows_per_block(s.rows), |rows| {
        // SAFETY: block b alone writes row b of the partial sums.
        let partial = partials.map(|p| unsafe { p.row_mut(rows.start / rows_per_block(s.rows)) }.split_at_mut(n));
        cpu.isa.run(Backward { op: *op, s, weight, dy, ds, dx, partial, rows });
    });
    let Some(partials) = partials else { return };
    for (i, out) in sums.into_iter().enumerate() {
        let Some(out) = out else { continue };
        cpu.pool.chunks(n, COLS_PER_TASK, |cols| {
            // SAFETY: this task alone writes these columns; the tasks that wrote the partial sums are done.
            let total = unsafe { out.columns(cols.start, cols.len()).row_mut::<f32>(0) };
            total.fill(0.0);
            for b in 0..blocks {
                // SAFETY: as above; the parts are only read now.
                let part = unsafe { partials.row(b) };
                let part = &part[i * n + cols.start..i * n + cols.end];
                total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
            }
        });
    }
}

/// The gradient of some rows, which this kernel alone writes.
struct Backward<'a> {
    op: Norm,
    s: Mat,
    weight: Option<Mat>,
    dy: Mat,
    ds: Option<Mat>,
    dx: Option<Mat>,
    /// These rows' parts of dweight and dbias.
    partial: Option<(&'a mut [f32], &'a mut [f32])>,
    rows: Range<usize>,
}

impl Kernel for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let n = self.s.cols;
        if let Some((dweight, dbias)) = &mut self.partial {
            dweight.fill(0.0);
            dbias.fill(0.0);
        }
        for r in self.rows {
            // SAFETY: row r lies in all operands, and this task alone writes row r of dx, which overlaps no input.
            // The weight is one row and the partial sums are slices as wide as s.
            unsafe {
                let (s, dy) = (self.s.at::<f32>(r, 0), self.dy.at::<f32>(r, 0));
                let weight = self.weight.map(|m| m.ptr::<f32>());
                let (mean, scale) = statistics(simd, &self.op, s, n);
                let normed = |i: usize, lanes: usize| {
                    let v = load(simd, s.add(i), lanes);
                    let v = if self.op.kind == Kind::Layer { simd.sub(v, splat(simd, mean, lanes)) } else { v };
                    simd.mul(v, simd.splat(scale))
                };
                let d_normed = |i: usize, lanes: usize| {
                    let d = load(simd, dy.add(i), lanes);
                    weight.map_or(d, |w| simd.mul(d, load(simd, w.add(i), lanes)))
                };
                if let Some(dx) = self.dx {
                    let dx = dx.at::<f32>(r, 0);
                    let ds = self.ds.map(|m| m.at::<f32>(r, 0));
                    let along = sum(simd, n, |i, lanes| simd.mul(d_normed(i, lanes), normed(i, lanes))) / n as f32;
                    let mean = if self.op.kind == Kind::Layer { sum(simd, n, d_normed) / n as f32 } else { 0.0 };
                    let (along, mean, scale) = (simd.splat(-along), simd.splat(mean), simd.splat(scale));
                    each(simd, n, |i, lanes| {
                        let centred = simd.sub(d_normed(i, lanes), mean);
                        let mut value = simd.mul(scale, simd.fma(normed(i, lanes), along, centred));
                        if let Some(ds) = ds {
                            value = simd.add(value, load(simd, ds.add(i), lanes));
                        }
                        store(simd, dx.add(i), value, lanes);
                    });
                }
                if let Some((dweight, dbias)) = &mut self.partial {
                    let (dweight, dbias) = (dweight.as_mut_ptr(), dbias.as_mut_ptr());
                    each(simd, n, |i, lanes| {
                        let d = load(simd, dy.add(i), lanes);
                        let w = simd.fma(d, normed(i, lanes), load(simd, dweight.add(i), lanes));
                        store(simd, dweight.add(i), w, lanes);
                        store(simd, dbias.add(i), simd.add(d, load(simd, dbias.add(i), lanes)), lanes);
                    });
                }
            }
        }
    }
}
