//! The state space duality op of Mamba-2: a selective SSM with one scalar decay a head, by matrix products.
//!
//! With Δ = clamp(softplus(dt + dt_bias), dt_limit), for each head h of width P with a state `[P, N]`, and
//! g = h / (H/G) its group:
//!
//! S_t = exp(Δ_t a) S_{t−1} + Δ_t x_t ⊗ B_t,  y_t = (S_t C_t + D x_t) ⊙ silu(z_t)
//!
//! (Dao & Gu 2024, "Transformers are SSMs", arXiv 2405.21060; B̄ = Δ B as in the released code.) A sequence is cut
//! into chunks, counted from each segment's start, and a chunk into equal blocks of at most [`BLOCK`] rows. With
//! cum_t = Σ_{i ≤ t} Δ_i a over a block,
//!
//! y_t = exp(cum_t) S C_t + Σ_{j ≤ t} exp(cum_t − cum_j) (C_t · B_j) Δ_j x_j
//! S' = exp(cum_last) S + Σ_j exp(cum_last − cum_j) Δ_j x_j ⊗ B_j
//!
//! What holds bit for bit on the CPU: a cut of a sequence at a multiple of `chunk` changes nothing, other segments
//! change nothing, and row t depends on rows ≤ t only and not on how many follow (as long as those are finite), with
//! one exception: a block of at most [`SHORT`] rows (a decode step, or the rest of a chunk) runs the plain recurrence,
//! which adds up in another order. Within such a block any cut changes nothing. Other cuts agree within rounding.
//!
//! On a GPU chunks are the kernels' own (64 rows in bf16, 32 or fewer in f32; `chunk` is not looked at), and cuts agree
//! within rounding. Two runs of a graph have the same bits. Up to [`SHORT`] tokens a segment on average, the plain
//! recurrence runs there, too. State sizes go up to 256.
//!
//! On the CPU the products bound the speed: about two thirds of the time at P = 64 and N = 128, close to the multiply-add peak.
//! Decode steps are bound by reading and writing the state.

mod cpu;
mod cpu_grad;
mod cuda;
pub(crate) mod lanes;
pub(crate) mod product;
pub mod reference;
mod steps;
#[cfg(test)]
mod tests;
pub(crate) mod workspace;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

/// Rows of a block of the forward pass, at most. Longer blocks cost more for the pairs of rows, shorter ones more for
/// reading and writing the state.
pub const BLOCK: usize = 64;
/// Rows of a block of the backward pass, at most: one state a block is kept while it runs.
const GRADIENT_BLOCK: usize = 128;
/// Blocks of at most this many rows run the plain recurrence.
pub const SHORT: usize = 4;

const NAME: &str = "ssd";

/// The operands and options of [`ssd`]. T tokens, H heads of width P, G groups of B and C, state size N, S segments.
#[derive(Clone, Copy, Debug)]
pub struct Ssd {
    /// `[T, H·P]`; in bf16 (on a GPU) or f32, and so are dt, b, c and z.
    pub x: TensorId,
    /// Step sizes before bias and softplus, `[T, H]`.
    pub dt: TensorId,
    /// The transition of each head, negative, `[1, H]`.
    pub a: TensorId,
    /// `[T, G·N]`.
    pub b: TensorId,
    /// `[T, G·N]`.
    pub c: TensorId,
    /// The skip connection: `[1, H]` or, a value for each channel, `[1, H·P]`.
    pub d: Option<TensorId>,
    /// The gate, `[T, H·P]`.
    pub z: Option<TensorId>,
    /// `[1, H]`.
    pub dt_bias: Option<TensorId>,
    /// The state that each segment starts from, `[S, H·P·N]` in the order (h, p, n); zero if None.
    pub initial_state: Option<TensorId>,
    /// Offsets of the segments, i32 `[1, S + 1]`.
    pub segments: TensorId,
    /// P.
    pub headdim: usize,
    /// N.
    pub d_state: usize,
    /// The grid, counted from a segment's start, on which cuts change no bit on the CPU. Any number from 1 on; it costs nothing
    /// to choose it large.
    pub chunk: usize,
    /// Whether softplus is applied to dt + dt_bias.
    pub softplus: bool,
    /// The least and the largest Δ; (0, ∞) is no limit. Outside, the gradient of dt is zero.
    pub dt_limit: (f32, f32),
}

