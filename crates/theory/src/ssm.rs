//! Linear time-invariant state space models with one input and one output, continuous and discrete.

use nalgebra::{DMatrix, DVector};

use crate::convolution::{self, Real};
use crate::discretise::{self, Method};
use crate::error::{Error, positive};

/// h'(t) = A h(t) + B x(t), y(t) = C h(t) + D x(t).
#[derive(Clone, Debug, PartialEq)]
pub struct Continuous {
    /// `[N, N]`
    pub a: DMatrix<f64>,
    /// `[N]`
    pub b: DVector<f64>,
    /// `[N]`
    pub c: DVector<f64>,
    /// The skip connection.
    pub d: f64,
}

impl Continuous {
    /// A model of state size N.
    ///
    /// # Errors
    /// State size 0; parts that do not fit together.
    pub fn new(a: DMatrix<f64>, b: DVector<f64>, c: DVector<f64>, d: f64) -> Result<Continuous, Error> {
        let n = positive("the state size", b.len())?;
        for (what, rows, cols, expected) in [("A", a.nrows(), a.ncols(), n), ("C", c.len(), n, n)] {
            if (rows, cols) != (expected, n) {
                let (found, expected) = (format!("[{rows}, {cols}]"), format!("[{expected}, {n}]"));
                return Err(Error::Shape { what, found, expected });
            }
        }
        Ok(Continuous { a, b, c, d })
    }

    /// A mass m on a spring of stiffness k with friction c, pushed by a force x: m s'' = x − c s' − k s. The state is
    /// (s, s'), the output the position s.
    ///
    /// # Errors
    /// A mass that is not above 0.
    pub fn spring(mass: f64, friction: f64, stiffness: f64) -> Result<Continuous, Error> {
        crate::error::above_zero("the mass", mass)?;
        let a = DMatrix::from_row_slice(2, 2, &[0.0, 1.0, -stiffness / mass, -friction / mass]);
        Continuous::new(a, DVector::from_vec(vec![0.0, 1.0 / mass]), DVector::from_vec(vec![1.0, 0.0]), 0.0)
    }

    /// N.
    pub fn state_size(&self) -> usize {
        self.b.len()
    }

    /// The recurrence with step Δ.
    ///
    /// # Errors
    /// Those of [`discretise::dense`].
    pub fn discretise(&self, method: Method, delta: f64) -> Result<Discrete<f64>, Error> {
        let (a, b) = discretise::dense(method, &self.a, &self.b, delta)?;
        Ok(Discrete { a, b, c: self.c.clone(), d: self.d })
    }

    /// The response C exp(tA) B to an impulse at time 0, without the D·δ(t) part.
    pub fn impulse_response(&self, t: f64) -> f64 {
        self.c.dot(&((&self.a * t).exp() * &self.b))
    }

    /// The outputs at Δ, 2Δ, … of the differential equation from rest, by the classical Runge-Kutta method of order 4
    /// with `fine` substeps between outputs. `x(t)` is the input; it is asked for inside of steps only, so it may jump
    /// where steps begin.
    ///
    /// # Errors
    /// No substeps.
    pub fn simulate(&self, x: impl Fn(f64) -> f64, delta: f64, steps: usize, fine: usize) -> Result<Vec<f64>, Error> {
        let step = delta / positive("the number of substeps", fine)? as f64;
        let slope = |h: &DVector<f64>, x: f64| &self.a * h + &self.b * x;
        let mut h = DVector::zeros(self.state_size());
        let mut outputs = Vec::with_capacity(steps);
        for k in 0..steps {
            let mut last = 0.0;
            for i in 0..fine {
                let t = delta * k as f64 + step * i as f64;
                // A little inside of the step, in case the input jumps at its ends.
                let (begin, middle, end) = (x(t + 1e-9 * step), x(t + 0.5 * step), x(t + (1.0 - 1e-9) * step));
                let k1 = slope(&h, begin);
                let k2 = slope(&(&h + &k1 * (step / 2.0)), middle);
                let k3 = slope(&(&h + &k2 * (step / 2.0)), middle);
                let k4 = slope(&(&h + &k3 * step), end);
                h += (k1 + (k2 + k3) * 2.0 + k4) * (step / 6.0);
                last = end;
            }
            outputs.push(self.c.dot(&h) + self.d * last);
        }
        Ok(outputs)
    }
}

