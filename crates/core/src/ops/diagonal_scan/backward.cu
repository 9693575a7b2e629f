
// Gradients of x and dt; `row_parts` [blocks, tokens, 2 PLANES states]: dB and dC of the channels of each block, which are
// `groups` times 32; `time_parts` [segments, 3 PLANES states + 2, channels]: dA, dB, dC, dD and the bias's; `g`: the gradient
// of the state, between chunks and at last of the initial one.
KERNEL __launch_bounds__(32 * W, 1) diagonal_scan_grad(Mat<T> x, Mat<float> a, Mat<float> a_imag, Mat<TB> b, Mat<TC> c, Mat<T> dt,
                                                    Mat<float> dt_bias, Mat<float> skip, const int* offsets, Mat<T> dy,
                                                    Mat<float> d_last, Mat<float> kept, Mat<T> dx, Mat<T> d_dt, Mat<float> g,
                                                    float* row_parts, float* time_parts, i64 tokens, i64 channels, i64 states,
                                                    int segments, i64 groups) {
    __shared__ float xs[CHUNK][32], deltas[CHUNK][32], dys[CHUNK][32], sums[2][W][CHUNK][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, segment = blockIdx.y;
    i64 plane = states * channels, width = PLANES * states;
    for (i64 group = 0; group < groups; group++) {
        i64 channel = (static_cast<i64>(blockIdx.x) * groups + group) * 32 + lane;
        bool here = channel < channels;
        if (here && warp == 0) {
            clear_rest(dx, offsets, segment, segments, tokens, channel);
            clear_rest(d_dt, offsets, segment, segments, tokens, channel);
        }
        if (segments == 0) continue;
        i64 start = offsets[segment], stop = offsets[segment + 1];
        i64 chunks = (stop - start + CHUNK - 1) / CHUNK;
        float* sum_of = time_parts + segment * (3 * width + 2) * channels + channel;
        for (i64 row = warp; row < 3 * width + 2 && here; row += W) sum_of[row * channels] = 0.0f;
        if (here) {
            for (i64 n = warp; n < states; n += W) {
                i64 col = n * channels + channel;
                Number d = d_last.present() ? load_number(d_last.row(segment) + col, plane) : real(0.0f);
                store_number(g.row(segment) + col, plane, d);
            }
        }
        for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
            i64 first = start + chunk * CHUNK;
            int steps = static_cast<int>(stop - first < CHUNK ? stop - first : CHUNK);
            for (int t = warp; t < steps; t += W) {
                xs[t][lane] = here ? to_f32(x.row(first + t)[channel]) : 0.0f;
                deltas[t][lane] = here ? step_size(dt, dt_bias, first + t, channel) : 0.0f;
                dys[t][lane] = here && dy.present() ? to_f32(dy.row(first + t)[channel]) : 0.0f;
            }
            for (int t = 0; t < steps; t++) sums[0][warp][t][lane] = sums[1][warp][t][lane] = 0.0f;
            __syncthreads();
            for (i64 n = warp; n < states; n += W) {
                i64 col = n * channels + channel;
                Number zero = real(0.0f), at = zero, fixed_b = zero, fixed_c = zero, d = zero;
                // The state before each step.
                Number before[CHUNK + 1];
                before[0] = zero;
                if (here) {
                    at = a_of(a, a_imag, channel, n);
                    before[0] = load_number(kept.row(start / CHUNK + segment + chunk) + col, plane);
                    d = load_number(g.row(segment) + col, plane);
                    if (B_FIXED) fixed_b = load_number(b.row(channel) + n, states);
                    if (C_FIXED) fixed_c = load_number(c.row(channel) + n, states);
                }
                for (int t = 0; t < steps; t++) {
                    Step step(at, deltas[t][lane]);
                    Number bt = B_FIXED ? fixed_b : load_number(b.row(first + t) + n, states);
                    before[t + 1] = add(mul(step.decay, before[t]), scale(mul(step.factor, bt), xs[t][lane]));
                }
                Number da = zero, db_sum = zero, dc_sum = zero;
                for (int t = steps - 1; t >= 0; t--) {
                    float delta = deltas[t][lane], dyt = static_cast<float>(PLANES) * dys[t][lane];
                    Step step(at, delta);
                    Number bt = B_FIXED ? fixed_b : load_number(b.row(first + t) + n, states);
                    Number ct = C_FIXED ? fixed_c : load_number(c.row(first + t) + n, states);
                    d = add(d, scale(conj(ct), dyt));
                    Number dc = scale(conj(before[t + 1]), dyt);
                    Number dxb = scale(d, xs[t][lane]);
                    Number db = mul(dxb, conj(step.factor)), d_factor = mul(dxb, conj(bt));
                    Number dz = mul(d, conj(mul(step.decay, before[t])));
                    da = add(da, scale(dz, delta));
                    float d_delta = mul(dz, conj(at)).re;
                    if (ZOH) {
                        Number slope = scale(phi_slope(scale(at, delta), step.decay), delta * delta);
                        da = add(da, mul(d_factor, conj(slope)));
                        d_delta += mul(d_factor, conj(step.decay)).re;
                    } else {
                        d_delta += d_factor.re;
                    }
                    sums[0][warp][t][lane] += mul(d, conj(mul(step.factor, bt))).re;
                    sums[1][warp][t][lane] += d_delta;
                    if (B_FIXED) db_sum = add(db_sum, db);
                    if (C_FIXED) dc_sum = add(dc_sum, dc);
                    if (!B_FIXED || !C_FIXED) {
                        float parts[4] = {db.re, db.im, dc.re, dc.im};
                        float* row = row_parts + (blockIdx.x * tokens + first + t) * 2 * width + n;
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            if ((i < 2 ? B_FIXED : C_FIXED) || (i % 2 == 1 && !COMPLEX)) continue;
                            float sum = warp_sum(here ? parts[i] : 0.0f);
                            float* to = row + i / 2 * width + i % 2 * states;
                            if (lane == 0) *to = group == 0 ? sum : *to + sum;
                        }
                    }
                    d = mul(d, conj(step.decay));
                }
                if (here) {
                    store_number(g.row(segment) + col, plane, d);
                    Number found[3] = {da, db_sum, dc_sum};
#pragma unroll
                    for (int i = 0; i < 3; i++) {
                        float* to = sum_of + (i * width + n) * channels;
                        to[0] += found[i].re;
                        if (COMPLEX) to[plane] += found[i].im;
                    }
                }
            }
            __syncthreads();
            // The first warp ends the chunk, so that sums over time have one order.
            if (warp == 0 && here) {
                float dd = 0.0f, d_bias = 0.0f;
                for (int t = steps - 1; t >= 0; t--) {
                    float dxt = skip.present() ? skip.data[channel] * dys[t][lane] : 0.0f, d_delta = 0.0f;
                    for (int w = 0; w < W; w++) dxt += sums[0][w][t][lane], d_delta += sums[1][w][t][lane];
                    dd += xs[t][lane] * dys[t][lane];
                    // The slope of softplus is the logistic function, 1 - exp(-softplus).
                    float slope = -expm1f(-deltas[t][lane]);
                    d_bias += d_delta * slope;
                    if (dx.present()) set(dx.row(first + t)[channel], dxt);
                    if (d_dt.present()) set(d_dt.row(first + t)[channel], d_delta * slope);
                }
                sum_of[3 * width * channels] += dd;
                sum_of[(3 * width + 1) * channels] += d_bias;
            }
            __syncthreads();
        }
        __syncthreads();
    }
}

// dB or dC [tokens, cols] from the parts of all blocks, zero in rows of no segment; a thread an element.
KERNEL __launch_bounds__(256) add_rows(const float* parts, const int* offsets, Mat<T> out, i64 blocks, i64 tokens, i64 cols,
                                       i64 stride, int segments) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= tokens * cols) return;
    i64 t = i / cols, col = i - t * cols;
    float sum = 0.0f;
    if (segments > 0 && t >= offsets[0] && t < offsets[segments])
        for (i64 block = 0; block < blocks; block++) sum += parts[(block * tokens + t) * stride + col];
    set(out.row(t)[col], sum);
}

// Sums over segments of rows first .. first + rows of the parts: out[channel, row], or out[row, channel] for a vector.
KERNEL __launch_bounds__(256) add_time(const float* parts, Mat<float> out, i64 rows, i64 channels, i64 stride, int segments,
                                       int vector) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= rows * channels) return;
    i64 row = i / channels, channel = i - row * channels;
    float sum = 0.0f;
    for (int s = 0; s < segments; s++) sum += parts[s * stride + row * channels + channel];
    (vector ? out.data[channel] : out.row(channel)[row]) = sum;
}
