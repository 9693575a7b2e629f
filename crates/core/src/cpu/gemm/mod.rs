//! The matrix product C[m, n] = start + A[m, k] · B[k, n] in f32, B in f32, bf16 or blocks of few bits.
//!
//! A and B are views with any strides, so x · Wᵀ, dy · W and dyᵀ · x are one function; weights that are used often
//! are packed once ([`PackedMatrix`]). The scheme is that of BLIS (Van Zee and van de Geijn, 2015): panels of A and B
//! packed for the caches, tiles of C in registers, threads over tiles.
//!
//! # Invariants
//! Every element of C is one sequential chain of fused multiply-adds over ascending k, begun with its start value
//! (0, C or bias) and never split. So its bits depend on its row of A, its column of B and the level of instructions
//! alone: not on m, n, strides, packing, the number of threads, or the place in C. Blocks of k go on where the ones
//! before left off, in C. ([`Isa::Portable`] rounds products before adding.)
//! Products of bf16 by tiles ([`Rhs::Rounded`], and bf16 weights packed for [`Isa::Amx`]) add up in another order, stated
//! in `tiles`, under the same invariant; and so do products with blocks ([`Rhs::Blocks`]), stated in `blocks`.
//!
//! # Error
//! |computed − exact| ≤ (k + 1) · 2⁻²⁴ · (|start| + Σ |a| |b|) to first order; twice that for `Isa::Portable`.
//! By tiles, A and B being rounded first: (k/32 + 18) · 2⁻²⁴ in place of (k + 1) · 2⁻²⁴. With blocks: see there.

mod blocks;
mod drive;
mod kernel;
mod matrix;
mod pack;
mod packed;
#[cfg(test)]
mod tests;
mod tiles;

use super::Cpu;
use super::isa::Isa;
use super::pool::Pool;
use drive::{Right, drive, rows_of_tile};

pub use blocks::{BlockMatrix, LEAST, arrange_blocks, blocks_len, encode_blocks};
pub use kernel::Weight;
pub use matrix::{MatMut, MatRef};
pub use packed::{Data, PackedBuffer, PackedMatrix, pack_into, packed_len};

/// The right-hand side of a product, `[k, n]`.
#[derive(Clone, Copy, Debug)]
pub enum Rhs<'a> {
    /// A view with any strides.
    Strided(MatRef<'a>),
    /// A matrix packed for the level of instructions in use.
    Packed(PackedMatrix<'a>),
    /// Rows of Bᵀ in blocks of few bits a number, arranged in panels. A is rounded to 8 bits a number.
    Blocks(BlockMatrix<'a>),
    /// As `Strided`, but A and B are rounded to bf16 as they are packed, and the product is that of [`Isa::Amx`] for bf16
    /// weights, at every level.
    Rounded(MatRef<'a>),
}

impl Rhs<'_> {
    /// With `rounded`, a view as [`Rhs::Rounded`]; packed matrices are what they are.
    pub(crate) fn rounded_if(self, rounded: bool) -> Self {
        match self {
            Rhs::Strided(b) if rounded => Rhs::Rounded(b),
            other => other,
        }
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            Rhs::Strided(b) | Rhs::Rounded(b) => (b.rows(), b.cols()),
            Rhs::Packed(b) => (b.k(), b.n()),
            Rhs::Blocks(b) => (b.k(), b.n()),
        }
    }
}

impl<'a> From<MatRef<'a>> for Rhs<'a> {
    fn from(b: MatRef<'a>) -> Rhs<'a> {
        Rhs::Strided(b)
    }
}

impl<'a> From<PackedMatrix<'a>> for Rhs<'a> {
    fn from(b: PackedMatrix<'a>) -> Rhs<'a> {
        Rhs::Packed(b)
    }
}

/// What the sums over k start from.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// C = A · B; what C held does not count.
    Zero,
    /// C = C + A · B: accumulation of gradients, or a residual already in C.
    C,
    /// C = bias + A · B, the bias `[n]` added to every row; what C held does not count.
    Bias(&'a [f32]),
}

/// C[m, n] = start + A[m, k] · B[k, n] on all threads. Any of m, n and k may be 0; with k = 0 C becomes its start.
///
/// # Panics
/// Where shapes do not fit together, or B was packed for another level of instructions.
pub fn gemm<'a>(cpu: &Cpu, c: MatMut<'_>, start: Start<'_>, a: MatRef<'_>, b: impl Into<Rhs<'a>>) {
    product(Some(&cpu.pool), cpu.isa, c, start, a, b.into());
}

/// [`gemm`] on the calling thread alone, for use inside tasks. Allocates nothing once a thread has seen the largest
/// shape it is used for.
///
/// # Panics
/// As [`gemm`].
pub fn gemm_serial<'a>(isa: Isa, c: MatMut<'_>, start: Start<'_>, a: MatRef<'_>, b: impl Into<Rhs<'a>>) {
    product(None, isa, c, start, a, b.into());
}

fn product(pool: Option<&Pool>, isa: Isa, c: MatMut<'_>, start: Start<'_>, a: MatRef<'_>, b: Rhs<'_>) {
    let (k, n) = b.shape();
    assert!(
        c.rows() == a.rows() && c.cols() == n && a.cols() == k,
        "C {} × {} does not fit A {} × {} and B {k} × {n}",
        c.rows(),
        c.cols(),
        a.rows(),
        a.cols()
    );
    if let Start::Bias(bias) = start {
        assert_eq!(bias.len(), n, "the bias needs a value for every column");
    }
    if c.rows() == 0 || n == 0 {
        return;
    }
    // A level this machine lacks runs as the portable one, and must be packed for as such.
    let isa = if isa.is_available() { isa } else { Isa::Portable };
    let rows = rows_of_tile(isa);
    match b {
        Rhs::Strided(b) => drive::<f32>(pool, isa, c, start, a, Right::Strided(b), rows),
        Rhs::Blocks(b) => blocks::drive(pool, isa, c, start, a, b),
        Rhs::Rounded(b) => tiles::drive(pool, isa, c, start, a, tiles::Right::Strided(b)),
        Rhs::Packed(b) => match b.data() {
            // Tiles are the same for all levels.
            Data::Tiles(data) => tiles::drive(pool, isa, c, start, a, tiles::Right::Packed(data)),
            Data::F32(data) => drive(pool, isa, c, start, a, Right::Packed(b.checked(isa, data)), rows),
            Data::Bf16(data) => drive(pool, isa, c, start, a, Right::Packed(b.checked(isa, data)), rows),
        },
    }
}
