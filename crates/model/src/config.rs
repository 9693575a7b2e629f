//! What a model is made of: sizes, variants and the parameters that follow from them.
//!
//! A [`ModelConfig`] describes a language model whose layers are `x + mixer(norm(x))`, each optionally followed by
//! `x + mlp(norm2(x))`. It is independent of any checkpoint format: the files in [`crate::checkpoint`] translate.
//! Parameters are named as in the original state-spaces checkpoints; these are hognose's canonical names.

use serde::{Deserialize, Serialize};

use crate::mixers::{
    AttentionConfig, Check, Diagonal, GatedConvConfig, GruConfig, H3Config, LstmConfig, S4Config, S4dConfig, S6Config,
    Transition, VimConfig,
};

/// Largest single size (width, state, vocabulary …) that is taken for real.
const MAX_SIZE: usize = 1 << 31;
/// Largest number of layers that is taken for real.
pub const MAX_LAYERS: usize = 1 << 16;
/// Largest number of parameters that is taken for real.
const MAX_PARAMETERS: u128 = 1 << 40;
/// Standard deviation of the embedding at initialisation, as in mamba-ssm.
const EMBEDDING_STD: f32 = 0.02;

/// The normalisation in front of every mixer and MLP, and before the output matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Divides by the root mean square; has a weight only.
    RmsNorm,
    /// Subtracts the mean, divides by the standard deviation; has a weight and a bias.
    LayerNorm,
}

/// A whole language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of token ids in use, e.g. 50277 for GPT-NeoX. Ids from here to `padded_vocab` have rows but no meaning.
    pub vocab_size: usize,
    /// Rows of the embedding and of the output matrix, at least `vocab_size`.
    pub padded_vocab: usize,
    /// The output matrix is the embedding.
    pub tie_embeddings: bool,
    /// Kind of the norms between the layers.
    pub norm: NormKind,
    /// Epsilon of those norms and of the gated norm inside Mamba-2.
    #[serde(with = "number")]
    pub norm_eps: f32,
    /// Keep the residual stream in f32 when activations are narrower.
    pub residual_in_fp32: bool,
    /// The layers, first to last.
    pub layers: Vec<LayerConfig>,
    /// Token that begins a text, where the checkpoint names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; empty where the checkpoint names none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub eos_token_ids: Vec<u32>,
    /// Token that fills rows which do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<u32>,
}

/// One layer: a mixer over time, then perhaps a gated MLP over channels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// Hidden width of the gated MLP after the mixer: its first matrix has twice as many rows. This is the width that is
    /// there, already rounded up to a multiple of 128 where the checkpoint format does that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_intermediate: Option<usize>,
}

/// What mixes tokens in a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Mixer {
    /// Selective SSM with one state per channel (Gu & Dao 2023, arXiv 2312.00752); Falcon-Mamba too.
    Mamba1(Mamba1Config),
    /// State space duality, one scalar decay per head (Dao & Gu 2024, arXiv 2405.21060).
    Mamba2(Mamba2Config),
    /// Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions.
    Attention(AttentionConfig),
    /// Mamba-1's block with every part optional.
    S6(S6Config),
    /// A time-invariant SSM with a diagonal A in each channel (Gu et al. 2022, arXiv 2206.11893).
    S4d(S4dConfig),
    /// A time-invariant SSM with a diagonal A plus rank one in each channel (Gu, Goel & Ré 2021, arXiv 2111.00396).
    S4(S4Config),
    /// A shift SSM and a diagonal one between products (Fu et al. 2022, arXiv 2212.14052).
    H3(H3Config),
    /// A gated causal convolution (Dauphin et al. 2017, arXiv 1612.08083), the baseline without a recurrence.
    GatedConv(GatedConvConfig),
    /// Long short-term memory (Hochreiter & Schmidhuber 1997).
    Lstm(LstmConfig),
    /// The gated recurrent unit (Cho et al. 2014, arXiv 1406.1078).
    Gru(GruConfig),
    /// Mamba-1 in both directions (Zhu et al. 2024, arXiv 2401.09417).
    Vim(VimConfig),
}

