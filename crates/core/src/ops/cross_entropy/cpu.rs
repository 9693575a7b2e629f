//! Cross-entropy on the CPU: blocks of tokens that predict something; products on all threads, softmax row by row.

use crate::cpu::Cpu;
use crate::cpu::gemm::{Rhs, Start, gemm};
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::dtype::DType;
use crate::graph::{Io, Layout, Mat};
use crate::ops::linear::{transposed, view, view_mut};
use crate::ops::vectors::{each, load, store, sum};

/// Columns whose exponentials are summed in f32 before the sum goes on in f64.
const COLS_PER_SUM: usize = 1024;
/// Rows that one task copies.
const ROWS_PER_COPY: usize = 16;

/// Where things are in the scratch memory, in bytes.
pub(super) struct Workspace {
    /// Tokens of a block.
    block: usize,
    vocabulary: usize,
    d: usize,
    /// [block, d] hidden vectors, where a block's tokens are not neighbours; their gradients afterwards.
    rows: usize,
    /// [block] f64: the losses of a block's tokens.
    losses: usize,
    /// [block] usize: the tokens of a block.
    tokens: usize,
    end: usize,
}

impl Workspace {
    pub fn new(block: usize, tokens: usize, vocabulary: usize, d: usize) -> Workspace {
        let block = block.min(tokens);
        // The logits [block, V] come first.
        let rows = (block * vocabulary * size_of::<f32>()).next_multiple_of(64);
        let losses = rows + (block * d * size_of::<f32>()).next_multiple_of(64);
        let tokens = losses + (block * size_of::<f64>()).next_multiple_of(64);
        let end = tokens + (block * size_of::<usize>()).next_multiple_of(64);
        Workspace { block, vocabulary, d, rows, losses, tokens, end }
    }

    pub fn bytes(&self) -> usize {
        self.end
    }

    fn mat(&self, start: *mut u8, offset: usize, cols: usize) -> Mat {
        let ptr = start.wrapping_add(offset);
        Mat { ptr, rows: self.block, cols, stride: cols, dtype: DType::F32, layout: Layout::Rows }
    }
}

pub(super) fn run(block: usize, rounded: bool, io: &Io<'_>, cpu: &Cpu) {
    let (h, weight) = (io.input(0), io.input(1));
    // SAFETY: the builder checked that the targets are one row of i32 and the scale is one f32; inputs do not change.
    let (targets, scale) = unsafe { (io.input(2).row::<i32>(0), io.input(3).row::<f32>(0)[0]) };
    let (dh, dw) = (io.optional_output(2), io.optional_output(3));
    let with_gradient = dh.is_some() || dw.is_some();
    // SAFETY: nobody else writes the outputs.
    let mut nll = io.optional_output(1).map(|m| unsafe { m.row_mut::<f32>(0) });
    if let Some(nll) = &mut nll {
        nll.fill(0.0);
    }

    let layout = Workspace::new(block, h.rows, weight.rows, h.cols);
    let (start, bytes) = io.workspace();
    assert!(layout.bytes() <= bytes, "the workspace is too small");
    let logits = layout.mat(start, 0, layout.vocabulary);
    let gathered = layout.mat(start, layout.rows, layout.d);
    // SAFETY: the workspace is this op's own, the places are aligned and do not overlap, and any bytes are valid.
    let (losses, tokens) = unsafe {
        (
            std::slice::from_raw_parts_mut(start.add(layout.losses).cast::<f64>(), layout.block),
            std::slice::from_raw_parts_mut(start.add(layout.tokens).cast::<usize>(), layout.block),
        )
    };

    let mut total = 0.0f64;
    let mut dw_start = Start::Zero;
    let mut next = 0;
    loop {
        // The next tokens that predict something; the others have no gradient.
        let mut count = 0;
        while count < layout.block && next < targets.len() {
            if targets[next] != -1 {
                tokens[count] = next;
                count += 1;
            } else if let Some(dh) = dh {
                // SAFETY: no task runs now.
                unsafe { dh.row_mut::<f32>(next) }.fill(0.0);
            }
            next += 1;
        }
        if count == 0 {
            break;
        }
        let (tokens, losses) = (&tokens[..count], &mut losses[..count]);
        let neighbours = tokens[count - 1] - tokens[0] + 1 == count;
        let hidden = if neighbours { h.rows(tokens[0], count) } else { gathered.rows(0, count) };
        if !neighbours {
            copy_rows(cpu, count, |i| (h, tokens[i]), |i| (gathered, i));
        }
        let logits = logits.rows(0, count);
        // SAFETY: the weight does not change; no task runs on the logits now.
        unsafe {
            let weight = transposed(weight, cpu).rounded_if(rounded);
            gemm(cpu, view_mut(logits), Start::Zero, view(hidden), weight);
        }
        cpu.pool.chunks_mut(losses, 1, |i, loss| {
            // SAFETY: task i alone touches row i.
            let logits = unsafe { logits.row_mut(i) };
            let scale = with_gradient.then_some(scale);
            loss[0] = cpu.isa.run(Softmax { logits, target: targets[tokens[i]], scale });
        });
        for (&token, &loss) in tokens.iter().zip(losses.iter()) {
            total += loss;
            if let Some(nll) = &mut nll {
                nll[token] = loss as f32;
            }
        }
        if let Some(dw) = dw {
            // SAFETY: dW is an output that nobody else touches; the others do not change now.
            unsafe {
                let hidden = Rhs::from(view(hidden)).rounded_if(rounded);
                gemm(cpu, view_mut(dw), dw_start, view(logits).t(), hidden);
            }
            dw_start = Start::C;
        }
        if let Some(dh) = dh {
            let to = if neighbours { dh.rows(tokens[0], count) } else { gathered.rows(0, count) };
            // SAFETY: dh is an output and the gathered rows are scratch: nobody else touches them.
            unsafe {
                let weight = Rhs::from(view(weight)).rounded_if(rounded);
                gemm(cpu, view_mut(to), Start::Zero, view(logits), weight);
            }
            if !neighbours {
                copy_rows(cpu, count, |i| (gathered, i), |i| (dh, tokens[i]));
            }
        }
    }
    if let (Some(dw), Start::Zero) = (dw, dw_start) {
        // SAFETY: each task alone writes its rows.
        cpu.pool.chunks(dw.rows, ROWS_PER_COPY, |rows| rows.for_each(|r| unsafe { dw.row_mut::<f32>(r) }.fill(0.0)));
    }
    if let Some(loss) = io.optional_output(0) {
        // SAFETY: nobody else writes the output, one f32.
        unsafe { loss.row_mut::<f32>(0)[0] = (total * f64::from(scale)) as f32 };
    }
}

