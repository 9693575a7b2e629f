// The rows of each segment in another order, grid after grid: a thread moves V columns of a row. Memory bounds it.
//
// Macros: T; V.

KERNEL __launch_bounds__(256) permute_rows(Mat<T> x, Mat<T> y, const int* order, const int* offsets, i64 rows,
                                           i64 vectors, i64 cells, i64 segments) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= rows * vectors) return;
    i64 row = i / vectors, c = (i - row * vectors) * V;
    int segment = segment_of(offsets, static_cast<int>(segments), row);
    float v[V] = {};
    if (segment >= 0) {
        i64 cell = cells > 0 ? (row - offsets[segment]) % cells : 0, from = cell;
        // Behind the last whole grid rows keep their places.
        if (cells > 0 && row - cell + cells <= offsets[segment + 1]) from = order[cell];
        if (from == cell || (from >= 0 && from < cells)) {
            load<V>(v, x.row(row - cell + from) + c);
        } else {
#pragma unroll
            for (int k = 0; k < V; k++) v[k] = bits_to_f32(0x7fc00000u);
        }
    }
    store<V>(y.row(row) + c, v);
}
