//! The rows of each segment in the opposite order: what a second scan against the direction of time needs before and behind
//! it (Vim, Zhu et al., arXiv 2401.09417).
//!
//! ```text
//! y[first + i] = x[end − 1 − i]   for a segment of rows first .. end
//! ```
//!
//! Its own inverse and its own gradient. It moves memory and nothing else.

mod cuda;

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::tasks::Segments;

const NAME: &str = "reverse_rows";
/// Elements that one task copies, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Appends x `[T, d]` with the rows of each segment reversed; `segments` are the offsets of the pack, i32 `[1, S + 1]`. Rows
/// in no segment become zero.
///
/// # Errors
/// x holds no floating-point numbers, or the offsets are none.
pub fn reverse_rows(g: &mut Graph, x: TensorId, segments: TensorId) -> Result<TensorId, Error> {
    g.expect_float(NAME, "x", x)?;
    g.expect_segments(NAME, segments)?;
    Ok(push(g, x, segments))
}

fn push(g: &mut Graph, x: TensorId, segments: TensorId) -> TensorId {
    let y = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
    g.push(ReverseRows, vec![Some(x), Some(segments)], vec![Some(y)]);
    y
}

#[derive(Debug)]
struct ReverseRows;

impl Op for ReverseRows {
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
        Ok(vec![d_outputs[0].map(|dy| push(g, dy, node.input(1))), None])
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, y) = (io.input(0), io.output(0));
        let segments = Segments::new(io.segments(1), x.rows);
        cpu.pool.chunks(y.rows, (ELEMENTS_PER_TASK / y.cols.max(1)).max(1), |rows| {
            for row in rows {
                // SAFETY: this task alone writes the row.
                let out = unsafe { y.row_mut::<f32>(row) };
                match segments.of(row).map(|s| segments.rows(s)) {
                    // SAFETY: the row lies in the segment, which lies in x; inputs do not change.
                    Some(all) => out.copy_from_slice(unsafe { x.row(all.end - 1 - (row - all.start)) }),
                    None => out.fill(0.0),
                }
            }
        });
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(io, launcher)
    }
}

/// The same in plain f64, for `x` of rows of `width` numbers.
pub fn reference(x: &[f64], width: usize, offsets: &[i32]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for ends in offsets.windows(2) {
        let (first, end) = (ends[0] as usize, ends[1] as usize);
        for row in first..end {
            y[row * width..][..width].copy_from_slice(&x[(first + end - 1 - row) * width..][..width]);
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::layout::split;
    use crate::ops::testing::{BF16_BOUNDS, Value, check_op, check_op_bf16};

    #[test]
    fn segments_turn_around_by_themselves() {
        // Empty segments, one of a single row, rows before the first and behind the last.
        for (rows, width, offsets) in [(9, 3, vec![1, 1, 5, 6, 8, 8]), (700, 48, vec![0, 699]), (4, 16, vec![0])] {
            let inputs = [("x", Value::random(rows, width + 8, 1)), ("segments", Value::ints(&offsets))];
            let build = |g: &mut Graph, t: &[TensorId]| {
                let x = split(g, t[0], &[8, width]).unwrap()[1];
                vec![reverse_rows(g, x, t[1]).unwrap()]
            };
            let expected = |v: &[Value]| {
                let x: Vec<f64> = v[0].data.chunks(width + 8).flat_map(|row| row[8..].to_vec()).collect();
                vec![Value::new(rows, width, reference(&x, width, &offsets))]
            };
            // Differences of many values take long; a copy's gradient shows in few.
            let wanted: &[&str] = if rows < 100 { &["x"] } else { &[] };
            check_op(&inputs, wanted, build, expected, (0.0, 1e-6));
            check_op_bf16(&inputs, &["x"], wanted, build, expected, BF16_BOUNDS);
        }
    }
}