/// Copies row `from(i)` to row `to(i)` for all i below `count`; the rows to write differ, and nobody else touches them.
fn copy_rows(
    cpu: &Cpu,
    count: usize,
    from: impl Fn(usize) -> (Mat, usize) + Sync,
    to: impl Fn(usize) -> (Mat, usize) + Sync,
) {
    cpu.pool.chunks(count, ROWS_PER_COPY, |range| {
        for i in range {
            let ((from, row), (to, to_row)) = (from(i), to(i));
            // SAFETY: this task alone writes the row, and nobody writes the one it reads.
            unsafe { to.row_mut::<f32>(to_row).copy_from_slice(from.row(row)) };
        }
    });
}

/// Computes a row's loss and turns its logits into the gradient `scale` · (softmax − target); without a scale, what
/// they become is of no use. The loss, and the gradient, are NaN if there is no such target.
struct Softmax<'a> {
    logits: &'a mut [f32],
    target: i32,
    scale: Option<f32>,
}

impl Kernel for Softmax<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let target = usize::try_from(self.target).unwrap_or(usize::MAX);
        let Some(&target_logit) = self.logits.get(target) else {
            self.logits.fill(f32::NAN);
            return f64::NAN;
        };
        let largest = max(s, self.logits);
        let shift = s.splat(largest);
        let mut total = 0.0f64;
        for part in self.logits.chunks_mut(COLS_PER_SUM) {
            let at = part.as_mut_ptr();
            let exponential = |i: usize, lanes: usize| {
                // SAFETY: elements i .. i + lanes lie in the part. Reading them again fills the other lanes with 0.
                unsafe {
                    let e = math::exp_not_positive(s, s.sub(load(s, at.add(i), lanes), shift));
                    store(s, at.add(i), e, lanes);
                    if lanes == S::LANES { e } else { load(s, at.add(i), lanes) }
                }
            };
            total += f64::from(sum(s, part.len(), exponential));
        }
        if let Some(scale) = self.scale {
            let factor = s.splat((f64::from(scale) / total) as f32);
            let at = self.logits.as_mut_ptr();
            each(s, self.logits.len(), |i, lanes| {
                // SAFETY: elements i .. i + lanes lie in the row.
                unsafe { store(s, at.add(i), s.mul(load(s, at.add(i), lanes), factor), lanes) }
            });
            self.logits[target] -= scale;
        }
        total.ln() + (f64::from(largest) - f64::from(target_logit))
    }
}

/// The largest of at least one number; any of them where one is NaN.
#[inline(always)]
fn max<S: Simd>(s: S, values: &[f32]) -> f32 {
    let n = values.len();
    if n < S::LANES {
        return values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    }
    let at = values.as_ptr();
    // SAFETY: there is a whole vector at least. The last one may overlap the one before.
    unsafe {
        let mut largest = [s.load(at); 4];
        let mut i = 0;
        while i + 4 * S::LANES <= n {
            for (k, largest) in largest.iter_mut().enumerate() {
                *largest = s.max(s.load(at.add(i + k * S::LANES)), *largest);
            }
            i += 4 * S::LANES;
        }
        while i < n {
            largest[0] = s.max(s.load(at.add(i.min(n - S::LANES))), largest[0]);
            i += S::LANES;
        }
        s.reduce_max(s.max(s.max(largest[0], largest[1]), s.max(largest[2], largest[3])))
    }
}
