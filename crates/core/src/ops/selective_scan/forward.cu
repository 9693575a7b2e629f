// The selective scan, forward.
//
// A block stages a tile of dt, x, z, B and C in shared memory while it works on the tile before; Δ, Δx and the gate are
// computed once an element, and what remains a state and step is the decay (one exponential) and three multiply-adds.
// Sums over a channel's lanes are formed for several steps together, by tensor cores where activations are bf16.
//
// The pack's rows are cut into parts so that there are blocks enough. A segment that reaches over the end of a part
// leaves that part's own end state behind (`end_states`); `scan_parts` makes its start state of them. Where parts end
// with segments, `end_states` has nothing to do.

// A tile: what threads have copied, each for itself, in two buffers used in turn, and what is computed of it.
struct Tile {
    f32x2* du;  // Δ and Δx (x for the zero-order hold) [STEPS, PAIR_ROW]
    float* bc;  // B and C [2, STEPS, 2, NP]; also of two tiles, so that warps may be apart
    float* y;   // Σ C h [STEPS, ROW]
    float *bias, *skip;
    T* raw;

    // Pieces of a thread: of dt, x and z each, and of B and C together, those of C last.
    static constexpr int PIECES = (Piece::of(STEPS) + WARP - 1) / WARP;
    static constexpr int OF_B = STEPS * (N / VB), OF_BC = (2 * OF_B + THREADS - 1) / THREADS;

    DEVICE explicit Tile(unsigned char* memory) {
        float* next = reinterpret_cast<float*>(memory);
        auto take = [&](int count) {
            float* p = next;
            next += (count + 3) / 4 * 4;
            return p;
        };
        du = reinterpret_cast<f32x2*>(take(2 * STEPS * PAIR_ROW));
        bc = take(2 * STEPS * 2 * NP);
        y = take(STEPS * ROW);
        bias = take(CB);
        skip = take(CB);
        raw = reinterpret_cast<T*>(next);
    }
    DEVICE T* by_channel(int buffer, int operand, int k) const {
        return raw + ((buffer * 3 + operand) * PIECES + k) * THREADS * V + threadIdx.x * V;
    }
    DEVICE T* by_state(int buffer, int k) const {
        return raw + 6 * PIECES * THREADS * V + (buffer * OF_BC + k) * THREADS * VB + threadIdx.x * VB;
    }
    DEVICE void begin(const Scan& scan, const Place& at) {
        for (int i = threadIdx.x; i < CB; i += THREADS) {
            bool real = i < at.width;
            bias[i] = real && scan.bias.present() ? scan.bias.data[at.first + i] : 0.0f;
            skip[i] = real && scan.d.present() ? scan.d.data[at.first + i] : 0.0f;
        }
        // States beyond N stay zero.
        for (int i = threadIdx.x; i < 4 * STEPS * NP; i += THREADS) bc[i] = 0.0f;
        __syncthreads();
    }
    // Starts the copies of rows [row, row + steps).
    template <bool Output>
    DEVICE void load(const Scan& scan, const Place& at, int buffer, int row, int steps) {
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            Piece piece(threadIdx.x % WARP + k * WARP);
            if (piece.step >= steps || piece.col >= at.width) continue;
            int step = row + piece.step, col = at.first + piece.col;
            stage<V>(by_channel(buffer, 0, k), element(scan.dt, step, col));
            stage<V>(by_channel(buffer, 1, k), element(scan.x, step, col));
            if (Output && scan.z.present()) stage<V>(by_channel(buffer, 2, k), element(scan.z, step, col));
        }
#pragma unroll
        for (int k = 0; k < OF_BC; k++) {
            int i = threadIdx.x + k * THREADS, step = i % OF_B / (N / VB), col = i % (N / VB) * VB;
            if (step >= steps || i >= (Output ? 2 : 1) * OF_B) continue;
            stage<VB>(by_state(buffer, k), element(i < OF_B ? scan.b : scan.c, row + step, at.column + col));
        }
        copy_async_commit();
    }
    // Computes what the thread has copied. Steps behind the last have Δ = 0 and no input: they change no state.
    template <bool Output>
    DEVICE void prepare(const Place& at, int buffer, int steps) {
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            Piece piece(threadIdx.x % WARP + k * WARP);
            if (Piece::of(STEPS) % WARP != 0 && piece.step >= STEPS) break;
            float raw[V], in[V], out[2 * V];
            ::load<V>(raw, by_channel(buffer, 0, k));
            ::load<V>(in, by_channel(buffer, 1, k));
            bool real = piece.step < steps && piece.col < at.width;
#pragma unroll
            for (int v = 0; v < V; v++) {
                float delta = step_size(raw[v] + bias[piece.col + v]);
                out[2 * v] = real ? delta : 0.0f;
                out[2 * v + 1] = real ? (ZOH ? in[v] : delta * in[v]) : 0.0f;
            }
            store<2 * V>(&du[piece.step * PAIR_ROW + piece.col].x, out);
        }
