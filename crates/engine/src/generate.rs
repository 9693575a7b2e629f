//! Generation: the prompt once, then one token after another at constant cost.

use std::ops::ControlFlow;
use std::time::Instant;

use hognose_core::Pack;
use hognose_model::session::Session;
use hognose_model::state::State;

use crate::error::Error;
use crate::sampling::{Sampler, Sampling};

/// Steps that a device is ahead of what was read of it.
const AHEAD: usize = 4;

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

fn expect_causal(session: &Session<'_>) -> Result<(), Error> {
    let what = "it cannot generate a text token after token";
    Ok(session.model().config.expect_causal(what).map_err(hognose_model::Error::from)?)
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
    expect_causal(session)?;
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
    // The last id of the prompt stays pending where nothing is generated, so that a saved state can go on by itself.
    let processed = if options.max_new_tokens == 0 { all_but_last } else { &prompt_ids[..] };
    let mut logits = session.prefill(processed, |done| {
        let _ = watch(Event::Prompt(done));
    })?;
    let prompt_seconds = start.elapsed().as_secs_f64();

    let start = Instant::now();
    // What happens with a token that was chosen: `Some` ends the generation.
    let mut accept = |ids: &mut Vec<u32>, id: u32| {
        ids.push(id);
        if options.eos.contains(&id) {
            return Some(Finish::Eos);
        }
        if let ControlFlow::Break(reason) = watch(Event::Token(id)) {
            return Some(reason);
        }
        (ids.len() == options.max_new_tokens).then_some(Finish::Length)
    };
    if options.max_new_tokens > 0 {
        let position = session.position(0);
        let first = sampler.sample(&mut logits).ok_or(Error::NotFinite { position })?;
        let mut ended = accept(&mut ids, first);
        if session.has_steps(1) && ended.is_none() {
            let mut steps = session.steps(&[sampler.start(0, first)], true)?;
            while ended.is_none() {
                let position = position + ids.len() as u64;
                steps.launch(AHEAD.min(options.max_new_tokens - ids.len()))?;
                let Some(id) = steps.read()?[0] else { return Err(Error::NotFinite { position }) };
                ended = accept(&mut ids, id);
            }
            steps.finish()?;
        }
        let one = Pack::from_lengths([1]).map_err(hognose_model::Error::from)?;
        while ended.is_none() {
            logits = session.run(&ids[ids.len() - 1..], &one, &[0])?;
            let position = session.position(0);
            let id = sampler.sample(&mut logits).ok_or(Error::NotFinite { position })?;
            ended = accept(&mut ids, id);
        }
        finish = ended.unwrap_or(finish);
    }
    let seconds = start.elapsed().as_secs_f64();
    let mut state = session.state(0);
    state.pending = vec![ids.last().copied().unwrap_or(last)];
    Ok(Generated { prompt_ids, ids, finish, prompt_seconds, seconds, state })
}

/// What one of several sequences gave.
#[derive(Clone, Debug)]
pub struct Continued {
    /// The new ids.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues several prompts at once, each in a slot of the session and with its own options, from their beginning.
/// `watch` sees every new token with the number of its prompt and may end that sequence. Sequences that have ended are
/// left out once they are half of those that are carried along.
pub fn generate_all(
    session: &mut Session<'_>,
    prompts: &[Vec<u32>],
    options: &[GenerateOptions],
    mut watch: impl FnMut(usize, u32) -> ControlFlow<Finish>,
) -> Result<Vec<Continued>, Error> {
    if prompts.len() != options.len() || prompts.iter().any(Vec::is_empty) {
        return Err(Error::EmptyPrompt);
    }
    expect_causal(session)?;
    let mut samplers = Vec::new();
    for (slot, (prompt, options)) in prompts.iter().zip(options).enumerate() {
        session.reset(slot);
        let mut sampler = Sampler::new(options.sampling.clone())?;
        sampler.observe(prompt);
        samplers.push(sampler);
    }
    let inputs: Vec<(usize, &[u32])> = prompts.iter().map(Vec::as_slice).enumerate().collect();
    let mut logits = session.prefill_all(&inputs)?;
    let mut found = vec![Continued { ids: Vec::new(), finish: Finish::Length }; prompts.len()];
    let mut active: Vec<usize> = (0..prompts.len()).filter(|&i| options[i].max_new_tokens > 0).collect();
    // Whether sequence i goes on after a token.
    let mut accept = |found: &mut Continued, i: usize, id: u32| {
        found.ids.push(id);
        let reason = match (options[i].eos.contains(&id), watch(i, id)) {
            (true, _) => Some(Finish::Eos),
            (false, ControlFlow::Break(reason)) => Some(reason),
            (false, ControlFlow::Continue(())) => {
                (found.ids.len() >= options[i].max_new_tokens).then_some(Finish::Length)
            }
        };
        found.finish = reason.unwrap_or(found.finish);
        reason.is_none()
    };
    let mut first = Ok(());
    active.retain(|&i| match samplers[i].sample(&mut logits[i]) {
        Some(id) => accept(&mut found[i], i, id),
        None => {
            first = Err(Error::NotFinite { position: session.position(i) });
            false
        }
    });
    first?;
    let all: Vec<usize> = (0..prompts.len()).collect();
    while !active.is_empty() && (session.has_steps(active.len()) || session.has_steps(all.len())) {
        let carried = if session.has_steps(active.len()) { active.clone() } else { all.clone() };
        let fits: Vec<bool> = (0..=carried.len()).map(|n| session.has_steps(n)).collect();
        let starts: Vec<_> =
            carried.iter().map(|&i| samplers[i].start(i, found[i].ids.last().copied().unwrap_or(0))).collect();
        let mut steps = session.steps(&starts, false)?;
        let mut going = active.clone();
        loop {
            let enough = going.is_empty() || fits[going.len()] && 2 * going.len() <= carried.len();
            // Before sequences are left out, what is under way is read: the others have taken these steps.
            if !enough {
                steps.launch(AHEAD)?;
            } else if steps.under_way() == 0 {
                break;
            }
            let ids = steps.read()?;
            for (&i, id) in carried.iter().zip(ids) {
                if !going.contains(&i) {
                    continue;
                }
                let Some(id) = id else { return Err(Error::NotFinite { position: found[i].ids.len() as u64 }) };
                samplers[i].chosen(id);
                if !accept(&mut found[i], i, id) {
                    going.retain(|&other| other != i);
                }
            }
        }
        steps.finish()?;
        active = going;
    }
    // Elsewhere all slots take part in every call; those that have ended have no tokens in it.
    let vocabulary = session.model().config.padded_vocab;
    while !active.is_empty() {
        let slots = prompts.len();
        let lengths: Vec<usize> = (0..slots).map(|i| usize::from(active.contains(&i))).collect();
        let ids: Vec<u32> = active.iter().filter_map(|&i| found[i].ids.last().copied()).collect();
        let rows: Vec<usize> = (0..active.len()).collect();
        let pack = Pack::from_lengths(lengths).map_err(hognose_model::Error::from)?;
        let mut all = session.run(&ids, &pack, &rows)?;
        let carried = active.clone();
        for (&i, logits) in carried.iter().zip(all.chunks_exact_mut(vocabulary)) {
            let position = session.position(i);
            let id = samplers[i].sample(logits).ok_or(Error::NotFinite { position })?;
            if !accept(&mut found[i], i, id) {
                active.retain(|&other| other != i);
            }
        }
    }
    Ok(found)
}
