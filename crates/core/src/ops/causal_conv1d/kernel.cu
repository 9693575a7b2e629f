// The causal depthwise convolution over time, forward and backward.
//
// A thread owns V neighbouring channels and slides over a run of RUN rows, ROWS at a time, with the last W − 1 inputs in
// registers, so each input is read once (and W − 1 rows of the run before again). It finds the segment of its first row by binary
// search and follows the offsets from there. The last inputs of each segment are stored by a kernel of their own, or,
// where segments are short, by the thread that walks over the whole segment.
//
// Memory bounds it: 2 elements of traffic forward (x, y), 3 backward (x, dy, dx).
//
// The gradient forms pre[t] again and keeps the last W values of d pre: dx[t] = Σ_k w[k] dpre[t + W − 1 − k]. Gradients of
// the weight and the bias are sums over rows: one part a run, added in order by another kernel.
//
// Macros: T type of activations; W taps; V channels of a thread; RUN rows of a thread, ROWS at a time; SILU 0 or 1.

#define H (W - 1)

// The input `back` rows before row t of a segment that starts at `start`: from x, or from the initial state, or zero.
DEVICE void earlier(float* to, Mat<T> x, Mat<float> initial, i64 t, i64 start, int segment, i64 channel, i64 channels) {
    if (t >= start) {
        load<V>(to, x.row(t) + channel);
    } else if (initial.present()) {
        load<V>(to, initial.row(segment) + (H + t - start) * channels + channel);
    } else {
#pragma unroll
        for (int v = 0; v < V; v++) to[v] = 0.0f;
    }
}

DEVICE void load_taps(float (*w)[V], float* b, Mat<float> weight, Mat<float> bias, i64 channel) {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < W; k++) w[k][v] = weight.row(channel + v)[k];
        b[v] = bias.present() ? bias.data[channel + v] : 0.0f;
    }
}

// y of Rows rows from t on, whose earlier inputs are in `window`, oldest first; the window moves along. All rows are read
// before the first is computed, so that enough reads are under way.
template <int Rows>
DEVICE void convolve_rows(Mat<T> x, Mat<T> y, float (*window)[V], const float (*w)[V], const float* b, i64 t, i64 channel) {
    float in[H + Rows][V];
#pragma unroll
    for (int i = 0; i < Rows; i++) load<V>(in[H + i], x.row(t + i) + channel);
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int k = 0; k < H; k++) in[k][v] = window[k][v];
#pragma unroll
        for (int k = 0; k < H; k++) window[k][v] = in[Rows + k][v];
    }
#pragma unroll
    for (int i = 0; i < Rows; i++) {
        float out[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
            out[v] = b[v];
#pragma unroll
            for (int k = 0; k < W; k++) out[v] += w[k][v] * in[i + k][v];
            if (SILU) out[v] = silu(out[v]);
        }
        if (y.present()) store<V>(y.row(t + i) + channel, out);
    }
}

// y of rows [first, last) of one segment.
DEVICE void convolve(Mat<T> x, Mat<T> y, float (*window)[V], const float (*w)[V], const float* b, i64 first, i64 last, i64 channel) {
    i64 t = first;
    for (; t + ROWS <= last; t += ROWS) convolve_rows<ROWS>(x, y, window, w, b, t, channel);
    for (; t < last; t++) convolve_rows<1>(x, y, window, w, b, t, channel);
}

