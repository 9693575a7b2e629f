//! Causal convolutions: y_t = Σ_{s ≤ t} k_{t−s} x_s.

use nalgebra::{ComplexField, RealField};
use realfft::RealFftPlanner;
use rustfft::FftNum;

/// A number type of models and transforms: f32 or f64.
pub trait Real: RealField + FftNum + Copy {}

impl<T: RealField + FftNum + Copy> Real for T {}

/// By the definition: L² / 2 multiply-adds.
pub fn direct<T: Real>(kernel: &[T], x: &[T]) -> Vec<T> {
    let sum = |t: usize| {
        let from = (t + 1).saturating_sub(kernel.len());
        (from..=t).fold(T::zero(), |sum, s| sum + kernel[t - s] * x[s])
    };
    (0..x.len()).map(sum).collect()
}

/// By FFT, padded with zeros to twice the length so that the ends do not meet: O(L log L).
pub fn fft<T: Real>(kernel: &[T], x: &[T]) -> Vec<T> {
    if x.is_empty() || kernel.is_empty() {
        return vec![T::zero(); x.len()];
    }
    let padded = 2 * x.len().max(kernel.len());
    let mut planner = RealFftPlanner::<T>::new();
    let (forward, inverse) = (planner.plan_fft_forward(padded), planner.plan_fft_inverse(padded));
    let transform = |values: &[T]| {
        let mut time = values.to_vec();
        time.resize(padded, T::zero());
        let mut frequency = forward.make_output_vec();
        forward.process(&mut time, &mut frequency).expect("the lengths are those of the plan");
        frequency
    };
    let mut product: Vec<_> = transform(kernel).into_iter().zip(transform(x)).map(|(a, b)| a * b).collect();
    // The first and the middle frequency of real signals are real.
    for at in [0, padded / 2] {
        product[at].im = T::zero();
    }
    let mut time = inverse.make_output_vec();
    inverse.process(&mut product, &mut time).expect("the lengths are those of the plan");
    let scale = <T as ComplexField>::recip(nalgebra::convert(padded as f64));
    time.truncate(x.len());
    time.into_iter().map(|v| v * scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::relative_error;

    #[test]
    fn both_are_the_same() {
        let mut random = Random::new(1);
        for (kernel, length) in [(1, 1), (5, 3), (3, 50), (100, 100), (0, 4), (4, 0)] {
            let (kernel, x) = (random.normals(kernel), random.normals(length));
            let expected = direct(&kernel, &x);
            assert!(relative_error(&fft(&kernel, &x), &expected) < 1e-13 || expected.iter().all(|v| *v == 0.0));
        }
    }

    #[test]
    fn nothing_comes_before_its_cause() {
        let y = fft(&[1.0, 2.0, 3.0], &[0.0, 0.0, 1.0, 0.0]);
        assert!(relative_error(&y, &[0.0, 0.0, 1.0, 2.0]) < 1e-14);
    }
}
