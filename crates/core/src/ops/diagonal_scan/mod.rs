//! The diagonal scan: a diagonal state space model, real or complex, each of whose parts may depend on the input or not.
//!
//! For channel d, state n and step t of a segment, with Δ = softplus(dt + dt_bias):
//!
//! ```text
//! h[t, n] = exp(Δ[t] A[n]) h[t−1, n] + F B[t, n] x[t]        F = Δ (Euler) or (exp(Δ A) − 1)/A (zero-order hold)
//! y[t]    = κ Re Σ_n C[t, n] h[t, n] + D x[t]                κ = 1 for real A, 2 for complex A
//! ```
//!
//! A complex state stands for itself and its conjugate, so N complex states are 2N real ones. B and C are the input's
//! (a row a token, shared by all channels, as in S6) or fixed (a row a channel, as in S4D); without dt the step size is
//! fixed, too. Sources: Gu & Dao, Mamba (arXiv 2312.00752), algorithms 1 and 2 and tables 7 to 10; Gu et al., S4D (arXiv
//! 2206.11893). Where all parts are real and the input's, this is [`super::selective_scan`], which is faster.
//!
//! K is 1 for real and 2 for complex numbers. Parts lie in planes: the real parts of all states, then the imaginary ones.
//!
//! Results do not depend on how a sequence is cut into calls, bit for bit. For the gradient the forward pass keeps the
//! state at the start of every chunk, as the selective scan does.

mod cpu;
mod cpu_grad;
mod cuda;
mod numbers;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::selective_scan::{Discretisation, chunk_len};

const NAME: &str = "diagonal_scan";

/// A part of the model that is chosen anew at each token, or not.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// `[T, K·N]`, of the activations' type.
    Selective(TensorId),
    /// `[D, K·N]`, f32.
    Fixed(TensorId),
}

impl Part {
    fn tensor(self) -> TensorId {
        match self {
            Part::Selective(t) | Part::Fixed(t) => t,
        }
    }

    fn is_fixed(self) -> bool {
        matches!(self, Part::Fixed(_))
    }
}

/// Operands and options of [`diagonal_scan`]. T tokens, D channels, N states per channel, S segments. All but the offsets
/// are f32; on a GPU x, dt and what the input chooses of B and C may be bf16, and y is of their type.
#[derive(Clone, Copy, Debug)]
pub struct DiagonalScan {
    /// The input `[T, D]`.
    pub x: TensorId,
    /// The step size before bias and softplus `[T, D]`; without it the bias alone decides.
    pub dt: Option<TensorId>,
    /// Added to dt `[1, D]`.
    pub dt_bias: Option<TensorId>,
    /// A, or its real part `[D, N]`; zero and positive values work, too.
    pub a: TensorId,
    /// The imaginary part of A `[D, N]`; A is real without it.
    pub a_imag: Option<TensorId>,
    /// B.
    pub b: Part,
    /// C.
    pub c: Part,
    /// D, the skip connection's factor `[1, D]`.
    pub d: Option<TensorId>,
    /// The states before the first step `[S, K·N·D]`: part k of state n of channel d in column (k·N + n)·D + d. Zero if
    /// not given.
    pub initial_state: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
    /// How the input enters the state.
    pub discretisation: Discretisation,
}

/// Results of [`diagonal_scan`].
#[derive(Clone, Copy, Debug)]
pub struct Scanned {
    /// The output `[T, D]`; rows in no segment are zero.
    pub y: TensorId,
    /// The states after the last step of each segment `[S, K·N·D]`. It may be stored over the initial state.
    pub final_state: TensorId,
}

