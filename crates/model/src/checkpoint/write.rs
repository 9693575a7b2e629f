//! Writing checkpoints: `save` for training, `convert` between formats. Neither can damage what was there before.

use super::error::CheckpointError;
use super::tensor::{Dtype, check_finite};
use super::{Checkpoint, Format, gguf, huggingface, json, native_name, original, torch, value_error};
use crate::config::ModelConfig;
use crate::tokenizer::{TOKENIZER_FILES, Tokenizer};
use half::bf16;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The numbers of a tensor to be saved.
#[derive(Debug, Clone, Copy)]
pub enum TensorData<'a> {
    /// Kept as f32.
    F32(&'a [f32]),
    /// Kept as bf16.
    Bf16(&'a [bf16]),
}

impl<'a> TensorData<'a> {
    fn parts(self) -> (Dtype, usize, &'a [u8]) {
        match self {
            TensorData::F32(x) => (Dtype::F32, x.len(), bytemuck::cast_slice(x)),
            TensorData::Bf16(x) => (Dtype::BF16, x.len(), bytemuck::cast_slice(x)),
        }
    }
}

/// A tensor to be saved, under its canonical name.
pub type SaveTensor<'a> = (&'a str, TensorData<'a>);

/// A tensor on its way into a safetensors file.
struct View<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl ::safetensors::View for View<'_> {
    fn dtype(&self) -> ::safetensors::Dtype {
        match self.dtype {
            // Blocks are decoded on their way here: `Checkpoint::plain_bytes`.
            Dtype::F32 | Dtype::Blocks(_) => ::safetensors::Dtype::F32,
            Dtype::F16 => ::safetensors::Dtype::F16,
            Dtype::BF16 => ::safetensors::Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Saves a model into a folder in the Hugging Face layout: model.safetensors, config.json, generation_config.json and
/// the extra files (name, contents), which a caller uses for the tokenizer.
///
/// The folder is made if need be. Each file is written under another name, synced and renamed, so an interruption or a
/// full disk leaves the previous one. config.json is last: a new folder without it is not yet a checkpoint.
///
/// # Errors
/// Tensors that are not exactly those of the configuration, numbers that are not finite, or the disk.
pub fn save(
    dir: impl AsRef<Path>,
    config: &ModelConfig,
    tensors: &[SaveTensor],
    extra: &[(&str, &[u8])],
) -> Result<(), CheckpointError> {
    let dir = dir.as_ref();
    config.validate().map_err(|source| CheckpointError::Config { path: dir.into(), source })?;
    let weights = dir.join("model.safetensors");
    let mut given: HashMap<&str, TensorData> = tensors.iter().copied().collect();
    let mut views = Vec::with_capacity(given.len());
    for p in config.parameters() {
        let data = given.remove(&p.name[..]);
        let data = data.ok_or_else(|| CheckpointError::UnknownTensor { name: p.name.clone() })?;
        let (dtype, found, bytes) = data.parts();
        if found != p.numel() {
            return Err(CheckpointError::Length { name: p.name.clone(), found, expected: p.numel() });
        }
        check_finite(dtype, bytes).map_err(|e| value_error(&weights, &p.name, e))?;
        let view = View { dtype, shape: p.shape, data: Cow::Borrowed(bytes) };
        views.push((huggingface::native_name(&p.name), view));
    }
    if let Some(name) = given.keys().min() {
        return Err(CheckpointError::UnknownTensor { name: name.to_string() });
    }
    fs::create_dir_all(dir).map_err(CheckpointError::io(dir, "create the folder"))?;
    let dtype = views.first().map_or(Dtype::F32, |v| v.1.dtype);
    for (name, bytes) in extra {
        replace(&dir.join(name), |path| write_synced(path, bytes))?;
    }
    replace(&weights, |path| write_safetensors(path, views))?;
    for (name, map) in hugging_face_files(dir, config, dtype)? {
        replace(&dir.join(name), |path| write_synced(path, map.as_bytes()))?;
    }
    Ok(())
}

/// The JSON files of the Hugging Face layout; config.json comes last.
fn hugging_face_files(
    dir: &Path,
    config: &ModelConfig,
    dtype: Dtype,
) -> Result<[(&'static str, String); 2], CheckpointError> {
    let dtype = match dtype {
        Dtype::F32 | Dtype::Blocks(_) => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
    };
    let text = |map: Result<Map<String, Value>, serde_json::Error>| {
        let text = map.and_then(|m| serde_json::to_string_pretty(&m)).map(|t| t + "\n");
        text.map_err(|e| CheckpointError::Json { path: dir.into(), message: e.to_string() })
    };
    Ok([
        ("generation_config.json", text(Ok(huggingface::generation_config(config)))?),
        ("config.json", text(huggingface::write(config, dtype))?),
    ])
}

fn write_safetensors(path: &Path, views: Vec<(String, View)>) -> Result<(), CheckpointError> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    ::safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| match e {
        ::safetensors::SafeTensorError::IoError(source) => CheckpointError::io(path, "write")(source),
        other => CheckpointError::Safetensors { path: path.into(), message: other.to_string() },
    })?;
    sync(path)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(CheckpointError::io(path, "write"))
}

/// Waits until a file, or the entries of a folder, are on the disk.
fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(CheckpointError::io(path, "sync"))
}

/// A path beside `path` that nobody else uses.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tmp-{}", std::process::id()))
}