/// A Mamba-1 mixer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba1Config {
    /// Channels of the mixer, D.
    pub d_inner: usize,
    /// State size of one channel, N.
    pub d_state: usize,
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Rank of the projection to Δ, R.
    pub dt_rank: usize,
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
    /// Bias on the convolution.
    pub conv_bias: bool,
    /// Falcon-Mamba: epsilon of an RMSNorm without weight on Δ (before `dt_proj`), B and C.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_number")]
    pub dt_b_c_rms: Option<f32>,
}

/// A Mamba-2 mixer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba2Config {
    /// Channels of the mixer: the SSM's and, where `d_ssm` is smaller, a gated MLP's.
    pub d_inner: usize,
    /// Channels of the SSM, H·P.
    pub d_ssm: usize,
    /// State size, N.
    pub d_state: usize,
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Channels of one head, P.
    pub headdim: usize,
    /// Groups of B and C (and of the gated norm), G.
    pub ngroups: usize,
    /// Length of the chunks in which the scan is computed. Does not change the result beyond rounding.
    pub chunk_size: usize,
    /// The skip weight D is per channel instead of per head.
    pub d_has_hdim: bool,
    /// A gated RMSNorm follows the SSM; without it the output is `y · silu(z)`.
    pub rmsnorm: bool,
    /// `RMSNorm(y) · silu(z)` instead of `RMSNorm(y · silu(z))`.
    pub norm_before_gate: bool,
    /// Δ is clamped to this range after softplus.
    #[serde(with = "number_pair")]
    pub dt_limit: (f32, f32),
    /// Bias on `in_proj` and `out_proj`.
    pub bias: bool,
    /// Bias on the convolution.
    pub conv_bias: bool,
}

impl Mamba2Config {
    /// Number of heads, H.
    pub fn nheads(&self) -> usize {
        self.d_ssm / self.headdim.max(1)
    }

    /// Channels of the gated MLP that shares the mixer's projections; 0 where the SSM has all channels.
    pub fn d_mlp(&self) -> usize {
        self.d_inner - self.d_ssm
    }

    /// Channels of the convolution: x, B and C.
    pub fn conv_dim(&self) -> usize {
        self.d_ssm + 2 * self.ngroups * self.d_state
    }

