// Rows of a table by number, and the sum of rows with the same number.
//
// Both move memory and nothing else. The sum is deterministic without float atomics: a counting sort gives each row of
// the result the list of its values' positions, in whatever order; its block puts the list in ascending order. Then the
// lists, one after another, are cut into pieces of PIECE positions, each a block's: a list that lies in one piece is
// added up there, a longer one (a frequent token's) from the sums of its pieces, in order.
//
// Macros: TI type of the rows that are read, TO type of the rows that are written, V elements of one access; PIECE.

// y[i] = x[rows[i]], or x[i] without row numbers; NaN where there is no such row. A warp makes a row.
KERNEL __launch_bounds__(256) gather(Mat<TI> x, const int* rows, Mat<TO> y, i64 count, i64 n, i64 cols) {
    i64 i = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) / WARP;
    if (i >= count) return;
    i64 from = rows != nullptr ? rows[i] : i;
    bool there = from >= 0 && from < n;
    for (i64 c = threadIdx.x % WARP * V; c < cols; c += WARP * V) {
        float v[V];
        if (there) {
            load_at<V>(v, x.row(from), c, cols);
        } else {
#pragma unroll
            for (int k = 0; k < V; k++) v[k] = bits_to_f32(0x7fc00000u);
        }
        store<V>(y.row(i) + c, v);
    }
}

// counts[r] = how often r occurs; counts are zero before.
KERNEL __launch_bounds__(256) count(const int* rows, int* counts, i64 count, i64 n) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= count) return;
    i64 r = rows[i];
    if (r >= 0 && r < n) atomicAdd(&counts[r], 1);
}

// starts[r] = counts[0] + … + counts[r − 1], and counts back to zero: they count again while lists are filled. One block,
// which takes 1024 runs of EACH counts at a time.
#define EACH 8

// EACH numbers by two accesses.
DEVICE void copy_run(int* to, const int* from) {
    u32x4 low = reinterpret_cast<const u32x4*>(from)[0], high = reinterpret_cast<const u32x4*>(from)[1];
    reinterpret_cast<u32x4*>(to)[0] = low;
    reinterpret_cast<u32x4*>(to)[1] = high;
}

KERNEL __launch_bounds__(1024) sum_counts(int* counts, int* starts, i64 n) {
    __shared__ int sums[32];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = 0;
    for (i64 tile = 0; tile < n; tile += 1024 * EACH) {
        i64 first = tile + threadIdx.x * EACH;
        __align__(16) int mine[EACH] = {};
        int sum = 0;
        bool whole = first + EACH <= n;
        if (whole) {
            copy_run(mine, counts + first);
        } else {
            for (int k = 0; k < EACH && first + k < n; k++) mine[k] = counts[first + k];
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) sum += mine[k];
        int upto = sum;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(0xffffffffu, upto, step);
            upto += lane >= step ? other : 0;
        }
        if (lane == WARP - 1) sums[warp] = upto;
        __syncthreads();
        int start = before + upto - sum;
        for (int w = 0; w < 32; w++) {
            start += w < warp ? sums[w] : 0;
            before += sums[w];
        }
        __syncthreads();
        __align__(16) int at[EACH];
        __align__(16) int zero[EACH] = {};
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            at[k] = start;
            start += mine[k];
        }
        if (whole) {
            copy_run(starts + first, at);
            copy_run(counts + first, zero);
        } else {
            for (int k = 0; k < EACH && first + k < n; k++) starts[first + k] = at[k], counts[first + k] = 0;
        }
    }
    if (threadIdx.x == 0) starts[n] = before;
}

// lists[starts[r] ..] = the positions i with rows[i] = r, in some order.
KERNEL __launch_bounds__(256) fill_lists(const int* rows, int* counts, const int* starts, int* lists, i64 count, i64 n) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= count) return;
    i64 r = rows[i];
    if (r >= 0 && r < n) lists[starts[r] + atomicAdd(&counts[r], 1)] = static_cast<int>(i);
}

