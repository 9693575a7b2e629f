// SSD: step sizes, states, outputs.
//
// A segment is cut into chunks of Q rows, and chunks are gathered in spans. A block takes one head (PT of its channels) and
// one span and walks over the chunks with the state [PT, NP] in registers, as the accumulators of its products:
//
//   y_t = before_t C_t · S + Σ_{j ≤ t} decay(t, j) Δ_j (C_t · B_j) x_j      S' = whole S + Σ_j after_j Δ_j x_j ⊗ B_j
//
// where before, after and whole are decays from the chunk's start, to its end, and over all of it. Where segments × heads
// do not fill the chip, spans are short: `states` first finds what each span adds to a state of zero, and `scan_spans` turns that
// into the states that spans start from. The gradient of the state runs the same way backwards in time: with dy for x, C for
// B and the decay `before` for Δ · after, `states` is its kernel, too.
//
// Bounds, bf16, P 64, N 128, a head and chunk of 64 rows: 896 products of 16 x 8 x 16, 1450 cycles of a multiprocessor.
//
// Macros: those of cuda/tiles.cu and kernel_steps.cu; STAGES buffers that a chunk's rows are fetched into; GATE whether there is a z.

// Δ, the cumulative logarithms of decays and, for the gradient, dΔ/d(dt): a warp a head, in the chunk of slot blockIdx.x.
KERNEL __launch_bounds__(THREADS) steps(Mat<T> dt, const float* a, const float* dt_bias, const int* offsets, float* delta,
                                        float* cum, float* rest, float* slope, int use_softplus, float low, float high, Sizes s) {
    constexpr int EACH = Q < WARP ? 1 : Q / WARP;
    i64 slot = blockIdx.x, head = blockIdx.y * WARPS + threadIdx.x / WARP;
    Piece chunk = piece_of(offsets, s.segments, slot, Q);
    if (head >= s.heads || !chunk.exists()) return;
    int first = threadIdx.x % WARP * EACH;
    float d[EACH], ds[EACH];
    double sums[EACH], sum = 0.0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        d[e] = ds[e] = 0.0f;
        i64 row = chunk.first + first + e;
        if (row < chunk.end && first < Q) {
            float raw = to_f32(dt.row(row)[head]) + (dt_bias != nullptr ? dt_bias[head] : 0.0f);
            float positive = use_softplus ? softplus(raw) : raw;
            d[e] = fminf(fmaxf(positive, low), high);
            ds[e] = positive < low || positive > high ? 0.0f : use_softplus ? sigmoid(raw) : 1.0f;
        }
        sum += static_cast<double>(d[e]) * static_cast<double>(a[head]) * 1.4426950408889634;
        sums[e] = sum;
    }
    double all = sum;
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        double other = __shfl_up_sync(0xffffffffu, all, lanes);
        if (threadIdx.x % WARP >= lanes) all += other;
    }
    if (first >= Q) return;
    i64 at = (slot * s.heads + head) * Q + first;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        double exact = all - sum + sums[e];
        float rounded = static_cast<float>(exact);
        delta[at + e] = d[e];
        cum[at + e] = rounded;
        if (SPLIT > 1) rest[at + e] = static_cast<float>(exact - static_cast<double>(rounded));
        if (slope != nullptr) slope[at + e] = ds[e];
    }
}

typedef Spread<PT, NP> StateSpread;

// The state of some channels in f32: `channels` rows of N numbers.
DEVICE void load_state(StateSpread::Acc& acc, const StateSpread& spread, const float* from, int channels, int d_state) {
#pragma unroll
    for (int mt = 0; mt < StateSpread::MT; mt++)
#pragma unroll
        for (int nt = 0; nt < StateSpread::NT; nt++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                int p = spread.row_of(mt, e), n = spread.col_of(nt, e);
                f32x2 v{0.0f, 0.0f};
                if (from != nullptr && spread.active && p < channels)
                    v = load_pair(from + p * d_state + n, n < d_state, n + 1 < d_state);
                acc[mt][nt][e] = v.x, acc[mt][nt][e + 1] = v.y;
            }
}

