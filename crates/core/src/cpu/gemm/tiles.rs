//! Products of bf16 with sums in f32, by tiles: A and B are rounded to bf16 as they are packed.
//!
//! What is computed is what AMX's TDPBF16PS computes, at every level of instructions: k in blocks of 32; in each, one
//! chain of multiply-adds over the even and one over the odd values of k, each begun with 0; their sum is added to C,
//! which begins with its start value, block after block. Products of two bf16 are exact in f32, so a level without
//! fused multiply-adds has the same bits. Values missing at the end of k are 0. (AMX alone takes denormal numbers as 0.)
//!
//! So the bits of an element depend on its row of A, its column of B and its start value alone.

use super::super::isa::{Isa, Kernel};
use super::super::pool::Pool;
use super::super::simd::{Element, MAX_LANES, Simd};
use super::Start;
use super::drive::{PACK_WORK, SERIAL_WORK, Shared, TASK_WORK, TASKS_PER_THREAD, even, region, with_workspace};
use super::matrix::{MatMut, MatRef};
use half::bf16;

/// Lines of a tile: rows of A, columns of B.
pub(super) const LINES: usize = 16;
/// Values of k in a tile.
pub(super) const STEPS: usize = 32;
/// Elements of a tile.
pub(super) const TILE: usize = LINES * STEPS;

/// Tiles of k a block has at most: a pair of B's panels (32 KiB) stays in L1.
const K_TILES: usize = 16;
/// Tiles of k that are packed at a time.
const PACK_K_TILES: usize = 64;
/// Rows of A packed at a time.
const ROWS: usize = 1536;
/// Columns of B packed at a time.
const COLUMNS: usize = 3072;
/// Rows of a task: A's part of up to 768 values of k takes less than half of an L2 of 2 MiB.
const TASK_ROWS: usize = 512;
/// Columns of a task: C's part takes a quarter.
const TASK_COLUMNS: usize = 256;
/// How much faster than multiply-adds tiles are, about, to judge what is worth a task.
const SPEED: usize = 8;

/// Elements that `lines` × `k` values take in tiles.
pub(super) fn len(lines: usize, k: usize) -> Option<usize> {
    lines.checked_next_multiple_of(LINES)?.checked_mul(k.checked_next_multiple_of(STEPS)?)
}

/// Where value `k` of line `line` of the right-hand side stands among `tiles` tiles of k.
pub(super) fn place(line: usize, k: usize, tiles: usize) -> usize {
    (line / LINES * tiles + k / STEPS) * TILE + (k % STEPS / 2 * LINES + line % LINES) * 2 + k % 2
}

/// Rounds lines (rows of the view) to bf16 and packs them into panels of 16 lines, each a tile for every 32 values of
/// k. A tile is `[line][value]` for a left-hand side, `[pair of values][line][2]` for a right-hand one.
pub(super) struct PackTiles<T> {
    pub from: *const T,
    /// Elements from line to line.
    pub line: usize,
    /// Elements from value to value along a line.
    pub step: usize,
    pub lines: usize,
    pub k: usize,
    pub right: bool,
    /// ⌈lines / 16⌉ panels.
    pub to: *mut bf16,
    /// Elements from panel to panel.
    pub panel: usize,
}

impl<T: Element> PackTiles<T> {
    pub fn new(lines: MatRef<'_, T>, right: bool, to: *mut bf16, panel: usize) -> PackTiles<T> {
        let (line, step) = (lines.row_stride(), lines.col_stride());
        PackTiles { from: lines.as_ptr(), line, step, lines: lines.rows(), k: lines.cols(), right, to, panel }
    }

