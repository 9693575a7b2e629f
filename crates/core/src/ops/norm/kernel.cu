// RMSNorm and LayerNorm of x + residual, and their gradients.
//
// G threads share a row (a warp, or a whole block for wide rows) and keep it in registers between the passes, E = ITERS·V
// elements each. Memory bounds both directions: forward reads x and residual and writes s and y, 14 bytes an element with
// bf16 activations; the gradient reads s, dy and ds and writes the gradients of x and residual, 16 bytes.
//
// The gradient's blocks each walk over some rows and keep their sums for the weight and the bias in registers; one part a
// block is written and the parts are added in order by another kernel.
//
// Macros: TX, TY types of x and y; TS type of s; G threads a row; THREADS of a block; ITERS, V; LAYER 0 or 1.

DEVICE float row_sum(float v, float* scratch) {
#if G == WARP
    return warp_sum(v);
#else
    return block_sum(v, scratch);
#endif
}

// 1/√(mean square + ε) around `mean`, which is 0 for RMSNorm.
DEVICE float inverse_deviation(const float (*v)[V], float& mean, int lane, i64 cols, float eps, float* scratch) {
    float sum = 0.0f;
    mean = 0.0f;
#if LAYER
#pragma unroll
    for (int i = 0; i < ITERS; i++)
#pragma unroll
        for (int k = 0; k < V; k++) sum += v[i][k];
    mean = row_sum(sum, scratch) / static_cast<float>(cols);
    sum = 0.0f;
#endif
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        bool inside = static_cast<i64>(i * G + lane) * V < cols;
#pragma unroll
        for (int k = 0; k < V; k++) sum += inside ? (v[i][k] - mean) * (v[i][k] - mean) : 0.0f;
    }
    return 1.0f / sqrtf(row_sum(sum, scratch) / static_cast<float>(cols) + eps);
}

KERNEL __launch_bounds__(THREADS) norm_rows(Mat<TX> x, Mat<float> residual, Mat<float> weight, Mat<float> bias, Mat<TY> y,
                                       Mat<float> s, i64 rows, i64 cols, float eps) {
    __shared__ float scratch[32];
    i64 row = static_cast<i64>(blockIdx.x) * (THREADS / G) + threadIdx.x / G;
    int lane = threadIdx.x % G;
    if (row >= rows) return;
    float v[ITERS][V];
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        i64 c = static_cast<i64>(i * G + lane) * V;
#pragma unroll
        for (int k = 0; k < V; k++) v[i][k] = 0.0f;
        if (c >= cols) continue;
        load<V>(v[i], x.row(row) + c);
        if (residual.present()) {
            float r[V];
            load<V>(r, residual.row(row) + c);
#pragma unroll
            for (int k = 0; k < V; k++) v[i][k] += r[k];
            if (s.present()) store<V>(s.row(row) + c, v[i]);
        }
    }
    float mean;
    float n = inverse_deviation(v, mean, lane, cols, eps, scratch);
    if (!y.present()) return;
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        i64 c = static_cast<i64>(i * G + lane) * V;
        if (c >= cols) continue;
        float w[V], b[V] = {};
#pragma unroll
        for (int k = 0; k < V; k++) w[k] = 1.0f;
        if (weight.present()) load<V>(w, weight.data + c);
        if (bias.present()) load<V>(b, bias.data + c);
#pragma unroll
        for (int k = 0; k < V; k++) w[k] = (v[i][k] - mean) * n * w[k] + b[k];
        store<V>(y.row(row) + c, w);
    }
}

// dresidual [rows, cols] f32 and dx in its own type, each if it is asked for; weight_parts, bias_parts [blocks, cols].
KERNEL __launch_bounds__(THREADS) norm_grad(Mat<TS> s, Mat<float> weight, Mat<TY> dy, Mat<float> ds, Mat<TX> dx,
                                            Mat<float> dresidual, float* weight_parts, float* bias_parts, i64 rows,
                                            i64 cols, float eps) {
    __shared__ float scratch[32];
    DYNAMIC_SHARED(bytes);
    int lane = threadIdx.x % G;
    float dw[ITERS][V] = {}, db[ITERS][V] = {};
    for (i64 row = static_cast<i64>(blockIdx.x) * (THREADS / G) + threadIdx.x / G; row < rows;
         row += static_cast<i64>(gridDim.x) * (THREADS / G)) {
        float v[ITERS][V], d[ITERS][V];
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            i64 c = static_cast<i64>(i * G + lane) * V;
#pragma unroll
            for (int k = 0; k < V; k++) v[i][k] = d[i][k] = 0.0f;
            if (c >= cols) continue;
            load<V>(v[i], s.row(row) + c);
            load<V>(d[i], dy.row(row) + c);
        }
        float mean;
        float n = inverse_deviation(v, mean, lane, cols, eps, scratch);
        float dot = 0.0f, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            i64 c = static_cast<i64>(i * G + lane) * V;
            if (c >= cols) continue;
            float w[V];
#pragma unroll
            for (int k = 0; k < V; k++) w[k] = 1.0f;
            if (weight.present()) load<V>(w, weight.data + c);
#pragma unroll
            for (int k = 0; k < V; k++) {
                v[i][k] = (v[i][k] - mean) * n;
                dw[i][k] += d[i][k] * v[i][k];
                if (LAYER) db[i][k] += d[i][k];
                d[i][k] *= w[k];
                dot += d[i][k] * v[i][k];
                sum += d[i][k];
            }
        }
        dot = row_sum(dot, scratch) / static_cast<float>(cols);
        sum = LAYER ? row_sum(sum, scratch) / static_cast<float>(cols) : 0.0f;
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            i64 c = static_cast<i64>(i * G + lane) * V;
            if (c >= cols) continue;
            float g[V] = {};
            if (ds.present()) load<V>(g, ds.row(row) + c);
#pragma unroll
            for (int k = 0; k < V; k++) g[k] += n * (d[i][k] - sum - v[i][k] * dot);
            if (dx.present()) store<V>(dx.row(row) + c, g);
            if (dresidual.present()) store<V>(dresidual.row(row) + c, g);
        }
    }
    // The rows' groups of a block add their sums in order.
    float* total = reinterpret_cast<float*>(bytes);
    for (int pass = 0; pass < (LAYER ? 2 : 1); pass++) {
        float* part = pass == 0 ? weight_parts : bias_parts;
        if (part == nullptr) continue;
        for (int group = 0; group < THREADS / G; group++) {
            if (threadIdx.x / G == group) {
#pragma unroll
                for (int i = 0; i < ITERS; i++) {
                    i64 c = static_cast<i64>(i * G + lane) * V;
                    if (c >= cols) continue;
#pragma unroll
                    for (int k = 0; k < V; k++) {
                        float mine = pass == 0 ? dw[i][k] : db[i][k];
                        total[c + k] = group == 0 ? mine : total[c + k] + mine;
                    }
                }
            }
            __syncthreads();
        }
        for (i64 c = threadIdx.x; c < cols; c += THREADS) part[blockIdx.x * cols + c] = total[c];
        __syncthreads();
    }
}
