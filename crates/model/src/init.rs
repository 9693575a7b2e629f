//! Starting values of a model's parameters.
//!
//! Every tensor draws from its own generator, seeded by the run's seed and the tensor's name, so a tensor's numbers do
//! not depend on which others exist, on their order or on threads.

use crate::config::{Init, ModelConfig, ParamSpec};
use crate::legs::Legs;
use crate::mixers::{Diagonal, Transition};
use std::f64::consts::{LN_2, PI};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Tensors that are in memory at once beside the model.
const MOST_AT_ONCE: usize = 8;

/// The starting values of every parameter, in the order of [`ModelConfig::parameters`].
///
/// Tensors are made as the iterator is advanced, a few at a time on as many threads; each is row-major f32.
pub fn initialise(config: &ModelConfig, seed: u64) -> impl Iterator<Item = (String, Vec<f32>)> + use<> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_AT_ONCE);
    let parameters = config.parameters();
    let groups: Vec<Vec<ParamSpec>> = parameters.chunks(threads).map(<[ParamSpec]>::to_vec).collect();
    groups.into_iter().flat_map(move |group| {
        let values = std::thread::scope(|scope| {
            let running: Vec<_> = group.iter().map(|p| scope.spawn(move || initial_values(p, seed))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<f32>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(join).collect::<Vec<_>>()
        });
        group.into_iter().map(|p| p.name).zip(values)
    })
}

/// The starting values of one parameter: a function of its name, its shape, its [`Init`] and the seed.
pub fn initial_values(p: &ParamSpec, seed: u64) -> Vec<f32> {
    let n = p.numel();
    let mut random = Uniform::new(seed, &p.name);
    match p.init {
        Init::Ones => vec![1.0; n],
        Init::Zeros => vec![0.0; n],
        Init::LogRange => {
            let last = p.shape.last().copied().unwrap_or(1).max(1);
            (0..n).map(|i| (((i % last) + 1) as f64).ln() as f32).collect()
        }
        Init::Uniform { bound } => {
            let bound = f64::from(bound);
            (0..n).map(|_| ((2.0 * random.next() - 1.0) * bound) as f32).collect()
        }
        Init::Frequencies(transition) => {
            let row = upper_frequencies(transition, p.shape.last().copied().unwrap_or(0));
            row.iter().cycle().take(n).map(|&f| f as f32).collect()
        }
        Init::Constant { value } => vec![value; n],
        Init::LogUniform { low, high } => {
            let (low, high) = (f64::from(low), f64::from(high));
            (0..n).map(|_| (low + (high - low) * random.next()).ln() as f32).collect()
        }
        Init::DtBias { min, max, floor } => {
            let (low, high) = (f64::from(min).ln(), f64::from(max).ln());
            let mut draw = || (low + (high - low) * random.next()).exp().max(f64::from(floor));
            // softplus(dt + ln(1 − e^−dt)) = dt, written with expm1 so that small Δ keep their digits.
            (0..n).map(|_| draw()).map(|dt| (dt + (-(-dt).exp_m1()).ln()) as f32).collect()
        }
        Init::LogDecay(Diagonal::Random) => (0..n).map(|_| (random.normal() - LN_2) as f32).collect(),
        Init::LogDecay(Diagonal::Real) => rows(p, |m| (m as f64 + 1.0).ln()),
        Init::LogDecay(_) => vec![-LN_2 as f32; n],
        Init::Frequency(Diagonal::Random) => {
            let scale = PI * p.shape[0] as f64;
            (0..n).map(|_| (scale * random.next()) as f32).collect()
        }
        Init::Frequency(diagonal) => frequencies(diagonal, p),
        Init::LegsInput | Init::LegsLowRank => {
            let legs = Legs::new(p.shape[0]);
            let of = if p.init == Init::LegsInput { &legs.b } else { &legs.p };
            rows(p, |row| if row % 2 == 0 { of[row / 2].re } else { of[row / 2].im })
        }
        Init::LogStep { min, max } => {
            let (low, high) = (f64::from(min).ln(), f64::from(max).ln());
            (0..n).map(|_| (low + (high - low) * random.next()) as f32).collect()
        }
        Init::Normal { std } => (0..n).map(|_| (random.normal() * f64::from(std)) as f32).collect(),
    }
}

