//! The graph: a list of ops over tensors, recorded for given shapes.
//!
//! A model is a function that appends nodes; [`Graph::backward`] appends the gradient ops to the same list;
//! [`crate::Plan`] gives every tensor its place. Tensors are two-dimensional: vectors are `[1, n]`, scalars `[1, 1]`,
//! a depthwise convolution's weight `[channels, width]`, states `[segments, elements]`.

mod backward;
mod hoist;
mod io;

pub use backward::Recompute;
pub use io::{Io, Mat};

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::cpu::Cpu;
use crate::cuda::{Launcher, Properties};
use crate::dtype::DType;
use crate::error::Error;

/// Names a tensor of one graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub(crate) u32);

impl TensorId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a tensor's elements live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the arena, for its lifetime: the plan decides where.
    Arena,
    /// In memory that the caller binds at run time: parameters, gradients, states, inputs, outputs.
    External(usize),
    /// Columns `col ..` of another tensor with the same rows.
    View { of: TensorId, col: usize },
}

/// How the elements of a tensor are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Layout {
    /// Row-major, rows one after another.
    #[default]
    Rows,
    /// A matrix of weights packed into panels for the matrix product (see [`crate::cpu::gemm`]).
    Panels,
}

/// What is known of a tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Number of rows: tokens of an activation, 1 of a vector.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Type of the elements.
    pub dtype: DType,
    /// How the elements are arranged.
    pub layout: Layout,
    /// Where they live.
    pub place: Place,
}

impl Tensor {
    /// Bytes of its elements.
    pub fn bytes(&self) -> usize {
        self.rows * self.dtype.row_bytes(self.cols)
    }
}

/// Memory that the caller binds when the graph runs.
#[derive(Clone, Debug)]
pub struct External {
    /// What the caller binds it by.
    pub name: String,
    /// The tensor that reads and writes this memory.
    pub tensor: TensorId,
}

/// Work and traffic of an op, for utilisation figures and ceilings.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts as two.
    pub flops: f64,
    /// Bytes read and written, each tensor once.
    pub bytes: f64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

/// One operation: what it computes, its gradient and how it runs on each device.
pub trait Op: Debug + Send + Sync {
    /// The op's name in messages and profiles.
    fn name(&self) -> &'static str;

    /// Appends the gradient ops.
    ///
    /// `d_outputs[i]` is the gradient of output `i`, `None` where nothing flows back; `wanted[j]` says whether the
    /// gradient of input `j` is asked for. Returns one gradient per input, `None` where there is none.
    ///
    /// By default there is none: ops that make gradients have no second derivatives.
    fn backward(
        &self,
        _graph: &mut Graph,
        _node: &Node,
        _d_outputs: &[Option<TensorId>],
        _wanted: &[bool],
    ) -> Result<Vec<Option<TensorId>>, Error> {
        Err(Error::Unsupported { op: self.name(), message: "its gradient is not implemented".into() })
    }

    /// The number that all elements of the op's output equal, if that is known while recording.
    fn constant(&self) -> Option<f32> {
        None
    }

    /// Whether computing the op again costs little beside the memory of its result, given inputs that are kept anyway.
    fn is_cheap(&self, _graph: &Graph, _node: &Node) -> bool {
        false
    }

    /// The input whose value the op adds to its first output, if it can: sums of gradients then need no pass of their own.
    fn start_input(&self) -> Option<usize> {
        None
    }

    /// Scratch bytes needed while the op runs on the CPU. Must not depend on the number of threads where results do.
    fn workspace(&self, _graph: &Graph, _node: &Node, _cpu: &Cpu) -> usize {
        0
    }

    /// Scratch bytes needed while the op runs on a GPU with these properties.
    fn workspace_cuda(&self, _graph: &Graph, _node: &Node, _gpu: &Properties) -> usize {
        0
    }

    /// The input that the CPU reads as bf16 or in blocks although activations are f32 there: a weight.
    fn narrow_weight(&self) -> Option<usize> {
        None
    }

