//! Training batches: windows of tokens cut from documents, as segments without padding.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::shuffle::Permutation;
use super::{DataError, TokenStore};

/// Tells apart the permutation of documents and that of windows.
const DOCUMENTS: u64 = u64::from_le_bytes(*b"document");
const WINDOWS: u64 = u64::from_le_bytes(*b"windows.");

/// One micro-batch: `batch` windows of `length` tokens one after another, cut into segments that do not see each
/// other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// `[tokens]`; the windows row by row.
    pub tokens: Vec<u32>,
    /// `[tokens]`; the token that follows in the same document, even where the window ends; -1 after a document's
    /// last token.
    pub targets: Vec<i32>,
    /// `[segments + 1]`; where each segment starts, and the number of tokens. Segments are never empty.
    pub cu_seqlens: Vec<u32>,
    /// `[segments]`; the lane whose final state of the previous batch the segment starts from; `None` for a zero
    /// state. Always `None` in [`Mode::Packed`].
    pub carried: Vec<Option<usize>>,
    /// `[lanes]`; the segment whose final state is the lane's state for the next batch, `None` if the lane has no
    /// more tokens (only in an evaluation). Empty in [`Mode::Packed`].
    pub carry_out: Vec<Option<usize>>,
}

impl Batch {
    /// The number of tokens that have a target.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&target| target >= 0).count()
    }

    /// The number of segments.
    pub fn segments(&self) -> usize {
        self.carried.len()
    }

    /// The windows `windows` of this batch of windows of `length` tokens. Lanes keep their numbers.
    pub fn share(&self, windows: Range<usize>, length: usize) -> Batch {
        let tokens = windows.start * length..windows.end * length;
        // A window begins with a segment of its own.
        let place = |token: usize| self.cu_seqlens.partition_point(|&start| (start as usize) < token);
        let segments = place(tokens.start)..place(tokens.end);
        let lane = |(lane, segment): (usize, &Option<usize>)| {
            segment.filter(|_| windows.contains(&lane)).map(|segment| segment - segments.start)
        };
        Batch {
            tokens: self.tokens[tokens.clone()].to_vec(),
            targets: self.targets[tokens.clone()].to_vec(),
            cu_seqlens: self.cu_seqlens[segments.start..=segments.end]
                .iter()
                .map(|o| o - tokens.start as u32)
                .collect(),
            carried: self.carried[segments.clone()].to_vec(),
            carry_out: self.carry_out.iter().enumerate().map(lane).collect(),
        }
    }

    pub(super) fn with_capacity(tokens: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            cu_seqlens: vec![0],
            ..Self::default()
        }
    }

    /// Appends a segment: `count` tokens of a document from `from` on.
    pub(super) fn push(
        &mut self,
        store: &TokenStore,
        document: usize,
        from: u64,
        count: usize,
        carried: Option<usize>,
    ) {
        store.copy(document, from, count, &mut self.tokens, &mut self.targets);
        // A batch has fewer than 2^32 tokens: `Loader::new` and `Evaluation::new` refuse larger ones.
        self.cu_seqlens.push(self.tokens.len() as u32);
        self.carried.push(carried);
    }
}

/// The size of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of a window.
    pub length: usize,
    /// Windows (lanes) of a micro-batch.
    pub batch: usize,
}

impl Shape {
    /// The number of tokens of a batch.
    pub fn tokens(self) -> u64 {
        (self.length as u64).saturating_mul(self.batch as u64)
    }

    pub(super) fn check(self) -> Result<(), DataError> {
        for (name, value) in [("the length", self.length), ("the batch", self.batch)] {
            if value == 0 {
                return Err(DataError::Zero { name });
            }
        }
        if self.tokens() > u64::from(u32::MAX) {
            return Err(DataError::BatchTooLarge { batch: self.batch, length: self.length });
        }
        Ok(())
    }
}

/// How windows follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Windows are drawn in random order and each starts from a zero state.
    Packed,
    /// Each of the `batch` lanes walks through documents in order; a window that begins inside a document starts
    /// from the state in which the lane's previous window ended (truncated backpropagation through time).
    CarryState,
}

/// A position in the endless stream of batches; what a checkpoint stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// How often all documents were gone through.
    pub epoch: u64,
    /// What was used of this epoch: windows in [`Mode::Packed`], batches in [`Mode::CarryState`].
    pub index: u64,
}

/// Yields training batches without end.
///
/// In each epoch the documents are put in a new order and lined up, boundary tokens included. [`Mode::Packed`] cuts
/// that line into windows and draws them in random order; [`Mode::CarryState`] cuts it into one part for each lane.
/// The remainder that fills no window, or no window of every lane, is left out of this epoch; since the order
/// changes, it is another one in each.
///
/// Everything is a function of the documents, the shape, the mode, the seed and the [`Cursor`].
#[derive(Debug, Clone)]
pub struct Loader {
    store: Arc<TokenStore>,
    shape: Shape,
    mode: Mode,
    seed: u64,
    /// Steps of [`Cursor::index`] in an epoch.
    per_epoch: u64,
    cursor: Cursor,
    line: Line,
}

