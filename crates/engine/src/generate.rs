//! Generation: the prompt once, then one token after another at constant cost.

use std::ops::ControlFlow;
use std::time::Instant;

use hognose_core::Pack;
use hognose_model::session::Session;
use hognose_model::state::State;

use crate::error::Error;
use crate::sampling::{Sampler, Sampling};

/// How much is generated, and how.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens at most. 0 only takes in the prompt.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens that end the text; they are not part of it.
    pub eos: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions { max_new_tokens: 256, sampling: Sampling::default(), eos: Vec::new() }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// As many tokens as asked for.
    Length,
    /// The caller stopped it: a stop text.
    Stop,
    /// A token that ends the text.
    Eos,
    /// The caller broke it off.
    Interrupted,
}

impl Finish {
    /// The word for it in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Length => "length",
            Finish::Stop => "stop",
            Finish::Eos => "eos",
            Finish::Interrupted => "interrupted",
        }
    }
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generated {
    /// All ids that were processed before the first new one: pending ones of the state, then the prompt.
    pub prompt_ids: Vec<u32>,
    /// The new ids.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Seconds for the prompt.
    pub prompt_seconds: f64,
    /// Seconds for the new tokens.
    pub seconds: f64,
    /// The state to go on from: of all tokens but the last, which is pending.
    pub state: State,
}

impl Generated {
    /// New tokens a second, the first one being the prompt's; 0 where there is nothing to measure.
    pub fn tokens_per_second(&self) -> f64 {
        let steps = self.ids.len().saturating_sub(1);
        if steps == 0 || self.seconds <= 0.0 { 0.0 } else { steps as f64 / self.seconds }
    }
}

/// Events that a caller may show or act on.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// So many tokens of the prompt are done.
    Prompt(usize),
    /// A new token.
    Token(u32),
}

/// Continues `state` (or an empty one) with `prompt`, then generates. The session must have one slot. `watch` sees
/// every new token and may end the generation.
pub fn generate(
    session: &mut Session<'_>,
    state: Option<&State>,
    prompt: &[u32],
    options: &GenerateOptions,
    mut watch: impl FnMut(Event) -> ControlFlow<Finish>,
) -> Result<Generated, Error> {
    let mut sampler = Sampler::new(options.sampling.clone())?;
    let mut prompt_ids = Vec::new();
    match state {
        Some(state) => {
            session.set_state(0, state)?;
            prompt_ids.extend(&state.pending);
        }
        None => session.reset(0),
    }
    prompt_ids.extend(prompt);
    let Some((&last, all_but_last)) = prompt_ids.split_last() else { return Err(Error::EmptyPrompt) };
    sampler.observe(&prompt_ids);

    let start = Instant::now();
    let mut ids = Vec::new();
    let mut finish = Finish::Length;
    let mut pending = last;
    // The last id of the prompt stays pending where nothing is generated, so that a saved state can go on by itself.
    let processed = if options.max_new_tokens == 0 { all_but_last } else { &prompt_ids[..] };
    let mut logits = session.prefill(processed, |done| {
        let _ = watch(Event::Prompt(done));
    })?;
    let prompt_seconds = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let one = Pack::from_lengths([1]).map_err(hognose_model::Error::from)?;
    while ids.len() < options.max_new_tokens {
        let position = session.position(0);
        let id = sampler.sample(&mut logits).ok_or(Error::NotFinite { position })?;
        ids.push(id);
        pending = id;
        if options.eos.contains(&id) {
            finish = Finish::Eos;
            break;
        }
        if let ControlFlow::Break(reason) = watch(Event::Token(id)) {
            finish = reason;
            break;
        }
        if ids.len() < options.max_new_tokens {
            logits = session.run(&[id], &one, &[0])?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let mut state = session.state(0);
    state.pending = vec![pending];
    Ok(Generated { prompt_ids, ids, finish, prompt_seconds, seconds, state })
}