/// h_k = Ā h_{k−1} + B̄ x_k, y_k = C h_k + D x_k.
#[derive(Clone, Debug, PartialEq)]
pub struct Discrete<T: Real> {
    /// Ā `[N, N]`
    pub a: DMatrix<T>,
    /// B̄ `[N]`
    pub b: DVector<T>,
    /// `[N]`
    pub c: DVector<T>,
    /// The skip connection.
    pub d: T,
}

impl<T: Real> Discrete<T> {
    /// The state before the first step.
    pub fn rest(&self) -> DVector<T> {
        DVector::zeros(self.b.len())
    }

    /// One step: N² multiply-adds. The state is all that is remembered.
    pub fn step(&self, h: &mut DVector<T>, x: T) -> T {
        *h = &self.a * &*h + &self.b * x;
        self.c.dot(h) + self.d * x
    }

    /// Recurrent: step after step from rest.
    pub fn run(&self, x: &[T]) -> Vec<T> {
        let mut h = self.rest();
        x.iter().map(|&x| self.step(&mut h, x)).collect()
    }

    /// K̄ = (C B̄, C Ā B̄, …, C Ā^{L−1} B̄), by powers, without D.
    pub fn kernel(&self, length: usize) -> Vec<T> {
        let mut column = self.b.clone();
        let mut next = || {
            let value = self.c.dot(&column);
            column = &self.a * &column;
            value
        };
        (0..length).map(|_| next()).collect()
    }

    /// Convolutional: y = K̄ * x + D x, by FFT.
    pub fn convolve(&self, x: &[T]) -> Vec<T> {
        let y = convolution::fft(&self.kernel(x.len()), x);
        y.into_iter().zip(x).map(|(y, &x)| y + self.d * x).collect()
    }
}

impl Discrete<f64> {
    /// The same in f32, rounded once.
    pub fn narrow(&self) -> Discrete<f32> {
        Discrete {
            a: self.a.map(|v| v as f32),
            b: self.b.map(|v| v as f32),
            c: self.c.map(|v| v as f32),
            d: self.d as f32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::relative_error;

    #[test]
    fn three_representations_of_one_model() {
        let model = Continuous { d: 0.3, ..Continuous::spring(1.0, 0.4, 4.0).unwrap() };
        let (delta, x) = (0.05, Random::new(3).normals(300));
        let discrete = model.discretise(Method::ZeroOrderHold, delta).unwrap();
        let steps = discrete.run(&x);
        assert!(relative_error(&discrete.convolve(&x), &steps) < 1e-13);
        let held = |t: f64| x[(t / delta) as usize];
        assert!(relative_error(&model.simulate(held, delta, x.len(), 20).unwrap(), &steps) < 1e-8);
        let narrow: Vec<f32> = x.iter().map(|&v| v as f32).collect();
        let widen = |y: Vec<f32>| y.into_iter().map(f64::from).collect::<Vec<_>>();
        assert!(relative_error(&widen(discrete.narrow().run(&narrow)), &steps) < 5e-6);
        assert!(relative_error(&widen(discrete.narrow().convolve(&narrow)), &steps) < 5e-6);
    }

    #[test]
    fn a_damped_spring_swings_as_physics_says() {
        let (friction, stiffness) = (0.5f64, 9.0f64);
        let model = Continuous::spring(1.0, friction, stiffness).unwrap();
        let omega = (stiffness - friction * friction / 4.0).sqrt();
        for t in [0.0, 0.3, 1.7] {
            let expected = (-friction * t / 2.0).exp() * (omega * t).sin() / omega;
            assert!((model.impulse_response(t) - expected).abs() < 1e-13);
        }
    }

    #[test]
    fn models_without_a_state_are_refused() {
        let none = Continuous::new(DMatrix::zeros(0, 0), DVector::zeros(0), DVector::zeros(0), 0.0);
        assert_eq!(none.unwrap_err().to_string(), "the state size is 0; expected a whole number from 1 up");
        let odd = Continuous::new(DMatrix::zeros(2, 3), DVector::zeros(2), DVector::zeros(2), 0.0);
        assert_eq!(odd.unwrap_err().to_string(), "A is [2, 3]; expected [2, 2]");
        assert!(Continuous::spring(0.0, 1.0, 1.0).is_err());
    }
}
