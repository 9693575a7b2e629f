// Dropout: a thread takes V columns of a row and draws a number for each by its position, as the CPU does. Memory bounds
// it, with about 60 integer operations an element beside.
//
// Macros: T; V.

// Philox 2x32 with 10 rounds: lower and upper half of 64 random bits.
DEVICE void philox(u32 key, u64 counter, u32& lo, u32& hi) {
    lo = static_cast<u32>(counter), hi = static_cast<u32>(counter >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 product = static_cast<u64>(lo) * 0xD256D193u;
        lo = static_cast<u32>(product >> 32) ^ key ^ hi;
        hi = static_cast<u32>(product);
        key += 0x9E3779B9u;
    }
}

KERNEL __launch_bounds__(256) dropout(Mat<T> x, const int* seed, Mat<T> y, i64 rows, i64 cols, int stream, float p, float scale) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, vectors = cols / V;
    if (i >= rows * vectors) return;
    i64 row = i / vectors, c = (i - row * vectors) * V;
    u32 key, unused;
    philox(static_cast<u32>(stream), static_cast<u64>(static_cast<u32>(seed[1])) << 32 | static_cast<u32>(seed[0]), key, unused);
    i64 before = static_cast<u32>(seed[2]);
    float v[V];
    load<V>(v, x.row(row) + c);
#pragma unroll
    for (int k = 0; k < V; k++) {
        u32 lo, hi;
        philox(key, static_cast<u64>((before + row) * cols + c + k), lo, hi);
        float number = static_cast<float>(hi >> 8) * (1.0f / 16777216.0f);
        v[k] = number >= p ? scale * v[k] : 0.0f;
    }
    store<V>(y.row(row) + c, v);
}
