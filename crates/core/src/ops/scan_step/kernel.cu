// One step of the selective scan for every token, with the projection to Δ before it and the gate behind it.
//
// A block holds 32 channels of TOKENS tokens; the lanes of a warp are channels, since states lie state-major, and its
// WARPS warps share the states and the columns of the projection. Reading and writing the states bounds it where there
// are many tokens, the chain of dependent reads where there are few: what no kernel of this step writes (states, A and
// the projection's weights) is read before the wait.
//
// Macros: T type of activations and weights; N states a channel; R rank of Δ; TOKENS; NORM 0 or 1 (RMSNorm without
// weight on Δ, B and C, as in Falcon-Mamba).

#define WARPS 4
// States, and columns of the projection, of a warp.
#define NS ((N + WARPS - 1) / WARPS)
#define RS (((R + WARPS - 1) / WARPS + 3) / 4 * 4)
#define PITCH ((R + 2 * N + 3) / 4 * 4)

KERNEL __launch_bounds__(WARPS * WARP) scan_step(Mat<T> x, Mat<T> z, Mat<float> parts, Mat<T> dt_weight, Mat<float> dt_bias, Mat<float> a, Mat<float> skip,
              Mat<float> state, const int* slots, Mat<T> y, i64 tokens, i64 channels, float eps) {
    __shared__ __align__(16) float in[TOKENS][PITCH];
    __shared__ float dts[WARPS][TOKENS][WARP], ys[WARPS][TOKENS][WARP];
    let_next_start();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    i64 d = static_cast<i64>(blockIdx.x) * WARP + lane, token0 = static_cast<i64>(blockIdx.y) * TOKENS;
    bool inside = d < channels;
    float h[TOKENS][NS], rate[NS], w[RS];
    i64 slot[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        bool there = token0 + t < tokens;
        slot[t] = there ? (slots != nullptr ? slots[token0 + t] : token0 + t) : -1;
#pragma unroll
        for (int i = 0; i < NS; i++) {
            int n = warp * NS + i;
            h[t][i] = there && inside && n < N ? state.row(slot[t])[n * channels + d] : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < NS; i++) {
        int n = warp * NS + i;
        rate[i] = inside && n < N ? a.row(d)[n] * LOG2_E : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < RS; i += 4) {
        int r = warp * RS + i;
#if R % 4 == 0
        w[i] = w[i + 1] = w[i + 2] = w[i + 3] = 0.0f;
        if (inside && r < R) load<4>(w + i, dt_weight.row(d) + r);
#else
#pragma unroll
        for (int j = 0; j < 4; j++) w[i + j] = inside && r + j < R ? to_f32(dt_weight.row(d)[r + j]) : 0.0f;
#endif
    }
    float bias = inside && dt_bias.present() ? dt_bias.data[d] : 0.0f;
    float through = inside && skip.present() ? skip.data[d] : 0.0f;
    wait_for_previous();

    float u[TOKENS], gate[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        bool there = inside && slot[t] >= 0;
        u[t] = there ? to_f32(x.row(token0 + t)[d]) : 0.0f;
        gate[t] = there && t % WARPS == warp ? to_f32(z.row(token0 + t)[d]) : 0.0f;
    }
    for (int e = threadIdx.x; e < TOKENS * PITCH; e += WARPS * WARP) {
        i64 token = token0 + e / PITCH;
        in[e / PITCH][e % PITCH] = token < tokens && e % PITCH < R + 2 * N ? parts.row(token)[e % PITCH] : 0.0f;
    }
    __syncthreads();
#if NORM
    for (int e = warp; e < 3 * TOKENS; e += WARPS) {
        float* part = in[e / 3] + (e % 3 == 0 ? 0 : e % 3 == 1 ? R : R + N);
        int length = e % 3 == 0 ? R : N;
        float sum = 0.0f;
        for (int i = lane; i < length; i += WARP) sum += part[i] * part[i];
        float scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(length) + eps);
        for (int i = lane; i < length; i += WARP) part[i] *= scale;
    }
    __syncthreads();
#endif
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < RS; i += 4) {
            if (warp * RS + i >= R) break;
            // Past the rank there are numbers of B, and zeros among the weights.
            float v[4];
            load<4>(v, in[t] + warp * RS + i);
            sum += w[i] * v[0] + w[i + 1] * v[1] + w[i + 2] * v[2] + w[i + 3] * v[3];
        }
        dts[warp][t][lane] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float dt = bias;
#pragma unroll
        for (int i = 0; i < WARPS; i++) dt += dts[i][t][lane];
        dt = softplus(dt);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < NS; i++) {
            int n = warp * NS + i;
            if (n >= N) break;
            h[t][i] = ex2(dt * rate[i]) * h[t][i] + dt * u[t] * in[t][R + n];
            sum += h[t][i] * in[t][R + N + n];
            if (inside && slot[t] >= 0) state.row(slot[t])[n * channels + d] = h[t][i];
        }
        ys[warp][t][lane] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t % WARPS != warp || !inside || slot[t] < 0) continue;
        float v = through * u[t];
#pragma unroll
        for (int i = 0; i < WARPS; i++) v += ys[i][t][lane];
        set(y.row(token0 + t)[d], v * silu(gate[t]));
    }
}
