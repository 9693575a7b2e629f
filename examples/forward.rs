//! Computes logits, in one call and in two that hand on the state.
//!
//! ```text
//! cargo run --release --example forward -- FOLDER
//! ```
//!
//! Without an argument the checkpoint is one of the tests', with random weights.

use hognose::{LoadOptions, Session};

fn main() -> Result<(), hognose::Error> {
    let random = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/oracles/hf/mamba");
    let path = std::env::args().nth(1).unwrap_or(random.to_string());
    let ids = [72, 111, 103, 110, 111, 115, 101, 115];

    let loaded = hognose::load(&path, &LoadOptions::default())?;
    let logits = hognose::forward(&loaded.model, &ids)?;

    let mut session = Session::new(&loaded.model, 1)?;
    let mut parts = hognose::forward_in(&mut session, &ids[..3])?;
    parts.extend(hognose::forward_in(&mut session, &ids[3..])?);
    let worst = logits.iter().zip(&parts).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("whole and in parts differ by {worst:e} at most");

    let state = session.state(0);
    println!("{} bytes of state after {} tokens", state.bytes(), state.position);
    let vocabulary = loaded.model.config.padded_vocab;
    for (id, row) in ids.iter().zip(logits.chunks_exact(vocabulary)) {
        let (next, logit) = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap_or((0, &0.0));
        println!("after {id}: likeliest is {next}, logit {logit:.3}");
    }
    Ok(())
}
