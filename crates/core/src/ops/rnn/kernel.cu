// LSTM and GRU: a block walks through the tokens of a segment, with its state and the product a = W h (+ b) in global
// memory, which its caches hold. At each step a warp makes a row of the product (the gradient's transposed product: a
// thread a column), then a thread the gates of a unit.
//
// The matrix is read at every step, by each block for itself: simple, and bound by the level-2 cache. What it writes
// does not depend on other segments.
//
// Macros: T type of activations; GATES 4 for the LSTM (i, f, g, o), 3 for the GRU (r, z, n).

#define THREADS 512
#define WARPS (THREADS / WARP)
// Vectors of a state, and of what is kept of a token.
#define STATE (GATES == 4 ? 2 : 1)
#define KEPT (GATES == 4 ? 5 : 4)

DEVICE float tanh_of(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// Zeros in the rows that no segment has: those before the first one, those after the last one.
DEVICE void clear_rest(Mat<T> out, i64 cols, const int* offsets, int segments, i64 tokens) {
    if (!out.present() || blockIdx.x != 0) return;
    i64 first = segments > 0 ? offsets[0] : 0, last = segments > 0 ? offsets[segments] : 0;
    for (i64 row = 0; row < tokens; row++) {
        if (row == first) row = last;
        if (row >= tokens) break;
        for (i64 c = threadIdx.x; c < cols; c += THREADS) set(out.row(row)[c], 0.0f);
    }
}

KERNEL __launch_bounds__(512) rnn_forward(Mat<T> x, Mat<float> weight, Mat<float> bias, Mat<float> initial,
                                          const int* offsets, float* memory, Mat<T> y, Mat<float> last, Mat<float> kept,
                                          i64 tokens, i64 units, int segments) {
    clear_rest(y, units, offsets, segments, tokens);
    int segment = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (segment >= segments) return;
    float* h = memory + segment * (GATES + 2) * units;
    float *c = h + units, *a = c + units;
    for (i64 i = threadIdx.x; i < units; i += THREADS) {
        h[i] = initial.present() ? initial.row(segment)[i] : 0.0f;
        if (GATES == 4) c[i] = initial.present() ? initial.row(segment)[units + i] : 0.0f;
    }
    __syncthreads();
    for (i64 row = offsets[segment]; row < offsets[segment + 1]; row++) {
        for (i64 r = warp; r < GATES * units; r += WARPS) {
            const float* w = weight.row(r);
            float sum = 0.0f;
            for (i64 k = lane; k < units; k += WARP) sum += w[k] * h[k];
            sum = warp_sum(sum);
            if (lane == 0) a[r] = sum + (bias.present() ? bias.data[r] : 0.0f);
        }
        __syncthreads();
        const T* in = x.row(row);
        for (i64 i = threadIdx.x; i < units; i += THREADS) {
            float p = sigmoid(to_f32(in[i]) + a[i]), q = sigmoid(to_f32(in[units + i]) + a[units + i]);
            float out, v[KEPT];
            v[0] = p, v[1] = q;
            if (GATES == 4) {
                v[2] = tanh_of(to_f32(in[2 * units + i]) + a[2 * units + i]);
                v[3] = sigmoid(to_f32(in[(GATES - 1) * units + i]) + a[(GATES - 1) * units + i]);
                c[i] = q * c[i] + p * v[2];
                v[KEPT - 1] = c[i];
                out = v[3] * tanh_of(c[i]);
            } else {
                v[3] = a[2 * units + i];
                v[2] = tanh_of(to_f32(in[2 * units + i]) + p * v[3]);
                out = v[2] + q * (h[i] - v[2]);
            }
            h[i] = out;
            if (y.present()) set(y.row(row)[i], out);
            if (kept.present()) {
#pragma unroll
                for (int k = 0; k < KEPT; k++) kept.row(row)[k * units + i] = v[k];
            }
        }
        __syncthreads();
    }
    if (!last.present()) return;
    for (i64 i = threadIdx.x; i < units; i += THREADS) {
        last.row(segment)[i] = h[i];
        if (GATES == 4) last.row(segment)[units + i] = c[i];
    }
}

KERNEL __launch_bounds__(512) rnn_backward(Mat<float> weight, const int* offsets, Mat<T> y, Mat<float> kept,
                                           Mat<float> initial, Mat<T> dy, Mat<float> dlast, float* memory, Mat<T> dx,
                                           Mat<T> da, Mat<T> before, Mat<float> dinitial, i64 tokens, i64 units,
                                           int segments) {
    clear_rest(dx, GATES * units, offsets, segments, tokens);
    clear_rest(da, GATES * units, offsets, segments, tokens);
    clear_rest(before, units, offsets, segments, tokens);
    int segment = blockIdx.x;
    if (segment >= segments) return;
    float* dh = memory + segment * (GATES + 2) * units;
    float *dc = dh + units, *step = dc + units;
    for (i64 i = threadIdx.x; i < units; i += THREADS) {
        dh[i] = dlast.present() ? dlast.row(segment)[i] : 0.0f;
        if (GATES == 4) dc[i] = dlast.present() ? dlast.row(segment)[units + i] : 0.0f;
    }
    __syncthreads();
    i64 start = offsets[segment];
    for (i64 row = offsets[segment + 1] - 1; row >= start; row--) {
        for (i64 i = threadIdx.x; i < units; i += THREADS) {
            const float* v = kept.row(row) + i;
            float d = dh[i] + (dy.present() ? to_f32(dy.row(row)[i]) : 0.0f);
            float h = 0.0f, gates[GATES];
            if (row > start) {
                h = to_f32(y.row(row - 1)[i]);
            } else if (initial.present()) {
                h = initial.row(segment)[i];
            }
            float p = v[0], q = v[units], n = v[2 * units], o = v[3 * units], last_factor = 1.0f;
            if (GATES == 4) {
                float c = 0.0f, tanh_c = tanh_of(v[(KEPT - 1) * units]);
                if (row > start) {
                    c = kept.row(row - 1)[(KEPT - 1) * units + i];
                } else if (initial.present()) {
                    c = initial.row(segment)[(STATE - 1) * units + i];
                }
                float into_c = dc[i] + d * o * (1.0f - tanh_c * tanh_c);
                gates[0] = into_c * n * p * (1.0f - p);
                gates[1] = into_c * c * q * (1.0f - q);
                gates[2] = into_c * p * (1.0f - n * n);
                gates[GATES - 1] = d * tanh_c * o * (1.0f - o);
                dc[i] = into_c * q;
            } else {
                gates[2] = d * (1.0f - q) * (1.0f - n * n);
                gates[1] = d * (h - n) * q * (1.0f - q);
                gates[0] = gates[2] * o * p * (1.0f - p);
                last_factor = p;
                dh[i] = d * q;
            }
#pragma unroll
            for (int k = 0; k < GATES; k++) {
                float product = k == 2 ? gates[k] * last_factor : gates[k];
                step[k * units + i] = product;
                if (dx.present()) set(dx.row(row)[k * units + i], gates[k]);
                if (da.present()) set(da.row(row)[k * units + i], product);
            }
            if (before.present()) set(before.row(row)[i], h);
        }
        __syncthreads();
        for (i64 k = threadIdx.x; k < units; k += THREADS) {
            float sum = GATES == 4 ? 0.0f : dh[k];
            for (i64 r = 0; r < GATES * units; r++) sum += step[r] * weight.row(r)[k];
            dh[k] = sum;
        }
        __syncthreads();
    }
    if (!dinitial.present()) return;
    for (i64 i = threadIdx.x; i < units; i += THREADS) {
        dinitial.row(segment)[i] = dh[i];
        if (GATES == 4) dinitial.row(segment)[units + i] = dc[i];
    }
}
