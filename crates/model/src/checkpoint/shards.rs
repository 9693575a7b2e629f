//! The weight files of a folder: one file or shards with an index, safetensors or torch.

use super::error::CheckpointError;
use super::json::read_object;
use super::tensor::{Dtype, Mapped, Stored};
use super::torch;
use ::safetensors::SafeTensors;
use ::safetensors::tensor::Dtype as SafetensorsDtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Weight files by preference; the second of each pair is the index of shards.
const NAMES: [(&str, &str); 2] =
    [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")];

/// The tensors of a folder under the names that its files give them, with the file to name in errors.
pub(super) struct Weights {
    /// The one file, or the index of shards.
    pub(super) path: PathBuf,
    pub(super) tensors: BTreeMap<String, Stored>,
}

/// Finds and opens the weights of a folder. Reads headers only.
pub(super) fn open(folder: &Path) -> Result<Weights, CheckpointError> {
    for (single, index) in NAMES {
        let path = folder.join(single);
        if path.exists() {
            let tensors = open_file(&path)?.into_iter().collect();
            return Ok(Weights { path, tensors });
        }
        let path = folder.join(index);
        if path.exists() {
            return open_shards(folder, path);
        }
    }
    let expected = NAMES.map(|(a, b)| format!("{a} or {b}")).join(", ");
    Err(CheckpointError::NoWeights { path: folder.into(), expected })
}

/// The weight files that an index of shards names, each once.
///
/// # Errors
/// An index without `weight_map`, or names that would lead out of the folder.
pub(crate) fn shard_names(index: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut all: Vec<_> = weight_map(index)?.into_values().collect();
    all.sort();
    all.dedup();
    Ok(all)
}

fn weight_map(index: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let object = read_object(index)?;
    let error = |message: String| CheckpointError::Key { path: index.into(), key: "weight_map".into(), message };
    let Some(map) = object.get("weight_map").and_then(|m| m.as_object()) else {
        return Err(error("is missing; expected an object from tensor names to files".into()));
    };
    let mut all = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().unwrap_or_default();
        let plain = Path::new(file).file_name().is_some_and(|n| n == file) && !file.contains('\\');
        if !plain {
            return Err(error(format!("places {name} in {file:?}; expected the name of a file in the same folder")));
        }
        all.insert(name.clone(), file.to_string());
    }
    Ok(all)
}

fn open_shards(folder: &Path, index: PathBuf) -> Result<Weights, CheckpointError> {
    let map = weight_map(&index)?;
    let mut tensors = BTreeMap::new();
    for file in shard_names(&index)? {
        let path = folder.join(&file);
        for (name, stored) in open_file(&path)? {
            if map.get(&name) != Some(&file) {
                return Err(CheckpointError::Surplus { path, name, more: 0 });
            }
            tensors.insert(name, stored);
        }
        if let Some((name, _)) = map.iter().find(|(n, f)| **f == file && !tensors.contains_key(*n)) {
            let message = format!("places {name} in {file}, which does not hold it");
            return Err(CheckpointError::Key { path: index, key: "weight_map".into(), message });
        }
    }
    Ok(Weights { path: index, tensors })
}

fn open_file(path: &Path) -> Result<Vec<(String, Stored)>, CheckpointError> {
    if path.extension().is_some_and(|e| e == "safetensors") { open_safetensors(path) } else { torch::open(path) }
}

fn open_safetensors(path: &Path) -> Result<Vec<(String, Stored)>, CheckpointError> {
    let file = Mapped::open(path).map_err(CheckpointError::io(path, "open"))?;
    let bytes = file.bytes();
    let bad = |message: String| CheckpointError::Safetensors { path: path.into(), message };
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| bad(explain(&e, bytes)))?;
    let mut all = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            SafetensorsDtype::F32 => Dtype::F32,
            SafetensorsDtype::F16 => Dtype::F16,
            SafetensorsDtype::BF16 => Dtype::BF16,
            other => return Err(CheckpointError::Dtype { path: path.into(), name, found: format!("{other:?}") }),
        };
        let range = |(from, to): (usize, usize)| Some((8 + header).checked_add(from)?..(8 + header).checked_add(to)?);
        // The library compares the sum of all sizes with the length of the file; absurd sizes could make it wrap.
        let Some(range) = range(info.data_offsets).filter(|r| bytes.get(r.clone()).is_some()) else {
            return Err(bad(format!("tensor {name} goes past the end of the file")));
        };
        let stored = Stored {
            file: file.clone(),
            dtype,
            shape: info.shape.clone(),
            start: range.start,
            strides: None,
            checked: None,
            negated_exp: false,
        };
        all.push((name, stored));
    }
    Ok(all)
}

/// What the library's errors mean for the person who has the file.
fn explain(error: &::safetensors::SafeTensorError, bytes: &[u8]) -> String {
    use ::safetensors::SafeTensorError as E;
    let declared = bytes.first_chunk().map(|b| u64::from_le_bytes(*b)).unwrap_or(0);
    match error {
        E::HeaderTooSmall => format!("it has {} bytes, which is less than a header", bytes.len()),
        E::HeaderTooLarge => {
            format!(
                "it announces a header of {declared} bytes, more than any real file has; it is damaged or something else"
            )
        }
        E::InvalidHeaderLength => {
            format!(
                "it announces a header of {declared} bytes and has only {}; it is cut short or damaged",
                bytes.len()
            )
        }
        E::MetadataIncompleteBuffer => {
            format!("its tensors do not end where the file does, at {} bytes; it is cut short or damaged", bytes.len())
        }
        other => format!("its header is damaged: {other}"),
    }
}
