//! Weights in blocks of few bits a number ([`crate::quant`]) as the right-hand side of a product.
//!
//! A is rounded to 8 bits as well, in groups of 32 with a scale each, so products of whole numbers do most of the work: for
//! one row and for many alike. The sum over a group is exact; sums of groups are added in f32.
//!
//! # Invariants
//! The bits of an element of C depend on its row of A, its column of B, its start and the level of instructions alone, as
//! for every product: groups are added in order, one multiply-add each.
//!
//! # Error
//! With a' the rounded A and w the decoded weights, |computed − Σ a' w| ≤ (k/32 + 3) · 2⁻²⁴ · (|start| + Σ (|a'| (|w| + 2 min)))
//! to first order, where min is what the part of a block with w has for a minimum (0 but for Q4_K); twice that for
//! [`Isa::Portable`]. |a − a'| is at most 1/254 of the largest magnitude of its group, and within [`LEAST`] of it.

mod kernel;
mod panels;
mod rounded;
#[cfg(test)]
mod tests;

use super::super::isa::Isa;
use super::super::pool::Pool;
use super::drive::{Grid, READ_COST, SERIAL_WORK, Shared, region, with_workspace};
use super::kernel::From;
use super::matrix::{MatMut, MatRef};
use super::{Start, rows_of_tile};
use crate::dtype::DType;
use crate::quant;
use panels::{Panel, ROWS};
use rounded::{GROUP, RoundRows, Rounded};

pub use rounded::LEAST;

/// Groups of A that a task rounds at least.
const TASK_GROUPS: usize = 512;

/// B[k, n] as the rows of W = Bᵀ `[n, k]` in blocks: panels of 16 rows, each block after block.
#[derive(Clone, Copy, Debug)]
pub struct BlockMatrix<'a> {
    data: &'a [u8],
    panel: Panel,
    k: usize,
    n: usize,
}

/// Bytes of W `[n, k]` in panels of blocks.
///
/// # Panics
/// Where the type is none of blocks, or that number does not fit into a `usize`.
pub fn blocks_len(dtype: DType, k: usize, n: usize) -> usize {
    let len = Panel::of(dtype).bytes(k).checked_mul(n.div_ceil(ROWS));
    len.unwrap_or_else(|| panic!("{n} rows of {k} numbers do not fit into memory"))
}

/// Encodes W `[n, k]`, row-major, and arranges its blocks in panels.
///
/// # Panics
/// Where `to` has not [`blocks_len`] bytes.
pub fn encode_blocks(pool: &Pool, dtype: DType, w: &[f32], (n, k): (usize, usize), to: &mut [u8]) {
    assert_eq!(w.len(), n * k, "a row of k numbers for each of n");
    arrange(pool, dtype, (n, k), to, |row, blocks| quant::encode(dtype, &w[row * k..][..k], blocks));
}

/// Arranges W `[n, k]` in panels, whose rows lie in blocks one after the other, as in a file.
///
/// # Panics
/// Where `rows` or `to` have another length.
pub fn arrange_blocks(pool: &Pool, dtype: DType, rows: &[u8], (n, k): (usize, usize), to: &mut [u8]) {
    let row_bytes = dtype.row_bytes(k);
    assert_eq!(rows.len(), n * row_bytes, "a row of blocks for each of n");
    arrange(pool, dtype, (n, k), to, |row, blocks| blocks.copy_from_slice(&rows[row * row_bytes..][..row_bytes]));
}

/// Fills panels with rows of blocks that `read` gives.
fn arrange(pool: &Pool, dtype: DType, (n, k): (usize, usize), to: &mut [u8], read: impl Fn(usize, &mut [u8]) + Sync) {
    assert_eq!(to.len(), blocks_len(dtype, k, n), "blocks_len bytes are needed");
    let panel = Panel::of(dtype);
    let bytes = panel.bytes(k);
    if bytes == 0 {
        return;
    }
    pool.chunks_mut(to, bytes, |start, to| {
        let mut row = vec![0; dtype.row_bytes(k)];
        to.fill(0);
        let first = start / bytes * ROWS;
        for lane in 0..ROWS.min(n - first) {
            read(first + lane, &mut row);
            panel.put(lane, &row, to);
        }
    });
}

