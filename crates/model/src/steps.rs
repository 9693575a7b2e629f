//! Steps of generation on a GPU: a chosen id goes into the next step on the device, and the host reads ids from a
//! mailbox a few steps behind, so neither waits for the other.
//!
//! When the host stops, the device has taken a few steps too many. [`Steps::finish`] then restores the states that were
//! set aside before and takes the steps up to the last one that was read again, which gives the same bits.

use hognose_core::ops::sample::{self, Options};
use hognose_core::{Buffer, Device, Pack, Slice};

use crate::error::Error;
use crate::network::{IDS, MAILBOX_STEPS, OPTIONS, PROGRESS, SEEN, SEGMENTS, SLOTS, has_step};
use crate::session::{Kind, Model, Session, Shape, Source};

/// Steps after which states are set aside, at most: what may have to be taken again.
const SET_ASIDE: usize = 64;
/// What stands in the mailbox before a step has left its ids there.
const EMPTY: i32 = i32::MIN;
/// Looks into the mailbox after which the device is asked whether it is still at work.
const PATIENCE: usize = 1 << 16;

/// A sequence that goes on.
#[derive(Clone, Debug)]
pub struct Start {
    /// Its slot.
    pub slot: usize,
    /// The chosen id that was not processed yet.
    pub id: u32,
    /// How further ids are chosen.
    pub options: Options,
    /// Numbers that were drawn so far.
    pub draws: u64,
    /// Ids that occurred, where the options have a penalty.
    pub seen: Vec<u32>,
}

/// Steps of some sequences of a session, under way.
#[derive(Debug)]
pub struct Steps<'s, 'm> {
    session: &'s mut Session<'m>,
    shape: Shape,
    slots: Vec<usize>,
    /// Ids that were processed since states were set aside, step by step, and those that come next.
    taken: Vec<Vec<u32>>,
    launched: usize,
    read: usize,
    /// The states before the first of `taken`, where they can be asked for.
    aside: Option<Buffer>,
}

impl<'m> Session<'m> {
    /// Whether `sequences` can go on on the device: on a GPU few of them, or as many as there are slots.
    pub fn has_steps(&self, sequences: usize) -> bool {
        let Model { config, weights, device } = self.model;
        let fused = has_step(config, weights.form(), sequences);
        matches!(device, Device::Cuda(_)) && sequences > 0 && (fused || sequences == self.pool.slots())
    }

    /// Begins steps of some slots. With `exact`, [`Steps::finish`] leaves the states as they are after the last id that
    /// was read; without, states of sequences that were stopped early are of no use.
    ///
    /// # Errors
    /// Too little memory; ids and slots that do not exist.
    pub fn steps(&mut self, starts: &[Start], exact: bool) -> Result<Steps<'_, 'm>, Error> {
        let vocabulary = self.model.config.padded_vocab;
        if let Some((at, start)) = starts.iter().enumerate().find(|(_, s)| s.id as usize >= vocabulary) {
            return Err(Error::TokenId { id: start.id, at, vocabulary });
        }
        let slots: Vec<usize> = starts.iter().map(|s| s.slot).collect();
        if let Some(&row) = slots.iter().find(|&&s| s >= self.pool.slots()) {
            return Err(Error::Row { row, rows: self.pool.slots() });
        }
        let penalty = starts.iter().any(|s| s.options.repetition_penalty != 1.0);
        let shape = Shape { tokens: starts.len(), rows: starts.len(), kind: Kind::Choice { penalty } };
        self.prepare(shape)?;
        let aside = if exact { Some(self.model.device.alloc(self.pool.bytes())?) } else { None };
        // Kernels of earlier steps may still write into the mailbox.
        self.model.device.synchronize()?;
        let compiled = self.compiled(shape);
        if let Some(mailbox) = &compiled.mailbox {
            (0..MAILBOX_STEPS * starts.len()).for_each(|i| mailbox.poke(i, EMPTY));
        }
        for (external, source) in compiled.plan.graph().externals().iter().zip(&compiled.sources) {
            let Source::Io(offset) = *source else { continue };
            let values: Vec<i32> = match external.name.as_str() {
                IDS => starts.iter().map(|s| s.id as i32).collect(),
                SLOTS => slots.iter().map(|&s| s as i32).collect(),
                SEGMENTS => (0..=self.pool.slots() as i32).collect(),
                OPTIONS => starts.iter().flat_map(|s| s.options.row()).collect(),
                PROGRESS => starts.iter().flat_map(|s| sample::progress(s.draws)).collect(),
                SEEN => starts.iter().flat_map(|s| bits(&s.seen, vocabulary)).collect(),
                _ => continue,
            };
            compiled.io.write(offset, &values);
        }
        let taken = vec![starts.iter().map(|s| s.id).collect()];
        Ok(Steps { session: self, shape, slots, taken, launched: 0, read: 0, aside })
    }
}

