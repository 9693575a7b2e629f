// The next token of each row of logits.
//
// A block holds a row. It reads the row once to find the largest logit, and a few times more where tokens are cut off:
// cuts are thresholds, found digit by digit over the numbers' bits, so nothing is sorted. Weights are whole numbers,
// 2^31 for the likeliest token, so sums are exact in any order and the draw is reproducible; the rounding moves a
// probability by less than 2^-31 of the likeliest token's.
//
// Macros: V logits that a thread loads at once.

#define THREADS 512
// Loads that a thread has under way.
#define BATCH 6
#define ONE 2147483648.0f
// Where thresholds are found, digits of 8 bits.
#define BINS 256

// The options of a row as the host lays them out, 8 words.
struct Options {
    float inverse_temperature;  // 0: the likeliest token
    int top_k;                  // 0: all
    float top_p;                // 1: all
    float min_p;                // 0: all
    float penalty;
    int vocabulary;
    u32 seed;
    int spare;
};

// Larger numbers have larger keys.
DEVICE u32 key_of(float x) {
    u32 bits = f32_to_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE u64 block_sum_u64(u64 v, u64* scratch) {
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    u64 sum = 0;
    for (int i = 0; i < THREADS / WARP; i++) sum += scratch[i];
    __syncthreads();
    return sum;
}

DEVICE u64 block_max_u64(u64 v, u64* scratch) {
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) {
        u64 other = __shfl_xor_sync(0xffffffffu, v, o);
        v = other > v ? other : v;
    }
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    u64 most = 0;
    for (int i = 0; i < THREADS / WARP; i++) most = scratch[i] > most ? scratch[i] : most;
    __syncthreads();
    return most;
}

// A row of logits with what was said about it.
struct Row {
    const float* logits;
    const u32* seen;
    Options options;
    float most;
    // Kept are keys above `key`, and those equal to it with ids up to `last`.
    u32 key;
    int last;

    DEVICE float value(int id) const {
        float v = logits[id];
        if (seen != nullptr && (seen[id / 32] >> (id % 32) & 1u)) {
            v = v > 0.0f ? v / options.penalty : v * options.penalty;
            v = fminf(fmaxf(v, -3.402823466e38f), 3.402823466e38f);
        }
        return v;
    }
    DEVICE u32 weight(float v) const {
        return static_cast<u32>(ex2((v - most) * options.inverse_temperature * LOG2_E) * ONE + 0.5f);
    }
    DEVICE bool keeps(float v, int id) const {
        u32 k = key_of(v);
        return k > key || (k == key && id <= last);
    }
};

// Moves the threshold up: of the kept tokens only the likeliest whose amounts together reach `target`, equals in the
// order of their ids. The amount of a token is 1 or its weight.
template <bool ByWeight>
DEVICE void cut(Row& row, u64 target, u64* bins, u64* scratch, u32& chosen_digit, u64& sum_above) {
    u32 prefix = 0;
    u64 above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
        for (int id = threadIdx.x; id < row.options.vocabulary; id += THREADS) {
            float v = row.value(id);
            u32 k = key_of(v);
            bool here = shift == 24 || k >> (shift + 8) == prefix >> (shift + 8);
            if (here && row.keeps(v, id)) {
                u64 amount = ByWeight ? row.weight(v) : 1;
                if (amount > 0) atomicAdd(&bins[k >> shift & (BINS - 1)], amount);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = BINS - 1;
            u64 sum = above;
            while (digit > 0 && sum + bins[digit] < target) sum += bins[digit--];
            chosen_digit = digit;
            sum_above = sum;
        }
        __syncthreads();
        prefix |= chosen_digit << shift;
        above = sum_above;
        __syncthreads();
    }
    // Of the equals at the threshold, as many as are needed.
    u64 amount = 1;
    if (ByWeight) {
        u32 bits = prefix & 0x80000000u ? prefix ^ 0x80000000u : ~prefix;
        amount = row.weight(bits_to_f32(bits));
    }
    u64 needed = target > above && amount > 0 ? (target - above + amount - 1) / amount : 1;
    int low = -1, high = prefix == row.key ? row.last : row.options.vocabulary - 1;
    // The smallest id such that `needed` equals lie up to it.
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        u64 count = 0;
        for (int id = threadIdx.x; id <= middle; id += THREADS) count += key_of(row.value(id)) == prefix;
        if (block_sum_u64(count, scratch) >= needed) high = middle; else low = middle;
    }
    row.key = prefix;
    row.last = high;
}

// Philox 2x32 with 10 rounds, as in rng.rs: the upper 24 of 64 bits.
DEVICE u32 random_24(u32 key, u64 counter) {
    u32 lo = static_cast<u32>(counter), hi = static_cast<u32>(counter >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        u64 product = static_cast<u64>(lo) * 0xD256D193u;
        lo = static_cast<u32>(product >> 32) ^ key ^ hi;
        hi = static_cast<u32>(product);
        key += 0x9E3779B9u;
    }
    return hi >> 8;
}

