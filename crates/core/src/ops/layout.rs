//! Ops that arrange storage: split and concat of columns (no copy wherever the plan can place the parts), copy.

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Mat, Node, Op, Place, TensorId};
use crate::ops::elementwise;
use crate::ops::elementwise::cuda::{self, Function};

/// Rows that one task copies.
const ROWS_PER_TASK: usize = 64;

/// Splits `x` [rows, Σ widths] into column blocks of these widths, without a copy.
///
/// The gradient is the concatenation of the parts' gradients.
pub fn split(g: &mut Graph, x: TensorId, widths: &[usize]) -> Result<Vec<TensorId>, Error> {
    g.expect_shape("split", "x", x, None, Some(widths.iter().sum()))?;
    let mut col = 0;
    let parts: Vec<TensorId> = widths
        .iter()
        .map(|&w| {
            let part = g.view(x, col, w);
            col += w;
            part
        })
        .collect();
    g.push(Split { widths: widths.to_vec() }, vec![Some(x)], parts.iter().copied().map(Some).collect());
    Ok(parts)
}

/// Puts tensors with the same rows side by side. A part whose storage is still free is produced in place; any other
/// (a view, an external, a part used twice) is copied.
pub fn concat(g: &mut Graph, parts: &[TensorId]) -> Result<TensorId, Error> {
    let Some(&first) = parts.first() else {
        return Err(Error::Unsupported { op: "concat", message: "there is nothing to put together".into() });
    };
    if let [only] = parts {
        return Ok(*only);
    }
    let (rows, dtype) = (g.rows(first), g.dtype(first));
    let mut cols = 0;
    for &part in parts {
        g.expect_shape("concat", "a part", part, Some(rows), None)?;
        g.expect_dtype("concat", "a part", part, dtype)?;
        cols += g.cols(part);
    }
    let whole = g.new_tensor(dtype, rows, cols);
    let mut col = 0;
    let mut inputs = Vec::with_capacity(parts.len());
    for &part in parts {
        let width = g.cols(part);
        // Zero-width parts and tensors that other tensors are views of keep their own storage.
        let placed = g.try_place(part, whole, col);
        let input = if placed {
            part
        } else {
            let copy = g.view(whole, col, width);
            copy_into(g, part, copy);
            copy
        };
        inputs.push(Some(input));
        col += width;
    }
    g.push(Concat, inputs, vec![Some(whole)]);
    Ok(whole)
}

/// Appends a copy of `from` to `to`, a tensor of the same shape and type; returns the copy.
pub(crate) fn copy_into(g: &mut Graph, from: TensorId, to: TensorId) -> TensorId {
    // An external destination is named by a view of its own, so that the plan sees a new value of it.
    let to = match g.tensor(to).place {
        Place::External(_) => g.view(to, 0, g.cols(to)),
        _ => to,
    };
    g.push(Copy, vec![Some(from)], vec![Some(to)]);
    to
}

#[derive(Debug)]
struct Split {
    widths: Vec<usize>,
}

impl Op for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let x = node.input(0);
        let (rows, dtype) = (g.rows(x), g.dtype(x));
        let mut parts = Vec::with_capacity(self.widths.len());
        for (d, &width) in d_outputs.iter().zip(&self.widths) {
            parts.push(match d {
                Some(d) => *d,
                None => elementwise::fill(g, dtype, rows, width, 0.0)?,
            });
        }
        Ok(vec![Some(concat(g, &parts)?)])
    }

    fn is_placement(&self) -> bool {
        true
    }

    fn run_cpu(&self, _io: &Io<'_>, _cpu: &Cpu) {}
}

#[derive(Debug)]
struct Concat;

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let Some(d) = d_outputs[0] else { return Ok(vec![None; node.inputs.len()]) };
        let widths: Vec<usize> = node.inputs.iter().flatten().map(|&t| g.cols(t)).collect();
        Ok(split(g, d, &widths)?.into_iter().map(Some).collect())
    }

    fn is_placement(&self) -> bool {
        true
    }

    fn run_cpu(&self, _io: &Io<'_>, _cpu: &Cpu) {}
}

