//! A vector of f32, written once for every instruction set.
//!
//! Kernels are generic over [`Simd`]; its implementors are tokens without data, each the proof that the machine has
//! the instructions. Only [`Isa::run`](super::Isa::run) hands them out ([`Portable`] is free for all).
//! All methods are `#[inline(always)]`, and so must be everything generic over `Simd` that runs in a loop.
//!
//! Levels agree in what they compute, not in the last bit: [`Portable`] rounds a product before it adds.
//! Within a level every operation is deterministic, and a lane's result depends on that lane alone.

use half::bf16;

mod bytes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod twice;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use bytes::Bytes;
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use portable::Portable;
pub use twice::Twice;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// The largest [`Simd::LANES`] of any level, for buffers on the stack.
pub const MAX_LANES: usize = 16;

/// 1.5 · 2²³: x + ROUNDING is ROUNDING + n with the integer n nearest to x, for |x| < 2²².
pub const ROUNDING: f32 = 12_582_912.0;

/// Vectors of f32 at one level of instructions.
pub trait Simd: Copy + Send + Sync + 'static {
    /// How many f32 a vector holds.
    const LANES: usize;
    /// The vector registers of the level, which bound the accumulators a kernel keeps.
    const REGISTERS: usize;
    /// A vector.
    type V: Copy;
    /// A truth value per lane.
    type M: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;

    /// All lanes +0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Reads `LANES` values; no alignment needed.
    ///
    /// # Safety
    /// `from` is valid for reading `LANES` values.
    unsafe fn load(self, from: *const f32) -> Self::V;

    /// Writes `LANES` values; no alignment needed.
    ///
    /// # Safety
    /// `to` is valid for writing `LANES` values.
    unsafe fn store(self, to: *mut f32, v: Self::V);

    /// Reads the first `n` values, 0 in the other lanes; touches nothing past them.
    ///
    /// # Safety
    /// `n <= LANES`, and `from` is valid for reading `n` values.
    unsafe fn load_partial(self, from: *const f32, n: usize) -> Self::V;

    /// Writes the first `n` lanes; touches nothing past them.
    ///
    /// # Safety
    /// `n <= LANES`, and `to` is valid for writing `n` values.
    unsafe fn store_partial(self, to: *mut f32, v: Self::V, n: usize);

    /// Reads `LANES` bf16 values, widened exactly.
    ///
    /// # Safety
    /// `from` is valid for reading `LANES` values.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;

    /// Writes `LANES` values rounded to the nearest bf16, ties to even, as [`bf16::from_f32`] does.
    ///
    /// # Safety
    /// `to` is valid for writing `LANES` values.
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V);

    /// As [`Simd::load_partial`] for bf16.
    ///
    /// # Safety
    /// `n <= LANES`, and `from` is valid for reading `n` values.
    #[inline(always)]
    unsafe fn load_partial_bf16(self, from: *const bf16, n: usize) -> Self::V {
        let mut whole = [bf16::ZERO; MAX_LANES];
        // SAFETY: the caller vouches for n values at `from`; `whole` holds at least LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(from, whole.as_mut_ptr(), n);
            self.load_bf16(whole.as_ptr())
        }
    }

    /// As [`Simd::store_partial`] for bf16.
    ///
    /// # Safety
    /// `n <= LANES`, and `to` is valid for writing `n` values.
    #[inline(always)]
    unsafe fn store_partial_bf16(self, to: *mut bf16, v: Self::V, n: usize) {
        let mut whole = [bf16::ZERO; MAX_LANES];
        // SAFETY: the caller vouches for n values at `to`; `whole` holds at least LANES.
        unsafe {
            self.store_bf16(whole.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(whole.as_ptr(), to, n);
        }
    }

    /// Reads 2 · `LANES` bf16 values, widened exactly: those at even places, those at odd places.
    ///
    /// Cheaper than two [`Simd::load_bf16`]: a shift and a mask instead of two shuffles.
    ///
    /// # Safety
    /// `from` is valid for reading 2 · `LANES` values.
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> (Self::V, Self::V);

    /// Rounds both to bf16 as [`Simd::store_bf16`] does and puts them together: lane i holds, as bits, the pair of
    /// `even`'s (below) and `odd`'s lane i. Only to be stored or transposed. The inverse of [`Simd::load_bf16_pairs`].
    #[inline(always)]
    fn bf16_pairs(self, even: Self::V, odd: Self::V) -> Self::V {
        let mut halves = [[bf16::ZERO; MAX_LANES]; 2];
        let mut pairs = [[bf16::ZERO; 2]; MAX_LANES];
        // SAFETY: the buffers hold MAX_LANES values or pairs.
        unsafe {
            self.store_bf16(halves[0].as_mut_ptr(), even);
            self.store_bf16(halves[1].as_mut_ptr(), odd);
            for (i, pair) in pairs.iter_mut().enumerate() {
                *pair = [halves[0][i], halves[1][i]];
            }
            self.load(pairs.as_ptr().cast())
        }
    }

    /// Transposes the first `LANES` vectors as a square: lane j of vector i becomes lane i of vector j. Vectors past
    /// them are unspecified.
    fn transpose(self, rows: [Self::V; MAX_LANES]) -> [Self::V; MAX_LANES];

    /// a + b
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b, correctly rounded.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the level has such an instruction ([`Portable`] rounds twice).
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// −a, also of 0.
    fn neg(self, a: Self::V) -> Self::V;
    /// |a|
    fn abs(self, a: Self::V) -> Self::V;
    /// The smaller one; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The square root, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// The largest integer not above a.
    fn floor(self, a: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;

    /// v · 2ⁿ for integral `n` of any size and 2⁻¹⁰⁰ ≤ |v| ≤ 2¹⁰⁰ (or v = 0): rounded once where the result is
    /// denormal, infinite where it overflows, 0 where it underflows.
    fn scale2(self, v: Self::V, n: Self::V) -> Self::V;

    /// v · 2ⁿ for `rounded` = [`ROUNDING`] + n, where v and the result are normal and |n| < 250: two instructions.
    fn scale2_normal(self, v: Self::V, rounded: Self::V) -> Self::V;

    /// Cuts a positive normal number into mantissa and exponent: v = m · 2ᵉ with √½ ≤ m < √2 and e integral.
    /// Meaningless for other numbers.
    fn split_exponent(self, v: Self::V) -> (Self::V, Self::V);

    /// a < b; false where either is NaN.
    fn lt(self, a: Self::V, b: Self::V) -> Self::M;
    /// a > b; false where either is NaN.
    fn gt(self, a: Self::V, b: Self::V) -> Self::M;
    /// `yes` where `m` holds, `no` elsewhere.
    fn select(self, m: Self::M, yes: Self::V, no: Self::V) -> Self::V;

    /// The sum of the lanes by halves: lane i with lane i + LANES/2, and so on.
    fn reduce_add(self, v: Self::V) -> f32;
    /// The largest lane; unspecified where one is NaN.
    fn reduce_max(self, v: Self::V) -> f32;
}

/// A storage type that kernels compute on in f32.
pub trait Element: Copy + Send + Sync + 'static {
    /// Reads `LANES` values.
    ///
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V;
    /// Writes `LANES` values, rounded to nearest, ties to even.
    ///
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, v: S::V);
    /// Reads the first `n` values, 0 in the other lanes.
    ///
    /// # Safety
    /// As [`Simd::load_partial`].
    unsafe fn load_partial<S: Simd>(simd: S, from: *const Self, n: usize) -> S::V;
    /// Writes the first `n` lanes.
    ///
    /// # Safety
    /// As [`Simd::store_partial`].
    unsafe fn store_partial<S: Simd>(simd: S, to: *mut Self, v: S::V, n: usize);
    /// The value in f32, exactly.
    fn widen(self) -> f32;
    /// The nearest value of the type, ties to even.
    fn narrow(x: f32) -> Self;
}

// SAFETY (all blocks of both impls): the callers' promises are those of the methods called.
macro_rules! element {
    ($type:ty, $load:ident, $store:ident, $load_partial:ident, $store_partial:ident, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V {
                unsafe { simd.$load(from) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(simd: S, to: *mut Self, v: S::V) {
                unsafe { simd.$store(to, v) }
            }
            #[inline(always)]
            unsafe fn load_partial<S: Simd>(simd: S, from: *const Self, n: usize) -> S::V {
                unsafe { simd.$load_partial(from, n) }
            }
            #[inline(always)]
            unsafe fn store_partial<S: Simd>(simd: S, to: *mut Self, v: S::V, n: usize) {
                unsafe { simd.$store_partial(to, v, n) }
            }
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(x: f32) -> Self {
                $narrow(x)
            }
        }
    };
}

element!(f32, load, store, load_partial, store_partial, |x| x, |x| x);
element!(bf16, load_bf16, store_bf16, load_partial_bf16, store_partial_bf16, bf16::to_f32, bf16::from_f32);

#[cfg(test)]
mod tests;
