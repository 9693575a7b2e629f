//! The noisy linear system h_k = Ā h_{k−1} + B̄ x_k + w_k, y_k = C h_k + v_k with w ~ N(0, Q), v ~ N(0, R): what the
//! state is likely to be (Kalman 1960; Rauch, Tung & Striebel 1965).

use nalgebra::{DMatrix, DVector};

use crate::error::{Error, above_zero};
use crate::ssm::Discrete;

/// A discrete model with noise, and what is known of its state before the first step.
#[derive(Clone, Debug)]
pub struct Noisy {
    pub model: Discrete<f64>,
    /// Covariance of what disturbs the state in a step `[N, N]`.
    pub q: DMatrix<f64>,
    /// Variance of the measurement.
    pub r: f64,
    /// Covariance of the state before the first step, whose mean is zero `[N, N]`.
    pub start: DMatrix<f64>,
}

/// What is known of the state at one step.
#[derive(Clone, Debug)]
pub struct Estimate {
    pub mean: DVector<f64>,
    pub covariance: DMatrix<f64>,
}

/// A filter's estimates.
#[derive(Clone, Debug)]
pub struct Filtered {
    /// Before the measurement of step k.
    pub predicted: Vec<Estimate>,
    /// With it.
    pub updated: Vec<Estimate>,
    /// (y_k − C h_k|k−1)² over its variance: 1 on average, if the model is right.
    pub surprise: Vec<f64>,
}

impl Noisy {
    /// Estimates from measurements up to each step, for inputs x and measurements y.
    ///
    /// # Errors
    /// A variance R that is not above 0; numbers of inputs and measurements that differ.
    pub fn filter(&self, x: &[f64], y: &[f64]) -> Result<Filtered, Error> {
        above_zero("the measurement's variance", self.r)?;
        if x.len() != y.len() {
            let (found, expected) = (format!("of {} steps", x.len()), format!("of {} steps, as y", y.len()));
            return Err(Error::Shape { what: "x", found, expected });
        }
        let Discrete { a, b, c, d } = &self.model;
        let n = b.len();
        let mut known = Estimate { mean: DVector::zeros(n), covariance: self.start.clone() };
        let mut out = Filtered { predicted: Vec::new(), updated: Vec::new(), surprise: Vec::new() };
        for (&x, &y) in x.iter().zip(y) {
            let mean = a * &known.mean + b * x;
            let covariance = a * &known.covariance * a.transpose() + &self.q;
            let variance = c.dot(&(&covariance * c)) + self.r;
            let gain = &covariance * c / variance;
            let innovation = y - c.dot(&mean) - d * x;
            // Joseph's form stays symmetric and positive.
            let keep = DMatrix::identity(n, n) - &gain * c.transpose();
            known = Estimate {
                mean: &mean + &gain * innovation,
                covariance: &keep * &covariance * keep.transpose() + &gain * gain.transpose() * self.r,
            };
            out.surprise.push(innovation * innovation / variance);
            out.predicted.push(Estimate { mean, covariance });
            out.updated.push(known.clone());
        }
        Ok(out)
    }

    /// Estimates from all measurements, walking back through a filter's.
    ///
    /// # Errors
    /// A predicted covariance without inverse.
    pub fn smooth(&self, filtered: &Filtered) -> Result<Vec<Estimate>, Error> {
        let mut smoothed = filtered.updated.clone();
        for k in (0..smoothed.len().saturating_sub(1)).rev() {
            let (now, next) = (&filtered.updated[k], &filtered.predicted[k + 1]);
            let inverse = next.covariance.clone().try_inverse();
            let inverse = inverse.ok_or(Error::Singular { what: "the predicted covariance" })?;
            let gain = &now.covariance * self.model.a.transpose() * inverse;
            let later = &smoothed[k + 1];
            smoothed[k] = Estimate {
                mean: &now.mean + &gain * (&later.mean - &next.mean),
                covariance: &now.covariance + &gain * (&later.covariance - &next.covariance) * gain.transpose(),
            };
        }
        Ok(smoothed)
    }

