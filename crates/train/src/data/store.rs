//! Documents as tokens, held compactly.

use std::borrow::Borrow;

use super::{DataError, Document, Encode};

/// The token that marks where a document begins, and whether it also marks where one ends.
///
/// A document always begins with it: without a token before the first one, the first could not be predicted, and the
/// bits per byte of a document would not count all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Before each document.
    Start(u32),
    /// Before and after each document, so that a model learns where texts end.
    StartAndEnd(u32),
}

impl Boundary {
    /// The token itself.
    pub fn token(self) -> u32 {
        match self {
            Self::Start(token) | Self::StartAndEnd(token) => token,
        }
    }
}

#[derive(Debug, Clone)]
enum Tokens {
    /// For vocabularies of up to 65,536 entries.
    U16(Vec<u16>),
    U32(Vec<u32>),
}

/// The tokens of documents one after another, each document with its boundary token.
#[derive(Debug, Clone)]
pub struct TokenStore {
    tokens: Tokens,
    /// Where each document starts, and the total at the end.
    starts: Vec<u64>,
    /// The length of each document in bytes.
    bytes: Vec<u64>,
    vocabulary: usize,
    fingerprint: u32,
}

impl TokenStore {
    /// Encodes documents, which may be borrowed or handed over one by one so that their bytes are freed on the way.
    ///
    /// # Errors
    /// [`DataError::Encode`] with the document's name where the tokenizer refuses it, and [`DataError::Vocabulary`]
    /// where a token, or the boundary token, lies outside the vocabulary.
    pub fn encode<D: Borrow<Document>>(
        documents: impl IntoIterator<Item = D>,
        encode: &dyn Encode,
        boundary: Boundary,
    ) -> Result<Self, DataError> {
        let vocabulary = encode.vocabulary();
        let check = |token: u32, document: &str| {
            // Targets are i32 with -1 for "none", which bounds what a vocabulary can be.
            if (token as usize) < vocabulary && i32::try_from(token).is_ok() {
                return Ok(());
            }
            Err(DataError::Vocabulary { document: document.to_owned(), token, vocabulary })
        };
        check(boundary.token(), "the boundary token")?;
        let mut tokens = if vocabulary <= 1 << 16 { Tokens::U16(Vec::new()) } else { Tokens::U32(Vec::new()) };
        let (mut starts, mut bytes, mut fingerprint) = (vec![0], Vec::new(), 0);
        for document in documents {
            let document = document.borrow();
            let mut encoded = vec![boundary.token()];
            encoded.extend(
                encode
                    .encode(&document.bytes)
                    .map_err(|source| DataError::Encode { document: document.name.clone(), source })?,
            );
            if let Boundary::StartAndEnd(token) = boundary {
                encoded.push(token);
            }
            for &token in &encoded {
                check(token, &document.name)?;
                fingerprint = crc32c::crc32c_append(fingerprint, &token.to_le_bytes());
            }
            fingerprint = crc32c::crc32c_append(fingerprint, &(encoded.len() as u64).to_le_bytes());
            starts.push(starts[starts.len() - 1] + encoded.len() as u64);
            bytes.push(document.bytes.len() as u64);
            match &mut tokens {
                // No token is cut off: each was checked against a vocabulary of at most 65,536.
                Tokens::U16(tokens) => tokens.extend(encoded.iter().map(|&token| token as u16)),
                Tokens::U32(tokens) => tokens.extend_from_slice(&encoded),
            }
        }
        Ok(Self { tokens, starts, bytes, vocabulary, fingerprint })
    }

