//! Dropout in plain f64: what the kernel is tested against.

use crate::rng;

/// `x[i] / (1 − p)` where the i-th uniform number of the mask's key is at least p, else 0.
pub fn dropout(x: &[f64], p: f32, seed: [i32; 2], stream: u32) -> Vec<f64> {
    let key = super::key(seed, stream);
    let keep = |i: usize| rng::uniform(key, i as u64) >= p;
    x.iter().enumerate().map(|(i, &x)| if keep(i) { x / (1.0 - f64::from(p)) } else { 0.0 }).collect()
}
