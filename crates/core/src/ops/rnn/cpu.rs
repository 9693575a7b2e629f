//! LSTM and GRU on a CPU: a step of all segments that are still running is a product [segments, H] · Wᵀ on all threads,
//! then the gates, a row a segment. Segments are taken longest first, so those that run are the first ones.

use super::lanes;
use super::{BIAS, Cell, Gradient, INITIAL_STATE, SEGMENTS, WEIGHT, X};
use crate::cpu::Cpu;
use crate::cpu::gemm::{MatRef, PackedMatrix, Start, gemm, pack_into, packed_len};
use crate::graph::{Io, Mat};
use crate::ops::linear::{view, view_mut};
use crate::ops::tasks::{Scratch, Segments};

/// Numbers of gates that one task computes, about.
const ELEMENTS_PER_TASK: usize = 4 * 1024;

/// Scratch memory: the packed matrix, a, then h and c of each segment.
pub(super) fn workspace(cell: Cell, units: usize, segments: usize, cpu: &Cpu) -> usize {
    let width = cell.gates() * units;
    bytes(cell, units, segments) + Scratch::bytes(1, packed_len::<f32>(cpu.isa, units, width))
}

/// Scratch memory: the packed matrix, da, then dh and dc of each segment.
pub(super) fn workspace_grad(cell: Cell, units: usize, segments: usize, cpu: &Cpu) -> usize {
    let width = cell.gates() * units;
    bytes(cell, units, segments) + Scratch::bytes(1, packed_len::<f32>(cpu.isa, width, units))
}

fn bytes(cell: Cell, units: usize, segments: usize) -> usize {
    Scratch::bytes(segments, cell.gates() * units) + 2 * Scratch::bytes(segments, units)
}

/// The segments, longest first, and where their rows begin.
struct Running {
    /// Number, first row and length of each.
    segments: Vec<(usize, usize, usize)>,
}

impl Running {
    fn new(segments: &Segments<'_>) -> Running {
        let of = |s: usize| (s, segments.rows(s).start, segments.rows(s).len());
        let mut all: Vec<_> = (0..segments.len()).map(of).collect();
        all.sort_by_key(|&(_, _, len)| std::cmp::Reverse(len));
        Running { segments: all }
    }

    /// Steps of the longest.
    fn steps(&self) -> usize {
        self.segments.first().map_or(0, |&(_, _, len)| len)
    }

    /// How many have a step `t`.
    fn at(&self, t: usize) -> usize {
        self.segments.partition_point(|&(_, _, len)| len > t)
    }
}

/// B [k, n] packed into scratch memory for all the products of a run.
fn packed<'a>(b: MatRef<'_>, scratch: &mut Scratch, cpu: &Cpu) -> PackedMatrix<'a> {
    let len = packed_len::<f32>(cpu.isa, b.rows(), b.cols());
    let memory = scratch.take(1, len);
    // SAFETY: the memory holds `len` numbers and is the matrix's alone from here to the end of the run.
    let data = unsafe { memory.row_mut::<f32>(0) };
    pack_into(&cpu.pool, cpu.isa, b, data);
    PackedMatrix::new(cpu.isa, b.rows(), b.cols(), data)
}

/// The first `rows` rows.
fn first(m: Mat, rows: usize) -> Mat {
    Mat { rows, ..m }
}

/// Reads each segment's h and c from rows of a state, or of its gradient, in the order of `running`; zero without.
fn read_states(cell: Cell, running: &Running, from: Option<Mat>, [h, c]: [Mat; 2]) {
    for (place, &(segment, ..)) in running.segments.iter().enumerate() {
        // SAFETY: called outside of parallel regions; the rows exist, and a state has h and for the LSTM c.
        unsafe {
            for (part, to) in [h, c].into_iter().take(cell.state()).enumerate() {
                let to = to.row_mut::<f32>(place);
                match from {
                    Some(from) => to.copy_from_slice(&from.row::<f32>(segment)[part * h.cols..][..h.cols]),
                    None => to.fill(0.0),
                }
            }
        }
    }
}

/// The opposite.
fn write_states(cell: Cell, running: &Running, [h, c]: [Mat; 2], to: Mat) {
    for (place, &(segment, ..)) in running.segments.iter().enumerate() {
        // SAFETY: as above.
        unsafe {
            for (part, from) in [h, c].into_iter().take(cell.state()).enumerate() {
                to.row_mut::<f32>(segment)[part * h.cols..][..h.cols].copy_from_slice(from.row::<f32>(place));
            }
        }
    }
}

