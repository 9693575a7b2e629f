//! Elementwise and reduction helpers: fill, add, mul, scale, silu, −exp, column sums.
//!
//! All act on matrices `[rows, cols]`, f32 or, on a GPU, bf16. They serve the backward transformation and research code; wherever speed
//! matters, the models use fused ops instead.

pub(crate) mod cuda;

use std::ops::Range;

use half::bf16;

use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Mat, Node, Op, TensorId};
use crate::ops::vectors::{each, load, store};
use cuda::Function;

/// Elements that one task handles, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;
/// Rows whose sum one task forms; a constant, so that the grouping does not depend on the number of threads.
const ROWS_PER_SUM: usize = 128;

fn rows_per_task(cols: usize) -> usize {
    (ELEMENTS_PER_TASK / cols.max(1)).max(1)
}

/// A tensor of this shape whose elements all equal `value`.
pub fn fill(g: &mut Graph, dtype: DType, rows: usize, cols: usize, value: f32) -> Result<TensorId, Error> {
    if dtype == DType::I32 && value.fract() != 0.0 {
        return Err(Error::Unsupported { op: "fill", message: format!("i32 cannot hold {value}") });
    }
    let out = g.new_tensor(dtype, rows, cols);
    g.push(Fill { value }, vec![], vec![Some(out)]);
    Ok(out)
}

/// a + b.
pub fn add(g: &mut Graph, a: TensorId, b: TensorId) -> Result<TensorId, Error> {
    binary(g, Binary::Add, a, b)
}

/// a ⊙ b.
pub fn mul(g: &mut Graph, a: TensorId, b: TensorId) -> Result<TensorId, Error> {
    binary(g, Binary::Mul, a, b)
}

/// x rounded or widened to another type.
///
/// # Errors
/// Integers.
pub fn cast(g: &mut Graph, x: TensorId, dtype: DType) -> Result<TensorId, Error> {
    g.expect_float("cast", "x", x)?;
    let out = g.new_tensor(dtype, g.rows(x), g.cols(x));
    g.push(Cast, vec![Some(x)], vec![Some(out)]);
    Ok(out)
}

/// factor · x.
pub fn scale(g: &mut Graph, x: TensorId, factor: f32) -> Result<TensorId, Error> {
    let dtype = g.expect_float("scale", "x", x)?;
    let out = g.new_tensor(dtype, g.rows(x), g.cols(x));
    g.push(Scale { factor }, vec![Some(x)], vec![Some(out)]);
    Ok(out)
}

/// s · x for a scalar tensor `s` [1, 1]; x itself where s is known to be one. Differentiable in x only: it serves gradients that scale with a loss's.
pub fn scale_by(g: &mut Graph, x: TensorId, s: TensorId) -> Result<TensorId, Error> {
    let dtype = g.expect_float("scale_by", "x", x)?;
    g.expect_f32("scale_by", "s", s, Some(1), Some(1))?;
    if g.constant(s) == Some(1.0) {
        return Ok(x);
    }
    let out = g.new_tensor(dtype, g.rows(x), g.cols(x));
    g.push(ScaleBy, vec![Some(x), Some(s)], vec![Some(out)]);
    Ok(out)
}

/// silu(x) = x · σ(x).
pub fn silu(g: &mut Graph, x: TensorId) -> Result<TensorId, Error> {
    unary(g, Unary::Silu, x)
}

/// −exp(x): A from A_log.
pub fn neg_exp(g: &mut Graph, x: TensorId) -> Result<TensorId, Error> {
    unary(g, Unary::NegExp, x)
}

fn unary(g: &mut Graph, op: Unary, x: TensorId) -> Result<TensorId, Error> {
    let dtype = g.expect_float(op.name(), "x", x)?;
    let out = g.new_tensor(dtype, g.rows(x), g.cols(x));
    g.push(op, vec![Some(x)], vec![Some(out)]);
    Ok(out)
}

