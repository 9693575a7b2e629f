// Turns pairs of every head's numbers. A thread takes a pair, or a number that stays, of a row in every gridDim.y-th head.
// Rows in no segment become zero. Angles are computed in f64. Memory bounds it, but for few heads, where
// sine and cosine do.
//
// Macros: T.

KERNEL __launch_bounds__(256) rotary(Mat<T> x, Mat<T> y, const int* offsets, Mat<float> positions, i64 rows, i64 segments,
                                     i64 heads, i64 headdim, i64 dims, float base, float sign) {
    i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, half = dims / 2, each = headdim - half;
    i64 row = i / each, c = i - row * each;
    if (row >= rows) return;
    int segment = segment_of(offsets, static_cast<int>(segments), row);
    double sine = 0.0, cosine = 1.0;
    if (segment >= 0 && c < half) {
        i64 position = position_of(positions, segment) + row - offsets[segment];
        double angle = static_cast<double>(position) * pow(static_cast<double>(base), -2.0 * static_cast<double>(c) / static_cast<double>(dims));
        sincos(angle, &sine, &cosine);
    }
    float sin_f32 = sign * static_cast<float>(sine), cos_f32 = static_cast<float>(cosine);
    for (i64 head = blockIdx.y; head < heads; head += gridDim.y) {
        const T* from = x.row(row) + head * headdim;
        T* to = y.row(row) + head * headdim;
        if (c >= half) {
            set(to[c + half], segment >= 0 ? to_f32(from[c + half]) : 0.0f);
        } else {
            float a = segment >= 0 ? to_f32(from[c]) : 0.0f, b = segment >= 0 ? to_f32(from[c + half]) : 0.0f;
            set(to[c], a * cos_f32 - b * sin_f32);
            set(to[c + half], b * cos_f32 + a * sin_f32);
        }
    }
}
