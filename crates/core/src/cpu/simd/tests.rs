use std::f32::consts::{FRAC_1_SQRT_2, SQRT_2};

use half::bf16;

use super::{MAX_LANES, ROUNDING, Simd};
use crate::cpu::{Isa, Kernel};

/// Values that break things: zeros, ties, large, tiny and not numbers.
const VALUES: [f32; 24] = [
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.5,
    -1.5,
    2.5,
    0.499_999_97,
    -0.499_999_97,
    1.0,
    -1.0,
    3.7,
    -3.7,
    8_388_607.5,
    -8_388_608.0,
    1e10,
    -1e10,
    1e38,
    -1e38,
    1e-40,
    f32::MIN_POSITIVE,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Runs every method over all pairs of `VALUES`, one pair a lane, and compares with plain Rust.
struct Check;

impl Kernel for Check {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, &x) in VALUES.iter().enumerate() {
            for (j, &y) in VALUES.iter().enumerate() {
                // The value of interest moves through all lanes.
                let lane = (i + j) % S::LANES;
                let mut buffers = [[1.0f32; MAX_LANES]; 2];
                buffers[0][lane] = x;
                buffers[1][lane] = y;
                // SAFETY: the buffers hold MAX_LANES values.
                let (a, b) = unsafe { (s.load(buffers[0].as_ptr()), s.load(buffers[1].as_ptr())) };
                let get = |v: S::V| {
                    let mut out = [0.0f32; MAX_LANES];
                    // SAFETY: `out` holds MAX_LANES values.
                    unsafe { s.store(out.as_mut_ptr(), v) };
                    out[lane]
                };
                let check = |name: &str, got: f32, want: f32| {
                    assert!(same(got, want), "{name}({x}, {y}): got {got}, want {want}");
                };
                check("add", get(s.add(a, b)), x + y);
                check("sub", get(s.sub(a, b)), x - y);
                check("mul", get(s.mul(a, b)), x * y);
                check("div", get(s.div(a, b)), x / y);
                let fused = get(s.fma(a, b, s.splat(0.25)));
                assert!(same(fused, x.mul_add(y, 0.25)) || same(fused, x * y + 0.25), "fma({x}, {y}): {fused}");
                check("neg", get(s.neg(a)), -x);
                check("abs", get(s.abs(a)), x.abs());
                check("min", get(s.min(a, b)), if x < y { x } else { y });
                check("max", get(s.max(a, b)), if x > y { x } else { y });
                check("sqrt", get(s.sqrt(a)), x.sqrt());
                check("round", get(s.round(a)), x.round_ties_even());
                let floor = get(s.floor(a));
                assert!(floor == x.floor() || floor.is_nan() && x.is_nan(), "floor({x}): {floor}");
                check("lt", get(s.select(s.lt(a, b), s.splat(1.0), s.zero())), f32::from(u8::from(x < y)));
                check("gt", get(s.select(s.gt(a, b), s.splat(1.0), s.zero())), f32::from(u8::from(x > y)));
            }
        }
        for n in -300..300 {
            for m in [1.0f32, -1.5, 1.999_999_9, 0.7, 1e30, 1e-30] {
                let mut out = [0.0f32; MAX_LANES];
                // SAFETY: `out` holds MAX_LANES values.
                unsafe { s.store(out.as_mut_ptr(), s.scale2(s.splat(m), s.splat(n as f32))) };
                let exact = (f64::from(m) * 2f64.powi(n)) as f32;
                assert_eq!(out[0], exact, "{m} · 2^{n}");
                if exact.is_normal() && f64::from(exact) == f64::from(m) * 2f64.powi(n) && n.abs() < 250 {
                    let rounded = s.add(s.splat(ROUNDING), s.splat(n as f32 + 0.25));
                    // SAFETY: `out` holds MAX_LANES values.
                    unsafe { s.store(out.as_mut_ptr(), s.scale2_normal(s.splat(m), rounded)) };
                    assert_eq!(out[0], exact, "{m} · 2^{n}");
                }
            }
        }
        let root = FRAC_1_SQRT_2;
        for x in [f32::MIN_POSITIVE, 0.3, root.next_down(), root, 1.0, SQRT_2, SQRT_2.next_up(), 7.5, f32::MAX] {
            let (m, e) = s.split_exponent(s.splat(x));
            let (mut ms, mut es) = ([0.0f32; MAX_LANES], [0.0f32; MAX_LANES]);
            // SAFETY: both buffers hold MAX_LANES values.
            unsafe {
                s.store(ms.as_mut_ptr(), m);
                s.store(es.as_mut_ptr(), e);
            }
            assert!((root..SQRT_2.next_up()).contains(&ms[0]), "mantissa {} of {x}", ms[0]);
            assert_eq!(f64::from(ms[0]) * 2f64.powi(es[0] as i32), f64::from(x));
        }
        let square: [[f32; MAX_LANES]; MAX_LANES] =
            std::array::from_fn(|i| std::array::from_fn(|j| (i * MAX_LANES + j) as f32));
        // SAFETY: every row holds MAX_LANES values.
        let columns = s.transpose(std::array::from_fn(|i| unsafe { s.load(square[i].as_ptr()) }));
        for (j, column) in columns.into_iter().enumerate().take(S::LANES) {
            let mut out = [0.0f32; MAX_LANES];
            // SAFETY: `out` holds MAX_LANES values.
            unsafe { s.store(out.as_mut_ptr(), column) };
            assert!((0..S::LANES).all(|i| out[i] == square[i][j]), "column {j}: {out:?}");
        }
        let pairs: [bf16; 2 * MAX_LANES] = std::array::from_fn(|i| bf16::from_f32(i as f32));
        let (mut even, mut odd) = ([0.0f32; MAX_LANES], [0.0f32; MAX_LANES]);
        // SAFETY: `pairs` holds 2 · MAX_LANES values, the others MAX_LANES.
        unsafe {
            let (a, b) = s.load_bf16_pairs(pairs.as_ptr());
            s.store(even.as_mut_ptr(), a);
            s.store(odd.as_mut_ptr(), b);
        }
        assert!((0..S::LANES).all(|i| even[i] == (2 * i) as f32 && odd[i] == (2 * i + 1) as f32));
        for n in 0..=S::LANES {
            let from: [f32; MAX_LANES] = std::array::from_fn(|i| 1.0 + i as f32);
            let mut to = [-7.0f32; MAX_LANES];
            let mut whole = [0.0f32; MAX_LANES];
            let (mut narrow, mut narrow_whole) = ([bf16::NEG_ONE; MAX_LANES], [0.0f32; MAX_LANES]);
            // SAFETY: all buffers hold MAX_LANES values.
            unsafe {
                let v = s.load_partial(from.as_ptr(), n);
                s.store(whole.as_mut_ptr(), v);
                s.store_partial(to.as_mut_ptr(), s.load(from.as_ptr()), n);
                s.store_partial_bf16(narrow.as_mut_ptr(), s.load(from.as_ptr()), n);
                s.store(narrow_whole.as_mut_ptr(), s.load_partial_bf16(narrow.as_ptr(), n));
                let sum: f32 = from[..n].iter().sum();
                assert_eq!(s.reduce_add(v), sum);
                assert_eq!(s.reduce_max(v), if n == 0 { 0.0 } else { n as f32 });
            }
            for i in 0..S::LANES {
                let inside = i < n;
                assert_eq!(whole[i], if inside { from[i] } else { 0.0 });
                assert_eq!(to[i], if inside { from[i] } else { -7.0 });
                assert_eq!(narrow[i].to_f32(), if inside { from[i] } else { -1.0 });
                assert_eq!(narrow_whole[i], if inside { from[i] } else { 0.0 });
            }
        }
    }
}