/// Imaginary parts of the upper one of each of `pairs` conjugate pairs; 0 of what is real.
fn upper_frequencies(transition: Transition, pairs: usize) -> Vec<f64> {
    let size = 2.0 * pairs as f64;
    let of = |k: usize| match transition {
        Transition::Lin => PI * k as f64,
        Transition::Inv => size / PI * (size / (2.0 * k as f64 + 1.0) - 1.0),
        Transition::Legs => Legs::new(2 * pairs).omega[k],
        Transition::Real | Transition::Random | Transition::Constant => 0.0,
    };
    (0..pairs).map(of).collect()
}

/// A matrix whose rows are constant.
fn rows(p: &ParamSpec, value: impl Fn(usize) -> f64) -> Vec<f32> {
    let cols = p.shape.last().copied().unwrap_or(1);
    (0..p.shape[0]).flat_map(|row| std::iter::repeat_n(value(row) as f32, cols)).collect()
}

/// Imaginary parts of a diagonal that does not start at random.
fn frequencies(diagonal: Diagonal, p: &ParamSpec) -> Vec<f32> {
    let d_state = 2.0 * p.shape[0] as f64;
    match diagonal {
        Diagonal::Lin => rows(p, |m| PI * m as f64),
        Diagonal::Inv => rows(p, |m| d_state / PI * (d_state / (2.0 * m as f64 + 1.0) - 1.0)),
        Diagonal::Legs => {
            let legs = Legs::new(2 * p.shape[0]);
            rows(p, |m| legs.omega[m])
        }
        Diagonal::Real | Diagonal::Random => vec![0.0; p.numel()],
    }
}

/// Uniform numbers from ChaCha, a counter-based generator.
struct Uniform(ChaCha8Rng);

impl Uniform {
    fn new(seed: u64, name: &str) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        for (i, part) in key[8..].chunks_exact_mut(8).enumerate() {
            part.copy_from_slice(&fnv1a(i as u8, name.as_bytes()).to_le_bytes());
        }
        Uniform(ChaCha8Rng::from_seed(key))
    }

    /// In [0, 1), with 53 random bits.
    fn next(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller; the second value of each pair is not used.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.next()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.next()).cos()
    }
}

