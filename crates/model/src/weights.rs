//! A model's parameters in the memory of a device, in one buffer.

use std::collections::BTreeMap;
use std::sync::Arc;

use hognose_core::graph::Layout;
use hognose_core::ops::step_linear;
use hognose_core::{Buffer, DType, Device, Slice, quant};

use crate::checkpoint::{Checkpoint, Dtype, TensorInfo};
use crate::config::{ModelConfig, ParamKind, ParamSpec};
use crate::error::Error;
use crate::init;

/// Alignment of every tensor inside the buffer, in bytes.
const ALIGNMENT: usize = 64;
/// Values of a tensor that go into the fingerprint.
const FINGERPRINT_SAMPLES: usize = 1024;
/// Numbers of a tensor that are in memory as f32 at a time while it is loaded, about.
const PIECE: usize = 1 << 18;

/// How parameters lie in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// f32 and row-major, as the optimizer updates them. With bf16 there is a copy of them rounded to bf16, which
    /// matrix products read; activations are bf16 then.
    Training(DType),
    /// f32 and row-major as well, but matrix products round both operands to bf16: training in bf16 on a CPU, where
    /// products alone gain by it.
    TrainingRounded,
    /// Matrices in this type and in the layout that the device's products read, A_log replaced by A = −exp(A_log); the
    /// rest in f32. Where blocks are asked for, see [`matrix_dtype`].
    Inference(DType, Layout),
    /// The same with a type for each matrix, by name: the types that a file of quantised weights has them in. Matrices
    /// without one take f32.
    Stored(Arc<BTreeMap<String, DType>>, Layout),
}

impl Form {
    /// The form for training on a device in f32 or bf16.
    pub fn training(device: &Device, dtype: DType) -> Form {
        match (device, dtype) {
            (Device::Cpu(_), DType::BF16) => Form::TrainingRounded,
            _ => Form::Training(dtype),
        }
    }

    /// The form for inference on a device.
    pub fn inference(device: &Device, dtype: DType) -> Form {
        Form::Inference(dtype, device.weight_layout())
    }

    /// The form for inference that a checkpoint has by itself: bf16 where it holds bf16; blocks as they are, or in the next
    /// finer type of those that are computed with, tensor by tensor (on a GPU Q8_0 where there are no others, else bf16);
    /// f32 else.
    pub fn of_checkpoint(device: &Device, checkpoint: &Checkpoint) -> Form {
        let tensors = checkpoint.tensors();
        let blocks = tensors.iter().any(|t| matches!(t.dtype, Dtype::Blocks(_)));
        if blocks && matches!(device, Device::Cpu(_)) {
            let dtype = |t: &TensorInfo| match t.dtype {
                Dtype::F32 | Dtype::F16 => DType::F32,
                Dtype::BF16 => DType::BF16,
                Dtype::Blocks(kind) => kind.computed_as().for_rows_of(matrix_shape(&t.shape).1),
            };
            let types = tensors.iter().map(|t| (t.name.clone(), dtype(t))).collect();
            return Form::Stored(Arc::new(types), device.weight_layout());
        }
        let q8_0 = |t: &TensorInfo| !matches!(t.dtype, Dtype::Blocks(kind) if kind != quant::Kind::Q8_0);
        if blocks && tensors.iter().all(q8_0) {
            return Form::inference(device, DType::Q8_0);
        }
        let narrow = blocks || tensors.iter().any(|t| t.dtype == Dtype::BF16);
        Form::inference(device, if narrow { DType::BF16 } else { DType::F32 })
    }

    /// Type and layout of a parameter.
    pub fn of(&self, spec: &ParamSpec, config: &ModelConfig) -> (DType, Layout) {
        if !matches!(spec.kind, ParamKind::Matrix | ParamKind::Embedding) {
            return (DType::F32, Layout::Rows);
        }
        let (dtype, layout) = match self {
            Form::Training(_) | Form::TrainingRounded => return (DType::F32, Layout::Rows),
            Form::Inference(dtype, layout) => (matrix_dtype((*dtype, *layout), spec, config), *layout),
            Form::Stored(types, layout) => (types.get(&spec.name).copied().unwrap_or(DType::F32), *layout),
        };
        // A tied embedding is a matrix of a product, too; an untied one is only looked up.
        let looked_up = spec.kind == ParamKind::Embedding && !config.tie_embeddings;
        (dtype, if looked_up { Layout::Rows } else { layout })
    }

