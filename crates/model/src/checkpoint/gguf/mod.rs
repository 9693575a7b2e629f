//! GGUF: one file with metadata, tensors and tokenizer, as llama.cpp has it. Architectures `mamba` and `mamba2`.
//!
//! The format is specified in ggml's docs/gguf.md; what the two architectures mean by it, by what llama.cpp's converter
//! writes and its loader reads. Against hognose's canonical tensors ([`crate::config::ParamSpec`]) the names differ, axes
//! are listed innermost first, some have lost or gained an axis of length 1, and A = −exp(A_log) is stored in place of
//! A_log. Matrices may be in blocks of few bits a number ([`hognose_core::quant`]).

mod container;
mod metadata;
pub(super) mod names;
mod pretokenizer;
#[cfg(test)]
mod tests;
mod vocabulary;
mod write;

pub use write::{Quantized, QuantizedTensor, quantize};

use super::error::CheckpointError;
use super::shards::Weights;
use super::tensor::{Dtype, Mapped, Stored};
use crate::config::ModelConfig;
use crate::tokenizer::{Tokenizer, TokenizerError};
use container::Container;
use metadata::Keys;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Whether a path is a file of this format, whatever its name.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    path.is_file() && File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *container::MAGIC
}

/// The architecture and the model that a file describes, checked; its tensors are not looked at.
pub(super) fn read_config(path: &Path) -> Result<(String, ModelConfig), CheckpointError> {
    let file = Mapped::open(path).map_err(CheckpointError::io(path, "open"))?;
    config(path, &parse(path, file.bytes())?)
}

/// Opens a file: the model, and its tensors under the file's names with hognose's shapes.
///
/// # Errors
/// A file that is damaged, another architecture, or a tensor that the model has in another shape. What is missing or
/// too much is left to the caller.
pub(super) fn open(path: &Path) -> Result<(String, ModelConfig, Weights), CheckpointError> {
    let file = Mapped::open(path).map_err(CheckpointError::io(path, "open"))?;
    let container = parse(path, file.bytes())?;
    let (arch, config) = config(path, &container)?;
    let specs: HashMap<String, _> = config.parameters().into_iter().map(|p| (names::native_name(&p.name), p)).collect();
    let mut tensors = BTreeMap::new();
    for entry in container.tensors {
        let mut shape: Vec<usize> = entry.dims.iter().rev().copied().collect();
        let spec = specs.get(&entry.name);
        let negated_exp = spec.is_some_and(|p| p.name.ends_with(".A_log"));
        if let Some(spec) = spec {
            let expected = names::dims(spec, &config);
            if !names::same_dims(&entry.dims, &expected) {
                let expected = expected.into_iter().rev().collect();
                return Err(CheckpointError::Shape { path: path.into(), name: entry.name, found: shape, expected });
            }
            shape = spec.shape.clone();
        }
        if negated_exp && entry.dtype != Dtype::F32 {
            let message = format!("tensor {} is of type {}; expected f32", entry.name, entry.dtype);
            return Err(CheckpointError::Unsupported { path: path.into(), message });
        }
        let (file, dtype, start) = (file.clone(), entry.dtype, entry.start);
        tensors.insert(entry.name, Stored { file, dtype, shape, start, strides: None, checked: None, negated_exp });
    }
    Ok((arch, config, Weights { path: path.into(), tensors }))
}

/// The tokenizer inside of a file; `None` where it has none.
///
/// # Errors
/// A file that is damaged, or a tokenizer of a kind that is not read.
pub(crate) fn tokenizer(path: &Path) -> Result<Option<Tokenizer>, TokenizerError> {
    let file = Mapped::open(path);
    let file = file.map_err(|source| TokenizerError::Io { path: path.into(), action: "open", source })?;
    let container = container::read(file.bytes());
    let container = container.map_err(|message| TokenizerError::Invalid { path: path.into(), message })?;
    vocabulary::read(&Keys { path, container: &container })
}

fn parse<'f>(path: &Path, bytes: &'f [u8]) -> Result<Container<'f>, CheckpointError> {
    container::read(bytes).map_err(|message| CheckpointError::Gguf { path: path.into(), message })
}

fn config(path: &Path, container: &Container) -> Result<(String, ModelConfig), CheckpointError> {
    let (arch, config) = metadata::read(&Keys { path, container })?;
    config.validate().map_err(|source| CheckpointError::Config { path: path.into(), source })?;
    Ok((arch, config))
}
