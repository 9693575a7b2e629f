//! One block of a set of heads, walked backwards: the products and the terms of log a.

use super::super::lanes::Transpose;
use super::super::product::{Band, Init, Product};
use super::super::steps::{CopyRows, Finish, decays};
use super::steps::{AddTo, Dot, GateGradient, GradientInputs, InputGradient, PairGradient, RowDots};
use super::{Gradient, Scratch};
use crate::graph::Mat;

/// A block of one head.
#[derive(Clone, Copy)]
struct Block {
    segment: usize,
    /// The segment's place in its batch.
    of_batch: usize,
    head: usize,
    /// First row and rows.
    t: usize,
    q: usize,
    /// The block's number from the segment's start and from its end.
    index: usize,
    back: usize,
    /// Whether the head is its set's first.
    is_first: bool,
}

impl Gradient<'_> {
    /// One block for a set of heads: `back` blocks from the segment's end, `(first row, rows, index)`.
    ///
    /// # Safety
    /// The scratch memory is the caller's own, and nobody else has these heads of this segment.
    pub(super) unsafe fn walk_back(
        &self,
        first: usize,
        of_batch: usize,
        set: usize,
        back: usize,
        (t, q, index): (usize, usize, usize),
        scratch: &Scratch,
    ) {
        let (dims, isa, n, row) = (self.dims, self.isa, self.dims.d_state, scratch.row);
        let (group, heads) = self.cut.set(dims, set);
        let [db, dc] = self.partials(of_batch, set);
        let Scratch { b, c, c_transposed, g, dg, .. } = *scratch;
        // SAFETY: the caller's promises; the scratch arrays hold blocks of q rows.
        unsafe {
            self.copy_rows(self.b, group * n, t, q, b);
            self.copy_rows(self.c, group * n, t, q, c);
            isa.run(Transpose { from: c, from_row: n, rows: q, cols: n, to: c_transposed, to_row: row });
            isa.run(Product {
                m: q,
                n: q,
                k: n,
                a: b,
                a_row: n,
                a_col: 1,
                b: c_transposed,
                b_row: row,
                out: g,
                out_row: row,
                init: Init::Zero,
                band: Band::UpperResult,
            });
            for (i, head) in heads.enumerate() {
                let block = Block { segment: first + of_batch, of_batch, head, t, q, index, back, is_first: i == 0 };
                self.head(&block, db, dc, scratch);
            }
            // Within the block: dB += dG C, dC += dGᵀ B, dG having rows j.
            let add = |m| Init::Scaled { from: m, row: n, by: 1.0 };
            let common = Product {
                m: q,
                n,
                k: q,
                a: dg,
                a_row: row,
                a_col: 1,
                b: c,
                b_row: n,
                out: db,
                out_row: n,
                init: add(db.cast_const()),
                band: Band::UpperA,
            };
            if self.dc.is_some() {
                let init = add(dc.cast_const());
                isa.run(Product { a_row: 1, a_col: row, b, out: dc, init, band: Band::LowerA, ..common });
            }
            if self.db.is_some() {
                isa.run(common);
            }
        }
    }

    /// One block of one head. Adds to the set's dB and dC (or sets them), and to dG in the scratch memory.
    ///
    /// # Safety
    /// As [`Gradient::walk_back`], which has filled b, c and g.
    unsafe fn head(&self, block: &Block, db: *mut f32, dc: *mut f32, scratch: &Scratch) {
        let Block { segment, of_batch, head, t, q, index, back, is_first } = *block;
        let (dims, isa, p, n, row) = (self.dims, self.isa, self.dims.headdim, self.dims.d_state, scratch.row);
        let Scratch { decay, b, c, g, k, m, dg, x, x_until_end, dy, dy_since_start, du, dy_transposed, .. } = *scratch;
        let d_state = self.d_state(of_batch, head);
        // Without these, terms of the old or of the new state are zero.
        let has_new = back > 0 || self.d_last.is_some();
        let has_old = index > 0 || self.initial.is_some();
        // SAFETY: the caller's promises; the scratch arrays hold blocks of q rows.
        unsafe {
            let step = dims.step(self.a, self.bias, head);
            decays(isa, step, self.dt, t, head, q, decay);
            let at = |m: Mat| (m.at::<f32>(t, head * p).cast_const(), m.stride);
            let at_mut = |m: Mat| (m.at::<f32>(t, head * p), m.stride);
            isa.run(GradientInputs {
                rows: q,
                cols: p,
                decay,
                x: at(self.x),
                dy: self.dy.map(at),
                z: self.z.map(at),
                x_copy: x,
                x_until_end,
                dy_copy: dy,
                dy_since_start,
            });
            let old_state = self.load_state(block, scratch);

            isa.run(Transpose { from: dy, from_row: p, rows: q, cols: p, to: dy_transposed, to_row: row });
            isa.run(Product {
                m: q,
                n: q,
                k: p,
                a: x,
                a_row: p,
                a_col: 1,
                b: dy_transposed,
                b_row: row,
                out: k,
                out_row: row,
                init: Init::Zero,
                band: Band::UpperResult,
            });
            let (prefix, astride) = (scratch.prefix, scratch.astride);
            isa.run(PairGradient { q, decay, g, k, m, dg, first: is_first, prefix, astride, row });
            if let (Some(z), Some(dz)) = (self.z, self.dz) {
                self.gate(head, at(z), at_mut(dz), t, q, has_old.then_some(old_state), scratch);
            }

            let mut init = Init::Zero;
            if has_new {
                let transposed = scratch.transposed;
                isa.run(Transpose { from: d_state, from_row: n, rows: p, cols: n, to: transposed, to_row: p });
                isa.run(Product {
                    m: q,
                    n: p,
                    k: n,
                    a: b,
                    a_row: n,
                    a_col: 1,
                    b: transposed,
                    b_row: p,
                    out: du,
                    out_row: p,
                    init: Init::Zero,
                    band: Band::Full,
                });
                isa.run(RowDots { rows: q, cols: p, a: x_until_end, b: du, out: scratch.new });
                init = Init::ScaledRows { from: du, row: p, by: decay.until_end };
            }
            isa.run(Product {
                m: q,
                n: p,
                k: q,
                a: m,
                a_row: row,
                a_col: 1,
                b: dy,
                b_row: p,
                out: du,
                out_row: p,
                init,
                band: Band::UpperA,
            });
            let (d, dx) = (dims.skip(self.d, head), self.dx.map(at_mut));
            isa.run(InputGradient {
                rows: q,
                cols: p,
                decay,
                x,
                dy,
                du,
                d,
                dx,
                d_delta: scratch.d_delta,
                dd: scratch.dd,
            });

            self.state_terms(old_state, has_old, d_state, has_new, is_first, q, db, dc, scratch);
            let through = if has_old && has_new {
                decay.whole(q) * isa.run(Dot { a: d_state, b: old_state, len: dims.state() })
            } else {
                0.0
            };
            if index > 0 || self.d_initial.is_some() {
                let by = decay.whole(q);
                isa.run(Product {
                    m: p,
                    n,
                    k: q,
                    a: dy_since_start,
                    a_row: 1,
                    a_col: p,
                    b: c,
                    b_row: n,
                    out: d_state,
                    out_row: n,
                    init: if has_new { Init::Scaled { from: d_state, row: n, by } } else { Init::Zero },
                    band: Band::Full,
                });
            }
            self.step_sizes(segment, head, t, q, step.a, (has_old, has_new, through), scratch);
        }
    }

    /// The state before a block, where products may read it; garbage if it is zero.
    ///
    /// # Safety
    /// As [`Gradient::walk_back`].
    unsafe fn load_state(&self, block: &Block, scratch: &Scratch) -> *const f32 {
        if block.index > 0 {
            return self.state_before(block.segment, block.index, block.head);
        }
        if let Some(initial) = self.initial {
            let len = self.dims.state();
            // SAFETY: the segment and the head exist, and the scratch memory holds a state.
            unsafe {
                let from = initial.at::<f32>(block.segment, block.head * len).cast_const();
                std::ptr::copy_nonoverlapping(from, scratch.state, len);
            }
        }
        scratch.state
    }

    /// Computes y before the gate again, and the gradient of the gate.
    ///
    /// # Safety
    /// As [`Gradient::head`]; the rows' `m` is filled.
    #[allow(clippy::too_many_arguments)]
    unsafe fn gate(
        &self,
        head: usize,
        z: (*const f32, usize),
        dz: (*mut f32, usize),
        t: usize,
        q: usize,
        old_state: Option<*const f32>,
        scratch: &Scratch,
    ) {
        let (dims, isa, p, n) = (self.dims, self.isa, self.dims.headdim, self.dims.d_state);
        // u lies where the gradient of u will be.
        let Scratch { decay, c, m, x, y, du: u, transposed, row, .. } = *scratch;
        // SAFETY: the caller's promises.
        unsafe {
            let mut init = Init::Zero;
            if let Some(from) = old_state {
                isa.run(Transpose { from, from_row: n, rows: p, cols: n, to: transposed, to_row: p });
                isa.run(Product {
                    m: q,
                    n: p,
                    k: n,
                    a: c,
                    a_row: n,
                    a_col: 1,
                    b: transposed,
                    b_row: p,
                    out: y,
                    out_row: p,
                    init,
                    band: Band::Full,
                });
                init = Init::ScaledRows { from: y, row: p, by: decay.since_start };
            }
            isa.run(CopyRows { from: x, from_row: p, rows: q, cols: p, factor: Some(decay.delta), to: u });
            isa.run(Product {
                m: q,
                n: p,
                k: q,
                a: m,
                a_row: 1,
                a_col: row,
                b: u,
                b_row: p,
                out: y,
                out_row: p,
                init,
                band: Band::LowerA,
            });
            let d = dims.skip(self.d, head);
            isa.run(Finish { rows: q, cols: p, y: (y, p), x: (x, p), d, z: None });
            let dy = self.dy.map(|dy| (dy.at::<f32>(t, head * p).cast_const(), dy.stride));
            match dy {
                Some(dy) => isa.run(GateGradient { rows: q, cols: p, y, dy, z, dz }),
                None => {
                    for r in 0..q {
                        std::slice::from_raw_parts_mut(dz.0.add(r * dz.1), p).fill(0.0);
                    }
                }
            }
        }
    }

    /// What the states before and after a block say of C and B.
    ///
    /// # Safety
    /// As [`Gradient::head`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn state_terms(
        &self,
        old_state: *const f32,
        has_old: bool,
        d_state: *const f32,
        has_new: bool,
        is_first: bool,
        q: usize,
        db: *mut f32,
        dc: *mut f32,
        scratch: &Scratch,
    ) {
        let (isa, p, n) = (self.isa, self.dims.headdim, self.dims.d_state);
        // SAFETY: the caller's promises.
        unsafe {
            let product = Product {
                m: q,
                n,
                k: p,
                a: scratch.dy_since_start,
                a_row: p,
                a_col: 1,
                b: old_state,
                b_row: n,
                out: if is_first { dc } else { scratch.dc },
                out_row: n,
                init: Init::Zero,
                band: Band::Full,
            };
            if has_old {
                let out = product.out;
                isa.run(Product { ..product });
                isa.run(RowDots { rows: q, cols: n, a: scratch.c, b: out, out: scratch.old });
                if !is_first {
                    isa.run(AddTo { from: out, to: dc, len: q * n });
                }
            } else if is_first {
                std::slice::from_raw_parts_mut(dc, q * n).fill(0.0);
            }
            if has_new {
                let init = if is_first { Init::Zero } else { Init::Scaled { from: db, row: n, by: 1.0 } };
                isa.run(Product { a: scratch.x_until_end, b: d_state, out: db, init, ..product });
            } else if is_first {
                std::slice::from_raw_parts_mut(db, q * n).fill(0.0);
            }
        }
    }

    /// The gradients of Δ, dt, its bias and a, from the terms of log a.
    ///
    /// # Safety
    /// As [`Gradient::head`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn step_sizes(
        &self,
        segment: usize,
        head: usize,
        t: usize,
        q: usize,
        a: f32,
        (has_old, has_new, through): (bool, bool, f32),
        scratch: &Scratch,
    ) {
        // SAFETY: the caller's promises; all arrays hold q values.
        unsafe {
            let slice = |from: *mut f32| std::slice::from_raw_parts_mut(from, q);
            let (delta, slope) = (slice(scratch.decay.delta), slice(scratch.decay.slope));
            let (old, new, astride) = (slice(scratch.old), slice(scratch.new), slice(scratch.astride));
            let d_delta = slice(scratch.d_delta);
            // The new state's terms of rows before t, and, walking back, the old state's of rows from t on.
            let mut before = 0.0f64;
            for i in 0..q {
                let here = if has_new { f64::from(new[i]) } else { 0.0 };
                astride[i] += (before + f64::from(through)) as f32;
                before += here;
            }
            let (mut after, mut da, mut d_bias) = (0.0f64, 0.0f64, 0.0f64);
            for i in (0..q).rev() {
                if has_old {
                    after += f64::from(old[i]);
                }
                let d_log_a = f64::from(astride[i]) + after;
                let d_dt = (f64::from(d_delta[i]) + f64::from(a) * d_log_a) * f64::from(slope[i]);
                da += f64::from(delta[i]) * d_log_a;
                d_bias += d_dt;
                if let Some(to) = self.d_dt {
                    *to.at::<f32>(t + i, head) = d_dt as f32;
                }
            }
            let place = segment * self.dims.heads + head;
            *self.shared.da.add(place) += da as f32;
            *self.shared.d_bias.add(place) += d_bias as f32;
            let p = self.dims.headdim;
            if self.d.is_some() {
                let sums = std::slice::from_raw_parts_mut(self.shared.dd.add(place * p), p);
                let block = std::slice::from_raw_parts(scratch.dd, p);
                sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
            }
        }
    }
}