/// What [`ssd`] returns.
#[derive(Clone, Copy, Debug)]
pub struct SsdOutput {
    /// `[T, H·P]`, of the type of x.
    pub y: TensorId,
    /// The state after each segment, `[S, H·P·N]`; that of an empty segment is its initial one.
    pub final_state: TensorId,
}

/// Appends the op (see the head of this module). All inputs are differentiable; so is the final state.
///
/// # Errors
/// Shapes or types that do not fit together, a limit that is none.
pub fn ssd(g: &mut Graph, s: Ssd) -> Result<SsdOutput, Error> {
    let shape = |what, expected: &str, found: String| Error::Shape { op: NAME, what, expected: expected.into(), found };
    for (what, value) in [("headdim", s.headdim), ("d_state", s.d_state), ("chunk", s.chunk)] {
        if value == 0 {
            return Err(shape(what, "at least 1", "0".into()));
        }
    }
    let (lo, hi) = s.dt_limit;
    if lo.is_nan() || hi.is_nan() || lo > hi {
        return Err(shape("dt_limit", "two rising numbers", format!("({lo}, {hi})")));
    }
    let (tokens, heads) = (g.rows(s.x), g.cols(s.a));
    if heads == 0 {
        return Err(shape("a", "one value for each of at least one head", "[1, 0]".into()));
    }
    let bc = g.cols(s.b);
    let groups = bc / s.d_state;
    if groups == 0 || !bc.is_multiple_of(s.d_state) || !heads.is_multiple_of(groups) {
        let expected = format!("a multiple of d_state = {} whose quotient divides {heads} heads", s.d_state);
        return Err(shape("the width of b", &expected, bc.to_string()));
    }
    let channels = heads * s.headdim;
    let segments = g.expect_segments(NAME, s.segments)?;
    let dtype = g.expect_float(NAME, "x", s.x)?;
    g.expect_shape(NAME, "x", s.x, None, Some(channels))?;
    g.expect(NAME, "dt", s.dt, dtype, Some(tokens), Some(heads))?;
    g.expect_f32(NAME, "a", s.a, Some(1), None)?;
    g.expect(NAME, "b", s.b, dtype, Some(tokens), None)?;
    g.expect(NAME, "c", s.c, dtype, Some(tokens), Some(bc))?;
    let d_per_channel = s.d.is_some_and(|d| g.cols(d) != heads);
    if let Some(d) = s.d {
        g.expect_f32(NAME, "d", d, Some(1), Some(if d_per_channel { channels } else { heads }))?;
    }
    if let Some(z) = s.z {
        g.expect(NAME, "z", z, dtype, Some(tokens), Some(channels))?;
    }
    if let Some(bias) = s.dt_bias {
        g.expect_f32(NAME, "dt_bias", bias, Some(1), Some(heads))?;
    }
    let state = channels * s.d_state;
    if let Some(initial) = s.initial_state {
        g.expect_f32(NAME, "initial_state", initial, Some(segments), Some(state))?;
    }
    let y = g.new_tensor(dtype, tokens, channels);
    let final_state = g.new_tensor(DType::F32, segments, state);
    let dims = Dims {
        heads,
        groups,
        headdim: s.headdim,
        d_state: s.d_state,
        chunk: s.chunk,
        softplus: s.softplus,
        dt_limit: s.dt_limit,
        d_per_channel,
    };
    let mut inputs = vec![None; inputs::COUNT];
    for (i, t) in [(inputs::X, s.x), (inputs::DT, s.dt), (inputs::A, s.a), (inputs::B, s.b), (inputs::C, s.c)] {
        inputs[i] = Some(t);
    }
    inputs[inputs::D] = s.d;
    inputs[inputs::Z] = s.z;
    inputs[inputs::DT_BIAS] = s.dt_bias;
    inputs[inputs::INITIAL_STATE] = s.initial_state;
    inputs[inputs::SEGMENTS] = Some(s.segments);
    g.push(Forward(dims), inputs, vec![Some(y), Some(final_state)]);
    Ok(SsdOutput { y, final_state })
}

/// Places of the operands in a node's inputs; gradients are outputs in the same places.
mod inputs {
    pub const X: usize = 0;
    pub const DT: usize = 1;
    pub const A: usize = 2;
    pub const B: usize = 3;
    pub const C: usize = 4;
    pub const D: usize = 5;
    pub const Z: usize = 6;
    pub const DT_BIAS: usize = 7;
    pub const INITIAL_STATE: usize = 8;
    pub const SEGMENTS: usize = 9;
    /// Inputs of the forward op; the gradient's further ones follow.
    pub const COUNT: usize = 10;
    pub const D_Y: usize = 10;
    pub const D_FINAL_STATE: usize = 11;
}

