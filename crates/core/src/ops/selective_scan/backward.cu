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
        for (int step = threadIdx.x; step < steps; step += THREADS) {
            prefetch(element(scan.dt, row + step, at.first));
            prefetch(element(scan.x, row + step, at.first));
            if (from.present()) prefetch(element(from, row + step, at.first));
            if (scan.z.present()) prefetch(element(scan.z, row + step, at.first));
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

// One step back: from the states before and after it to what its elements need. `in` is what multiplies the input in
// the gradient of B (Euler: g), `dc` that of C.
struct Step {
    float in[NS], db[NS], dc[NS];
    float y, by_b, by_a;

    DEVICE Step(Walk& w, const float* before, const float* after, const float* decay, const float* b, const float* c, f32x2 du, float dy) {
        y = by_b = by_a = 0.0f;
#pragma unroll
        for (int i = 0; i < NS; i++) {
            float g = w.g[i] + c[i] * dy, through = g * decay[i], by_decay = through * before[i];
            in[i] = g;
            by_a += by_decay * w.a2[i];
            w.da[i] += by_decay * du.x;
#if ZOH
            float a = w.a2[i] * LN_2, u = du.x * a;
            in[i] = g * zoh_factor(decay[i], u, du.x, a);
            by_a += through * (du.y * LOG2_E * b[i]);
            w.da[i] += g * b[i] * du.y * zoh_slope(decay[i], u, du.x, a);
#endif
            db[i] = in[i] * du.y;
            dc[i] = after[i] * dy;
            y += c[i] * after[i];
            by_b += in[i] * b[i];
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

// Where the sum of dB (which = 0) or dC (1) for state n at a step stands among those of a warp. Tensor cores leave the sums
// of four steps and of pairs of states to neighbouring lanes, which write to different banks.
DEVICE int sum_at(int step, int which, int n) {
    if constexpr (TENSOR) return step * 2 * NP + ((which * NP + n / 4 * 2 + n % 2 + n % 4 / 2 * 8) ^ (step % 4 * 8));
    return (step * 2 + which) * NP + n;
}

// Ones in column 2q for the first four rows of a matrix [8, 8] and in column 2q + 1 for the others.
DEVICE void two_columns(float* ones, int q) {
    int g = threadIdx.x % WARP / 4;
    ones[0] = g == 2 * q ? 1.0f : 0.0f;
    ones[1] = g == 2 * q + 1 ? 1.0f : 0.0f;
}

// Sums over the eight channels of a warp by tensor cores, for step q of four. Lanes are (g, t) with channel g and states
// 4t ..: a product with ones where row and lane agree moves values so that channels are in t and in two registers, one
// with two columns of ones adds up what is in t. After four steps lane (g, t) has the sums of step t for states
// 4 (g % 4) + 2 (g / 4) and the next, those of even and of odd channels.
DEVICE void add_channels_of_warp(float* sums, const float* v, int q) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    float same = g == t ? 1.0f : 0.0f, other = g == t + 4 ? 1.0f : 0.0f, ones[2];
    float upper[4] = {same, 0.0f, other, 0.0f}, lower[4] = {0.0f, same, 0.0f, other};
    float first[2] = {v[0], v[2]}, second[2] = {v[1], v[3]}, moved[4] = {};
    mma_tf32(moved, upper, first);
    mma_tf32(moved, lower, second);
    two_columns(ones, q);
    mma_tf32(sums, moved, ones);
}
DEVICE void write_channels_of_warp(float* to, int which, const float* sums) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    *reinterpret_cast<f32x2*>(to + sum_at(t, which, g % 4 * 4 + g / 4 * 2)) = f32x2{sums[0] + sums[2], sums[1] + sums[3]};
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
    if constexpr (TENSOR) {
        int g = threadIdx.x % WARP / 4;
        float b[4], c[4], y[2] = {}, by_b[2] = {}, by_a[4] = {};
        tile.coefficients(b, scan, at, 0, row, first + g, steps);
        tile.coefficients(c, scan, at, 1, row, first + g, steps);
#pragma unroll
        for (int four = SUB - 4; four >= 0; four -= 4) {
            float db[4] = {}, dc[4] = {};
#pragma unroll
            for (int j = four + 2; j >= four; j -= 2) {
                Step second = step_at(j + 1);
                add_channels_of_warp(db, second.db, (j + 1) % 4);
                add_channels_of_warp(dc, second.dc, (j + 1) % 4);
                // Keeps the compiler from loading the operands of more steps than there are registers for.
                __syncwarp();
                Step one = step_at(j);
                add_channels_of_warp(db, one.db, j % 4);
                add_channels_of_warp(dc, one.dc, j % 4);
                contract_pair(y, h[j + 1], h[j + 2], c, j);
                contract_pair(by_b, one.in, second.in, b, j);
                float both[4] = {one.by_a, 0.0f, second.by_a, 0.0f}, ones[2];
                two_columns(ones, j / 2);
                mma_tf32(by_a, both, ones);
            }
            write_channels_of_warp(sums + four * 2 * NP, 0, db);
            write_channels_of_warp(sums + four * 2 * NP, 1, dc);
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 2; k++) finish(at, tile, w, first + 2 * at.s + k, steps, y[k], by_b[k], by_a[k]);
    } else {
#pragma unroll
        for (int four = SUB - 4; four >= 0; four -= 4) {
            float y[4], by_b[4], by_a[4];
#pragma unroll
            for (int k = 3; k >= 0; k--) {
                if (k % 2 == 1) __syncwarp();
                Step step = step_at(four + k);
                y[k] = step.y, by_b[k] = step.by_b, by_a[k] = step.by_a;
                // Over the channels of the warp; each lane keeps some: dB comes before dC.
                float both[2 * NS];
#pragma unroll
                for (int i = 0; i < NS; i++) both[i] = step.db[i], both[NS + i] = step.dc[i];
                int lane = at.c % CH, mine = kept_first<2 * NS, CH>(lane);
                sum_lanes<2 * NS, CH, LANES>(both, lane);
#pragma unroll
                for (int i = 0; i < (2 * NS > CH ? 2 * NS / CH : 1); i++)
                    sums[sum_at(four + k, (mine + i) / NS, at.s * NS + (mine + i) % NS)] = both[i];
            }
            sum_lanes<4, LANES, 1>(y, at.s);
            sum_lanes<4, LANES, 1>(by_b, at.s);
            sum_lanes<4, LANES, 1>(by_a, at.s);
            int mine = first + four + kept_first<4, LANES>(at.s);
            __syncwarp();
#pragma unroll
            for (int k = 0; k < (LANES < 4 ? 4 / LANES : 1); k++) {
                // Where there are more lanes than steps, the first of them writes.
                if (LANES <= 4 || at.s < 4) finish(at, tile, w, mine + k, steps, y[k], by_b[k], by_a[k]);
            }
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
    tile.prepare<true>(scan, gradients.dy, at, row, steps);
    if (row % CHUNK == 0 && row > 0) tile.prefetch_rows(scan, gradients.dy, at, row - CHUNK, CHUNK);
    float h[NS];
    at.load(h, gradients.kept.row(kept_row(row, segment)));
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
                if constexpr (TENSOR && WIDE == 4) {
                    load<2>(more, of + sum_at(k, which, n));
                    load<2>(more + 2, of + sum_at(k, which, n + 2));
                } else {
#pragma unroll
                    for (int j = 0; j < WIDE; j++) more[j] = of[sum_at(k, which, n + j)];
                }
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
    for (int s = first_segment(scan, first); s < scan.segments; s++) {
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
    sum_lanes<1, LANES, 1>(&w.dd, at.s);
    sum_lanes<1, LANES, 1>(&w.dbias, at.s);
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
