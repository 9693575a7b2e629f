//! A small matrix product with both operands in the first-level caches: nothing is packed.
//!
//! Each element is one chain of multiply-adds over k in rising order, whatever the other rows and columns are: a row
//! has the same bits in a product of fewer rows, and zeros at the end of a row of A change nothing.
//!
//! Beside [`crate::cpu::gemm::gemm_serial`], which computes the same bits, because blocks are small: not packing them
//! gives 97 % and more of the multiply-add peak where that one gives 87 to 92 % (AVX-512, products of 64 to 128 a
//! side), and it knows triangular operands and starts scaled by row, which would be passes over memory otherwise.

use super::lanes;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;

/// The most rows of a tile. Rows of A are read as far as a tile's, and B's rows up to a whole vector: operands need that
/// much room behind them (see [`super::workspace::Bump::take`]).
pub(crate) const TILE_ROWS: usize = 8;

/// What a sum starts from.
#[derive(Clone, Copy)]
pub(crate) enum Init {
    Zero,
    /// `by` times the element of a matrix (which may be the output itself).
    Scaled {
        from: *const f32,
        row: usize,
        by: f32,
    },
    /// As `Scaled`, with a factor for each row.
    ScaledRows {
        from: *const f32,
        row: usize,
        by: *const f32,
    },
}

/// Which part of the product is not known to be zero or of no interest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Band {
    Full,
    /// A is lower triangular: k ≤ i. Elements above the diagonal are zero for k < i + [`TILE_ROWS`].
    LowerA,
    /// A is upper triangular: k ≥ i. Elements below the diagonal are zero for k > i − [`TILE_ROWS`].
    UpperA,
    /// Only elements j ≤ i of the result are needed; some others are computed.
    LowerResult,
    /// Only elements j ≥ i of the result are needed; some others are computed.
    UpperResult,
}

/// out[i, j] = init + Σ_k A[i, k] · B[k, j] for i < m, j < n.
///
/// `a_row` and `a_col` are the steps between rows and columns of A, so A may be stored transposed.
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    pub b: *const f32,
    pub b_row: usize,
    pub out: *mut f32,
    pub out_row: usize,
    pub init: Init,
    pub band: Band,
}

impl Kernel for Product {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // A tile's sums, two vectors of B and an element of A fill the registers.
        if S::REGISTERS >= 32 { self.panels::<S, TILE_ROWS>(s) } else { self.panels::<S, 6>(s) }
    }
}

impl Product {
    /// Panels of two vectors of columns, each walked by tiles of `R` rows: the panel of B stays in the first cache.
    #[inline(always)]
    fn panels<S: Simd, const R: usize>(&self, s: S) {
        let mut j = 0;
        while j < self.n {
            let wide = self.n - j > S::LANES;
            let width = if wide { 2 * S::LANES } else { S::LANES };
            for i in (0..self.m).step_by(R) {
                if self.band == Band::LowerResult && j >= i + R || self.band == Band::UpperResult && j + width <= i {
                    continue;
                }
                // SAFETY: the tile starts inside the matrices, and the operands have the room that the fields ask for.
                unsafe { if wide { self.tile::<S, R, 2>(s, i, j) } else { self.tile::<S, R, 1>(s, i, j) } }
            }
            j += width;
        }
    }

    /// # Safety
    /// (i, j) lies inside the result.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, s: S, i: usize, j: usize) {
        let rows = R.min(self.m - i);
        let (start, end) = match self.band {
            Band::LowerA => (0, self.k.min(i + R)),
            Band::UpperA => (i, self.k),
            _ => (0, self.k),
        };
        let mut sums = [[s.zero(); C]; R];
        let (from, row) = match self.init {
            Init::Zero => (std::ptr::null(), 0),
            Init::Scaled { from, row, .. } | Init::ScaledRows { from, row, .. } => (from, row),
        };
        if !from.is_null() {
            for (r, sums) in sums.iter_mut().enumerate().take(rows) {
                // SAFETY: row i + r and the columns from j on lie inside the matrix.
                unsafe {
                    let by = s.splat(match self.init {
                        Init::ScaledRows { by, .. } => *by.add(i + r),
                        Init::Scaled { by, .. } => by,
                        Init::Zero => 0.0,
                    });
                    for (c, sum) in sums.iter_mut().enumerate() {
                        let at = j + c * S::LANES;
                        *sum = s.mul(by, lanes::load(s, from.add((i + r) * row + at), self.n - at));
                    }
                }
            }
        }
        // SAFETY: A may be read up to a multiple of R rows and B up to whole vectors; k < self.k.
        unsafe {
            let mut a = self.a.add(i * self.a_row + start * self.a_col);
            let mut b = self.b.add(start * self.b_row + j);
            for _ in start..end {
                let mut row = [s.zero(); C];
                for (c, v) in row.iter_mut().enumerate() {
                    *v = s.load(b.add(c * S::LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let factor = s.splat(*a.add(r * self.a_row));
                    for (sum, v) in sums.iter_mut().zip(row) {
                        *sum = s.fma(factor, v, *sum);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
        }
        for (r, sums) in sums.iter().enumerate().take(rows) {
            for (c, sum) in sums.iter().enumerate() {
                let at = j + c * S::LANES;
                // SAFETY: as for the initial values.
                unsafe { lanes::store(s, self.out.add((i + r) * self.out_row + at), *sum, self.n - at) };
            }
        }
    }
}
