// Rows of a table by number, and the sum of rows with the same number.
//
// Both move memory and nothing else. The sum is deterministic without float atomics: a counting sort gives each row of
// the result the list of its values' positions, in whatever order; its block puts the list in ascending order, then adds
// the rows up in that order.
//
// Macros: TI type of the rows that are read, TO type of the rows that are written, V elements of one access.

// y[i] = x[rows[i]]; NaN where there is no such row. A warp makes a row.
KERNEL __launch_bounds__(256) gather(Mat<TI> x, const int* rows, Mat<TO> y, i64 count, i64 n, i64 cols) {
    i64 i = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) / WARP;
    if (i >= count) return;
    i64 from = rows[i];
    bool there = from >= 0 && from < n;
    for (i64 c = threadIdx.x % WARP * V; c < cols; c += WARP * V) {
        float v[V];
        if (there) {
            load<V>(v, x.row(from) + c);
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

// starts[r] = counts[0] + … + counts[r − 1], and counts back to zero: they count again while lists are filled. One block
// of 1024 threads, each with a run of numbers.
KERNEL __launch_bounds__(1024) sum_counts(int* counts, int* starts, i64 n) {
    __shared__ int sums[1024];
    i64 each = (n + 1023) / 1024;
    i64 first = threadIdx.x * each;
    i64 last = first + each < n ? first + each : n;
    int sum = 0;
    for (i64 r = first; r < last; r++) sum += counts[r];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int step = 1; step < 1024; step *= 2) {
        int before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
        __syncthreads();
        sums[threadIdx.x] += before;
        __syncthreads();
    }
    int start = sums[threadIdx.x] - sum;
    for (i64 r = first; r < last; r++) {
        starts[r] = start;
        start += counts[r];
        counts[r] = 0;
    }
    if (threadIdx.x == 1023) starts[n] = sums[1023];
}

// lists[starts[r] ..] = the positions i with rows[i] = r, in some order.
KERNEL __launch_bounds__(256) fill_lists(const int* rows, int* counts, const int* starts, int* lists, i64 count, i64 n) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= count) return;
    i64 r = rows[i];
    if (r >= 0 && r < n) lists[starts[r] + atomicAdd(&counts[r], 1)] = static_cast<int>(i);
}

// Puts each list in ascending order: the place of a position is the number of smaller ones. A block a row of the result.
KERNEL __launch_bounds__(256) sort_lists(const int* starts, const int* lists, int* sorted) {
    i64 r = blockIdx.x;
    int start = starts[r], length = starts[r + 1] - start;
    for (int i = threadIdx.x; i < length; i += 256) {
        int mine = lists[start + i], place = 0;
        for (int k = 0; k < length; k++) place += lists[start + k] < mine;
        sorted[start + place] = mine;
    }
}

// sum[r] = values[i] added up over the list of r, ascending. A warp makes a row.
KERNEL __launch_bounds__(256) add_up(Mat<TI> values, const int* starts, const int* sorted, Mat<TO> sum, i64 n, i64 cols) {
    i64 r = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) / WARP;
    if (r >= n) return;
    int start = starts[r], end = starts[r + 1];
    for (i64 c = threadIdx.x % WARP * V; c < cols; c += WARP * V) {
        float total[V] = {};
        for (int k = start; k < end; k++) {
            float v[V];
            load<V>(v, values.row(sorted[k]) + c);
#pragma unroll
            for (int j = 0; j < V; j++) total[j] += v[j];
        }
        store<V>(sum.row(r) + c, total);
    }
}
