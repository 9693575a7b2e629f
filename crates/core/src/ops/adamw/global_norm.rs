//! The norm of all gradients together: √Σ g², accumulated in f64.
//!
//! Blocks of a fixed size are summed in [`LANES`] interleaved sums, then in order, so the bits depend on the numbers
//! alone. Squares of f32 never overflow in f64; the norm is infinite or NaN only if a gradient is, or if it exceeds f32.

use super::cuda;
use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};

/// Elements of a block.
const BLOCK: usize = 64 * 1024;
/// Interleaved sums of a block.
const LANES: usize = 16;

/// The L2 norm [1, 1] of `grads` [1, n].
///
/// # Errors
/// The gradients are not one row of f32.
pub fn global_norm(g: &mut Graph, grads: TensorId) -> Result<TensorId, Error> {
    g.expect_f32("global_norm", "the gradients", grads, Some(1), None)?;
    let norm = g.new_tensor(DType::F32, 1, 1);
    g.push(GlobalNorm, vec![Some(grads)], vec![Some(norm)]);
    Ok(norm)
}

#[derive(Debug)]
struct GlobalNorm;

impl Op for GlobalNorm {
    fn name(&self) -> &'static str {
        "global_norm"
    }

    fn backward(
        &self,
        _: &mut Graph,
        _: &Node,
        _: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        Err(Error::Unsupported { op: "global_norm", message: "its gradient is not implemented".into() })
    }

    fn workspace(&self, g: &Graph, node: &Node, _: &Cpu) -> usize {
        g.cols(node.input(0)).div_ceil(BLOCK) * size_of::<f64>()
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        cuda::norm_workspace(g.cols(node.input(0)))
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::norm(io, launcher)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (2 * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        // SAFETY: the builder checked that the gradients are one row of f32; inputs do not change.
        let grads = unsafe { io.input(0).row::<f32>(0) };
        let blocks = grads.len().div_ceil(BLOCK);
        let (start, bytes) = io.workspace();
        assert!(blocks * size_of::<f64>() <= bytes, "the workspace is too small");
        let sums = if blocks == 0 {
            &mut []
        } else {
            let start = start.cast::<f64>();
            // SAFETY: the workspace is this op's own, aligned to 64 bytes and large enough, and any bytes are an f64.
            unsafe { std::slice::from_raw_parts_mut(start, blocks) }
        };
        cpu.pool.chunks_mut(sums, 1, |b, sum| {
            let block = &grads[b * BLOCK..grads.len().min((b + 1) * BLOCK)];
            sum[0] = cpu.isa.run(SumSquares(block));
        });
        // SAFETY: nobody else writes the output, one f32.
        unsafe { io.output(0).row_mut::<f32>(0)[0] = sums.iter().sum::<f64>().sqrt() as f32 };
    }
}

struct SumSquares<'a>(&'a [f32]);

impl Kernel for SumSquares<'_> {
    type Output = f64;

    /// Plain arithmetic on independent sums: the compiler vectorises it with the instructions of `S`.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut sums = [0.0f64; LANES];
        let (whole, rest) = self.0.as_chunks::<LANES>();
        for chunk in whole {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(x) * f64::from(x);
        }
        sums.iter().sum()
    }
}