/// A bit for each id, in words of 32.
fn bits(ids: &[u32], vocabulary: usize) -> Vec<i32> {
    let mut words = vec![0u32; vocabulary.div_ceil(32)];
    ids.iter().filter(|id| (**id as usize) < vocabulary).for_each(|id| words[*id as usize / 32] |= 1 << (id % 32));
    words.into_iter().map(|w| w as i32).collect()
}

impl Steps<'_, '_> {
    /// Steps that are enqueued and whose ids were not read.
    pub fn under_way(&self) -> usize {
        self.launched - self.read
    }

    /// Enqueues steps until `ahead` are under way, at most half a mailbox.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn launch(&mut self, ahead: usize) -> Result<(), Error> {
        while self.under_way() < ahead.min(MAILBOX_STEPS / 2) {
            if let Some(aside) = &self.aside
                && (self.launched == 0 || self.taken.len() > SET_ASIDE)
            {
                // Only where all that was launched was read do states and ids belong together.
                if self.launched > self.read {
                    return Ok(());
                }
                let states = self.session.pool.buffer();
                aside.copy_from(0, states.slice(), states.bytes());
                self.taken.drain(..self.taken.len() - 1);
            }
            let Session { model, pool, arena, .. } = &*self.session;
            let compiled = self.session.compiled(self.shape);
            let bindings: Vec<Slice<'_>> = compiled
                .sources
                .iter()
                .map(|source| match *source {
                    Source::Weights(offset) => model.weights.buffer().at(offset),
                    Source::State(offset) => pool.buffer().at(offset),
                    Source::Io(offset) => compiled.io.at(offset),
                    Source::Mailbox => compiled.mailbox.as_ref().unwrap_or(&compiled.io).slice(),
                })
                .collect();
            model.device.run(&compiled.plan, arena, &bindings)?;
            self.launched += 1;
        }
        Ok(())
    }

    /// Waits for the ids of the next step, in the order of the starts: `None` where logits were not finite. A step must
    /// be under way.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn read(&mut self) -> Result<Vec<Option<u32>>, Error> {
        debug_assert!(self.under_way() > 0);
        let rows = self.slots.len();
        let device = &self.session.model.device;
        let Some(mailbox) = &self.session.compiled(self.shape).mailbox else { return Ok(Vec::new()) };
        let first = self.read % MAILBOX_STEPS * rows;
        let mut ids = Vec::with_capacity(rows);
        for i in first..first + rows {
            let mut looks = 0;
            while mailbox.peek(i) == EMPTY {
                looks += 1;
                if looks % PATIENCE == 0 {
                    // A kernel that failed leaves nothing: the device says so.
                    if device.is_idle()? && mailbox.peek(i) == EMPTY {
                        let message = "a step of generation left no ids".to_string();
                        return Err(hognose_core::Error::Cuda(message).into());
                    }
                }
                std::hint::spin_loop();
            }
            ids.push(u32::try_from(mailbox.peek(i)).ok());
            mailbox.poke(i, EMPTY);
        }
        self.read += 1;
        self.taken.push(ids.iter().map(|id| id.unwrap_or(0)).collect());
        if self.aside.is_none() {
            self.taken.drain(..self.taken.len() - 1);
        }
        Ok(ids)
    }

    /// Ends the steps. The ids that were read last are not processed.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn finish(self) -> Result<(), Error> {
        let Steps { session, slots, taken, launched, read, aside, .. } = self;
        for &slot in &slots {
            session.positions[slot] += read as u64;
        }
        let (Some(aside), true) = (aside, launched > read) else { return Ok(()) };
        session.pool.buffer().copy_from(0, aside.slice(), aside.bytes());
        // One sequence at a time would be other shapes: only all slots together are taken again.
        let pack = Pack::from_lengths(slots.iter().map(|_| 1))?;
        let rows: Vec<usize> = (0..slots.len()).collect();
        let positions = session.positions.clone();
        for ids in &taken[..taken.len() - 1] {
            session.run(ids, &pack, &rows)?;
        }
        session.positions = positions;
        session.model.device.synchronize()?;
        Ok(())
    }
}
