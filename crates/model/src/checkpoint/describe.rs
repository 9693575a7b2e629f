//! What a checkpoint is, for people.

use super::write::find_tokenizer;
use super::{Checkpoint, CheckpointError, TensorInfo};
use crate::config::{Mixer, ModelConfig};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What is in a checkpoint.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Description {
    /// The folder, or the file.
    pub path: PathBuf,
    /// `original`, `huggingface` or `gguf`.
    pub format: String,
    /// The architecture in the format's own words.
    pub model_type: String,
    /// The architecture in a few words, e.g. `Mamba-2, 24 layers of width 768`.
    pub architecture: String,
    /// Number of parameters; a tied output matrix counts once.
    pub parameters: u64,
    /// Bytes of all weights as they are kept.
    pub bytes: u64,
    /// Parameters by number format, e.g. `bf16` → 129135360.
    pub dtypes: BTreeMap<String, u64>,
    /// `bytes`, `tokenizer.json`, or nothing where there is no tokenizer.
    pub tokenizer: Option<String>,
    /// All sizes.
    pub config: ModelConfig,
    /// Every tensor, in the order of the model.
    pub tensors: Vec<TensorInfo>,
}

/// Describes a checkpoint folder or a GGUF file. Reads headers only; numbers are not checked.
///
/// # Errors
/// As [`Checkpoint::open`]; a tokenizer that does not load is an error too.
pub fn describe(path: impl AsRef<Path>) -> Result<Description, CheckpointError> {
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = find_tokenizer(&checkpoint)?;
    let mut dtypes = BTreeMap::new();
    for t in checkpoint.tensors() {
        *dtypes.entry(t.dtype.to_string()).or_default() += t.numel() as u64;
    }
    Ok(Description {
        format: checkpoint.format.to_string(),
        model_type: checkpoint.model_type.clone(),
        architecture: architecture(&checkpoint.config),
        parameters: checkpoint.config.parameter_count(),
        bytes: checkpoint.tensors().iter().map(|t| t.nbytes() as u64).sum(),
        dtypes,
        tokenizer: tokenizer.map(|t| if t.is_bytes() { "bytes".into() } else { "tokenizer.json".into() }),
        config: checkpoint.config.clone(),
        tensors: checkpoint.tensors().to_vec(),
        path: checkpoint.path,
    })
}

/// The architecture in a few words.
fn architecture(config: &ModelConfig) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for layer in &config.layers {
        let kind = match &layer.mixer {
            Mixer::Mamba1(m) if m.dt_b_c_rms.is_some() => "Falcon-Mamba",
            Mixer::Mamba1(_) => "Mamba-1",
            Mixer::Mamba2(_) => "Mamba-2",
            other => other.kind(),
        };
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let mlp = if config.layers.iter().any(|l| l.d_intermediate.is_some()) { " with MLPs" } else { "" };
    format!("{}{mlp}, {} layers of width {}", kinds.join(" and "), config.n_layer(), config.d_model)
}
