//! What a run leaves behind beside its checkpoints: metrics and pictures.

use std::io;
use std::path::{Path, PathBuf};

mod jsonl;
mod plot;
mod run;
mod tensorboard;

pub use jsonl::{Metrics, MetricsLog, read_metrics};
pub use plot::LossPlot;
pub use run::Records;
pub use tensorboard::EventWriter;

/// What can go wrong with the records of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The operating system refused.
    #[error("cannot write {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// A line of metrics.jsonl that is not one.
    #[error("{path}, line {line}: expected the metrics of a step, found {reason}; the file was changed or is damaged")]
    Line { path: PathBuf, line: usize, reason: String },
    /// A file cannot be written.
    #[error(transparent)]
    Save(#[from] crate::atomic::SaveError),
    /// There are no metrics to draw.
    #[error("there is nothing to draw: expected at least one step with a finite loss")]
    NothingToDraw,
    /// The picture cannot be drawn or written.
    #[error(transparent)]
    Picture(#[from] hognose_plot::Error),
}

impl RecordError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}
