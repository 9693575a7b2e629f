//! Cross-entropy in plain f64: what the kernel is tested against.

/// The negative log-likelihood of each target under softmax(h · Wᵀ), 0 where the target is −1.
///
/// `h` and `weight` hold rows of `d` numbers; a target is −1 or a row of `weight`.
pub fn nll(h: &[f64], weight: &[f64], d: usize, targets: &[i32]) -> Vec<f64> {
    let one = |(h, &target): (&[f64], &i32)| {
        let Ok(target) = usize::try_from(target) else { return 0.0 };
        let logits: Vec<f64> =
            weight.chunks_exact(d).map(|w| h.iter().zip(w).map(|(a, b)| a * b).sum::<f64>()).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        max + sum.ln() - logits[target]
    };
    h.chunks_exact(d).zip(targets).map(one).collect()
}

/// scale · Σ nll: the loss.
pub fn cross_entropy(h: &[f64], weight: &[f64], d: usize, targets: &[i32], scale: f64) -> f64 {
    scale * nll(h, weight, d, targets).iter().sum::<f64>()
}
