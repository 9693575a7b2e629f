//! Dropout in plain f64: what the kernel is tested against.

use crate::rng;

/// `x[i] / (1 − p)` where the uniform number of the mask's key at i and the elements before x is at least p, else 0.
pub fn dropout(x: &[f64], cols: usize, p: f32, seed: [i32; 3], stream: u32) -> Vec<f64> {
    let (key, before) = (super::key(&seed, stream), seed[2] as usize * cols);
    let keep = |i: usize| rng::uniform(key, (before + i) as u64) >= p;
    x.iter().enumerate().map(|(i, &x)| if keep(i) { x / (1.0 - f64::from(p)) } else { 0.0 }).collect()
}