#[test]
fn every_operation_agrees_with_plain_rust() {
    for isa in Isa::available() {
        isa.run(Check);
    }
}

#[test]
fn bf16_rounds_as_the_half_crate_does() {
    struct Narrow<'a>(&'a [f32; MAX_LANES], &'a mut [bf16; MAX_LANES], &'a mut [f32; MAX_LANES]);
    impl Kernel for Narrow<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for i in (0..MAX_LANES).step_by(S::LANES) {
                // SAFETY: MAX_LANES is a multiple of LANES.
                unsafe {
                    s.store_bf16(self.1.as_mut_ptr().add(i), s.load(self.0.as_ptr().add(i)));
                    s.store(self.2.as_mut_ptr().add(i), s.load_bf16(self.1.as_ptr().add(i)));
                }
            }
        }
    }
    for isa in Isa::available() {
        // All upper halves against lower halves around the tie; the step is odd so that lanes vary.
        for upper in (0..=0xffff_u32).step_by(MAX_LANES) {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let values = std::array::from_fn(|i| f32::from_bits(((upper + i as u32) << 16) | lower));
                let (mut out, mut back) = ([bf16::ZERO; MAX_LANES], [0.0; MAX_LANES]);
                isa.run(Narrow(&values, &mut out, &mut back));
                for i in 0..MAX_LANES {
                    let want = bf16::from_f32(values[i]);
                    assert_eq!(out[i].to_bits(), want.to_bits(), "{isa}: {:08x}", values[i].to_bits());
                    assert_eq!(back[i].to_bits(), want.to_f32().to_bits());
                }
            }
        }
    }
}