    /// The number of tokens of all documents, boundary tokens included.
    pub fn tokens(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// The number of documents.
    pub fn documents(&self) -> usize {
        self.bytes.len()
    }

    /// The number of bytes of all documents.
    pub fn bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// The number of bytes of one document.
    pub fn document_bytes(&self, document: usize) -> u64 {
        self.bytes[document]
    }

    /// The number of tokens of one document, boundary tokens included.
    pub fn document_tokens(&self, document: usize) -> u64 {
        self.starts[document + 1] - self.starts[document]
    }

    /// The tokens of one document, boundary tokens included.
    pub fn document(&self, document: usize) -> Vec<u32> {
        let range = self.starts[document] as usize..self.starts[document + 1] as usize;
        match &self.tokens {
            Tokens::U16(all) => all[range].iter().map(|&token| u32::from(token)).collect(),
            Tokens::U32(all) => all[range].to_vec(),
        }
    }

    /// The number of entries of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// A checksum of all tokens and of where documents end. A resumed run compares it to find out whether the data
    /// is still the same.
    pub fn fingerprint(&self) -> u32 {
        self.fingerprint
    }

    /// Appends `count` tokens of a document from `from` on, and for each the token that follows it, -1 at the
    /// document's end.
    pub(super) fn copy(&self, document: usize, from: u64, count: usize, tokens: &mut Vec<u32>, targets: &mut Vec<i32>) {
        let start = (self.starts[document] + from) as usize;
        let end = self.starts[document + 1] as usize;
        let after = (start + count + 1).min(end);
        match &self.tokens {
            Tokens::U16(all) => {
                tokens.extend(all[start..start + count].iter().map(|&token| u32::from(token)));
                targets.extend(all[start + 1..after].iter().map(|&token| i32::from(token)));
            }
            Tokens::U32(all) => {
                tokens.extend_from_slice(&all[start..start + count]);
                targets.extend(all[start + 1..after].iter().map(|&token| token as i32));
            }
        }
        if start + count == end {
            targets.push(-1);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::EncodeError;

    /// Bytes as tokens, with the boundary token 256.
    pub struct Bytes {
        pub vocabulary: usize,
    }

    impl Encode for Bytes {
        fn encode(&self, bytes: &[u8]) -> Result<Vec<u32>, EncodeError> {
            if bytes.starts_with(b"refuse") {
                return Err("these bytes are not UTF-8".into());
            }
            Ok(bytes.iter().map(|&byte| u32::from(byte)).collect())
        }

        fn vocabulary(&self) -> usize {
            self.vocabulary
        }
    }

    pub fn document(text: &str) -> Document {
        Document { name: format!("\"{text}\""), bytes: text.into() }
    }

    pub fn store(texts: &[&str]) -> TokenStore {
        let documents = texts.iter().map(|text| document(text));
        TokenStore::encode(documents, &Bytes { vocabulary: 257 }, Boundary::Start(256)).unwrap()
    }

    #[test]
    fn small_and_large_vocabularies_hold_the_same_tokens() {
        for boundary in [Boundary::Start(256), Boundary::StartAndEnd(256)] {
            let documents = [document("abc"), document("de")];
            let small = TokenStore::encode(&documents, &Bytes { vocabulary: 257 }, boundary).unwrap();
            let large = TokenStore::encode(&documents, &Bytes { vocabulary: 100_000 }, boundary).unwrap();
            assert!(matches!(small.tokens, Tokens::U16(_)) && matches!(large.tokens, Tokens::U32(_)));
            assert_eq!(small.fingerprint(), large.fingerprint());
            for store in [small, large] {
                let end = usize::from(matches!(boundary, Boundary::StartAndEnd(_)));
                assert_eq!((store.documents(), store.bytes()), (2, 5));
                assert_eq!(store.document_tokens(0), 4 + end as u64);
                let (mut tokens, mut targets) = (Vec::new(), Vec::new());
                store.copy(1, 0, 3 + end, &mut tokens, &mut targets);
                assert_eq!(tokens, [256, 100, 101, 256][..3 + end]);
                assert_eq!(targets, [&[100, 101, 256][..2 + end], &[-1]].concat());
            }
        }
    }

    #[test]
    fn the_fingerprint_sees_tokens_and_cuts() {
        assert_eq!(store(&["ab", "c"]).fingerprint(), store(&["ab", "c"]).fingerprint());
        assert_ne!(store(&["ab", "c"]).fingerprint(), store(&["ab", "d"]).fingerprint());
        assert_ne!(store(&["ab", "c"]).fingerprint(), store(&["a", "bc"]).fingerprint());
    }

    #[test]
    fn errors_name_the_document() {
        let encode = |text, vocabulary, boundary| {
            TokenStore::encode([document(text)], &Bytes { vocabulary }, boundary).unwrap_err().to_string()
        };
        let error = encode("refuse", 257, Boundary::Start(256));
        assert_eq!(error, "\"refuse\" cannot be turned into tokens: these bytes are not UTF-8");
        assert!(encode("abc", 256, Boundary::Start(256)).starts_with("the boundary token: the tokenizer gave"));
        assert!(encode("abc", 50, Boundary::Start(0)).contains("gave token 97, but the model's vocabulary has 50"));
    }
}
