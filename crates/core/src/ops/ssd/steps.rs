//! The parts of a block that are no matrix products: step sizes, decays, the masked decay matrix, scaled copies.
//!
//! Within a block of `q` rows, cum_t = Σ_{i ≤ t} Δ_i a is the logarithm of the decay since the block's start. It is
//! summed in f64 and kept as the sum of two f32, so that the exponent of a decay exp(cum_t − cum_j) has the precision
//! of the difference and not of the sums.

use super::Dims;
use super::lanes::{load, store};
use super::workspace::Bump;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::graph::Mat;

/// 0, 1, 2, …: the numbers of the lanes.
const LANE_NUMBERS: [f32; MAX_LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

#[inline(always)]
pub(super) fn lane_numbers<S: Simd>(s: S) -> S::V {
    // SAFETY: the array holds MAX_LANES values.
    unsafe { s.load(LANE_NUMBERS.as_ptr()) }
}

/// Step sizes and decays of a block of one head: arrays of `q` values.
#[derive(Clone, Copy)]
pub(super) struct Decay {
    /// Δ
    pub delta: *mut f32,
    /// dΔ / d dt
    pub slope: *mut f32,
    /// cum as the sum of two f32.
    pub high: *mut f32,
    pub low: *mut f32,
    /// exp(cum_t): the decay since before the block's first row.
    pub since_start: *mut f32,
    /// exp(cum_last − cum_t): the decay until the block's last row.
    pub until_end: *mut f32,
}

impl Decay {
    pub fn take(bump: &mut Bump, q: usize) -> Decay {
        let mut next = || bump.take(q);
        Decay { delta: next(), slope: next(), high: next(), low: next(), since_start: next(), until_end: next() }
    }

    /// The decay over the whole block of `q` rows.
    ///
    /// # Safety
    /// The arrays were filled for `q` rows.
    pub unsafe fn whole(&self, q: usize) -> f32 {
        // SAFETY: q > 0 values were written.
        unsafe { *self.since_start.add(q - 1) }
    }
}

/// The inputs of Δ for one head.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub a: f32,
    pub bias: f32,
    pub softplus: bool,
    pub limit: (f32, f32),
}

/// Fills Δ and its slope.
struct StepSizes {
    step: Step,
    q: usize,
    out: Decay,
}

impl Kernel for StepSizes {
    type Output = ();

    /// `out.delta` holds dt.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (lo, hi) = (s.splat(self.step.limit.0), s.splat(self.step.limit.1));
        for t in (0..self.q).step_by(S::LANES) {
            let n = self.q - t;
            // SAFETY: the arrays hold q values.
            unsafe {
                let raw = s.add(load(s, self.out.delta.add(t), n), s.splat(self.step.bias));
                let (value, slope) = if self.step.softplus {
                    (math::softplus(s, raw), math::sigmoid(s, raw))
                } else {
                    (raw, s.splat(1.0))
                };
                // In this order a NaN stays one.
                let delta = s.max(lo, s.min(hi, value));
                let slope = s.select(s.lt(value, lo), s.zero(), s.select(s.gt(value, hi), s.zero(), slope));
                store(s, self.out.delta.add(t), delta, n);
                store(s, self.out.slope.add(t), slope, n);
            }
        }
    }
}

/// Fills the decays from cum (`high`, `low`) and the exponents of `until_end`.
struct Exponentials {
    q: usize,
    out: Decay,
}

impl Kernel for Exponentials {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for t in (0..self.q).step_by(S::LANES) {
            let n = self.q - t;
            // SAFETY: the arrays hold q values.
            unsafe {
                store(s, self.out.since_start.add(t), math::exp(s, load(s, self.out.high.add(t), n)), n);
                store(s, self.out.until_end.add(t), math::exp(s, load(s, self.out.until_end.add(t), n)), n);
            }
        }
    }
}

