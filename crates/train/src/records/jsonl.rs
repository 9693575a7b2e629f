//! Metrics as JSON lines.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::RecordError;

/// The metrics of a step or of an evaluation. What was not measured is left out; a value that is not finite is
/// written as `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens seen in training so far.
    pub tokens: u64,
    /// The position in the training data as a number of epochs.
    pub epoch: f64,
    /// Time spent in training so far, in seconds, without the time between a stop and a resume.
    pub seconds: f64,
    /// Mean cross-entropy of the step's training tokens, in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// The same in bits per byte of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Learning rate of the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Global norm of the gradient before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f64>,
    /// Training tokens of the step by its seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Mean cross-entropy of the validation tokens, in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// The same in bits per byte of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_bits_per_byte: Option<f64>,
}

/// A file of metrics that grows by a line at a time. Each line is handed to the system whole, at once.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Starts a new file; one that exists is emptied.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn create(path: &Path) -> Result<Self, RecordError> {
        let file = File::create(path).map_err(RecordError::io(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Continues a file after `step`: lines of later steps, which the resumed run will write again, and a last line
    /// that was not completed are cut off. A file that does not exist is started.
    ///
    /// # Errors
    /// [`RecordError::Io`], and [`RecordError::Line`] for a line before that which is not metrics.
    pub fn resume(path: &Path, step: u64) -> Result<Self, RecordError> {
        let mut keep = 0;
        for found in lines(path)? {
            let (metrics, end) = found?;
            if metrics.step > step {
                break;
            }
            keep = end;
        }
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(RecordError::io(path))?;
        file.set_len(keep as u64).map_err(RecordError::io(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn write(&mut self, metrics: &Metrics) -> Result<(), RecordError> {
        let mut line = serde_json::to_vec(metrics).map_err(io::Error::from).map_err(RecordError::io(&self.path))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(RecordError::io(&self.path))
    }
}

/// All metrics of a file. A last line that was not completed is left out.
///
/// # Errors
/// [`RecordError`] if the file cannot be read or holds something else.
pub fn read_metrics(path: &Path) -> Result<Vec<Metrics>, RecordError> {
    lines(path)?.map(|line| line.map(|(metrics, _)| metrics)).collect()
}

/// The completed lines of a file, each with the position of its end. A missing file has none.
fn lines(path: &Path) -> Result<impl Iterator<Item = Result<(Metrics, usize), RecordError>>, RecordError> {
    let mut bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(RecordError::io(path)(error)),
    };
    bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1));
    let path = path.to_path_buf();
    let (mut start, mut line) = (0, 0);
    Ok(std::iter::from_fn(move || {
        let end = start + bytes[start..].iter().position(|&byte| byte == b'\n')? + 1;
        line += 1;
        let metrics = serde_json::from_slice(&bytes[start..end]).map_err(|error| RecordError::Line {
            path: path.clone(),
            line,
            reason: format!("\"{error}\""),
        });
        start = end;
        Some(metrics.map(|metrics| (metrics, end)))
    }))
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn metrics(step: u64, loss: f64) -> Metrics {
        Metrics { step, loss: Some(loss), ..Metrics::default() }
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let folder = TempDir::new().unwrap();
        let (whole, resumed) = (folder.path().join("whole"), folder.path().join("resumed"));
        let mut log = MetricsLog::create(&whole).unwrap();
        (1..=6).for_each(|step| log.write(&metrics(step, 1.0 / step as f64)).unwrap());
        let mut log = MetricsLog::create(&resumed).unwrap();
        (1..=4).for_each(|step| log.write(&metrics(step, 1.0 / step as f64)).unwrap());
        // The run died while it wrote the fifth line, and its last checkpoint is of step 3.
        fs::OpenOptions::new().append(true).open(&resumed).unwrap().write_all(b"{\"step\":5,\"lo").unwrap();
        assert_eq!(read_metrics(&resumed).unwrap().len(), 4);
        let mut log = MetricsLog::resume(&resumed, 3).unwrap();
        (4..=6).for_each(|step| log.write(&metrics(step, 1.0 / step as f64)).unwrap());
        assert_eq!(fs::read(&whole).unwrap(), fs::read(&resumed).unwrap());
        assert_eq!(read_metrics(&whole).unwrap()[2], metrics(3, 1.0 / 3.0));
    }

    #[test]
    fn a_torn_line_alone_is_cut_off_too() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "{\"step\":1}\n{\"st").unwrap();
        MetricsLog::resume(&path, 10).unwrap().write(&metrics(2, 0.5)).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), [Metrics { step: 1, ..Metrics::default() }, metrics(2, 0.5)]);
    }

    #[test]
    fn a_missing_log_is_started_and_a_foreign_one_refused() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("log");
        MetricsLog::resume(&path, 3).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), []);
        fs::write(&path, "{\"step\":1}\nhello\n").unwrap();
        let error = MetricsLog::resume(&path, 3).unwrap_err().to_string();
        assert!(error.contains("line 2: expected the metrics of a step"), "{error}");
        assert_eq!(fs::read(&path).unwrap().len(), 17, "nothing was cut");
    }

    #[test]
    fn what_is_not_finite_or_not_measured_reads_as_absent() {
        let line = serde_json::to_string(&metrics(1, f64::NAN)).unwrap();
        assert_eq!(line, r#"{"step":1,"tokens":0,"epoch":0.0,"seconds":0.0,"loss":null}"#);
        assert_eq!(serde_json::from_str::<Metrics>(&line).unwrap().loss, None);
    }
}
