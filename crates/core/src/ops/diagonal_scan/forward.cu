
// Forward; `last` holds the states between chunks, too.
KERNEL __launch_bounds__(32 * W, 1) diagonal_scan(Mat<T> x, Mat<float> a, Mat<float> a_imag, Mat<TB> b, Mat<TC> c, Mat<T> dt,
                                               Mat<float> dt_bias, Mat<float> skip, Mat<float> initial, const int* offsets,
                                               Mat<T> y, Mat<float> last, Mat<float> kept, i64 tokens, i64 channels,
                                               i64 states, int segments) {
    __shared__ float xs[CHUNK][32], deltas[CHUNK][32], sums[W][CHUNK][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, segment = blockIdx.y;
    i64 channel = static_cast<i64>(blockIdx.x) * 32 + lane, plane = states * channels;
    bool here = channel < channels;
    if (here && warp == 0) clear_rest(y, offsets, segment, segments, tokens, channel);
    if (segments == 0) return;
    i64 start = offsets[segment], stop = offsets[segment + 1];
    // An empty segment has one chunk without steps, which passes the states on.
    for (i64 chunk = 0; chunk == 0 || start + chunk * CHUNK < stop; chunk++) {
        i64 first = start + chunk * CHUNK;
        int steps = static_cast<int>(stop - first < CHUNK ? stop - first : CHUNK);
        for (int t = warp; t < steps && here; t += W) {
            xs[t][lane] = to_f32(x.row(first + t)[channel]);
            deltas[t][lane] = step_size(dt, dt_bias, first + t, channel);
        }
        for (int t = 0; t < steps; t++) sums[warp][t][lane] = 0.0f;
        __syncthreads();
        for (i64 n = warp; n < states && here; n += W) {
            Mat<float> from = chunk == 0 ? initial : last;
            i64 col = n * channels + channel;
            Number h = from.present() ? load_number(from.row(segment) + col, plane) : real(0.0f);
            if (kept.present() && steps > 0) store_number(kept.row(start / CHUNK + segment + chunk) + col, plane, h);
            Number at = a_of(a, a_imag, channel, n), fixed_b = real(0.0f), fixed_c = real(0.0f);
            if (B_FIXED) fixed_b = load_number(b.row(channel) + n, states);
            if (C_FIXED) fixed_c = load_number(c.row(channel) + n, states);
            for (int t = 0; t < steps; t++) {
                Step step(at, deltas[t][lane]);
                Number bt = B_FIXED ? fixed_b : load_number(b.row(first + t) + n, states);
                Number ct = C_FIXED ? fixed_c : load_number(c.row(first + t) + n, states);
                h = add(mul(step.decay, h), scale(mul(step.factor, bt), xs[t][lane]));
                sums[warp][t][lane] += static_cast<float>(PLANES) * mul(ct, h).re;
            }
            store_number(last.row(segment) + col, plane, h);
        }
        __syncthreads();
        for (int t = warp; t < steps && here && y.present(); t += W) {
            float sum = skip.present() ? skip.data[channel] * xs[t][lane] : 0.0f;
            for (int w = 0; w < W; w++) sum += sums[w][t][lane];
            set(y.row(first + t)[channel], sum);
        }
        __syncthreads();
    }
}
