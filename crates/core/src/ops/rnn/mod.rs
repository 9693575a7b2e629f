//! The recurrences of LSTM and GRU, whose states meet a dense matrix at every step.
//!
//! The part that the input contributes, x = W_x u + b, is a linear layer over all tokens; the op is what has to wait for
//! the step before. With a = W h[t−1] (+ b_h), all products by rows of H gates (σ the logistic function):
//!
//! ```text
//! LSTM   i, f, o = σ(x + a),  g = tanh(x + a);   c[t] = f c[t−1] + i g,   h[t] = o tanh(c[t])
//! GRU    r, z = σ(x + a),     n = tanh(x + r a);  h[t] = (1 − z) n + z h[t−1]
//! ```
//!
//! Columns of x and rows of W hold the gates in PyTorch's and cuDNN's order: i, f, g, o and r, z, n. So the GRU's reset
//! gate multiplies the product with its bias, not the state before the product. Sources: Hochreiter and Schmidhuber,
//! Long short-term memory (Neural Computation 9, 1997), with the forget gate of Gers et al. (2000); Cho et al. (arXiv
//! 1406.1078).
//!
//! Steps are sequential. On a CPU all segments that are still running take a step together, as one matrix product; on a
//! GPU a block has a segment. A segment's bits depend neither on the others nor on where a sequence is cut.
//! For the gradient the forward pass keeps the gates of each token, and the LSTM's c or the GRU's product for n: memory
//! linear in the tokens.

mod cpu;
mod cuda;
mod lanes;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::{elementwise, linear};

const NAME: &str = "rnn_scan";
/// Arithmetic of a gate beside its product, about.
const FLOPS: f64 = 15.0;

/// Which recurrence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Long short-term memory; its state is h, then c.
    Lstm,
    /// The gated recurrent unit; its state is h.
    Gru,
}

impl Cell {
    /// Rows of H in W and columns of H in x.
    pub const fn gates(self) -> usize {
        match self {
            Cell::Lstm => 4,
            Cell::Gru => 3,
        }
    }

    /// Vectors of H numbers in a state.
    pub const fn state(self) -> usize {
        match self {
            Cell::Lstm => 2,
            Cell::Gru => 1,
        }
    }

    /// Vectors of H numbers that are kept of a token for the gradient: i, f, g, o, c or r, z, n and a's part for n.
    const fn kept(self) -> usize {
        match self {
            Cell::Lstm => 5,
            Cell::Gru => 4,
        }
    }
}

/// Operands of [`rnn_scan`]. T tokens, H units, G = [`Cell::gates`], S segments. All but the offsets are f32; x may be
/// bf16 on a GPU, and y is of its type.
#[derive(Clone, Copy, Debug)]
pub struct RnnScan {
    /// The recurrence.
    pub cell: Cell,
    /// What the input contributes to the gates `[T, G·H]`.
    pub x: TensorId,
    /// W `[G·H, H]`.
    pub weight: TensorId,
    /// b_h `[1, G·H]`. Beside a bias in x it changes the GRU's n only.
    pub bias: Option<TensorId>,
    /// The states before the first step `[S, H]` (GRU) or `[S, 2H]` (LSTM: h, c). Zero if not given.
    pub initial_state: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
}

/// Results of [`rnn_scan`].
#[derive(Clone, Copy, Debug)]
pub struct Scanned {
    /// h of every token `[T, H]`; rows in no segment are zero.
    pub y: TensorId,
    /// The state after each segment's last token, as the initial one, over which it may be stored.
    pub final_state: TensorId,
}

/// Appends the recurrence. Differentiable in all f32 operands and both results.
///
/// # Errors
/// An operand of another shape or type.
pub fn rnn_scan(g: &mut Graph, rnn: RnnScan) -> Result<Scanned, Error> {
    let (cell, units) = (rnn.cell, g.cols(rnn.weight));
    let (tokens, width) = (g.rows(rnn.x), cell.gates() * units);
    let dtype = g.expect_float(NAME, "x", rnn.x)?;
    g.expect_f32(NAME, "the weight", rnn.weight, Some(width), None)?;
    g.expect_shape(NAME, "x", rnn.x, None, Some(width))?;
    let segments = g.expect_segments(NAME, rnn.segments)?;
    let state = cell.state() * units;
    if let Some(bias) = rnn.bias {
        g.expect_f32(NAME, "the bias", bias, Some(1), Some(width))?;
    }
    if let Some(initial) = rnn.initial_state {
        g.expect_f32(NAME, "the initial state", initial, Some(segments), Some(state))?;
    }
    let y = g.new_tensor(dtype, tokens, units);
    let final_state = g.new_tensor(DType::F32, segments, state);
    let kept = g.new_tensor(DType::F32, tokens, cell.kept() * units);
    let inputs = vec![Some(rnn.x), Some(rnn.weight), Some(rnn.segments), rnn.bias, rnn.initial_state];
    g.push(Forward { cell }, inputs, vec![Some(y), Some(final_state), Some(kept)]);
    Ok(Scanned { y, final_state })
}

