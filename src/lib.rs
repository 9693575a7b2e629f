//! State space models in Rust: load, generate, forward and train in a few lines each.
//!
//! ```no_run
//! # fn main() -> Result<(), hognose::Error> {
//! let model = hognose::load("runs/tiny", &hognose::LoadOptions::default())?;
//! let answer = hognose::complete(&model, "Call me ", &hognose::GenerateOptions::default())?;
//! println!("{answer}");
//! # Ok(())
//! # }
//! ```
//!
//! This crate is the front door. Behind it: [`hognose_core`] (ops, graph, plan, devices), [`hognose_model`]
//! (configurations, checkpoints, states), [`hognose_engine`] (generation) and [`hognose_train`] (training).

pub use hognose_core::{DType, Device};
pub use hognose_engine::{Finish, GenerateOptions, Sampling};
pub use hognose_model::config::ModelConfig;
pub use hognose_model::session::{Model, Session};
pub use hognose_model::state::State;
pub use hognose_model::tokenizer::Tokenizer;
pub use hognose_train::config::TrainConfig;
pub use hognose_train::report::Outcome;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use hognose_engine::generate::Event;
use hognose_model::checkpoint::Checkpoint;
use hognose_model::weights::{Form, Weights};

/// Any error of hognose.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// How a checkpoint is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Where to compute; `None`: the CPU with all cores.
    pub device: Option<Device>,
    /// Type of the matrices in products; `None`: what the checkpoint has ([`Form::of_checkpoint`]).
    pub dtype: Option<DType>,
    /// A tokenizer.json to use instead of the checkpoint's.
    pub tokenizer: Option<PathBuf>,
}

/// A checkpoint in memory, ready to compute.
#[derive(Debug)]
pub struct Loaded {
    /// Configuration, parameters and device.
    pub model: Model,
    /// Missing where the checkpoint has none.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// The folder it came from.
    pub path: PathBuf,
}

/// Loads a checkpoint: a folder in the original or the Hugging Face format, a GGUF file, or an id of the hub (`org/name`).
///
/// # Errors
/// Nothing there, a checkpoint that is damaged or not of a known kind, a tokenizer that cannot be read, too little
/// memory.
pub fn load(path_or_id: &str, options: &LoadOptions) -> Result<Loaded, Error> {
    let path = hognose_model::hub::resolve(path_or_id)?;
    let checkpoint = Checkpoint::open(&path)?;
    let device = match &options.device {
        Some(device) => device.clone(),
        None => Device::auto(None)?.0,
    };
    let form = match options.dtype {
        Some(dtype) => Form::inference(&device, dtype),
        None => Form::of_checkpoint(&device, &checkpoint),
    };
    let weights = Weights::load(&device, &checkpoint, form)?;
    let tokenizer = match &options.tokenizer {
        Some(file) => Some(Tokenizer::load(file)?),
        None => Tokenizer::find(&path)?,
    };
    let eos = checkpoint.config.eos_token_ids.clone();
    Ok(Loaded { model: Model { config: checkpoint.config, weights, device }, tokenizer, eos, path })
}

/// Continues a text. The model must have a tokenizer.
///
/// # Errors
/// No tokenizer, a text that it refuses, an empty prompt, sampling options outside their ranges, logits that are
/// not finite.
pub fn complete(loaded: &Loaded, prompt: &str, options: &GenerateOptions) -> Result<String, Error> {
    let tokenizer = loaded.tokenizer.as_ref().ok_or("the checkpoint has no tokenizer; generate from ids instead")?;
    let mut ids = loaded.start();
    ids.extend(tokenizer.encode(prompt.as_bytes(), true)?);
    let mut options = GenerateOptions { eos: loaded.eos.clone(), ..options.clone() };
    options.sampling.vocabulary.get_or_insert(tokenizer.vocab_size());
    let mut session = Session::new(&loaded.model, 1)?;
    let mut text = hognose_engine::text::TextStream::new(tokenizer, &[]);
    let mut out = String::new();
    let mut failed = None;
    hognose_engine::generate(&mut session, None, &ids, &options, |event| {
        if let Event::Token(id) = event {
            match text.push(id) {
                Ok(piece) => out.push_str(&piece),
                Err(error) => {
                    failed = Some(error);
                    return ControlFlow::Break(Finish::Interrupted);
                }
            }
        }
        ControlFlow::Continue(())
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    out.push_str(&text.finish()?);
    Ok(out)
}

impl Loaded {
    /// Ids that stand before every prompt: a model of bytes was trained with the boundary token before each document.
    /// A tokenizer.json says itself what it puts there.
    pub fn start(&self) -> Vec<u32> {
        match &self.tokenizer {
            Some(Tokenizer::Bytes) => Tokenizer::Bytes.boundary().into_iter().collect(),
            _ => Vec::new(),
        }
    }
}

/// Logits of every position of a sequence, row-major `[ids.len(), padded vocabulary]`. Memory beside the result does
/// not grow with the length.
///
/// # Errors
/// An id outside the vocabulary; too little memory.
pub fn forward(model: &Model, ids: &[u32]) -> Result<Vec<f32>, Error> {
    let mut session = Session::new(model, 1)?;
    Ok(forward_in(&mut session, ids)?)
}

/// As [`forward`], in a session with one slot: continues its sequence.
///
/// # Errors
/// As [`forward`]; a session with more than one slot.
pub fn forward_in(session: &mut Session<'_>, ids: &[u32]) -> Result<Vec<f32>, hognose_model::Error> {
    let mut logits = Vec::with_capacity(ids.len() * session.model().config.padded_vocab);
    for chunk in ids.chunks(session.prefill_tokens()) {
        let rows: Vec<usize> = (0..chunk.len()).collect();
        let pack = hognose_core::Pack::from_lengths([chunk.len()])?;
        logits.extend(session.run(chunk, &pack, &rows)?);
    }
    Ok(logits)
}

/// Trains a model as the configuration says, into a new folder, without a word. `hognose_train::trainer::train` takes
/// an observer that watches.
///
/// # Errors
/// A configuration that is not possible, data that cannot be read, a folder that holds something, too little memory,
/// a loss that is not finite.
pub fn train(config: TrainConfig, folder: &Path) -> Result<Outcome, Error> {
    let (devices, _) = hognose_train::setup::devices(&config)?;
    let mut silent = hognose_train::report::Silent;
    let outcome = hognose_train::trainer::train(config, devices, folder, false, &mut silent)?;
    outcome.ok_or_else(|| "training ended before it began".into())
}
