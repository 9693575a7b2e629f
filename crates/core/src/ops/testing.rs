//! Helpers for the tests of ops: build a graph from values, run it at every instruction set, compare with oracle
//! files and finite differences.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use half::bf16;

use crate::cpu::Cpu;
use crate::cpu::isa::Isa;
use crate::cpu::pool::Pool;
use crate::cuda::Properties;
use crate::dtype::DType;
use crate::graph::{Layout, Recompute};
use crate::{Buffer, Device, Error, Graph, Plan, Slice, TensorId, quant, rng};

/// A matrix of test values; token ids and offsets are held as f64, too.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
    pub dtype: DType,
}

impl Value {
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Value {
        assert_eq!(data.len(), rows * cols);
        Value { rows, cols, data, dtype: DType::F32 }
    }

    /// Numbers that f32 holds exactly, roughly normal, from a seed.
    pub fn random(rows: usize, cols: usize, seed: u32) -> Value {
        let draw = |i: u64| f64::from(rng::uniform(seed, i)) - 0.5;
        let normal = |i: u64| ((0..4).map(|k| draw(4 * i + k)).sum::<f64>() * 1.7) as f32;
        Value::new(rows, cols, (0..(rows * cols) as u64).map(|i| f64::from(normal(i))).collect())
    }

    /// Numbers in [lo, hi) that f32 holds exactly.
    pub fn uniform(rows: usize, cols: usize, lo: f32, hi: f32, seed: u32) -> Value {
        let draw = |i| f64::from(rng::uniform(seed, i) * (hi - lo) + lo);
        Value::new(rows, cols, (0..(rows * cols) as u64).map(draw).collect())
    }

    pub fn ints(values: &[i32]) -> Value {
        let data = values.iter().map(|&v| f64::from(v)).collect();
        Value { dtype: DType::I32, ..Value::new(1, values.len(), data) }
    }

    /// The same numbers rounded to bf16.
    pub fn to_bf16(&self) -> Value {
        let data = self.data.iter().map(|&v| bf16::from_f32(v as f32).to_f64()).collect();
        Value { dtype: DType::BF16, ..Value::new(self.rows, self.cols, data) }
    }

    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.cols + col]
    }

    /// What is left of the numbers in Q8_0, and that type.
    pub fn to_q8_0(&self) -> Value {
        let (dtype, cols) = (DType::Q8_0, self.cols);
        let mut blocks = vec![0; dtype.row_bytes(cols)];
        let decoded = self.data.chunks(cols).flat_map(|row| {
            let mut row: Vec<f32> = row.iter().map(|&v| v as f32).collect();
            quant::encode(dtype, &row, &mut blocks);
            quant::Kind::Q8_0.decode(&blocks, &mut row);
            row.into_iter().map(f64::from)
        });
        let data = decoded.collect();
        Value { dtype, ..Value::new(self.rows, cols, data) }
    }

    /// max|self − other| / max|self|: the measure of the oracle files; a NaN counts as infinite.
    pub fn error(&self, other: &Value) -> f64 {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols), "shapes differ");
        let top = self.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let diff = |(a, b): (&f64, &f64)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() };
        let worst = self.data.iter().zip(&other.data).map(diff).fold(0.0, f64::max);
        worst / if top == 0.0 { 1.0 } else { top }
    }
}

/// What [`Case::run_everywhere`] calls the GPU.
pub const CUDA: &str = "cuda";

/// How much further from the reference results of a GPU may be in f32: its exponentials, logarithms and reciprocals are
/// those of the special function unit.
pub const CUDA_SLACK: f64 = 4.0;

/// Bounds of [`check_op_bf16`] where numbers are rounded to bf16, which has 8 bits, once; twice in gradients.
pub const BF16_BOUNDS: (f64, f64) = (4e-3, 8e-3);

/// Where kernels for GPUs run.
enum Gpu {
    /// The first GPU of the machine. One stream, which captures runs: one test at a time.
    Real(Mutex<Device>),
    /// A CPU with [`crate::cuda::emulator`].
    Emulated(Device, Properties),
}