/// FNV-1a with a first byte that makes different functions of it.
fn fnv1a(first: u8, bytes: &[u8]) -> u64 {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(step(0xcbf2_9ce4_8422_2325, first), |h, &b| step(h, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::preset;
    use std::collections::HashMap;

    fn softplus(x: f64) -> f64 {
        x.exp().ln_1p()
    }

    #[test]
    fn frequencies_are_the_published_ones() {
        // math.md, section 2.
        let legs = [0.427489, 1.957794, 5.354209, 19.857410];
        for (found, expected) in upper_frequencies(Transition::Legs, 4).iter().zip(legs) {
            assert!((found - expected).abs() < 1e-6, "{found}");
        }
        assert_eq!(upper_frequencies(Transition::Lin, 3), [0.0, PI, 2.0 * PI]);
        assert!((upper_frequencies(Transition::Inv, 2)[1] - 4.0 / PI / 3.0).abs() < 1e-12);
    }

    #[test]
    fn diagonals_are_those_of_the_theory() {
        use hognose_theory::s4d;
        let of = |init: Init, rows: usize| {
            let p = ParamSpec::new("x", [rows, 3], crate::config::ParamKind::Ssm, init);
            initial_values(&p, 1).chunks(3).map(|row| row[2]).collect::<Vec<f32>>()
        };
        let pairs =
            [(Diagonal::Lin, s4d::Init::Lin), (Diagonal::Inv, s4d::Init::Inv), (Diagonal::Legs, s4d::Init::LegS)];
        for (ours, theirs) in pairs {
            let (decay, frequency) = (of(Init::LogDecay(ours), 8), of(Init::Frequency(ours), 8));
            for (m, expected) in theirs.diagonal(16).unwrap().into_iter().enumerate() {
                assert!((f64::from(-decay[m].exp()) - expected.re).abs() < 1e-6, "{ours:?}");
                assert!((f64::from(frequency[m]) - expected.im).abs() < 1e-6 * expected.im.abs().max(1.0), "{ours:?}");
            }
        }
        let decay = of(Init::LogDecay(Diagonal::Real), 4);
        assert!((decay[3].exp() - 4.0).abs() < 1e-6 && of(Init::Frequency(Diagonal::Real), 4) == [0.0; 4]);
        assert!(of(Init::Frequency(Diagonal::Random), 4).iter().all(|w| (0.0..13.0).contains(w)));
        let steps = of(Init::LogStep { min: 1e-3, max: 0.1 }, 100);
        assert!(steps.iter().all(|dt| (0.000_999..0.100_1).contains(&dt.exp())));
    }

    #[test]
    fn a_tensor_depends_on_seed_and_name_only() {
        let mut config = preset("tiny").unwrap();
        let all: HashMap<_, _> = initialise(&config, 7).collect();
        assert_eq!(all, initialise(&config, 7).collect::<HashMap<_, _>>());
        let other: HashMap<_, _> = initialise(&config, 8).collect();
        let name = "backbone.layers.0.mixer.in_proj.weight";
        assert_ne!(all[name], other[name]);
        assert_ne!(all[name], all["backbone.layers.1.mixer.in_proj.weight"]);
        config.layers.truncate(1);
        let fewer: HashMap<_, _> = initialise(&config, 7).collect();
        assert_eq!(all[name], fewer[name]);
    }

    #[test]
    fn distributions_are_the_ones_of_mamba_ssm() {
        for name in ["mamba-130m", "mamba2-130m"] {
            let mut config = preset(name).unwrap();
            config.layers.truncate(2);
            config.vocab_size = 1000;
            config.padded_vocab = 1000;
            for (p, (n, values)) in config.parameters().iter().zip(initialise(&config, 1)) {
                assert_eq!(p.name, n);
                assert_eq!(values.len(), p.numel());
                let max = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
                let rms = (values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
                let expect_uniform = |bound: f64| {
                    assert!(f64::from(max) <= bound * 1.000001 && f64::from(max) > 0.95 * bound, "{n}: {max} {bound}");
                    assert!((rms - bound / 3f64.sqrt()).abs() < 0.05 * bound, "{n}: {rms} {bound}");
                };
                match n.rsplit("mixer.").next().unwrap() {
                    "backbone.embedding.weight" => assert!((rms - 0.02).abs() < 1e-3 && mean.abs() < 1e-3),
                    "in_proj.weight" => expect_uniform(768f64.powf(-0.5)),
                    "x_proj.weight" => expect_uniform(1536f64.powf(-0.5)),
                    "out_proj.weight" => expect_uniform(1536f64.powf(-0.5) / 2f64.sqrt()),
                    "dt_proj.weight" => expect_uniform(48f64.powf(-0.5)),
                    "conv1d.weight" | "conv1d.bias" => expect_uniform(0.5),
                    "dt_bias" | "dt_proj.bias" => {
                        assert!(values.iter().all(|&v| (0.00099..0.1001).contains(&softplus(f64::from(v)))), "{n}");
                    }
                    "A_log" if name == "mamba-130m" => {
                        assert!(values.chunks(16).all(|row| row[0] == 0.0 && (row[15] - 16f32.ln()).abs() < 1e-6));
                    }
                    "A_log" => assert!(values.iter().all(|&v| (0.0..=16f32.ln()).contains(&v)) && rms > 1.0, "{n}"),
                    _ => assert!(values.iter().all(|&v| v == 1.0), "{n}"),
                }
            }
        }
    }
}
