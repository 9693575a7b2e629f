//! How ops that walk through time cut their work: channels into blocks, segments into groups, scratch by thread.
//!
//! The cuts depend on shapes only, never on the number of threads, so sums kept per task have the same bits anywhere.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cpu::pool::Pool;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::dtype::DType;
use crate::graph::Mat;
use crate::ops::vectors::load;
use crate::plan::ALIGNMENT;

/// Tasks that are enough for any number of threads.
const TASKS: usize = 256;
/// The largest number of segment groups: it bounds the memory of sums that are kept per group.
const MAX_SEGMENT_GROUPS: usize = 64;
/// The number of segment groups that is never too large.
const SEGMENT_GROUPS: usize = 16;

/// Calls `f(slot, task)` once for every task. Calls that run at the same time have different slots below
/// `pool.threads()`, so a slot may own scratch memory.
pub(crate) fn run_with_slots(pool: &Pool, tasks: usize, f: impl Fn(usize, usize) + Sync) {
    let slots = pool.threads().min(tasks);
    if slots <= 1 {
        (0..tasks).for_each(|task| f(0, task));
        return;
    }
    let next = AtomicUsize::new(0);
    pool.run(slots, |slot| {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            f(slot, task);
        }
    });
}

/// Cuts an op's scratch memory into matrices of f32, each aligned as the whole is.
pub(crate) struct Scratch {
    start: *mut u8,
    bytes: usize,
}

impl Scratch {
    pub fn new((start, bytes): (*mut u8, usize)) -> Scratch {
        Scratch { start, bytes }
    }

    /// Bytes that [`Scratch::take`] takes for such a matrix.
    pub const fn bytes(rows: usize, cols: usize) -> usize {
        (rows * cols * size_of::<f32>()).next_multiple_of(ALIGNMENT)
    }

    /// The next `rows` · `cols` values; their contents are undefined.
    ///
    /// # Panics
    /// Where the scratch memory is used up: the op asked for too little.
    pub fn take(&mut self, rows: usize, cols: usize) -> Mat {
        let bytes = Scratch::bytes(rows, cols);
        assert!(bytes <= self.bytes, "the workspace is too small");
        let ptr = self.start;
        self.start = ptr.wrapping_add(bytes);
        self.bytes -= bytes;
        Mat { ptr, rows, cols, stride: cols, dtype: DType::F32, layout: Default::default() }
    }
}

/// The segments of a pack as ranges of rows, checked once a run.
#[derive(Clone, Copy)]
pub(crate) struct Segments<'a> {
    offsets: &'a [i32],
}

impl<'a> Segments<'a> {
    /// Takes the offsets of a pack of at most `rows` rows.
    ///
    /// # Panics
    /// Where the offsets fall or leave the rows: a [`crate::Pack`] has no such offsets.
    pub fn new(offsets: &'a [i32], rows: usize) -> Segments<'a> {
        let sorted = offsets.windows(2).all(|w| w[0] <= w[1]);
        let inside = offsets.first().is_some_and(|&o| o >= 0) && offsets.last().is_some_and(|&o| o as usize <= rows);
        assert!(sorted && inside, "segment offsets must rise from 0 to at most {rows}, but are {offsets:?}");
        Segments { offsets }
    }

    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The rows of segment `s`.
    pub fn rows(&self, s: usize) -> Range<usize> {
        self.offsets[s] as usize..self.offsets[s + 1] as usize
    }

    /// The segment that row `row` belongs to.
    pub fn of(&self, row: usize) -> Option<usize> {
        // The first offset past the row is its segment's end: empty segments end before.
        let end = self.offsets.partition_point(|&o| o as usize <= row);
        (1..=self.len()).contains(&end).then(|| end - 1)
    }

    /// Sets the rows of `out` that belong to no segment to zero.
    pub fn clear_rest(&self, out: Mat) {
        let (first, last) = (self.offsets[0] as usize, self.offsets[self.len()] as usize);
        for r in (0..first).chain(last..out.rows) {
            // SAFETY: called outside of parallel regions; nobody else uses the output.
            unsafe { out.row_mut::<f32>(r).fill(0.0) }
        }
    }
}

/// Segments cut into groups of neighbours; a task handles the segments of a group one after another.
#[derive(Clone, Copy)]
pub(crate) struct SegmentGroups {
    segments: usize,
    each: usize,
}

impl SegmentGroups {
    /// Groups for tasks that each have one of `blocks` blocks of channels: few enough that what a task prepares once
    /// serves several segments.
    pub fn new(segments: usize, blocks: usize) -> SegmentGroups {
        let groups = (TASKS / blocks.max(1)).clamp(SEGMENT_GROUPS, MAX_SEGMENT_GROUPS);
        SegmentGroups { segments, each: segments.div_ceil(groups).max(1) }
    }