/// What `HOGNOSE_TEST_CUDA` asks for: `emulate` runs kernels for GPUs on the CPU, `1` on a GPU, and the tests then fail
/// where there is none. With `only` (`emulate-only`) kernels for the CPU are left out.
fn gpu() -> Option<&'static Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let open = || match std::env::var("HOGNOSE_TEST_CUDA").ok()?.as_str() {
        "emulate" | "emulate-only" => {
            // The memory of a CPU is all that is used.
            let cpu = Device::Cpu(Arc::new(Cpu { pool: Pool::new(1), isa: Isa::detect() }));
            Some(Gpu::Emulated(cpu, Properties::of_arch((9, 0))))
        }
        _ => Some(Gpu::Real(Mutex::new(Device::cuda(0).expect("a GPU")))),
    };
    GPU.get_or_init(open).as_ref()
}

impl Gpu {
    /// Two runs, which must agree in every bit; emulated threads take turns in another order the second time.
    fn run(&self, case: &Case) -> BTreeMap<String, Value> {
        let [once, again] = match self {
            Gpu::Real(device) => {
                let device = device.lock().unwrap_or_else(PoisonError::into_inner);
                [(); 2].map(|()| case.run_in(&device, |graph| device.plan(graph), |p, a, b| device.run(p, a, b)))
            }
            Gpu::Emulated(cpu, gpu) => [false, true].map(|reversed| {
                case.run_in(cpu, |graph| Plan::for_gpu(graph, gpu), |p, a, b| cpu.emulate(p, gpu, a, b, reversed))
            }),
        };
        assert!(bits(&once) == bits(&again), "two runs on the GPU differ: {once:?}\n{again:?}");
        once
    }
}

/// Where tests run: every instruction set of the machine and, if the tests were asked to, its GPU.
pub fn places() -> Vec<String> {
    let only_gpu = std::env::var("HOGNOSE_TEST_CUDA").is_ok_and(|v| v.ends_with("only"));
    let levels = Isa::available().into_iter().filter(|_| !only_gpu).map(|isa| isa.to_string());
    levels.chain(gpu().map(|_| CUDA.to_string())).collect()
}

/// All bits of some results: a NaN equals itself.
fn bits(out: &BTreeMap<String, Value>) -> Vec<(&String, Vec<u64>)> {
    out.iter().map(|(name, v)| (name, v.data.iter().map(|x| x.to_bits()).collect())).collect()
}

/// Bytes behind a buffer that no kernel may change, and what they are.
const GUARD: (usize, u8) = (64, 0xA5);

/// A graph with values for its inputs.
#[derive(Default)]
pub struct Case {
    pub graph: Graph,
    values: Vec<(TensorId, Value)>,
    outputs: Vec<(String, TensorId)>,
}

impl Case {
    pub fn new() -> Case {
        Case::default()
    }

    pub fn input(&mut self, name: &str, value: &Value) -> TensorId {
        let t = self.graph.external(name, value.dtype, value.rows, value.cols);
        self.set(t, value);
        t
    }

    /// Gives an external of the graph its value.
    pub fn set(&mut self, t: TensorId, value: &Value) {
        self.values.push((t, value.clone()));
    }

    /// A matrix of weights packed into panels, in the value's type.
    pub fn packed(&mut self, name: &str, value: &Value) -> TensorId {
        let t = self.graph.external_with_layout(name, value.dtype, value.rows, value.cols, Layout::Panels);
        self.values.push((t, value.clone()));
        t
    }

    pub fn output(&mut self, name: &str, t: TensorId) {
        let dest = self.graph.output(name, t).unwrap();
        self.outputs.push((name.to_string(), dest));
    }

    /// Reads external `t` after the run, as output `name`: a state that was stored over its old value.
    pub fn watch(&mut self, name: &str, t: TensorId) {
        self.outputs.push((name.to_string(), t));
    }

    /// Runs at the best instruction set with two threads.
    pub fn run(&self) -> BTreeMap<String, Value> {
        self.run_on(Isa::detect(), 2)
    }

