// What every kernel of hognose builds on. It is put in front of each kernel.cu, so that no header is needed.
//
// Rules for kernels:
// - an entry point is written `KERNEL name(...)` or `KERNEL __launch_bounds__(threads) name(...)`, never through a macro;
// - what varies (element type, state size, tile sizes) is a macro that the launch defines: `T`, `N`, ...;
// - pointers and strides come as Mat<T>, an optional operand that is missing has data == nullptr;
// - offsets into matrices are 64-bit.
//
// Assembler stands here only, between `#ifndef FAKE_CUDA` and its end: to run kernels on a CPU, tests replace this part by
// emulator/emulator.h, so what is added here needs a counterpart there.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define KERNEL extern "C" __global__ void
#define DEVICE __device__ __forceinline__
#define WARP 32

// Storage of a bf16: the upper half of an f32.
struct __align__(2) bf16 {
    unsigned short bits;
};

// Rows of a matrix `stride` elements apart.
template <typename E>
struct Mat {
    E* data;
    i64 stride;
    DEVICE E* row(i64 r) const { return data + r * stride; }
    DEVICE bool present() const { return data != nullptr; }
};

struct __align__(16) f32x4 {
    float x, y, z, w;
};
struct __align__(8) f32x2 {
    float x, y;
};
struct __align__(16) u32x4 {
    u32 x, y, z, w;
};
struct __align__(8) u32x2 {
    u32 x, y;
};

// A number of a row of Q8_0: the numbers of a row, filled up to a multiple of 32, are followed by a scale of 16 bits for
// each 32 of them. Two neighbouring blocks lie in turns of eight numbers, see `q8_place`. The stride of such a matrix is
// that of rows with their scales.
struct q8 {
    signed char value;
};

#ifndef FAKE_CUDA

// Threads of a block share this memory, whose size the launch gives.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE float bits_to_f32(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 f32_to_bits(float x) { return __float_as_uint(x); }

