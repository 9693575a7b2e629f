//! A counter-based random generator: the number at a position depends on seed and position only, so a mask can be
//! drawn again in the backward pass, by any thread, on any device.

/// Philox 2x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
///
/// Returns 64 random bits for one (key, counter) pair.
pub fn philox(key: u32, counter: u64) -> u64 {
    let (mut lo, mut hi, mut k) = (counter as u32, (counter >> 32) as u32, key);
    for _ in 0..10 {
        let product = u64::from(lo) * 0xD256_D193;
        lo = (product >> 32) as u32 ^ k ^ hi;
        hi = product as u32;
        k = k.wrapping_add(0x9E37_79B9);
    }
    u64::from(hi) << 32 | u64::from(lo)
}

/// A uniform number in [0, 1) with 24 random bits, exactly representable in f32.
pub fn uniform(key: u32, counter: u64) -> f32 {
    (philox(key, counter) >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_published_vector() {
        // Random123, kat_vectors: philox2x32-10 with counter and key all zero.
        let bits = philox(0, 0);
        assert_eq!((bits as u32, (bits >> 32) as u32), (0xff1d_ae59, 0x6cd1_0df2));
    }

    #[test]
    fn uniform_is_uniform() {
        let n = 100_000;
        let values: Vec<f32> = (0..n).map(|i| uniform(7, i)).collect();
        assert!(values.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 5e-3, "mean {mean}");
    }
}
