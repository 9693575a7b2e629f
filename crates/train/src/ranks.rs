//! Training on several devices of one machine: a thread for each, of which the first leads.
//!
//! Every rank holds all parameters and does the same steps, each on its own windows of every batch; sums over the group
//! inside of the plans make gradients the same everywhere, so the parameters stay the same. The first rank alone talks
//! to the outside, decides what comes next and tells the others.
//!
//! Ranks meet twice in a step, as threads: nobody waits for a GPU there.
//!
//! 1. The order. By then every rank has enqueued the step before.
//! 2. Ready: whatever the step needs memory for is done. Then all enqueue.
//!
//! So no rank allocates, compiles or captures while another's GPU waits for the sums that this rank has yet to
//! enqueue: inside one process a driver may make such calls wait for all GPUs, and nobody would move again.
//!
//! A rank that fails leaves the meeting and the group, for good: the others find out where they meet, or while they wait
//! for their GPU, leave in turn, and free their memory only then, since a GPU that waits for a sum never ends by itself.

use std::sync::Arc;
use std::thread;

use hognose_core::meeting::Meeting;
use hognose_core::{Device, Member};
use hognose_model::state::State;

use crate::error::Error;

/// What the first rank tells the others to do next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// A step with this learning rate.
    Step { lr: f64 },
    /// Show what you have, for a checkpoint.
    Show,
    /// The end.
    Stop,
}

/// What a rank has that a checkpoint is made of or checked against.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    /// Checksum of its parameters.
    pub checksum: u32,
    /// States of its lanes.
    pub lanes: Vec<(usize, State)>,
}

/// What ranks bring when they meet.
#[derive(Clone, Debug)]
enum Message {
    Order(Order),
    /// Here, for whatever it is.
    Here,
    Shown(Shown),
}

/// One device's place among those that train together.
#[derive(Clone, Debug)]
pub(crate) struct Rank {
    /// Its number, from 0.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// Its membership in the group that sums; none for a single device.
    pub member: Option<Arc<Member>>,
    meeting: Arc<Meeting<Message>>,
}

impl Rank {
    /// The windows of a batch that are this rank's.
    pub fn share(&self, batch: usize) -> std::ops::Range<usize> {
        batch * self.number / self.count..batch * (self.number + 1) / self.count
    }

    fn meet(&self, message: Message) -> Result<Arc<Vec<Message>>, Error> {
        self.meeting.exchange(self.number, message).ok_or(Error::Abandoned)
    }

    /// Tells the others what comes next.
    pub fn lead(&self, order: Order) -> Result<(), Error> {
        self.meet(Message::Order(order)).map(drop)
    }

    /// Waits for what comes next.
    pub fn follow(&self) -> Result<Order, Error> {
        match self.meet(Message::Here)?[0] {
            Message::Order(order) => Ok(order),
            _ => Err(Error::Internal("the ranks are out of step".into())),
        }
    }

    /// Waits until all are ready.
    pub fn ready(&self) -> Result<(), Error> {
        self.meet(Message::Here).map(drop)
    }

    /// What all have to show, in their order.
    pub fn show(&self, shown: Shown) -> Result<Vec<Shown>, Error> {
        let all = self.meet(Message::Shown(shown))?;
        let shown = |message: &Message| match message {
            Message::Shown(shown) => Ok(shown.clone()),
            _ => Err(Error::Internal("the ranks are out of step".into())),
        };
        all.iter().map(shown).collect()
    }

    /// Whether a rank has failed.
    pub fn is_hopeless(&self) -> bool {
        self.meeting.is_left()
    }

    /// Ends it for all.
    pub fn leave(&self) {
        self.meeting.leave();
        if let Some(member) = &self.member {
            member.leave();
        }
    }
}

/// Leaves unless told that all went well: also where a thread panics.
struct Guard(Option<Rank>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(rank) = &self.0 {
            rank.leave();
        }
    }
}

fn guarded<T>(rank: Rank, run: impl FnOnce(Rank) -> Result<T, Error>) -> Result<T, Error> {
    let mut guard = Guard(Some(rank.clone()));
    let result = run(rank);
    if result.is_ok() {
        guard.0 = None;
    }
    result
}

/// Runs `lead` with the first device in this thread and `follow` with each other one in a thread of its own. Both must
/// call [`Rank::leave`] before they free a device's memory, if they failed. Returns what `lead` returns, or the error of
/// the rank that failed first.
pub(crate) fn run<T>(
    devices: Vec<Device>,
    lead: impl FnOnce(Device, Rank) -> Result<T, Error>,
    follow: impl Fn(Device, Rank) -> Result<(), Error> + Sync,
) -> Result<T, Error> {
    let count = devices.len();
    let members: Vec<Option<Arc<Member>>> = match count {
        1 => vec![None],
        _ => Member::group(&devices)?.into_iter().map(|m| Some(Arc::new(m))).collect(),
    };
    let meeting = Arc::new(Meeting::new(count));
    // The members in `members` are the last to go: NCCL waits for the plans that use them.
    let rank = |(number, member): (usize, &Option<Arc<Member>>)| Rank {
        number,
        count,
        member: member.clone(),
        meeting: meeting.clone(),
    };
    let mut ranks = devices.into_iter().zip(members.iter().enumerate().map(rank));
    let Some((first, leader)) = ranks.next() else {
        return Err(Error::Unsupported("there is no device to train on".into()));
    };
    thread::scope(|scope| {
        let follow = &follow;
        let spawn = |(device, rank): (Device, Rank)| {
            let name = device.describe();
            (name, scope.spawn(move || guarded(rank, |rank| follow(device, rank))))
        };
        let threads: Vec<_> = ranks.map(spawn).collect();
        let mut result = guarded(leader, |rank| lead(first, rank));
        for (i, (device, thread)) in threads.into_iter().enumerate() {
            let ended = thread.join().unwrap_or_else(|_| Err(Error::Internal("a thread panicked".into())));
            if let (Err(Error::Abandoned), Err(error)) = (&result, ended)
                && !matches!(error, Error::Abandoned)
            {
                let device = format!("{device}, number {} of {count}", i + 2);
                result = Err(Error::Rank { device, source: Box::new(error) });
            }
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(count: usize) -> Vec<Device> {
        vec![Device::cpu(Some(1)).unwrap(); count]
    }

    #[test]
    fn shares_cover_the_batch_once() {
        let shares = |count, batch| {
            let ranks = Arc::new(Meeting::new(count));
            let rank = |number| Rank { number, count, member: None, meeting: ranks.clone() };
            (0..count).map(|number| rank(number).share(batch)).collect::<Vec<_>>()
        };
        assert_eq!(shares(2, 8), [0..4, 4..8]);
        assert_eq!(shares(3, 8), [0..2, 2..5, 5..8]);
        assert_eq!(shares(1, 5), std::slice::from_ref(&(0..5)));
    }

    #[test]
    fn the_one_that_failed_is_named_and_nobody_hangs() {
        for failing in 0..3 {
            let one = |rank: Rank| -> Result<(), Error> {
                if rank.number == failing {
                    return Err(Error::Unsupported("no more".into()));
                }
                loop {
                    rank.ready()?;
                }
            };
            let error = run(cpus(3), |_, rank| one(rank), |_, rank| one(rank)).unwrap_err().to_string();
            assert!(error.contains("no more"), "{error}");
            assert_eq!(error.contains(&format!("number {} of 3", failing + 1)), failing > 0, "{error}");
        }
    }
}