impl<'a> BlockMatrix<'a> {
    /// What [`encode_blocks`] or [`arrange_blocks`] wrote.
    ///
    /// # Panics
    /// Where `data` has not [`blocks_len`] bytes.
    pub fn new(dtype: DType, k: usize, n: usize, data: &'a [u8]) -> BlockMatrix<'a> {
        assert_eq!(data.len(), blocks_len(dtype, k, n), "blocks_len bytes are needed");
        BlockMatrix { data, panel: Panel::of(dtype), k, n }
    }

    /// The number of rows of B, the inner dimension of the product.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The number of columns of B.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Reads column `j` of B, which is row `j` of W: an embedding row of tied weights.
    ///
    /// # Panics
    /// Where there is no such column, or `to` has not k values.
    pub fn column(&self, j: usize, to: &mut [f32]) {
        assert!(j < self.n, "column {j} of {}", self.n);
        assert_eq!(to.len(), self.k, "a column has k values");
        let bytes = self.panel.bytes(self.k);
        self.panel.decode(j % ROWS, &self.data[j / ROWS * bytes..][..bytes], to);
    }
}

/// C = start + A · B. Shapes have been checked; neither m nor n is 0.
pub(super) fn drive(
    pool: Option<&Pool>,
    isa: Isa,
    mut c: MatMut<'_>,
    start: Start<'_>,
    a: MatRef<'_>,
    b: BlockMatrix<'_>,
) {
    let (m, n, k) = (a.rows(), c.cols(), a.cols());
    let (groups, panel_bytes) = (b.panel.blocks(k) * b.panel.len() / GROUP, b.panel.bytes(k));
    let work = (m + READ_COST).saturating_mul(n).saturating_mul(k);
    let pool = pool.filter(|pool| pool.threads() > 1 && work >= SERIAL_WORK);
    let (c_stride, c) = (c.row_stride(), Shared(c.as_mut_ptr()));
    with_workspace(m * groups * (size_of::<Rounded>() / 4), |workspace| {
        let rounded = Shared(workspace.cast::<Rounded>());
        let rows = TASK_GROUPS.div_ceil(groups.max(1));
        region(pool, m.div_ceil(rows), |task| {
            let (first, last) = (task * rows, m.min((task + 1) * rows));
            // SAFETY: the workspace has room for all rows, and each belongs to one task.
            isa.run(RoundRows {
                a: a.row_range(first..last),
                groups,
                to: unsafe { rounded.get().add(first * groups) },
            });
        });
        let threads = pool.map_or(1, Pool::threads);
        let grid = Grid::new(m, n.div_ceil(ROWS), k * ROWS, READ_COST, rows_of_tile(isa), threads);
        region(pool, grid.tasks(), |task| {
            let (rows, panels) = grid.place(task);
            let column = panels.start * ROWS;
            isa.run_bytes(kernel::Product {
                panel: b.panel,
                blocks: b.panel.blocks(k),
                // SAFETY: the rows lie inside of the workspace, where they have been written.
                a: unsafe { rounded.get().add(rows.start * groups) }.cast_const(),
                rows: rows.len(),
                b: b.data[panels.start * panel_bytes..].as_ptr(),
                columns: n.min(panels.end * ROWS) - column,
                // SAFETY: the block lies inside of C, and no other task's block overlaps it.
                c: unsafe { c.get().add(rows.start * c_stride + column) },
                c_stride,
                from: match start {
                    Start::Zero => From::Zero,
                    Start::C => From::C,
                    Start::Bias(bias) => From::Bias(bias[column..].as_ptr()),
                },
            });
        });
    });
}