// One thread: V channels, rows [blockIdx.y · RUN, + RUN).
KERNEL __launch_bounds__(128) convolve_runs(Mat<T> x, Mat<float> weight, Mat<float> bias, Mat<float> initial,
                                            const int* offsets, Mat<T> y, i64 tokens, i64 channels, int segments) {
    i64 channel = (static_cast<i64>(blockIdx.x) * 128 + threadIdx.x) * V;
    if (channel >= channels) return;
    float w[W][V], b[V], window[H > 0 ? H : 1][V], zero[V] = {};
    load_taps(w, b, weight, bias, channel);
    i64 t = static_cast<i64>(blockIdx.y) * RUN;
    i64 end = t + RUN < tokens ? t + RUN : tokens;
    int segment = 0, high = segments;
    while (high - segment > 1) {
        int middle = (segment + high) / 2;
        if (offsets[middle] <= t) segment = middle; else high = middle;
    }
    // Rows before the first segment and after the last are zero.
    for (; t < end && (segments == 0 || t < offsets[0]); t++) store<V>(y.row(t) + channel, zero);
    for (; t < end && segment < segments; segment++) {
        i64 start = offsets[segment], stop = offsets[segment + 1];
        if (stop <= t) continue;
        stop = stop < end ? stop : end;
#pragma unroll
        for (int k = 0; k < H; k++) earlier(window[k], x, initial, t - H + k, start, segment, channel, channels);
        convolve(x, y, window, w, b, t, stop, channel);
        t = stop;
    }
    for (; t < end; t++) store<V>(y.row(t) + channel, zero);
}

// One thread: V channels of a whole segment, blockIdx.y, and its final state. For many short segments.
KERNEL __launch_bounds__(128) convolve_segments(Mat<T> x, Mat<float> weight, Mat<float> bias, Mat<float> initial,
                                                const int* offsets, Mat<T> y, Mat<float> last, i64 tokens, i64 channels,
                                                int segments) {
    i64 channel = (static_cast<i64>(blockIdx.x) * 128 + threadIdx.x) * V;
    if (channel >= channels) return;
    int segment = blockIdx.y;
    float w[W][V], b[V], window[H > 0 ? H : 1][V], zero[V] = {};
    load_taps(w, b, weight, bias, channel);
    i64 start = offsets[segment], stop = offsets[segment + 1];
#pragma unroll
    for (int k = 0; k < H; k++) earlier(window[k], x, initial, start - H + k, start, segment, channel, channels);
    convolve(x, y, window, w, b, start, stop, channel);
    if (last.present()) {
#pragma unroll
        for (int k = 0; k < H; k++) store<V>(last.row(segment) + k * channels + channel, window[k]);
    }
    if (!y.present()) return;
    if (segment == 0)
        for (i64 t = 0; t < start; t++) store<V>(y.row(t) + channel, zero);
    if (segment + 1 == segments)
        for (i64 t = stop; t < tokens; t++) store<V>(y.row(t) + channel, zero);
}

// The last W − 1 inputs of segment blockIdx.y. The final state may lie over the initial one: all of it is read first.
KERNEL __launch_bounds__(128) last_inputs(Mat<T> x, Mat<float> initial, const int* offsets, Mat<float> last, i64 channels) {
    i64 channel = (static_cast<i64>(blockIdx.x) * 128 + threadIdx.x) * V;
    if (channel >= channels) return;
    int segment = blockIdx.y;
    i64 start = offsets[segment], stop = offsets[segment + 1];
    float window[H > 0 ? H : 1][V];
#pragma unroll
    for (int k = 0; k < H; k++) earlier(window[k], x, initial, stop - H + k, start, segment, channel, channels);
#pragma unroll
    for (int k = 0; k < H; k++) store<V>(last.row(segment) + k * channels + channel, window[k]);
}

// d pre of a row: dy times the slope of the activation, given the row's W inputs, oldest first.
DEVICE void before_activation(float* d, const float (*in)[V], const float (*w)[V], const float* b) {
    if (!SILU) return;
#pragma unroll
    for (int v = 0; v < V; v++) {
        float pre = b[v];
#pragma unroll
        for (int k = 0; k < W; k++) pre += w[k][v] * in[k][v];
        d[v] *= dsilu(pre);
    }
}

// What a thread of the gradient carries from row to row: the inputs and the d pre of the last W − 1 rows, and its sums.
struct Walk {
    float in[H > 0 ? H : 1][V], d[H > 0 ? H : 1][V];
    float dw[W][V], db[V];
};