    /// Rows of `in_proj`: z0, x0 (each `d_mlp`), z, x (each `d_ssm`), B, C (each G·N), Δ (H).
    pub fn d_in_proj(&self) -> usize {
        2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads()
    }
}

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// A size outside what can exist.
    #[error("{what} is {found}; expected a whole number from {min} to {max}")]
    Size { what: String, found: usize, min: usize, max: usize },
    /// A size that must divide another one does not.
    #[error("{what} ({value}) is not a multiple of {of} ({divisor}); change one of them")]
    NotMultiple { what: String, value: usize, of: String, divisor: usize },
    /// A number outside its range.
    #[error("{what} is {found}; expected {expected}")]
    Number { what: String, found: f32, expected: &'static str },
    /// The limits of Δ are in the wrong order or not numbers.
    #[error("dt_limit is ({low}, {high}); expected 0 ≤ low < high")]
    DtLimit { low: f32, high: f32 },
    /// A special token that has no row.
    #[error("{what} is {id}, but the vocabulary has {rows} rows; expected an id below that")]
    Token { what: &'static str, id: u32, rows: usize },
    /// More parameters than any machine holds.
    #[error("the sizes make {found} parameters, more than the {max} that are taken for real; check them")]
    TooLarge { found: u128, max: u128 },
    /// What only a causal model can do.
    #[error("layer {layer} ({kind}) reads a sequence in both directions, so {what}")]
    NotCausal { layer: usize, kind: &'static str, what: &'static str },
}

pub(crate) fn size(what: impl Fn() -> String, found: usize, min: usize, max: usize) -> Result<(), ConfigError> {
    if found < min || found > max { Err(ConfigError::Size { what: what(), found, min, max }) } else { Ok(()) }
}

pub(crate) fn positive(what: impl Fn() -> String, found: usize) -> Result<(), ConfigError> {
    size(what, found, 1, MAX_SIZE)
}

pub(crate) fn multiple(layer: usize, what: &str, value: usize, of: &str, divisor: usize) -> Result<(), ConfigError> {
    if divisor == 0 || !value.is_multiple_of(divisor) {
        return Err(ConfigError::NotMultiple { what: format!("layer {layer}: {what}"), value, of: of.into(), divisor });
    }
    Ok(())
}

pub(crate) fn epsilon(what: impl Fn() -> String, found: f32) -> Result<(), ConfigError> {
    if (0.0..1.0).contains(&found) {
        Ok(())
    } else {
        Err(ConfigError::Number { what: what(), found, expected: "a small number that is not negative, such as 1e-5" })
    }
}

impl ModelConfig {
    /// Number of layers.
    pub fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// Checks every size and every relation between them.
    ///
    /// # Errors
    /// Zero or absurd sizes, sizes that do not divide, limits of Δ in the wrong order, special tokens without a row,
    /// or more than 2^40 parameters. The first one found is reported.
    pub fn validate(&self) -> Result<(), ConfigError> {
        positive(|| "d_model".into(), self.d_model)?;
        positive(|| "vocab_size".into(), self.vocab_size)?;
        size(|| "padded_vocab".into(), self.padded_vocab, self.vocab_size, MAX_SIZE)?;
        size(|| "the number of layers".into(), self.layers.len(), 1, MAX_LAYERS)?;
        epsilon(|| "norm_eps".into(), self.norm_eps)?;
        for (i, layer) in self.layers.iter().enumerate() {
            layer.validate(i)?;
        }
        let tokens = (self.bos_token_id.iter().map(|&id| ("bos_token_id", id)))
            .chain(self.eos_token_ids.iter().map(|&id| ("eos_token_id", id)))
            .chain(self.pad_token_id.iter().map(|&id| ("pad_token_id", id)));
        for (what, id) in tokens {
            if id as usize >= self.padded_vocab {
                return Err(ConfigError::Token { what, id, rows: self.padded_vocab });
            }
        }
        let found = self.count();
        if found > MAX_PARAMETERS {
            return Err(ConfigError::TooLarge { found, max: MAX_PARAMETERS });
        }
        Ok(())
    }

    /// Whether no token's result depends on a token after it.
    pub fn is_causal(&self) -> bool {
        self.layers.iter().all(|layer| layer.mixer.is_causal())
    }

    /// Refuses a model that is not causal; `what` says what cannot be then.
    ///
    /// # Errors
    /// [`ConfigError::NotCausal`] names the first such layer.
    pub fn expect_causal(&self, what: &'static str) -> Result<(), ConfigError> {
        match self.layers.iter().position(|layer| !layer.mixer.is_causal()) {
            Some(layer) => Err(ConfigError::NotCausal { layer, kind: self.layers[layer].mixer.kind(), what }),
            None => Ok(()),
        }
    }

    /// Number of parameters; a tied output matrix counts once.
    pub fn parameter_count(&self) -> u64 {
        u64::try_from(self.count()).unwrap_or(u64::MAX)
    }

    fn count(&self) -> u128 {
        let matrices = if self.tie_embeddings { 1 } else { 2 };
        let outside = matrices * product(&[self.padded_vocab, self.d_model])
            + self.norm_tensors("norm").iter().map(|p| product(&p.shape)).sum::<u128>();
        outside
            + self
                .layers
                .iter()
                .map(|l| self.layer_parameters(l).iter().map(|p| product(&p.shape)).sum::<u128>())
                .sum::<u128>()
    }

    /// Every parameter in the order of the model, under its canonical name.
    ///
    /// The configuration must be valid. The output matrix is listed only where it is not the embedding.
    pub fn parameters(&self) -> Vec<ParamSpec> {
        let d = self.d_model;
        let mut all = vec![ParamSpec::new(
            "backbone.embedding.weight",
            [self.padded_vocab, d],
            ParamKind::Embedding,
            Init::Normal { std: EMBEDDING_STD },
        )];
        for (i, layer) in self.layers.iter().enumerate() {
            for mut p in self.layer_parameters(layer) {
                p.name = format!("backbone.layers.{i}.{}", p.name);
                all.push(p);
            }
        }
        all.extend(self.norm_tensors("backbone.norm_f"));
        if !self.tie_embeddings {
            all.push(ParamSpec::matrix("lm_head.weight", self.padded_vocab, d, 1.0));
        }
        all
    }

    fn norm_tensors(&self, name: &str) -> Vec<ParamSpec> {
        let mut all = vec![ParamSpec::new(format!("{name}.weight"), [self.d_model], ParamKind::Norm, Init::Ones)];
        if self.norm == NormKind::LayerNorm {
            all.push(ParamSpec::new(format!("{name}.bias"), [self.d_model], ParamKind::Norm, Init::Zeros));
        }
        all
    }

    fn layer_parameters(&self, layer: &LayerConfig) -> Vec<ParamSpec> {
        // Matrices that write into the residual stream start smaller, by the square root of how many of them there are.
        let residuals = self.layers.iter().map(|l| 1 + usize::from(l.d_intermediate.is_some())).max().unwrap_or(1);
        let scale = 1.0 / ((residuals * self.layers.len()) as f32).sqrt();
        let mut all = self.norm_tensors("norm");
        layer.mixer.parameters(self.d_model, scale, &mut all);
        if let Some(h) = layer.d_intermediate {
            all.extend(self.norm_tensors("norm2"));
            all.push(ParamSpec::matrix("mlp.fc1.weight", 2 * h, self.d_model, 1.0));
            all.push(ParamSpec::matrix("mlp.fc2.weight", self.d_model, h, scale));
        }
        all
    }
}

fn product(shape: &[usize]) -> u128 {
    shape.iter().map(|&n| n as u128).fold(1, u128::saturating_mul)
}

impl LayerConfig {
    fn validate(&self, i: usize) -> Result<(), ConfigError> {
        if let Some(h) = self.d_intermediate {
            positive(|| format!("layer {i}: d_intermediate"), h)?;
        }
        self.mixer.validate(&Check { layer: i })
    }
}

pub(crate) fn linear(name: &str, rows: usize, columns: usize, bias: bool, scale: f32, all: &mut Vec<ParamSpec>) {
    all.push(ParamSpec::matrix(format!("{name}.weight"), rows, columns, scale));
    if bias {
        all.push(ParamSpec::new(format!("{name}.bias"), [rows], ParamKind::Bias, Init::Zeros));
    }
}

/// torch's default for a depthwise Conv1d, which mamba-ssm keeps: weight and bias U(±1/√width).
pub(crate) fn convolution(channels: usize, width: usize, bias: bool, all: &mut Vec<ParamSpec>) {
    let init = Init::Uniform { bound: (width as f32).powf(-0.5) };
    all.push(ParamSpec::new("mixer.conv1d.weight", [channels, 1, width], ParamKind::Convolution, init));
    if bias {
        all.push(ParamSpec::new("mixer.conv1d.bias", [channels], ParamKind::Bias, init));
    }
}

/// What a parameter is for. Decides weight decay and which ones stay in f32 in a narrower checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamKind {
    /// The token embedding.
    Embedding,
    /// The weight of a matrix product, `[rows out, columns in]`.
    Matrix,
    /// The weight of a depthwise convolution, `[channels, 1, width]`.
    Convolution,
    /// A matrix that a state meets at every step: f32 and row-major in any form.
    Recurrent,
    /// Weight or bias of a norm.
    Norm,
    /// Bias of a matrix product or of a convolution.
    Bias,
    /// A, D, Δ or its bias, and B, C and P where they are no projections: always f32.
    Ssm,
}

