//! The linear time-invariant scan in plain f64, as the formula says it.

use std::ops::Range;

use num_complex::Complex64;

/// Operands of [`lti_scan`], row-major with the shapes of [`super::LtiScan`].
#[derive(Clone, Debug)]
pub struct Operands<'a> {
    /// Channels D.
    pub channels: usize,
    /// `[T, D]`
    pub x: &'a [f64],
    /// `[2M, D]`
    pub a: &'a [f64],
    /// `[2M, D]`
    pub b: &'a [f64],
    /// `[2M, D]`
    pub c: &'a [f64],
    /// u and v, `[2M, D]` each.
    pub rank_one: Option<[&'a [f64]; 2]>,
    /// `[D]`
    pub d: Option<&'a [f64]>,
    /// `[S, 2M·D]`
    pub initial_state: Option<&'a [f64]>,
    /// The rows of each of the S segments.
    pub segments: &'a [Range<usize>],
}

/// y `[T, D]` and the final states `[S, 2M·D]`.
pub fn lti_scan(op: &Operands<'_>) -> (Vec<f64>, Vec<f64>) {
    let (d, width) = (op.channels, op.a.len());
    let pairs = width / 2 / d;
    let mut y = vec![0.0; op.x.len()];
    let mut states = vec![0.0; op.segments.len() * width];
    for (segment, rows) in op.segments.iter().enumerate() {
        for channel in 0..d {
            let places = (0..pairs).map(|m| (2 * m * d + channel, (2 * m + 1) * d + channel));
            let column = |of: &[f64]| -> Vec<Complex64> {
                places.clone().map(|(re, im)| Complex64::new(of[re], of[im])).collect()
            };
            let twice_real = |row: &[Complex64], h: &[Complex64]| -> f64 {
                2.0 * row.iter().zip(h).map(|(r, h)| (r * h).re).sum::<f64>()
            };
            let (a, b, c) = (column(op.a), column(op.b), column(op.c));
            let rank_one = op.rank_one.map(|[u, v]| (column(u), column(v)));
            let initial = op.initial_state.map(|s| column(&s[segment * width..][..width]));
            let mut h = initial.unwrap_or(vec![Complex64::ZERO; pairs]);
            for t in rows.clone() {
                let x = op.x[t * d + channel];
                let w = rank_one.as_ref().map_or(0.0, |(_, v)| twice_real(v, &h));
                for m in 0..pairs {
                    let u = rank_one.as_ref().map_or(Complex64::ZERO, |(u, _)| u[m]);
                    h[m] = a[m] * h[m] + u * w + b[m] * x;
                }
                y[t * d + channel] = twice_real(&c, &h) + op.d.map_or(0.0, |skip| skip[channel]) * x;
            }
            for ((re, im), h) in places.zip(h) {
                let state = &mut states[segment * width..][..width];
                (state[re], state[im]) = (h.re, h.im);
            }
        }
    }
    (y, states)
}