#pragma unroll
        for (int k = 0; k < OF_BC; k++) {
            int i = threadIdx.x + k * THREADS, step = i % OF_B / (N / VB), col = i % (N / VB) * VB;
            if (i >= (Output ? 2 : 1) * OF_B) break;
            float wide[VB] = {};
            if (step < steps) ::load<VB>(wide, by_state(buffer, k));
            store<VB>(bc + ((buffer * STEPS + step) * 2 + i / OF_B) * NP + col, wide);
        }
    }
    DEVICE void write(const Scan& scan, const Place& at, Mat<T> to, int buffer, int row, int steps) {
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            Piece piece(threadIdx.x % WARP + k * WARP);
            if (piece.step >= steps || piece.col >= at.width) continue;
            float out[V], in[V], gate[V];
            ::load<V>(out, y + piece.step * ROW + piece.col);
            ::load<V>(in, by_channel(buffer, 1, k));
            if (scan.z.present()) ::load<V>(gate, by_channel(buffer, 2, k));
#pragma unroll
            for (int v = 0; v < V; v++) {
                out[v] += skip[piece.col + v] * in[v];
                if (scan.z.present()) out[v] *= silu(gate[v]);
            }
            store<V>(element(to, row + piece.step, at.first + piece.col), out);
        }
    }
};

// One step: the decay of the states and what comes in.
DEVICE void advance(float* h, const float* a2, const float* b, f32x2 du) {
#pragma unroll
    for (int i = 0; i < NS; i++) {
        float e = du.x * a2[i];
        float decay = ex2(e);
#if ZOH
        float in = zoh_factor(decay, e * LN_2, du.x, a2[i] * LN_2) * du.y;
#else
        float in = du.y;
#endif
        h[i] = decay * h[i] + in * b[i];
    }
}

// Takes the states h through rows [from, to) of a segment; adds up Δ.
template <bool Output>
DEVICE float walk(const Scan& scan, const Place& at, Tile& tile, float* h, const float* a2, int from, int to, Mat<T> y,
                  Mat<float> kept, int segment) {
    float sum = 0.0f;
    int buffer = 0;
    auto steps_at = [&](int row) { return smaller(to - row, STEPS - row % STEPS); };
    __syncthreads();
    tile.load<Output>(scan, at, 0, from, steps_at(from));
    for (int row = from; row < to; row += steps_at(row), buffer ^= 1) {
        int steps = steps_at(row);
        copy_async_wait<0>();
        if (row + steps < to) tile.load<Output>(scan, at, buffer ^ 1, row + steps, steps_at(row + steps));
        tile.prepare<Output>(at, buffer, steps);
        if (Output && kept.present() && (row == from || row % CHUNK == 0)) at.store(kept.row(kept_row(row, segment)), h);
        // The only time in a tile that warps wait for each other: B and C are there.
        __syncthreads();
        const float* bc = tile.bc + buffer * STEPS * 2 * NP;
        if constexpr (TENSOR && Output) {
            for (int t = 0; t < steps; t += 8) {
                float c[4], out[2] = {};
                load<4>(c, bc + (t + threadIdx.x % WARP / 4) * 2 * NP + NP + at.s * 4);
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    float b[NS], before[NS];
                    load<NS>(b, bc + (t + j) * 2 * NP + at.s * NS);
                    advance(h, a2, b, tile.du[(t + j) * PAIR_ROW + at.c]);
#pragma unroll
                    for (int i = 0; i < NS; i++) before[i] = h[i];
                    load<NS>(b, bc + (t + j + 1) * 2 * NP + at.s * NS);
                    advance(h, a2, b, tile.du[(t + j + 1) * PAIR_ROW + at.c]);
                    contract_pair(out, before, h, c, j);
                }
                tile.y[(t + 2 * at.s) * ROW + at.c] = out[0];
                tile.y[(t + 2 * at.s + 1) * ROW + at.c] = out[1];
            }
        } else {
            for (int t = 0; t < steps; t += 4) {
                float out[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    f32x2 du = tile.du[(t + k) * PAIR_ROW + at.c];
                    float b[NS], c[NS];
                    load<NS>(b, bc + (t + k) * 2 * NP + at.s * NS);
                    advance(h, a2, b, du);
                    if (Output) {
                        load<NS>(c, bc + (t + k) * 2 * NP + NP + at.s * NS);
                        out[k] = 0.0f;
#pragma unroll
                        for (int i = 0; i < NS; i++) out[k] += c[i] * h[i];
                    } else {
                        sum += du.x;
                    }
                }
                if (!Output) continue;
                sum_lanes<4, LANES, 1>(out, at.s);
                int mine = kept_first<4, LANES>(at.s);
#pragma unroll
                for (int k = 0; k < (LANES < 4 ? 4 / LANES : 1); k++) tile.y[(t + mine + k) * ROW + at.c] = out[k];
            }
        }
        __syncwarp();
        if (Output && y.present()) tile.write(scan, at, y, buffer, row, steps);
    }
    return sum;
}