pub(super) fn run(cell: Cell, io: &Io<'_>, cpu: &Cpu) {
    let (x, weight) = (io.input(X), io.input(WEIGHT));
    let (bias, initial) = (io.optional_input(BIAS), io.optional_input(INITIAL_STATE));
    let [y, last, kept] = [0, 1, 2].map(|i| io.optional_output(i));
    let segments = Segments::new(io.segments(SEGMENTS), x.rows);
    let (units, running) = (weight.cols, Running::new(&segments));
    let mut scratch = Scratch::new(io.workspace());
    // SAFETY: inputs do not change while the op runs.
    let matrix = packed(unsafe { view(weight) }.t(), &mut scratch, cpu);
    let a = scratch.take(segments.len(), cell.gates() * units);
    let state = [(); 2].map(|()| scratch.take(segments.len(), units));
    let [h, c] = state;
    read_states(cell, &running, initial, state);
    // SAFETY: as above.
    let start = bias.map_or(Start::Zero, |bias| Start::Bias(unsafe { bias.row(0) }));
    for t in 0..running.steps() {
        let count = running.at(t);
        // SAFETY: this is outside of parallel regions, and a and h are different memory.
        unsafe { gemm(cpu, view_mut(first(a, count)), start, view(first(h, count)), matrix) };
        cpu.pool.chunks(count, (ELEMENTS_PER_TASK / a.cols.max(1)).max(1), |places| {
            for place in places {
                let row = running.segments[place].1 + t;
                // SAFETY: this task alone has this segment; the row is one of its rows.
                unsafe {
                    cpu.isa.run(lanes::Forward {
                        cell,
                        units,
                        x: x.at(row, 0),
                        a: a.at(place, 0),
                        h: h.at(place, 0),
                        c: c.at(place, 0),
                        y: y.map(|y| y.at(row, 0)),
                        kept: kept.map(|kept| kept.at(row, 0)),
                    });
                }
            }
        });
    }
    if let Some(last) = last {
        write_states(cell, &running, state, last);
    }
    if let Some(y) = y {
        segments.clear_rest(y);
    }
}

pub(super) fn run_grad(cell: Cell, io: &Io<'_>, cpu: &Cpu) {
    let (weight, y, kept) = (io.input(Gradient::WEIGHT), io.input(Gradient::Y), io.input(Gradient::KEPT));
    let [initial, dy, d_final] =
        [Gradient::INITIAL_STATE, Gradient::DY, Gradient::D_FINAL].map(|i| io.optional_input(i));
    let [dx, da, before, d_initial] =
        [Gradient::DX, Gradient::DA, Gradient::BEFORE, Gradient::D_INITIAL].map(|i| io.optional_output(i));
    let segments = Segments::new(io.segments(Gradient::SEGMENTS), y.rows);
    let (units, running) = (weight.cols, Running::new(&segments));
    let width = cell.gates() * units;
    let mut scratch = Scratch::new(io.workspace());
    // SAFETY: inputs do not change while the op runs.
    let matrix = packed(unsafe { view(weight) }, &mut scratch, cpu);
    let step = scratch.take(segments.len(), width);
    let d_state = [(); 2].map(|()| scratch.take(segments.len(), units));
    let [dh, dc] = d_state;
    read_states(cell, &running, d_final, d_state);
    // A part of the state before a token: of the row before, or of the initial state.
    let part_before = |rows: Mat, part: usize, (segment, start, _): (usize, usize, usize), row: usize| {
        let (m, row, part) = if row > start { (Some(rows), row - 1, 0) } else { (initial, segment, part) };
        // SAFETY: the row exists; states have `part` parts of `units` numbers before this one.
        m.map(|m| unsafe { m.at::<f32>(row, part * units) }.cast_const())
    };
    // The columns of what is kept that hold c.
    let c_rows = if cell == Cell::Lstm { kept.columns(4 * units, units) } else { kept };
    for t in (0..running.steps()).rev() {
        let count = running.at(t);
        cpu.pool.chunks(count, (ELEMENTS_PER_TASK / width.max(1)).max(1), |places| {
            for place in places {
                let segment = running.segments[place];
                let row = segment.1 + t;
                let h_before = part_before(y, 0, segment, row);
                // SAFETY: this task alone has this segment; the row is one of its rows.
                unsafe {
                    cpu.isa.run(lanes::Backward {
                        cell,
                        units,
                        kept: kept.at(row, 0),
                        before: match cell {
                            Cell::Lstm => part_before(c_rows, 1, segment, row),
                            Cell::Gru => h_before,
                        },
                        dy: dy.map(|dy| dy.at::<f32>(row, 0).cast_const()),
                        dh: dh.at(place, 0),
                        dc: dc.at(place, 0),
                        dx: dx.map(|dx| dx.at(row, 0)),
                        da: step.at(place, 0),
                    });
                    if let Some(da) = da {
                        da.row_mut::<f32>(row).copy_from_slice(step.row(place));
                    }
                    if let Some(before) = before {
                        let to = before.row_mut::<f32>(row);
                        match h_before {
                            Some(from) => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), units),
                            None => to.fill(0.0),
                        }
                    }
                }
            }
        });
        let start = if cell == Cell::Lstm { Start::Zero } else { Start::C };
        // SAFETY: this is outside of parallel regions, and dh and da are different memory.
        unsafe { gemm(cpu, view_mut(first(dh, count)), start, view(first(step, count)), matrix) };
    }
    if let Some(d_initial) = d_initial {
        write_states(cell, &running, d_state, d_initial);
    }
    for out in [dx, da, before].into_iter().flatten() {
        segments.clear_rest(out);
    }
}
