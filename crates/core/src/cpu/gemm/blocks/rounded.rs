//! The left-hand side in 8 bits a number.

use super::super::super::isa::Kernel;
use super::super::super::simd::{ROUNDING, Simd};
use super::super::matrix::MatRef;

/// Numbers of a row that are rounded together.
pub(super) const GROUP: usize = 32;

/// Groups without a larger magnitude count as 0.
pub const LEAST: f32 = 1e-30;

/// A group of a row: scale · q. Not a number where any of them is none; infinite or that where one is infinite.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Rounded {
    /// From −127 to 127.
    pub q: [i8; GROUP],
    /// Sums of the first and of the second half of q.
    pub sums: [i32; 2],
    pub scale: f32,
}

impl Rounded {
    /// The largest magnitude becomes 127; ties go to even. Multiplications and additions only, none fused, so all levels of
    /// instructions have the same bits.
    #[inline(always)]
    fn new(x: &[f32; GROUP]) -> Rounded {
        // As bits, so that what is not a number counts as the largest.
        let bits = x.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
        let largest = f32::from_bits(bits);
        if largest < LEAST {
            return Rounded { q: [0; GROUP], sums: [0; 2], scale: 0.0 };
        }
        let inverse = 127.0 / largest;
        let mut q = [0; GROUP];
        for (q, x) in q.iter_mut().zip(x) {
            // The whole number is in the lowest bits.
            *q = (x * inverse + ROUNDING).to_bits() as i8;
        }
        let sum = |half: &[i8]| half.iter().map(|&q| i32::from(q)).sum();
        Rounded { q, sums: [sum(&q[..GROUP / 2]), sum(&q[GROUP / 2..])], scale: largest / 127.0 }
    }
}

/// Rounds rows in groups; numbers missing in the last ones are 0.
pub(super) struct RoundRows<'a> {
    pub a: MatRef<'a>,
    /// Groups of a row.
    pub groups: usize,
    /// Room for the groups of all rows.
    pub to: *mut Rounded,
}

impl Kernel for RoundRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (a, k, step) = (self.a, self.a.cols(), self.a.col_stride());
        for row in 0..a.rows() {
            for group in 0..self.groups {
                let first = group * GROUP;
                let count = k.saturating_sub(first).min(GROUP);
                let mut x = [0.0; GROUP];
                // SAFETY: only numbers of the row are read; whoever made this vouches for the room.
                unsafe {
                    let from = a.as_ptr().wrapping_add(row * a.row_stride() + first * step);
                    if step == 1 && count == GROUP {
                        x = from.cast::<[f32; GROUP]>().read();
                    } else {
                        for (i, x) in x.iter_mut().enumerate().take(count) {
                            *x = *from.add(i * step);
                        }
                    }
                    self.to.add(row * self.groups + group).write(Rounded::new(&x));
                }
            }
        }
    }
}
