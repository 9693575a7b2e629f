//! What can go wrong while generating.

/// An error of generation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] hognose_model::Error),
    #[error("{name} must be {expected}, but is {found}")]
    Option { name: &'static str, expected: &'static str, found: String },
    #[error("the prompt is empty; give at least one token to continue")]
    EmptyPrompt,
    #[error("the model's output after token {position} is not finite; the checkpoint may be damaged")]
    NotFinite { position: u64 },
}
