//! Cutting a product into blocks that fit the caches, and blocks into tasks.

use std::cell::Cell;
use std::ops::Range;

use super::super::isa::{Isa, Kernel};
use super::super::pool::Pool;
use super::super::simd::{Element, Simd};
use super::Start;
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
pub(super) const SERIAL_WORK: usize = 200_000;
/// Multiply-adds that a task has at least, where there is more than one.
pub(super) const TASK_WORK: usize = 100_000;
/// Tasks a thread gets, about: enough to even out what else the machine does.
pub(super) const TASKS_PER_THREAD: usize = 4;
/// Steps of k packed at a time where a task packs for itself: a slab of a panel stays in L1 for a single tile.
const SLAB_STEPS: usize = 256;
/// What packing an element costs, in multiply-adds.
const PACK_COST: usize = 8;
/// What a byte of packed panels costs that few rows use, in multiply-adds: it comes from memory, and one thread alone
/// does not reach the memory's rate.
pub(super) const READ_COST: usize = 5;
/// Elements a packing task moves, about.
pub(super) const PACK_WORK: usize = 32_768;
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

/// The pieces a task needs, sent by address.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub T);

// SAFETY: tasks write disjoint parts of C and of the workspace, and read what nobody writes.
unsafe impl<T> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    /// The whole wrapper is captured by closures this way, not its field.
    pub fn get(&self) -> T {
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
pub(super) fn region(pool: Option<&Pool>, tasks: usize, f: impl Fn(usize) + Sync) {
    match pool {
        Some(pool) => pool.run(tasks, f),
        None => (0..tasks).for_each(f),
    }
}

/// Calls `f` with room for `len` values of this thread's own, aligned to cache lines.
pub(super) fn with_workspace<T>(len: usize, f: impl FnOnce(*mut f32) -> T) -> T {
    let mut workspace = WORKSPACE.take();
    if workspace.len() * 16 < len {
        workspace.resize(len.div_ceil(16), Line([0.0; 16]));
    }
    let result = f(workspace.as_mut_ptr().cast());
    WORKSPACE.set(workspace);
    result
}

/// C = start + A · B. Shapes have been checked; neither m nor n is 0.
pub(super) fn drive<W: Weight>(
    pool: Option<&Pool>,
    isa: Isa,
    mut c: MatMut<'_>,
    start: Start<'_>,
    a: MatRef<'_>,
    b: Right<'_, W>,
    tile_rows: usize,
) {
    let (m, n, k) = (a.rows(), c.cols(), a.cols());
    let read_cost = if m <= tile_rows { READ_COST * size_of::<W>() } else { 0 };
    let cost = match b {
        Right::Packed(_) => read_cost,
        Right::Strided(_) => PACK_COST,
    };
    let work = (m + cost).saturating_mul(n).saturating_mul(k);
    let pool = pool.filter(|pool| pool.threads() > 1 && work >= SERIAL_WORK);
    let threads = pool.map_or(1, Pool::threads);
    let width = panel_columns(isa.lanes());
    let c_stride = c.row_stride();
    let product =
        Product { pool, threads, isa, c: Shared(c.as_mut_ptr()), c_stride, start, a, n, tile_rows, width, read_cost };
    match b {
        Right::Strided(b) if m <= tile_rows || (m <= TASK_ROWS && (pool.is_none() || n >= 2 * threads * width)) => {
            product.by_panels(b);
        }
        _ => product.by_blocks(b),
    }
}

/// A product, its right-hand side aside.
struct Product<'a> {
    pool: Option<&'a Pool>,
    threads: usize,
    isa: Isa,
    c: Shared<*mut f32>,
    c_stride: usize,
    start: Start<'a>,
    a: MatRef<'a>,
    n: usize,
    tile_rows: usize,
    /// Columns of a panel.
    width: usize,
    /// What reading an element of B costs beside multiplying, in multiply-adds.
    read_cost: usize,
}