    /// Packs one tile whose lines or values are neighbours, as `[line][pair]` or `[pair][line]`, whichever they are.
    ///
    /// # Safety
    /// The tile has `lines` lines of `k` values at `from`.
    #[inline(always)]
    unsafe fn natural<S: Simd>(&self, s: S, from: *const T, lines: usize, k: usize, to: *mut f32) {
        // SAFETY: only values that exist are read; the tile has 16 rows of 16 pairs.
        unsafe {
            for i in 0..LINES {
                for first in (0..LINES).step_by(S::LANES) {
                    let to = to.add(i * LINES + first);
                    if self.step == 1 {
                        // A line's values: one vector of pairs is two of values.
                        let at = |half: usize| {
                            let value = 2 * first + half * S::LANES;
                            let valid = if i < lines { k.saturating_sub(value).min(S::LANES) } else { 0 };
                            partial(s, from.wrapping_add(i * self.line + value), valid)
                        };
                        s.store_bf16(to.cast(), at(0));
                        s.store_bf16(to.cast::<bf16>().add(S::LANES), at(1));
                    } else {
                        let valid = lines.saturating_sub(first).min(S::LANES);
                        let at = |value: usize| {
                            let valid = if value < k { valid } else { 0 };
                            partial(s, from.wrapping_add(value * self.step + first * self.line), valid)
                        };
                        s.store(to, s.bf16_pairs(at(2 * i), at(2 * i + 1)));
                    }
                }
            }
        }
    }
}

/// The first `n` values at a place, 0 in the other lanes; nothing is read for n = 0.
///
/// # Safety
/// As [`Element::load_partial`].
#[inline(always)]
unsafe fn partial<S: Simd, T: Element>(s: S, from: *const T, n: usize) -> S::V {
    // SAFETY: the caller's promises.
    unsafe {
        match n {
            0 => s.zero(),
            n if n == S::LANES => T::load(s, from),
            n => T::load_partial(s, from, n),
        }
    }
}

/// Transposes 16 × 16 values of 32 bits.
///
/// # Safety
/// Both are valid for 256 values and do not overlap.
#[inline(always)]
unsafe fn transpose<S: Simd>(s: S, from: *const f32, to: *mut f32) {
    for i in (0..LINES).step_by(S::LANES) {
        for j in (0..LINES).step_by(S::LANES) {
            let mut square = [s.zero(); MAX_LANES];
            // SAFETY: the square lies in both.
            unsafe {
                for (r, row) in square.iter_mut().enumerate().take(S::LANES) {
                    *row = s.load(from.add((i + r) * LINES + j));
                }
                let square = s.transpose(square);
                for (r, row) in square.iter().enumerate().take(S::LANES) {
                    s.store(to.add((j + r) * LINES + i), *row);
                }
            }
        }
    }
}

impl<T: Element> Kernel for PackTiles<T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for panel in 0..self.lines.div_ceil(LINES) {
            for tile in 0..self.k.div_ceil(STEPS) {
                let (lines, k) = ((self.lines - panel * LINES).min(LINES), (self.k - tile * STEPS).min(STEPS));
                let from = self.from.wrapping_add(panel * LINES * self.line + tile * STEPS * self.step);
                // SAFETY: whoever made this vouches for the lines and for room for the panels.
                unsafe {
                    let to = self.to.add(panel * self.panel + tile * TILE);
                    // Values that are neighbours give a left-hand tile, lines that are neighbours a right-hand one.
                    if self.step != 1 && self.line != 1 {
                        for at in 0..TILE {
                            let (line, value) = match self.right {
                                true => (at / 2 % LINES, at / (2 * LINES) * 2 + at % 2),
                                false => (at / STEPS, at % STEPS),
                            };
                            let exists = line < lines && value < k;
                            let value = exists.then(|| (*from.add(line * self.line + value * self.step)).widen());
                            *to.add(at) = bf16::from_f32(value.unwrap_or(0.0));
                        }
                    } else if (self.step == 1) != self.right {
                        self.natural(s, from, lines, k, to.cast());
                    } else {
                        let mut tile = [0.0f32; LINES * LINES];
                        self.natural(s, from, lines, k, tile.as_mut_ptr());
                        transpose(s, tile.as_ptr(), to.cast());
                    }
                }
            }
        }
    }
}

