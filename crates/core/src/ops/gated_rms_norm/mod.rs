//! The gated normalisation after Mamba-2's SSD: a root mean square norm of groups of columns, and a gate.
//!
//! With RMSNorm(v) = v / √(mean(v²) + ε) over each group of `group_size` columns and a weight for each column,
//!
//! gate first: y = RMSNorm(x ⊙ silu(z)) ⊙ weight; norm first: y = RMSNorm(x) ⊙ weight ⊙ silu(z)
//!
//! x, z and y are `[T, D]`, f32 or on a GPU bf16, the weight `[1, D]`. (Dao & Gu 2024, arXiv 2405.21060, section 7.2; the order of gate and
//! norm is `norm_before_gate` of the released code.) The gradient of n = r v with r = 1 / √(mean(v²) + ε) is
//! dv = r (dn − n · mean(dn ⊙ n)). One pass over memory forwards and one backwards, which bounds it.

mod cpu;
mod cuda;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

const NAME: &str = "gated_rms_norm";

/// Arithmetic per element, about: silu, the mean, the products.
const FLOPS: f64 = 24.0;

/// Appends the op (see the head of this module): x, z `[T, D]`, weight `[1, D]` → `[T, D]`. All three are
/// differentiable; without a weight, it counts as 1.
///
/// # Errors
/// Shapes or types that do not fit together, a width that is no multiple of the group size.
pub fn gated_rms_norm(
    g: &mut Graph,
    x: TensorId,
    z: TensorId,
    weight: Option<TensorId>,
    group_size: usize,
    eps: f32,
    norm_before_gate: bool,
) -> Result<TensorId, Error> {
    let (rows, cols) = (g.rows(x), g.cols(x));
    let dtype = g.expect_float(NAME, "x", x)?;
    g.expect(NAME, "z", z, dtype, Some(rows), Some(cols))?;
    if let Some(weight) = weight {
        g.expect_f32(NAME, "weight", weight, Some(1), Some(cols))?;
    }
    if group_size == 0 || !cols.is_multiple_of(group_size) {
        let expected = format!("a divisor of the width {cols}");
        return Err(Error::Shape { op: NAME, what: "the group size", expected, found: group_size.to_string() });
    }
    let y = g.new_tensor(dtype, rows, cols);
    g.push(Forward(Options { group_size, eps, norm_before_gate }), vec![Some(x), Some(z), weight], vec![Some(y)]);
    Ok(y)
}

#[derive(Clone, Copy, Debug)]
struct Options {
    group_size: usize,
    eps: f32,
    norm_before_gate: bool,
}

#[derive(Debug)]
struct Forward(Options);

impl Op for Forward {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let Some(dy) = d_outputs[0] else { return Ok(vec![None; 3]) };
        let mut gradients = vec![None; 3];
        for (i, gradient) in gradients.iter_mut().enumerate() {
            if let (Some(input), true) = (node.inputs[i], wanted[i]) {
                *gradient = Some(g.new_tensor(g.dtype(input), g.rows(input), g.cols(input)));
            }
        }
        let mut operands = node.inputs.clone();
        operands.push(Some(dy));
        g.push(Gradient(self.0), operands, gradients.clone());
        Ok(gradients)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        FLOPS * (g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::forward(&self.0, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::forward(&self.0, io, launcher)
    }
}

/// Inputs x, z, weight and dy; outputs dx, dz and dweight.
#[derive(Debug)]
struct Gradient(Options);

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "gated_rms_norm_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, _: &Cpu) -> usize {
        cpu::gradient_workspace(g.rows(node.input(0)), g.cols(node.input(0)))
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        2.0 * FLOPS * (g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::gradient(&self.0, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, gpu: &Properties) -> usize {
        cuda::gradient_workspace(&self.0, g.rows(node.input(0)), g.cols(node.input(0)), gpu)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::gradient(&self.0, io, launcher)
    }
}

/// One row in f64. The weight counts as 1 if None.
pub fn reference(
    x: &[f64],
    z: &[f64],
    weight: Option<&[f64]>,
    group_size: usize,
    eps: f64,
    norm_before_gate: bool,
) -> Vec<f64> {
    let gate = |i: usize| z[i] / (1.0 + (-z[i]).exp());
    let gated: Vec<f64> = x.iter().enumerate().map(|(i, v)| if norm_before_gate { *v } else { v * gate(i) }).collect();
    let mut y = Vec::with_capacity(x.len());
    for group in gated.chunks(group_size) {
        let mean = group.iter().map(|v| v * v).sum::<f64>() / group_size as f64;
        y.extend(group.iter().map(|v| v / (mean + eps).sqrt()));
    }
    for (i, y) in y.iter_mut().enumerate() {
        *y *= weight.map_or(1.0, |w| w[i]) * if norm_before_gate { gate(i) } else { 1.0 };
    }
    y
}