// Rows u .. u + Rows of a segment that ends at `stop`, of which this thread's run has those from t to `mine` (all of them,
// but for single rows): their d pre, their share of the sums, and dx of rows u − H .. u − H + Rows, which have met every d pre that reads them.
template <int Rows>
DEVICE void walk_rows(Walk& walk, Mat<T> x, Mat<T> dy, Mat<float> dlast, Mat<T> dx, const float (*w)[V], const float* b,
                      i64 u, i64 t, i64 mine, i64 stop, int segment, i64 channel, i64 channels) {
    float in[H + Rows][V], d[H + Rows][V];
#pragma unroll
    for (int i = 0; i < Rows; i++) {
#pragma unroll
        for (int v = 0; v < V; v++) in[H + i][v] = d[H + i][v] = 0.0f;
        if (Rows == 1 && u + i >= stop) continue;
        load<V>(in[H + i], x.row(u + i) + channel);
        if (dy.present()) load<V>(d[H + i], dy.row(u + i) + channel);
    }
#pragma unroll
    for (int k = 0; k < H; k++)
#pragma unroll
        for (int v = 0; v < V; v++) in[k][v] = walk.in[k][v], d[k][v] = walk.d[k][v];
#pragma unroll
    for (int i = 0; i < Rows; i++) {
        before_activation(d[H + i], in + i, w, b);
        if (Rows == 1 && u + i >= mine) continue;
#pragma unroll
        for (int v = 0; v < V; v++) {
#pragma unroll
            for (int k = 0; k < W; k++) walk.dw[k][v] += d[H + i][v] * in[i + k][v];
            walk.db[v] += d[H + i][v];
        }
    }
#pragma unroll
    for (int k = 0; k < H; k++)
#pragma unroll
        for (int v = 0; v < V; v++) walk.in[k][v] = in[Rows + k][v], walk.d[k][v] = d[Rows + k][v];
#pragma unroll
    for (int i = 0; i < Rows; i++) {
        i64 row = u - H + i;
        if (row < t || row >= mine || !dx.present()) continue;
        float sum[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
            sum[v] = 0.0f;
#pragma unroll
            for (int k = 0; k < W; k++) sum[v] += w[H - k][v] * d[i + k][v];
        }
        // What the row leaves in the final state.
        i64 place = row - (stop - H);
        if (dlast.present() && place >= 0) {
            float more[V];
            load<V>(more, dlast.row(segment) + place * channels + channel);
#pragma unroll
            for (int v = 0; v < V; v++) sum[v] += more[v];
        }
        store<V>(dx.row(row) + channel, sum);
    }
}

// One thread: V channels, rows [blockIdx.y · RUN, + RUN): dx of them, and the part of dweight [W, channels] and of dbias
// [channels] that their d pre makes, in row blockIdx.y of `parts` [runs, (W + 1) · channels].
KERNEL __launch_bounds__(128) convolve_grad(Mat<T> x, Mat<float> weight, Mat<float> bias, Mat<float> initial,
                                            const int* offsets, Mat<T> dy, Mat<float> dlast, Mat<T> dx, float* parts,
                                            i64 tokens, i64 channels, int segments) {
    i64 channel = (static_cast<i64>(blockIdx.x) * 128 + threadIdx.x) * V;
    if (channel >= channels) return;
    float w[W][V], b[V], zero[V] = {};
    load_taps(w, b, weight, bias, channel);
    Walk walk;
#pragma unroll
    for (int v = 0; v < V; v++) {
        walk.db[v] = 0.0f;
#pragma unroll
        for (int k = 0; k < W; k++) walk.dw[k][v] = 0.0f;
    }
    i64 t = static_cast<i64>(blockIdx.y) * RUN;
    i64 end = t + RUN < tokens ? t + RUN : tokens;
    int segment = 0, high = segments;
    while (high - segment > 1) {
        int middle = (segment + high) / 2;
        if (offsets[middle] <= t) segment = middle; else high = middle;
    }
    for (; t < end && (segments == 0 || t < offsets[0]); t++)
        if (dx.present()) store<V>(dx.row(t) + channel, zero);
    for (; t < end && segment < segments; segment++) {
        i64 start = offsets[segment], stop = offsets[segment + 1];
        if (stop <= t) continue;
        i64 mine = stop < end ? stop : end;
#pragma unroll
        for (int k = 0; k < H; k++) {
            earlier(walk.in[k], x, initial, t - H + k, start, segment, channel, channels);
#pragma unroll
            for (int v = 0; v < V; v++) walk.d[k][v] = 0.0f;
        }
        i64 u = t;
        for (; u + ROWS <= mine; u += ROWS)
            walk_rows<ROWS>(walk, x, dy, dlast, dx, w, b, u, t, mine, stop, segment, channel, channels);
        for (; u < mine + H; u++)
            walk_rows<1>(walk, x, dy, dlast, dx, w, b, u, t, mine, stop, segment, channel, channels);
        t = mine;
    }
    for (; t < end; t++)
        if (dx.present()) store<V>(dx.row(t) + channel, zero);
    if (parts != nullptr) {
        float* part = parts + static_cast<i64>(blockIdx.y) * (W + 1) * channels + channel;
#pragma unroll
        for (int k = 0; k < W; k++) store<V>(part + k * channels, walk.dw[k]);
        store<V>(part + W * channels, walk.db);
    }
}

