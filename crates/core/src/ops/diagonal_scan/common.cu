// The diagonal scan, forward and backward, for research: any part may be fixed, A may be complex.
//
// A lane owns a channel, a warp every W-th state of the 32 channels; a block walks through a segment chunk by chunk.
// What belongs to a step but to no state (x, the step size, sums over states) is in shared memory. Sums over states are
// kept per warp, those over channels (dB, dC) per block of channels, those over time per segment; all are added in order.
//
// Macros: T type of activations; TB, TC types of B and C (T, or float where they are fixed); COMPLEX, ZOH, B_FIXED, C_FIXED 0
// or 1; CHUNK steps between kept states; W warps of a block.

#define PLANES (1 + COMPLEX)

struct Number {
    float re, im;
};
DEVICE Number real(float re) { return Number{re, 0.0f}; }
DEVICE Number conj(Number a) { return Number{a.re, -a.im}; }
DEVICE Number scale(Number a, float by) { return Number{a.re * by, COMPLEX ? a.im * by : 0.0f}; }
DEVICE Number add(Number a, Number b) { return Number{a.re + b.re, COMPLEX ? a.im + b.im : 0.0f}; }
DEVICE Number mul(Number a, Number b) {
    if (!COMPLEX) return real(a.re * b.re);
    return Number{a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
DEVICE Number exp(Number z) {
    float magnitude = expf(z.re);
    return COMPLEX ? Number{magnitude * cosf(z.im), magnitude * sinf(z.im)} : real(magnitude);
}
// Where |z| < 1/2 the sum of z^k c_k, elsewhere over / z.
DEVICE Number near_or_far(Number z, const float* c, Number over) {
    float square = z.re * z.re + (COMPLEX ? z.im * z.im : 0.0f);
    if (square >= 0.25f) return scale(mul(over, conj(z)), 1.0f / square);
    Number sum = real(c[8]);
#pragma unroll
    for (int k = 7; k >= 0; k--) sum = add(mul(sum, z), real(c[k]));
    return sum;
}
// (e^z - 1) / z and its derivative, given e^z.
DEVICE Number phi(Number z, Number e) {
    const float c[9] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040, 1.0f / 40320, 1.0f / 362880};
    return near_or_far(z, c, Number{e.re - 1.0f, e.im});
}
DEVICE Number phi_slope(Number z, Number e) {
    const float c[9] = {1.0f / 2, 1.0f / 3, 1.0f / 8, 1.0f / 30, 1.0f / 144, 1.0f / 840, 1.0f / 5760, 1.0f / 45360, 1.0f / 403200};
    return near_or_far(z, c, add(e, scale(phi(z, e), -1.0f)));
}

// A number of a row whose imaginary parts are `plane` elements behind the real ones.
template <typename E>
DEVICE Number load_number(const E* from, i64 plane) {
    return Number{to_f32(from[0]), COMPLEX ? to_f32(from[plane]) : 0.0f};
}
DEVICE void store_number(float* to, i64 plane, Number a) {
    to[0] = a.re;
    if (COMPLEX) to[plane] = a.im;
}

// What a step makes of A: the decay, and what multiplies B x.
struct Step {
    Number decay, factor;
    DEVICE Step(Number a, float delta) {
        Number z = scale(a, delta);
        decay = exp(z);
        factor = ZOH ? scale(phi(z, decay), delta) : real(delta);
    }
};

DEVICE float step_size(Mat<T> dt, Mat<float> bias, i64 row, i64 channel) {
    float raw = dt.present() ? to_f32(dt.row(row)[channel]) : 0.0f;
    return softplus(raw + (bias.present() ? bias.data[channel] : 0.0f));
}

DEVICE Number a_of(Mat<float> a, Mat<float> a_imag, i64 channel, i64 n) {
    return Number{a.row(channel)[n], COMPLEX ? a_imag.row(channel)[n] : 0.0f};
}

// Rows of `out` in no segment become zero; by the blocks of the first and of the last segment.
DEVICE void clear_rest(Mat<T> out, const int* offsets, int segment, int segments, i64 tokens, i64 channel) {
    if (!out.present()) return;
    i64 start = segments > 0 ? offsets[0] : tokens, stop = segments > 0 ? offsets[segments] : tokens;
    if (segment == 0)
        for (i64 t = 0; t < start; t++) set(out.row(t)[channel], 0.0f);
    if (segment + 1 == segments)
        for (i64 t = stop; t < tokens; t++) set(out.row(t)[channel], 0.0f);
}
