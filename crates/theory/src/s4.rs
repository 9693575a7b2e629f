//! S4 (Gu, Goel & Ré 2021, arXiv 2111.00396): HiPPO-LegS as a normal matrix plus one of low rank, and the kernel of a
//! long convolution in three ways.

use nalgebra::{DMatrix, DVector, SymmetricEigen};
use num_complex::Complex64;
use rustfft::FftPlanner;

use crate::discretise::Method;
use crate::error::{Error, above_zero, positive};
use crate::hippo::Measure;
use crate::ssm::Continuous;

type C = Complex64;

/// P of A + P Pᵀ = −I/2 + skew-symmetric: P_n = √(n + ½).
pub fn low_rank(n: usize) -> DVector<f64> {
    DVector::from_fn(n, |n, _| (n as f64 + 0.5).sqrt())
}

/// A model in the coordinates in which A = Λ − P P*: diagonal plus low rank.
#[derive(Clone, Debug)]
pub struct Dplr {
    /// Λ `[N]`, by imaginary part.
    pub lambda: DVector<C>,
    /// P = Q `[N]`.
    pub p: DVector<C>,
    /// `[N]`
    pub b: DVector<C>,
    /// The row C `[N]`, not conjugated.
    pub c: DVector<C>,
    /// The unitary V of A = V(Λ − P P*)V*.
    pub v: DMatrix<C>,
}

impl Dplr {
    /// HiPPO-LegS of state size N with the output row C.
    ///
    /// A + P Pᵀ = −I/2 + S with S skew-symmetric, so −iS is Hermitian and S = V(iω)V* with V unitary: Λ = −½ + iω. (A
    /// itself is far from normal: its eigenvectors are useless in floating point.)
    ///
    /// # Errors
    /// State size 0; C of another length.
    pub fn legs(c: &DVector<f64>) -> Result<Dplr, Error> {
        let n = positive("the state size", c.len())?;
        let (a, b) = Measure::LegS.transition(n)?;
        let p = low_rank(n);
        let skew = &a + &p * p.transpose() + DMatrix::identity(n, n) * 0.5;
        let eigen = SymmetricEigen::new(skew.map(|s| C::new(0.0, -s)));
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| eigen.eigenvalues[i].total_cmp(&eigen.eigenvalues[j]));
        let v = DMatrix::from_fn(n, n, |row, col| eigen.eigenvectors[(row, order[col])]);
        let rotate = |x: &DVector<f64>| v.adjoint() * x.map(C::from);
        let lambda = DVector::from_fn(n, |i, _| C::new(-0.5, eigen.eigenvalues[order[i]]));
        // C V as a column.
        let c = v.transpose() * c.map(C::from);
        Ok(Dplr { lambda, p: rotate(&p), b: rotate(&b), c, v })
    }

    /// V(Λ − P P*)V*: must be HiPPO-LegS again.
    pub fn dense(&self) -> DMatrix<C> {
        &self.v * self.inner() * self.v.adjoint()
    }

    /// Λ − P P*.
    fn inner(&self) -> DMatrix<C> {
        DMatrix::from_diagonal(&self.lambda) - &self.p * self.p.adjoint()
    }

    /// The kernel of length L with the bilinear step Δ, through four Cauchy products a frequency and Woodbury's
    /// identity: K̂(z) = 2/(1+z) · [c00 − c01 (1 + c11)⁻¹ c10], then an inverse FFT. O(N + L) in space, O(N·L) in time.
    ///
    /// Written with c/(1+z), so that nothing is divided by zero at z = −1.
    ///
    /// # Errors
    /// Length 0, a step that is not above 0.
    pub fn kernel(&self, delta: f64, length: usize) -> Result<Vec<f64>, Error> {
        self.kernel_of(&self.truncated(delta, length)?, delta, length)
    }

    /// The same from C̃ `[N]`, which S4 learns instead of C: no power of Ā.
    ///
    /// # Errors
    /// As [`Dplr::kernel`].
    pub fn kernel_of(&self, c: &DVector<C>, delta: f64, length: usize) -> Result<Vec<f64>, Error> {
        positive("the length", length)?;
        above_zero("the step Δ", delta)?;
        let one = C::new(1.0, 0.0);
        let frequency = |j: usize| {
            let z = root_of_unity(j, length);
            let (minus, plus) = ((one - z) * (2.0 / delta), one + z);
            let [mut r00, mut r01, mut r10, mut r11] = [C::ZERO; 4];
            for n in 0..self.lambda.len() {
                let r = one / (minus - plus * self.lambda[n]);
                let (p, b, q) = (self.p[n], self.b[n], self.p[n].conj());
                r00 += c[n] * b * r;
                r01 += c[n] * p * r;
                r10 += q * b * r;
                r11 += q * p * r;
            }
            (r00 - plus * r01 * r10 / (one + plus * r11)) * 2.0
        };
        Ok(from_frequencies((0..length).map(frequency).collect()))
    }

    /// C̃ = C(I − Ā^L).
    ///
    /// # Errors
    /// As [`Dplr::kernel`].
    pub fn truncated(&self, delta: f64, length: usize) -> Result<DVector<C>, Error> {
        positive("the length", length)?;
        above_zero("the step Δ", delta)?;
        let n = self.lambda.len();
        let (identity, half) = (DMatrix::<C>::identity(n, n), C::from(delta / 2.0));
        let inner = self.inner() * half;
        let a_bar = (&identity - &inner).lu().solve(&(&identity + &inner));
        let a_bar = a_bar.ok_or(Error::Singular { what: "I − ΔA/2" })?;
        Ok(&self.c - power(a_bar, length).transpose() * &self.c)
    }
}