/// Sums over rows: x [rows, cols] → [1, cols] in f32. The order of summation depends on the shape only.
pub fn column_sums(g: &mut Graph, x: TensorId) -> Result<TensorId, Error> {
    g.expect_float("column_sums", "x", x)?;
    let out = g.new_tensor(DType::F32, 1, g.cols(x));
    g.push(ColumnSums, vec![Some(x)], vec![Some(out)]);
    Ok(out)
}

fn binary(g: &mut Graph, op: Binary, a: TensorId, b: TensorId) -> Result<TensorId, Error> {
    let dtype = g.expect_float(op.name(), "a", a)?;
    g.expect(op.name(), "b", b, dtype, Some(g.rows(a)), Some(g.cols(a)))?;
    let out = g.new_tensor(dtype, g.rows(a), g.cols(a));
    g.push(op, vec![Some(a), Some(b)], vec![Some(out)]);
    Ok(out)
}

#[derive(Debug)]
struct Fill {
    value: f32,
}

impl Op for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn backward(
        &self,
        _: &mut Graph,
        _: &Node,
        _: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        Ok(vec![])
    }

    fn constant(&self) -> Option<f32> {
        Some(self.value)
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::fill(launcher, io.output(0), self.value)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let out = io.output(0);
        cpu.pool.chunks(out.rows, rows_per_task(out.cols), |rows| {
            for r in rows {
                // SAFETY: this task alone writes row r.
                unsafe {
                    match out.dtype {
                        DType::F32 => out.row_mut::<f32>(r).fill(self.value),
                        DType::BF16 => out.row_mut::<bf16>(r).fill(bf16::from_f32(self.value)),
                        DType::I32 => out.row_mut::<i32>(r).fill(self.value as i32),
                        blocks => unreachable!("activations are never in {blocks}"),
                    }
                }
            }
        });
    }
}

#[derive(Clone, Copy, Debug)]
enum Binary {
    Add,
    Mul,
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self {
            Binary::Add => "add",
            Binary::Mul => "mul",
        }
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let Some(d) = d_outputs[0] else { return Ok(vec![None, None]) };
        Ok(match self {
            Binary::Add => vec![Some(d), Some(d)],
            Binary::Mul => vec![
                if wanted[0] { Some(mul(g, d, node.input(1))?) } else { None },
                if wanted[1] { Some(mul(g, d, node.input(0))?) } else { None },
            ],
        })
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (g.rows(node.output(0)) * g.cols(node.output(0))) as f64
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let function = match self {
            Binary::Add => Function::Add,
            Binary::Mul => Function::Mul,
        };
        cuda::map(launcher, function, Some(io.input(0)), Some(io.input(1)), None, io.output(0), 0.0)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (a, b, out) = (io.input(0), io.input(1), io.output(0));
        cpu.pool.chunks(out.rows, rows_per_task(out.cols), |rows| {
            for r in rows {
                // SAFETY: this task alone writes row r, and inputs do not change.
                let (a, b, out) = unsafe { (a.row::<f32>(r), b.row::<f32>(r), out.row_mut::<f32>(r)) };
                let pairs = out.iter_mut().zip(a).zip(b);
                match self {
                    Binary::Add => pairs.for_each(|((o, a), b)| *o = a + b),
                    Binary::Mul => pairs.for_each(|((o, a), b)| *o = a * b),
                }
            }
        });
    }
}

#[derive(Debug)]
struct Cast;

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let dtype = g.dtype(node.input(0));
        Ok(vec![d_outputs[0].map(|d| cast(g, d, dtype)).transpose()?])
    }

    /// Both types are f32: the plan of a CPU refuses bf16 activations.
    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        scale_rows(io.input(0), io.output(0), 1.0, cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::map(launcher, Function::Copy, Some(io.input(0)), None, None, io.output(0), 0.0)
    }
}

#[derive(Debug)]
struct Scale {
    factor: f32,
}

