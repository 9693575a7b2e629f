//! config.json of the original state-spaces checkpoints (mamba_ssm.models.config_mamba.MambaConfig).
//!
//! Tensor names are hognose's canonical names. `ssm_cfg` holds the keyword arguments of the mixer's class; a key that
//! the class does not take is an error there, and here.

use super::error::CheckpointError;
use super::json::{Keys, python_float};
use super::{Format, uniform_layer};
use crate::config::{LayerConfig, MAX_LAYERS, Mamba1Config, Mamba2Config, Mixer, ModelConfig, NormKind};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The epsilon of every norm in mamba-ssm; its configuration has no key for it.
const NORM_EPS: f32 = 1e-5;
/// Hidden widths of the MLP are rounded up to this (mamba_ssm.modules.mlp.GatedMLP).
const MLP_MULTIPLE: usize = 128;

const KEYS: [&str; 12] = [
    "d_model",
    "d_intermediate",
    "n_layer",
    "vocab_size",
    "ssm_cfg",
    "attn_layer_idx",
    "attn_cfg",
    "rms_norm",
    "residual_in_fp32",
    "fused_add_norm",
    "pad_vocab_size_multiple",
    "tie_embeddings",
];
/// Keys that other tools add and that do not change what is computed.
const HARMLESS: [&str; 4] = ["architectures", "torch_dtype", "dtype", "transformers_version"];
/// Arguments of both mixers that only matter to their initialisation or to which kernels run.
const SSM_HARMLESS: [&str; 5] = ["layer", "dt_min", "dt_max", "dt_init_floor", "device"];
const MAMBA1_KEYS: [&str; 9] =
    ["d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias", "dt_init", "dt_scale", "use_fast_path"];
const MAMBA2_KEYS: [&str; 16] = [
    "d_state",
    "d_conv",
    "expand",
    "headdim",
    "d_ssm",
    "ngroups",
    "D_has_hdim",
    "rmsnorm",
    "norm_before_gate",
    "dt_limit",
    "bias",
    "conv_bias",
    "chunk_size",
    "conv_init",
    "A_init_range",
    "use_mem_eff_path",
];

/// Whether a config.json is of this format: it has no `model_type`, but these.
pub(super) fn recognise(map: &Map<String, Value>) -> bool {
    !map.contains_key("model_type") && map.contains_key("d_model") && map.contains_key("n_layer")
}

/// Translates config.json.
pub(super) fn read(path: &Path, map: &Map<String, Value>) -> Result<ModelConfig, CheckpointError> {
    let keys = Keys { path: path.into(), map, prefix: "" };
    for key in map.keys() {
        if !KEYS.contains(&&key[..]) && !HARMLESS.contains(&&key[..]) && !key.starts_with('_') {
            return Err(keys.error(key, format!("is not known; the original format has {}", KEYS.join(", "))));
        }
    }
    if keys.get("attn_layer_idx").is_some_and(|v| v.as_array().is_none_or(|a| !a.is_empty())) {
        return Err(keys.unsupported("layers with attention (attn_layer_idx) are not supported yet"));
    }
    let d_model = keys.size("d_model")?;
    let n_layer = keys.size("n_layer")?;
    if n_layer > MAX_LAYERS {
        return Err(keys.error("n_layer", format!("is {n_layer}; expected at most {MAX_LAYERS}")));
    }
    let empty = Map::new();
    let ssm = match keys.get("ssm_cfg") {
        None => &empty,
        Some(Value::Object(o)) => o,
        Some(v) => return Err(keys.error("ssm_cfg", format!("is {v}; expected an object"))),
    };
    let ssm = Keys { path: path.into(), map: ssm, prefix: "ssm_cfg." };
    let mixer = match ssm.get("layer").map(|v| v.as_str().unwrap_or_default()) {
        None | Some("Mamba1") => Mixer::Mamba1(read_mamba1(&ssm, d_model)?),
        Some("Mamba2") => Mixer::Mamba2(read_mamba2(&ssm, d_model)?),
        Some(other) => {
            return Err(ssm.unsupported(format!("ssm_cfg.layer is \"{other}\"; supported are Mamba1 and Mamba2")));
        }
    };
    let d_intermediate = Some(keys.size_or("d_intermediate", 0)?).filter(|&h| h > 0);
    // An absurd width is left as it is for validation to refuse.
    let d_intermediate = d_intermediate.map(|h| h.checked_next_multiple_of(MLP_MULTIPLE).unwrap_or(h));
    let vocab_size = keys.size("vocab_size")?;
    let multiple = keys.size_or("pad_vocab_size_multiple", 8)?;
    if multiple == 0 {
        return Err(keys.error("pad_vocab_size_multiple", "is 0; expected 1 or more"));
    }
    Ok(ModelConfig {
        d_model,
        vocab_size,
        padded_vocab: vocab_size.checked_next_multiple_of(multiple).unwrap_or(usize::MAX),
        tie_embeddings: keys.bool_or("tie_embeddings", true)?,
        norm: if keys.bool_or("rms_norm", true)? { NormKind::RmsNorm } else { NormKind::LayerNorm },
        norm_eps: NORM_EPS,
        residual_in_fp32: keys.bool_or("residual_in_fp32", true)?,
        layers: vec![LayerConfig { mixer, d_intermediate }; n_layer],
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    })
}

