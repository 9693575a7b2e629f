//! The product of a few tokens with a matrix of weights, together with what surrounds it in a step of generation: the
//! scale of the norm before it, and behind it a step of the convolution, or the residual addition with the weight of the
//! next norm. For GPUs; the graphs of CPUs have the single ops.
//!
//! ```text
//! v[t] = n[t] (x[t] · Wᵀ) + bias        n[t] = 1/√(Σ squares[t] / width + ε), or 1
//! convolution, columns first .. :  out = silu(Σ_i w[i] (window, v)[i] + b); the window moves on by v
//! residual:  stream = residual + v;  out = stream ⊙ norm weight;  squares'[t, p] = Σ stream², over row block p
//! ```
//!
//! x `[T, K]` bf16, W `[N, K]` bf16 row-major, bias `[1, N]` f32, out `[T, N]` bf16 or f32. An RMSNorm is split in two:
//! whoever makes the stream multiplies by the weight and adds up squares, and the product that reads it multiplies its
//! results by n, which is the same for the whole row. So no kernel waits for the sum over a row before it multiplies.

#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::cuda::{Arg, Kernel, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Layout, Mat, Node, Op, TensorId};

const NAME: &str = "step_linear";

static PROGRAM: Program = Program { name: NAME, source: include_str!("kernel.cu") };

/// Tokens up to which this is used: beyond, products are no longer bound by reading, and the library's are faster.
pub const MOST_TOKENS: usize = 64;

/// A multiple of this is the number of columns of a weight in q8_0: rows with their scales are then aligned to 16 bytes.
pub const Q8_0_COLUMNS: usize = 256;

/// Bytes of the ring of copies of a block, at most.
const RING: usize = 64 << 10;
/// Fewer blocks than this leave too much of a GPU idle.
const FEW_BLOCKS: usize = 64;

/// The second half of an RMSNorm: what is left to do with rows that were multiplied by the norm's weight already.
#[derive(Clone, Copy, Debug)]
pub struct RowScale {
    /// Parts of the sum of squares of each row, f32 `[T, P]`.
    pub squares: TensorId,
    /// Columns that were summed.
    pub width: usize,
    /// ε of the norm.
    pub eps: f32,
}

/// A step of the convolution on some columns of the result.
#[derive(Clone, Copy, Debug)]
pub struct Conv {
    /// First column.
    pub first: usize,
    /// `[C, W]` f32
    pub weight: TensorId,
    /// `[1, C]` f32
    pub bias: Option<TensorId>,
    /// The windows, an external f32 `[S, (W − 1)·C]`; they move on in place.
    pub state: TensorId,
}

/// A residual addition, and the first half of the norm that follows.
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// `[T, N]` f32
    pub residual: TensorId,
    /// Weight of the next norm `[1, N]` f32.
    pub norm_weight: TensorId,
}

/// Operands of a product.
#[derive(Clone, Copy, Debug)]
pub struct StepLinear {
    /// `[T, K]` bf16, K a multiple of 8.
    pub x: TensorId,
    /// `[N, K]` bf16 or q8_0, row-major; K is a multiple of 256 for q8_0.
    pub weight: TensorId,
    /// `[1, N]` f32
    pub bias: Option<TensorId>,
    /// The norm before the product.
    pub scale: Option<RowScale>,
    /// The row of states that each token continues, i32 `[1, T]`; token t continues row t without it.
    pub slots: Option<TensorId>,
    /// Type of the result.
    pub dtype: DType,
}

impl StepLinear {
    /// A mere product, in the type of x.
    pub fn new(x: TensorId, weight: TensorId, bias: Option<TensorId>) -> StepLinear {
        StepLinear { x, weight, bias, scale: None, slots: None, dtype: DType::BF16 }
    }
}

/// The residual stream in the form in which products of a step read it.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// The stream `[T, D]` f32.
    pub stream: TensorId,
    /// The stream times the weight of the next norm, bf16.
    pub weighted: TensorId,
    /// Parts of the sum of squares of its rows, f32 `[T, P]`.
    pub squares: TensorId,
}

/// Appends the product.
///
/// # Errors
/// Operands of other shapes or types.
pub fn step_linear(g: &mut Graph, p: StepLinear) -> Result<TensorId, Error> {
    record(g, p, None, None).map(|out| out.weighted)
}

/// Appends the product with a step of the convolution.
///
/// # Errors
/// Operands of other shapes or types; states that are not an external tensor.
pub fn step_linear_conv(g: &mut Graph, p: StepLinear, conv: Conv) -> Result<TensorId, Error> {
    record(g, p, Some(conv), None).map(|out| out.weighted)
}

