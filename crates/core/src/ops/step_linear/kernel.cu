// The product of a few tokens with a matrix of weights, and what surrounds it in a step of generation.
//
// Reading the weights bounds it: every weight is read once, and nothing else may be waited for
// meanwhile. A block multiplies ROWS rows of the weight with TOKENS tokens; its warps share the columns, in steps of 32.
// With many tokens what bounds it is what a block reads from the L2 cache, weights and tokens alike: see `Shape`.
// Rows of the weight are the rows of the tensor cores' first operand, tokens the columns of the second. A thread takes
// the same 8 consecutive columns of a weight row and of a token: which column is which k of a product does not matter
// as long as both operands agree, so 16-byte pieces go from memory to the operands without being exchanged. A thread
// copies the pieces that it multiplies itself, so the ring of copies needs no barrier, and it starts them before it
// waits for the kernel before: weights do not depend on it.
//
// Sums over k: in f32, along the steps of a warp, then over warps in order, whatever the number of tokens.
//
// With few tokens the time is that of one warp going through the code once, so what can be known beforehand is: the
// columns are a macro, loops are unrolled, rows and tokens that are not there are replaced by the last ones.
//
// Weights in blocks of 8 bits: a step has 64 columns, two blocks, of which a thread's 16 bytes hold 8 columns each. Numbers
// are exact in bf16, so products are made as with bf16 from zero, and the scale of a row's block multiplies that sum in f32.
//
// Macros: TO type of the result; Q8 0 or 1 (weights in blocks of 8 bits); K columns; WARPS; MT tiles of 16 rows and NT
// tiles of 8 tokens of a block, 1 or 2 each; STAGES of
// the ring; SCALE 0 or 1; EPILOGUE 0 (none), 1 (convolution) or 2 (residual); W taps of the convolution.

#define THREADS (WARPS * WARP)
#if Q8
#define WEIGHT q8
#else
#define WEIGHT bf16
#endif
// Times 8 columns that a thread multiplies in a step.
#define EIGHTS (1 + Q8)
#define COLUMNS (32 * EIGHTS)
#define ROWS (16 * MT)
#define TOKENS (8 * NT)
// Steps over the columns, and those of a warp.
#define STEPS ((K + COLUMNS - 1) / COLUMNS)
#define MINE ((STEPS + WARPS - 1) / WARPS)
// Steps whose tokens, and scales of weights, are under way together.
#define MOST (8 / (NT * EIGHTS))
#define AHEAD (NT == 1 && MINE < MOST ? MINE : MOST)
// Chains of sums: a single one would be as long as all its products take one after another.
#define CHAINS (NT == 1 && !Q8 ? 2 : 1)
// Results a thread, all of one row since rows divide the threads, and tokens a warp.
#define EACH ((ROWS * TOKENS + THREADS - 1) / THREADS)
#define EACH_SCALE ((TOKENS + WARPS - 1) / WARPS)
// Distance of the tokens in the partial sums: writes of a warp fall into different banks.
#define PITCH (ROWS + 4)

// out = x · weightᵀ ⊙ scale (+ bias), with scale[t] = 1/√(mean square of token t + ε) from `parts` partial sums a token.
// Convolution: results of rows first .. first + channels go through the convolution's step and SiLU; state row slots[t]
// moves on. Residual: stream = out + residual is stored, and what goes to `out` is stream ⊙ next_weight; row block b
// leaves its sum of the squares of token t's stream in squares_out[t, b].
KERNEL __launch_bounds__(THREADS) step_linear(Mat<bf16> x, Mat<WEIGHT> weight, Mat<float> bias, Mat<TO> out, Mat<float> squares, float inverse_width, float eps,
                Mat<float> conv_weight, Mat<float> conv_bias, Mat<float> state, const int* slots, int first, int channels,
                Mat<float> residual, Mat<float> next_weight, Mat<float> stream, Mat<float> squares_out, int parts,
                int tokens, int rows) {
    DYNAMIC_SHARED(bytes);
    u32x4* ring = reinterpret_cast<u32x4*>(bytes);  // [STAGES][2 * MT][THREADS]
    float* sums = reinterpret_cast<float*>(bytes);  // [WARPS][TOKENS][PITCH], once the ring is done
#if SCALE
    __shared__ float scale[TOKENS];
#endif
    let_next_start();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int row0 = blockIdx.x * ROWS, token0 = blockIdx.y * TOKENS;
    tokens -= token0;
    int column = warp * COLUMNS + lane % 4 * 8;
    auto there = [&](int i) { return i < MINE && (STEPS % WARPS == 0 || i < MINE - 1 || warp + i * WARPS < STEPS); };
    // Behind the last column tokens are taken as zero, so the weight may be any.
    auto behind = [&](int i) { return K % 32 != 0 && column + i * WARPS * COLUMNS >= K; };
    const WEIGHT* from[2 * MT];
#pragma unroll
    for (int m = 0; m < 2 * MT; m++) {
        int row = row0 + 8 * m + lane / 4;
        from[m] = weight.row(row < rows ? row : rows - 1) + warp * COLUMNS + lane % 4 * 8 * EIGHTS;
    }
    auto fetch = [&](int i) {
        if (!there(i)) return;
        u32x4* to = ring + i % STAGES * 2 * MT * THREADS + threadIdx.x;
        int offset = behind(i) ? -column : i * WARPS * COLUMNS;
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) copy_async16(to + m * THREADS, from[m] + offset);
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
        fetch(i);
        copy_async_commit();
    }
