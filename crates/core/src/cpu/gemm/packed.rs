//! Weights rearranged once for all the products they take part in.

use half::bf16;

use super::super::isa::Isa;
use super::super::pool::Pool;
use super::super::simd::{Element, MAX_LANES};
use super::kernel::{Weight, panel_columns};
use super::matrix::MatRef;
use super::pack::Pack;
use super::tiles;

/// A right-hand side B[k, n] in panels of 2 · lanes columns, each panel `[k][columns]`; columns missing in the last
/// panel are 0. f32 or bf16 (exactly widened where it is used).
///
/// The layout depends on the number of lanes, so a packed matrix belongs to one level of instructions. bf16 for
/// [`Isa::Amx`] lies in tiles of 16 columns by 32 rows, and products with it round A to bf16.
#[derive(Clone, Copy, Debug)]
pub struct PackedMatrix<'a> {
    data: Data<'a>,
    k: usize,
    n: usize,
    lanes: usize,
}

/// A packed matrix's panels.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Tiles(&'a [bf16]),
}

/// Whether a packed matrix of this type lies in tiles.
fn in_tiles<W: Weight>(isa: Isa) -> bool {
    isa == Isa::Amx && W::IS_BF16
}

/// The number of elements a packed B[k, n] of this type takes: k times n rounded up to whole panels, or both to whole
/// tiles.
///
/// # Panics
/// Where that number does not fit into a `usize`.
pub fn packed_len<W: Weight>(isa: Isa, k: usize, n: usize) -> usize {
    let len = if in_tiles::<W>(isa) {
        tiles::len(n, k)
    } else {
        n.checked_next_multiple_of(panel_columns(isa.lanes())).and_then(|columns| columns.checked_mul(k))
    };
    len.unwrap_or_else(|| panic!("a packed {k} × {n} matrix does not fit into memory"))
}

/// Packs B[k, n] into memory of the caller's, best aligned to 64 bytes. For x · Wᵀ with W `[out, in]` row-major, B is
/// `MatRef::new(w, out, in).t()`. Values are rounded to nearest where `W` is narrower than `T`.
///
/// # Panics
/// Where `to` has not [`packed_len`] elements.
pub fn pack_into<T: Element, W: Weight>(pool: &Pool, isa: Isa, b: MatRef<'_, T>, to: &mut [W]) {
    assert_eq!(to.len(), packed_len::<W>(isa, b.rows(), b.cols()), "packed_len elements are needed");
    if to.is_empty() {
        return;
    }
    if in_tiles::<W>(isa) {
        let panel = b.rows().next_multiple_of(tiles::STEPS) * tiles::LINES;
        pool.chunks_mut(to, panel, |start, to| {
            let first = start / panel * tiles::LINES;
            let lines = b.col_range(first..b.cols().min(first + tiles::LINES)).t();
            isa.run(tiles::PackTiles::new(lines, true, to.as_mut_ptr().cast(), panel));
        });
        return;
    }
    let lanes = isa.lanes();
    let width = panel_columns(lanes);
    let k = b.rows();
    // Panels in slabs of steps, so that bf16 needs a small buffer only.
    const STEPS: usize = 64;
    pool.chunks_mut(to, k * width, |start, panel| {
        let first = start / k;
        let lines = b.col_range(first..b.cols().min(first + width));
        let mut slab = [0.0f32; STEPS * 2 * MAX_LANES];
        for (index, out) in panel.chunks_mut(STEPS * width).enumerate() {
            let steps = out.len() / width;
            let lines = lines.row_range(index * STEPS..index * STEPS + steps);
            isa.run(Pack {
                from: lines.as_ptr(),
                line: lines.col_stride(),
                step: lines.row_stride(),
                count: lines.cols(),
                k: steps,
                width,
                to: slab.as_mut_ptr(),
            });
            for (out, row) in out.chunks_exact_mut(width).zip(slab.chunks_exact(width)) {
                for (column, &value) in row.iter().enumerate() {
                    out[W::place(column, lanes)] = W::narrow(value);
                }
            }
        }
    });
}

impl<'a> PackedMatrix<'a> {
    /// What [`pack_into`] wrote for a B[k, n] at the same level of instructions.
    ///
    /// # Panics
    /// Where `data` has not [`packed_len`] elements.
    pub fn new<W: Weight>(isa: Isa, k: usize, n: usize, data: &'a [W]) -> PackedMatrix<'a> {
        assert_eq!(data.len(), packed_len::<W>(isa, k, n), "packed_len elements are needed");
        let data = match W::wrap(data) {
            Data::Bf16(data) if isa == Isa::Amx => Data::Tiles(data),
            data => data,
        };
        PackedMatrix { data, k, n, lanes: isa.lanes() }
    }

    /// The number of rows of B, the inner dimension of the product.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The number of columns of B.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Panels of this matrix, for a level that they were packed for.
    pub(super) fn checked<W>(&self, isa: Isa, data: &'a [W]) -> &'a [W] {
        assert_eq!(self.lanes, isa.lanes(), "B was packed for another level of instructions");
        data
    }

    pub(super) fn data(&self) -> Data<'a> {
        self.data
    }

    /// Reads column `j` of B, which is row `j` of a weight W `[n, k]`: an embedding row of tied weights.
    ///
    /// # Panics
    /// Where there is no such column, or `to` has not k values.
    pub fn column(&self, j: usize, to: &mut [f32]) {
        assert!(j < self.n, "column {j} of {}", self.n);
        assert_eq!(to.len(), self.k, "a column has k values");
        match self.data {
            Data::F32(data) => self.read(data, j, to),
            Data::Bf16(data) => self.read(data, j, to),
            Data::Tiles(data) => {
                let tiles = self.k.div_ceil(tiles::STEPS);
                for (i, value) in to.iter_mut().enumerate() {
                    *value = data[tiles::place(j, i, tiles)].to_f32();
                }
            }
        }
    }

    fn read<W: Weight>(&self, data: &[W], j: usize, to: &mut [f32]) {
        let width = panel_columns(self.lanes);
        let start = j / width * width * self.k + W::place(j % width, self.lanes);
        for (value, weight) in to.iter_mut().zip(data.iter().skip(start).step_by(width)) {
            *value = weight.widen();
        }
    }
}

/// A packed matrix with its own memory, aligned to cache lines.
#[derive(Clone, Debug)]
pub struct PackedBuffer<W> {
    memory: Vec<Line<W>>,
    k: usize,
    n: usize,
    isa: Isa,
}

/// Elements of at least a cache line, aligned to one.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line<W>([W; 32]);

impl<W: Weight> PackedBuffer<W> {
    /// Packs B[k, n]; see [`pack_into`].
    pub fn pack<T: Element>(pool: &Pool, isa: Isa, b: MatRef<'_, T>) -> PackedBuffer<W> {
        let len = packed_len::<W>(isa, b.rows(), b.cols());
        let mut memory = vec![Line([W::narrow(0.0); 32]); len.div_ceil(32)];
        // SAFETY: lines have no padding (32 elements of 2 or 4 bytes), so they are `len` elements or more in a row.
        let elements = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<W>(), len) };
        pack_into(pool, isa, b, elements);
        PackedBuffer { memory, k: b.rows(), n: b.cols(), isa }
    }

    /// The matrix.
    pub fn matrix(&self) -> PackedMatrix<'_> {
        let len = packed_len::<W>(self.isa, self.k, self.n);
        // SAFETY: as in `pack`.
        let elements = unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast::<W>(), len) };
        PackedMatrix::new(self.isa, self.k, self.n, elements)
    }
}
