// The tokens before the first of segment `s`, 0 without a state. A state may hold anything: a NaN counts as 0.
DEVICE i64 position_of(Mat<float> positions, i64 s) {
    if (!positions.present()) return 0;
    const float* numbers = positions.row(s);
    double at = static_cast<double>(numbers[0]) + 1048576.0 * static_cast<double>(numbers[1]);
    return at > 0.0 ? static_cast<i64>(at < 17592186044416.0 ? at : 17592186044416.0) : 0;
}
