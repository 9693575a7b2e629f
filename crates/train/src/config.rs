//! The configuration of a training run, read from and written to TOML.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hognose_core::graph::Recompute;
use serde::{Deserialize, Serialize};

use crate::data::sources::DEFAULT_FIELD;
use crate::schedule::{Kind, Schedule};

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read, or is not UTF-8.
    #[error("cannot read the configuration {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    /// Not TOML, a key that does not exist, or a value of another type; with the place in the file.
    #[error("the configuration {path} is not valid:\n{reason}")]
    Parse { path: PathBuf, reason: String },
    /// A value outside what is possible.
    #[error("{name} is {found}, expected {expected}")]
    Value { name: &'static str, found: String, expected: &'static str },
    /// A value that has no form in TOML.
    #[error("the configuration cannot be written as TOML: {0}")]
    Write(String),
}

/// The number type of stored activations and matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    #[default]
    F32,
    /// The upper half of an f32.
    Bf16,
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What of the forward pass is computed again in the backward pass instead of being kept: `false`, `"cheap"` or `true`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RecomputationText", into = "RecomputationText")]
pub enum Recomputation {
    /// Nothing: fastest, most memory.
    #[default]
    Nothing,
    /// Ops that cost little beside their memory: convolutions, Δ, gates.
    Cheap,
    /// Every layer: least memory, about a forward pass more work.
    Layers,
}

/// [`Recomputation`] as it stands in TOML.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RecomputationText {
    All(bool),
    Some(String),
}

impl TryFrom<RecomputationText> for Recomputation {
    type Error = String;

    fn try_from(text: RecomputationText) -> Result<Recomputation, String> {
        match text {
            RecomputationText::All(false) => Ok(Recomputation::Nothing),
            RecomputationText::All(true) => Ok(Recomputation::Layers),
            RecomputationText::Some(word) if word == "cheap" => Ok(Recomputation::Cheap),
            RecomputationText::Some(word) => Err(format!("recompute is false, true or \"cheap\", but is \"{word}\"")),
        }
    }
}

impl From<Recomputation> for RecomputationText {
    fn from(what: Recomputation) -> RecomputationText {
        match what {
            Recomputation::Nothing => RecomputationText::All(false),
            Recomputation::Cheap => RecomputationText::Some("cheap".to_owned()),
            Recomputation::Layers => RecomputationText::All(true),
        }
    }
}

impl From<Recomputation> for Recompute {
    fn from(what: Recomputation) -> Recompute {
        match what {
            Recomputation::Nothing => Recompute::Nothing,
            Recomputation::Cheap => Recompute::Cheap,
            Recomputation::Layers => Recompute::All,
        }
    }
}

/// Micro-batches of a step that are taken for real: all of them are in memory at once.
const MAX_ACCUMULATION: usize = 1 << 16;

/// Everything that decides what a training run computes. The defaults are those of a run without any argument.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// The name of a model configuration; `[model]` changes single values of it.
    pub preset: String,
    /// A checkpoint to start from (fine-tuning) in place of a fresh model; the preset is then not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Seed of the split, the order of the data, the initial parameters and dropout. At most 2⁶³ − 1, as in TOML.
    pub seed: u64,
    /// Where to train.
    pub device: DeviceKind,
    /// Numbers of the GPUs that share each batch, counted from 0; the first GPU when there are none. Which ones, and how
    /// many, changes the results by rounding only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<usize>,
    /// Type of stored activations and matrix products; parameters and their gradients are f32 in any case.
    pub dtype: Dtype,
    /// Threads on the CPU; all cores when absent. The results do not depend on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Optimiser steps.
    pub steps: u64,
    /// Time budget in minutes; the decay of the learning rate begins early enough to be done by then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minutes: Option<f64>,
    /// Tokens of a window.
    pub length: usize,
    /// Windows of a micro-batch, over all devices.
    pub batch: usize,
    /// Micro-batches whose gradients make up a step.
    pub accumulation: usize,
    /// Whether the state goes on from window to window inside a document.
    pub carry_state: bool,
    /// What of the forward pass is computed again in the backward pass instead of being kept.
    pub recompute: Recomputation,
    /// Probability of dropping a value, in `[0, 1)`.
    pub dropout: f64,
    /// Steps from one evaluation to the next; 0 evaluates only at the end.
    pub eval_every: u64,
    /// Steps from one checkpoint to the next; 0 writes only the last one.
    pub checkpoint_every: u64,
    /// Steps from one line written by the model to the next; 0 for none.
    pub sample_every: u64,
    /// `[data]`: what to train on.
    pub data: DataConfig,
    /// `[optimizer]`: AdamW.
    pub optimizer: OptimizerConfig,
    /// `[schedule]`: the learning rate over the steps.
    pub schedule: ScheduleConfig,
    /// Values of the model's configuration that differ from the preset's.
    pub model: toml::Table,
}

