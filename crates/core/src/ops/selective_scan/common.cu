// What the kernels of the selective scan share: who owns what, the tiles, the states.
//
// A channel's N states are spread over LANES lanes of a warp, NS each (those beyond N are zero), and a warp has CH
// channels, side by side in its lowest lanes. A block has WARPS warps and so CB channels of one group; it walks through
// a part of the pack's rows, tile by tile, and through the segments in it. State n of a channel is multiplied by
// 2^(Δ A log2 e) a step, its decay.
//
// Macros: T type of activations; N states; NS, CH as above; WARPS; V channels and VB columns of B and C that one access
// moves; STEPS rows of a tile; CHUNK rows between two states kept for the gradient; SOFTPLUS, ZOH 0 or 1.

#define LANES (WARP / CH)
#define NP (LANES * NS)
#define CB (WARPS * CH)
#define THREADS (WARPS * WARP)

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
    int c, s, width;
    i64 first, column, channels;

    DEVICE explicit Place(const Scan& scan) {
        int lane = threadIdx.x % WARP;
        c = threadIdx.x / WARP * CH + lane % CH;
        s = lane / CH;
        i64 group = blockIdx.x / scan.group_blocks, block = blockIdx.x % scan.group_blocks;
        first = group * scan.group_width + block * CB;
        i64 left = scan.group_width - block * CB;
        width = left < CB ? static_cast<int>(left) : CB;
        column = group * N;
        channels = scan.channels;
    }
    DEVICE bool owns(int i) const { return c < width && s * NS + i < N; }
    // Of state i of the thread in a row of states.
    DEVICE i64 at(int i) const { return static_cast<i64>(s * NS + i) * channels + first + c; }
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
    DEVICE void rates(float* a, const Scan& scan, float factor) const {
#pragma unroll
        for (int i = 0; i < NS; i++) a[i] = owns(i) ? scan.a.row(first + c)[s * NS + i] * factor : 0.0f;
    }
};

// The row of the kept states that belongs to row `row`, where a segment or a chunk of the pack starts: distinct, since
// chunk and segment only grow, and below tokens / CHUNK + segments.
DEVICE i64 kept_row(i64 row, i64 segment) { return row / CHUNK + segment; }

DEVICE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
DEVICE i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// The first segment that ends at or behind `row`: segments that are empty at `row` come first.
DEVICE i64 first_segment(const Scan& scan, i64 row) {
    i64 low = 0, high = scan.segments;
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (scan.offsets[middle + 1] < row) low = middle + 1; else high = middle;
    }
    return low;
}

// Empty segments belong to the part in which they stand, those at the end to the last one.
DEVICE bool owns_empty(const Scan& scan, i64 at, i64 part) {
    return smaller(at / scan.part_rows, gridDim.y - 1) == part;
}

// Zeros in the block's columns of rows [from, to).
DEVICE void clear_rows(Mat<T> m, i64 from, i64 to, const Place& at) {
    if (!m.present()) return;
    for (i64 i = threadIdx.x; i < (to - from) * CB; i += THREADS)
        if (i % CB < at.width) set(m.row(from + i / CB)[at.first + i % CB], 0.0f);
}

// A part of a segment leaves behind what the parts after it (forward) or before it (backward) need: the state that it
// would have come to from zero, and the sum of its Δ, since 2^(A log2 e · ΣΔ) is what a state before it shrinks by.
// Behind that stands the initial state of the segment that reaches over the part's end, since the final state may be
// written over it before this part reads it.
DEVICE float* carried(float* carry, i64 part, i64 channels) { return carry + part * (2 * N + 1) * channels; }
DEVICE float* saved_initial(float* carry, i64 part, i64 channels) { return carried(carry, part, channels) + (N + 1) * channels; }

DEVICE void carry_on(float* h, const float* a2, const float* from, bool first, const Place& at) {
    float sum = at.c < at.width ? from[N * at.channels + at.first + at.c] : 0.0f;
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
