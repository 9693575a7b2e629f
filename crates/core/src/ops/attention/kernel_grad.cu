// The gradient of attention in two walks, so that every sum is one block's own: `query_grad` takes a tile of queries and walks
// over keys, `key_grad` takes a block of keys and walks over the queries that see some of them. Both compute the weights
// again: with P = exp(scores - ln sum exp) and delta = sum(y dy) of a query, dV = P^T dY, dS = P (dY V^T - delta),
// dQ = dS K / sqrt(P) and dK = dS^T Q / sqrt(P) (Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4).
//
// Macros: those of kernel_rows.cu, with KW 1; PT columns of dK and dV that a block of `key_grad` holds.

// The sum of y dy for each query and head: a warp each.
KERNEL __launch_bounds__(THREADS) sum_deltas(Mat<T> y, Mat<T> dy, Mat<float> deltas, Sizes s) {
    i64 i = static_cast<i64>(blockIdx.x) * WARPS + threadIdx.x / WARP, row = i / s.heads, head = i - row * s.heads;
    if (row >= s.tokens) return;
    float sum = 0.0f;
    for (i64 c = threadIdx.x % WARP; c < s.headdim; c += WARP)
        sum += to_f32(y.row(row)[head * s.headdim + c]) * to_f32(dy.row(row)[head * s.headdim + c]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) deltas.row(row)[head] = sum;
}

KERNEL __launch_bounds__(THREADS, 1) query_grad(Mat<T> q, Mat<T> k, Mat<T> v, const int* offsets, Mat<float> positions, Mat<float> kv,
                                             Mat<T> dy, Mat<float> log_sums, Mat<float> deltas, Mat<T> dq, Sizes s) {
    DYNAMIC_SHARED(memory);
    typedef Tile<BLOCK, PP> Keys;
    typedef Tile<TILE_ROWS, PP> Queries;
    Queries queries{reinterpret_cast<bf16*>(memory)}, dys{reinterpret_cast<bf16*>(memory + Queries::BYTES)};
    auto keys_of = [&](int i) { return Keys{reinterpret_cast<bf16*>(memory + 2 * Queries::BYTES + i % STAGES * 2 * Keys::BYTES)}; };
    auto values_of = [&](int i) { return Keys{keys_of(i).data + Keys::BYTES / 2}; };
    Work work(offsets, positions, s, gridDim.x - 1 - blockIdx.x, blockIdx.y);
    if (blockIdx.x == 0) clear_outside(dq, work.head * s.headdim, work.heads * s.headdim, offsets, s);
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
    fetch_queries(dys, dy, work, s);
    fetch(0);

    int row = threadIdx.x / WARP * 16;
    float factor = s.factor(), log_sum[2], delta[2];
    Seen seen(row, work, first_key, s);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        bool there = seen.row[h] < work.rows;
        log_sum[h] = there ? *work.of_head(log_sums, seen.row[h]) * LOG2_E : 0.0f;
        delta[h] = there ? *work.of_head(deltas, seen.row[h]) : 0.0f;
    }
    float acc[1][PP / 8][4] = {};
    for (int i = 0; i < blocks; i++) {
        if (STAGES > 1 && i + 1 < blocks) {
            fetch(i + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        int at = i * BLOCK;
        if (seen.any(at, BLOCK)) {
            float scores[1][BLOCK / 8][4] = {}, d[1][BLOCK / 8][4] = {};
            product<false, false, PP>(scores, queries, row, keys_of(i), 0);
            product<false, false, PP>(d, dys, row, values_of(i), 0);
#pragma unroll
            for (int nt = 0; nt < BLOCK / 8; nt++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    bool holds = seen.holds(e / 2, at + nt * 8 + threadIdx.x % 4 * 2 + e % 2);
                    float weight = ex2(scores[0][nt][e] * factor - log_sum[e / 2]);
                    d[0][nt][e] = holds ? weight * (d[0][nt][e] - delta[e / 2]) : 0.0f;
                }
            Operand<1, BLOCK / 8> d_scores;
            d_scores.set(d);
            product(acc, d_scores, keys_of(i), 0);
        }
        __syncthreads();
        if (STAGES == 1 && i + 1 < blocks) fetch(i + 1);
    }
    float scale = factor * LN_2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (seen.row[h] >= work.rows) continue;
        T* to = work.at(dq, seen.row[h], s);
#pragma unroll
        for (int nt = 0; nt < PP / 8; nt++) {
            int c = nt * 8 + threadIdx.x % 4 * 2;
            store_pair(to + c, c < s.headdim, c + 1 < s.headdim, acc[0][nt][2 * h] * scale, acc[0][nt][2 * h + 1] * scale);
        }
    }
}

// What a tile's rows of queries have besides: ln sum exp to the base 2, delta, and the query's place in its segment.
struct __align__(16) QueryNumbers {
    float log_sum[BLOCK], delta[BLOCK];
    int place[BLOCK];
};

