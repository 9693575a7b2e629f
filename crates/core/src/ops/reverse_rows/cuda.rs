//! The launch of the kernel that reverses.

use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::Io;
use crate::ops::elementwise::cuda::vector;

static PROGRAM: Program = Program { name: "reverse_rows", source: include_str!("kernel.cu") };

pub(super) fn run(io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, offsets, y) = (io.input(0), io.input(1), io.output(0));
    let v = vector(&[x, y]);
    launcher.launch(
        Kernel::new(&PROGRAM, "reverse_rows")
            .define_type("T", x.dtype)
            .define("V", v)
            .grid((x.rows * (x.cols / v)).div_ceil(256), 1, 1)
            .threads(256)
            .args([x.into(), y.into(), Arg::Ptr(offsets.address())])
            .args([x.rows.into(), (x.cols / v).into(), (offsets.cols - 1).into()]),
    )
}
