//! A place where threads meet: each brings something, and all go on with what everyone brought.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A meeting of a fixed number of members, which can be held again and again.
#[derive(Debug)]
pub struct Meeting<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    round: u64,
    brought: Vec<Option<T>>,
    last: Arc<Vec<T>>,
    /// A member will not come any more.
    left: bool,
}

impl<T> Meeting<T> {
    /// A meeting of that many members.
    pub fn new(members: usize) -> Meeting<T> {
        let brought = (0..members).map(|_| None).collect();
        let state = State { round: 0, brought, last: Arc::new(Vec::new()), left: false };
        Meeting { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Waits for all members and returns what they brought, in their order; `None` if one has left for good.
    pub fn exchange(&self, member: usize, value: T) -> Option<Arc<Vec<T>>> {
        let mut state = self.lock();
        if state.left {
            return None;
        }
        state.brought[member] = Some(value);
        if state.brought.iter().all(Option::is_some) {
            state.last = Arc::new(state.brought.iter_mut().filter_map(Option::take).collect());
            state.round += 1;
            self.changed.notify_all();
            return Some(state.last.clone());
        }
        // The next round cannot end without this member, so `last` is this round's as soon as it is over.
        let round = state.round;
        while state.round == round && !state.left {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        (state.round != round).then(|| state.last.clone())
    }

    /// Leaves for good: whoever waits or comes later is told.
    pub fn leave(&self) {
        self.lock().left = true;
        self.changed.notify_all();
    }

    /// Whether a member has left.
    pub fn is_left(&self) -> bool {
        self.lock().left
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_gets_what_everyone_brought_in_every_round() {
        let meeting = Meeting::new(3);
        std::thread::scope(|scope| {
            for member in 0..3 {
                let meeting = &meeting;
                scope.spawn(move || {
                    for round in 0..200 {
                        let all = meeting.exchange(member, (round, member)).unwrap();
                        assert_eq!(*all, [(round, 0), (round, 1), (round, 2)]);
                    }
                });
            }
        });
    }

    #[test]
    fn nobody_waits_for_one_who_left() {
        let meeting = Meeting::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(meeting.exchange(0, ()).is_none()));
            meeting.leave();
        });
        assert!(meeting.is_left());
        assert!(meeting.exchange(1, ()).is_none());
    }
}