    /// The gain that the filter settles to, and the covariance after a measurement.
    ///
    /// # Errors
    /// A variance R that is not above 0.
    pub fn steady_gain(&self) -> Result<(DVector<f64>, DMatrix<f64>), Error> {
        let filtered = self.filter(&[0.0; 4096], &[0.0; 4096])?;
        let (before, after) = match (filtered.predicted.last(), filtered.updated.last()) {
            (Some(before), Some(after)) => (&before.covariance, &after.covariance),
            _ => (&self.start, &self.start),
        };
        let c = &self.model.c;
        Ok((before * c / (c.dot(&(before * c)) + self.r), after.clone()))
    }

    /// The likeliest states of all steps, given all measurements, as one least-squares problem: what the smoother must
    /// find. Dense and for few steps. Q and the start's covariance must have inverses.
    ///
    /// # Errors
    /// Covariances without inverse.
    pub fn likeliest(&self, x: &[f64], y: &[f64]) -> Result<Vec<DVector<f64>>, Error> {
        let Discrete { a, b, c, d } = &self.model;
        let (n, steps) = (b.len(), y.len());
        let inverse = |m: &DMatrix<f64>, what| m.clone().try_inverse().ok_or(Error::Singular { what });
        // The first state comes from the start through one disturbed step.
        let first = inverse(&(a * &self.start * a.transpose() + &self.q), "the first state's covariance")?;
        let later = inverse(&self.q, "Q")?;
        let (mut normal, mut right) = (DMatrix::zeros(steps * n, steps * n), DVector::zeros(steps * n));
        for k in 0..steps {
            let weight = if k == 0 { &first } else { &later };
            let mut add = |row: usize, col: usize, block: DMatrix<f64>| {
                let mut view = normal.view_mut((row * n, col * n), (n, n));
                view += block;
            };
            add(k, k, weight + c * c.transpose() / self.r);
            if k > 0 {
                add(k - 1, k - 1, a.transpose() * weight * a);
                add(k, k - 1, -(weight * a));
                add(k - 1, k, -(a.transpose() * weight));
            }
            let drift = weight * b * x[k];
            let mut here = right.rows_mut(k * n, n);
            here += &drift + c * ((y[k] - d * x[k]) / self.r);
            if k > 0 {
                let mut before = right.rows_mut((k - 1) * n, n);
                before -= a.transpose() * drift;
            }
        }
        let solved = normal.cholesky().ok_or(Error::Singular { what: "the normal equations" })?.solve(&right);
        Ok((0..steps).map(|k| solved.rows(k * n, n).into_owned()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discretise::Method;
    use crate::random::Random;
    use crate::ssm::Continuous;

    fn noisy() -> Noisy {
        let model = Continuous::spring(1.0, 0.3, 2.0).unwrap().discretise(Method::ZeroOrderHold, 0.2).unwrap();
        let q = DMatrix::from_diagonal(&DVector::from_vec(vec![1e-4, 2e-3]));
        Noisy { model, q, r: 0.04, start: DMatrix::identity(2, 2) }
    }

    #[test]
    fn the_smoother_finds_the_likeliest_states() {
        let mut random = Random::new(6);
        let (noisy, x, y) = (noisy(), random.normals(40), random.normals(40));
        let filtered = noisy.filter(&x, &y).unwrap();
        let smoothed = noisy.smooth(&filtered).unwrap();
        let likeliest = noisy.likeliest(&x, &y).unwrap();
        for (k, (s, l)) in smoothed.iter().zip(&likeliest).enumerate() {
            assert!((&s.mean - l).amax() < 1e-10, "{k}");
        }
        // At the last step there is nothing to look back from.
        assert!((&filtered.updated[39].mean - &likeliest[39]).amax() < 1e-10);
        for (s, f) in smoothed.iter().zip(&filtered.updated) {
            assert!(s.covariance.trace() <= f.covariance.trace() + 1e-12);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let noisy = Noisy { r: 0.0, ..noisy() };
        assert!(noisy.filter(&[1.0], &[1.0]).unwrap_err().to_string().contains("variance is 0"));
        assert!(Noisy { r: 1.0, ..noisy }.filter(&[1.0], &[]).is_err());
    }
}