/// The right-hand side.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Tiles over all of k.
    Packed(&'a [bf16]),
    Strided(MatRef<'a>),
}

/// C = start + A · B, both rounded to bf16. Shapes have been checked; neither m nor n is 0.
pub(super) fn drive(pool: Option<&Pool>, isa: Isa, mut c: MatMut<'_>, start: Start<'_>, a: MatRef<'_>, b: Right<'_>) {
    let (m, n, k) = (a.rows(), c.cols(), a.cols());
    let pool = pool.filter(|pool| {
        pool.threads() > 1 && (m + LINES).saturating_mul(n).saturating_mul(k) >= SPEED / 2 * SERIAL_WORK
    });
    let threads = pool.map_or(1, Pool::threads);
    let c_stride = c.row_stride();
    let c = Shared(c.as_mut_ptr());
    let all_tiles = k.div_ceil(STEPS);
    let tiles = even(all_tiles, PACK_K_TILES, 1);
    let rows = even(m, ROWS, LINES);
    let columns = match b {
        Right::Packed(_) => n.next_multiple_of(LINES),
        Right::Strided(_) => even(n, COLUMNS, LINES),
    };
    let a_len = rows * tiles * STEPS;
    let b_len = if let Right::Strided(_) = b { columns * tiles * STEPS } else { 0 };
    // The workspace is counted in f32.
    with_workspace((a_len + b_len) / 2, |workspace| {
        let a_pack = Shared(workspace.cast::<bf16>());
        let b_pack = Shared(workspace.cast::<bf16>().wrapping_add(a_len));
        for column in (0..n).step_by(columns) {
            let width = columns.min(n - column);
            // One round even where k is 0: it writes where the sums start.
            for tile in (0..all_tiles.max(1)).step_by(tiles) {
                let count = tiles.min(all_tiles - tile);
                let steps = tile * STEPS..k.min((tile + count) * STEPS);
                for row in (0..m).step_by(rows) {
                    let height = rows.min(m - row);
                    let a = a.row_range(row..row + height).col_range(steps.clone());
                    let b_lines = match b {
                        Right::Strided(b) if row == 0 => {
                            Some(b.row_range(steps.clone()).col_range(column..column + width).t())
                        }
                        _ => None,
                    };
                    pack(pool, isa, a, a_pack, b_lines, b_pack, count * TILE);
                    let (b, b_panel) = match b {
                        Right::Strided(_) => (b_pack.get().cast_const(), count * TILE),
                        Right::Packed(data) => {
                            let at = (column / LINES * all_tiles + tile) * TILE;
                            (data.as_ptr().wrapping_add(at), all_tiles * TILE)
                        }
                    };
                    let (task_rows, task_columns) = cut(height, width, count * STEPS, threads);
                    let across = width.div_ceil(task_columns);
                    let b = Shared(b);
                    region(pool, height.div_ceil(task_rows) * across, |task| {
                        let (i, j) = (task / across * task_rows, task % across * task_columns);
                        let block = Block {
                            rows: task_rows.min(height - i),
                            columns: task_columns.min(width - j),
                            tiles: count,
                            a: a_pack.get().wrapping_add(i / LINES * count * TILE),
                            a_panel: count * TILE,
                            b: b.get().wrapping_add(j / LINES * b_panel),
                            b_panel,
                            c: c.get().wrapping_add((row + i) * c_stride + column + j),
                            c_stride,
                            start: match start {
                                _ if tile > 0 => Start::C,
                                Start::Bias(bias) => Start::Bias(&bias[column + j..]),
                                other => other,
                            },
                        };
                        // SAFETY: the block's parts of A, B and C exist, and no other task has this part of C.
                        unsafe { block.multiply(isa) };
                    });
                }
            }
        }
    });
}

/// Packs rows of A, and columns of B if there are any, on all threads.
fn pack(
    pool: Option<&Pool>,
    isa: Isa,
    a: MatRef<'_>,
    a_to: Shared<*mut bf16>,
    b: Option<MatRef<'_>>,
    b_to: Shared<*mut bf16>,
    panel: usize,
) {
    if panel == 0 {
        return;
    }
    let group = (PACK_WORK / panel).max(1) * LINES;
    let (a_tasks, b_tasks) = (a.rows().div_ceil(group), b.map_or(0, |b| b.rows().div_ceil(group)));
    region(pool, a_tasks + b_tasks, |task| {
        let (lines, to, right, task) = match b {
            Some(b) if task >= a_tasks => (b, b_to, true, task - a_tasks),
            _ => (a, a_to, false, task),
        };
        let first = task * group;
        let lines = lines.row_range(first..lines.rows().min(first + group));
        isa.run(PackTiles::new(lines, right, to.get().wrapping_add(first / LINES * panel), panel));
    });
}

/// Rows and columns of a task.
fn cut(m: usize, n: usize, k: usize, threads: usize) -> (usize, usize) {
    let (mut rows, mut columns) = (even(m, TASK_ROWS, 2 * LINES), even(n, TASK_COLUMNS, 2 * LINES));
    let wanted = if threads > 1 { threads * TASKS_PER_THREAD } else { 1 };
    while m.div_ceil(rows) * n.div_ceil(columns) < wanted && rows.min(m) * columns * k >= 2 * SPEED * TASK_WORK {
        if columns > 4 * LINES || (rows <= 2 * LINES && columns > 2 * LINES) {
            columns = columns.div_ceil(2).next_multiple_of(2 * LINES);
        } else if rows > 2 * LINES {
            rows = rows.div_ceil(2).next_multiple_of(2 * LINES);
        } else {
            break;
        }
    }
    (rows, columns)
}

/// A part of C that one task computes.
struct Block<'a> {
    rows: usize,
    columns: usize,
    /// Tiles of k.
    tiles: usize,
    a: *const bf16,
    a_panel: usize,
    b: *const bf16,
    b_panel: usize,
    c: *mut f32,
    c_stride: usize,
    start: Start<'a>,
}