#if Q8
    // The scales of the steps to come, as they lie in memory.
    u32 scales[AHEAD][2 * MT];
    auto load_scales = [&](int i) {
        if (!there(i)) return;
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) {
            int row = row0 + 8 * m + lane / 4;
            auto of_row = reinterpret_cast<const u32*>(weight.row(row < rows ? row : rows - 1) + K);
            scales[i % AHEAD][m] = of_row[warp + i * WARPS];
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load_scales(i);
#endif
    // What the results meet, as far as nothing in this step writes it. The windows of many results would take the
    // registers of the products.
    constexpr bool early = EACH <= 2;
    int row = row0 + threadIdx.x % ROWS, token1 = threadIdx.x / ROWS;
    auto inside = [&](int e) {
        int token = token1 + e * (THREADS / ROWS);
        return row < rows && token < TOKENS && token < tokens;
    };
    float shift = 0.0f, taps[W], window[EACH][W];
    bool convolved = EPILOGUE == 1 && row >= first && row < first + channels;
    auto state_row = [&](int e) {
        int token = token0 + token1 + e * (THREADS / ROWS);
        return state.row(slots != nullptr ? slots[token] : token) + (row - first);
    };
    auto load_window = [&](int e) {
        if (!convolved || !inside(e)) return;
        const float* old = state_row(e);
#pragma unroll
        for (int i = 0; i < W - 1; i++) window[e][i] = old[static_cast<i64>(i) * channels];
    };
    if (row < rows) {
        if (bias.present()) shift = bias.data[row];
#if EPILOGUE == 1
        if (convolved) load<W>(taps, conv_weight.data + static_cast<i64>(row - first) * W);
#endif
#if EPILOGUE == 2
        taps[0] = next_weight.data[row];
#endif
    }
    float conv_shift = convolved && conv_bias.present() ? conv_bias.data[row - first] : 0.0f;
    if (early) {
#pragma unroll
        for (int e = 0; e < EACH; e++) load_window(e);
    }
    int offsets[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int token = 8 * j + lane / 4;
        offsets[j] = (token0 + (token < tokens ? token : tokens - 1)) * static_cast<int>(x.stride) + column;
    }
    wait_for_previous();

    u32x4 b[AHEAD][NT][EIGHTS];
    auto load_tokens = [&](int i) {
        if (!there(i)) return;
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int h = 0; h < EIGHTS; h++) {
                const bf16* at = x.data + offsets[j] + i * WARPS * COLUMNS + 32 * h;
                b[i % AHEAD][j][h] = behind(i) ? u32x4{0, 0, 0, 0} : *reinterpret_cast<const u32x4*>(at);
            }
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load_tokens(i);
#if EPILOGUE == 2
    float before[EACH];
    auto load_before = [&](int e) {
        if (inside(e)) before[e] = residual.row(token0 + token1 + e * (THREADS / ROWS))[row];
    };
    if (early) {
#pragma unroll
        for (int e = 0; e < EACH; e++) load_before(e);
    }
#endif
#if SCALE
    // Token `warp`, and perhaps a second one: what the lanes have is added up while others are behind.
    float square[EACH_SCALE] = {};
#pragma unroll
    for (int j = 0; j < EACH_SCALE; j++) {
        int token = warp + j * WARPS;
        if (token < TOKENS && token < tokens)
            for (int p = lane; p < parts; p += WARP) square[j] += squares.row(token0 + token)[p];
    }
#endif
    float d[CHAINS][MT][NT][4] = {};
    constexpr int unroll = MINE <= 8 ? MINE : AHEAD;
#pragma unroll unroll
    for (int i = 0; i < MINE; i++) {
        if (!there(i)) break;
        copy_async_wait<STAGES - 1>();
        u32x4* at = ring + i % STAGES * 2 * MT * THREADS + threadIdx.x;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            u32x4 upper = at[2 * m * THREADS], lower = at[(2 * m + 1) * THREADS];
#if Q8
            u32x4 uppers[2] = {q8_to_bf16(upper.x, upper.y), q8_to_bf16(upper.z, upper.w)};
            u32x4 lowers[2] = {q8_to_bf16(lower.x, lower.y), q8_to_bf16(lower.z, lower.w)};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                upper = uppers[h], lower = lowers[h];
                u32 a0[4] = {upper.x, lower.x, upper.y, lower.y}, a1[4] = {upper.z, lower.z, upper.w, lower.w};
                float upper_scale = f16_to_f32(scales[i % AHEAD][2 * m] >> 16 * h & 0xffffu);
                float lower_scale = f16_to_f32(scales[i % AHEAD][2 * m + 1] >> 16 * h & 0xffffu);
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    u32x4 v = b[i % AHEAD][j][h];
                    u32 b0[2] = {v.x, v.y}, b1[2] = {v.z, v.w};
                    float part[4] = {};
                    mma_bf16(part, a0, b0);
                    mma_bf16(part, a1, b1);
#pragma unroll
                    for (int k = 0; k < 4; k++) d[0][m][j][k] += part[k] * (k < 2 ? upper_scale : lower_scale);
                }
            }
