//! exp, ln, sigmoid, tanh, softplus, sine and cosine and their kin over vectors.
//!
//! The error bounds stand beside the functions as constants, in units in the last place (ULP) of the exact result;
//! `tests` checks them at every level of instructions. Polynomials are minimax fits (Remez) made for this file.
//! Each function works lane by lane, so a scalar computed in one lane has the bits of the same value in a vector.
//! NaN goes in and NaN comes out, everywhere.

use super::simd::{MAX_LANES, ROUNDING, Simd};

/// Bound of [`exp`].
pub const EXP_ULP: f64 = 1.5;
/// Bound of [`exp_m1`].
pub const EXP_M1_ULP: f64 = 2.0;
/// Bound of [`ln`].
pub const LN_ULP: f64 = 1.5;
/// Bound of [`log1p`].
pub const LOG1P_ULP: f64 = 2.5;
/// Bound of [`sigmoid`].
pub const SIGMOID_ULP: f64 = 3.0;
/// Bound of [`silu`] for x ≥ −87.
pub const SILU_ULP: f64 = 4.0;
/// Bound of [`silu`] for x < −87, where σ(x) is denormal and |x σ(x)| < 10⁻³⁵: absolute.
pub const SILU_TAIL: f64 = 2e-43;
/// Bound of [`tanh`].
pub const TANH_ULP: f64 = 5.0;
/// Bound of [`softplus`].
pub const SOFTPLUS_ULP: f64 = 4.0;
/// Bound of [`dsilu`]: absolute, since it has a root at x ≈ −1.278.
pub const DSILU_ERROR: f64 = 5e-7;
/// Bound of [`sin_cos`] for |x| ≤ [`SIN_COS_LARGEST`]: absolute, since both have roots everywhere.
pub const SIN_COS_ERROR: f64 = 1.2e-7;
/// Where [`sin_cos`] keeps its bound.
pub const SIN_COS_LARGEST: f32 = 1e4;

/// ln 2 in two parts: the first has 10 bits, so that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// π/2 in three parts: the first two have 11 bits, so that their products with a quadrant below 2¹³ are exact.
const HALF_PI: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];

/// Where [`softplus`] becomes the identity, as in PyTorch. ln(1 + e⁻²⁰) is far below half a unit in the last place
/// of 20, so this changes no result by more than rounding.
pub const SOFTPLUS_THRESHOLD: f32 = 20.0;

/// A polynomial by Horner's rule; coefficients from the constant one upwards.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, coefficients: [f32; N]) -> S::V {
    let mut sum = s.splat(coefficients[N - 1]);
    for i in (0..N - 1).rev() {
        sum = s.fma(sum, x, s.splat(coefficients[i]));
    }
    sum
}

/// x = n · ln 2 + r with |r| ≤ ½ ln 2: (n, r).
#[inline(always)]
fn reduce<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    (n, s.fma(n, s.splat(-LN2_LOW), r))
}

/// eʳ for |r| ≤ ½ ln 2.
#[inline(always)]
fn exp_reduced<S: Simd>(s: S, r: S::V) -> S::V {
    // (eʳ − 1 − r) / r², within 2⁻²⁸ of eʳ.
    let q = polynomial(s, r, [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_719, 0.001_381_459_2]);
    s.add(s.fma(s.mul(r, r), q, r), s.splat(1.0))
}

/// eˣ within [`EXP_ULP`]: infinite above 88.72, 0 below −103.97, denormal results between.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Past these ends the result is infinite or 0 anyway; in this order min and max keep a NaN.
    let x = s.max(s.splat(-110.0), s.min(s.splat(100.0), x));
    let (n, r) = reduce(s, x);
    s.scale2(exp_reduced(s, r), n)
}

/// eˣ for x ≤ 0 within [`EXP_ULP`], in fewer instructions than [`exp`].
#[inline(always)]
pub fn exp_not_positive<S: Simd>(s: S, x: S::V) -> S::V {
    // Below, the result is 0 anyway; in this order max keeps a NaN.
    let x = s.max(s.splat(-110.0), x);
    // ROUNDING + n + 64: 2ⁿ⁺⁶⁴ is normal, and the product with 2⁻⁶⁴ rounds once where the result is denormal.
    let rounding = s.splat(ROUNDING + 64.0);
    let rounded = s.fma(x, s.splat(std::f32::consts::LOG2_E), rounding);
    let n = s.sub(rounded, rounding);
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    // The power is made by itself, so that a NaN in the other factor stays one.
    let power = s.scale2_normal(s.splat(1.0), rounded);
    s.mul(s.mul(exp_reduced(s, r), power), s.splat(f32::from_bits((127 - 64) << 23)))
}