impl Product<'_> {
    /// Few rows, and B not packed: every task packs a piece of a panel into its own cache and uses it up at once, so
    /// B is read once and never written to memory.
    fn by_panels(&self, b: MatRef<'_>) {
        let (m, n, k, width) = (self.a.rows(), self.n, self.a.cols(), self.width);
        let slab = if m <= self.tile_rows { SLAB_STEPS } else { 2 * SLAB_STEPS };
        let panels = n.div_ceil(width);
        let least = TASK_WORK.div_ceil(((m + PACK_COST) * width * k).max(1));
        let group = panels.div_ceil(self.threads * TASKS_PER_THREAD).max(least);
        region(self.pool, panels.div_ceil(group), |task| {
            with_workspace(width * slab, |panel| {
                for column in (task * group * width..n.min((task + 1) * group * width)).step_by(width) {
                    let columns = width.min(n - column);
                    // One round even where k is 0: it writes where the sums start.
                    for step in (0..k.max(1)).step_by(slab) {
                        let steps = slab.min(k - step);
                        let lines = b.row_range(step..step + steps).col_range(column..column + columns).t();
                        pack(self.isa, lines, width, panel);
                        self.isa.run(Block {
                            k: steps,
                            a: strided(self.a.col_range(step..step + steps)),
                            rows: m,
                            b: panel.cast_const(),
                            panel_stride: 0,
                            columns,
                            // SAFETY: the column lies inside of C.
                            c: unsafe { self.c.get().add(column) },
                            c_stride: self.c_stride,
                            from: self.from(column, step),
                        });
                    }
                }
            });
        });
    }

    /// Blocks of rows, columns and k. What is to be packed is packed by all threads, then used by all.
    fn by_blocks<W: Weight>(&self, b: Right<'_, W>) {
        let (m, n, k, width, tile_rows) = (self.a.rows(), self.n, self.a.cols(), self.width, self.tile_rows);
        let few_rows = m <= tile_rows;
        let packed = matches!(b, Right::Packed(_));
        // With few rows the panels are streamed once and all sums fit into registers: no blocks of k.
        let k_steps = if few_rows && packed { k.max(1) } else { even(k, K_STEPS, 16) };
        let columns = if packed { n } else { n.min(COLUMNS) };
        let pack_a = !few_rows && self.a.col_stride() != 1 && n.div_ceil(width) >= PACK_A_PANELS;
        let rows = if pack_a { even(m, ROWS, tile_rows) } else { m };
        let a_len = if pack_a { (rows.next_multiple_of(tile_rows) * k_steps).next_multiple_of(16) } else { 0 };
        let b_len = if packed { 0 } else { columns.next_multiple_of(width) * k_steps };
        with_workspace(a_len + b_len, |workspace| {
            // SAFETY: the workspace holds both parts.
            let b_pack = unsafe { workspace.add(a_len) };
            for column in (0..n).step_by(columns) {
                // One round even where k is 0: it writes where the sums start.
                for step in (0..k.max(1)).step_by(k_steps) {
                    for row in (0..m).step_by(rows) {
                        let place = Place {
                            rows: row..m.min(row + rows),
                            columns: column..n.min(column + columns),
                            steps: step..k.min(step + k_steps),
                            a_pack: pack_a.then_some(Shared(workspace)),
                            b_pack: Shared(b_pack),
                        };
                        self.pack(&place, b);
                        self.multiply(&place, b);
                    }
                }
            }
        });
    }

    /// Packs what a block needs and no block before has packed.
    fn pack<W: Weight>(&self, place: &Place, b: Right<'_, W>) {
        let steps = place.steps.len();
        let a = self.a.row_range(place.rows.clone()).col_range(place.steps.clone());
        let a_rows = if place.a_pack.is_some() { a.rows() } else { 0 };
        let a_group = (PACK_WORK / (self.tile_rows * steps).max(1)).max(1) * self.tile_rows;
        let a_tasks = a_rows.div_ceil(a_group);
        // Blocks of rows share the panels of the first.
        let b = match b {
            Right::Strided(b) if place.rows.start == 0 => {
                Some(b.row_range(place.steps.clone()).col_range(place.columns.clone()).t())
            }
            _ => None,
        };
        let b_group = (PACK_WORK / (self.width * steps).max(1)).max(1) * self.width;
        let b_tasks = b.map_or(0, |b| b.rows().div_ceil(b_group));
        region(self.pool, a_tasks + b_tasks, |task| {
            if let Some(a_pack) = place.a_pack
                && task < a_tasks
            {
                let first = task * a_group;
                let lines = a.row_range(first..a_rows.min(first + a_group));
                // SAFETY: the workspace has room for all tiles of the block.
                pack(self.isa, lines, self.tile_rows, unsafe { a_pack.get().add(first * steps) });
            } else if let Some(b) = b {
                let first = (task - a_tasks) * b_group;
                let lines = b.row_range(first..b.rows().min(first + b_group));
                // SAFETY: the workspace has room for all panels of the block.
                pack(self.isa, lines, self.width, unsafe { place.b_pack.get().add(first * steps) });
            }
        });
    }

    /// Multiplies a block, on all threads.
    fn multiply<W: Weight>(&self, place: &Place, b: Right<'_, W>) {
        let (k, width, steps) = (self.a.cols(), self.width, place.steps.len());
        let a = self.a.row_range(place.rows.clone()).col_range(place.steps.clone());
        let panels = place.columns.len().div_ceil(width);
        let grid = Grid::new(a.rows(), panels, steps * width, self.read_cost, self.tile_rows, self.threads);
        region(self.pool, grid.tasks(), |task| {
            let (rows, panels) = grid.place(task);
            let first = panels.start * width;
            let column = place.columns.start + first;
            let block = Block {
                k: steps,
                a: match place.a_pack {
                    // SAFETY: the tile lies inside of the packed block.
                    Some(a_pack) => Left::Packed(unsafe { a_pack.get().add(rows.start * steps) }),
                    None => strided(a.row_range(rows.clone())),
                },
                rows: rows.len(),
                // The panels of the workspace; replaced below where B came packed.
                b: place.b_pack.get().cast_const().wrapping_add(first * steps),
                panel_stride: steps * width,
                columns: place.columns.len().min(panels.end * width) - first,
                // SAFETY: the block lies inside of C, and no other task's block overlaps it.
                c: unsafe { self.c.get().add((place.rows.start + rows.start) * self.c_stride + column) },
                c_stride: self.c_stride,
                from: self.from(column, place.steps.start),
            };
            match b {
                Right::Strided(_) => self.isa.run(block),
                Right::Packed(data) => {
                    let at = column * k + place.steps.start * width;
                    self.isa.run(block.with_panels(data.as_ptr().wrapping_add(at), k * width));
                }
            }
        });
    }

    /// Where the sums start at a column and a step of k: later blocks of k go on from C.
    fn from(&self, column: usize, step: usize) -> From {
        match self.start {
            Start::C => From::C,
            _ if step > 0 => From::C,
            Start::Zero => From::Zero,
            Start::Bias(bias) => From::Bias(bias[column..].as_ptr()),
        }
    }
}

