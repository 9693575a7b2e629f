//! Checkpoints of a run: everything that the next step depends on, written so that an interruption at any moment
//! leaves the previous checkpoint whole.
//!
//! ```text
//! runs/NAME/config.toml               the resolved configuration
//! runs/NAME/config.json …             the model as of the latest checkpoint, in the Hugging Face layout
//! runs/NAME/checkpoints/step-00000200/ model, optimizer.safetensors, trainer.json
//! runs/NAME/checkpoints/latest        name of the newest one
//! runs/NAME/checkpoints/best          name of the one with the fewest bits per byte on held-out text
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use hognose_core::Buffer;
use hognose_model::checkpoint::{SaveTensor, TensorData};
use hognose_model::config::ModelConfig;
use hognose_model::weights::Weights;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::atomic;
use crate::data::Cursor;
use crate::error::Error;
use crate::schedule::Schedule;

const CHECKPOINTS: &str = "checkpoints";
const LATEST: &str = "latest";
const BEST: &str = "best";
const TRAINER: &str = "trainer.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// Where a run stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Where the training data goes on.
    pub cursor: Cursor,
    /// With a time budget the decay may have been moved.
    pub schedule: Schedule,
    /// The decay has begun early, because of the time budget.
    pub decay_fixed: bool,
    /// Seconds trained.
    pub elapsed: f64,
    /// The best evaluation so far, where there was one.
    pub best: Option<Best>,
    /// Checksum of the training tokens: a run goes on with the same data only.
    pub data: u32,
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Optimizer steps done then.
    pub step: u64,
    /// Bits per byte of held-out text.
    pub bits_per_byte: f64,
}

/// The optimizer's memory beside the parameters.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerState<'a> {
    /// First moments, laid out as the weights.
    pub m: &'a Buffer,
    /// Second moments, laid out as the weights.
    pub v: &'a Buffer,
    /// States that lanes carry to the next step, where they do.
    pub lanes: Option<&'a Buffer>,
}

