//! `hognose generate`: continue a prompt, streaming.

use std::io::Write;
use std::ops::ControlFlow;

use anyhow::Context;
use hognose::{Finish, GenerateOptions, Loaded, Sampling, Session, State, Tokenizer};
use hognose_core::error::human_bytes;
use hognose_engine::generate::{Event, Generated, generate};
use hognose_engine::text::TextStream;

use crate::args::{GenerateArgs, Usage};
use crate::terminal;

pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let mut sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        vocabulary: None,
        seed: args.seed,
    };
    sampling.validate().map_err(|e| Usage(format!("--{e}")))?;
    check_prompt(&args)?;
    terminal::catch_interrupts()?;

    let loaded = super::load(&args.model, args.tokenizer.as_deref(), &args.compute)?;
    eprintln!("{}: {}", args.model, super::describe(&loaded));
    sampling.vocabulary = loaded.tokenizer.as_ref().map(Tokenizer::vocab_size);
    let config = &loaded.model.config;
    let state = match &args.load_state {
        Some(file) => Some(State::load(file, config, &loaded.model.weights.fingerprint())?),
        None => None,
    };
    let prompt = prompt_ids(&args, &loaded, state.is_some())?;
    let mut session = Session::new(&loaded.model, 1)?;
    let eos = if args.ignore_eos { Vec::new() } else { loaded.eos.clone() };
    let options = GenerateOptions { max_new_tokens: args.max_new_tokens, sampling, eos };
    let printer = Printer::new(&loaded, &args, prompt.len() as u64)?;
    let (generated, text) = printer.run(&mut session, state.as_ref(), &prompt, &options)?;

    if let Some(file) = &args.save_state {
        generated.state.save(file)?;
        let size = human_bytes(generated.state.bytes() as u64);
        eprintln!("state of {} tokens ({size}) saved to {}", generated.state.position, file.display());
    }
    if args.json {
        print_json(&generated, &text)?;
    } else {
        let memory = human_bytes((loaded.model.weights.bytes() + session.bytes()) as u64);
        eprintln!(
            "{} tokens of prompt in {:.2} s, {} new tokens at {:.1} tokens/s, {memory} in use ({})",
            generated.prompt_ids.len(),
            generated.prompt_seconds,
            generated.ids.len(),
            generated.tokens_per_second(),
            generated.finish.as_str(),
        );
    }
    Ok(())
}

/// What is wrong with the prompt can be said before the model is read.
fn check_prompt(args: &GenerateArgs) -> Result<(), Usage> {
    let usage = |text: &str| Err(Usage(text.to_string()));
    match (&args.prompt, &args.ids) {
        (Some(text), _) if text.is_empty() && args.load_state.is_none() => {
            usage("the prompt is empty; give a --prompt of at least one character, or --ids")
        }
        (_, Some(ids)) if ids.is_empty() => usage("--ids is empty; give at least one id"),
        (None, None) if args.load_state.is_none() => usage("nothing to continue: give --prompt, --ids or --load-state"),
        _ => Ok(()),
    }
}

fn prompt_ids(args: &GenerateArgs, loaded: &Loaded, continues: bool) -> anyhow::Result<Vec<u32>> {
    if let Some(ids) = &args.ids {
        return Ok(ids.clone());
    }
    let Some(text) = &args.prompt else { return Ok(Vec::new()) };
    let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| {
        let model = &args.model;
        Usage(format!("{model} has no tokenizer.json; give one with --tokenizer FILE, or token ids with --ids 1,2,3"))
    })?;
    // In the middle of a text there is no beginning to mark.
    let mut ids = if continues { Vec::new() } else { loaded.start() };
    ids.extend(tokenizer.encode(text.as_bytes(), !continues)?);
    Ok(ids)
}

/// Streams what is generated: text to stdout, or ids where there is no tokenizer; nothing with --json.
struct Printer<'a> {
    text: Option<TextStream<'a>>,
    stream: bool,
    bar: indicatif::ProgressBar,
}

impl<'a> Printer<'a> {
    fn new(loaded: &'a Loaded, args: &GenerateArgs, prompt: u64) -> Result<Printer<'a>, Usage> {
        let text = loaded.tokenizer.as_ref().map(|t| TextStream::new(t, &args.stop));
        if text.is_none() && !args.stop.is_empty() {
            return Err(Usage("--stop needs a tokenizer; give one with --tokenizer FILE".into()));
        }
        let bar = terminal::bar(prompt, "prompt {wide_bar} {pos}/{len} tokens, {eta} left");
        if prompt < 4096 {
            bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Ok(Printer { text, stream: !args.json, bar })
    }

    fn run(
        mut self,
        session: &mut Session<'_>,
        state: Option<&State>,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> anyhow::Result<(Generated, String)> {
        let mut failed: Option<anyhow::Error> = None;
        let generated = generate(session, state, prompt, options, |event| {
            let shown = match event {
                Event::Prompt(done) => {
                    self.bar.set_position(done as u64);
                    Ok(())
                }
                Event::Token(id) => self.token(id),
            };
            if let Err(error) = shown {
                failed = Some(error);
                return ControlFlow::Break(Finish::Interrupted);
            }
            if self.text.as_ref().is_some_and(TextStream::stopped) {
                return ControlFlow::Break(Finish::Stop);
            }
            if terminal::interrupted() { ControlFlow::Break(Finish::Interrupted) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let mut text = String::new();
        if let Some(stream) = &mut self.text {
            let rest = stream.finish()?;
            text = stream.text().to_string();
            self.show(&rest)?;
        }
        if self.stream {
            writeln!(std::io::stdout())?;
        }
        Ok((generated, text))
    }

    fn token(&mut self, id: u32) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        let piece = match &mut self.text {
            Some(text) => text.push(id)?,
            None => format!("{id} "),
        };
        self.show(&piece)
    }

    fn show(&self, piece: &str) -> anyhow::Result<()> {
        if self.stream && !piece.is_empty() {
            let mut out = std::io::stdout().lock();
            out.write_all(piece.as_bytes()).and_then(|()| out.flush()).context("writing to stdout")?;
        }
        Ok(())
    }
}

fn print_json(generated: &Generated, text: &str) -> anyhow::Result<()> {
    let object = serde_json::json!({
        "prompt_ids": generated.prompt_ids,
        "ids": generated.ids,
        "text": text,
        "finish_reason": generated.finish.as_str(),
        "seconds": generated.prompt_seconds + generated.seconds,
        "prompt_seconds": generated.prompt_seconds,
        "tokens_per_second": generated.tokens_per_second(),
    });
    writeln!(std::io::stdout(), "{object}")?;
    Ok(())
}
