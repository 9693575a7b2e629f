// Tiles in shared memory and their products on tensor cores, and where the pieces of segments lie: what the kernels of
// SSD share.
//
// Operands of products are bf16. Numbers in f32 are held as a sum of three bf16 (SPLIT 3), whose products are added up
// but for those below the precision of f32: six instead of one.
//
// Macros: T type of activations; SPLIT 1 for bf16, 3 for f32; Q rows of a chunk; PT channels of a head that a block handles;
// NP the state size rounded up to a power of two, at least 16; V elements that one access of a row of x, B or C takes.

#define THREADS 256
#define WARPS (THREADS / WARP)

// Sizes that are known when a kernel is launched.
struct Sizes {
    i64 tokens, segments, heads, headdim, d_state, heads_per_group;
    // Rows of a span; more than there are tokens where segments are not cut.
    i64 span;
    // D has a value for each channel, not for each head.
    i64 d_per_channel;
};

// --- pieces of segments -----------------------------------------------------------------------------------------------

// Segments are cut into pieces of `size` rows, counted from their starts; the last one may be shorter. Slots for pieces are
// numbered such that each segment has enough, whatever the offsets are: those of segment s begin at start / size + s.
struct Piece {
    int segment;
    i64 segment_start, segment_end, first, end;
    DEVICE bool exists() const { return segment >= 0 && first >= segment_start && first < end; }
};

DEVICE i64 first_slot(i64 start, int segment, i64 size) { return start / size + segment; }

DEVICE Piece piece_of(const int* offsets, i64 segments, i64 slot, i64 size) {
    int low = 0, high = static_cast<int>(segments);
    if (segments == 0) return Piece{-1, 0, 0, 0, 0};
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (first_slot(offsets[middle], middle, size) <= slot) low = middle; else high = middle;
    }
    i64 start = offsets[low], end = offsets[low + 1];
    i64 first = start + (slot - first_slot(start, low, size)) * size;
    return Piece{low, start, end, first, first + size < end ? first + size : end};
}

// Zeros in the rows of no segment: columns [col, col + cols).
DEVICE void clear_outside(Mat<T> m, i64 col, i64 cols, const int* offsets, const Sizes& s) {
    if (!m.present()) return;
    i64 start = s.segments > 0 ? offsets[0] : s.tokens, end = s.segments > 0 ? offsets[s.segments] : s.tokens;
    i64 rows = start + s.tokens - end;
    for (i64 i = threadIdx.x; i < rows * cols; i += THREADS) {
        i64 r = i / cols;
        set(m.row(r < start ? r : end + r - start)[col + i % cols], 0.0f);
    }
}

// --- tiles ------------------------------------------------------------------------------------------------------------

// R rows of C numbers. Rows are 16 bytes longer than that, which keeps ldmatrix free of bank conflicts.
template <int R, int C>
struct Tile {
    static constexpr int ROWS = R, COLS = C, LD = C + 8, PLANE = R * LD, BYTES = SPLIT * PLANE * 2;
    bf16* data;
    DEVICE float value(int r, int c) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = SPLIT - 1; i >= 0; i--) sum += to_f32(data[i * PLANE + r * LD + c]);
        return sum;
    }
    // Two neighbours, c even.
    DEVICE f32x2 pair(int r, int c) const {
        f32x2 sum{0.0f, 0.0f};
#pragma unroll
        for (int i = SPLIT - 1; i >= 0; i--) {
            u32 two = *reinterpret_cast<const u32*>(data + i * PLANE + r * LD + c);
            sum.x += bf16_lo(two), sum.y += bf16_hi(two);
        }
        return sum;
    }
    DEVICE void set_pair(int r, int c, float x, float y) const {
#pragma unroll
        for (int i = 0; i < SPLIT; i++) {
            u32 two = pack_bf16(x, y);
            *reinterpret_cast<u32*>(data + i * PLANE + r * LD + c) = two;
            x -= bf16_lo(two), y -= bf16_hi(two);
        }
    }
    // V neighbours.
    DEVICE void set_vector(int r, int c, const float* from) const {
        float v[V];
#pragma unroll
        for (int k = 0; k < V; k++) v[k] = from[k];
#pragma unroll
        for (int i = 0; i < SPLIT; i++) {
            store<V>(data + i * PLANE + r * LD + c, v);
#pragma unroll
            for (int k = 0; k < V; k++) v[k] -= bits_to_f32(static_cast<u32>(f32_to_bf16_bits(v[k])) << 16);
        }
    }
};

