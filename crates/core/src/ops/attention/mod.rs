//! Causal softmax attention inside a window, with the keys and values of the window as a state that goes on.
//!
//! For query head h, which shares key and value head g = h / (H/G) with its neighbours, at position p of a sequence:
//!
//! ```text
//! y[p] = Σ_j softmax_j(q[p] · k[j] / √P) v[j],   p − window < j ≤ p
//! ```
//!
//! Sources: Vaswani et al., Attention is all you need (arXiv 1706.03762); grouped heads: Ainslie et al. (arXiv
//! 2305.13245); the softmax over blocks of keys and its gradient, which keep no matrix of scores but one number a query,
//! ln Σ exp: Dao et al., FlashAttention (arXiv 2205.14135).
//!
//! Memory is linear in the tokens. Blocks of keys lie on a grid of absolute positions and a query meets them in order, so
//! its result does not depend on how a sequence is cut into calls, bit for bit.
//!
//! The state is a ring: position p has slot p mod window, with the keys and then the values of all G heads. Beside it
//! stands the number of tokens so far, as two f32 that are exact (see [`POSITION`]).

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
use crate::graph::{Graph, Io, Mat, Node, Op, TensorId};

const NAME: &str = "attention";

/// Numbers of a position in a state: its rest by 2²⁰, and how many times that.
pub const POSITION: usize = 2;
const POSITION_UNIT: f64 = (1u64 << 20) as f64;
/// Positions that are taken for real; a state file may hold anything.
const MAX_POSITION: f64 = (1u64 << 44) as f64;

/// The position of sequence `row`, 0 without a state.
///
/// # Safety
/// The row lies in the matrix, which nobody writes meanwhile.
pub(crate) unsafe fn position(state: Option<Mat>, row: usize) -> u64 {
    // SAFETY: as the caller says.
    let Some(state) = state.map(|m| unsafe { m.row::<f32>(row) }) else { return 0 };
    // A NaN becomes 0.
    (f64::from(state[0]) + POSITION_UNIT * f64::from(state[1])).clamp(0.0, MAX_POSITION) as u64
}

/// Operands and options of [`attention`]. T tokens, H query heads of P numbers, G key and value heads, S segments;
/// queries, keys and values f32 or bf16, a state f32.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Queries `[T, H·P]`.
    pub q: TensorId,
    /// Keys `[T, G·P]`.
    pub k: TensorId,
    /// Values `[T, G·P]`.
    pub v: TensorId,
    /// Number of query heads H.
    pub heads: usize,
    /// Number of key and value heads G; divides H.
    pub kv_heads: usize,
    /// Keys that a query sees, its own among them.
    pub window: usize,
    /// Tokens before the first of each segment `[S, 2]`; 0 if not given.
    pub position: Option<TensorId>,
    /// Their keys and values `[S, window·2·G·P]`; given where the position is.
    pub kv: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
}

/// Results of [`attention`].
#[derive(Clone, Copy, Debug)]
pub struct Attended {
    /// `[T, H·P]`, of the type of q; rows in no segment are zero.
    pub y: TensorId,
    /// Tokens of each segment and before `[S, 2]`. May be stored over the initial ones, as may the keys and values.
    pub final_position: TensorId,
    /// Keys and values of the last tokens `[S, window·2·G·P]`.
    pub final_kv: TensorId,
}

