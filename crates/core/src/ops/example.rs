//! The worked example of `docs/adding-an-op.md`, which quotes this file. The op exists in tests only.

use std::ops::Range;

use crate::cpu::Cpu;
use crate::cpu::isa::Kernel;
use crate::cpu::simd::Simd;
use crate::cuda::{self, Launcher, Program};
use crate::dtype::DType;
use crate::error::Error;
use crate::graph::{Graph, Io, Mat, Node, Op, TensorId};
use crate::ops::elementwise::cuda::vector;
use crate::ops::testing::{Value, check_op};
use crate::ops::vectors::{each, load, store};

/// Elements that one task handles, about.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// y = max(x, 0)² for x [rows, cols] f32 (So et al., "Primer", 2021).
///
/// # Errors
/// x is not f32.
pub fn squared_relu(g: &mut Graph, x: TensorId) -> Result<TensorId, Error> {
    g.expect_dtype("squared_relu", "x", x, DType::F32)?;
    let y = g.new_tensor(DType::F32, g.rows(x), g.cols(x));
    g.push(SquaredRelu, vec![Some(x)], vec![Some(y)]);
    Ok(y)
}

#[derive(Debug)]
struct SquaredRelu;

impl Op for SquaredRelu {
    fn name(&self) -> &'static str {
        "squared_relu"
    }

    fn backward(
        &self,
        g: &mut Graph,
        node: &Node,
        d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        let Some(dy) = d_outputs[0] else { return Ok(vec![None]) };
        let x = node.input(0);
        let dx = g.new_tensor(DType::F32, g.rows(x), g.cols(x));
        g.push(SquaredReluGrad, vec![Some(x), Some(dy)], vec![Some(dx)]);
        Ok(vec![Some(dx)])
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (2 * g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        run(io.input(0), None, io.output(0), cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        launch(io.input(0), None, io.output(0), launcher)
    }
}

/// dx = dy · 2 max(x, 0).
#[derive(Debug)]
struct SquaredReluGrad;

impl Op for SquaredReluGrad {
    fn name(&self) -> &'static str {
        "squared_relu_grad"
    }

    fn flops(&self, g: &Graph, node: &Node) -> f64 {
        (3 * g.rows(node.input(0)) * g.cols(node.input(0))) as f64
    }

    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu) {
        run(io.input(0), Some(io.input(1)), io.output(0), cpu);
    }

    fn run_cuda(&self, io: &Io<'_>, launcher: &mut Launcher<'_>) -> Result<(), Error> {
        launch(io.input(0), Some(io.input(1)), io.output(0), launcher)
    }
}

fn run(x: Mat, dy: Option<Mat>, out: Mat, cpu: &Cpu) {
    let rows_per_task = (ELEMENTS_PER_TASK / x.cols.max(1)).max(1);
    cpu.pool.chunks(x.rows, rows_per_task, |rows| cpu.isa.run(Rows { x, dy, out, rows }));
}

/// Some rows of the op, or of its gradient where there is a dy.
struct Rows {
    x: Mat,
    dy: Option<Mat>,
    out: Mat,
    rows: Range<usize>,
}

impl Kernel for Rows {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in self.rows {
            // SAFETY: row r lies in all operands, this task alone writes row r of the output, and inputs do not
            // change. Only the columns that exist are touched.
            unsafe {
                let (x, out) = (self.x.at::<f32>(r, 0), self.out.at::<f32>(r, 0));
                let dy = self.dy.map(|dy| dy.at::<f32>(r, 0));
                each(s, self.x.cols, |i, lanes| {
                    let positive = s.max(load(s, x.add(i), lanes), s.zero());
                    let value = match dy {
                        None => s.mul(positive, positive),
                        Some(dy) => s.mul(load(s, dy.add(i), lanes), s.add(positive, positive)),
                    };
                    store(s, out.add(i), value, lanes);
                });
            }
        }
    }
}

static PROGRAM: Program = Program { name: "squared_relu", source: include_str!("example.cu") };

fn launch(x: Mat, dy: Option<Mat>, out: Mat, launcher: &mut Launcher<'_>) -> Result<(), Error> {
    let mats: Vec<Mat> = [Some(x), dy, Some(out)].into_iter().flatten().collect();
    let v = vector(&mats);
    launcher.launch(
        cuda::Kernel::new(&PROGRAM, "squared_relu")
            .define("V", v)
            .grid((x.rows * (x.cols / v)).div_ceil(256), 1, 1)
            .threads(256)
            .args([x.into(), dy.into(), out.into(), x.rows.into(), x.cols.into()]),
    )
}

/// Bounds of the values and of the gradients, as max|difference| / max|expected|.
const BOUND: (f64, f64) = (2e-7, 1e-6);

#[test]
fn values_and_gradients() {
    for (rows, cols) in [(1, 1), (5, 19), (700, 48)] {
        check_op(
            &[("x", Value::random(rows, cols, 1))],
            &["x"],
            |g, t| vec![squared_relu(g, t[0]).unwrap()],
            |v| vec![Value::new(rows, cols, v[0].data.iter().map(|x| x.max(0.0).powi(2)).collect())],
            BOUND,
        );
    }
}

#[test]
fn the_guide_quotes_these_files() {
    let guide = include_str!("../../../../docs/adding-an-op.md");
    for (language, file) in [("rust", include_str!("example.rs")), ("cuda", include_str!("example.cu"))] {
        let start = format!("```{language}\n");
        let quotes: Vec<&str> = guide.split(&start).skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert!(!quotes.is_empty());
        for quote in quotes {
            assert!(file.contains(quote), "docs/adding-an-op.md quotes what is not there:\n{quote}");
        }
    }
}
