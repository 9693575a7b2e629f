//! S4D (Gu et al. 2022, arXiv 2206.11893): models with a diagonal A.

use std::f64::consts::PI;

use nalgebra::{DMatrix, DVector};
use num_complex::Complex64;

use crate::discretise::{self, Method};
use crate::error::{Error, positive};
use crate::random::Random;
use crate::s4::Dplr;
use crate::ssm::Continuous;

/// Where the diagonal starts. All but Real have N/2 conjugate pairs, of which the one above the real axis is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// −½ + iπn.
    Lin,
    /// −½ + i (N/π)(N/(2n+1) − 1).
    Inv,
    /// The eigenvalues of the normal part of HiPPO-LegS.
    LegS,
    /// −(n+1), real: what Mamba starts from.
    Real,
    /// −½ exp(z) + iπ(N/2)u, z normal and u uniform; with its seed.
    Random(u64),
}

impl Init {
    /// The diagonal for state size N: N/2 numbers, or N for Real.
    ///
    /// # Errors
    /// State size 0, or an odd one where there are pairs.
    pub fn diagonal(self, n: usize) -> Result<Vec<Complex64>, Error> {
        positive("the state size", n)?;
        if self != Init::Real && n % 2 == 1 {
            let expected = "an even number, since complex states come in conjugate pairs";
            return Err(Error::Size { what: "the state size", found: n, expected });
        }
        let (half, size) = (n / 2, n as f64);
        let pairs = |imaginary: &dyn Fn(f64) -> f64| {
            (0..half).map(|k| Complex64::new(-0.5, imaginary(k as f64))).collect::<Vec<_>>()
        };
        Ok(match self {
            Init::Lin => pairs(&|k| PI * k),
            Init::Inv => pairs(&|k| size / PI * (size / (2.0 * k + 1.0) - 1.0)),
            Init::LegS => Dplr::legs(&DVector::zeros(n))?.lambda.iter().copied().filter(|l| l.im > 0.0).collect(),
            Init::Real => (1..=n).map(|k| Complex64::new(-(k as f64), 0.0)).collect(),
            Init::Random(seed) => {
                let mut random = Random::new(seed);
                (0..half)
                    .map(|_| Complex64::new(-0.5 * random.normal().exp(), PI * size / 2.0 * random.uniform()))
                    .collect()
            }
        })
    }
}

/// A diagonal model. B and C belong to the diagonal's elements.
#[derive(Clone, Debug)]
pub struct S4d {
    pub a: Vec<Complex64>,
    pub b: Vec<Complex64>,
    pub c: Vec<Complex64>,
    /// Every element stands for itself and its conjugate: outputs are 2 Re(…).
    pub pairs: bool,
}

impl S4d {
    /// With B = 1 and a random C.
    ///
    /// # Errors
    /// Those of [`Init::diagonal`].
    pub fn new(init: Init, n: usize, seed: u64) -> Result<S4d, Error> {
        let a = init.diagonal(n)?;
        let mut random = Random::new(seed);
        let pairs = init != Init::Real;
        let c = a.iter().map(|_| Complex64::new(random.normal(), if pairs { random.normal() } else { 0.0 })).collect();
        Ok(S4d { b: vec![1.0.into(); a.len()], c, a, pairs })
    }

    /// K̄_k = 2 Re Σ_n C_n B̄_n Ā_n^k (without 2 for real models): a product with the Vandermonde matrix of Ā, N·L.
    ///
    /// # Errors
    /// Length 0; those of [`discretise::scalar`].
    pub fn kernel(&self, method: Method, delta: f64, length: usize) -> Result<Vec<f64>, Error> {
        positive("the length", length)?;
        let mut kernel = vec![0.0; length];
        let scale = if self.pairs { 2.0 } else { 1.0 };
        for ((&a, &b), &c) in self.a.iter().zip(&self.b).zip(&self.c) {
            let (a_bar, b_bar) = discretise::scalar(method, a, b, delta)?;
            let (logarithm, weight) = (a_bar.ln(), c * b_bar * scale);
            for (k, sum) in kernel.iter_mut().enumerate() {
                // Each power by itself: an error of a product of k factors would grow with k.
                let power = if a_bar == Complex64::ZERO && k == 0 { 1.0.into() } else { (logarithm * k as f64).exp() };
                *sum += (weight * power).re;
            }
        }
        Ok(kernel)
    }

    /// The same model with real numbers: a pair α ± iω is the block [[α, −ω], [ω, α]].
    ///
    /// # Errors
    /// A model without states.
    pub fn dense(&self) -> Result<Continuous, Error> {
        let width = if self.pairs { 2 } else { 1 };
        let n = width * self.a.len();
        let (mut a, mut b, mut c) = (DMatrix::zeros(n, n), DVector::zeros(n), DVector::zeros(n));
        for (i, ((&pole, &input), &output)) in self.a.iter().zip(&self.b).zip(&self.c).enumerate() {
            let at = width * i;
            (a[(at, at)], b[at], c[at]) = (pole.re, input.re, output.re * width as f64);
            if self.pairs {
                (a[(at + 1, at + 1)], a[(at, at + 1)], a[(at + 1, at)]) = (pole.re, -pole.im, pole.im);
                (b[at + 1], c[at + 1]) = (input.im, -2.0 * output.im);
            }
        }
        Continuous::new(a, b, c, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relative_error;

    const ALL: [Init; 5] = [Init::Lin, Init::Inv, Init::LegS, Init::Real, Init::Random(1)];

    #[test]
    fn kernels_are_those_of_the_dense_model() {
        for init in ALL {
            for method in [Method::ZeroOrderHold, Method::BILINEAR] {
                let model = S4d::new(init, 16, 2).unwrap();
                let dense = model.dense().unwrap().discretise(method, 0.03).unwrap();
                let kernel = model.kernel(method, 0.03, 200).unwrap();
                assert!(relative_error(&kernel, &dense.kernel(200)) < 1e-11, "{init:?} {method:?}");
            }
        }
    }

    #[test]
    fn diagonals_are_the_published_ones() {
        let of = |init: Init| init.diagonal(8).unwrap();
        assert_eq!(of(Init::Lin)[3], Complex64::new(-0.5, 3.0 * PI));
        assert!((of(Init::Inv)[0].im - 8.0 / PI * 7.0).abs() < 1e-12);
        assert!((of(Init::LegS)[3].im - 19.857_410).abs() < 1e-6);
        assert_eq!((of(Init::Real).len(), of(Init::Real)[7].re), (8, -8.0));
        assert!(ALL.into_iter().all(|init| of(init).iter().all(|a| a.re < 0.0)));
    }

    #[test]
    fn impossible_sizes_are_named() {
        assert!(Init::Lin.diagonal(0).unwrap_err().to_string().contains("state size is 0"));
        assert!(Init::Lin.diagonal(5).unwrap_err().to_string().contains("conjugate pairs"));
        assert_eq!(Init::Real.diagonal(5).unwrap().len(), 5);
        assert!(S4d::new(Init::Lin, 4, 1).unwrap().kernel(Method::BILINEAR, 0.1, 0).is_err());
    }
}