/// eˣ − 1 within [`EXP_M1_ULP`], also for small x.
#[inline(always)]
pub fn exp_m1<S: Simd>(s: S, x: S::V) -> S::V {
    // Above 88.73 the result is infinite, which 89 gives too without 2ⁿ⁻¹ being infinite itself.
    let bounded = s.max(s.splat(-30.0), s.min(s.splat(89.0), x));
    let (n, r) = reduce(s, bounded);
    // (eʳ − 1 − r) / r² on |r| ≤ ½ ln 2, within 2⁻³² of (eʳ − 1) / r.
    let q = polynomial(s, r, [0.5, 0.166_666_67, 0.041_666_355, 0.008_333_273, 0.001_394_101_2, 0.000_199_141_77]);
    let p = s.fma(s.mul(r, r), q, r);
    // 2ⁿ(p + 1) − 1 as 2 · (2ⁿ⁻¹ p + (2ⁿ⁻¹ − ½)), since 2ⁿ itself overflows before the result does.
    let half = s.splat(0.5);
    let power = s.scale2(half, n);
    let sum = s.fma(power, p, s.sub(power, half));
    // Below 2⁻²⁵ the result is x itself; −0 and denormal numbers need this.
    s.select(s.lt(s.abs(x), s.splat(2.98e-8)), x, s.add(sum, sum))
}

/// The logarithm of a positive normal number, without the treatment of special values.
#[inline(always)]
fn ln_positive<S: Simd>(s: S, x: S::V, exponent_offset: S::V) -> S::V {
    let (m, e) = s.split_exponent(x);
    let e = s.add(e, exponent_offset);
    let f = s.sub(m, s.splat(1.0));
    // (ln(1 + f) − f + f²/2) / f³ on √½ ≤ 1 + f ≤ √2, within 2⁻³⁰ of ln(1 + f) / f.
    let q = polynomial(
        s,
        f,
        [
            0.333_333_1,
            -0.249_999_87,
            0.200_022_27,
            -0.166_692_51,
            0.142_186_64,
            -0.123_843_41,
            0.118_729_316,
            -0.117_898_34,
            0.069_154_92,
        ],
    );
    let square = s.mul(f, f);
    // From the smallest part to the largest.
    let tail = s.fma(e, s.splat(LN2_LOW), s.mul(s.mul(f, square), q));
    let tail = s.fma(s.splat(-0.5), square, tail);
    s.fma(e, s.splat(LN2_HIGH), s.add(f, tail))
}

/// ln x within [`LN_ULP`]: −∞ at 0, NaN below.
#[inline(always)]
pub fn ln<S: Simd>(s: S, x: S::V) -> S::V {
    // Denormal numbers are scaled by 2²³ first.
    let denormal = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let scaled = s.select(denormal, s.mul(x, s.splat(8_388_608.0)), x);
    let result = ln_positive(s, scaled, s.select(denormal, s.splat(-23.0), s.zero()));
    // +∞ and NaN stand for themselves.
    let result = s.select(s.lt(x, s.splat(f32::INFINITY)), result, x);
    let result = s.select(s.gt(x, s.zero()), result, s.splat(f32::NEG_INFINITY));
    let result = s.select(s.lt(x, s.zero()), s.splat(f32::NAN), result);
    keep_nan(s, x, result)
}

/// ln(1 + x) within [`LOG1P_ULP`], also for small x: −∞ at −1, NaN below.
#[inline(always)]
pub fn log1p<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let u = s.add(one, x);
    // ln(1 + x) = ln u + ln(1 + c/u) with c = x − (u − 1), which is exact where it matters; far out it is nothing.
    let c = s.select(s.lt(x, s.splat(3.4e7)), s.sub(x, s.sub(u, one)), s.zero());
    let result = s.add(ln_positive(s, u, s.zero()), s.div(c, s.max(s.splat(f32::MIN_POSITIVE), u)));
    let result = s.select(s.lt(x, s.splat(f32::INFINITY)), result, x);
    let result = s.select(s.gt(x, s.splat(-1.0)), result, s.splat(f32::NEG_INFINITY));
    let result = s.select(s.lt(x, s.splat(-1.0)), s.splat(f32::NAN), result);
    // Below 2⁻²⁵ the result is x itself; −0 needs this.
    let result = s.select(s.lt(s.abs(x), s.splat(2.98e-8)), x, result);
    keep_nan(s, x, result)
}

/// `result`, or NaN where `x` is NaN.
#[inline(always)]
fn keep_nan<S: Simd>(s: S, x: S::V, result: S::V) -> S::V {
    // x · 0 is NaN for infinities too, so this asks by comparison: a number is below or not below infinity.
    let number = s.lt(x, s.splat(f32::INFINITY));
    s.select(number, result, s.select(s.gt(x, s.zero()), result, x))
}

/// The two parts of the logistic function: (σ(x), σ(−x)), each without cancellation.
#[inline(always)]
pub fn sigmoid_pair<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let one = s.splat(1.0);
    let e = exp_not_positive(s, s.neg(s.abs(x)));
    let large = s.div(one, s.add(one, e));
    let small = s.mul(e, large);
    let negative = s.lt(x, s.zero());
    (s.select(negative, small, large), s.select(negative, large, small))
}

