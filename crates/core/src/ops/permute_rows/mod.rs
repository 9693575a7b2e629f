//! The rows of each segment in another order, grid after grid: what a scan along another order of a grid's cells needs
//! before and behind it.
//!
//! ```text
//! y[first + k n + i] = x[first + k n + order[i]],   i = 0 .. n − 1,   for each whole grid k of a segment
//! ```
//!
//! A segment holds grids of n cells one after another, n being the length of the order. Rows behind its last whole grid
//! keep their places. The gradient, and the way back, is the same with the inverse order. It moves memory and nothing else.

mod cuda;
#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::tasks::Segments;

const NAME: &str = "permute_rows";
/// Elements that one task copies, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Appends x `[T, d]` with the rows of each segment in order. `order` and its inverse are i32 `[1, n]`, `segments` the
/// offsets of the pack, i32 `[1, S + 1]`. Rows in no segment become zero; a number outside 0 .. n gives a row of NaN, so
/// that it is seen. Nobody checks that the two are inverses of each other: the gradient would be another op's.
///
/// # Errors
/// x holds no floating-point numbers, or the other operands are not as above.
pub fn permute_rows(
    g: &mut Graph,
    x: TensorId,
    [order, inverse]: [TensorId; 2],
    segments: TensorId,
) -> Result<TensorId, Error> {
    g.expect_float(NAME, "x", x)?;
    g.expect(NAME, "the order", order, DType::I32, Some(1), None)?;
    g.expect(NAME, "the inverse order", inverse, DType::I32, Some(1), Some(g.cols(order)))?;
    g.expect_segments(NAME, segments)?;
    Ok(push(g, x, [order, inverse], segments))
}

fn push(g: &mut Graph, x: TensorId, [order, inverse]: [TensorId; 2], segments: TensorId) -> TensorId {
    let y = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
    g.push(PermuteRows, vec![Some(x), Some(order), Some(inverse), Some(segments)], vec![Some(y)]);
    y
}

/// Inputs: x, the order, its inverse (for the gradient alone), the offsets. Output: y.
#[derive(Debug)]
struct PermuteRows;

impl Op for PermuteRows {
    fn name(&self) -> &'static str {
        NAME
    }

    fn is_cheap(&self, _: &Graph, _: &Node) -> bool {
        true
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let back = [node.input(2), node.input(1)];
        Ok(vec![d_outputs[0].map(|dy| push(g, dy, back, node.input(3))), None, None, None])
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, y) = (io.input(0), io.output(0));
        // SAFETY: the builder checked that the order is one row of i32; inputs do not change.
        let order = unsafe { io.input(1).row::<i32>(0) };
        let segments = Segments::new(io.segments(3), x.rows);
        cpu.pool.chunks(y.rows, (ELEMENTS_PER_TASK / y.cols.max(1)).max(1), |rows| {
            for row in rows {
                // SAFETY: this task alone writes the row.
                let out = unsafe { y.row_mut::<f32>(row) };
                match segments.of(row).map(|s| source(order, segments.rows(s), row)) {
                    // SAFETY: the row lies in the segment, which lies in x; inputs do not change.
                    Some(Some(from)) => out.copy_from_slice(unsafe { x.row(from) }),
                    Some(None) => out.fill(f32::NAN),
                    None => out.fill(0.0),
                }
            }
        });
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(io, launcher)
    }
}

/// The row of x that a row of a segment comes from, `None` where the order has no such cell.
fn source(order: &[i32], segment: Range<usize>, row: usize) -> Option<usize> {
    let cell = (row - segment.start) % order.len().max(1);
    let grid = row - cell;
    if grid + order.len() > segment.end || order.is_empty() {
        return Some(row);
    }
    usize::try_from(order[cell]).ok().filter(|&from| from < order.len()).map(|from| grid + from)
}
