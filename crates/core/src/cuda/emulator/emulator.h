// Runs the threads of a kernel on a CPU, so that kernels can be tested without a GPU. g++ reads this before the prelude,
// whose part below `#ifndef FAKE_CUDA` it replaces. emulator/mod.rs compiles a variant and launches its kernels.
//
// Blocks run one after another. The threads of a block are fibers that take turns: one runs until it waits for others.
// What goes wrong on a GPU by chance goes wrong here always: shared memory starts as NaN, an asynchronous copy arrives when it
// is waited for and not before, and the reversed order of threads and blocks of a second run shows missing barriers.
// Threads that wait for each other forever, misaligned accesses and indices out of bounds are errors.
//
// How to add a primitive to the prelude's replaced part: write a function of the same name below. Then
// - what a thread does alone is plain C++ (`ex2`);
// - a warp collective hands its operands to `emulator::meet`, which returns those of all lanes (`__shfl_sync`, `mma_bf16`);
// - everything else that waits says for what: `emulator::wait_until("mbarrier", [&] { return …; })`.

#pragma once
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static const
#define __shared__ static __attribute__((section("emulated_shared")))
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::launch->shared
#define EMULATED static inline

// The memory of all `__shared__` variables; the linker sets the two.
extern "C" unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// What emulator/mod.rs asks for; the same structure stands there.
struct Launch {
    unsigned grid[3], threads;
    // Blocks and threads in descending order.
    unsigned reversed;
    unsigned args;
    // Addresses of the arguments, what each is ('m' a Mat, 'p' a pointer, 'i' int, 'l' long long, 'f' float, 't' a table), bytes.
    void** arg;
    const char* kinds;
    const uint64_t* bytes;
    // Dynamic shared memory, its bytes, and what a block may have in all.
    unsigned char* shared;
    uint64_t shared_bytes, shared_most;
    // Stacks for 1024 threads.
    unsigned char* stacks;
    uint64_t stack_bytes;
    // Called where memory is touched that is not there.
    void (*fault)(int);
    char error[1024];
};

// Operands of the lanes that have come to a warp collective with the same mask. Two sets: some lanes may come to the next
// collective while others still read.
struct Meeting {
    unsigned mask, arrived, generation;
    const char* what;
    alignas(16) unsigned char slots[2][32][64];
};

struct Barrier {
    unsigned arrived, generation, expected;
    const char* what;
    int any[2], all[2], count[2];
};

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, zeros, group;
};

struct Fiber {
    ucontext_t start;
    jmp_buf context;
    bool entered, done;
    Index thread;
    unsigned lane, warp;
    // What it waits for, if it does.
    const char* what;
    bool (*ready)(void*);
    void* condition;
    // Asynchronous copies under way, and the number of the group that is being filled.
    std::vector<Copy> copies;
    unsigned group;
};

static Launch* launch;
static Fiber* me;
static Index block;
static jmp_buf scheduler;
static void (*body)(void*);
static void* parameters;
static bool failed;
static Fiber* fibers;
static Meeting meetings[32][16];
static Barrier barriers[16];

static __attribute__((noinline)) void leave() {
    if (_setjmp(me->context) == 0) _longjmp(scheduler, 1);
}

// Ends the launch with a message.
static __attribute__((noinline)) void fail(const char* format, ...) {
    if (!failed) {
        failed = true;
        int n = 0;
        if (me != nullptr)
            n = snprintf(launch->error, sizeof launch->error, "block (%u, %u, %u), thread %u: ", block.x, block.y, block.z, me->thread.x);
        va_list list;
        va_start(list, format);
        vsnprintf(launch->error + n, sizeof launch->error - n, format, list);
        va_end(list);
    }
    if (me != nullptr) leave();
}

// Lets others run until `ready()`.
template <class Ready>
EMULATED void wait_until(const char* what, Ready ready) {
    if (ready()) return;
    me->what = what;
    me->condition = &ready;
    me->ready = [](void* condition) { return (*static_cast<Ready*>(condition))(); };
    leave();
    me->ready = nullptr;
}