    /// Floating-point operations of one run.
    fn flops(&self, _graph: &Graph, _node: &Node) -> f64 {
        0.0
    }

    /// Whether the op only arranges storage (split, concat): the plan places its tensors and nothing runs.
    fn is_placement(&self) -> bool {
        false
    }

    /// Runs on the CPU. Shapes and types were checked when the node was recorded. An output that nobody reads is
    /// `None` and need not be computed.
    fn run_cpu(&self, io: &Io<'_>, cpu: &Cpu);

    /// Writes down the kernels that run it on a GPU: their number and sizes depend on shapes alone, since they are
    /// captured into a graph and replayed. Addresses in `io` are the device's and are not read here.
    ///
    /// By default there are none.
    fn run_cuda(&self, _io: &Io<'_>, _launcher: &mut Launcher<'_>) -> Result<(), Error> {
        Err(Error::Unsupported { op: self.name(), message: "there is no kernel for GPUs".into() })
    }
}

/// A recorded operation with its operands.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it computes.
    pub op: Arc<dyn Op>,
    /// Operands by place; `None` where an optional one is left out.
    pub inputs: Vec<Option<TensorId>>,
    /// Results by place; `None` where the op has none there.
    pub outputs: Vec<Option<TensorId>>,
}

impl Node {
    /// Input `i`, which the op's builder always sets.
    pub fn input(&self, i: usize) -> TensorId {
        self.inputs[i].expect("the builder of the op sets this input")
    }

    /// Output `i`, which the op's builder always sets.
    pub fn output(&self, i: usize) -> TensorId {
        self.outputs[i].expect("the builder of the op sets this output")
    }
}

/// A list of ops over tensors of known shapes.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) externals: Vec<External>,
    /// Node ranges that may be recomputed as a whole: a model's layers.
    pub(crate) regions: Vec<Range<usize>>,
    open_region: Option<usize>,
    rounds_products: bool,
}

impl Graph {
    /// A graph without ops.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// Products with row-major f32 weights that are recorded from now on round both operands to bf16 on a CPU, here and
    /// for their gradients; sums and results stay f32. GPUs, which take bf16 activations, do not look at it.
    pub fn round_products(&mut self) {
        self.rounds_products = true;
    }

    /// Whether [`Graph::round_products`] was called.
    pub fn rounds_products(&self) -> bool {
        self.rounds_products
    }

    /// What is known of a tensor.
    pub fn tensor(&self, t: TensorId) -> &Tensor {
        &self.tensors[t.index()]
    }

    /// Rows of a tensor.
    pub fn rows(&self, t: TensorId) -> usize {
        self.tensor(t).rows
    }

    /// Columns of a tensor.
    pub fn cols(&self, t: TensorId) -> usize {
        self.tensor(t).cols
    }

    /// Element type of a tensor.
    pub fn dtype(&self, t: TensorId) -> DType {
        self.tensor(t).dtype
    }

    /// The ops in the order in which they were recorded.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The tensors that the caller binds, in the order of the bindings of [`crate::Device::run`].
    pub fn externals(&self) -> &[External] {
        &self.externals
    }

    fn add_tensor(&mut self, tensor: Tensor) -> TensorId {
        let id = TensorId(u32::try_from(self.tensors.len()).expect("fewer than 2^32 tensors"));
        self.tensors.push(tensor);
        id
    }

    /// A tensor that an op produces.
    pub fn new_tensor(&mut self, dtype: DType, rows: usize, cols: usize) -> TensorId {
        self.add_tensor(Tensor { rows, cols, dtype, layout: Layout::Rows, place: Place::Arena })
    }

    /// A tensor in memory that the caller binds by `name` when the graph runs.
    pub fn external(&mut self, name: impl Into<String>, dtype: DType, rows: usize, cols: usize) -> TensorId {
        self.external_with_layout(name, dtype, rows, cols, Layout::Rows)
    }

