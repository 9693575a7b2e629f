//! What can go wrong while generating.

/// An error of generation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Running the model failed.
    #[error(transparent)]
    Model(#[from] hognose_model::Error),
    /// A sampling option outside its range.
    #[error("{name} must be {expected}, but is {found}")]
    Option { name: &'static str, expected: &'static str, found: String },
    /// Neither the prompt nor a state gives a token to go on from.
    #[error("the prompt is empty; give at least one token to continue")]
    EmptyPrompt,
    /// The model's logits are not numbers: damaged weights, or a state that overflowed.
    #[error("the model's output after token {position} is not finite; the checkpoint may be damaged")]
    NotFinite { position: u64 },
}
