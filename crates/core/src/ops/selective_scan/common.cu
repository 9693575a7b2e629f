// What the kernels of the selective scan share: who owns what, the tiles, the states.
//
// A channel's N states are spread over LANES neighbouring lanes of a warp, NS each (those beyond N are zero), and a warp
// has CH channels. A block has WARPS warps and so CB channels of one group; it walks through
// a part of the pack's rows, tile by tile, and through the segments in it. State n of a channel is multiplied by
// 2^(Δ A log2 e) a step, its decay.
//
// Macros: T type of activations; N states; NS, CH as above; WARPS; V channels and VB columns of B and C that one access
// moves; STEPS rows of a tile; CHUNK rows between two states kept for the gradient; SOFTPLUS, ZOH 0 or 1.

#define LANES (WARP / CH)
#define NP (LANES * NS)
#define CB (WARPS * CH)
#define THREADS (WARPS * WARP)
// Rows of tiles are longer than CB, so that lanes which read a channel of several rows meet different banks.
#define ROW (CB + 4)
#define PAIR_ROW (CB + 2)

// The operands that all kernels read, and the sizes.
struct Scan {
    Mat<T> x, dt;
    Mat<float> a;
    Mat<T> b, c;
    Mat<float> d;
    Mat<T> z;
    Mat<float> bias;
    const int* offsets;
    i64 segments, tokens, channels;
    i64 group_width;   // channels of a group
    i64 group_blocks;  // blocks of channels of a group
    i64 part_rows;     // rows of a part, a multiple of CHUNK
};

// What a thread has: lane s of those that share channel c of the block.
struct Place {
    const Scan& scan;
    int c, s, width, first, column;

    DEVICE explicit Place(const Scan& scan) : scan(scan) {
        int lane = threadIdx.x % WARP;
        c = threadIdx.x / LANES;
        s = lane % LANES;
        // 32 bits hold the numbers of blocks and parts; dividing 64 bits is a call.
        u32 group = blockIdx.x / static_cast<u32>(scan.group_blocks), block = blockIdx.x % static_cast<u32>(scan.group_blocks);
        int group_width = static_cast<int>(scan.group_width), left = group_width - block * CB;
        first = group * group_width + block * CB;
        width = left < CB ? left : CB;
        column = group * N;
    }
    DEVICE bool owns(int i) const { return c < width && s * NS + i < N; }
    // Of state i of the thread in a row of states.
    DEVICE i64 at(int i) const { return static_cast<i64>(s * NS + i) * scan.channels + first + c; }
    DEVICE void load(float* h, const float* row) const {
#pragma unroll
        for (int i = 0; i < NS; i++) h[i] = row != nullptr && owns(i) ? row[at(i)] : 0.0f;
    }
    DEVICE void store(float* row, const float* h) const {
#pragma unroll
        for (int i = 0; i < NS; i++)
            if (owns(i)) row[at(i)] = h[i];
    }
    // A of the thread's states, times `factor`.
    DEVICE void rates(float* a, float factor) const {
#pragma unroll
        for (int i = 0; i < NS; i++) a[i] = owns(i) ? scan.a.row(first + c)[s * NS + i] * factor : 0.0f;
    }
};

// A warp loads, prepares and stores its own channels, V at a time: piece number `i` of its rows. So it need not wait for
// other warps there.
struct Piece {
    static DEVICE constexpr int of(int rows) { return rows * (CH / V); }
    int step, col;
    DEVICE explicit Piece(int i) : step(i / (CH / V)), col(threadIdx.x / WARP * CH + i % (CH / V) * V) {}
};

// The row of the kept states that belongs to row `row`, where a segment or a chunk of the pack starts: distinct, since
// chunk and segment only grow, and below tokens / CHUNK + segments.
DEVICE i64 kept_row(int row, int segment) { return static_cast<i64>(row / CHUNK) + segment; }

// A pack has less than 2^31 rows, and so do its parts.
DEVICE int smaller(i64 a, i64 b) { return static_cast<int>(a < b ? a : b); }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// Element `col` of row `row`: with 32 bits for row and stride the address is one multiplication.
template <typename E>
DEVICE E* element(Mat<E> m, int row, i64 col) {
    return m.data + (static_cast<u64>(static_cast<u32>(row)) * static_cast<u32>(m.stride) + col);
}

