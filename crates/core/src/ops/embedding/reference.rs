//! The embedding in plain f64: what the kernel is tested against.

/// Row `ids[t]` of a table with rows of `width` numbers, for every t; NaN where there is no such row.
pub fn embedding(ids: &[i32], table: &[f64], width: usize) -> Vec<f64> {
    let row = |&id: &i32| table.chunks_exact(width).nth(usize::try_from(id).unwrap_or(usize::MAX));
    ids.iter().flat_map(|id| row(id).map_or(vec![f64::NAN; width], <[f64]>::to_vec)).collect()
}