impl Op for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn backward(
        &self,
        g: &mut Graph,
        _: &Node,
        d_outputs: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        Ok(vec![match d_outputs[0] {
            Some(d) => Some(scale(g, d, self.factor)?),
            None => None,
        }])
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::map(launcher, Function::Scale, Some(io.input(0)), None, None, io.output(0), self.factor)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        scale_rows(io.input(0), io.output(0), self.factor, cpu);
    }
}

#[derive(Debug)]
struct ScaleBy;

impl Op for ScaleBy {
    fn name(&self) -> &'static str {
        "scale_by"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        if wanted[1] {
            return Err(Error::Unsupported { op: "scale_by", message: "the scalar has no gradient".into() });
        }
        Ok(vec![
            match d_outputs[0] {
                Some(d) => Some(scale_by(g, d, node.input(1))?),
                None => None,
            },
            None,
        ])
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::map(launcher, Function::ScaleBy, Some(io.input(0)), None, Some(io.input(1)), io.output(0), 0.0)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        // SAFETY: the builder checked that input 1 is one f32; inputs do not change.
        let factor = unsafe { io.input(1).row::<f32>(0)[0] };
        scale_rows(io.input(0), io.output(0), factor, cpu);
    }
}

fn scale_rows(x: Mat, out: Mat, factor: f32, cpu: &Cpu) {
    cpu.pool.chunks(out.rows, rows_per_task(out.cols), |rows| {
        for r in rows {
            // SAFETY: this task alone writes row r, and inputs do not change.
            let (x, out) = unsafe { (x.row::<f32>(r), out.row_mut::<f32>(r)) };
            out.iter_mut().zip(x).for_each(|(o, x)| *o = factor * x);
        }
    });
}

/// Functions of one element with a kernel over vectors.
#[derive(Clone, Copy, Debug)]
enum Unary {
    Silu,
    /// dy · silu'(x), as an op of (x, dy).
    SiluGrad,
    NegExp,
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        match self {
            Unary::Silu => "silu",
            Unary::SiluGrad => "silu_grad",
            Unary::NegExp => "neg_exp",
        }
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let Some(d) = d_outputs[0] else { return Ok(vec![None; node.inputs.len()]) };
        let x = node.input(0);
        Ok(vec![Some(match self {
            Unary::Silu => {
                let dx = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
                g.push(Unary::SiluGrad, vec![Some(x), Some(d)], vec![Some(dx)]);
                dx
            }
            // (−eˣ)' is the value itself.
            Unary::NegExp => mul(g, d, node.output(0))?,
            Unary::SiluGrad => {
                let message = "its gradient is not implemented".into();
                return Err(Error::Unsupported { op: self.name(), message });
            }
        })])
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        let function = match self {
            Unary::Silu => Function::Silu,
            Unary::SiluGrad => Function::SiluGrad,
            Unary::NegExp => Function::NegExp,
        };
        cuda::map(launcher, function, Some(io.input(0)), io.optional_input(1), None, io.output(0), 0.0)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, dy, out) = (io.input(0), io.optional_input(1), io.output(0));
        let op = *self;
        cpu.pool.chunks(out.rows, rows_per_task(out.cols), |rows| cpu.isa.run(UnaryRows { op, x, dy, out, rows }));
    }
}

/// Some rows, which this kernel alone writes.
struct UnaryRows {
    op: Unary,
    x: Mat,
    dy: Option<Mat>,
    out: Mat,
    rows: Range<usize>,
}

impl Kernel for UnaryRows {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in self.rows {
            // SAFETY: row r lies in all operands, and inputs do not change; lanes below `cols` are touched only.
            unsafe {
                let (x, out) = (self.x.at::<f32>(r, 0), self.out.at::<f32>(r, 0));
                let dy = self.dy.map(|dy| dy.at::<f32>(r, 0));
                each(s, self.x.cols, |i, lanes| {
                    let x = load(s, x.add(i), lanes);
                    let value = match self.op {
                        Unary::Silu => math::silu(s, x),
                        Unary::NegExp => s.neg(math::exp(s, x)),
                        Unary::SiluGrad => {
                            let dy = dy.map_or(s.zero(), |dy| load(s, dy.add(i), lanes));
                            s.mul(math::dsilu(s, x), dy)
                        }
                    };
                    store(s, out.add(i), value, lanes);
                });
            }
        }
    }
}