// Δ. For bf16 the logarithm of a number close to 1 is good enough: its error is below 2^-23, that of x's rounding larger.
DEVICE float step_size(float x) {
#if SOFTPLUS
    if constexpr (sizeof(T) == 2) return fmaxf(x, 0.0f) + LN_2 * lg2(1.0f + ex2(-LOG2_E * fabsf(x)));
    return softplus(x);
#else
    return x;
#endif
}

// Columns of B and C that a thread widens at once.
#define WIDE (VB % 4 == 0 ? 4 : 1)

// The first segment that ends at or behind `row`: segments that are empty at `row` come first.
DEVICE int first_segment(const Scan& scan, int row) {
    int low = 0, high = static_cast<int>(scan.segments);
    while (low < high) {
        int middle = (low + high) / 2;
        if (scan.offsets[middle + 1] < row) low = middle + 1; else high = middle;
    }
    return low;
}

// Empty segments belong to the part in which they stand, those at the end to the last one.
DEVICE int part_of(const Scan& scan, int row) { return static_cast<int>(static_cast<u32>(row) / static_cast<u32>(scan.part_rows)); }
DEVICE bool owns_empty(const Scan& scan, int at, int part) {
    return smaller(part_of(scan, at), gridDim.y - 1) == part;
}

// A segment and its rows [from, until) in the block's part, which has the rows [first, end).
struct Span {
    int first, end, start, stop, from, until;

    DEVICE Span(const Scan& scan, int segment) {
        first = static_cast<int>(blockIdx.y * scan.part_rows);
        end = smaller(first + scan.part_rows, scan.tokens);
        start = scan.offsets[segment], stop = scan.offsets[segment + 1];
        from = larger(start, first), until = smaller(stop, end);
    }
    // Segments from here on are those of later parts.
    DEVICE bool behind() const { return start >= end && blockIdx.y + 1 < gridDim.y; }
    // Whether the part has the segment's first or last row, or stands where the empty segment does.
    DEVICE bool begins(const Scan& scan) const { return start == stop ? owns_empty(scan, start, blockIdx.y) : from < until && from == start; }
    DEVICE bool ends(const Scan& scan) const { return start == stop ? owns_empty(scan, start, blockIdx.y) : from < until && until == stop; }
};

// Zeros in the block's columns of rows [from, to).
DEVICE void clear_rows(Mat<T> m, int from, int to, const Place& at) {
    if (!m.present()) return;
    for (i64 i = threadIdx.x; i < static_cast<i64>(to - from) * CB; i += THREADS)
        if (i % CB < at.width) set(m.row(from + i / CB)[at.first + i % CB], 0.0f);
}

// A part of a segment leaves behind what the parts after it (forward) or before it (backward) need: the state that it
// would have come to from zero, and the sum of its Δ, since 2^(A log2 e · ΣΔ) is what a state before it shrinks by.
// Behind that stands the initial state of the segment that reaches over the part's end, since the final state may be
// written over it before this part reads it.
DEVICE float* carried(float* carry, i64 part, i64 channels) { return carry + part * (2 * N + 1) * channels; }
DEVICE float* saved_initial(float* carry, i64 part, i64 channels) { return carried(carry, part, channels) + (N + 1) * channels; }

DEVICE void carry_on(float* h, const float* a2, const float* from, bool first, const Place& at) {
    float sum = at.c < at.width ? from[N * at.scan.channels + at.first + at.c] : 0.0f;
#pragma unroll
    for (int i = 0; i < NS; i++) {
        float here = at.owns(i) ? from[at.at(i)] : 0.0f;
        // Nothing times an infinite growth is still nothing.
        h[i] = first ? here : ex2(a2[i] * sum) * h[i] + here;
    }
}

