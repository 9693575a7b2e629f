//! What an op sees while it runs: its operands as matrices in memory.

use crate::dtype::{DType, Element};
use crate::graph::Layout;

/// A matrix in the memory of the device that runs the op: rows of `cols` elements, `stride` elements apart.
///
/// It carries no lifetime and no exclusiveness. The executor guarantees, for the duration of one `run_cpu` call, that
/// the memory is valid and that an output overlaps no other operand, except a state or buffer that the graph declares
/// to be updated in place. Kernels split outputs between tasks so that no two tasks write the same element.
#[derive(Clone, Copy, Debug)]
pub struct Mat {
    pub(crate) ptr: *mut u8,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Type of the elements.
    pub dtype: DType,
    /// Row-major, or packed for the matrix product.
    pub layout: Layout,
}

// SAFETY: a Mat is an address with a shape; every access through it is unsafe and states its own reasons.
unsafe impl Send for Mat {}
// SAFETY: as above.
unsafe impl Sync for Mat {}

impl Mat {
    /// Address of element (0, 0), on whatever device it is.
    pub fn address(&self) -> u64 {
        self.ptr as u64
    }

    /// Address of element (0, 0).
    #[inline(always)]
    pub fn ptr<T: Element>(&self) -> *mut T {
        debug_assert_eq!(self.dtype, T::DTYPE);
        self.ptr.cast()
    }

    /// Address of element (row, col).
    ///
    /// # Safety
    /// The element must lie inside the matrix, or one past a row's end.
    #[inline(always)]
    pub unsafe fn at<T: Element>(&self, row: usize, col: usize) -> *mut T {
        debug_assert!(row < self.rows && col <= self.cols, "({row}, {col}) in [{}, {}]", self.rows, self.cols);
        // SAFETY: the caller keeps (row, col) inside the matrix.
        unsafe { self.ptr::<T>().add(row * self.stride + col) }
    }

    /// A row as a slice.
    ///
    /// # Safety
    /// No other thread may write this row meanwhile.
    #[inline(always)]
    pub unsafe fn row<'a, T: Element>(&self, row: usize) -> &'a [T] {
        // SAFETY: `cols` elements from the start of a row lie inside the matrix.
        unsafe { std::slice::from_raw_parts(self.at::<T>(row, 0), self.cols) }
    }

    /// A row as a mutable slice.
    ///
    /// # Safety
    /// No other reference to this row may be in use meanwhile.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_mut<'a, T: Element>(&self, row: usize) -> &'a mut [T] {
        // SAFETY: `cols` elements from the start of a row lie inside the matrix.
        unsafe { std::slice::from_raw_parts_mut(self.at::<T>(row, 0), self.cols) }
    }

    /// A row of a matrix of weights in blocks, row after row.
    ///
    /// # Safety
    /// As [`Mat::row`].
    pub(crate) unsafe fn row_of_blocks<'a>(&self, row: usize) -> &'a [u8] {
        let bytes = self.dtype.row_bytes(self.cols);
        debug_assert!(row < self.rows && self.stride == self.cols, "weights are whole");
        // SAFETY: the matrix has `rows` rows of this many bytes.
        unsafe { std::slice::from_raw_parts(self.ptr.add(row * bytes), bytes) }
    }

    /// The first `bytes` bytes of a matrix of weights in panels of blocks.
    ///
    /// # Safety
    /// The matrix has them, and nobody may write it meanwhile.
    pub(crate) unsafe fn blocks<'a>(&self, bytes: usize) -> &'a [u8] {
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts(self.ptr, bytes) }
    }

    /// Columns `col .. col + cols` as a matrix of their own.
    pub fn columns(&self, col: usize, cols: usize) -> Mat {
        assert!(col + cols <= self.cols);
        Mat { ptr: self.ptr.wrapping_add(col * self.dtype.size()), cols, ..*self }
    }

    /// Rows `row .. row + rows` as a matrix of their own.
    pub fn rows(&self, row: usize, rows: usize) -> Mat {
        assert!(row + rows <= self.rows);
        Mat { ptr: self.ptr.wrapping_add(row * self.stride * self.dtype.size()), rows, ..*self }
    }
}

/// The operands of one op while it runs.
#[derive(Debug)]
pub struct Io<'a> {
    pub(crate) name: &'static str,
    pub(crate) inputs: &'a [Option<Mat>],
    pub(crate) outputs: &'a [Option<Mat>],
    pub(crate) workspace: (*mut u8, usize),
}

impl Io<'_> {
    /// Input `i`, which the op's builder always sets.
    pub fn input(&self, i: usize) -> Mat {
        self.inputs[i].unwrap_or_else(|| panic!("{}: input {i} is not set", self.name))
    }

    /// Input `i`, if it is set.
    pub fn optional_input(&self, i: usize) -> Option<Mat> {
        self.inputs.get(i).copied().flatten()
    }

    /// Output `i`, which the op's builder always sets.
    pub fn output(&self, i: usize) -> Mat {
        self.outputs[i].unwrap_or_else(|| panic!("{}: output {i} is not set", self.name))
    }

    /// Output `i`, if anybody wants it.
    pub fn optional_output(&self, i: usize) -> Option<Mat> {
        self.outputs.get(i).copied().flatten()
    }

    /// The segment offsets of a pack, given as input `i`.
    pub fn segments(&self, i: usize) -> &[i32] {
        // SAFETY: inputs are not written while the op runs.
        unsafe { self.input(i).row::<i32>(0) }
    }

    /// The op's scratch memory, aligned to 64 bytes, contents undefined: start and bytes.
    pub fn workspace(&self) -> (*mut u8, usize) {
        self.workspace
    }

    /// Fills scratch memory and those outputs that lie in `arena` with NaN, so that an op which reads what it did not
    /// write is found out.
    #[cfg(test)]
    pub(crate) fn spoil(&self, arena: &std::ops::Range<*mut u8>) {
        let (start, bytes) = self.workspace;
        // SAFETY: the op's own scratch memory, and its own outputs: in the arena none is an input, too.
        unsafe {
            start.write_bytes(0xFF, bytes);
            for out in self.outputs.iter().flatten().filter(|out| arena.contains(&out.ptr)) {
                for r in 0..out.rows {
                    out.rows(r, 1).ptr.write_bytes(0xFF, out.cols * out.dtype.size());
                }
            }
        }
    }
}