    /// The type in which an op reads a parameter: for matrices that of the rounded copy, if there is one.
    pub fn read_as(&self, spec: &ParamSpec, config: &ModelConfig) -> (DType, Layout) {
        match (self, spec.kind) {
            (Form::Training(dtype), ParamKind::Matrix | ParamKind::Embedding) => (*dtype, Layout::Rows),
            _ => self.of(spec, config),
        }
    }

    /// Type of the activations: bf16 only where row-major bf16 weights are, on a GPU.
    pub fn activations(&self) -> DType {
        match self {
            Form::Training(dtype) | Form::Inference(dtype @ (DType::F32 | DType::BF16), Layout::Rows) => *dtype,
            Form::Inference(_, Layout::Rows) | Form::Stored(_, Layout::Rows) => DType::BF16,
            Form::TrainingRounded => DType::F32,
            Form::Inference(_, Layout::Panels) | Form::Stored(_, Layout::Panels) => DType::F32,
        }
    }

    /// Whether A_log is replaced by A.
    pub fn is_for_inference(&self) -> bool {
        !matches!(self, Form::Training(_) | Form::TrainingRounded)
    }

    /// Bytes of the rounded copy beside parameters of this size.
    fn copy_bytes(&self, bytes: usize) -> usize {
        if *self == Form::Training(DType::BF16) { bytes / 2 } else { 0 }
    }
}

/// The type of a matrix or an embedding where `dtype` is asked for. Types of blocks are not for everything: with Q4_K
/// the output matrix, tied or not, is Q6_K, since its errors reach the result undamped (as llama.cpp's Q4_K_M has it),
/// and rows that blocks do not fit take Q8_0. Row-major, for a GPU, Q8_0 is for what [`step_linear`] multiplies: Δ's
/// projection, a table that is only looked up and rows of other lengths are bf16.
pub fn matrix_dtype((dtype, layout): (DType, Layout), spec: &ParamSpec, config: &ModelConfig) -> DType {
    let (_, cols) = matrix_shape(&spec.shape);
    let tied = spec.kind == ParamKind::Embedding && config.tie_embeddings;
    let output = spec.name == "lm_head.weight" || tied;
    if (dtype, layout) == (DType::Q8_0, Layout::Rows) {
        let looked_up = spec.kind == ParamKind::Embedding && !tied;
        let multiplied = cols.is_multiple_of(step_linear::Q8_0_COLUMNS) && !spec.name.ends_with(".dt_proj.weight");
        return if multiplied && !looked_up { DType::Q8_0 } else { DType::BF16 };
    }
    let dtype = if output && dtype == DType::Q4_K { DType::Q6_K } else { dtype };
    dtype.for_rows_of(cols)
}

/// Prefix of the externals that are copies of parameters rounded to bf16.
pub const ROUNDED: &str = "bf16.";

/// A parameter's shape as the graph has it: vectors are one row, and all axes but the first form the columns.
pub fn matrix_shape(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [n] => (1, *n),
        [rows, rest @ ..] => (*rows, rest.iter().product()),
    }
}

/// Bytes of a parameter with the padding behind it.
fn padded_bytes(device: &Device, spec: &ParamSpec, (dtype, layout): (DType, Layout)) -> usize {
    let (rows, cols) = matrix_shape(&spec.shape);
    device.matrix_bytes(dtype, layout, rows, cols).next_multiple_of(ALIGNMENT)
}

/// The parameters of a model.
#[derive(Debug)]
pub struct Weights {
    form: Form,
    buffer: Buffer,
    /// All parameters rounded to bf16, at half the offsets, where the form has them.
    rounded: Buffer,
    entries: BTreeMap<String, Entry>,
    hasher: blake3::Hasher,
}