    /// An external tensor whose elements are arranged as `layout`.
    pub fn external_with_layout(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        rows: usize,
        cols: usize,
        layout: Layout,
    ) -> TensorId {
        let place = Place::External(self.externals.len());
        let tensor = self.add_tensor(Tensor { rows, cols, dtype, layout, place });
        self.externals.push(External { name: name.into(), tensor });
        tensor
    }

    /// Appends an op. Its builder has checked shapes and types and created the outputs.
    pub fn push(&mut self, op: impl Op + 'static, inputs: Vec<Option<TensorId>>, outputs: Vec<Option<TensorId>>) {
        self.nodes.push(Node { op: Arc::new(op), inputs, outputs });
    }

    /// A tensor that is columns `col .. col + cols` of `of`: no copy.
    pub(crate) fn view(&mut self, of: TensorId, col: usize, cols: usize) -> TensorId {
        let Tensor { rows, dtype, layout, .. } = *self.tensor(of);
        self.add_tensor(Tensor { rows, cols, dtype, layout, place: Place::View { of, col } })
    }

    /// A tensor for the new value of the external `t`, stored over the old one: the output of an op that updates it in
    /// place and reads the old value as an input. The plan refuses a graph in which a later op still reads the old value.
    pub fn in_place(&mut self, t: TensorId) -> Result<TensorId, Error> {
        if !matches!(self.tensor(t).place, Place::External(_)) {
            let message = "only external tensors can be updated in place".into();
            return Err(Error::Unsupported { op: "in_place", message });
        }
        Ok(self.view(t, 0, self.cols(t)))
    }

    /// Stores `t` in columns `col ..` of `dest` without a copy, if the tensor's storage is still free to choose.
    ///
    /// It is free if an op produces it into the arena and it was not placed before. Returns whether it was placed.
    pub(crate) fn try_place(&mut self, t: TensorId, dest: TensorId, col: usize) -> bool {
        let (a, b) = (self.tensor(t), self.tensor(dest));
        let free = a.place == Place::Arena && a.dtype == b.dtype && a.rows == b.rows && col + a.cols <= b.cols;
        if free {
            self.tensors[t.index()].place = Place::View { of: dest, col };
        }
        free
    }

    /// Makes the value of `t` end up in `dest` (an external of the same shape): by placement where possible, else by
    /// a copy.
    ///
    /// Placing a final state over the initial state that it replaces is allowed: the plan refuses a graph in which a
    /// later op still reads the old value.
    ///
    /// Returns the value as it stands in `dest`: what an op reads that comes after the store.
    ///
    /// # Errors
    /// Another shape or type.
    pub fn store(&mut self, t: TensorId, dest: TensorId) -> Result<TensorId, Error> {
        let (a, b) = (self.tensor(t), self.tensor(dest));
        if (a.rows, a.cols, a.dtype) != (b.rows, b.cols, b.dtype) {
            return Err(Error::Shape {
                op: "store",
                what: "the destination",
                expected: format!("[{}, {}] {}", a.rows, a.cols, a.dtype),
                found: format!("[{}, {}] {}", b.rows, b.cols, b.dtype),
            });
        }
        if self.try_place(t, dest, 0) {
            return Ok(t);
        }
        Ok(crate::ops::layout::copy_into(self, t, dest))
    }

    /// Declares `t` an output named `name` that the caller binds and reads after the run.
    pub fn output(&mut self, name: impl Into<String>, t: TensorId) -> Result<TensorId, Error> {
        let Tensor { rows, cols, dtype, .. } = *self.tensor(t);
        let dest = self.external(name, dtype, rows, cols);
        self.store(t, dest)?;
        Ok(dest)
    }

    /// Starts a range of nodes (a layer) that the backward transformation may recompute instead of keeping.
    pub fn begin_region(&mut self) {
        self.end_region();
        self.open_region = Some(self.nodes.len());
    }

    /// Ends the range that [`Graph::begin_region`] started.
    pub fn end_region(&mut self) {
        if let Some(start) = self.open_region.take() {
            self.regions.push(start..self.nodes.len());
        }
    }