// The gradient of the initial state of segment blockIdx.y: one thread V channels. Its input j stands at row
// start − H + j, which the rows start .. start + j read with tap j − (row − start); what a short segment leaves of it
// in the final state comes on top.
KERNEL __launch_bounds__(128) initial_grad(Mat<T> x, Mat<float> weight, Mat<float> bias, Mat<float> initial,
                                           const int* offsets, Mat<T> dy, Mat<float> dlast, Mat<float> dinitial,
                                           i64 channels) {
    i64 channel = (static_cast<i64>(blockIdx.x) * 128 + threadIdx.x) * V;
    if (channel >= channels) return;
    int segment = blockIdx.y;
    i64 start = offsets[segment], stop = offsets[segment + 1];
    float w[W][V], b[V], in[W][V], sum[H > 0 ? H : 1][V] = {};
    load_taps(w, b, weight, bias, channel);
#pragma unroll
    for (int k = 0; k < H; k++) earlier(in[k], x, initial, start - H + k, start, segment, channel, channels);
#pragma unroll
    for (int step = 0; step < H; step++) {
        if (start + step >= stop) break;
        float d[V] = {};
        load<V>(in[H], x.row(start + step) + channel);
        if (dy.present()) load<V>(d, dy.row(start + step) + channel);
        before_activation(d, in, w, b);
#pragma unroll
        for (int v = 0; v < V; v++) {
#pragma unroll
            for (int j = step; j < H; j++) sum[j][v] += w[j - step][v] * d[v];
#pragma unroll
            for (int k = 0; k < H; k++) in[k][v] = in[k + 1][v];
        }
    }
#pragma unroll
    for (int j = 0; j < H; j++) {
        i64 place = j - (stop - start);
        if (dlast.present() && place >= 0) {
            float more[V];
            load<V>(more, dlast.row(segment) + place * channels + channel);
#pragma unroll
            for (int v = 0; v < V; v++) sum[j][v] += more[v];
        }
        store<V>(dinitial.row(segment) + j * channels + channel, sum[j]);
    }
}

// dweight [channels, W] and dbias [1, channels] from the parts: a warp a channel and tap... blockIdx.y is the tap, the
// bias coming last; 32 threads a channel as in other reductions.
KERNEL __launch_bounds__(1024) add_parts(const float* parts, Mat<float> dweight, Mat<float> dbias, i64 runs, i64 channels) {
    __shared__ float sums[32][33];
    int lane = threadIdx.x % 32, part_of = threadIdx.x / 32, tap = blockIdx.y;
    i64 channel = static_cast<i64>(blockIdx.x) * 32 + lane;
    float sum = 0.0f;
    if (channel < channels) {
        for (i64 r = part_of; r < runs; r += 32) sum += parts[(r * (W + 1) + tap) * channels + channel];
    }
    sums[part_of][lane] = sum;
    __syncthreads();
    sum = warp_sum(sums[lane][part_of]);
    channel = static_cast<i64>(blockIdx.x) * 32 + part_of;
    if (lane != 0 || channel >= channels) return;
    if (tap < W) {
        if (dweight.present()) dweight.row(channel)[tap] = sum;
    } else if (dbias.present()) {
        dbias.data[channel] = sum;
    }
}
