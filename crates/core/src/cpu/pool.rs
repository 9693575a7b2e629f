//! Threads for parallel regions of a few microseconds, hundreds of them a token.
//!
//! [`Pool::run`] posts a job and takes part in it. Workers that still spin from the region before join at once;
//! parked ones are woken, but nobody waits for them: a worker joins only while the job is open, and the caller waits
//! only for those that joined. So a small region costs a few atomic operations, however sleepy the others are.
//! Which thread runs a task is left to chance; results must not depend on it.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker looks for the next job before it sleeps. Covers the serial stretches between the regions
/// of one token; short enough not to heat an idle machine.
const SPIN: Duration = Duration::from_micros(20);

/// Spins between two looks at the clock.
const SPINS_A_LOOK: u32 = 64;

/// The word that says whether there is a job: the upper half counts jobs, bit 31 says whether one is open, the rest
/// counts the workers in it.
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const GENERATION: u64 = 1 << 32;

/// A fixed set of threads, the caller of [`Pool::run`] among them. Dropping it ends and joins them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

struct Worker {
    thread: Thread,
    handle: Option<JoinHandle<()>>,
}

/// A counter alone on its cache lines (two, since neighbours are fetched in pairs).
#[repr(align(128))]
struct Alone<T>(T);

struct Shared {
    /// Generation, open bit and number of joined workers.
    state: Alone<AtomicU64>,
    /// The next task.
    next: Alone<AtomicUsize>,
    /// Whether a caller owns the pool; another one (or a task) runs its region by itself.
    busy: AtomicBool,
    stop: AtomicBool,
    /// One flag a worker: set before it sleeps, cleared by whoever wakes it.
    asleep: Vec<AtomicBool>,
    /// Written by the owner of `busy` while no job is open and nobody has joined; read by those who joined.
    job: UnsafeCell<Job>,
    /// What the first task that panicked left behind.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A function over task indices, its lifetime erased for as long as the job is open.
#[derive(Clone, Copy)]
struct Job {
    f: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is the only part that is not Sync; it follows the protocol stated there. The function behind the
// pointer is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing belongs to a thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller included: `threads − 1` are started, none for 0 or 1.
    ///
    /// Where the system refuses a thread, the pool has fewer.
    pub fn new(threads: usize) -> Pool {
        let wanted = threads.saturating_sub(1).min(JOINED as usize);
        let shared = Arc::new(Shared {
            state: Alone(AtomicU64::new(0)),
            next: Alone(AtomicUsize::new(0)),
            busy: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..wanted).map(|_| AtomicBool::new(false)).collect(),
            job: UnsafeCell::new(Job { f: &|_| (), tasks: 0 }),
            panic: Mutex::new(None),
        });
        let mut workers = Vec::with_capacity(wanted);
        for index in 0..wanted {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name(format!("hognose-{}", index + 1));
            match builder.spawn(move || shared.work(index)) {
                Ok(handle) => workers.push(Worker { thread: handle.thread().clone(), handle: Some(handle) }),
                Err(_) => break,
            }
        }
        Pool { shared, workers }
    }

    /// The number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f` once for every task index below `tasks`, on any of the threads, and returns when all are done.
    ///
    /// Called from inside a task, or while another thread uses the pool, it runs everything on the calling thread.
    ///
    /// # Panics
    /// Where a task panics: the remaining tasks may be left out, and the panic goes on in the caller. The pool stays
    /// usable.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        let alone = tasks <= 1 || self.workers.is_empty();
        if alone || self.shared.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            (0..tasks).for_each(f);
            return;
        }
        let shared = &*self.shared;
        let f: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: only the lifetime changes. The job is closed and left by all before this function returns.
        let f: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(f) };
        // SAFETY: this thread owns `busy`; no job is open and nobody is in one, since the owner before waited.
        unsafe { *shared.job.get() = Job { f, tasks } };
        shared.next.0.store(0, Ordering::Relaxed);
        let generation = shared.state.0.load(Ordering::Relaxed) & !(GENERATION - 1);
        shared.state.0.store(generation.wrapping_add(GENERATION) | OPEN, Ordering::SeqCst);
        self.wake(tasks - 1);

        shared.take_part(Job { f, tasks });

        // Nobody joins from here on; Acquire, so that what the workers wrote is seen.
        let mut state = shared.state.0.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut spins = 0u32;
        while state & JOINED != 0 {
            spins = spins.saturating_add(1);
            if spins < 10_000 {
                std::hint::spin_loop();
            } else {
                // The worker in question may be waiting for this very core.
                thread::yield_now();
            }
            state = shared.state.0.load(Ordering::Acquire);
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `0..n` into ranges of `chunk` (the last one shorter) and calls `f` once for each.
    ///
    /// The partition depends on `n` and `chunk` alone, so sums kept per range are the same whatever the number of
    /// threads. A `chunk` of 0 counts as 1.
    pub fn chunks(&self, n: usize, chunk: usize, f: impl Fn(Range<usize>) + Sync) {
        let chunk = chunk.max(1);
        self.run(n.div_ceil(chunk), |task| {
            let start = task * chunk;
            f(start..n.min(start + chunk));
        });
    }

    /// Cuts a slice into pieces of `chunk` elements (the last one shorter) and calls `f` once for each, with the
    /// index of the piece's first element. A `chunk` of 0 counts as 1.
    pub fn chunks_mut<T: Send>(&self, slice: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        struct Base<T>(*mut T);
        // SAFETY: every range reaches one thread only, and T may be sent there.
        unsafe impl<T: Send> Sync for Base<T> {}
        let base = Base(slice.as_mut_ptr());
        let base = &base;
        self.chunks(slice.len(), chunk, |range| {
            // SAFETY: the ranges lie inside the slice and do not overlap, and the slice is borrowed for the call.
            let piece = unsafe { std::slice::from_raw_parts_mut(base.0.add(range.start), range.len()) };
            f(range.start, piece);
        });
    }

    /// Wakes up to `count` sleeping workers.
    fn wake(&self, count: usize) {
        // Pairs with the fence in `wait`: either the worker sees the job, or this thread sees that it sleeps.
        fence(Ordering::SeqCst);
        let mut left = count;
        for (worker, asleep) in self.workers.iter().zip(&self.shared.asleep) {
            if left == 0 {
                break;
            }
            left -= 1;
            if asleep.load(Ordering::Relaxed) && asleep.swap(false, Ordering::AcqRel) {
                worker.thread.unpark();
            }
        }
    }
}

