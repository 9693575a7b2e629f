//! The public-domain text that ships inside the library: Moby-Dick by chapters and State of the Union addresses.
//!
//! Origin, licence and the script that builds the file are in `crates/train/data`.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use serde::Deserialize;

use crate::data::{DataError, Document};

static PACKED: &[u8] = include_bytes!("../../data/corpus.jsonl.xz");

/// One sentence for a person: what the text is and that it is free to use.
pub const DESCRIPTION: &str =
    "Moby-Dick and the State of the Union addresses of 1897 to 1928 (public domain; see crates/train/data/README.md)";

/// The documents of the shipped text, always in the same order: the chapters of Moby-Dick, then the addresses by year.
///
/// # Errors
/// [`DataError`] if the embedded file cannot be unpacked, which only a damaged build can cause.
pub fn documents() -> Result<Vec<Document>, DataError> {
    #[derive(Deserialize)]
    struct Line {
        name: String,
        text: String,
    }
    let path = || PathBuf::from("corpus.jsonl.xz");
    let reader = BufReader::new(liblzma::bufread::XzDecoder::new(PACKED));
    reader
        .lines()
        .enumerate()
        .map(|(index, line)| {
            let line = line.map_err(|source| DataError::Read { path: path(), source })?;
            let Line { name, text } = serde_json::from_str(&line).map_err(|error| DataError::Json {
                path: path(),
                line: index + 1,
                reason: error.to_string(),
            })?;
            Ok(Document { name, bytes: text.into_bytes() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_chapters_and_the_addresses_as_separate_documents() {
        let documents = documents().unwrap();
        assert_eq!(documents.len(), 168);
        assert_eq!(documents.iter().map(|d| d.bytes.len()).sum::<usize>(), 3_540_550);
        assert_eq!(documents.iter().filter(|d| d.name.starts_with("moby-dick/")).count(), 136);
        assert!(documents[0].bytes.starts_with(b"CHAPTER 1. Loomings.\n\nCall me Ishmael."));
        assert_eq!(documents[167].name, "state-of-the-union/1928-calvin-coolidge");
        assert!(documents.iter().all(|d| std::str::from_utf8(&d.bytes).is_ok()));
    }

    #[test]
    fn fits_the_size_the_repository_allows() {
        assert!(PACKED.len() <= 2_000_000);
    }
}
