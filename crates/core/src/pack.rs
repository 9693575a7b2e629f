//! How the rows of a pack of tokens are cut into segments.

use crate::error::Error;

/// A pack of tokens: `segments()` sequences that stand one after another, without padding between them.
///
/// Held as cumulative lengths (`cu_seqlens`): segment `s` owns rows `offsets[s]..offsets[s + 1]`. Segments may be
/// empty. A training batch of 8 × 2048 tokens is 8 segments; a decode step of 64 sequences is 64 segments of length 1.
/// Ops read the offsets at run time from an i32 tensor `[1, segments + 1]`, so a plan depends only on the number of
/// tokens and of segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pack {
    offsets: Vec<i32>,
}

impl Pack {
    /// A pack of segments of these lengths. Fails if they add up to more than `i32::MAX` tokens.
    pub fn from_lengths(lengths: impl IntoIterator<Item = usize>) -> Result<Pack, Error> {
        let mut offsets = vec![0i32];
        let mut total = 0usize;
        for length in lengths {
            total = total.saturating_add(length);
            let end = i32::try_from(total)
                .map_err(|_| Error::Pack(format!("{total} tokens are more than one pack holds")))?;
            offsets.push(end);
        }
        Ok(Pack { offsets })
    }

    /// A pack from cumulative lengths: they must start at 0 and never fall.
    pub fn from_offsets(offsets: Vec<i32>) -> Result<Pack, Error> {
        if offsets.first() != Some(&0) || offsets.windows(2).any(|w| w[0] > w[1]) {
            return Err(Error::Pack(format!("segment offsets must start at 0 and never fall, but are {offsets:?}")));
        }
        Ok(Pack { offsets })
    }

    /// Rows of all segments together.
    pub fn tokens(&self) -> usize {
        *self.offsets.last().expect("a pack has at least the offset 0") as usize
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Cumulative lengths, `segments() + 1` of them.
    pub fn offsets(&self) -> &[i32] {
        &self.offsets
    }
}
