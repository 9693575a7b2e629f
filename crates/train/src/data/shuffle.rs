//! Permutations that are a function of a seed and an epoch and take no memory.
//!
//! A balanced Feistel network over the smallest power of four that covers the range, with "cycle walking": a value
//! that falls outside the range is encrypted again until it falls inside (Black and Rogaway, "Ciphers with arbitrary
//! finite domains", 2002). Since a window's place is computed and not stored, a run resumes anywhere at no cost.

/// Rounds of the network. Four make a pseudorandom permutation in theory; small ranges have weak halves, so more.
const ROUNDS: usize = 8;

/// A permutation of `0..length`.
#[derive(Debug, Clone)]
pub struct Permutation {
    length: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..length` for this seed and epoch. `stream` tells apart the permutations that one run
    /// uses for different things.
    pub fn new(length: u64, seed: u64, epoch: u64, stream: u64) -> Self {
        let bits = u64::BITS - length.saturating_sub(1).leading_zeros();
        let mut state = mix(seed ^ mix(epoch ^ mix(stream)));
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        });
        Self { length, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// The number of elements.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The element at `index`; `None` past the end.
    pub fn get(&self, index: u64) -> Option<u64> {
        if index >= self.length {
            return None;
        }
        let mut value = self.encrypt(index);
        // The network permutes less than four times as many values as the range has, so this ends soon.
        while value >= self.length {
            value = self.encrypt(value);
        }
        Some(value)
    }

    /// All elements in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.length).filter_map(|index| self.get(index))
    }

    fn encrypt(&self, value: u64) -> u64 {
        // `half_bits` is at most 32, so the mask does not overflow.
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_comes_once() {
        for length in (0..70).chain([255, 256, 257, 1000, 4096, 100_003]) {
            let mut seen: Vec<u64> = Permutation::new(length, 3, 1, 0).iter().collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..length), "length {length}");
        }
    }

    #[test]
    fn depends_on_seed_epoch_and_stream_only() {
        let order = |seed, epoch, stream| Permutation::new(1000, seed, epoch, stream).iter().collect::<Vec<_>>();
        assert_eq!(order(1, 2, 3), order(1, 2, 3));
        assert_ne!(order(1, 2, 3), order(0, 2, 3));
        assert_ne!(order(1, 2, 3), order(1, 3, 3));
        assert_ne!(order(1, 2, 3), order(1, 2, 4));
    }

    #[test]
    fn the_first_element_is_spread_evenly() {
        // 12 values, 12,000 seeds: a count has mean 1000 and standard deviation 30; seven of these are allowed.
        let mut counts = [0u32; 12];
        for seed in 0..12_000 {
            counts[Permutation::new(12, seed, 0, 0).get(0).unwrap() as usize] += 1;
        }
        assert!(counts.iter().all(|count| (790..1210).contains(count)), "{counts:?}");
    }

    #[test]
    fn handles_the_largest_range() {
        let permutation = Permutation::new(u64::MAX, 1, 1, 1);
        assert!(permutation.get(0).is_some() && permutation.get(u64::MAX - 1).is_some());
        assert_eq!(permutation.get(u64::MAX), None);
    }
}