#[derive(Debug)]
struct Entry {
    spec: ParamSpec,
    offset: usize,
    dtype: DType,
    layout: Layout,
}

impl Weights {
    /// Bytes that the parameters of a model take.
    pub fn required_bytes(device: &Device, config: &ModelConfig, form: &Form) -> usize {
        let bytes = config.parameters().iter().map(|spec| padded_bytes(device, spec, form.of(spec, config))).sum();
        bytes + form.copy_bytes(bytes)
    }

    /// Memory for the parameters of a model, all zero.
    ///
    /// # Errors
    /// A type that the device does not compute with; too little memory.
    pub fn zeros(device: &Device, config: &ModelConfig, form: Form) -> Result<Weights, Error> {
        let mut entries = BTreeMap::new();
        let mut offset = 0;
        for spec in config.parameters() {
            let (dtype, layout) = form.of(&spec, config);
            device.check_weights(dtype)?;
            let bytes = padded_bytes(device, &spec, (dtype, layout));
            entries.insert(spec.name.clone(), Entry { spec, offset, dtype, layout });
            offset += bytes;
        }
        let hasher = blake3::Hasher::new();
        let (buffer, rounded) = (device.alloc(offset)?, device.alloc(form.copy_bytes(offset))?);
        Ok(Weights { form, buffer, rounded, entries, hasher })
    }

    /// Loads a checkpoint.
    ///
    /// # Errors
    /// Damaged numbers in the checkpoint; too little memory.
    pub fn load(device: &Device, checkpoint: &Checkpoint, form: Form) -> Result<Weights, Error> {
        let mut weights = Weights::zeros(device, &checkpoint.config, form)?;
        let mut piece = Vec::new();
        for tensor in checkpoint.tensors() {
            let (rows, cols) = matrix_shape(&tensor.shape);
            let step = (PIECE / cols.max(1)).max(1).next_multiple_of(Device::ROW_GROUP);
            let blocks = matches!(tensor.dtype, Dtype::Blocks(kind)
                if weights.entries[&tensor.name].dtype.blocks() == Some(kind));
            for first in (0..rows).step_by(step) {
                if blocks {
                    let numbers = first * cols..rows.min(first + step) * cols;
                    let set = |blocks: &[u8]| weights.set_blocks(device, &tensor.name, first, blocks);
                    checkpoint.with_bytes(&tensor.name, numbers, set)?;
                    continue;
                }
                piece.resize(step.min(rows - first) * cols, 0.0);
                checkpoint.read_f32_part(&tensor.name, first * cols, &mut piece)?;
                weights.set_rows(device, &tensor.name, first, &piece)?;
            }
        }
        Ok(weights)
    }

    /// Sets rows of a parameter, as [`Weights::set_rows`] does, from the blocks that a file has them in, exactly.
    fn set_blocks(&mut self, device: &Device, name: &str, first: usize, blocks: &[u8]) {
        let entry = &self.entries[name];
        let (rows, cols) = matrix_shape(&entry.spec.shape);
        let (place, row) = ((entry.dtype, entry.layout), entry.dtype.row_bytes(cols));
        if first == 0 {
            self.hasher.update(name.as_bytes());
        }
        let stride = (rows * row).div_ceil(FINGERPRINT_SAMPLES).max(1);
        let skip = (first * row).next_multiple_of(stride) - first * row;
        blocks.iter().skip(skip).step_by(stride).for_each(|&b| {
            self.hasher.update(&[b]);
        });
        let offset = entry.offset + device.matrix_bytes(entry.dtype, entry.layout, first, cols);
        device.write_blocks(&mut self.buffer, offset, place, (blocks.len() / row.max(1), cols), blocks);
    }

    /// Starting values from a seed.
    pub fn initialise(device: &Device, config: &ModelConfig, form: Form, seed: u64) -> Result<Weights, Error> {
        let mut weights = Weights::zeros(device, config, form)?;
        for (name, values) in init::initialise(config, seed) {
            weights.set_rows(device, &name, 0, &values)?;
        }
        Ok(weights)
    }