// Inputs of the forward op.
const X: usize = 0;
const WEIGHT: usize = 1;
const SEGMENTS: usize = 2;
const BIAS: usize = 3;
const INITIAL_STATE: usize = 4;

/// 2 G H² a token for the product, and the gates.
fn flops(cell: Cell, tokens: usize, units: usize) -> f64 {
    (tokens * cell.gates() * units) as f64 * (2.0 * units as f64 + FLOPS)
}

/// Inputs: those above. Outputs: y, the final state, what is kept.
#[derive(Clone, Copy, Debug)]
struct Forward {
    cell: Cell,
}

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
        let (dy, d_final) = (d_outputs[0], d_outputs[1]);
        let mut gradients = vec![None; node.inputs.len()];
        if dy.is_none() && d_final.is_none() {
            return Ok(gradients);
        }
        let (x, weight) = (node.input(X), node.input(WEIGHT));
        let (dtype, tokens, width, units) = (g.dtype(x), g.rows(x), g.cols(x), g.cols(weight));
        let dx = g.new_tensor(dtype, tokens, width);
        // The LSTM adds x and a, so their gradients are one.
        let da = (self.cell == Cell::Gru).then(|| g.new_tensor(dtype, tokens, width));
        let before = g.new_tensor(dtype, tokens, units);
        let initial = node.inputs[INITIAL_STATE].filter(|_| wanted[INITIAL_STATE]);
        gradients[INITIAL_STATE] = initial.map(|t| g.new_tensor(DType::F32, g.rows(t), g.cols(t)));
        let inputs = vec![
            Some(weight),
            node.inputs[SEGMENTS],
            node.inputs[INITIAL_STATE],
            node.outputs[0],
            node.outputs[2],
            dy,
            d_final,
        ];
        g.push(Gradient { cell: self.cell }, inputs, vec![Some(dx), da, Some(before), gradients[INITIAL_STATE]]);
        let da = da.unwrap_or(dx);
        gradients[X] = wanted[X].then_some(dx);
        if wanted[WEIGHT] {
            gradients[WEIGHT] = Some(linear::weight_gradient(g, da, before, false));
        }
        if wanted[BIAS] && node.inputs[BIAS].is_some() {
            gradients[BIAS] = Some(elementwise::column_sums(g, da)?);
        }
        Ok(gradients)
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(self.cell, g.cols(node.input(WEIGHT)), g.cols(node.input(SEGMENTS)) - 1, cpu)
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        cuda::workspace(self.cell, g.cols(node.input(WEIGHT)), g.cols(node.input(SEGMENTS)) - 1)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        flops(self.cell, g.rows(node.input(X)), g.cols(node.input(WEIGHT)))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self.cell, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self.cell, io, launcher)
    }
}

/// Inputs: W, the offsets, the initial state, y, what was kept, dy, the gradient of the final state. Outputs: dx, for the
/// GRU da, the h before each token, the gradient of the initial state.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    cell: Cell,
}

impl Gradient {
    const WEIGHT: usize = 0;
    const SEGMENTS: usize = 1;
    const INITIAL_STATE: usize = 2;
    const Y: usize = 3;
    const KEPT: usize = 4;
    const DY: usize = 5;
    const D_FINAL: usize = 6;

    const DX: usize = 0;
    const DA: usize = 1;
    const BEFORE: usize = 2;
    const D_INITIAL: usize = 3;
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "rnn_scan_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        let segments = g.cols(node.input(Gradient::SEGMENTS)) - 1;
        cpu::workspace_grad(self.cell, g.cols(node.input(Gradient::WEIGHT)), segments, cpu)
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let segments = g.cols(node.input(Gradient::SEGMENTS)) - 1;
        cuda::workspace(self.cell, g.cols(node.input(Gradient::WEIGHT)), segments)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        flops(self.cell, g.rows(node.input(Gradient::Y)), g.cols(node.input(Gradient::WEIGHT)))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run_grad(self.cell, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(self.cell, io, launcher)
    }
}
