// The gradient of SSD in a chunk, from the state S that it starts from and the gradient G of the state after it, which
// `states` of kernel.cu left. With dy the gradient of the sum before the gate, M_tj = decay(t, j) (C_t · B_j) (dy_t · x_j) for
// j ≤ t, and before, after, whole as there:
//
//   dx_j = Δ_j (Σ_t decay(t, j) (C_t · B_j) dy_t + after_j G B_j) + D dy_j
//   dC_t = Σ_heads (Σ_j decay(t, j) Δ_j (dy_t · x_j) B_j + before_t dy_t S)
//   dB_j = Σ_heads (Σ_t decay(t, j) Δ_j (dy_t · x_j) C_t + Δ_j after_j x_j G)
//
// The gradient of the logarithm of the decay of step i sums what passes from rows before it to rows from it on:
//
//   dlog_i = whole S · G + Σ_{j < i} Δ_j after_j (x_j G · B_j) + Σ_{t ≥ i} before_t (dy_t S · C_t) + Σ_{j < i ≤ t} Δ_j M_tj
//   dΔ_i = a dlog_i + Σ_t M_ti + after_i (x_i G · B_i),  da = Σ_i Δ_i dlog_i
//
// A block takes one chunk and some heads of a group, one after another (and the channels of a head in tiles of PT). C · Bᵀ
// is formed once; dB and dC, and the sum over heads of the matrix that multiplies B and C, stay in registers, so that those
// products are done once, too. Sums over time for a, D and the bias are written a part for each chunk.
//
// Bounds, bf16, P 64, N 128, a head and chunk of 64 rows: 1024 products of 16 x 8 x 16, 1650 cycles of a multiprocessor.
//
// Macros: those of cuda/tiles.cu and kernel_steps.cu; STAGES buffers that a head's rows and states are fetched into.

typedef Spread<Q, Q, 4> PairSpread;
typedef Spread<Q, PT, 2> ChannelSpread;
typedef Spread<Q, NP, 2> KeySpread;

// Adds the sum over a row's columns that this thread's quad holds: sums[warp_col][row].
template <class S>
DEVICE void put_row_sum(float (*sums)[Q], const S& spread, int mt, int half, float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    v += __shfl_xor_sync(0xffffffffu, v, 2);
    if (threadIdx.x % 4 == 0) sums[spread.warp_col][spread.row_of(mt, 2 * half)] = v;
}
template <int COUNT>
DEVICE float add_up(const float (*sums)[Q], int t) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += sums[i][t];
    return sum;
}

