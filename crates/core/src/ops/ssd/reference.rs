//! The recurrence in f64, one step at a time: what [`super::ssd`] computes.

/// Sizes and options of [`ssd`].
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// H.
    pub heads: usize,
    /// P.
    pub headdim: usize,
    /// N.
    pub d_state: usize,
    /// G.
    pub groups: usize,
    /// Whether softplus is applied to dt + dt_bias.
    pub softplus: bool,
    /// The least and the largest Δ.
    pub dt_limit: (f64, f64),
}

/// Row-major inputs; see [`super::Ssd`] for their shapes. `d` has H or H·P values.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    pub x: &'a [f64],
    pub dt: &'a [f64],
    pub a: &'a [f64],
    pub b: &'a [f64],
    pub c: &'a [f64],
    pub d: Option<&'a [f64]>,
    pub z: Option<&'a [f64]>,
    pub dt_bias: Option<&'a [f64]>,
    pub initial_state: Option<&'a [f64]>,
    pub segments: &'a [usize],
}

/// y `[T, H·P]` and the final states `[S, H·P·N]`.
pub fn ssd(shape: &Shape, inputs: &Inputs<'_>) -> (Vec<f64>, Vec<f64>) {
    let Shape { heads, headdim, d_state, groups, .. } = *shape;
    let segments = inputs.segments.len() - 1;
    let state_len = heads * headdim * d_state;
    let mut y = vec![0.0; inputs.x.len()];
    let mut states = inputs.initial_state.map_or_else(|| vec![0.0; segments * state_len], <[f64]>::to_vec);
    for s in 0..segments {
        for h in 0..heads {
            let group = h / (heads / groups);
            let state = &mut states[s * state_len + h * headdim * d_state..][..headdim * d_state];
            for t in inputs.segments[s]..inputs.segments[s + 1] {
                let raw = inputs.dt[t * heads + h] + inputs.dt_bias.map_or(0.0, |bias| bias[h]);
                // ln(1 + eˣ) = max(x, 0) + ln(1 + e^−|x|)
                let positive = if shape.softplus { raw.max(0.0) + (-raw.abs()).exp().ln_1p() } else { raw };
                let delta = positive.clamp(shape.dt_limit.0, shape.dt_limit.1);
                let decay = (delta * inputs.a[h]).exp();
                let b = &inputs.b[(t * groups + group) * d_state..][..d_state];
                let c = &inputs.c[(t * groups + group) * d_state..][..d_state];
                for p in 0..headdim {
                    let channel = h * headdim + p;
                    let x = inputs.x[t * heads * headdim + channel];
                    let mut sum = 0.0;
                    for n in 0..d_state {
                        let element = &mut state[p * d_state + n];
                        *element = decay * *element + delta * x * b[n];
                        sum += *element * c[n];
                    }
                    if let Some(d) = inputs.d {
                        sum += x * if d.len() == heads { d[h] } else { d[channel] };
                    }
                    if let Some(z) = inputs.z {
                        let gate = z[t * heads * headdim + channel];
                        sum *= gate / (1.0 + (-gate).exp());
                    }
                    y[t * heads * headdim + channel] = sum;
                }
            }
        }
    }
    (y, states)
}