/// The kernel by powers of the dense Ā: N² L.
///
/// # Errors
/// Those of [`Continuous::discretise`].
pub fn kernel_by_powers(model: &Continuous, delta: f64, length: usize) -> Result<Vec<f64>, Error> {
    positive("the length", length)?;
    Ok(model.discretise(Method::BILINEAR, delta)?.kernel(length))
}

/// The kernel through its generating function K̂(z) = C̃ (I − Ā z)⁻¹ B̄ at the roots of unity, each with a dense solution:
/// N³ L. The step towards Cauchy products.
///
/// # Errors
/// As [`kernel_by_powers`].
pub fn kernel_by_generating_function(model: &Continuous, delta: f64, length: usize) -> Result<Vec<f64>, Error> {
    positive("the length", length)?;
    let discrete = model.discretise(Method::BILINEAR, delta)?;
    let c = &discrete.c - power(discrete.a.clone(), length).transpose() * &discrete.c;
    let (a, b, c) = (discrete.a.map(C::from), discrete.b.map(C::from), c.map(C::from));
    let identity = DMatrix::<C>::identity(b.len(), b.len());
    let frequency = |j: usize| {
        let left = &identity - &a * root_of_unity(j, length);
        let solved = left.lu().solve(&b).ok_or(Error::Singular { what: "I − Āz" })?;
        Ok(c.iter().zip(solved.iter()).map(|(c, s)| c * s).sum())
    };
    Ok(from_frequencies((0..length).map(frequency).collect::<Result<_, Error>>()?))
}

/// exp(−2πi j/L).
fn root_of_unity(j: usize, length: usize) -> C {
    C::cis(-std::f64::consts::TAU * j as f64 / length as f64)
}

/// The real signal with this discrete Fourier transform.
fn from_frequencies(mut values: Vec<C>) -> Vec<f64> {
    let length = values.len();
    FftPlanner::new().plan_fft_inverse(length).process(&mut values);
    values.into_iter().map(|v| v.re / length as f64).collect()
}

/// m^n by squaring.
fn power<T: nalgebra::ComplexField>(mut m: DMatrix<T>, mut n: usize) -> DMatrix<T> {
    let mut result = DMatrix::identity(m.nrows(), m.nrows());
    while n > 0 {
        if n % 2 == 1 {
            result = &result * &m;
        }
        m = &m * &m;
        n /= 2;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::relative_error;

    fn model(n: usize) -> Continuous {
        let (a, b) = Measure::LegS.transition(n).unwrap();
        Continuous::new(a, b, DVector::from_vec(Random::new(5).normals(n)), 0.0).unwrap()
    }

    #[test]
    fn the_normal_part_has_its_published_eigenvalues() {
        let dplr = Dplr::legs(&DVector::zeros(8)).unwrap();
        let positive: Vec<f64> = dplr.lambda.iter().map(|l| l.im).filter(|im| *im > 0.0).collect();
        for (found, expected) in positive.iter().zip([0.427_489, 1.957_794, 5.354_209, 19.857_410]) {
            assert!((found - expected).abs() < 1e-6, "{found}");
        }
        assert_eq!(positive.len(), 4);
        assert!(dplr.lambda.iter().all(|l| l.re == -0.5));
    }

    #[test]
    fn diagonal_plus_low_rank_is_hippo_again() {
        for n in [1, 2, 7, 64] {
            let (a, _) = Measure::LegS.transition(n).unwrap();
            let dense = Dplr::legs(&DVector::zeros(n)).unwrap().dense();
            let error = (dense - a.map(C::from)).map(|v| v.norm()).max() / a.abs().max();
            assert!(error < 1e-13 * n as f64, "{n}: {error}");
        }
    }

    #[test]
    fn three_ways_to_one_kernel() {
        for (n, length) in [(1, 1), (2, 5), (8, 64), (16, 33), (64, 128)] {
            let model = model(n);
            let expected = kernel_by_powers(&model, 0.02, length).unwrap();
            let dense = kernel_by_generating_function(&model, 0.02, length).unwrap();
            let cauchy = Dplr::legs(&model.c).unwrap().kernel(0.02, length).unwrap();
            assert!(relative_error(&dense, &expected) < 1e-9, "{n} {length}");
            assert!(relative_error(&cauchy, &expected) < 1e-9, "{n} {length}");
        }
    }

    #[test]
    fn impossible_sizes_are_named() {
        assert!(Dplr::legs(&DVector::zeros(0)).unwrap_err().to_string().contains("state size is 0"));
        let dplr = Dplr::legs(&DVector::zeros(2)).unwrap();
        assert!(dplr.kernel(0.1, 0).unwrap_err().to_string().contains("length is 0"));
        assert!(dplr.kernel(-1.0, 4).unwrap_err().to_string().contains("Δ is -1"));
    }
}
