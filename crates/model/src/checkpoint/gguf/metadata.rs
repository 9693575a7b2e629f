//! The metadata that says what a model is: architectures `mamba` (Falcon-Mamba too) and `mamba2`.
//!
//! Sizes have the keys that llama.cpp reads. What it has no key for, and hognose needs to give a checkpoint back as it
//! was, is kept under `hognose.`, where other programs do not look; a file without these keys gets what llama.cpp computes
//! with.

use super::super::error::CheckpointError;
use super::super::{Format, uniform_layer};
use super::container::{Container, Value};
use crate::config::{LayerConfig, MAX_LAYERS, Mamba1Config, Mamba2Config, Mixer, ModelConfig, NormKind};
use std::path::Path;

/// The architectures that are read and written.
const ARCHITECTURES: &str = "mamba, mamba2";
/// Chunks of a Mamba-2 scan where the file does not say; changes no result beyond rounding.
const CHUNK_SIZE: usize = 256;
/// Keys of a mixer's sizes: channels, state, width of the convolution, and rank of Δ or number of heads.
const MIXER_SIZES: [&str; 4] = ["ssm.inner_size", "ssm.state_size", "ssm.conv_kernel", "ssm.time_step_rank"];
/// What a recurrent model's context is said to be: as good as unlimited.
const CONTEXT: u32 = 1 << 20;
/// Keys of the tokens that end a text, in the order in which they are used.
pub(super) const EOS_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
pub(super) const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";
pub(super) const PAD_KEY: &str = "tokenizer.ggml.padding_token_id";
/// Number of tokens in use, where the matrices have more rows.
const TOKENS_KEY: &str = "hognose.vocab_size";
const CHUNK_KEY: &str = "hognose.chunk_size";
const RESIDUAL_KEY: &str = "hognose.residual_in_fp32";
/// llama.cpp takes the epsilon of the other norms.
pub(super) const DT_B_C_KEY: &str = "hognose.dt_b_c_rms_epsilon";

/// Typed access to metadata, with errors that name the key.
pub(super) struct Keys<'a, 'f> {
    pub(super) path: &'a Path,
    pub(super) container: &'a Container<'f>,
}

impl<'f> Keys<'_, 'f> {
    pub(super) fn get(&self, key: &str) -> Option<Value<'f>> {
        self.container.metadata.get(key).copied()
    }

    pub(super) fn error(&self, key: &str, message: impl Into<String>) -> CheckpointError {
        CheckpointError::Key { path: self.path.into(), key: key.into(), message: message.into() }
    }

    fn expected(&self, key: &str, what: &str) -> CheckpointError {
        let found = if self.get(key).is_some() { "is something else" } else { "is missing" };
        self.error(key, format!("{found}; expected {what}"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Whole(n)) if usize::try_from(n).is_ok() => Ok(usize::try_from(n).ok()),
            Some(_) => Err(self.expected(key, "a whole number that is not negative")),
        }
    }

    fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        self.optional_size(key)?.ok_or_else(|| self.expected(key, "a whole number"))
    }

    fn optional_float(&self, key: &str) -> Result<Option<f32>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(x as f32)),
            Some(_) => Err(self.expected(key, "a number")),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, CheckpointError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(b),
            Some(_) => Err(self.expected(key, "true or false")),
        }
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&'f str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => {
                std::str::from_utf8(text).map(Some).map_err(|_| self.error(key, "is no text in UTF-8"))
            }
            Some(_) => Err(self.expected(key, "a text")),
        }
    }

    /// A token id. llama.cpp disregards one that has no row, and so is it here.
    pub(super) fn token(&self, key: &str, rows: usize) -> Result<Option<u32>, CheckpointError> {
        let id = self.optional_size(key)?.filter(|&id| id < rows);
        Ok(id.and_then(|id| u32::try_from(id).ok()))
    }
}

