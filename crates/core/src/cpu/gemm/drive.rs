//! Cutting a product into blocks that fit the caches, and blocks into tasks.

use std::cell::Cell;

use super::super::isa::{Isa, Kernel};
use super::super::pool::Pool;
use super::super::simd::{Element, Simd};
use super::kernel::{Block, From, Left, Weight, panel_columns, tile_rows};
use super::matrix::{MatMut, MatRef};
use super::pack::Pack;

/// Steps of k a block has at most: a panel of B (128 KiB in f32 with AVX-512) stays in L2. It need not fit into L1:
/// a tile reads two vectors of B for 24 multiply-adds. Few, long blocks keep C out of the way; measured better than
/// 256 to 512.
const K_STEPS: usize = 1024;
/// Rows of A packed at a time.
const ROWS: usize = 1536;
/// Columns of B packed at a time.
const COLUMNS: usize = 3072;
/// Rows of A a task works on: how often a panel of B is used before the next one comes.
const TASK_ROWS: usize = 384;
/// Multiply-adds below which a product is not worth waking anybody.
const SERIAL_WORK: usize = 200_000;
/// Multiply-adds that a task has at least, where there is more than one.
const TASK_WORK: usize = 100_000;
/// Tasks a thread gets, about: enough to even out what else the machine does.
const TASKS_PER_THREAD: usize = 4;
/// Elements a packing task moves, about.
const PACK_WORK: usize = 32_768;
/// Panels of B from which on packing a transposed A pays. Rows of A that lie in memory as such are never packed:
/// tiles read them value by value anyway, and measurements show no gain from moving them together.
const PACK_A_PANELS: usize = 8;

/// The right-hand side as the driver sees it.
#[derive(Clone, Copy)]
pub(super) enum Right<'a, W> {
    /// Panels over all of k.
    Packed(&'a [W]),
    Strided(MatRef<'a>),
}

/// Where the sums start.
#[derive(Clone, Copy)]
pub(super) enum Init<'a> {
    Zero,
    C,
    Bias(&'a [f32]),
}

/// The pieces a task needs, sent by address.
#[derive(Clone, Copy)]
struct Shared<T>(T);

// SAFETY: tasks write disjoint parts of C and of the workspace, and read what nobody writes.
unsafe impl<T> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    /// The whole wrapper is captured by closures this way, not its field.
    fn get(&self) -> T {
        self.0
    }
}

/// A cache line of f32.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    /// Packed blocks; kept from call to call, so that a steady state allocates nothing.
    static WORKSPACE: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Runs tasks on the pool, or one by one here.
fn region(pool: Option<&Pool>, tasks: usize, f: impl Fn(usize) + Sync) {
    match pool {
        Some(pool) => pool.run(tasks, f),
        None => (0..tasks).for_each(f),
    }
}