// Copies V elements to shared memory, where possible behind the thread's back.
template <int Count>
DEVICE void stage(T* to, const T* from) {
    constexpr int bytes = Count * sizeof(T);
    if constexpr (bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += 16 / static_cast<int>(sizeof(T))) copy_async16(to + i, from + i);
    } else if constexpr (bytes == 8) {
        *reinterpret_cast<u32x2*>(to) = *reinterpret_cast<const u32x2*>(from);
    } else if constexpr (bytes == 4) {
        copy_async4(to, from);
    } else {
        *to = *from;
    }
}

// Whether tensor cores form sums over lanes: in tf32, which keeps 11 bits of what is added up and is finer than bf16.
constexpr bool TENSOR = sizeof(T) == 2 && LANES == 4 && NS == 4;

// Σ_n c[n] v[n] over the states of two steps j, j + 1 of eight, where lane (g, t) has c of step g, states 4t ..: channel g's
// sums come to lane t = j / 2. The matrices are v [channels, states], with the second step's below the first's, and
// c [states, steps]; of their product the columns of the two steps are kept.
DEVICE void contract_pair(float* sums, const float* v0, const float* v1, const float* c, int j) {
    float d[4] = {}, low[4] = {v0[0], v1[0], v0[1], v1[1]}, high[4] = {v0[2], v1[2], v0[3], v1[3]};
    mma_tf32(d, low, c);
    mma_tf32(d, high, c + 2);
    bool mine = threadIdx.x % 4 == j / 2;
    sums[0] = mine ? d[0] : sums[0];
    sums[1] = mine ? d[3] : sums[1];
}

// Sums `Count` values over `Lanes` lanes whose numbers differ by multiples of `Stride`; `number` counts the thread among
// them. Each lane keeps Count / Lanes of the sums (one, if there are fewer), the first of which is that of `kept_first`.
template <int Count, int Lanes, int Stride>
DEVICE void sum_lanes(float* v, int number) {
    if constexpr (Lanes > 1) {
        if constexpr (Count > 1) {
            bool upper = number & 1;
#pragma unroll
            for (int i = 0; i < Count / 2; i++) {
                float send = upper ? v[i] : v[i + Count / 2], keep = upper ? v[i + Count / 2] : v[i];
                v[i] = keep + __shfl_xor_sync(0xffffffffu, send, Stride);
            }
            sum_lanes<Count / 2, Lanes / 2, 2 * Stride>(v, number / 2);
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], Stride);
            sum_lanes<1, Lanes / 2, 2 * Stride>(v, number / 2);
        }
    }
}
template <int Count, int Lanes>
DEVICE int kept_first(int number) {
    if constexpr (Lanes > 1 && Count > 1)
        return (number & 1) * (Count / 2) + kept_first<Count / 2, Lanes / 2>(number / 2);
    else
        return 0;
}

// e^u - 1, where e = e^u: by its series where the difference would cancel.
DEVICE float exp_m1(float u, float e) {
    float series = u * (1.0f + u * 0.5f * (1.0f + u * 0.33333333f * (1.0f + u * 0.25f * (1.0f + u * 0.2f * (1.0f + u * 0.16666667f)))));
    return fabsf(u) < 0.3f ? series : e - 1.0f;
}

// dΔ/d(dt) = 1 - e^-Δ, which is the logistic function.
DEVICE float slope_of_step_size(float delta) {
    float e = ex2(-LOG2_E * delta);
    return sizeof(T) == 2 ? 1.0f - e : -exp_m1(-delta, e);
}

#if ZOH
// Below this |A|, B̄ of the zero-order hold is its limit ΔB.
#define ZOH_LIMIT 1e-12f

// B̄ / B for a decay over the exponent u = ΔA.
DEVICE float zoh_factor(float decay, float u, float delta, float a) {
    return fabsf(a) < ZOH_LIMIT ? delta : exp_m1(u, decay) / a;
}
// The derivative of that with respect to A: near u = 0 by its series Δ² Σ u^k (k + 1) / (k + 2)!.
DEVICE float zoh_slope(float decay, float u, float delta, float a) {
    float series = 0.5f + u * (0.33333333f + u * (0.125f + u * (0.033333333f + u * (0.0069444444f + u * (0.0011904762f + u * 0.00017361111f)))));
    if (fabsf(u) < 0.3f) return delta * delta * series;
    return (delta * decay - exp_m1(u, decay) / a) / a;
}
#endif
