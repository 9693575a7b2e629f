//! What can go wrong in training.

use std::fmt::Display;
use std::path::{Path, PathBuf};

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
    Engine(#[from] hognose_engine::Error),
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
