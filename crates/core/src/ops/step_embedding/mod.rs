//! The embedding of a step of generation: rows of the table as the residual stream, ready for the first product of
//! [`step_linear`](super::step_linear). For GPUs; the graphs of CPUs have the single ops.
//!
//! ids `[1, T]` i32, table `[V, D]` bf16 or q8_0, norm weight `[1, D]` f32. An id outside 0..V gives a row of NaN.

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::elementwise::cuda::vector;
use crate::ops::step_linear::Stream;

const NAME: &str = "step_embedding";

static PROGRAM: Program = Program { name: NAME, source: include_str!("kernel.cu") };

/// Appends the embedding of `ids`, multiplied by the weight of the first norm.
///
/// # Errors
/// Operands of other shapes or types.
pub fn step_embedding(g: &mut Graph, ids: TensorId, table: TensorId, norm_weight: TensorId) -> Result<Stream, Error> {
    let (tokens, cols) = (g.cols(ids), g.cols(table));
    g.expect(NAME, "the ids", ids, DType::I32, Some(1), None)?;
    if g.dtype(table) != DType::Q8_0 {
        g.expect_dtype(NAME, "the table", table, DType::BF16)?;
    }
    g.expect_f32(NAME, "the weight of the norm", norm_weight, Some(1), Some(cols))?;
    let stream = g.new_tensor(DType::F32, tokens, cols);
    let weighted = g.new_tensor(DType::BF16, tokens, cols);
    let squares = g.new_tensor(DType::F32, tokens, 1);
    let inputs = vec![Some(ids), Some(table), Some(norm_weight)];
    g.push(Embedding, inputs, vec![Some(stream), Some(weighted), Some(squares)]);
    Ok(Stream { stream, weighted, squares })
}

/// Inputs ids, table, norm weight; outputs stream, weighted, squares.
#[derive(Clone, Copy, Debug)]
struct Embedding;

impl Op for Embedding {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (3 * g.cols(node.input(0)) * g.cols(node.input(1))) as f64
    }

    fn run_cpu(&self, _: &Io<'_>, _: &Cpu) {
        unreachable!("the plan of a CPU refuses bf16 activations")
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let (ids, table, weight) = (io.input(0), io.input(1), io.input(2));
        let outputs = [0, 1, 2].map(|i| io.optional_output(i));
        let [Some(stream), Some(weighted), Some(squares)] = outputs else {
            unreachable!("a product reads all three");
        };
        launcher.launch(
            Kernel::new(&PROGRAM, NAME)
                .define_type("TABLE", table.dtype)
                .define("V", vector(&[table, weight, stream, weighted]))
                .grid(ids.cols, 1, 1)
                .threads(256)
                .overlapping()
                .arg(Arg::Ptr(ids.address()))
                .args([table.into(), weight.into(), stream.into(), weighted.into(), squares.into()])
                .args([(table.rows as i32).into(), (table.cols as i32).into()]),
        )
    }
}
