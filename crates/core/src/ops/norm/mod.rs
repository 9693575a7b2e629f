//! RMSNorm and LayerNorm over the columns of each row, with the residual addition before them fused in.
//!
//! ```text
//! s = x + residual                                  (s = x without a residual)
//! RMSNorm:   y = s / √(mean(s²) + ε) ⊙ weight                    Zhang & Sennrich, 2019
//! LayerNorm: y = (s − mean(s)) / √(var(s) + ε) ⊙ weight + bias   Ba, Kiros & Hinton, 2016
//! ```
//!
//! x, residual, s, y: [rows, width]; weight, bias: [1, width]; all f32, but x and y may be bf16 on a GPU, where the
//! residual stream, s, stays f32. Means run over the columns of one row, and
//! the variance is the biased one, so a row's result depends on that row alone. The new residual s is an output of
//! its own: the next block adds to it.
//!
//! Gradient, with n = 1 / √(… + ε), x̂ the normalised row before the weight, and dx̂ = dy ⊙ weight:
//!
//! ```text
//! RMSNorm:   ds' = n (dx̂ − x̂ mean(dx̂ ⊙ x̂))
//! LayerNorm: ds' = n (dx̂ − mean(dx̂) − x̂ mean(dx̂ ⊙ x̂))
//! dx = dresidual = ds + ds';  dweight = Σ_rows dy ⊙ x̂;  dbias = Σ_rows dy
//! ```
//!
//! The row's statistics are computed again instead of being kept. Both directions are bound by memory: forward reads
//! x and residual and writes s and y; the gradient reads s, dy and ds and writes dx.

mod cpu;
mod cpu_grad;
pub(crate) mod cuda;
pub mod reference;

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::elementwise;

/// What a norm gives back.
#[derive(Clone, Copy, Debug)]
pub struct Normed {
    /// The normalised rows.
    pub y: TensorId,
    /// x + residual, or x itself where there was no residual.
    pub residual: TensorId,
}

/// RMSNorm of x (+ residual), scaled by `weight` [1, width] if there is one, in the type of x.
///
/// # Errors
/// Operands of other shapes or types, rows of no columns, an ε that is negative or not finite.
pub fn rms_norm(
    g: &mut Graph,
    x: TensorId,
    residual: Option<TensorId>,
    weight: Option<TensorId>,
    eps: f32,
) -> Result<Normed, Error> {
    let dtype = g.dtype(x);
    rms_norm_to(g, x, residual, weight, eps, dtype)
}

/// [`rms_norm`] with a result of another type: the first norm of a model reads an embedding in f32.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_to(
    g: &mut Graph,
    x: TensorId,
    residual: Option<TensorId>,
    weight: Option<TensorId>,
    eps: f32,
    dtype: DType,
) -> Result<Normed, Error> {
    norm(g, Norm { kind: Kind::Rms, eps }, x, residual, [weight, None], dtype)
}

/// LayerNorm of x (+ residual), scaled by `weight` and shifted by `bias`, both [1, width].
///
/// # Errors
/// As [`rms_norm`].
pub fn layer_norm(
    g: &mut Graph,
    x: TensorId,
    residual: Option<TensorId>,
    weight: TensorId,
    bias: TensorId,
    eps: f32,
) -> Result<Normed, Error> {
    let dtype = g.dtype(x);
    layer_norm_to(g, x, residual, [weight, bias], eps, dtype)
}

/// [`layer_norm`] by weight and bias, with a result of another type.
///
/// # Errors
/// As [`rms_norm`].
pub fn layer_norm_to(
    g: &mut Graph,
    x: TensorId,
    residual: Option<TensorId>,
    parameters: [TensorId; 2],
    eps: f32,
    dtype: DType,
) -> Result<Normed, Error> {
    norm(g, Norm { kind: Kind::Layer, eps }, x, residual, parameters.map(Some), dtype)
}

