//! Launches of the convolution's kernels.

use super::{BIAS, Forward, Gradient, INITIAL_STATE, SEGMENTS, WEIGHT, X};
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::vector;

static PROGRAM: Program = Program { name: "causal_conv1d", source: include_str!("kernel.cu") };

const THREADS: usize = 128;
/// Rows of a run: long enough that the W − 1 rows that are read again cost little.
const RUN: usize = 64;
/// Rows that are read together, for filters of the usual width.
const ROWS: usize = 4;
/// Rows a segment up to which one thread walks over a whole segment.
const SHORT: usize = 4;

/// Kernels for operands of this alignment, with the number of blocks that the channels need.
struct Launch {
    dtype: DType,
    width: usize,
    silu: bool,
    v: usize,
    channels: usize,
    run: usize,
}

impl Launch {
    fn new(forward: &Forward, most: usize, mats: &[Option<Mat>]) -> Launch {
        let Some(x) = mats[0] else { unreachable!("x is always there") };
        // States and parts have rows of `channels` numbers in f32, so what fits x fits them.
        let mats: Vec<Mat> = mats.iter().flatten().copied().collect();
        // Wide filters need their registers for taps.
        let v = vector(&mats).min(if forward.width <= 4 { most } else { 1 });
        // At most 65,535 runs fit a grid.
        let run = RUN.max(x.rows.div_ceil(65_535).next_multiple_of(RUN));
        Launch { dtype: x.dtype, width: forward.width, silu: forward.silu, v, channels: x.cols, run }
    }

    fn kernel(&self, entry: &'static str, parts: usize) -> Kernel {
        Kernel::new(&PROGRAM, entry)
            .define_type("T", self.dtype)
            .define("W", self.width)
            .define("V", self.v)
            .define("RUN", self.run)
            .define("ROWS", if self.width <= 4 { ROWS } else { 1 })
            .define("SILU", i32::from(self.silu))
            .grid((self.channels / self.v).div_ceil(THREADS), parts, 1)
            .threads(THREADS as u32)
    }
}

fn address(m: Mat) -> Arg {
    Arg::Ptr(m.address())
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, weight, offsets) = (io.input(X), io.input(WEIGHT), io.input(SEGMENTS));
    let (bias, initial) = (io.optional_input(BIAS), io.optional_input(INITIAL_STATE));
    let (y, last) = (io.optional_output(0), io.optional_output(1));
    let launch = Launch::new(forward, 4, &[Some(x), y]);
    let segments = offsets.cols - 1;
    let operands = [x.into(), weight.into(), bias.into(), initial.into(), address(offsets), y.into()];
    let sizes = [Arg::from(x.rows), x.cols.into(), (segments as i32).into()];
    if segments > 0 && x.rows <= SHORT * segments && segments <= 65_535 {
        let kernel = launch.kernel("convolve_segments", segments);
        return launcher.launch(kernel.args(operands).arg(last).args(sizes));
    }
    if y.is_some() {
        let kernel = launch.kernel("convolve_runs", x.rows.div_ceil(launch.run));
        launcher.launch(kernel.args(operands).args(sizes))?;
    }
    match last {
        Some(last) if forward.width > 1 => launcher.launch(launch.kernel("last_inputs", segments).args([
            x.into(),
            initial.into(),
            address(offsets),
            last.into(),
            x.cols.into(),
        ])),
        _ => Ok(()),
    }
}

/// Bytes of the parts of dweight and dbias.
pub(super) fn gradient_workspace(forward: &Forward, tokens: usize, channels: usize) -> usize {
    4 * tokens.div_ceil(RUN) * (forward.width + 1) * channels
}

pub(super) fn run_grad(gradient: &Gradient, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, weight, offsets) = (io.input(X), io.input(WEIGHT), io.input(SEGMENTS));
    let (bias, initial) = (io.optional_input(BIAS), io.optional_input(INITIAL_STATE));
    let (dy, dlast) = (io.optional_input(Gradient::DY), io.optional_input(Gradient::D_FINAL));
    let [dx, dweight, dbias, dinitial] = [X, WEIGHT, BIAS, INITIAL_STATE].map(|i| io.optional_output(i));
    let launch = Launch::new(&gradient.forward, 4, &[Some(x), dy, dx]);
    let (segments, runs) = (offsets.cols - 1, x.rows.div_ceil(launch.run));
    let operands = [x.into(), weight.into(), bias.into(), initial.into(), address(offsets), dy.into(), dlast.into()];
    let parts = io.workspace().0;
    let sums = dweight.is_some() || dbias.is_some();
    if dx.is_some() || sums {
        let part = if sums { Arg::from(parts) } else { Arg::Ptr(0) };
        let kernel = launch.kernel("convolve_grad", runs).args(operands.clone());
        launcher.launch(kernel.args([dx.into(), part, x.rows.into(), x.cols.into(), (segments as i32).into()]))?;
    }
    if sums {
        let kernel = launch.kernel("add_parts", gradient.forward.width + 1).grid(
            x.cols.div_ceil(32),
            gradient.forward.width + 1,
            1,
        );
        launcher.launch(kernel.threads(1024).args([
            parts.into(),
            dweight.into(),
            dbias.into(),
            runs.into(),
            x.cols.into(),
        ]))?;
    }
    match dinitial {
        Some(dinitial) if gradient.forward.width > 1 => {
            let kernel = launch.kernel("initial_grad", segments).args(operands);
            launcher.launch(kernel.args([dinitial.into(), x.cols.into()]))
        }
        _ => Ok(()),
    }
}
