// The selective scan, backward.
//
// With g the gradient of a state, e the decay, and dy' = dy · silu(z) the gradient of y before the gate:
//
//   g[t] = C[t] dy'[t] + e[t+1] g[t+1]        dB[t] = Σ_d g Δx   dC[t] = Σ_d h dy'   dA = Σ_t g e h[t-1] Δ
//   dx[t] = Δ Σ_n g B + D dy'                 dΔ[t] = x Σ_n g B + Σ_n g e h[t-1] A
//   dz[t] = dy silu'(z) (Σ_n C h + D x)       d dt = dΔ σ(dt + bias)
//
// A block walks back through a part of the rows, chunk by chunk: the states at every SUBth step are computed from the
// kept state at the chunk's start, and from there, SUB steps at a time, all states and decays, in registers. Sums over
// states are formed for several steps together; sums over channels are added up over the lanes of a warp, the warps of a
// block and, by `add_channels`, over the blocks, in this order. Sums over time stay in registers; each
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
    f32x2* du;      // Δ and Δx (x for the zero-order hold) [CHUNK, PAIR_ROW]
    float* x;       // [CHUNK, ROW] each; x becomes dx, gate becomes dz, Δ becomes d dt
    float* dy;      // before the gate
    float* gate;    // dy silu'(z)
    float* bc;      // B and C [CHUNK, 2, NP]
    float* states;  // at the start of every SUBth step but the last [SUBS - 1, THREADS, NS]
    float* sums;    // of dB and dC over the channels of a warp [2, WARPS, SUB, 2, NP]
    float *bias, *skip;

    DEVICE explicit Tile(unsigned char* memory) {
        float* next = reinterpret_cast<float*>(memory);
        auto take = [&](int count) {
            float* p = next;
            next += (count + 3) / 4 * 4;
            return p;
        };
        du = reinterpret_cast<f32x2*>(take(2 * CHUNK * PAIR_ROW));
        x = take(CHUNK * ROW);
        dy = take(CHUNK * ROW);
        gate = take(CHUNK * ROW);
        states = take((SUBS - 1) * THREADS * NS);
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
    // Steps behind the last have Δ = 0, no input and no gradient. The loads of some pieces come before the first is used.
    // For `start_grads` only Δ and dy' are needed.
    template <bool All>
    DEVICE void prepare(const Scan& scan, Mat<T> from, const Place& at, int row, int steps) {
        constexpr int pieces = Piece::of(CHUNK), batch = 2;
        for (int first = threadIdx.x % WARP; first < pieces; first += batch * WARP) {
            float raw[batch][V] = {}, in[batch][V] = {}, d[batch][V] = {}, z[batch][V] = {};
#pragma unroll
            for (int k = 0; k < batch; k++) {
                Piece piece(first + k * WARP);
                if (piece.step >= steps || piece.col >= at.width) continue;
                int step = row + piece.step, col = at.first + piece.col;
                load<V>(raw[k], element(scan.dt, step, col));
                if (All) load<V>(in[k], element(scan.x, step, col));
                if (from.present()) load<V>(d[k], element(from, step, col));
                if (scan.z.present()) load<V>(z[k], element(scan.z, step, col));
            }
#pragma unroll
            for (int k = 0; k < batch; k++) {
                Piece piece(first + k * WARP);
                if (pieces % (batch * WARP) != 0 && piece.step >= CHUNK) break;
                bool real = piece.step < steps && piece.col < at.width;
                int to = piece.step * ROW + piece.col;
                float pair[2 * V], slope[V] = {};
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float delta = step_size(raw[k][v] + bias[piece.col + v]);
                    pair[2 * v] = real ? delta : 0.0f;
                    pair[2 * v + 1] = ZOH ? in[k][v] : pair[2 * v] * in[k][v];
                    if (!scan.z.present()) continue;
                    float p = sigmoid(z[k][v]);
                    if (All) slope[v] = d[k][v] * p * (1.0f + z[k][v] * (1.0f - p));
                    d[k][v] *= z[k][v] * p;
                }
                store<2 * V>(&du[piece.step * PAIR_ROW + piece.col].x, pair);
                store<V>(dy + to, d[k]);
                if (!All) continue;
                store<V>(x + to, in[k]);
                store<V>(gate + to, slope);
            }
        }
#if STAGED
#pragma unroll 4
        for (int i = threadIdx.x; i < CHUNK * (NP / WIDE); i += THREADS) {
            int step = i / (NP / WIDE), n = i % (NP / WIDE) * WIDE;
            float wide_b[WIDE] = {}, wide_c[WIDE] = {};
            if (step < steps && n < N) {
                if (All) load<WIDE>(wide_b, element(scan.b, row + step, at.column + n));
                load<WIDE>(wide_c, element(scan.c, row + step, at.column + n));
            }
            if (All) store<WIDE>(bc + step * 2 * NP + n, wide_b);
            store<WIDE>(bc + step * 2 * NP + NP + n, wide_c);
        }
#endif
    }
    // Rows that are needed next come into the level-2 cache.
    DEVICE void prefetch_rows(const Scan& scan, Mat<T> from, const Place& at, int row, int steps) const {
        for (int i = threadIdx.x % WARP; i < Piece::of(steps); i += WARP) {
            Piece piece(i);
            if (piece.col >= at.width) continue;
            int step = row + piece.step, col = at.first + piece.col;
            prefetch(element(scan.dt, step, col));
            prefetch(element(scan.x, step, col));
            if (from.present()) prefetch(element(from, step, col));
            if (scan.z.present()) prefetch(element(scan.z, step, col));
        }
    }
    // B (which = 0) or C (1) of the thread's states at a step.
    DEVICE void coefficients(float* to, const Scan& scan, const Place& at, int which, int row, int step, int steps) const {
#if STAGED
        load<NS>(to, bc + (step * 2 + which) * NP + at.s * NS);
#else
        const T* from = step < steps ? element(which ? scan.c : scan.b, row + step, at.column + at.s * NS) : nullptr;
#pragma unroll
        for (int i = 0; i < NS; i++) to[i] = from != nullptr && at.s * NS + i < N ? to_f32(from[i]) : 0.0f;
#endif
    }
    DEVICE void write(const Scan& scan, const Gradients& to, const Place& at, int row, int steps) const {
        for (int i = threadIdx.x % WARP; i < Piece::of(CHUNK); i += WARP) {
            Piece piece(i);
            if (piece.step >= steps || piece.col >= at.width) continue;
            int from = piece.step * ROW + piece.col, step = row + piece.step, col = at.first + piece.col;
            float v[V];
            load<V>(v, x + from);
            if (to.dx.present()) store<V>(element(to.dx, step, col), v);
            load<V>(v, gate + from);
            if (to.dz.present()) store<V>(element(to.dz, step, col), v);
#pragma unroll
            for (int k = 0; k < V; k++) v[k] = du[piece.step * PAIR_ROW + piece.col + k].x;
            if (to.ddt.present()) store<V>(element(to.ddt, step, col), v);
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

// One step back: from the states before and after it to what its element needs.
struct Step {
    float db[NS], dc[NS];
    float y, by_b, by_a;

    DEVICE Step(Walk& w, const float* before, const float* after, const float* decay, const float* b, const float* c, f32x2 du, float dy) {
        y = by_b = by_a = 0.0f;
#pragma unroll
        for (int i = 0; i < NS; i++) {
            float g = w.g[i] + c[i] * dy, through = g * decay[i], by_decay = through * before[i];
            float in = g;
            by_a += by_decay * w.a2[i];
            w.da[i] += by_decay * du.x;
#if ZOH
            float a = w.a2[i] * LN_2, u = du.x * a;
            in = g * zoh_factor(decay[i], u, du.x, a);
            by_a += through * (du.y * LOG2_E * b[i]);
            w.da[i] += g * b[i] * du.y * zoh_slope(decay[i], u, du.x, a);
#endif
            db[i] = in * du.y;
            dc[i] = after[i] * dy;
            y += c[i] * after[i];
            by_b += in * b[i];
            w.g[i] = through;
        }
    }
};

// What is left to do for the element of a step: its gradients go into the tile.
DEVICE void finish(const Place& at, Tile& tile, Walk& w, int step, int steps, float y, float by_b, float by_a) {
    int here = step * ROW + at.c;
    f32x2 du = tile.du[step * PAIR_ROW + at.c];
    float x = tile.x[here], dy = tile.dy[here], skip = tile.skip[at.c];
    float ddt = LN_2 * by_a;
    if (!ZOH) ddt += x * by_b;
    if (SOFTPLUS) ddt *= slope_of_step_size(du.x);
    w.dd += x * dy;
    // Steps behind the last have a Δ of 0, not its gradient.
    if (step < steps) w.dbias += ddt;
    tile.x[here] = (ZOH ? by_b : du.x * by_b) + skip * dy;
    tile.gate[here] *= y + skip * x;
    tile.du[step * PAIR_ROW + at.c].x = ddt;
}

// Values of dB and dC of a thread, in whole matrices of four.
#define BOTH ((2 * NS + 3) / 4 * 4)

// Where the sum of dB (which = 0) or dC (1) for state n at a step stands among those of a warp. Lanes that write the sums
// of four steps meet different banks.
DEVICE int sum_at(int step, int which, int n) {
    int at = which * NP + n;
    if constexpr (NP == 16) at ^= step % 4 * 8;
    return step * 2 * NP + at;
}
// Writes `Count` of the 2 NS sums of dB and dC that belong to the thread's states, from number `first` on.
template <int Count>
DEVICE void write_sums(float* to, const float* v, int first, int step, const Place& at) {
    float* begin = to + sum_at(step, first / NS, at.s * NS + first % NS);
    if constexpr (Count == 4 && NS == 4) {
        store<4>(begin, v);
    } else {
#pragma unroll
        for (int i = 0; i < Count; i++) to[sum_at(step, (first + i) / NS, at.s * NS + (first + i) % NS)] = v[i];
    }
}

// The sums over the channels of a warp of what `both` has for dB and dC at one of four steps.
//
// Where a warp has 4 channels or more, its tensor cores add: the values are a matrix [16, 8] whose columns are lanes and
// two registers, and the other matrix has ones where they are to be added up, in two columns for each of the four steps.
// So lane t of a quad ends with the sums of step t. In tf32, which keeps 11 bits and is finer than bf16; for f32, in two
// pieces.
DEVICE void add_to_channel_sums(float* sums, const float* both, const Place& at, int step, float* to) {
#if CH >= 4
    int g = threadIdx.x % WARP / 4;
    float ones[2] = {g == 2 * (step % 4) ? 1.0f : 0.0f, g == 2 * (step % 4) + 1 ? 1.0f : 0.0f};
#pragma unroll
    for (int i = 0; i < BOTH; i += 4) {
        float v[4] = {both[i], both[i + 2], both[i + 1], both[i + 3]};
        if constexpr (sizeof(T) == 4) {
            float low[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float high = bits_to_f32(f32_to_bits(v[k]) & 0xffffe000u);
                low[k] = v[k] - high, v[k] = high;
            }
            mma_tf32(sums + i, low, ones);
        }
        mma_tf32(sums + i, v, ones);
    }
#else
    float v[2 * NS];
#pragma unroll
    for (int i = 0; i < 2 * NS; i++) v[i] = both[i];
    int lane = at.c % CH;
    sum_lanes<2 * NS, CH, CHANNEL_STRIDE>(v, lane);
    write_sums<2 * NS / CH>(to, v, kept_first<2 * NS, CH>(lane), step, at);
#endif
}
// Ends what `add_to_channel_sums` began for the steps from `first` on.
DEVICE void write_channel_sums(float* sums, const Place& at, int first, float* to) {
#if CH >= 4
    int lane = at.c % CH / 4;
    sum_lanes<2 * NS, CH / 4, 4>(sums, lane);
    write_sums<(2 * NS > CH / 4 ? 2 * NS / (CH / 4) : 1)>(to, sums, kept_first<2 * NS, CH / 4>(lane), first + threadIdx.x % 4, at);
#endif
}

// SUB steps back from step `first` on: gradients of the elements go into the tile, sums over the warp's channels into
// `sums` [SUB, 2, NP].
DEVICE void back(const Scan& scan, const Place& at, Tile& tile, Walk& w, const float* start, float* sums, int row, int first, int steps) {
    float h[SUB + 1][NS], decay[SUB][NS];
#pragma unroll
    for (int i = 0; i < NS; i++) h[0][i] = start[i];
#pragma unroll
    for (int k = 0; k < SUB; k++) {
        float b[NS];
        tile.coefficients(b, scan, at, 0, row, first + k, steps);
#pragma unroll
        for (int i = 0; i < NS; i++) h[k + 1][i] = h[k][i];
        advance(h[k + 1], decay[k], w.a2, b, tile.du[(first + k) * PAIR_ROW + at.c]);
    }
    auto step_at = [&](int k) {
        float b[NS], c[NS];
        tile.coefficients(b, scan, at, 0, row, first + k, steps);
        tile.coefficients(c, scan, at, 1, row, first + k, steps);
        f32x2 du = tile.du[(first + k) * PAIR_ROW + at.c];
        return Step(w, h[k], h[k + 1], decay[k], b, c, du, tile.dy[(first + k) * ROW + at.c]);
    };
#pragma unroll
    for (int four = SUB - 4; four >= 0; four -= 4) {
        float y[4], by_b[4], by_a[4], channels[BOTH] = {};
#pragma unroll
        for (int k = 3; k >= 0; k--) {
            // Keeps the compiler from loading the operands of more steps than there are registers for.
            if (k % 2 == 1) __syncwarp();
            Step step = step_at(four + k);
            y[k] = step.y, by_b[k] = step.by_b, by_a[k] = step.by_a;
            float both[BOTH] = {};
#pragma unroll
            for (int i = 0; i < NS; i++) both[i] = step.db[i], both[NS + i] = step.dc[i];
            add_to_channel_sums(channels, both, at, four + k, sums);
        }
        write_channel_sums(channels, at, four, sums);
        sum_lanes<4, LANES, STATE_STRIDE>(y, at.s);
        sum_lanes<4, LANES, STATE_STRIDE>(by_b, at.s);
        sum_lanes<4, LANES, STATE_STRIDE>(by_a, at.s);
        int mine = first + four + kept_first<4, LANES>(at.s);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < (LANES < 4 ? 4 / LANES : 1); k++) {
            // Where there are more lanes than steps, the first of them writes.
            if (LANES <= 4 || at.s < 4) finish(at, tile, w, mine + k, steps, y[k], by_b[k], by_a[k]);
        }
    }
    __syncwarp();
}

// Where a block puts its sums over channels for a row.
DEVICE float* channel_part(const Scan& scan, float* channel_parts, int row) {
    return channel_parts + (blockIdx.x * scan.tokens + row) * (2 * N);
}

// Rows [row, row + steps) of a segment, which lie in one chunk, and their parts of dB and dC.
DEVICE void back_through_chunk(const Scan& scan, const Gradients& gradients, const Place& at, Tile& tile, Walk& w, int row,
                               int steps, int segment, float* channel_parts) {
    float h[NS];
    at.load(h, gradients.kept.row(kept_row(row, segment)));
    tile.prepare<true>(scan, gradients.dy, at, row, steps);
    if (row % CHUNK == 0 && row > 0) tile.prefetch_rows(scan, gradients.dy, at, row - CHUNK, CHUNK);
    // B and C are shared; whoever is here has read those of the chunk before.
    __syncthreads();
    int subs = (steps + SUB - 1) / SUB;
    for (int sub = 0; sub + 1 < subs; sub++) {
        store<NS>(tile.states + (sub * THREADS + threadIdx.x) * NS, h);
#pragma unroll
        for (int k = 0; k < SUB; k++) {
            float b[NS], decay[NS];
            tile.coefficients(b, scan, at, 0, row, sub * SUB + k, steps);
            advance(h, decay, w.a2, b, tile.du[(sub * SUB + k) * PAIR_ROW + at.c]);
        }
    }
    for (int sub = subs - 1; sub >= 0; sub--) {
        if (sub + 1 < subs) load<NS>(h, tile.states + (sub * THREADS + threadIdx.x) * NS);
        float* sums = tile.sums + (sub % 2) * WARPS * SUB * 2 * NP;
        back(scan, at, tile, w, h, sums + threadIdx.x / WARP * SUB * 2 * NP, row, sub * SUB, steps);
        __syncthreads();
        for (int i = threadIdx.x * WIDE; channel_parts != nullptr && i < SUB * 2 * N; i += THREADS * WIDE) {
            int k = i / (2 * N), which = i / N % 2, n = i % N;
            if (sub * SUB + k >= steps) continue;
            float sum[WIDE] = {}, more[WIDE];
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) {
                const float* of = sums + warp * SUB * 2 * NP;
                load<WIDE>(more, of + sum_at(k, which, n));
#pragma unroll
                for (int j = 0; j < WIDE; j++) sum[j] += more[j];
            }
            store<WIDE>(channel_part(scan, channel_parts, row + sub * SUB + k) + i % (2 * N), sum);
        }
    }
    tile.write(scan, gradients, at, row, steps);
}