/// What to train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Files, folders and patterns; none for the text inside the program.
    pub paths: Vec<PathBuf>,
    /// The field of a JSON line that holds the text.
    pub field: String,
    /// A tokenizer.json; bytes, or the tokenizer of the checkpoint that `init` names, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// The share of the text that is held out, in `[0, 1)`.
    pub validation_fraction: f64,
}

/// AdamW with decoupled weight decay (Loshchilov and Hutter, 2019).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The largest learning rate.
    pub lr: f64,
    /// Decay of the first and second moment, in `[0, 1)`.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of the learning rate by which matrices, embedding and convolutions shrink in a step; norms, biases, A and
    /// D do not.
    pub weight_decay: f64,
    /// The global norm to which larger gradients are scaled down; 0 for no clipping.
    pub clip: f64,
}

/// The course of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Its form after the warm-up.
    pub kind: Kind,
    /// Steps of warm-up; a twentieth of the steps, at most 100, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// The last rate as a share of the largest, in `[0, 1]`.
    pub min_ratio: f64,
    /// The share of the steps that the decay of the stable-decay kinds takes, in `[0, 1]`.
    pub decay_fraction: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            preset: "tiny".to_owned(),
            init: None,
            seed: 0,
            device: DeviceKind::default(),
            devices: Vec::new(),
            dtype: Dtype::default(),
            threads: None,
            steps: 4000,
            minutes: None,
            length: 256,
            batch: 8,
            accumulation: 1,
            carry_state: false,
            recompute: Recomputation::Nothing,
            dropout: 0.0,
            eval_every: 500,
            checkpoint_every: 500,
            sample_every: 250,
            data: DataConfig::default(),
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            model: toml::Table::new(),
        }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { paths: Vec::new(), field: DEFAULT_FIELD.to_owned(), tokenizer: None, validation_fraction: 0.05 }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { lr: 3e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: Kind::StableDecaySqrt, warmup: None, min_ratio: 0.0, decay_fraction: 0.3 }
    }
}

