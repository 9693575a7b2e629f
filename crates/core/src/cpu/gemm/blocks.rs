//! Weights in blocks of few bits a number ([`crate::quant`]) as the right-hand side of a product.

use super::super::isa::Isa;
use super::super::pool::Pool;
use super::drive::pack;
use super::kernel::panel_columns;
use super::matrix::MatRef;
use crate::dtype::DType;
use crate::quant;

/// B[k, n] as the rows of W = Bᵀ `[n, k]`, each in blocks. Products decode pieces of it into their workspace, so they are
/// the f32 product with the decoded numbers.
#[derive(Clone, Copy, Debug)]
pub struct BlockMatrix<'a> {
    data: &'a [u8],
    dtype: DType,
    k: usize,
    n: usize,
}

/// Bytes of W `[n, k]` in blocks.
///
/// # Panics
/// Where that number does not fit into a `usize`.
pub fn blocks_len(dtype: DType, k: usize, n: usize) -> usize {
    let len = dtype.row_bytes(k).checked_mul(n);
    len.unwrap_or_else(|| panic!("{n} rows of {k} numbers do not fit into memory"))
}

/// Encodes W `[n, k]`, row-major.
///
/// # Panics
/// Where `to` has not [`blocks_len`] bytes.
pub fn encode_blocks(pool: &Pool, dtype: DType, w: &[f32], (n, k): (usize, usize), to: &mut [u8]) {
    assert_eq!((w.len(), to.len()), (n * k, blocks_len(dtype, k, n)), "a row of blocks for each row");
    let row_bytes = dtype.row_bytes(k);
    if row_bytes > 0 {
        pool.chunks_mut(to, row_bytes, |start, blocks| {
            let row = start / row_bytes;
            quant::encode(dtype, &w[row * k..][..k], blocks);
        });
    }
}

impl<'a> BlockMatrix<'a> {
    /// What [`encode_blocks`] wrote, or rows of blocks from a file.
    ///
    /// # Panics
    /// Where `data` has not [`blocks_len`] bytes.
    pub fn new(dtype: DType, k: usize, n: usize, data: &'a [u8]) -> BlockMatrix<'a> {
        assert_eq!(data.len(), blocks_len(dtype, k, n), "blocks_len bytes are needed");
        BlockMatrix { data, dtype, k, n }
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
        self.decode(j, 0, to);
    }

    /// Decodes row `row` of W from number `first` on, which starts a block.
    fn decode(&self, row: usize, first: usize, to: &mut [f32]) {
        let (kind, row_bytes) = (self.dtype.blocks().expect("a type of blocks"), self.dtype.row_bytes(self.k));
        let row = &self.data[row * row_bytes..][..row_bytes];
        kind.decode(&row[kind.row_bytes(first)..], to);
    }

    /// Packs `steps` of k from `first` on, which starts a block, of one panel: columns `column .. column + columns`.
    pub(super) fn pack(
        &self,
        isa: Isa,
        (column, columns): (usize, usize),
        (first, steps): (usize, usize),
        rows: &mut [f32],
        to: *mut f32,
    ) {
        if steps == 0 {
            return;
        }
        for (i, row) in rows[..columns * steps].chunks_exact_mut(steps).enumerate() {
            self.decode(column + i, first, row);
        }
        pack(isa, MatRef::new(&rows[..columns * steps], columns, steps), panel_columns(isa.lanes()), to);
    }
}
