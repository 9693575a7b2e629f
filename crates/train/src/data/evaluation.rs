//! Windows in which every token of the validation documents is predicted exactly once.

use std::sync::Arc;

use super::pack::{Batch, Shape};
use super::{DataError, TokenStore};

/// The validation documents as batches of windows, in a fixed order, with state carried from window to window.
///
/// Documents are dealt to the lanes, each to the one with the fewest tokens so far. A lane reads its documents one
/// after another; the state continues inside a document and starts from zero at the next. So every token but the
/// boundary token at the start is predicted once, from everything before it in its document, whatever the shape.
/// Lanes that have come to their end are left out, so the last batches are smaller.
#[derive(Debug, Clone)]
pub struct Evaluation {
    store: Arc<TokenStore>,
    length: usize,
    lanes: Vec<Vec<usize>>,
    bytes: u64,
    predicted: u64,
}

impl Evaluation {
    /// An evaluation of all documents, or of the first ones until these have `limit` tokens (whole documents, at
    /// least one).
    ///
    /// # Errors
    /// [`DataError::Zero`] for a shape with a zero, [`DataError::BatchTooLarge`] from 2³² tokens a batch on.
    pub fn new(store: Arc<TokenStore>, shape: Shape, limit: Option<u64>) -> Result<Self, DataError> {
        shape.check()?;
        let mut lanes = vec![Vec::new(); shape.batch.min(store.documents())];
        let mut filled = vec![0u64; lanes.len()];
        let (mut tokens, mut bytes, mut predicted) = (0, 0, 0);
        for document in 0..store.documents() {
            if limit.is_some_and(|limit| tokens >= limit) {
                break;
            }
            let count = store.document_tokens(document);
            if let Some(lane) = (0..lanes.len()).min_by_key(|&lane| filled[lane]) {
                lanes[lane].push(document);
                filled[lane] += count;
            }
            tokens += count;
            bytes += store.document_bytes(document);
            predicted += count - 1;
        }
        Ok(Self { store, length: shape.length, lanes, bytes, predicted })
    }

    /// The bytes of the documents that are evaluated. All of them are predicted.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many tokens are predicted: all but the boundary token at the start of each document.
    pub fn predicted(&self) -> u64 {
        self.predicted
    }

    /// Bits per byte from the sum over all predicted tokens of the negative log-likelihood in nats. With
    /// [`Boundary::StartAndEnd`](super::Boundary::StartAndEnd) this includes saying where documents end. Not a number without documents.
    pub fn bits_per_byte(&self, nats: f64) -> f64 {
        nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    /// The batches from the beginning.
    pub fn batches(&self) -> Batches<'_> {
        Batches { evaluation: self, places: vec![(0, 0); self.lanes.len()] }
    }
}

