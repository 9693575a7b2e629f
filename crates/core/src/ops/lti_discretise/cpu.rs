//! The discretisation and its gradient on a CPU: a task takes some channels, one after another, in f64.

use num_complex::Complex64;

use super::reference::{Channel, discretise, inverse, low_rank_sums, phi, phi_slope};
use super::{A_IMAG, B, Gradient, LOG_A_REAL, LOG_DT, Method, P};
use crate::cpu::Cpu;
use crate::graph::{Io, Mat};

/// Channels of a task.
const CHANNELS: usize = 16;

#[derive(Clone, Copy)]
struct Inputs {
    log_a_real: Mat,
    a_imag: Mat,
    log_dt: Mat,
    b: Option<Mat>,
    p: Option<Mat>,
}

/// The numbers of one channel in a matrix of complex numbers.
///
/// # Safety
/// The channel is a column, and nobody writes it meanwhile.
unsafe fn column(m: Mat, channel: usize) -> Vec<Complex64> {
    // SAFETY: rows come in pairs.
    let at = |row| f64::from(unsafe { *m.at::<f32>(row, channel) });
    (0..m.rows / 2).map(|pair| Complex64::new(at(2 * pair), at(2 * pair + 1))).collect()
}

/// The inverse of [`column`], rounded.
///
/// # Safety
/// This task alone uses the column.
unsafe fn set_column(m: Option<Mat>, channel: usize, values: &[Complex64]) {
    let Some(m) = m else { return };
    for (pair, value) in values.iter().enumerate() {
        // SAFETY: as the caller says.
        unsafe {
            *m.at::<f32>(2 * pair, channel) = value.re as f32;
            *m.at::<f32>(2 * pair + 1, channel) = value.im as f32;
        }
    }
}

impl Inputs {
    fn new(io: &Io<'_>) -> Inputs {
        Inputs {
            log_a_real: io.input(LOG_A_REAL),
            a_imag: io.input(A_IMAG),
            log_dt: io.input(LOG_DT),
            b: io.optional_input(B),
            p: io.optional_input(P),
        }
    }

    /// # Safety
    /// The channel exists.
    unsafe fn channel(&self, channel: usize) -> Channel {
        // SAFETY: the builder checked the shapes; inputs do not change.
        unsafe {
            let at = |m: Mat, row| f64::from(*m.at::<f32>(row, channel));
            let pairs = self.a_imag.rows;
            Channel {
                lambda: (0..pairs).map(|m| Complex64::new(-at(self.log_a_real, m).exp(), at(self.a_imag, m))).collect(),
                delta: at(self.log_dt, 0).exp(),
                b: self.b.map_or(vec![Complex64::ONE; pairs], |b| column(b, channel)),
                p: self.p.map(|p| column(p, channel)),
            }
        }
    }
}

pub(super) fn run(method: Method, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let [a, b, u, v] = [0, 1, 2, 3].map(|i| io.optional_output(i));
    cpu.pool.chunks(inputs.log_dt.cols, CHANNELS, |channels| {
        for channel in channels {
            // SAFETY: this task alone has the channel.
            unsafe {
                let made = discretise(method, &inputs.channel(channel));
                for (m, values) in [(a, &made.a), (b, &made.b), (u, &made.u), (v, &made.v)] {
                    set_column(m, channel, values);
                }
            }
        }
    });
}

pub(super) fn run_grad(method: Method, io: &Io<'_>, cpu: &Cpu) {
    let inputs = Inputs::new(io);
    let given = [0, 1, 2, 3].map(|i| io.optional_input(Gradient::D_OUTPUTS + i));
    let [d_log_a_real, d_a_imag, d_log_dt, db, dp] = [LOG_A_REAL, A_IMAG, LOG_DT, B, P].map(|i| io.optional_output(i));
    let pairs = inputs.a_imag.rows;
    cpu.pool.chunks(inputs.log_dt.cols, CHANNELS, |channels| {
        for channel in channels {
            // SAFETY: this task alone has the channel; inputs do not change.
            unsafe {
                let parameters = inputs.channel(channel);
                let given = given.map(|m| m.map_or(vec![Complex64::ZERO; pairs], |m| column(m, channel)));
                let gradient = match method {
                    Method::Zoh => zoh_gradient(&parameters, &given),
                    Method::Bilinear => bilinear_gradient(&parameters, &given),
                };
                for (m, d) in gradient.lambda.iter().enumerate() {
                    if let Some(out) = d_log_a_real {
                        *out.at::<f32>(m, channel) = (d.re * parameters.lambda[m].re) as f32;
                    }
                    if let Some(out) = d_a_imag {
                        *out.at::<f32>(m, channel) = d.im as f32;
                    }
                }
                if let Some(out) = d_log_dt {
                    *out.at::<f32>(0, channel) = (gradient.delta * parameters.delta) as f32;
                }
                set_column(db, channel, &gradient.b);
                set_column(dp, channel, gradient.p.as_deref().unwrap_or_default());
            }
        }
    });
}