fn check_ssm_keys(ssm: &Keys, known: &[&str], class: &str) -> Result<(), CheckpointError> {
    match ssm.map.keys().find(|k| !known.contains(&&k[..]) && !SSM_HARMLESS.contains(&&k[..])) {
        None => Ok(()),
        Some(key) => Err(ssm.error(key, format!("is not known; {class} takes {}", known.join(", ")))),
    }
}

fn read_mamba1(ssm: &Keys, d_model: usize) -> Result<Mamba1Config, CheckpointError> {
    check_ssm_keys(ssm, &MAMBA1_KEYS, "Mamba1")?;
    Ok(Mamba1Config {
        d_inner: ssm.expanded("expand", 2, d_model)?,
        d_state: ssm.size_or("d_state", 16)?,
        d_conv: ssm.size_or("d_conv", 4)?,
        dt_rank: ssm.rank_or_auto("dt_rank", d_model)?,
        bias: ssm.bool_or("bias", false)?,
        conv_bias: ssm.bool_or("conv_bias", true)?,
        dt_b_c_rms: None,
    })
}

fn read_mamba2(ssm: &Keys, d_model: usize) -> Result<Mamba2Config, CheckpointError> {
    check_ssm_keys(ssm, &MAMBA2_KEYS, "Mamba2")?;
    let d_inner = ssm.expanded("expand", 2, d_model)?;
    Ok(Mamba2Config {
        d_inner,
        d_ssm: ssm.size_or("d_ssm", d_inner)?,
        d_state: ssm.size_or("d_state", 128)?,
        d_conv: ssm.size_or("d_conv", 4)?,
        headdim: ssm.size_or("headdim", 64)?,
        ngroups: ssm.size_or("ngroups", 1)?,
        chunk_size: ssm.size_or("chunk_size", 256)?,
        d_has_hdim: ssm.bool_or("D_has_hdim", false)?,
        rmsnorm: ssm.bool_or("rmsnorm", true)?,
        norm_before_gate: ssm.bool_or("norm_before_gate", false)?,
        dt_limit: ssm.float_pair_or("dt_limit", (0.0, f32::INFINITY))?,
        bias: ssm.bool_or("bias", false)?,
        conv_bias: ssm.bool_or("conv_bias", true)?,
    })
}