    /// Sets rows of a parameter from row `first` on, a multiple of [`Device::ROW_GROUP`]; parameters come in the order of
    /// [`ModelConfig::parameters`], rows in theirs.
    fn set_rows(&mut self, device: &Device, name: &str, first: usize, values: &[f32]) -> Result<(), Error> {
        let entry = &self.entries[name];
        let (_, cols) = matrix_shape(&entry.spec.shape);
        let (place, shape) = ((entry.dtype, entry.layout), (values.len() / cols.max(1), cols));
        if entry.dtype.blocks().is_some()
            && let Some(&value) = values.iter().find(|v| v.abs() > quant::LARGEST)
        {
            return Err(Error::Magnitude { name: name.into(), value, dtype: entry.dtype });
        }
        if first == 0 {
            self.hasher.update(name.as_bytes());
        }
        let stride = entry.spec.numel().div_ceil(FINGERPRINT_SAMPLES).max(1);
        let skip = (first * cols).next_multiple_of(stride) - first * cols;
        values.iter().skip(skip).step_by(stride).for_each(|v| {
            self.hasher.update(&v.to_le_bytes());
        });
        let offset = entry.offset + device.matrix_bytes(entry.dtype, entry.layout, first, cols);
        if self.form.is_for_inference() && name.ends_with(".A_log") {
            let a: Vec<f32> = values.iter().map(|v| -v.exp()).collect();
            device.write_matrix(&mut self.buffer, offset, place, shape, &a);
        } else {
            device.write_matrix(&mut self.buffer, offset, place, shape, values);
        }
        if self.rounded.bytes() > 0 {
            let place = (DType::BF16, Layout::Rows);
            device.write_matrix(&mut self.rounded, entry.offset / 2 + 2 * first * cols, place, shape, values);
        }
        Ok(())
    }

    /// Calls `read` with every parameter's name and values in the order of memory: without a copy on a CPU. The form
    /// must be one for training.
    pub fn with_tensors<R>(&mut self, read: impl FnOnce(&[(&str, &[f32])]) -> R) -> R {
        debug_assert!(!self.form.is_for_inference());
        let values = self.buffer.contents(0, self.buffer.bytes() / 4);
        let mut entries: Vec<_> = self.entries.iter().map(|(name, e)| (e.offset / 4, name.as_str(), &e.spec)).collect();
        entries.sort_by_key(|e| e.0);
        let tensors: Vec<_> = entries.iter().map(|&(at, name, spec)| (name, &values[at..][..spec.numel()])).collect();
        read(&tensors)
    }

    /// How the parameters lie in memory.
    pub fn form(&self) -> &Form {
        &self.form
    }

    /// Bytes of all parameters, without rounded copies.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// The copy of all parameters that is rounded to bf16, in the same order, if the form has one.
    pub fn rounded(&self) -> Option<&Buffer> {
        (self.rounded.bytes() > 0).then_some(&self.rounded)
    }

    /// A short name for exactly these parameters: states saved under one belong to it alone.
    pub fn fingerprint(&self) -> String {
        self.hasher.finalize().to_hex()[..16].to_string()
    }

    /// Where a parameter lies, if the model has it.
    pub fn slice(&self, name: &str) -> Option<Slice<'_>> {
        match name.strip_prefix(ROUNDED) {
            Some(name) => self.entries.get(name).map(|e| self.rounded.at(e.offset / 2)),
            None => self.entries.get(name).map(|e| self.buffer.at(e.offset)),
        }
    }

    /// Byte offset and specification of every parameter, in the order of memory.
    pub fn entries(&self) -> impl Iterator<Item = (usize, &ParamSpec)> {
        let mut entries: Vec<_> = self.entries.values().map(|e| (e.offset, &e.spec)).collect();
        entries.sort_by_key(|e| e.0);
        entries.into_iter()
    }

    /// The memory as a whole: for training one flat f32 vector, padding between tensors being zero.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}