    /// Runs at all [`places`] and passes the name of each and the result to `check`. On a CPU the number of threads must
    /// not change a bit.
    pub fn run_everywhere(&self, mut check: impl FnMut(&str, &BTreeMap<String, Value>)) {
        for place in places() {
            if place == CUDA {
                self.run_on_gpu(|out| check(CUDA, out));
                continue;
            }
            let out = self.run_on(&place, 2);
            assert_eq!(bits(&out), bits(&self.run_on(&place, 1)), "{place}: the number of threads changes bits");
            check(&place, &out);
        }
    }

    /// Runs on the GPU, if the tests were asked to and the graph has no matrices in a CPU's layout.
    pub fn run_on_gpu(&self, mut check: impl FnMut(&BTreeMap<String, Value>)) {
        let packed = |t: &TensorId| self.graph.tensor(*t).layout == Layout::Panels;
        if self.values.iter().any(|(t, _)| packed(t)) {
            return;
        }
        if let Some(gpu) = gpu() {
            check(&gpu.run(self));
        }
    }

    /// Runs at one of the [`places`].
    pub fn run_on(&self, place: impl Display, threads: usize) -> BTreeMap<String, Value> {
        let place = place.to_string();
        if place == CUDA {
            return gpu().expect("a GPU was asked for").run(self);
        }
        let isa = Isa::available().into_iter().find(|isa| isa.to_string() == place).expect("a level of this machine");
        let device = Device::Cpu(Arc::new(Cpu { pool: Pool::new(threads), isa }));
        self.run_in(&device, |graph| device.plan(graph), |plan, arena, bindings| device.run(plan, arena, bindings))
    }

