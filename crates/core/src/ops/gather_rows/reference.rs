//! Gathering rows in plain f64: what the kernel is tested against.

/// `y[i] = x[rows[i]]` for `x` of rows of `width` numbers; NaN where there is no such row.
pub fn gather_rows(x: &[f64], width: usize, rows: &[i32]) -> Vec<f64> {
    let row = |&r: &i32| x.chunks_exact(width).nth(usize::try_from(r).unwrap_or(usize::MAX));
    rows.iter().flat_map(|r| row(r).map_or(vec![f64::NAN; width], <[f64]>::to_vec)).collect()
}