fn norm(
    g: &mut Graph,
    op: Norm,
    x: TensorId,
    residual: Option<TensorId>,
    [weight, bias]: [Option<TensorId>; 2],
    dtype: DType,
) -> Result<Normed, Error> {
    let name = op.name();
    let (rows, cols) = (g.rows(x), g.cols(x));
    g.expect_float(name, "x", x)?;
    if cols == 0 {
        let (expected, found) = ("at least one column wide".into(), format!("[{rows}, 0]"));
        return Err(Error::Shape { op: name, what: "x", expected, found });
    }
    if let Some(residual) = residual {
        g.expect_f32(name, "the residual", residual, Some(rows), Some(cols))?;
    }
    for (what, t) in [("the weight", weight), ("the bias", bias)] {
        if let Some(t) = t {
            g.expect_f32(name, what, t, Some(1), Some(cols))?;
        }
    }
    if !(op.eps.is_finite() && op.eps >= 0.0) {
        let message = format!("eps must be a finite number of at least 0, but is {}", op.eps);
        return Err(Error::Unsupported { op: name, message });
    }
    let y = g.new_tensor(dtype, rows, cols);
    let s = residual.map(|_| g.new_tensor(DType::F32, rows, cols));
    g.push(op, vec![Some(x), residual, weight, bias], vec![Some(y), s]);
    Ok(Normed { y, residual: s.unwrap_or(x) })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rms,
    Layer,
}

/// Inputs x, residual?, weight?, bias?; outputs y and, with a residual, s.
#[derive(Clone, Copy, Debug)]
struct Norm {
    kind: Kind,
    eps: f32,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Rms => "rms_norm",
            Kind::Layer => "layer_norm",
        }
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let [dy, ds] = [d_outputs[0], d_outputs[1]];
        let Some(dy) = dy else {
            // Only the sum is used: its gradient goes straight to both parts of it.
            let dtype = g.dtype(node.input(0));
            let dx = ds.map(|ds| if dtype == DType::F32 { Ok(ds) } else { elementwise::cast(g, ds, dtype) });
            return Ok(vec![dx.transpose()?, ds, None, None]);
        };
        let s = node.outputs[1].unwrap_or(node.input(0));
        let (rows, cols) = (g.rows(s), g.cols(s));
        let x_dtype = g.dtype(node.input(0));
        let mut gradient = |wanted: bool, dtype: DType, rows: usize| wanted.then(|| g.new_tensor(dtype, rows, cols));
        // The gradients of x and of the residual are the same numbers; they differ where their types do.
        let separate = x_dtype != DType::F32;
        let dx = gradient(wanted[0] || wanted[1] && !separate, x_dtype, rows);
        let dresidual = gradient(wanted[1] && separate, DType::F32, rows);
        let (dweight, dbias) = (gradient(wanted[2], DType::F32, 1), gradient(wanted[3], DType::F32, 1));
        let outputs = vec![dx, dweight, dbias, dresidual];
        g.push(NormGrad(*self), vec![Some(s), node.inputs[2], Some(dy), ds], outputs);
        Ok(vec![dx, dresidual.or(dx), dweight, dbias])
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        // Addition; square and sum; two products. LayerNorm centres and shifts besides.
        let an_element = match self.kind {
            Kind::Rms => 5,
            Kind::Layer => 8,
        };
        (an_element * g.rows(node.output(0)) * g.cols(node.output(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self, io, launcher)
    }
}

/// Inputs s, weight?, dy, ds?; outputs dx?, dweight?, dbias?, and dresidual? where its type is not that of dx.
#[derive(Clone, Copy, Debug)]
struct NormGrad(Norm);

impl Op for NormGrad {
    fn name(&self) -> &'static str {
        match self.0.kind {
            Kind::Rms => "rms_norm_grad",
            Kind::Layer => "layer_norm_grad",
        }
    }

    fn workspace(&self, g: &Graph, node: &Node, _: &Cpu) -> usize {
        let s = node.input(0);
        cpu_grad::workspace(g.rows(s), g.cols(s), node.outputs[1].is_some() || node.outputs[2].is_some())
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        // Statistics 2 (4), products with x̂ 5, dx 5 (6), dweight 2, dbias 1.
        let an_element = match self.0.kind {
            Kind::Rms => 14,
            Kind::Layer => 18,
        };
        (an_element * g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::run(&self.0, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, gpu: &Properties) -> usize {
        let (s, parts) = (node.input(0), node.outputs[1..3].iter().flatten().count());
        cuda::gradient_workspace(g.rows(s), g.cols(s), parts, gpu)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(&self.0, io, launcher)
    }
}
