//! AdamW on the CPU: a task takes a block of parameters, cut where decay begins or ends.

use std::ops::Range;

use super::reference::Factors;
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::vectors::{each, load, store};

/// Parameters that one task updates.
const BLOCK: usize = 32 * 1024;

pub(super) fn run(decayed: &[Range<usize>], io: &Io<'_>, cpu: &Cpu) {
    // SAFETY: the builder checked that the norm is one f32 and that the hyperparameters are eight.
    let (norm, hyper) = unsafe { (io.input(5).row::<f32>(0)[0], io.input(4).row::<f32>(0)) };
    if !norm.is_finite() {
        return;
    }
    let factors = Factors::new(std::array::from_fn(|i| hyper[i]), norm);
    // The outputs are the inputs 0, 2 and 3, updated in place.
    let (params, m, v) = (io.output(0), io.output(1), io.output(2));
    let grads = io.input(1);
    cpu.pool.chunks(params.cols, BLOCK, |block| {
        let mut next = decayed.partition_point(|r| r.end <= block.start);
        let mut start = block.start;
        while start < block.end {
            let (end, decays) = match decayed.get(next) {
                Some(r) if r.start <= start => (r.end, true),
                Some(r) => (r.start, false),
                None => (block.end, false),
            };
            next += usize::from(decays);
            let range = start..end.min(block.end);
            start = range.end;
            let part = |mat: Mat| mat.columns(range.start, range.len());
            let [params, grads, m, v] = [part(params), part(grads), part(m), part(v)];
            cpu.isa.run(Update { factors, decays, params, grads, m, v });
        }
    });
}

/// A step on some neighbouring parameters, which this kernel alone touches.
struct Update {
    factors: Factors,
    decays: bool,
    params: Mat,
    grads: Mat,
    m: Mat,
    v: Mat,
}

impl Kernel for Update {
    type Output = ();

    /// The operations of [`super::reference::step`] in their order. None is fused, so every level has the same bits.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let f = &self.factors;
        let (clip, eps) = (s.splat(f.clip), s.splat(f.eps));
        let [beta1, beta2, beta1_rest, beta2_rest] = [f.beta1, f.beta2, f.beta1_rest, f.beta2_rest].map(|x| s.splat(x));
        let keep = s.splat(if self.decays { f.keep } else { 1.0 });
        let (step_size, root_correction) = (s.splat(f.step_size), s.splat(f.root_correction));
        let [p_at, g_at, m_at, v_at] = [self.params, self.grads, self.m, self.v].map(|mat| mat.ptr::<f32>());
        each(s, self.params.cols, |i, lanes| {
            // SAFETY: elements i .. i + lanes lie in all four rows, and this task alone touches them.
            unsafe {
                let g = s.mul(load(s, g_at.add(i), lanes), clip);
                let m = s.add(s.mul(beta1, load(s, m_at.add(i), lanes)), s.mul(beta1_rest, g));
                let v = s.add(s.mul(beta2, load(s, v_at.add(i), lanes)), s.mul(s.mul(beta2_rest, g), g));
                let p = s.mul(load(s, p_at.add(i), lanes), keep);
                let root = s.add(s.mul(s.sqrt(v), root_correction), eps);
                let p = s.sub(p, s.mul(step_size, s.div(m, root)));
                store(s, m_at.add(i), m, lanes);
                store(s, v_at.add(i), v, lanes);
                store(s, p_at.add(i), p, lanes);
            }
        });
    }
}
