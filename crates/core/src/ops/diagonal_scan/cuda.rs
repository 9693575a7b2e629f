//! Launches of the scan's kernels.

use super::{A, A_IMAG, B, C, D, DT, DT_BIAS, Discretisation, Forward, Gradient, SEGMENTS, X};
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::tasks::Scratch;

static FORWARD: Program =
    Program { name: "diagonal_scan", source: concat!(include_str!("common.cu"), include_str!("forward.cu")) };
static BACKWARD: Program =
    Program { name: "diagonal_scan_grad", source: concat!(include_str!("common.cu"), include_str!("backward.cu")) };

/// Numbers of a channel's state up to which a chunk fits into shared memory.
const MOST: usize = 64;

fn kernel(forward: &Forward, program: &'static Program, entry: &'static str, dtype: DType) -> Kernel {
    // As many warps as have room for what they share.
    let warps = match (std::ptr::eq(program, &FORWARD), forward.chunk() == 32) {
        (true, true) => 8,
        (true, false) | (false, true) => 4,
        (false, false) => 1,
    };
    let part = |i: usize| if forward.fixed[i] { DType::F32 } else { dtype };
    let flag = |value: bool| usize::from(value);
    Kernel::new(program, entry)
        .define_type("T", dtype)
        .define_type("TB", part(0))
        .define_type("TC", part(1))
        .define("COMPLEX", flag(forward.is_complex()))
        .define("ZOH", flag(forward.discretisation == Discretisation::Zoh))
        .define("B_FIXED", flag(forward.fixed[0]))
        .define("C_FIXED", flag(forward.fixed[1]))
        .define("CHUNK", forward.chunk())
        .define("W", warps)
        .threads(32 * warps)
}

fn check(forward: &Forward) -> Result<(), Error> {
    if forward.width() <= MOST {
        return Ok(());
    }
    let message = format!(
        "a channel's state has {} numbers; on a GPU at most {MOST} are supported, so choose fewer states or a CPU",
        forward.width()
    );
    Err(Error::Unsupported { op: super::NAME, message })
}

/// Bytes of states that rest in scratch memory where nobody wants the final ones.
pub(super) fn workspace(forward: &Forward, channels: usize, segments: usize) -> usize {
    Scratch::bytes(segments, forward.width() * channels)
}

/// The operands that both kernels begin with.
fn operands(io: &Io<'_>) -> [Arg; 8] {
    let optional = |i| io.optional_input(i);
    [
        io.input(X).into(),
        io.input(A).into(),
        optional(A_IMAG).into(),
        io.input(B).into(),
        io.input(C).into(),
        optional(DT).into(),
        optional(DT_BIAS).into(),
        optional(D).into(),
    ]
}

fn offsets(io: &Io<'_>) -> (Arg, usize) {
    let m = io.input(SEGMENTS);
    (Arg::Ptr(m.address()), m.cols - 1)
}

pub(super) fn run(forward: &Forward, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    check(forward)?;
    let x = io.input(X);
    let (offsets, segments) = offsets(io);
    let mut memory = Scratch::new(io.workspace());
    let rest = memory.take(segments, forward.width() * x.cols);
    let kernel = kernel(forward, &FORWARD, "diagonal_scan", x.dtype);
    let args = [
        io.optional_input(Forward::INITIAL_STATE).into(),
        offsets,
        io.optional_output(0).into(),
        io.optional_output(1).unwrap_or(rest).into(),
        io.optional_output(2).into(),
        x.rows.into(),
        x.cols.into(),
        forward.states.into(),
        Arg::I32(segments as i32),
    ];
    launcher.launch(kernel.grid(x.cols.div_ceil(32), segments.max(1), 1).args(operands(io)).args(args))
}

/// How the gradient's sums are cut.
struct Cut {
    /// Groups of 32 channels of a block: so many that sums over channels take at most T·D values.
    groups: usize,
    blocks: usize,
    row_parts: (usize, usize),
    time_parts: (usize, usize),
    states: (usize, usize),
}

