//! What can go wrong with models.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::tokenizer::TokenizerError;

/// An error of a model, its files or its states.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Core(#[from] hognose_core::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    #[error(transparent)]
    Save(#[from] crate::atomic::SaveError),
    #[error("{path} {message}")]
    File { path: PathBuf, message: String },
    #[error("the state belongs to the model {found}, not to this one ({expected})")]
    ForeignState { found: String, expected: String },
    #[error("token id {id} at position {at} is outside the vocabulary of {vocabulary}")]
    TokenId { id: u32, at: usize, vocabulary: usize },
    #[error("{ids} ids in a pack of {pack} tokens, {segments} segments for {slots} sequences; the numbers must agree")]
    Pack { ids: usize, pack: usize, segments: usize, slots: usize },
    #[error("the logits of row {row} were asked for, but the pack has {rows} rows")]
    Row { row: usize, rows: usize },
}

impl Error {
    /// An error of a file: its path, then what is wrong with it.
    pub(crate) fn file(path: &Path, message: impl Display) -> Error {
        Error::File { path: path.into(), message: message.to_string() }
    }
}
