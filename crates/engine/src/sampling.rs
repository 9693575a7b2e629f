//! Choosing the next token from logits.
//!
//! In this order, as Hugging Face transformers applies them: repetition penalty, temperature, top-k, top-p, min-p.

use std::collections::HashSet;

use hognose_core::ops::sample::Options;
use hognose_core::rng;
use hognose_model::steps::Start;

use crate::error::Error;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token (the first of equals).
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 takes all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1 takes all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0 takes all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred (Keskar et al. 2019, arXiv 1909.05858);
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// Only ids below this, such as those that the tokenizer has; `None` takes all. Rows that fill up an embedding have no
    /// meaning, but a model that is not trained well finds them likely, too.
    pub vocabulary: Option<usize>,
    /// Seed of the draws: the same seed, prompt and model give the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            vocabulary: None,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), Error> {
        let check = |ok: bool, name, expected, found: f32| {
            if ok { Ok(()) } else { Err(Error::Option { name, expected, found: found.to_string() }) }
        };
        let t = self.temperature;
        check(t.is_finite() && t >= 0.0, "temperature", "a number of at least 0", t)?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top-p", "above 0 and at most 1", self.top_p)?;
        check((0.0..=1.0).contains(&self.min_p), "min-p", "between 0 and 1", self.min_p)?;
        let r = self.repetition_penalty;
        check(r.is_finite() && r > 0.0, "repetition-penalty", "a number above 0", r)
    }
}

/// Chooses tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    seen: HashSet<u32>,
    draws: u64,
}

impl Sampler {
    /// A sampler that has seen no token. Fails for options outside their ranges.
    pub fn new(options: Sampling) -> Result<Sampler, Error> {
        options.validate()?;
        Ok(Sampler { options, seen: HashSet::new(), draws: 0 })
    }

    /// Tells the sampler of tokens that occurred: the prompt's.
    pub fn observe(&mut self, ids: &[u32]) {
        self.seen.extend(ids);
    }

    /// Tells the sampler of a token that a device chose in its place.
    pub fn chosen(&mut self, id: u32) {
        self.seen.insert(id);
        if self.options.temperature != 0.0 {
            self.draws += 1;
        }
    }

    /// How a device goes on choosing for the sequence in `slot` after the token `id`.
    pub fn start(&self, slot: usize, id: u32) -> Start {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, vocabulary, seed } = self.options;
        let vocabulary = vocabulary.unwrap_or(usize::MAX);
        let options = Options { temperature, top_k, top_p, min_p, repetition_penalty, vocabulary, seed };
        let seen = if repetition_penalty == 1.0 { Vec::new() } else { self.seen.iter().copied().collect() };
        Start { slot, id, options, draws: self.draws, seen }
    }

    /// Chooses a token, or `None` if the logits are not all finite. Changes `logits`.
    pub fn sample(&mut self, logits: &mut [f32]) -> Option<u32> {
        if logits.is_empty() || logits.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let allowed = self.options.vocabulary.unwrap_or(logits.len()).clamp(1, logits.len());
        let logits = &mut logits[..allowed];
        let penalty = self.options.repetition_penalty;
        if penalty != 1.0 {
            for &id in &self.seen {
                if let Some(v) = logits.get_mut(id as usize) {
                    let changed = if *v > 0.0 { *v / penalty } else { *v * penalty };
                    *v = changed.clamp(f32::MIN, f32::MAX);
                }
            }
        }
        let id = if self.options.temperature == 0.0 { argmax(logits) } else { self.draw(logits) };
        self.seen.insert(id);
        Some(id)
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, seed, .. } = self.options;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // Likeliest first; equals in the order of their ids, so that the choice does not depend on the sort.
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if top_k > 0 && top_k < order.len() {
            order.select_nth_unstable_by(top_k - 1, likelier);
            order.truncate(top_k);
        }
        if top_p < 1.0 || min_p > 0.0 || top_k > 0 {
            order.sort_unstable_by(likelier);
        }
        let max = f64::from(logits[argmax(logits) as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - max) / f64::from(temperature)).exp();
        let mut weights: Vec<f64> = order.iter().map(|&id| weight(id)).collect();
        if top_p < 1.0 {
            let target = f64::from(top_p) * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let enough = weights.iter().position(|w| {
                sum += w;
                sum >= target
            });
            weights.truncate(enough.map_or(weights.len(), |i| i + 1));
        }
        if min_p > 0.0 {
            // The likeliest token has weight 1.
            let kept = weights.iter().take_while(|w| **w >= f64::from(min_p)).count();
            weights.truncate(kept.max(1));
        }
        let draw = f64::from(rng::uniform(seed as u32 ^ (seed >> 32) as u32, self.draws));
        self.draws += 1;
        let mut rest = draw * weights.iter().sum::<f64>();
        for (&id, w) in order.iter().zip(&weights) {
            rest -= w;
            if rest < 0.0 {
                return id;
            }
        }
        order[weights.len() - 1]
    }
}

