//! Gathering rows: `y[i] = x[rows[i]]`.
//!
//! x [n, d] f32 or bf16, rows [1, R] i32, y [R, d]. Rows may repeat and come in any order: the last token of every segment
//! before the output projection, a scan order over a grid. A row number outside 0..n gives a row of NaN, so that it is
//! seen; callers check what a user can cause.
//!
//! Gradient: `dx[r] = Σ dy[i]` over the i with `rows[i] = r`, summed in the order of i, whatever the number of threads.
//! Both directions move memory and nothing else.

pub(crate) mod cuda;
pub mod reference;

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

/// Elements that one task copies, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;
/// Parts into which the rows of a scattered gradient are cut; each task looks through all row numbers.
const ROW_PARTS: usize = 64;
/// Columns of a scattered gradient that one task writes.
const COLS_PER_TASK: usize = 512;

/// Rows `rows` [1, R] of x [n, d], as [R, d].
///
/// # Errors
/// x holds no floating-point numbers, or the row numbers are not i32 in one row.
pub fn gather_rows(g: &mut Graph, x: TensorId, rows: TensorId) -> Result<TensorId, Error> {
    let dtype = g.expect_float("gather_rows", "x", x)?;
    g.expect_dtype("gather_rows", "the row numbers", rows, DType::I32)?;
    g.expect_shape("gather_rows", "the row numbers", rows, Some(1), None)?;
    let y = g.new_tensor(dtype, g.cols(rows), g.cols(x));
    g.push(GatherRows, vec![Some(x), Some(rows)], vec![Some(y)]);
    Ok(y)
}

/// The transpose of a gather: a tensor [n, d] of zeros with row i of `values` [R, d] added to its row `rows[i]`. Numbers
/// outside are left out: the gather that they come from has shown them as NaN. The sum has the given type.
pub(crate) fn scatter_add(g: &mut Graph, values: TensorId, rows: TensorId, n: usize, dtype: DType) -> TensorId {
    let sum = g.new_tensor(dtype, n, g.cols(values));
    g.push(ScatterAdd, vec![Some(values), Some(rows)], vec![Some(sum)]);
    sum
}

#[derive(Debug)]
struct GatherRows;

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let (n, dtype) = (g.rows(node.input(0)), g.dtype(node.input(0)));
        Ok(vec![d_outputs[0].map(|dy| scatter_add(g, dy, node.input(1), n, dtype)), None])
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::gather(launcher, io.input(0), io.input(1), io.output(0))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, y) = (io.input(0), io.output(0));
        // SAFETY: the builder checked that the row numbers are one row of i32; inputs do not change.
        let numbers = unsafe { io.input(1).row::<i32>(0) };
        cpu.pool.chunks(y.rows, (ELEMENTS_PER_TASK / y.cols.max(1)).max(1), |rows| {
            for r in rows {
                // SAFETY: this task alone writes row r.
                let out = unsafe { y.row_mut::<f32>(r) };
                match usize::try_from(numbers[r]) {
                    // SAFETY: the row lies in x, which does not change.
                    Ok(from) if from < x.rows => out.copy_from_slice(unsafe { x.row(from) }),
                    _ => out.fill(f32::NAN),
                }
            }
        });
    }
}

#[derive(Debug)]
struct ScatterAdd;

impl Op for ScatterAdd {
    fn name(&self) -> &'static str {
        "scatter_add"
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let values = node.input(0);
        cuda::scatter_workspace(g.rows(values), g.rows(node.output(0)), g.cols(values))
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::scatter_add(launcher, io)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (values, sum) = (io.input(0), io.output(0));
        // SAFETY: the builder checked that the row numbers are one row of i32; inputs do not change.
        let numbers = unsafe { io.input(1).row::<i32>(0) };
        // A task owns a block of the result and adds to it in the order of the values.
        let rows_per_part = sum.rows.div_ceil(ROW_PARTS).max(1);
        let row_parts = sum.rows.div_ceil(rows_per_part);
        cpu.pool.run(row_parts * sum.cols.div_ceil(COLS_PER_TASK), |task| {
            let first = task % row_parts * rows_per_part;
            let mine = first..sum.rows.min(first + rows_per_part);
            let col = task / row_parts * COLS_PER_TASK;
            let cols = COLS_PER_TASK.min(sum.cols - col);
            let (values, sum) = (values.columns(col, cols), sum.columns(col, cols));
            for r in mine.clone() {
                // SAFETY: this task alone writes these rows and columns of the sum.
                unsafe { sum.row_mut::<f32>(r) }.fill(0.0);
            }
            for (i, &number) in numbers.iter().enumerate() {
                // Negative numbers become too large ones.
                let r = number as u32 as usize;
                if mine.contains(&r) {
                    // SAFETY: as above; the values do not change.
                    let (sum, value) = unsafe { (sum.row_mut::<f32>(r), values.row::<f32>(i)) };
                    sum.iter_mut().zip(value).for_each(|(s, v)| *s += v);
                }
            }
        });
    }
}
