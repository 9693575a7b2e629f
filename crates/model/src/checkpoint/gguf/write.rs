//! Writing GGUF files: matrices in a type of choice, everything else in f32.

use super::super::error::CheckpointError;
use super::super::tensor::Dtype;
use super::super::write::{parent, replace};
use super::super::{Checkpoint, Format};
use super::container::{ALIGNMENT, MAGIC, VERSION, type_number};
use super::metadata::Given;
use super::{metadata, names, vocabulary};
use crate::config::{ModelConfig, ParamKind, ParamSpec};
use crate::tokenizer::Tokenizer;
use half::{bf16, f16};
use hognose_core::DType;
use hognose_core::quant::{self, Kind};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Version of the layouts of blocks, as llama.cpp counts it.
const QUANTIZATION_VERSION: u32 = 2;

/// Numbers that a thread encodes at a time, at least.
const SHARE: usize = 1 << 16;

/// What was written.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Quantized {
    /// Bytes of all tensors in the input.
    pub bytes_before: u64,
    /// Bytes of all tensors in the file.
    pub bytes_after: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// The largest of the tensors' errors.
    pub largest_error: f64,
    /// Every tensor, in the order of the file.
    pub tensors: Vec<QuantizedTensor>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// A tensor that was written.
#[derive(Debug, Clone, serde::Serialize)]
pub struct QuantizedTensor {
    /// Canonical name.
    pub name: String,
    /// Name in the file.
    pub native_name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Type in the input.
    pub from: Dtype,
    /// Type in the file.
    pub dtype: Dtype,
    /// Bytes in the file.
    pub bytes: u64,
    /// Root mean square of the errors over that of the numbers.
    pub error: f64,
}

/// Writes a checkpoint as a GGUF file with matrices in `dtype`; `None` keeps each in its type. The file appears complete
/// or not at all. `progress` is told how many numbers of how many are written.
///
/// What is no matrix is f32, as llama.cpp wants it. With Q4_K the output matrix (the embedding, where it is tied) takes
/// Q6_K; rows that blocks of 256 do not divide take Q8_0, and those that blocks of 32 do not divide F16.
///
/// # Errors
/// A file that exists, a model that the format cannot express, damaged numbers, numbers too large for the type, or the
/// disk.
pub fn quantize(
    input: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
    output: &Path,
    dtype: Option<Dtype>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Quantized, CheckpointError> {
    if output.symlink_metadata().is_ok() {
        return Err(CheckpointError::Exists { path: output.into() });
    }
    if let Some(Dtype::Blocks(kind)) = dtype
        && block_type(kind).is_none()
    {
        let message = format!("nothing is encoded as {kind:?}; choose Q8_0, Q4_K or Q6_K");
        return Err(CheckpointError::Inexpressible { format: Format::Gguf, message });
    }
    let config = &input.config;
    let (header, notes, plan) = plan(input, tokenizer, dtype)?;
    let mut report = Quantized {
        bytes_before: input.tensors().iter().map(|t| t.nbytes() as u64).sum(),
        bytes_after: plan.iter().map(|t| t.1.bytes(t.0.numel()) as u64).sum(),
        file_bytes: 0,
        largest_error: 0.0,
        tensors: Vec::new(),
        notes,
    };
    let total = config.parameter_count();
    fs::create_dir_all(parent(output)).map_err(CheckpointError::io(parent(output), "create the folder"))?;
    replace(output, |path| {
        let disk = || CheckpointError::io(path, "write");
        let file = File::create(path).map_err(disk())?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(disk())?;
        let (mut written, mut done) = (header.len() as u64, 0);
        for (spec, dtype) in &plan {
            let (bytes, error) = encoded(input, spec, *dtype)?;
            let padding = vec![0; bytes.len().next_multiple_of(ALIGNMENT as usize) - bytes.len()];
            file.write_all(&bytes).and_then(|()| file.write_all(&padding)).map_err(disk())?;
            written += (bytes.len() + padding.len()) as u64;
            done += spec.numel() as u64;
            progress(done, total);
            report.largest_error = report.largest_error.max(error);
            report.tensors.push(QuantizedTensor {
                name: spec.name.clone(),
                native_name: names::native_name(&spec.name),
                shape: spec.shape.clone(),
                from: input.info(&spec.name).map_or(Dtype::F32, |t| t.dtype),
                dtype: *dtype,
                bytes: bytes.len() as u64,
                error,
            });
        }
        report.file_bytes = written;
        file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|f| f.sync_all()).map_err(disk())
    })?;
    Ok(report)
}

