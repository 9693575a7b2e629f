// The selective scan, backward.
//
// With g the gradient of a state, e the decay, and dy' = dy · silu(z) the gradient of y before the gate:
//
//   g[t] = C[t] dy'[t] + e[t+1] g[t+1]        dB[t] = Σ_d g Δx   dC[t] = Σ_d h dy'   dA = Σ_t g e h[t-1] Δ
//   dx[t] = Δ Σ_n g B + D dy'                 dΔ[t] = x Σ_n g B + Σ_n g e h[t-1] A
//   dz[t] = dy silu'(z) (Σ_n C h + D x)       d dt = dΔ σ(dt + bias)
//
// A block walks back through a part of the rows, chunk by chunk: the states at every SUBth step are computed from the
// kept state at the chunk's start, and from there, SUB steps at a time, all states and decays, in registers. What is a
// sum over states is formed for four steps together; what is a sum over channels is added up over the lanes of a warp,
// the warps of a block and, by `add_channels`, over the blocks, in this order. Sums over time stay in registers; each
// part writes its own, and `add_time` adds them.
//
// A segment that reaches over the start of a part leaves its gradient there behind (`start_grads`), as in the forward
// pass.
//
// Further macros: SUB steps whose states are in registers.

#define SUBS (CHUNK / SUB)

struct Gradients {
    Mat<T> dy;
    Mat<float> dlast, kept;
    Mat<T> dx, ddt, dz;
    Mat<float> dinitial;
};

struct Tile {
    f32x2* du;      // Δ and Δx (x for the zero-order hold) [CHUNK, CB]
    float* x;       // [CHUNK, CB] each; x becomes dx, gate becomes dz, Δ becomes d dt
    float* dy;      // before the gate
    float* gate;    // dy silu'(z)
    float* bc;      // B and C [CHUNK, 2, NP]
    float* states;  // at the start of every SUBth step [SUBS, THREADS, NS]
    float* sums;    // of dB and dC over the channels of a warp [2, WARPS, SUB, 2, NP]
    float *bias, *skip;