/// What multiplies tiles.
trait Unit {
    /// C[16·M, 16·N] += A · B over `steps` tiles of k, or C = A · B with `zero`. Only `rows` rows of A count.
    ///
    /// # Safety
    /// All tiles are valid for reading, C for reading and writing; `a_next` and `b_next` elements lead from one panel
    /// to the next.
    #[expect(clippy::too_many_arguments, reason = "two operands and a result with their strides")]
    unsafe fn multiply<const M: usize, const N: usize>(
        &self,
        steps: usize,
        a: *const bf16,
        a_next: usize,
        b: *const bf16,
        b_next: usize,
        c: *mut f32,
        c_stride: usize,
        zero: bool,
        rows: usize,
    );
}

#[cfg(target_arch = "x86_64")]
impl Unit for super::super::amx::Tiles {
    #[inline(always)]
    unsafe fn multiply<const M: usize, const N: usize>(
        &self,
        steps: usize,
        a: *const bf16,
        a_next: usize,
        b: *const bf16,
        b_next: usize,
        c: *mut f32,
        c_stride: usize,
        zero: bool,
        _: usize,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            super::super::amx::Tiles::multiply::<M, N>(
                self,
                steps,
                a.cast(),
                a_next,
                b.cast(),
                b_next,
                c,
                c_stride,
                zero,
            );
        }
    }
}

/// Tiles by vectors of any level.
struct Vectors<S>(S);

impl<S: Simd> Vectors<S> {
    /// R rows of a tile of A by one of B, `steps` of them: C[R, 16].
    ///
    /// # Safety
    /// As [`Unit::multiply`].
    #[inline(always)]
    unsafe fn rows<const R: usize>(
        &self,
        steps: usize,
        a: *const bf16,
        b: *const bf16,
        c: *mut f32,
        c_stride: usize,
        zero: bool,
    ) {
        let s = self.0;
        // SAFETY: the caller vouches for the tiles and for C.
        unsafe {
            for first in (0..LINES).step_by(S::LANES) {
                let mut total = [s.zero(); R];
                if !zero {
                    for (r, total) in total.iter_mut().enumerate() {
                        *total = s.load(c.add(r * c_stride + first));
                    }
                }
                for step in 0..steps {
                    let (a, b) = (a.add(step * TILE), b.add(step * TILE + 2 * first));
                    let mut sums = [[s.zero(); 2]; R];
                    for pair in 0..STEPS / 2 {
                        let (even, odd) = s.load_bf16_pairs(b.add(pair * 2 * LINES));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let a = a.add(r * STEPS + 2 * pair);
                            sums[0] = s.fma(s.splat((*a).widen()), even, sums[0]);
                            sums[1] = s.fma(s.splat((*a.add(1)).widen()), odd, sums[1]);
                        }
                    }
                    for (total, sums) in total.iter_mut().zip(sums) {
                        *total = s.add(*total, s.add(sums[0], sums[1]));
                    }
                }
                for (r, total) in total.iter().enumerate() {
                    s.store(c.add(r * c_stride + first), *total);
                }
            }
        }
    }
}

