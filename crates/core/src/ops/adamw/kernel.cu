// The norm of all gradients, and a step of AdamW on all parameters in one launch.
//
// Both are bound by memory: the norm reads 4 bytes a parameter, the step reads 16 and writes 12, and 2 more for a copy
// rounded to bf16. A thread takes 4 neighbouring parameters. Operations are those of the CPU, each rounded by itself.
//
// Macros: BLOCK numbers that a block of the norm adds up; COUNT ranges of parameters that decay; SHADOW 0 or 1.

// parts[b] = the sum of the squares of block b, in f64: a fixed tree over the threads.
KERNEL __launch_bounds__(256) squares(Mat<float> x, double* parts, i64 n) {
    __shared__ double sums[256];
    i64 first = static_cast<i64>(blockIdx.x) * BLOCK;
    i64 last = first + BLOCK < n ? first + BLOCK : n;
    double sum = 0.0;
    i64 i = first + threadIdx.x * 4;
    for (; i + 4 <= last; i += 1024) {
        float v[4];
        load<4>(v, x.data + i);
#pragma unroll
        for (int k = 0; k < 4; k++) sum += static_cast<double>(v[k]) * v[k];
    }
    for (; i < last; i++) sum += static_cast<double>(x.data[i]) * x.data[i];
    sums[threadIdx.x] = sum;
    for (int step = 128; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x == 0) parts[blockIdx.x] = sums[0];
}

// The root of the sum of the parts.
KERNEL __launch_bounds__(256) root(const double* parts, Mat<float> norm, i64 count) {
    __shared__ double sums[256];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += 256) sum += parts[i];
    sums[threadIdx.x] = sum;
    for (int step = 128; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x == 0) norm.data[0] = static_cast<float>(sqrt(sums[0]));
}

// place = the number of the first element of x that is infinite or NaN, all ones where there is none; looked for only if
// the norm is. One block: this is for the end of a run that went astray.
KERNEL __launch_bounds__(1024) first_not_finite(Mat<float> x, Mat<float> norm, u64* place, i64 n) {
    __shared__ u32 lowest;
    if (fabsf(norm.data[0]) <= 3.4028234e38f) n = 0;
    if (threadIdx.x == 0) lowest = 1024;
    u64 found = ~0ull;
    for (i64 first = 0; first < n && found == ~0ull; first += 1024) {
        i64 i = first + threadIdx.x;
        __syncthreads();
        if (i < n && !(fabsf(x.data[i]) <= 3.4028234e38f)) atomicMin(&lowest, static_cast<u32>(threadIdx.x));
        __syncthreads();
        if (lowest < 1024) found = first + lowest;
    }
    if (threadIdx.x == 0) *place = found;
}

// Starts and ends of the ranges, ascending.
struct Ranges {
    i64 at[2 * COUNT + 1];
};

// Parameters [first, last).
KERNEL __launch_bounds__(256) adamw(Mat<float> params, Mat<float> grads, Mat<float> m, Mat<float> v, Mat<float> hyper,
                                    Mat<float> norm, Mat<bf16> shadow, i64 first, i64 last, Ranges decayed) {
    i64 i = first + (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) * 4;
    float found = norm.data[0];
    // Infinite or NaN: nothing is changed.
    if (i >= last || !(fabsf(found) <= 3.4028234e38f)) return;
    float lr = hyper.data[0], beta1 = hyper.data[1], beta2 = hyper.data[2], eps = hyper.data[3];
    float decay = hyper.data[4], most = hyper.data[5], correction1 = hyper.data[6], correction2 = hyper.data[7];
    float clip = most > 0.0f ? fminf(__fdiv_rn(most, __fadd_rn(found, 1e-6f)), 1.0f) : 1.0f;
    float beta1_rest = __fsub_rn(1.0f, beta1), beta2_rest = __fsub_rn(1.0f, beta2);
    float keep = __fsub_rn(1.0f, __fmul_rn(lr, decay));
    float step_size = __fdiv_rn(lr, correction1), root_correction = __fdiv_rn(1.0f, __fsqrt_rn(correction2));
    // The first range that ends after i.
    int range = 0, high = COUNT;
    while (range < high) {
        int middle = (range + high) / 2;
        if (decayed.at[2 * middle + 1] <= i) range = middle + 1; else high = middle;
    }
    bool whole = i + 4 <= last;
    float P[4], G[4], M[4], V[4];
    if (whole) {
        load<4>(P, params.data + i), load<4>(G, grads.data + i), load<4>(M, m.data + i), load<4>(V, v.data + i);
    } else {
        for (int k = 0; k < 4 && i + k < last; k++)
            P[k] = params.data[i + k], G[k] = grads.data[i + k], M[k] = m.data[i + k], V[k] = v.data[i + k];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        while (range < COUNT && decayed.at[2 * range + 1] <= i + k) range++;
        bool decays = range < COUNT && decayed.at[2 * range] <= i + k;
        float g = __fmul_rn(G[k], clip);
        M[k] = __fadd_rn(__fmul_rn(beta1, M[k]), __fmul_rn(beta1_rest, g));
        V[k] = __fadd_rn(__fmul_rn(beta2, V[k]), __fmul_rn(__fmul_rn(beta2_rest, g), g));
        float p = decays ? __fmul_rn(P[k], keep) : P[k];
        float below = __fadd_rn(__fmul_rn(__fsqrt_rn(V[k]), root_correction), eps);
        P[k] = __fsub_rn(p, __fmul_rn(step_size, __fdiv_rn(M[k], below)));
    }
    if (whole) {
        store<4>(params.data + i, P), store<4>(m.data + i, M), store<4>(v.data + i, V);
        if (SHADOW) store<4>(shadow.data + i, P);
    } else {
        for (int k = 0; k < 4 && i + k < last; k++) {
            params.data[i + k] = P[k], m.data[i + k] = M[k], v.data[i + k] = V[k];
            if (SHADOW) set(shadow.data[i + k], P[k]);
        }
    }
}
