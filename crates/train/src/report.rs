//! What a training run tells whoever watches it.

use std::path::Path;

use hognose_model::config::ModelConfig;
use hognose_model::session::Model;
use hognose_model::tokenizer::Tokenizer;

use serde::{Deserialize, Serialize};

use crate::baseline::Baseline;

/// What will be trained and what it needs, before the first step.
#[derive(Clone, Debug)]
pub struct PlanReport {
    /// What is trained.
    pub model: ModelConfig,
    /// Number of its parameters.
    pub parameters: u64,
    /// Devices that share each batch.
    pub devices: usize,
    /// The first of them, in words.
    pub device: String,
    /// Bytes of parameters, gradients and the optimizer's moments on each device.
    pub persistent_bytes: u64,
    /// Bytes of the arena: all intermediate tensors of a micro-batch.
    pub arena_bytes: u64,
    /// Bytes that they would need without sharing.
    pub unshared_bytes: u64,
    /// Bytes that were free on the device before any of it was taken.
    pub available_bytes: u64,
    /// Floating-point operations of a step.
    pub step_flops: f64,
    /// Floating-point operations a second that the devices reach together, in a loop of multiply-adds or a large product.
    pub peak_flops: f64,
    /// Tokens of a step.
    pub step_tokens: u64,
    /// Steps in all.
    pub steps: u64,
    /// Steps done before this session of the run.
    pub start_step: u64,
    /// Documents to train on.
    pub training_documents: usize,
    /// Their bytes.
    pub training_bytes: u64,
    /// Their tokens, boundaries included.
    pub training_tokens: u64,
    /// Documents held out.
    pub held_out_documents: usize,
    /// Their bytes.
    pub held_out_bytes: u64,
    /// Where the text comes from.
    pub data: String,
    /// `bytes` or `tokenizer.json`.
    pub tokenizer: String,
}

/// One optimizer step.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Steps done.
    pub step: u64,
    /// Steps in all: fewer than planned where the time budget is short.
    pub steps: u64,
    /// Mean cross-entropy of the step's tokens, in nats.
    pub loss: f64,
    /// The same per byte of text, in bits.
    pub bits_per_byte: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Tokens of all steps so far.
    pub tokens: u64,
    /// Tokens of the step by its seconds.
    pub tokens_per_second: f64,
    /// Share of the device's measured peak.
    pub utilisation: f64,
    /// Passes over the training text so far.
    pub epochs: f64,
    /// Seconds trained in all sessions of the run.
    pub elapsed: f64,
    /// Seconds that are left, as far as one can tell.
    pub left: f64,
}

/// An evaluation on held-out text.
#[derive(Clone, Copy, Debug)]
pub struct EvaluationReport {
    /// Steps done.
    pub step: u64,
    /// Bits per byte of held-out text.
    pub bits_per_byte: f64,
    /// Bytes of held-out text that were predicted.
    pub bytes: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Whether it is the best so far.
    pub best: bool,
    /// Whether all held-out text was used.
    pub full: bool,
}

/// What compressors need for the held-out text, having seen the training text.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Baselines {
    /// `gzip -9`.
    pub gzip: Baseline,
    /// `xz -9`.
    pub xz: Baseline,
}

/// Watches a run. Every method has an empty default.
pub trait Observer {
    /// Before the first step.
    fn plan(&mut self, _plan: &PlanReport) {}
    /// After each step.
    fn step(&mut self, _step: &StepReport) {}
    /// After each evaluation.
    fn evaluation(&mut self, _evaluation: &EvaluationReport) {}
    /// How much of an evaluation is done, from 0 to 1.
    fn evaluating(&mut self, _done: f64) {}
    /// Now and then the model itself, for a line that it writes.
    fn sample(&mut self, _step: u64, _model: &Model, _tokenizer: &Tokenizer) {}
    /// A checkpoint was written.
    fn saved(&mut self, _step: u64, _folder: &Path) {}
    /// Anything else worth knowing.
    fn note(&mut self, _text: &str) {}
    /// The compressors are done; they run beside the training.
    fn baselines(&mut self, _baselines: &Baselines) {}
    /// Whether training should save and stop now.
    fn interrupted(&mut self) -> bool {
        false
    }
}

/// Watches nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The run's folder.
    pub folder: std::path::PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps planned, as far as the time budget allowed.
    pub steps: u64,
    /// It was interrupted and can be resumed.
    pub interrupted: bool,
    /// Bits per byte on all held-out text; missing where the run was interrupted or nothing is held out.
    pub bits_per_byte: Option<f64>,
    /// What compressors need for the same text.
    pub baselines: Option<Baselines>,
    /// Seconds trained in all sessions of the run.
    pub elapsed: f64,
}
