//! What can be wrong with a checkpoint.

use super::Format;
use crate::config::ConfigError;
use std::path::PathBuf;

/// Why a checkpoint cannot be read or written. Every message names the file and, where there is one, the tensor.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The path is neither a folder nor a file that is read.
    #[error("{}: there is no such folder or GGUF file; expected a folder with config.json and the weights, or a GGUF file",
        .path.display())]
    NoFolder { path: PathBuf },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", .path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    /// A file that should hold JSON does not.
    #[error("{}: not valid JSON: {message}", .path.display())]
    Json { path: PathBuf, message: String },
    /// A key of a JSON file is missing or has a value that cannot be used.
    #[error("{}: \"{key}\" {message}", .path.display())]
    Key { path: PathBuf, key: String, message: String },
    /// `model_type` names an architecture that this program does not know.
    #[error("{}: model_type \"{found}\" is not supported; supported are {known}", .path.display())]
    ModelType { path: PathBuf, found: String, known: &'static str },
    /// The sizes do not make a model.
    #[error("{}: {source}", .path.display())]
    Config { path: PathBuf, source: ConfigError },
    /// A feature of the model that this program does not compute.
    #[error("{}: {message}", .path.display())]
    Unsupported { path: PathBuf, message: String },
    /// A folder with a configuration and no weights.
    #[error("{}: no weights found; expected {expected}", .path.display())]
    NoWeights { path: PathBuf, expected: String },
    /// A safetensors file that is damaged.
    #[error("{}: not a valid safetensors file: {message}", .path.display())]
    Safetensors { path: PathBuf, message: String },
    /// A torch file that is damaged, or holds something else than tensors.
    #[error("{}: not a file of tensors as torch.save writes it: {message}", .path.display())]
    Torch { path: PathBuf, message: String },
    /// A GGUF file that is damaged, or none.
    #[error("{}: not a GGUF file that can be read: {message}", .path.display())]
    Gguf { path: PathBuf, message: String },
    /// A tensor that the configuration asks for is not there.
    #[error("{}: tensor {name} of shape {shape:?} is missing{}", .path.display(), others(*.more))]
    Missing { path: PathBuf, name: String, shape: Vec<usize>, more: usize },
    /// A tensor that the configuration does not ask for is there.
    #[error("{}: tensor {name} does not belong to the model that is described{}; one of the two is wrong",
        .path.display(), others(*.more))]
    Surplus { path: PathBuf, name: String, more: usize },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {name} has shape {found:?}; the configuration asks for {expected:?}", .path.display())]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    /// A tensor is of a type that is not read.
    #[error("{}: tensor {name} is of type {found}; expected F32, F16 or BF16", .path.display())]
    Dtype { path: PathBuf, name: String, found: String },
    /// A tensor of transitions A holds one that does not decay.
    #[error("{}: tensor {name} holds {value} at element {index}; expected A, which is negative", .path.display())]
    NotNegative { path: PathBuf, name: String, index: usize, value: f32 },
    /// A tensor holds an infinity or something that is not a number.
    #[error("{}: tensor {name} holds {value} at element {index}; the weights are damaged", .path.display())]
    NonFinite { path: PathBuf, name: String, index: usize, value: f32 },
    /// `lm_head.weight` is there, should be the embedding, and is not.
    #[error("{}: the configuration ties the output matrix to the embedding, but {name} differs from it; \
        set tie_embeddings (or tie_word_embeddings) to false if that is meant", .path.display())]
    TiedDiffers { path: PathBuf, name: String },
    /// A destination that must not exist does.
    #[error("{}: already exists; choose another name or remove it", .path.display())]
    Exists { path: PathBuf },
    /// The other format cannot say what this model is.
    #[error("the {format} format cannot express this model: {message}")]
    Inexpressible { format: Format, message: String },
    /// A caller asked for, or handed over, a tensor that the model does not have.
    #[error("there is no tensor {name} in this model")]
    UnknownTensor { name: String },
    /// A caller handed over a tensor of the wrong size.
    #[error("tensor {name} has {found} elements; expected {expected}")]
    Length { name: String, found: usize, expected: usize },
}

fn others(more: usize) -> String {
    match more {
        0 => String::new(),
        1 => " (and 1 more)".into(),
        n => format!(" (and {n} more)"),
    }
}

impl CheckpointError {
    pub(super) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| CheckpointError::Io { path, action, source }
    }
}
