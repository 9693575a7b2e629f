//! The parts of a block's gradient that are no matrix products.

use super::super::lanes::{load, store};
use super::super::product::TILE_ROWS;
use super::super::steps::{Decay, Skip, decay_between, lane_numbers};
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;

/// What the pairs (j, t ≥ j) of a block contribute to the gradient. All matrices have rows j of `row` elements, lanes
/// along t.
pub(super) struct PairGradient {
    pub q: usize,
    pub decay: Decay,
    /// G[j, t] = C_t · B_j
    pub g: *const f32,
    /// K[j, t] = dy_t · x_j
    pub k: *const f32,
    /// Out: M[j, t] = exp(cum_t − cum_j) G[j, t].
    pub m: *mut f32,
    /// Out: Δ_j exp(cum_t − cum_j) K[j, t], the gradient of G; added to what is there unless `first`.
    pub dg: *mut f32,
    pub first: bool,
    /// Scratch: `row` values.
    pub prefix: *mut f32,
    /// Out: Σ_{s ≥ t} Σ_{j < t} q_sj with q_sj = dG · G: what the pairs astride t say of log a_t.
    pub astride: *mut f32,
    pub row: usize,
}

impl Kernel for PairGradient {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let numbers = lane_numbers(s);
        // SAFETY: j < q, and columns below `row`, which is a whole number of vectors, lie inside the matrices.
        unsafe {
            std::slice::from_raw_parts_mut(self.prefix, self.row).fill(0.0);
            *self.astride = 0.0;
            for j in 0..self.q {
                let at_j = (s.splat(*self.decay.high.add(j)), s.splat(*self.decay.low.add(j)));
                let delta = s.splat(*self.decay.delta.add(j));
                let start = (j + 1).saturating_sub(TILE_ROWS) / S::LANES * S::LANES;
                let mut sum = s.zero();
                for t in (start..self.q).step_by(S::LANES) {
                    let place = j * self.row + t;
                    let at_t = (s.load(self.decay.high.add(t)), s.load(self.decay.low.add(t)));
                    let number = s.add(numbers, s.splat(t as f32));
                    let decay = decay_between(s, at_t, at_j);
                    // Zero before j and past the block's end, where the operands are garbage.
                    let inside = |v: S::V| {
                        let v = s.select(s.lt(number, s.splat(j as f32)), s.zero(), v);
                        s.select(s.lt(number, s.splat(self.q as f32)), v, s.zero())
                    };
                    let g = s.load(self.g.add(place));
                    let dg = inside(s.mul(s.mul(delta, decay), s.load(self.k.add(place))));
                    s.store(self.m.add(place), inside(s.mul(decay, g)));
                    let pair = inside(s.mul(dg, g));
                    let prefix = s.add(s.load(self.prefix.add(t)), pair);
                    s.store(self.prefix.add(t), prefix);
                    sum = s.add(sum, s.select(s.gt(number, s.splat(j as f32)), prefix, s.zero()));
                    let dg = if self.first { dg } else { s.add(s.load(self.dg.add(place)), dg) };
                    s.store(self.dg.add(place), dg);
                }
                if j + 1 < self.q {
                    *self.astride.add(j + 1) = s.reduce_add(sum);
                }
            }
        }
    }
}

/// What a block of one head reads of x, z and dy, as rows of P elements without gaps.
pub(super) struct GradientInputs {
    pub rows: usize,
    pub cols: usize,
    pub decay: Decay,
    pub x: (*const f32, usize),
    /// The gradient of the output; zero if None.
    pub dy: Option<(*const f32, usize)>,
    pub z: Option<(*const f32, usize)>,
    /// Out: x.
    pub x_copy: *mut f32,
    /// Out: Δ_t exp(cum_last − cum_t) x_t.
    pub x_until_end: *mut f32,
    /// Out: dy before the gate.
    pub dy_copy: *mut f32,
    /// Out: exp(cum_t) dy_t, dy before the gate.
    pub dy_since_start: *mut f32,
}

impl Kernel for GradientInputs {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.rows {
            // SAFETY: row r and the columns below `cols` lie inside all operands.
            unsafe {
                let since = s.splat(*self.decay.since_start.add(r));
                let until = s.mul(s.splat(*self.decay.until_end.add(r)), s.splat(*self.decay.delta.add(r)));
                for c in (0..self.cols).step_by(S::LANES) {
                    let n = self.cols - c;
                    let to = r * self.cols + c;
                    let x = load(s, self.x.0.add(r * self.x.1 + c), n);
                    store(s, self.x_copy.add(to), x, n);
                    store(s, self.x_until_end.add(to), s.mul(until, x), n);
                    let mut dy = self.dy.map_or(s.zero(), |(dy, row)| load(s, dy.add(r * row + c), n));
                    if let Some((z, row)) = self.z {
                        dy = s.mul(dy, math::silu(s, load(s, z.add(r * row + c), n)));
                    }
                    store(s, self.dy_copy.add(to), dy, n);
                    store(s, self.dy_since_start.add(to), s.mul(since, dy), n);
                }
            }
        }
    }
}