/// σ(x) = 1 / (1 + e⁻ˣ) within [`SIGMOID_ULP`], also where it is tiny.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let e = exp_not_positive(s, s.neg(s.abs(x)));
    s.div(s.select(s.lt(x, s.zero()), e, one), s.add(one, e))
}

/// tanh x within [`TANH_ULP`], also for small x.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // −(e − 1) / (e + 1) with e = e^−2|x|, the numerator without cancellation.
    let m = exp_m1(s, s.mul(s.splat(-2.0), s.abs(x)));
    let large = s.div(s.neg(m), s.add(m, s.splat(2.0)));
    let result = s.select(s.lt(x, s.zero()), s.neg(large), large);
    // Below 2⁻¹³ the result is x itself; −0 and denormal numbers need this.
    s.select(s.lt(s.abs(x), s.splat(1.2e-4)), x, result)
}

/// x · σ(x) within [`SILU_ULP`] (below −87: [`SILU_TAIL`]); NaN at −∞, as in PyTorch.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}

/// The derivative of [`silu`], σ(x) · (1 + x · σ(−x)), within [`DSILU_ERROR`]; NaN at ±∞.
#[inline(always)]
pub fn dsilu<S: Simd>(s: S, x: S::V) -> S::V {
    let (p, q) = sigmoid_pair(s, x);
    s.mul(p, s.fma(x, q, s.splat(1.0)))
}

/// ln(1 + eˣ) within [`SOFTPLUS_ULP`], also where it is tiny; x itself above [`SOFTPLUS_THRESHOLD`], as in PyTorch.
///
/// Its derivative is [`sigmoid`].
#[inline(always)]
pub fn softplus<S: Simd>(s: S, x: S::V) -> S::V {
    // max(x, 0) + ln(1 + e) with e = e^−|x|: no division, and tiny where it should be. The factor is ln(1 + e) / e on
    // 0 ≤ e ≤ 1, within 2⁻²⁷. Above the threshold the sum rounds to x. In this order max keeps a NaN.
    let e = exp_not_positive(s, s.neg(s.abs(x)));
    let factor = polynomial(
        s,
        e,
        [
            1.0,
            -0.499_999_02,
            0.333_299_64,
            -0.249_541_34,
            0.196_759_39,
            -0.153_055_94,
            0.106_036_55,
            -0.056_959_54,
            0.019_851_465,
            -0.003_244_025_6,
        ],
    );
    s.fma(e, factor, s.max(s.zero(), x))
}

/// (sin x, cos x) within [`SIN_COS_ERROR`] for |x| ≤ [`SIN_COS_LARGEST`]; beyond, the error grows with |x|, but
/// neither leaves [−1, 1] by more than rounding. NaN at ±∞.
#[inline(always)]
pub fn sin_cos<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    // x = n · π/2 + r with |r| ≤ π/4.
    let n = s.round(s.mul(x, s.splat(std::f32::consts::FRAC_2_PI)));
    let r = HALF_PI.iter().fold(x, |r, &part| s.fma(n, s.splat(-part), r));
    // Far out r is noise, but the results still are sines of something. In this order min and max keep a NaN.
    let r = s.max(s.splat(-0.8), s.min(s.splat(0.8), r));
    let square = s.mul(r, r);
    // (sin r − r) / r³ and (cos r − 1 + r²/2) / r⁴ on |r| ≤ π/4, within 2⁻²⁸ of sin r / r and 2⁻³³ of 1.
    let sin = polynomial(s, square, [-0.166_666_55, 0.008_332_174, -0.000_195_166_56]);
    let sin = s.fma(s.mul(r, square), sin, r);
    let cos = polynomial(s, square, [0.041_666_647, -0.001_388_736_1, 2.443_773e-5]);
    let cos = s.fma(s.mul(square, square), cos, s.fma(s.splat(-0.5), square, s.splat(1.0)));
    // Odd quadrants exchange the two; the sine is negative in the third and fourth, the cosine in the second and third.
    let quadrant = s.fma(s.splat(-4.0), s.floor(s.mul(n, s.splat(0.25))), n);
    let odd = s.lt(s.abs(s.sub(s.abs(s.sub(quadrant, s.splat(2.0))), s.splat(1.0))), s.splat(0.5));
    let (sine, cosine) = (s.select(odd, cos, sin), s.select(odd, sin, cos));
    let sine = s.select(s.gt(quadrant, s.splat(1.5)), s.neg(sine), sine);
    let second_or_third = s.lt(s.abs(s.sub(quadrant, s.splat(1.5))), s.splat(1.0));
    (sine, s.select(second_or_third, s.neg(cosine), cosine))
}

/// `f` of one value, with the bits it has as a lane of a vector.
#[inline(always)]
pub fn scalar<S: Simd>(s: S, x: f32, f: impl Fn(S, S::V) -> S::V) -> f32 {
    let mut out = [0.0f32; MAX_LANES];
    // SAFETY: `out` holds at least LANES values.
    unsafe { s.store(out.as_mut_ptr(), f(s, s.splat(x))) };
    out[0]
}

#[cfg(test)]
mod tests;
