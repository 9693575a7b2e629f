//! State space models from the continuous equation to Mamba-2, as the formulas say it: in f64, dense where that is
//! clearer, and depending on nothing else of hognose. What runs models is `hognose-core`; this is what explains them.
//!
//! | module | subject |
//! |---|---|
//! | [`ssm`] | continuous and discrete models, stepped and convolved |
//! | [`discretise`] | zero-order hold, bilinear, Euler, generalised bilinear |
//! | [`convolution`] | causal convolutions, directly and by FFT |
//! | [`hippo`] | HiPPO matrices and measures; functions remembered online |
//! | [`s4`] | HiPPO-LegS as normal plus low rank; S4's kernel in three ways |
//! | [`s4d`] | diagonal models: initialisations, kernels by Vandermonde products |
//! | [`scan`] | the associative operator of linear recurrences; four scans that count their work |
//! | [`ssd`] | Mamba-2's duality: recurrence, masked linear attention, chunks |
//! | [`kalman`] | the noisy linear system: filter, smoother, and the same estimate at once |
//!
//! Convention: the input is visible at once, h_k = Ā h_{k−1} + B̄ x_k and y_k = C h_k + D x_k. (Control theory's
//! h_{k+1} = A h_k + B u_k is one step late.)

pub mod convolution;
pub mod discretise;
mod error;
pub mod hippo;
pub mod kalman;
pub mod random;
pub mod s4;
pub mod s4d;
pub mod scan;
pub mod ssd;
pub mod ssm;

pub use error::Error;
pub use nalgebra;
pub use num_complex::Complex64;

/// max |a − b| / max |b|: how far results are from what they should be. NaN counts as infinite.
pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0f64, |m, v| if v.is_nan() { f64::INFINITY } else { m.max(v.abs()) })
    };
    let scale = largest(&mut expected.iter().copied()).max(f64::MIN_POSITIVE);
    largest(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / scale
}

/// √(Σ(a − b)² / Σb²).
pub fn relative_rmse(found: &[f64], expected: &[f64]) -> f64 {
    let sum = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    (sum(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / sum(&mut expected.iter().copied())).sqrt()
}