#[derive(Debug)]
struct Copy;

impl Op for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn backward(
        &self,
        _g: &mut Graph,
        _node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        Ok(vec![d_outputs[0]])
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        // f32 passes through the kernel unchanged, so integers can be copied as f32.
        let as_f32 = |m: Mat| if m.dtype == DType::I32 { Mat { dtype: DType::F32, ..m } } else { m };
        let (from, to) = (as_f32(io.input(0)), as_f32(io.output(0)));
        cuda::map(launcher, Function::Copy, Some(from), None, None, to, 0.0)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (from, to) = (io.input(0), io.output(0));
        let bytes = from.cols * from.dtype.size();
        cpu.pool.chunks(from.rows, ROWS_PER_TASK, |rows| {
            for r in rows {
                let (from, to) = (from.rows(r, 1), to.rows(r, 1));
                // SAFETY: both rows hold `bytes` bytes; this task alone writes row r, and the two do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(from.ptr, to.ptr, bytes) }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Recompute;
    use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op_bf16};

    #[test]
    fn split_and_concat_move_nothing_and_differentiate() {
        let x = Value::random(5, 7, 1);
        let mut case = Case::new();
        let input = case.input("x", &x);
        let parts = split(&mut case.graph, input, &[2, 1, 4]).unwrap();
        let doubled = elementwise::scale(&mut case.graph, parts[2], 2.0).unwrap();
        let swapped = concat(&mut case.graph, &[doubled, parts[0]]).unwrap();
        let seed = Value::random(5, 6, 2);
        let d = case.input("d", &seed);
        let grads = case.graph.backward(&[(swapped, d)], &[input], Recompute::Nothing).unwrap();
        case.output("y", swapped);
        case.output("dx", grads[0].unwrap());
        case.run_everywhere(|_, out| {
            for r in 0..5 {
                for c in 0..6 {
                    let expected = if c < 4 { 2.0 * x.at(r, 3 + c) } else { x.at(r, c - 4) };
                    assert_eq!(out["y"].at(r, c), expected);
                }
                for c in 0..7 {
                    let expected = match c {
                        0 | 1 => seed.at(r, 4 + c),
                        2 => 0.0,
                        _ => 2.0 * seed.at(r, c - 3),
                    };
                    assert_eq!(out["dx"].at(r, c), expected);
                }
            }
        });
    }

    #[test]
    fn parts_in_bf16() {
        for widths in [[3, 4], [8, 16]] {
            let x = Value::random(5, widths[0] + widths[1], 1);
            let build = |g: &mut Graph, t: &[TensorId]| {
                let parts = split(g, t[0], &widths).unwrap();
                vec![concat(g, &[parts[1], parts[0], parts[1]]).unwrap()]
            };
            let reference = |v: &[Value]| {
                let at = |r: usize, c: usize| v[0].at(r, if c < widths[1] { c + widths[0] } else { c - widths[1] });
                let cols = widths[0] + 2 * widths[1];
                vec![Value::new(5, cols, (0..5 * cols).map(|i| at(i / cols, i % cols)).collect())]
            };
            check_op_bf16(&[("x", x)], &["x"], &["x"], build, reference, BF16_BOUNDS);
        }
    }

    #[test]
    fn a_part_used_twice_is_copied() {
        let x = Value::random(3, 2, 1);
        let mut case = Case::new();
        let input = case.input("x", &x);
        let y = elementwise::scale(&mut case.graph, input, 2.0).unwrap();
        let both = concat(&mut case.graph, &[y, y, input]).unwrap();
        case.output("both", both);
        case.run_everywhere(|_, out| {
            for r in 0..3 {
                for c in 0..6 {
                    let scale = if c < 4 { 2.0 } else { 1.0 };
                    assert_eq!(out["both"].at(r, c), scale * x.at(r, c % 2));
                }
            }
        });
    }
}
