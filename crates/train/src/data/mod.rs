//! From files to batches of tokens.
//!
//! [`sources::read`] finds and unpacks documents, [`split::split`] keeps some of them for validation, a
//! [`TokenStore`] holds them as tokens, a [`Loader`] (or [`Prefetch`], on a thread of its own) cuts them into
//! [`Batch`]es and an [`Evaluation`] into windows in which every token is predicted once.
//!
//! Everything here is a function of the documents, the settings and a seed, so a run that resumes at a [`Cursor`]
//! sees exactly the batches that an uninterrupted run sees.

mod error;
mod evaluation;
mod pack;
mod prefetch;
pub mod shuffle;
pub mod sources;
pub mod split;
mod store;

pub use error::{DataError, EncodeError};
pub use evaluation::Evaluation;
pub use pack::{Batch, Cursor, Loader, Mode, Shape};
pub use prefetch::Prefetch;
pub use store::{Boundary, TokenStore};

/// A text as it lies on disk: raw bytes, which need not be UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Where it comes from: a path, with the line number after a colon for JSON lines.
    pub name: String,
    /// The text; for a model of bytes it need not be UTF-8.
    pub bytes: Vec<u8>,
}

/// Turns the bytes of a document into tokens; a model's tokenizer or plain bytes.
pub trait Encode {
    /// The tokens of one whole document, without any boundary token.
    ///
    /// # Errors
    /// Whatever the tokenizer objects to, such as bytes that are not UTF-8. The caller adds the document's name.
    fn encode(&self, bytes: &[u8]) -> Result<Vec<u32>, EncodeError>;

    /// The number of entries of the vocabulary, boundary token included. Every token is smaller.
    fn vocabulary(&self) -> usize;
}
