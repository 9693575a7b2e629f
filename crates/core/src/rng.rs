//! A counter-based random generator: the number at a position depends on seed and position only, so a mask can be
//! drawn again in the backward pass, by any thread, on any device.

const ROUNDS: usize = 10;
const MULTIPLIER: u64 = 0xD256_D193;
const KEY_STEP: u32 = 0x9E37_79B9;

/// Philox 2x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
///
/// Returns 64 random bits for one (key, counter) pair.
pub fn philox(key: u32, counter: u64) -> u64 {
    let (mut lo, mut hi, mut k) = (counter as u32, (counter >> 32) as u32, key);
    for _ in 0..ROUNDS {
        let product = u64::from(lo) * MULTIPLIER;
        lo = (product >> 32) as u32 ^ k ^ hi;
        hi = product as u32;
        k = k.wrapping_add(KEY_STEP);
    }
    u64::from(hi) << 32 | u64::from(lo)
}

/// A uniform number in [0, 1) with 24 random bits, exactly representable in f32.
pub fn uniform(key: u32, counter: u64) -> f32 {
    (philox(key, counter) >> 40) as f32 * (1.0 / (1u32 << 24) as f32)
}

/// [`uniform`] at `N` positions from `first` on. All lanes take a step before any takes the next one, so that the
/// compiler vectorises this with the instructions of the kernel that calls it; best for N of 32 or more.
#[inline(always)]
pub fn uniforms<const N: usize>(key: u32, first: u64) -> [f32; N] {
    // The words are 32 bits in 64-bit lanes, where their products fit.
    const WORD: u64 = u32::MAX as u64;
    let mut lo: [u64; N] = std::array::from_fn(|i| first.wrapping_add(i as u64) & WORD);
    let mut hi: [u64; N] = std::array::from_fn(|i| first.wrapping_add(i as u64) >> 32);
    let mut k = key;
    for _ in 0..ROUNDS {
        for (lo, hi) in lo.iter_mut().zip(&mut hi) {
            let product = *lo * MULTIPLIER;
            *lo = (product >> 32) ^ u64::from(k) ^ *hi;
            *hi = product & WORD;
        }
        k = k.wrapping_add(KEY_STEP);
    }
    std::array::from_fn(|i| (hi[i] >> 8) as u32 as f32 * (1.0 / (1u32 << 24) as f32))
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
    fn many_at_once_are_the_same_numbers() {
        for first in [0, 5, (1 << 32) - 7, u64::MAX - 3] {
            let numbers: [f32; 37] = uniforms(11, first);
            for (i, number) in numbers.into_iter().enumerate() {
                assert_eq!(number, uniform(11, first.wrapping_add(i as u64)));
            }
        }
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
