// Kernels for the emulator's own tests, right ones and mistaken ones.

KERNEL __launch_bounds__(256) sums(float* out) {
    __shared__ float scratch[32];
    float before = __shfl_sync(0xffffffffu, static_cast<float>(threadIdx.x % 32), threadIdx.x + 31);
    float sum = block_sum(static_cast<float>(threadIdx.x), scratch);
    if (blockIdx.x == 1) out[threadIdx.x] = sum + before;
}

// d = a · b by ldmatrix and mma: a [16, 16], b [16, 8], d [16, 8] behind each other.
KERNEL multiply(float* data) {
    __shared__ __align__(16) bf16 a[16 * 16];
    __shared__ __align__(16) bf16 b[16 * 8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) set(a[i], data[i]);
    for (int i = lane; i < 128; i += 32) set(b[i], data[256 + i]);
    __syncwarp();
    u32 left[4], right[2];
    ldmatrix_x4(left, a + (lane % 16) * 16 + lane / 16 * 8);
    ldmatrix_x2_trans(right, b + lane % 16 * 8);
    float d[4] = {};
    mma_bf16(d, left, right);
    for (int i = 0; i < 4; i++) data[384 + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

KERNEL copy(float* data) {
    __shared__ float there[32];
    copy_async4(&there[threadIdx.x], &data[threadIdx.x]);
    copy_async_commit();
    float early = there[threadIdx.x];
    copy_async_wait<0>();
    data[32 + threadIdx.x] = there[threadIdx.x];
    data[threadIdx.x] = early;
}

KERNEL unwritten(float* out) {
    __shared__ float fixed[32];
    DYNAMIC_SHARED(bytes);
    out[threadIdx.x] = fixed[threadIdx.x];
    out[32 + threadIdx.x] = reinterpret_cast<float*>(bytes)[threadIdx.x];
}

KERNEL __launch_bounds__(64) race(float* out) {
    __shared__ float numbers[64];
    numbers[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = numbers[63 - threadIdx.x];
}

KERNEL some_leave(float* out) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
}

KERNEL different_barriers(float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads_or(1);
}

KERNEL half_a_warp(float* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

KERNEL misaligned(float* out) {
    float v[4] = {};
    store<4>(reinterpret_cast<float*>(reinterpret_cast<char*>(out) + 2), v);
}

KERNEL out_of_bounds(float* out) {
    float numbers[4] = {};
    for (int i = 0; i <= 4; i++) numbers[i] = out[i];
    out[0] = numbers[threadIdx.x % 4];
}

KERNEL two_arguments(float* out, int n) { out[0] = n; }