    DEVICE explicit Tile(unsigned char* memory) {
        float* next = reinterpret_cast<float*>(memory);
        auto take = [&](int count) {
            float* p = next;
            next += (count + 3) / 4 * 4;
            return p;
        };
        du = reinterpret_cast<f32x2*>(take(2 * CHUNK * CB));
        x = take(CHUNK * CB);
        dy = take(CHUNK * CB);
        gate = take(CHUNK * CB);
        states = take(SUBS * THREADS * NS);
        sums = take(2 * WARPS * SUB * 2 * NP);
        bias = take(CB);
        skip = take(CB);
#if STAGED
        bc = take(CHUNK * 2 * NP);
#endif
    }
    DEVICE void load_vectors(const Scan& scan, const Place& at) {
        for (int i = threadIdx.x; i < CB; i += THREADS) {
            bool real = i < at.width;
            bias[i] = real && scan.bias.present() ? scan.bias.data[at.first + i] : 0.0f;
            skip[i] = real && scan.d.present() ? scan.d.data[at.first + i] : 0.0f;
        }
    }
    // Steps behind the last have Δ = 0, no input and no gradient.
    DEVICE void prepare(const Scan& scan, Mat<T> from, const Place& at, i64 row, int steps) {
        for (int i = threadIdx.x; i < CHUNK * (CB / V); i += THREADS) {
            int step = i / (CB / V), col = i % (CB / V) * V, to = step * CB + col;
            float pair[2 * V] = {}, in[V] = {}, d[V] = {}, slope[V] = {};
            if (step < steps && col < at.width) {
                float raw[V], z[V];
                load<V>(raw, scan.dt.row(row + step) + at.first + col);
                load<V>(in, scan.x.row(row + step) + at.first + col);
                if (from.present()) load<V>(d, from.row(row + step) + at.first + col);
                if (scan.z.present()) load<V>(z, scan.z.row(row + step) + at.first + col);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float delta = raw[v] + bias[col + v];
                    if (SOFTPLUS) delta = softplus(delta);
                    pair[2 * v] = delta, pair[2 * v + 1] = ZOH ? in[v] : delta * in[v];
                    if (!scan.z.present()) continue;
                    float p = sigmoid(z[v]);
                    slope[v] = d[v] * p * (1.0f + z[v] * (1.0f - p));
                    d[v] *= z[v] * p;
                }
            }
            store<2 * V>(&du[to].x, pair);
            store<V>(x + to, in);
            store<V>(dy + to, d);
            store<V>(gate + to, slope);
        }
#if STAGED
        for (int i = threadIdx.x; i < CHUNK * NP; i += THREADS) {
            int step = i / NP, n = i % NP;
            bool real = step < steps && n < N;
            bc[step * 2 * NP + n] = real ? to_f32(scan.b.row(row + step)[at.column + n]) : 0.0f;
            bc[step * 2 * NP + NP + n] = real ? to_f32(scan.c.row(row + step)[at.column + n]) : 0.0f;
        }
#endif
    }
    // B (which = 0) or C (1) of the thread's states at a step.
    DEVICE void coefficients(float* to, const Scan& scan, const Place& at, int which, i64 row, int step, int steps) const {
#if STAGED
        load<NS>(to, bc + (step * 2 + which) * NP + at.s * NS);
#else
        const T* from = step < steps ? (which ? scan.c : scan.b).row(row + step) + at.column + at.s * NS : nullptr;
#pragma unroll
        for (int i = 0; i < NS; i++) to[i] = from != nullptr && at.s * NS + i < N ? to_f32(from[i]) : 0.0f;
#endif
    }
    DEVICE void write(const Scan& scan, const Gradients& to, const Place& at, i64 row, int steps) const {
        for (int i = threadIdx.x; i < CHUNK * (CB / V); i += THREADS) {
            int step = i / (CB / V), col = i % (CB / V) * V, from = step * CB + col;
            if (step >= steps || col >= at.width) continue;
            float v[V];
            load<V>(v, x + from);
            if (to.dx.present()) store<V>(to.dx.row(row + step) + at.first + col, v);
            load<V>(v, gate + from);
            if (to.dz.present()) store<V>(to.dz.row(row + step) + at.first + col, v);
#pragma unroll
            for (int k = 0; k < V; k++) v[k] = du[from + k].x;
            if (to.ddt.present()) store<V>(to.ddt.row(row + step) + at.first + col, v);
        }
    }
};

// The decay of the states at a step and the states after it.
DEVICE void advance(float* h, float* decay, const float* a2, const float* b, f32x2 du) {
#pragma unroll
    for (int i = 0; i < NS; i++) {
        float e = du.x * a2[i];
        decay[i] = ex2(e);
#if ZOH
        float in = zoh_factor(decay[i], e * LN_2, du.x, a2[i] * LN_2) * du.y;
#else
        float in = du.y;
#endif
        h[i] = decay[i] * h[i] + in * b[i];
    }
}

// What a thread adds up over time, beside what it carries.
struct Walk {
    float a2[NS], g[NS], da[NS];
    float dd, dbias;
};

