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
// See kernel_tiles.cu for macros.

typedef Spread<Q, Q> PairSpread;
typedef Spread<Q, PT> ChannelSpread;
typedef Spread<Q, NP> KeySpread;

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

// A row of dB or dC, or of its part.
template <class E>
DEVICE void store_keys(E* to, i64 stride, const float (&acc)[KeySpread::MT][KeySpread::NT][4], const KeySpread& spread, i64 rows, i64 cols) {
    if (!spread.active) return;
#pragma unroll
    for (int mt = 0; mt < KeySpread::MT; mt++)
#pragma unroll
        for (int nt = 0; nt < KeySpread::NT; nt++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                int t = spread.row_of(mt, e), n = spread.col_of(nt, e);
                if (t < rows) store_pair(to + t * stride + n, n < cols, n + 1 < cols, acc[mt][nt][e], acc[mt][nt][e + 1]);
            }
}

// Sums over the rows of the chunk, a value for each head (or, for D per channel, each channel), go to row `slot` of
// `part_a`, `part_bias` and `part_d`. blockIdx.x is the chunk's slot, blockIdx.y the group and, where a group's heads are split, which part of them. The parts'
// dB and dC then go to `split_b` and `split_c`: [splits, tokens, G N].
KERNEL __launch_bounds__(THREADS, 1) gradients(Mat<T> x, Mat<T> b, Mat<T> c, const float* a, const float* d, const int* offsets,
                                               const float* delta, const float* cum, const float* rest, const float* slope,
                                               const T* chunk_states, const T* chunk_gradients, Mat<T> dy, Mat<T> dx,
                                               Mat<T> ddt, Mat<T> db, Mat<T> dc, float* split_b, float* split_c,
                                               float* part_a, float* part_bias, float* part_d, int splits, Sizes s) {
    DYNAMIC_SHARED(memory);
    unsigned char* next = memory;
    Tile<Q, NP> keys{reinterpret_cast<bf16*>(next)}, queries{reinterpret_cast<bf16*>(next += Tile<Q, NP>::BYTES)};
    Tile<Q, PT> values{reinterpret_cast<bf16*>(next += Tile<Q, NP>::BYTES)}, ups{reinterpret_cast<bf16*>(next += Tile<Q, PT>::BYTES)};
    Tile<PT, NP> state{reinterpret_cast<bf16*>(next += Tile<Q, PT>::BYTES)}, gradient{reinterpret_cast<bf16*>(next += Tile<PT, NP>::BYTES)};
    Tile<Q, Q> scores{reinterpret_cast<bf16*>(next += Tile<PT, NP>::BYTES)};
    __shared__ ChunkSteps now;
    // Row and column sums of M, Δ of j inside; x G · B and dy S · C of each row; dy · x of each row.
    __shared__ float row_sums[WARPS][Q], col_sums[WARPS][Q], key_sums[WARPS][Q], query_sums[WARPS][Q], diagonal[Q], state_sums[WARPS];

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
    i64 first = chunk.first, rows = chunk.end - chunk.first;
    load_tile(keys, b.data + first * b.stride + group_col, b.stride, rows, s.d_state);
    load_tile(queries, c.data + first * c.stride + group_col, c.stride, rows, s.d_state);
    __syncthreads();

    PairSpread pairs;
    ChannelSpread channel_spread;
    KeySpread key_spread;
    float similar[PairSpread::MT][PairSpread::NT][4] = {}, mixed[PairSpread::MT][PairSpread::NT][4] = {};
    float dkeys[KeySpread::MT][KeySpread::NT][4] = {}, dqueries[KeySpread::MT][KeySpread::NT][4] = {};
    if (pairs.active) product<false, false, NP>(similar, queries, pairs.row, keys, pairs.col);

    Steps steps{delta, cum, rest};
    for (; head < head_end; head++) {
        // Sums of the rows of this thread in warp 0, over the tiles of channels.
        constexpr int EACH = Q < WARP ? 1 : Q / WARP;
        float rows_of_m[EACH] = {}, cols_of_m[EACH] = {}, from_keys[EACH] = {}, from_queries[EACH] = {}, states_product = 0.0f, skip = 0.0f;
        for (i64 channel = 0; channel < s.headdim; channel += PT) {
            i64 channels = s.headdim - channel < PT ? s.headdim - channel : PT, col = head * s.headdim + channel;
            if (channel == 0) load_steps(now, steps, slot, s.heads, head);
            load_tile(values, x.data + first * x.stride + col, x.stride, rows, channels);
            load_tile(ups, dy.data + first * dy.stride + col, dy.stride, dy.present() ? rows : 0, channels);
            i64 at = (slot * s.heads * s.headdim + col) * s.d_state;
            load_tile(state, chunk_states + at, s.d_state, channels, s.d_state);
            load_tile(gradient, chunk_gradients + at, s.d_state, channels, s.d_state);
            __syncthreads();

            if (pairs.active) {
                float acc[PairSpread::MT][PairSpread::NT][4] = {};
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
                            float score[2];
#pragma unroll
                            for (int k = 0; k < 2; k++) {
                                int e = 2 * half + k, j = pairs.col_of(nt, e);
                                float decay = t >= j ? now.decay(t, j) : 0.0f, m = acc[mt][nt][e] * decay;
                                if (t == j) diagonal[t] = acc[mt][nt][e];
                                score[k] = similar[mt][nt][e] * decay;
                                mixed[mt][nt][e] += m * now.delta[j];
                                m *= similar[mt][nt][e];
                                across += m * now.delta[j];
                                down[nt][k] += m;
                            }
                            scores.set_pair(t, pairs.col_of(nt, 0), score[0], score[1]);
                        }
                        put_row_sum(row_sums, pairs, mt, half, across);
                    }
#pragma unroll
                for (int nt = 0; nt < PairSpread::NT; nt++)
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        float v = down[nt][k];
#pragma unroll
                        for (int lanes = 4; lanes < WARP; lanes *= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
                        if (lane < 4) col_sums[pairs.warp_row][pairs.col_of(nt, k)] = v;
                    }
            }
            if (key_spread.active) {
                float acc[KeySpread::MT][KeySpread::NT][4] = {};
                product<false, true, PT>(acc, ups, key_spread.row, state, key_spread.col);
#pragma unroll
                for (int mt = 0; mt < KeySpread::MT; mt++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int t = key_spread.row_of(mt, 2 * half);
                        float factor = now.before[t], across = 0.0f;
#pragma unroll
                        for (int nt = 0; nt < KeySpread::NT; nt++) {
                            f32x2 query = queries.pair(t, key_spread.col_of(nt, 0));
                            float v0 = factor * acc[mt][nt][2 * half], v1 = factor * acc[mt][nt][2 * half + 1];
                            dqueries[mt][nt][2 * half] += v0, dqueries[mt][nt][2 * half + 1] += v1;
                            across += v0 * query.x + v1 * query.y;
                        }
                        put_row_sum(query_sums, key_spread, mt, half, across);
                    }
            }
            if (key_spread.active) {
                float acc[KeySpread::MT][KeySpread::NT][4] = {};
                product<false, true, PT>(acc, values, key_spread.row, gradient, key_spread.col);
#pragma unroll
                for (int mt = 0; mt < KeySpread::MT; mt++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int t = key_spread.row_of(mt, 2 * half);
                        float factor = now.after[t] * now.delta[t];
#pragma unroll
                        for (int nt = 0; nt < KeySpread::NT; nt++)
#pragma unroll
                            for (int k = 0; k < 2; k++) dkeys[mt][nt][2 * half + k] += factor * acc[mt][nt][2 * half + k];
                    }
            }
            float sum = 0.0f;
            for (int i = 2 * threadIdx.x; i < PT * NP; i += 2 * THREADS) {
                f32x2 one = state.pair(i / NP, i % NP), two = gradient.pair(i / NP, i % NP);
                sum += one.x * two.x + one.y * two.y;
            }
            sum = warp_sum(sum);
            if (lane == 0) state_sums[warp] = sum;
            __syncthreads();

            if (channel_spread.active) {
                float acc[ChannelSpread::MT][ChannelSpread::NT][4] = {};
                product<false, false, NP>(acc, keys, channel_spread.row, gradient, channel_spread.col);
#pragma unroll
                for (int mt = 0; mt < ChannelSpread::MT; mt++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int t = channel_spread.row_of(mt, 2 * half);
                        float factor = now.after[t], across = 0.0f;
#pragma unroll
                        for (int nt = 0; nt < ChannelSpread::NT; nt++) {
                            f32x2 in = values.pair(t, channel_spread.col_of(nt, 0));
                            float &v0 = acc[mt][nt][2 * half], &v1 = acc[mt][nt][2 * half + 1];
                            v0 *= factor, v1 *= factor;
                            across += v0 * in.x + v1 * in.y;
                        }
                        put_row_sum(key_sums, channel_spread, mt, half, across);
                    }
                product<true, true, Q>(acc, scores, channel_spread.row, ups, channel_spread.col);
                if (dx.present()) {
#pragma unroll
                    for (int mt = 0; mt < ChannelSpread::MT; mt++)
#pragma unroll
                        for (int nt = 0; nt < ChannelSpread::NT; nt++)
#pragma unroll
                            for (int e = 0; e < 4; e += 2) {
                                int t = channel_spread.row_of(mt, e), p = channel_spread.col_of(nt, e);
                                if (t >= rows || p >= channels) continue;
                                bool two = p + 1 < channels;
                                float v0 = now.delta[t] * acc[mt][nt][e], v1 = now.delta[t] * acc[mt][nt][e + 1];
                                if (d != nullptr) {
                                    f32x2 up = ups.pair(t, p);
                                    v0 += up.x * d[s.d_per_channel ? col + p : head];
                                    if (two) v1 += up.y * d[s.d_per_channel ? col + p + 1 : head];
                                }
                                store_pair(dx.row(first + t) + col + p, true, two, v0, v1);
                            }
                }
            }
            if (part_d != nullptr && s.d_per_channel && threadIdx.x < channels) {
                float total = 0.0f;
                for (int t = 0; t < rows; t++) total += ups.value(t, threadIdx.x) * values.value(t, threadIdx.x);
                part_d[slot * s.heads * s.headdim + col + threadIdx.x] = total;
            }
            __syncthreads();
            if (warp == 0) {
#pragma unroll
                for (int e = 0; e < EACH; e++) {
                    int t = lane * EACH + e;
                    if (t >= Q) continue;
                    rows_of_m[e] += add_up<PairSpread::WN>(row_sums, t);
                    cols_of_m[e] += add_up<PairSpread::WM>(col_sums, t);
                    from_keys[e] += add_up<ChannelSpread::WN>(key_sums, t);
                    from_queries[e] += add_up<KeySpread::WN>(query_sums, t);
                    skip += diagonal[t];
                }
#pragma unroll
                for (int i = 0; i < WARPS; i++) states_product += state_sums[i];
            }
        }
        if (warp == 0) {
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
            i64 at = (slot * s.heads + head) * Q;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                int t = lane * EACH + e;
                if (t >= rows || t >= Q) continue;
                float dlog = now.whole() * states_product + before + after;
                before += delta_of[e] * from_keys[e];
                after -= from_queries[e] + rows_of_m[e] - delta_of[e] * cols_of_m[e];
                sum_a += delta_of[e] * dlog;
                float out = (a[head] * dlog + cols_of_m[e] + from_keys[e]) * slope[at + t];
                sum_bias += out;
                if (ddt.present()) set(ddt.row(first + t)[head], out);
            }
            sum_a = warp_sum(sum_a), sum_bias = warp_sum(sum_bias), skip = warp_sum(skip);
            if (lane == 0) {
                if (part_a != nullptr) part_a[slot * s.heads + head] = sum_a;
                if (part_bias != nullptr) part_bias[slot * s.heads + head] = sum_bias;
                if (part_d != nullptr && !s.d_per_channel) part_d[slot * s.heads + head] = skip;
            }
        }
        // `now` is filled anew.
        __syncthreads();
    }

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
        if (db.present()) store_keys(split_b + at, width, dkeys, key_spread, rows, s.d_state);
        if (dc.present()) store_keys(split_c + at, width, dqueries, key_spread, rows, s.d_state);
    } else {
        if (db.present()) store_keys(db.row(first) + group_col, db.stride, dkeys, key_spread, rows, s.d_state);
        if (dc.present()) store_keys(dc.row(first) + group_col, dc.stride, dqueries, key_spread, rows, s.d_state);
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
