//! Launches of the optimizer's kernels.

use std::ops::Range;

use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::error::Error;
use crate::graph::Io;

static PROGRAM: Program = Program { name: "adamw", source: include_str!("kernel.cu") };

const THREADS: usize = 256;
/// Numbers that a block of the norm adds up.
const BLOCK: usize = 64 * 1024;
/// Decayed ranges that one launch is told of: its parameters have a few KiB.
const RANGES: usize = 120;

fn kernel(entry: &'static str, ranges: usize, shadow: bool) -> Kernel {
    Kernel::new(&PROGRAM, entry)
        .define("BLOCK", BLOCK)
        .define("COUNT", ranges)
        .define("SHADOW", i32::from(shadow))
        .threads(THREADS as u32)
}

pub(super) fn norm_workspace(n: usize) -> usize {
    8 * n.div_ceil(BLOCK)
}

pub(super) fn norm(io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (grads, parts) = (io.input(0), io.workspace().0);
    let blocks = grads.cols.div_ceil(BLOCK);
    launcher.launch(kernel("squares", 0, false).grid(blocks, 1, 1).args([
        grads.into(),
        parts.into(),
        grads.cols.into(),
    ]))?;
    launcher.launch(kernel("root", 0, false).args([parts.into(), io.output(0).into(), blocks.into()]))
}

pub(super) fn first_not_finite(io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (x, norm, place) = (io.input(0), io.input(1), io.output(0));
    launcher.launch(kernel("first_not_finite", 0, false).threads(1024).args([
        x.into(),
        norm.into(),
        Arg::Ptr(place.address()),
        x.cols.into(),
    ]))
}

pub(super) fn step(decayed: &[Range<usize>], io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    // The outputs are the inputs 0, 2 and 3, updated in place.
    let (params, m, v) = (io.output(0), io.output(1), io.output(2));
    let shadow = io.optional_output(3);
    let (mut first, mut told) = (0, 0);
    loop {
        let next = (told + RANGES).min(decayed.len());
        // A launch ends where the next one's ranges begin, on the grid of the threads' 4 parameters. The range before
        // that may reach into those 4, so the next launch is told of it again.
        let ranges = &decayed[told.saturating_sub(1)..next];
        let last = decayed.get(next).map_or(params.cols, |range| range.start / 4 * 4);
        let table: Vec<u64> = ranges.iter().flat_map(|r| [r.start as u64, r.end as u64]).chain([0]).collect();
        let grid = last.saturating_sub(first).div_ceil(4 * THREADS);
        launcher.launch(
            kernel("adamw", ranges.len(), shadow.is_some())
                .grid(grid, 1, 1)
                .args([params.into(), io.input(1).into(), m.into(), v.into(), io.input(4).into(), io.input(5).into()])
                .args([shadow.into(), first.into(), last.into(), Arg::Table(table)]),
        )?;
        (first, told) = (last, next);
        if next == decayed.len() {
            return Ok(());
        }
    }
}
