//! The causal convolution in plain f64, as the formula says it.

use std::ops::Range;

/// Operands of [`causal_conv1d`], row-major with the shapes of [`super::CausalConv1d`].
#[derive(Clone, Debug)]
pub struct Operands<'a> {
    /// Channels D.
    pub channels: usize,
    /// `[T, D]`
    pub x: &'a [f64],
    /// `[D, W]`
    pub weight: &'a [f64],
    /// `[D]`
    pub bias: Option<&'a [f64]>,
    /// `[S, (W−1)·D]`, oldest first.
    pub initial_state: Option<&'a [f64]>,
    /// The rows of each of the S segments.
    pub segments: &'a [Range<usize>],
    pub silu: bool,
}

/// y `[T, D]` and the final states `[S, (W−1)·D]`.
pub fn causal_conv1d(op: &Operands<'_>) -> (Vec<f64>, Vec<f64>) {
    let d = op.channels;
    let width = op.weight.len() / d;
    let mut y = vec![0.0; op.x.len()];
    let mut states = Vec::new();
    for (segment, rows) in op.segments.iter().enumerate() {
        // The W−1 inputs before the segment, then its own.
        let mut inputs = vec![0.0; (width - 1) * d];
        if let Some(initial) = op.initial_state {
            inputs.copy_from_slice(&initial[segment * (width - 1) * d..][..(width - 1) * d]);
        }
        inputs.extend(&op.x[rows.start * d..rows.end * d]);
        for t in 0..rows.len() {
            for channel in 0..d {
                let taps = (0..width).map(|k| op.weight[channel * width + k] * inputs[(t + k) * d + channel]);
                let sum = op.bias.map_or(0.0, |bias| bias[channel]) + taps.sum::<f64>();
                y[(rows.start + t) * d + channel] = if op.silu { sum / (1.0 + (-sum).exp()) } else { sum };
            }
        }
        states.extend(&inputs[rows.len() * d..]);
    }
    (y, states)
}
