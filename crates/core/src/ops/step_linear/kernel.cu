// The product of a few tokens with a matrix of weights, and what surrounds it in a step of generation.
//
// Reading the weights bounds it: every weight is read once (once per TOKENS tokens), and nothing else may be waited for
// meanwhile. A block multiplies ROWS rows of the weight with TOKENS tokens; its warps share the columns, in steps of 32.
// Rows of the weight are the rows of the tensor cores' first operand, tokens the columns of the second. A thread takes
// the same 8 consecutive columns of a weight row and of a token: which column is which k of a product does not matter
// as long as both operands agree, so 16-byte pieces go from memory to the operands without being exchanged. A thread
// copies the pieces that it multiplies itself, so the ring of copies needs no barrier, and it starts them before it
// waits for the kernel before: weights do not depend on it.
//
// Sums over k: in f32, along the steps of a warp, then over warps in order, whatever the number of tokens.
//
// Macros: TO type of the result; WARPS; M row tiles of 16; NT token tiles of 8; STAGES of the ring; SCALE 0 or 1;
// EPILOGUE 0 (none), 1 (convolution) or 2 (residual); W taps of the convolution.

#define THREADS (WARPS * WARP)
#define ROWS (16 * M)
#define TOKENS (8 * NT)
// Steps whose tokens are loaded together.
#define AHEAD (8 / NT)
// Results a thread, and whether what they meet fits into registers meanwhile.
#define EACH ((ROWS * TOKENS + THREADS - 1) / THREADS)
#define EARLY (EACH <= 2)
// Distance of the tokens in the partial sums: writes of a warp fall into different banks.
#define PITCH (ROWS + 4)

DEVICE void load_tokens(u32x4 (*b)[NT], Mat<bf16> x, i64 token0, i64 tokens, i64 k, int step, int steps, int lane) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        i64 c = static_cast<i64>(step + u * WARPS) * 32 + lane % 4 * 8;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            i64 token = token0 + 8 * j + lane / 4;
            bool inside = step + u * WARPS < steps && token < tokens && c < k;
            b[u][j] = inside ? *reinterpret_cast<const u32x4*>(x.row(token) + c) : u32x4{0, 0, 0, 0};
        }
    }
}

// out = x · weightᵀ ⊙ scale (+ bias), with scale[t] = 1/√(mean square of token t + ε) from `parts` partial sums a token.
// Convolution: results of rows first .. first + channels go through the convolution's step and SiLU; state row slots[t]
// moves on. Residual: stream = out + residual is stored, and what goes to `out` is stream ⊙ next_weight; row block b
// leaves its sum of the squares of token t's stream in squares_out[t, b].
KERNEL __launch_bounds__(THREADS) step_linear(Mat<bf16> x, Mat<bf16> weight, Mat<float> bias, Mat<TO> out, Mat<float> squares, float width, float eps,
                Mat<float> conv_weight, Mat<float> conv_bias, Mat<float> state, const int* slots, i64 first, i64 channels,
                Mat<float> residual, Mat<float> next_weight, Mat<float> stream, Mat<float> squares_out, int parts,
                i64 tokens, i64 rows, i64 k) {
    DYNAMIC_SHARED(bytes);
    u32x4* ring = reinterpret_cast<u32x4*>(bytes);  // [STAGES][2 M][THREADS]
    float* sums = reinterpret_cast<float*>(bytes);  // [WARPS][TOKENS][PITCH], once the ring is done
    __shared__ float scale[TOKENS];
    let_next_start();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    i64 row0 = static_cast<i64>(blockIdx.x) * ROWS, token0 = static_cast<i64>(blockIdx.y) * TOKENS;
    int steps = static_cast<int>((k + 31) / 32);
    auto fetch = [&](int step, int stage) {
        i64 c = static_cast<i64>(step) * 32 + lane % 4 * 8;
#pragma unroll
        for (int m = 0; m < 2 * M; m++) {
            i64 row = row0 + 8 * m + lane / 4;
            u32x4* to = ring + (stage * 2 * M + m) * THREADS + threadIdx.x;
            if (row < rows && c < k) {
                copy_async16(to, weight.row(row) + c);
            } else {
                *to = u32x4{0, 0, 0, 0};
            }
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (warp + s * WARPS < steps) fetch(warp + s * WARPS, s);
        copy_async_commit();
    }
    // What the results meet, as far as nothing in this step writes it. With many results a thread it is read late.
    float shift[EACH], window[EACH][W], taps[EACH][W];
    auto load_constants = [&](int e) {
        int at = threadIdx.x + e * THREADS;
        i64 row = row0 + at % ROWS, token = token0 + at / ROWS;
        if (at >= ROWS * TOKENS || row >= rows || token >= tokens) return;
        shift[e] = bias.present() ? bias.data[row] : 0.0f;
#if EPILOGUE == 1
        i64 c = row - first;
        if (c < 0 || c >= channels) return;
        i64 slot = slots != nullptr ? slots[token] : token;
#pragma unroll
        for (int i = 0; i < W - 1; i++) window[e][i] = state.row(slot)[i * channels + c];
#pragma unroll
        for (int i = 0; i < W; i++) taps[e][i] = conv_weight.row(c)[i];
#endif
#if EPILOGUE == 2
        taps[e][0] = next_weight.data[row];
#endif
    };
    if constexpr (EARLY) {
#pragma unroll
        for (int e = 0; e < EACH; e++) load_constants(e);
    }
    wait_for_previous();

    u32x4 b[AHEAD][NT];
    load_tokens(b, x, token0, tokens, k, warp, steps, lane);
#if EPILOGUE == 2
    float before[EACH];
    if constexpr (EARLY) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int at = threadIdx.x + e * THREADS;
            i64 row = row0 + at % ROWS, token = token0 + at / ROWS;
            if (at < ROWS * TOKENS && row < rows && token < tokens) before[e] = residual.row(token)[row];
        }
    }
