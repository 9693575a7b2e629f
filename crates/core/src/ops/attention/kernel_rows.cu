// What the kernels of attention share: which queries a block takes, and how their rows and those of keys come into tiles.
//
// The query heads that share a key and value head are rows of one tile: row r is query r / heads, head r % heads.
//
// Macros: those of cuda/tiles.cu; PP the head's numbers rounded up to a power of two, at least 16; RW warps that share the
// rows of a tile, 16 each; KW warps that share the keys of a block; KEYS keys that a warp takes of it; STAGES buffers
// that blocks are fetched into.

#define TILE_ROWS (16 * RW)
#define BLOCK (KEYS * KW)
#define NOTHING bits_to_f32(0xff800000u)

// Sizes that are known when a kernel is launched.
struct Sizes {
    i64 tokens, segments, heads, kv_heads, headdim, window;
    // Query heads of a tile, and queries.
    i64 tile_heads, queries;
    DEVICE i64 group() const { return heads / kv_heads; }
    DEVICE i64 head_tiles() const { return (group() + tile_heads - 1) / tile_heads; }
    // What turns a product into an exponent of 2.
    DEVICE float factor() const { return LOG2_E * (1.0f / sqrtf(static_cast<float>(headdim))); }
};

// The queries and heads of a tile: rows `first` up to `end` of the pack.
struct Work {
    Piece piece;
    i64 kv_head, head;
    int heads, rows;
    // Position of the first query.
    i64 first;
    DEVICE Work() {}
    DEVICE Work(const int* offsets, Mat<float> positions, const Sizes& s, i64 slot, i64 tile) {
        i64 part = tile % s.head_tiles() * s.tile_heads, rest = s.group() - part;
        kv_head = tile / s.head_tiles();
        head = kv_head * s.group() + part;
        heads = static_cast<int>(rest < s.tile_heads ? rest : s.tile_heads);
        piece = piece_of(offsets, s.segments, slot, s.queries);
        rows = piece.exists() ? static_cast<int>(piece.end - piece.first) * heads : 0;
        first = rows > 0 ? position_of(positions, piece.segment) + piece.first - piece.segment_start : 0;
    }
    DEVICE i64 end() const { return first + rows / heads; }
    // Where row r of the tile lies.
    template <class E>
    DEVICE E* at(Mat<E> m, int r, const Sizes& s) const {
        return m.row(piece.first + r / heads) + (head + r % heads) * s.headdim;
    }
    // Row r's number in a matrix with one for each head.
    DEVICE float* of_head(Mat<float> m, int r) const { return m.row(piece.first + r / heads) + head + r % heads; }
};

// Rows of queries, or of what belongs to them.
template <class Tile>
DEVICE void fetch_queries(Tile tile, Mat<T> from, const Work& work, const Sizes& s) {
#pragma unroll 4
    for (int i = threadIdx.x * V; i < Tile::ROWS * Tile::COLS; i += THREADS * V) {
        int r = i / Tile::COLS, c = i % Tile::COLS;
        bool there = r < work.rows && c < s.headdim;
        fetch_vector(tile, there ? work.at(from, r, s) + c : from.data, r, c, there);
    }
}

// Where the keys and values of a segment lie, as one key and value head sees them: in the pack from position `start` on, in
// the state's ring before.
struct Past {
    Mat<T> k, v;
    const float* ring;
    i64 row, start, window;
    int col, headdim;
    i64 kv_width;
    DEVICE Past(Mat<T> k, Mat<T> v, Mat<float> kv, const Work& work, const Sizes& s)
        : k(k), v(v), ring(kv.present() ? kv.row(work.piece.segment) : nullptr), row(work.piece.segment_start),
          start(work.first - (work.piece.first - work.piece.segment_start)), window(s.window),
          col(static_cast<int>(work.kv_head * s.headdim)), headdim(static_cast<int>(s.headdim)), kv_width(s.kv_heads * s.headdim) {}
};

template <class Tile>
DEVICE void fetch_ring(Tile tile, const float* from, int r, int c, bool there) {
    float v[V] = {};
    if (there) load<V>(v, from);
    tile.set_vector(r, c, v);
}

// The keys and values of positions from `first` on, as far as they lie in [low, end); zeros in the rest.
template <class Tile>
DEVICE void fetch_keys(Tile keys, Tile values, const Past& past, i64 first, i64 low, i64 end) {
    i64 slot = past.ring != nullptr ? first % past.window : 0;
#pragma unroll 4
    for (int i = threadIdx.x * V; i < Tile::ROWS * Tile::COLS; i += THREADS * V) {
        int r = i / Tile::COLS, c = i % Tile::COLS;
        i64 p = first + r;
        bool there = p >= low && p < end && c < past.headdim;
        if (there && p < past.start) {
            i64 at = slot + r;
            if (at >= past.window) at %= past.window;
            const float* from = past.ring + at * 2 * past.kv_width + past.col + c;
            there = past.ring != nullptr;
            fetch_ring(keys, from, r, c, there);
            fetch_ring(values, from + past.kv_width, r, c, there);
        } else {
            i64 at = there ? past.row + (p - past.start) : 0;
            fetch_vector(keys, past.k.data + at * past.k.stride + past.col + c, r, c, there);
            fetch_vector(values, past.v.data + at * past.v.stride + past.col + c, r, c, there);
        }
    }
}

// The two rows of a thread in a tile of queries: r and r + 8. Row i sees the keys from `low[i]` up to `high[i]`, counted from the
// first block; none if it is not there.
struct Seen {
    int row[2], low[2], high[2];
    DEVICE Seen(int warp_row, const Work& work, i64 first_key, const Sizes& s) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i] = warp_row + threadIdx.x % WARP / 4 + 8 * i;
            i64 position = work.first + row[i] / work.heads;
            bool there = row[i] < work.rows;
            i64 from = position + 1 - s.window;
            low[i] = there && from > first_key ? static_cast<int>(from - first_key) : 0;
            high[i] = there ? static_cast<int>(position + 1 - first_key) : 0;
        }
    }
    DEVICE bool holds(int i, int key) const { return key >= low[i] && key < high[i]; }
    // Whether any row of the warp sees some of the keys [from, from + count).
    DEVICE bool any(int from, int count) const {
        bool some = false;
#pragma unroll
        for (int i = 0; i < 2; i++) some |= low[i] < from + count && high[i] > from && high[i] > low[i];
        return __any_sync(0xffffffffu, some);
    }
};

// Rows of a tile from `first` on.
template <class Tile>
DEVICE Tile rows_from(Tile tile, int first) { return Tile{tile.data + first * Tile::LD}; }
