//! The selective scan S6: a diagonal state space model whose Δ, B and C depend on the input.
//!
//! For channel d, state n and step t of a segment, with Δ = softplus(dt + dt_bias) or dt + dt_bias:
//!
//! ```text
//! h[t, n] = exp(Δ[t] A[n]) h[t−1, n] + B̄[t, n] x[t]        B̄ = Δ B (Euler) or (exp(Δ A) − 1)/A · B (zero-order hold)
//! y[t]    = (Σ_n C[t, n] h[t, n] + D x[t]) · silu(z[t])
//! ```
//!
//! Source: Gu & Dao, Mamba (arXiv 2312.00752), section 3 and algorithm 2; released checkpoints use the Euler form.
//! B and C are shared by the D/G channels of a group.
//!
//! The forward kernel walks through time with the states of a block of channels at hand, so its results do not depend
//! on how a sequence is cut into calls, bit for bit. For the gradient it keeps the state at the start of every chunk
//! of [`chunk_len`] steps (`[T/chunk + S, N·D]`, at most T·D + S·N·D values); the gradient recomputes a chunk's states
//! from there, then walks back through it. On a GPU chunks start on a grid over the whole pack, and at segments' starts.

mod cpu;
mod cpu_grad;
mod cuda;
mod decay;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

const NAME: &str = "selective_scan";

/// How the continuous model becomes a recurrence: what multiplies the input. The decay is exp(ΔA) in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discretisation {
    /// B̄ = ΔB, as in every released Mamba checkpoint.
    #[default]
    Euler,
    /// The zero-order hold, B̄ = (exp(ΔA) − 1)/A · B, and its limit ΔB at A = 0.
    Zoh,
}

/// Operands and options of [`selective_scan`]. T tokens, D channels, N states per channel, G groups, S segments. All
/// but the offsets are f32; on a GPU the activations x, dt, B, C and z may all be bf16, and y is of their type.
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan {
    /// The input `[T, D]`.
    pub x: TensorId,
    /// The step size before bias and softplus `[T, D]`.
    pub dt: TensorId,
    /// A `[D, N]`, already −exp(A_log); zero and positive values work, too.
    pub a: TensorId,
    /// B `[T, G·N]`, group g in columns g·N ..; G is its columns / N and must divide D.
    pub b: TensorId,
    /// C `[T, G·N]`.
    pub c: TensorId,
    /// D, the skip connection's factor `[1, D]`.
    pub d: Option<TensorId>,
    /// The gate before silu `[T, D]`.
    pub z: Option<TensorId>,
    /// Added to dt `[1, D]`.
    pub dt_bias: Option<TensorId>,
    /// The states before the first step `[S, N·D]`, state-major: state n of channel d in column n·D + d. Zero if not
    /// given.
    pub initial_state: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
    /// Whether Δ = softplus(dt + dt_bias) instead of dt + dt_bias.
    pub softplus: bool,
    /// How the input enters the state.
    pub discretisation: Discretisation,
}

/// Results of [`selective_scan`].
#[derive(Clone, Copy, Debug)]
pub struct Scanned {
    /// The output `[T, D]`; rows in no segment are zero.
    pub y: TensorId,
    /// The states after the last step of each segment `[S, N·D]`, state-major. It may be stored over the initial
    /// state.
    pub final_state: TensorId,
}

/// Appends a selective scan. Differentiable in all f32 operands and both results.
///
/// # Errors
/// An operand of another shape or type, or groups that do not divide the channels.
pub fn selective_scan(g: &mut Graph, scan: SelectiveScan) -> Result<Scanned, Error> {
    let (tokens, channels) = (g.rows(scan.x), g.cols(scan.x));
    let dtype = g.expect_float(NAME, "x", scan.x)?;
    g.expect(NAME, "dt", scan.dt, dtype, Some(tokens), Some(channels))?;
    g.expect_f32(NAME, "A", scan.a, Some(channels), None)?;
    let d_state = g.cols(scan.a);
    g.expect(NAME, "B", scan.b, dtype, Some(tokens), None)?;
    let columns = g.cols(scan.b);
    let unsupported = |message: String| Error::Unsupported { op: NAME, message };
    if channels == 0 || d_state == 0 || columns == 0 || !columns.is_multiple_of(d_state) {
        return Err(unsupported(format!(
            "expected at least one channel and B of G·N columns, found {channels} channels and B of {columns} columns \
             where A has N = {d_state} states a channel"
        )));
    }
    let groups = columns / d_state;
    if !channels.is_multiple_of(groups) {
        return Err(unsupported(format!(
            "the {groups} groups of B ({columns} columns of {d_state} states) must divide the {channels} channels"
        )));
    }
    g.expect(NAME, "C", scan.c, dtype, Some(tokens), Some(columns))?;
    let segments = g.expect_segments(NAME, scan.segments)?;
    for (what, t, dtype, rows, cols) in [
        ("D", scan.d, DType::F32, 1, channels),
        ("z", scan.z, dtype, tokens, channels),
        ("dt_bias", scan.dt_bias, DType::F32, 1, channels),
        ("the initial state", scan.initial_state, DType::F32, segments, d_state * channels),
    ] {
        if let Some(t) = t {
            g.expect(NAME, what, t, dtype, Some(rows), Some(cols))?;
        }
    }
    let y = g.new_tensor(dtype, tokens, channels);
    let final_state = g.new_tensor(DType::F32, segments, d_state * channels);
    let chunk_states = g.new_tensor(DType::F32, tokens / chunk_len(d_state) + segments, d_state * channels);
    let op = Forward { shape: Shape { d_state, groups }, softplus: scan.softplus, discretisation: scan.discretisation };
    let inputs = vec![
        Some(scan.x),
        Some(scan.dt),
        Some(scan.a),
        Some(scan.b),
        Some(scan.c),
        Some(scan.segments),
        scan.d,
        scan.z,
        scan.dt_bias,
        scan.initial_state,
    ];
    g.push(op, inputs, vec![Some(y), Some(final_state), Some(chunk_states)]);
    Ok(Scanned { y, final_state })
}

