//! Model sizes by name: the published Mamba and Mamba-2 models, and `tiny` for a laptop.

use crate::config::{LayerConfig, Mixer, ModelConfig, NormKind};

/// Published models: name, width, layers. Widths and depths of Mamba-2 are the same (arXiv 2312.00752, 2405.21060).
const PUBLISHED: [(&str, usize, usize); 10] = [
    ("mamba-130m", 768, 24),
    ("mamba-370m", 1024, 48),
    ("mamba-790m", 1536, 48),
    ("mamba-1.4b", 2048, 48),
    ("mamba-2.8b", 2560, 64),
    ("mamba2-130m", 768, 24),
    ("mamba2-370m", 1024, 48),
    ("mamba2-780m", 1536, 48),
    ("mamba2-1.3b", 2048, 48),
    ("mamba2-2.7b", 2560, 64),
];

/// Size of the GPT-NeoX-20B vocabulary, before rows are padded.
const GPT_NEOX_VOCAB: usize = 50277;

/// No preset has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no preset \"{name}\"; the presets are {}", preset_names().join(", "))]
pub struct UnknownPreset {
    /// What was asked for.
    pub name: String,
}

/// The names that [`preset`] knows.
pub fn preset_names() -> Vec<&'static str> {
    std::iter::once("tiny").chain(PUBLISHED.iter().map(|p| p.0)).collect()
}

/// The configuration of a preset.
///
/// # Errors
/// An unknown name; the error lists the known ones.
pub fn preset(name: &str) -> Result<ModelConfig, UnknownPreset> {
    if name == "tiny" {
        return Ok(tiny());
    }
    let Some(&(_, d_model, n_layer)) = PUBLISHED.iter().find(|p| p.0 == name) else {
        return Err(UnknownPreset { name: name.into() });
    };
    let (kind, multiple) = if name.starts_with("mamba2-") { ("mamba2", 16) } else { ("mamba1", 8) };
    Ok(ModelConfig {
        padded_vocab: GPT_NEOX_VOCAB.next_multiple_of(multiple),
        // <|endoftext|> is token 0 of GPT-NeoX and serves for everything.
        ..language_model(d_model, n_layer, GPT_NEOX_VOCAB, kind, 0)
    })
}

/// A byte-level model that learns a book on two cores in minutes: 256 bytes and one token between documents.
fn tiny() -> ModelConfig {
    let (d_model, boundary) = (128, 256);
    ModelConfig { padded_vocab: 264, ..language_model(d_model, 4, 257, "mamba1", boundary) }
}

fn language_model(d_model: usize, n_layer: usize, vocab_size: usize, kind: &str, boundary: u32) -> ModelConfig {
    let layer = Mixer::of_kind(kind, d_model).map(|mixer| LayerConfig { mixer, d_intermediate: None });
    ModelConfig {
        d_model,
        vocab_size,
        padded_vocab: vocab_size,
        tie_embeddings: true,
        norm: NormKind::RmsNorm,
        norm_eps: 1e-5,
        residual_in_fp32: true,
        layers: layer.into_iter().cycle().take(n_layer).collect(),
        bos_token_id: Some(boundary),
        eos_token_ids: vec![boundary],
        pad_token_id: Some(boundary),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_valid() {
        for name in preset_names() {
            preset(name).unwrap().validate().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        assert_eq!(preset("mamba-2.8b").unwrap().padded_vocab, 50280);
        assert_eq!(preset("mamba2-2.7b").unwrap().padded_vocab, 50288);
        assert_eq!(preset("tiny").unwrap().padded_vocab, 264);
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let error = preset("mamba-7b").unwrap_err().to_string();
        assert!(error.contains("mamba-7b") && error.contains("tiny") && error.contains("mamba2-2.7b"), "{error}");
    }
}
