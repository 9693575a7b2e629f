//! Launches of the scan's kernels.

use super::{A, B, C, D, Forward, Gradient, INITIAL_STATE, NAME, SEGMENTS, U, V, X, chunk_len};
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::{Io, Mat};

static PROGRAM: Program = Program { name: "lti_scan", source: include_str!("kernel.cu") };

/// Pairs of states a channel beyond which a chunk's states do not fit.
const MOST_PAIRS: usize = 128;
/// Pairs of a thread.
const PAIRS_A_LANE: usize = 4;
/// Steps whose states the gradient has in registers; divides every chunk.
const SUB: usize = 8;
/// Rows of blocks of the gradient at most: each leaves sums over time.
const MOST_PARTS: usize = 64;
const ADDING_THREADS: usize = 256;

/// How pairs and channels are spread over threads.
struct Spread {
    pairs: usize,
    lanes: usize,
    warps: usize,
}

impl Spread {
    fn new(pairs: usize) -> Result<Spread, Error> {
        if pairs > MOST_PAIRS {
            let message = format!("on a GPU at most {MOST_PAIRS} pairs of states a channel are possible, not {pairs}");
            return Err(Error::Unsupported { op: NAME, message });
        }
        let lanes = pairs.div_ceil(PAIRS_A_LANE).next_power_of_two();
        // Chunks are longer where there are more states.
        Ok(Spread { pairs, lanes, warps: if pairs <= 32 { 4 } else { 1 } })
    }

    fn threads(&self) -> usize {
        32 * self.warps
    }

    fn pairs_a_lane(&self) -> usize {
        self.pairs.div_ceil(self.lanes)
    }

    /// Bytes of shared memory of the gradient: the state of every SUB-th step of a chunk.
    fn shared(&self) -> usize {
        chunk_len(self.pairs) / SUB * 2 * self.pairs_a_lane() * self.threads() * 4
    }

    fn kernel(&self, forward: &Forward, entry: &'static str, x: Mat, rows: usize) -> Kernel {
        Kernel::new(&PROGRAM, entry)
            .define_type("T", x.dtype)
            .define("PAIRS", self.pairs)
            .define("LANES", self.lanes)
            .define("NS", self.pairs_a_lane())
            .define("WARPS", self.warps)
            .define("CHUNK", chunk_len(self.pairs))
            .define("SUB", SUB)
            .define("RANK_ONE", i32::from(forward.rank_one))
            .grid(x.cols.div_ceil(self.threads() / self.lanes), rows, 1)
            .threads(self.threads() as u32)
    }
}

/// `Scan` of the kernels.
fn scan(io: &Io<'_>) -> Arg {
    let (x, offsets) = (io.input(X), io.input(SEGMENTS));
    let mut table = matrices(&[X, A, B, C, U, V, D].map(|i| io.optional_input(i)));
    table.extend([offsets.address(), offsets.cols as u64 - 1, x.rows as u64, x.cols as u64]);
    Arg::Table(table)
}

/// Some `Mat`s in a structure.
fn matrices(mats: &[Option<Mat>]) -> Vec<u64> {
    mats.iter().flat_map(|m| m.map_or([0, 0], |m| [m.address(), m.stride as u64])).collect()
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let segments = io.input(SEGMENTS).cols - 1;
    let kernel = Spread::new(forward.pairs)?.kernel(forward, "lti_scan", io.input(X), segments.clamp(1, 65_535));
    let [y, last, kept] = [0, 1, 2].map(|i| io.optional_output(i));
    launcher.launch(kernel.args([
        scan(io),
        io.optional_input(INITIAL_STATE).into(),
        y.into(),
        last.into(),
        kept.into(),
    ]))
}

/// Segments that are walked through at the same time, each with sums of its own.
fn parts(segments: usize) -> usize {
    segments.clamp(1, MOST_PARTS)
}

fn sum_rows(forward: &Forward) -> usize {
    2 * forward.pairs * forward.coefficients() + 1
}

pub(super) fn gradient_workspace(forward: &Forward, channels: usize, segments: usize) -> usize {
    4 * parts(segments) * sum_rows(forward) * channels
}

pub(super) fn run_grad(gradient: &Gradient, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let forward = &gradient.forward;
    let (x, parts) = (io.input(X), parts(io.input(SEGMENTS).cols - 1));
    let spread = Spread::new(forward.pairs)?;
    let given = [Gradient::DY, Gradient::D_FINAL, Gradient::CHUNK_STATES].map(|i| io.optional_input(i));
    let made = [X, INITIAL_STATE].map(|i| io.optional_output(i));
    let sums = io.workspace().0;
    let kernel = spread.kernel(forward, "lti_scan_grad", x, parts).shared(spread.shared());
    let gradients = Arg::Table(matrices(&[given, [made[0], made[1], None]].concat()[..5]));
    launcher.launch(kernel.args([scan(io), gradients, sums.into()]))?;
    let outputs = [A, B, C, U, V, D].map(|i| io.optional_output(i));
    if outputs.iter().all(Option::is_none) {
        return Ok(());
    }
    let kernel = spread.kernel(forward, "add_parts", x, 1).threads(ADDING_THREADS as u32);
    let kernel = kernel.grid(x.cols.div_ceil(ADDING_THREADS), sum_rows(forward), 1);
    launcher.launch(kernel.args([sums.into(), Arg::Table(matrices(&outputs)), parts.into(), x.cols.into()]))
}
