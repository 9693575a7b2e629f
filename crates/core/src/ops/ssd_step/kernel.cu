// One step of Mamba-2's recurrence for every token, with the gate and the weight of the norm behind it.
//
// A block holds ROWS channels of a head of one token, a warp some of these rows of the state, its lanes the N states of
// a row. Reading and writing the states bounds it, 8 bytes for 6 operations; they are read before the wait, since no
// kernel of this step writes them.
//
// Macros: T type of activations; N states a channel; V states that a lane loads at once; GATE 0 (none), 1 (silu(z)), 2
// (silu(z) and weight; squares of the product) or 3 (weight and silu(z); squares before the gate).

#define WARPS 4
// Channels of a warp and of a block.
#define EACH 4
#define ROWS (WARPS * EACH)
#define ITERS ((N + WARP * V - 1) / (WARP * V))

KERNEL __launch_bounds__(WARPS * WARP) ssd_step(Mat<T> x, Mat<T> b, Mat<T> c, Mat<T> dt, Mat<T> z, Mat<float> a, Mat<float> skip, Mat<float> dt_bias,
             Mat<float> weight, Mat<float> state, const int* slots, Mat<T> y, Mat<float> squares, int headdim,
             int heads_per_group, int skip_each, float dt_min, float dt_max) {
    __shared__ float scratch[WARPS];
    let_next_start();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int blocks = (headdim + ROWS - 1) / ROWS;
    i64 token = blockIdx.y, head = blockIdx.x / blocks, slot = slots != nullptr ? slots[token] : token;
    int p0 = static_cast<int>(blockIdx.x % blocks) * ROWS + warp * EACH;
    float* states = state.row(slot) + head * headdim * N;
    float h[EACH][ITERS][V];
#pragma unroll
    for (int r = 0; r < EACH; r++)
#pragma unroll
        for (int i = 0; i < ITERS; i++) {
            int n = (i * WARP + lane) * V;
            if (p0 + r < headdim && n < N) load<V>(h[r][i], states + static_cast<i64>(p0 + r) * N + n);
        }
    float rate = a.data[head] * LOG2_E, bias = dt_bias.present() ? dt_bias.data[head] : 0.0f;
    // Lane r has the numbers of row r.
    bool mine = lane < EACH && p0 + lane < headdim;
    i64 channel = head * headdim + p0 + lane;
    float through = mine && skip.present() ? skip.data[skip_each ? channel : head] : 0.0f;
#if GATE >= 2
    float scale = mine ? weight.data[channel] : 0.0f;
#endif
    wait_for_previous();

    float u = mine ? to_f32(x.row(token)[channel]) : 0.0f;
#if GATE
    float gate = mine ? silu(to_f32(z.row(token)[channel])) : 0.0f;
#endif
    float step = softplus(to_f32(dt.row(token)[head]) + bias);
    step = fminf(fmaxf(step, dt_min), dt_max);
    float decay = ex2(step * rate);
    i64 group = head / heads_per_group * N;
    float bs[ITERS][V], cs[ITERS][V];
#pragma unroll
    for (int i = 0; i < ITERS; i++) {
        int n = (i * WARP + lane) * V;
        if (n >= N) continue;
        load<V>(bs[i], b.row(token) + group + n);
        load<V>(cs[i], c.row(token) + group + n);
    }
    float v = 0.0f;
#pragma unroll
    for (int r = 0; r < EACH; r++) {
        float sum = 0.0f, input = step * __shfl_sync(0xffffffffu, u, r);
        if (p0 + r < headdim) {
#pragma unroll
            for (int i = 0; i < ITERS; i++) {
                int n = (i * WARP + lane) * V;
                if (n >= N) continue;
#pragma unroll
                for (int k = 0; k < V; k++) {
                    h[r][i][k] = decay * h[r][i][k] + input * bs[i][k];
                    sum += h[r][i][k] * cs[i][k];
                }
                store<V>(states + static_cast<i64>(p0 + r) * N + n, h[r][i]);
            }
        }
        sum = warp_sum(sum);
        if (lane == r) v = sum + through * u;
    }
    float square = 0.0f;
    if (mine) {
#if GATE == 3
        square = v * v;
#endif
#if GATE
        v *= gate;
#endif
#if GATE == 2
        square = v * v;
#endif
#if GATE >= 2
        v *= scale;
#endif
        set(y.row(token)[channel], v);
    }
#if GATE >= 2
    square = warp_sum(square);
    if (lane == 0) scratch[warp] = square;
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += scratch[i];
        squares.row(token)[blockIdx.x] = sum;
    }
#endif
}
