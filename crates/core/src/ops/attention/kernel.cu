// Attention: a block takes a tile of queries and walks over the blocks of keys that they see, with the sums of values in
// registers (Dao et al., FlashAttention, arXiv 2205.14135). Blocks lie on a grid of absolute positions, so that a query's
// result does not depend on how a sequence is cut into calls.
//
// Where there are few queries, as in steps of generation, the warps share the keys of a block (KW) and add up what they
// found at the end.
//
// Macros: those of kernel_rows.cu.

KERNEL __launch_bounds__(THREADS, 1) attend(Mat<T> q, Mat<T> k, Mat<T> v, const int* offsets, Mat<float> positions, Mat<float> kv,
                                         Mat<T> y, Mat<float> log_sums, Sizes s) {
    DYNAMIC_SHARED(memory);
    typedef Tile<BLOCK, PP> Keys;
    Tile<TILE_ROWS, PP> queries{reinterpret_cast<bf16*>(memory)};
    auto keys_of = [&](int i) { return Keys{reinterpret_cast<bf16*>(memory + Tile<TILE_ROWS, PP>::BYTES + i % STAGES * 2 * Keys::BYTES)}; };
    auto values_of = [&](int i) { return Keys{keys_of(i).data + Keys::BYTES / 2}; };
    // Queries at the end of a sequence see most keys: they begin.
    Work work(offsets, positions, s, gridDim.x - 1 - blockIdx.x, blockIdx.y);
    if (blockIdx.x == 0) {
        clear_outside(y, work.head * s.headdim, work.heads * s.headdim, offsets, s);
        clear_outside(log_sums, work.head, work.heads, offsets, s);
    }
    if (work.rows == 0) return;
    i64 end = work.end(), low = work.first + 1 > s.window ? work.first + 1 - s.window : 0;
    i64 first_key = low / BLOCK * BLOCK;
    int blocks = static_cast<int>((end - first_key + BLOCK - 1) / BLOCK);
    Past past(k, v, kv, work, s);
    auto fetch = [&](int i) {
        fetch_keys(keys_of(i), values_of(i), past, first_key + static_cast<i64>(i) * BLOCK, low, end);
        copy_async_commit();
    };
    fetch_queries(queries, q, work, s);
    fetch(0);

    int warp = threadIdx.x / WARP, row = warp % RW * 16, key = warp / RW * KEYS;
    float factor = s.factor();
    Seen seen(row, work, first_key, s);
    float top[2] = {NOTHING, NOTHING}, sum[2] = {0.0f, 0.0f}, acc[1][PP / 8][4] = {};
    for (int i = 0; i < blocks; i++) {
        if (STAGES > 1 && i + 1 < blocks) {
            fetch(i + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        int at = i * BLOCK + key;
        if (seen.any(at, KEYS)) {
            float scores[1][KEYS / 8][4] = {};
            product<false, false, PP>(scores, queries, row, keys_of(i), key);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float largest = top[h];
#pragma unroll
                for (int nt = 0; nt < KEYS / 8; nt++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        float& x = scores[0][nt][e];
                        x = seen.holds(h, at + nt * 8 + threadIdx.x % 4 * 2 + e % 2) ? x * factor : NOTHING;
                        largest = fmaxf(largest, x);
                    }
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
                // A row that has seen nothing so far has weights of 0.
                float base = largest == NOTHING ? 0.0f : largest, fade = ex2(top[h] - base), total = 0.0f;
#pragma unroll
                for (int nt = 0; nt < KEYS / 8; nt++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) total += scores[0][nt][e] = ex2(scores[0][nt][e] - base);
                sum[h] = sum[h] * fade + total;
                top[h] = largest;
#pragma unroll
                for (int nt = 0; nt < PP / 8; nt++) acc[0][nt][2 * h] *= fade, acc[0][nt][2 * h + 1] *= fade;
            }
            Operand<1, KEYS / 8> weights;
            weights.set(scores);
            product(acc, weights, rows_from(values_of(i), key), 0);
        }
        __syncthreads();
        if (STAGES == 1 && i + 1 < blocks) fetch(i + 1);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    }

    if (KW == 1) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (seen.row[h] >= work.rows) continue;
            T* to = work.at(y, seen.row[h], s);
            float part = 1.0f / sum[h];
#pragma unroll
            for (int nt = 0; nt < PP / 8; nt++) {
                int c = nt * 8 + threadIdx.x % 4 * 2;
                store_pair(to + c, c < s.headdim, c + 1 < s.headdim, acc[0][nt][2 * h] * part, acc[0][nt][2 * h + 1] * part);
            }
            if (log_sums.present() && threadIdx.x % 4 == 0) *work.of_head(log_sums, seen.row[h]) = (top[h] + lg2(sum[h])) * LN_2;
        }
        return;
    }
    // Sums of the warps [KW, TILE_ROWS, PP], their largest scores and sums of weights.
    float* sums = reinterpret_cast<float*>(memory);
    float *tops = sums + KW * TILE_ROWS * PP, *totals = tops + KW * TILE_ROWS;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = warp / RW * TILE_ROWS + seen.row[h];
#pragma unroll
        for (int nt = 0; nt < PP / 8; nt++)
#pragma unroll
            for (int e = 0; e < 2; e++) sums[r * PP + nt * 8 + threadIdx.x % 4 * 2 + e] = acc[0][nt][2 * h + e];
        if (threadIdx.x % 4 == 0) tops[r] = top[h], totals[r] = sum[h];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < work.rows * PP; i += THREADS) {
        int r = i / PP, c = i % PP;
        float largest = NOTHING, total = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < KW; w++) largest = fmaxf(largest, tops[w * TILE_ROWS + r]);
#pragma unroll
        for (int w = 0; w < KW; w++) {
            float fade = ex2(tops[w * TILE_ROWS + r] - largest);
            total += totals[w * TILE_ROWS + r] * fade;
            value += sums[(w * TILE_ROWS + r) * PP + c] * fade;
        }
        if (c < s.headdim) set(work.at(y, r, s)[c], value / total);
        if (log_sums.present() && c == 0) *work.of_head(log_sums, r) = (largest + lg2(total)) * LN_2;
    }
}

// Puts the keys and values of the last tokens of each segment into its ring: a thread a row and V columns.
KERNEL __launch_bounds__(256) keep(Mat<T> k, Mat<T> v, const int* offsets, Mat<float> positions, Mat<float> kv, Sizes s) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, width = s.kv_heads * s.headdim, vectors = width / V;
    i64 row = i / vectors, c = (i - row * vectors) * V;
    if (row >= s.tokens) return;
    int segment = segment_of(offsets, static_cast<int>(s.segments), row);
    if (segment < 0 || row < offsets[segment + 1] - s.window) return;
    i64 slot = (position_of(positions, segment) + row - offsets[segment]) % s.window;
    float* to = kv.row(segment) + slot * 2 * width + c;
    float numbers[V];
    load<V>(numbers, k.row(row) + c);
    store<V>(to, numbers);
    load<V>(numbers, v.row(row) + c);
    store<V>(to + width, numbers);
}

// Counts on. May run in place.
KERNEL __launch_bounds__(256) count(const int* offsets, Mat<float> positions, Mat<float> to, i64 segments) {
    i64 segment = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (segment >= segments) return;
    i64 end = position_of(positions, segment) + offsets[segment + 1] - offsets[segment];
    to.row(segment)[0] = static_cast<float>(end % 1048576);
    to.row(segment)[1] = static_cast<float>(end / 1048576);
}