impl<S: Simd> Unit for Vectors<S> {
    #[inline(always)]
    unsafe fn multiply<const M: usize, const N: usize>(
        &self,
        steps: usize,
        a: *const bf16,
        a_next: usize,
        b: *const bf16,
        b_next: usize,
        c: *mut f32,
        c_stride: usize,
        zero: bool,
        rows: usize,
    ) {
        for column in 0..N {
            let mut row = 0;
            while row < rows.min(M * LINES) {
                // SAFETY: the caller's promises; four rows lie in one tile.
                unsafe {
                    let a = a.add(row / LINES * a_next + row % LINES * STEPS);
                    let b = b.add(column * b_next);
                    let c = c.add(row * c_stride + column * LINES);
                    if rows - row >= 4 {
                        self.rows::<4>(steps, a, b, c, c_stride, zero);
                        row += 4;
                    } else {
                        self.rows::<1>(steps, a, b, c, c_stride, zero);
                        row += 1;
                    }
                }
            }
        }
    }
}

impl Block<'_> {
    /// Multiplies with the tiles or the vectors of a level.
    ///
    /// # Safety
    /// The block's parts of A, B and C exist, and nobody else touches C's.
    unsafe fn multiply(self, isa: Isa) {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's promises; the level is one of this machine's.
            Isa::Amx if isa.is_available() => unsafe { self.by(&super::super::amx::Tiles::configure()) },
            _ => isa.run(self),
        }
    }

    /// # Safety
    /// As [`Block::multiply`].
    #[inline(always)]
    unsafe fn by(&self, unit: &impl Unit) {
        // SAFETY (all blocks): the caller vouches for C.
        if let (Start::Bias(_), _) | (Start::Zero, 0) = (self.start, self.tiles) {
            for row in 0..self.rows {
                let row = unsafe { std::slice::from_raw_parts_mut(self.c.add(row * self.c_stride), self.columns) };
                match self.start {
                    Start::Bias(bias) => row.copy_from_slice(&bias[..self.columns]),
                    _ => row.fill(0.0),
                }
            }
        }
        let most = even(self.tiles, K_TILES, 1);
        for tile in (0..self.tiles).step_by(most) {
            let steps = most.min(self.tiles - tile);
            let zero = tile == 0 && matches!(self.start, Start::Zero);
            for column in (0..self.columns).step_by(2 * LINES) {
                for row in (0..self.rows).step_by(2 * LINES) {
                    unsafe { self.square(unit, row, column, tile, steps, zero) };
                }
            }
        }
    }

    /// Up to 2 × 2 tiles of C.
    ///
    /// # Safety
    /// As [`Block::multiply`].
    #[inline(always)]
    unsafe fn square(&self, unit: &impl Unit, row: usize, column: usize, tile: usize, steps: usize, zero: bool) {
        const SIDE: usize = 2 * LINES;
        let (rows, columns) = ((self.rows - row).min(SIDE), (self.columns - column).min(SIDE));
        let a = self.a.wrapping_add(row / LINES * self.a_panel + tile * TILE);
        let b = self.b.wrapping_add(column / LINES * self.b_panel + tile * TILE);
        let c = self.c.wrapping_add(row * self.c_stride + column);
        let (m, n) = (rows.div_ceil(LINES), columns.div_ceil(LINES));
        // Tiles that reach beyond C are computed beside it.
        let mut beside = [0.0f32; SIDE * SIDE];
        let whole = rows == m * LINES && columns == n * LINES;
        // SAFETY: tiles of A and B are whole, whatever m and n; only the part of C that exists is touched.
        unsafe {
            let (to, stride) = if whole { (c, self.c_stride) } else { (beside.as_mut_ptr(), SIDE) };
            if !whole && !zero {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(c.add(r * self.c_stride), to.add(r * SIDE), columns);
                }
            }
            match (m, n) {
                (1, 1) => unit.multiply::<1, 1>(steps, a, self.a_panel, b, self.b_panel, to, stride, zero, rows),
                (1, _) => unit.multiply::<1, 2>(steps, a, self.a_panel, b, self.b_panel, to, stride, zero, rows),
                (_, 1) => unit.multiply::<2, 1>(steps, a, self.a_panel, b, self.b_panel, to, stride, zero, rows),
                _ => unit.multiply::<2, 2>(steps, a, self.a_panel, b, self.b_panel, to, stride, zero, rows),
            }
            if !whole {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(to.add(r * SIDE), c.add(r * self.c_stride), columns);
                }
            }
        }
    }
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: whoever made the block vouches for its parts.
        unsafe { self.by(&Vectors(s)) }
    }
}