#[derive(Debug)]
struct ColumnSums;

impl Op for ColumnSums {
    fn name(&self) -> &'static str {
        "column_sums"
    }

    fn workspace(&self, g: &Graph, node: &Node, _: &Cpu) -> usize {
        let x = node.input(0);
        g.rows(x).div_ceil(ROWS_PER_SUM) * g.cols(x) * 4
    }

    fn workspace_cuda(&self, g: &Graph, node: &Node, _: &Properties) -> usize {
        let x = node.input(0);
        cuda::column_sums_workspace(g.rows(x), g.cols(x))
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::column_sums(launcher, io)
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, out) = (io.input(0), io.output(0));
        let blocks = x.rows.div_ceil(ROWS_PER_SUM);
        let partial = Partials::new(io.workspace(), blocks, x.cols);
        cpu.pool.run(blocks, |b| {
            // SAFETY: task b alone writes row b of the partial sums; inputs do not change.
            let sum = unsafe { partial.row_mut(b) };
            sum.fill(0.0);
            for r in b * ROWS_PER_SUM..((b + 1) * ROWS_PER_SUM).min(x.rows) {
                // SAFETY: as above.
                let row = unsafe { x.row::<f32>(r) };
                sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
            }
        });
        // SAFETY: the tasks are done; nobody else writes the output.
        let total = unsafe { out.row_mut::<f32>(0) };
        total.fill(0.0);
        for b in 0..blocks {
            // SAFETY: the tasks that wrote the partial sums are done.
            let sum = unsafe { partial.row_mut(b) };
            total.iter_mut().zip(sum).for_each(|(t, s)| *t += *s);
        }
    }
}

/// Partial results of a reduction in an op's scratch memory: one row per block of work. Summing the rows in order
/// gives the same bits whatever thread computed which block.
#[derive(Clone, Copy)]
pub(crate) struct Partials {
    mat: Mat,
}

impl Partials {
    /// `rows` rows of `cols` f32 at the start of a workspace that must hold them.
    pub fn new(workspace: (*mut u8, usize), rows: usize, cols: usize) -> Partials {
        assert!(rows * cols * 4 <= workspace.1, "the workspace is too small");
        let layout = Default::default();
        Partials { mat: Mat { ptr: workspace.0, rows, cols, stride: cols, dtype: DType::F32, layout } }
    }

    /// Row `r`.
    ///
    /// # Safety
    /// No other reference to the row may be in use meanwhile.
    pub unsafe fn row_mut<'a>(&self, r: usize) -> &'a mut [f32] {
        // SAFETY: the caller keeps the row to itself.
        unsafe { self.mat.row_mut(r) }
    }