    pub fn count(&self) -> usize {
        self.segments.div_ceil(self.each)
    }

    pub fn segments(&self, group: usize) -> Range<usize> {
        group * self.each..((group + 1) * self.each).min(self.segments)
    }
}

/// Channels cut into blocks; no block crosses the boundary between two groups of channels.
#[derive(Clone, Copy)]
pub(crate) struct ChannelBlocks {
    groups: usize,
    group_width: usize,
    width: usize,
}

impl ChannelBlocks {
    /// `groups` must divide `channels`.
    pub fn new(channels: usize, groups: usize, width: usize) -> ChannelBlocks {
        ChannelBlocks { groups, group_width: channels / groups.max(1), width }
    }

    /// Blocks of one group.
    pub fn per_group(&self) -> usize {
        self.group_width.div_ceil(self.width)
    }

    pub fn count(&self) -> usize {
        self.groups * self.per_group()
    }

    /// The group and the channels of a block.
    pub fn block(&self, block: usize) -> (usize, Range<usize>) {
        let (group, i) = (block / self.per_group(), block % self.per_group());
        let start = group * self.group_width;
        (group, start + i * self.width..(start + (i + 1) * self.width).min(start + self.group_width))
    }
}

/// The number of vectors that hold `n` values.
#[inline(always)]
pub(crate) fn vectors<S: Simd>(n: usize) -> usize {
    n.div_ceil(S::LANES)
}

/// Asks for columns `col .. col + width` of rows that will be used soon: rows of wide matrices are too far apart for
/// the hardware to guess. Into the second-level cache, since such rows compete for few lines of the first-level one.
#[inline(always)]
pub(crate) fn prefetch_rows(m: Option<Mat>, rows: Range<usize>, col: usize, width: usize) {
    let Some(m) = m else { return };
    let mut row = m.ptr::<f32>().wrapping_add(rows.start * m.stride + col);
    for _ in rows {
        for line in (0..width).step_by(ALIGNMENT / size_of::<f32>()) {
            prefetch(row.wrapping_add(line));
        }
        row = row.wrapping_add(m.stride);
    }
}

/// Asks for the cache line at any address, into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of every x86-64 and faults at no address.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Copies rows `first .. first + lanes` of `m`, which hold one value per column each, to `to` with the rows as lanes:
/// one vector per column, lanes past `lanes` zero.
///
/// # Safety
/// The rows lie in `m`, an f32 matrix; `to` has room for `m.cols · LANES` values; `lanes <= LANES`.
#[inline(always)]
pub(crate) unsafe fn transpose_rows<S: Simd>(s: S, m: Mat, first: usize, lanes: usize, to: *mut f32) {
    for col in (0..m.cols).step_by(S::LANES) {
        let n = S::LANES.min(m.cols - col);
        let mut rows = [s.zero(); MAX_LANES];
        for (l, row) in rows.iter_mut().enumerate().take(lanes) {
            // SAFETY: n values follow column `col` of the row.
            *row = unsafe { load(s, m.at::<f32>(first + l, col), n) };
        }
        for (i, &column) in s.transpose(rows).iter().enumerate().take(n) {
            // SAFETY: the caller vouches for a vector per column.
            unsafe { s.store(to.add((col + i) * S::LANES), column) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_blocks_cover_each_group_once() {
        let blocks = ChannelBlocks::new(3 * 70, 3, 32);
        assert_eq!((blocks.per_group(), blocks.count()), (3, 9));
        let mut next = 0;
        for b in 0..blocks.count() {
            let (group, channels) = blocks.block(b);
            assert_eq!(channels.start, next);
            assert!(group * 70 <= channels.start && channels.end <= (group + 1) * 70);
            next = channels.end;
        }
        assert_eq!(next, 210);
    }

    #[test]
    fn segment_groups_are_bounded_in_number_and_cover_all() {
        for (segments, blocks) in [(0, 1), (1, 1), (63, 1), (64, 3), (65, 24), (1000, 1000), (17, 0)] {
            let groups = SegmentGroups::new(segments, blocks);
            assert!(groups.count() <= MAX_SEGMENT_GROUPS);
            let all: Vec<usize> = (0..groups.count()).flat_map(|g| groups.segments(g)).collect();
            assert_eq!(all, (0..segments).collect::<Vec<_>>());
        }
    }

    #[test]
    fn slots_of_concurrent_tasks_differ() {
        let pool = Pool::new(3);
        let busy: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        let done = AtomicUsize::new(0);
        run_with_slots(&pool, 500, |slot, _| {
            assert_eq!(busy[slot].fetch_add(1, Ordering::SeqCst), 0);
            done.fetch_add(1, Ordering::SeqCst);
            busy[slot].fetch_sub(1, Ordering::SeqCst);
        });
        assert_eq!(done.into_inner(), 500);
    }
}
