//! What can be wrong with data.

use std::io;
use std::path::PathBuf;

/// An error of any type that a tokenizer reports.
pub type EncodeError = Box<dyn std::error::Error + Send + Sync>;

/// What can be wrong with data: where it lies, what it holds, how it is cut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    #[error("there is no file or folder {0}; check the path given as data")]
    Missing(PathBuf),
    #[error("the pattern {pattern} matches no file; check it, and quote it so that the shell passes it on")]
    NoMatch { pattern: String },
    #[error("{pattern} is not a valid file pattern: {reason}")]
    Pattern { pattern: String, reason: String },
    #[error(
        "the folder {0} holds no text: expected files ending in .txt or .jsonl (also with .gz, .zst or .xz) in it or below"
    )]
    FolderWithoutText(PathBuf),
    #[error("cannot tell what {0} holds: expected a name ending in .txt or .jsonl (also with .gz, .zst or .xz)")]
    UnknownKind(PathBuf),
    #[error("no data was named: expected at least one file, folder or pattern")]
    NoSources,
    #[error("the data is empty: {files} file(s) were read and hold no text")]
    Empty { files: usize },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: expected a JSON object, found {reason}")]
    Json { path: PathBuf, line: usize, reason: String },
    #[error("{path}, line {line}: there is no field \"{field}\"; its fields are {found}; name the one with the text")]
    Field { path: PathBuf, line: usize, field: String, found: String },
    #[error("{path}, line {line}: the field \"{field}\" is {found}, expected a string")]
    FieldKind { path: PathBuf, line: usize, field: String, found: &'static str },
    #[error("{document} cannot be turned into tokens: {source}")]
    Encode { document: String, source: EncodeError },
    #[error("{document}: the tokenizer gave token {token}, but the model's vocabulary has {vocabulary} entries")]
    Vocabulary { document: String, token: u32, vocabulary: usize },
    #[error("the validation fraction is {0}, expected a number from 0 up to but not including 1")]
    Fraction(f64),
    #[error(
        "the only document, {document}, has {bytes} byte(s) and cannot be split into training and validation; add text or set the fraction to 0"
    )]
    TooSmallToSplit { document: String, bytes: usize },
    #[error("{name} is 0, expected at least 1")]
    Zero { name: &'static str },
    #[error(
        "a batch of {batch} × {length} has more than 2³² tokens, more than one step can hold; choose a smaller batch or length"
    )]
    BatchTooLarge { batch: usize, length: usize },
    #[error(
        "the training text has {tokens} tokens, fewer than the {needed} that {what} needs; choose a smaller length or batch, or add text"
    )]
    TooShort { tokens: u64, needed: u64, what: String },
    #[error(
        "the position {index} in epoch {epoch} lies outside the {available} that this data has; it was saved with other data or other settings"
    )]
    Position { epoch: u64, index: u64, available: u64 },
    #[error("the thread that prepares batches ended early; this is a fault of hognose")]
    Prefetch,
}
