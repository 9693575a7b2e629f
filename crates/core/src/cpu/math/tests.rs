use super::*;
use crate::cpu::{Isa, Kernel};

#[derive(Clone, Copy, Debug)]
enum Function {
    Exp,
    /// Of −|x|.
    ExpNotPositive,
    ExpM1,
    Ln,
    Log1p,
    Sigmoid,
    Tanh,
    Silu,
    Dsilu,
    Softplus,
    Sin,
    Cos,
}

/// Replaces each value by `f` of it. `f` sees whole vectors, the last one filled up with zeros.
#[inline(always)]
fn map_in_place<S: Simd>(s: S, values: &mut [f32], f: impl Fn(S, S::V) -> S::V) {
    let data = values.as_mut_ptr();
    let mut start = 0;
    // One place calls `f`, so that it is surely inlined there.
    while start < values.len() {
        let n = values.len() - start;
        // SAFETY: n values follow `start`; a whole vector is touched only where there are as many.
        unsafe {
            let at = data.add(start);
            let x = if n >= S::LANES { s.load(at) } else { s.load_partial(at, n) };
            let y = f(s, x);
            if n >= S::LANES { s.store(at, y) } else { s.store_partial(at, y, n) }
        }
        start += S::LANES;
    }
}

struct Apply<'a>(Function, &'a mut [f32]);

impl Kernel for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.0 {
            Function::Exp => map_in_place(s, self.1, |s, x| exp(s, x)),
            Function::ExpNotPositive => map_in_place(s, self.1, |s, x| exp_not_positive(s, s.neg(s.abs(x)))),
            Function::ExpM1 => map_in_place(s, self.1, |s, x| exp_m1(s, x)),
            Function::Ln => map_in_place(s, self.1, |s, x| ln(s, x)),
            Function::Log1p => map_in_place(s, self.1, |s, x| log1p(s, x)),
            Function::Sigmoid => map_in_place(s, self.1, |s, x| sigmoid(s, x)),
            Function::Tanh => map_in_place(s, self.1, |s, x| tanh(s, x)),
            Function::Silu => map_in_place(s, self.1, |s, x| silu(s, x)),
            Function::Dsilu => map_in_place(s, self.1, |s, x| dsilu(s, x)),
            Function::Softplus => map_in_place(s, self.1, |s, x| softplus(s, x)),
            Function::Sin => map_in_place(s, self.1, |s, x| sin_cos(s, x).0),
            Function::Cos => map_in_place(s, self.1, |s, x| sin_cos(s, x).1),
        }
    }
}

fn apply(isa: Isa, function: Function, x: f32) -> f32 {
    let mut one = [x];
    isa.run(Apply(function, &mut one));
    one[0]
}

fn sigmoid64(x: f64) -> f64 {
    if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
}

fn exact(function: Function, x: f64) -> f64 {
    match function {
        Function::Exp => x.exp(),
        Function::ExpNotPositive => (-x.abs()).exp(),
        Function::ExpM1 => x.exp_m1(),
        Function::Ln => x.ln(),
        Function::Log1p => x.ln_1p(),
        Function::Sigmoid => sigmoid64(x),
        Function::Tanh => x.tanh(),
        Function::Silu => x * sigmoid64(x),
        Function::Dsilu => sigmoid64(x) * (1.0 + x * sigmoid64(-x)),
        Function::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
    }
}

/// The distance between neighbouring f32 around `x`.
fn ulp(x: f64) -> f64 {
    let x = x.abs();
    if x < f64::from(f32::MIN_POSITIVE) { 2f64.powi(-149) } else { 2f64.powi(x.log2().floor() as i32 - 23) }
}

/// Every `step`-th f32 between two values of one sign, in bits.
fn bits_between(low: f32, high: f32, step: usize) -> impl Iterator<Item = f32> {
    (low.to_bits()..=high.to_bits()).step_by(step).map(f32::from_bits)
}