// Part blockIdx.y. `channel_parts` [blocks, tokens, 2, N] takes the sums for dB and dC over the block's channels,
// `time_parts` [parts, N + 2, channels] those for dA, dD and the bias over the part's rows.
KERNEL __launch_bounds__(THREADS, sizeof(T) == 2 ? 3 : 2) scan_parts_grad(Scan scan, Gradients to, float* carry, float* channel_parts, float* time_parts) {
    DYNAMIC_SHARED(memory);
    Tile tile(memory);
    Place at(scan);
    int part = blockIdx.y, first = static_cast<int>(part * scan.part_rows);
    int end = smaller(first + scan.part_rows, scan.tokens);
    Walk w = {};
    at.rates(w.a2, LOG2_E);
    tile.load_vectors(scan, at);
    __syncthreads();
    int covered = scan.segments > 0 ? scan.offsets[0] : end;
    int behind = scan.segments > 0 ? scan.offsets[scan.segments] : end;
    for (int side = 0; side < 2; side++) {
        int from = side == 0 ? first : larger(behind, first), until = side == 0 ? smaller(covered, end) : end;
        clear_rows(to.dx, from, until, at);
        clear_rows(to.ddt, from, until, at);
        clear_rows(to.dz, from, until, at);
        for (i64 i = threadIdx.x; channel_parts != nullptr && i < static_cast<i64>(until - from) * 2 * N; i += THREADS)
            channel_part(scan, channel_parts, from)[i] = 0.0f;
    }
    for (int s = first_segment(scan, first); s < static_cast<int>(scan.segments); s++) {
        Span span(scan, s);
        if (span.behind()) break;
        if (span.stop <= span.end) {
            at.load(w.g, to.dlast.present() ? to.dlast.row(s) : nullptr);
        } else if (span.from < span.until) {
            int last = part_of(scan, span.stop - 1);
            for (int q = last; q > blockIdx.y; q--) carry_on(w.g, w.a2, carried(carry, q, scan.channels), q == last, at);
        }
        for (int until = span.until;;) {
            // Found again every time: registers are dear in between.
            int from = Span(scan, s).from;
            if (from >= until) break;
            int row = larger(from, (until - 1) / CHUNK * CHUNK);
            back_through_chunk(scan, to, at, tile, w, row, until - row, s, channel_parts);
            until = row;
        }
        if (to.dinitial.present() && Span(scan, s).begins(scan)) at.store(to.dinitial.row(s), w.g);
    }
    if (time_parts == nullptr) return;
    float* sums = time_parts + blockIdx.y * (N + 2) * scan.channels;
    at.store(sums, w.da);
    // A channel's lanes have summed different steps.
    sum_lanes<1, LANES, STATE_STRIDE>(&w.dd, at.s);
    sum_lanes<1, LANES, STATE_STRIDE>(&w.dbias, at.s);
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
    int part = blockIdx.y + 1, first = static_cast<int>(part * scan.part_rows);
    int end = smaller(first + scan.part_rows, scan.tokens);
    int s = segment_of(scan.offsets, static_cast<int>(scan.segments), first);
    if (s < 0 || scan.offsets[s] == first) return;
    int stop = scan.offsets[s + 1], until = smaller(stop, end);
    float a2[NS], g[NS], sum = 0.0f;
    at.rates(a2, LOG2_E);
    tile.load_vectors(scan, at);
    __syncthreads();
    at.load(g, stop <= end && dlast.present() ? dlast.row(s) : nullptr);
    while (first < until) {
        int row = (until - 1) / CHUNK * CHUNK, steps = until - row;
        __syncthreads();
        tile.prepare<false>(scan, dy, at, row, steps);
        __syncthreads();
        for (int four = (steps - 1) / 4 * 4; four >= 0; four -= 4) {
#pragma unroll
            for (int step = four + 3; step >= four; step--) {
                float c[NS], delta = tile.du[step * PAIR_ROW + at.c].x, d = tile.dy[step * ROW + at.c];
                tile.coefficients(c, scan, at, 1, row, step, steps);
#pragma unroll
                for (int i = 0; i < NS; i++) g[i] = ex2(delta * a2[i]) * (g[i] + c[i] * d);
                sum += delta;
            }
        }
        until = row;
    }
    float* to = carried(carry, part, scan.channels);
    at.store(to, g);
    if (at.s == 0 && at.c < at.width) to[N * scan.channels + at.first + at.c] = sum;
}

// dB and dC [tokens, groups · N]: the sums over the blocks of a group, in order. A thread has WIDE elements.
KERNEL __launch_bounds__(256) add_channels(const float* parts, Mat<T> db, Mat<T> dc, i64 tokens, i64 group_blocks) {
    i64 i = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) * WIDE, group = blockIdx.y;
    if (i >= tokens * 2 * N) return;
    const float* from = parts + group * group_blocks * tokens * 2 * N + i;
    float sum[WIDE] = {}, more[WIDE];
#pragma unroll 8
    for (int k = 0; k < static_cast<int>(group_blocks); k++, from += tokens * 2 * N) {
        load<WIDE>(more, from);
#pragma unroll
        for (int j = 0; j < WIDE; j++) sum[j] += more[j];
    }
    i64 row = i / (2 * N);
    int within = static_cast<int>(i - row * 2 * N), n = within % N;
    Mat<T> to = within < N ? db : dc;
    if (!to.present()) return;
#pragma unroll
    for (int j = 0; j < WIDE; j++) set(to.row(row)[group * N + n + j], sum[j]);
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