/// Tensors with their types, in the order of the file.
type Plan = Vec<(ParamSpec, Dtype)>;

/// Everything that stands before the numbers, sentences for people, and the tensors.
fn plan(
    input: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
    dtype: Option<Dtype>,
) -> Result<(Vec<u8>, Vec<String>, Plan), CheckpointError> {
    let config = &input.config;
    let (arch, keys) = metadata::write(config)?;
    let (tokens, note) = vocabulary::write(tokenizer, config)?;
    let stored = |name: &str| input.info(name).map_or(Dtype::F32, |t| t.dtype);
    let plan: Plan = config
        .parameters()
        .into_iter()
        .map(|p| {
            let wanted = dtype.unwrap_or_else(|| stored(&p.name));
            let dtype = type_of(&p, wanted, dtype.is_some(), config);
            (p, dtype)
        })
        .collect();
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend((plan.len() as u64).to_le_bytes());
    let general = [
        ("general.architecture", Given::Text(arch.into())),
        ("general.type", Given::Text("model".into())),
        ("general.file_type", Given::U32(file_type(&plan))),
        ("general.quantization_version", Given::U32(QUANTIZATION_VERSION)),
    ];
    let values: Vec<_> = general.map(|(k, v)| (k.to_string(), v)).into_iter().chain(keys).chain(tokens).collect();
    header.extend((values.len() as u64).to_le_bytes());
    for (key, value) in &values {
        put_value(&mut header, key, value);
    }
    let mut offset = 0;
    for (spec, dtype) in &plan {
        put_text(&mut header, &names::native_name(&spec.name));
        let dims = names::dims(spec, config);
        header.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|&n| header.extend((n as u64).to_le_bytes()));
        header.extend(type_number(*dtype).to_le_bytes());
        header.extend(u64::to_le_bytes(offset));
        offset += (dtype.bytes(spec.numel()) as u64).next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    let mut notes: Vec<String> = note.into_iter().collect();
    if values.iter().any(|v| v.0 == metadata::DT_B_C_KEY) {
        notes.push(
            "llama.cpp normalises Δ, B and C with the epsilon of the other norms, hognose with the model's".into(),
        );
    }
    Ok((header, notes, plan))
}

/// The type in which a tensor is written. A type that was `chosen` gives way where it does not suit.
fn type_of(spec: &ParamSpec, wanted: Dtype, chosen: bool, config: &ModelConfig) -> Dtype {
    let tied = spec.kind == ParamKind::Embedding && config.tie_embeddings;
    match spec.kind {
        ParamKind::Matrix | ParamKind::Embedding => {}
        _ => return Dtype::F32,
    }
    let columns = spec.shape.last().copied().unwrap_or(1);
    let wanted = match wanted {
        Dtype::Blocks(Kind::Q4_K) if chosen && (tied || spec.name == "lm_head.weight") => Dtype::Blocks(Kind::Q6_K),
        other => other,
    };
    let finer = [wanted, Dtype::Blocks(Kind::Q8_0)];
    finer.into_iter().find(|d| d.fits(columns)).unwrap_or(Dtype::F16)
}

