//! The recurrence of a linear time-invariant state space model whose transition is diagonal, or diagonal plus rank one:
//! S4D, the diagonal SSM of H3, and S4.
//!
//! Each channel has M complex states h, one of every conjugate pair, so a state size of N = 2M real numbers. For step t
//! of a segment:
//!
//! ```text
//! h[t] = ā ⊙ h[t−1] + u · 2 Re(v · h[t−1]) + b̄ x[t]           the term with u and v for S4 alone
//! y[t] = 2 Re(c · h[t]) + D x[t]
//! ```
//!
//! v · h is a sum over both halves of the pairs, hence twice a real part. Sources: Gu et al., S4D (arXiv 2206.11893),
//! section 3; Gu, Goel & Ré, S4 (arXiv 2111.00396), section 3 and appendix C.2, whose discrete transition is of this
//! form by Woodbury's identity (see [`super::lti_discretise`]), so that a step costs O(N).
//!
//! Coefficients are state-major as the states are: `[2M, D]`, real and imaginary part of pair m of channel d at (2m, d) and
//! (2m + 1, d). The kernels walk through time, so results do not depend on how a sequence is cut into calls, bit for bit.
//! For the gradient the state at the start of every chunk of [`chunk_len`] steps is kept (`[T/chunk + S, 2M·D]`, at most
//! T·D + S·2M·D values); the gradient recomputes a chunk's states from there, then walks back through it.

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

const NAME: &str = "lti_scan";

/// Operands of [`lti_scan`]. T tokens, D channels, M pairs of states a channel, S segments. All but the offsets are f32;
/// on a GPU x may be bf16, and y is of its type.
#[derive(Clone, Copy, Debug)]
pub struct LtiScan {
    /// The input `[T, D]`.
    pub x: TensorId,
    /// ā `[2M, D]`.
    pub a: TensorId,
    /// b̄ `[2M, D]`.
    pub b: TensorId,
    /// c `[2M, D]`.
    pub c: TensorId,
    /// u and v of the rank-one part of the transition `[2M, D]` each.
    pub rank_one: Option<[TensorId; 2]>,
    /// D, the skip connection's factor `[1, D]`.
    pub d: Option<TensorId>,
    /// The states before the first step `[S, 2M·D]`, a row being a `[2M, D]` as above. Zero if not given.
    pub initial_state: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
}

/// Results of [`lti_scan`].
#[derive(Clone, Copy, Debug)]
pub struct Scanned {
    /// The output `[T, D]`; rows in no segment are zero.
    pub y: TensorId,
    /// The states after the last step of each segment `[S, 2M·D]`. It may be stored over the initial state.
    pub final_state: TensorId,
}

/// Appends a linear time-invariant scan. Differentiable in all f32 operands and both results.
///
/// # Errors
/// An operand of another shape or type; no channels, no states, or an odd number of rows of ā.
pub fn lti_scan(g: &mut Graph, scan: LtiScan) -> Result<Scanned, Error> {
    let (tokens, channels) = (g.rows(scan.x), g.cols(scan.x));
    let dtype = g.expect_float(NAME, "x", scan.x)?;
    g.expect_f32(NAME, "ā", scan.a, None, Some(channels))?;
    let rows = g.rows(scan.a);
    if channels == 0 || rows == 0 || !rows.is_multiple_of(2) {
        let message = format!(
            "expected at least one channel and ā of two rows for every pair of states, found {channels} channels and \
             {rows} rows"
        );
        return Err(Error::Unsupported { op: NAME, message });
    }
    let segments = g.expect_segments(NAME, scan.segments)?;
    let [u, v] = scan.rank_one.map_or([None; 2], |uv| uv.map(Some));
    for (what, t, rows, cols) in [
        ("b̄", Some(scan.b), rows, channels),
        ("c", Some(scan.c), rows, channels),
        ("u", u, rows, channels),
        ("v", v, rows, channels),
        ("D", scan.d, 1, channels),
        ("the initial state", scan.initial_state, segments, rows * channels),
    ] {
        if let Some(t) = t {
            g.expect_f32(NAME, what, t, Some(rows), Some(cols))?;
        }
    }
    let pairs = rows / 2;
    let y = g.new_tensor(dtype, tokens, channels);
    let final_state = g.new_tensor(DType::F32, segments, rows * channels);
    let chunk_states = g.new_tensor(DType::F32, tokens / chunk_len(pairs) + segments, rows * channels);
    let op = Forward { pairs, rank_one: scan.rank_one.is_some() };
    let inputs = vec![
        Some(scan.x),
        Some(scan.a),
        Some(scan.b),
        Some(scan.c),
        u,
        v,
        scan.d,
        Some(scan.segments),
        scan.initial_state,
    ];
    g.push(op, inputs, vec![Some(y), Some(final_state), Some(chunk_states)]);
    Ok(Scanned { y, final_state })
}

