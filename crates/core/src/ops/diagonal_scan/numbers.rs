//! Vectors of real or complex numbers, and what a step makes of A: exp(z) and, for the zero-order hold, (exp(z) − 1)/z.

use crate::cpu::math;
use crate::cpu::simd::Simd;

/// Σ zᵏ/(k+1)! of (exp(z) − 1)/z. For |z| < ½ nine terms are within 2⁻²⁷.
const PHI: [f32; 9] =
    [1.0, 1.0 / 2.0, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0, 1.0 / 40_320.0, 1.0 / 362_880.0];
/// Σ zᵏ (k+1)/(k+2)! of its derivative.
const PHI_SLOPE: [f32; 9] = [
    1.0 / 2.0,
    1.0 / 3.0,
    1.0 / 8.0,
    1.0 / 30.0,
    1.0 / 144.0,
    1.0 / 840.0,
    1.0 / 5760.0,
    1.0 / 45_360.0,
    1.0 / 403_200.0,
];

/// A number a lane. The imaginary part of a real one is never read.
#[derive(Clone, Copy)]
pub(super) struct Number<V> {
    pub re: V,
    pub im: V,
}

/// Arithmetic with complex numbers, or with real ones. Parts lie in planes: all real parts, then all imaginary ones.
#[derive(Clone, Copy)]
pub(super) struct Numbers<S, const COMPLEX: bool>(pub S);

impl<S: Simd, const COMPLEX: bool> Numbers<S, COMPLEX> {
    #[inline(always)]
    pub fn zero(self) -> Number<S::V> {
        self.real(self.0.zero())
    }

    #[inline(always)]
    pub fn real(self, re: S::V) -> Number<S::V> {
        Number { re, im: self.0.zero() }
    }

    /// Makes a number of its parts; `part(1)` is asked for complex ones only.
    #[inline(always)]
    pub fn of(self, part: impl Fn(usize) -> S::V) -> Number<S::V> {
        Number { re: part(0), im: if COMPLEX { part(1) } else { self.0.zero() } }
    }

    /// Reads whole vectors, `plane` values between the parts.
    ///
    /// # Safety
    /// A vector lies there for each part.
    #[inline(always)]
    pub unsafe fn load(self, from: *const f32, plane: usize) -> Number<S::V> {
        // SAFETY: as the caller says.
        self.of(|part| unsafe { self.0.load(from.add(part * plane)) })
    }

    /// Writes whole vectors, `plane` values between the parts.
    ///
    /// # Safety
    /// There is room for a vector for each part.
    #[inline(always)]
    pub unsafe fn store(self, to: *mut f32, plane: usize, a: Number<S::V>) {
        // SAFETY: as the caller says.
        unsafe {
            self.0.store(to, a.re);
            if COMPLEX {
                self.0.store(to.add(plane), a.im);
            }
        }
    }

    #[inline(always)]
    pub fn add(self, a: Number<S::V>, b: Number<S::V>) -> Number<S::V> {
        Number { re: self.0.add(a.re, b.re), im: if COMPLEX { self.0.add(a.im, b.im) } else { a.im } }
    }

    /// a · b + c
    #[inline(always)]
    pub fn fma(self, a: Number<S::V>, b: Number<S::V>, c: Number<S::V>) -> Number<S::V> {
        let s = self.0;
        let re = s.fma(a.re, b.re, c.re);
        if !COMPLEX {
            return self.real(re);
        }
        Number { re: s.fma(s.neg(a.im), b.im, re), im: s.fma(a.re, b.im, s.fma(a.im, b.re, c.im)) }
    }

    #[inline(always)]
    pub fn mul(self, a: Number<S::V>, b: Number<S::V>) -> Number<S::V> {
        let s = self.0;
        let re = s.mul(a.re, b.re);
        if !COMPLEX {
            return self.real(re);
        }
        Number { re: s.fma(s.neg(a.im), b.im, re), im: s.fma(a.re, b.im, s.mul(a.im, b.re)) }
    }

    #[inline(always)]
    pub fn scale(self, a: Number<S::V>, by: S::V) -> Number<S::V> {
        Number { re: self.0.mul(a.re, by), im: if COMPLEX { self.0.mul(a.im, by) } else { a.im } }
    }

    #[inline(always)]
    pub fn conj(self, a: Number<S::V>) -> Number<S::V> {
        Number { re: a.re, im: if COMPLEX { self.0.neg(a.im) } else { a.im } }
    }

    /// exp(z).
    #[inline(always)]
    pub fn exp(self, z: Number<S::V>) -> Number<S::V> {
        let magnitude = math::exp(self.0, z.re);
        if !COMPLEX {
            return self.real(magnitude);
        }
        let (sin, cos) = math::sin_cos(self.0, z.im);
        Number { re: self.0.mul(magnitude, cos), im: self.0.mul(magnitude, sin) }
    }

    /// φ(z) = (exp(z) − 1)/z, given exp(z): by its series near 0, where the difference cancels.
    #[inline(always)]
    pub fn phi(self, z: Number<S::V>, exp: Number<S::V>) -> Number<S::V> {
        let minus_one = Number { re: self.0.sub(exp.re, self.0.splat(1.0)), im: exp.im };
        self.near_or_far(z, PHI, minus_one)
    }

    /// φ′(z) = (exp(z) − φ(z))/z.
    #[inline(always)]
    pub fn phi_slope(self, z: Number<S::V>, exp: Number<S::V>) -> Number<S::V> {
        let phi = self.phi(z, exp);
        let difference = self.add(exp, self.scale(phi, self.0.splat(-1.0)));
        self.near_or_far(z, PHI_SLOPE, difference)
    }

    /// A series in z where |z| < ½, `over` / z elsewhere.
    #[inline(always)]
    fn near_or_far(self, z: Number<S::V>, series: [f32; 9], over: Number<S::V>) -> Number<S::V> {
        let s = self.0;
        let mut near = self.real(s.splat(series[8]));
        for i in (0..8).rev() {
            near = self.fma(near, z, self.real(s.splat(series[i])));
        }
        let square = if COMPLEX { s.fma(z.re, z.re, s.mul(z.im, z.im)) } else { s.mul(z.re, z.re) };
        let far = self.scale(self.mul(over, self.conj(z)), s.div(s.splat(1.0), square));
        let is_near = s.lt(square, s.splat(0.25));
        Number {
            re: s.select(is_near, near.re, far.re),
            im: if COMPLEX { s.select(is_near, near.im, far.im) } else { near.im },
        }
    }
}
