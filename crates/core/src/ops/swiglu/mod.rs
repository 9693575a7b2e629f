//! The gate of a gated MLP: x = (y, gate) → y ⊙ silu(gate).
//!
//! x is `[T, 2h]` with y in the first half of the columns, as the first projection of the official gated MLP makes it;
//! the result is `[T, h]`. (Shazeer 2020, "GLU variants improve Transformer", arXiv 2002.05202.) The gradient of y is
//! d ⊙ silu(gate), that of the gate d ⊙ y ⊙ silu'(gate). Elementwise, so memory traffic bounds it.

mod cuda;

use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::math;
use crate::cpu::simd::Simd;
use crate::cuda::Launcher;
use crate::error::Error;
use crate::graph::{Graph, Io, Mat, Node, Op, TensorId};
use crate::ops::ssd::lanes::{load, store};

const NAME: &str = "swiglu";

/// Elements that one task handles, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;
/// Arithmetic of silu and of its derivative beside it, about, in operations per element.
const FLOPS: f64 = 20.0;

/// Appends y ⊙ silu(gate) for x = (y, gate): `[T, 2h]` → `[T, h]`.
///
/// # Errors
/// `x` holds no floating-point numbers, or has an odd number of columns.
pub fn swiglu(g: &mut Graph, x: TensorId) -> Result<TensorId, Error> {
    let dtype = g.expect_float(NAME, "x", x)?;
    let cols = g.cols(x);
    if !cols.is_multiple_of(2) {
        let expected = "an even number: as many values as gates".into();
        return Err(Error::Shape { op: NAME, what: "the width of x", expected, found: cols.to_string() });
    }
    let out = g.new_tensor(dtype, g.rows(x), cols / 2);
    g.push(Swiglu, vec![Some(x)], vec![Some(out)]);
    Ok(out)
}

#[derive(Debug)]
struct Swiglu;

impl Op for Swiglu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn is_cheap(&self, _: &Graph, _: &Node) -> bool {
        true
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let (Some(d), x) = (d_outputs[0], node.input(0)) else { return Ok(vec![None]) };
        let dx = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
        g.push(SwigluGrad, vec![Some(x), Some(d)], vec![Some(dx)]);
        Ok(vec![Some(dx)])
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        FLOPS * (g.rows(node.input(0)) * g.cols(node.input(0))) as f64 / 2.0
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        rows(io.input(0), None, io.output(0), cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(launcher, io.input(0), None, io.output(0))
    }
}

#[derive(Debug)]
struct SwigluGrad;

impl Op for SwigluGrad {
    fn name(&self) -> &'static str {
        "swiglu_grad"
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        FLOPS * (g.rows(node.input(0)) * g.cols(node.input(0))) as f64 / 2.0
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        rows(io.input(0), Some(io.input(1)), io.output(0), cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(launcher, io.input(0), Some(io.input(1)), io.output(0))
    }
}

/// The op, or with `d` its gradient, over all rows.
fn rows(x: Mat, d: Option<Mat>, out: Mat, cpu: &Cpu) {
    let width = x.cols / 2;
    cpu.pool.chunks(x.rows, (ELEMENTS_PER_TASK / width.max(1)).max(1), |rows| {
        for r in rows {
            // SAFETY: row r exists in all operands, inputs do not change, and this task alone writes row r.
            unsafe {
                let d = d.map(|d| d.at::<f32>(r, 0).cast_const());
                let (x, out) = (x.at(r, 0), out.at(r, 0));
                cpu.isa.run(Row { width, x, d, out });
            }
        }
    });
}

/// One row: 2 · `width` values of x; of the result `width`, or of the gradient 2 · `width`.
struct Row {
    width: usize,
    x: *const f32,
    d: Option<*const f32>,
    out: *mut f32,
}

impl Kernel for Row {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in (0..self.width).step_by(S::LANES) {
            let n = self.width - i;
            // SAFETY: column i lies in the first half of the row, width + i in the second.
            unsafe {
                let (y, gate) = (load(s, self.x.add(i), n), load(s, self.x.add(self.width + i), n));
                match self.d {
                    None => store(s, self.out.add(i), s.mul(y, math::silu(s, gate)), n),
                    Some(d) => {
                        let d = load(s, d.add(i), n);
                        store(s, self.out.add(i), s.mul(d, math::silu(s, gate)), n);
                        let slope = math::dsilu(s, gate);
                        store(s, self.out.add(self.width + i), s.mul(s.mul(d, y), slope), n);
                    }
                }
            }
        }
    }
}

/// y ⊙ silu(gate) in f64 for one row x = (y, gate).
pub fn reference(x: &[f64]) -> Vec<f64> {
    let (y, gate) = x.split_at(x.len() / 2);
    y.iter().zip(gate).map(|(y, gate)| y * gate / (1.0 + (-gate).exp())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::layout::split;
    use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};

    /// Bounds on max|difference| / max|expected| against f64.
    const BOUND: f64 = 1e-6;

    fn expected(x: &Value) -> Vec<Value> {
        let data = x.data.chunks(x.cols).flat_map(reference).collect();
        vec![Value::new(x.rows, x.cols / 2, data)]
    }

    #[test]
    fn values_and_gradients() {
        for (rows, width) in [(5, 1), (3, 16), (40, 37), (1, 64)] {
            let x = Value::random(rows, 2 * width, 1);
            let build = |g: &mut Graph, t: &[TensorId]| vec![swiglu(g, t[0]).unwrap()];
            let x = [("x", x)];
            check_op(&x, &["x"], build, |v| expected(&v[0]), (BOUND, BOUND));
            check_op_bf16(&x, &["x"], &["x"], build, |v| expected(&v[0]), BF16_BOUNDS);
        }
    }

    #[test]
    fn columns_of_a_wider_tensor() {
        let x = Value::random(6, 25, 2);
        let middle: Vec<f64> = (0..6).flat_map(|r| x.data[r * 25 + 3..r * 25 + 21].to_vec()).collect();
        let mut case = Case::new();
        let input = case.input("x", &x);
        let parts = split(&mut case.graph, input, &[3, 18, 4]).unwrap();
        let y = swiglu(&mut case.graph, parts[1]).unwrap();
        case.output("y", y);
        case.run_everywhere(|isa, out| {
            let error = expected(&Value::new(6, 18, middle.clone()))[0].error(&out["y"]);
            assert!(error <= BOUND, "{isa}: {error:.2e}");
        });
    }

    #[test]
    fn an_odd_width_is_an_error() {
        let mut case = Case::new();
        let x = case.input("x", &Value::random(2, 3, 1));
        let message = swiglu(&mut case.graph, x).unwrap_err().to_string();
        assert_eq!(message, "swiglu: the width of x must be an even number: as many values as gates, but is 3");
    }
}