/// How a parameter starts. U(a, b) is the uniform distribution; ranks and widths are already in the numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// N(0, std²).
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// U(−bound, bound). torch's default for a Linear (Kaiming uniform with a = √5) is bound = 1/√columns.
    Uniform {
        /// Largest magnitude.
        bound: f32,
    },
    /// log 1, log 2, …, log N along the last dimension: A = −(1 … N), S4D-Real (Gu et al. 2022, arXiv 2206.11893).
    LogRange,
    /// Im A of a complex transition along the last dimension, n = 0, 1, …
    Frequencies(Transition),
    /// One number.
    Constant {
        /// The number.
        value: f32,
    },
    /// log of U(low, high): A of Mamba-2.
    LogUniform {
        /// Smallest value before the logarithm.
        low: f32,
        /// Largest value before the logarithm.
        high: f32,
    },
    /// Inverse softplus of a Δ that is log-uniform in [min, max] and at least `floor`.
    DtBias {
        /// Smallest Δ drawn.
        min: f32,
        /// Largest Δ drawn.
        max: f32,
        /// Δ is raised to this.
        floor: f32,
    },
    /// log of −Re A of a diagonal SSM, `[N/2, D]`.
    LogDecay(Diagonal),
    /// Im A of a diagonal SSM, `[N/2, D]`.
    Frequency(Diagonal),
    /// B of HiPPO-LegS in the coordinates in which its normal part is diagonal, `[N, D]`: complex numbers as two rows.
    LegsInput,
    /// P of its part of rank one, likewise.
    LegsLowRank,
    /// log Δ, uniform between the logarithms of both.
    LogStep {
        /// Smallest Δ.
        min: f32,
        /// Largest Δ.
        max: f32,
    },
    /// All 1.
    Ones,
    /// All 0.
    Zeros,
}

