//! Loads a checkpoint and continues a text.
//!
//! ```text
//! cargo run --release --example load_and_generate -- runs/tiny "Call me "
//! ```
//!
//! The checkpoint is a folder or an id of the Hugging Face hub. Without arguments a small model is trained for a
//! moment first, so what it writes is no English yet.

use std::path::Path;

use hognose::{GenerateOptions, LoadOptions, Sampling, TrainConfig};

fn main() -> Result<(), hognose::Error> {
    let scratch = tempfile::tempdir()?;
    let mut args = std::env::args().skip(1);
    let path = match args.next() {
        Some(path) => path,
        None => train_for_a_moment(scratch.path())?,
    };
    let prompt = args.next().unwrap_or("Call me ".to_string());

    let model = hognose::load(&path, &LoadOptions::default())?;
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, ..Sampling::default() };
    let options = GenerateOptions { max_new_tokens: 200, sampling, ..GenerateOptions::default() };
    let text = hognose::complete(&model, &prompt, &options)?;
    println!("{prompt}{text}");
    Ok(())
}

fn train_for_a_moment(folder: &Path) -> Result<String, hognose::Error> {
    let mut config = TrainConfig { steps: 50, length: 128, batch: 4, ..TrainConfig::default() };
    config.model.insert("d_model".into(), 32.into());
    config.data.validation_fraction = 0.0;
    hognose::train(config, folder)?;
    Ok(folder.to_string_lossy().into_owned())
}
