//! Launches of the gated norm's kernels.

use super::Options;
use crate::cuda::{Arg, Kernel, Launcher, Program, Properties};
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::{sum_parts, vector};
use crate::ops::norm::cuda::Spread;

static PROGRAM: Program = Program { name: "gated_rms_norm", source: include_str!("kernel.cu") };

/// Threads that share a group: at most 16 elements each, of which the gradient holds five values and the next row's.
fn spread(width: usize) -> Spread {
    match width {
        0..=512 => Spread { group: 32, threads: 256 },
        513..=2048 => Spread { group: 128, threads: 128 },
        2049..=4096 => Spread { group: 256, threads: 256 },
        _ => Spread { group: 512, threads: 512 },
    }
}

fn kernel(entry: &'static str, options: &Options, mats: &[Option<Mat>]) -> (Kernel, Spread) {
    let Some(x) = mats[0] else { unreachable!("x is always there") };
    let width = options.group_size;
    // Groups start at multiples of their size.
    let mats: Vec<Mat> = mats.iter().flatten().map(|m| Mat { cols: width, ..*m }).collect();
    let (spread, v) = (spread(width), vector(&mats).min(4));
    let kernel = Kernel::new(&PROGRAM, entry)
        .define_type("T", x.dtype)
        .define("G", spread.group)
        .define("THREADS", spread.threads)
        .define("V", v)
        .define("ITERS", width.div_ceil(spread.group * v))
        .define("NORM_FIRST", i32::from(options.norm_before_gate))
        .threads(spread.threads as u32);
    (kernel, spread)
}

pub(super) fn forward(options: &Options, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, z, weight, y) = (io.input(0), io.input(1), io.optional_input(2), io.output(0));
    let (kernel, spread) = kernel("gated_norm", options, &[Some(x), Some(z), Some(y)]);
    launcher.launch(
        kernel
            .grid(x.rows.div_ceil(spread.rows_of_block()), x.cols / options.group_size, 1)
            .args([x.into(), z.into(), weight.into(), y.into(), x.rows.into()])
            .args([options.group_size.into(), options.eps.into()]),
    )
}

/// Blocks of the gradient for each group: together enough to fill the chip, few parts to add.
fn gradient_blocks(options: &Options, rows: usize, cols: usize, gpu: &Properties) -> usize {
    let groups = cols / options.group_size;
    let most = (gpu.blocks(4) as usize).div_ceil(groups);
    rows.div_ceil(spread(options.group_size).rows_of_block()).min(most).max(1)
}

pub(super) fn gradient_workspace(options: &Options, rows: usize, cols: usize, gpu: &Properties) -> usize {
    4 * gradient_blocks(options, rows, cols, gpu) * cols
}

pub(super) fn gradient(options: &Options, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, z, weight, dy) = (io.input(0), io.input(1), io.optional_input(2), io.input(3));
    let [dx, dz, dweight] = [0, 1, 2].map(|i| io.optional_output(i));
    let blocks = gradient_blocks(options, x.rows, x.cols, launcher.properties());
    let parts = io.workspace().0;
    let (kernel, _) = kernel("gated_norm_grad", options, &[Some(x), Some(z), Some(dy), dx, dz]);
    launcher.launch(
        kernel
            .grid(blocks, x.cols / options.group_size, 1)
            .shared(4 * options.group_size)
            .args([x.into(), z.into(), weight.into(), dy.into(), dx.into(), dz.into()])
            .arg(if dweight.is_some() { Arg::from(parts) } else { Arg::Ptr(0) })
            .args([x.rows.into(), options.group_size.into(), options.eps.into()]),
    )?;
    match dweight {
        Some(dweight) => sum_parts(launcher, parts, blocks, dweight),
        None => Ok(()),
    }
}