// SUB steps back from step `first` on: gradients of the elements go into the tile, sums over the warp's channels into
// `sums`.
DEVICE void back(const Scan& scan, const Place& at, Tile& tile, Walk& w, const float* start, float* sums, i64 row, int first, int steps) {
    float h[SUB + 1][NS], decay[SUB][NS];
#pragma unroll
    for (int i = 0; i < NS; i++) h[0][i] = start[i];
#pragma unroll
    for (int k = 0; k < SUB; k++) {
        float b[NS];
        tile.coefficients(b, scan, at, 0, row, first + k, steps);
#pragma unroll
        for (int i = 0; i < NS; i++) h[k + 1][i] = h[k][i];
        advance(h[k + 1], decay[k], w.a2, b, tile.du[(first + k) * CB + at.c]);
    }
#pragma unroll
    for (int four = SUB - 4; four >= 0; four -= 4) {
        float y[4], by_b[4], by_a[4];
#pragma unroll
        for (int k = four + 3; k >= four; k--) {
            int step = first + k;
            f32x2 du = tile.du[step * CB + at.c];
            float b[NS], c[NS], both[2 * NS], dy = tile.dy[step * CB + at.c];
            tile.coefficients(b, scan, at, 0, row, step, steps);
            tile.coefficients(c, scan, at, 1, row, step, steps);
            float sum_y = 0.0f, sum_b = 0.0f, sum_a = 0.0f;
#pragma unroll
            for (int i = 0; i < NS; i++) {
                float g = w.g[i] + c[i] * dy, through = g * decay[k][i];
                sum_y += c[i] * h[k + 1][i];
                both[NS + i] = h[k + 1][i] * dy;
#if ZOH
                float a = w.a2[i] * LN_2, u = du.x * a, factor = zoh_factor(decay[k][i], u, du.x, a);
                both[i] = g * factor * du.y;
                sum_b += g * factor * b[i];
                sum_a += through * (h[k][i] * w.a2[i] + du.y * LOG2_E * b[i]);
                w.da[i] += through * h[k][i] * du.x + g * b[i] * du.y * zoh_slope(decay[k][i], u, du.x, a);
#else
                both[i] = g * du.y;
                sum_b += g * b[i];
                float by_decay = through * h[k][i];
                sum_a += by_decay * w.a2[i];
                w.da[i] += by_decay * du.x;
#endif
                w.g[i] = through;
            }
            y[k - four] = sum_y, by_b[k - four] = sum_b, by_a[k - four] = sum_a;
            // Over the channels of the warp; each lane keeps some.
            constexpr int kept = 2 * NS > CH ? 2 * NS / CH : 1;
            int lane = at.c % CH;
            sum_lanes<2 * NS, CH, 1>(both, lane);
            int mine = kept_first<2 * NS, CH>(lane);
#pragma unroll
            for (int i = 0; i < kept; i++) {
                int which = (mine + i) / NS, n = at.s * NS + (mine + i) % NS;
                sums[(k * 2 + which) * NP + n] = both[i];
            }
        }
        sum_lanes<4, LANES, CH>(y, at.s);
        sum_lanes<4, LANES, CH>(by_b, at.s);
        sum_lanes<4, LANES, CH>(by_a, at.s);
        int mine = first + four + kept_first<4, LANES>(at.s);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < (LANES < 4 ? 4 / LANES : 1); k++) {
            int here = (mine + k) * CB + at.c;
            // Where there are more lanes than steps, the first of them writes.
            if (LANES > 4 && at.s >= 4) continue;
            f32x2 du = tile.du[here];
            float x = tile.x[here], dy = tile.dy[here], skip = tile.skip[at.c];
            float ddt = LN_2 * by_a[k];
            if (!ZOH) ddt += x * by_b[k];
            if (SOFTPLUS) ddt *= -exp_m1(-du.x, ex2(-LOG2_E * du.x));
            w.dd += x * dy;
            // Steps behind the last have a Δ of 0, not its gradient.
            if (mine + k < steps) w.dbias += ddt;
            tile.x[here] = (ZOH ? by_b[k] : du.x * by_b[k]) + skip * dy;
            tile.gate[here] *= y[k] + skip * x;
            tile.du[here].x = ddt;
        }
        __syncwarp();
    }
}