/// The real part of a* · b: how a real number changes that multiplies a, where b is the gradient of the product.
fn real(a: Complex64, b: Complex64) -> f64 {
    (a.conj() * b).re
}

/// Gradients are ∂L/∂Re + i ∂L/∂Im, so that of the argument of an analytic function is the conjugate of its slope times
/// that of its value.
fn zoh_gradient(channel: &Channel, [da, db, ..]: &[Vec<Complex64>; 4]) -> Channel {
    let mut gradient = zero(channel);
    for (m, lambda) in channel.lambda.iter().enumerate() {
        let (delta, b) = (channel.delta, channel.b[m]);
        let z = lambda * delta;
        let dz = z.exp().conj() * da[m] + (delta * phi_slope(z) * b).conj() * db[m];
        gradient.lambda[m] = delta * dz;
        gradient.delta += real(*lambda, dz) + real(phi(z) * b, db[m]);
        gradient.b[m] = (delta * phi(z)).conj() * db[m];
    }
    gradient
}

/// With q = b − γρp: the formulas of [`super`] from their ends to their beginnings.
fn bilinear_gradient(channel: &Channel, [da, db, du, dv]: &[Vec<Complex64>; 4]) -> Channel {
    let mut gradient = zero(channel);
    let Channel { lambda, delta, b, p } = channel;
    let delta = *delta;
    let e: Vec<Complex64> = lambda.iter().map(|l| inverse(l * delta)).collect();
    let mut de: Vec<Complex64> = da.iter().map(|d| 2.0 * d).collect();
    let zeros = vec![Complex64::ZERO; b.len()];
    let low_rank = p.as_ref();
    let p = low_rank.unwrap_or(&zeros);
    let (gamma, rho) = low_rank_sums(delta, &e, b, p);
    let mut dp = zeros.clone();
    let (mut d_gamma, mut d_rho) = (0.0, 0.0);
    for m in 0..b.len() {
        let q = b[m] - gamma * rho * p[m];
        let dq = (delta * e[m]).conj() * db[m];
        de[m] += (delta * q).conj() * db[m] - 2.0 * gamma * p[m].conj() * du[m] + p[m] * dv[m];
        gradient.delta += real(e[m] * q, db[m]);
        gradient.b[m] = dq;
        dp[m] = -gamma * rho * dq - 2.0 * gamma * e[m].conj() * du[m] + e[m] * dv[m].conj();
        d_gamma += -rho * real(p[m], dq) - 2.0 * real(e[m] * p[m], du[m]);
        d_rho -= gamma * real(p[m], dq);
    }
    // γ is one over a sum.
    let d_sum = -gamma * gamma * d_gamma;
    gradient.delta -= d_sum * 2.0 / (delta * delta);
    for m in 0..b.len() {
        gradient.b[m] += 2.0 * d_rho * p[m] * e[m].conj();
        dp[m] += 2.0 * d_rho * e[m] * b[m] + 4.0 * d_sum * e[m].re * p[m];
        de[m] += 2.0 * d_rho * p[m] * b[m].conj() + 2.0 * d_sum * p[m].norm_sqr();
        let dz = (e[m] * e[m] / 2.0).conj() * de[m];
        gradient.lambda[m] = delta * dz;
        gradient.delta += real(lambda[m], dz);
    }
    gradient.p = low_rank.map(|_| dp);
    gradient
}

fn zero(channel: &Channel) -> Channel {
    let zeros = vec![Complex64::ZERO; channel.lambda.len()];
    Channel { lambda: zeros.clone(), delta: 0.0, b: zeros, p: None }
}
