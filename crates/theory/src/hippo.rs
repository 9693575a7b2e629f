//! HiPPO, high-order polynomial projection operators: a state that holds the best approximation of the input's past
//! (Gu et al. 2020, arXiv 2008.07669; with orthonormal bases as in Gu et al. 2022, arXiv 2206.12037).
//!
//! The state c of c'(t) = A c(t) + B f(t) holds the coefficients of f's past in a basis that is orthonormal under a
//! measure, so that the past is Σ_n c_n · basis_n. With u the time into the past, in units of the measure's width:
//!
//! | measure | remembers | basis_n(u) |
//! |---|---|---|
//! | LegS, c' = (A c + B f)/t | all of [0, t] alike | √(2n+1) P_n(2s/t − 1) |
//! | LegS, c' = A c + B f (what S4 uses) | with weight e^−u | √(2n+1) P_n(2e^−u − 1) |
//! | LegT | a window of width 1 | √(2n+1) P_n(1 − 2u) |
//! | LagT | with weight e^−u | e^(−u/2) L_n(u) |
//! | FouT | a window of width 1 | 1, √2 cos 2πku, √2 sin 2πku |

use std::f64::consts::{PI, SQRT_2};

use nalgebra::{DMatrix, DVector, SymmetricEigen};

use crate::discretise::{self, Method};
use crate::error::{Error, above_zero, positive};
use crate::random::Random;

/// Which past the state approximates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Scaled Legendre.
    LegS,
    /// Translated Legendre, a sliding window; also the Legendre memory unit.
    LegT,
    /// Translated Laguerre.
    LagT,
    /// Truncated Fourier, a sliding window.
    FouT,
    /// No measure: random numbers, stable. The seed comes with it.
    Random(u64),
}

impl Measure {
    /// (A, B) of state size N.
    ///
    /// # Errors
    /// State size 0.
    pub fn transition(self, n: usize) -> Result<(DMatrix<f64>, DVector<f64>), Error> {
        positive("the state size", n)?;
        let root = |n: usize| ((2 * n + 1) as f64).sqrt();
        Ok(match self {
            Measure::LegS => {
                let a = DMatrix::from_fn(n, n, |n, k| match n.cmp(&k) {
                    std::cmp::Ordering::Greater => -root(n) * root(k),
                    std::cmp::Ordering::Equal => -((n + 1) as f64),
                    std::cmp::Ordering::Less => 0.0,
                });
                (a, DVector::from_fn(n, |n, _| root(n)))
            }
            Measure::LegT => {
                let sign = |n: usize, k: usize| if n < k && (k - n) % 2 == 1 { 1.0 } else { -1.0 };
                let a = DMatrix::from_fn(n, n, |n, k| root(n) * root(k) * sign(n, k));
                (a, DVector::from_fn(n, |n, _| root(n)))
            }
            Measure::LagT => {
                let a = DMatrix::from_fn(n, n, |n, k| {
                    if n > k {
                        -1.0
                    } else if n == k {
                        -0.5
                    } else {
                        0.0
                    }
                });
                (a, DVector::from_element(n, 1.0))
            }
            Measure::FouT => {
                // What leaves the window is 2 Σ φ_k(0) c_k − f: at its ends a Fourier series meets the mean of both.
                let start = DVector::from_vec(self.basis(n, 0.0));
                let mut a = &start * start.transpose() * -2.0;
                for k in 1..=(n - 1) / 2 {
                    let (cos, sin, omega) = (2 * k - 1, 2 * k, 2.0 * PI * k as f64);
                    a[(cos, sin)] -= omega;
                    a[(sin, cos)] += omega;
                }
                (a, start * 2.0)
            }
            Measure::Random(seed) => {
                let mut random = Random::new(seed);
                let scale = 1.0 / (n as f64).sqrt();
                let noise = DMatrix::from_fn(n, n, |_, _| random.normal() * scale);
                // Eigenvalues of the noise fill the unit disk; shifted by more they are stable.
                let b = DVector::from_fn(n, |_, _| random.normal());
                (noise - DMatrix::identity(n, n) * 1.1, b)
            }
        })
    }

    /// The basis functions at u, the time into the past: f(t − u) ≈ Σ c_n basis_n(u). For LegS that of the
    /// time-invariant dynamics. The random matrix has none.
    pub fn basis(self, n: usize, u: f64) -> Vec<f64> {
        match self {
            Measure::LegS => legendre(n, 2.0 * (-u).exp() - 1.0),
            Measure::LegT => legendre(n, 1.0 - 2.0 * u),
            Measure::LagT => {
                let weight = (-u / 2.0).exp();
                let mut values = vec![1.0; n];
                for k in 1..n {
                    let before = if k >= 2 { values[k - 2] } else { 0.0 };
                    let k_f = k as f64;
                    values[k] = ((2.0 * k_f - 1.0 - u) * values[k - 1] - (k_f - 1.0) * before) / k_f;
                }
                values.iter().map(|v| v * weight).collect()
            }
            Measure::FouT => {
                let wave = |i: usize| {
                    let phase = 2.0 * PI * i.div_ceil(2) as f64 * u;
                    SQRT_2 * if i % 2 == 1 { phase.cos() } else { phase.sin() }
                };
                (0..n).map(|i| if i == 0 { 1.0 } else { wave(i) }).collect()
            }
            Measure::Random(_) => vec![0.0; n],
        }
    }
}

