//! The loops that multiply: tiles of C held in registers.

use half::bf16;

use super::super::isa::Kernel;
use super::super::simd::{Element, Simd};

/// Vectors a panel of B is wide.
pub(super) const PANEL_VECTORS: usize = 2;

/// Columns of a panel of B at `lanes` lanes.
pub(super) const fn panel_columns(lanes: usize) -> usize {
    PANEL_VECTORS * lanes
}

/// The rows of C held in registers at once: two accumulators a row, and room for two vectors of B and one value of A.
/// 12 × 32 with AVX-512, 12 × 8 with NEON, 6 × 16 with AVX2.
pub(super) const fn tile_rows(registers: usize) -> usize {
    match registers {
        32 => 12,
        16 => 6,
        _ => 3,
    }
}

/// A storage type of packed matrices: f32 or bf16.
pub trait Weight: Element {
    /// Whether this is bf16, which tiles multiply.
    #[doc(hidden)]
    const IS_BF16: bool;

    /// Reads one row of a panel.
    ///
    /// # Safety
    /// 2 · `LANES` values are valid for reading.
    #[doc(hidden)]
    unsafe fn load_panel_row<S: Simd>(simd: S, from: *const Self) -> [S::V; PANEL_VECTORS];

    /// Where a column of a panel stands in the panel's rows.
    #[doc(hidden)]
    fn place(column: usize, lanes: usize) -> usize;

    /// A packed matrix's data.
    #[doc(hidden)]
    fn wrap(data: &[Self]) -> super::packed::Data<'_>;
}

impl Weight for f32 {
    const IS_BF16: bool = false;

    #[inline(always)]
    unsafe fn load_panel_row<S: Simd>(simd: S, from: *const f32) -> [S::V; PANEL_VECTORS] {
        // SAFETY: the caller vouches for two vectors.
        unsafe { [simd.load(from), simd.load(from.add(S::LANES))] }
    }

    #[inline(always)]
    fn place(column: usize, _: usize) -> usize {
        column
    }

    fn wrap(data: &[f32]) -> super::packed::Data<'_> {
        super::packed::Data::F32(data)
    }
}

impl Weight for bf16 {
    const IS_BF16: bool = true;

    #[inline(always)]
    unsafe fn load_panel_row<S: Simd>(simd: S, from: *const bf16) -> [S::V; PANEL_VECTORS] {
        // SAFETY: the caller vouches for two vectors.
        let (even, odd) = unsafe { simd.load_bf16_pairs(from) };
        [even, odd]
    }

    /// Columns of the first and the second vector alternate, so that a shift and a mask widen them.
    #[inline(always)]
    fn place(column: usize, lanes: usize) -> usize {
        if column < lanes { 2 * column } else { 2 * (column - lanes) + 1 }
    }

    fn wrap(data: &[bf16]) -> super::packed::Data<'_> {
        super::packed::Data::Bf16(data)
    }
}

/// Where the sums of a block start.
#[derive(Clone, Copy)]
pub(super) enum From {
    Zero,
    C,
    /// The block's first column's bias.
    Bias(*const f32),
}

/// The rows of A of a block.
#[derive(Clone, Copy)]
pub(super) enum Left {
    /// Panels of [`tile_rows`] rows, each `[k][rows]`.
    Packed(*const f32),
    /// The matrix itself: element (i, k) at `i · row + k · col`.
    Strided { ptr: *const f32, row: usize, col: usize },
}

/// A block of C: C[rows, columns] = start + A[rows, k] · B[k, columns], a sequential chain of fused multiply-adds
/// over k for every element.
pub(super) struct Block<W> {
    pub k: usize,
    pub a: Left,
    pub rows: usize,
    /// The first panel of B.
    pub b: *const W,
    /// Elements from panel to panel.
    pub panel_stride: usize,
    pub columns: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    pub from: From,
}

impl<W> Block<W> {
    /// The same block with other panels of B.
    pub fn with_panels<U>(self, b: *const U, panel_stride: usize) -> Block<U> {
        Block {
            k: self.k,
            a: self.a,
            rows: self.rows,
            b,
            panel_stride,
            columns: self.columns,
            c: self.c,
            c_stride: self.c_stride,
            from: self.from,
        }
    }
}

/// One tile's place.
#[derive(Clone, Copy)]
struct Tile<W> {
    k: usize,
    b: *const W,
    panel_stride: usize,
    c: *mut f32,
    c_stride: usize,
    from: From,
    /// Columns in the last panel of the tile.
    columns: usize,
}

impl<W: Weight> Kernel for Block<W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = panel_columns(S::LANES);
        let panels = self.columns.div_ceil(width);
        let mut panel = 0;
        while panel < panels {
            // Few rows leave registers free (and additions waiting for each other): several panels at once then.
            let together = match self.rows {
                1 if panels - panel >= 4 => 4,
                2 if S::REGISTERS >= 32 && panels - panel >= 4 => 4,
                2 | 3 if S::REGISTERS >= 16 && panels - panel >= 2 => 2,
                4 | 5 if S::REGISTERS >= 32 && panels - panel >= 2 => 2,
                _ => 1,
            };
            let first = panel * width;
            // SAFETY (both): the panel lies inside of B.
            let b = unsafe { self.b.add(panel * self.panel_stride) };
            let from = match self.from {
                From::Bias(bias) => From::Bias(unsafe { bias.add(first) }),
                other => other,
            };
            let last = (self.columns - first).min(together * width) - (together - 1) * width;
            let mut row = 0;
            while row < self.rows {
                let rows = (self.rows - row).min(tile_rows(S::REGISTERS));
                // SAFETY: the tile lies inside of C, and A has its rows; whoever made the block vouches for both.
                unsafe {
                    let tile = Tile {
                        k: self.k,
                        b,
                        panel_stride: self.panel_stride,
                        c: self.c.add(row * self.c_stride + first),
                        c_stride: self.c_stride,
                        from,
                        columns: last,
                    };
                    dispatch(s, tile, self.a, row, rows, together);
                }
                row += rows;
            }
            panel += together;
        }
    }
}

