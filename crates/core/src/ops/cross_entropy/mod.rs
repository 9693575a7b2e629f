//! Cross-entropy of the next tokens, fused with the output projection: the logits of all tokens never exist together.
//!
//! ```text
//! logits = h · Wᵀ;   nll[t] = ln Σ_v exp(logits[t, v]) − logits[t, target[t]];   loss = scale · Σ_t nll[t]
//! dlogits[t, v] = scale · (softmax(logits[t])[v] − [v = target[t]]);   dh = dlogits · W;   dW = dlogitsᵀ · h
//! ```
//!
//! After [`Graph::round_products`] a CPU rounds the operands of all three products to bf16.
//!
//! h [T, d] f32, or bf16 on a GPU; W [V, d], of h's type by rows, or packed (f32 or bf16) where no gradient is asked for; targets [1, T] i32, −1
//! for tokens that predict nothing; scale [1, 1] f32, one over the number of predicted tokens of the whole batch. All V
//! rows take part in the softmax, those that only pad the vocabulary too. A target outside of −1..V makes the token's
//! nll, the loss and the gradients NaN; callers check what a user can cause.
//!
//! The tokens that predict something are taken in blocks. A block's logits go to the workspace and become softmax
//! and gradient there; dh and dW are computed in the same pass, for a loss whose gradient is 1, and the backward
//! transformation only scales them. So a block costs three products and the memory of its logits, [block, V]. Tokens
//! that predict nothing cost nothing. A row's nll and dh depend on that row alone, and dW sums over tokens in order:
//! no result depends on the size of the blocks or on the number of threads. Bound by the products; each block also
//! reads W twice (to pack it) and reads and writes dW, which larger blocks make up for.

mod cpu;
mod cuda;
pub mod reference;

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Layout, Node, Op, TensorId};
use crate::ops::elementwise::scale_by;

/// Tokens whose logits are in memory at a time, unless [`cross_entropy_in_blocks`] says otherwise.
pub const BLOCK: usize = 256;

/// Operands of [`cross_entropy`].
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// Hidden vectors [T, d] f32.
    pub h: TensorId,
    /// The output matrix W [V, d].
    pub weight: TensorId,
    /// The token to predict at each row of h, i32 [1, T]; −1 for none. Where there is none the row of h may be anything,
    /// on a GPU anything finite: there its zero gradient is multiplied by it.
    pub targets: TensorId,
    /// What the sum is multiplied by, f32 [1, 1].
    pub scale: TensorId,
    /// Whether the pass also computes the gradients, which [`Graph::backward`] needs.
    pub with_gradient: bool,
}

/// What [`cross_entropy`] gives back.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    /// scale · Σ nll [1, 1].
    pub loss: TensorId,
    /// −ln p(target) in nats for each token [1, T], 0 where there is no target. Not differentiable.
    pub nll: TensorId,
}

/// The loss of predicting `targets` from h through the output matrix.
///
/// # Errors
/// Operands of other shapes or types, an empty vocabulary, a bf16 weight by rows, a gradient with a weight that is not
/// f32 by rows.
pub fn cross_entropy(g: &mut Graph, inputs: CrossEntropy) -> Result<Outputs, Error> {
    cross_entropy_in_blocks(g, inputs, BLOCK)
}

/// [`cross_entropy`] with the logits of at most `block` tokens in memory at a time: a larger block is faster and takes
/// `block` · V · 4 bytes.
///
/// # Errors
/// As [`cross_entropy`]; a block of no tokens.
pub fn cross_entropy_in_blocks(g: &mut Graph, inputs: CrossEntropy, block: usize) -> Result<Outputs, Error> {
    const OP: &str = "cross_entropy";
    let CrossEntropy { h, weight, targets, scale, with_gradient } = inputs;
    let (tokens, vocabulary, d) = (g.rows(h), g.rows(weight), g.cols(weight));
    let h_dtype = g.expect_float(OP, "h", h)?;
    g.expect_shape(OP, "h", h, None, Some(d))?;
    g.expect_dtype(OP, "the targets", targets, DType::I32)?;
    g.expect_shape(OP, "the targets", targets, Some(1), Some(tokens))?;
    g.expect_f32(OP, "the scale", scale, Some(1), Some(1))?;
    let (dtype, layout) = (g.dtype(weight), g.tensor(weight).layout);
    let fits = match (dtype, layout) {
        (dtype, Layout::Rows) => dtype == h_dtype,
        (DType::I32, Layout::Panels) => false,
        (_, Layout::Panels) => !with_gradient,
    };
    if !fits {
        let or = if with_gradient { " to have a gradient" } else { ", or f32, bf16 or blocks in panels" };
        let message = format!("the weight must be {h_dtype} by rows{or}, but is {dtype} {layout:?}");
        return Err(Error::Unsupported { op: OP, message });
    }
    if vocabulary == 0 || block == 0 {
        let message = format!("vocabulary and block must not be empty, but are {vocabulary} and {block}");
        return Err(Error::Unsupported { op: OP, message });
    }
    let loss = g.new_tensor(DType::F32, 1, 1);
    let nll = g.new_tensor(DType::F32, 1, tokens);
    let dh = with_gradient.then(|| g.new_tensor(h_dtype, tokens, d));
    let dw = with_gradient.then(|| g.new_tensor(DType::F32, vocabulary, d));
    let operands = [h, weight, targets, scale].map(Some).to_vec();
    let rounded = g.rounds_products();
    g.push(Fused { block, rounded }, operands, vec![Some(loss), Some(nll), dh, dw]);
    Ok(Outputs { loss, nll })
}

/// Inputs h, weight, targets, scale; outputs loss, nll and, with a gradient, dh and dW for a loss whose gradient is 1.
#[derive(Debug)]
struct Fused {
    block: usize,
    /// As [`Graph::round_products`] says.
    rounded: bool,
}

impl Op for Fused {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let unsupported = |message: &str| Err(Error::Unsupported { op: "cross_entropy", message: message.into() });
        if d_outputs[1].is_some() {
            return unsupported("the losses of single tokens have no gradient; use the loss");
        }
        if wanted[3] {
            return unsupported("the scale has no gradient");
        }
        let Some(d_loss) = d_outputs[0] else { return Ok(vec![None; 4]) };
        let [Some(dh), Some(dw)] = [node.outputs[2], node.outputs[3]] else {
            return unsupported("it was recorded without gradient; set with_gradient");
        };
        // Where the loss itself is differentiated its gradient is a known 1, and these are the gradients already.
        Ok(vec![
            if wanted[0] { Some(scale_by(g, dh, d_loss)?) } else { None },
            if wanted[1] { Some(scale_by(g, dw, d_loss)?) } else { None },
            None,
            None,
        ])
    }

    fn narrow_weight(&self) -> Option<usize> {
        Some(1)
    }

    fn workspace(&self, g: &Graph, node: &Node, _: &Cpu) -> usize {
        let (h, weight) = (node.input(0), node.input(1));
        cpu::Workspace::new(self.block, g.rows(h), g.rows(weight), g.cols(h)).bytes()
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let products = if node.outputs[2].is_some() { 3.0 } else { 1.0 };
        let (h, weight) = (node.input(0), node.input(1));
        products * 2.0 * g.rows(h) as f64 * g.cols(h) as f64 * g.rows(weight) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self.block, self.rounded, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let (h, weight) = (node.input(0), node.input(1));
        cuda::workspace(g.rows(h), g.rows(weight), g.dtype(h))
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(io, launcher)
    }
}
