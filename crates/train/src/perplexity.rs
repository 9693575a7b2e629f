//! What predicting texts costs a model, with its weights in the form for inference.

use hognose_core::Pack;
use hognose_model::session::{Session, next_token_loss};

use crate::data::TokenStore;
use crate::error::Error;

/// Pieces of fewer tokens than this are filled up to it.
const SMALLEST_PIECE: usize = 32;

/// The cost of predicting every token of some documents once, from everything before it in its document.
///
/// The boundary token before a document is given, not predicted. There are no windows: a state remembers the whole
/// document, so figures do not depend on a length of context, and are not those of programs that cut texts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Sum over the predicted tokens of the negative log-likelihood, in nats.
    pub nats: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Bytes of the text that they stand for.
    pub bytes: u64,
}

impl Cost {
    /// Mean negative log-likelihood of a token, in nats.
    pub fn per_token(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// e to the mean negative log-likelihood. Models with different tokenizers are not comparable by it.
    pub fn perplexity(&self) -> f64 {
        self.per_token().exp()
    }

    /// Bits for a byte of text, which models with different tokenizers are comparable by.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }
}

/// Slots that [`measure`] needs in its session.
pub const SLOTS: usize = 2;

/// Predicts all documents in a session of [`SLOTS`] slots, whose states are overwritten. `progress` is told how many
/// tokens are predicted and may end it early (`None` is returned then).
///
/// # Errors
/// A token outside the model's vocabulary; a session with another number of slots; too little memory.
pub fn measure(
    session: &mut Session<'_>,
    store: &TokenStore,
    mut progress: impl FnMut(u64) -> bool,
) -> Result<Option<Cost>, Error> {
    let vocabulary = session.model().config.padded_vocab;
    let what = "it would see the tokens that it is to predict";
    session.model().config.expect_causal(what).map_err(hognose_model::Error::from)?;
    let largest = session.prefill_tokens();
    let mut cost = Cost::default();
    for document in 0..store.documents() {
        let ids = store.document(document);
        session.reset(0);
        // The last token predicts nothing.
        let given = ids.len() - 1;
        for start in (0..given).step_by(largest) {
            let count = largest.min(given - start);
            // A plan, and memory for its logits, belongs to a number of tokens. So that documents of all lengths need
            // few of them, a second sequence fills pieces up to a few sizes; nobody reads what it gives.
            let size = count.next_power_of_two().clamp(SMALLEST_PIECE.min(largest), largest);
            let mut piece = ids[start..start + count].to_vec();
            piece.resize(size, 0);
            let rows: Vec<usize> = (0..size).collect();
            let logits = session.run(&piece, &Pack::from_lengths([count, size - count])?, &rows)?;
            cost.nats += next_token_loss(&logits[..count * vocabulary], &ids[start..=start + count], vocabulary);
            cost.tokens += count as u64;
            if progress(cost.tokens) {
                return Ok(None);
            }
        }
        cost.bytes += store.document_bytes(document);
    }
    Ok(Some(cost))
}
