//! Linear layers: y = x · Wᵀ + bias, and the products of its gradient.
//!
//! x `[T, K]`, W `[N, K]` (row-major, or packed into panels for inference; f32 or bf16, widened exactly, or blocks), bias
//! `[1, N]`, y `[T, N]`; sums are f32 chains over k in order (bf16 at the level of AMX, and blocks, by which a rounded x is
//! multiplied: see `cpu::gemm`), so a row of y has the same bits whatever other rows there are.
//! dx = dy · W, dW = dyᵀ · x, dbias = column sums of dy. After [`Graph::round_products`] a CPU rounds both operands of
//! the three products to bf16.

use half::bf16;

use crate::cpu::Cpu;
use crate::cpu::gemm::{BlockMatrix, MatMut, MatRef, PackedMatrix, Rhs, Start, blocks_len, gemm, packed_len};
use crate::cuda::blas::Product;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Layout, Mat, Node, Op, TensorId};
use crate::ops::elementwise;
use crate::ops::gather_rows::cuda::widen;

/// y = x · Wᵀ (+ bias), in the type of x.
///
/// # Errors
/// Operands of other shapes or types.
pub fn linear(g: &mut Graph, x: TensorId, weight: TensorId, bias: Option<TensorId>) -> Result<TensorId, Error> {
    let dtype = g.dtype(x);
    linear_to(g, x, weight, bias, dtype)
}

/// [`linear`] with a result of another type: logits are f32 whatever the activations are.
///
/// # Errors
/// As [`linear`].
pub fn linear_to(
    g: &mut Graph,
    x: TensorId,
    weight: TensorId,
    bias: Option<TensorId>,
    dtype: DType,
) -> Result<TensorId, Error> {
    let (n, k) = (g.rows(weight), g.cols(weight));
    g.expect_shape("linear", "x", x, None, Some(k))?;
    let x_dtype = g.expect_float("linear", "x", x)?;
    let w = g.tensor(weight);
    // Packed weights widen exactly; others have the type of x, or are widened to bf16 on a GPU.
    let widened = w.dtype == DType::Q8_0 && x_dtype == DType::BF16;
    if !(w.dtype == x_dtype || widened || w.dtype != DType::I32 && w.layout == Layout::Panels) {
        let message =
            format!("the weight must be {x_dtype}, or bf16 or blocks in panels, but is {} {:?}", w.dtype, w.layout);
        return Err(Error::Unsupported { op: "linear", message });
    }
    if let Some(bias) = bias {
        g.expect_f32("linear", "the bias", bias, Some(1), Some(n))?;
    }
    let y = g.new_tensor(dtype, g.rows(x), n);
    let rounded = g.rounds_products();
    g.push(Linear { rounded }, vec![Some(x), Some(weight), bias], vec![Some(y)]);
    Ok(y)
}

/// dW = dyᵀ · x: gradients of parameters are f32, also where the parameter was rounded to bf16 for the product.
pub(crate) fn weight_gradient(g: &mut Graph, dy: TensorId, x: TensorId, rounded: bool) -> TensorId {
    let dw = g.new_tensor(DType::F32, g.cols(dy), g.cols(x));
    g.push(LinearDw { rounded }, vec![Some(dy), Some(x)], vec![Some(dw)]);
    dw
}

/// The right-hand side Wᵀ `[K, N]` of a product with a weight W `[N, K]` in memory.
///
/// # Safety
/// Nobody may write the weight while the result is in use.
pub(crate) unsafe fn transposed<'a>(weight: Mat, cpu: &Cpu) -> Rhs<'a> {
    let (n, k) = (weight.rows, weight.cols);
    match (weight.layout, weight.dtype) {
        (Layout::Panels, DType::Q8_0 | DType::Q4_K | DType::Q6_K) => {
            // SAFETY: a matrix in panels of blocks has this many bytes; the caller keeps them unchanged.
            let data = unsafe { weight.blocks(blocks_len(weight.dtype, k, n)) };
            Rhs::Blocks(BlockMatrix::new(weight.dtype, k, n, data))
        }
        // SAFETY: the caller keeps it unchanged.
        (Layout::Rows, _) => Rhs::Strided(unsafe { view(weight) }.t()),
        (Layout::Panels, DType::BF16) => {
            // SAFETY: a packed matrix has this many elements; the caller keeps them unchanged.
            let data = unsafe { std::slice::from_raw_parts(weight.ptr::<bf16>(), packed_len::<bf16>(cpu.isa, k, n)) };
            Rhs::Packed(PackedMatrix::new(cpu.isa, k, n, data))
        }
        (Layout::Panels, _) => {
            // SAFETY: as above.
            let data = unsafe { std::slice::from_raw_parts(weight.ptr::<f32>(), packed_len::<f32>(cpu.isa, k, n)) };
            Rhs::Packed(PackedMatrix::new(cpu.isa, k, n, data))
        }
    }
}