// Rows [row, row + steps) of a segment, which lie in one chunk, and their parts of dB and dC.
DEVICE void back_through_chunk(const Scan& scan, const Gradients& gradients, const Place& at, Tile& tile, Walk& w, i64 row,
                               int steps, i64 segment, float* parts) {
    __syncthreads();
    tile.prepare(scan, gradients.dy, at, row, steps);
    float h[NS];
    at.load(h, gradients.kept.row(kept_row(row, segment)));
    __syncthreads();
    int subs = (steps + SUB - 1) / SUB;
    for (int sub = 0; sub + 1 < subs; sub++) {
        store<NS>(tile.states + (sub * THREADS + threadIdx.x) * NS, h);
#pragma unroll
        for (int k = 0; k < SUB; k++) {
            float b[NS], decay[NS];
            tile.coefficients(b, scan, at, 0, row, sub * SUB + k, steps);
            advance(h, decay, w.a2, b, tile.du[(sub * SUB + k) * CB + at.c]);
        }
    }
    for (int sub = subs - 1; sub >= 0; sub--) {
        if (sub + 1 < subs) load<NS>(h, tile.states + (sub * THREADS + threadIdx.x) * NS);
        float* sums = tile.sums + (sub % 2) * WARPS * SUB * 2 * NP;
        back(scan, at, tile, w, h, sums + threadIdx.x / WARP * SUB * 2 * NP, row, sub * SUB, steps);
        __syncthreads();
        for (int i = threadIdx.x; parts != nullptr && i < SUB * 2 * N; i += THREADS) {
            int k = i / (2 * N), which = i / N % 2, n = i % N;
            if (sub * SUB + k >= steps) continue;
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) sum += sums[((warp * SUB + k) * 2 + which) * NP + n];
            parts[(row + sub * SUB + k) * 2 * N + i % (2 * N)] = sum;
        }
    }
    tile.write(scan, gradients, at, row, steps);
}

// Part blockIdx.y. `channel_parts` [blocks, tokens, 2, N] takes the sums for dB and dC over the block's channels,
// `time_parts` [parts, N + 2, channels] those for dA, dD and the bias over the part's rows.
KERNEL __launch_bounds__(THREADS) scan_parts_grad(Scan scan, Gradients to, float* carry, float* channel_parts, float* time_parts) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    i64 part = blockIdx.y, first = part * scan.part_rows, end = smaller(first + scan.part_rows, scan.tokens);
    float* parts = channel_parts == nullptr ? nullptr : channel_parts + blockIdx.x * scan.tokens * 2 * N;
    Walk w = {};
    at.rates(w.a2, scan, LOG2_E);
    tile.load_vectors(scan, at);
    i64 covered = scan.segments > 0 ? scan.offsets[0] : scan.tokens;
    i64 behind = scan.segments > 0 ? scan.offsets[scan.segments] : scan.tokens;
    for (int side = 0; side < 2; side++) {
        i64 from = side == 0 ? first : larger(behind, first), until = side == 0 ? smaller(covered, end) : end;
        clear_rows(to.dx, from, until, at);
        clear_rows(to.ddt, from, until, at);
        clear_rows(to.dz, from, until, at);
        for (i64 i = threadIdx.x; parts != nullptr && i < (until - from) * 2 * N; i += THREADS) parts[from * 2 * N + i] = 0.0f;
    }
    for (i64 s = first_segment(scan, first); s < scan.segments; s++) {
        i64 start = scan.offsets[s], stop = scan.offsets[s + 1];
        if (start >= end && part + 1 < gridDim.y) break;
        i64 from = larger(start, first), until = smaller(stop, end);
        bool begins = start == stop ? owns_empty(scan, start, part) : from < until && from == start;
        if (stop <= end) {
            at.load(w.g, to.dlast.present() ? to.dlast.row(s) : nullptr);
        } else if (from < until) {
            i64 last = (stop - 1) / scan.part_rows;
            for (i64 q = last; q > part; q--) carry_on(w.g, w.a2, carried(carry, q, scan.channels), q == last, at);
        }
        while (from < until) {
            i64 row = larger(from, (until - 1) / CHUNK * CHUNK);
            back_through_chunk(scan, to, at, tile, w, row, static_cast<int>(until - row), s, parts);
            until = row;
        }
        if (begins && to.dinitial.present()) at.store(to.dinitial.row(s), w.g);
    }
    if (time_parts == nullptr) return;
    float* sums = time_parts + part * (N + 2) * scan.channels;
    at.store(sums, w.da);
    // A channel's lanes have summed different steps.
    sum_lanes<1, LANES, CH>(&w.dd, at.s);
    sum_lanes<1, LANES, CH>(&w.dbias, at.s);
    if (at.s == 0 && at.c < at.width) {
        sums[N * scan.channels + at.first + at.c] = w.dd;
        sums[(N + 1) * scan.channels + at.first + at.c] = w.dbias;
    }
}

