//! Loads and stores of up to one vector, and a transposition: what kernels over rows of any width need.

use crate::cpu::isa::Kernel;
use crate::cpu::simd::{MAX_LANES, Simd};

/// Reads `min(n, LANES)` values, 0 in the other lanes.
///
/// # Safety
/// `from` is valid for reading that many values.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd>(s: S, from: *const f32, n: usize) -> S::V {
    // SAFETY: the caller vouches for the values.
    unsafe { if n >= S::LANES { s.load(from) } else { s.load_partial(from, n) } }
}

/// Writes the first `min(n, LANES)` lanes.
///
/// # Safety
/// `to` is valid for writing that many values.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd>(s: S, to: *mut f32, v: S::V, n: usize) {
    // SAFETY: the caller vouches for the values.
    unsafe { if n >= S::LANES { s.store(to, v) } else { s.store_partial(to, v, n) } }
}

/// to[c, r] = from[r, c] for a matrix of `rows` × `cols`.
pub(crate) struct Transpose {
    pub from: *const f32,
    pub from_row: usize,
    pub rows: usize,
    pub cols: usize,
    pub to: *mut f32,
    pub to_row: usize,
}

impl Kernel for Transpose {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in (0..self.rows).step_by(S::LANES) {
            let height = S::LANES.min(self.rows - r);
            for c in (0..self.cols).step_by(S::LANES) {
                let width = S::LANES.min(self.cols - c);
                let mut square = [s.zero(); MAX_LANES];
                // SAFETY: rows r .. r + height and columns c .. c + width lie inside both matrices, which the caller
                // of the kernel vouches for.
                unsafe {
                    for (i, row) in square.iter_mut().enumerate().take(height) {
                        *row = load(s, self.from.add((r + i) * self.from_row + c), width);
                    }
                    let square = s.transpose(square);
                    for (i, row) in square.iter().enumerate().take(width) {
                        store(s, self.to.add((c + i) * self.to_row + r), *row, height);
                    }
                }
            }
        }
    }
}
