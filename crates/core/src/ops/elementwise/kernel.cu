// Elementwise functions of up to two matrices, and sums over rows.
//
// A thread makes V consecutive elements of a row (one access of up to 16 bytes an operand where V > 1; the launch makes
// sure of the alignment). Memory bounds all of this: each operand is read or written once.
//
// Macros: TA, TO types of the operands and of the result; V elements of a thread; OP which function.

#define FILL 0
#define ADD 1
#define MUL 2
#define SCALE 3
#define SCALE_BY 4
#define SILU 5
#define SILU_GRAD 6
#define NEG_EXP 7
#define COPY 8
#define ADD_ROW 9

DEVICE float apply(float a, float b, float factor) {
#if OP == FILL
    return factor;
#elif OP == ADD || OP == ADD_ROW
    return a + b;
#elif OP == MUL
    return a * b;
#elif OP == SCALE || OP == SCALE_BY
    return factor * a;
#elif OP == SILU
    return silu(a);
#elif OP == SILU_GRAD
    return b * dsilu(a);
#elif OP == NEG_EXP
    return -expf(a);
#else
    return a;
#endif
}

// out [rows, V · vectors] = f(a, b); `scalar` is the factor of SCALE_BY, or the row [1, cols] that ADD_ROW adds to each.
KERNEL __launch_bounds__(256) map(Mat<TA> a, Mat<TA> b, Mat<TO> out, Mat<float> scalar, i64 rows, i64 vectors, float factor) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= rows * vectors) return;
    i64 row = rows == 1 ? 0 : i / vectors;
    i64 col = (i - row * vectors) * V;
#if OP == SCALE_BY
    factor = scalar.data[0];
#endif
    float x[V] = {}, y[V] = {}, r[V];
    if (a.present()) load<V>(x, a.row(row) + col);
    if (b.present()) load<V>(y, b.row(row) + col);
    if (OP == ADD_ROW) load<V>(y, scalar.data + col);
#pragma unroll
    for (int k = 0; k < V; k++) r[k] = apply(x[k], y[k], factor);
    store<V>(out.row(row) + col, r);
}

// out [rows, cols] = the integer `value`.
KERNEL __launch_bounds__(256) fill_int(Mat<int> out, i64 rows, i64 cols, int value) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i < rows * cols) out.row(i / cols)[i % cols] = value;
}

// part [blocks, cols]: block (x, y) sums ROWS rows of 32 columns: 8 threads a column, then a sum over the 8 in order.
KERNEL __launch_bounds__(256) sum_rows(Mat<TA> x, float* part, i64 rows, i64 cols) {
    __shared__ float sums[8][33];
    int lane = threadIdx.x % 32, part_of = threadIdx.x / 32;
    i64 col = static_cast<i64>(blockIdx.x) * 32 + lane;
    i64 first = static_cast<i64>(blockIdx.y) * ROWS;
    i64 last = first + ROWS < rows ? first + ROWS : rows;
    float sum = 0.0f;
    if (col < cols) {
        for (i64 r = first + part_of; r < last; r += 8) sum += to_f32(x.row(r)[col]);
    }
    sums[part_of][lane] = sum;
    __syncthreads();
    if (part_of == 0 && col < cols) {
        for (int k = 1; k < 8; k++) sum += sums[k][lane];
        part[blockIdx.y * cols + col] = sum;
    }
}

// out [1, cols]: the sum over the parts. 32 threads a column each add every 32nd part, then their sums are added in order.
KERNEL __launch_bounds__(1024) sum_parts(const float* part, Mat<float> out, i64 parts, i64 cols) {
    __shared__ float sums[32][33];
    int lane = threadIdx.x % 32, part_of = threadIdx.x / 32;
    i64 col = static_cast<i64>(blockIdx.x) * 32 + lane;
    float sum = 0.0f;
    if (col < cols) {
        for (i64 p = part_of; p < parts; p += 32) sum += part[p * cols + col];
    }
    sums[part_of][lane] = sum;
    __syncthreads();
    // Transposed, so that a warp adds up one column.
    sum = warp_sum(sums[lane][part_of]);
    col = static_cast<i64>(blockIdx.x) * 32 + part_of;
    if (lane == 0 && col < cols) out.data[col] = sum;
}