/// The documents of one epoch in their order.
#[derive(Debug, Clone)]
struct Line {
    epoch: u64,
    order: Vec<u32>,
    /// Where each document starts in the line.
    starts: Vec<u64>,
    windows: Permutation,
}

impl Line {
    fn new(store: &TokenStore, seed: u64, epoch: u64, windows: u64) -> Self {
        let documents = Permutation::new(store.documents() as u64, seed, epoch, DOCUMENTS);
        let order: Vec<u32> = documents.iter().map(|document| document as u32).collect();
        let mut at = 0;
        let starts = order.iter().map(|&document| {
            let start = at;
            at += store.document_tokens(document as usize);
            start
        });
        Self { epoch, starts: starts.collect(), order, windows: Permutation::new(windows, seed, epoch, WINDOWS) }
    }
}

impl Loader {
    /// A loader at the beginning of the first epoch.
    ///
    /// # Errors
    /// [`DataError::Zero`] for a shape with a zero, [`DataError::BatchTooLarge`] from 2³² tokens on,
    /// [`DataError::TooShort`] when the documents do not fill one window (of each lane, when state is carried).
    pub fn new(store: Arc<TokenStore>, shape: Shape, mode: Mode, seed: u64) -> Result<Self, DataError> {
        shape.check()?;
        let (needed, what) = match mode {
            Mode::Packed => (shape.length as u64, format!("one window of {}", shape.length)),
            Mode::CarryState => (shape.tokens(), format!("{} lanes of {}", shape.batch, shape.length)),
        };
        let per_epoch = store.tokens() / needed;
        if per_epoch == 0 {
            return Err(DataError::TooShort { tokens: store.tokens(), needed, what });
        }
        let line = Line::new(&store, seed, 0, per_epoch);
        Ok(Self { store, shape, mode, seed, per_epoch, cursor: Cursor::default(), line })
    }

    /// Continues at a position that [`Loader::cursor`] gave.
    ///
    /// # Errors
    /// [`DataError::Position`] if there is no such position with this data and shape.
    pub fn seek(&mut self, cursor: Cursor) -> Result<(), DataError> {
        if cursor.index > self.per_epoch {
            let Cursor { epoch, index } = cursor;
            return Err(DataError::Position { epoch, index, available: self.per_epoch });
        }
        self.cursor = cursor;
        Ok(())
    }

    /// The position of the next batch.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The position as a number of epochs.
    pub fn epochs(&self) -> f64 {
        self.cursor.epoch as f64 + self.cursor.index as f64 / self.per_epoch as f64
    }

    /// How many batches an epoch has; not a whole number in [`Mode::Packed`], where a batch may span two epochs.
    pub fn batches_per_epoch(&self) -> f64 {
        match self.mode {
            Mode::Packed => self.per_epoch as f64 / self.shape.batch as f64,
            Mode::CarryState => self.per_epoch as f64,
        }
    }

    /// The size of a batch.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// How windows follow each other.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The next micro-batch, always of [`Shape::tokens`] tokens.
    pub fn next_batch(&mut self) -> Batch {
        let mut batch = Batch::with_capacity(self.shape.tokens() as usize);
        match self.mode {
            Mode::Packed => {
                for _ in 0..self.shape.batch {
                    let index = self.advance();
                    // `index` is below the number of windows by construction, so a window is always found.
                    let window = self.line.windows.get(index).unwrap_or(index);
                    self.window(window, None, &mut batch);
                }
            }
            Mode::CarryState => {
                let index = self.advance();
                for lane in 0..self.shape.batch {
                    let window = lane as u64 * self.per_epoch + index;
                    self.window(window, (index > 0).then_some(lane), &mut batch);
                    batch.carry_out.push(Some(batch.segments() - 1));
                }
            }
        }
        batch
    }

    /// The index of the step to take now, in the line of its epoch; moves the cursor past it.
    fn advance(&mut self) -> u64 {
        if self.cursor.index >= self.per_epoch {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, index: 0 };
        }
        if self.line.epoch != self.cursor.epoch {
            self.line = Line::new(&self.store, self.seed, self.cursor.epoch, self.per_epoch);
        }
        self.cursor.index += 1;
        self.cursor.index - 1
    }

    /// Appends the segments of a window; `lane` is whose state the first one starts from if it begins inside a
    /// document.
    fn window(&self, window: u64, lane: Option<usize>, batch: &mut Batch) {
        let start = window * self.shape.length as u64;
        // The last document that starts at or before the window's start; the first one starts at 0.
        let mut place = self.line.starts.partition_point(|&at| at <= start) - 1;
        let mut from = start - self.line.starts[place];
        let mut left = self.shape.length as u64;
        let mut carried = if from > 0 { lane } else { None };
        while left > 0 {
            let document = self.line.order[place] as usize;
            let count = (self.store.document_tokens(document) - from).min(left);
            batch.push(&self.store, document, from, count as usize, carried);
            left -= count;
            (place, from, carried) = (place + 1, 0, None);
        }
    }
}

#[cfg(test)]
mod tests;