/// A row-major f32 matrix as the matrix product reads it.
///
/// # Safety
/// Nobody may write it while the result is in use.
pub(crate) unsafe fn view<'a>(m: Mat) -> MatRef<'a> {
    // SAFETY: a Mat describes valid memory; the caller keeps it unchanged.
    unsafe { MatRef::from_raw(m.ptr::<f32>(), m.rows, m.cols, m.stride, 1) }
}

/// A row-major f32 matrix as the matrix product writes it.
///
/// # Safety
/// Nobody else may touch it while the result is in use.
pub(crate) unsafe fn view_mut<'a>(m: Mat) -> MatMut<'a> {
    // SAFETY: a Mat describes valid memory with rows that do not overlap; the caller keeps it to itself.
    unsafe { MatMut::from_raw(m.ptr::<f32>(), m.rows, m.cols, m.stride) }
}

/// Each with `rounded` as [`Graph::round_products`] says.
#[derive(Debug)]
struct Linear {
    rounded: bool,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    /// A product of low rank (Δ from its projection) reads little and computes little.
    fn is_cheap(&self, g: &Graph, node: &Node) -> bool {
        16 * g.cols(node.input(1)) <= g.rows(node.input(1))
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let Some(dy) = d_outputs[0] else { return Ok(vec![None; 3]) };
        let (x, weight) = (node.input(0), node.input(1));
        let mut d_inputs = vec![None; 3];
        if wanted[0] {
            let w = g.tensor(weight);
            if w.layout != Layout::Rows || w.dtype != g.dtype(x) {
                let message = "gradients need the weight row-major and of the type of x".into();
                return Err(Error::Unsupported { op: "linear", message });
            }
            let dx = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
            g.push(LinearDx { rounded: self.rounded }, vec![Some(dy), Some(weight)], vec![Some(dx)]);
            d_inputs[0] = Some(dx);
        }
        if wanted[1] {
            d_inputs[1] = Some(weight_gradient(g, dy, x, self.rounded));
        }
        if wanted[2] {
            d_inputs[2] = Some(elementwise::column_sums(g, dy)?);
        }
        Ok(d_inputs)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        product_flops(g, node.input(0), g.rows(node.input(1)))
    }

    fn narrow_weight(&self) -> Option<usize> {
        Some(1)
    }

    /// Weights in blocks as bf16: the library multiplies no blocks.
    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let weight = g.tensor(node.input(1));
        if weight.dtype.blocks().is_some() { 2 * weight.rows * weight.cols } else { 0 }
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let mut weight = io.input(1);
        if weight.dtype.blocks().is_some() {
            let wide = Mat { ptr: io.workspace().0, dtype: DType::BF16, ..weight };
            widen(launcher, weight, wide)?;
            weight = wide;
        }
        let product = Product::new(io.output(0), (io.input(0), false), (weight, true));
        match io.optional_input(2) {
            // The library adds a bias of the result's type only.
            Some(bias) if bias.dtype != io.output(0).dtype => {
                launcher.product(&product)?;
                elementwise::cuda::add_row(launcher, io.output(0), bias)
            }
            bias => launcher.product(&Product { bias, ..product }),
        }
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, weight, y) = (io.input(0), io.input(1), io.output(0));
        // SAFETY: inputs do not change while the op runs, and nobody else touches its output.
        unsafe {
            let start = io.optional_input(2).map_or(Start::Zero, |bias| Start::Bias(bias.row(0)));
            gemm(cpu, view_mut(y), start, view(x), transposed(weight, cpu).rounded_if(self.rounded));
        }
    }
}

/// 2 · rows · cols · n.
fn product_flops(g: &Graph, a: TensorId, n: usize) -> f64 {
    2.0 * g.rows(a) as f64 * g.cols(a) as f64 * n as f64
}