/// The batches of an [`Evaluation`].
#[derive(Debug)]
pub struct Batches<'a> {
    evaluation: &'a Evaluation,
    /// For each lane the number of documents it has finished and of tokens it has read of the current one.
    places: Vec<(usize, u64)>,
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let Evaluation { store, length, lanes, .. } = self.evaluation;
        let mut batch = Batch::with_capacity(0);
        for (lane, (documents, place)) in lanes.iter().zip(&mut self.places).enumerate() {
            let mut left = *length as u64;
            let mut last = None;
            while left > 0 && place.0 < documents.len() {
                let (document, from) = (documents[place.0], place.1);
                let rest = store.document_tokens(document) - from;
                let count = rest.min(left);
                last = Some(batch.segments());
                batch.push(store, document, from, count as usize, (from > 0).then_some(lane));
                left -= count;
                *place = if count == rest { (place.0 + 1, 0) } else { (place.0, from + count) };
            }
            batch.carry_out.push(last);
        }
        (batch.segments() > 0).then_some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::store::tests::{Bytes, document, store};
    use crate::data::{Boundary, Encode, EncodeError};

    const TEXTS: [&str; 5] = ["abcdefghij", "klm", "n", "opqrstuvwxyz", "01234567890123456789012"];

    fn evaluation(length: usize, batch: usize, limit: Option<u64>) -> Evaluation {
        Evaluation::new(Arc::new(store(&TEXTS)), Shape { length, batch }, limit).unwrap()
    }

    /// What a model with a state would see: for each prediction, everything before it in its document.
    fn predictions(evaluation: &Evaluation) -> Vec<(Vec<u32>, i32)> {
        let mut states: Vec<Vec<u32>> = Vec::new();
        let mut found = Vec::new();
        for batch in evaluation.batches() {
            let mut last = Vec::new();
            for segment in 0..batch.segments() {
                let mut seen = batch.carried[segment].map_or_else(Vec::new, |lane| states[lane].clone());
                for at in batch.cu_seqlens[segment] as usize..batch.cu_seqlens[segment + 1] as usize {
                    seen.push(batch.tokens[at]);
                    if batch.targets[at] >= 0 {
                        found.push((seen.clone(), batch.targets[at]));
                    }
                }
                last.push(seen);
            }
            states = batch.carry_out.iter().map(|s| s.map_or_else(Vec::new, |s| last[s].clone())).collect();
        }
        found.sort();
        found
    }

    #[test]
    fn every_token_is_predicted_once_from_its_whole_past_whatever_the_shape() {
        let mut expected = Vec::new();
        for text in TEXTS {
            let tokens: Vec<u32> = std::iter::once(256).chain(text.bytes().map(u32::from)).collect();
            expected.extend((1..tokens.len()).map(|at| (tokens[..at].to_vec(), tokens[at] as i32)));
        }
        expected.sort();
        for (length, batch) in [(1, 1), (1, 3), (4, 2), (5, 8), (100, 1), (7, 4)] {
            let evaluation = evaluation(length, batch, None);
            assert_eq!(predictions(&evaluation), expected, "length {length}, batch {batch}");
            assert_eq!((evaluation.predicted(), evaluation.bytes()), (49, 49));
            assert!(evaluation.batches().all(|b| b.tokens.len() <= length * batch));
        }
    }

    #[test]
    fn a_limit_takes_whole_documents() {
        assert_eq!(evaluation(4, 2, Some(1)).bytes(), 10);
        assert_eq!(evaluation(4, 2, Some(12)).bytes(), 13);
        assert_eq!(evaluation(4, 2, Some(1000)).bytes(), 49);
        let none = Evaluation::new(Arc::new(store(&[])), Shape { length: 4, batch: 2 }, None).unwrap();
        assert_eq!(none.batches().count(), 0);
    }

    #[test]
    fn bits_per_byte_count_bytes_and_not_tokens() {
        struct Pairs;
        impl Encode for Pairs {
            fn encode(&self, bytes: &[u8]) -> Result<Vec<u32>, EncodeError> {
                Ok(bytes.chunks(2).map(|pair| u32::from(pair[0])).collect())
            }
            fn vocabulary(&self) -> usize {
                300
            }
        }
        let store = TokenStore::encode([document("12345678")], &Pairs, Boundary::Start(256)).unwrap();
        let evaluation = Evaluation::new(Arc::new(store), Shape { length: 3, batch: 1 }, None).unwrap();
        assert_eq!((evaluation.predicted(), evaluation.bytes()), (4, 8));
        // A uniform choice of 256 at each of 4 tokens is 32 bits for 8 bytes.
        let nats = 4.0 * 256f64.ln();
        assert!((evaluation.bits_per_byte(nats) - 4.0).abs() < 1e-12);
    }

    #[test]
    fn the_end_is_predicted_too_when_documents_have_one() {
        let store = TokenStore::encode([document("abc")], &Bytes { vocabulary: 257 }, Boundary::StartAndEnd(256));
        let evaluation = Evaluation::new(Arc::new(store.unwrap()), Shape { length: 2, batch: 1 }, None).unwrap();
        assert_eq!((evaluation.predicted(), evaluation.bytes()), (4, 3));
        assert_eq!(predictions(&evaluation).iter().filter(|(_, target)| *target == 256).count(), 1);
    }
}
