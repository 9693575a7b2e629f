//! Launches of attention's kernels.

use super::{Gradient, K, KV, POSITIONS, Q, SEGMENTS, Shape, V};
use crate::cuda::{Arg, Kernel, Launcher, Program, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Io, Mat};
use crate::ops::elementwise::cuda::{self as elementwise, Function, map};

static PROGRAM: Program = Program {
    name: "attention",
    source: concat!(
        include_str!("../../cuda/tiles.cu"),
        include_str!("position.cu"),
        include_str!("kernel_rows.cu"),
        include_str!("kernel.cu")
    ),
};
static GRADIENT: Program = Program {
    name: "attention_grad",
    source: concat!(
        include_str!("../../cuda/tiles.cu"),
        include_str!("position.cu"),
        include_str!("kernel_rows.cu"),
        include_str!("kernel_grad.cu")
    ),
};

/// The largest head whose sums fit a warp's registers.
const MOST_HEADDIM: usize = 256;
/// Threads of a block of `keep` and `count`.
const THREADS: usize = 256;

/// How a kernel cuts its work: sizes of tiles. Depends on shapes, types and the GPU alone.
#[derive(Clone, Copy, Debug)]
struct Cut {
    dtype: DType,
    /// A head's numbers, rounded up.
    headdim: usize,
    /// Warps that share the rows of a tile, and those that share the keys of a block.
    row_warps: usize,
    key_warps: usize,
    /// Keys of a warp; queries of a tile where a block holds keys.
    keys: usize,
    /// Buffers that blocks are fetched into.
    stages: usize,
    /// Tiles of a tile's rows that stay, and bytes of a block's row beside its tiles.
    held: usize,
    extra: usize,
}

impl Cut {
    /// The first of these (row warps, key warps, keys) whose tiles fit shared memory.
    fn fitting(
        shape: &Shape,
        dtype: DType,
        choices: &[[usize; 3]],
        held: usize,
        extra: usize,
        gpu: &Properties,
    ) -> Cut {
        let headdim = shape.headdim.next_power_of_two().max(16);
        let stages = if dtype == DType::BF16 { 2 } else { 1 };
        let cuts = choices.iter().flat_map(|&[row_warps, key_warps, keys]| {
            (1..=stages).rev().map(move |stages| Cut {
                dtype,
                headdim,
                row_warps,
                key_warps,
                keys,
                stages,
                held,
                extra,
            })
        });
        let smallest = Cut { dtype, headdim, row_warps: 1, key_warps: 1, keys: 16, stages: 1, held, extra };
        cuts.into_iter().find(|cut| cut.shared() <= gpu.shared as usize).unwrap_or(smallest)
    }

    fn forward(shape: &Shape, tokens: usize, segments: usize, dtype: DType, gpu: &Properties) -> Cut {
        let wide = if dtype == DType::BF16 && shape.headdim <= 128 { 64 } else { 32 };
        // So few rows that one warp takes all of a segment.
        let choices = if tokens * shape.group() <= 16 * segments {
            [[1, 8, 16], [1, 4, 16], [1, 2, 16]]
        } else {
            [[4, 1, wide], [2, 1, 32], [2, 1, 16]]
        };
        Cut::fitting(shape, dtype, &choices, 1, 0, gpu)
    }

    fn query_grad(shape: &Shape, dtype: DType, gpu: &Properties) -> Cut {
        let wide = if dtype == DType::BF16 && shape.headdim <= 64 { 64 } else { 32 };
        Cut::fitting(shape, dtype, &[[4, 1, wide], [4, 1, 16], [2, 1, 16]], 2, 0, gpu)
    }

    fn key_grad(shape: &Shape, dtype: DType, gpu: &Properties) -> Cut {
        Cut::fitting(shape, dtype, &[[4, 1, 32], [4, 1, 16], [2, 1, 16]], 2, 12, gpu)
    }

    fn rows(&self) -> usize {
        16 * self.row_warps
    }

    fn threads(&self) -> usize {
        32 * self.row_warps * self.key_warps
    }

