//! exp and expm1 of Δ·A in base 2: A is multiplied by log₂ e once a call, which saves the range reduction its products.

use std::f32::consts::LN_2;

use crate::cpu::simd::{ROUNDING, Simd};

/// Below this |A|, B̄ of the zero-order hold is its limit ΔB: the two differ by ΔA/2, less than f32 resolves.
pub(super) const ZOH_LIMIT: f32 = 1e-12;

/// (2ʳ − 1) / r on |r| ≤ ½: r times it is within 2⁻²⁸ of 2ʳ − 1, relative to 2ʳ. A minimax fit (Remez).
const COEFFICIENTS: [f32; 6] = [LN_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_887_4, 0.000_153_533_62];

/// Where |Δ·A| is less, [`decay_near`] holds.
pub(super) const NEAR: f32 = 125.0;

/// (2ʳ − 1) / r for |r| ≤ ½.
#[inline(always)]
fn quotient<S: Simd>(s: S, r: S::V) -> S::V {
    let mut q = s.splat(COEFFICIENTS[5]);
    for c in COEFFICIENTS[..5].iter().rev() {
        q = s.fma(q, r, s.splat(*c));
    }
    q
}

/// x = n + r with integral n and |r| ≤ ½, exactly, and (2ʳ − 1) / r.
#[inline(always)]
fn reduce<S: Simd>(s: S, x: S::V) -> (S::V, S::V, S::V) {
    let n = s.round(x);
    let r = s.sub(x, n);
    (n, r, quotient(s, r))
}

/// 2^(Δ·A) for |Δ·A| < [`NEAR`], within 1.5 ULP: 11 instructions, since Δ·A is never rounded and the result is normal.
#[inline(always)]
pub(super) fn decay_near<S: Simd>(s: S, delta: S::V, a: S::V) -> S::V {
    let rounding = s.splat(ROUNDING);
    let rounded = s.fma(delta, a, rounding);
    let r = s.fma(delta, a, s.sub(rounding, rounded));
    s.scale2_normal(s.fma(r, quotient(s, r), s.splat(1.0)), rounded)
}

/// 2^(Δ·A) for any finite Δ·A: [`decay_near`] and, outside its range, [`exp2`].
#[inline(always)]
pub(super) fn decay<S: Simd>(s: S, delta: S::V, a: S::V) -> S::V {
    let x = s.mul(delta, a);
    s.select(s.lt(s.abs(x), s.splat(NEAR)), decay_near(s, delta, a), exp2(s, x))
}

/// 2ˣ for finite x, within 1.5 ULP: any x below −150 gives 0, above 128 infinity. 2⁰ is exactly 1.
#[inline(always)]
pub(super) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let (n, r, q) = reduce(s, x);
    s.scale2(s.fma(r, q, s.splat(1.0)), n)
}

/// (2ˣ, 2ˣ − 1) for finite x, each accurate for itself.
#[inline(always)]
pub(super) fn exp2_and_m1<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (n, r, q) = reduce(s, x);
    let one = s.splat(1.0);
    let p = s.mul(r, q);
    let power = s.scale2(one, n);
    (s.scale2(s.add(p, one), n), s.fma(power, p, s.sub(power, one)))
}

