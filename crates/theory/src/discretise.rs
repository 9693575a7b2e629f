//! From a continuous model to a recurrence with step Δ.
//!
//! | method | Ā | B̄ |
//! |---|---|---|
//! | zero-order hold | exp(ΔA) | A⁻¹(exp(ΔA) − I)B, the limit ΔB at A = 0 |
//! | generalised bilinear α | (I − αΔA)⁻¹(I + (1 − α)ΔA) | (I − αΔA)⁻¹ΔB |
//! | Mamba's | exp(ΔA) | ΔB |
//!
//! α = 0 is forward Euler, ½ bilinear (Tustin), 1 backward Euler. Zero-order hold is exact where the input is constant
//! between samples. Released Mamba checkpoints use the last line, not the zero-order hold that the paper prints.

use nalgebra::{DMatrix, DVector};
use num_complex::Complex64;

use crate::error::{Error, above_zero};

/// How the step is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// The input is held constant between samples.
    ZeroOrderHold,
    /// The share α of the step that is implicit, in [0, 1].
    Generalised(f64),
    /// exp(ΔA) and ΔB, as Mamba computes.
    Mamba,
}

impl Method {
    /// Trapezoids, also called Tustin's method.
    pub const BILINEAR: Method = Method::Generalised(0.5);
    /// Forward Euler.
    pub const EULER: Method = Method::Generalised(0.0);
    /// Backward Euler.
    pub const BACKWARD_EULER: Method = Method::Generalised(1.0);

    fn check(self, delta: f64) -> Result<(), Error> {
        above_zero("the step Δ", delta)?;
        match self {
            Method::Generalised(alpha) if !(0.0..=1.0).contains(&alpha) => {
                Err(Error::Value { what: "α of the bilinear method", found: alpha, expected: "a number from 0 to 1" })
            }
            _ => Ok(()),
        }
    }
}

/// (Ā, B̄) of dense A `[N, N]` and B `[N]`.
///
/// # Errors
/// A step that is not above 0, α outside [0, 1], I − αΔA without inverse.
pub fn dense(
    method: Method,
    a: &DMatrix<f64>,
    b: &DVector<f64>,
    delta: f64,
) -> Result<(DMatrix<f64>, DVector<f64>), Error> {
    method.check(delta)?;
    let n = a.nrows();
    let identity = DMatrix::identity(n, n);
    match method {
        Method::ZeroOrderHold => {
            // exp of [[ΔA, ΔB], [0, 0]] is [[Ā, B̄], [0, 1]], also where A has no inverse (Van Loan 1978).
            let mut block = DMatrix::zeros(n + 1, n + 1);
            block.view_mut((0, 0), (n, n)).copy_from(&(a * delta));
            block.view_mut((0, n), (n, 1)).copy_from(&(b * delta));
            let exponential = block.exp();
            Ok((exponential.view((0, 0), (n, n)).into(), exponential.view((0, n), (n, 1)).column(0).into()))
        }
        Method::Mamba => Ok(((a * delta).exp(), b * delta)),
        Method::Generalised(alpha) => {
            let implicit = (&identity - a * (alpha * delta)).lu();
            let explicit = &identity + a * ((1.0 - alpha) * delta);
            let singular = Error::Singular { what: "I − αΔA" };
            let a_bar = implicit.solve(&explicit).ok_or(singular.clone())?;
            Ok((a_bar, implicit.solve(&(b * delta)).ok_or(singular)?))
        }
    }
}

/// (Ā, B̄) of one diagonal element.
///
/// # Errors
/// As [`dense`].
pub fn scalar(method: Method, a: Complex64, b: Complex64, delta: f64) -> Result<(Complex64, Complex64), Error> {
    method.check(delta)?;
    let one = Complex64::new(1.0, 0.0);
    Ok(match method {
        // (e^z − 1)/z = 1 + z/2 + …; the division below would underflow.
        Method::ZeroOrderHold if (a * delta).norm() < 1e-12 => (one + a * delta, b * delta),
        Method::ZeroOrderHold => ((a * delta).exp(), exp_m1(a * delta) / a * b),
        Method::Mamba => ((a * delta).exp(), b * delta),
        Method::Generalised(alpha) => {
            let implicit = one - a * (alpha * delta);
            if implicit == Complex64::ZERO {
                return Err(Error::Singular { what: "1 − αΔa" });
            }
            ((one + a * ((1.0 - alpha) * delta)) / implicit, b * delta / implicit)
        }
    })
}

/// e^z − 1 without cancellation near 0.
fn exp_m1(z: Complex64) -> Complex64 {
    // e^x cos y − 1 = expm1(x) cos y − 2 sin²(y/2)
    let (sin, cos) = z.im.sin_cos();
    let half = (z.im / 2.0).sin();
    Complex64::new(z.re.exp_m1() * cos - 2.0 * half * half, z.re.exp() * sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(method: Method, a: f64, delta: f64) -> [(f64, f64); 2] {
        let (sa, sb) = scalar(method, a.into(), 1.0.into(), delta).unwrap();
        let (da, db) = dense(method, &DMatrix::from_element(1, 1, a), &DVector::from_element(1, 1.0), delta).unwrap();
        [(sa.re, sb.re), (da[(0, 0)], db[0])]
    }

    #[test]
    fn check_values() {
        for (method, expected) in [
            (Method::ZeroOrderHold, (0.740_818_220_7, 0.086_393_926_4)),
            (Method::BILINEAR, (0.739_130_434_8, 0.086_956_521_7)),
            (Method::EULER, (0.7, 0.1)),
            (Method::BACKWARD_EULER, (1.0 / 1.3, 0.1 / 1.3)),
            (Method::Mamba, (0.740_818_220_7, 0.1)),
        ] {
            for found in both(method, -3.0, 0.1) {
                assert!((found.0 - expected.0).abs() < 1e-10 && (found.1 - expected.1).abs() < 1e-10, "{method:?}");
            }
        }
    }

    #[test]
    fn the_hold_has_its_limit_where_a_vanishes() {
        for a in [0.0, 1e-300, -1e-12] {
            for (a_bar, b_bar) in both(Method::ZeroOrderHold, a, 0.25) {
                assert!((a_bar - 1.0).abs() < 1e-12 && (b_bar - 0.25).abs() < 1e-12);
            }
        }
        let z = Complex64::new(-1e-9, 2e-9);
        assert!((exp_m1(z) - (z + z * z / 2.0)).norm() < 1e-24);
    }

    #[test]
    fn impossible_steps_are_refused() {
        let (a, b) = (DMatrix::identity(2, 2), DVector::zeros(2));
        assert!(dense(Method::BILINEAR, &a, &b, 0.0).unwrap_err().to_string().contains("Δ is 0"));
        assert!(dense(Method::BILINEAR, &a, &b, f64::NAN).is_err());
        assert!(dense(Method::Generalised(1.5), &a, &b, 0.1).unwrap_err().to_string().contains("from 0 to 1"));
        assert_eq!(dense(Method::BACKWARD_EULER, &a, &b, 1.0), Err(Error::Singular { what: "I − αΔA" }));
    }
}
