// The linear time-invariant scan, forward and backward.
//
// LANES neighbouring threads share a channel, each with NS of its pairs of states and their coefficients in registers, and
// walk through a segment together; sums over pairs are shuffles. The gradient goes through a segment's chunks from the last
// one: it walks through a chunk from the kept state, leaves the state of every SUB-th step in shared memory, then goes back
// over SUB steps at a time, whose states it has in registers. The formulas stand in cpu_grad.rs.
//
// Macros: T type of activations; PAIRS; LANES, NS; WARPS of a block; CHUNK steps between kept states; SUB; RANK_ONE 0 or 1.

#define THREADS (WARPS * WARP)
#define BLOCK_CHANNELS (THREADS / LANES)
// Steps whose inputs are read together; divides every chunk.
#define AHEAD 8

struct Pairs {
    float re[NS], im[NS];
};

struct Coefficients {
    Pairs a, b, c;
#if RANK_ONE
    Pairs u, v;
#endif
};

struct Place {
    int lane;
    i64 channel, channels;
    DEVICE bool has(int i) const { return channel < channels && i * LANES + lane < PAIRS; }
    DEVICE i64 pair(int i) const { return i * LANES + lane; }
};

DEVICE Place place(i64 channels) {
    return Place{static_cast<int>(threadIdx.x % LANES), static_cast<i64>(blockIdx.x) * BLOCK_CHANNELS + threadIdx.x / LANES,
                 channels};
}

// This thread's numbers of a row of [2 PAIRS, channels]; 0 for pairs and channels that do not exist, which stay 0.
DEVICE void load_pairs(Pairs& to, const float* from, i64 stride, const Place& at) {
#pragma unroll
    for (int i = 0; i < NS; i++) {
        to.re[i] = at.has(i) && from != nullptr ? from[2 * at.pair(i) * stride + at.channel] : 0.0f;
        to.im[i] = at.has(i) && from != nullptr ? from[(2 * at.pair(i) + 1) * stride + at.channel] : 0.0f;
    }
}
DEVICE void store_pairs(float* to, i64 stride, const Pairs& from, const Place& at) {
#pragma unroll
    for (int i = 0; i < NS; i++) {
        if (!at.has(i)) continue;
        to[2 * at.pair(i) * stride + at.channel] = from.re[i];
        to[(2 * at.pair(i) + 1) * stride + at.channel] = from.im[i];
    }
}

struct Scan {
    Mat<T> x;
    Mat<float> a, b, c, u, v, d;
    const int* offsets;
    i64 segments, tokens, channels;
};

DEVICE void load_coefficients(Coefficients& k, const Scan& scan, const Place& at) {
    load_pairs(k.a, scan.a.data, scan.a.stride, at);
    load_pairs(k.b, scan.b.data, scan.b.stride, at);
    load_pairs(k.c, scan.c.data, scan.c.stride, at);
#if RANK_ONE
    load_pairs(k.u, scan.u.data, scan.u.stride, at);
    load_pairs(k.v, scan.v.data, scan.v.stride, at);
#endif
}

DEVICE float sum_of_lanes(float v) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

// This thread's part of 2 Re(row · h).
DEVICE float twice_real(const Pairs& row, const Pairs& h) {
    float re = 0.0f, im = 0.0f;
#pragma unroll
    for (int i = 0; i < NS; i++) re += row.re[i] * h.re[i], im += row.im[i] * h.im[i];
    return 2.0f * (re - im);
}

// One step; returns w.
DEVICE float step(Pairs& h, const Coefficients& k, float x) {
    float w = 0.0f;
#if RANK_ONE
    w = sum_of_lanes(twice_real(k.v, h));
#endif
#pragma unroll
    for (int i = 0; i < NS; i++) {
        float re = k.b.re[i] * x, im = k.b.im[i] * x;
#if RANK_ONE
        re += k.u.re[i] * w, im += k.u.im[i] * w;
#endif
        re += k.a.re[i] * h.re[i], im += k.a.re[i] * h.im[i];
        re -= k.a.im[i] * h.im[i], im += k.a.im[i] * h.re[i];
        h.re[i] = re, h.im[i] = im;
    }
    return w;
}

// Row of the kept states, as `chunk_row` has it.
DEVICE i64 chunk_row(i64 start, i64 segment, i64 chunk) { return start / CHUNK + segment + chunk; }