// V elements as they are, from global to shared memory.
DEVICE void copy_vector(bf16* to, const bf16* from) {
    if constexpr (V == 8) *reinterpret_cast<u32x4*>(to) = *reinterpret_cast<const u32x4*>(from);
    else if constexpr (V == 4) *reinterpret_cast<u32x2*>(to) = *reinterpret_cast<const u32x2*>(from);
    else if constexpr (V == 2) *reinterpret_cast<u32*>(to) = *reinterpret_cast<const u32*>(from);
    else *to = *from;
}
template <class E>
DEVICE void copy_vector(bf16*, const E*) {}

// Rows `stride` apart into a tile: `rows` of them, `cols` numbers each, zeros in the rest.
template <class Tile>
DEVICE void load_tile(Tile tile, const T* from, i64 stride, i64 rows, i64 cols) {
    for (int i = threadIdx.x * V; i < Tile::ROWS * Tile::COLS; i += THREADS * V) {
        int r = i / Tile::COLS, c = i % Tile::COLS;
        if (SPLIT == 1 && r < rows && c < cols) {
            copy_vector(tile.data + r * Tile::LD + c, from + r * stride + c);
        } else {
            float v[V] = {};
            if (r < rows && c < cols) load<V>(v, from + r * stride + c);
            tile.set_vector(r, c, v);
        }
    }
}

// As above, row r times scale[r].
template <class Tile>
DEVICE void load_scaled(Tile tile, const T* from, i64 stride, i64 rows, i64 cols, const float* scale) {
    for (int i = threadIdx.x * V; i < Tile::ROWS * Tile::COLS; i += THREADS * V) {
        int r = i / Tile::COLS, c = i % Tile::COLS;
        float v[V] = {};
        if (r < rows && c < cols) {
            load<V>(v, from + r * stride + c);
#pragma unroll
            for (int k = 0; k < V; k++) v[k] *= scale[r];
        }
        tile.set_vector(r, c, v);
    }
}

// --- products ---------------------------------------------------------------------------------------------------------

// How the warps of a block share an R x C result: WM x WN of them, MT x NT tiles of 16 x 8 each.
template <int R, int C>
struct Spread {
    static constexpr int WM = R / 16 < 4 ? R / 16 : 4;
    static constexpr int WN = WARPS / WM < C / 16 ? WARPS / WM : C / 16;
    static constexpr int MT = R / 16 / WM, NT = C / 8 / WN;
    int row, col, warp_row, warp_col;
    bool active;
    DEVICE Spread() {
        int warp = threadIdx.x / WARP;
        warp_row = warp % WM, warp_col = warp / WM;
        row = warp_row * MT * 16, col = warp_col * NT * 8;
        active = warp < WM * WN;
    }
    // Where element e of tile (mt, nt) of this thread stands.
    DEVICE int row_of(int mt, int e) const { return row + mt * 16 + threadIdx.x % WARP / 4 + e / 2 * 8; }
    DEVICE int col_of(int nt, int e) const { return col + nt * 8 + threadIdx.x % 4 * 2 + e % 2; }
};