#endif
#if SCALE
    // Token `warp`, `warp` + WARPS, ...
    for (int j = warp; j < TOKENS; j += WARPS) {
        float sum = 0.0f;
        if (token0 + j < tokens)
            for (int p = lane; p < parts; p += WARP) sum += squares.row(token0 + j)[p];
        sum = warp_sum(sum);
        if (lane == 0) scale[j] = 1.0f / sqrtf(sum / width + eps);
    }
#endif
    float d[M][NT][4] = {};
    int stage = 0;
    for (int step = warp; step < steps; step += AHEAD * WARPS) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (step + u * WARPS >= steps) break;
            copy_async_wait<STAGES - 1>();
            u32x4* from = ring + stage * 2 * M * THREADS + threadIdx.x;
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32x4 upper = from[2 * m * THREADS], lower = from[(2 * m + 1) * THREADS];
                u32 a0[4] = {upper.x, lower.x, upper.y, lower.y}, a1[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    u32 b0[2] = {b[u][j].x, b[u][j].y}, b1[2] = {b[u][j].z, b[u][j].w};
                    mma_bf16(d[m][j], a0, b0);
                    mma_bf16(d[m][j], a1, b1);
                }
            }
            int next = step + (u + STAGES) * WARPS;
            if (next < steps) fetch(next, stage);
            copy_async_commit();
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        if (step + AHEAD * WARPS < steps) load_tokens(b, x, token0, tokens, k, step + AHEAD * WARPS, steps, lane);
    }

    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int token = 8 * j + lane % 4 * 2 + i % 2, row = 16 * m + lane / 4 + i / 2 * 8;
                sums[(warp * TOKENS + token) * PITCH + row] = d[m][j][i];
            }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int at = threadIdx.x + e * THREADS;
        if (at >= ROWS * TOKENS) break;  // whole warps
        i64 row = row0 + at % ROWS, token = token0 + at / ROWS;
        bool inside = row < rows && token < tokens;
        float v = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += sums[(w * TOKENS + at / ROWS) * PITCH + at % ROWS];
#if SCALE
        v *= scale[at / ROWS];
#endif
        if constexpr (!EARLY) load_constants(e);
        if (inside) v += shift[e];
#if EPILOGUE == 1
        i64 c = row - first;
        if (inside && c >= 0 && c < channels) {
            i64 slot = slots != nullptr ? slots[token] : token;
            // The window holds what a prompt would have stored: numbers of the activations' type.
            TO rounded;
            set(rounded, v);
            window[e][W - 1] = to_f32(rounded);
            v = conv_bias.present() ? conv_bias.data[c] : 0.0f;
#pragma unroll
            for (int i = 0; i < W; i++) v += taps[e][i] * window[e][i];
            v = silu(v);
#pragma unroll
            for (int i = 0; i < W - 1; i++) state.row(slot)[i * channels + c] = window[e][i + 1];
        }
#endif
#if EPILOGUE == 2
        float s = 0.0f;
        if (inside) {
            s = (EARLY ? before[e] : residual.row(token)[row]) + v;
            stream.row(token)[row] = s;
            v = s * taps[e][0];
        }
        // The lanes of a token's rows are neighbours.
        float square = s * s;
#pragma unroll
        for (int o = (ROWS < WARP ? ROWS : WARP) / 2; o > 0; o /= 2) square += __shfl_xor_sync(0xffffffffu, square, o);
        if (at % ROWS == 0 && token < tokens) squares_out.row(token)[blockIdx.x] = square;
#endif
        if (inside) set(out.row(token)[row], v);
    }
}
