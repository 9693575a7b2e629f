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

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hognose_core::Buffer;
use hognose_model::checkpoint::{SaveTensor, TensorData};
use hognose_model::config::ModelConfig;
use hognose_model::weights::Weights;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::atomic::{self, SaveError};
use crate::data::Cursor;
use crate::error::Error;
use crate::schedule::Schedule;

const CHECKPOINTS: &str = "checkpoints";
const LATEST: &str = "latest";
const BEST: &str = "best";
/// Held by the process that trains into the folder; let go by the system however that process ends.
const LOCK: &str = ".lock";
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
#[derive(Debug)]
pub struct OptimizerState<'a> {
    /// First and second moments.
    pub m: &'a mut Buffer,
    pub v: &'a mut Buffer,
    /// States that lanes carry to the next step, where they do.
    pub lanes: Option<&'a mut Buffer>,
}

impl<'a> OptimizerState<'a> {
    fn parts(self) -> impl Iterator<Item = (&'static str, &'a mut Buffer)> {
        [("m", self.m), ("v", self.v)].into_iter().chain(self.lanes.map(|l| ("lanes", l)))
    }
}

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Only held, never read.
    _lock: Option<Arc<File>>,
}

impl RunFolder {
    /// Refuses a folder in which there is something.
    pub fn check_free(path: &Path) -> Result<(), Error> {
        let mut entries = fs::read_dir(path).into_iter().flatten().flatten();
        if path.is_file() || entries.any(|e| e.file_name() != LOCK) {
            return Err(Error::RunExists { path: path.into() });
        }
        Ok(())
    }

    /// A new folder, which must not exist or be empty.
    pub fn create(path: &Path) -> Result<RunFolder, Error> {
        RunFolder::check_free(path)?;
        fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        let run = RunFolder { path: path.into(), _lock: None }.lock()?;
        // Another process may have been faster, and be done already.
        RunFolder::check_free(path)?;
        fs::create_dir_all(path.join(CHECKPOINTS)).map_err(|e| Error::io(path, e))?;
        Ok(run)
    }

    /// Keeps other processes from training into the folder as long as this value lives.
    pub fn lock(self) -> Result<RunFolder, Error> {
        let path = self.path.join(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let message = "is being trained into by another process; stop that one first, or choose another --out";
                return Err(Error::Resume { path: self.path, message: message.into() });
            }
            // Some network file systems have no locks; nothing is lost that was not lost before.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        Ok(RunFolder { _lock: Some(Arc::new(file)), ..self })
    }

    /// The folder of a run to go on with.
    pub fn open(path: &Path) -> Result<RunFolder, Error> {
        if !path.join("config.toml").is_file() {
            let message = "is not the folder of a run: it has no config.toml; `hognose train` makes one".into();
            return Err(Error::Resume { path: path.into(), message });
        }
        Ok(RunFolder { path: path.into(), _lock: None })
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
        weights: &mut Weights,
        optimizer: OptimizerState<'_>,
        progress: &Progress,
        extra: &[(&str, &[u8])],
    ) -> Result<PathBuf, Error> {
        let name = format!("step-{:08}", progress.step);
        let target = self.path.join(CHECKPOINTS).join(&name);
        if self.pointed(LATEST).is_some_and(|latest| latest == target) {
            // Nothing was trained since: only what was measured is new, and the weights must not be at risk.
            write_progress(&target, progress)?;
        } else {
            // A session that broke off before it could point here may have left this step's checkpoint.
            let _ = fs::remove_dir_all(&target);
            atomic::write_folder(&target, |folder| {
                self.write_into(folder, config, weights, optimizer, progress, extra)
            })?;
            self.point(LATEST, &name)?;
        }
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
        weights: &mut Weights,
        optimizer: OptimizerState<'_>,
        progress: &Progress,
        extra: &[(&str, &[u8])],
    ) -> Result<(), Error> {
        // Straight from the memory in which they are trained: a save needs no memory of its own.
        weights.with_tensors(|tensors| {
            let tensors: Vec<SaveTensor<'_>> =
                tensors.iter().map(|(name, values)| (*name, TensorData::F32(values))).collect();
            hognose_model::checkpoint::save(folder, config, &tensors, extra)
        })?;
        let path = folder.join(OPTIMIZER);
        let (mut parts, mut views) = (Vec::new(), Vec::new());
        for (name, buffer) in optimizer.parts() {
            let len = buffer.bytes() / 4;
            parts.push((name, buffer.contents::<f32>(0, len)));
        }
        for (name, values) in &parts {
            let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values));
            views.push((*name, view.map_err(|e| Error::damaged(&path, e))?));
        }
        // The folder as a whole is synced and put in place by the caller.
        safetensors::serialize_to_file(views, None, &path).map_err(|e| match e {
            SafeTensorError::IoError(source) => SaveError::Io { path: path.clone(), source }.into(),
            other => Error::damaged(&path, other),
        })?;
        write_progress(folder, progress)
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

fn write_progress(checkpoint: &Path, progress: &Progress) -> Result<(), Error> {
    let path = checkpoint.join(TRAINER);
    let text = serde_json::to_vec_pretty(progress).map_err(|e| Error::damaged(&path, e))?;
    Ok(atomic::write(&path, &text)?)
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
