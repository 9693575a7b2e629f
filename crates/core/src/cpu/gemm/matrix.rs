//! Views of matrices by strides.

use std::marker::PhantomData;
use std::ops::Range;

use super::super::simd::Element;

/// A matrix to read: `rows` × `cols` elements, element (i, j) at `i · row_stride + j · col_stride`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a, T = f32> {
    ptr: *const T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    life: PhantomData<&'a [T]>,
}

// SAFETY: a view is a shared borrow of elements that are Sync.
unsafe impl<T: Element> Send for MatRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for MatRef<'_, T> {}

/// The number of elements from the first to the last one of a matrix, both included.
fn span(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<usize> {
    if rows == 0 || cols == 0 {
        return Some(0);
    }
    let last = (rows - 1).checked_mul(row_stride)?.checked_add((cols - 1).checked_mul(col_stride)?)?;
    last.checked_add(1)
}

impl<'a, T: Element> MatRef<'a, T> {
    /// A row-major matrix without gaps.
    ///
    /// # Panics
    /// Where the slice has not `rows · cols` elements.
    pub fn new(slice: &'a [T], rows: usize, cols: usize) -> MatRef<'a, T> {
        assert_eq!(Some(slice.len()), rows.checked_mul(cols), "a {rows} × {cols} matrix needs as many elements");
        MatRef::with_strides(slice, rows, cols, cols, 1)
    }

    /// A matrix with any strides, in elements.
    ///
    /// # Panics
    /// Where the last element lies outside of the slice.
    pub fn with_strides(
        slice: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> MatRef<'a, T> {
        assert!(
            span(rows, cols, row_stride, col_stride).is_some_and(|span| span <= slice.len()),
            "a {rows} × {cols} matrix with strides {row_stride} and {col_stride} does not fit into {} elements",
            slice.len()
        );
        // SAFETY: all elements lie inside the slice, which is borrowed for 'a.
        unsafe { MatRef::from_raw(slice.as_ptr(), rows, cols, row_stride, col_stride) }
    }

    /// A matrix at a pointer.
    ///
    /// # Safety
    /// All elements are valid for reading, and nobody writes them during 'a.
    pub unsafe fn from_raw(
        ptr: *const T,
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> MatRef<'a, T> {
        MatRef { ptr, rows, cols, row_stride, col_stride, life: PhantomData }
    }

    /// The transposed matrix; moves nothing.
    pub fn t(self) -> MatRef<'a, T> {
        MatRef { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// Where the range leaves the matrix.
    pub fn row_range(self, range: Range<usize>) -> MatRef<'a, T> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        // An empty range may start past the last element; wrapping arithmetic makes no promise about that.
        let ptr = self.ptr.wrapping_add(range.start * self.row_stride);
        MatRef { ptr, rows: range.len(), ..self }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// Where the range leaves the matrix.
    pub fn col_range(self, range: Range<usize>) -> MatRef<'a, T> {
        self.t().row_range(range).t()
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The distance between rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The distance between columns, in elements.
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// The first element.
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// One element.
    ///
    /// # Panics
    /// Where it lies outside.
    pub fn get(&self, row: usize, col: usize) -> T {
        assert!(row < self.rows && col < self.cols, "({row}, {col}) of {} × {}", self.rows, self.cols);
        // SAFETY: the element lies inside the matrix.
        unsafe { *self.ptr.add(row * self.row_stride + col * self.col_stride) }
    }
}

/// A matrix to write: `rows` × `cols` values, rows without gaps, `row_stride` ≥ `cols` apart.
#[derive(Debug)]
pub struct MatMut<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: a view is an exclusive borrow of values that may be sent.
unsafe impl Send for MatMut<'_> {}
// SAFETY: a shared MatMut offers nothing but its shape.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// A row-major matrix without gaps.
    ///
    /// # Panics
    /// Where the slice has not `rows · cols` elements.
    pub fn new(slice: &'a mut [f32], rows: usize, cols: usize) -> MatMut<'a> {
        assert_eq!(Some(slice.len()), rows.checked_mul(cols), "a {rows} × {cols} matrix needs as many elements");
        MatMut::with_stride(slice, rows, cols, cols)
    }

    /// A row-major matrix whose rows are `row_stride` apart.
    ///
    /// # Panics
    /// Where rows overlap, or the last element lies outside of the slice.
    pub fn with_stride(slice: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> MatMut<'a> {
        assert!(rows <= 1 || row_stride >= cols, "rows of {cols} overlap at a stride of {row_stride}");
        assert!(
            span(rows, cols, row_stride, 1).is_some_and(|span| span <= slice.len()),
            "a {rows} × {cols} matrix with row stride {row_stride} does not fit into {} elements",
            slice.len()
        );
        // SAFETY: all elements lie inside the slice, which is borrowed for 'a, and rows do not overlap.
        unsafe { MatMut::from_raw(slice.as_mut_ptr(), rows, cols, row_stride) }
    }

    /// A matrix at a pointer.
    ///
    /// # Safety
    /// All elements are initialised and valid for reading and writing; nobody else touches them during 'a; rows do
    /// not overlap.
    pub unsafe fn from_raw(ptr: *mut f32, rows: usize, cols: usize, row_stride: usize) -> MatMut<'a> {
        MatMut { ptr, rows, cols, row_stride, life: PhantomData }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The distance between rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The first element.
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.ptr
    }
}
