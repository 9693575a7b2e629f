//! Launches of the gate's kernels.

use crate::cuda::{Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::Mat;
use crate::ops::elementwise::cuda::vector;

static PROGRAM: Program = Program { name: "swiglu", source: include_str!("kernel.cu") };

/// The op, or with `d` its gradient.
pub(super) fn run(launcher: &mut Launcher<'_>, x: Mat, d: Option<Mat>, out: Mat) -> Result<(), Error> {
    let width = x.cols / 2;
    let mats: Vec<Mat> = [Some(x), d, Some(out)].into_iter().flatten().map(|m| Mat { cols: width, ..m }).collect();
    let v = vector(&mats);
    let kernel = Kernel::new(&PROGRAM, if d.is_some() { "swiglu_grad" } else { "swiglu" })
        .define_type("T", x.dtype)
        .define("V", v)
        .grid((x.rows * (width / v)).div_ceil(256), 1, 1)
        .threads(256)
        .arg(x);
    let kernel = d.into_iter().fold(kernel, Kernel::arg);
    launcher.launch(kernel.args([out.into(), x.rows.into(), width.into()]))
}
