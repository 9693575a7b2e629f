// The rows of a table of weights that begin the residual stream of a step, ready for the first product.
//
// A block has a token: the time is that of one read after another, id and row.
//
// Macros: TABLE type of the table, V elements that a thread loads at once.

#define THREADS 256

KERNEL __launch_bounds__(THREADS) step_embedding(const int* ids, Mat<TABLE> table, Mat<float> weight, Mat<float> stream, Mat<bf16> weighted,
                                                 Mat<float> squares, int rows, int cols) {
    __shared__ float scratch[32];
    let_next_start();
    wait_for_previous();
    int token = blockIdx.x, id = ids[token];
    float sum = 0.0f;
    for (int c = threadIdx.x * V; c < cols; c += THREADS * V) {
        float v[V], w[V];
        load<V>(w, weight.data + c);
        if (id >= 0 && id < rows) {
            load_at<V>(v, table.row(id), c, cols);
        } else {
            for (int i = 0; i < V; i++) v[i] = bits_to_f32(0x7fc00000u);
        }
#pragma unroll
        for (int i = 0; i < V; i++) sum += v[i] * v[i], w[i] *= v[i];
        store<V>(stream.row(token) + c, v);
        store<V>(weighted.row(token) + c, w);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) squares.row(token)[0] = sum;
}
