//! AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019) over all parameters at once, with the
//! gradient's norm and clipping.
//!
//! A model's parameters lie in one flat buffer [1, n], and so do gradients and moments, so a step is one pass over
//! four arrays. It is bound by memory: 16 bytes read and 12 written a parameter.
//!
//! ```text
//! g ← g · min(1, max_norm / (norm + 1e-6))          as torch.nn.utils.clip_grad_norm_; skipped for max_norm = 0
//! m ← β₁ m + (1 − β₁) g
//! v ← β₂ v + (1 − β₂) g²
//! p ← p (1 − lr · weight_decay)                     on the ranges `decayed` only
//! p ← p − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)
//! ```
//!
//! [`reference::step`] states the order of every rounding; the kernel has the same bits at all levels of instructions.
//! If the norm is not finite nothing changes: one bad batch must not destroy the moments. The caller sees it in the
//! norm, and by [`first_not_finite`] where it came from.

mod cpu;
mod cuda;
mod global_norm;
mod not_finite;
pub mod reference;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub use global_norm::global_norm;
pub use not_finite::first_not_finite;

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

/// Numbers in the row of hyperparameters.
pub const HYPER_LEN: usize = 8;

/// What a step depends on besides its tensors; [`Hyper::row`] is the contents of [`AdamW::hyper`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Share of a decayed parameter that a step takes away, times lr.
    pub weight_decay: f32,
    /// Largest norm of the gradient; 0 for no clipping.
    pub max_norm: f32,
}

impl Hyper {
    /// lr, β₁, β₂, ε, weight_decay, max_norm, 1 − β₁ᵗ and 1 − β₂ᵗ for step t = 1, 2, …
    ///
    /// The corrections are computed in f64 from the betas as f32 holds them, which are those the moments decay by.
    pub fn row(&self, step: u64) -> [f32; HYPER_LEN] {
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        let Hyper { lr, beta1, beta2, eps, weight_decay, max_norm } = *self;
        [lr, beta1, beta2, eps, weight_decay, max_norm, correction(beta1), correction(beta2)]
    }
}

/// Operands of [`adamw`].
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Parameters, an external [1, n], updated in place.
    pub params: TensorId,
    /// Gradients [1, n].
    pub grads: TensorId,
    /// First moments, an external [1, n], updated in place; zero before the first step.
    pub m: TensorId,
    /// Second moments, an external [1, n], updated in place; zero before the first step.
    pub v: TensorId,
    /// [`Hyper::row`] [1, 8].
    pub hyper: TensorId,
    /// The gradient's norm [1, 1], from [`global_norm`].
    pub norm: TensorId,
    /// The parameters that decay.
    pub decayed: Vec<Range<usize>>,
    /// On a GPU: an external [1, n] in bf16 that receives the new parameters, rounded.
    pub rounded: Option<TensorId>,
}

/// One step of AdamW. Returns the new parameters, stored over the old ones.
///
/// # Errors
/// Operands of other shapes or types, parameters or moments that are not external, ranges outside of 0..n.
pub fn adamw(g: &mut Graph, step: AdamW) -> Result<TensorId, Error> {
    let AdamW { params, grads, m, v, hyper, norm, decayed, rounded } = step;
    let n = g.cols(params);
    for (what, t) in [("the parameters", params), ("the gradients", grads), ("m", m), ("v", v)] {
        g.expect_f32("adamw", what, t, Some(1), Some(n))?;
    }
    g.expect_f32("adamw", "the hyperparameters", hyper, Some(1), Some(HYPER_LEN))?;
    g.expect_f32("adamw", "the norm", norm, Some(1), Some(1))?;
    let decayed = merge(decayed, n)?;
    if let Some(rounded) = rounded {
        g.expect("adamw", "the rounded parameters", rounded, DType::BF16, Some(1), Some(n))?;
    }
    let [new_params, new_m, new_v] = [params, m, v].map(|t| g.in_place(t));
    let (new_params, rounded) = (new_params?, rounded.map(|t| g.in_place(t)).transpose()?);
    let outputs = vec![Some(new_params), Some(new_m?), Some(new_v?), rounded];
    g.push(Step { decayed }, [params, grads, m, v, hyper, norm].map(Some).to_vec(), outputs);
    Ok(new_params)
}

/// The ranges in order and without overlaps.
fn merge(mut ranges: Vec<Range<usize>>, n: usize) -> Result<Vec<Range<usize>>, Error> {
    if let Some(bad) = ranges.iter().find(|r| r.start > r.end || r.end > n) {
        let message = format!("decayed ranges must lie in 0..{n}, but one is {bad:?}");
        return Err(Error::Unsupported { op: "adamw", message });
    }
    ranges.sort_unstable_by_key(|r| r.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in ranges.into_iter().filter(|r| !r.is_empty()) {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

/// Inputs params, grads, m, v, hyper, norm; outputs params, m, v in place, and the rounded copy.
#[derive(Debug)]
struct Step {
    decayed: Vec<Range<usize>>,
}

impl Op for Step {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn backward(
        &self,
        _: &mut Graph,
        _: &Node,
        _: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        Err(Error::Unsupported { op: "adamw", message: "an optimiser step has no gradient".into() })
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        // Clipping 1, m 3, v 4, decay 1, update 5 and a root.
        (15 * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(&self.decayed, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::step(&self.decayed, io, launcher)
    }
}
