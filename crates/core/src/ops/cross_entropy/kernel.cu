// Losses of rows of logits, and their gradients in place.
//
// A block takes a row. It reads the logits twice, first for the maximum and the sum of exponentials (in one pass: the sum
// is scaled when a larger number comes), then to write the gradient over them; where a row fits, the first reading leaves
// it in shared memory for the second. Memory bounds it: 2 elements of traffic a logit.
//
// Macros: T type of the logits; GRADIENT, SHARED 0 or 1; THREADS of a block.

// Elements of one access.
#define V (16 / sizeof(T))

struct Running {
    float top, sum;
};

// Σ exp over both, relative to the larger maximum.
DEVICE Running combine(Running a, Running b) {
    float top = fmaxf(a.top, b.top);
    // Of two empty sums the difference would be NaN.
    float left = a.sum == 0.0f ? 0.0f : a.sum * fast_exp(a.top - top);
    float right = b.sum == 0.0f ? 0.0f : b.sum * fast_exp(b.top - top);
    return {top, left + right};
}

// logits [rows, width] of the rows first .. first + rows of the targets; nll [1, …] of those rows. With GRADIENT the
// logits become scale · (softmax − one at the target).
KERNEL __launch_bounds__(THREADS) losses(Mat<T> logits, const int* targets, Mat<float> scale, Mat<float> nll, i64 first, i64 width) {
    __shared__ float tops[32], sums[32];
#if SHARED
    DYNAMIC_SHARED(bytes);
    T* kept = reinterpret_cast<T*>(bytes);
#endif
    T* row = logits.row(blockIdx.x);
    i64 target = targets[first + blockIdx.x];
    Running mine = {-3.4028234e38f, 0.0f};
    bool odd = false;
#pragma unroll 4
    for (i64 c = threadIdx.x * V; c < width; c += THREADS * V) {
        float v[V];
        int count = width - c < static_cast<i64>(V) ? static_cast<int>(width - c) : static_cast<int>(V);
        load<V>(v, row + c);
#if SHARED
        store<V>(kept + c, v);
#endif
        float top = mine.top;
#pragma unroll
        for (int k = 0; k < V; k++) {
            if (k >= count) v[k] = -3.4028234e38f;
            odd |= v[k] != v[k];
            top = fmaxf(top, v[k]);
        }
        float sum = mine.sum * fast_exp(mine.top - top);
#pragma unroll
        for (int k = 0; k < V; k++) sum += k < count ? fast_exp(v[k] - top) : 0.0f;
        mine = {top, sum};
    }
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        Running other = {__shfl_xor_sync(0xffffffffu, mine.top, lane), __shfl_xor_sync(0xffffffffu, mine.sum, lane)};
        mine = combine(mine, other);
    }
    if (threadIdx.x % WARP == 0) tops[threadIdx.x / WARP] = mine.top, sums[threadIdx.x / WARP] = mine.sum;
    odd = __syncthreads_or(odd);
    Running all = {tops[0], sums[0]};
    for (int w = 1; w < THREADS / WARP; w++) all = combine(all, {tops[w], sums[w]});
    float nothing = bits_to_f32(0x7fc00000u);
    bool bad = odd || target < -1 || target >= width;
    if (threadIdx.x == 0) {
        float loss = target == -1 ? 0.0f : all.top + logf(all.sum) - to_f32(row[target < 0 || target >= width ? 0 : target]);
        nll.data[first + blockIdx.x] = target == -1 ? 0.0f : (bad ? nothing : loss);
    }
#if GRADIENT
    __syncthreads();
    float factor = target == -1 ? 0.0f : (bad ? nothing : scale.data[0]);
    float share = factor / all.sum;
    for (i64 c = threadIdx.x * V; c < width; c += THREADS * V) {
        float v[V];
#if SHARED
        load<V>(v, kept + c);
#else
        load<V>(v, row + c);
#endif
#pragma unroll
        for (int k = 0; k < V; k++) {
            // A row without a target is zero whatever its logits are.
            v[k] = target == -1 ? 0.0f : share * fast_exp(v[k] - all.top) - (c + k == target ? factor : 0.0f);
        }
        store<V>(row + c, v);
    }
#endif
}

// loss = scale · Σ nll, in f64, in a fixed order.
KERNEL __launch_bounds__(256) total(Mat<float> nll, Mat<float> scale, Mat<float> loss, i64 tokens) {
    __shared__ double sums[256];
    double sum = 0.0;
    for (i64 t = threadIdx.x; t < tokens; t += 256) sum += nll.data[t];
    sums[threadIdx.x] = sum;
    for (int step = 128; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x == 0) loss.data[0] = static_cast<float>(sums[0] * scale.data[0]);
}
