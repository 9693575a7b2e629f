//! Launches of the norms' kernels.

use super::{Kind, Norm};
use crate::cuda::{Arg, Kernel, Launcher, Program, Properties};
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::{sum_parts, vector};

static PROGRAM: Program = Program { name: "norm", source: include_str!("kernel.cu") };

/// Widths up to which this many threads share a row: at most 32 elements each.
const WARP_WIDTH: usize = 1024;
const BLOCK_WIDTH: usize = 4096;

/// How rows are spread over threads.
pub(crate) struct Spread {
    /// Threads of a row.
    pub group: usize,
    /// Threads of a block.
    pub threads: usize,
}

impl Spread {
    pub(crate) fn of(cols: usize) -> Spread {
        if cols <= WARP_WIDTH {
            Spread { group: 32, threads: 256 }
        } else if cols <= BLOCK_WIDTH {
            Spread { group: 128, threads: 128 }
        } else {
            Spread { group: 512, threads: 512 }
        }
    }

    pub(crate) fn rows_of_block(&self) -> usize {
        self.threads / self.group
    }

    /// The kernel with everything that its operands decide.
    fn kernel(&self, entry: &'static str, norm: &Norm, [x, y, s]: [Mat; 3], mats: &[Option<Mat>]) -> Kernel {
        let mats: Vec<Mat> = mats.iter().flatten().copied().collect();
        let v = vector(&mats).min(4);
        Kernel::new(&PROGRAM, entry)
            .define_type("TX", x.dtype)
            .define_type("TY", y.dtype)
            .define_type("TS", s.dtype)
            .define("G", self.group)
            .define("THREADS", self.threads)
            .define("V", v)
            .define("ITERS", x.cols.div_ceil(self.group * v))
            .define("LAYER", i32::from(norm.kind == Kind::Layer))
            .threads(self.threads as u32)
    }
}

pub(super) fn run(norm: &Norm, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let x = io.input(0);
    let (residual, weight, bias) = (io.optional_input(1), io.optional_input(2), io.optional_input(3));
    let (y, s) = (io.optional_output(0), io.optional_output(1));
    let spread = Spread::of(x.cols);
    let types = [x, y.unwrap_or(x), s.unwrap_or(x)];
    launcher.launch(
        spread
            .kernel("norm_rows", norm, types, &[Some(x), residual, weight, bias, y, s])
            .grid(x.rows.div_ceil(spread.rows_of_block()), 1, 1)
            .args([x.into(), residual.into(), weight.into(), bias.into(), y.into(), s.into()])
            .args([x.rows.into(), x.cols.into(), norm.eps.into()]),
    )
}

/// Blocks of the gradient: enough to fill the chip, few parts to add.
fn gradient_blocks(rows: usize, cols: usize, gpu: &Properties) -> usize {
    rows.div_ceil(Spread::of(cols).rows_of_block()).min(gpu.blocks(4) as usize)
}

pub(super) fn gradient_workspace(rows: usize, cols: usize, parts: usize, gpu: &Properties) -> usize {
    4 * parts * gradient_blocks(rows, cols, gpu) * cols
}

pub(super) fn run_grad(norm: &Norm, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (s, weight, dy, ds) = (io.input(0), io.optional_input(1), io.input(2), io.optional_input(3));
    let [dx, dweight, dbias, dresidual] = [0, 1, 2, 3].map(|i| io.optional_output(i));
    let spread = Spread::of(s.cols);
    let blocks = gradient_blocks(s.rows, s.cols, launcher.properties());
    let parts = io.workspace().0;
    let part = |wanted: Option<Mat>, number: usize| match wanted {
        Some(_) => Arg::from(parts.wrapping_add(4 * number * blocks * s.cols)),
        None => Arg::Ptr(0),
    };
    let bias_number = usize::from(dweight.is_some());
    launcher.launch(
        spread
            .kernel("norm_grad", norm, [dx.unwrap_or(s), dy, s], &[Some(s), weight, Some(dy), ds, dx, dresidual])
            .grid(blocks, 1, 1)
            .shared(4 * s.cols)
            .args([s.into(), weight.into(), dy.into(), ds.into(), dx.into(), dresidual.into()])
            .args([part(dweight, 0), part(dbias, bias_number), s.rows.into(), s.cols.into(), norm.eps.into()]),
    )?;
    for (out, number) in [(dweight, 0), (dbias, bias_number)] {
        if let Some(out) = out {
            sum_parts(launcher, parts.wrapping_add(4 * number * blocks * s.cols), blocks, out)?;
        }
    }
    Ok(())
}