// progress row: number of the draw (64 bits), number of the step. The id goes to `ids` and to row step % ring of the
// mailbox; -1 where logits are not finite. Chosen ids are marked in `seen`.
KERNEL __launch_bounds__(THREADS) sample(Mat<float> logits, Mat<int> options, Mat<u32> seen, Mat<int> progress, int* ids, Mat<int> mailbox, int ring,
           i64 width) {
    __shared__ u64 scratch[THREADS / WARP], bins[BINS];
    __shared__ u32 chosen_digit;
    __shared__ u64 sum_above;
    __shared__ int chosen;
    let_next_start();
    wait_for_previous();
    i64 t = blockIdx.x;
    Row row;
    row.logits = logits.row(t);
    row.options = *reinterpret_cast<const Options*>(options.row(t));
    if (row.options.vocabulary > width) row.options.vocabulary = static_cast<int>(width);
    row.seen = seen.present() && row.options.penalty != 1.0f ? seen.row(t) : nullptr;
    row.key = 0;
    row.last = -1;
    int* state = progress.row(t);
    u64 draw = static_cast<u32>(state[0]) | static_cast<u64>(static_cast<u32>(state[1])) << 32;
    int step = state[2];

    // The likeliest token, the first of equals: of equal keys the largest inverted id.
    u32 best_key = 0;
    int best_id = 0;
    bool finite = true;
    auto consider = [&](float v, int id) {
        finite = finite && (f32_to_bits(v) & 0x7f800000u) != 0x7f800000u;
        if (id >= row.options.vocabulary) return;
        if (row.seen != nullptr) v = row.value(id);
        // A thread's ids ascend, so the first of equals stays. -0 and 0 are equal.
        u32 key = key_of(v + 0.0f);
        if (key > best_key) best_key = key, best_id = id;
    };
    // Many loads are under way at once: a block has the row to itself.
    int vectors = static_cast<int>(width) / V;
#pragma unroll 1
    for (int i = threadIdx.x; i < vectors; i += BATCH * THREADS) {
        float v[BATCH][V];
#pragma unroll
        for (int k = 0; k < BATCH; k++)
            if (i + k * THREADS < vectors) load<V>(v[k], row.logits + static_cast<i64>(i + k * THREADS) * V);
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (i + k * THREADS >= vectors) break;
#pragma unroll
            for (int j = 0; j < V; j++) consider(v[k][j], (i + k * THREADS) * V + j);
        }
    }
    u64 best = block_max_u64(static_cast<u64>(best_key) << 32 | (0xffffffffu - best_id), scratch);
    bool bad = block_sum_u64(finite ? 0 : 1, scratch) > 0;
    int likeliest = static_cast<int>(0xffffffffu - static_cast<u32>(best));
    if (threadIdx.x == 0) chosen = bad ? -1 : likeliest;
    if (!bad && row.options.inverse_temperature != 0.0f) {
        row.most = row.value(likeliest);
        if (row.options.top_k > 0 && row.options.top_k < row.options.vocabulary)
            cut<false>(row, row.options.top_k, bins, scratch, chosen_digit, sum_above);
        u64 mine = 0;
        if (row.options.top_p < 1.0f) {
            for (int id = threadIdx.x; id < row.options.vocabulary; id += THREADS) {
                float v = row.value(id);
                if (row.keeps(v, id)) mine += row.weight(v);
            }
            u64 total = block_sum_u64(mine, scratch);
            u64 target = static_cast<u64>(static_cast<double>(row.options.top_p) * static_cast<double>(total));
            cut<true>(row, target > 0 ? target : 1, bins, scratch, chosen_digit, sum_above);
        }
        // The likeliest token has the weight ONE.
        u32 least = static_cast<u32>(row.options.min_p * ONE);
        mine = 0;
        for (int id = threadIdx.x; id < row.options.vocabulary; id += THREADS) {
            float v = row.value(id);
            u32 w = row.weight(v);
            if (w >= least && row.keeps(v, id)) mine += w;
        }
        // Tokens are drawn in the order thread by thread: any order that is always the same will do.
        u64 before = mine;
#pragma unroll
        for (int o = 1; o < WARP; o *= 2) {
            u64 other = __shfl_up_sync(0xffffffffu, before, o);
            if (threadIdx.x % WARP >= o) before += other;
        }
        if (threadIdx.x % WARP == WARP - 1) scratch[threadIdx.x / WARP] = before;
        __syncthreads();
        u64 total = 0;
        for (int i = 0; i < THREADS / WARP; i++) {
            if (i < threadIdx.x / WARP) before += scratch[i];
            total += scratch[i];
        }
        before -= mine;
        // floor(total · uniform), exactly: total has at most 48 bits.
        u64 u = random_24(row.options.seed, draw);
        u64 target = (total >> 24) * u + ((total & 0xffffff) * u >> 24);
        if (mine > 0 && before <= target && target < before + mine) {
            for (int id = threadIdx.x; id < row.options.vocabulary; id += THREADS) {
                float v = row.value(id);
                u32 w = row.weight(v);
                if (w < least || !row.keeps(v, id)) continue;
                if (target < before + w) {
                    chosen = id;
                    break;
                }
                before += w;
            }
        }
        draw++;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (seen.present() && chosen >= 0) seen.row(t)[chosen / 32] |= 1u << (chosen % 32);
    state[0] = static_cast<int>(static_cast<u32>(draw));
    state[1] = static_cast<int>(static_cast<u32>(draw >> 32));
    state[2] = step + 1;
    ids[t] = chosen;
    mailbox.row(step % ring)[t] = chosen;
}
