//! What can go wrong in training.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::atomic::SaveError;
use crate::config::ConfigError;
use crate::data::DataError;

/// An error of training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be read or holds impossible values.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data cannot be read or used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Recording, planning or running a graph failed.
    #[error(transparent)]
    Core(#[from] hognose_core::Error),
    /// The model, its checkpoint or its tokenizer failed.
    #[error(transparent)]
    Model(#[from] hognose_model::Error),
    /// A file cannot be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Metrics or pictures cannot be read or written.
    #[error(transparent)]
    Record(#[from] crate::records::RecordError),
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// A file of a checkpoint is not what was written.
    #[error("{path} is damaged: {message}")]
    Damaged { path: PathBuf, message: String },
    /// The folder of a new run holds something.
    #[error("{path} exists and is not empty; choose another --out, or go on with the run by --resume {path}")]
    RunExists { path: PathBuf },
    /// The run cannot be resumed, or the checkpoint not be started from.
    #[error("{path} {message}")]
    Resume { path: PathBuf, message: String },
    /// The loss or the gradient is infinite or NaN.
    #[error("step {step}: {what} is not finite{tensor}; {advice}")]
    NotFinite { step: u64, what: &'static str, tensor: String, advice: String },
    /// There is no preset of that name.
    #[error("{0}")]
    Preset(String),
    /// A value of `[model]` that is not possible.
    #[error("[model] {key} is {found}; expected {expected}")]
    ModelValue { key: String, found: String, expected: &'static str },
    /// A key of `[model]` that the preset's layers do not have.
    #[error("[model] {key} is not a size that the model's layers have; known are {known}")]
    ModelKey { key: String, known: String },
    /// The tokenizer has more ids than the model has rows.
    #[error("the tokenizer has {tokenizer} ids, but the model only {model} rows; use the tokenizer that belongs to it")]
    Vocabulary { tokenizer: usize, model: usize },
    /// There is no token to put between documents.
    #[error(
        "neither the tokenizer nor the model names a token that ends a text; name one as eos_token in tokenizer_config.json"
    )]
    NoBoundary,
    /// More than the device holds, with what would hold.
    #[error("training needs {needed} of memory on {device}, but {available} are free; {advice}")]
    Memory { needed: String, device: String, available: String, advice: String },
    /// Another device that trains along has failed.
    #[error("another device has failed")]
    Abandoned,
    /// One of several devices failed.
    #[error("{device}: {source}")]
    Rank { device: String, source: Box<Error> },
    /// Devices that should have the same parameters do not.
    #[error(
        "step {step}: the parameters on {device} are not those on the first device; nothing was saved since the last \
         checkpoint, which --resume goes on from"
    )]
    Diverged { step: u64, device: String },
    /// Something that this version does not do.
    #[error("{0}")]
    Unsupported(String),
    /// Something that cannot happen, did.
    #[error("{0}; this is an error in hognose")]
    Internal(String),
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Error {
        Error::Io { path: path.into(), source }
    }

    pub(crate) fn damaged(path: &Path, message: impl Display) -> Error {
        Error::Damaged { path: path.into(), message: message.to_string() }
    }
}

impl From<hognose_model::checkpoint::CheckpointError> for Error {
    fn from(error: hognose_model::checkpoint::CheckpointError) -> Error {
        Error::Model(error.into())
    }
}

impl From<hognose_model::hub::HubError> for Error {
    fn from(error: hognose_model::hub::HubError) -> Error {
        Error::Model(error.into())
    }
}
