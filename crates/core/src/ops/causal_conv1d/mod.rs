//! The causal depthwise convolution over time, with SiLU on request: each channel has a filter of its own.
//!
//! ```text
//! y[t] = act(bias + Σ_k w[k] x[t − (W−1) + k]),  k = 0 .. W−1,  act = silu or nothing
//! ```
//!
//! where x before a segment's first step comes from its initial state, the W−1 inputs before it, and is zero without
//! one. The final state is the last W−1 inputs. Source: Gu & Dao, Mamba (arXiv 2312.00752), figure 3; the sums are
//! formed from the bias on, oldest input first, so results do not depend on how a sequence is cut into calls.
//! The gradient forms the sums again instead of keeping them.

mod cpu;
mod cpu_grad;
mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

const NAME: &str = "causal_conv1d";

/// Operands and options of [`causal_conv1d`]. T tokens, D channels, filters of W taps, S segments. All but the offsets
/// are f32; x may be bf16 on a GPU, and y is of its type.
#[derive(Clone, Copy, Debug)]
pub struct CausalConv1d {
    /// The input `[T, D]`.
    pub x: TensorId,
    /// The filters `[D, W]`, W ≥ 1; the last tap meets the current input.
    pub weight: TensorId,
    /// Added before the activation `[1, D]`.
    pub bias: Option<TensorId>,
    /// The W−1 inputs before the first step `[S, (W−1)·D]`, oldest first: input j of channel d in column j·D + d.
    /// Zero if not given.
    pub initial_state: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
    /// Whether silu is applied.
    pub silu: bool,
}

/// Results of [`causal_conv1d`].
#[derive(Clone, Copy, Debug)]
pub struct Convolved {
    /// The output `[T, D]`; rows in no segment are zero.
    pub y: TensorId,
    /// The last W−1 inputs of each segment, those of its initial state among them where it is shorter
    /// `[S, (W−1)·D]`. It may be stored over the initial state.
    pub final_state: TensorId,
}

/// Appends a causal convolution. Differentiable in all f32 operands and both results.
///
/// # Errors
/// An operand of another shape or type, or filters without taps.
pub fn causal_conv1d(g: &mut Graph, conv: CausalConv1d) -> Result<Convolved, Error> {
    let (tokens, channels) = (g.rows(conv.x), g.cols(conv.x));
    let dtype = g.expect_float(NAME, "x", conv.x)?;
    g.expect_f32(NAME, "the weight", conv.weight, Some(channels), None)?;
    let width = g.cols(conv.weight);
    if width == 0 {
        let message = format!("expected filters of at least one tap, found a weight of [{channels}, 0]");
        return Err(Error::Unsupported { op: NAME, message });
    }
    let segments = g.expect_segments(NAME, conv.segments)?;
    let state = (width - 1) * channels;
    if let Some(bias) = conv.bias {
        g.expect_f32(NAME, "the bias", bias, Some(1), Some(channels))?;
    }
    if let Some(initial) = conv.initial_state {
        g.expect_f32(NAME, "the initial state", initial, Some(segments), Some(state))?;
    }
    let y = g.new_tensor(dtype, tokens, channels);
    let final_state = g.new_tensor(DType::F32, segments, state);
    let inputs = vec![Some(conv.x), Some(conv.weight), Some(conv.segments), conv.bias, conv.initial_state];
    g.push(Forward { width, silu: conv.silu }, inputs, vec![Some(y), Some(final_state)]);
    Ok(Convolved { y, final_state })
}

// Inputs of both ops, as far as they share them.
const X: usize = 0;
const WEIGHT: usize = 1;
const SEGMENTS: usize = 2;
const BIAS: usize = 3;
const INITIAL_STATE: usize = 4;

/// Inputs: those above. Outputs: y, the final state.
#[derive(Clone, Copy, Debug)]
struct Forward {
    width: usize,
    silu: bool,
}

impl Op for Forward {
    fn name(&self) -> &'static str {
        NAME
    }

    fn is_cheap(&self, _: &Graph, _: &Node) -> bool {
        true
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let (dy, d_final) = (d_outputs[0], d_outputs[1]);
        let mut gradients = vec![None; node.inputs.len()];
        if dy.is_none() && d_final.is_none() {
            return Ok(gradients);
        }
        for (i, gradient) in gradients.iter_mut().enumerate() {
            // The final state holds inputs only.
            let flows = dy.is_some() || matches!(i, X | INITIAL_STATE);
            if let Some(input) = node.inputs[i].filter(|_| wanted[i] && flows && i != SEGMENTS) {
                *gradient = Some(g.new_tensor(g.dtype(input), g.rows(input), g.cols(input)));
            }
        }
        let mut inputs = node.inputs.clone();
        inputs.extend([dy, d_final]);
        g.push(Gradient { forward: *self }, inputs, gradients.clone());
        Ok(gradients)
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(self, g.cols(node.input(X)), cpu)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(X);
        (g.rows(x) * g.cols(x)) as f64 * (2 * self.width) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self, io, launcher)
    }
}

/// Inputs: those above, dy, the gradient of the final state. Outputs: the gradients of the forward op's inputs, in
/// their order.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    forward: Forward,
}

impl Gradient {
    const DY: usize = 5;
    const D_FINAL: usize = 6;
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "causal_conv1d_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        cpu_grad::workspace(&self.forward, g.cols(node.input(X)), g.cols(node.input(SEGMENTS)) - 1, cpu)
    }

    /// The sums again, their transposes for dx, and the products for the weight.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(X);
        (g.rows(x) * g.cols(x)) as f64 * (6 * self.forward.width) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::run(self, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        cuda::gradient_workspace(&self.forward, g.rows(node.input(X)), g.cols(node.input(X)))
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(self, io, launcher)
    }
}
