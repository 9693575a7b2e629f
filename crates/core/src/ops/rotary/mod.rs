//! Rotary positions: pairs of a head's numbers turn by an angle that grows with the position (Su et al., RoFormer, arXiv
//! 2104.09864), so that products of queries and keys depend on their distance.
//!
//! ```text
//! (x[i], x[i + R/2]) turns by position · base^(−2i/R),   i = 0 .. R/2 − 1
//! ```
//!
//! in every head of P numbers, of which those from R on stay as they are. The pairing is that of GPT-NeoX and Llama.
//! Angles are computed in f64, so positions of millions are as exact as small ones. The gradient turns back.

mod cuda;

use crate::cpu::Cpu;
use crate::cuda::Launcher;
use crate::error::Error;
use crate::graph::{Graph, Io, Node, Op, TensorId};
use crate::ops::attention::{POSITION, position};
use crate::ops::tasks::Segments;

const NAME: &str = "rotary";
/// Rows that one task turns.
const ROWS_PER_TASK: usize = 32;

/// Operands and options of [`rotary`].
#[derive(Clone, Copy, Debug)]
pub struct Rotary {
    /// `[T, heads · P]`.
    pub x: TensorId,
    /// Numbers of a head, P.
    pub headdim: usize,
    /// Those that turn, R: even, at most P.
    pub dims: usize,
    /// The slowest angle is about 1/base.
    pub base: f32,
    /// Tokens before the first of each segment, as [`crate::ops::attention`] leaves them `[S, 2]`; 0 if not given.
    pub position: Option<TensorId>,
    /// The segment offsets of the pack, i32 `[1, S + 1]`.
    pub segments: TensorId,
}

/// Appends the turned x.
///
/// # Errors
/// x that holds no floating-point numbers, or of parts of heads; an odd R, or one above P; a base that is not above 1.
pub fn rotary(g: &mut Graph, r: Rotary) -> Result<TensorId, Error> {
    g.expect_float(NAME, "x", r.x)?;
    let unsupported = |message: String| Err(Error::Unsupported { op: NAME, message });
    if r.headdim == 0 || !g.cols(r.x).is_multiple_of(r.headdim) {
        return unsupported(format!("the {} columns of x are no multiple of heads of {}", g.cols(r.x), r.headdim));
    }
    if !r.dims.is_multiple_of(2) || r.dims > r.headdim {
        let (dims, headdim) = (r.dims, r.headdim);
        return unsupported(format!("{dims} numbers of a head of {headdim} turn; expected an even number up to that"));
    }
    if !(r.base > 1.0 && r.base.is_finite()) {
        return unsupported(format!("the base is {}; expected a number above 1, such as 10000", r.base));
    }
    let segments = g.expect_segments(NAME, r.segments)?;
    if let Some(position) = r.position {
        g.expect_f32(NAME, "the position", position, Some(segments), Some(POSITION))?;
    }
    let op = Turn { headdim: r.headdim, dims: r.dims, base: r.base, back: false };
    Ok(op.push(g, r.x, r.segments, r.position))
}

#[derive(Clone, Copy, Debug)]
struct Turn {
    headdim: usize,
    dims: usize,
    base: f32,
    back: bool,
}

impl Turn {
    fn push(self, g: &mut Graph, x: TensorId, segments: TensorId, position: Option<TensorId>) -> TensorId {
        let y = g.new_tensor(g.dtype(x), g.rows(x), g.cols(x));
        g.push(self, vec![Some(x), Some(segments), position], vec![Some(y)]);
        y
    }
}

