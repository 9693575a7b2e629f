//! HiPPO-LegS as a normal matrix plus one of rank one (Gu, Goel & Ré 2021, arXiv 2111.00396, appendix C.1): what S4 starts
//! from.
//!
//! A_nk = −√((2n+1)(2k+1)) below the diagonal and −(n+1) on it, B_n = √(2n+1). With P_n = √(n + ½), A + P Pᵀ = −½ I + S
//! and S is skew-symmetric, so −iS is Hermitian: S = V(iω)V* with V unitary, and A = V(Λ − (V*P)(V*P)*)V* with
//! Λ = −½ + iω.

use nalgebra::{DMatrix, SymmetricEigen};
use num_complex::Complex64;

/// One of each conjugate pair, by rising ω.
pub(crate) struct Legs {
    pub omega: Vec<f64>,
    /// V*B
    pub b: Vec<Complex64>,
    /// V*P
    pub p: Vec<Complex64>,
}

impl Legs {
    /// For state size `n`, an even number.
    pub fn new(n: usize) -> Legs {
        let p = |i: usize| (i as f64 + 0.5).sqrt();
        // −iS: A's entry is −2 P_row P_col below the diagonal, to which P Pᵀ is added.
        let hermitian = DMatrix::from_fn(n, n, |row, col| {
            let s = p(row) * p(col);
            Complex64::new(0.0, [s, -s, 0.0][usize::from(row < col) + 2 * usize::from(row == col)])
        });
        let eigen = SymmetricEigen::new(hermitian);
        let mut places: Vec<usize> = (0..n).filter(|&i| eigen.eigenvalues[i] > 0.0).collect();
        places.sort_by(|&i, &j| eigen.eigenvalues[i].total_cmp(&eigen.eigenvalues[j]));
        let rotated = |x: &dyn Fn(usize) -> f64| -> Vec<Complex64> {
            let element = |&i: &usize| (0..n).map(|row| eigen.eigenvectors[(row, i)].conj() * x(row)).sum();
            places.iter().map(element).collect()
        };
        Legs {
            omega: places.iter().map(|&i| eigen.eigenvalues[i]).collect(),
            b: rotated(&|i| (2.0 * i as f64 + 1.0).sqrt()),
            p: rotated(&p),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hognose_theory::s4::Dplr;

    #[test]
    fn the_published_eigenvalues() {
        let found = Legs::new(8).omega;
        for (found, expected) in found.iter().zip([0.427_489, 1.957_794, 5.354_209, 19.857_410]) {
            assert!((found - expected).abs() < 1e-6, "{found}");
        }
        assert_eq!(found.len(), 4);
    }

    #[test]
    fn the_theory_has_the_same() {
        // Eigenvectors are free to turn, so products of two numbers of a state are compared.
        for n in [2, 8, 64] {
            let (found, theory) = (Legs::new(n), Dplr::legs(&vec![0.0; n].into()).unwrap());
            let upper: Vec<usize> = (0..n).filter(|&i| theory.lambda[i].im > 0.0).collect();
            assert_eq!(upper.len(), found.omega.len());
            for (m, &i) in upper.iter().enumerate() {
                assert!((found.omega[m] - theory.lambda[i].im).abs() < 1e-10 * n as f64);
                assert!((found.p[m].norm() - theory.p[i].norm()).abs() < 1e-10);
                let products = (found.p[m].conj() * found.b[m], theory.p[i].conj() * theory.b[i]);
                assert!((products.0 - products.1).norm() < 1e-9, "{n} {m}: {products:?}");
            }
        }
    }
}
