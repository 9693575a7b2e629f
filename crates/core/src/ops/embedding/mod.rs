//! Embedding: row `ids[t]` of a table of weights for every token t.
//!
//! ids [1, T] i32, weight [V, d] f32, bf16 or (on a CPU) in blocks, y [T, d] f32. The weight may be packed ([`Layout::Panels`]), as it is
//! where the output projection uses the same matrix. An id outside 0..V gives a row of NaN, so that it is seen; callers
//! check what a user can cause.
//!
//! Gradient: `dweight[v] = Σ dy[t]` over the t with `ids[t] = v`, [V, d] f32, summed in the order of t. It is dense: the
//! rows of tokens that do not occur are zero.

pub mod reference;

#[cfg(test)]
mod tests;

use half::bf16;

use crate::cpu::Cpu;
use crate::cpu::gemm::Rhs;
use crate::cuda::Launcher;
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Layout, Mat, Node, Op, TensorId};
use crate::ops::gather_rows::{cuda, scatter_add};
use crate::ops::linear::transposed;

/// Elements that one task copies, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Rows `ids` [1, T] of `weight` [V, d], as [T, d] f32.
///
/// # Errors
/// The ids are not i32 in one row, or the weight holds whole numbers.
pub fn embedding(g: &mut Graph, ids: TensorId, weight: TensorId) -> Result<TensorId, Error> {
    g.expect_dtype("embedding", "the ids", ids, DType::I32)?;
    g.expect_shape("embedding", "the ids", ids, Some(1), None)?;
    if g.dtype(weight) == DType::I32 {
        g.expect_dtype("embedding", "the weight", weight, DType::F32)?;
    }
    let y = g.new_tensor(DType::F32, g.cols(ids), g.cols(weight));
    g.push(Embedding, vec![Some(ids), Some(weight)], vec![Some(y)]);
    Ok(y)
}

#[derive(Debug)]
struct Embedding;

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let vocabulary = g.rows(node.input(1));
        Ok(vec![None, d_outputs[0].map(|dy| scatter_add(g, dy, node.input(0), vocabulary, DType::F32))])
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::gather(launcher, io.input(1), io.input(0), io.output(0))
    }

    fn narrow_weight(&self) -> Option<usize> {
        Some(1)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (weight, y) = (io.input(1), io.output(0));
        // SAFETY: the builder checked that the ids are one row of i32; inputs do not change.
        let ids = unsafe { io.input(0).row::<i32>(0) };
        cpu.pool.chunks(y.rows, (ELEMENTS_PER_TASK / y.cols.max(1)).max(1), |rows| {
            for r in rows {
                // SAFETY: this task alone writes row r.
                let out = unsafe { y.row_mut::<f32>(r) };
                match usize::try_from(ids[r]) {
                    // SAFETY: the row lies in the table, which does not change.
                    Ok(id) if id < weight.rows => unsafe { read_row(cpu, weight, id, out) },
                    _ => out.fill(f32::NAN),
                }
            }
        });
    }
}

/// Copies row `id` of the table to `out`, widened to f32.
///
/// # Safety
/// The row lies in the table, and nobody writes it.
unsafe fn read_row(cpu: &Cpu, weight: Mat, id: usize, out: &mut [f32]) {
    // SAFETY: as the caller promises.
    unsafe {
        match (weight.layout, weight.dtype) {
            (Layout::Rows, DType::Q8_0 | DType::Q4_K | DType::Q6_K) => {
                let kind = weight.dtype.blocks().expect("a type of blocks");
                kind.decode(weight.row_of_blocks(id), out);
            }
            (Layout::Rows, DType::BF16) => {
                out.iter_mut().zip(weight.row::<bf16>(id)).for_each(|(o, w)| *o = w.to_f32());
            }
            (Layout::Rows, _) => out.copy_from_slice(weight.row(id)),
            (Layout::Panels, _) => match transposed(weight, cpu) {
                Rhs::Packed(packed) => packed.column(id, out),
                Rhs::Blocks(blocks) => blocks.column(id, out),
                Rhs::Strided(_) | Rhs::Rounded(_) => unreachable!("weights in panels are packed"),
            },
        }
    }
}
