// The causal depthwise convolution over time, forward and backward.
//
// A thread owns V neighbouring channels and slides over a run of RUN rows with the last W − 1 inputs in registers, so
// each input is read once (and W − 1 rows of the run before again). It finds the segment of its first row by binary
// search and follows the offsets from there. The last inputs of each segment are stored by a kernel of their own, or,
// where segments are short, by the thread that walks over the whole segment.
//
// Memory bounds it: 2 elements of traffic forward (x, y), 3 backward (x, dy, dx).
//
// The gradient forms pre[t] again and keeps the last W values of d pre: dx[t] = Σ_k w[k] dpre[t + W − 1 − k]. Gradients of
// the weight and the bias are sums over rows: one part a run, added in order by another kernel.
//
// Macros: T type of activations; W taps; V channels of a thread; RUN rows; SILU 0 or 1.

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

// y of rows [first, last) of one segment, whose earlier inputs are in `window`, oldest first; the window moves along.
DEVICE void convolve(Mat<T> x, Mat<T> y, float (*window)[V], const float (*w)[V], const float* b, i64 first, i64 last, i64 channel) {
    for (i64 t = first; t < last; t++) {
        float now[V], out[V];
        load<V>(now, x.row(t) + channel);
#pragma unroll
        for (int v = 0; v < V; v++) {
            out[v] = b[v];
#pragma unroll
            for (int k = 0; k < H; k++) out[v] += w[k][v] * window[k][v];
            out[v] += w[H][v] * now[v];
            if (SILU) out[v] = silu(out[v]);
#pragma unroll
            for (int k = 0; k + 1 < H; k++) window[k][v] = window[k + 1][v];
            if (H > 0) window[H - 1][v] = now[v];
        }
        if (y.present()) store<V>(y.row(t) + channel, out);
    }
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

// d pre of row t, which has its inputs in `window` (oldest first) and `now`.
DEVICE void gradient_before_activation(float* d, const float (*window)[V], const float* now, const float (*w)[V], const float* b, Mat<T> dy, i64 t, i64 channel) {
    if (!dy.present()) {
#pragma unroll
        for (int v = 0; v < V; v++) d[v] = 0.0f;
        return;
    }
    load<V>(d, dy.row(t) + channel);
    if (!SILU) return;
#pragma unroll
    for (int v = 0; v < V; v++) {
        float pre = b[v];
#pragma unroll
        for (int k = 0; k < H; k++) pre += w[k][v] * window[k][v];
        pre += w[H][v] * now[v];
        d[v] *= dsilu(pre);
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
    float dw[W][V] = {}, db[V] = {};
    i64 first = static_cast<i64>(blockIdx.y) * RUN;
    i64 t = first, end = t + RUN < tokens ? t + RUN : tokens;
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
        // window: inputs of the W − 1 rows before row u; d[k]: d pre of row u − H + k.
        float window[H > 0 ? H : 1][V], d[W][V] = {};
#pragma unroll
        for (int k = 0; k < H; k++) earlier(window[k], x, initial, t - H + k, start, segment, channel, channels);
        for (i64 u = t; u < mine + H; u++) {
#pragma unroll
            for (int k = 0; k < H; k++)
#pragma unroll
                for (int v = 0; v < V; v++) d[k][v] = d[k + 1][v];
            float now[V];
            if (u < stop) {
                load<V>(now, x.row(u) + channel);
                gradient_before_activation(d[H], window, now, w, b, dy, u, channel);
            } else {
#pragma unroll
                for (int v = 0; v < V; v++) now[v] = d[H][v] = 0.0f;
            }
            if (u < mine) {
#pragma unroll
                for (int v = 0; v < V; v++) {
#pragma unroll
                    for (int k = 0; k < H; k++) dw[k][v] += d[H][v] * window[k][v];
                    dw[H][v] += d[H][v] * now[v];
                    db[v] += d[H][v];
                }
            }
#pragma unroll
            for (int v = 0; v < V; v++) {
#pragma unroll
                for (int k = 0; k + 1 < H; k++) window[k][v] = window[k + 1][v];
                if (H > 0) window[H - 1][v] = now[v];
            }
            // Row u − H has met every d pre that reads it.
            if (u - H >= t && dx.present()) {
                float sum[V];
#pragma unroll
                for (int v = 0; v < V; v++) {
                    sum[v] = 0.0f;
#pragma unroll
                    for (int k = 0; k < W; k++) sum[v] += w[H - k][v] * d[k][v];
                }
                i64 from_end = u - H - (stop - H);
                if (dlast.present() && from_end >= 0) {
                    float more[V];
                    load<V>(more, dlast.row(segment) + from_end * channels + channel);
#pragma unroll
                    for (int v = 0; v < V; v++) sum[v] += more[v];
                }
                store<V>(dx.row(u - H) + channel, sum);
            }
        }
        t = mine;
    }
    for (; t < end; t++)
        if (dx.present()) store<V>(dx.row(t) + channel, zero);
    if (parts != nullptr) {
        float* part = parts + static_cast<i64>(blockIdx.y) * (W + 1) * channels + channel;
#pragma unroll
        for (int k = 0; k < W; k++) store<V>(part + k * channels, dw[k]);
        store<V>(part + W * channels, db);
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
    float w[W][V], b[V], window[H > 0 ? H : 1][V], sum[H > 0 ? H : 1][V] = {};
    load_taps(w, b, weight, bias, channel);
#pragma unroll
    for (int k = 0; k < H; k++) earlier(window[k], x, initial, start - H + k, start, segment, channel, channels);
#pragma unroll
    for (int step = 0; step < H; step++) {
        if (start + step >= stop) break;
        float now[V], d[V];
        load<V>(now, x.row(start + step) + channel);
        gradient_before_activation(d, window, now, w, b, dy, start + step, channel);
#pragma unroll
        for (int v = 0; v < V; v++) {
#pragma unroll
            for (int j = step; j < H; j++) sum[j][v] += w[j - step][v] * d[v];
#pragma unroll
            for (int k = 0; k + 1 < H; k++) window[k][v] = window[k + 1][v];
            if (H > 0) window[H - 1][v] = now[v];
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