/// dz = dy ⊙ y ⊙ silu'(z) with y before the gate, which lies without gaps.
pub(super) struct GateGradient {
    pub rows: usize,
    pub cols: usize,
    pub y: *const f32,
    pub dy: (*const f32, usize),
    pub z: (*const f32, usize),
    pub dz: (*mut f32, usize),
}

impl Kernel for GateGradient {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.rows {
            for c in (0..self.cols).step_by(S::LANES) {
                let n = self.cols - c;
                // SAFETY: row r and the columns below `cols` lie inside all operands.
                unsafe {
                    let dy = load(s, self.dy.0.add(r * self.dy.1 + c), n);
                    let y = load(s, self.y.add(r * self.cols + c), n);
                    let slope = math::dsilu(s, load(s, self.z.0.add(r * self.z.1 + c), n));
                    store(s, self.dz.0.add(r * self.dz.1 + c), s.mul(s.mul(dy, y), slope), n);
                }
            }
        }
    }
}

/// dx_t = Δ_t du_t + D dy_t, the sums du_t · x_t (for dΔ_t), and the gradient of D per channel.
pub(super) struct InputGradient {
    pub rows: usize,
    pub cols: usize,
    pub decay: Decay,
    pub x: *const f32,
    pub dy: *const f32,
    /// The gradient of u = Δ x.
    pub du: *const f32,
    pub d: Option<Skip>,
    pub dx: Option<(*mut f32, usize)>,
    pub d_delta: *mut f32,
    /// dy · x of each channel over the rows.
    pub dd: *mut f32,
}

impl Kernel for InputGradient {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: rows below `rows` and columns below `cols` lie inside all operands.
        unsafe {
            std::slice::from_raw_parts_mut(self.dd, self.cols).fill(0.0);
            for r in 0..self.rows {
                let delta = s.splat(*self.decay.delta.add(r));
                let mut sum = s.zero();
                for c in (0..self.cols).step_by(S::LANES) {
                    let (n, at) = (self.cols - c, r * self.cols + c);
                    let (x, du) = (load(s, self.x.add(at), n), load(s, self.du.add(at), n));
                    sum = s.fma(x, du, sum);
                    let mut dx = s.mul(delta, du);
                    if let Some(d) = self.d {
                        let dy = load(s, self.dy.add(at), n);
                        dx = s.fma(d.load(s, c, n), dy, dx);
                        store(s, self.dd.add(c), s.fma(x, dy, load(s, self.dd.add(c), n)), n);
                    }
                    if let Some((to, row)) = self.dx {
                        store(s, to.add(r * row + c), dx, n);
                    }
                }
                *self.d_delta.add(r) = s.reduce_add(sum);
            }
        }
    }
}

/// out_r = Σ_c a_rc · b_rc over rows without gaps.
pub(super) struct RowDots {
    pub rows: usize,
    pub cols: usize,
    pub a: *const f32,
    pub b: *const f32,
    pub out: *mut f32,
}

impl Kernel for RowDots {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.rows {
            let mut sum = s.zero();
            // SAFETY: row r and the columns below `cols` lie inside both matrices.
            unsafe {
                for c in (0..self.cols).step_by(S::LANES) {
                    let at = r * self.cols + c;
                    sum = s.fma(load(s, self.a.add(at), self.cols - c), load(s, self.b.add(at), self.cols - c), sum);
                }
                *self.out.add(r) = s.reduce_add(sum);
            }
        }
    }
}

/// Σ a_i b_i.
pub(super) struct Dot {
    pub a: *const f32,
    pub b: *const f32,
    pub len: usize,
}

impl Kernel for Dot {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); 4];
        for (i, at) in (0..self.len).step_by(S::LANES).enumerate() {
            let n = self.len - at;
            // SAFETY: `len` values lie behind both pointers.
            unsafe { sums[i % 4] = s.fma(load(s, self.a.add(at), n), load(s, self.b.add(at), n), sums[i % 4]) }
        }
        s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

/// to += from.
pub(super) struct AddTo {
    pub from: *const f32,
    pub to: *mut f32,
    pub len: usize,
}

impl Kernel for AddTo {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for at in (0..self.len).step_by(S::LANES) {
            let n = self.len - at;
            // SAFETY: `len` values lie behind both pointers.
            unsafe {
                let sum = s.add(load(s, self.to.add(at), n), load(s, self.from.add(at), n));
                store(s, self.to.add(at), sum, n);
            }
        }
    }
}