/// A block of the product and where its packed parts are.
struct Place {
    rows: Range<usize>,
    columns: Range<usize>,
    steps: Range<usize>,
    a_pack: Option<Shared<*mut f32>>,
    b_pack: Shared<*mut f32>,
}

/// Rows of A where they are.
fn strided(a: MatRef<'_>) -> Left {
    Left::Strided { ptr: a.as_ptr(), row: a.row_stride(), col: a.col_stride() }
}

/// Packs lines (rows of the view) into panels of `width`.
pub(super) fn pack<T: Element>(isa: Isa, lines: MatRef<'_, T>, width: usize, to: *mut f32) {
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
pub(super) fn even(n: usize, most: usize, unit: usize) -> usize {
    let parts = n.div_ceil(most).max(1);
    n.div_ceil(parts).next_multiple_of(unit).max(1)
}

/// Tasks over a block of C: rows by panels.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    rows: usize,
    panels: usize,
    task_rows: usize,
    task_panels: usize,
}

impl Grid {
    /// Tasks for `rows` and `panels` of `panel` elements each.
    pub fn new(rows: usize, panels: usize, panel: usize, read_cost: usize, tile_rows: usize, threads: usize) -> Grid {
        let mut grid = Grid { rows, panels, task_rows: even(rows, TASK_ROWS, tile_rows), task_panels: panels };
        let wanted = if threads > 1 { threads * TASKS_PER_THREAD } else { 1 };
        let work = |grid: &Grid| (grid.task_rows.min(rows) + read_cost) * grid.task_panels * panel.max(1);
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

    pub fn tasks(&self) -> usize {
        self.rows.div_ceil(self.task_rows) * self.panels.div_ceil(self.task_panels)
    }

    /// The rows and panels of a task; neighbours share the rows of A.
    pub fn place(&self, task: usize) -> (Range<usize>, Range<usize>) {
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