// Zeros for the rows that no segment has.
DEVICE void clear_rest(Mat<T> out, const Scan& scan, const Place& at) {
    if (!out.present() || blockIdx.y != 0 || at.channel >= scan.channels || at.lane != 0) return;
    for (i64 t = 0; t < scan.offsets[0]; t++) set(out.row(t)[at.channel], 0.0f);
    for (i64 t = scan.offsets[scan.segments]; t < scan.tokens; t++) set(out.row(t)[at.channel], 0.0f);
}

KERNEL __launch_bounds__(THREADS) lti_scan(Scan scan, Mat<float> initial, Mat<T> y, Mat<float> last, Mat<float> kept) {
    Place at = place(scan.channels);
    bool mine = at.channel < scan.channels;
    Coefficients k;
    load_coefficients(k, scan, at);
    float skip = mine && scan.d.present() ? scan.d.data[at.channel] : 0.0f;
    clear_rest(y, scan, at);
    for (i64 segment = blockIdx.y; segment < scan.segments; segment += gridDim.y) {
        i64 start = scan.offsets[segment], end = scan.offsets[segment + 1];
        Pairs h;
        load_pairs(h, initial.present() ? initial.row(segment) : nullptr, scan.channels, at);
        for (i64 first = start; first < end; first += AHEAD) {
            if (kept.present() && (first - start) % CHUNK == 0)
                store_pairs(kept.row(chunk_row(start, segment, (first - start) / CHUNK)), scan.channels, h, at);
            float x[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                x[i] = mine && first + i < end ? to_f32(scan.x.row(first + i)[at.channel]) : 0.0f;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (first + i >= end) break;
                step(h, k, x[i]);
                float out = sum_of_lanes(twice_real(k.c, h)) + skip * x[i];
                if (y.present() && mine && at.lane == 0) set(y.row(first + i)[at.channel], out);
            }
        }
        if (last.present()) store_pairs(last.row(segment), scan.channels, h, at);
    }
}

struct Gradients {
    Mat<T> dy;
    Mat<float> dlast, kept;
    Mat<T> dx;
    Mat<float> dinitial;
};

