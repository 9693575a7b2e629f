//! Attention in plain f64, as the formula says it.

use std::ops::Range;

/// Operands of [`attention`], row-major with the shapes of [`super::Attention`].
#[derive(Clone, Debug)]
pub struct Operands<'a> {
    pub q: &'a [f64],
    pub k: &'a [f64],
    pub v: &'a [f64],
    pub heads: usize,
    pub kv_heads: usize,
    pub headdim: usize,
    pub window: usize,
    /// The rows of each segment.
    pub segments: &'a [Range<usize>],
    /// For each segment the keys and values before it, oldest first, `[n, G·P]` each.
    pub before: &'a [(Vec<f64>, Vec<f64>)],
}

/// y `[T, H·P]`.
pub fn attention(op: &Operands<'_>) -> Vec<f64> {
    let (p, width, kv_width) = (op.headdim, op.heads * op.headdim, op.kv_heads * op.headdim);
    let mut y = vec![0.0; op.q.len()];
    for (segment, rows) in op.segments.iter().enumerate() {
        let (mut keys, mut values) = op.before.get(segment).cloned().unwrap_or_default();
        for t in rows.clone() {
            keys.extend(&op.k[t * kv_width..][..kv_width]);
            values.extend(&op.v[t * kv_width..][..kv_width]);
            let seen = keys.len() / kv_width;
            for head in 0..op.heads {
                let col = head / (op.heads / op.kv_heads) * p;
                let q = &op.q[t * width + head * p..][..p];
                let first = seen.saturating_sub(op.window);
                let dot = |j: usize| q.iter().zip(&keys[j * kv_width + col..]).map(|(q, k)| q * k).sum::<f64>();
                let scores: Vec<f64> = (first..seen).map(|j| dot(j) / (p as f64).sqrt()).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for (j, s) in (first..seen).zip(&scores) {
                    for i in 0..p {
                        y[t * width + head * p + i] += (s - top).exp() / total * values[j * kv_width + col + i];
                    }
                }
            }
        }
    }
    y
}