/// Appends the product that is added to the residual stream.
///
/// # Errors
/// Operands of other shapes or types.
pub fn step_linear_residual(g: &mut Graph, p: StepLinear, residual: Residual) -> Result<Stream, Error> {
    record(g, p, None, Some(residual))
}

fn record(g: &mut Graph, p: StepLinear, conv: Option<Conv>, residual: Option<Residual>) -> Result<Stream, Error> {
    let (tokens, n, k) = (g.rows(p.x), g.rows(p.weight), g.cols(p.weight));
    g.expect(NAME, "x", p.x, DType::BF16, None, Some(k))?;
    let in_blocks = g.dtype(p.weight) == DType::Q8_0;
    if !in_blocks {
        g.expect_dtype(NAME, "the weight", p.weight, DType::BF16)?;
    }
    let unsupported = |message: String| Err(Error::Unsupported { op: NAME, message });
    let step = if in_blocks { Q8_0_COLUMNS } else { 8 };
    if g.tensor(p.weight).layout != Layout::Rows || !k.is_multiple_of(step) {
        let message = format!("the weight must be row-major with a multiple of {step} columns, but has {k}");
        return unsupported(message);
    }
    if let Some(bias) = p.bias {
        g.expect_f32(NAME, "the bias", bias, Some(1), Some(n))?;
    }
    if n * 8 > i32::MAX as usize || tokens > MOST_TOKENS {
        return unsupported(format!("{tokens} tokens and {n} rows, but at most {MOST_TOKENS} and 2²⁸"));
    }
    if let Some(scale) = p.scale {
        g.expect_f32(NAME, "the sums of squares", scale.squares, Some(tokens), None)?;
    }
    if let Some(slots) = p.slots {
        g.expect(NAME, "the slots", slots, DType::I32, Some(1), Some(tokens))?;
    }
    let mut op = Product { scale: p.scale.map(|s| (s.width, s.eps)), conv: None, residual: residual.is_some() };
    let mut inputs = vec![Some(p.x), Some(p.weight), p.bias, p.scale.map(|s| s.squares), p.slots];
    let out = g.new_tensor(p.dtype, tokens, n);
    let mut outputs = vec![Some(out), None, None, None];
    let mut made = Stream { stream: out, weighted: out, squares: out };
    if let Some(conv) = conv {
        let (channels, width) = (g.rows(conv.weight), g.cols(conv.weight));
        g.expect_dtype(NAME, "the convolution's weight", conv.weight, DType::F32)?;
        if conv.first + channels > n || width == 0 {
            return unsupported(format!("{channels} channels of width {width} do not fit into {n} columns"));
        }
        if let Some(bias) = conv.bias {
            g.expect_f32(NAME, "the convolution's bias", bias, Some(1), Some(channels))?;
        }
        let slots = if p.slots.is_some() { None } else { Some(tokens) };
        g.expect_f32(NAME, "the windows", conv.state, slots, Some((width - 1) * channels))?;
        inputs.extend([Some(conv.weight), conv.bias, Some(conv.state)]);
        outputs[1] = Some(g.in_place(conv.state)?);
        op.conv = Some((conv.first, channels, width));
    } else {
        inputs.extend([None; 3]);
    }
    if let Some(r) = residual {
        g.expect_f32(NAME, "the residual", r.residual, Some(tokens), Some(n))?;
        g.expect_f32(NAME, "the weight of the norm", r.norm_weight, Some(1), Some(n))?;
        inputs.extend([Some(r.residual), Some(r.norm_weight)]);
        made.stream = g.new_tensor(DType::F32, tokens, n);
        made.squares = g.new_tensor(DType::F32, tokens, Shape::new(tokens, (n, k), in_blocks).row_blocks);
        outputs[2] = Some(made.stream);
        outputs[3] = Some(made.squares);
    }
    g.push(op, inputs, outputs);
    Ok(made)
}

/// Inputs x, weight, bias?, squares?, slots?, convolution's weight?, bias? and windows?, residual?, norm weight?; outputs
/// out, windows?, stream?, squares?.
#[derive(Clone, Copy, Debug)]
struct Product {
    /// Width and ε of the norm before.
    scale: Option<(usize, f32)>,
    /// First column, channels and width of the convolution.
    conv: Option<(usize, usize, usize)>,
    residual: bool,
}