/// The folder that holds `path`; the current one for a bare name.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Puts a file in place once it is complete and on the disk.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let temporary = temporary(path);
    let result = write(&temporary)
        .and_then(|()| fs::rename(&temporary, path).map_err(CheckpointError::io(path, "put in place")))
        .and_then(|()| sync(parent(path)));
    if result.is_err() {
        // Best effort: what matters is that the old file is untouched.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Copies a checkpoint into another format (or the same), with every number's bits and type kept, and the tokenizer.
/// What has no type of its own in the other format becomes f32: weights in blocks outside of GGUF, and in GGUF what is no
/// matrix.
///
/// `output` appears complete or not at all. Every number is checked on the way.
///
/// # Errors
/// An `input` that does not open, an `output` that exists, a model that the format cannot express, damaged numbers, or
/// the disk.
pub fn convert(input: impl AsRef<Path>, output: impl AsRef<Path>, format: Format) -> Result<(), CheckpointError> {
    let output = output.as_ref();
    let exists = || CheckpointError::Exists { path: output.into() };
    if output.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let checkpoint = Checkpoint::open(input)?;
    if format == Format::Gguf {
        let tokenizer = find_tokenizer(&checkpoint)?;
        return gguf::quantize(&checkpoint, tokenizer.as_ref(), output, None, &mut |_, _| ()).map(|_| ());
    }
    // Refuse what the format cannot express before anything is written.
    let original = (format == Format::Original).then(|| original::write(&checkpoint.config)).transpose()?;
    fs::create_dir_all(parent(output)).map_err(CheckpointError::io(parent(output), "create the folder"))?;
    let folder = Temporary(temporary(output));
    fs::create_dir(&folder.0).map_err(CheckpointError::io(&folder.0, "create the folder"))?;
    if checkpoint.format == Format::Gguf
        && let Some(tokenizer) = find_tokenizer(&checkpoint)?
    {
        for (name, bytes) in tokenizer.files() {
            write_synced(&folder.0.join(name), &bytes)?;
        }
    }
    for name in TOKENIZER_FILES.iter().chain(&["generation_config.json"]) {
        let from = checkpoint.path.join(name);
        if from.exists() {
            let bytes = fs::read(&from).map_err(CheckpointError::io(&from, "read"))?;
            write_synced(&folder.0.join(name), &bytes)?;
        }
    }
    match original {
        Some(map) => {
            torch::write(&folder.0.join("pytorch_model.bin"), &torch_entries(&checkpoint))?;
            let text = json::to_python(&map);
            let text = text.map_err(|e| CheckpointError::Json { path: output.into(), message: e.to_string() })?;
            write_synced(&folder.0.join("config.json"), text.as_bytes())?;
        }
        None => {
            let mut views = Vec::new();
            for t in checkpoint.tensors() {
                let view =
                    View { dtype: t.dtype.plain(), shape: t.shape.clone(), data: checkpoint.plain_bytes(&t.name)? };
                views.push((native_name(format, &t.name), view));
            }
            write_safetensors(&folder.0.join("model.safetensors"), views)?;
            let dtype = checkpoint.tensors().first().map_or(Dtype::F32, |t| t.dtype);
            for (name, text) in hugging_face_files(output, &checkpoint.config, dtype)? {
                let path = folder.0.join(name);
                if !path.exists() {
                    write_synced(&path, text.as_bytes())?;
                }
            }
        }
    }
    sync(&folder.0)?;
    if output.symlink_metadata().is_ok() {
        return Err(exists());
    }
    fs::rename(&folder.0, output).map_err(CheckpointError::io(output, "put in place"))?;
    sync(parent(output))
}

/// The tokenizer of a checkpoint, if it has one.
pub(super) fn find_tokenizer(checkpoint: &Checkpoint) -> Result<Option<Tokenizer>, CheckpointError> {
    let path = &checkpoint.path;
    Tokenizer::find(path).map_err(|e| CheckpointError::Unsupported {
        path: path.clone(),
        message: format!("the tokenizer does not load: {e}"),
    })
}

/// The tensors for a .bin, with the output matrix written out even where it is the embedding, as mamba-ssm does.
fn torch_entries(checkpoint: &Checkpoint) -> Vec<torch::Entry<'_>> {
    let mut entries: Vec<_> = checkpoint
        .tensors()
        .iter()
        .map(|t| torch::Entry {
            name: t.name.clone(),
            dtype: t.dtype.plain(),
            shape: t.shape.clone(),
            shares: None,
            data: Box::new(|| checkpoint.plain_bytes(&t.name)),
        })
        .collect();
    if checkpoint.config.tie_embeddings
        && let Some(t) = checkpoint.info("backbone.embedding.weight")
    {
        let (dtype, shape) = (t.dtype.plain(), t.shape.clone());
        let data = Box::new(|| checkpoint.plain_bytes(&t.name));
        entries.push(torch::Entry { name: "lm_head.weight".into(), dtype, shape, shares: Some(0), data });
    }
    entries
}

/// A folder that is removed unless it has been renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already where all went well.
        let _ = fs::remove_dir_all(&self.0);
    }
}
