//! The launch of the kernel that turns.

use super::Turn;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::Io;

static PROGRAM: Program =
    Program { name: "rotary", source: concat!(include_str!("../attention/position.cu"), include_str!("kernel.cu")) };

/// Numbers from which on a thread takes all heads, to compute an angle once.
const MANY: usize = 1 << 18;

pub(super) fn run(op: &Turn, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, offsets, positions, y) = (io.input(0), io.input(1), io.optional_input(2), io.output(0));
    let heads = x.cols / op.headdim;
    let threads = x.rows * (op.headdim - op.dims / 2);
    let spread = if x.rows * x.cols >= MANY { 1 } else { heads.min(65_535) };
    launcher.launch(
        Kernel::new(&PROGRAM, "rotary")
            .define_type("T", x.dtype)
            .grid(threads.div_ceil(256), spread, 1)
            .threads(256)
            .args([x.into(), y.into(), Arg::Ptr(offsets.address()), positions.into()])
            .args([x.rows.into(), (offsets.cols - 1).into(), heads.into(), op.headdim.into(), op.dims.into()])
            .args([op.base.into(), (if op.back { -1.0f32 } else { 1.0 }).into()]),
    )
}