/// All magnitudes that f32 has, dense where functions bend, both signs.
fn samples() -> Vec<f32> {
    let mut samples: Vec<f32> = bits_between(0.0, f32::MAX, 10_007).collect();
    samples.extend(bits_between(0.01, 110.0, 499));
    let negative: Vec<f32> = samples.iter().map(|x| -x).collect();
    samples.extend(negative);
    samples
}

/// The largest error in ULP over the samples for which the exact result is a finite f32, with its place.
fn worst(isa: Isa, function: Function, error: impl Fn(f64, f64, f64) -> f64) -> (f64, f32) {
    let inputs = samples();
    let mut outputs = inputs.clone();
    isa.run(Apply(function, &mut outputs));
    let mut worst = (0.0, 0.0);
    for (&x, &y) in inputs.iter().zip(&outputs) {
        let want = exact(function, f64::from(x));
        if want.is_nan() {
            assert!(y.is_nan(), "{isa}: {function:?}({x}) is {y}");
            continue;
        }
        if (want as f32).is_infinite() {
            // The last value before infinity may go either way.
            assert!(
                y.is_infinite() || f64::from(y).abs() >= f64::from(f32::MAX) * (1.0 - 1e-6),
                "{function:?}({x}) {y}"
            );
            continue;
        }
        if y.is_infinite() {
            assert!(want.abs() > f64::from(f32::MAX) * (1.0 - 1e-6), "{isa}: {function:?}({x}) is {y}, not {want}");
            continue;
        }
        let e = error(f64::from(x), f64::from(y), want);
        assert!(!e.is_nan(), "{isa}: {function:?}({x}) is {y}, not {want}");
        if e > worst.0 {
            worst = (e, x);
        }
    }
    worst
}

#[test]
fn errors_stay_within_the_stated_bounds() {
    let bounds = [
        (Function::Exp, EXP_ULP),
        (Function::ExpNotPositive, EXP_ULP),
        (Function::ExpM1, EXP_M1_ULP),
        (Function::Ln, LN_ULP),
        (Function::Log1p, LOG1P_ULP),
        (Function::Sigmoid, SIGMOID_ULP),
        (Function::Tanh, TANH_ULP),
        (Function::Softplus, SOFTPLUS_ULP),
    ];
    for isa in Isa::available() {
        for (function, bound) in bounds {
            let (error, at) = worst(isa, function, |_, got, want| (got - want).abs() / ulp(want));
            println!("{isa} {function:?}: {error:.3} ULP at {at}");
            assert!(error <= bound, "{isa}: {function:?} is off by {error} ULP at {at}, bound {bound}");
        }
        for x in samples().into_iter().filter(|x| *x > SOFTPLUS_THRESHOLD) {
            assert_eq!(apply(isa, Function::Softplus, x), x);
        }
        let (error, at) = worst(isa, Function::Silu, |x, got, want| {
            let error = (got - want).abs();
            if x < -87.0 { error / SILU_TAIL * SILU_ULP } else { error / ulp(want) }
        });
        println!("{isa} Silu: {error:.3} ULP at {at}");
        assert!(error <= SILU_ULP, "{isa}: silu is off by {error} ULP at {at}");
        let (error, at) = worst(isa, Function::Dsilu, |_, got, want| (got - want).abs());
        println!("{isa} Dsilu: {error:.3e} at {at}");
        assert!(error <= DSILU_ERROR, "{isa}: dsilu is off by {error} at {at}");
        for function in [Function::Sin, Function::Cos] {
            let (error, at) = worst(isa, function, |x, got, want| {
                let beyond = x.abs() > f64::from(SIN_COS_LARGEST);
                if beyond { got.abs() - 1.0 } else { (got - want).abs() }
            });
            println!("{isa} {function:?}: {error:.3e} at {at}");
            assert!(error <= SIN_COS_ERROR, "{isa}: {function:?} is off by {error} at {at}");
        }
    }
}