// What a block of `states` and `walk` works on: a span of a segment, some channels of a head.
struct Work {
    i64 slot, head;
    int channels;
    // Column of the first channel in x, and of the group in B and C.
    i64 col, group_col;
    Piece span;
    // Slot of the first chunk, and the number of chunks.
    i64 chunk_slot;
    int chunks;
    DEVICE Work(const int* offsets, const Sizes& s) {
        i64 tiles = (s.headdim + PT - 1) / PT;
        slot = blockIdx.x, head = blockIdx.y / tiles;
        i64 channel = blockIdx.y % tiles * PT;
        channels = static_cast<int>(s.headdim - channel < PT ? s.headdim - channel : PT);
        col = head * s.headdim + channel, group_col = head / s.heads_per_group * s.d_state;
        span = piece_of(offsets, s.segments, slot, s.span);
        chunk_slot = first_slot(span.segment_start, span.segment, Q) + (span.first - span.segment_start) / Q;
        chunks = static_cast<int>((span.end - span.first + Q - 1) / Q);
    }
    DEVICE i64 first_of(int chunk) const { return span.first + static_cast<i64>(chunk) * Q; }
    DEVICE int rows_from(i64 first) const { return static_cast<int>(span.end - first < Q ? span.end - first : Q); }
    // Spans are there if they have rows; where segments are not cut, an empty one is there, too, for its state.
    DEVICE bool exists(const Sizes& s) const {
        return span.segment >= 0 && span.first >= span.segment_start && (s.span > s.tokens || span.first < span.end);
    }
};

