//! The norms in plain f64: what the kernels are tested against.

/// RMSNorm: y = s / √(mean(s²) + ε) ⊙ weight with s = x + residual. Returns (y, s).
///
/// `x` holds rows of `width` numbers; an absent residual counts as zeros, an absent weight as ones.
pub fn rms_norm(
    x: &[f64],
    width: usize,
    residual: Option<&[f64]>,
    weight: Option<&[f64]>,
    eps: f64,
) -> (Vec<f64>, Vec<f64>) {
    let s = sum(x, residual);
    let mut y = Vec::with_capacity(s.len());
    for row in s.chunks_exact(width) {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
        let scale = 1.0 / (mean_square + eps).sqrt();
        y.extend((0..width).map(|c| row[c] * scale * weight.map_or(1.0, |w| w[c])));
    }
    (y, s)
}

/// LayerNorm: y = (s − mean(s)) / √(var(s) + ε) ⊙ weight + bias with s = x + residual. Returns (y, s).
///
/// `x` holds rows of `weight.len()` numbers; an absent residual counts as zeros.
pub fn layer_norm(x: &[f64], residual: Option<&[f64]>, weight: &[f64], bias: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let s = sum(x, residual);
    let mut y = Vec::with_capacity(s.len());
    for row in s.chunks_exact(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (variance + eps).sqrt();
        y.extend((0..width).map(|c| (row[c] - mean) * scale * weight[c] + bias[c]));
    }
    (y, s)
}

fn sum(x: &[f64], residual: Option<&[f64]>) -> Vec<f64> {
    match residual {
        Some(residual) => x.iter().zip(residual).map(|(a, b)| a + b).collect(),
        None => x.to_vec(),
    }
}
