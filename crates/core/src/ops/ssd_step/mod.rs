//! One step of Mamba-2's recurrence for every token, with the gate behind it and the first half of the gated norm (see
//! [`step_linear`](super::step_linear) for the second). For GPUs; the graphs of CPUs have the single ops.
//!
//! ```text
//! Δ = clamp(softplus(dt + bias));  S' = exp(Δ a) S + Δ x ⊗ B;  v = S' · C + D x               (see ssd)
//! y = v, or v silu(z), or v silu(z) ⊙ weight with the squares of v silu(z) or of v
//! ```

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Mat, Node, Op, TensorId};

const NAME: &str = "ssd_step";

static PROGRAM: Program = Program { name: NAME, source: include_str!("kernel.cu") };

/// Channels of a head that a block of the kernel holds.
const ROWS: usize = 16;
/// States a channel up to which the kernel keeps them in registers.
pub const MOST: usize = 256;

/// What follows the recurrence.
#[derive(Clone, Copy, Debug)]
pub enum Gate {
    /// Nothing.
    None,
    /// silu(z).
    Silu(TensorId),
    /// silu(z), then RMSNorm over all channels with this weight, but for the division by the root.
    SiluThenNorm(TensorId, TensorId),
    /// RMSNorm over all channels with this weight, but for the division by the root, then silu(z).
    NormThenSilu(TensorId, TensorId),
}

/// Operands of a step. T tokens, H heads of P channels, G groups of B and C, N states a channel.
#[derive(Clone, Copy, Debug)]
pub struct SsdStep {
    /// `[T, H·P]`
    pub x: TensorId,
    /// `[T, H]`
    pub dt: TensorId,
    /// `[1, H]` f32, negative.
    pub a: TensorId,
    /// `[T, G·N]`
    pub b: TensorId,
    /// `[T, G·N]`
    pub c: TensorId,
    /// D, a head's or a channel's, f32.
    pub d: Option<TensorId>,
    /// `[1, H]` f32
    pub dt_bias: Option<TensorId>,
    /// Δ is clamped to this range.
    pub dt_limit: (f32, f32),
    /// P
    pub headdim: usize,
    /// N
    pub d_state: usize,
    /// What follows.
    pub gate: Gate,
    /// The states, an external f32 `[S, H·P·N]`; they move on in place.
    pub state: TensorId,
    /// The row of states that each token continues, i32 `[1, T]`; token t continues row t without it.
    pub slots: Option<TensorId>,
}