    /// Columns of the gradients of keys that a block holds.
    fn columns(&self) -> usize {
        self.headdim.min(if self.dtype == DType::BF16 { 128 } else { 64 })
    }

    /// Bytes of a block's shared memory.
    fn shared(&self) -> usize {
        let row = if self.dtype == DType::BF16 { 1 } else { 3 } * (self.headdim + 8) * 2;
        let block = self.keys * self.key_warps * (2 * row + self.extra);
        let tiles = self.held * self.rows() * row + self.stages * block;
        // What warps that share keys add up in the end.
        let sums = if self.key_warps > 1 { 4 * self.key_warps * self.rows() * (self.headdim + 2) } else { 0 };
        tiles.max(sums)
    }

    fn kernel(&self, program: &'static Program, entry: &'static str, vector: usize) -> Kernel {
        Kernel::new(program, entry)
            .define_type("T", self.dtype)
            .define("SPLIT", if self.dtype == DType::BF16 { 1 } else { 3 })
            .define("PP", self.headdim)
            .define("PT", self.columns())
            .define("RW", self.row_warps)
            .define("KW", self.key_warps)
            .define("KEYS", self.keys)
            .define("STAGES", self.stages)
            .define("V", vector)
            .define("THREADS", self.threads())
            .threads(self.threads() as u32)
            .shared(self.shared())
    }
}

/// Query heads and queries of a tile of so many rows.
fn tile(shape: &Shape, rows: usize) -> [usize; 2] {
    let heads = shape.group().min(rows);
    [heads, rows / heads]
}

/// Elements that one access of a head takes.
fn vector(shape: &Shape, mats: &[Option<Mat>], ring: &[Option<Mat>]) -> usize {
    let of = |mats: &[Option<Mat>]| {
        let heads: Vec<Mat> = mats.iter().flatten().map(|m| Mat { cols: shape.headdim, ..*m }).collect();
        elementwise::vector(&heads)
    };
    // The ring is f32, of which an access takes four; more are several.
    let (v, ring) = (of(mats), of(ring));
    if ring == 4 { v } else { v.min(ring) }
}

/// What all launches of a call share.
struct Call<'a> {
    shape: &'a Shape,
    offsets: Arg,
    tokens: usize,
    segments: usize,
    dtype: DType,
}

impl<'a> Call<'a> {
    fn new(shape: &'a Shape, io: &Io<'_>) -> Result<Call<'a>, Error> {
        if shape.headdim > MOST_HEADDIM {
            let message = format!("on a GPU headdim can be at most {MOST_HEADDIM}, but is {}", shape.headdim);
            return Err(Error::Unsupported { op: super::NAME, message });
        }
        let (q, offsets) = (io.input(Q), io.input(SEGMENTS));
        Ok(Call {
            shape,
            offsets: Arg::Ptr(offsets.address()),
            tokens: q.rows,
            segments: offsets.cols - 1,
            dtype: q.dtype,
        })
    }

    fn sizes(&self, [heads, queries]: [usize; 2]) -> Arg {
        let Shape { heads: all, kv_heads, headdim, window } = *self.shape;
        let sizes = [self.tokens, self.segments, all, kv_heads, headdim, window, heads, queries];
        Arg::Table(sizes.map(|v| v as u64).into())
    }

    /// Slots for pieces of so many rows of the pack.
    fn slots(&self, rows: usize) -> usize {
        (self.tokens / rows + self.segments).max(1)
    }

    /// Blocks over all tiles of queries, and the sizes that go with them.
    fn over_queries(&self, cut: &Cut, kernel: Kernel) -> (Kernel, Arg) {
        let [heads, queries] = tile(self.shape, cut.rows());
        let tiles = self.shape.kv_heads * self.shape.group().div_ceil(heads);
        (kernel.grid(self.slots(queries), tiles, 1), self.sizes([heads, queries]))
    }
}

