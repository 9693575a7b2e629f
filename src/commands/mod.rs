//! One file a command.

pub mod bench;
pub mod convert;
pub mod eval;
pub mod explain;
pub mod forward;
pub mod generate;
pub mod inspect;
pub mod quantize;
pub mod train;

use hognose::{DType, LoadOptions, Loaded};
use hognose_core::error::human_bytes;
use hognose_core::graph::Layout;
use hognose_model::weights::Form;

use crate::args::Compute;

/// Loads a checkpoint as the arguments say, and tells the person on stderr.
pub fn load(model: &str, tokenizer: Option<&std::path::Path>, compute: &Compute) -> anyhow::Result<Loaded> {
    let options = LoadOptions {
        device: Some(compute.device()?),
        dtype: compute.dtype.map(|d| d.dtype()),
        tokenizer: tokenizer.map(Into::into),
    };
    hognose::load(model, &options).map_err(anyhow::Error::from_boxed)
}

/// `mamba-130m: 129 M parameters, 493 MiB, f32`.
pub fn describe(loaded: &Loaded) -> String {
    let dtype = match loaded.model.weights.form() {
        Form::Inference(DType::BF16, Layout::Panels) => "bf16 matrices",
        Form::Inference(DType::BF16, Layout::Rows) => "bf16",
        Form::Inference(DType::Q8_0, _) => "q8_0 matrices",
        Form::Inference(DType::Q4_K, _) => "q4_k matrices",
        Form::Stored(..) => "matrices as stored",
        _ => "f32",
    };
    format!(
        "{} parameters, {} of weights ({dtype}) on {}",
        crate::terminal::thousands(loaded.model.config.parameter_count()),
        human_bytes(loaded.model.weights.bytes() as u64),
        loaded.model.device.describe(),
    )
}
