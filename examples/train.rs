//! Trains a very small model on the text that ships with hognose, then lets it write.
//!
//! ```text
//! cargo run --release --example train
//! ```

use hognose::{GenerateOptions, LoadOptions, TrainConfig};

fn main() -> Result<(), hognose::Error> {
    let scratch = tempfile::tempdir()?;
    let folder = scratch.path().join("run");

    let mut config = TrainConfig { steps: 100, length: 128, batch: 4, ..TrainConfig::default() };
    config.model.insert("d_model".into(), 48.into());
    config.model.insert("n_layer".into(), 2.into());
    let outcome = hognose::train(config, &folder)?;
    if let Some(bits) = outcome.bits_per_byte {
        println!("{} steps: {bits:.3} bits per byte of held-out text", outcome.step);
    }

    // The folder is a checkpoint like any other.
    let model = hognose::load(&folder.to_string_lossy(), &LoadOptions::default())?;
    let options = GenerateOptions { max_new_tokens: 100, ..GenerateOptions::default() };
    println!("{}", hognose::complete(&model, "The whale ", &options)?);
    Ok(())
}
