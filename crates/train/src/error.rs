//! What can go wrong in training.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::atomic::SaveError;
use crate::config::ConfigError;
use crate::data::DataError;

/// An error of training.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Core(#[from] hognose_core::Error),
    #[error(transparent)]
    Model(#[from] hognose_model::Error),
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error(transparent)]
    Record(#[from] crate::records::RecordError),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is damaged: {message}")]
    Damaged { path: PathBuf, message: String },
    #[error("{path} exists and is not empty; choose another --out, or go on with the run by --resume {path}")]
    RunExists { path: PathBuf },
    #[error("{path} {message}")]
    Resume { path: PathBuf, message: String },
    #[error("step {step}: {what} is not finite{tensor}; {advice}")]
    NotFinite { step: u64, what: &'static str, tensor: String, advice: String },
    #[error("{0}")]
    Preset(String),
    #[error("[model] {key} is {found}; expected {expected}")]
    ModelValue { key: String, found: String, expected: &'static str },
    #[error("[model] {key} is not a size that the preset's layers have; known are {known}")]
    ModelKey { key: String, known: &'static str },
    #[error("the tokenizer has {tokenizer} ids, but the model only {model} rows; use the tokenizer that belongs to it")]
    Vocabulary { tokenizer: usize, model: usize },
    #[error(
        "neither the tokenizer nor the model names a token that ends a text; name one as eos_token in tokenizer_config.json"
    )]
    NoBoundary,
    #[error("{0}")]
    Unsupported(String),
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
