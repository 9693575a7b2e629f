//! The gates of one token on a CPU: what a step does around the matrix product.

use super::Cell;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::ops::vectors::{each, load, store};

/// A token's forward step. All pointers are to rows: x and a of G·H numbers, the state's h and c in place.
pub(super) struct Forward {
    pub cell: Cell,
    pub units: usize,
    pub x: *const f32,
    pub a: *const f32,
    pub h: *mut f32,
    /// The LSTM's alone.
    pub c: *mut f32,
    pub y: Option<*mut f32>,
    pub kept: Option<*mut f32>,
}

impl Kernel for Forward {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.units;
        each(s, n, |i, lanes| {
            // SAFETY: the caller's rows are as long as the fields say, and only columns that exist are touched.
            unsafe {
                let x = |gate: usize| load(s, self.x.add(gate * n + i), lanes);
                let a = |gate: usize| load(s, self.a.add(gate * n + i), lanes);
                let keep = |place: usize, v: S::V| {
                    if let Some(kept) = self.kept {
                        store(s, kept.add(place * n + i), v, lanes);
                    }
                };
                let sum = |gate: usize| s.add(x(gate), a(gate));
                let h = match self.cell {
                    Cell::Lstm => {
                        let (input, forget) = (math::sigmoid(s, sum(0)), math::sigmoid(s, sum(1)));
                        let (new, out) = (math::tanh(s, sum(2)), math::sigmoid(s, sum(3)));
                        let c = s.fma(forget, load(s, self.c.add(i), lanes), s.mul(input, new));
                        store(s, self.c.add(i), c, lanes);
                        [input, forget, new, out, c].into_iter().enumerate().for_each(|(place, v)| keep(place, v));
                        s.mul(out, math::tanh(s, c))
                    }
                    Cell::Gru => {
                        let (reset, update) = (math::sigmoid(s, sum(0)), math::sigmoid(s, sum(1)));
                        let new = math::tanh(s, s.fma(reset, a(2), x(2)));
                        [reset, update, new, a(2)].into_iter().enumerate().for_each(|(place, v)| keep(place, v));
                        s.fma(update, s.sub(load(s, self.h.add(i), lanes), new), new)
                    }
                };
                store(s, self.h.add(i), h, lanes);
                if let Some(y) = self.y {
                    store(s, y.add(i), h, lanes);
                }
            }
        });
    }
}

/// A token's backward step up to the product da · W, which is still to be added to dh.
pub(super) struct Backward {
    pub cell: Cell,
    pub units: usize,
    pub kept: *const f32,
    /// The state before the token, none where it is zero: the GRU's h, the LSTM's c.
    pub before: Option<*const f32>,
    pub dy: Option<*const f32>,
    /// In: what later tokens want of h. Out: the GRU's share that goes past the product; unchanged for the LSTM.
    pub dh: *mut f32,
    /// The same of c, the LSTM's alone.
    pub dc: *mut f32,
    pub dx: Option<*mut f32>,
    pub da: *mut f32,
}

impl Kernel for Backward {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.units;
        let one = s.splat(1.0);
        each(s, n, |i, lanes| {
            // SAFETY: as above.
            unsafe {
                let kept = |place: usize| load(s, self.kept.add(place * n + i), lanes);
                let optional = |row: Option<*const f32>| row.map_or(s.zero(), |row| load(s, row.add(i), lanes));
                let (before, dy) = (optional(self.before), optional(self.dy));
                let dh = s.add(load(s, self.dh.add(i), lanes), dy);
                // d σ = p (1 − p) and d tanh = 1 − p² of what they give.
                let through_sigmoid = |d: S::V, p: S::V| s.mul(d, s.mul(p, s.sub(one, p)));
                let through_tanh = |d: S::V, p: S::V| s.mul(d, s.fma(s.neg(p), p, one));
                let write = |to: *mut f32, gate: usize, d: S::V| store(s, to.add(gate * n + i), d, lanes);
                match self.cell {
                    Cell::Lstm => {
                        let (input, forget, new, out, c) = (kept(0), kept(1), kept(2), kept(3), kept(4));
                        let tanh_c = math::tanh(s, c);
                        let dc = through_tanh(s.mul(dh, out), tanh_c);
                        let dc = s.add(load(s, self.dc.add(i), lanes), dc);
                        let gates = [
                            through_sigmoid(s.mul(dc, new), input),
                            through_sigmoid(s.mul(dc, before), forget),
                            through_tanh(s.mul(dc, input), new),
                            through_sigmoid(s.mul(dh, tanh_c), out),
                        ];
                        store(s, self.dc.add(i), s.mul(dc, forget), lanes);
                        for (gate, d) in gates.into_iter().enumerate() {
                            write(self.da, gate, d);
                            if let Some(dx) = self.dx {
                                write(dx, gate, d);
                            }
                        }
                    }
                    Cell::Gru => {
                        let (reset, update, new, product) = (kept(0), kept(1), kept(2), kept(3));
                        let d_new = through_tanh(s.mul(dh, s.sub(one, update)), new);
                        let d_update = through_sigmoid(s.mul(dh, s.sub(before, new)), update);
                        let d_reset = through_sigmoid(s.mul(d_new, product), reset);
                        for (gate, d) in [d_reset, d_update, d_new].into_iter().enumerate() {
                            write(self.da, gate, if gate == 2 { s.mul(d, reset) } else { d });
                            if let Some(dx) = self.dx {
                                write(dx, gate, d);
                            }
                        }
                        store(s, self.dh.add(i), s.mul(dh, update), lanes);
                    }
                }
            }
        });
    }
}
