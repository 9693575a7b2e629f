//! A step of AdamW on one parameter in plain f32: the kernel has exactly these bits.

use super::HYPER_LEN;

/// Added to the norm in the clipping factor, as in PyTorch.
pub const CLIP_EPS: f32 = 1e-6;

/// The factors of a step that are the same for all parameters.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// What the gradient is multiplied by: min(1, max_norm / (norm + 1e-6)), or 1 for max_norm = 0.
    pub clip: f32,
    /// Decay of the first moment, β₁.
    pub beta1: f32,
    /// Decay of the second moment, β₂.
    pub beta2: f32,
    /// 1 − β₁
    pub beta1_rest: f32,
    /// 1 − β₂
    pub beta2_rest: f32,
    /// Added to the root of the second moment, ε.
    pub eps: f32,
    /// What a decayed parameter is multiplied by: 1 − lr · weight_decay.
    pub keep: f32,
    /// lr / (1 − β₁ᵗ)
    pub step_size: f32,
    /// 1 / √(1 − β₂ᵗ)
    pub root_correction: f32,
}

impl Factors {
    /// From a row of hyperparameters ([`super::Hyper::row`]) and the norm of the gradient.
    pub fn new(hyper: [f32; HYPER_LEN], norm: f32) -> Factors {
        let [lr, beta1, beta2, eps, weight_decay, max_norm, correction1, correction2] = hyper;
        Factors {
            clip: if max_norm > 0.0 { (max_norm / (norm + CLIP_EPS)).min(1.0) } else { 1.0 },
            beta1,
            beta2,
            beta1_rest: 1.0 - beta1,
            beta2_rest: 1.0 - beta2,
            eps,
            keep: 1.0 - lr * weight_decay,
            step_size: lr / correction1,
            root_correction: 1.0 / correction2.sqrt(),
        }
    }
}

/// The new (p, m, v) of a parameter p with gradient g. Every operation rounds once; none is fused.
pub fn step(f: &Factors, p: f32, g: f32, m: f32, v: f32, decays: bool) -> (f32, f32, f32) {
    let g = g * f.clip;
    let m = f.beta1 * m + f.beta1_rest * g;
    let v = f.beta2 * v + (f.beta2_rest * g) * g;
    let p = if decays { p * f.keep } else { p };
    let p = p - f.step_size * (m / (v.sqrt() * f.root_correction + f.eps));
    (p, m, v)
}