impl Shared {
    /// The life of a worker.
    fn work(&self, index: usize) {
        let mut seen = 0;
        while let Some(state) = self.wait(index, seen) {
            seen = state & !(GENERATION - 1);
            // Join, unless the job closes first.
            let mut state = state;
            let joined = loop {
                if state & !(GENERATION - 1) != seen || state & OPEN == 0 {
                    break false;
                }
                match self.state.0.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break true,
                    Err(now) => state = now,
                }
            };
            if joined {
                // SAFETY: this thread has joined, so the owner of the job waits for it and does not write.
                let job = unsafe { *self.job.get() };
                self.take_part(job);
                self.state.0.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Waits for an open job of another generation than `seen`; None where the pool ends.
    fn wait(&self, index: usize, seen: u64) -> Option<u64> {
        let fresh = || {
            let state = self.state.0.load(Ordering::Acquire);
            (state & OPEN != 0 && state & !(GENERATION - 1) != seen).then_some(state)
        };
        loop {
            let start = Instant::now();
            while start.elapsed() < SPIN {
                for _ in 0..SPINS_A_LOOK {
                    if let Some(state) = fresh() {
                        return Some(state);
                    }
                    std::hint::spin_loop();
                }
            }
            self.asleep[index].store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(state) = fresh() {
                self.asleep[index].store(false, Ordering::Relaxed);
                return Some(state);
            }
            while self.asleep[index].load(Ordering::Acquire) {
                thread::park();
            }
        }
    }

    /// Runs tasks until none is left.
    fn take_part(&self, job: Job) {
        // SAFETY: the owner of the job keeps the function alive until all who joined have left.
        let f = unsafe { &*job.f };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.0.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                f(task);
            }
        }));
        if let Err(payload) = outcome {
            // Let the others stop early; far from where the counter could wrap around.
            self.next.0.store(usize::MAX / 2, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for (worker, asleep) in self.workers.iter_mut().zip(&self.shared.asleep) {
            asleep.store(false, Ordering::Release);
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                // A worker catches what its tasks throw, so there is nothing to report.
                let _ = handle.join();
            }
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREADS: [usize; 5] = [0, 1, 2, 4, 9];

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in THREADS {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 3, 17, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for round in 1..=20 {
                    pool.run(tasks, |task| {
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == round));
                }
            }
        }
    }

    #[test]
    fn what_tasks_write_is_seen_after_the_region_even_when_workers_slept() {
        let pool = Pool::new(3);
        let mut values = vec![0u64; 4096];
        for round in 0..200u64 {
            if round % 50 == 0 {
                // Long enough for the workers to park.
                thread::sleep(Duration::from_millis(2));
            }
            pool.chunks_mut(&mut values, 100, |start, piece| {
                for (i, value) in piece.iter_mut().enumerate() {
                    *value += (start + i) as u64;
                }
            });
        }
        assert!(values.iter().enumerate().all(|(i, &value)| value == 200 * i as u64));
    }

    #[test]
    fn chunks_cover_the_range_the_same_way_for_any_number_of_threads() {
        for threads in THREADS {
            let pool = Pool::new(threads);
            let ranges = Mutex::new(Vec::new());
            pool.chunks(103, 10, |range| ranges.lock().unwrap().push(range));
            let mut ranges = ranges.into_inner().unwrap();
            ranges.sort_by_key(|range| range.start);
            let want: Vec<_> = (0..11).map(|i| i * 10..(i * 10 + 10).min(103)).collect();
            assert_eq!(ranges, want);
            pool.chunks(0, 0, |_| unreachable!("there is nothing to cut"));
        }
    }

    #[test]
    fn nested_and_concurrent_regions_finish() {
        let pool = Pool::new(4);
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(8, |_| {
                            pool.run(5, |_| {
                                count.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 3 * 50 * 8 * 5);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        for threads in THREADS {
            let pool = Pool::new(threads);
            for _ in 0..20 {
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(64, |task| {
                        if task % 7 == 3 {
                            resume_unwind(Box::new(task));
                        }
                    });
                }));
                let task = *outcome.unwrap_err().downcast::<usize>().unwrap();
                assert_eq!(task % 7, 3);
                let count = AtomicUsize::new(0);
                pool.run(64, |_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.into_inner(), 64);
            }
        }
    }
}