/// C = init + A · B. Shapes have been checked; neither m nor n is 0.
pub(super) fn drive<W: Weight>(
    pool: Option<&Pool>,
    isa: Isa,
    mut c: MatMut<'_>,
    init: Init<'_>,
    a: MatRef<'_>,
    b: Right<'_, W>,
    tile_rows: usize,
) {
    let (m, n, k) = (a.rows(), c.cols(), a.cols());
    let work = m.saturating_mul(n).saturating_mul(k);
    let pool = pool.filter(|pool| pool.threads() > 1 && work >= SERIAL_WORK);
    let width = panel_columns(isa.lanes());
    let c_stride = c.row_stride();
    let c = Shared(c.as_mut_ptr());

    let few_rows = m <= tile_rows;
    let packed = matches!(b, Right::Packed(_));
    // With few rows the panels are streamed once and all sums fit into registers: no blocks of k.
    let k_steps = if few_rows && packed { k.max(1) } else { even(k, K_STEPS, 16) };
    let columns = if packed { n } else { n.min(COLUMNS) };
    let pack_a = !few_rows && a.col_stride() != 1 && n.div_ceil(width) >= PACK_A_PANELS;
    let rows = if pack_a { even(m, ROWS, tile_rows) } else { m };

    let a_len = if pack_a { rows.next_multiple_of(tile_rows) * k_steps } else { 0 };
    let b_len = if packed { 0 } else { columns.next_multiple_of(width) * k_steps };
    let mut workspace = WORKSPACE.take();
    let lines = (a_len.next_multiple_of(16) + b_len).div_ceil(16);
    if workspace.len() < lines {
        workspace.resize(lines, Line([0.0; 16]));
    }
    let a_pack = Shared(workspace.as_mut_ptr().cast::<f32>());
    // SAFETY: the workspace holds both parts.
    let b_pack = Shared(unsafe { a_pack.0.add(a_len.next_multiple_of(16)) });

    for column in (0..n).step_by(columns) {
        let columns = columns.min(n - column);
        let panels = columns.div_ceil(width);
        // One round even where k is 0: it writes where the sums start.
        for step in (0..k.max(1)).step_by(k_steps) {
            let steps = k_steps.min(k - step);
            let from = match init {
                Init::C => From::C,
                _ if step > 0 => From::C,
                Init::Zero => From::Zero,
                Init::Bias(bias) => From::Bias(bias[column..].as_ptr()),
            };
            let from = Shared(from);
            for row in (0..m).step_by(rows) {
                let rows = rows.min(m - row);
                let a_block = a.row_range(row..row + rows).col_range(step..step + steps);

                // Pack what is not packed yet.
                let per_task = |width: usize| (PACK_WORK / (width * steps).max(1)).max(1);
                let a_tiles = if pack_a { rows.div_ceil(tile_rows) } else { 0 };
                let a_group = per_task(tile_rows);
                let a_tasks = a_tiles.div_ceil(a_group);
                let b_panels = if !packed && row == 0 { panels } else { 0 };
                let b_group = per_task(width);
                let b_tasks = b_panels.div_ceil(b_group);
                region(pool, a_tasks + b_tasks, |task| {
                    if task < a_tasks {
                        let first = task * a_group * tile_rows;
                        let lines = a_block.row_range(first..rows.min(first + a_group * tile_rows));
                        // SAFETY: the workspace has room for all tiles of the block.
                        let to = unsafe { a_pack.get().add(first * steps) };
                        pack(isa, lines, tile_rows, to);
                    } else if let Right::Strided(b) = b {
                        let first = (task - a_tasks) * b_group * width;
                        let end = columns.min(first + b_group * width);
                        let lines = b.row_range(step..step + steps).col_range(column + first..column + end);
                        // SAFETY: the workspace has room for all panels of the block.
                        let to = unsafe { b_pack.get().add(first * steps) };
                        pack(isa, lines.t(), width, to);
                    }
                });

                let threads = pool.map_or(1, Pool::threads);
                let grid = Grid::new(rows, panels, steps, width, tile_rows, threads);
                region(pool, grid.tasks(), |task| {
                    let (rows_of, panels_of) = grid.place(task);
                    let first = panels_of.start * width;
                    let a = if pack_a {
                        // SAFETY: the tile lies inside of the packed block.
                        Left::Packed(unsafe { a_pack.get().add(rows_of.start * steps) })
                    } else {
                        let rows = a_block.row_range(rows_of.clone());
                        Left::Strided { ptr: rows.as_ptr(), row: rows.row_stride(), col: rows.col_stride() }
                    };
                    let start = match from.get() {
                        // SAFETY: the bias has a value for every column.
                        From::Bias(bias) => From::Bias(unsafe { bias.add(first) }),
                        other => other,
                    };
                    let rows = rows_of.len();
                    let columns = columns.min(panels_of.end * width) - first;
                    // SAFETY: the block lies inside of C, and no other task's block overlaps it.
                    let c = unsafe { c.get().add((row + rows_of.start) * c_stride + column + first) };
                    match b {
                        Right::Packed(data) => {
                            let at = (column + first) * k + step * width;
                            isa.run(Block {
                                k: steps,
                                a,
                                rows,
                                b: data.as_ptr().wrapping_add(at),
                                panel_stride: k * width,
                                columns,
                                c,
                                c_stride,
                                from: start,
                            });
                        }
                        Right::Strided(_) => isa.run(Block {
                            k: steps,
                            a,
                            rows,
                            // SAFETY: the panels lie inside of the workspace.
                            b: unsafe { b_pack.get().add(first * steps) }.cast_const(),
                            panel_stride: steps * width,
                            columns,
                            c,
                            c_stride,
                            from: start,
                        }),
                    }
                });
            }
        }
    }
    WORKSPACE.set(workspace);
}

/// Packs lines (rows of the view) into panels of `width`.
fn pack<T: Element>(isa: Isa, lines: MatRef<'_, T>, width: usize, to: *mut f32) {
    isa.run(Pack {
        from: lines.as_ptr(),
        line: lines.row_stride(),
        step: lines.col_stride(),
        count: lines.rows(),
        k: lines.cols(),
        width,
        to,
    });
}

/// The size of the parts if `n` is cut into as few as possible of at most `most`, all about alike and multiples of
/// `unit`; at least 1.
fn even(n: usize, most: usize, unit: usize) -> usize {
    let parts = n.div_ceil(most).max(1);
    n.div_ceil(parts).next_multiple_of(unit).max(1)
}

/// Tasks over a block of C: rows by panels.
#[derive(Clone, Copy)]
struct Grid {
    rows: usize,
    panels: usize,
    task_rows: usize,
    task_panels: usize,
}

impl Grid {
    fn new(rows: usize, panels: usize, steps: usize, width: usize, tile_rows: usize, threads: usize) -> Grid {
        let mut grid = Grid { rows, panels, task_rows: even(rows, TASK_ROWS, tile_rows), task_panels: panels };
        let wanted = if threads > 1 { threads * TASKS_PER_THREAD } else { 1 };
        let work = |grid: &Grid| grid.task_rows.min(rows) * grid.task_panels * width * steps.max(1);
        while grid.tasks() < wanted && work(&grid) >= 2 * TASK_WORK {
            // Rows stay together as long as there are panels to cut: they share the panels' way through the caches.
            if grid.task_panels > 4 || (grid.task_rows <= tile_rows && grid.task_panels > 1) {
                grid.task_panels = grid.task_panels.div_ceil(2);
            } else if grid.task_rows > tile_rows {
                grid.task_rows = grid.task_rows.div_ceil(2).next_multiple_of(tile_rows);
            } else {
                break;
            }
        }
        grid
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.task_rows) * self.panels.div_ceil(self.task_panels)
    }

    /// The rows and panels of a task; neighbours share the rows of A.
    fn place(&self, task: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let across = self.panels.div_ceil(self.task_panels);
        let (row, panel) = (task / across * self.task_rows, task % across * self.task_panels);
        (row..self.rows.min(row + self.task_rows), panel..self.panels.min(panel + self.task_panels))
    }
}

/// The rows of a tile at a level of instructions.
pub(super) fn rows_of_tile(isa: Isa) -> usize {
    struct Registers;
    impl Kernel for Registers {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::REGISTERS
        }
    }
    tile_rows(isa.run(Registers))
}
