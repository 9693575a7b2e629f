//! Kernels over blocks of rows.

use super::Options;
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::{Simd, Twice};
use crate::graph::{Io, Mat};
use crate::ops::elementwise::Partials;
use crate::ops::ssd::lanes::{load, store};

/// Rows of one task of the forward pass.
const ROWS_PER_TASK: usize = 16;
/// Rows whose part of the weight's gradient one task adds up; a constant, so that the grouping does not depend on the
/// number of threads.
const ROWS_PER_SUM: usize = 32;

pub(super) fn forward(options: &Options, io: &Io<'_>, cpu: &Cpu) {
    let (x, z, weight, y) = (io.input(0), io.input(1), io.optional_input(2), io.output(0));
    cpu.pool.chunks(x.rows, ROWS_PER_TASK, |rows| {
        for r in rows {
            // SAFETY: row r exists in all operands, inputs do not change, and this task alone writes row r.
            let row = unsafe { Row::new(options, x, z, weight, r) };
            // SAFETY: as above.
            cpu.isa.run(ForwardRow { row, y: unsafe { y.at(r, 0) } });
        }
    });
}

pub(super) fn gradient_workspace(rows: usize, cols: usize) -> usize {
    // Parts of the weight's gradient, and n and dn of a group for each task.
    rows.div_ceil(ROWS_PER_SUM) * 3 * cols * 4
}

pub(super) fn gradient(options: &Options, io: &Io<'_>, cpu: &Cpu) {
    let (x, z, weight, dy) = (io.input(0), io.input(1), io.optional_input(2), io.input(3));
    let (dx, dz, dweight) = (io.optional_output(0), io.optional_output(1), io.optional_output(2));
    let blocks = x.rows.div_ceil(ROWS_PER_SUM);
    let memory = Partials::new(io.workspace(), 3 * blocks, x.cols);
    cpu.pool.run(blocks, |block| {
        // SAFETY: task `block` alone has these rows of the workspace.
        let [sum, normed, d_normed] = [0, 1, 2].map(|i| unsafe { memory.row_mut(i * blocks + block) });
        sum.fill(0.0);
        for r in block * ROWS_PER_SUM..((block + 1) * ROWS_PER_SUM).min(x.rows) {
            // SAFETY: row r exists in all operands, inputs do not change, and this task alone writes row r.
            unsafe {
                cpu.isa.run(GradientRow {
                    row: Row::new(options, x, z, weight, r),
                    dy: dy.at(r, 0),
                    dx: dx.map(|m| m.at(r, 0)),
                    dz: dz.map(|m| m.at(r, 0)),
                    dweight: dweight.map(|_| sum.as_mut_ptr()),
                    normed: normed.as_mut_ptr(),
                    d_normed: d_normed.as_mut_ptr(),
                });
            }
        }
    });
    if let Some(out) = dweight {
        // SAFETY: the tasks are done; nobody else writes the output.
        let total = unsafe { out.row_mut::<f32>(0) };
        total.fill(0.0);
        for block in 0..blocks {
            // SAFETY: the tasks that wrote the parts are done.
            let part = unsafe { memory.row_mut(block) };
            total.iter_mut().zip(part).for_each(|(total, part)| *total += *part);
        }
    }
}

/// The inputs of one row.
#[derive(Clone, Copy)]
struct Row {
    cols: usize,
    group: usize,
    eps: f32,
    norm_first: bool,
    x: *const f32,
    z: *const f32,
    weight: Option<*const f32>,
}

impl Row {
    /// # Safety
    /// Row `r` exists.
    unsafe fn new(options: &Options, x: Mat, z: Mat, weight: Option<Mat>, r: usize) -> Row {
        // SAFETY: the caller vouches for the row; a weight has one row of as many columns.
        unsafe {
            Row {
                cols: x.cols,
                group: options.group_size,
                eps: options.eps,
                norm_first: options.norm_before_gate,
                x: x.at(r, 0),
                z: z.at(r, 0),
                weight: weight.map(|w| w.at::<f32>(0, 0).cast_const()),
            }
        }
    }

    /// The weights of columns from `at` on.
    ///
    /// # Safety
    /// `min(n, LANES)` columns follow `at`.
    #[inline(always)]
    unsafe fn weight<S: Simd>(&self, s: S, at: usize, n: usize) -> S::V {
        // SAFETY: the caller vouches for the columns.
        self.weight.map_or(s.splat(1.0), |w| unsafe { load(s, w.add(at), n) })
    }

    /// 1 / √(mean + ε) for a sum of squares over a group.
    #[inline(always)]
    fn scale(&self, squares: f32) -> f32 {
        1.0 / (squares / self.group as f32 + self.eps).sqrt()
    }
}