/// Appends a step; returns y `[T, H·P]` and, where a norm is begun, the parts of the sums of squares.
///
/// # Errors
/// Operands of other shapes or types, more than [`MOST`] states.
pub fn ssd_step(g: &mut Graph, s: SsdStep) -> Result<(TensorId, Option<TensorId>), Error> {
    let (tokens, channels, heads) = (g.rows(s.x), g.cols(s.x), g.cols(s.a));
    let dtype = g.expect_float(NAME, "x", s.x)?;
    g.expect(NAME, "dt", s.dt, dtype, Some(tokens), Some(heads))?;
    g.expect_f32(NAME, "A", s.a, Some(1), None)?;
    g.expect(NAME, "B", s.b, dtype, Some(tokens), None)?;
    let columns = g.cols(s.b);
    g.expect(NAME, "C", s.c, dtype, Some(tokens), Some(columns))?;
    let (n, p) = (s.d_state, s.headdim);
    let groups = columns / n.max(1);
    if n == 0 || n > MOST || groups * n != columns || heads * p != channels || groups == 0 || heads % groups != 0 {
        let message = format!("{channels} channels in {heads} heads of {p}, B of {columns} columns, {n} states");
        return Err(Error::Unsupported { op: NAME, message });
    }
    if let Some(d) = s.d {
        let cols = g.rows(d) * g.cols(d);
        if g.dtype(d) != DType::F32 || cols != heads && cols != channels {
            g.expect_f32(NAME, "D", d, Some(1), Some(heads))?;
        }
    }
    if let Some(bias) = s.dt_bias {
        g.expect_f32(NAME, "the bias of Δ", bias, Some(1), Some(heads))?;
    }
    let (mode, z, weight) = match s.gate {
        Gate::None => (0, None, None),
        Gate::Silu(z) => (1, Some(z), None),
        Gate::SiluThenNorm(z, weight) => (2, Some(z), Some(weight)),
        Gate::NormThenSilu(z, weight) => (3, Some(z), Some(weight)),
    };
    if let Some(z) = z {
        g.expect(NAME, "z", z, dtype, Some(tokens), Some(channels))?;
    }
    if let Some(weight) = weight {
        g.expect_f32(NAME, "the weight of the norm", weight, Some(1), Some(channels))?;
    }
    if let Some(slots) = s.slots {
        g.expect(NAME, "the slots", slots, DType::I32, Some(1), Some(tokens))?;
    }
    let rows = if s.slots.is_some() { None } else { Some(tokens) };
    g.expect_f32(NAME, "the states", s.state, rows, Some(channels * n))?;
    let y = g.new_tensor(dtype, tokens, channels);
    let squares = weight.map(|_| g.new_tensor(DType::F32, tokens, heads * p.div_ceil(ROWS)));
    let next = g.in_place(s.state)?;
    let inputs =
        vec![Some(s.x), Some(s.dt), Some(s.a), Some(s.b), Some(s.c), s.d, s.dt_bias, z, weight, Some(s.state), s.slots];
    let op = Step { mode, headdim: p, d_state: n, groups, dt_limit: s.dt_limit };
    g.push(op, inputs, vec![Some(y), squares, Some(next)]);
    Ok((y, squares))
}

/// Inputs x, dt, A, B, C, D?, dt_bias?, z?, weight?, states, slots?; outputs y, squares?, states.
#[derive(Clone, Copy, Debug)]
struct Step {
    mode: usize,
    headdim: usize,
    d_state: usize,
    groups: usize,
    dt_limit: (f32, f32),
}

impl Op for Step {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let x = node.input(0);
        (g.rows(x) * g.cols(x)) as f64 * (5 * self.d_state) as f64
    }

    fn run_cpu(&self, _: &Io<'_>, _: &Cpu) {
        unreachable!("recorded for GPUs only")
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let [x, dt, a, b, c] = [0, 1, 2, 3, 4].map(|i| io.input(i));
        let (d, state) = (io.optional_input(5), io.input(9));
        let heads = a.cols;
        let fours = |m: &Mat| m.address().is_multiple_of(4 * m.dtype.size() as u64) && m.stride.is_multiple_of(4);
        let v = if self.d_state.is_multiple_of(4) && [&b, &c, &state].into_iter().all(fours) { 4 } else { 1 };
        let skip_each = d.is_some_and(|d| d.rows * d.cols != heads);
        let blocks = heads * self.headdim.div_ceil(ROWS);
        launcher.launch(
            Kernel::new(&PROGRAM, NAME)
                .define_type("T", x.dtype)
                .define("N", self.d_state)
                .define("V", v)
                .define("GATE", self.mode)
                .grid(blocks, x.rows, 1)
                .threads(128)
                .overlapping()
                .args([x.into(), b.into(), c.into(), dt.into(), io.optional_input(7).into(), a.into(), d.into()])
                .args([io.optional_input(6).into(), io.optional_input(8).into(), state.into()])
                .arg(Arg::Ptr(io.optional_input(10).map_or(0, |m| m.address())))
                .args([io.output(0).into(), io.optional_output(1).into()])
                .args([(self.headdim as i32).into(), ((heads / self.groups) as i32).into()])
                .args([i32::from(skip_each).into(), self.dt_limit.0.into(), self.dt_limit.1.into()]),
        )
    }
}