// A block takes TILE_ROWS keys of a segment, a key and value head and PT columns of it (blockIdx.z); a warp holds 16 of the keys.
// Scores are transposed: keys are their rows, queries their columns.
KERNEL __launch_bounds__(THREADS, 1) key_grad(Mat<T> q, Mat<T> k, Mat<T> v, const int* offsets, Mat<T> dy, Mat<float> log_sums,
                                           Mat<float> deltas, Mat<T> dk, Mat<T> dv, Sizes s) {
    DYNAMIC_SHARED(memory);
    typedef Tile<TILE_ROWS, PP> Keys;
    typedef Tile<BLOCK, PP> Queries;
    constexpr int STAGE = 2 * Queries::BYTES + sizeof(QueryNumbers);
    Keys keys{reinterpret_cast<bf16*>(memory)}, values{reinterpret_cast<bf16*>(memory + Keys::BYTES)};
    auto queries_of = [&](int i) { return Queries{reinterpret_cast<bf16*>(memory + 2 * Keys::BYTES + i % STAGES * STAGE)}; };
    auto dys_of = [&](int i) { return Queries{queries_of(i).data + Queries::BYTES / 2}; };
    auto numbers_of = [&](int i) { return reinterpret_cast<QueryNumbers*>(queries_of(i).data + Queries::BYTES); };
    i64 kv_head = blockIdx.y, col = kv_head * s.headdim;
    if (blockIdx.x == 0 && blockIdx.z == 0) {
        clear_outside(dk, col, s.headdim, offsets, s);
        clear_outside(dv, col, s.headdim, offsets, s);
    }
    Piece piece = piece_of(offsets, s.segments, blockIdx.x, TILE_ROWS);
    if (!piece.exists()) return;
    int count = static_cast<int>(piece.end - piece.first), headdim = static_cast<int>(s.headdim);
    // Places are counted from the block's first key. The last query that sees one of its keys:
    i64 last = piece.segment_end - piece.first;
    if (last > count - 1 + s.window) last = count - 1 + s.window;
    int tiles = static_cast<int>((last + s.queries - 1) / s.queries), head_tiles = static_cast<int>(s.head_tiles());
    auto fetch = [&](int i) {
        Work work;
        i64 part = i % head_tiles * s.tile_heads, rest = s.group() - part, from = i / head_tiles * s.queries;
        work.head = kv_head * s.group() + part;
        work.heads = static_cast<int>(rest < s.tile_heads ? rest : s.tile_heads);
        work.piece.first = piece.first + from;
        work.rows = static_cast<int>(last - from < s.queries ? last - from : s.queries) * work.heads;
        fetch_queries(queries_of(i), q, work, s);
        fetch_queries(dys_of(i), dy, work, s);
        QueryNumbers& numbers = *numbers_of(i);
        for (int r = threadIdx.x; r < BLOCK; r += THREADS) {
            bool there = r < work.rows;
            numbers.log_sum[r] = there ? *work.of_head(log_sums, r) * LOG2_E : 0.0f;
            numbers.delta[r] = there ? *work.of_head(deltas, r) : 0.0f;
            numbers.place[r] = there ? static_cast<int>(from) + r / work.heads : -1;
        }
        copy_async_commit();
    };
    fetch_tile(keys, k.data + piece.first * k.stride + col, k.stride, count, headdim);
    fetch_tile(values, v.data + piece.first * v.stride + col, v.stride, count, headdim);
    fetch(0);

    int row = threadIdx.x / WARP * 16, first_col = blockIdx.z * PT;
    float factor = s.factor(), d_keys[1][PT / 8][4] = {}, d_values[1][PT / 8][4] = {};
    for (int i = 0; i < tiles * head_tiles; i++) {
        if (STAGES > 1 && i + 1 < tiles * head_tiles) {
            fetch(i + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const QueryNumbers& numbers = *numbers_of(i);
        float weights[1][BLOCK / 8][4] = {}, d[1][BLOCK / 8][4] = {};
        product<false, false, PP>(weights, keys, row, queries_of(i), 0);
        product<false, false, PP>(d, values, row, dys_of(i), 0);
#pragma unroll
        for (int nt = 0; nt < BLOCK / 8; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = row + threadIdx.x % WARP / 4 + e / 2 * 8, r = nt * 8 + threadIdx.x % 4 * 2 + e % 2;
                int distance = numbers.place[r] - key;
                float weight = distance >= 0 && distance < s.window ? ex2(weights[0][nt][e] * factor - numbers.log_sum[r]) : 0.0f;
                weights[0][nt][e] = weight;
                d[0][nt][e] = weight * (d[0][nt][e] - numbers.delta[r]);
            }
        Operand<1, BLOCK / 8> operand;
        operand.set(weights);
        product(d_values, operand, dys_of(i), first_col);
        operand.set(d);
        product(d_keys, operand, queries_of(i), first_col);
        __syncthreads();
        if (STAGES == 1 && i + 1 < tiles * head_tiles) fetch(i + 1);
    }
    float scale = factor * LN_2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = row + threadIdx.x % WARP / 4 + 8 * h;
        if (r >= count) continue;
#pragma unroll
        for (int nt = 0; nt < PT / 8; nt++) {
            int c = first_col + nt * 8 + threadIdx.x % 4 * 2;
            bool one = c < headdim, two = c + 1 < headdim;
            if (dv.present()) store_pair(dv.row(piece.first + r) + col + c, one, two, d_values[0][nt][2 * h], d_values[0][nt][2 * h + 1]);
            if (dk.present()) store_pair(dk.row(piece.first + r) + col + c, one, two, d_keys[0][nt][2 * h] * scale, d_keys[0][nt][2 * h + 1] * scale);
        }
    }
}