// `parts` has the sums over time of blockIdx.y: rows of channels, two a pair and coefficient, and one for D.
KERNEL __launch_bounds__(THREADS) lti_scan_grad(Scan scan, Gradients grad, float* parts) {
    DYNAMIC_SHARED(memory);
    float* boundaries = reinterpret_cast<float*>(memory) + threadIdx.x;
    Place at = place(scan.channels);
    bool mine = at.channel < scan.channels;
    Coefficients k, sums;
    load_coefficients(k, scan, at);
    Pairs zero;
#pragma unroll
    for (int i = 0; i < NS; i++) zero.re[i] = zero.im[i] = 0.0f;
    sums.a = sums.b = sums.c = zero;
#if RANK_ONE
    sums.u = sums.v = zero;
#endif
    float skip = mine && scan.d.present() ? scan.d.data[at.channel] : 0.0f, dd = 0.0f;
    clear_rest(grad.dx, scan, at);
    for (i64 segment = blockIdx.y; segment < scan.segments; segment += gridDim.y) {
        i64 start = scan.offsets[segment], end = scan.offsets[segment + 1];
        Pairs p;
        load_pairs(p, grad.dlast.present() ? grad.dlast.row(segment) : nullptr, scan.channels, at);
        for (i64 chunk = (end - start + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
            i64 first = start + chunk * CHUNK;
            int steps = static_cast<int>(end - first < CHUNK ? end - first : CHUNK);
            Pairs h[SUB + 1];
            load_pairs(h[0], grad.kept.row(chunk_row(start, segment, chunk)), scan.channels, at);
            int subs = (steps + SUB - 1) / SUB;
            for (int sub = 0; sub < subs; sub++) {
#pragma unroll
                for (int i = 0; i < NS; i++) {
                    boundaries[((sub * NS + i) * 2) * THREADS] = h[0].re[i];
                    boundaries[((sub * NS + i) * 2 + 1) * THREADS] = h[0].im[i];
                }
                if (sub + 1 == subs) break;
                float x[SUB];
#pragma unroll
                for (int i = 0; i < SUB; i++) x[i] = mine ? to_f32(scan.x.row(first + sub * SUB + i)[at.channel]) : 0.0f;
#pragma unroll
                for (int i = 0; i < SUB; i++) step(h[0], k, x[i]);
            }
            for (int sub = subs - 1; sub >= 0; sub--) {
                float x[SUB], dy[SUB], w[SUB];
                i64 row = first + sub * SUB;
                int count = steps - sub * SUB;
#pragma unroll
                for (int i = 0; i < SUB; i++) {
                    x[i] = mine && i < count ? to_f32(scan.x.row(row + i)[at.channel]) : 0.0f;
                    dy[i] = mine && i < count && grad.dy.present() ? to_f32(grad.dy.row(row + i)[at.channel]) : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < NS; i++) {
                    h[0].re[i] = boundaries[((sub * NS + i) * 2) * THREADS];
                    h[0].im[i] = boundaries[((sub * NS + i) * 2 + 1) * THREADS];
                }
#pragma unroll
                for (int i = 0; i < SUB; i++) {
                    h[i + 1] = h[i];
                    w[i] = i < count ? step(h[i + 1], k, x[i]) : 0.0f;
                }
#pragma unroll
                for (int i = SUB - 1; i >= 0; i--) {
                    if (i >= count) continue;
                    float dy2 = 2.0f * dy[i], dx = 0.0f;
                    const Pairs &before = h[i], &after = h[i + 1];
#if RANK_ONE
                    float dw = 0.0f;
#endif
                    dd += dy[i] * x[i];
#pragma unroll
                    for (int n = 0; n < NS; n++) {
                        float re = p.re[n] + k.c.re[n] * dy2, im = p.im[n] - k.c.im[n] * dy2;
                        dx += k.b.re[n] * re + k.b.im[n] * im;
                        sums.a.re[n] += re * before.re[n] + im * before.im[n];
                        sums.a.im[n] += im * before.re[n] - re * before.im[n];
                        sums.b.re[n] += re * x[i], sums.b.im[n] += im * x[i];
                        sums.c.re[n] += dy2 * after.re[n], sums.c.im[n] -= dy2 * after.im[n];
                        p.re[n] = k.a.re[n] * re + k.a.im[n] * im;
                        p.im[n] = k.a.re[n] * im - k.a.im[n] * re;
#if RANK_ONE
                        dw += k.u.re[n] * re + k.u.im[n] * im;
                        sums.u.re[n] += re * w[i], sums.u.im[n] += im * w[i];
#endif
                    }
#if RANK_ONE
                    dw = 2.0f * sum_of_lanes(dw);
#pragma unroll
                    for (int n = 0; n < NS; n++) {
                        p.re[n] += k.v.re[n] * dw, p.im[n] -= k.v.im[n] * dw;
                        sums.v.re[n] += dw * before.re[n], sums.v.im[n] -= dw * before.im[n];
                    }
#endif
                    dx = sum_of_lanes(dx) + skip * dy[i];
                    if (grad.dx.present() && mine && at.lane == 0) set(grad.dx.row(row + i)[at.channel], dx);
                }
            }
        }
        if (grad.dinitial.present()) store_pairs(grad.dinitial.row(segment), scan.channels, p, at);
    }
    const i64 rows = 2 * PAIRS * (RANK_ONE ? 5 : 3);
    float* part = parts + blockIdx.y * (rows + 1) * scan.channels;
    store_pairs(part, scan.channels, sums.a, at);
    store_pairs(part + 2 * PAIRS * scan.channels, scan.channels, sums.b, at);
    store_pairs(part + 4 * PAIRS * scan.channels, scan.channels, sums.c, at);
#if RANK_ONE
    store_pairs(part + 6 * PAIRS * scan.channels, scan.channels, sums.u, at);
    store_pairs(part + 8 * PAIRS * scan.channels, scan.channels, sums.v, at);
#endif
    if (mine && at.lane == 0) part[rows * scan.channels + at.channel] = dd;
}

struct Sums {
    Mat<float> a, b, c, u, v, d;
};

// Adds up the parts in order: blockIdx.y is their row.
KERNEL __launch_bounds__(256) add_parts(const float* parts, Sums to, i64 count, i64 channels) {
    i64 channel = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, row = blockIdx.y, rows = gridDim.y;
    if (channel >= channels) return;
    float sum = 0.0f;
    for (i64 part = 0; part < count; part++) sum += parts[(part * rows + row) * channels + channel];
    i64 which = row / (2 * PAIRS);
    Mat<float> out = row + 1 == rows ? to.d : which == 0 ? to.a : which == 1 ? to.b : which == 2 ? to.c : which == 3 ? to.u : to.v;
    if (out.present()) out.row(row + 1 == rows ? 0 : row % (2 * PAIRS))[channel] = sum;
}
