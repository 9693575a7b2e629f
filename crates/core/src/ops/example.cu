// y = max(x, 0)² or, where there is a dy, its gradient. A thread makes V neighbouring elements of a row.
//
// Macros: V.

KERNEL __launch_bounds__(256) squared_relu(Mat<float> x, Mat<float> dy, Mat<float> out, i64 rows, i64 cols) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, vectors = cols / V;
    if (i >= rows * vectors) return;
    i64 row = i / vectors, col = (i - row * vectors) * V;
    float v[V], d[V];
    load<V>(v, x.row(row) + col);
    if (dy.present()) load<V>(d, dy.row(row) + col);
#pragma unroll
    for (int k = 0; k < V; k++) {
        float positive = fmaxf(v[k], 0.0f);
        v[k] = dy.present() ? d[k] * (positive + positive) : positive * positive;
    }
    store<V>(out.row(row) + col, v);
}