impl Cut {
    fn new(forward: &Forward, tokens: usize, channels: usize, segments: usize) -> Cut {
        let width = forward.width();
        let groups = (2 * width).div_ceil(32);
        let blocks = channels.div_ceil(32 * groups);
        Cut {
            groups,
            blocks,
            row_parts: if forward.fixed == [true; 2] { (0, 0) } else { (blocks * tokens, 2 * width) },
            time_parts: (segments, (3 * width + 2) * channels),
            states: (segments, width * channels),
        }
    }
}

pub(super) fn gradient_workspace(forward: &Forward, tokens: usize, channels: usize, segments: usize) -> usize {
    let cut = Cut::new(forward, tokens, channels, segments);
    [cut.row_parts, cut.time_parts, cut.states].iter().map(|&(rows, cols)| Scratch::bytes(rows, cols)).sum()
}

pub(super) fn run_grad(gradient: &Gradient, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let forward = &gradient.forward;
    check(forward)?;
    let x = io.input(X);
    let (tokens, channels, width) = (x.rows, x.cols, forward.width());
    let (offsets, segments) = offsets(io);
    let cut = Cut::new(forward, tokens, channels, segments);
    let mut memory = Scratch::new(io.workspace());
    let mut take = |(rows, cols)| memory.take(rows, cols);
    let (row_parts, time_parts, rest) = (take(cut.row_parts), take(cut.time_parts), take(cut.states));
    let args = [
        offsets.clone(),
        io.optional_input(Gradient::DY).into(),
        io.optional_input(Gradient::D_FINAL).into(),
        io.input(Gradient::CHUNK_STATES).into(),
        io.optional_output(X).into(),
        io.optional_output(DT).into(),
        io.optional_output(Forward::INITIAL_STATE).unwrap_or(rest).into(),
        Arg::Ptr(row_parts.address()),
        Arg::Ptr(time_parts.address()),
        tokens.into(),
        channels.into(),
        forward.states.into(),
        Arg::I32(segments as i32),
        cut.groups.into(),
    ];
    let walk = kernel(forward, &BACKWARD, "diagonal_scan_grad", x.dtype);
    launcher.launch(walk.grid(cut.blocks, segments.max(1), 1).args(operands(io)).args(args))?;
    let sum = |entry| kernel(forward, &BACKWARD, entry, x.dtype).threads(256);
    let column = |m: Mat, col: usize| Arg::Ptr(m.address() + (col * size_of::<f32>()) as u64);
    for (i, input) in [B, C].into_iter().enumerate() {
        let Some(out) = io.optional_output(input) else { continue };
        if forward.fixed[i] {
            continue;
        }
        let args = [
            column(row_parts, i * width),
            offsets.clone(),
            out.into(),
            cut.blocks.into(),
            tokens.into(),
            width.into(),
            (2 * width).into(),
            Arg::I32(segments as i32),
        ];
        launcher.launch(sum("add_rows").grid((tokens * width).div_ceil(256), 1, 1).args(args))?;
    }
    let fixed = |i: usize, input| io.optional_output(input).filter(|_| forward.fixed[i]);
    let states = forward.states;
    for (out, first, rows, vector) in [
        (io.optional_output(A), 0, states, 0),
        (io.optional_output(A_IMAG), states, states, 0),
        (fixed(0, B), width, width, 0),
        (fixed(1, C), 2 * width, width, 0),
        (io.optional_output(D), 3 * width, 1, 1),
        (io.optional_output(DT_BIAS), 3 * width + 1, 1, 1),
    ] {
        let Some(out) = out else { continue };
        let args = [
            column(time_parts, first * channels),
            out.into(),
            rows.into(),
            channels.into(),
            cut.time_parts.1.into(),
            Arg::I32(segments as i32),
            Arg::I32(vector),
        ];
        launcher.launch(sum("add_time").grid((rows * channels).div_ceil(256), 1, 1).args(args))?;
    }
    Ok(())
}
