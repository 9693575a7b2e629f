//! config.json of Hugging Face transformers: mamba, mamba2, falcon_mamba; and hognose's own in the same layout.
//!
//! Read and written as transformers 5.23 does. What its classes compute, where the file leaves room for doubt:
//! - `intermediate_size` is the width of mamba and falcon_mamba where it is given, `expand` otherwise; mamba2 has
//!   `expand` only, and `num_heads · head_dim` must agree with it.
//! - mamba2 always normalises `y · silu(z)`, per group. Files of older versions carry `rms_norm` and
//!   `norm_before_gate`, which no version has ever looked at; they are not looked at here either. (Versions before 5
//!   normalise over the whole width where n_groups > 1, which is not what the weights were trained for.)
//! - `vocab_size` counts the rows of the matrices. The number of tokens in use is kept beside it under a key of our own.
//!
//! A model that these classes cannot express is written in the same layout with `model_type` "hognose", which
//! transformers refuses by name, and its whole configuration under `hognose`.

use super::error::CheckpointError;
use super::json::{Keys, float};
use super::uniform_layer;
use crate::config::{LayerConfig, MAX_LAYERS, Mamba1Config, Mamba2Config, Mixer, ModelConfig, NormKind};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The model types that are read.
pub(super) const MODEL_TYPES: &str = "mamba, mamba2, falcon_mamba, hognose";
/// Number of tokens in use where the matrices have more rows; transformers keeps keys that it does not know.
const TOKENS_KEY: &str = "unpadded_vocab_size";

/// The name of a tensor in a Hugging Face file.
pub(super) fn native_name(canonical: &str) -> String {
    canonical.replace("backbone.embedding.", "backbone.embeddings.")
}

/// The canonical name of a tensor. Early files have the original names, which transformers accepts too.
pub(super) fn canonical_name(native: &str) -> String {
    native.replace("backbone.embeddings.", "backbone.embedding.")
}

/// Translates config.json.
pub(super) fn read(path: &Path, map: &Map<String, Value>) -> Result<ModelConfig, CheckpointError> {
    let keys = Keys { path: path.into(), map, prefix: "" };
    let model_type = match keys.get("model_type") {
        Some(Value::String(s)) => s.as_str(),
        _ => return Err(keys.error("model_type", format!("is missing; expected one of {MODEL_TYPES}"))),
    };
    if model_type == "hognose" {
        let own = keys.get("hognose").ok_or_else(|| keys.error("hognose", "is missing"))?;
        return serde_json::from_value(own.clone()).map_err(|e| keys.error("hognose", format!("is damaged: {e}")));
    }
    if !["mamba", "mamba2", "falcon_mamba"].contains(&model_type) {
        let found = model_type.into();
        return Err(CheckpointError::ModelType { path: path.into(), found, known: MODEL_TYPES });
    }
    for key in ["quantization_config", "per_layer_config"] {
        if keys.get(key).is_some() {
            return Err(keys.unsupported(format!("\"{key}\" is not supported; use the plain checkpoint of this model")));
        }
    }
    if let Some(act) = keys.get("hidden_act").filter(|v| !matches!(v.as_str(), Some("silu" | "swish"))) {
        return Err(keys.unsupported(format!("hidden_act is {act}; only \"silu\" is supported")));
    }
    let d_model = keys.size("hidden_size")?;
    let n_layer = keys.size("num_hidden_layers")?;
    if n_layer > MAX_LAYERS {
        return Err(keys.error("num_hidden_layers", format!("is {n_layer}; expected at most {MAX_LAYERS}")));
    }
    let mixer = if model_type == "mamba2" {
        Mixer::Mamba2(read_mamba2(&keys, d_model)?)
    } else {
        Mixer::Mamba1(read_mamba1(&keys, d_model, model_type == "falcon_mamba")?)
    };
    let rows = keys.size("vocab_size")?;
    Ok(ModelConfig {
        d_model,
        vocab_size: keys.size_or(TOKENS_KEY, rows)?,
        padded_vocab: rows,
        tie_embeddings: keys.bool_or("tie_word_embeddings", model_type != "mamba2")?,
        norm: NormKind::RmsNorm,
        norm_eps: keys.float_or("layer_norm_epsilon", 1e-5)?,
        residual_in_fp32: keys.bool_or("residual_in_fp32", true)?,
        layers: vec![LayerConfig { mixer, d_intermediate: None }; n_layer],
        bos_token_id: keys.token_id("bos_token_id")?,
        eos_token_ids: keys.token_ids("eos_token_id")?,
        pad_token_id: keys.token_id("pad_token_id")?,
    })
}

fn read_mamba1(keys: &Keys, d_model: usize, falcon: bool) -> Result<Mamba1Config, CheckpointError> {
    let d_inner = match keys.optional_size("intermediate_size")? {
        Some(width) => width,
        None => keys.expanded("expand", 2, d_model)?,
    };
    Ok(Mamba1Config {
        d_inner,
        d_state: keys.size_or("state_size", 16)?,
        d_conv: keys.size_or("conv_kernel", 4)?,
        dt_rank: keys.rank_or_auto("time_step_rank", d_model)?,
        bias: keys.bool_or("use_bias", false)?,
        conv_bias: keys.bool_or("use_conv_bias", true)?,
        dt_b_c_rms: if falcon { Some(keys.float_or("mixer_rms_eps", 1e-6)?) } else { None },
    })
}