/// The first index of the largest value.
pub fn argmax(values: &[f32]) -> u32 {
    // Whether a piece has a larger one is a question for vector instructions; few pieces are looked at value by value.
    const PIECE: usize = 64;
    let mut best = 0;
    for (piece, part) in values.chunks(PIECE).enumerate() {
        let largest = values[best];
        if part.iter().fold(false, |any, v| any | (*v > largest)) {
            for (i, v) in part.iter().enumerate() {
                if *v > values[best] {
                    best = piece * PIECE + i;
                }
            }
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(options: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0.0; logits.len()];
        let n = 20_000;
        for _ in 0..n {
            counts[sampler.sample(&mut logits.to_vec()).unwrap() as usize] += 1.0 / f64::from(n);
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax_at_the_temperature() {
        let logits = [0.0, 1.0, -1.0, 2.0];
        for temperature in [0.5, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|v| f64::from(v / temperature).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let found = frequencies(Sampling { temperature, ..Sampling::default() }, &logits);
            for (w, f) in weights.iter().zip(found) {
                assert!((w / sum - f).abs() < 0.015, "temperature {temperature}: {f} instead of {}", w / sum);
            }
        }
    }

    #[test]
    fn cuts_keep_exactly_the_likeliest() {
        // Probabilities 0.4, 0.3, 0.2, 0.1 in shuffled order.
        let logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect();
        let kept =
            |options: Sampling| -> Vec<bool> { frequencies(options, &logits).iter().map(|f| *f > 0.0).collect() };
        let base = Sampling::default();
        assert_eq!(kept(Sampling { top_k: 2, ..base.clone() }), [false, true, false, true]);
        assert_eq!(kept(Sampling { top_p: 0.65, ..base.clone() }), [false, true, false, true]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..base.clone() }), [false, true, true, true]);
        assert_eq!(kept(Sampling { min_p: 0.6, ..base.clone() }), [false, true, false, true]);
        assert_eq!(kept(Sampling { min_p: 1.0, ..base.clone() }), [false, true, false, false]);
        assert_eq!(kept(Sampling { top_k: 1, ..base }), [false, true, false, false]);
    }

    #[test]
    fn ids_that_the_tokenizer_does_not_have_are_never_chosen() {
        for temperature in [0.0, 1.0] {
            let options = Sampling { temperature, vocabulary: Some(3), ..Sampling::default() };
            let mut sampler = Sampler::new(options).unwrap();
            for _ in 0..50 {
                assert!(sampler.sample(&mut [0.0, 1.0, 2.0, 9.0]).unwrap() < 3);
            }
        }
    }

    #[test]
    fn an_extreme_penalty_still_orders_the_tokens() {
        for (penalty, expected) in [(1e-38, 1), (1e38, 2)] {
            let mut sampler = Sampler::new(Sampling { repetition_penalty: penalty, ..Sampling::default() }).unwrap();
            sampler.observe(&[0, 1]);
            assert_eq!(sampler.sample(&mut [-3.0, 40.0, 30.0, -60.0]), Some(expected), "{penalty}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_the_penalty_acts_on_both_signs() {
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::greedy() }).unwrap();
        sampler.observe(&[1]);
        assert_eq!(sampler.sample(&mut [1.0, 1.9, 1.0]), Some(0));
        let mut sampler = Sampler::new(Sampling { repetition_penalty: 2.0, ..Sampling::greedy() }).unwrap();
        sampler.observe(&[0]);
        assert_eq!(sampler.sample(&mut [-1.0, -1.5]), Some(1));
    }

    #[test]
    fn bad_numbers_are_refused() {
        assert_eq!(Sampler::new(Sampling::greedy()).unwrap().sample(&mut [0.0, f32::NAN]), None);
        let bad = Sampling { top_p: 0.0, ..Sampling::default() };
        assert_eq!(Sampler::new(bad).unwrap_err().to_string(), "top-p must be above 0 and at most 1, but is 0");
        assert!(Sampler::new(Sampling { temperature: f32::NAN, ..Sampling::default() }).is_err());
    }
}