/// Runs the tile's kernel for its number of rows and panels.
///
/// # Safety
/// The tile's `rows` rows from `row` on lie inside of A and C, its panels inside of B.
#[inline(always)]
unsafe fn dispatch<S: Simd, W: Weight>(s: S, tile: Tile<W>, a: Left, row: usize, rows: usize, together: usize) {
    let full = tile_rows(S::REGISTERS);
    let one_vector = tile.columns <= S::LANES;
    // SAFETY: the caller's promises are those of the kernels; a packed panel has all its rows.
    unsafe {
        let (a, a_row, a_col) = match a {
            Left::Packed(ptr) => {
                let ptr = ptr.add(row * tile.k);
                if rows == full && !one_vector {
                    // The hot case, with strides the compiler knows.
                    match full {
                        12 => multiply::<S, W, 12, 1, 2>(s, tile, ptr, 1, 12),
                        6 => multiply::<S, W, 6, 1, 2>(s, tile, ptr, 1, 6),
                        _ => multiply::<S, W, 3, 1, 2>(s, tile, ptr, 1, 3),
                    }
                    return;
                }
                (ptr, 1, full)
            }
            Left::Strided { ptr, row: row_stride, col } => (ptr.add(row * row_stride), row_stride, col),
        };
        match (together, rows) {
            (4, 1) => return multiply::<S, W, 1, 4, 2>(s, tile, a, a_row, a_col),
            (4, _) => return multiply::<S, W, 2, 4, 2>(s, tile, a, a_row, a_col),
            (2, 2) => return multiply::<S, W, 2, 2, 2>(s, tile, a, a_row, a_col),
            (2, 3) => return multiply::<S, W, 3, 2, 2>(s, tile, a, a_row, a_col),
            (2, 4) => return multiply::<S, W, 4, 2, 2>(s, tile, a, a_row, a_col),
            (2, _) => return multiply::<S, W, 5, 2, 2>(s, tile, a, a_row, a_col),
            _ => {}
        }
        /// A kernel for every number of rows up to a full tile's.
        macro_rules! rows {
            ($($n:literal)*) => {
                match rows {
                    $($n if $n <= full => {
                        if one_vector {
                            multiply::<S, W, $n, 1, 1>(s, tile, a, a_row, a_col)
                        } else {
                            multiply::<S, W, $n, 1, 2>(s, tile, a, a_row, a_col)
                        }
                    })*
                    _ => unreachable!("a tile has 1 to {full} rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12)
    }
}

/// C[R, P panels of V vectors] = start + A · B.
///
/// # Safety
/// `a` has R rows of `tile.k` values at the strides given, `tile.b` P panels, C the tile.
#[inline(always)]
unsafe fn multiply<S: Simd, W: Weight, const R: usize, const P: usize, const V: usize>(
    s: S,
    tile: Tile<W>,
    a: *const f32,
    a_row: usize,
    a_col: usize,
) {
    let width = panel_columns(S::LANES);
    // The columns of a vector that exist.
    let valid = |p: usize, v: usize| {
        if p + 1 < P { S::LANES } else { tile.columns.saturating_sub(v * S::LANES).min(S::LANES) }
    };
    let whole = tile.columns == V * S::LANES;
    let mut sums = [[[s.zero(); V]; P]; R];
    // SAFETY: the caller vouches for C, A, B and the bias; partial loads and stores keep to the columns that exist.
    unsafe {
        match tile.from {
            From::Zero => {}
            From::C => {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (p, sums) in sums.iter_mut().enumerate() {
                        for (v, sum) in sums.iter_mut().enumerate() {
                            let at = tile.c.add(r * tile.c_stride + p * width + v * S::LANES);
                            *sum = if whole { s.load(at) } else { s.load_partial(at, valid(p, v)) };
                        }
                    }
                }
            }
            From::Bias(bias) => {
                for p in 0..P {
                    for v in 0..V {
                        let at = bias.add(p * width + v * S::LANES);
                        let start = if whole { s.load(at) } else { s.load_partial(at, valid(p, v)) };
                        for sums in &mut sums {
                            sums[p][v] = start;
                        }
                    }
                }
            }
        }
        for k in 0..tile.k {
            for p in 0..P {
                let b = W::load_panel_row(s, tile.b.add(p * tile.panel_stride + k * width));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = s.splat(*a.add(r * a_row + k * a_col));
                    for v in 0..V {
                        sums[p][v] = s.fma(x, b[v], sums[p][v]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (p, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    let at = tile.c.add(r * tile.c_stride + p * width + v * S::LANES);
                    if whole { s.store(at, *sum) } else { s.store_partial(at, *sum, valid(p, v)) }
                }
            }
        }
    }
}