    /// Row `r`, for several tasks to read.
    ///
    /// # Safety
    /// Nobody may write the row meanwhile.
    pub unsafe fn row<'a>(&self, r: usize) -> &'a [f32] {
        // SAFETY: the caller vouches that nobody writes the row.
        unsafe { self.mat.row(r) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};

    fn map(values: &[Value], f: impl Fn(f64, f64) -> f64) -> Vec<Value> {
        let b = values.last().unwrap();
        let data = values[0].data.iter().zip(&b.data).map(|(&a, &b)| f(a, b)).collect();
        vec![Value::new(b.rows, b.cols, data)]
    }

    #[test]
    fn values_and_gradients() {
        let (a, b) = (Value::random(9, 19, 1), Value::random(9, 19, 2));
        let two = [("a", a.clone()), ("b", b)];
        let one = [("a", a)];
        check_op(&two, &["a", "b"], |g, t| vec![add(g, t[0], t[1]).unwrap()], |v| map(v, |a, b| a + b), (1e-7, 1e-7));
        check_op(&two, &["a", "b"], |g, t| vec![mul(g, t[0], t[1]).unwrap()], |v| map(v, |a, b| a * b), (1e-6, 1e-6));
        check_op(&one, &["a"], |g, t| vec![scale(g, t[0], -3.0).unwrap()], |v| map(v, |a, _| -3.0 * a), (1e-6, 1e-6));
        let silu_ref = |v: &[Value]| map(v, |a, _| a / (1.0 + (-a).exp()));
        check_op(&one, &["a"], |g, t| vec![silu(g, t[0]).unwrap()], silu_ref, (1e-6, 1e-6));
        let neg_exp_ref = |v: &[Value]| map(v, |a, _| -a.exp());
        check_op(&one, &["a"], |g, t| vec![neg_exp(g, t[0]).unwrap()], neg_exp_ref, (1e-6, 1e-6));
    }

    #[test]
    fn values_and_gradients_in_bf16() {
        // Rows with a rest, and whole accesses of 8.
        for cols in [19, 24] {
            let two = [("a", Value::random(9, cols, 1)), ("b", Value::random(9, cols, 2))];
            type Build = fn(&mut Graph, &[TensorId]) -> Result<TensorId, Error>;
            type Formula = fn(f64, f64) -> f64;
            let ops: [(Build, Formula); 5] = [
                (|g, t| add(g, t[0], t[1]), |a, b| a + b),
                (|g, t| mul(g, t[0], t[1]), |a, b| a * b),
                (|g, t| scale(g, t[0], -3.0), |a, _| -3.0 * a),
                (|g, t| silu(g, t[0]), |a, _| a / (1.0 + (-a).exp())),
                (|g, t| cast(g, t[0], DType::F32), |a, _| a),
            ];
            for (i, (build, f)) in ops.into_iter().enumerate() {
                let inputs = if i < 2 { &two[..] } else { &two[..1] };
                let names: Vec<&str> = inputs.iter().map(|(name, _)| *name).collect();
                let reference = |v: &[Value]| map(v, f);
                check_op_bf16(inputs, &names, &names, |g, t| vec![build(g, t).unwrap()], reference, BF16_BOUNDS);
            }
        }
    }

    #[test]
    fn numbers_everywhere() {
        for dtype in [DType::F32, DType::BF16, DType::I32] {
            let mut case = Case::new();
            let t = fill(&mut case.graph, dtype, 5, 7, 3.0).unwrap();
            case.output("out", t);
            let check = |out: &std::collections::BTreeMap<String, Value>| assert_eq!(out["out"].data, [3.0; 35]);
            if dtype == DType::BF16 { case.run_on_gpu(check) } else { case.run_everywhere(|_, out| check(out)) }
        }
    }

    #[test]
    fn column_sums_of_many_rows() {
        let x = Value::random(1000, 37, 3);
        let reference = |v: &[Value]| {
            let sum = |c| (0..v[0].rows).map(|r| v[0].at(r, c)).sum();
            vec![Value::new(1, v[0].cols, (0..v[0].cols).map(sum).collect())]
        };
        let x = [("x", x)];
        check_op(&x, &[], |g, t| vec![column_sums(g, t[0]).unwrap()], reference, (1e-5, 0.0));
        check_op_bf16(&x, &["x"], &[], |g, t| vec![column_sums(g, t[0]).unwrap()], reference, (1e-5, 0.0));
    }

    #[test]
    fn mismatched_shapes_are_named_errors() {
        let mut case = Case::new();
        let (a, b) = (case.input("a", &Value::random(2, 3, 1)), case.input("b", &Value::random(3, 2, 1)));
        let message = add(&mut case.graph, a, b).unwrap_err().to_string();
        assert_eq!(message, "add: b must be [2, 3], but is [3, 2]");
    }
}
