//! Loops over a row in vectors, for kernels whose rows have any width.

use crate::cpu::simd::{MAX_LANES, Simd};

/// Independent sums of a row, to hide the latency of additions.
const SUMS: usize = 4;

/// The sum of `term` over 0..n in a fixed order. `term(i, lanes)` gives lanes i .. i + lanes, and 0 in the others.
#[inline(always)]
pub(crate) fn sum<S: Simd>(simd: S, n: usize, term: impl Fn(usize, usize) -> S::V) -> f32 {
    let mut sums = [simd.zero(); SUMS];
    let mut i = 0;
    while i < n {
        // One place calls `term`, so that it is surely inlined there.
        for sum in &mut sums {
            if i < n {
                *sum = simd.add(*sum, term(i, S::LANES.min(n - i)));
            }
            i += S::LANES;
        }
    }
    simd.reduce_add(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}

/// Calls `f(i, lanes)` for each vector of 0..n; the last one may have fewer lanes.
#[inline(always)]
pub(crate) fn each<S: Simd>(_: S, n: usize, mut f: impl FnMut(usize, usize)) {
    let mut i = 0;
    while i < n {
        f(i, S::LANES.min(n - i));
        i += S::LANES;
    }
}

/// The first `lanes` numbers from `from`, 0 in the other lanes.
///
/// # Safety
/// They can be read, and there are at most `LANES`.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd>(simd: S, from: *const f32, lanes: usize) -> S::V {
    // SAFETY: as the caller promises.
    unsafe { if lanes == S::LANES { simd.load(from) } else { simd.load_partial(from, lanes) } }
}

/// Writes the first `lanes` lanes.
///
/// # Safety
/// They can be written, and there are at most `LANES`.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd>(simd: S, to: *mut f32, v: S::V, lanes: usize) {
    // SAFETY: as the caller promises.
    unsafe { if lanes == S::LANES { simd.store(to, v) } else { simd.store_partial(to, v, lanes) } }
}

/// `x` in the first `lanes` lanes, 0 in the others.
#[inline(always)]
pub(crate) fn splat<S: Simd>(simd: S, x: f32, lanes: usize) -> S::V {
    if lanes == S::LANES {
        simd.splat(x)
    } else {
        // SAFETY: the array has at least LANES elements.
        unsafe { simd.load_partial([x; MAX_LANES].as_ptr(), lanes) }
    }
}
