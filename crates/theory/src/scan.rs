//! Prefix scans of linear recurrences h_t = a_t h_{t−1} + b_t.
//!
//! A step is the map h ↦ a h + b; maps in a row are one map: (a₂, b₂)∘(a₁, b₁) = (a₂a₁, a₂b₁ + b₂), with identity
//! (1, 0). The operator is associative, so the grouping is free (Blelloch 1990); it is not commutative, so the order is
//! not.

use crate::error::{Error, positive};

/// The map h ↦ a h + b.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    pub a: f64,
    pub b: f64,
}

impl Affine {
    /// h ↦ h.
    pub const IDENTITY: Affine = Affine { a: 1.0, b: 0.0 };

    /// This map first, then the later one.
    pub fn then(self, later: Affine) -> Affine {
        Affine { a: later.a * self.a, b: later.a * self.b + later.b }
    }
}

/// What a scan did.
#[derive(Clone, Debug, PartialEq)]
pub struct Scanned {
    /// The map from before the first step to after step t.
    pub prefixes: Vec<Affine>,
    /// Applications of the operator in all.
    pub work: usize,
    /// Applications one after another, with as many processors as one likes.
    pub depth: usize,
}

/// A way to scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// One after another: work L − 1, depth L − 1.
    Sequential,
    /// Hillis & Steele 1986: everybody adds what stands 1, 2, 4 … places before; work about L log₂ L, depth log₂ L.
    HillisSteele,
    /// Blelloch 1990: up a tree, down again, and once over all: work about 3L, depth 2 log₂ L + 1.
    Blelloch,
    /// Pieces of this length side by side, each one after another, then a scan over their ends: what processors do.
    Chunked(usize),
}

impl Algorithm {
    /// Scans any number of steps.
    ///
    /// # Errors
    /// Chunks of length 0.
    pub fn scan(self, steps: &[Affine]) -> Result<Scanned, Error> {
        match self {
            Algorithm::Sequential => Ok(sequential(steps)),
            Algorithm::HillisSteele => Ok(hillis_steele(steps)),
            Algorithm::Blelloch => Ok(blelloch(steps)),
            Algorithm::Chunked(length) => Ok(chunked(steps, positive("the chunk length", length)?)),
        }
    }
}

fn sequential(steps: &[Affine]) -> Scanned {
    let mut prefixes = steps.to_vec();
    for t in 1..steps.len() {
        prefixes[t] = prefixes[t - 1].then(steps[t]);
    }
    let count = steps.len().saturating_sub(1);
    Scanned { prefixes, work: count, depth: count }
}

fn hillis_steele(steps: &[Affine]) -> Scanned {
    let (mut prefixes, mut work, mut depth, mut stride) = (steps.to_vec(), 0, 0, 1);
    while stride < steps.len() {
        let before = prefixes.clone();
        for t in stride..steps.len() {
            prefixes[t] = before[t - stride].then(before[t]);
        }
        (work, depth, stride) = (work + steps.len() - stride, depth + 1, 2 * stride);
    }
    Scanned { prefixes, work, depth }
}

fn blelloch(steps: &[Affine]) -> Scanned {
    let length = steps.len().next_power_of_two();
    let mut tree = steps.to_vec();
    tree.resize(length, Affine::IDENTITY);
    let (mut work, mut depth, mut stride) = (0, 0, 1);
    while stride < length {
        for right in (2 * stride - 1..length).step_by(2 * stride) {
            tree[right] = tree[right - stride].then(tree[right]);
            work += 1;
        }
        (depth, stride) = (depth + 1, 2 * stride);
    }
    // Downwards each node learns what comes before it: exclusive prefixes.
    tree[length - 1] = Affine::IDENTITY;
    while stride > 1 {
        stride /= 2;
        for right in (2 * stride - 1..length).step_by(2 * stride) {
            let (left, before) = (tree[right - stride], tree[right]);
            tree[right - stride] = before;
            tree[right] = before.then(left);
            work += 1;
        }
        depth += 1;
    }
    let prefixes = tree.iter().zip(steps).map(|(before, &step)| before.then(step)).collect();
    Scanned { prefixes, work: work + steps.len(), depth: depth + 1 }
}

fn chunked(steps: &[Affine], length: usize) -> Scanned {
    let mut prefixes = Vec::with_capacity(steps.len());
    let (mut work, mut depth) = (0, 0);
    for chunk in steps.chunks(length) {
        let scanned = sequential(chunk);
        (work, depth) = (work + scanned.work, depth.max(scanned.depth));
        prefixes.extend(scanned.prefixes);
    }
    let ends: Vec<Affine> = prefixes.chunks(length).filter_map(|c| c.last().copied()).collect();
    let carried = sequential(&ends);
    for (chunk, before) in prefixes.chunks_mut(length).skip(1).zip(&carried.prefixes) {
        for prefix in &mut *chunk {
            *prefix = before.then(*prefix);
        }
        work += chunk.len();
    }
    let combine = usize::from(steps.len() > length);
    Scanned { prefixes, work: work + carried.work, depth: depth + carried.depth + combine }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::relative_error;

    fn steps(n: usize) -> Vec<Affine> {
        let mut random = Random::new(n as u64);
        (0..n).map(|_| Affine { a: random.uniform(), b: random.normal() }).collect()
    }

    #[test]
    fn all_scans_are_equal() {
        for n in [0, 1, 2, 3, 7, 64, 1000] {
            let steps = steps(n);
            let mut h = 0.0;
            let expected: Vec<f64> = steps
                .iter()
                .map(|s| {
                    h = s.a * h + s.b;
                    h
                })
                .collect();
            for algorithm in [
                Algorithm::Sequential,
                Algorithm::HillisSteele,
                Algorithm::Blelloch,
                Algorithm::Chunked(1),
                Algorithm::Chunked(16),
                Algorithm::Chunked(5000),
            ] {
                let found: Vec<f64> = algorithm.scan(&steps).unwrap().prefixes.iter().map(|p| p.b).collect();
                assert!(relative_error(&found, &expected) < 1e-13, "{algorithm:?} {n}");
            }
        }
    }

    #[test]
    fn work_and_depth_are_those_of_the_books() {
        let steps = steps(1024);
        let counts = |a: Algorithm| a.scan(&steps).map(|s| (s.work, s.depth)).unwrap();
        assert_eq!(counts(Algorithm::Sequential), (1023, 1023));
        assert_eq!(counts(Algorithm::HillisSteele), (1024 * 10 - 1023, 10));
        assert_eq!(counts(Algorithm::Blelloch), (2 * 1023 + 1024, 21));
        // 32 chunks of 32: each alone, their ends, and once over all but the first.
        assert_eq!(counts(Algorithm::Chunked(32)), (32 * 31 + 31 + 31 * 32, 31 + 31 + 1));
        assert!(Algorithm::Chunked(0).scan(&steps).unwrap_err().to_string().contains("chunk length is 0"));
    }

    #[test]
    fn the_operator_associates_and_does_not_commute() {
        let s = steps(3);
        let (x, y) = (s[0].then(s[1]).then(s[2]), s[0].then(s[1].then(s[2])));
        assert!((x.a - y.a).abs() < 1e-15 && (x.b - y.b).abs() < 1e-14);
        assert!((s[0].then(s[1]).b - s[1].then(s[0]).b).abs() > 0.1);
        assert_eq!(Affine::IDENTITY.then(s[0]), s[0]);
    }
}