/// √(2n+1) P_n(x) for n below `n`: orthonormal on [−1, 1] under the uniform distribution.
pub fn legendre(n: usize, x: f64) -> Vec<f64> {
    let mut p = vec![1.0; n];
    if n > 1 {
        p[1] = x;
    }
    for k in 2..n {
        let k_f = k as f64;
        p[k] = ((2.0 * k_f - 1.0) * x * p[k - 1] - (k_f - 1.0) * p[k - 2]) / k_f;
    }
    p.iter().enumerate().map(|(k, v)| v * ((2 * k + 1) as f64).sqrt()).collect()
}

/// A state that remembers a function online: one sample in, N numbers kept.
#[derive(Clone, Debug)]
pub struct Memory {
    dynamics: Dynamics,
    c: DVector<f64>,
    seen: usize,
}

#[derive(Clone, Debug)]
enum Dynamics {
    /// c' = (1/t)(A c + B f).
    Scaled { a: DMatrix<f64>, b: DVector<f64> },
    /// c' = (1/width)(A c + B f).
    Invariant { measure: Measure, width: f64, a_bar: DMatrix<f64>, b_bar: DVector<f64> },
}

impl Memory {
    /// LegS as it was meant: the whole past alike. Step k is bilinear with Δ = 1/k.
    ///
    /// # Errors
    /// State size 0.
    pub fn scaled(n: usize) -> Result<Memory, Error> {
        let (a, b) = Measure::LegS.transition(n)?;
        Ok(Memory { dynamics: Dynamics::Scaled { a, b }, c: DVector::zeros(n), seen: 0 })
    }

    /// Time-invariant dynamics of a width in samples: the window of LegT and FouT, the time constant of the others.
    ///
    /// # Errors
    /// State size or window 0.
    pub fn invariant(measure: Measure, n: usize, width: f64) -> Result<Memory, Error> {
        let (a, b) = measure.transition(n)?;
        above_zero("the window", width)?;
        let (a_bar, b_bar) = discretise::dense(Method::ZeroOrderHold, &a, &b, 1.0 / width)?;
        Ok(Memory { dynamics: Dynamics::Invariant { measure, width, a_bar, b_bar }, c: DVector::zeros(n), seen: 0 })
    }

    /// Takes the next sample.
    ///
    /// # Errors
    /// Never for the matrices of this module; [`Error::Singular`] says that a step could not be solved.
    pub fn push(&mut self, f: f64) -> Result<(), Error> {
        self.seen += 1;
        match &self.dynamics {
            Dynamics::Invariant { a_bar, b_bar, .. } => self.c = a_bar * &self.c + b_bar * f,
            Dynamics::Scaled { a, b } => {
                let step = 1.0 / self.seen as f64;
                let n = self.c.len();
                let right = &self.c + (a * &self.c) * (step / 2.0) + b * (step * f);
                let left = DMatrix::identity(n, n) - a * (step / 2.0);
                self.c = left.solve_lower_triangular(&right).ok_or(Error::Singular { what: "I − A/2k" })?;
            }
        }
        Ok(())
    }

    /// The state.
    pub fn coefficients(&self) -> &DVector<f64> {
        &self.c
    }

    /// What it remembers of the last `samples` samples, oldest first. Samples stand for the intervals that end at
    /// them, so the basis is taken in their middles. Without a basis (random) it is the projection of the past onto
    /// what the state can tell of it: the best that can be done.
    pub fn recall(&self, samples: usize) -> Vec<f64> {
        let n = self.c.len();
        let ages = (0..samples).rev().map(|age| age as f64 + 0.5);
        let value = |basis: Vec<f64>| basis.iter().zip(self.c.iter()).map(|(b, c)| b * c).sum::<f64>();
        match &self.dynamics {
            Dynamics::Scaled { .. } => {
                ages.map(|age| value(legendre(n, 1.0 - 2.0 * age / self.seen.max(1) as f64))).collect()
            }
            Dynamics::Invariant { measure: Measure::Random(_), a_bar, b_bar, .. } => {
                project(a_bar, b_bar, &self.c, samples)
            }
            Dynamics::Invariant { measure, width, .. } => {
                ages.map(|age| value(measure.basis(n, age / width))).collect()
            }
        }
    }
}