// Waits for all lanes of the mask; the operands of lane i are at result[i].
typedef unsigned char Slot[64];
static const Slot* meet(unsigned mask, const char* what, const void* operands, size_t bytes) {
    unsigned width = launch->threads - me->warp * 32;
    if (width < 32) mask &= (1u << width) - 1;
    if ((mask >> me->lane & 1) == 0) fail("%s: the mask %08x lacks the lane itself", what, mask);
    int i = 0;
    Meeting* all = meetings[me->warp];
    while (all[i].mask != mask && all[i].mask != 0)
        if (++i == 16) fail("%s: more than 16 different masks", what);
    Meeting& m = all[i];
    m.mask = mask;
    if (m.arrived != 0 && strcmp(m.what, what) != 0) fail("lanes of a warp wait at %s and at %s", m.what, what);
    m.what = what;
    m.arrived |= 1u << me->lane;
    unsigned generation = m.generation;
    memcpy(m.slots[generation % 2][me->lane], operands, bytes);
    if (m.arrived == mask) {
        m.arrived = 0;
        m.generation++;
    } else {
        wait_until(what, [&m, generation] { return m.generation != generation; });
    }
    return m.slots[generation % 2];
}

// Waits for `expected` threads; the result has what they brought.
static const Barrier& barrier(unsigned id, unsigned expected, const char* what, int value, unsigned& parity) {
    if (id >= 16) fail("there is no barrier %u", id);
    Barrier& b = barriers[id];
    if (b.arrived != 0 && (strcmp(b.what, what) != 0 || b.expected != expected)) fail("threads wait at %s and at %s", b.what, what);
    parity = b.generation % 2;
    if (b.arrived == 0) b.any[parity] = 0, b.all[parity] = 1, b.count[parity] = 0;
    b.what = what, b.expected = expected;
    b.any[parity] |= value != 0, b.all[parity] &= value != 0, b.count[parity] += value != 0;
    unsigned generation = b.generation;
    if (++b.arrived == expected) {
        b.arrived = 0;
        b.generation++;
    } else {
        wait_until(what, [&b, generation] { return b.generation != generation; });
    }
    return b;
}

// Copies the committed groups but the last `pending`.
EMULATED void finish_copies(unsigned pending) {
    std::vector<Copy> rest;
    for (const Copy& c : me->copies) {
        if (c.group + pending < me->group) {
            memcpy(c.to, c.from, c.bytes);
            memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
        } else {
            rest.push_back(c);
        }
    }
    me->copies = std::move(rest);
}
// `bytes` and then `zeros` zeros, which stand there when the copy was waited for; until then NaN does.
EMULATED void copy_later(void* to, const void* from, unsigned bytes, unsigned zeros) {
    unsigned whole = bytes + zeros;
    if (reinterpret_cast<uintptr_t>(to) % whole != 0 || bytes > 0 && reinterpret_cast<uintptr_t>(from) % whole != 0)
        fail("an asynchronous copy of %u bytes is misaligned", whole);
    memset(to, 0xff, whole);
    me->copies.push_back({to, from, bytes, zeros, me->group});
}

// --- launching --------------------------------------------------------------------------------------------------------

static void fiber_main() {
    for (;;) {
        body(parameters);
        me->done = true;
        leave();
    }
}

static __attribute__((noinline)) void resume(Fiber& f) {
    me = &f;
    if (_setjmp(scheduler) == 0) {
        if (f.entered) _longjmp(f.context, 1);
        f.entered = true;
        setcontext(&f.start);
    }
    me = nullptr;
}

static void run_block() {
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    memset(launch->shared, 0xff, launch->shared_bytes);
    for (auto& warp : meetings)
        for (Meeting& m : warp) m.mask = m.arrived = 0;
    for (Barrier& b : barriers) b.arrived = 0;
    unsigned n = launch->threads, warps = (n + 31) / 32, done = 0;
    for (unsigned i = 0; i < n; i++) {
        fibers[i].done = false, fibers[i].ready = nullptr;
        fibers[i].copies.clear();
        fibers[i].group = 0;
    }
    while (done < n) {
        bool progress = false;
        for (unsigned w = 0; w < warps; w++) {
            unsigned warp = launch->reversed ? warps - 1 - w : w;
            bool moved;
            do {
                moved = false;
                for (unsigned l = 0; l < 32; l++) {
                    unsigned i = warp * 32 + (launch->reversed ? 31 - l : l);
                    if (i >= n || fibers[i].done || fibers[i].ready && !fibers[i].ready(fibers[i].condition)) continue;
                    resume(fibers[i]);
                    if (failed) return;
                    done += fibers[i].done;
                    moved = progress = true;
                }
            } while (moved);
        }
        if (progress || done == n) continue;
        const Fiber* first = nullptr;
        for (unsigned i = 0; i < n; i++) {
            if (fibers[i].done) continue;
            if (first == nullptr) first = &fibers[i];
            if (strcmp(first->what, fibers[i].what) == 0) continue;
            return fail("block (%u, %u, %u): thread %u waits at %s and thread %u at %s", block.x, block.y, block.z, first->thread.x, first->what, i, fibers[i].what);
        }
        return fail("block (%u, %u, %u): thread %u waits at %s for threads that never come there; %u of %u have ended", block.x, block.y, block.z, first->thread.x, first->what, done, n);
    }
}