/// Fills the step sizes and decays of `q` rows of `dt` from row `t` on, column `head`.
///
/// # Safety
/// The rows lie inside `dt`, nobody writes them, and the arrays of `out` hold `q > 0` values.
pub(super) unsafe fn decays(isa: crate::cpu::Isa, step: Step, dt: Mat, t: usize, head: usize, q: usize, out: Decay) {
    // SAFETY: the caller vouches for all operands.
    unsafe {
        for i in 0..q {
            *out.delta.add(i) = *dt.at::<f32>(t + i, head);
        }
        isa.run(StepSizes { step, q, out });
        let mut cum = 0.0f64;
        for i in 0..q {
            cum += f64::from(*out.delta.add(i)) * f64::from(step.a);
            let high = cum as f32;
            *out.high.add(i) = high;
            // An infinite sum has no rest.
            *out.low.add(i) = if high.is_finite() { (cum - f64::from(high)) as f32 } else { 0.0 };
        }
        for i in 0..q {
            let sum = f64::from(*out.high.add(i)) + f64::from(*out.low.add(i));
            *out.until_end.add(i) = if i + 1 == q { 0.0 } else { (cum - sum) as f32 };
        }
        isa.run(Exponentials { q, out });
    }
}

/// exp(cum_t − cum_j), lane by lane.
#[inline(always)]
pub(super) fn decay_between<S: Simd>(s: S, (t_high, t_low): (S::V, S::V), (j_high, j_low): (S::V, S::V)) -> S::V {
    math::exp(s, s.add(s.sub(t_high, j_high), s.sub(t_low, j_low)))
}

/// M[t, j] = G[t, j] · exp(cum_t − cum_j) for j ≤ t, zero as far as the band of the product reads. G and M have rows
/// of `row` elements.
pub(super) struct MaskedDecay {
    pub q: usize,
    pub decay: Decay,
    pub g: *const f32,
    pub m: *mut f32,
    pub row: usize,
}

impl Kernel for MaskedDecay {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let numbers = lane_numbers(s);
        for t in 0..self.q {
            // SAFETY: t < q; columns below `row`, which is a whole number of vectors, lie inside G and M.
            unsafe {
                let at_t = (s.splat(*self.decay.high.add(t)), s.splat(*self.decay.low.add(t)));
                let end = (t + super::product::TILE_ROWS).min(self.row);
                for j in (0..end).step_by(S::LANES) {
                    let at_j = (s.load(self.decay.high.add(j)), s.load(self.decay.low.add(j)));
                    let decay = decay_between(s, at_t, at_j);
                    let value = s.mul(s.load(self.g.add(t * self.row + j)), decay);
                    let after = s.gt(numbers, s.splat(t as f32 - j as f32));
                    s.store(self.m.add(t * self.row + j), s.select(after, s.zero(), value));
                }
            }
        }
    }
}

/// Copies rows of a matrix to rows of `cols` elements without gaps, times a factor for each row if given.
pub(super) struct CopyRows {
    pub from: *const f32,
    pub from_row: usize,
    pub rows: usize,
    pub cols: usize,
    pub factor: Option<*const f32>,
    pub to: *mut f32,
}

impl Kernel for CopyRows {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.rows {
            // SAFETY: row r and the columns below `cols` lie inside both matrices.
            unsafe {
                let factor = s.splat(self.factor.map_or(1.0, |f| *f.add(r)));
                for c in (0..self.cols).step_by(S::LANES) {
                    let v = load(s, self.from.add(r * self.from_row + c), self.cols - c);
                    store(s, self.to.add(r * self.cols + c), s.mul(factor, v), self.cols - c);
                }
            }
        }
    }
}

/// y += D ⊙ x and y ⊙= silu(z) on a block of rows of one head.
pub(super) struct Finish {
    pub rows: usize,
    pub cols: usize,
    pub y: (*mut f32, usize),
    pub x: (*const f32, usize),
    pub d: Option<Skip>,
    pub z: Option<(*const f32, usize)>,
}

/// D of one head: one value, or one for each channel.
#[derive(Clone, Copy)]
pub(super) enum Skip {
    Head(f32),
    Channels(*const f32),
}

impl Skip {
    /// D of the channels from `c` on, `n` of them.
    ///
    /// # Safety
    /// They exist.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(self, s: S, c: usize, n: usize) -> S::V {
        match self {
            Skip::Head(d) => s.splat(d),
            // SAFETY: the caller keeps c and n inside the head.
            Skip::Channels(d) => unsafe { load(s, d.add(c), n) },
        }
    }
}