impl TrainConfig {
    /// Reads a file. What it does not name keeps its default; a name that does not exist is an error. Values are
    /// checked by [`TrainConfig::resolve`], after the command line has had its say.
    ///
    /// # Errors
    /// [`ConfigError::Read`], and [`ConfigError::Parse`] with the line, what is wrong and what could stand there.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_path_buf(), source };
        let text = String::from_utf8(fs::read(path).map_err(read)?)
            .map_err(|error| read(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_path_buf(),
            reason: error.to_string().trim_end().to_owned(),
        })
    }

    /// The configuration as TOML, which [`TrainConfig::load`] reads back to the same values.
    ///
    /// # Errors
    /// [`ConfigError::Write`] if a value has no place in TOML, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|error| ConfigError::Write(error.to_string()))
    }

    /// Checks every value and fills in those that follow from others.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first value that is not possible.
    pub fn resolve(mut self) -> Result<Self, ConfigError> {
        self.check()?;
        self.schedule.warmup.get_or_insert((self.steps / 20).min(100));
        Ok(self)
    }

    /// The learning rate of each step.
    pub fn learning_rate(&self) -> Schedule {
        let ScheduleConfig { kind, warmup, min_ratio, decay_fraction } = self.schedule;
        let warmup = warmup.unwrap_or((self.steps / 20).min(100));
        Schedule::new(kind, self.optimizer.lr, min_ratio, warmup, decay_fraction, self.steps)
    }

    /// Tokens of a step, over all its micro-batches.
    pub fn tokens_per_step(&self) -> u64 {
        (self.length as u64).saturating_mul(self.batch as u64).saturating_mul(self.accumulation as u64)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let fail = |name, found: String, expected| Err(ConfigError::Value { name, found, expected });
        let counts = [
            ("steps", self.steps),
            ("length", self.length as u64),
            ("batch", self.batch as u64),
            ("accumulation", self.accumulation as u64),
            ("threads", self.threads.map_or(1, |threads| threads as u64)),
        ];
        if self.accumulation > MAX_ACCUMULATION {
            return fail("accumulation", self.accumulation.to_string(), "a whole number from 1 to 65536");
        }
        for (name, value) in counts {
            if value == 0 || i64::try_from(value).is_err() {
                return fail(name, value.to_string(), "a whole number from 1 up");
            }
        }
        let devices = &self.devices;
        if self.device == DeviceKind::Cpu && !devices.is_empty() {
            return fail("devices", format!("{devices:?}"), "none with device = \"cpu\": they are numbers of GPUs");
        }
        if (1..devices.len()).any(|i| devices[..i].contains(&devices[i])) {
            return fail("devices", format!("{devices:?}"), "each GPU once");
        }
        if self.batch < devices.len() {
            return fail("batch", self.batch.to_string(), "at least one window for each of the devices");
        }
        if i64::try_from(self.seed).is_err() {
            return fail("seed", self.seed.to_string(), "a whole number from 0 to 2⁶³ − 1");
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        let share = |value: f64| (0.0..=1.0).contains(&value);
        const POSITIVE: &str = "a finite number above 0";
        const NOT_NEGATIVE: &str = "a finite number from 0 up";
        const BELOW_ONE: &str = "a number from 0 up to but not including 1";
        const SHARE: &str = "a number from 0 to 1";
        let optimizer = &self.optimizer;
        let numbers = [
            ("minutes", self.minutes.unwrap_or(1.0), positive as fn(f64) -> bool, POSITIVE),
            ("dropout", self.dropout, below_one, BELOW_ONE),
            ("data.validation_fraction", self.data.validation_fraction, below_one, BELOW_ONE),
            ("optimizer.lr", optimizer.lr, positive, POSITIVE),
            ("optimizer.betas[0]", optimizer.betas[0], below_one, BELOW_ONE),
            ("optimizer.betas[1]", optimizer.betas[1], below_one, BELOW_ONE),
            ("optimizer.eps", optimizer.eps, positive, POSITIVE),
            ("optimizer.weight_decay", optimizer.weight_decay, not_negative, NOT_NEGATIVE),
            ("optimizer.clip", optimizer.clip, not_negative, NOT_NEGATIVE),
            ("schedule.min_ratio", self.schedule.min_ratio, share, SHARE),
            ("schedule.decay_fraction", self.schedule.decay_fraction, share, SHARE),
        ];
        for (name, value, holds, expected) in numbers {
            if !holds(value) {
                return fail(name, value.to_string(), expected);
            }
        }
        let texts = [("preset", &self.preset), ("data.field", &self.data.field)];
        for (name, value) in texts {
            if value.is_empty() {
                return fail(name, "empty".to_owned(), "a name");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn load(text: &str) -> Result<TrainConfig, ConfigError> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("config.toml");
        fs::write(&path, text).unwrap();
        TrainConfig::load(&path)
    }

    fn message(change: impl FnOnce(&mut TrainConfig)) -> String {
        let mut config = TrainConfig::default();
        change(&mut config);
        config.resolve().unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_is_the_default_run() {
        assert_eq!(load("").unwrap(), TrainConfig::default());
        TrainConfig::default().resolve().unwrap();
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let mut config = TrainConfig {
            init: Some("runs/a".into()),
            minutes: Some(3.5),
            threads: Some(2),
            dtype: Dtype::Bf16,
            device: DeviceKind::Cuda,
            devices: vec![0, 3],
            ..TrainConfig::default()
        };
        config.data.paths = vec!["a.txt".into(), "b/*.jsonl".into()];
        config.data.tokenizer = Some("tokenizer.json".into());
        config.optimizer.lr = 0.1 + 0.2;
        config.model.insert("layers".to_owned(), toml::Value::Integer(3));
        for config in [config.resolve().unwrap(), TrainConfig::default().resolve().unwrap()] {
            let text = config.to_toml().unwrap();
            assert_eq!(load(&text).unwrap(), config, "{text}");
        }
    }

    #[test]
    fn a_file_changes_what_it_names() {
        let config = load(
            "steps = 10\ndevice = \"cpu\"\n[data]\nfield = \"body\"\n[schedule]\nkind = \"cosine\"\n\
             [model]\nd_model = 64\n[model.ssm]\nd_state = 8\n",
        );
        let config = config.unwrap().resolve().unwrap();
        assert_eq!((config.steps, config.device, config.length), (10, DeviceKind::Cpu, TrainConfig::default().length));
        assert_eq!(config.data.field, "body");
        assert_eq!((config.schedule.kind, config.schedule.warmup), (Kind::Cosine, Some(0)));
        assert_eq!(config.model["ssm"]["d_state"].as_integer(), Some(8));
        assert_eq!(config.learning_rate().rate(0), config.optimizer.lr);
    }

    #[test]
    fn says_where_a_file_is_wrong() {
        let error = load("steps = 10\nlerning_rate = 1.0\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("unknown field `lerning_rate`"), "{error}");
        assert!(error.contains("`optimizer`"), "the possible names are listed: {error}");
        let error = load("[optimizer]\nlearning_rate = 1.0\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("`lr`"), "{error}");
        for (text, part) in [
            ("steps = -1", "line 1"),
            ("steps = 1.5", "expected u64"),
            ("dtype = \"f16\"", "expected `f32` or `bf16`"),
            ("steps = ", "line 1"),
            ("[schedule]\nkind = \"linear\"", "`stable-decay`"),
            ("[optimizer]\nbetas = [0.9]", "line 2"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let missing = TrainConfig::load(Path::new("no/config.toml")).unwrap_err().to_string();
        assert!(missing.contains("cannot read the configuration no/config.toml"), "{missing}");
    }

    #[test]
    fn impossible_values_are_named() {
        assert_eq!(message(|c| c.steps = 0), "steps is 0, expected a whole number from 1 up");
        assert!(message(|c| c.length = 0).starts_with("length is 0"));
        assert!(message(|c| c.batch = 0).starts_with("batch is 0"));
        assert!(message(|c| c.accumulation = 0).starts_with("accumulation is 0"));
        assert!(message(|c| c.accumulation = 65537).ends_with("65537, expected a whole number from 1 to 65536"));
        assert!(message(|c| c.threads = Some(0)).starts_with("threads is 0"));
        assert_eq!(message(|c| c.devices = vec![0, 2, 0]), "devices is [0, 2, 0], expected each GPU once");
        assert!(
            message(|c| (c.devices, c.device) = (vec![1], DeviceKind::Cpu))
                .starts_with("devices is [1], expected none")
        );
        assert!(message(|c| (c.devices, c.batch) = (vec![0, 1], 1)).starts_with("batch is 1, expected at least one"));
        assert!(message(|c| c.seed = u64::MAX).starts_with("seed is"));
        assert_eq!(message(|c| c.optimizer.lr = f64::NAN), "optimizer.lr is NaN, expected a finite number above 0");
        assert!(message(|c| c.optimizer.lr = f64::INFINITY).starts_with("optimizer.lr is inf"));
        assert!(message(|c| c.optimizer.betas[1] = 1.0).starts_with("optimizer.betas[1] is 1"));
        assert!(message(|c| c.optimizer.clip = -1.0).starts_with("optimizer.clip is -1"));
        assert!(message(|c| c.dropout = 1.0).starts_with("dropout is 1"));
        assert!(message(|c| c.minutes = Some(0.0)).starts_with("minutes is 0"));
        assert!(message(|c| c.data.validation_fraction = 1.0).starts_with("data.validation_fraction is 1"));
        assert!(message(|c| c.schedule.min_ratio = 1.5).starts_with("schedule.min_ratio is 1.5"));
        assert!(message(|c| c.preset.clear()).starts_with("preset is empty"));
    }
}