impl Op for Product {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        let weight = node.input(1);
        2.0 * g.rows(node.input(0)) as f64 * g.rows(weight) as f64 * g.cols(weight) as f64
    }

    fn run_cpu(&self, _: &Io<'_>, _: &Cpu) {
        unreachable!("the plan of a CPU refuses bf16 activations")
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let (x, weight) = (io.input(0), io.input(1));
        // Whoever normalises the stream itself does not read it weighted.
        let out = io.optional_output(0);
        let aligned = |m: &Mat| m.address().is_multiple_of(16) && m.stride.is_multiple_of(8);
        let in_blocks = weight.dtype.blocks().is_some();
        if !aligned(&x) || !aligned(&weight) {
            let message = "x and the weight must have rows that are aligned to 16 bytes".into();
            return Err(Error::Unsupported { op: NAME, message });
        }
        let shape = Shape::new(x.rows, (weight.rows, weight.cols), in_blocks);
        let (epilogue, taps) = match (self.conv, self.residual) {
            (Some((_, _, width)), _) => (1, width),
            (None, residual) => (if residual { 2 } else { 0 }, 1),
        };
        let (first, channels, _) = self.conv.unwrap_or_default();
        let (width, eps) = self.scale.unwrap_or_default();
        let parts = io.optional_input(3).map_or(0, |s| s.cols);
        let slots = io.optional_input(4).map_or(0, |m| m.address());
        let kernel = Kernel::new(&PROGRAM, NAME)
            .define_type("TO", out.map_or(DType::BF16, |out| out.dtype))
            .define("Q8", i32::from(in_blocks))
            .define("K", weight.cols)
            .define("WARPS", shape.warps)
            .define("MT", shape.row_tiles)
            .define("NT", shape.token_tiles)
            .define("STAGES", shape.stages)
            .define("SCALE", i32::from(self.scale.is_some()))
            .define("EPILOGUE", epilogue)
            .define("W", taps)
            .grid(shape.row_blocks, shape.token_blocks, 1)
            .threads(32 * shape.warps as u32)
            .shared(shape.shared())
            .overlapping()
            .args([x.into(), weight.into(), io.optional_input(2).into(), out.into(), io.optional_input(3).into()])
            .args([(1.0 / width.max(1) as f32).into(), eps.into()])
            .args([io.optional_input(5).into(), io.optional_input(6).into(), io.optional_input(7).into()])
            .args([Arg::Ptr(slots), (first as i32).into(), (channels as i32).into()])
            .args([io.optional_input(8).into(), io.optional_input(9).into()])
            .args([io.optional_output(2).into(), io.optional_output(3).into(), (parts as i32).into()])
            .args([(x.rows as i32).into(), (weight.rows as i32).into()]);
        launcher.launch(kernel)
    }
}

/// How a product is cut: by shapes alone.
#[derive(Clone, Copy, Debug)]
struct Shape {
    warps: usize,
    /// Tiles of 16 rows of the weight, and of 8 tokens, of a block.
    row_tiles: usize,
    token_tiles: usize,
    stages: usize,
    row_blocks: usize,
    token_blocks: usize,
}

impl Shape {
    /// Up to 16 tokens a block has all of them and one tile of rows: the weights alone count. With more, blocks of 32
    /// rows and 16 tokens, or where these are few, of 16 and 8. Larger ones read less but have too few warps at work.
    fn new(tokens: usize, (n, k): (usize, usize), in_blocks: bool) -> Shape {
        // A thread copies 16 bytes of a row in a step.
        let steps = k.div_ceil(if in_blocks { 64 } else { 32 });
        let warps = if k >= 512 { 8 } else { 4 };
        let shape = |row_tiles: usize, token_tiles: usize| {
            let stages = steps.div_ceil(warps).clamp(1, RING / (1024 * row_tiles * warps));
            let (row_blocks, token_blocks) = (n.div_ceil(16 * row_tiles), tokens.div_ceil(8 * token_tiles));
            Shape { warps, row_tiles, token_tiles, stages, row_blocks, token_blocks }
        };
        if tokens <= 16 {
            return shape(1, tokens.div_ceil(8));
        }
        let large = shape(2, 2);
        if large.row_blocks * large.token_blocks >= FEW_BLOCKS { large } else { shape(1, 1) }
    }

    /// The ring of copies, in whose place the sums of the warps come.
    fn shared(&self) -> usize {
        let ring = self.stages * 1024 * self.row_tiles * self.warps;
        let sums = self.warps * 8 * self.token_tiles * (16 * self.row_tiles + 4) * 4;
        ring.max(sums)
    }
}
