//! `hognose eval`: how well a model does.

use std::io::Write;
use std::time::Instant;

use hognose::{Session, Tokenizer};
use hognose_train::data::{Document, sources};
use hognose_train::perplexity::{self, SLOTS};
use hognose_train::setup;

use crate::args::{EvalArgs, EvalCommand, PerplexityArgs, Usage};
use crate::terminal::{self, thousands};

pub fn run(args: EvalArgs) -> anyhow::Result<()> {
    match args.command {
        EvalCommand::Perplexity(args) => perplexity(args),
    }
}

fn perplexity(args: PerplexityArgs) -> anyhow::Result<()> {
    terminal::catch_interrupts()?;
    // What is wrong with the texts can be said before the model is read.
    let paths: Vec<_> = args.data.iter().map(Into::into).collect();
    let mut documents = sources::read(&paths, &args.field)?;
    if let Some(limit) = args.max_bytes {
        cut(&mut documents, limit);
        if documents.is_empty() {
            return Err(Usage(format!("--max-bytes is {limit}, but the first character of the texts is longer")).into());
        }
    }
    let loaded = super::load(&args.model, args.tokenizer.as_deref(), &args.compute)?;
    eprintln!("{}: {}", args.model, super::describe(&loaded));
    let tokenizer: &Tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
        let model = &args.model;
        Usage(format!("{model} has no tokenizer.json; give one with --tokenizer FILE"))
    })?;
    let store = setup::tokens(&documents, tokenizer, &loaded.model.config)?;
    drop(documents);

    let total = store.tokens() - store.documents() as u64;
    let bar = terminal::bar(total, "perplexity {wide_bar} {pos}/{len} tokens, {eta} left");
    let begin = Instant::now();
    let mut session = Session::new(&loaded.model, SLOTS)?;
    let cost = perplexity::measure(&mut session, &store, |done| {
        bar.set_position(done);
        terminal::interrupted()
    })?;
    bar.finish_and_clear();
    let Some(cost) = cost else { return Ok(()) };
    let seconds = begin.elapsed().as_secs_f64();
    if !cost.nats.is_finite() {
        anyhow::bail!("the model's logits are not all finite; the checkpoint may be damaged");
    }
    let mut out = std::io::stdout();
    if args.json {
        let object = serde_json::json!({
            "model": args.model,
            "documents": store.documents(),
            "tokens": cost.tokens,
            "bytes": cost.bytes,
            "nats_per_token": cost.per_token(),
            "perplexity": cost.perplexity(),
            "bits_per_byte": cost.bits_per_byte(),
            "seconds": seconds,
            "tokens_per_second": cost.tokens as f64 / seconds,
        });
        writeln!(out, "{object}")?;
    } else {
        writeln!(
            out,
            "perplexity {:.4}, {:.5} nats a token, {:.5} bits a byte",
            cost.perplexity(),
            cost.per_token(),
            cost.bits_per_byte(),
        )?;
        eprintln!(
            "{} tokens, {} bytes in {} documents, {} at {:.0} tokens/s",
            thousands(cost.tokens),
            thousands(cost.bytes),
            thousands(store.documents() as u64),
            terminal::duration(seconds),
            cost.tokens as f64 / seconds,
        );
    }
    Ok(())
}

/// Keeps the first `limit` bytes; the last document is cut between characters.
fn cut(documents: &mut Vec<Document>, limit: usize) {
    let mut left = limit;
    for document in &mut *documents {
        let mut end = left.min(document.bytes.len());
        left -= end;
        // Bytes that continue a character of UTF-8 are 10xxxxxx.
        while end > 0 && document.bytes.get(end).is_some_and(|b| b & 0xC0 == 0x80) {
            end -= 1;
        }
        document.bytes.truncate(end);
    }
    documents.retain(|d| !d.bytes.is_empty());
}