// Part blockIdx.y + 1: if a segment reaches over its start, the gradient of the state there as far as it comes from this part.
KERNEL __launch_bounds__(THREADS) start_grads(Scan scan, Mat<T> dy, Mat<float> dlast, float* carry) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    i64 part = blockIdx.y + 1, first = part * scan.part_rows, end = smaller(first + scan.part_rows, scan.tokens);
    int s = segment_of(scan.offsets, static_cast<int>(scan.segments), first);
    if (s < 0 || scan.offsets[s] == first) return;
    i64 stop = scan.offsets[s + 1], until = smaller(stop, end);
    float a2[NS], g[NS], sum = 0.0f;
    at.rates(a2, scan, LOG2_E);
    tile.load_vectors(scan, at);
    at.load(g, stop <= end && dlast.present() ? dlast.row(s) : nullptr);
    while (first < until) {
        i64 row = (until - 1) / CHUNK * CHUNK;
        int steps = static_cast<int>(until - row);
        __syncthreads();
        tile.prepare(scan, dy, at, row, steps);
        __syncthreads();
        for (int step = steps - 1; step >= 0; step--) {
            f32x2 du = tile.du[step * CB + at.c];
            float c[NS], d = tile.dy[step * CB + at.c];
            tile.coefficients(c, scan, at, 1, row, step, steps);
#pragma unroll
            for (int i = 0; i < NS; i++) g[i] = ex2(du.x * a2[i]) * (g[i] + c[i] * d);
            sum += du.x;
        }
        until = row;
    }
    float* to = carried(carry, part, scan.channels);
    at.store(to, g);
    if (at.s == 0 && at.c < at.width) to[N * scan.channels + at.first + at.c] = sum;
}

// dB and dC [tokens, groups · N]: the sums over the blocks of a group, in order. A thread has one element.
KERNEL __launch_bounds__(256) add_channels(const float* parts, Mat<T> db, Mat<T> dc, i64 tokens, i64 group_blocks) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, group = blockIdx.y;
    if (i >= tokens * 2 * N) return;
    const float* from = parts + group * group_blocks * tokens * 2 * N + i;
    float sum = 0.0f;
    for (i64 k = 0; k < group_blocks; k++) sum += from[k * tokens * 2 * N];
    i64 row = i / (2 * N), which = i / N % 2, n = i % N;
    Mat<T> to = which ? dc : db;
    if (to.present()) set(to.row(row)[group * N + n], sum);
}

// dA [channels, N], dD and d bias [1, channels]: the sums over the parts, in order. A thread has one element.
KERNEL __launch_bounds__(256) add_time(const float* time_parts, Mat<float> da, Mat<float> dd, Mat<float> dbias, i64 parts, i64 channels) {
    i64 channel = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, n = blockIdx.y;
    if (channel >= channels) return;
    float sum = 0.0f;
    for (i64 p = 0; p < parts; p++) sum += time_parts[(p * (N + 2) + n) * channels + channel];
    if (n < N) {
        if (da.present()) da.row(channel)[n] = sum;
    } else {
        Mat<float> to = n == N ? dd : dbias;
        if (to.present()) to.data[channel] = sum;
    }
}