impl Kernel for Finish {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.rows {
            for c in (0..self.cols).step_by(S::LANES) {
                let n = self.cols - c;
                // SAFETY: row r and the columns below `cols` lie inside the matrices.
                unsafe {
                    let at = self.y.0.add(r * self.y.1 + c);
                    let mut y = load(s, at, n);
                    if let Some(d) = self.d {
                        y = s.fma(d.load(s, c, n), load(s, self.x.0.add(r * self.x.1 + c), n), y);
                    }
                    if let Some((z, z_row)) = self.z {
                        y = s.mul(y, math::silu(s, load(s, z.add(r * z_row + c), n)));
                    }
                    store(s, at, y, n);
                }
            }
        }
    }
}

/// A few rows by the plain recurrence: S ← exp(Δ a) S + Δ x ⊗ B, y = S C, row after row. The state is `[P, N]`.
pub(super) struct Recurrence {
    pub rows: usize,
    pub headdim: usize,
    pub d_state: usize,
    pub step: Step,
    pub decay: Decay,
    /// The state before the rows; zero if null. May be `state`.
    pub from: *const f32,
    pub state: *mut f32,
    pub x: (*const f32, usize),
    pub b: (*const f32, usize),
    pub c: (*const f32, usize),
    pub y: Option<(*mut f32, usize)>,
}

/// Rows of the state that are updated together, for instruction-level parallelism.
const STATE_ROWS: usize = 4;

impl Kernel for Recurrence {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (p, n) = (self.headdim, self.d_state);
        for t in 0..self.rows {
            // SAFETY: t is one of the rows of all operands; rows of the state are below P, its columns below N.
            unsafe {
                let from = if t == 0 { self.from } else { self.state };
                let delta = *self.decay.delta.add(t);
                let decay = s.splat(math::scalar(s, delta * self.step.a, math::exp));
                let (b, c) = (self.b.0.add(t * self.b.1), self.c.0.add(t * self.c.1));
                for first in (0..p).step_by(STATE_ROWS) {
                    let rows = STATE_ROWS.min(p - first);
                    let mut sums = [s.zero(); STATE_ROWS];
                    for at in (0..n).step_by(S::LANES) {
                        let (b, c) = (load(s, b.add(at), n - at), load(s, c.add(at), n - at));
                        for (i, sum) in sums.iter_mut().enumerate().take(rows) {
                            let place = (first + i) * n + at;
                            let input = s.splat(delta * *self.x.0.add(t * self.x.1 + first + i));
                            let old = if from.is_null() { s.zero() } else { load(s, from.add(place), n - at) };
                            let new = s.fma(input, b, s.mul(decay, old));
                            store(s, self.state.add(place), new, n - at);
                            *sum = s.fma(new, c, *sum);
                        }
                    }
                    if let Some((y, y_row)) = self.y {
                        for (i, sum) in sums.iter().enumerate().take(rows) {
                            *y.add(t * y_row + first + i) = s.reduce_add(*sum);
                        }
                    }
                }
            }
        }
    }
}

impl Dims {
    /// The inputs of Δ for `head`.
    ///
    /// # Safety
    /// `a` and `bias` are the op's inputs.
    pub unsafe fn step(&self, a: Mat, bias: Option<Mat>, head: usize) -> Step {
        // SAFETY: the builder checked that both have one value for each head.
        unsafe {
            Step {
                a: *a.at::<f32>(0, head),
                bias: bias.map_or(0.0, |b| *b.at::<f32>(0, head)),
                softplus: self.softplus,
                limit: self.dt_limit,
            }
        }
    }

    /// D of `head`.
    ///
    /// # Safety
    /// `d` is the op's input.
    pub unsafe fn skip(&self, d: Option<Mat>, head: usize) -> Option<Skip> {
        // SAFETY: the builder checked that D has one value for each head or each channel.
        d.map(|d| unsafe {
            if self.d_per_channel {
                Skip::Channels(d.at::<f32>(0, head * self.headdim))
            } else {
                Skip::Head(*d.at::<f32>(0, head))
            }
        })
    }
}