/// Appends a diagonal scan. Differentiable in all f32 operands and both results.
///
/// # Errors
/// An operand of another shape or type; neither dt nor its bias.
pub fn diagonal_scan(g: &mut Graph, scan: DiagonalScan) -> Result<Scanned, Error> {
    let (tokens, channels) = (g.rows(scan.x), g.cols(scan.x));
    let dtype = g.expect_float(NAME, "x", scan.x)?;
    g.expect_f32(NAME, "A", scan.a, Some(channels), None)?;
    let states = g.cols(scan.a);
    let unsupported = |message: String| Error::Unsupported { op: NAME, message };
    if channels == 0 || states == 0 {
        return Err(unsupported(format!(
            "expected at least one channel and one state, found A of [{channels}, {states}]"
        )));
    }
    if scan.dt.is_none() && scan.dt_bias.is_none() {
        return Err(unsupported("expected dt, its bias, or both".into()));
    }
    let planes = 1 + usize::from(scan.a_imag.is_some());
    let width = planes * states;
    for (what, part) in [("B", scan.b), ("C", scan.c)] {
        match part {
            Part::Selective(t) => g.expect(NAME, what, t, dtype, Some(tokens), Some(width))?,
            Part::Fixed(t) => g.expect_f32(NAME, what, t, Some(channels), Some(width))?,
        }
    }
    let segments = g.expect_segments(NAME, scan.segments)?;
    for (what, t, dtype, rows, cols) in [
        ("the imaginary part of A", scan.a_imag, DType::F32, channels, states),
        ("dt", scan.dt, dtype, tokens, channels),
        ("dt_bias", scan.dt_bias, DType::F32, 1, channels),
        ("D", scan.d, DType::F32, 1, channels),
        ("the initial state", scan.initial_state, DType::F32, segments, width * channels),
    ] {
        if let Some(t) = t {
            g.expect(NAME, what, t, dtype, Some(rows), Some(cols))?;
        }
    }
    let y = g.new_tensor(dtype, tokens, channels);
    let final_state = g.new_tensor(DType::F32, segments, width * channels);
    let chunk_states = g.new_tensor(DType::F32, tokens / chunk_len(width) + segments, width * channels);
    let op =
        Forward { states, planes, fixed: [scan.b.is_fixed(), scan.c.is_fixed()], discretisation: scan.discretisation };
    let inputs = vec![
        Some(scan.x),
        Some(scan.a),
        Some(scan.b.tensor()),
        Some(scan.c.tensor()),
        Some(scan.segments),
        scan.a_imag,
        scan.dt,
        scan.dt_bias,
        scan.d,
        scan.initial_state,
    ];
    g.push(op, inputs, vec![Some(y), Some(final_state), Some(chunk_states)]);
    Ok(Scanned { y, final_state })
}

// Inputs of both ops, as far as they share them.
const X: usize = 0;
const A: usize = 1;
const B: usize = 2;
const C: usize = 3;
const SEGMENTS: usize = 4;
const A_IMAG: usize = 5;
const DT: usize = 6;
const DT_BIAS: usize = 7;
const D: usize = 8;

/// Inputs: those above, the initial state. Outputs: y, the final state, the states at chunk starts.
#[derive(Clone, Copy, Debug)]
struct Forward {
    /// N
    states: usize,
    /// K
    planes: usize,
    /// Whether B and C are.
    fixed: [bool; 2],
    discretisation: Discretisation,
}

impl Forward {
    const INITIAL_STATE: usize = 9;

    /// Numbers of a channel's state.
    fn width(&self) -> usize {
        self.planes * self.states
    }

    fn is_complex(&self) -> bool {
        self.planes == 2
    }

    /// Steps between two states kept for the gradient.
    fn chunk(&self) -> usize {
        chunk_len(self.width())
    }

    /// The row of the kept states of a chunk, in a segment whose first row is `first` (see the selective scan).
    fn chunk_row(&self, segment: usize, first: usize, chunk: usize) -> usize {
        first / self.chunk() + segment + chunk
    }

    /// Operations of a state and step, forward: multiply-adds of the state, of B x and of y; a function counts as one.
    fn flops(&self, g: &Graph, x: TensorId) -> f64 {
        let each = if self.is_complex() { 22 } else { 7 };
        (g.rows(x) * g.cols(x)) as f64 * (each * self.states) as f64
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
            // The final state does not depend on C and D.
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

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(self, g.cols(node.input(X)), g.rows(node.output(1)), cpu)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        self.flops(g, node.input(X))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        cuda::workspace(self, g.cols(node.input(X)), g.rows(node.output(1)))
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
        "diagonal_scan_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        let (x, segments) = (node.input(X), g.cols(node.input(SEGMENTS)) - 1);
        cpu_grad::Layout::new(&self.forward, g.rows(x), g.cols(x), segments, cpu).bytes()
    }

    /// The forward pass again, and about twice as much for the way back.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        3.0 * self.forward.flops(g, node.input(X))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::run(self, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let (x, segments) = (node.input(X), g.cols(node.input(SEGMENTS)) - 1);
        cuda::gradient_workspace(&self.forward, g.rows(x), g.cols(x), segments)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(self, io, launcher)
    }
}
