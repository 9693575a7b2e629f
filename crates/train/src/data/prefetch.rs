//! Batches prepared ahead on a thread of their own.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use super::{Batch, Cursor, DataError, Loader};

/// A [`Loader`] whose next batches are made while the current one is computed.
///
/// The batches are those of the loader, and [`Prefetch::cursor`] counts only what was handed out, so a run resumes
/// exactly even though the thread is ahead.
#[derive(Debug)]
pub struct Prefetch {
    receiver: Option<Receiver<(Batch, Cursor, f64)>>,
    thread: Option<JoinHandle<()>>,
    cursor: Cursor,
    epochs: f64,
}

impl Prefetch {
    /// Starts the thread, which keeps up to `depth` batches ready (at least one).
    ///
    /// # Errors
    /// [`DataError::Prefetch`] if the system gives no thread.
    pub fn new(mut loader: Loader, depth: usize) -> Result<Self, DataError> {
        let (sender, receiver) = sync_channel(depth.max(1));
        let (cursor, epochs) = (loader.cursor(), loader.epochs());
        let thread = std::thread::Builder::new()
            .name("batches".to_owned())
            .spawn(move || {
                loop {
                    let batch = loader.next_batch();
                    // An error means that the receiver is gone and nobody wants more.
                    if sender.send((batch, loader.cursor(), loader.epochs())).is_err() {
                        return;
                    }
                }
            })
            .map_err(|_| DataError::Prefetch)?;
        Ok(Self { receiver: Some(receiver), thread: Some(thread), cursor, epochs })
    }

    /// The next micro-batch; waits for it if it is not ready.
    ///
    /// # Errors
    /// [`DataError::Prefetch`] if the thread has died.
    pub fn next_batch(&mut self) -> Result<Batch, DataError> {
        let receiver = self.receiver.as_ref().ok_or(DataError::Prefetch)?;
        let (batch, cursor, epochs) = receiver.recv().map_err(|_| DataError::Prefetch)?;
        (self.cursor, self.epochs) = (cursor, epochs);
        Ok(batch)
    }

    /// The position after the last batch that was handed out.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// That position as a number of epochs.
    pub fn epochs(&self) -> f64 {
        self.epochs
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // The thread ends when it finds that nobody receives, so that has to go first.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was already reported as a missing batch.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::store::tests::store;
    use crate::data::{Mode, Shape};

    #[test]
    fn hands_out_the_loaders_batches_and_positions() {
        let loader = || {
            let store = Arc::new(store(&["abcdefgh", "ijk", "lmnopqrstuv"]));
            Loader::new(store, Shape { length: 3, batch: 2 }, Mode::CarryState, 1).unwrap()
        };
        let mut plain = loader();
        let mut ahead = Prefetch::new(loader(), 3).unwrap();
        for _ in 0..10 {
            assert_eq!(ahead.cursor(), plain.cursor());
            assert_eq!(ahead.next_batch().unwrap(), plain.next_batch());
            assert_eq!(ahead.epochs(), plain.epochs());
        }
        let mut resumed = loader();
        resumed.seek(ahead.cursor()).unwrap();
        drop(ahead);
        let mut resumed = Prefetch::new(resumed, 1).unwrap();
        for _ in 0..10 {
            assert_eq!(resumed.next_batch().unwrap(), plain.next_batch());
        }
    }
}