static void run_grid(Launch* asked, unsigned most_threads) {
    launch = asked;
    failed = false;
    me = nullptr;
    uint64_t fixed = __stop_emulated_shared - __start_emulated_shared;
    if (fixed > 48 << 10) return fail("%lu bytes of __shared__ variables, of at most 48 KiB", fixed);
    if (fixed + launch->shared_bytes > launch->shared_most)
        return fail("needs %lu bytes of shared memory, of %lu", fixed + launch->shared_bytes, launch->shared_most);
    if (launch->threads > most_threads || launch->threads > 1024)
        return fail("%u threads, but __launch_bounds__(%u)", launch->threads, most_threads);
    struct sigaction action = {};
    action.sa_handler = launch->fault;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    std::vector<Fiber> all(launch->threads);
    fibers = all.data();
    uint64_t* bottom;
    for (unsigned i = 0; i < launch->threads; i++) {
        Fiber& f = fibers[i];
        f.thread = {i, 0, 0}, f.lane = i % 32, f.warp = i / 32, f.entered = false;
        getcontext(&f.start);
        bottom = reinterpret_cast<uint64_t*>(launch->stacks + i * launch->stack_bytes);
        *bottom = 0x5eed5eed5eed5eed;
        f.start.uc_stack.ss_sp = bottom;
        f.start.uc_stack.ss_size = launch->stack_bytes;
        f.start.uc_link = nullptr;
        makecontext(&f.start, fiber_main, 0);
    }
    uint64_t blocks = static_cast<uint64_t>(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    for (uint64_t b = 0; b < blocks && !failed; b++) {
        uint64_t i = launch->reversed ? blocks - 1 - b : b;
        block = {static_cast<unsigned>(i % launch->grid[0]), static_cast<unsigned>(i / launch->grid[0] % launch->grid[1]),
                 static_cast<unsigned>(i / launch->grid[0] / launch->grid[1])};
        run_block();
    }
    for (unsigned i = 0; i < launch->threads && !failed; i++) {
        bottom = reinterpret_cast<uint64_t*>(launch->stacks + i * launch->stack_bytes);
        if (*bottom != 0x5eed5eed5eed5eed) fail("a thread's stack of %lu bytes is too small", launch->stack_bytes);
    }
}

template <class A>
constexpr char kind_of() {
    if (std::is_pointer_v<A>) return 'p';
    if (std::is_same_v<A, float>) return 'f';
    if (std::is_same_v<A, int>) return 'i';
    if (std::is_same_v<A, long long>) return 'l';
    return std::is_class_v<A> ? 's' : '?';
}

template <class... A, size_t... I>
void run(Launch* asked, void (*kernel)(A...), unsigned most_threads, std::index_sequence<I...>) {
    const char kinds[] = {kind_of<A>()..., 0};
    const uint64_t bytes[] = {sizeof(A)..., 0};
    launch = asked;
    me = nullptr;
    failed = false;
    if (asked->args != sizeof...(A)) return fail("takes %lu arguments, but got %u", sizeof...(A), asked->args);
    for (unsigned i = 0; i < sizeof...(A); i++) {
        char got = asked->kinds[i] == 'm' || asked->kinds[i] == 't' ? 's' : asked->kinds[i];
        if (got != kinds[i] || asked->bytes[i] != bytes[i])
            return fail("argument %u is '%c' of %lu bytes, but got '%c' of %lu", i, kinds[i], bytes[i], asked->kinds[i], asked->bytes[i]);
    }
    auto call = [&] { kernel(*static_cast<A*>(asked->arg[I])...); };
    parameters = &call;
    body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    run_grid(asked, most_threads);
}
template <class... A>
void run(Launch* asked, void (*kernel)(A...), unsigned most_threads) {
    run(asked, kernel, most_threads, std::index_sequence_for<A...>());
}

}  // namespace emulator

