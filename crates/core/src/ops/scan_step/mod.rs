//! One step of the selective scan for every token, with the projection to Δ before it and the gate behind it. For GPUs;
//! the graphs of CPUs have the single ops.
//!
//! ```text
//! Δ = softplus(dt · W_Δᵀ + bias);  h' = exp(Δ A) h + Δ B x;  y = (C · h' + D x) silu(z)       (see selective_scan)
//! ```
//!
//! dt, B and C are columns of one tensor `[T, R + 2 N]`, in Falcon-Mamba each through an RMSNorm without weight.

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

const NAME: &str = "scan_step";

static PROGRAM: Program = Program { name: NAME, source: include_str!("kernel.cu") };

/// States a channel and rank of Δ up to which the kernel keeps them in registers and shared memory.
pub const MOST: usize = 256;

/// Operands of a step. T tokens, D channels, N states, rank R; activations and the projection's weight have one type.
#[derive(Clone, Copy, Debug)]
pub struct ScanStep {
    /// `[T, D]`
    pub x: TensorId,
    /// The gate before silu `[T, D]`.
    pub z: TensorId,
    /// dt before the projection, B and C `[T, R + 2 N]` f32.
    pub dt_b_c: TensorId,
    /// ε of the norms on the three, if there are any.
    pub norm_eps: Option<f32>,
    /// Projection to Δ `[D, R]`.
    pub dt_weight: TensorId,
    /// `[1, D]` f32
    pub dt_bias: Option<TensorId>,
    /// A `[D, N]` f32, negative.
    pub a: TensorId,
    /// D `[1, D]` f32
    pub d: Option<TensorId>,
    /// The states, an external f32 `[S, N·D]`, state-major; they move on in place.
    pub state: TensorId,
    /// The row of states that each token continues, i32 `[1, T]`; token t continues row t without it.
    pub slots: Option<TensorId>,
}

/// Appends a step; returns y `[T, D]`.
///
/// # Errors
/// Operands of other shapes or types, more than [`MOST`] states.
pub fn scan_step(g: &mut Graph, s: ScanStep) -> Result<TensorId, Error> {
    let (tokens, channels) = (g.rows(s.x), g.cols(s.x));
    let (n, r) = (g.cols(s.a), g.cols(s.dt_weight));
    let dtype = g.expect_float(NAME, "x", s.x)?;
    g.expect(NAME, "z", s.z, dtype, Some(tokens), Some(channels))?;
    g.expect_f32(NAME, "Δ, B and C", s.dt_b_c, Some(tokens), Some(r + 2 * n))?;
    g.expect(NAME, "the projection's weight", s.dt_weight, dtype, Some(channels), None)?;
    g.expect_f32(NAME, "A", s.a, Some(channels), None)?;
    for (what, t) in [("the bias of Δ", s.dt_bias), ("D", s.d)] {
        if let Some(t) = t {
            g.expect_f32(NAME, what, t, Some(1), Some(channels))?;
        }
    }
    if n == 0 || n > MOST || r == 0 || r > MOST {
        let message = format!("{n} states and rank {r}, but each must be from 1 to {MOST}");
        return Err(Error::Unsupported { op: NAME, message });
    }
    if let Some(slots) = s.slots {
        g.expect(NAME, "the slots", slots, DType::I32, Some(1), Some(tokens))?;
    }
    let rows = if s.slots.is_some() { None } else { Some(tokens) };
    g.expect_f32(NAME, "the states", s.state, rows, Some(n * channels))?;
    let y = g.new_tensor(dtype, tokens, channels);
    let next = g.in_place(s.state)?;
    let inputs = vec![
        Some(s.x),
        Some(s.z),
        Some(s.dt_b_c),
        Some(s.dt_weight),
        s.dt_bias,
        Some(s.a),
        s.d,
        Some(s.state),
        s.slots,
    ];
    g.push(Step { norm_eps: s.norm_eps }, inputs, vec![Some(y), Some(next)]);
    Ok(y)
}

/// Inputs x, z, dt_b_c, dt_weight, dt_bias?, A, D?, states, slots?; outputs y, states.
#[derive(Clone, Copy, Debug)]
struct Step {
    norm_eps: Option<f32>,
}

impl Op for Step {
    fn name(&self) -> &'static str {
        NAME
    }

    /// As the scan's, and the projection.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let (x, weight, a) = (node.input(0), node.input(3), node.input(5));
        (g.rows(x) * g.cols(x)) as f64 * (7 * g.cols(a) + 2 * g.cols(weight)) as f64
    }

    fn run_cpu(&self, _: &Io<'_>, _: &Cpu) {
        unreachable!("recorded for GPUs only")
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let [x, z, parts, dt_weight] = [0, 1, 2, 3].map(|i| io.input(i));
        let (a, state) = (io.input(5), io.input(7));
        // More tokens share the weights of a block, and their states are under way together.
        let tokens = match x.rows {
            0..=8 => 1,
            9..=16 => 2,
            _ => 4,
        };
        let tokens = if a.cols > 64 { 1 } else { tokens };
        let blocks = [x.cols.div_ceil(32), x.rows.div_ceil(tokens)];
        launcher.launch(
            Kernel::new(&PROGRAM, NAME)
                .define_type("T", x.dtype)
                .define("N", a.cols)
                .define("R", dt_weight.cols)
                .define("TOKENS", tokens)
                .define("NORM", i32::from(self.norm_eps.is_some()))
                .grid(blocks[0], blocks[1], 1)
                .threads(128)
                .overlapping()
                .args([x.into(), z.into(), parts.into(), dt_weight.into(), io.optional_input(4).into(), a.into()])
                .args([io.optional_input(6).into(), state.into()])
                .arg(Arg::Ptr(io.optional_input(8).map_or(0, |m| m.address())))
                .args([io.output(0).into(), x.rows.into(), x.cols.into(), self.norm_eps.unwrap_or(0.0).into()]),
        )
    }
}
