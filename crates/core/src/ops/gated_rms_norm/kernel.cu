// The gated norm of groups of columns, and its gradient.
//
// G threads share the group of a row and keep it in registers between the passes. Memory bounds it: forward reads x and z
// and writes y; the gradient reads x, z and dy and writes dx and dz. The blocks of the gradient each walk over some rows
// of one group of columns, so their sums for the weight stay in registers; parts are added in order by another kernel.
//
// Macros: T type of x, z and y; G threads a group; THREADS of a block; ITERS, V; NORM_FIRST 0 or 1.

DEVICE float group_sum(float v, float* scratch) {
#if G == WARP
    return warp_sum(v);
#else
    return block_sum(v, scratch);
#endif
}

// V elements as they lie in memory.
struct __align__(sizeof(T) * V) Pack {
    T v[V];
};

// The elements of a thread in one group of a row.
DEVICE void fetch(Pack* to, const T* from, int lane, i64 width) {
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        i64 c = static_cast<i64>(i * G + lane) * V;
        if (c < width) to[i] = *reinterpret_cast<const Pack*>(from + c);
    }
}

// x and z of a thread's elements with σ(z), and 1/√(mean v² + ε).
DEVICE float widen(float (*x)[V], float (*z)[V], float (*s)[V], const Pack* from_x, const Pack* from_z, int lane, i64 width, float eps, float* scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        bool inside = static_cast<i64>(i * G + lane) * V < width;
#pragma unroll
        for (int k = 0; k < V; k++) {
            x[i][k] = inside ? to_f32(from_x[i].v[k]) : 0.0f;
            z[i][k] = inside ? to_f32(from_z[i].v[k]) : 0.0f;
            s[i][k] = sigmoid(z[i][k]);
            float v = NORM_FIRST ? x[i][k] : x[i][k] * z[i][k] * s[i][k];
            sum += v * v;
        }
    }
    return 1.0f / sqrtf(group_sum(sum, scratch) / static_cast<float>(width) + eps);
}

// silu'(z), given s = σ(z).
DEVICE float slope(float z, float s) { return s * (1.0f + z * (1.0f - s)); }

// Group blockIdx.y of each row.
KERNEL __launch_bounds__(THREADS) gated_norm(Mat<T> x, Mat<T> z, Mat<float> weight, Mat<T> y, i64 rows, i64 width, float eps) {
    __shared__ float scratch[32];
    i64 row = static_cast<i64>(blockIdx.x) * (THREADS / G) + threadIdx.x / G;
    int lane = threadIdx.x % G;
    if (row >= rows) return;
    i64 first = blockIdx.y * width;
    Pack from_x[ITERS], from_z[ITERS];
    fetch(from_x, x.row(row) + first, lane, width);
    fetch(from_z, z.row(row) + first, lane, width);
    float v[ITERS][V], g[ITERS][V], s[ITERS][V];
    float r = widen(v, g, s, from_x, from_z, lane, width, eps, scratch);
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        i64 c = static_cast<i64>(i * G + lane) * V;
        if (c >= width) continue;
        float w[V];
#pragma unroll
        for (int k = 0; k < V; k++) w[k] = 1.0f;
        if (weight.present()) load<V>(w, weight.data + first + c);
#pragma unroll
        for (int k = 0; k < V; k++) w[k] *= r * v[i][k] * g[i][k] * s[i][k];
        store<V>(y.row(row) + first + c, w);
    }
}

KERNEL __launch_bounds__(THREADS) gated_norm_grad(Mat<T> x, Mat<T> z, Mat<float> weight, Mat<T> dy, Mat<T> dx, Mat<T> dz,
                                                  float* parts, i64 rows, i64 width, float eps) {
    __shared__ float scratch[32];
    DYNAMIC_SHARED(bytes);
    int lane = threadIdx.x % G;
    i64 first = blockIdx.y * width, cols = gridDim.y * width;
    float dw[ITERS][V] = {};
    i64 step = static_cast<i64>(gridDim.x) * (THREADS / G);
    i64 row = static_cast<i64>(blockIdx.x) * (THREADS / G) + threadIdx.x / G;
    Pack from_x[ITERS], from_z[ITERS], from_dy[ITERS];
    if (row < rows) {
        fetch(from_x, x.row(row) + first, lane, width);
        fetch(from_z, z.row(row) + first, lane, width);
        fetch(from_dy, dy.row(row) + first, lane, width);
    }
    for (; row < rows; row += step) {
        float v[ITERS][V], g[ITERS][V], s[ITERS][V], d[ITERS][V];
        float r = widen(v, g, s, from_x, from_z, lane, width, eps, scratch);
#pragma unroll
        for (int i = 0; i < ITERS; i++)
#pragma unroll
            for (int k = 0; k < V; k++) d[i][k] = to_f32(from_dy[i].v[k]);
        // The next row is on its way while this one is computed.
        if (row + step < rows) {
            fetch(from_x, x.row(row + step) + first, lane, width);
            fetch(from_z, z.row(row + step) + first, lane, width);
            fetch(from_dy, dy.row(row + step) + first, lane, width);
        }
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            i64 c = static_cast<i64>(i * G + lane) * V;
            if (c >= width) continue;
            float w[V];
#pragma unroll
            for (int k = 0; k < V; k++) w[k] = 1.0f;
            if (weight.present()) load<V>(w, weight.data + first + c);
#pragma unroll
            for (int k = 0; k < V; k++) {
                // n, and dn in place of dy; the gate's own part with the norm first needs dy as it was.
                float gate = g[i][k] * s[i][k];
                float n = r * v[i][k] * (NORM_FIRST ? 1.0f : gate);
                float dn = d[i][k] * w[k];
                dw[i][k] += d[i][k] * n * (NORM_FIRST ? gate : 1.0f);
                if (NORM_FIRST) {
                    g[i][k] = dn * n * slope(g[i][k], s[i][k]);
                    dn *= gate;
                }
                d[i][k] = dn;
                dot += dn * n;
            }
        }
        dot = group_sum(dot, scratch) / static_cast<float>(width);
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            i64 c = static_cast<i64>(i * G + lane) * V;
            if (c >= width) continue;
#pragma unroll
            for (int k = 0; k < V; k++) {
                if (NORM_FIRST) {
                    d[i][k] = r * (d[i][k] - r * v[i][k] * dot);
                } else {
                    float gate = g[i][k] * s[i][k];
                    float dv = r * (d[i][k] - r * v[i][k] * gate * dot);
                    d[i][k] = dv * gate;
                    g[i][k] = dv * v[i][k] * slope(g[i][k], s[i][k]);
                }
            }
            if (dx.present()) store<V>(dx.row(row) + first + c, d[i]);
            if (dz.present()) store<V>(dz.row(row) + first + c, g[i]);
        }
    }
    if (parts == nullptr) return;
    // The rows' groups of a block add their sums in order.
    float* total = reinterpret_cast<float*>(bytes);
    for (int group = 0; group < THREADS / G; group++) {
        if (threadIdx.x / G == group) {
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
                i64 c = static_cast<i64>(i * G + lane) * V;
                if (c >= width) continue;
#pragma unroll
                for (int k = 0; k < V; k++) total[c + k] = group == 0 ? dw[i][k] : total[c + k] + dw[i][k];
            }
        }
        __syncthreads();
    }
    for (i64 c = threadIdx.x; c < width; c += THREADS) parts[blockIdx.x * cols + first + c] = total[c];
}