    /// Plans and runs by the two functions, in memory of the device.
    fn run_in(
        &self,
        device: &Device,
        plan: impl FnOnce(Graph) -> Result<Plan, Error>,
        run: impl FnOnce(&Plan, &Buffer, &[Slice<'_>]) -> Result<(), Error>,
    ) -> BTreeMap<String, Value> {
        let plan = plan(self.graph.clone()).unwrap();
        // Garbage shows kernels that read what they did not write, and a guard those that write where they may not.
        let guarded = |bytes: usize| {
            let buffer = device.alloc(bytes + GUARD.0).unwrap();
            buffer.fill(0xFF);
            buffer.write_bytes(bytes, &[GUARD.1; GUARD.0]);
            buffer
        };
        let arena = guarded(plan.arena_bytes());
        let buffers: Vec<_> = plan
            .graph()
            .externals()
            .iter()
            .map(|e| {
                let mut buffer = guarded(device.external_bytes(&plan, e.tensor));
                if let Some((t, value)) = self.values.iter().find(|(t, _)| *t == e.tensor) {
                    if value.dtype == DType::I32 {
                        buffer.write(0, &value.data.iter().map(|&v| v as i32).collect::<Vec<_>>());
                    } else {
                        let form = (value.dtype, plan.graph().tensor(*t).layout);
                        let values: Vec<f32> = value.data.iter().map(|&v| v as f32).collect();
                        device.write_matrix(&mut buffer, 0, form, (value.rows, value.cols), &values);
                    }
                }
                buffer
            })
            .collect();
        let bindings: Vec<Slice<'_>> = buffers.iter().map(|b| b.slice()).collect();
        run(&plan, &arena, &bindings).unwrap_or_else(|error| panic!("{error}"));
        device.synchronize().unwrap();
        for (buffer, name) in
            buffers.iter().zip(plan.graph().externals().iter().map(|e| e.name.as_str())).chain([(&arena, "the arena")])
        {
            let mut behind = [0; GUARD.0];
            buffer.read_bytes(buffer.bytes() - GUARD.0, &mut behind);
            assert_eq!(behind, [GUARD.1; GUARD.0], "something was written behind {name}");
        }
        let mut out = BTreeMap::new();
        for (name, t) in &self.outputs {
            let i = plan.graph().externals().iter().position(|e| e.tensor == *t).unwrap();
            let tensor = plan.graph().tensor(*t);
            let data = match tensor.dtype {
                DType::I32 => {
                    buffers[i].to_vec::<i32>(0, tensor.rows * tensor.cols).into_iter().map(f64::from).collect()
                }
                DType::BF16 => {
                    buffers[i].to_vec::<bf16>(0, tensor.rows * tensor.cols).into_iter().map(f64::from).collect()
                }
                _ => buffers[i].to_vec::<f32>(0, tensor.rows * tensor.cols).into_iter().map(f64::from).collect(),
            };
            out.insert(name.clone(), Value { dtype: tensor.dtype, ..Value::new(tensor.rows, tensor.cols, data) });
        }
        out
    }
}

/// Gradient of Σ seed·output with respect to each input by central differences of a reference in f64.
///
/// `reference` maps input values to output values. Steps scale with the input.
pub fn finite_differences(inputs: &[Value], seeds: &[Value], reference: impl Fn(&[Value]) -> Vec<Value>) -> Vec<Value> {
    let objective = |inputs: &[Value]| -> f64 {
        let dot = |a: &Value, b: &Value| a.data.iter().zip(&b.data).map(|(x, y)| x * y).sum::<f64>();
        reference(inputs).iter().zip(seeds).map(|(o, s)| dot(o, s)).sum()
    };
    let mut gradients = Vec::new();
    for i in 0..inputs.len() {
        let mut gradient = Value { dtype: DType::F32, ..inputs[i].clone() };
        if inputs[i].dtype == DType::I32 {
            gradient.data.fill(0.0);
            gradients.push(gradient);
            continue;
        }
        let mut shifted = inputs.to_vec();
        for e in 0..inputs[i].data.len() {
            let x = inputs[i].data[e];
            let step = 1e-5 * x.abs().max(1.0);
            shifted[i].data[e] = x + step;
            let up = objective(&shifted);
            shifted[i].data[e] = x - step;
            let down = objective(&shifted);
            shifted[i].data[e] = x;
            gradient.data[e] = (up - down) / (2.0 * step);
        }
        gradients.push(gradient);
    }
    gradients
}

/// What an op's test compares: outputs and gradients of a graph against a reference in f64.
///
/// `build` appends the op for the given inputs and returns its outputs; `reference` computes them in f64. Checks at
/// every instruction set the outputs within `bound` and the gradients of all inputs named in `differentiable` within
/// `gradient_bound`, both as max|difference| / max|expected|.
pub fn check_op(
    inputs: &[(&str, Value)],
    differentiable: &[&str],
    build: impl Fn(&mut Graph, &[TensorId]) -> Vec<TensorId>,
    reference: impl Fn(&[Value]) -> Vec<Value>,
    (bound, gradient_bound): (f64, f64),
) {
    let expected = Expected::new(inputs, differentiable, &reference);
    let case = expected.case(inputs, build);
    case.run_everywhere(|place, out| {
        let slack = if place == CUDA { CUDA_SLACK } else { 1.0 };
        expected.check(place, out, (bound * slack, gradient_bound * slack));
    });
}

/// As [`check_op`], on the GPU only and with the inputs named in `activations` in bf16: the reference gets the rounded
/// numbers, so what is left is the rounding of results and of intermediate values. Bounds are those of bf16, which
/// has 8 bits: 2⁻⁸ = 4·10⁻³ for a result that is rounded once.
pub fn check_op_bf16(
    inputs: &[(&str, Value)],
    activations: &[&str],
    differentiable: &[&str],
    build: impl Fn(&mut Graph, &[TensorId]) -> Vec<TensorId>,
    reference: impl Fn(&[Value]) -> Vec<Value>,
    bounds: (f64, f64),
) {
    if gpu().is_none() {
        return;
    }
    let rounded: Vec<(&str, Value)> =
        inputs.iter().map(|(n, v)| (*n, if activations.contains(n) { v.to_bf16() } else { v.clone() })).collect();
    let expected = Expected::new(&rounded, differentiable, &reference);
    let case = expected.case(&rounded, build);
    case.run_on_gpu(|out| expected.check("cuda in bf16", out, bounds));
}

/// What a reference gives for an op's outputs and gradients.
struct Expected<'a> {
    outputs: Vec<Value>,
    seeds: Vec<Value>,
    /// The inputs that gradients are compared of, with what they should be.
    gradients: Vec<(&'a str, usize, Value)>,
}

impl<'a> Expected<'a> {
    fn new(
        inputs: &[(&str, Value)],
        differentiable: &[&'a str],
        reference: impl Fn(&[Value]) -> Vec<Value>,
    ) -> Expected<'a> {
        let values: Vec<Value> = inputs.iter().map(|(_, v)| v.clone()).collect();
        let outputs = reference(&values);
        // Seeds that bf16 holds exactly, since the gradient of a bf16 result is bf16.
        let seed = |(i, o): (usize, &Value)| Value {
            dtype: DType::F32,
            ..Value::random(o.rows, o.cols, 1000 + i as u32).to_bf16()
        };
        let seeds: Vec<Value> = outputs.iter().enumerate().map(seed).collect();
        let mut gradients = Vec::new();
        if !differentiable.is_empty() {
            let all = finite_differences(&values, &seeds, &reference);
            for &name in differentiable {
                let i = inputs.iter().position(|(n, _)| *n == name).expect("a named input");
                gradients.push((name, i, Value { dtype: DType::F32, ..all[i].clone() }));
            }
        }
        Expected { outputs, seeds, gradients }
    }

    /// The graph that `build` records, with its gradients.
    fn case(&self, inputs: &[(&str, Value)], build: impl Fn(&mut Graph, &[TensorId]) -> Vec<TensorId>) -> Case {
        let mut case = Case::new();
        let ids: Vec<TensorId> = inputs.iter().map(|(name, v)| case.input(name, v)).collect();
        let outputs = build(&mut case.graph, &ids);
        assert_eq!(outputs.len(), self.outputs.len());
        if !self.gradients.is_empty() {
            let mut pairs = Vec::new();
            for (&output, seed) in outputs.iter().zip(&self.seeds) {
                let dtype = case.graph.dtype(output);
                pairs.push((output, case.input("seed", &Value { dtype, ..seed.clone() })));
            }
            let wrt: Vec<_> = self.gradients.iter().map(|(_, i, _)| ids[*i]).collect();
            let gradients = case.graph.backward(&pairs, &wrt, Recompute::Nothing).unwrap();
            for ((name, ..), gradient) in self.gradients.iter().zip(gradients) {
                case.output(&format!("grad.{name}"), gradient.unwrap_or_else(|| panic!("no gradient of {name}")));
            }
        }
        for (i, &t) in outputs.iter().enumerate() {
            case.output(&format!("out.{i}"), t);
        }
        case
    }

    fn check(&self, place: &str, out: &BTreeMap<String, Value>, (bound, gradient_bound): (f64, f64)) {
        for (i, expected) in self.outputs.iter().enumerate() {
            let error = expected.error(&out[&format!("out.{i}")]);
            assert!(error <= bound, "{place}: output {i} is off by {error:.2e} > {bound:.0e}");
        }
        for (name, _, expected) in &self.gradients {
            let error = expected.error(&out[&format!("grad.{name}")]);
            assert!(
                error <= gradient_bound,
                "{place}: gradient of {name} is off by {error:.2e} > {gradient_bound:.0e}"
            );
        }
    }
}

/// A tensor of an oracle file with its original shape.
pub struct OracleTensor {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

/// The tensors of an oracle file in tests/data/oracles/ops at the root of the workspace.
pub fn oracle(name: &str) -> BTreeMap<String, OracleTensor> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/oracles/ops").join(format!("{name}.safetensors"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), safetensors::Dtype::F32);
            let data =
                view.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect();
            (name, OracleTensor { shape: view.shape().to_vec(), data })
        })
        .collect()
}

impl OracleTensor {
    /// Reorders the axes, then flattens to `[rows, cols]`, where the last `col_axes` of the new axes are columns.
    pub fn permute(&self, axes: &[usize], col_axes: usize) -> Value {
        assert_eq!(axes.len(), self.shape.len());
        let shape: Vec<usize> = axes.iter().map(|&a| self.shape[a]).collect();
        let strides: Vec<usize> = axes.iter().map(|&a| self.shape[a + 1..].iter().product::<usize>()).collect();
        let mut data = Vec::with_capacity(self.data.len());
        let mut index = vec![0usize; shape.len()];
        for _ in 0..self.data.len() {
            data.push(self.data[index.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>()]);
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                if index[axis] < shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        let cols: usize = shape[shape.len() - col_axes..].iter().product();
        Value::new(data.len() / cols.max(1), cols, data)
    }
}
