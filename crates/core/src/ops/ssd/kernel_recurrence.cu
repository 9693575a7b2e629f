// SSD one token after another: for decode steps and other segments of a few tokens. Memory bounds it: each number of the
// state is read and written once.
//
// A warp takes ROWS channels of a head; its lanes share the N numbers of a channel's state, V neighbours each.
//
// Macros: T type of activations; V; VECTORS groups of 32 V numbers that cover N; ROWS.

#define THREADS 128

KERNEL __launch_bounds__(THREADS) recurrence(Mat<T> x, Mat<T> dt, const float* a, Mat<T> b, Mat<T> c, const float* d, Mat<T> z,
                                             const float* dt_bias, Mat<float> initial, const int* offsets, Mat<T> y,
                                             Mat<float> last, i64 tokens, i64 heads, i64 headdim, i64 d_state,
                                             i64 heads_per_group, int d_per_channel, int use_softplus, float low, float high) {
    i64 channel = (static_cast<i64>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP) * ROWS;
    int segment = blockIdx.y, lane = threadIdx.x % WARP;
    i64 channels = heads * headdim, start = offsets[segment], end = offsets[segment + 1];
    if (channel >= channels) return;
    if (y.present() && lane < ROWS && channel + lane < channels) {
        // Rows of no segment are zero.
        if (segment == 0)
            for (i64 t = 0; t < start; t++) set(y.row(t)[channel + lane], 0.0f);
        if (segment + 1 == gridDim.y)
            for (i64 t = end; t < tokens; t++) set(y.row(t)[channel + lane], 0.0f);
    }
    float state[ROWS][VECTORS][V];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            i64 n = (i * WARP + lane) * V;
#pragma unroll
            for (int v = 0; v < V; v++) state[r][i][v] = 0.0f;
            if (initial.present() && channel + r < channels && n < d_state)
                load<V>(state[r][i], initial.row(segment) + (channel + r) * d_state + n);
        }
    for (i64 t = start; t < end; t++) {
        float mine = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (channel + r >= channels) continue;
            i64 head = (channel + r) / headdim, group = head / heads_per_group;
            float raw = to_f32(dt.row(t)[head]) + (dt_bias != nullptr ? dt_bias[head] : 0.0f);
            float step = fminf(fmaxf(use_softplus ? softplus(raw) : raw, low), high);
            float decay = fast_exp(step * a[head]), in = step * to_f32(x.row(t)[channel + r]), sum = 0.0f;
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                i64 n = (i * WARP + lane) * V;
                float key[V] = {}, query[V] = {};
                if (n < d_state) {
                    load<V>(key, b.row(t) + group * d_state + n);
                    load<V>(query, c.row(t) + group * d_state + n);
                }
#pragma unroll
                for (int v = 0; v < V; v++) {
                    state[r][i][v] = decay * state[r][i][v] + in * key[v];
                    sum += state[r][i][v] * query[v];
                }
            }
            sum = warp_sum(sum);
            if (lane == r) mine = sum;
        }
        if (y.present() && lane < ROWS && channel + lane < channels) {
            i64 at = channel + lane;
            if (d != nullptr) mine += d[d_per_channel ? at : at / headdim] * to_f32(x.row(t)[at]);
            if (z.present()) mine *= silu(to_f32(z.row(t)[at]));
            set(y.row(t)[at], mine);
        }
    }
    if (!last.present()) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            i64 n = (i * WARP + lane) * V;
            if (channel + r < channels && n < d_state) store<V>(last.row(segment) + (channel + r) * d_state + n, state[r][i]);
        }
}