impl Op for Turn {
    fn name(&self) -> &'static str {
        if self.back { "rotary_grad" } else { NAME }
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
        let back = Turn { back: !self.back, ..*self };
        Ok(vec![d_outputs[0].map(|dy| back.push(g, dy, node.input(1), node.inputs[2])), None, None])
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (3 * g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        cuda::run(self, io, launcher)
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        let (x, y, positions) = (io.input(0), io.output(0), io.optional_input(2));
        let segments = Segments::new(io.segments(1), x.rows);
        let sign = if self.back { -1.0 } else { 1.0 };
        cpu.pool.chunks(x.rows, ROWS_PER_TASK, |rows| {
            for row in rows {
                // SAFETY: this task alone writes the row, inputs do not change, and the builder checked the positions.
                let (from, to) = unsafe { (x.row::<f32>(row), y.row_mut::<f32>(row)) };
                let Some(segment) = segments.of(row) else {
                    to.fill(0.0);
                    continue;
                };
                // SAFETY: as above.
                let start = unsafe { position(positions, segment) };
                let at = sign * (start + (row - segments.rows(segment).start) as u64) as f64;
                to.copy_from_slice(from);
                for i in 0..self.dims / 2 {
                    let (sin, cos) = angle(at, i, self.dims, self.base).sin_cos();
                    let (sin, cos) = (sin as f32, cos as f32);
                    for head in (0..to.len()).step_by(self.headdim) {
                        let (a, b) = (from[head + i], from[head + i + self.dims / 2]);
                        to[head + i] = a * cos - b * sin;
                        to[head + i + self.dims / 2] = b * cos + a * sin;
                    }
                }
            }
        });
    }
}

/// The angle of pair `i` at a position.
fn angle(position: f64, i: usize, dims: usize, base: f32) -> f64 {
    position * f64::from(base).powf(-2.0 * i as f64 / dims as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{BF16_BOUNDS, Case, Value, check_op, check_op_bf16};

    /// Results are rounded twice.
    const BOUND: (f64, f64) = (3e-7, 3e-7);

    /// Rows at these positions, turned.
    fn expected(x: &Value, positions: &[f64], headdim: usize, dims: usize) -> Value {
        let mut y = x.clone();
        for (row, position) in positions.iter().enumerate() {
            for head in (0..x.cols).step_by(headdim) {
                for i in 0..dims / 2 {
                    let (sin, cos) = angle(*position, i, dims, 100.0).sin_cos();
                    let (a, b) = (x.at(row, head + i), x.at(row, head + i + dims / 2));
                    y.data[row * x.cols + head + i] = a * cos - b * sin;
                    y.data[row * x.cols + head + i + dims / 2] = b * cos + a * sin;
                }
            }
        }
        y
    }

    fn build(g: &mut Graph, t: &[TensorId], headdim: usize, dims: usize) -> TensorId {
        let (x, segments, position) = (t[0], t[1], t.get(2).copied());
        rotary(g, Rotary { x, headdim, dims, base: 100.0, position, segments }).unwrap()
    }

    #[test]
    fn values_and_gradients() {
        for (headdim, dims) in [(4, 4), (5, 2), (6, 0), (16, 16)] {
            let inputs = [
                ("x", Value::random(7, 2 * headdim, 1)),
                ("segments", Value::ints(&[0, 4, 4, 7])),
                // 3, 0 and 2²¹ + 5 tokens before.
                ("position", Value::new(3, 2, vec![3.0, 0.0, 0.0, 0.0, 5.0, 2.0])),
            ];
            let far = (1 << 21) as f64 + 5.0;
            let positions = [3.0, 4.0, 5.0, 6.0, far, far + 1.0, far + 2.0];
            let reference = |v: &[Value]| vec![expected(&v[0], &positions, headdim, dims)];
            let op = |g: &mut Graph, t: &[TensorId]| vec![build(g, t, headdim, dims)];
            check_op(&inputs, &["x"], op, reference, BOUND);
            check_op_bf16(&inputs, &["x"], &["x"], op, reference, BF16_BOUNDS);
        }
    }

    #[test]
    fn impossible_sizes_are_named() {
        let mut case = Case::new();
        let (x, segments) = (case.input("x", &Value::random(2, 12, 1)), case.input("s", &Value::ints(&[0, 2])));
        let good = Rotary { x, headdim: 6, dims: 4, base: 100.0, position: None, segments };
        for (bad, words) in [
            (Rotary { dims: 3, ..good }, "3 numbers of a head of 6"),
            (Rotary { dims: 8, ..good }, "8 numbers"),
            (Rotary { headdim: 5, ..good }, "12 columns"),
            (Rotary { headdim: 0, ..good }, "heads of 0"),
            (Rotary { base: f32::NAN, ..good }, "base is NaN"),
        ] {
            let error = rotary(&mut case.graph, bad).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