// acc += A · B for the rows of the result from `m` and its columns from `n` on. A is stored by rows, [m, k], or, with A_T,
// [k, m]; B is stored [n, k] or, with B_T, [k, n].
template <bool A_T, bool B_T, int K, class TileA, class TileB, int MT, int NT>
DEVICE void product(float (&acc)[MT][NT][4], TileA a, int m, TileB b, int n) {
    int lane = threadIdx.x % WARP, row = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    const bf16* pa = A_T ? a.data + (third + row) * TileA::LD + m + second : a.data + (m + second + row) * TileA::LD + third;
    const bf16* pb = B_T ? b.data + (second + row) * TileB::LD + n + third : b.data + (n + third + row) * TileB::LD + second;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        u32 fa[SPLIT][MT][4];
#pragma unroll
        for (int i = 0; i < SPLIT; i++) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                if (A_T) ldmatrix_x4_trans(fa[i][mt], pa + i * TileA::PLANE + k * TileA::LD + mt * 16);
                else ldmatrix_x4(fa[i][mt], pa + i * TileA::PLANE + mt * 16 * TileA::LD + k);
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
#pragma unroll
            for (int j = SPLIT - 1; j >= 0; j--) {
                u32 fb[4];
                if (B_T) ldmatrix_x4_trans(fb, pb + j * TileB::PLANE + k * TileB::LD + nt * 8);
                else ldmatrix_x4(fb, pb + j * TileB::PLANE + nt * 8 * TileB::LD + k);
#pragma unroll
                for (int i = SPLIT - 1 - j; i >= 0; i--) {
#pragma unroll
                    for (int mt = 0; mt < MT; mt++) {
                        mma_bf16(acc[mt][nt], fa[i][mt], fb);
                        mma_bf16(acc[mt][nt + 1], fa[i][mt], fb + 2);
                    }
                }
            }
        }
    }
}

template <int MT, int NT>
DEVICE void scale(float (&acc)[MT][NT][4], float factor) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[mt][nt][e] *= factor;
}

// Two neighbours of a row, those that are there, from or to global memory.
template <class E>
DEVICE f32x2 load_pair(const E* from, bool first, bool second) {
    float v[2] = {};
    if (V > 1 && second) {
        load<2>(v, from);
    } else {
        if (first) v[0] = to_f32(from[0]);
        if (second) v[1] = to_f32(from[1]);
    }
    return f32x2{v[0], v[1]};
}
template <class E>
DEVICE void store_pair(E* to, bool first, bool second, float x, float y) {
    float v[2] = {x, y};
    if (V > 1 && second) {
        store<2>(to, v);
    } else {
        if (first) set(to[0], x);
        if (second) set(to[1], y);
    }
}

// --- steps of a chunk -------------------------------------------------------------------------------------------------

// What `steps` made of the chunk in each slot and head, Q numbers each: Δ; the sum of the logarithms of the decays to the
// base 2 up to and with each row, and what f32 lost of it.
struct Steps {
    const float *delta, *cum, *rest;
};

// The steps of one chunk and head in shared memory.
struct ChunkSteps {
    float delta[Q], cum[Q], rest[Q];
    // The decay from the chunk's start to a row (its own one included), and from a row to the chunk's end.
    float before[Q], after[Q];
    DEVICE float decay(int to, int from) const {
        float log = cum[to] - cum[from];
        if (SPLIT > 1) log += rest[to] - rest[from];
        return ex2(log);
    }
    DEVICE float whole() const { return before[Q - 1]; }
};

// Threads [0, Q) fill it.
DEVICE void load_steps(ChunkSteps& to, const Steps& from, i64 slot, i64 heads, i64 head) {
    int t = threadIdx.x;
    if (t >= Q) return;
    i64 at = (slot * heads + head) * Q;
    float cum = from.cum[at + t], last = from.cum[at + Q - 1], difference = last - cum;
    to.delta[t] = from.delta[at + t];
    to.cum[t] = cum;
    if (SPLIT > 1) {
        float rest = from.rest[at + t];
        to.rest[t] = rest;
        difference += from.rest[at + Q - 1] - rest;
    }
    to.before[t] = ex2(cum);
    to.after[t] = ex2(difference);
}
