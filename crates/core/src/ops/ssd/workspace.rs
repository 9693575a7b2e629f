//! Scratch memory of running tasks.

use std::sync::atomic::{AtomicBool, Ordering};

/// f32 behind every array that a kernel may read past its end (see [`super::product`]).
const ROOM: usize = 16;

/// Hands out arrays one after another from a piece of memory, or, starting from null, counts what they need.
pub(crate) struct Bump {
    base: *mut u8,
    used: usize,
}

impl Bump {
    pub fn new(base: *mut u8) -> Bump {
        Bump { base, used: 0 }
    }

    /// For adding up sizes; what it hands out must not be used.
    pub fn measure() -> Bump {
        Bump::new(std::ptr::null_mut())
    }

    /// `len` f32, aligned to a cache line as far as the memory is, with room behind them.
    pub fn take(&mut self, len: usize) -> *mut f32 {
        let start = self.base.wrapping_add(self.used);
        self.used += (len + ROOM).next_multiple_of(16) * 4;
        start.cast()
    }

    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.used
    }
}

/// Pieces of scratch memory, one for each thread that may run a task. Which piece a task gets is left to chance.
pub(crate) struct Slots {
    base: *mut u8,
    bytes: usize,
    taken: Vec<AtomicBool>,
}

// SAFETY: the memory behind `base` reaches one holder at a time, by the flags.
unsafe impl Sync for Slots {}

impl Slots {
    /// `count` pieces of `bytes` bytes from `base` on.
    pub fn new(base: *mut u8, bytes: usize, count: usize) -> Slots {
        Slots { base, bytes, taken: (0..count.max(1)).map(|_| AtomicBool::new(false)).collect() }
    }

    /// Calls `f` with a piece that nobody else uses meanwhile. Waits where all are taken, which does not happen with
    /// as many pieces as threads.
    pub fn with<R>(&self, f: impl FnOnce(Bump) -> R) -> R {
        let index = loop {
            let free = self.taken.iter().position(|taken| !taken.swap(true, Ordering::Acquire));
            match free {
                Some(index) => break index,
                None => std::hint::spin_loop(),
            }
        };
        let result = f(Bump::new(self.base.wrapping_add(index * self.bytes)));
        self.taken[index].store(false, Ordering::Release);
        result
    }
}
