//! The next token of each sequence, chosen on a GPU: repetition penalty, temperature, top-k, top-p and min-p as the
//! engine's sampler applies them on a CPU. CPUs choose outside of graphs.
//!
//! With temperature 0 the choice is the CPU's: the first of the likeliest. Otherwise weights are rounded to 2⁻³¹ of the
//! likeliest token's, and the number that draws is [`rng::uniform`](crate::rng::uniform) of seed and number of the draw,
//! as on a CPU; but tokens are lined up in another order, so the same number may draw another token.

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::elementwise::cuda::vector;

const NAME: &str = "sample";

static PROGRAM: Program = Program { name: NAME, source: include_str!("kernel.cu") };

/// Columns of the options of a row.
pub const OPTIONS: usize = 8;
/// Columns of the progress of a row.
pub const PROGRESS: usize = 4;

/// How the next token of a sequence is chosen; in range, as the engine checks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 takes all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1 takes all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0 takes all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Only ids below this.
    pub vocabulary: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Options {
    /// The row of the tensor of options.
    pub fn row(&self) -> [i32; OPTIONS] {
        let bits = |v: f32| v.to_bits() as i32;
        let inverse = if self.temperature == 0.0 { 0.0 } else { (1.0 / self.temperature).min(f32::MAX) };
        let most = i32::MAX as usize;
        [
            bits(inverse),
            self.top_k.min(most) as i32,
            bits(self.top_p),
            bits(self.min_p),
            bits(self.repetition_penalty),
            self.vocabulary.clamp(1, most) as i32,
            (self.seed as u32 ^ (self.seed >> 32) as u32) as i32,
            0,
        ]
    }
}

/// The row of the tensor of progress before step 0.
pub fn progress(draws: u64) -> [i32; PROGRESS] {
    [draws as u32 as i32, (draws >> 32) as u32 as i32, 0, 0]
}

/// Operands, T rows; all but the logits are external and change in place.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// `[T, V]` f32
    pub logits: TensorId,
    /// Rows of [`Options::row`], i32 `[T, 8]`.
    pub options: TensorId,
    /// A bit for each id that occurred, i32 `[T, ⌈V/32⌉]`: where a penalty is to be applied.
    pub seen: Option<TensorId>,
    /// Rows of [`progress`], i32 `[T, 4]`.
    pub progress: TensorId,
    /// Receives the chosen ids, i32 `[1, T]`; −1 for logits that are not all finite.
    pub ids: TensorId,
    /// Receives the chosen ids in row step mod R, i32 `[R, T]`.
    pub mailbox: TensorId,
}

/// Appends the choice.
///
/// # Errors
/// Operands of other shapes or types.
pub fn sample(g: &mut Graph, s: Sample) -> Result<(), Error> {
    let (rows, vocabulary) = (g.rows(s.logits), g.cols(s.logits));
    g.expect_f32(NAME, "the logits", s.logits, None, None)?;
    g.expect(NAME, "the options", s.options, DType::I32, Some(rows), Some(OPTIONS))?;
    g.expect(NAME, "the progress", s.progress, DType::I32, Some(rows), Some(PROGRESS))?;
    g.expect(NAME, "the ids", s.ids, DType::I32, Some(1), Some(rows))?;
    g.expect(NAME, "the mailbox", s.mailbox, DType::I32, None, Some(rows))?;
    if let Some(seen) = s.seen {
        g.expect(NAME, "the ids that occurred", seen, DType::I32, Some(rows), Some(vocabulary.div_ceil(32)))?;
    }
    if vocabulary == 0 || g.rows(s.mailbox) == 0 {
        return Err(Error::Unsupported { op: NAME, message: "there must be a logit and a row of the mailbox".into() });
    }
    let inputs = vec![Some(s.logits), Some(s.options), s.seen, Some(s.progress)];
    let seen = s.seen.map(|t| g.in_place(t)).transpose()?;
    let [progress, ids, mailbox] = [s.progress, s.ids, s.mailbox].map(|t| g.in_place(t));
    g.push(Choose, inputs, vec![seen, Some(progress?), Some(ids?), Some(mailbox?)]);
    Ok(())
}

/// Inputs logits, options, seen?, progress; outputs seen?, progress, ids, mailbox.
#[derive(Clone, Copy, Debug)]
struct Choose;

impl Op for Choose {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run_cpu(&self, _: &Io<'_>, _: &Cpu) {
        unreachable!("recorded for GPUs only")
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let logits = io.input(0);
        let outputs = [1, 2, 3].map(|i| io.optional_output(i));
        let [Some(progress), Some(ids), Some(mailbox)] = outputs else {
            unreachable!("externals are always written");
        };
        launcher.launch(
            Kernel::new(&PROGRAM, NAME)
                .define("V", vector(&[logits]).min(4))
                .grid(logits.rows, 1, 1)
                .threads(512)
                .overlapping()
                .args([logits.into(), io.input(1).into(), io.optional_input(2).into(), progress.into()])
                .arg(Arg::Ptr(ids.address()))
                .args([mailbox.into(), (mailbox.rows as i32).into(), logits.cols.into()]),
        )
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }
}