impl<'a> OptimizerState<'a> {
    fn parts(self) -> impl Iterator<Item = (&'static str, &'a Buffer)> {
        [("m", self.m), ("v", self.v)].into_iter().chain(self.lanes.map(|l| ("lanes", l)))
    }
}

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// A new folder, which must not exist or be empty.
    pub fn create(path: &Path) -> Result<RunFolder, Error> {
        let taken = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some()) || path.is_file();
        if taken {
            return Err(Error::RunExists { path: path.into() });
        }
        fs::create_dir_all(path.join(CHECKPOINTS)).map_err(|e| Error::io(path, e))?;
        Ok(RunFolder { path: path.into() })
    }

    /// The folder of a run to go on with.
    pub fn open(path: &Path) -> Result<RunFolder, Error> {
        if !path.join("config.toml").is_file() {
            let message = "is not the folder of a run: it has no config.toml; `hognose train` makes one".into();
            return Err(Error::Resume { path: path.into(), message });
        }
        Ok(RunFolder { path: path.into() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the newest checkpoint.
    pub fn latest(&self) -> Result<PathBuf, Error> {
        self.pointed(LATEST).ok_or_else(|| {
            let message = "has no checkpoint to resume from; the run ended before the first one".into();
            Error::Resume { path: self.path.clone(), message }
        })
    }

    fn pointed(&self, pointer: &str) -> Option<PathBuf> {
        let folder = self.path.join(CHECKPOINTS);
        let name = fs::read_to_string(folder.join(pointer)).ok()?;
        Some(folder.join(name.trim())).filter(|p| p.is_dir())
    }

    /// Writes a checkpoint, then makes it the latest (and perhaps the best) and removes those that are neither.
    pub fn save(
        &self,
        config: &ModelConfig,
        weights: &Weights,
        optimizer: OptimizerState<'_>,
        progress: &Progress,
        extra: &[(&str, &[u8])],
    ) -> Result<PathBuf, Error> {
        let name = format!("step-{:08}", progress.step);
        let target = self.path.join(CHECKPOINTS).join(&name);
        // A run that was resumed from an earlier step comes by this one again.
        let _ = fs::remove_dir_all(&target);
        atomic::write_folder(&target, |folder| self.write_into(folder, config, weights, optimizer, progress, extra))?;
        self.point(LATEST, &name)?;
        if progress.best.is_some_and(|b| b.step == progress.step) {
            self.point(BEST, &name)?;
        }
        self.publish(&target)?;
        self.prune();
        Ok(target)
    }

    fn write_into(
        &self,
        folder: &Path,
        config: &ModelConfig,
        weights: &Weights,
        optimizer: OptimizerState<'_>,
        progress: &Progress,
        extra: &[(&str, &[u8])],
    ) -> Result<(), Error> {
        let parameters: Vec<(String, Vec<f32>)> = weights.read_all().collect();
        let tensors: Vec<SaveTensor<'_>> = parameters.iter().map(|(n, v)| (n.as_str(), TensorData::F32(v))).collect();
        hognose_model::checkpoint::save(folder, config, &tensors, extra)?;
        drop(parameters);
        let path = folder.join(OPTIMIZER);
        let parts: Vec<(&str, Vec<u8>)> = optimizer.parts().map(|(n, b)| (n, b.to_bytes())).collect();
        let views = parts.iter().map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            (*name, view.expect("the shape is the number of elements"))
        });
        let data = safetensors::serialize(views, None).map_err(|e| Error::damaged(&path, e))?;
        atomic::write(&path, &data)?;
        let path = folder.join(TRAINER);
        let text = serde_json::to_vec_pretty(progress).map_err(|e| Error::damaged(&path, e))?;
        Ok(atomic::write(&path, &text)?)
    }

    fn point(&self, pointer: &str, name: &str) -> Result<(), Error> {
        Ok(atomic::write(&self.path.join(CHECKPOINTS).join(pointer), format!("{name}\n").as_bytes())?)
    }

    /// Shows the model of a checkpoint in the run's folder itself, so that `--model runs/NAME` finds it: by hard links
    /// where the file system has them, else by copies.
    fn publish(&self, checkpoint: &Path) -> Result<(), Error> {
        for entry in fs::read_dir(checkpoint).map_err(|e| Error::io(checkpoint, e))?.flatten() {
            let name = entry.file_name();
            if name == OPTIMIZER || name == TRAINER {
                continue;
            }
            let target = self.path.join(&name);
            let temporary = self.path.join(format!(".writing-{}", name.to_string_lossy()));
            let _ = fs::remove_file(&temporary);
            fs::hard_link(entry.path(), &temporary)
                .or_else(|_| fs::copy(entry.path(), &temporary).map(drop))
                .and_then(|()| fs::rename(&temporary, &target))
                .map_err(|e| Error::io(&target, e))?;
        }
        Ok(())
    }

    /// Removes checkpoints that are neither the latest nor the best, and what an interrupted save left behind.
    fn prune(&self) {
        let kept = [self.pointed(LATEST), self.pointed(BEST)];
        let Ok(entries) = fs::read_dir(self.path.join(CHECKPOINTS)) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() && !kept.contains(&Some(path.clone())) {
                // A checkpoint too many does no harm, so a failure here is no reason to stop.
                let _ = fs::remove_dir_all(path);
            }
        }
    }
}

/// Reads where a checkpoint stands.
pub fn read_progress(checkpoint: &Path) -> Result<Progress, Error> {
    let path = checkpoint.join(TRAINER);
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::damaged(&path, e))
}

/// Reads the optimizer's memory of a checkpoint.
pub fn read_optimizer(checkpoint: &Path, into: OptimizerState<'_>) -> Result<(), Error> {
    let path = checkpoint.join(OPTIMIZER);
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| Error::damaged(&path, e))?;
    for (name, buffer) in into.parts() {
        let view = file.tensor(name).map_err(|e| Error::damaged(&path, e))?;
        if view.dtype() != Dtype::F32 || view.data().len() != buffer.bytes() {
            let message = format!("{name} has {} bytes; expected {}", view.data().len(), buffer.bytes());
            return Err(Error::Resume { path, message });
        }
        buffer.write_bytes(0, view.data());
    }
    Ok(())
}