/// (Δ·eᵘ − (eᵘ − 1)/A) / A with u = Δ·A: the derivative of (eᵘ − 1)/A with respect to A. Near u = 0 by its series
/// Δ²·Σ uᵏ (k+1)/(k+2)!, since the difference cancels there.
#[inline(always)]
pub(super) fn zoh_slope<S: Simd>(s: S, delta: S::V, u: S::V, decay: S::V, m1: S::V, inverse_a: S::V) -> S::V {
    const SERIES: [f32; 7] = [0.5, 1.0 / 3.0, 1.0 / 8.0, 1.0 / 30.0, 1.0 / 144.0, 1.0 / 840.0, 1.0 / 5760.0];
    let mut series = s.splat(SERIES[6]);
    for c in SERIES[..6].iter().rev() {
        series = s.fma(series, u, s.splat(*c));
    }
    let series = s.mul(s.mul(delta, delta), series);
    let direct = s.mul(s.sub(s.mul(delta, decay), s.mul(m1, inverse_a)), inverse_a);
    s.select(s.lt(s.abs(u), s.splat(0.3)), series, direct)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::{Isa, Kernel};
    use crate::cpu::simd::MAX_LANES;

    struct Eval(f32);

    impl Kernel for Eval {
        type Output = (f32, f32, f32);

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let first = |v: S::V| {
                let mut out = [0.0; MAX_LANES];
                // SAFETY: `out` holds a vector.
                unsafe { s.store(out.as_mut_ptr(), v) };
                out[0]
            };
            let (power, m1) = exp2_and_m1(s, s.splat(self.0));
            // The product with one is exact.
            (first(decay(s, s.splat(self.0), s.splat(1.0))), first(power), first(m1))
        }
    }

    #[test]
    fn powers_of_two_are_accurate_everywhere() {
        let mut xs: Vec<f32> = (-20_000..2_000).map(|i| i as f32 * 0.006_283).collect();
        xs.extend((0..40).flat_map(|i| [-(0.5f32.powi(i)), 0.5f32.powi(i)]));
        for isa in Isa::available() {
            for &x in &xs {
                let (e, decay, m1) = isa.run(Eval(x));
                let exact = f64::from(x).exp2();
                let ulp = exact * f64::from(f32::EPSILON);
                assert!((f64::from(e) - exact).abs() <= 1.5 * ulp + 1e-44, "{isa}: 2^{x} = {e}, not {exact}");
                assert!((f64::from(decay) - exact).abs() <= 2.0 * ulp + 1e-44, "{isa}: 2^{x} = {decay}, not {exact}");
                let exact = (f64::from(x) * std::f64::consts::LN_2).exp_m1();
                let error = (f64::from(m1) - exact).abs();
                assert!(error <= 3e-7 * exact.abs(), "{isa}: 2^{x} - 1 = {m1}, not {exact}");
            }
            assert_eq!(isa.run(Eval(0.0)), (1.0, 1.0, 0.0));
            assert_eq!(isa.run(Eval(-1e30)), (0.0, 0.0, -1.0));
        }
    }

    #[test]
    fn near_decays_have_the_same_bits_both_ways() {
        struct Both(f32, f32);
        impl Kernel for Both {
            type Output = (u32, u32);

            #[inline(always)]
            fn run<S: Simd>(self, s: S) -> (u32, u32) {
                let (delta, a) = (s.splat(self.0), s.splat(self.1));
                (s.reduce_max(decay_near(s, delta, a)).to_bits(), s.reduce_max(decay(s, delta, a)).to_bits())
            }
        }
        for isa in Isa::available() {
            for i in 0..4000 {
                let (delta, a) = (0.031 * i as f32, -1.003 + 0.0007 * i as f32);
                if (delta * a).abs() < NEAR {
                    let (near, any) = isa.run(Both(delta, a));
                    assert_eq!(near, any, "{isa}: {delta} · {a}");
                    let exact = (f64::from(delta) * f64::from(a)).exp2();
                    let error = (f64::from(f32::from_bits(near)) - exact).abs();
                    // On the portable level the product is rounded first.
                    let rounding = if isa == Isa::Portable { (delta * a).abs() } else { 0.0 };
                    let bound = (1.5 + f64::from(rounding)) * f64::from(f32::EPSILON);
                    assert!(error <= bound * exact, "{isa}: {delta} · {a}");
                }
            }
            assert!(f32::from_bits(isa.run(Both(f32::NAN, -1.0)).1).is_nan(), "{isa}");
            assert_eq!(isa.run(Both(1e30, -1.0)).1, 0, "{isa}");
        }
    }
}