#else
            u32 a0[4] = {upper.x, lower.x, upper.y, lower.y}, a1[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int j = 0; j < NT; j++) {
                u32x4 v = b[i % AHEAD][j][0];
                u32 b0[2] = {v.x, v.y}, b1[2] = {v.z, v.w};
                mma_bf16(d[0][m][j], a0, b0);
                mma_bf16(d[CHAINS - 1][m][j], a1, b1);
            }
#endif
        }
        if (i + STAGES < MINE) fetch(i + STAGES);
        copy_async_commit();
        if (i + AHEAD < MINE) load_tokens(i + AHEAD);
#if Q8
        if (i + AHEAD < MINE) load_scales(i + AHEAD);
#endif
    }

    __syncthreads();
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int token = 8 * j + lane % 4 * 2;
        if (token >= tokens) break;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float* to = sums + (warp * TOKENS + token) * PITCH + 16 * m + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float v = d[0][m][j][i];
                if (CHAINS > 1) v += d[CHAINS - 1][m][j][i];
                to[i % 2 * PITCH + i / 2 * 8] = v;
            }
        }
    }
    if (!early) {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            load_window(e);
#if EPILOGUE == 2
            load_before(e);
#endif
        }
    }
#if SCALE
#pragma unroll
    for (int j = 0; j < EACH_SCALE; j++) {
        int token = warp + j * WARPS;
        if (token >= TOKENS || token >= tokens) break;
        float sum = warp_sum(square[j]);
        if (lane == 0) scale[token] = rcp(sqrtf(sum * inverse_width + eps));
    }
#endif
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int token = token1 + e * (THREADS / ROWS);
        if (token >= TOKENS) break;  // whole warps
        float v = 0.0f;
        if (inside(e)) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) v += sums[(w * TOKENS + token) * PITCH + row - row0];
#if SCALE
            v *= scale[token];
#endif
            v += shift;
#if EPILOGUE == 1
            if (convolved) {
                // The window holds what a prompt would have stored: numbers of the activations' type.
                TO rounded;
                set(rounded, v);
                window[e][W - 1] = to_f32(rounded);
                v = conv_shift;
#pragma unroll
                for (int i = 0; i < W; i++) v += taps[i] * window[e][i];
                v = silu(v);
                float* next = state_row(e);
#pragma unroll
                for (int i = 0; i < W - 1; i++) next[static_cast<i64>(i) * channels] = window[e][i + 1];
            }
#endif
        }
#if EPILOGUE == 2
        float s = 0.0f;
        if (inside(e)) {
            s = before[e] + v;
            // Behind the last layer nobody reads the stream itself.
            if (stream.present()) stream.row(token0 + token)[row] = s;
            v = s * taps[0];
        }
        // The lanes of a token's rows are neighbours.
        float square = s * s;
#pragma unroll
        for (int o = ROWS / 2; o > 0; o /= 2) square += __shfl_xor_sync(0xffffffffu, square, o);
        if (row == row0 && token < tokens && squares_out.present()) squares_out.row(token0 + token)[blockIdx.x] = square;
#endif
        if (inside(e) && (EPILOGUE != 2 || out.present())) set(out.row(token0 + token)[row], v);
    }
}
