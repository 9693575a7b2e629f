// The selective scan, forward.
//
// A block stages a tile of dt, x, z, B and C in shared memory while it works on the tile before; Δ, Δx and the gate are
// computed once an element, and what remains a state and step is the decay (one exponential) and three multiply-adds.
// Sums over a channel's lanes are formed for several steps together, by tensor cores where activations are bf16.
//
// The pack's rows are cut into parts so that there are blocks enough. A segment that reaches over the end of a part
// leaves that part's own end state behind (`end_states`); `scan_parts` makes its start state of them. Where parts end
// with segments, `end_states` has nothing to do.

// A tile of raw operands, two of them in turn, and what is computed of it.
struct Tile {
    T* raw;     // dt, x, z [STEPS, CB], B, C [STEPS, N]; twice
    f32x2* du;  // Δ and Δx (x for the zero-order hold) [STEPS, CB]
    float* bc;  // B and C [STEPS, 2, NP]
    float* y;   // Σ C h [STEPS, CB]
    float *bias, *skip;

    DEVICE explicit Tile(unsigned char* memory) {
        auto take = [&](i64 bytes) {
            unsigned char* p = memory;
            memory += (bytes + 15) / 16 * 16;
            return p;
        };
        du = reinterpret_cast<f32x2*>(take(sizeof(f32x2) * STEPS * CB));
        bc = reinterpret_cast<float*>(take(4 * STEPS * 2 * NP));
        y = reinterpret_cast<float*>(take(4 * STEPS * CB));
        bias = reinterpret_cast<float*>(take(4 * CB));
        skip = reinterpret_cast<float*>(take(4 * CB));
        raw = reinterpret_cast<T*>(memory);
    }
    static constexpr int PIECES = STEPS * (CB / V);
    static constexpr int BY_CHANNEL = (STEPS * CB + 7) / 8 * 8, BY_STATE = (STEPS * N + 7) / 8 * 8;
    DEVICE T* dt(int buffer) const { return raw + buffer * (3 * BY_CHANNEL + 2 * BY_STATE); }
    DEVICE T* x(int buffer) const { return dt(buffer) + BY_CHANNEL; }
    DEVICE T* z(int buffer) const { return dt(buffer) + 2 * BY_CHANNEL; }
    DEVICE T* b(int buffer) const { return dt(buffer) + 3 * BY_CHANNEL; }
    DEVICE T* c(int buffer) const { return b(buffer) + BY_STATE; }
    DEVICE void load_vectors(const Scan& scan, const Place& at) {
        for (int i = threadIdx.x; i < CB; i += THREADS) {
            bool real = i < at.width;
            bias[i] = real && scan.bias.present() ? scan.bias.data[at.first + i] : 0.0f;
            skip[i] = real && scan.d.present() ? scan.d.data[at.first + i] : 0.0f;
        }
    }
    // Starts the copies of rows [row, row + steps).
    template <bool Output>
    DEVICE void load(const Scan& scan, const Place& at, int buffer, int row, int steps) {
#pragma unroll
        for (int i = threadIdx.x, k = 0; k < PIECES; i += THREADS, k += THREADS) {
            int step = i / (CB / V), col = i % (CB / V) * V;
            if (PIECES % THREADS != 0 && i >= PIECES) break;
            if (step >= steps || col >= at.width) continue;
            stage<V>(dt(buffer) + step * CB + col, element(scan.dt, row + step, at.first + col));
            stage<V>(x(buffer) + step * CB + col, element(scan.x, row + step, at.first + col));
            if (Output && scan.z.present()) stage<V>(z(buffer) + step * CB + col, element(scan.z, row + step, at.first + col));
        }
#pragma unroll 2
        for (int i = threadIdx.x; i < STEPS * (N / VB); i += THREADS) {
            int step = i / (N / VB), col = i % (N / VB) * VB;
            if (step >= steps) continue;
            stage<VB>(b(buffer) + step * N + col, element(scan.b, row + step, at.column + col));
            if (Output) stage<VB>(c(buffer) + step * N + col, element(scan.c, row + step, at.column + col));
        }
        copy_async_commit();
    }
    // Steps behind the last have Δ = 0 and no input: they change no state.
    template <bool Output>
    DEVICE void prepare(const Place& at, int buffer, int steps) {
#pragma unroll
        for (int i = threadIdx.x, k = 0; k < PIECES; i += THREADS, k += THREADS) {
            int step = i / (CB / V), col = i % (CB / V) * V;
            if (PIECES % THREADS != 0 && i >= PIECES) break;
            float raw[V], in[V], out[2 * V];
            ::load<V>(raw, dt(buffer) + step * CB + col);
            ::load<V>(in, x(buffer) + step * CB + col);
            bool real = step < steps && col < at.width;
#pragma unroll
            for (int v = 0; v < V; v++) {
                float delta = step_size(raw[v] + bias[col + v]);
                out[2 * v] = real ? delta : 0.0f;
                out[2 * v + 1] = real ? (ZOH ? in[v] : delta * in[v]) : 0.0f;
            }
            store<2 * V>(&du[step * CB + col].x, out);
        }
#pragma unroll 2
        for (int i = threadIdx.x; i < STEPS * (NP / WIDE); i += THREADS) {
            int step = i / (NP / WIDE), n = i % (NP / WIDE) * WIDE;
            float wide_b[WIDE] = {}, wide_c[WIDE] = {};
            if (step < steps && n < N) {
                ::load<WIDE>(wide_b, b(buffer) + step * N + n);
                if (Output) ::load<WIDE>(wide_c, c(buffer) + step * N + n);
            }
            store<WIDE>(bc + step * 2 * NP + n, wide_b);
            if (Output) store<WIDE>(bc + step * 2 * NP + NP + n, wide_c);
        }
    }
    DEVICE void write(const Scan& scan, const Place& at, Mat<T> to, int buffer, int row, int steps) {
#pragma unroll
        for (int i = threadIdx.x, k = 0; k < PIECES; i += THREADS, k += THREADS) {
            int step = i / (CB / V), col = i % (CB / V) * V;
            if (PIECES % THREADS != 0 && i >= PIECES) break;
            if (step >= steps || col >= at.width) continue;
            float out[V], in[V], gate[V];
            ::load<V>(in, x(buffer) + step * CB + col);
            if (scan.z.present()) ::load<V>(gate, z(buffer) + step * CB + col);
#pragma unroll
            for (int v = 0; v < V; v++) {
                out[v] = y[step * CB + col + v] + skip[col + v] * in[v];
                if (scan.z.present()) out[v] *= silu(gate[v]);
            }
            store<V>(element(to, row + step, at.first + col), out);
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
        __syncthreads();
        if (row + steps < to) tile.load<Output>(scan, at, buffer ^ 1, row + steps, steps_at(row + steps));
        tile.prepare<Output>(at, buffer, steps);
        if (Output && kept.present() && (row == from || row % CHUNK == 0)) at.store(kept.row(kept_row(row, segment)), h);
        __syncthreads();
        if constexpr (TENSOR && Output) {
            for (int t = 0; t < steps; t += 8) {
                float c[4], out[2] = {};
                load<4>(c, tile.bc + (t + threadIdx.x % WARP / 4) * 2 * NP + NP + at.s * 4);
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    float b[NS], before[NS];
                    load<NS>(b, tile.bc + (t + j) * 2 * NP + at.s * NS);
                    advance(h, a2, b, tile.du[(t + j) * CB + at.c]);
#pragma unroll
                    for (int i = 0; i < NS; i++) before[i] = h[i];
                    load<NS>(b, tile.bc + (t + j + 1) * 2 * NP + at.s * NS);
                    advance(h, a2, b, tile.du[(t + j + 1) * CB + at.c]);
                    contract_pair(out, before, h, c, j);
                }
                tile.y[(t + 2 * at.s) * CB + at.c] = out[0];
                tile.y[(t + 2 * at.s + 1) * CB + at.c] = out[1];
            }
        } else {
            for (int t = 0; t < steps; t += 4) {
                float out[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    f32x2 du = tile.du[(t + k) * CB + at.c];
                    float b[NS], c[NS];
                    load<NS>(b, tile.bc + (t + k) * 2 * NP + at.s * NS);
                    advance(h, a2, b, du);
                    if (Output) {
                        load<NS>(c, tile.bc + (t + k) * 2 * NP + NP + at.s * NS);
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
                for (int k = 0; k < (LANES < 4 ? 4 / LANES : 1); k++) tile.y[(t + mine + k) * CB + at.c] = out[k];
            }
        }
        if (Output) {
            __syncthreads();
            if (y.present()) tile.write(scan, at, y, buffer, row, steps);
        }
    }
    return sum;
}

// Part blockIdx.y: y of its rows, the kept states, and the final states of the segments that end in it.
KERNEL __launch_bounds__(THREADS) scan_parts(Scan scan, Mat<float> initial, Mat<T> y, Mat<float> last, Mat<float> kept, float* carry) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    int part = blockIdx.y, first = static_cast<int>(part * scan.part_rows);
    int end = smaller(first + scan.part_rows, scan.tokens);
    float a2[NS], h[NS];
    at.rates(a2, LOG2_E);
    tile.load_vectors(scan, at);
    int covered = scan.segments > 0 ? scan.offsets[0] : end;
    clear_rows(y, first, smaller(covered, end), at);
    for (int s = first_segment(scan, first); s < scan.segments; s++) {
        int start = scan.offsets[s], stop = scan.offsets[s + 1];
        if (start >= end && part + 1 < gridDim.y) break;
        int from = larger(start, first), to = smaller(stop, end);
        bool whole = start == stop ? owns_empty(scan, start, part) : from < to && to == stop;
        if (from == start) {
            const float* saved = stop > end ? saved_initial(carry, part, scan.channels) : initial.row(s);
            at.load(h, initial.present() ? saved : nullptr);
        } else if (from < to) {
            int begin = part_of(scan, start);
            for (int q = begin; q < part; q++) carry_on(h, a2, carried(carry, q, scan.channels), q == begin, at);
        }
        if (from < to) walk<true>(scan, at, tile, h, a2, from, to, y, kept, s);
        if (whole && last.present()) at.store(last.row(s), h);
    }
    if (scan.segments > 0) clear_rows(y, larger(scan.offsets[scan.segments], first), end, at);
}

// Part blockIdx.y: if a segment reaches over its end, the state there as far as it comes from this part.
KERNEL __launch_bounds__(THREADS) end_states(Scan scan, Mat<float> initial, float* carry) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    int part = blockIdx.y, first = static_cast<int>(part * scan.part_rows), end = static_cast<int>(first + scan.part_rows);
    int s = segment_of(scan.offsets, static_cast<int>(scan.segments), end);
    if (s < 0 || scan.offsets[s] == end) return;
    float a2[NS], h[NS];
    at.rates(a2, LOG2_E);
    tile.load_vectors(scan, at);
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
