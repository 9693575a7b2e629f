//! The loops that multiply rounded rows by panels of blocks.

use super::super::super::isa::BytesKernel;
use super::super::super::simd::Bytes;
use super::super::kernel::From;
use super::panels::*;
use super::rounded::{GROUP, Rounded};

/// Vectors that a line of a panel takes at most: four of NEON.
const MOST_VECTORS: usize = 4;

/// Sums of a tile: one lane for each column of the panel, in as many vectors as the level needs.
type Sums<S, const R: usize> = [[<S as super::super::super::simd::Simd>::V; MOST_VECTORS]; R];

/// C[rows, columns] = start + A · B for some panels.
pub(super) struct Product {
    pub panel: Panel,
    /// Blocks of a row of W.
    pub blocks: usize,
    /// Rows of A, one after the other.
    pub a: *const Rounded,
    pub rows: usize,
    /// The first panel.
    pub b: *const u8,
    pub columns: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    pub from: From,
}

impl BytesKernel for Product {
    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        match self.panel {
            Panel::Q8 => self.walk::<S, Q8>(s),
            Panel::Q4 => self.walk::<S, Q4>(s),
            Panel::Q6 => self.walk::<S, Q6>(s),
        }
    }
}

impl Product {
    #[inline(always)]
    fn walk<S: Bytes, T: Block>(&self, s: S) {
        for panel in 0..self.columns.div_ceil(ROWS) {
            let mut row = 0;
            while row < self.rows {
                // SAFETY: whoever made this vouches for A, B and C.
                row += unsafe {
                    match self.rows - row {
                        8.. if S::REGISTERS >= 32 => self.tile::<S, T, 8>(s, row, panel),
                        4.. => self.tile::<S, T, 4>(s, row, panel),
                        2.. => self.tile::<S, T, 2>(s, row, panel),
                        _ => self.tile::<S, T, 1>(s, row, panel),
                    }
                };
            }
        }
    }

    /// R rows from `row` on, by one panel. Returns R.
    ///
    /// # Safety
    /// A, B and C have these rows and this panel.
    #[inline(always)]
    unsafe fn tile<S: Bytes, T: Block, const R: usize>(&self, s: S, row: usize, panel: usize) -> usize {
        let first = panel * ROWS;
        let valid = |v: usize| (self.columns - first).saturating_sub(v * S::LANES).min(S::LANES);
        // SAFETY: the caller vouches for all; partial loads and stores keep to the columns that exist.
        unsafe {
            let c = |r: usize, v: usize| self.c.wrapping_add((row + r) * self.c_stride + first + v * S::LANES);
            let mut sums: Sums<S, R> = [[s.zero(); MOST_VECTORS]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate().take(ROWS / S::LANES) {
                    match self.from {
                        From::Zero => {}
                        From::C => *sum = s.load_partial(c(r, v), valid(v)),
                        From::Bias(bias) => {
                            *sum = s.load_partial(bias.wrapping_add(first + v * S::LANES), valid(v));
                        }
                    }
                }
            }
            let groups = self.blocks * T::LEN / GROUP;
            let mut a = self.a.add(row * groups);
            let mut b = self.b.add(panel * self.blocks * T::BYTES);
            for _ in 0..self.blocks {
                T::add(s, b, Rows { first: a, stride: groups }, &mut sums);
                a = a.add(T::LEN / GROUP);
                b = b.add(T::BYTES);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate().take(ROWS / S::LANES) {
                    s.store_partial(c(r, v), *sum, valid(v));
                }
            }
        }
        R
    }
}

/// A group of each row of a tile.
#[derive(Clone, Copy)]
struct Rows {
    first: *const Rounded,
    /// Groups from row to row.
    stride: usize,
}

impl Rows {
    /// # Safety
    /// The tile has row `r`.
    #[inline(always)]
    unsafe fn get<'a>(self, r: usize) -> &'a Rounded {
        // SAFETY: the caller vouches for the row, which nobody writes meanwhile.
        unsafe { &*self.first.add(r * self.stride) }
    }

    /// The same rows' group `n` further on.
    #[inline(always)]
    fn group(self, n: usize) -> Rows {
        Rows { first: self.first.wrapping_add(n), ..self }
    }

    /// Numbers 4 · step .. 4 · step + 4 of row r in all lanes.
    ///
    /// # Safety
    /// The tile has row `r`; step < 8.
    #[inline(always)]
    unsafe fn splat<S: Bytes>(self, s: S, r: usize, step: usize) -> S::B {
        // SAFETY: the caller vouches for both.
        unsafe { s.splat_bytes(self.get(r).q.as_ptr().cast::<i32>().add(step).read_unaligned()) }
    }
}

/// A type of blocks as the kernel multiplies by it.
trait Block {
    /// Numbers of a block of a row.
    const LEN: usize;
    /// Bytes of a block of a panel.
    const BYTES: usize;

    /// Adds a block's products to the sums: group after group, one multiply-add each.
    ///
    /// # Safety
    /// `b` has a block, and there are R rows in `a`, each with the block's groups.
    unsafe fn add<S: Bytes, const R: usize>(s: S, b: *const u8, a: Rows, sums: &mut Sums<S, R>);
}

struct Q8;

impl Block for Q8 {
    const LEN: usize = 32;
    const BYTES: usize = Q8_0_BYTES;