// Puts each list in ascending order. A block has eight rows of the result, a warp each. Lists up to SHORT are sorted by the
// warp: the place of a position is the number of smaller ones. For longer ones the block looks at all positions in order.
#define SHORT 128
KERNEL __launch_bounds__(256) sort_lists(const int* rows, const int* starts, const int* lists, int* sorted, i64 count, i64 n) {
    __shared__ int found[8];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    i64 first_row = static_cast<i64>(blockIdx.x) * 8;
    if (first_row + warp < n) {
        int start = starts[first_row + warp], length = starts[first_row + warp + 1] - start;
        for (int i = lane; i < length && length <= SHORT; i += WARP) {
            int mine = lists[start + i], place = 0;
            for (int k = 0; k < length; k++) place += lists[start + k] < mine;
            sorted[start + place] = mine;
        }
    }
    for (i64 r = first_row; r < first_row + 8 && r < n; r++) {
        int start = starts[r];
        if (starts[r + 1] - start <= SHORT) continue;
        for (i64 first = 0; first < count; first += 256) {
            i64 i = first + threadIdx.x;
            bool mine = i < count && rows[i] == r;
            u32 mask = __ballot_sync(0xffffffffu, mine);
            if (lane == 0) found[warp] = __popc(mask);
            __syncthreads();
            int place = start + __popc(mask & ((1u << lane) - 1));
            for (int w = 0; w < 8; w++) {
                place += w < warp ? found[w] : 0;
                start += found[w];
            }
            if (mine) sorted[place] = static_cast<int>(i);
            __syncthreads();
        }
    }
}

// Sums of piece blockIdx.x of the sorted positions: of a list that lies in it, to the result; of one that began before to
// parts[2 · piece], of one that goes on after it to parts[2 · piece + 1], rows of `cols` numbers.
KERNEL __launch_bounds__(256) add_pieces(Mat<TI> values, const int* rows, const int* starts, const int* sorted, float* parts, Mat<TO> sum, i64 n, i64 cols) {
    i64 first = static_cast<i64>(blockIdx.x) * PIECE, all = starts[n];
    i64 last = first + PIECE < all ? first + PIECE : all;
    for (i64 c = threadIdx.x * V; c < cols; c += 256 * V) {
        for (i64 k = first; k < last;) {
            i64 r = rows[sorted[k]];
            i64 begin = starts[r], end = starts[r + 1], stop = end < last ? end : last;
            float total[V] = {};
#pragma unroll 4
            for (; k < stop; k++) {
                float v[V];
                load_at<V>(v, values.row(sorted[k]), c, cols);
#pragma unroll
                for (int j = 0; j < V; j++) total[j] += v[j];
            }
            if (begin >= first && end <= last) {
                store<V>(sum.row(r) + c, total);
            } else {
                store<V>(parts + (2 * static_cast<i64>(blockIdx.x) + (begin < first ? 0 : 1)) * cols + c, total);
            }
        }
    }
}

// The rows that no piece made: those of empty lists are zero, those of lists over several pieces the sum of their parts.
// A warp makes a row.
KERNEL __launch_bounds__(256) add_parts(const int* starts, const float* parts, Mat<TO> sum, i64 n, i64 cols) {
    i64 r = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) / WARP;
    if (r >= n) return;
    i64 begin = starts[r], end = starts[r + 1];
    i64 first = begin / PIECE, last = end == begin ? first : (end - 1) / PIECE;
    if (end > begin && first == last) return;
    for (i64 c = threadIdx.x % WARP * V; c < cols; c += WARP * V) {
        float total[V] = {};
        for (i64 p = first; end > begin && p <= last; p++) {
            float v[V];
            load<V>(v, parts + (2 * p + (p == first ? 1 : 0)) * cols + c);
#pragma unroll
            for (int j = 0; j < V; j++) total[j] += v[j];
        }
        store<V>(sum.row(r) + c, total);
    }
}