/// Steps between two states kept for the gradient: 32 or, where a channel has more states, as many as keep them
/// below T·D values.
pub const fn chunk_len(pairs: usize) -> usize {
    (2 * pairs).div_ceil(32) * 32
}

/// The row of the kept states that belongs to chunk `chunk` of a segment: distinct whatever the segments' lengths, and
/// below T/chunk + S.
fn chunk_row(pairs: usize, segment: usize, first_row: usize, chunk: usize) -> usize {
    first_row / chunk_len(pairs) + segment + chunk
}

// Inputs of both ops, as far as they share them. The coefficients that have gradients by time come in this order.
const X: usize = 0;
const A: usize = 1;
const B: usize = 2;
const C: usize = 3;
const U: usize = 4;
const V: usize = 5;
const D: usize = 6;
const SEGMENTS: usize = 7;
const INITIAL_STATE: usize = 8;

/// Inputs: those above. Outputs: y, the final state, the states at chunk starts.
#[derive(Clone, Copy, Debug)]
struct Forward {
    pairs: usize,
    rank_one: bool,
}

impl Forward {
    /// The coefficients of a pair with a real and an imaginary part each: ā, b̄, c and perhaps u, v.
    fn coefficients(&self) -> usize {
        if self.rank_one { 5 } else { 3 }
    }
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
        for (i, gradient) in gradients.iter_mut().enumerate() {
            // The final state does not depend on c and D.
            let flows = dy.is_some() || !matches!(i, C | D);
            if let Some(input) = node.inputs[i].filter(|_| wanted[i] && flows && i != SEGMENTS) {
                *gradient = Some(g.new_tensor(g.dtype(input), g.rows(input), g.cols(input)));
            }
        }
        let mut inputs = node.inputs[..Gradient::DY].to_vec();
        inputs.extend([dy, d_final, node.outputs[2]]);
        g.push(Gradient { forward: *self }, inputs, gradients.clone());
        Ok(gradients)
    }

    fn workspace(&self, _: &Graph, _: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(self, cpu)
    }

    /// A pair and step: 8 operations for ā and b̄, 4 for c, 8 for u and v.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(X);
        (g.rows(x) * g.cols(x) * self.pairs * (4 * self.coefficients() + 4)) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self, io, launcher)
    }
}

/// Inputs: those above without the initial state, dy, the gradient of the final state, the states at chunk starts.
/// Outputs: the gradients of the forward op's inputs, in their order.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    forward: Forward,
}

impl Gradient {
    const DY: usize = 8;
    const D_FINAL: usize = 9;
    const CHUNK_STATES: usize = 10;
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "lti_scan_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        let (x, segments) = (node.input(X), g.cols(node.input(SEGMENTS)) - 1);
        cpu_grad::workspace(&self.forward, g.cols(x), segments, cpu)
    }

    /// The forward pass again, and about twice as much for the way back.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(X);
        (g.rows(x) * g.cols(x) * self.forward.pairs * 3 * (4 * self.forward.coefficients() + 4)) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::run(self, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let (x, segments) = (node.input(X), g.cols(node.input(SEGMENTS)) - 1);
        cuda::gradient_workspace(&self.forward, g.cols(x), segments)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(self, io, launcher)
    }
}
