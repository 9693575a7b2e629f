//! The selective scan in plain f64, as the formula says it.

use super::Discretisation;
use std::ops::Range;

/// Operands of [`selective_scan`], row-major with the shapes of [`super::SelectiveScan`].
#[derive(Clone, Debug)]
pub struct Operands<'a> {
    /// Channels D.
    pub channels: usize,
    /// States per channel N.
    pub d_state: usize,
    /// Groups G that share B and C.
    pub groups: usize,
    /// `[T, D]`
    pub x: &'a [f64],
    /// `[T, D]`, before bias and softplus.
    pub dt: &'a [f64],
    /// `[D, N]`
    pub a: &'a [f64],
    /// `[T, G·N]`
    pub b: &'a [f64],
    /// `[T, G·N]`
    pub c: &'a [f64],
    /// `[D]`
    pub d: Option<&'a [f64]>,
    /// `[T, D]`
    pub z: Option<&'a [f64]>,
    /// `[D]`
    pub dt_bias: Option<&'a [f64]>,
    /// `[S, N·D]`, state-major.
    pub initial_state: Option<&'a [f64]>,
    /// The rows of each of the S segments.
    pub segments: &'a [Range<usize>],
    pub softplus: bool,
    pub discretisation: Discretisation,
}

/// y `[T, D]` and the final states `[S, N·D]`.
pub fn selective_scan(op: &Operands<'_>) -> (Vec<f64>, Vec<f64>) {
    let (d, n) = (op.channels, op.d_state);
    let group_width = d / op.groups;
    let mut y = vec![0.0; op.x.len()];
    let mut states = vec![0.0; op.segments.len() * n * d];
    if let Some(initial) = op.initial_state {
        states.copy_from_slice(initial);
    }
    for (segment, rows) in op.segments.iter().enumerate() {
        let h = &mut states[segment * n * d..][..n * d];
        for t in rows.clone() {
            for channel in 0..d {
                let x = op.x[t * d + channel];
                let dt = op.dt[t * d + channel] + op.dt_bias.map_or(0.0, |bias| bias[channel]);
                let delta = if op.softplus { softplus(dt) } else { dt };
                let mut sum = op.d.map_or(0.0, |skip| skip[channel] * x);
                for state in 0..n {
                    let a = op.a[channel * n + state];
                    let col = (t * op.groups + channel / group_width) * n + state;
                    let b_bar = match op.discretisation {
                        Discretisation::Euler => delta * op.b[col],
                        Discretisation::Zoh if a == 0.0 => delta * op.b[col],
                        Discretisation::Zoh => (delta * a).exp_m1() / a * op.b[col],
                    };
                    let h = &mut h[state * d + channel];
                    *h = (delta * a).exp() * *h + b_bar * x;
                    sum += op.c[col] * *h;
                }
                let gate = op.z.map_or(1.0, |z| silu(z[t * d + channel]));
                y[t * d + channel] = sum * gate;
            }
        }
    }
    (y, states)
}

fn softplus(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