struct ForwardRow {
    row: Row,
    y: *mut f32,
}

impl Kernel for ForwardRow {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.row(Twice(s));
    }
}

impl ForwardRow {
    #[inline(always)]
    fn row<S: Simd>(self, s: S) {
        let row = self.row;
        for start in (0..row.cols).step_by(row.group) {
            let end = start + row.group;
            let mut squares = s.zero();
            for at in (start..end).step_by(S::LANES) {
                // SAFETY: columns at .. end lie inside the row of all operands.
                unsafe {
                    let n = end - at;
                    let mut v = load(s, row.x.add(at), n);
                    if !row.norm_first {
                        // Kept in the output until the mean is known.
                        v = s.mul(v, math::silu(s, load(s, row.z.add(at), n)));
                        store(s, self.y.add(at), v, n);
                    }
                    squares = s.fma(v, v, squares);
                }
            }
            let scale = s.splat(row.scale(s.reduce_add(squares)));
            for at in (start..end).step_by(S::LANES) {
                // SAFETY: as above.
                unsafe {
                    let n = end - at;
                    let y = if row.norm_first {
                        let gate = math::silu(s, load(s, row.z.add(at), n));
                        s.mul(s.mul(s.mul(load(s, row.x.add(at), n), scale), row.weight(s, at, n)), gate)
                    } else {
                        s.mul(s.mul(load(s, self.y.add(at), n), scale), row.weight(s, at, n))
                    };
                    store(s, self.y.add(at), y, n);
                }
            }
        }
    }
}

struct GradientRow {
    row: Row,
    dy: *const f32,
    dx: Option<*mut f32>,
    dz: Option<*mut f32>,
    /// Sums of the weight's gradient.
    dweight: Option<*mut f32>,
    /// Scratch: a group of v or n, and of dn.
    normed: *mut f32,
    d_normed: *mut f32,
}

impl Kernel for GradientRow {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let row = self.row;
        for start in (0..row.cols).step_by(row.group) {
            let end = start + row.group;
            let mut squares = s.zero();
            let mut dots = s.zero();
            for at in (start..end).step_by(S::LANES) {
                // SAFETY: columns at .. end lie inside the row of all operands, and at − start inside a group.
                unsafe {
                    let n = end - at;
                    let gate = math::silu(s, load(s, row.z.add(at), n));
                    let mut v = load(s, row.x.add(at), n);
                    let mut dn = s.mul(load(s, self.dy.add(at), n), row.weight(s, at, n));
                    if row.norm_first {
                        dn = s.mul(dn, gate);
                    } else {
                        v = s.mul(v, gate);
                    }
                    store(s, self.normed.add(at - start), v, n);
                    store(s, self.d_normed.add(at - start), dn, n);
                    squares = s.fma(v, v, squares);
                    dots = s.fma(v, dn, dots);
                }
            }
            let scale = row.scale(s.reduce_add(squares));
            // mean(dn ⊙ n), with n = scale · v
            let mean = s.splat(s.reduce_add(dots) * scale / row.group as f32);
            let scale = s.splat(scale);
            for at in (start..end).step_by(S::LANES) {
                // SAFETY: as above.
                unsafe {
                    let n = end - at;
                    let normed = s.mul(load(s, self.normed.add(at - start), n), scale);
                    let dn = load(s, self.d_normed.add(at - start), n);
                    let dv = s.mul(scale, s.sub(dn, s.mul(normed, mean)));
                    let (x, z) = (load(s, row.x.add(at), n), load(s, row.z.add(at), n));
                    let dy = load(s, self.dy.add(at), n);
                    let (p, q) = math::sigmoid_pair(s, z);
                    let gate = s.mul(z, p);
                    let slope = s.mul(p, s.fma(z, q, s.splat(1.0)));
                    let (dx, d_gate) = if row.norm_first {
                        (dv, s.mul(s.mul(dy, normed), row.weight(s, at, n)))
                    } else {
                        (s.mul(dv, gate), s.mul(dv, x))
                    };
                    if let Some(to) = self.dx {
                        store(s, to.add(at), dx, n);
                    }
                    if let Some(to) = self.dz {
                        store(s, to.add(at), s.mul(d_gate, slope), n);
                    }
                    if let Some(to) = self.dweight {
                        let part = s.mul(dy, normed);
                        let part = if row.norm_first { s.mul(part, gate) } else { part };
                        store(s, to.add(at), s.add(load(s, to.add(at), n), part), n);
                    }
                }
            }
        }
    }
}