// Stands behind the source for each kernel in it, with its launch bounds.
#define EMULATED_ENTRY(name, ...)                                                                                    \
    extern "C" __attribute__((visibility("default"))) void emulated_##name(emulator::Launch* asked) {                 \
        unsigned bounds[] = {__VA_ARGS__};                                                                            \
        emulator::run(asked, name, bounds[0]);                                                                        \
    }

// What the compiler's checks of undefined behaviour call: structures that begin with a place in the source.
struct EmulatedPlace {
    const char* file;
    unsigned line, column;
};
extern "C" __attribute__((visibility("hidden"), weak)) void __ubsan_handle_type_mismatch_v1(EmulatedPlace* at, uintptr_t address) {
    emulator::fail("%s:%u:%u: a misaligned access at %p, or one through a null pointer", at->file, at->line, at->column, reinterpret_cast<void*>(address));
}
extern "C" __attribute__((visibility("hidden"), weak)) void __ubsan_handle_out_of_bounds(EmulatedPlace* at, uintptr_t index) {
    emulator::fail("%s:%u:%u: index %ld is out of bounds", at->file, at->line, at->column, static_cast<long>(index));
}

// --- what the prelude replaces ----------------------------------------------------------------------------------------

EMULATED float bits_to_f32(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
EMULATED unsigned f32_to_bits(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
EMULATED unsigned short f32_to_bf16_bits(float x) {
    unsigned bits = f32_to_bits(x);
    if (x != x) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
EMULATED unsigned pack_bf16(float lo, float hi) {
    return static_cast<unsigned>(f32_to_bf16_bits(hi)) << 16 | f32_to_bf16_bits(lo);
}

EMULATED float f16_to_f32(unsigned short bits) {
    float magnitude = (bits >> 10 & 31) == 31 ? INFINITY : bits_to_f32((bits & 0x7fffu) << 13) * 0x1p112f;
    return bits & 0x8000 ? -magnitude : magnitude;
}

// The special function unit takes numbers below 2^-126 for 0, and gives 0 for them.
EMULATED float emulated_flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
EMULATED float ex2(float x) { return emulated_flush(exp2f(emulated_flush(x))); }
EMULATED float lg2(float x) { return emulated_flush(log2f(emulated_flush(x))); }
EMULATED float rcp(float x) { return emulated_flush(1.0f / emulated_flush(x)); }

EMULATED void copy_async4(void* shared, const void* global) { emulator::copy_later(shared, global, 4, 0); }
EMULATED void copy_async16(void* shared, const void* global) { emulator::copy_later(shared, global, 16, 0); }
EMULATED void prefetch(const void*) {}
EMULATED void copy_async_commit() { emulator::me->group++; }
template <int Pending>
EMULATED void copy_async_wait() {
    emulator::finish_copies(Pending);
}

EMULATED void emulated_ldmatrix(unsigned* r, const void* row, unsigned count, bool transposed) {
    unsigned char mine[16] = {};
    unsigned lane = emulator::me->lane;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0 && lane < 8 * count) emulator::fail("ldmatrix: a misaligned row");
    if (lane < 8 * count) memcpy(mine, row, 16);
    const emulator::Slot* rows = emulator::meet(0xffffffffu, "ldmatrix", mine, 16);
    for (unsigned m = 0; m < count; m++) {
        unsigned short two[2];
        for (unsigned k = 0; k < 2; k++) {
            unsigned from = transposed ? lane % 4 * 2 + k : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + k;
            memcpy(&two[k], rows[8 * m + from] + 2 * col, 2);
        }
        r[m] = static_cast<unsigned>(two[1]) << 16 | two[0];
    }
}
EMULATED void ldmatrix_x4(unsigned* r, const void* row) { emulated_ldmatrix(r, row, 4, false); }
EMULATED void ldmatrix_x4_trans(unsigned* r, const void* row) { emulated_ldmatrix(r, row, 4, true); }
EMULATED void ldmatrix_x2(unsigned* r, const void* row) { emulated_ldmatrix(r, row, 2, false); }
EMULATED void ldmatrix_x2_trans(unsigned* r, const void* row) { emulated_ldmatrix(r, row, 2, true); }

EMULATED void mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const emulator::Slot* all = emulator::meet(0xffffffffu, "mma_bf16", mine, sizeof mine);
    auto half = [&](unsigned lane, unsigned reg, unsigned which) {
        unsigned two;
        memcpy(&two, all[lane] + 4 * reg, 4);
        return which ? bits_to_f32(two & 0xffff0000u) : bits_to_f32(two << 16);
    };
    unsigned g = emulator::me->lane / 4, t = emulator::me->lane % 4;
    for (unsigned i = 0; i < 4; i++) {
        double sum = d[i];
        for (unsigned k = 0; k < 16; k++)
            sum += static_cast<double>(half(g * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2)) * half((2 * t + i % 2) * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        d[i] = static_cast<float>(sum);
    }
}

EMULATED void mma_tf32(float* d, const float* a, const float* b) {
    float mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const emulator::Slot* all = emulator::meet(0xffffffffu, "mma_tf32", mine, sizeof mine);
    auto value = [&](unsigned lane, unsigned reg) {
        unsigned bits;
        memcpy(&bits, all[lane] + 4 * reg, 4);
        return static_cast<double>(bits_to_f32(bits & 0xffffe000u));
    };
    unsigned g = emulator::me->lane / 4, t = emulator::me->lane % 4;
    for (unsigned i = 0; i < 4; i++) {
        double sum = d[i];
        for (unsigned k = 0; k < 8; k++) sum += value(g * 4 + k % 4, i / 2 + k / 4 * 2) * value((2 * t + i % 2) * 4 + k % 4, 4 + k / 4);
        d[i] = static_cast<float>(sum);
    }
}

EMULATED void wait_for_previous() {}
EMULATED void let_next_start() {}

// --- what CUDA C++ has built in ---------------------------------------------------------------------------------------

#define threadIdx (emulator::me->thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::Index{emulator::launch->threads, 1, 1})
#define gridDim (emulator::Index{emulator::launch->grid[0], emulator::launch->grid[1], emulator::launch->grid[2]})

EMULATED void __syncthreads() {
    unsigned parity;
    emulator::barrier(0, emulator::launch->threads, "__syncthreads", 0, parity);
}
EMULATED int __syncthreads_or(int value) {
    unsigned parity;
    return emulator::barrier(0, emulator::launch->threads, "__syncthreads_or", value, parity).any[parity];
}
EMULATED int __syncthreads_and(int value) {
    unsigned parity;
    return emulator::barrier(0, emulator::launch->threads, "__syncthreads_and", value, parity).all[parity];
}
EMULATED int __syncthreads_count(int value) {
    unsigned parity;
    return emulator::barrier(0, emulator::launch->threads, "__syncthreads_count", value, parity).count[parity];
}
EMULATED void __syncwarp(unsigned mask = 0xffffffffu) { emulator::meet(mask, "__syncwarp", &mask, 4); }

// The value of lane `from` of those that called; NaN where it did not.
template <class E>
EMULATED E emulated_shuffle(unsigned mask, E value, unsigned from, const char* what) {
    const emulator::Slot* all = emulator::meet(mask, what, &value, sizeof value);
    if (from >= 32 || (mask >> from & 1) == 0)
        memset(&value, 0xff, sizeof value);
    else
        memcpy(&value, all[from], sizeof value);
    return value;
}
template <class E>
EMULATED E __shfl_sync(unsigned mask, E value, int from, int width = 32) {
    return emulated_shuffle(mask, value, emulator::me->lane / width * width + (from & (width - 1)), "__shfl_sync");
}
template <class E>
EMULATED E __shfl_xor_sync(unsigned mask, E value, int lanes, int width = 32) {
    unsigned lane = emulator::me->lane, from = lane ^ lanes;
    return emulated_shuffle(mask, value, from / width > lane / width ? lane : from, "__shfl_xor_sync");
}
template <class E>
EMULATED E __shfl_up_sync(unsigned mask, E value, unsigned lanes, int width = 32) {
    unsigned lane = emulator::me->lane;
    return emulated_shuffle(mask, value, lane % width < lanes ? lane : lane - lanes, "__shfl_up_sync");
}
template <class E>
EMULATED E __shfl_down_sync(unsigned mask, E value, unsigned lanes, int width = 32) {
    unsigned lane = emulator::me->lane;
    return emulated_shuffle(mask, value, lane % width + lanes >= unsigned(width) ? lane : lane + lanes, "__shfl_down_sync");
}
// Combines the values of all lanes in the mask, ascending.
template <class E, class F>
EMULATED E emulated_reduce(unsigned mask, E value, const char* what, F combine) {
    const emulator::Slot* all = emulator::meet(mask, what, &value, sizeof value);
    bool first = true;
    for (unsigned lane = 0; lane < 32 && emulator::me->warp * 32 + lane < emulator::launch->threads; lane++) {
        if ((mask >> lane & 1) == 0) continue;
        E other;
        memcpy(&other, all[lane], sizeof other);
        value = first ? other : combine(value, other);
        first = false;
    }
    return value;
}
EMULATED unsigned __ballot_sync(unsigned mask, int value) {
    unsigned bit = value != 0 ? 1u << emulator::me->lane : 0;
    return emulated_reduce(mask, bit, "__ballot_sync", [](unsigned a, unsigned b) { return a | b; });
}
EMULATED int __any_sync(unsigned mask, int value) {
    return emulated_reduce(mask, int(value != 0), "__any_sync", [](int a, int b) { return a | b; });
}
EMULATED int __all_sync(unsigned mask, int value) {
    return emulated_reduce(mask, int(value != 0), "__all_sync", [](int a, int b) { return a & b; });
}
template <class E>
EMULATED E __reduce_add_sync(unsigned mask, E value) {
    return emulated_reduce(mask, value, "__reduce_add_sync", [](E a, E b) { return a + b; });
}
template <class E>
EMULATED E __reduce_min_sync(unsigned mask, E value) {
    return emulated_reduce(mask, value, "__reduce_min_sync", [](E a, E b) { return a < b ? a : b; });
}
template <class E>
EMULATED E __reduce_max_sync(unsigned mask, E value) {
    return emulated_reduce(mask, value, "__reduce_max_sync", [](E a, E b) { return a > b ? a : b; });
}
template <class E>
EMULATED E __reduce_or_sync(unsigned mask, E value) {
    return emulated_reduce(mask, value, "__reduce_or_sync", [](E a, E b) { return a | b; });
}

// Fibers are not interrupted, so plain operations are atomic.
template <class E, class F>
EMULATED E emulated_atomic(E* to, F change) {
    E old = *to;
    *to = change(old);
    return old;
}
template <class E>
EMULATED E atomicAdd(E* to, E value) { return emulated_atomic(to, [=](E old) { return E(old + value); }); }
template <class E>
EMULATED E atomicMax(E* to, E value) { return emulated_atomic(to, [=](E old) { return old > value ? old : value; }); }
template <class E>
EMULATED E atomicMin(E* to, E value) { return emulated_atomic(to, [=](E old) { return old < value ? old : value; }); }
template <class E>
EMULATED E atomicOr(E* to, E value) { return emulated_atomic(to, [=](E old) { return E(old | value); }); }
template <class E>
EMULATED E atomicExch(E* to, E value) { return emulated_atomic(to, [=](E) { return value; }); }
template <class E>
EMULATED E atomicCAS(E* to, E expected, E value) { return emulated_atomic(to, [=](E old) { return old == expected ? value : old; }); }
EMULATED void __threadfence() {}
EMULATED void __threadfence_block() {}

EMULATED float __fadd_rn(float a, float b) { return a + b; }
EMULATED float __fsub_rn(float a, float b) { return a - b; }
EMULATED float __fmul_rn(float a, float b) { return a * b; }
EMULATED float __fdiv_rn(float a, float b) { return a / b; }
EMULATED float __fsqrt_rn(float a) { return sqrtf(a); }
EMULATED float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMULATED float __fdividef(float a, float b) { return a / b; }
// The C library has its own functions of these names.
#define __expf expf
#define __logf logf
EMULATED float rsqrtf(float a) { return 1.0f / sqrtf(a); }
EMULATED unsigned __float_as_uint(float x) { return f32_to_bits(x); }
EMULATED float __uint_as_float(unsigned x) { return bits_to_f32(x); }
EMULATED int __float_as_int(float x) { return static_cast<int>(f32_to_bits(x)); }
EMULATED float __int_as_float(int x) { return bits_to_f32(static_cast<unsigned>(x)); }
EMULATED int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATED int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
EMULATED int __ffs(int x) { return __builtin_ffs(x); }
template <class E>
EMULATED E __ldg(const E* p) { return *p; }
template <class A, class B>
EMULATED std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <class A, class B>
EMULATED std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }
