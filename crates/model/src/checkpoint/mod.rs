//! Checkpoints: reading, checking, writing and converting the formats people have.
//!
//! [`Checkpoint::open`] reads a folder in the original state-spaces format or in that of Hugging Face transformers, or a
//! GGUF file. The weight files are mapped, not read: tensors are converted one at a time, straight from the file into the memory of
//! the caller. All tensors go by their canonical names, the original ones (see [`crate::config::ParamSpec`]);
//! [`Checkpoint::native_name`] gives a tensor's name in the file.
//!
//! What is checked: on opening, that the tensors are exactly those of the configuration and have its shapes; on reading
//! a tensor, that its numbers are finite and, in a torch file, match the checksum. Nothing in a file is ever executed.

mod describe;
mod error;
pub(crate) mod gguf;
mod huggingface;
mod json;
mod original;
mod pickle;
pub(crate) mod shards;
mod tensor;
mod torch;
mod write;

pub use describe::{Description, describe};
pub use error::CheckpointError;
pub use gguf::{Quantized, QuantizedTensor, is_gguf, quantize};
pub use tensor::Dtype;
pub use write::{SaveTensor, TensorData, convert, save};

use crate::config::{LayerConfig, ModelConfig};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tensor::{Stored, ValueError};

/// The layouts of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// config.json and pytorch_model.bin, as mamba-ssm writes them.
    Original,
    /// config.json with `model_type` and model.safetensors, as transformers writes them.
    HuggingFace,
    /// One file with everything, as llama.cpp has it.
    Gguf,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Format::Original => "original",
            Format::HuggingFace => "huggingface",
            Format::Gguf => "gguf",
        })
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    /// `original`, `huggingface` or `hf`, `gguf`.
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "original" => Ok(Format::Original),
            "huggingface" | "hf" => Ok(Format::HuggingFace),
            "gguf" => Ok(Format::Gguf),
            _ => Err(format!("\"{s}\" is not a checkpoint format; expected original, huggingface or gguf")),
        }
    }
}

/// What a tensor of a checkpoint is, without its numbers.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TensorInfo {
    /// Canonical name.
    pub name: String,
    /// Name in the file.
    pub native_name: String,
    /// Number format in the file.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the numbers in the file.
    pub fn nbytes(&self) -> usize {
        self.dtype.bytes(self.numel())
    }
}

/// An open checkpoint. Can be shared between threads, each reading its tensors.
#[derive(Debug)]
pub struct Checkpoint {
    /// What the model is.
    pub config: ModelConfig,
    /// Which layout it has.
    pub format: Format,
    /// The architecture in the format's own words: `mamba`, `mamba2`, `falcon_mamba`, `hognose`; `original`.
    pub model_type: String,
    /// The folder, or the file.
    pub path: PathBuf,
    weights: PathBuf,
    infos: Vec<TensorInfo>,
    stored: Vec<Stored>,
    index: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a checkpoint folder or a GGUF file and checks everything but the numbers.
    ///
    /// # Errors
    /// Whatever is wrong with the folder or the file, the configuration or the tensors; see [`CheckpointError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let (format, model_type, config, mut weights) = if gguf::is_gguf(path) {
            let (architecture, config, weights) = gguf::open(path)?;
            (Format::Gguf, architecture, config, weights)
        } else {
            let (format, model_type, config) = read_config(path)?;
            (format, model_type, config, shards::open(path)?)
        };
        // lm_head.weight may be written although it is the embedding, as the original format does.
        if config.tie_embeddings
            && let Some(head) = weights.tensors.remove("lm_head.weight")
        {
            let embedding = ["backbone.embedding.weight", "backbone.embeddings.weight"];
            if let Some(embedding) = embedding.iter().find_map(|n| weights.tensors.get(*n)) {
                let name = "lm_head.weight".to_string();
                if !same(&head, embedding).map_err(|e| value_error(&weights.path, &name, e))? {
                    return Err(CheckpointError::TiedDiffers { path: weights.path, name });
                }
            }
        }
        let canonical_names: HashMap<String, String> =
            config.parameters().into_iter().map(|p| (native_name(format, &p.name), p.name)).collect();
        let mut found = HashMap::new();
        for (native, stored) in weights.tensors {
            let canonical = match format {
                Format::Gguf => canonical_names.get(&native).unwrap_or(&native).clone(),
                Format::Original | Format::HuggingFace => huggingface::canonical_name(&native),
            };
            if let Some((other, _)) = found.insert(canonical, (native.clone(), stored)) {
                let name: String = if other < native { native } else { other };
                return Err(CheckpointError::Surplus { path: weights.path, name, more: 0 });
            }
        }
        let (mut infos, mut all, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        for p in config.parameters() {
            let Some((native_name, stored)) = found.remove(&p.name) else {
                missing.push(p);
                continue;
            };
            if stored.shape != p.shape {
                let (path, found, expected) = (weights.path, stored.shape, p.shape);
                return Err(CheckpointError::Shape { path, name: native_name, found, expected });
            }
            infos.push(TensorInfo { name: p.name, native_name, dtype: stored.dtype, shape: p.shape });
            all.push(stored);
        }
        if let Some(p) = missing.first() {
            let (name, shape, more) = (native_name(format, &p.name), p.shape.clone(), missing.len() - 1);
            return Err(CheckpointError::Missing { path: weights.path, name, shape, more });
        }
        if let Some(name) = found.values().map(|(native, _)| native.clone()).min() {
            return Err(CheckpointError::Surplus { path: weights.path, name, more: found.len() - 1 });
        }
        let index = infos.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let (path, weights, stored) = (path.into(), weights.path, all);
        Ok(Checkpoint { config, format, model_type, path, weights, infos, stored, index })
    }

    /// Every tensor, in the order of [`ModelConfig::parameters`].
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    /// A tensor by its canonical name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.infos[i])
    }

    /// What the file calls a tensor.
    pub fn native_name(&self, canonical: &str) -> Option<&str> {
        self.info(canonical).map(|t| &t.native_name[..])
    }

    /// The numbers of a tensor as they are in the file: row-major, little-endian, in its own dtype. Borrowed from the
    /// mapped file unless the tensor lies scattered in it.
    ///
    /// # Errors
    /// An unknown name, or damaged numbers.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let stored = self.stored(name)?;
        let bytes = stored.bytes().map_err(|e| self.value_error(name, e))?;
        tensor::check_finite(stored.dtype, &bytes).map_err(|e| self.value_error(name, e))?;
        Ok(bytes)
    }

    /// A tensor as f32, row-major.
    ///
    /// # Errors
    /// An unknown name, or damaged numbers.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut out = vec![0.0; self.stored(name)?.numel()];
        self.read_f32_into(name, &mut out)?;
        Ok(out)
    }

    /// A tensor as f32, row-major, into memory of exactly its size.
    ///
    /// # Errors
    /// An unknown name, memory of another size, or damaged numbers.
    pub fn read_f32_into(&self, name: &str, out: &mut [f32]) -> Result<(), CheckpointError> {
        let stored = self.stored_of_length(name, out.len())?;
        stored.read_f32(0, out).map_err(|e| self.value_error(name, e))
    }

    /// A part of a tensor as f32: numbers from `first` on, in row-major order. Memory of the mapped file that only this
    /// part needed is given back.
    ///
    /// # Errors
    /// An unknown name, more numbers than the tensor has, or damaged ones.
    pub fn read_f32_part(&self, name: &str, first: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        let stored = self.stored(name)?;
        let (expected, found) = (stored.numel(), first.saturating_add(out.len()));
        if found > expected {
            return Err(CheckpointError::Length { name: name.into(), found, expected });
        }
        stored.read_f32(first, out).map_err(|e| self.value_error(name, e))?;
        stored.forget(first..first + out.len());
        Ok(())
    }

    /// Calls `read` with a part of what [`Checkpoint::bytes`] gives: some numbers in row-major order, in types of blocks
    /// whole blocks of them. Memory of the mapped file that only this part needed is given back.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32_part`].
    pub fn with_bytes<R>(
        &self,
        name: &str,
        range: Range<usize>,
        read: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, CheckpointError> {
        let stored = self.stored(name)?;
        if range.end > stored.numel() {
            let (expected, found) = (stored.numel(), range.end);
            return Err(CheckpointError::Length { name: name.into(), found, expected });
        }
        let first = range.start;
        let bytes = stored.part(range.clone()).map_err(|e| self.value_error(name, e))?;
        tensor::check_finite(stored.dtype, &bytes).map_err(|e| self.value_error(name, e.after(first)))?;
        let result = read(&bytes);
        stored.forget(range);
        Ok(result)
    }

    /// As [`Checkpoint::bytes`], in the type that [`Dtype::plain`] says: blocks are decoded to f32.
    pub(crate) fn plain_bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, CheckpointError> {
        match self.stored(name)?.dtype {
            Dtype::Blocks(_) => Ok(Cow::Owned(bytemuck::cast_slice(&self.read_f32(name)?).to_vec())),
            _ => self.bytes(name),
        }
    }

    /// A = −exp(A_log) of the tensor A_log with this name: as the file has it, where the file has A.
    fn read_transition(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut stored = self.stored(name)?.clone();
        let has_a = std::mem::replace(&mut stored.negated_exp, false);
        let mut values = vec![0.0; stored.numel()];
        stored.read_f32(0, &mut values).map_err(|e| self.value_error(name, e))?;
        if !has_a {
            values.iter_mut().for_each(|v| *v = -f64::from(*v).exp() as f32);
        }
        Ok(values)
    }

    fn stored(&self, name: &str) -> Result<&Stored, CheckpointError> {
        let i = self.index.get(name).ok_or_else(|| CheckpointError::UnknownTensor { name: name.into() })?;
        Ok(&self.stored[*i])
    }

    fn stored_of_length(&self, name: &str, found: usize) -> Result<&Stored, CheckpointError> {
        let stored = self.stored(name)?;
        let expected = stored.numel();
        if found != expected {
            return Err(CheckpointError::Length { name: name.into(), found, expected });
        }
        Ok(stored)
    }

    fn value_error(&self, name: &str, e: ValueError) -> CheckpointError {
        value_error(&self.weights, self.native_name(name).unwrap_or(name), e)
    }
}

fn value_error(path: &Path, name: &str, e: ValueError) -> CheckpointError {
    let (path, name) = (path.to_path_buf(), name.to_string());
    match e {
        ValueError::NonFinite { index, value } => CheckpointError::NonFinite { path, name, index, value },
        ValueError::NotNegative { index, value } => CheckpointError::NotNegative { path, name, index, value },
        ValueError::Checksum => {
            let message = format!("tensor {name} does not match its checksum; the file is damaged");
            CheckpointError::Torch { path, message }
        }
    }
}

/// Whether two tensors are the same numbers; views of the same place are, without looking.
fn same(a: &Stored, b: &Stored) -> Result<bool, ValueError> {
    if a.dtype != b.dtype || a.shape != b.shape {
        return Ok(false);
    }
    let place = |s: &Stored| (s.file.path.clone(), s.start, s.strides.clone());
    Ok(place(a) == place(b) || a.bytes()? == b.bytes()?)
}

/// What a format calls a tensor.
fn native_name(format: Format, canonical: &str) -> String {
    match format {
        Format::Original => canonical.into(),
        Format::HuggingFace => huggingface::native_name(canonical),
        Format::Gguf => gguf::names::native_name(canonical),
    }
}

/// The configuration in a checkpoint folder or a GGUF file, checked; the weights are not looked at.
///
/// # Errors
/// As [`Checkpoint::open`], for everything about the configuration.
pub fn read_config(folder: &Path) -> Result<(Format, String, ModelConfig), CheckpointError> {
    if gguf::is_gguf(folder) {
        let (architecture, config) = gguf::read_config(folder)?;
        return Ok((Format::Gguf, architecture, config));
    }
    if !folder.is_dir() {
        return Err(CheckpointError::NoFolder { path: folder.into() });
    }
    let path = folder.join("config.json");
    let map = json::read_object(&path)?;
    let (format, model_type, mut config) = if original::recognise(&map) {
        (Format::Original, "original".to_string(), original::read(&path, &map)?)
    } else {
        let config = huggingface::read(&path, &map)?;
        let model_type = map["model_type"].as_str().unwrap_or_default().to_string();
        (Format::HuggingFace, model_type, config)
    };
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        huggingface::read_generation_config(&generation, &json::read_object(&generation)?, &mut config)?;
    }
    config.validate().map_err(|source| CheckpointError::Config { path, source })?;
    Ok((format, model_type, config))
}

/// The layer that all layers are, for formats that describe one.
fn uniform_layer(config: &ModelConfig) -> Option<&LayerConfig> {
    let first = config.layers.first()?;
    config.layers.iter().all(|l| l == first).then_some(first)
}
