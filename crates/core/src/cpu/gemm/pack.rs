//! Rearranging matrices into panels that the kernels read from front to back.

use super::super::isa::Kernel;
use super::super::simd::{Element, MAX_LANES, Simd};

/// Packs `count` lines of `k` values each into panels of `width` lines: line i, value j goes to panel i / `width`,
/// place `j · width + i % width`. Lines missing in the last panel become 0.
pub(super) struct Pack<T> {
    pub from: *const T,
    /// Elements from line to line.
    pub line: usize,
    /// Elements from value to value along a line.
    pub step: usize,
    pub count: usize,
    pub k: usize,
    pub width: usize,
    /// ⌈count / width⌉ panels of `k · width` values.
    pub to: *mut f32,
}

impl<T: Element> Kernel for Pack<T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut line = 0;
        while line < self.count {
            let lines = (self.count - line).min(self.width);
            // SAFETY: whoever made this vouches for the lines and for room for the panels.
            unsafe {
                let from = self.from.add(line * self.line);
                let to = self.to.add(line * self.k);
                let mut first = 0;
                while first < self.width {
                    let strip = Strip {
                        from: from.wrapping_add(first * self.line),
                        line: self.line,
                        step: self.step,
                        lines: lines.saturating_sub(first).min(S::LANES),
                        places: (self.width - first).min(S::LANES),
                        k: self.k,
                        to: to.add(first),
                        width: self.width,
                    };
                    if self.step == 1 && S::LANES > 1 {
                        strip.transpose(s);
                    } else if self.line == 1 {
                        strip.copy(s);
                    } else {
                        strip.gather();
                    }
                    first += S::LANES;
                }
            }
            line += lines;
        }
    }
}

/// Up to a vector of lines of one panel.
struct Strip<T> {
    from: *const T,
    line: usize,
    step: usize,
    /// Lines that exist.
    lines: usize,
    /// Places in the panel, `lines` or more.
    places: usize,
    k: usize,
    to: *mut f32,
    width: usize,
}

impl<T: Element> Strip<T> {
    /// Writes one vector to step `k` of the panel. A full vector where that spills only into steps written later.
    ///
    /// # Safety
    /// The panel has `k` steps; steps are written in order.
    #[inline(always)]
    unsafe fn put<S: Simd>(&self, s: S, k: usize, v: S::V) {
        // The only strip of a panel may spill into the step that follows, which is written next.
        let may_spill = k + 1 < self.k && self.width <= S::LANES && 2 * self.width >= S::LANES;
        // SAFETY: a vector spills at most one step, and not from the last one, so it stays inside of the panel.
        unsafe {
            let at = self.to.add(k * self.width);
            if self.places == S::LANES || may_spill {
                s.store(at, v);
            } else {
                s.store_partial(at, v, self.places);
            }
        }
    }

    /// Values of a line are neighbours: squares are transposed in registers.
    ///
    /// # Safety
    /// As [`Pack`].
    #[inline(always)]
    unsafe fn transpose<S: Simd>(&self, s: S) {
        let mut k = 0;
        while k < self.k {
            let steps = (self.k - k).min(S::LANES);
            let mut square = [s.zero(); MAX_LANES];
            // SAFETY: only lines and values that exist are read.
            unsafe {
                if steps == S::LANES && self.lines == S::LANES {
                    for (i, row) in square.iter_mut().enumerate().take(S::LANES) {
                        *row = T::load(s, self.from.add(i * self.line + k));
                    }
                } else {
                    for (i, row) in square.iter_mut().enumerate().take(S::LANES) {
                        if i < self.lines {
                            *row = T::load_partial(s, self.from.add(i * self.line + k), steps);
                        }
                    }
                }
                let square = s.transpose(square);
                for (j, column) in square.iter().enumerate().take(S::LANES) {
                    if j < steps {
                        self.put(s, k + j, *column);
                    }
                }
            }
            k += steps;
        }
    }

    /// Lines are neighbours: vectors are copied.
    ///
    /// # Safety
    /// As [`Pack`].
    #[inline(always)]
    unsafe fn copy<S: Simd>(&self, s: S) {
        for k in 0..self.k {
            // SAFETY: only lines that exist are read.
            unsafe {
                let at = self.from.wrapping_add(k * self.step);
                let v = if self.lines == S::LANES { T::load(s, at) } else { T::load_partial(s, at, self.lines) };
                self.put(s, k, v);
            }
        }
    }

    /// Neither are neighbours.
    ///
    /// # Safety
    /// As [`Pack`].
    #[inline(always)]
    unsafe fn gather(&self) {
        for k in 0..self.k {
            for i in 0..self.places {
                // SAFETY: only lines that exist are read; the places lie inside of the panel.
                unsafe {
                    let value =
                        if i < self.lines { (*self.from.add(i * self.line + k * self.step)).widen() } else { 0.0 };
                    *self.to.add(k * self.width + i) = value;
                }
            }
        }
    }
}