/// Sizes and options, checked.
#[derive(Clone, Copy, Debug)]
struct Dims {
    heads: usize,
    groups: usize,
    headdim: usize,
    d_state: usize,
    chunk: usize,
    softplus: bool,
    dt_limit: (f32, f32),
    d_per_channel: bool,
}

impl Dims {
    /// Elements of one head's state.
    fn state(&self) -> usize {
        self.headdim * self.d_state
    }

    fn heads_per_group(&self) -> usize {
        self.heads / self.groups
    }

    /// Rows of a block of at most `most` rows: chunks are cut into equal blocks, but for rounding.
    fn block(&self, most: usize) -> usize {
        self.chunk.div_ceil(self.chunk.div_ceil(most))
    }

    /// Number of blocks of a segment of `length` rows.
    fn block_count(&self, length: usize, most: usize) -> usize {
        let (chunk, block) = (self.chunk, self.block(most));
        length / chunk * chunk.div_ceil(block) + (length % chunk).div_ceil(block)
    }

    /// First row and number of rows of block `index` of a segment of `length` rows.
    fn nth_block(&self, length: usize, most: usize, index: usize) -> (usize, usize) {
        let (chunk, block) = (self.chunk, self.block(most));
        let per_chunk = chunk.div_ceil(block);
        let chunk_start = index / per_chunk * chunk;
        let chunk_end = chunk_start.saturating_add(chunk).min(length);
        let start = chunk_start + index % per_chunk * block;
        (start, block.min(chunk_end - start))
    }

    /// First row and number of rows of each block of a segment of `length` rows.
    fn blocks(&self, length: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.block_count(length, most)).map(move |index| self.nth_block(length, most, index))
    }

    /// Multiply-adds of the products of a forward pass over `tokens`, twice.
    fn flops(&self, tokens: usize) -> f64 {
        let (block, state) = (self.block(BLOCK).min(tokens) as f64, self.state() as f64);
        let head = 4.0 * state + block * self.headdim as f64;
        tokens as f64 * (self.heads as f64 * head + self.groups as f64 * block * self.d_state as f64)
    }
}

#[derive(Debug)]
struct Forward(Dims);

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
        let mut gradients = vec![None; inputs::COUNT];
        for (i, gradient) in gradients.iter_mut().enumerate() {
            if let (Some(input), true) = (node.inputs[i], wanted[i] && i != inputs::SEGMENTS) {
                *gradient = Some(g.new_tensor(g.dtype(input), g.rows(input), g.cols(input)));
            }
        }
        let mut operands = node.inputs.clone();
        operands.extend_from_slice(d_outputs);
        g.push(Gradient(self.0), operands, gradients.clone());
        Ok(gradients)
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        cpu::workspace(&self.0, g.cols(node.input(inputs::SEGMENTS)) - 1, cpu)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        self.0.flops(g.rows(node.input(inputs::X)))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::forward(&self.0, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, gpu: &Properties) -> usize {
        let (x, segments) = (node.input(inputs::X), g.cols(node.input(inputs::SEGMENTS)) - 1);
        cuda::workspace(&self.0, g.rows(x), segments, g.dtype(x), gpu)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(&self.0, io, launcher)
    }
}

#[derive(Debug)]
struct Gradient(Dims);

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "ssd_grad"
    }

    fn workspace(&self, g: &Graph, node: &Node, cpu: &Cpu) -> usize {
        let segments = g.cols(node.input(inputs::SEGMENTS)) - 1;
        cpu_grad::workspace(&self.0, g.rows(node.input(inputs::X)), segments, cpu)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        cpu_grad::flops(&self.0, g.rows(node.input(inputs::X)))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu_grad::gradient(&self.0, io, cpu);
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, gpu: &Properties) -> usize {
        let (x, segments) = (node.input(inputs::X), g.cols(node.input(inputs::SEGMENTS)) - 1);
        let gate = node.inputs[inputs::Z].is_some();
        cuda::gradient_workspace(&self.0, g.rows(x), segments, g.dtype(x), gate, gpu)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(&self.0, io, launcher)
    }
}
