// Sizes and the steps of a chunk, which the kernels of SSD share.
//
// Macros: those of cuda/tiles.cu, where PT are the channels of a head that a block handles; Q rows of a chunk; NP the state
// size rounded up to a power of two, at least 16.

// Sizes that are known when a kernel is launched.
struct Sizes {
    i64 tokens, segments, heads, headdim, d_state, heads_per_group;
    // Rows of a span; more than there are tokens where segments are not cut.
    i64 span;
    // D has a value for each channel, not for each head.
    i64 d_per_channel;
};

// --- steps of a chunk -------------------------------------------------------------------------------------------------

// What `steps` made of the chunk in each slot and head, Q numbers each: Δ; the sum of the logarithms of the decays to the
// base 2 up to and with each row, and what f32 lost of it.
struct Steps {
    const float *delta, *cum, *rest;
};

// The steps of one chunk and head in shared memory.
struct __align__(16) ChunkSteps {
    float delta[Q], cum[Q], rest[SPLIT > 1 ? Q : 4];
    // The decay from after row `from` to after row `to`.
    DEVICE float decay(int to, int from) const {
        float log = cum[to] - cum[from];
        if (SPLIT > 1) log += rest[to] - rest[from];
        return ex2(log);
    }
    // From after row j, or j + 1, to after row `to`; 0 if they come later.
    DEVICE f32x2 decay_pair(int to, int j) const {
        f32x2 one = *reinterpret_cast<const f32x2*>(cum + j);
        float x = cum[to] - one.x, y = cum[to] - one.y;
        if (SPLIT > 1) x += rest[to] - rest[j], y += rest[to] - rest[j + 1];
        return f32x2{to >= j ? ex2(x) : 0.0f, to > j ? ex2(y) : 0.0f};
    }
    DEVICE f32x2 delta_pair(int j) const { return *reinterpret_cast<const f32x2*>(delta + j); }
    // From the chunk's start to after row t, from after row t to the chunk's end, and over all of it.
    DEVICE float before(int t) const { return ex2(SPLIT > 1 ? cum[t] + rest[t] : cum[t]); }
    DEVICE float after(int t) const { return decay(Q - 1, t); }
    DEVICE float whole() const { return before(Q - 1); }
};

DEVICE void fetch_steps(ChunkSteps& to, const Steps& from, i64 slot, i64 heads, i64 head) {
    i64 at = (slot * heads + head) * Q;
    int t = threadIdx.x * 4;
    if (t >= Q) return;
    copy_async16(to.delta + t, from.delta + at + t);
    copy_async16(to.cum + t, from.cum + at + t);
    if (SPLIT > 1) copy_async16(to.rest + t, from.rest + at + t);
}
