//! Two vectors as one.

use half::bf16;

use super::{MAX_LANES, Simd};

/// Vectors of twice as many lanes, for functions that are one long chain of dependent operations: the processor works
/// on one half while it waits for the other. Lanes have the bits that they have in a vector of the level itself.
///
/// For arithmetic lane by lane and sums; it cannot transpose, and has more lanes than [`MAX_LANES`].
#[derive(Clone, Copy)]
pub struct Twice<S>(pub S);

/// Methods that do the same to both halves.
macro_rules! halves {
    ($(fn $name:ident($($arg:ident),*) -> $out:ident;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Self::V),*) -> Self::$out {
            [self.0.$name($($arg[0]),*), self.0.$name($($arg[1]),*)]
        }
    )*};
}

impl<S: Simd> Simd for Twice<S> {
    const LANES: usize = 2 * S::LANES;
    const REGISTERS: usize = S::REGISTERS / 2;
    type V = [S::V; 2];
    type M = [S::M; 2];

    halves! {
        fn add(a, b) -> V;
        fn sub(a, b) -> V;
        fn mul(a, b) -> V;
        fn div(a, b) -> V;
        fn fma(a, b, c) -> V;
        fn neg(a) -> V;
        fn abs(a) -> V;
        fn min(a, b) -> V;
        fn max(a, b) -> V;
        fn sqrt(a) -> V;
        fn floor(a) -> V;
        fn round(a) -> V;
        fn scale2(v, n) -> V;
        fn scale2_normal(v, rounded) -> V;
        fn lt(a, b) -> M;
        fn gt(a, b) -> M;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [self.0.splat(x); 2]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for both vectors.
        unsafe { [self.0.load(from), self.0.load(from.add(S::LANES))] }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for both vectors.
        unsafe {
            self.0.store(to, v[0]);
            self.0.store(to.add(S::LANES), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_partial(self, from: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller vouches for n values; a half is touched where it has some.
        unsafe {
            if n <= S::LANES {
                return [self.0.load_partial(from, n), self.0.zero()];
            }
            [self.0.load(from), self.0.load_partial(from.add(S::LANES), n - S::LANES)]
        }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, v: Self::V, n: usize) {
        // SAFETY: as for `load_partial`.
        unsafe {
            if n <= S::LANES {
                return self.0.store_partial(to, v[0], n);
            }
            self.0.store(to, v[0]);
            self.0.store_partial(to.add(S::LANES), v[1], n - S::LANES);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller vouches for both vectors.
        unsafe { [self.0.load_bf16(from), self.0.load_bf16(from.add(S::LANES))] }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V) {
        // SAFETY: the caller vouches for both vectors.
        unsafe {
            self.0.store_bf16(to, v[0]);
            self.0.store_bf16(to.add(S::LANES), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> (Self::V, Self::V) {
        // SAFETY: the caller vouches for four vectors.
        let [(a, b), (c, d)] =
            unsafe { [self.0.load_bf16_pairs(from), self.0.load_bf16_pairs(from.add(2 * S::LANES))] };
        ([a, c], [b, d])
    }

    fn transpose(self, _: [Self::V; MAX_LANES]) -> [Self::V; MAX_LANES] {
        unreachable!("kernels transpose vectors of the level itself")
    }

    #[inline(always)]
    fn split_exponent(self, v: Self::V) -> (Self::V, Self::V) {
        let ((a, b), (c, d)) = (self.0.split_exponent(v[0]), self.0.split_exponent(v[1]));
        ([a, c], [b, d])
    }

    #[inline(always)]
    fn select(self, m: Self::M, yes: Self::V, no: Self::V) -> Self::V {
        [self.0.select(m[0], yes[0], no[0]), self.0.select(m[1], yes[1], no[1])]
    }

    #[inline(always)]
    fn reduce_add(self, v: Self::V) -> f32 {
        self.0.reduce_add(self.0.add(v[0], v[1]))
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        self.0.reduce_max(self.0.max(v[0], v[1]))
    }
}