pub(super) fn run(shape: &Shape, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let call = Call::new(shape, io)?;
    let [q, k, v] = [Q, K, V].map(|i| io.input(i));
    let [positions, kv] = [POSITIONS, KV].map(|i| io.optional_input(i));
    let [y, log_sums, final_position, final_kv] = [0, 1, 2, 3].map(|i| io.optional_output(i));
    let cut = Cut::forward(shape, call.tokens, call.segments, call.dtype, launcher.properties());
    let vector = vector(shape, &[Some(q), Some(k), Some(v), y], &[kv, final_kv]);
    if let Some(y) = y {
        let (kernel, sizes) = call.over_queries(&cut, cut.kernel(&PROGRAM, "attend", vector));
        let operands = [q.into(), k.into(), v.into(), call.offsets.clone(), positions.into(), kv.into()];
        launcher.launch(kernel.args(operands).args([y.into(), log_sums.into(), sizes]))?;
    }
    // After all queries, since the state may be replaced.
    let small = |entry, threads: usize| {
        cut.kernel(&PROGRAM, entry, vector).shared(0).threads(THREADS as u32).grid(threads.div_ceil(THREADS), 1, 1)
    };
    if let Some(to) = final_kv {
        match kv {
            None => map(launcher, Function::Fill, None, None, None, to, 0.0)?,
            Some(from) if from.address() != to.address() => {
                map(launcher, Function::Copy, Some(from), None, None, to, 0.0)?;
            }
            Some(_) => {}
        }
        let kernel = small("keep", call.tokens * (k.cols / vector));
        let operands = [k.into(), v.into(), call.offsets.clone(), positions.into(), to.into()];
        launcher.launch(kernel.args(operands).arg(call.sizes([1, 1])))?;
    }
    if let Some(to) = final_position {
        let kernel = small("count", call.segments);
        launcher.launch(kernel.args([call.offsets.clone(), positions.into(), to.into(), call.segments.into()]))?;
    }
    Ok(())
}

/// Bytes for Σ y · dy of each query and head.
pub(super) fn gradient_workspace(shape: &Shape, tokens: usize) -> usize {
    4 * tokens * shape.heads
}

pub(super) fn run_gradient(shape: &Shape, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let call = Call::new(shape, io)?;
    let [q, k, v, dy, y, log_sums] = [Q, K, V, Gradient::DY, Gradient::Y, Gradient::LOG_SUMS].map(|i| io.input(i));
    let [positions, kv] = [POSITIONS, KV].map(|i| io.optional_input(i));
    let [dq, dk, dv] = [0, 1, 2].map(|i| io.optional_output(i));
    let gpu = launcher.properties();
    let vector = vector(shape, &[Some(q), Some(k), Some(v), Some(dy), dq, dk, dv], &[kv]);
    let cut = Cut::query_grad(shape, call.dtype, gpu);
    let deltas = Mat { ptr: io.workspace().0, stride: shape.heads, ..log_sums };
    let kernel = cut.kernel(&GRADIENT, "sum_deltas", vector).shared(0);
    let blocks = (call.tokens * shape.heads).div_ceil(cut.threads() / 32);
    let operands = [y.into(), dy.into(), deltas.into(), call.sizes([1, 1])];
    launcher.launch(kernel.grid(blocks, 1, 1).args(operands))?;
    if let Some(dq) = dq {
        let (kernel, sizes) = call.over_queries(&cut, cut.kernel(&GRADIENT, "query_grad", vector));
        let operands = [q.into(), k.into(), v.into(), call.offsets.clone(), positions.into(), kv.into()];
        let known = [dy.into(), log_sums.into(), deltas.into(), dq.into(), sizes];
        launcher.launch(kernel.args(operands).args(known))?;
    }
    if dk.is_some() || dv.is_some() {
        let cut = Cut::key_grad(shape, call.dtype, gpu);
        let kernel = cut.kernel(&GRADIENT, "key_grad", vector);
        let kernel = kernel.grid(call.slots(cut.rows()), shape.kv_heads, cut.headdim / cut.columns());
        let operands = [q.into(), k.into(), v.into(), call.offsets.clone()];
        let known = [dy.into(), log_sums.into(), deltas.into(), dk.into(), dv.into()];
        launcher.launch(kernel.args(operands).args(known).arg(call.sizes(tile(shape, cut.keys))))?;
    }
    Ok(())
}
