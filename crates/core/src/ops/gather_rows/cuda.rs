//! Launches of the kernels that gather and scatter rows.

use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::vector;

static PROGRAM: Program = Program { name: "gather_rows", source: include_str!("kernel.cu") };

const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

fn kernel(entry: &'static str, from: Mat, to: Mat) -> (Kernel, usize) {
    let v = vector(&[from, to]);
    let kernel = Kernel::new(&PROGRAM, entry)
        .define_type("TI", from.dtype)
        .define_type("TO", to.dtype)
        .define("V", v)
        .threads(THREADS as u32);
    (kernel, v)
}

/// y[i] = x[rows[i]], in the type of y.
pub(crate) fn gather(launcher: &mut Launcher<'_>, x: Mat, rows: Mat, y: Mat) -> Result<(), Error> {
    let (kernel, _) = kernel("gather", x, y);
    launcher.launch(kernel.grid(y.rows.div_ceil(WARPS), 1, 1).args([
        x.into(),
        Arg::Ptr(rows.address()),
        y.into(),
        y.rows.into(),
        x.rows.into(),
        x.cols.into(),
    ]))
}

/// Bytes of counts, starts and two lists.
pub(super) fn scatter_workspace(count: usize, n: usize) -> usize {
    4 * (n + (n + 1) + 2 * count)
}

/// Sums of the values with the same row number.
pub(super) fn scatter_add(launcher: &mut Launcher<'_>, io: &Io<'_>) -> Result<(), Error> {
    let (values, rows, sum) = (io.input(0), Arg::Ptr(io.input(1).address()), io.output(0));
    let (count, n) = (values.rows, sum.rows);
    let counts = io.workspace().0;
    let starts = counts.wrapping_add(4 * n);
    let lists = starts.wrapping_add(4 * (n + 1));
    let sorted = lists.wrapping_add(4 * count);
    launcher.zero(counts, 4 * n)?;
    let launch = |entry| kernel(entry, values, sum).0;
    let blocks = count.div_ceil(THREADS);
    launcher.launch(launch("count").grid(blocks, 1, 1).args([rows.clone(), counts.into(), count.into(), n.into()]))?;
    launcher.launch(launch("sum_counts").grid(1, 1, 1).threads(1024).args([counts.into(), starts.into(), n.into()]))?;
    launcher.launch(launch("fill_lists").grid(blocks, 1, 1).args([
        rows,
        counts.into(),
        starts.into(),
        lists.into(),
        count.into(),
        n.into(),
    ]))?;
    launcher.launch(launch("sort_lists").grid(n, 1, 1).args([starts.into(), lists.into(), sorted.into()]))?;
    launcher.launch(launch("add_up").grid(n.div_ceil(WARPS), 1, 1).args([
        values.into(),
        starts.into(),
        sorted.into(),
        sum.into(),
        n.into(),
        values.cols.into(),
    ]))
}
