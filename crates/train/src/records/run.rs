//! All records of a run together: metrics.jsonl, TensorBoard events, the picture of the loss curves.

use std::path::{Path, PathBuf};

use super::{EventWriter, LossPlot, Metrics, MetricsLog, RecordError, read_metrics};
use crate::atomic;
use crate::report::{Baselines, EvaluationReport, StepReport};

const METRICS: &str = "metrics.jsonl";
const BASELINES: &str = "baselines.json";

/// The records in a run's folder.
#[derive(Debug)]
pub struct Records {
    folder: PathBuf,
    log: MetricsLog,
    events: EventWriter,
    baselines: Option<Baselines>,
    /// Where the last step stood, for evaluations.
    last: Metrics,
}

impl Records {
    /// Opens the records of a run that has done `step` steps of `step_tokens` tokens: what a broken-off session wrote past
    /// them goes.
    pub fn open(folder: &Path, step: u64, step_tokens: u64) -> Result<Records, RecordError> {
        let path = folder.join(METRICS);
        let (log, resumed) =
            if step == 0 { (MetricsLog::create(&path)?, None) } else { (MetricsLog::resume(&path, step)?, Some(step)) };
        let events = EventWriter::create(folder, resumed)?;
        let baselines = std::fs::read(folder.join(BASELINES)).ok().and_then(|t| serde_json::from_slice(&t).ok());
        Ok(Records {
            folder: folder.into(),
            log,
            events,
            baselines,
            last: Metrics { step, tokens: step * step_tokens, ..Metrics::default() },
        })
    }

    /// Records a step.
    pub fn step(&mut self, step: &StepReport) -> Result<(), RecordError> {
        self.last = Metrics {
            step: step.step,
            tokens: step.tokens,
            epoch: step.epochs,
            seconds: step.elapsed,
            ..Metrics::default()
        };
        self.write(Metrics {
            loss: Some(step.loss),
            bits_per_byte: Some(step.bits_per_byte),
            learning_rate: Some(step.lr),
            gradient_norm: Some(step.gradient_norm),
            tokens_per_second: Some(step.tokens_per_second),
            ..self.last.clone()
        })
    }

    /// Records an evaluation.
    pub fn evaluation(&mut self, found: &EvaluationReport) -> Result<(), RecordError> {
        self.write(Metrics { validation_bits_per_byte: Some(found.bits_per_byte), ..self.last.clone() })
    }

    fn write(&mut self, metrics: Metrics) -> Result<(), RecordError> {
        self.log.write(&metrics)?;
        self.events.metrics(&metrics)
    }

    /// What compressors need, where it is known.
    pub fn baselines(&self) -> Option<Baselines> {
        self.baselines
    }

    /// Keeps what compressors need.
    pub fn set_baselines(&mut self, found: &Baselines) -> Result<(), RecordError> {
        self.baselines = Some(*found);
        let text = serde_json::to_vec_pretty(found).unwrap_or_default();
        Ok(atomic::write(&self.folder.join(BASELINES), &text)?)
    }

    /// Draws the loss curves.
    pub fn finish(&self) -> Result<(), RecordError> {
        let metrics = read_metrics(&self.folder.join(METRICS))?;
        let name = self.folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut plot = LossPlot::new(name, &metrics);
        if let Some(b) = &self.baselines {
            plot = plot.reference("xz -9", b.xz.bits_per_byte).reference("gzip -9", b.gzip.bits_per_byte);
        }
        plot.write_png(&self.folder.join("loss.png"))?;
        plot.write_svg(&self.folder.join("loss.svg"))
    }
}