/// dx = dy · W, or with a third input that plus dy · W.
#[derive(Debug)]
struct LinearDx {
    rounded: bool,
}

impl Op for LinearDx {
    fn name(&self) -> &'static str {
        "linear_dx"
    }

    fn start_input(&self) -> Option<usize> {
        Some(2)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        product_flops(g, node.input(0), g.cols(node.input(1)))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        // SAFETY: inputs do not change while the op runs, and nobody else touches its output.
        unsafe {
            let weight = Rhs::from(view(io.input(1))).rounded_if(self.rounded);
            gemm(cpu, view_mut(io.output(0)), start(io, cpu), view(io.input(0)), weight);
        }
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let product = Product::new(io.output(0), (io.input(0), false), (io.input(1), false));
        launcher.product(&Product { start: io.optional_input(2), ..product })
    }
}

/// dW = dyᵀ · x, or with a third input that plus dyᵀ · x: sums over tokens in order.
#[derive(Debug)]
struct LinearDw {
    rounded: bool,
}

impl Op for LinearDw {
    fn name(&self) -> &'static str {
        "linear_dw"
    }

    fn start_input(&self) -> Option<usize> {
        Some(2)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        product_flops(g, node.input(0), g.cols(node.input(1)))
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        // SAFETY: inputs do not change while the op runs, and nobody else touches its output.
        unsafe {
            let x = Rhs::from(view(io.input(1))).rounded_if(self.rounded);
            gemm(cpu, view_mut(io.output(0)), start(io, cpu), view(io.input(0)).t(), x);
        }
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let product = Product::new(io.output(0), (io.input(0), true), (io.input(1), false));
        launcher.product(&Product { start: io.optional_input(2), ..product })
    }
}

