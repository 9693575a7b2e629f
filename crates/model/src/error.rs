//! What can go wrong with models.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::tokenizer::TokenizerError;

/// An error of a model, its files or its states.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Recording, planning or running a graph failed.
    #[error(transparent)]
    Core(#[from] hognose_core::Error),
    /// The checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(Box<CheckpointError>),
    /// The sizes cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer cannot be read, or refuses the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model cannot be found or fetched.
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    /// A file cannot be written.
    #[error(transparent)]
    Save(#[from] crate::atomic::SaveError),
    /// A number that the scales of blocks do not reach.
    #[error(
        "{name} holds {value:e}, but numbers in {dtype} reach {:e} only; use bf16 or f32",
        hognose_core::quant::LARGEST
    )]
    Magnitude { name: String, value: f32, dtype: hognose_core::DType },
    /// A state file that cannot be read or is none.
    #[error("{path} {message}")]
    File { path: PathBuf, message: String },
    /// A state that other parameters made; both are fingerprints ([`crate::weights::Weights::fingerprint`]).
    #[error("the state belongs to the model {found}, not to this one ({expected})")]
    ForeignState { found: String, expected: String },
    /// An id that has no row in the embedding.
    #[error("token id {id} at position {at} is outside the vocabulary of {vocabulary}")]
    TokenId { id: u32, at: usize, vocabulary: usize },
    /// Ids, pack and session do not fit together.
    #[error("{ids} ids in a pack of {pack} tokens, {segments} segments for {slots} sequences; the numbers must agree")]
    Pack { ids: usize, pack: usize, segments: usize, slots: usize },
    /// Logits were asked for a row that the pack does not have.
    #[error("the logits of row {row} were asked for, but the pack has {rows} rows")]
    Row { row: usize, rows: usize },
}

impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Error {
        Error::Checkpoint(Box::new(error))
    }
}

impl Error {
    /// An error of a file: its path, then what is wrong with it.
    pub(crate) fn file(path: &Path, message: impl Display) -> Error {
        Error::File { path: path.into(), message: message.to_string() }
    }
}