    #[inline(always)]
    unsafe fn add<S: Bytes, const R: usize>(s: S, b: *const u8, a: Rows, sums: &mut Sums<S, R>) {
        // SAFETY: the caller vouches for the block and the rows.
        unsafe {
            let mut dots = [[s.splat_int(0); MOST_VECTORS]; R];
            for (r, dots) in dots.iter_mut().enumerate() {
                *dots = [s.signed_start(a.get(r).sums[0] + a.get(r).sums[1]); MOST_VECTORS];
            }
            for step in 0..8 {
                for v in 0..ROWS / S::LANES {
                    let w = s.load_bytes(b.add(step * LINE + v * 4 * S::LANES));
                    for (r, dots) in dots.iter_mut().enumerate() {
                        dots[v] = s.signed_dot(dots[v], w, a.splat(s, r, step));
                    }
                }
            }
            for v in 0..ROWS / S::LANES {
                let scale = s.load_f16(b.add(Q8_0_SCALES + 2 * v * S::LANES));
                for (r, (sums, dots)) in sums.iter_mut().zip(&dots).enumerate() {
                    sums[v] = s.fma(s.to_float(dots[v]), s.mul(scale, s.splat(a.get(r).scale)), sums[v]);
                }
            }
        }
    }
}

struct Q4;

impl Block for Q4 {
    const LEN: usize = 256;
    const BYTES: usize = Q4_K_BYTES;

    #[inline(always)]
    unsafe fn add<S: Bytes, const R: usize>(s: S, b: *const u8, a: Rows, sums: &mut Sums<S, R>) {
        // SAFETY: the caller vouches for the block and the rows.
        unsafe {
            for part in 0..Q4::LEN / GROUP {
                let (bytes, a) = (b.add(Q4_K_PARTS + part * Q4_K_PART), a.group(part));
                let mut dots = [[s.splat_int(0); MOST_VECTORS]; R];
                for line in 0..4 {
                    for v in 0..ROWS / S::LANES {
                        let both = s.load_bytes(bytes.add(line * LINE + v * 4 * S::LANES));
                        let (low, high) = (s.and(both, 15), s.and(s.shift_right::<4>(both), 15));
                        for (r, dots) in dots.iter_mut().enumerate() {
                            dots[v] = s.dot(dots[v], low, a.splat(s, r, line));
                            dots[v] = s.dot(dots[v], high, a.splat(s, r, line + 4));
                        }
                    }
                }
                for v in 0..ROWS / S::LANES {
                    let first = v * S::LANES;
                    // Both are exact.
                    let scale = s.mul(s.load_f16(b.add(2 * first)), s.load_u8(bytes.add(Q4_K_SCALES + first)));
                    let min = s.mul(s.load_f16(b.add(2 * ROWS + 2 * first)), s.load_u8(bytes.add(Q4_K_MINS + first)));
                    for (r, (sums, dots)) in sums.iter_mut().zip(&dots).enumerate() {
                        let a = a.get(r);
                        let below = s.mul(min, s.splat(-((a.sums[0] + a.sums[1]) as f32)));
                        let group = s.fma(s.to_float(dots[v]), scale, below);
                        sums[v] = s.fma(group, s.splat(a.scale), sums[v]);
                    }
                }
            }
        }
    }
}

struct Q6;

impl Block for Q6 {
    const LEN: usize = 256;
    const BYTES: usize = Q6_K_BYTES;

    #[inline(always)]
    unsafe fn add<S: Bytes, const R: usize>(s: S, b: *const u8, a: Rows, sums: &mut Sums<S, R>) {
        // SAFETY: the caller vouches for the block and the rows.
        unsafe {
            for part in 0..Q6::LEN / GROUP {
                let (bytes, a) = (b.add(Q6_K_PARTS + part * Q6_K_PART), a.group(part));
                // Sums of a half times its scale are whole numbers below 2²³, and so is what both add up to below 2²⁴.
                let mut halves = [[s.zero(); MOST_VECTORS]; R];
                for half in 0..2 {
                    let mut dots = [[s.splat_int(0); MOST_VECTORS]; R];
                    for (r, dots) in dots.iter_mut().enumerate() {
                        *dots = [s.splat_int(-32 * a.get(r).sums[half]); MOST_VECTORS];
                    }
                    for v in 0..ROWS / S::LANES {
                        let at = v * 4 * S::LANES;
                        for pair in 0..2 {
                            let upper = s.load_bytes(bytes.add(Q6_K_UPPER + pair * LINE + at));
                            let lines = [0, 1].map(|odd| s.load_bytes(bytes.add((2 * pair + odd) * LINE + at)));
                            // The upper bits of this half are at 2 · half of the lower four for the even line.
                            let w = if half == 0 {
                                let [even, odd] = lines.map(|line| s.and(line, 15));
                                [s.or(even, s.and(s.shift_left::<4>(upper), 48)), s.or(odd, s.and(upper, 48))]
                            } else {
                                let [even, odd] = lines.map(|line| s.and(s.shift_right::<4>(line), 15));
                                let upper = [s.shift_left::<2>(upper), s.shift_right::<2>(upper)];
                                [s.or(even, s.and(upper[0], 48)), s.or(odd, s.and(upper[1], 48))]
                            };
                            for (r, dots) in dots.iter_mut().enumerate() {
                                for (odd, w) in w.into_iter().enumerate() {
                                    dots[v] = s.dot(dots[v], w, a.splat(s, r, 4 * half + 2 * pair + odd));
                                }
                            }
                        }
                        let scale = s.load_i8(bytes.add(Q6_K_SCALES + half * ROWS + v * S::LANES));
                        for (halves, dots) in halves.iter_mut().zip(&dots) {
                            halves[v] = s.fma(s.to_float(dots[v]), scale, halves[v]);
                        }
                    }
                }
                for v in 0..ROWS / S::LANES {
                    let scale = s.load_f16(b.add(2 * v * S::LANES));
                    for (r, (sums, halves)) in sums.iter_mut().zip(&halves).enumerate() {
                        sums[v] = s.fma(halves[v], s.mul(scale, s.splat(a.get(r).scale)), sums[v]);
                    }
                }
            }
        }
    }
}