/// Steps between two states kept for the gradient: 32 or, where a channel has more states, as many as keep them
/// below T·D values.
pub const fn chunk_len(d_state: usize) -> usize {
    d_state.div_ceil(32) * 32
}

/// The row of the kept states that belongs to chunk `chunk` of a segment. Chunks start at the segment's first row, so
/// their number is not known when the graph is recorded; these rows are distinct whatever the segments' lengths, and
/// below T/chunk + S.
fn chunk_row(d_state: usize, segment: usize, first_row: usize, chunk: usize) -> usize {
    first_row / chunk_len(d_state) + segment + chunk
}

/// States and groups: what the shapes of x and B alone do not say.
#[derive(Clone, Copy, Debug)]
struct Shape {
    d_state: usize,
    groups: usize,
}

// Inputs of both ops, as far as they share them.
const X: usize = 0;
const DT: usize = 1;
const A: usize = 2;
const B: usize = 3;
const C: usize = 4;
const SEGMENTS: usize = 5;
const D: usize = 6;
const Z: usize = 7;
const DT_BIAS: usize = 8;

/// Inputs: those above, the initial state. Outputs: y, the final state, the states at chunk starts.
#[derive(Clone, Copy, Debug)]
struct Forward {
    shape: Shape,
    softplus: bool,
    discretisation: Discretisation,
}

impl Forward {
    const INITIAL_STATE: usize = 9;
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
            // The final state does not depend on C, D and z.
            let flows = dy.is_some() || !matches!(i, C | D | Z);
            if let Some(input) = node.inputs[i].filter(|_| wanted[i] && flows && i != SEGMENTS) {
                *gradient = Some(g.new_tensor(g.dtype(input), g.rows(input), g.cols(input)));
            }
        }
        let mut inputs = node.inputs[..Gradient::DY].to_vec();
        inputs.extend([dy, d_final, node.outputs[2]]);
        g.push(Gradient { forward: *self }, inputs, gradients.clone());
        Ok(gradients)
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(self, g.cols(node.input(X)), g.rows(node.output(1)), cpu)
    }

    /// A state and step: Δ·A, Δx·B, and two multiply-adds, beside one exponential, which counts as one.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(X);
        (g.rows(x) * g.cols(x)) as f64 * (7 * self.shape.d_state) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, gpu: &Properties) -> usize {
        cuda::workspace(self, g.rows(node.input(X)), g.cols(node.input(X)), g.cols(node.input(SEGMENTS)) - 1, gpu)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self, io, launcher)
    }
}

/// Inputs: those above, dy, the gradient of the final state, the states at chunk starts. Outputs: the gradients of
/// the forward op's inputs, in their order.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    forward: Forward,
}

impl Gradient {
    const DY: usize = 9;
    const D_FINAL: usize = 10;
    const CHUNK_STATES: usize = 11;
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "selective_scan_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        let (x, segments) = (node.input(X), g.cols(node.input(SEGMENTS)) - 1);
        cpu_grad::Layout::new(&self.forward, g.rows(x), g.cols(x), segments, cpu).bytes()
    }

    /// The forward pass again, and about 13 operations a state and step for the way back.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(X);
        (g.rows(x) * g.cols(x)) as f64 * (20 * self.forward.shape.d_state) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::run(self, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, gpu: &Properties) -> usize {
        let (x, segments) = (node.input(X), g.cols(node.input(SEGMENTS)) - 1);
        cuda::gradient_workspace(&self.forward, g.rows(x), g.cols(x), segments, gpu)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(self, io, launcher)
    }
}