/// The architecture's name and the model. Sizes are not yet checked.
pub(super) fn read(keys: &Keys) -> Result<(String, ModelConfig), CheckpointError> {
    let arch = keys.optional_text("general.architecture")?.unwrap_or_default();
    if arch != "mamba" && arch != "mamba2" {
        let message = format!("is \"{arch}\", which is not supported; supported are {ARCHITECTURES}");
        return Err(keys.error("general.architecture", message));
    }
    let key = |name: &str| format!("{arch}.{name}");
    let size = |name: &str| keys.size(&key(name));
    let d_model = size("embedding_length")?;
    let n_layer = size("block_count")?;
    if n_layer > MAX_LAYERS {
        return Err(keys.error(&key("block_count"), format!("is {n_layer}; expected at most {MAX_LAYERS}")));
    }
    let eps_key = key("attention.layer_norm_rms_epsilon");
    let norm_eps = keys.optional_float(&eps_key)?.ok_or_else(|| keys.expected(&eps_key, "a number"))?;
    let [d_inner, d_state, d_conv, rank] = MIXER_SIZES.map(size);
    let (d_inner, d_state, d_conv, rank) = (d_inner?, d_state?, d_conv?, rank?);
    let mixer = if arch == "mamba" {
        let norms = keys.flag(&key("ssm.dt_b_c_rms"), false)?;
        let eps = keys.optional_float(DT_B_C_KEY)?.unwrap_or(norm_eps);
        let dt_b_c_rms = norms.then_some(eps);
        Mixer::Mamba1(Mamba1Config {
            d_inner,
            d_state,
            d_conv,
            dt_rank: rank,
            bias: false,
            conv_bias: true,
            dt_b_c_rms,
        })
    } else {
        if rank == 0 || !d_inner.is_multiple_of(rank) {
            let message = format!("({rank} heads) does not divide ssm.inner_size ({d_inner})");
            return Err(keys.error(&key("ssm.time_step_rank"), message));
        }
        Mixer::Mamba2(Mamba2Config {
            d_inner,
            d_ssm: d_inner,
            d_state,
            d_conv,
            headdim: d_inner / rank,
            ngroups: size("ssm.group_count")?,
            chunk_size: keys.optional_size(CHUNK_KEY)?.unwrap_or(CHUNK_SIZE),
            d_has_hdim: false,
            rmsnorm: true,
            norm_before_gate: false,
            dt_limit: (0.0, f32::INFINITY),
            bias: false,
            conv_bias: true,
        })
    };
    let tensor = |name: &str| keys.container.tensors.iter().find(|t| t.name == name);
    // The embedding says how many rows there are; llama.cpp does not look at `vocab_size` where there are tokens.
    let rows = match tensor("token_embd.weight").map(|t| t.dims.as_slice()) {
        Some(&[_, rows]) => rows,
        Some(&[_]) => 1,
        _ => size("vocab_size")?,
    };
    let config = ModelConfig {
        d_model,
        vocab_size: keys.optional_size(TOKENS_KEY)?.unwrap_or(rows),
        padded_vocab: rows,
        tie_embeddings: tensor("output.weight").is_none(),
        norm: NormKind::RmsNorm,
        norm_eps,
        residual_in_fp32: keys.flag(RESIDUAL_KEY, true)?,
        layers: vec![LayerConfig { mixer, d_intermediate: None }; n_layer],
        bos_token_id: keys.token(BOS_KEY, rows)?,
        eos_token_ids: EOS_KEYS.iter().filter_map(|key| keys.token(key, rows).transpose()).collect::<Result<_, _>>()?,
        pad_token_id: keys.token(PAD_KEY, rows)?,
    };
    Ok((arch.to_string(), config))
}

