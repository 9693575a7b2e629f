//! State space models in Rust: load, generate, forward and train in a few lines each.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
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

use std::ops::ControlFlow;
use std::path::PathBuf;

use hognose_engine::generate::Event;
use hognose_model::checkpoint::{self, Checkpoint};
use hognose_model::weights::{Form, Weights};

/// Any error of hognose.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// How a checkpoint is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Where to compute; `None`: the CPU with all cores.
    pub device: Option<Device>,
    /// Type of the matrices in products; `None`: bf16 where the checkpoint stores bf16, else f32.
    pub dtype: Option<DType>,
    /// A tokenizer.json to use instead of the checkpoint's.
    pub tokenizer: Option<PathBuf>,
}

/// A checkpoint in memory, ready to compute.
#[derive(Debug)]
pub struct Loaded {
    pub model: Model,
    /// Missing where the checkpoint has none.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// The sampling that the checkpoint's generation settings ask for.
    pub sampling: Sampling,
    /// The folder it came from.
    pub path: PathBuf,
}
