//! From the parameters of S4D and S4 to the coefficients of [`super::lti_scan`], with the gradient.
//!
//! Per channel with step Δ = exp(log_dt) and, for M pairs of states, λ = −exp(log_a_real) + i·a_imag:
//!
//! ```text
//! zero-order hold    ā = exp(Δλ)          b̄ = (exp(Δλ) − 1)/λ · b
//! bilinear           ā = 2E − 1           b̄ = ΔE b                            E = 1/(1 − Δλ/2)
//! bilinear with p    ā = 2E − 1           b̄ = ΔE (b − γ ρ p)                  γ = 1/(2/Δ + 2 Re(p* · E p))
//!                    u = −2γ E p          v = E p*                            ρ = 2 Re(p* · E b)
//! ```
//!
//! The last is the bilinear transform of A = Λ − P P* (S4's normal plus low rank form): with I − ΔA/2 = E⁻¹ + Δ/2 P P*,
//! Woodbury's identity gives (I − ΔA/2)⁻¹ = E − γ (EP)(P*E), and Ā = 2 (I − ΔA/2)⁻¹ − I. Sums over states take both
//! halves of the conjugate pairs, hence twice a real part. Sources: Gu, Goel & Ré, S4 (arXiv 2111.00396), appendix C.2;
//! Gu et al., S4D (arXiv 2206.11893), section 3 and its parametrisation of A.
//!
//! Everything is computed in f64 and rounded once.

mod cpu;
mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

const NAME: &str = "lti_discretise";

/// How the continuous model becomes a recurrence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The zero-order hold: exact where the input is constant between samples.
    Zoh,
    /// Trapezoids, also called Tustin's method.
    Bilinear,
}

/// Operands and options of [`lti_discretise`]: f32, M pairs of states, D channels. Complex operands are `[2M, D]`, real and
/// imaginary part of a pair in neighbouring rows.
#[derive(Clone, Copy, Debug)]
pub struct LtiDiscretise {
    /// log(−Re λ) `[M, D]`.
    pub log_a_real: TensorId,
    /// Im λ `[M, D]`.
    pub a_imag: TensorId,
    /// log Δ `[1, D]`.
    pub log_dt: TensorId,
    /// B `[2M, D]`; 1 if not given.
    pub b: Option<TensorId>,
    /// P of the rank-one part `[2M, D]`, with the bilinear method only.
    pub p: Option<TensorId>,
    /// How.
    pub method: Method,
}

/// Results of [`lti_discretise`], each `[2M, D]`.
#[derive(Clone, Copy, Debug)]
pub struct Discrete {
    pub a: TensorId,
    pub b: TensorId,
    /// u and v, where there is a P.
    pub rank_one: Option<[TensorId; 2]>,
}

/// Appends the discretisation. Differentiable in all operands.
///
/// # Errors
/// An operand of another shape or type; P with the zero-order hold, for which there is no such form.
pub fn lti_discretise(g: &mut Graph, operands: LtiDiscretise) -> Result<Discrete, Error> {
    let LtiDiscretise { log_a_real, a_imag, log_dt, b, p, method } = operands;
    let (pairs, channels) = (g.rows(log_a_real), g.cols(log_a_real));
    for (what, t, rows) in [
        ("log_a_real", Some(log_a_real), pairs),
        ("a_imag", Some(a_imag), pairs),
        ("log_dt", Some(log_dt), 1),
        ("B", b, 2 * pairs),
        ("P", p, 2 * pairs),
    ] {
        if let Some(t) = t {
            g.expect_f32(NAME, what, t, Some(rows), Some(channels))?;
        }
    }
    if p.is_some() && method == Method::Zoh {
        let message = "a diagonal plus P P* is discretised by the bilinear method only".into();
        return Err(Error::Unsupported { op: NAME, message });
    }
    let outputs: Vec<_> =
        (0..if p.is_some() { 4 } else { 2 }).map(|_| Some(g.new_tensor(DType::F32, 2 * pairs, channels))).collect();
    let made = |i: usize| outputs.get(i).copied().flatten();
    let rank_one = made(2).zip(made(3)).map(|(u, v)| [u, v]);
    let (Some(a_bar), Some(b_bar)) = (made(0), made(1)) else { unreachable!("two outputs at least") };
    g.push(Forward { method }, vec![Some(log_a_real), Some(a_imag), Some(log_dt), b, p], outputs);
    Ok(Discrete { a: a_bar, b: b_bar, rank_one })
}

// Inputs of both ops.
const LOG_A_REAL: usize = 0;
const A_IMAG: usize = 1;
const LOG_DT: usize = 2;
const B: usize = 3;
const P: usize = 4;

/// Inputs: those above. Outputs: ā, b̄ and, with P, u and v.
#[derive(Clone, Copy, Debug)]
struct Forward {
    method: Method,
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
        if d_outputs.iter().all(Option::is_none) {
            return Ok(vec![None; node.inputs.len()]);
        }
        let gradients: Vec<_> = node
            .inputs
            .iter()
            .zip(wanted)
            .map(|(input, wanted)| input.filter(|_| *wanted).map(|t| g.new_tensor(DType::F32, g.rows(t), g.cols(t))))
            .collect();
        let mut inputs = node.inputs.clone();
        inputs.extend(d_outputs);
        inputs.resize(Gradient::D_OUTPUTS + 4, None);
        g.push(Gradient { method: self.method }, inputs, gradients.clone());
        Ok(gradients)
    }

    /// About 30 operations a pair, of which the exponential counts as one.
    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (30 * g.rows(node.input(LOG_A_REAL)) * g.cols(node.input(LOG_A_REAL))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run(self.method, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self.method, io, launcher)
    }
}

/// Inputs: those above, the gradients of ā, b̄, u, v. Outputs: the gradients of the forward op's inputs, in their order.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    method: Method,
}

impl Gradient {
    const D_OUTPUTS: usize = 5;
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        "lti_discretise_grad"
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (100 * g.rows(node.input(LOG_A_REAL)) * g.cols(node.input(LOG_A_REAL))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        cpu::run_grad(self.method, io, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run_grad(self.method, io, launcher)
    }
}