// Round to nearest even.
DEVICE unsigned short f32_to_bf16_bits(float x) {
    unsigned short r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
// Two rounded values in one register: `lo` in the lower half.
DEVICE u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

DEVICE float f16_to_f32(unsigned short bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
}

// 2^x, log2 x, 1/x and 1/sqrt(x) of the special function unit: about 2 units in the last place.
DEVICE float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float rcp(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Copies from global to shared memory that run on while the thread goes on; 4 or 16 bytes, aligned to that.
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE void copy_async4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void copy_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Brings the line of an address into the level-2 cache.
DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
// Waits until at most `Pending` of the committed groups are still under way.
template <int Pending>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 8x8 matrices of 16-bit elements from shared memory into the fragments of mma_bf16: lane i gives the address of row
// i % 8 of matrix i / 8 (16 bytes, aligned to 16). `_trans` transposes each matrix.
DEVICE void ldmatrix_x4(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_x4_trans(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_x2(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_x2_trans(u32* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// d += a · b for a [16, 16], b [16, 8] in bf16 and d [16, 8] in f32, each spread over a warp as the PTX manual's
// m16n8k16 has it: with g = lane / 4 and t = lane % 4, d is (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1);
// a is (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); b is (2t.., g), (2t+8.., g).
DEVICE void mma_bf16(float* d, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a · b for a [16, 8], b [8, 8] in tf32, which is f32 whose lower 13 bits are ignored, and d [16, 8] in f32: d as
// above; a is (g, t), (g+8, t), (g, t+4), (g+8, t+4); b is (t, g), (t+4, g).
DEVICE void mma_tf32(float* d, const float* a, const float* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(f32_to_bits(a[0])), "r"(f32_to_bits(a[1])), "r"(f32_to_bits(a[2])), "r"(f32_to_bits(a[3])),
                   "r"(f32_to_bits(b[0])), "r"(f32_to_bits(b[1])));
}

// Programmatic dependent launch: a kernel may start while the one before it ends. Nothing that the one before wrote may
// be read, and nothing it still reads may be written, before `wait_for_previous`.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // FAKE_CUDA

// --- elements ---------------------------------------------------------------------------------------------------------

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(bf16 x) { return bits_to_f32(static_cast<u32>(x.bits) << 16); }
DEVICE void set(float& to, float x) { to = x; }
DEVICE void set(bf16& to, float x) { to.bits = f32_to_bf16_bits(x); }
// The two halves of a register that holds two bf16.
DEVICE float bf16_lo(u32 two) { return bits_to_f32(two << 16); }
DEVICE float bf16_hi(u32 two) { return bits_to_f32(two & 0xffff0000u); }

// `Count` consecutive elements as f32: one access where they fill 2, 4, 8 or 16 bytes and are aligned to that.
template <int Count>
DEVICE void load(float* to, const float* from) {
    if constexpr (Count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += 4) {
            f32x4 v = *reinterpret_cast<const f32x4*>(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else if constexpr (Count == 2) {
        f32x2 v = *reinterpret_cast<const f32x2*>(from);
        to[0] = v.x, to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < Count; i++) to[i] = from[i];
    }
}
template <int Count>
DEVICE void load(float* to, const bf16* from) {
    if constexpr (Count % 8 == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += 8) {
            u32x4 v = *reinterpret_cast<const u32x4*>(from + i);
            to[i] = bf16_lo(v.x), to[i + 1] = bf16_hi(v.x), to[i + 2] = bf16_lo(v.y), to[i + 3] = bf16_hi(v.y);
            to[i + 4] = bf16_lo(v.z), to[i + 5] = bf16_hi(v.z), to[i + 6] = bf16_lo(v.w), to[i + 7] = bf16_hi(v.w);
        }
    } else if constexpr (Count == 4) {
        u32x2 v = *reinterpret_cast<const u32x2*>(from);
        to[0] = bf16_lo(v.x), to[1] = bf16_hi(v.x), to[2] = bf16_lo(v.y), to[3] = bf16_hi(v.y);
    } else if constexpr (Count == 2) {
        u32 v = *reinterpret_cast<const u32*>(from);
        to[0] = bf16_lo(v), to[1] = bf16_hi(v);
    } else {
#pragma unroll
        for (int i = 0; i < Count; i++) to[i] = to_f32(from[i]);
    }
}
template <int Count>
DEVICE void store(float* to, const float* from) {
    if constexpr (Count % 4 == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += 4)
            *reinterpret_cast<f32x4*>(to + i) = f32x4{from[i], from[i + 1], from[i + 2], from[i + 3]};
    } else if constexpr (Count == 2) {
        *reinterpret_cast<f32x2*>(to) = f32x2{from[0], from[1]};
    } else {
#pragma unroll
        for (int i = 0; i < Count; i++) to[i] = from[i];
    }
}
template <int Count>
DEVICE void store(bf16* to, const float* from) {
    if constexpr (Count % 8 == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += 8)
            *reinterpret_cast<u32x4*>(to + i) = u32x4{pack_bf16(from[i], from[i + 1]), pack_bf16(from[i + 2], from[i + 3]),
                                                      pack_bf16(from[i + 4], from[i + 5]), pack_bf16(from[i + 6], from[i + 7])};
    } else if constexpr (Count == 4) {
        *reinterpret_cast<u32x2*>(to) = u32x2{pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3])};
    } else if constexpr (Count == 2) {
        *reinterpret_cast<u32*>(to) = pack_bf16(from[0], from[1]);
    } else {
#pragma unroll
        for (int i = 0; i < Count; i++) set(to[i], from[i]);
    }
}

// Scale of block `block` in a row of Q8_0 with `cols` numbers.
DEVICE float q8_scale(const q8* row, i64 cols, i64 block) {
    const q8* scales = row + (cols + 31) / 32 * 32;
    return f16_to_f32(reinterpret_cast<const unsigned short*>(scales)[block]);
}
// Where number c lies: so that 16 bytes have 8 numbers of each of two blocks, if there are two.
DEVICE i64 q8_place(i64 c, i64 cols) {
    if (c / 64 * 64 + 32 >= cols) return c;
    return c / 64 * 64 + c % 32 / 8 * 16 + c % 64 / 32 * 8 + c % 8;
}
// Eight 8-bit numbers as bf16, exactly: 2^23 + 128 + q is an f32 whose last bits are those of q with the sign turned.
DEVICE u32x4 q8_to_bf16(u32 low, u32 high) {
    u32 words[2] = {low ^ 0x80808080u, high ^ 0x80808080u}, r[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 two = words[i / 2] >> (16 * (i % 2));
        float lo = bits_to_f32(0x4b000000u | (two & 0xffu)), hi = bits_to_f32(0x4b000000u | (two >> 8 & 0xffu));
        r[i] = pack_bf16(lo - 8388736.0f, hi - 8388736.0f);
    }
    return u32x4{r[0], r[1], r[2], r[3]};
}

// `Count` elements of a row of `cols` from column c on, a multiple of Count, which divides 8.
template <int Count, typename E>
DEVICE void load_at(float* to, const E* row, i64 c, i64) { load<Count>(to, row + c); }
template <int Count>
DEVICE void load_at(float* to, const q8* row, i64 c, i64 cols) {
    float scale = q8_scale(row, cols, c / 32);
#pragma unroll
    for (int i = 0; i < Count; i++) to[i] = scale * static_cast<float>(row[q8_place(c, cols) + i].value);
}

// --- functions --------------------------------------------------------------------------------------------------------

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

// e^x, by 2^x: the relative error grows with |x| to about 2^-22 + |x| 2^-24.
DEVICE float fast_exp(float x) { return ex2(x * LOG2_E); }
DEVICE float sigmoid(float x) { return rcp(1.0f + fast_exp(-x)); }
// For x far below zero the exponential overflows to infinity, its reciprocal is 0 and so is the product.
DEVICE float silu(float x) { return x * sigmoid(x); }
// silu'(x) = s (1 + x (1 - s)).
DEVICE float dsilu(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}
// ln(1 + e^x); the identity above 20, as in PyTorch. Below -8 the series e^x - e^2x/2 keeps the relative precision that
// the logarithm of a number close to 1 would lose.
DEVICE float softplus(float x) {
    float e = fast_exp(x);
    float large = lg2(1.0f + e) * LN_2;
    float small = e * (1.0f + e * (-0.5f + e * (0.33333333f - 0.25f * e)));
    return x > 20.0f ? x : (x < -3.5f ? small : large);
}

// --- sums -------------------------------------------------------------------------------------------------------------

// The sum over a warp, in every lane, in a fixed order.
DEVICE float warp_sum(float v) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}
// The sum over a block of a multiple of 32 threads, in every thread, in a fixed order. `scratch` has 32 floats of shared
// memory; it may be used again after the next barrier.
DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    int warps = (blockDim.x + WARP - 1) / WARP;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += scratch[i];
    __syncthreads();
    return sum;
}

// The segment that row `row` lies in, or -1: the last s with offsets[s] <= row, if row < offsets[s + 1].
DEVICE int segment_of(const int* offsets, int segments, i64 row) {
    int low = 0, high = segments;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (offsets[middle] <= row) low = middle; else high = middle;
    }
    return segments > 0 && offsets[low] <= row && row < offsets[low + 1] ? low : -1;
}