fn read_mamba2(keys: &Keys, d_model: usize) -> Result<Mamba2Config, CheckpointError> {
    let d_inner = keys.expanded("expand", 2, d_model)?;
    let (heads, headdim) = (keys.size_or("num_heads", 128)?, keys.size_or("head_dim", 64)?);
    if heads.checked_mul(headdim) != Some(d_inner) {
        let message = format!("({heads}) times head_dim ({headdim}) must equal expand times hidden_size ({d_inner})");
        return Err(keys.error("num_heads", message));
    }
    Ok(Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: keys.size_or("state_size", 128)?,
        d_conv: keys.size_or("conv_kernel", 4)?,
        headdim,
        ngroups: keys.size_or("n_groups", 8)?,
        chunk_size: keys.size_or("chunk_size", 256)?,
        d_has_hdim: false,
        rmsnorm: true,
        norm_before_gate: false,
        dt_limit: keys.float_pair_or("time_step_limit", (0.0, f32::INFINITY))?,
        bias: keys.bool_or("use_bias", false)?,
        conv_bias: keys.bool_or("use_conv_bias", true)?,
    })
}

/// The `model_type` under which transformers computes this model, or "hognose" where it has no class that does.
pub(super) fn model_type(config: &ModelConfig) -> &'static str {
    let Some(layer) = uniform_layer(config) else { return "hognose" };
    if config.norm != NormKind::RmsNorm || layer.d_intermediate.is_some() {
        return "hognose";
    }
    match &layer.mixer {
        Mixer::Mamba1(m) if m.dt_b_c_rms.is_some() => "falcon_mamba",
        Mixer::Mamba1(_) => "mamba",
        Mixer::Mamba2(m) => {
            let plain = m.rmsnorm && !m.norm_before_gate && !m.d_has_hdim && m.d_ssm == m.d_inner;
            if plain && m.d_inner.is_multiple_of(config.d_model) { "mamba2" } else { "hognose" }
        }
        _ => "hognose",
    }
}

/// The config.json of a model. `dtype` is the type of the weights in torch's words.
pub(super) fn write(config: &ModelConfig, dtype: &str) -> Result<Map<String, Value>, serde_json::Error> {
    let model_type = model_type(config);
    let class = match model_type {
        "mamba" => "MambaForCausalLM",
        "mamba2" => "Mamba2ForCausalLM",
        "falcon_mamba" => "FalconMambaForCausalLM",
        _ => "HognoseForCausalLM",
    };
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.into(), value);
    put("architectures", json!([class]));
    put("model_type", json!(model_type));
    put("dtype", json!(dtype));
    put("vocab_size", json!(config.padded_vocab));
    put("hidden_size", json!(config.d_model));
    put("num_hidden_layers", json!(config.n_layer()));
    put("tie_word_embeddings", json!(config.tie_embeddings));
    token_ids(config, &mut put);
    let Some(layer) = uniform_layer(config).filter(|_| model_type != "hognose") else {
        put("hognose", serde_json::to_value(config)?);
        return Ok(map);
    };
    if config.vocab_size != config.padded_vocab {
        put(TOKENS_KEY, json!(config.vocab_size));
    }
    put("layer_norm_epsilon", float(config.norm_eps));
    put("residual_in_fp32", json!(config.residual_in_fp32));
    put("hidden_act", json!("silu"));
    put("use_cache", json!(true));
    match &layer.mixer {
        Mixer::Mamba1(m) => {
            // transformers takes whole expansions only; where there is none, intermediate_size overrules it.
            put("expand", json!((m.d_inner / config.d_model).max(1)));
            put("intermediate_size", json!(m.d_inner));
            put("state_size", json!(m.d_state));
            put("conv_kernel", json!(m.d_conv));
            put("time_step_rank", json!(m.dt_rank));
            put("use_bias", json!(m.bias));
            put("use_conv_bias", json!(m.conv_bias));
            if let Some(eps) = m.dt_b_c_rms {
                put("mixer_rms_eps", float(eps));
            }
        }
        Mixer::Mamba2(m) => {
            put("expand", json!(m.d_inner / config.d_model));
            put("num_heads", json!(m.nheads()));
            put("head_dim", json!(m.headdim));
            put("state_size", json!(m.d_state));
            put("n_groups", json!(m.ngroups));
            put("conv_kernel", json!(m.d_conv));
            put("chunk_size", json!(m.chunk_size));
            put("time_step_limit", json!([float(m.dt_limit.0), float(m.dt_limit.1)]));
            put("use_bias", json!(m.bias));
            put("use_conv_bias", json!(m.conv_bias));
        }
        // These have no class, and were written above.
        _ => {}
    }
    Ok(map)
}

fn token_ids(config: &ModelConfig, put: &mut impl FnMut(&str, Value) -> Option<Value>) {
    put("bos_token_id", json!(config.bos_token_id));
    let eos = match config.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    };
    put("eos_token_id", eos);
    put("pad_token_id", json!(config.pad_token_id));
}

/// generation_config.json: the special tokens, which transformers' `generate` takes from here.
pub(super) fn generation_config(config: &ModelConfig) -> Map<String, Value> {
    let mut map = Map::new();
    token_ids(config, &mut |key, value| map.insert(key.into(), value));
    map.retain(|_, v| !v.is_null());
    map
}

/// Takes special tokens from generation_config.json where it names them: they are the ones that generation goes by.
pub(super) fn read_generation_config(
    path: &Path,
    map: &Map<String, Value>,
    config: &mut ModelConfig,
) -> Result<(), CheckpointError> {
    let keys = Keys { path: path.into(), map, prefix: "" };
    config.bos_token_id = keys.token_id("bos_token_id")?.or(config.bos_token_id);
    config.pad_token_id = keys.token_id("pad_token_id")?.or(config.pad_token_id);
    let eos = keys.token_ids("eos_token_id")?;
    if !eos.is_empty() {
        config.eos_token_ids = eos;
    }
    Ok(())
}