/// One parameter: its canonical name, its shape and how it is treated in training.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamSpec {
    /// The name in an original state-spaces checkpoint, e.g. `backbone.layers.0.mixer.in_proj.weight`.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub kind: ParamKind,
    /// How it starts.
    pub init: Init,
    /// Weight decay applies: to the embedding, matrices and convolutions only.
    pub weight_decay: bool,
}

impl ParamSpec {
    pub(crate) fn new<const R: usize>(name: impl Into<String>, shape: [usize; R], kind: ParamKind, init: Init) -> Self {
        let weight_decay = !matches!(kind, ParamKind::Norm | ParamKind::Bias | ParamKind::Ssm);
        ParamSpec { name: name.into(), shape: shape.to_vec(), kind, init, weight_decay }
    }

    /// A matrix that starts as torch's Linear does, times `scale`.
    pub(crate) fn matrix(name: impl Into<String>, rows: usize, columns: usize, scale: f32) -> Self {
        let init = Init::Uniform { bound: scale * (columns as f32).powf(-0.5) };
        Self::new(name, [rows, columns], ParamKind::Matrix, init)
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// f32 as the shortest decimal that means it (1e-5, not 9.999999747378752e-6), and infinity as a text, which JSON lacks.
pub(crate) mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize, Serialize)]
    #[serde(untagged)]
    pub(super) enum Number {
        Finite(f64),
        Named(String),
    }

    impl From<f32> for Number {
        fn from(x: f32) -> Self {
            if x.is_finite() {
                Number::Finite(super::shortest(x))
            } else {
                Number::Named(
                    if x.is_nan() {
                        "nan"
                    } else if x > 0.0 {
                        "inf"
                    } else {
                        "-inf"
                    }
                    .into(),
                )
            }
        }
    }

    impl Number {
        pub(super) fn get<E: serde::de::Error>(self) -> Result<f32, E> {
            match self {
                Number::Finite(x) => Ok(x as f32),
                Number::Named(s) => match s.as_str() {
                    "inf" => Ok(f32::INFINITY),
                    "-inf" => Ok(f32::NEG_INFINITY),
                    _ => Err(E::custom(format!("expected a number, \"inf\" or \"-inf\", found \"{s}\""))),
                },
            }
        }
    }

    pub(crate) fn serialize<S: Serializer>(x: &f32, s: S) -> Result<S::Ok, S::Error> {
        Number::from(*x).serialize(s)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f32, D::Error> {
        Number::deserialize(d)?.get()
    }
}

mod number_pair {
    use super::number::Number;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(x: &(f32, f32), s: S) -> Result<S::Ok, S::Error> {
        [Number::from(x.0), Number::from(x.1)].serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<(f32, f32), D::Error> {
        let [low, high] = <[Number; 2]>::deserialize(d)?;
        Ok((low.get()?, high.get()?))
    }
}

mod optional_number {
    use super::number::Number;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(x: &Option<f32>, s: S) -> Result<S::Ok, S::Error> {
        x.map(Number::from).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f32>, D::Error> {
        Option::<Number>::deserialize(d)?.map(Number::get).transpose()
    }
}

/// The f64 with the shortest decimal form that rounds to `x`: 1e-5 stays 1e-5 in a file.
pub(crate) fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::preset;

