//! Dropout (Srivastava et al., 2014): each element is zeroed with probability p, the others are scaled by 1 / (1 − p).
//!
//! ```text
//! y[i] = x[i] / (1 − p) where uniform(key, i) ≥ p, else 0
//! ```
//!
//! x, y: [rows, cols] f32, or bf16 on a GPU; i is the element's index in the row-major matrix, whatever its strides; the
//! key is drawn from the first two numbers of `seed` (an i32 tensor [1, 3], new for every step) and `stream` (one a
//! place in the model). The third number says how many rows of a larger matrix come before x: devices that share a
//! batch draw the mask of the whole. Numbers come from [`crate::rng`], which counts instead of keeping a state: the
//! gradient draws the same mask again and nothing is stored, and a recomputed layer gets the same mask.

pub mod reference;

#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::cuda::{Arg, Kernel as CudaKernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Mat, Node, Op, TensorId};
use crate::ops::elementwise::cuda::vector;
use crate::rng;

static PROGRAM: Program = Program { name: "dropout", source: include_str!("kernel.cu") };

/// Elements that one task handles, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;
/// Elements whose random numbers are drawn together.
const LANES: usize = 32;

/// x with elements dropped with probability p in [0, 1). For p = 0 this is x itself.
///
/// # Errors
/// x holds no floating-point numbers, the seed is not an i32 tensor [1, 3], or p lies outside of [0, 1).
pub fn dropout(g: &mut Graph, x: TensorId, p: f32, seed: TensorId, stream: u32) -> Result<TensorId, Error> {
    g.expect_float("dropout", "x", x)?;
    g.expect_dtype("dropout", "the seed", seed, DType::I32)?;
    g.expect_shape("dropout", "the seed", seed, Some(1), Some(3))?;
    if !(0.0..1.0).contains(&p) {
        return Err(Error::Unsupported { op: "dropout", message: format!("p must lie in [0, 1), but is {p}") });
    }
    if p == 0.0 {
        return Ok(x);
    }
    Ok(Dropout { p, stream }.append(g, x, seed))
}

/// The key of a mask: a hash of seed and stream.
fn key(seed: &[i32], stream: u32) -> u32 {
    rng::philox(stream, u64::from(seed[1] as u32) << 32 | u64::from(seed[0] as u32)) as u32
}

#[derive(Clone, Copy, Debug)]
struct Dropout {
    p: f32,
    stream: u32,
}

impl Dropout {
    fn append(self, g: &mut Graph, x: TensorId, seed: TensorId) -> TensorId {
        let y = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
        g.push(self, vec![Some(x), Some(seed)], vec![Some(y)]);
        y
    }
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        // Linear in x with a diagonal matrix: its transpose is the op itself.
        Ok(vec![d_outputs[0].map(|dy| self.append(g, dy, node.input(1))), None])
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let (x, y) = (io.input(0), io.output(0));
        let v = vector(&[x, y]);
        launcher.launch(
            CudaKernel::new(&PROGRAM, "dropout")
                .define_type("T", x.dtype)
                .define("V", v)
                .grid((x.rows * (x.cols / v)).div_ceil(256), 1, 1)
                .threads(256)
                .args([x.into(), Arg::Ptr(io.input(1).address()), y.into(), x.rows.into(), x.cols.into()])
                .args([(self.stream as i32).into(), self.p.into(), (1.0 / (1.0 - self.p)).into()]),
        )
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, y) = (io.input(0), io.output(0));
        // SAFETY: the builder checked that the seed is three i32; inputs do not change.
        let seed = unsafe { io.input(1).row::<i32>(0) };
        let (key, before) = (key(seed, self.stream), seed[2] as u32 as usize);
        cpu.pool.chunks(x.rows, (ELEMENTS_PER_TASK / x.cols.max(1)).max(1), |rows| {
            cpu.isa.run(Mask { p: self.p, key, before, x, y, rows });
        });
    }
}

/// Dropout of some rows, which this kernel alone writes.
struct Mask {
    p: f32,
    key: u32,
    /// Rows before the first one.
    before: usize,
    x: Mat,
    y: Mat,
    rows: Range<usize>,
}

impl Kernel for Mask {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let scale = 1.0 / (1.0 - self.p);
        for r in self.rows {
            // SAFETY: this task alone writes row r of y; x does not change.
            let (x, y) = unsafe { (self.x.row::<f32>(r), self.y.row_mut::<f32>(r)) };
            let mut first = ((self.before + r) * x.len()) as u64;
            for (x, y) in x.chunks(LANES).zip(y.chunks_mut(LANES)) {
                let numbers: [f32; LANES] = rng::uniforms(self.key, first);
                for ((y, x), number) in y.iter_mut().zip(x).zip(numbers) {
                    *y = if number >= self.p { scale * x } else { 0.0 };
                }
                first += LANES as u64;
            }
        }
    }
}