/// Appends attention. Differentiable in q, k and v through y; not in its states.
///
/// # Errors
/// An operand of another shape or type, heads that do not divide, a window of 0.
pub fn attention(g: &mut Graph, a: Attention) -> Result<Attended, Error> {
    let unsupported = |message: String| Err(Error::Unsupported { op: NAME, message });
    let (tokens, width) = (g.rows(a.q), g.cols(a.q));
    if a.heads == 0 || width == 0 || !width.is_multiple_of(a.heads) {
        return unsupported(format!("the {width} columns of q must be a multiple of the number of heads, {}", a.heads));
    }
    if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) {
        return unsupported(format!("{} key and value heads must divide the {} query heads", a.kv_heads, a.heads));
    }
    if a.window == 0 {
        return unsupported("the window is 0; expected at least 1, the query's own position".into());
    }
    let shape = Shape { heads: a.heads, kv_heads: a.kv_heads, headdim: width / a.heads, window: a.window };
    let kv_width = shape.kv_heads * shape.headdim;
    let segments = g.expect_segments(NAME, a.segments)?;
    let state = a.window.checked_mul(2 * kv_width);
    let Some(state) = state else { return unsupported(format!("a window of {} is too large", a.window)) };
    let dtype = g.expect_float(NAME, "q", a.q)?;
    g.expect(NAME, "k", a.k, dtype, Some(tokens), Some(kv_width))?;
    g.expect(NAME, "v", a.v, dtype, Some(tokens), Some(kv_width))?;
    if a.position.is_some() != a.kv.is_some() {
        return unsupported("position and keys and values of a state come together".into());
    }
    if let (Some(position), Some(kv)) = (a.position, a.kv) {
        g.expect_f32(NAME, "the position", position, Some(segments), Some(POSITION))?;
        g.expect_f32(NAME, "the keys and values of the state", kv, Some(segments), Some(state))?;
    }
    let y = g.new_tensor(dtype, tokens, width);
    let log_sums = g.new_tensor(DType::F32, tokens, a.heads);
    let final_position = g.new_tensor(DType::F32, segments, POSITION);
    let final_kv = g.new_tensor(DType::F32, segments, state);
    let inputs = vec![Some(a.q), Some(a.k), Some(a.v), Some(a.segments), a.position, a.kv];
    let outputs = vec![Some(y), Some(log_sums), Some(final_position), Some(final_kv)];
    g.push(Forward { shape }, inputs, outputs);
    Ok(Attended { y, final_position, final_kv })
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    headdim: usize,
    window: usize,
}

impl Shape {
    /// Query heads that share a key and value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Two products over the keys that a query sees on average, in both directions of an element.
    fn flops(&self, tokens: usize, segments: usize) -> f64 {
        let seen = (tokens as f64 / segments.max(1) as f64 / 2.0).clamp(1.0, self.window as f64);
        4.0 * tokens as f64 * (self.heads * self.headdim) as f64 * seen
    }
}

// Inputs of both ops, as far as they share them.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const SEGMENTS: usize = 3;
const POSITIONS: usize = 4;
const KV: usize = 5;

/// Inputs: those above. Outputs: y, ln Σ exp of each query and head, the final position, the final keys and values.
#[derive(Clone, Copy, Debug)]
struct Forward {
    shape: Shape,
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
        let mut gradients = vec![None; node.inputs.len()];
        if d_outputs[2].is_some() || d_outputs[3].is_some() || wanted[KV] {
            let message = "gradients of its states are not implemented".into();
            return Err(Error::Unsupported { op: NAME, message });
        }
        let Some(dy) = d_outputs[0] else { return Ok(gradients) };
        for i in [Q, K, V] {
            let input = node.input(i);
            gradients[i] = Some(g.new_tensor(g.dtype(input), g.rows(input), g.cols(input)));
        }
        let mut inputs = node.inputs.clone();
        inputs.extend([Some(dy), node.outputs[0], node.outputs[1]]);
        g.push(Gradient { shape: self.shape }, inputs, gradients[..3].to_vec());
        Ok(gradients)
    }

    fn workspace(&self, _: &Graph, _: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(&self.shape, cpu)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        self.shape.flops(g.rows(node.input(Q)), g.cols(node.input(SEGMENTS)) - 1)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(&self.shape, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(&self.shape, io, launcher)
    }
}

/// Inputs: those above, dy, y, ln Σ exp. Outputs: dq, dk, dv.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    shape: Shape,
}

impl Gradient {
    const DY: usize = 6;
    const Y: usize = 7;
    const LOG_SUMS: usize = 8;
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "attention_grad"
    }

    fn workspace(&self, _: &Graph, _: &Node, cpu: &Cpu) -> usize {
        cpu_grad::workspace(&self.shape, cpu)
    }

    /// Five products in place of two.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        2.5 * self.shape.flops(g.rows(node.input(Q)), g.cols(node.input(SEGMENTS)) - 1)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::run(&self.shape, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        cuda::gradient_workspace(&self.shape, g.rows(node.input(Q)))
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_gradient(&self.shape, io, launcher)
    }
}