/// The config.json of a model.
///
/// # Errors
/// What the format has no key for: Falcon-Mamba's norms, another epsilon, layers that differ, odd expansions.
pub(super) fn write(config: &ModelConfig) -> Result<Map<String, Value>, CheckpointError> {
    let no = |message: String| CheckpointError::Inexpressible { format: Format::Original, message };
    let layer = uniform_layer(config).ok_or_else(|| no("its layers differ from each other".into()))?;
    if config.norm_eps != NORM_EPS {
        return Err(no(format!("its norms have epsilon {}; the format knows {NORM_EPS} only", config.norm_eps)));
    }
    let d_intermediate = layer.d_intermediate.unwrap_or(0);
    if !d_intermediate.is_multiple_of(MLP_MULTIPLE) {
        return Err(no(format!("its MLP is {d_intermediate} wide; the format knows multiples of {MLP_MULTIPLE} only")));
    }
    let d = config.d_model;
    let mut ssm = Map::new();
    let mut put = |key: &str, value: Value, default: Value| {
        if value != default {
            ssm.insert(key.into(), value);
        }
    };
    let preferred = match &layer.mixer {
        Mixer::Mamba1(m) => {
            if m.dt_b_c_rms.is_some() {
                return Err(no("it normalises Δ, B and C (Falcon-Mamba); keep it in the Hugging Face format".into()));
            }
            let expand = if m.d_inner.is_multiple_of(d) {
                json!(m.d_inner / d)
            } else {
                let factor = m.d_inner as f64 / d as f64;
                if (factor * d as f64) as usize != m.d_inner {
                    return Err(no(format!("its width {} is no multiple of {d}", m.d_inner)));
                }
                json!(factor)
            };
            put("d_state", json!(m.d_state), json!(16));
            put("d_conv", json!(m.d_conv), json!(4));
            put("expand", expand, json!(2));
            put("dt_rank", json!(m.dt_rank), json!(d.div_ceil(16)));
            put("bias", json!(m.bias), json!(false));
            put("conv_bias", json!(m.conv_bias), json!(true));
            8
        }
        Mixer::Mamba2(m) => {
            if !m.d_inner.is_multiple_of(d) {
                return Err(no(format!("its width {} is no multiple of {d}", m.d_inner)));
            }
            put("layer", json!("Mamba2"), Value::Null);
            put("d_state", json!(m.d_state), json!(128));
            put("d_conv", json!(m.d_conv), json!(4));
            put("expand", json!(m.d_inner / d), json!(2));
            put("headdim", json!(m.headdim), json!(64));
            put("d_ssm", json!(m.d_ssm), json!(m.d_inner));
            put("ngroups", json!(m.ngroups), json!(1));
            put("D_has_hdim", json!(m.d_has_hdim), json!(false));
            put("rmsnorm", json!(m.rmsnorm), json!(true));
            put("norm_before_gate", json!(m.norm_before_gate), json!(false));
            let limit = |(low, high)| json!([python_float(low), python_float(high)]);
            put("dt_limit", limit(m.dt_limit), limit((0.0, f32::INFINITY)));
            put("bias", json!(m.bias), json!(false));
            put("conv_bias", json!(m.conv_bias), json!(true));
            put("chunk_size", json!(m.chunk_size), json!(256));
            16
        }
        other => return Err(no(format!("it has no layers of the kind {}", other.kind()))),
    };
    let (vocab, rows) = (config.vocab_size, config.padded_vocab);
    // The padding of the published models if it fits, else a power of two, else the number of rows itself.
    let multiples = [preferred, 8, 16, 1, 2, 4, 32, 64, 128, 256, rows];
    let multiple = multiples.into_iter().find(|m| vocab.next_multiple_of(*m) == rows).unwrap_or(rows);
    let object = json!({
        "d_model": d,
        "d_intermediate": d_intermediate,
        "n_layer": config.n_layer(),
        "vocab_size": vocab,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": config.norm == NormKind::RmsNorm,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": true,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": config.tie_embeddings,
    });
    match object {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}