    /// The number that all elements of `t` equal, if an op gives a known constant.
    pub fn constant(&self, t: TensorId) -> Option<f32> {
        self.nodes.iter().rev().find(|n| n.outputs.contains(&Some(t)))?.op.constant()
    }

    /// The tensor whose storage `t` lives in (itself, if it is no view) and the column where it starts.
    pub(crate) fn root(&self, t: TensorId) -> (TensorId, usize) {
        let (mut t, mut start) = (t, 0);
        while let Place::View { of, col } = self.tensor(t).place {
            t = of;
            start += col;
        }
        (t, start)
    }

    /// Work and traffic of a node: each operand read or written once.
    pub fn cost(&self, node: &Node) -> Cost {
        if node.op.is_placement() {
            return Cost::default();
        }
        let operands = node.inputs.iter().chain(&node.outputs).flatten();
        let bytes = operands.map(|&t| self.tensor(t).bytes() as f64).sum();
        Cost { flops: node.op.flops(self, node), bytes }
    }
}

/// Checks of shapes and types that every op's builder uses; each names the op and the operand.
impl Graph {
    /// `t` must be `[rows, cols]`; `None` accepts any number.
    pub fn expect_shape(
        &self,
        op: &'static str,
        what: &'static str,
        t: TensorId,
        rows: Option<usize>,
        cols: Option<usize>,
    ) -> Result<(), Error> {
        let found = self.tensor(t);
        if rows.is_some_and(|r| r != found.rows) || cols.is_some_and(|c| c != found.cols) {
            let show = |n: Option<usize>| n.map_or("any".to_string(), |n| n.to_string());
            return Err(Error::Shape {
                op,
                what,
                expected: format!("[{}, {}]", show(rows), show(cols)),
                found: format!("[{}, {}]", found.rows, found.cols),
            });
        }
        Ok(())
    }

    /// `t` must hold elements of type `dtype`.
    pub fn expect_dtype(&self, op: &'static str, what: &'static str, t: TensorId, dtype: DType) -> Result<(), Error> {
        let found = self.dtype(t);
        if found != dtype {
            return Err(Error::Type { op, what, expected: dtype, found });
        }
        Ok(())
    }

    /// `t` must hold floating-point numbers; returns their type. bf16 activations are for GPUs: the plan of a CPU
    /// refuses them.
    pub fn expect_float(&self, op: &'static str, what: &'static str, t: TensorId) -> Result<DType, Error> {
        match self.dtype(t) {
            float @ (DType::F32 | DType::BF16) => Ok(float),
            found => Err(Error::Type { op, what, expected: DType::F32, found }),
        }
    }

    /// `t` must be of this type and `[rows, cols]`.
    pub fn expect(
        &self,
        op: &'static str,
        what: &'static str,
        t: TensorId,
        dtype: DType,
        rows: Option<usize>,
        cols: Option<usize>,
    ) -> Result<(), Error> {
        self.expect_dtype(op, what, t, dtype)?;
        self.expect_shape(op, what, t, rows, cols)
    }

    /// `t` must be f32 and `[rows, cols]`.
    pub fn expect_f32(
        &self,
        op: &'static str,
        what: &'static str,
        t: TensorId,
        rows: Option<usize>,
        cols: Option<usize>,
    ) -> Result<(), Error> {
        self.expect_dtype(op, what, t, DType::F32)?;
        self.expect_shape(op, what, t, rows, cols)
    }

    /// `t` must be the i32 offsets `[1, segments + 1]` of a pack; returns the number of segments.
    pub fn expect_segments(&self, op: &'static str, t: TensorId) -> Result<usize, Error> {
        self.expect_dtype(op, "the segment offsets", t, DType::I32)?;
        self.expect_shape(op, "the segment offsets", t, Some(1), None)?;
        match self.cols(t) {
            0 => Err(Error::Pack("segment offsets must hold at least the offset 0".into())),
            n => Ok(n - 1),
        }
    }
}
