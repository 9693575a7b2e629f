// y ⊙ silu(gate) for x = (y, gate), and its gradient: a thread takes V columns of a row. Memory bounds both.
//
// Macros: T; V.

KERNEL __launch_bounds__(256) swiglu(Mat<T> x, Mat<T> out, i64 rows, i64 width) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, vectors = width / V;
    if (i >= rows * vectors) return;
    i64 row = i / vectors, c = (i - row * vectors) * V;
    float y[V], gate[V];
    load<V>(y, x.row(row) + c);
    load<V>(gate, x.row(row) + width + c);
#pragma unroll
    for (int k = 0; k < V; k++) y[k] *= silu(gate[k]);
    store<V>(out.row(row) + c, y);
}

KERNEL __launch_bounds__(256) swiglu_grad(Mat<T> x, Mat<T> d, Mat<T> dx, i64 rows, i64 width) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, vectors = width / V;
    if (i >= rows * vectors) return;
    i64 row = i / vectors, c = (i - row * vectors) * V;
    float y[V], gate[V], g[V];
    load<V>(y, x.row(row) + c);
    load<V>(gate, x.row(row) + width + c);
    load<V>(g, d.row(row) + c);
#pragma unroll
    for (int k = 0; k < V; k++) {
        float dgate = g[k] * y[k] * dsilu(gate[k]);
        y[k] = g[k] * silu(gate[k]);
        gate[k] = dgate;
    }
    store<V>(dx.row(row) + c, y);
    store<V>(dx.row(row) + width + c, gate);
}
