//! The diagonal scan in plain f64, as the formula says it.

use crate::ops::selective_scan::Discretisation;
use std::ops::{Add, Mul, Range};

/// Operands of [`diagonal_scan`], row-major with the shapes of [`super::DiagonalScan`].
#[derive(Clone, Debug)]
pub struct Operands<'a> {
    /// Channels D.
    pub channels: usize,
    /// `[T, D]`
    pub x: &'a [f64],
    /// `[T, D]`, before bias and softplus.
    pub dt: Option<&'a [f64]>,
    /// `[D]`
    pub dt_bias: Option<&'a [f64]>,
    /// `[D, N]`
    pub a: &'a [f64],
    /// `[D, N]`
    pub a_imag: Option<&'a [f64]>,
    /// `[T, K·N]`, or `[D, K·N]` where it is fixed.
    pub b: &'a [f64],
    pub b_is_fixed: bool,
    /// As B.
    pub c: &'a [f64],
    pub c_is_fixed: bool,
    /// `[D]`
    pub d: Option<&'a [f64]>,
    /// `[S, K·N·D]`
    pub initial_state: Option<&'a [f64]>,
    /// The rows of each of the S segments.
    pub segments: &'a [Range<usize>],
    pub discretisation: Discretisation,
}

/// A complex number.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Complex(f64, f64);

impl Add for Complex {
    type Output = Complex;
    fn add(self, other: Complex) -> Complex {
        Complex(self.0 + other.0, self.1 + other.1)
    }
}

impl Mul for Complex {
    type Output = Complex;
    fn mul(self, other: Complex) -> Complex {
        Complex(self.0 * other.0 - self.1 * other.1, self.0 * other.1 + self.1 * other.0)
    }
}

impl Complex {
    fn exp(self) -> Complex {
        Complex(self.0.exp() * self.1.cos(), self.0.exp() * self.1.sin())
    }

    /// (exp(z) − 1)/z, with exp(z) − 1 = expm1(x) cos y − 2 sin²(y/2) + i eˣ sin y, which does not cancel.
    fn phi(self) -> Complex {
        let Complex(x, y) = self;
        let square = x * x + y * y;
        if square == 0.0 {
            return Complex(1.0, 0.0);
        }
        let m1 = Complex(x.exp_m1() * y.cos() - 2.0 * (y / 2.0).sin().powi(2), x.exp() * y.sin());
        m1 * Complex(x / square, -y / square)
    }
}

/// y `[T, D]` and the final states `[S, K·N·D]`.
pub fn diagonal_scan(op: &Operands<'_>) -> (Vec<f64>, Vec<f64>) {
    let (d, n) = (op.channels, op.a.len() / op.channels);
    let planes = if op.a_imag.is_some() { 2 } else { 1 };
    let number = |data: &[f64], start: usize, plane: usize| {
        Complex(data[start], if planes == 2 { data[start + plane] } else { 0.0 })
    };
    let width = planes * n;
    let mut y = vec![0.0; op.x.len()];
    let mut states = vec![0.0; op.segments.len() * width * d];
    if let Some(initial) = op.initial_state {
        states.copy_from_slice(initial);
    }
    for (segment, rows) in op.segments.iter().enumerate() {
        let states = &mut states[segment * width * d..][..width * d];
        for t in rows.clone() {
            for channel in 0..d {
                let x = op.x[t * d + channel];
                let dt = op.dt.map_or(0.0, |dt| dt[t * d + channel]) + op.dt_bias.map_or(0.0, |bias| bias[channel]);
                let delta = if dt > 20.0 { dt } else { dt.exp().ln_1p() };
                let mut sum = op.d.map_or(0.0, |skip| skip[channel] * x);
                for state in 0..n {
                    let a = Complex(op.a[channel * n + state], op.a_imag.map_or(0.0, |a| a[channel * n + state]));
                    let of = |values: &[f64], fixed: bool| {
                        number(values, if fixed { channel } else { t } * width + state, n)
                    };
                    let z = Complex(delta, 0.0) * a;
                    let factor = match op.discretisation {
                        Discretisation::Euler => Complex(delta, 0.0),
                        Discretisation::Zoh => Complex(delta, 0.0) * z.phi(),
                    };
                    let at = state * d + channel;
                    let h = z.exp() * number(states, at, n * d) + factor * of(op.b, op.b_is_fixed) * Complex(x, 0.0);
                    states[at] = h.0;
                    if planes == 2 {
                        states[at + n * d] = h.1;
                    }
                    sum += planes as f64 * (of(op.c, op.c_is_fixed) * h).0;
                }
                y[t * d + channel] = sum;
            }
        }
    }
    (y, states)
}
