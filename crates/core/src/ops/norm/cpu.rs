//! The norms on the CPU: a task takes some rows; a row's passes after the first run in the nearest cache.

use std::ops::Range;

use super::{Kind, Norm};
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::graph::{Io, Mat};
use crate::ops::vectors::{each, load, splat, store, sum};

/// Elements that one task handles, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

pub(super) fn run(op: &Norm, io: &Io<'_>, cpu: &Cpu) {
    let x = io.input(0);
    let all = Forward {
        op: *op,
        x,
        residual: io.optional_input(1),
        weight: io.optional_input(2),
        bias: io.optional_input(3),
        y: io.optional_output(0),
        s: io.optional_output(1),
        rows: 0..x.rows,
    };
    cpu.pool.chunks(x.rows, (ELEMENTS_PER_TASK / x.cols).max(1), |rows| cpu.isa.run(Forward { rows, ..all }));
}

/// The norm of some rows, which this kernel alone writes.
struct Forward {
    op: Norm,
    x: Mat,
    residual: Option<Mat>,
    weight: Option<Mat>,
    bias: Option<Mat>,
    y: Option<Mat>,
    s: Option<Mat>,
    rows: Range<usize>,
}

impl Kernel for Forward {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n = self.x.cols;
        for r in self.rows {
            // SAFETY: row r lies in all operands, and this task alone writes row r of the outputs, which overlap no
            // input. Weight and bias are one row as wide as x.
            unsafe {
                let mut s = self.x.at::<f32>(r, 0).cast_const();
                if let Some(residual) = self.residual {
                    let residual = residual.at::<f32>(r, 0);
                    // The sum goes where it is wanted; if it is not, y's own row holds it for the moment.
                    let Some(sum) = self.s.or(self.y).map(|m| m.at::<f32>(r, 0)) else { continue };
                    each(simd, n, |i, lanes| {
                        let value = simd.add(load(simd, s.add(i), lanes), load(simd, residual.add(i), lanes));
                        store(simd, sum.add(i), value, lanes);
                    });
                    s = sum;
                }
                let Some(y) = self.y.map(|m| m.at::<f32>(r, 0)) else { continue };
                let (mean, scale) = statistics(simd, &self.op, s, n);
                let (mean, scale) = (simd.splat(mean), simd.splat(scale));
                let weight = self.weight.map(|m| m.ptr::<f32>());
                let bias = self.bias.map(|m| m.ptr::<f32>());
                each(simd, n, |i, lanes| {
                    let mut value = load(simd, s.add(i), lanes);
                    if self.op.kind == Kind::Layer {
                        value = simd.sub(value, mean);
                    }
                    value = simd.mul(value, scale);
                    if let Some(weight) = weight {
                        value = simd.mul(value, load(simd, weight.add(i), lanes));
                    }
                    if let Some(bias) = bias {
                        value = simd.add(value, load(simd, bias.add(i), lanes));
                    }
                    store(simd, y.add(i), value, lanes);
                });
            }
        }
    }
}

/// The mean of a row (0 for RMSNorm, which does not centre) and 1 / √(variance or mean square + ε).
///
/// # Safety
/// `n` numbers can be read from `s`.
#[inline(always)]
pub(super) unsafe fn statistics<S: Simd>(simd: S, op: &Norm, s: *const f32, n: usize) -> (f32, f32) {
    // SAFETY: `sum` asks for lanes below n only.
    unsafe {
        let mean = match op.kind {
            Kind::Rms => 0.0,
            Kind::Layer => sum(simd, n, |i, lanes| load(simd, s.add(i), lanes)) / n as f32,
        };
        let squares = match op.kind {
            Kind::Rms => sum(simd, n, |i, lanes| {
                let v = load(simd, s.add(i), lanes);
                simd.mul(v, v)
            }),
            Kind::Layer => sum(simd, n, |i, lanes| {
                let v = simd.sub(load(simd, s.add(i), lanes), splat(simd, mean, lanes));
                simd.mul(v, v)
            }),
        };
        (mean, 1.0 / (squares / n as f32 + op.eps).sqrt())
    }
}
