//! Launches of the discretisation's kernels.

use super::{A_IMAG, B, Gradient, LOG_A_REAL, LOG_DT, Method, P};
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::{Io, Mat};

static PROGRAM: Program = Program { name: "lti_discretise", source: include_str!("kernel.cu") };

const THREADS: usize = 64;

fn matrices(mats: &[Option<Mat>]) -> Vec<u64> {
    mats.iter().flat_map(|m| m.map_or([0, 0], |m| [m.address(), m.stride as u64])).collect()
}

fn kernel(method: Method, io: &Io<'_>, entry: &'static str) -> Kernel {
    let parameters = [LOG_A_REAL, A_IMAG, LOG_DT, B, P].map(|i| io.optional_input(i));
    let (shape, low_rank) = (io.input(A_IMAG), parameters[P].is_some());
    let mut table = matrices(&parameters);
    table.push(shape.cols as u64);
    Kernel::new(&PROGRAM, entry)
        .define("PAIRS", shape.rows)
        .define("ZOH", i32::from(method == Method::Zoh))
        .define("LOW_RANK", i32::from(low_rank))
        .grid(shape.cols.div_ceil(THREADS), 1, 1)
        .threads(THREADS as u32)
        .args([Arg::Table(table)])
}

pub(super) fn run(method: Method, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let outputs = [0, 1, 2, 3].map(|i| io.optional_output(i));
    launcher.launch(kernel(method, io, "discretise").arg(Arg::Table(matrices(&outputs))))
}

pub(super) fn run_grad(method: Method, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let mut mats = [0, 1, 2, 3].map(|i| io.optional_input(Gradient::D_OUTPUTS + i)).to_vec();
    mats.extend([LOG_A_REAL, A_IMAG, LOG_DT, B, P].map(|i| io.optional_output(i)));
    launcher.launch(kernel(method, io, "discretise_grad").arg(Arg::Table(matrices(&mats))))
}