/// The shortest past of so many samples that leads to the state c = Σ_j Ā^j B̄ f_{−j}, oldest first.
fn project(a_bar: &DMatrix<f64>, b_bar: &DVector<f64>, c: &DVector<f64>, samples: usize) -> Vec<f64> {
    let mut columns = Vec::with_capacity(samples);
    let mut column = b_bar.clone();
    for _ in 0..samples {
        columns.push(column.clone());
        column = a_bar * column;
    }
    columns.reverse();
    if columns.is_empty() {
        return Vec::new();
    }
    let kernels = DMatrix::from_columns(&columns);
    let eigen = SymmetricEigen::new(&kernels * kernels.transpose());
    let largest = eigen.eigenvalues.max();
    // Directions that the past hardly reaches are left out, as a pseudo-inverse does.
    let mut weights = eigen.eigenvectors.transpose() * c;
    for (w, &value) in weights.iter_mut().zip(eigen.eigenvalues.iter()) {
        *w = if value > 1e-12 * largest { *w / value } else { 0.0 };
    }
    (kernels.transpose() * (eigen.eigenvectors * weights)).iter().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{relative_error, relative_rmse};

    /// Eight harmonics.
    fn signal(length: usize) -> Vec<f64> {
        let wave =
            |t: f64| (1..=8).map(|k| (2.0 * PI * f64::from(k) * t + 0.7 * f64::from(k * k)).sin() / f64::from(k)).sum();
        (0..length).map(|k| wave((k as f64 + 0.5) / length as f64)).collect()
    }

    #[test]
    fn legs_has_its_published_matrix() {
        let (a, b) = Measure::LegS.transition(4).unwrap();
        let expected = [
            [-1.0, 0.0, 0.0, 0.0],
            [-1.732_051, -2.0, 0.0, 0.0],
            [-2.236_068, -3.872_983, -3.0, 0.0],
            [-2.645_751, -4.582_576, -5.916_080, -4.0],
        ];
        for (i, row) in expected.iter().enumerate() {
            for (j, v) in row.iter().enumerate() {
                assert!((a[(i, j)] - v).abs() < 5e-7, "{i} {j}");
            }
        }
        for (found, expected) in b.iter().zip([1.0, 1.732_051, 2.236_068, 2.645_751]) {
            assert!((found - expected).abs() < 5e-7);
        }
    }

    #[test]
    fn scaled_legs_remembers_eight_harmonics() {
        let f = signal(1024);
        let mut memory = Memory::scaled(64).unwrap();
        f.iter().for_each(|&f| memory.push(f).unwrap());
        let error = relative_rmse(&memory.recall(1024), &f);
        assert!(error < 0.04, "{error}");
    }

    #[test]
    fn impulse_responses_are_the_weighted_basis() {
        // Exact for LegS and LagT; a truncated window forgets in its own way only approximately.
        for u in [0.0, 0.2, 1.0, 3.0] {
            let (a, b) = Measure::LegS.transition(12).unwrap();
            let response: Vec<f64> = ((a * u).exp() * b).iter().copied().collect();
            let expected: Vec<f64> = Measure::LegS.basis(12, u).iter().map(|v| v * (-u).exp()).collect();
            assert!(relative_error(&response, &expected) < 1e-10, "{u}");
            let (a, b) = Measure::LagT.transition(12).unwrap();
            let response: Vec<f64> = ((a * u).exp() * b).iter().copied().collect();
            assert!(relative_error(&response, &Measure::LagT.basis(12, u)) < 1e-11, "{u}");
        }
    }

    #[test]
    fn windows_hold_what_is_in_them() {
        let f = signal(1000);
        for (measure, bound) in [(Measure::LegT, 0.02), (Measure::FouT, 0.2)] {
            let mut memory = Memory::invariant(measure, 65, 500.0).unwrap();
            f.iter().for_each(|&f| memory.push(f).unwrap());
            let error = relative_rmse(&memory.recall(500), &f[500..]);
            assert!(error < bound, "{measure:?}: {error}");
        }
    }

    #[test]
    fn all_are_stable_at_any_size() {
        for measure in [Measure::LegS, Measure::LegT, Measure::LagT, Measure::FouT, Measure::Random(4)] {
            for n in [1, 2, 5, 16] {
                let (a, _) = measure.transition(n).unwrap();
                let real = a.complex_eigenvalues().iter().map(|e| e.re).fold(f64::NEG_INFINITY, f64::max);
                assert!(real < 1e-9, "{measure:?} {n}: {real}");
            }
        }
    }

    #[test]
    fn impossible_sizes_are_named() {
        assert_eq!(
            Memory::scaled(0).unwrap_err().to_string(),
            "the state size is 0; expected a whole number from 1 up"
        );
        let window = Memory::invariant(Measure::LegT, 4, 0.0).unwrap_err().to_string();
        assert_eq!(window, "the window is 0; expected a number above 0");
    }
}