// Walks over the chunks of a span with the state alone, forward or backward in time. The state that a chunk starts from (in
// the direction of the walk) goes to `chunk_states` [chunks, heads, P, N], the one after the last chunk to `outgoing`, the
// decay over the span to `decays` [spans, heads]; each if it is there. `incoming` and `outgoing` are by span.
KERNEL __launch_bounds__(THREADS, SPLIT == 1 ? 4 : 1) states(Mat<T> x, Mat<T> b, const int* offsets, const float* delta, const float* cum,
                                         const float* rest, Mat<float> incoming, Mat<float> outgoing, float* decays,
                                         T* chunk_states, int backward, Sizes s) {
    DYNAMIC_SHARED(memory);
    constexpr int STAGE = Tile<Q, PT>::BYTES + Tile<Q, NP>::BYTES;
    __shared__ ChunkSteps chunk_steps[2];
    Work work(offsets, s);
    if (!work.exists(s)) return;
    int d_state = static_cast<int>(s.d_state);
    Steps steps{delta, cum, rest};
    StateSpread spread(threadIdx.x / WARP);
    StateSpread::Acc state;
    i64 offset = work.col * s.d_state;
    // The chunk in step i of the walk, into buffer i % 2.
    auto fetch = [&](int i) {
        int c = backward ? work.chunks - 1 - i : i;
        i64 first = work.first_of(c);
        int rows = work.rows_from(first);
        unsigned char* stage = memory + i % 2 * STAGE;
        fetch_steps(chunk_steps[i % 2], steps, work.chunk_slot + c, s.heads, work.head);
        fetch_tile(Tile<Q, PT>{reinterpret_cast<bf16*>(stage)}, x.data + first * x.stride + work.col, x.stride, x.present() ? rows : 0, work.channels);
        fetch_tile(Tile<Q, NP>{reinterpret_cast<bf16*>(stage + Tile<Q, PT>::BYTES)}, b.data + first * b.stride + work.group_col, b.stride, rows, d_state);
        copy_async_commit();
    };
    if (work.chunks > 0) fetch(0);
    load_state(state, spread, incoming.present() ? incoming.row(work.slot) + offset : nullptr, work.channels, d_state);
    float decay = 1.0f;
    for (int i = 0; i < work.chunks; i++) {
        if (chunk_states != nullptr) {
            i64 c = backward ? work.chunks - 1 - i : i;
            i64 at = ((work.chunk_slot + c) * s.heads * s.headdim + work.col) * s.d_state;
            store_result(chunk_states + at, d_state, state, spread, work.channels, d_state);
            if (i + 1 == work.chunks && !outgoing.present()) break;
        }
        if (i + 1 < work.chunks) {
            fetch(i + 1);
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        __syncthreads();
        const ChunkSteps& now = chunk_steps[i % 2];
        Tile<Q, PT> values{reinterpret_cast<bf16*>(memory + i % 2 * STAGE)};
        Tile<Q, NP> keys{reinterpret_cast<bf16*>(memory + i % 2 * STAGE + Tile<Q, PT>::BYTES)};
        decay *= now.whole();
        if (spread.active) {
            scale(state, now.whole());
            auto weight = [&](int t) { return backward ? now.before(t) : now.delta[t] * now.after(t); };
            product<true, true, Q>(state, values, spread.row, keys, spread.col, weight);
        }
        __syncthreads();
    }
    copy_async_wait<0>();
    if (outgoing.present()) store_result(outgoing.row(work.slot) + offset, d_state, state, spread, work.channels, d_state);
    if (decays != nullptr && threadIdx.x == 0) decays[work.slot * s.heads + work.head] = decay;
}

// Turns what spans add to a state of zero into the states that they start from, in place, and finds the state after the
// last one. A thread takes some neighbouring numbers of the state of segment blockIdx.x.
KERNEL __launch_bounds__(THREADS) scan_spans(const int* offsets, const float* decays, Mat<float> span_states, Mat<float> initial,
                                             Mat<float> last, int backward, Sizes s) {
    constexpr int W = V < 4 ? V : 4;
    i64 element = (static_cast<i64>(blockIdx.y) * THREADS + threadIdx.x) * W, state = s.headdim * s.d_state;
    if (element >= s.heads * state) return;
    int segment = blockIdx.x;
    i64 head = element / state, slot = first_slot(offsets[segment], segment, s.span);
    i64 spans = (offsets[segment + 1] - offsets[segment] + s.span - 1) / s.span;
    float now[W] = {};
    if (initial.present()) load<W>(now, initial.row(segment) + element);
    // Several loads under way at once.
    constexpr int AHEAD = 8;
    for (i64 i = 0; i < spans; i += AHEAD) {
        float added[AHEAD][W], decay[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (i + u >= spans) break;
            i64 k = slot + (backward ? spans - 1 - i - u : i + u);
            decay[u] = decays[k * s.heads + head];
            load<W>(added[u], span_states.row(k) + element);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (i + u >= spans) break;
            store<W>(span_states.row(slot + (backward ? spans - 1 - i - u : i + u)) + element, now);
#pragma unroll
            for (int w = 0; w < W; w++) now[w] = decay[u] * now[w] + added[u][w];
        }
    }
    if (last.present()) store<W>(last.row(segment) + element, now);
}

// Outputs of a span and, if wanted, the state after it. With dy, what the gradient of the gate needs instead: dz, and
// the gradient of the sum before the gate. A warp takes 16 rows of a chunk, so that the scores stay in its registers; those of
// the first half need only the first half of the scores.
KERNEL __launch_bounds__(THREADS, SPLIT == 1 ? 2 : 1) walk(Mat<T> x, Mat<T> b, Mat<T> c, const float* d, Mat<T> z,
                                                            const int* offsets, const float* delta, const float* cum,
                                                            const float* rest, Mat<float> incoming, Mat<float> outgoing,
                                                            Mat<T> y, Mat<T> dy, Mat<T> dz, Mat<T> d_sum, Sizes s) {
    DYNAMIC_SHARED(memory);
    constexpr int STAGE = Tile<Q, PT>::BYTES + 2 * Tile<Q, NP>::BYTES;
    Tile<PT, NP> rounded{reinterpret_cast<bf16*>(memory)};
    auto values_of = [&](int i) { return Tile<Q, PT>{reinterpret_cast<bf16*>(memory + Tile<PT, NP>::BYTES + i % STAGES * STAGE)}; };
    auto keys_of = [&](int i) { return Tile<Q, NP>{reinterpret_cast<bf16*>(values_of(i).data) + Tile<Q, PT>::BYTES / 2}; };
    auto queries_of = [&](int i) { return Tile<Q, NP>{keys_of(i).data + Tile<Q, NP>::BYTES / 2}; };
    __shared__ ChunkSteps chunk_steps[STAGES];
    Work work(offsets, s);
    if (blockIdx.x == 0) {
        clear_outside(y, work.col, work.channels, offsets, s);
        clear_outside(dz, work.col, work.channels, offsets, s);
        clear_outside(d_sum, work.col, work.channels, offsets, s);
    }
    if (!work.exists(s)) return;
    int d_state = static_cast<int>(s.d_state);
    Steps steps{delta, cum, rest};
    int warp = threadIdx.x / WARP;
    StateSpread spread(warp);
    // Later rows have more to do: blocks give them to different warps.
    Spread<Q, PT> out((warp + blockIdx.x + blockIdx.y) % WARPS);
    StateSpread::Acc state;
    i64 offset = work.col * s.d_state;
    float skip = d != nullptr && !s.d_per_channel ? d[work.head] : 0.0f;
    auto fetch = [&](int i) {
        i64 first = work.first_of(i);
        int rows = work.rows_from(first);
        fetch_steps(chunk_steps[i % STAGES], steps, work.chunk_slot + i, s.heads, work.head);
        fetch_tile(queries_of(i), c.data + first * c.stride + work.group_col, c.stride, rows, d_state);
        fetch_tile(keys_of(i), b.data + first * b.stride + work.group_col, b.stride, rows, d_state);
        fetch_tile(values_of(i), x.data + first * x.stride + work.col, x.stride, rows, work.channels);
        copy_async_commit();
    };
    if (work.chunks > 0) fetch(0);
    load_state(state, spread, incoming.present() ? incoming.row(work.slot) + offset : nullptr, work.channels, d_state);
    for (int i = 0; i < work.chunks; i++) {
        i64 first = work.first_of(i);
        int rows = work.rows_from(first);
        if (spread.active) {
#pragma unroll
            for (int mt = 0; mt < StateSpread::MT; mt++)
#pragma unroll
                for (int nt = 0; nt < StateSpread::NT; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e += 2)
                        rounded.set_pair(spread.row_of(mt, e), spread.col_of(nt, e), state[mt][nt][e], state[mt][nt][e + 1]);
        }
        copy_async_wait<0>();
        __syncthreads();
        if (STAGES > 1 && i + 1 < work.chunks) fetch(i + 1);
        const ChunkSteps& now = chunk_steps[i % STAGES];
        Tile<Q, PT> values = values_of(i);
        Tile<Q, NP> keys = keys_of(i), queries = queries_of(i);
        Spread<Q, PT>::Acc acc = {};
        product<false, false, NP>(acc, queries, out.row, rounded, 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float before = now.before(out.row_of(0, 2 * half));
#pragma unroll
            for (int nt = 0; nt < out.NT; nt++) acc[0][nt][2 * half] *= before, acc[0][nt][2 * half + 1] *= before;
        }
        // Of the rows of the chunk, the first COLS.
        auto add_inputs = [&](auto cols) {
            constexpr int COLS = decltype(cols)::VALUE;
            float scores[1][COLS / 8][4] = {};
            product<false, false, NP>(scores, queries, out.row, keys, 0);
#pragma unroll
            for (int nt = 0; nt < COLS / 8; nt++) {
                int j = out.col_of(nt, 0);
                f32x2 step = now.delta_pair(j);
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    f32x2 decay = now.decay_pair(out.row_of(0, e), j);
                    scores[0][nt][e] *= decay.x * step.x, scores[0][nt][e + 1] *= decay.y * step.y;
                }
            }
            Operand<1, COLS / 8> operand;
            operand.set(scores);
            product(acc, operand, values, 0);
        };
        if (Q >= 32 && out.row < Q / 2) add_inputs(Constant<Q >= 32 ? Q / 2 : Q>()); else add_inputs(Constant<Q>());
        if (d != nullptr) {
#pragma unroll
            for (int nt = 0; nt < out.NT; nt++) {
                int p = out.col_of(nt, 0);
                float skip0 = skip, skip1 = skip;
                if (s.d_per_channel) {
                    skip0 = p < work.channels ? d[work.col + p] : 0.0f;
                    skip1 = p + 1 < work.channels ? d[work.col + p + 1] : 0.0f;
                }
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    f32x2 in = values.pair(out.row_of(0, e), p);
                    acc[0][nt][e] += in.x * skip0, acc[0][nt][e + 1] += in.y * skip1;
                }
            }
        }
        if (spread.active) {
            scale(state, now.whole());
            auto weight = [&](int t) { return now.delta[t] * now.after(t); };
            product<true, true, Q>(state, values, spread.row, keys, spread.col, weight);
        }
        __syncthreads();
        if (STAGES == 1 && i + 1 < work.chunks) fetch(i + 1);
        if (GATE) {
#pragma unroll
            for (int mt = 0; mt < out.MT; mt++)
#pragma unroll
                for (int nt = 0; nt < out.NT; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e += 2) {
                        int t = out.row_of(mt, e), p = out.col_of(nt, e);
                        if (t >= rows || p >= work.channels) continue;
                        bool two = p + 1 < work.channels;
                        i64 row = first + t, col = work.col + p;
                        f32x2 gate = load_pair(z.row(row) + col, true, two);
                        float &v0 = acc[mt][nt][e], &v1 = acc[mt][nt][e + 1];
                        if (dy.present()) {
                            f32x2 up = load_pair(dy.row(row) + col, true, two);
                            if (dz.present()) store_pair(dz.row(row) + col, true, two, up.x * v0 * dsilu(gate.x), up.y * v1 * dsilu(gate.y));
                            v0 = up.x, v1 = up.y;
                        }
                        v0 *= silu(gate.x), v1 *= silu(gate.y);
                    }
        }
        Mat<T> to = GATE && dy.present() ? d_sum : y;
        store_result(to.row(first) + work.col, to.stride, acc, out, rows, work.channels);
    }
    if (outgoing.present()) store_result(outgoing.row(work.slot) + offset, d_state, state, spread, work.channels, d_state);
}
