//! Launches of the recurrences' kernels: a block a segment.

use super::{BIAS, Cell, Gradient, INITIAL_STATE, SEGMENTS, WEIGHT, X};
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::Io;

static PROGRAM: Program = Program { name: "rnn", source: include_str!("kernel.cu") };

/// Threads of a block, as in the kernel.
const THREADS: u32 = 512;

/// Bytes of what a segment's block has in memory: a or da, and h and c or their gradients.
pub(super) fn workspace(cell: Cell, units: usize, segments: usize) -> usize {
    4 * (cell.gates() + 2) * units * segments
}

fn kernel(cell: Cell, entry: &'static str, dtype: DType, segments: usize) -> Kernel {
    // One block at least: it clears rows outside of segments.
    Kernel::new(&PROGRAM, entry)
        .define_type("T", dtype)
        .define("GATES", cell.gates())
        .grid(segments.max(1), 1, 1)
        .threads(THREADS)
}

pub(super) fn run(cell: Cell, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, weight, offsets) = (io.input(X), io.input(WEIGHT), io.input(SEGMENTS));
    let (bias, initial) = (io.optional_input(BIAS), io.optional_input(INITIAL_STATE));
    let [y, last, kept] = [0, 1, 2].map(|i| io.optional_output(i));
    let segments = offsets.cols - 1;
    launcher.launch(kernel(cell, "rnn_forward", x.dtype, segments).args([
        x.into(),
        weight.into(),
        bias.into(),
        initial.into(),
        Arg::Ptr(offsets.address()),
        io.workspace().0.into(),
        y.into(),
        last.into(),
        kept.into(),
        x.rows.into(),
        weight.cols.into(),
        (segments as i32).into(),
    ]))
}

pub(super) fn run_grad(cell: Cell, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (weight, y, kept) = (io.input(Gradient::WEIGHT), io.input(Gradient::Y), io.input(Gradient::KEPT));
    let offsets = io.input(Gradient::SEGMENTS);
    let segments = offsets.cols - 1;
    let inputs = [Gradient::INITIAL_STATE, Gradient::DY, Gradient::D_FINAL].map(|i| Arg::from(io.optional_input(i)));
    let outputs = [Gradient::DX, Gradient::DA, Gradient::BEFORE, Gradient::D_INITIAL];
    let outputs = outputs.map(|i| Arg::from(io.optional_output(i)));
    let kernel = kernel(cell, "rnn_backward", y.dtype, segments)
        .args([weight.into(), Arg::Ptr(offsets.address()), y.into(), kept.into()])
        .args(inputs)
        .arg(io.workspace().0)
        .args(outputs);
    launcher.launch(kernel.args([Arg::from(y.rows), weight.cols.into(), (segments as i32).into()]))
}