/// A value to be written.
#[derive(Debug, Clone)]
pub(super) enum Given {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

/// Keys and their values, in the order of the file.
pub(super) type Values = Vec<(String, Given)>;

/// The architecture and the keys of a model, without those of the tokenizer.
///
/// # Errors
/// What llama.cpp does not compute for these architectures.
pub(super) fn write(config: &ModelConfig) -> Result<(&'static str, Values), CheckpointError> {
    let no = |message: String| CheckpointError::Inexpressible { format: Format::Gguf, message };
    let layer = uniform_layer(config).ok_or_else(|| no("its layers differ from each other".into()))?;
    if config.norm != NormKind::RmsNorm {
        return Err(no("its norms are LayerNorm; the format knows RMSNorm only".into()));
    }
    if layer.d_intermediate.is_some() {
        return Err(no("its layers have MLPs".into()));
    }
    let number = |what: &str, n: usize| {
        u32::try_from(n).map(Given::U32).map_err(|_| no(format!("{what} is {n}, which has more than 32 bits")))
    };
    let check_biases = |projections: bool, convolution: bool| match (projections, convolution) {
        (true, _) => Err(no("its projections have biases".into())),
        (_, false) => Err(no("its convolutions have no biases".into())),
        _ => Ok(()),
    };
    let mut own: Vec<(&str, Given)> = Vec::new();
    let (arch, sizes, special) = match &layer.mixer {
        Mixer::Mamba1(m) => {
            if m.d_inner != 2 * config.d_model {
                let message = format!("its width {} is not twice {}, as llama.cpp has it", m.d_inner, config.d_model);
                return Err(no(message));
            }
            check_biases(m.bias, m.conv_bias)?;
            own.extend(m.dt_b_c_rms.filter(|e| *e != config.norm_eps).map(|e| (DT_B_C_KEY, Given::F32(e))));
            let norms = ("ssm.dt_b_c_rms", Given::Bool(m.dt_b_c_rms.is_some()));
            ("mamba", [m.d_inner, m.d_state, m.d_conv, m.dt_rank], norms)
        }
        Mixer::Mamba2(m) => {
            check_biases(m.bias, m.conv_bias)?;
            let (low, high) = m.dt_limit;
            let missing = [
                (m.d_ssm != m.d_inner, "its mixers share their channels with an MLP (d_ssm)"),
                (!m.rmsnorm, "its mixers have no norm"),
                (m.norm_before_gate, "its mixers normalise before the gate"),
                (m.d_has_hdim, "its D has a value for each channel"),
                (low > 0.0 || high < f32::INFINITY, "it limits Δ (dt_limit)"),
            ];
            if let Some((_, what)) = missing.iter().find(|m| m.0) {
                return Err(no(what.to_string()));
            }
            if m.chunk_size != CHUNK_SIZE {
                own.push((CHUNK_KEY, number("chunk_size", m.chunk_size)?));
            }
            let groups = ("ssm.group_count", number("ngroups", m.ngroups)?);
            ("mamba2", [m.d_inner, m.d_state, m.d_conv, m.nheads()], groups)
        }
        other => return Err(no(format!("its layers are {}", other.kind()))),
    };
    let mut all = Vec::new();
    let mut put = |name: &str, value: Given| all.push((format!("{arch}.{name}"), value));
    put("context_length", Given::U32(CONTEXT));
    put("embedding_length", number("d_model", config.d_model)?);
    // llama.cpp asks for both, though there is neither attention nor an MLP.
    put("feed_forward_length", Given::U32(0));
    put("attention.head_count", Given::U32(0));
    put("block_count", number("the number of layers", config.n_layer())?);
    for (name, size) in MIXER_SIZES.iter().zip(sizes) {
        put(name, number(name, size)?);
    }
    put(special.0, special.1);
    put("attention.layer_norm_rms_epsilon", Given::F32(config.norm_eps));
    put("vocab_size", number("the vocabulary", config.padded_vocab)?);
    if config.vocab_size != config.padded_vocab {
        own.push((TOKENS_KEY, number("the vocabulary", config.vocab_size)?));
    }
    if !config.residual_in_fp32 {
        own.push((RESIDUAL_KEY, Given::Bool(false)));
    }
    all.extend(own.into_iter().map(|(key, value)| (key.to_string(), value)));
    Ok((arch, all))
}