    fn mamba2() -> Mamba2Config {
        match &preset("mamba2-130m").unwrap().layers[0].mixer {
            Mixer::Mamba2(m) => m.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn published_parameter_counts() {
        for (name, count) in [("mamba-130m", 129_135_360), ("mamba2-130m", 128_989_632)] {
            let config = preset(name).unwrap();
            assert_eq!(config.parameter_count(), count, "{name}");
            let listed: usize = config.parameters().iter().map(ParamSpec::numel).sum();
            assert_eq!(listed as u64, count, "{name}");
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let good = preset("mamba2-130m").unwrap();
        type Change = fn(&mut ModelConfig);
        let bad: &[(&str, Change)] = &[
            ("d_model", |c| c.d_model = 0),
            ("vocab_size", |c| c.vocab_size = 0),
            ("padded_vocab", |c| c.padded_vocab = c.vocab_size - 1),
            ("layers", |c| c.layers.clear()),
            ("norm_eps", |c| c.norm_eps = f32::NAN),
            ("norm_eps", |c| c.norm_eps = -1e-5),
            ("parameters", |c| c.d_model = 1 << 30),
            ("bos_token_id", |c| c.bos_token_id = Some(1 << 20)),
            ("eos_token_id", |c| c.eos_token_ids = vec![0, 1 << 20]),
        ];
        for (word, change) in bad {
            let mut c = good.clone();
            change(&mut c);
            let error = c.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
        type MixerChange = fn(&mut Mamba2Config);
        let bad: &[(&str, MixerChange)] = &[
            ("d_state", |m| m.d_state = 0),
            ("d_conv", |m| m.d_conv = 0),
            ("headdim", |m| m.headdim = 0),
            ("headdim", |m| m.headdim = 100),
            ("ngroups", |m| m.ngroups = 7),
            ("ngroups", |m| m.ngroups = 0),
            ("chunk_size", |m| m.chunk_size = 0),
            ("d_ssm", |m| m.d_ssm = m.d_inner + 64),
            ("dt_limit", |m| m.dt_limit = (0.5, 0.1)),
            ("dt_limit", |m| m.dt_limit = (0.0, f32::NAN)),
            ("parameters", |m| m.d_state = 1 << 30),
        ];
        for (word, change) in bad {
            let mut c = good.clone();
            let mut m = mamba2();
            change(&mut m);
            c.layers[3].mixer = Mixer::Mamba2(m);
            let error = c.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn survives_json() {
        let mut c = preset("mamba2-130m").unwrap();
        c.layers[0].d_intermediate = Some(256);
        let text = serde_json::to_string(&c).unwrap();
        assert!(text.contains("\"norm_eps\":0.00001,") && text.contains("[0.0,\"inf\"]"), "{text}");
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), c);
        let c = preset("mamba-130m").unwrap();
        assert_eq!(serde_json::from_value::<ModelConfig>(serde_json::to_value(&c).unwrap()).unwrap(), c);
    }

    #[test]
    fn no_decay_on_ssm_parameters_norms_and_biases() {
        for name in ["mamba-130m", "mamba2-130m"] {
            for p in preset(name).unwrap().parameters() {
                let exempt = ["A_log", ".D", "dt_bias", ".bias", "norm.weight", "norm_f.weight"];
                assert_eq!(p.weight_decay, !exempt.iter().any(|e| p.name.ends_with(e)), "{}", p.name);
            }
        }
    }

    #[test]
    fn a_mixer_that_shares_its_channels_with_an_mlp() {
        let m = Mamba2Config { d_ssm: 512, ..mamba2() };
        assert_eq!((m.nheads(), m.d_mlp(), m.conv_dim()), (8, 1024, 768));
        assert_eq!(m.d_in_proj(), 2 * 1024 + 2 * 512 + 2 * 128 + 8);
    }
}