// blockIdx.x is the chunk's slot, blockIdx.y the group and, where a group's heads are split, which part of them: the parts' dB
// and dC then go to `split_b` and `split_c`, [splits, tokens, G N]. Sums over the rows of the chunk, a value for each head (or,
// for D per channel, each channel), go to row `slot` of `part_a`, `part_bias` and `part_d`.
KERNEL __launch_bounds__(THREADS, 1) gradients(Mat<T> x, Mat<T> b, Mat<T> c, const float* a, const float* d, const int* offsets,
                                               const float* delta, const float* cum, const float* rest, const float* slope,
                                               const T* chunk_states, const T* chunk_gradients, Mat<T> dy, Mat<T> dx,
                                               Mat<T> ddt, Mat<T> db, Mat<T> dc, float* split_b, float* split_c,
                                               float* part_a, float* part_bias, float* part_d, int splits, Sizes s) {
    DYNAMIC_SHARED(memory);
    unsigned char* next = memory;
    Tile<Q, NP> keys{reinterpret_cast<bf16*>(next)}, queries{reinterpret_cast<bf16*>(next += Tile<Q, NP>::BYTES)};
    Tile<Q, Q> scores{reinterpret_cast<bf16*>(next += Tile<Q, NP>::BYTES)};
    // What changes with the head and the channels, in STAGES buffers.
    constexpr int STAGE = 2 * Tile<Q, PT>::BYTES + 2 * Tile<PT, NP>::BYTES;
    unsigned char* stages = next + Tile<Q, Q>::BYTES;
    // Steps are read for longer than tiles.
    __shared__ ChunkSteps chunk_steps[3];
    // Row sums of M Δ and column sums of M; x G · B and dy S · C of each row; dy · x of each row; S · G. A warp adds them up
    // while the next ones are found.
    __shared__ float row_sums[2][WARPS][Q], col_sums[2][WARPS][Q], key_sums[2][WARPS][Q], query_sums[2][WARPS][Q];
    __shared__ float diagonal[2][Q], state_sums[2][WARPS];
    // Of the tiles of a head before.
    __shared__ float sums_so_far[4][Q], more_so_far[2][WARP];

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    i64 slot = blockIdx.x, group = blockIdx.y / splits, split = blockIdx.y % splits;
    i64 per_split = (s.heads_per_group + splits - 1) / splits;
    i64 head = group * s.heads_per_group + split * per_split;
    i64 group_end = (group + 1) * s.heads_per_group, head_end = head + per_split < group_end ? head + per_split : group_end;
    i64 groups = s.heads / s.heads_per_group, width = groups * s.d_state, group_col = group * s.d_state;
    if (slot == 0 && head < head_end) {
        clear_outside(dx, head * s.headdim, (head_end - head) * s.headdim, offsets, s);
        clear_outside(ddt, head, head_end - head, offsets, s);
        if (split == 0) {
            clear_outside(db, group_col, s.d_state, offsets, s);
            clear_outside(dc, group_col, s.d_state, offsets, s);
        }
    }
    Piece chunk = piece_of(offsets, s.segments, slot, Q);
    if (!chunk.exists()) {
        // Every part is added up, so those of no chunk are zero.
        for (i64 h = head + threadIdx.x; h < head_end; h += THREADS) {
            if (part_a != nullptr) part_a[slot * s.heads + h] = 0.0f;
            if (part_bias != nullptr) part_bias[slot * s.heads + h] = 0.0f;
            if (part_d != nullptr && !s.d_per_channel) part_d[slot * s.heads + h] = 0.0f;
        }
        if (part_d != nullptr && s.d_per_channel)
            for (i64 i = head * s.headdim + threadIdx.x; i < head_end * s.headdim; i += THREADS)
                part_d[slot * s.heads * s.headdim + i] = 0.0f;
        return;
    }
    i64 first = chunk.first;
    int rows = static_cast<int>(chunk.end - first), d_state = static_cast<int>(s.d_state), headdim = static_cast<int>(s.headdim);
    Steps steps{delta, cum, rest};
    // Item i of the block's work: the channels from i % tiles · PT on of head i / tiles.
    int tiles = (headdim + PT - 1) / PT, items = head_end > head ? static_cast<int>(head_end - head) * tiles : 0;
    auto fetch = [&](int i) {
        int channel = i % tiles * PT, channels = headdim - channel < PT ? headdim - channel : PT;
        i64 h = head + i / tiles, col = h * s.headdim + channel, at = (slot * s.heads * s.headdim + col) * s.d_state;
        unsigned char* to = stages + i % STAGES * STAGE;
        fetch_steps(chunk_steps[i % 3], steps, slot, s.heads, h);
        fetch_tile(Tile<Q, PT>{reinterpret_cast<bf16*>(to)}, x.data + first * x.stride + col, x.stride, rows, channels);
        fetch_tile(Tile<Q, PT>{reinterpret_cast<bf16*>(to += Tile<Q, PT>::BYTES)}, dy.data + first * dy.stride + col, dy.stride, dy.present() ? rows : 0, channels);
        fetch_tile(Tile<PT, NP>{reinterpret_cast<bf16*>(to += Tile<Q, PT>::BYTES)}, chunk_states + at, s.d_state, channels, d_state);
        fetch_tile(Tile<PT, NP>{reinterpret_cast<bf16*>(to += Tile<PT, NP>::BYTES)}, chunk_gradients + at, s.d_state, channels, d_state);
        copy_async_commit();
    };
    fetch_tile(keys, b.data + first * b.stride + group_col, b.stride, rows, d_state);
    fetch_tile(queries, c.data + first * c.stride + group_col, c.stride, rows, d_state);
    copy_async_commit();
    if (STAGES > 1 && items > 0) {
        fetch(0);
        copy_async_wait<1>();
    } else {
        copy_async_wait<0>();
    }
    __syncthreads();

    PairSpread pairs(warp);
    ChannelSpread channel_spread(warp);
    KeySpread key_spread(warp);
    PairSpread::Acc similar = {}, mixed = {};
    KeySpread::Acc dkeys = {}, dqueries = {};
    if (pairs.active) product<false, false, NP>(similar, queries, pairs.row, keys, pairs.col);

    // What is left once the products of item i are done: sums of rows, and with the last channels of a head the gradient of
    // its steps. For one warp, lane l of which has the rows from l · EACH on.
    auto finish = [&](int i) {
        constexpr int EACH = Q < WARP ? 1 : Q / WARP;
        i64 h = head + i / tiles;
        const ChunkSteps& now = chunk_steps[i % 3];
        float rows_of_m[EACH] = {}, cols_of_m[EACH] = {}, from_keys[EACH] = {}, from_queries[EACH] = {}, states_product = 0.0f, skip = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int t = lane * EACH + e;
            if (t >= Q) continue;
            rows_of_m[e] = add_up<PairSpread::WN>(row_sums[i % 2], t);
            cols_of_m[e] = add_up<PairSpread::WM>(col_sums[i % 2], t);
            from_keys[e] = add_up<ChannelSpread::WN>(key_sums[i % 2], t);
            from_queries[e] = add_up<KeySpread::WN>(query_sums[i % 2], t);
            skip += diagonal[i % 2][t];
            if (tiles > 1) {
                bool begun = i % tiles > 0;
                float* sums[4] = {&rows_of_m[e], &cols_of_m[e], &from_keys[e], &from_queries[e]};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (begun) *sums[k] += sums_so_far[k][t];
                    sums_so_far[k][t] = *sums[k];
                }
            }
        }