#[test]
fn special_values() {
    use Function::*;
    const INF: f32 = f32::INFINITY;
    const NAN: f32 = f32::NAN;
    let tiny = 1e-42;
    let cases = [
        (Exp, 0.0, 1.0),
        (Exp, -0.0, 1.0),
        (Exp, INF, INF),
        (Exp, -INF, 0.0),
        (Exp, 88.73, INF),
        (Exp, -104.1, 0.0),
        (Exp, f32::MAX, INF),
        (Exp, f32::MIN, 0.0),
        (Exp, tiny, 1.0),
        (ExpNotPositive, 0.0, 1.0),
        (ExpNotPositive, INF, 0.0),
        (ExpNotPositive, 104.1, 0.0),
        (ExpM1, 0.0, 0.0),
        (ExpM1, -0.0, -0.0),
        (ExpM1, tiny, tiny),
        (ExpM1, -tiny, -tiny),
        (ExpM1, INF, INF),
        (ExpM1, -INF, -1.0),
        (ExpM1, 89.0, INF),
        (Sin, 0.0, 0.0),
        (Sin, INF, NAN),
        (Sin, tiny, tiny),
        (Cos, 0.0, 1.0),
        (Cos, -INF, NAN),
        (Ln, 0.0, -INF),
        (Ln, -0.0, -INF),
        (Ln, 1.0, 0.0),
        (Ln, INF, INF),
        (Ln, -1.0, NAN),
        (Ln, -INF, NAN),
        (Ln, -tiny, NAN),
        (Log1p, 0.0, 0.0),
        (Log1p, -0.0, -0.0),
        (Log1p, tiny, tiny),
        (Log1p, INF, INF),
        (Log1p, -1.0, -INF),
        (Log1p, -1.5, NAN),
        (Log1p, -INF, NAN),
        (Sigmoid, 0.0, 0.5),
        (Sigmoid, INF, 1.0),
        (Sigmoid, -INF, 0.0),
        (Tanh, 0.0, 0.0),
        (Tanh, -0.0, -0.0),
        (Tanh, tiny, tiny),
        (Tanh, INF, 1.0),
        (Tanh, -INF, -1.0),
        (Silu, 0.0, 0.0),
        (Silu, -0.0, -0.0),
        (Silu, INF, INF),
        (Silu, f32::MAX, f32::MAX),
        (Silu, f32::MIN, -0.0),
        (Silu, -INF, NAN),
        (Softplus, -INF, 0.0),
        (Softplus, INF, INF),
        (Softplus, 20.000_002, 20.000_002),
        (Softplus, 1e30, 1e30),
        (Dsilu, 0.0, 0.5),
        (Dsilu, 1e30, 1.0),
    ];
    for isa in Isa::available() {
        for (function, x, want) in cases {
            let got = apply(isa, function, x);
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                "{isa}: {function:?}({x}) is {got}, not {want}"
            );
        }
        for function in [Exp, ExpNotPositive, ExpM1, Ln, Log1p, Sigmoid, Tanh, Silu, Dsilu, Softplus] {
            assert!(apply(isa, function, NAN).is_nan(), "{isa}: {function:?}(NaN)");
            assert!(apply(isa, function, -NAN).is_nan(), "{isa}: {function:?}(-NaN)");
            assert!(apply(isa, function, f32::from_bits(0x7fff_ffff)).is_nan(), "{isa}: {function:?}(NaN)");
        }
    }
}

#[test]
fn a_lane_has_the_same_bits_wherever_it_stands() {
    struct Scalar(f32);
    impl Kernel for Scalar {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            scalar(s, self.0, |s, x| softplus(s, x))
        }
    }
    let inputs: Vec<f32> = (0..1001).map(|i| (i as f32 - 500.0) * 0.037).collect();
    for isa in Isa::available() {
        let mut whole = inputs.clone();
        isa.run(Apply(Function::Softplus, &mut whole));
        for (i, &x) in inputs.iter().enumerate() {
            assert_eq!(apply(isa, Function::Softplus, x).to_bits(), whole[i].to_bits());
            assert_eq!(isa.run(Scalar(x)).to_bits(), whole[i].to_bits());
        }
    }
}