/// llama.cpp's number for a file whose matrices are mostly of one type.
fn file_type(plan: &Plan) -> u32 {
    let numbers = |dtype: Dtype| plan.iter().filter(|t| t.1 == dtype).map(|t| t.0.numel()).sum::<usize>();
    let known = [
        (0, Dtype::F32),
        (1, Dtype::F16),
        (2, Dtype::Blocks(Kind::Q4_0)),
        (3, Dtype::Blocks(Kind::Q4_1)),
        (7, Dtype::Blocks(Kind::Q8_0)),
        (8, Dtype::Blocks(Kind::Q5_0)),
        (9, Dtype::Blocks(Kind::Q5_1)),
        (14, Dtype::Blocks(Kind::Q4_K)),
        (16, Dtype::Blocks(Kind::Q5_K)),
        (18, Dtype::Blocks(Kind::Q6_K)),
        (32, Dtype::BF16),
    ];
    known.into_iter().max_by_key(|k| numbers(k.1)).map_or(0, |k| k.0)
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

fn put_value(to: &mut Vec<u8>, key: &str, value: &Given) {
    put_text(to, key);
    let mut kind = |n: u32| to.extend(n.to_le_bytes());
    match value {
        Given::U32(n) => {
            kind(4);
            to.extend(n.to_le_bytes());
        }
        Given::F32(x) => {
            kind(6);
            to.extend(x.to_le_bytes());
        }
        Given::Bool(b) => {
            kind(7);
            to.push(u8::from(*b));
        }
        Given::Text(text) => {
            kind(8);
            put_text(to, text);
        }
        Given::Texts(all) => {
            kind(9);
            kind(8);
            to.extend((all.len() as u64).to_le_bytes());
            all.iter().for_each(|text| put_text(to, text));
        }
        Given::I32s(all) => {
            kind(9);
            kind(5);
            to.extend((all.len() as u64).to_le_bytes());
            all.iter().for_each(|n| to.extend(n.to_le_bytes()));
        }
    }
}

/// A tensor's bytes in a type, and the root mean square of the errors over that of the numbers.
fn encoded(input: &Checkpoint, spec: &ParamSpec, dtype: Dtype) -> Result<(Vec<u8>, f64), CheckpointError> {
    let transition = spec.name.ends_with(".A_log");
    if !transition && input.info(&spec.name).is_some_and(|t| t.dtype == dtype) {
        return Ok((input.bytes(&spec.name)?.into_owned(), 0.0));
    }
    let values = if transition { input.read_transition(&spec.name) } else { input.read_f32(&spec.name) }?;
    let limit = match dtype {
        Dtype::F32 | Dtype::BF16 => f32::MAX,
        Dtype::F16 => f16::MAX.to_f32(),
        Dtype::Blocks(_) => quant::LARGEST,
    };
    if let Some(index) = values.iter().position(|v| v.abs() > limit) {
        let message = format!(
            "tensor {} holds {} at element {index}, which is too large for {dtype}; choose f32 or bf16",
            spec.name, values[index]
        );
        return Err(CheckpointError::Inexpressible { format: Format::Gguf, message });
    }
    // Threads take whole rows, in shares by the number of rows alone; blocks do not look at their neighbours.
    let columns = spec.shape.last().copied().unwrap_or(1);
    let share = SHARE.div_ceil(columns) * columns;
    let mut bytes = vec![0; dtype.bytes(values.len())];
    let shares: Vec<_> = values.chunks(share).zip(bytes.chunks_mut(dtype.bytes(share))).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(shares.len().max(1));
    let mut sums: Vec<(f64, f64)> = vec![(0.0, 0.0); shares.len()];
    let queue = std::sync::Mutex::new(shares.into_iter().zip(&mut sums));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let next = || queue.lock().ok().and_then(|mut q| q.next());
                while let Some(((values, bytes), sums)) = next() {
                    encode(values, columns, dtype, bytes);
                    *sums = squares(values, dtype, bytes);
                }
            });
        }
    });
    let (error, size) = sums.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    let error = if size > 0.0 { f64::sqrt(error / size) } else { 0.0 };
    Ok((bytes, error))
}

/// Encodes rows.
fn encode(values: &[f32], columns: usize, dtype: Dtype, to: &mut [u8]) {
    match dtype {
        Dtype::F32 => to.copy_from_slice(bytemuck::cast_slice(values)),
        Dtype::F16 => each(values, to, |x| f16::from_f32(x).to_le_bytes()),
        Dtype::BF16 => each(values, to, |x| bf16::from_f32(x).to_le_bytes()),
        Dtype::Blocks(kind) => {
            let dtype = block_type(kind).expect("other kinds are refused before");
            let rows = values.chunks_exact(columns).zip(to.chunks_exact_mut(kind.row_bytes(columns)));
            rows.for_each(|(row, to)| quant::encode(dtype, row, to));
        }
    }
}

/// The type that encodes blocks of a kind.
fn block_type(kind: Kind) -> Option<DType> {
    [DType::Q8_0, DType::Q4_K, DType::Q6_K].into_iter().find(|d| d.blocks() == Some(kind))
}

fn each(values: &[f32], to: &mut [u8], f: impl Fn(f32) -> [u8; 2]) {
    values.iter().zip(to.as_chunks_mut().0).for_each(|(x, to)| *to = f(*x));
}

/// Sums of the squares of the errors and of the numbers.
fn squares(values: &[f32], dtype: Dtype, bytes: &[u8]) -> (f64, f64) {
    let mut again = vec![0.0; values.len()];
    dtype.decode(bytes, &mut again);
    let square = |x: f64| x * x;
    let error = values.iter().zip(&again).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (error, values.iter().map(|v| square(f64::from(*v))).sum())
}