#pragma unroll
        for (int k = 0; k < WARPS; k++) states_product += state_sums[i % 2][k];
        if (tiles > 1) {
            if (i % tiles > 0) states_product += more_so_far[0][lane], skip += more_so_far[1][lane];
            more_so_far[0][lane] = states_product, more_so_far[1][lane] = skip;
            if (i % tiles + 1 < tiles) return;
        }
        // From the chunk's start: what passed the rows before; from its end: what passes to the rows from here on.
        float ahead = 0.0f, behind = 0.0f, delta_of[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int t = lane * EACH + e;
            delta_of[e] = t < Q ? now.delta[t] : 0.0f;
            ahead += delta_of[e] * from_keys[e];
            behind += from_queries[e] + rows_of_m[e] - delta_of[e] * cols_of_m[e];
        }
        float before = ahead, after = behind;
#pragma unroll
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            float one = __shfl_up_sync(0xffffffffu, before, lanes), two = __shfl_down_sync(0xffffffffu, after, lanes);
            if (lane >= lanes) before += one;
            if (lane + lanes < WARP) after += two;
        }
        before -= ahead;
        float sum_a = 0.0f, sum_bias = 0.0f;
        i64 at = (slot * s.heads + h) * Q;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int t = lane * EACH + e;
            if (t >= rows || t >= Q) continue;
            float dlog = now.whole() * states_product + before + after;
            before += delta_of[e] * from_keys[e];
            after -= from_queries[e] + rows_of_m[e] - delta_of[e] * cols_of_m[e];
            sum_a += delta_of[e] * dlog;
            float out = (a[h] * dlog + cols_of_m[e] + from_keys[e]) * slope[at + t];
            sum_bias += out;
            if (ddt.present()) set(ddt.row(first + t)[h], out);
        }
        sum_a = warp_sum(sum_a), sum_bias = warp_sum(sum_bias), skip = warp_sum(skip);
        if (lane == 0) {
            if (part_a != nullptr) part_a[slot * s.heads + h] = sum_a;
            if (part_bias != nullptr) part_bias[slot * s.heads + h] = sum_bias;
            if (part_d != nullptr && !s.d_per_channel) part_d[slot * s.heads + h] = skip;
        }
    };
    for (int i = 0; i < items; i++) {
        int channel = i % tiles * PT, channels = headdim - channel < PT ? headdim - channel : PT;
        i64 h = head + i / tiles, col = h * s.headdim + channel;
        if (STAGES == 1) {
            __syncthreads();
            fetch(i);
        }
        copy_async_wait<0>();
        __syncthreads();
        if (STAGES > 1 && i + 1 < items) fetch(i + 1);
        if (i > 0 && warp == (i - 1) / tiles % WARPS) finish(i - 1);
        const ChunkSteps& now = chunk_steps[i % 3];
        unsigned char* stage = stages + i % STAGES * STAGE;
        Tile<Q, PT> values{reinterpret_cast<bf16*>(stage)}, ups{reinterpret_cast<bf16*>(stage + Tile<Q, PT>::BYTES)};
        Tile<PT, NP> state{reinterpret_cast<bf16*>(stage + 2 * Tile<Q, PT>::BYTES)};
        Tile<PT, NP> gradient{reinterpret_cast<bf16*>(stage + 2 * Tile<Q, PT>::BYTES + Tile<PT, NP>::BYTES)};

        if (pairs.active) {
            PairSpread::Acc acc = {};
            product<false, false, PT>(acc, ups, pairs.row, values, pairs.col);
            float down[PairSpread::NT][2] = {};
#pragma unroll
            for (int mt = 0; mt < PairSpread::MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int t = pairs.row_of(mt, 2 * half);
                    float across = 0.0f;
#pragma unroll
                    for (int nt = 0; nt < PairSpread::NT; nt++) {
                        int j = pairs.col_of(nt, 0);
                        f32x2 decay = now.decay_pair(t, j), step = now.delta_pair(j);
                        float &up0 = acc[mt][nt][2 * half], &up1 = acc[mt][nt][2 * half + 1];
                        if (t == j) diagonal[i % 2][t] = up0;
                        if (t == j + 1) diagonal[i % 2][t] = up1;
                        float score0 = similar[mt][nt][2 * half] * decay.x, score1 = similar[mt][nt][2 * half + 1] * decay.y;
                        mixed[mt][nt][2 * half] += up0 * (decay.x * step.x), mixed[mt][nt][2 * half + 1] += up1 * (decay.y * step.y);
                        float m0 = score0 * up0, m1 = score1 * up1;
                        across += m0 * step.x + m1 * step.y;
                        down[nt][0] += m0, down[nt][1] += m1;
                        scores.set_pair(t, j, score0, score1);
                    }
                    put_row_sum(row_sums[i % 2], pairs, mt, half, across);
                }
#pragma unroll
            for (int nt = 0; nt < PairSpread::NT; nt++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float v = down[nt][k];
#pragma unroll
                    for (int lanes = 4; lanes < WARP; lanes *= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
                    if (lane < 4) col_sums[i % 2][pairs.warp_row][pairs.col_of(nt, k)] = v;
                }
        }
        if (key_spread.active) {
            KeySpread::Acc acc = {};
            product<false, true, PT>(acc, ups, key_spread.row, state, key_spread.col);
#pragma unroll
            for (int mt = 0; mt < KeySpread::MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int t = key_spread.row_of(mt, 2 * half);
                    float factor = now.before(t), across = 0.0f;
#pragma unroll
                    for (int nt = 0; nt < KeySpread::NT; nt++) {
                        f32x2 query = queries.pair(t, key_spread.col_of(nt, 0));
                        float v0 = factor * acc[mt][nt][2 * half], v1 = factor * acc[mt][nt][2 * half + 1];
                        dqueries[mt][nt][2 * half] += v0, dqueries[mt][nt][2 * half + 1] += v1;
                        across += v0 * query.x + v1 * query.y;
                    }
                    put_row_sum(query_sums[i % 2], key_spread, mt, half, across);
                }
        }
        if (key_spread.active) {
            KeySpread::Acc acc = {};
            product<false, true, PT>(acc, values, key_spread.row, gradient, key_spread.col);
#pragma unroll
            for (int mt = 0; mt < KeySpread::MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int t = key_spread.row_of(mt, 2 * half);
                    float factor = now.after(t) * now.delta[t];
#pragma unroll
                    for (int nt = 0; nt < KeySpread::NT; nt++)
#pragma unroll
                        for (int k = 0; k < 2; k++) dkeys[mt][nt][2 * half + k] += factor * acc[mt][nt][2 * half + k];
                }
        }
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < PT * NP; from += 8 * THREADS) {
            int at = from + 8 * threadIdx.x;
            if (PT * NP < 8 * THREADS && at >= PT * NP) break;
            float one[8], two[8];
            state.eight(one, at / NP, at % NP), gradient.eight(two, at / NP, at % NP);
#pragma unroll
            for (int k = 0; k < 8; k++) sum += one[k] * two[k];
        }
        sum = warp_sum(sum);
        if (lane == 0) state_sums[i % 2][warp] = sum;
        __syncthreads();

        if (channel_spread.active) {
            ChannelSpread::Acc acc = {};
            product<false, false, NP>(acc, keys, channel_spread.row, gradient, channel_spread.col);
#pragma unroll
            for (int mt = 0; mt < ChannelSpread::MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int t = channel_spread.row_of(mt, 2 * half);
                    float factor = now.after(t), across = 0.0f;
#pragma unroll
                    for (int nt = 0; nt < ChannelSpread::NT; nt++) {
                        f32x2 in = values.pair(t, channel_spread.col_of(nt, 0));
                        float &v0 = acc[mt][nt][2 * half], &v1 = acc[mt][nt][2 * half + 1];
                        v0 *= factor, v1 *= factor;
                        across += v0 * in.x + v1 * in.y;
                    }
                    put_row_sum(key_sums[i % 2], channel_spread, mt, half, across);
                }
            product<true, true, Q>(acc, scores, channel_spread.row, ups, channel_spread.col);
            float skip = d != nullptr && !s.d_per_channel ? d[h] : 0.0f;
#pragma unroll
            for (int mt = 0; mt < ChannelSpread::MT; mt++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    int t = channel_spread.row_of(mt, e);
                    float step = now.delta[t];
#pragma unroll
                    for (int nt = 0; nt < ChannelSpread::NT; nt++) {
                        f32x2 up = ups.pair(t, channel_spread.col_of(nt, 0));
                        acc[mt][nt][e] = step * acc[mt][nt][e] + skip * up.x;
                        acc[mt][nt][e + 1] = step * acc[mt][nt][e + 1] + skip * up.y;
                    }
                }
            if (d != nullptr && s.d_per_channel) {
#pragma unroll
                for (int mt = 0; mt < ChannelSpread::MT; mt++)
#pragma unroll
                    for (int nt = 0; nt < ChannelSpread::NT; nt++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int p = channel_spread.col_of(nt, e);
                            if (p < channels) acc[mt][nt][e] += d[col + p] * ups.value(channel_spread.row_of(mt, e), p);
                        }
            }
            if (dx.present()) store_result(dx.row(first) + col, dx.stride, acc, channel_spread, rows, channels);
        }
        if (part_d != nullptr && s.d_per_channel && threadIdx.x < channels) {
            float total = 0.0f;
            for (int t = 0; t < rows; t++) total += ups.value(t, threadIdx.x) * values.value(t, threadIdx.x);
            part_d[slot * s.heads * s.headdim + col + threadIdx.x] = total;
        }
    }

    __syncthreads();
    if (items > 0 && warp == (items - 1) / tiles % WARPS) finish(items - 1);
    if (pairs.active) {
#pragma unroll
        for (int mt = 0; mt < PairSpread::MT; mt++)
#pragma unroll
            for (int nt = 0; nt < PairSpread::NT; nt++)
#pragma unroll
                for (int e = 0; e < 4; e += 2)
                    scores.set_pair(pairs.row_of(mt, e), pairs.col_of(nt, e), mixed[mt][nt][e], mixed[mt][nt][e + 1]);
    }
    __syncthreads();
    if (key_spread.active) {
        product<false, true, Q>(dqueries, scores, key_spread.row, keys, key_spread.col);
        product<true, true, Q>(dkeys, scores, key_spread.row, queries, key_spread.col);
    }
    if (splits > 1) {
        i64 at = (split * s.tokens + first) * width + group_col;
        if (db.present()) store_result(split_b + at, width, dkeys, key_spread, rows, d_state);
        if (dc.present()) store_result(split_c + at, width, dqueries, key_spread, rows, d_state);
    } else {
        if (db.present()) store_result(db.row(first) + group_col, db.stride, dkeys, key_spread, rows, d_state);
        if (dc.present()) store_result(dc.row(first) + group_col, dc.stride, dqueries, key_spread, rows, d_state);
    }
}

// dB or dC from the parts of a group's heads, for the rows that lie in segments: a thread two numbers of a row.
KERNEL __launch_bounds__(THREADS) add_splits(const float* parts, int splits, const int* offsets, Mat<T> out, Sizes s) {
    i64 width = s.heads / s.heads_per_group * s.d_state, i = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    i64 row = i / width, col = i % width;
    if (row >= s.tokens || row < offsets[0] || row >= offsets[s.segments]) return;
    float sum = 0.0f;
    for (int k = 0; k < splits; k++) sum += parts[(k * s.tokens + row) * width + col];
    set(out.row(row)[col], sum);
}