// Part blockIdx.y: y of its rows, the kept states, and the final states of the segments that end in it.
KERNEL __launch_bounds__(THREADS, 3) scan_parts(Scan scan, Mat<float> initial, Mat<T> y, Mat<float> last, Mat<float> kept, float* carry) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    int part = blockIdx.y, first = static_cast<int>(part * scan.part_rows);
    int end = smaller(first + scan.part_rows, scan.tokens);
    float a2[NS], h[NS];
    at.rates(a2, LOG2_E);
    tile.begin(scan, at);
    int covered = scan.segments > 0 ? scan.offsets[0] : end;
    clear_rows(y, first, smaller(covered, end), at);
    for (int s = first_segment(scan, first); s < scan.segments; s++) {
        Span span(scan, s);
        if (span.behind()) break;
        if (span.from == span.start) {
            const float* saved = span.stop > end ? saved_initial(carry, part, scan.channels) : initial.row(s);
            at.load(h, initial.present() ? saved : nullptr);
        } else if (span.from < span.until) {
            int begin = part_of(scan, span.start);
            for (int q = begin; q < part; q++) carry_on(h, a2, carried(carry, q, scan.channels), q == begin, at);
        }
        if (span.from < span.until) walk<true>(scan, at, tile, h, a2, span.from, span.until, y, kept, s);
        if (last.present() && span.ends(scan)) at.store(last.row(s), h);
    }
    if (scan.segments > 0) clear_rows(y, larger(scan.offsets[scan.segments], first), end, at);
}

// Part blockIdx.y: if a segment reaches over its end, the state there as far as it comes from this part.
KERNEL __launch_bounds__(THREADS, 3) end_states(Scan scan, Mat<float> initial, float* carry) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    int part = blockIdx.y, first = static_cast<int>(part * scan.part_rows), end = static_cast<int>(first + scan.part_rows);
    int s = segment_of(scan.offsets, static_cast<int>(scan.segments), end);
    if (s < 0 || scan.offsets[s] == end) return;
    float a2[NS], h[NS];
    at.rates(a2, LOG2_E);
    tile.begin(scan, at);
    int start = scan.offsets[s];
    at.load(h, start >= first && initial.present() ? initial.row(s) : nullptr);
    if (initial.present()) at.store(saved_initial(carry, part, scan.channels), h);
    float sum = walk<false>(scan, at, tile, h, a2, larger(start, first), end, Mat<T>{}, Mat<float>{}, s);
    float* to = carried(carry, part, scan.channels);
    at.store(to, h);
    if (at.s == 0 && at.c < at.width) to[N * scan.channels + at.first + at.c] = sum;
}

// Segment blockIdx.y as a whole: for many short ones, as in decoding. Nothing is staged. The final state may lie over
// the initial one: a thread reads its states before it writes them.
KERNEL __launch_bounds__(THREADS) scan_segments(Scan scan, Mat<float> initial, Mat<T> y, Mat<float> last, Mat<float> kept) {
    Place at(scan);
    float a2[NS], h[NS];
    at.rates(a2, LOG2_E);
    int s = blockIdx.y, start = scan.offsets[s], stop = scan.offsets[s + 1];
    i64 channel = at.first + at.c;
    bool real = at.c < at.width;
    at.load(h, initial.present() ? initial.row(s) : nullptr);
    float bias = real && scan.bias.present() ? scan.bias.data[channel] : 0.0f;
    float skip = real && scan.d.present() ? scan.d.data[channel] : 0.0f;
    for (int t = start; t < stop; t++) {
        if (kept.present() && (t == start || t % CHUNK == 0)) at.store(kept.row(kept_row(t, s)), h);
        float b[NS], delta = real ? to_f32(scan.dt.row(t)[channel]) + bias : 0.0f;
        float x = real ? to_f32(scan.x.row(t)[channel]) : 0.0f, out = 0.0f;
        delta = step_size(delta);
#pragma unroll
        for (int i = 0; i < NS; i++) b[i] = at.owns(i) ? to_f32(scan.b.row(t)[at.column + at.s * NS + i]) : 0.0f;
        advance(h, a2, b, f32x2{delta, ZOH ? x : delta * x});
#pragma unroll
        for (int i = 0; i < NS; i++)
            if (at.owns(i)) out += to_f32(scan.c.row(t)[at.column + at.s * NS + i]) * h[i];
        sum_lanes<1, LANES, 1>(&out, at.s);
        out += skip * x;
        if (real && scan.z.present()) out *= silu(to_f32(scan.z.row(t)[channel]));
        if (y.present() && real && at.s == 0) set(y.row(t)[channel], out);
    }
    if (last.present()) at.store(last.row(s), h);
    if (s == 0) clear_rows(y, 0, start, at);
    if (s + 1 == scan.segments) clear_rows(y, stop, static_cast<int>(scan.tokens), at);
}
