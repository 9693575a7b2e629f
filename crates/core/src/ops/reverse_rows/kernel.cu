// The rows of each segment in the opposite order: a thread moves V columns of a row. Memory bounds it.
//
// Macros: T; V.

KERNEL __launch_bounds__(256) reverse_rows(Mat<T> x, Mat<T> y, const int* offsets, i64 rows, i64 vectors, i64 segments) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= rows * vectors) return;
    i64 row = i / vectors, c = (i - row * vectors) * V;
    int segment = segment_of(offsets, static_cast<int>(segments), row);
    float v[V] = {};
    if (segment >= 0) load<V>(v, x.row(offsets[segment] + (offsets[segment + 1] - 1 - row)) + c);
    store<V>(y.row(row) + c, v);
}