/// What the gradient's product starts from on a CPU: zero, or the third input, copied into the output first.
fn start(io: &Io<'_>, cpu: &Cpu) -> Start<'static> {
    let Some(start) = io.optional_input(2) else { return Start::Zero };
    let out = io.output(0);
    if start.address() != out.address() {
        cpu.pool.chunks(out.rows, (16 * 1024 / out.cols.max(1)).max(1), |rows| {
            for r in rows {
                // SAFETY: this task alone writes row r, and the start is another matrix.
                unsafe { out.row_mut::<f32>(r).copy_from_slice(start.row(r)) };
            }
        });
    }
    Start::C
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::ops::layout::split;
    use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};

    /// Error bound of values and gradients against f64, for sums of up to a hundred products.
    const BOUND: (f64, f64) = (2e-6, 4e-6);

    fn reference(v: &[Value]) -> Vec<Value> {
        let (x, w) = (&v[0], &v[1]);
        let mut y = Value::new(x.rows, w.rows, vec![0.0; x.rows * w.rows]);
        for t in 0..x.rows {
            for n in 0..w.rows {
                let sum: f64 = (0..w.cols).map(|k| x.at(t, k) * w.at(n, k)).sum();
                y.data[t * w.rows + n] = sum + v.get(2).map_or(0.0, |b| b.at(0, n));
            }
        }
        vec![y]
    }

    #[test]
    fn values_and_gradients() {
        for (t, k, n) in [(1, 1, 1), (7, 33, 5), (40, 9, 70)] {
            let inputs =
                [("x", Value::random(t, k, 1)), ("w", Value::random(n, k, 2)), ("bias", Value::random(1, n, 3))];
            let with_bias = |g: &mut Graph, i: &[TensorId]| vec![linear(g, i[0], i[1], Some(i[2])).unwrap()];
            check_op(&inputs, &["x", "w", "bias"], with_bias, reference, BOUND);
            // The bias is rounded, too.
            let bounds = (2.0 * BF16_BOUNDS.0, BF16_BOUNDS.1);
            check_op_bf16(&inputs, &["x", "w"], &["x", "w", "bias"], with_bias, reference, bounds);
            let without = |g: &mut Graph, i: &[TensorId]| vec![linear(g, i[0], i[1], None).unwrap()];
            check_op(&inputs[..2], &["x", "w"], without, reference, BOUND);
            let to_f32 = |g: &mut Graph, i: &[TensorId]| vec![linear_to(g, i[0], i[1], None, DType::F32).unwrap()];
            check_op_bf16(&inputs[..2], &["x", "w"], &[], to_f32, reference, BOUND);
        }
    }

    #[test]
    fn products_that_round_to_bf16() {
        let narrow = |v: Value| Value { dtype: DType::F32, ..v.to_bf16() };
        let build = |g: &mut Graph, i: &[TensorId]| {
            g.round_products();
            vec![linear(g, i[0], i[1], None).unwrap()]
        };
        for (t, k, n) in [(1, 1, 1), (7, 33, 5), (40, 9, 70)] {
            // Numbers that bf16 holds: nothing is lost, in the gradients' products neither.
            let inputs = [("x", narrow(Value::random(t, k, 1))), ("w", narrow(Value::random(n, k, 2)))];
            check_op(&inputs, &["x", "w"], build, reference, BOUND);
        }
        let inputs = [Value::random(7, 33, 1), Value::random(5, 33, 2)];
        let mut case = Case::new();
        let ids = ["x", "w"].iter().zip(&inputs).map(|(name, v)| case.input(name, v)).collect::<Vec<_>>();
        let y = build(&mut case.graph, &ids)[0];
        case.output("y", y);
        let y = &case.run_on(Isa::Portable, 1)["y"];
        assert!(reference(&inputs.clone().map(narrow))[0].error(y) <= BOUND.0);
        assert!(reference(&inputs)[0].error(y) > 100.0 * BOUND.0, "nothing was rounded");
    }

    #[test]
    fn weights_in_blocks_on_a_gpu() {
        for (t, k, n) in [(1, 128, 1), (70, 256, 33)] {
            let (x, w) = (Value::random(t, k, 1).to_bf16(), Value::random(n, k, 2).to_q8_0());
            let mut case = Case::new();
            let (a, b) = (case.input("x", &x), case.input("w", &w));
            let y = linear_to(&mut case.graph, a, b, None, DType::F32).unwrap();
            case.output("y", y);
            // Decoded numbers are rounded to bf16.
            case.run_on_gpu(|out| assert!(reference(&[x.clone(), w.clone()])[0].error(&out["y"]) <= BF16_BOUNDS.0));
        }
    }

    #[test]
    fn gradients_of_two_readers_are_summed_by_the_product() {
        let inputs = [("x", Value::random(9, 12, 1)), ("w", Value::random(5, 12, 2)), ("v", Value::random(3, 12, 3))];
        let build = |g: &mut Graph, i: &[TensorId]| {
            vec![linear(g, i[0], i[1], None).unwrap(), linear(g, i[0], i[2], None).unwrap()]
        };
        let expected = |v: &[Value]| {
            let [y, u] = [1, 2].map(|w| reference(&[v[0].clone(), v[w].clone()]).remove(0));
            vec![y, u]
        };
        check_op(&inputs, &["x", "w", "v"], build, expected, BOUND);
        let mut g = Graph::new();
        let ids: Vec<TensorId> = inputs.iter().map(|(name, v)| g.external(*name, DType::F32, v.rows, v.cols)).collect();
        let seeds: Vec<(TensorId, TensorId)> = build(&mut g, &ids)
            .into_iter()
            .map(|y| {
                let (rows, cols) = (g.rows(y), g.cols(y));
                (y, elementwise::fill(&mut g, DType::F32, rows, cols, 2.0).unwrap())
            })
            .collect();
        g.backward(&seeds, &ids[..1], crate::graph::Recompute::Nothing).unwrap();
        assert!(g.nodes().iter().all(|n| n.op.name() != "add"), "the sum takes a pass of its own");
    }

    #[test]
    fn column_views_as_input_and_gradient() {
        let inputs = [("x", Value::random(6, 10, 1)), ("w", Value::random(4, 3, 2))];
        let build = |g: &mut Graph, i: &[TensorId]| {
            let parts = split(g, i[0], &[2, 3, 5]).unwrap();
            vec![linear(g, parts[1], i[1], None).unwrap()]
        };
        let reference = |v: &[Value]| {
            let middle = (0..6).flat_map(|r| (2..5).map(move |c| v[0].at(r, c))).collect();
            reference(&[Value::new(6, 3, middle), v[1].clone()])
        };
        check_op(&inputs, &["x", "w"], build, reference, BOUND);
    }
}
