// Tiles in shared memory and their products on tensor cores, and where the pieces of segments lie: what the kernels of
// SSD and of attention share.
//
// Operands of products are bf16. Numbers in f32 are held as a sum of three bf16 (SPLIT 3), whose products are added up
// but for those below the precision of f32: six instead of one.
//
// Macros: T type of activations; SPLIT 1 for bf16, 3 for f32; PT columns of results that a block holds, which decide how
// far products are unrolled; V elements that one access of a row takes; THREADS of a block.

#define WARPS (THREADS / WARP)
// Rows go to shared memory as they are, without a thread's registers.
#define ASYNC (SPLIT == 1 && V == 8)

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
template <class E, class Sizes>
DEVICE void clear_outside(Mat<E> m, i64 col, i64 cols, const int* offsets, const Sizes& s) {
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
    // Eight neighbours, c a multiple of 8.
    DEVICE void eight(float* v, int r, int c) const {
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = 0.0f;
#pragma unroll
        for (int i = SPLIT - 1; i >= 0; i--) {
            float part[8];
            load<8>(part, data + i * PLANE + r * LD + c);
#pragma unroll
            for (int k = 0; k < 8; k++) v[k] += part[k];
        }
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

// V elements, or zeros.
template <class Tile>
DEVICE void fetch_vector(Tile tile, const T* from, int r, int c, bool there) {
    if constexpr (ASYNC) {
        bf16* to = tile.data + r * Tile::LD + c;
        if (there) copy_async16(to, from); else *reinterpret_cast<u32x4*>(to) = u32x4{0, 0, 0, 0};
    } else {
        float v[V] = {};
        if (there) load<V>(v, from);
        tile.set_vector(r, c, v);
    }
}

// Rows `stride` apart into a tile: `rows` of them, `cols` numbers each, zeros in the rest. They are there once the thread has
// waited for its asynchronous copies.
template <class Tile>
DEVICE void fetch_tile(Tile tile, const T* from, i64 stride, int rows, int cols) {
    constexpr int STEP = THREADS * V / Tile::COLS;
    if constexpr (STEP > 0) {
        // A thread keeps to its column.
        int r = threadIdx.x * V / Tile::COLS, c = threadIdx.x * V % Tile::COLS;
        if (r >= Tile::ROWS) return;
        from += r * stride + c;
#pragma unroll 4
        for (int k = 0; k < Tile::ROWS; k += STEP) {
            if (Tile::ROWS % STEP != 0 && r + k >= Tile::ROWS) break;
            fetch_vector(tile, from, r + k, c, r + k < rows && c < cols);
            from += STEP * stride;
        }
    } else {
        for (int i = threadIdx.x * V; i < Tile::ROWS * Tile::COLS; i += THREADS * V) {
            int r = i / Tile::COLS, c = i % Tile::COLS;
            fetch_vector(tile, from + r * stride + c, r, c, r < rows && c < cols);
        }
    }
}

// --- products ---------------------------------------------------------------------------------------------------------

// How the warps of a block share an R x C result: WM x WN of them, MT x NT tiles of 16 x 8 each.
template <int R, int C, int MOST = WARPS>
struct Spread {
    static constexpr int WM = R / 16 < MOST ? R / 16 : MOST;
    static constexpr int WN = WARPS / WM < C / 16 ? WARPS / WM : C / 16;
    static constexpr int MT = R / 16 / WM, NT = C / 8 / WN;
    typedef float Acc[MT][NT][4];
    int row, col, warp_row, warp_col;
    bool active;
    DEVICE explicit Spread(int warp) {
        warp_row = warp % WM, warp_col = warp / WM;
        row = warp_row * MT * 16, col = warp_col * NT * 8;
        active = warp < WM * WN;
    }
    // Where element e of tile (mt, nt) of this thread stands.
    DEVICE int row_of(int mt, int e) const { return row + mt * 16 + threadIdx.x % WARP / 4 + e / 2 * 8; }
    DEVICE int col_of(int nt, int e) const { return col + nt * 8 + threadIdx.x % 4 * 2 + e % 2; }
};

// Two f32 as SPLIT pairs of bf16.
DEVICE void split_pair(u32* to, int step, float x, float y) {
#pragma unroll
    for (int i = 0; i < SPLIT; i++) {
        u32 two = pack_bf16(x, y);
        to[i * step] = two;
        x -= bf16_lo(two), y -= bf16_hi(two);
    }
}

template <int N>
struct Constant {
    static constexpr int VALUE = N;
};

struct Unweighted {
    DEVICE float operator()(int) const { return 1.0f; }
};
template <class W>
struct IsWeighted {
    static constexpr bool VALUE = true;
};
template <>
struct IsWeighted<Unweighted> {
    static constexpr bool VALUE = false;
};

// acc += A · diag(weight) · B for the rows of the result from `m` and its columns from `n` on. A is stored by rows, [m, k],
// or, with A_T, [k, m]; B is stored [n, k] or, with B_T, [k, n]. No branches, so that the compiler can load fragments ahead;
// unrolled only so far as registers allow.
template <bool A_T, bool B_T, int K, class TileA, class TileB, int MT, int NT, class W = Unweighted>
DEVICE void product(float (&acc)[MT][NT][4], TileA a, int m, TileB b, int n, W weight = W()) {
    int lane = threadIdx.x % WARP, row = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    const bf16* pa = A_T ? a.data + (third + row) * TileA::LD + m + second : a.data + (m + second + row) * TileA::LD + third;
    const bf16* pb = B_T ? b.data + (second + row) * TileB::LD + n + third : b.data + (n + third + row) * TileB::LD + second;
    constexpr int UNROLL = PT < 64 ? 1 : 2;
#pragma unroll UNROLL
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
        if constexpr (IsWeighted<W>::VALUE) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = k + half * 8 + lane % 4 * 2;
                float w0 = weight(at), w1 = weight(at + 1);
#pragma unroll
                for (int mt = 0; mt < MT; mt++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        float x = 0.0f, y = 0.0f;
#pragma unroll
                        for (int i = SPLIT - 1; i >= 0; i--) x += bf16_lo(fa[i][mt][e]), y += bf16_hi(fa[i][mt][e]);
                        split_pair(&fa[0][mt][e], MT * 4, w0 * x, w1 * y);
                    }
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

// A result of R x K numbers as the operand A of another product, in registers.
template <int MT, int KT>
struct Operand {
    u32 parts[KT / 2][SPLIT][MT][4];
    DEVICE void set(const float (&acc)[MT][KT][4]) {
#pragma unroll
        for (int k = 0; k < KT / 2; k++)
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float* from = &acc[mt][2 * k + e / 2][e % 2 * 2];
                    split_pair(&parts[k][0][mt][e], MT * 4, from[0], from[1]);
                }
    }
};

// acc += A · B for an A in registers; B is stored [k, n].
template <int MT, int KT, int NT, class TileB>
DEVICE void product(float (&acc)[MT][NT][4], const Operand<MT, KT>& a, TileB b, int n) {
    int lane = threadIdx.x % WARP;
    const bf16* pb = b.data + (lane / 8 % 2 * 8 + lane % 8) * TileB::LD + n + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < KT / 2; k++) {
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
#pragma unroll
            for (int j = SPLIT - 1; j >= 0; j--) {
                u32 fb[4];
                ldmatrix_x4_trans(fb, pb + j * TileB::PLANE + k * 16 * TileB::LD + nt * 8);
#pragma unroll
                for (int i = SPLIT - 1 - j; i >= 0; i--) {
#pragma unroll
                    for (int mt = 0; mt < MT; mt++) {
                        mma_bf16(acc[mt][nt], a.parts[k][i][mt], fb);
                        mma_bf16(acc[mt][nt + 1], a.parts[k][i][mt], fb + 2);
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

// A result's rows to global memory, `stride` apart: the first `rows` of them, `cols` numbers each.
template <class E, class I, class S>
DEVICE void store_result(E* to, I stride, const typename S::Acc& acc, const S& spread, int rows, int cols) {
    if (!spread.active) return;
    int odd = threadIdx.x % 2;
#pragma unroll
    for (int mt = 0; mt < S::MT; mt++)
#pragma unroll
        for (int nt = 0; nt < S::NT; nt += 2)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                int r = spread.row_of(mt, e);
                if constexpr (sizeof(E) == 2 && V >= 4) {
                    // Neighbours trade halves, so that each has four numbers of a row and a quad fills 32 bytes.
                    u32 one = pack_bf16(acc[mt][nt][e], acc[mt][nt][e + 1]), two = pack_bf16(acc[mt][nt + 1][e], acc[mt][nt + 1][e + 1]);
                    u32 other = __shfl_xor_sync(0xffffffffu, odd ? one : two, 1);
                    int c = spread.col_of(nt + odd, 0) - 2 * odd;
                    if (r < rows && c < cols)
                        *reinterpret_cast<u32x2*>(to + r * stride + c) = odd ? u32x2{other, two} : u32x2{one, other};
                } else {
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        int c = spread.col_of(nt + k, 0);
                        if (r < rows) store_pair(to + r * stride + c, c < cols, c + 1 < cols, acc[mt][nt + k][e], acc[mt][nt + k][e + 1]);
                    }
                }
            }
}
