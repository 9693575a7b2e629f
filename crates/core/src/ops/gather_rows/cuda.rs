//! Launches of the kernels that gather and scatter rows.

use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::vector;

static PROGRAM: Program = Program { name: "gather_rows", source: include_str!("kernel.cu") };

const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Values that one block adds up.
const PIECE: usize = 32;

fn kernel(entry: &'static str, from: Mat, to: Mat) -> (Kernel, usize) {
    let v = vector(&[from, to]);
    let kernel = Kernel::new(&PROGRAM, entry)
        .define_type("TI", from.dtype)
        .define_type("TO", to.dtype)
        .define("V", v)
        .define("PIECE", PIECE)
        .threads(THREADS as u32);
    (kernel, v)
}

/// y[i] = x[rows[i]], in the type of y.
pub(crate) fn gather(launcher: &mut Launcher<'_>, x: Mat, rows: Mat, y: Mat) -> Result<(), Error> {
    let kernel = kernel("gather", x, y).0;
    launcher.launch(kernel.grid(y.rows.div_ceil(WARPS), 1, 1).args([
        x.into(),
        Arg::Ptr(rows.address()),
        y.into(),
        y.rows.into(),
        x.rows.into(),
        x.cols.into(),
    ]))
}

/// y = x, in the type of y: weights in blocks for products that know none.
pub(crate) fn widen(launcher: &mut Launcher<'_>, x: Mat, y: Mat) -> Result<(), Error> {
    let kernel = kernel("gather", x, y).0;
    let (none, rows) = (Arg::Ptr(0), y.rows.into());
    launcher.launch(kernel.grid(y.rows.div_ceil(WARPS), 1, 1).args([
        x.into(),
        none,
        y.into(),
        rows,
        x.rows.into(),
        x.cols.into(),
    ]))
}

/// Where counts, starts, the two lists and the parts of the sums begin in the workspace, and its size: bytes.
fn places(count: usize, n: usize, cols: usize) -> [usize; 6] {
    let mut end = 0;
    [n, n + 1, count, count, 2 * count.div_ceil(PIECE) * cols, 0].map(|numbers| {
        let start = end;
        end += (4 * numbers).next_multiple_of(64);
        start
    })
}

pub(super) fn scatter_workspace(count: usize, n: usize, cols: usize) -> usize {
    places(count, n, cols)[5]
}

/// Sums of the values with the same row number.
pub(super) fn scatter_add(launcher: &mut Launcher<'_>, io: &Io<'_>) -> Result<(), Error> {
    let (values, rows, sum) = (io.input(0), Arg::Ptr(io.input(1).address()), io.output(0));
    let (count, n, cols) = (values.rows, sum.rows, values.cols);
    let workspace = io.workspace().0;
    let [counts, starts, lists, sorted, parts, _] = places(count, n, cols).map(|at| workspace.wrapping_add(at));
    launcher.zero(counts, 4 * n)?;
    let launch = |entry, blocks| kernel(entry, values, sum).0.grid(blocks, 1, 1);
    let blocks = count.div_ceil(THREADS);
    let ids = rows.clone();
    launcher.launch(launch("count", blocks).args([ids.clone(), counts.into(), count.into(), n.into()]))?;
    launcher.launch(launch("sum_counts", 1).threads(1024).args([counts.into(), starts.into(), n.into()]))?;
    let lists_of = [counts.into(), starts.into(), lists.into(), count.into(), n.into()];
    launcher.launch(launch("fill_lists", blocks).arg(ids.clone()).args(lists_of))?;
    let sorting = [ids, starts.into(), lists.into(), sorted.into(), count.into(), n.into()];
    launcher.launch(launch("sort_lists", n.div_ceil(WARPS)).args(sorting))?;
    let adding = [values.into(), rows, starts.into(), sorted.into(), parts.into(), sum.into(), n.into(), cols.into()];
    launcher.launch(launch("add_pieces", count.div_ceil(PIECE)).args(adding))?;
    let adding = [starts.into(), parts.into(), sum.into(), n.into(), cols.into()];
    launcher.launch(launch("add_parts", n.div_ceil(WARPS)).args(adding))
}
