//! The cross-entropy on a GPU: blocks of tokens, each three products around a kernel over its logits.

use crate::cuda::blas::Product;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Io, Layout, Mat};

static PROGRAM: Program = Program { name: "cross_entropy", source: include_str!("kernel.cu") };

/// Bytes of logits in memory at a time, about: enough rows that reading and writing dW once a block costs little. Tests
/// have few tokens, and several blocks all the same.
const LOGITS: usize = if cfg!(test) { 0 } else { 512 << 20 };
/// Rows are padded to whole accesses of this many bytes.
const ACCESS: usize = 16;

/// Elements from one row of logits to the next.
fn stride(vocabulary: usize, dtype: DType) -> usize {
    vocabulary.next_multiple_of(ACCESS / dtype.size())
}

/// Tokens of a block.
fn rows(tokens: usize, vocabulary: usize, dtype: DType) -> usize {
    let most = LOGITS / (stride(vocabulary, dtype) * dtype.size()).max(1);
    // Whole tiles of the products, and blocks of about the same size.
    let most = (most / 256 * 256).max(256);
    let blocks = tokens.div_ceil(most).max(1);
    tokens.div_ceil(blocks).next_multiple_of(256).min(tokens.max(1))
}

pub(super) fn workspace(tokens: usize, vocabulary: usize, dtype: DType) -> usize {
    // The nll of all tokens, for when nobody reads it.
    let nll = (4 * tokens).next_multiple_of(256);
    nll + rows(tokens, vocabulary, dtype) * stride(vocabulary, dtype) * dtype.size()
}

pub(super) fn run(io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let (h, weight, targets, scale) = (io.input(0), io.input(1), io.input(2), io.input(3));
    let (loss, nll) = (io.optional_output(0), io.optional_output(1));
    let (dh, dw) = (io.optional_output(2), io.optional_output(3));
    let (tokens, vocabulary, dtype) = (h.rows, weight.rows, h.dtype);
    let start = io.workspace().0;
    let own = Mat { ptr: start, rows: 1, cols: tokens, stride: tokens, dtype: DType::F32, layout: Layout::Rows };
    let nll = nll.unwrap_or(own);
    let (block, stride) = (rows(tokens, vocabulary, dtype), stride(vocabulary, dtype));
    let logits = start.wrapping_add((4 * tokens).next_multiple_of(256));
    let gradient = dh.is_some() || dw.is_some();
    // Two blocks at a time on a multiprocessor.
    let row_bytes = stride * dtype.size();
    let shared = gradient && row_bytes + 1024 <= launcher.properties().shared as usize / 2;
    let threads = if shared { 1024 } else { 512 };
    let kernel = |entry: &'static str| {
        Kernel::new(&PROGRAM, entry)
            .define_type("T", dtype)
            .define("GRADIENT", i32::from(gradient))
            .define("SHARED", i32::from(shared))
            .define("THREADS", threads)
    };
    for first in (0..tokens).step_by(block) {
        let count = block.min(tokens - first);
        let logits = Mat { ptr: logits, rows: count, cols: vocabulary, stride, dtype, layout: Layout::Rows };
        let part = h.rows(first, count);
        launcher.product(&Product::new(logits, (part, false), (weight, true)))?;
        launcher.launch(
            kernel("losses").grid(count, 1, 1).threads(threads).shared(if shared { row_bytes } else { 0 }).args([
                logits.into(),
                Arg::Ptr(targets.address()),
                scale.into(),
                nll.into(),
                first.into(),
                vocabulary.into(),
            ]),
        )?;
        if let Some(dh) = dh {
            launcher.product(&Product::new(dh.rows(first, count), (logits, false), (weight, false)))?;
        }
        if let Some(dw) = dw {
            let product = Product::new(dw, (logits, true), (part, false));
            launcher.product(&Product { start: (first > 0).then_some(dw), ..product })?;
        }
    }
    match loss {
        Some(loss) => {
            launcher.launch(kernel("total").threads(256).args([nll.into(), scale.into(), loss.into(), tokens.into()]))
        }
        None => Ok(()),
    }
}
