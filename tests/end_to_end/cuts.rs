//! A sequence may be cut into calls in any way.

use hognose::{DType, Device, LoadOptions, Loaded, Session, State};
use hognose_core::Pack;

use crate::common::*;

const MAMBA1: [&str; 4] = ["hf/mamba", "hf/mamba_wide_rank", "hf/falcon_mamba", "official/mamba1_layernorm_untied"];
const MAMBA2: [&str; 3] = ["hf/mamba2", "official/mamba2", "official/mamba2_groups_mlp"];
/// Cuts off the chunk grid change the order in which Mamba-2 adds: max |difference| / max |expected|.
const OFF_GRID: f32 = 1e-5;
/// Far more than a chunk, and more than a call of `prefill` takes.
const LONG: usize = 3000;

fn load(name: &str) -> Loaded {
    let device = Some(Device::cpu(Some(2)).unwrap());
    let options = LoadOptions { device, dtype: Some(DType::F32), tokenizer: None };
    hognose::load(arg(&oracle(name)), &options).unwrap()
}

fn vocabulary(loaded: &Loaded) -> usize {
    loaded.model.config.padded_vocab
}

/// Logits of all tokens and the state after them.
pub type Outcome = (Vec<f32>, Vec<f32>);

/// All tokens in one call.
pub fn whole(loaded: &Loaded, ids: &[u32]) -> Outcome {
    in_chunks(loaded, ids, |_| ids.len())
}

/// In calls of `length(tokens done)` tokens.
pub fn in_chunks(loaded: &Loaded, ids: &[u32], mut length: impl FnMut(usize) -> usize) -> Outcome {
    let mut session = Session::new(&loaded.model, 1).unwrap();
    let (mut logits, mut done) = (Vec::new(), 0);
    while done < ids.len() {
        let chunk = &ids[done..ids.len().min(done + length(done))];
        let rows: Vec<usize> = (0..chunk.len()).collect();
        logits.extend(session.run(chunk, &Pack::from_lengths([chunk.len()]).unwrap(), &rows).unwrap());
        done += chunk.len();
    }
    assert_eq!(session.position(0), ids.len() as u64);
    (logits, session.state(0).values().to_vec())
}

/// Several sequences at once, of which each call takes `length()` more tokens, perhaps none.
pub fn packed(loaded: &Loaded, sequences: &[Vec<u32>], mut length: impl FnMut() -> usize) -> Vec<Outcome> {
    let mut session = Session::new(&loaded.model, sequences.len()).unwrap();
    let mut done = vec![0; sequences.len()];
    let mut logits = vec![Vec::new(); sequences.len()];
    while done.iter().zip(sequences).any(|(d, s)| *d < s.len()) {
        let lengths: Vec<usize> = done.iter().zip(sequences).map(|(d, s)| length().min(s.len() - d)).collect();
        let parts = sequences.iter().zip(&done).zip(&lengths);
        let ids: Vec<u32> = parts.flat_map(|((s, &d), &n)| s[d..d + n].to_vec()).collect();
        if ids.is_empty() {
            continue;
        }
        let rows: Vec<usize> = (0..ids.len()).collect();
        let found = session.run(&ids, &Pack::from_lengths(lengths.iter().copied()).unwrap(), &rows).unwrap();
        let mut rest = &found[..];
        for (slot, &n) in lengths.iter().enumerate() {
            let (mine, others) = rest.split_at(n * vocabulary(loaded));
            logits[slot].extend_from_slice(mine);
            done[slot] += n;
            rest = others;
        }
    }
    let states = (0..sequences.len()).map(|slot| session.state(slot).values().to_vec());
    logits.into_iter().zip(states).collect()
}

/// In random calls, between which the state goes through a file into a new session.
pub fn through_files(loaded: &Loaded, ids: &[u32], mut length: impl FnMut() -> usize) -> Outcome {
    let scratch = folder();
    let file = scratch.path().join("state");
    let mut state = State::zero(&loaded.model.config, loaded.model.weights.fingerprint());
    let (mut logits, mut done) = (Vec::new(), 0);
    while done < ids.len() {
        let n = length().min(ids.len() - done);
        let mut session = Session::new(&loaded.model, 1).unwrap();
        session.set_state(0, &state).unwrap();
        let rows: Vec<usize> = (0..n).collect();
        logits.extend(session.run(&ids[done..done + n], &Pack::from_lengths([n]).unwrap(), &rows).unwrap());
        done += n;
        session.state(0).save(&file).unwrap();
        state = State::load(&file, &loaded.model.config, &loaded.model.weights.fingerprint()).unwrap();
        assert_eq!(state, session.state(0));
    }
    assert_eq!(state.position, ids.len() as u64);
    (logits, state.values().to_vec())
}

/// Not `assert_eq`, which would print thousands of numbers.
pub fn same(found: &Outcome, expected: &Outcome, what: &str) {
    assert!(found.0 == expected.0, "{what}: logits are off by {:e}", distance(&found.0, &expected.0));
    assert!(found.1 == expected.1, "{what}: the state is off by {:e}", distance(&found.1, &expected.1));
}

pub fn near(found: &Outcome, expected: &Outcome, what: &str) {
    let far = distance(&found.0, &expected.0).max(distance(&found.1, &expected.1));
    assert!(far <= OFF_GRID, "{what}: off by {far:e}");
}

#[test]
fn mamba1_does_not_see_the_cuts() {
    for name in MAMBA1 {
        let loaded = load(name);
        let mut draws = Draws::new(1);
        let ids = draws.ids(150, vocabulary(&loaded));
        let expected = whole(&loaded, &ids);
        same(&in_chunks(&loaded, &ids, |_| 1), &expected, &format!("{name}, one at a time"));
        for trial in 0..4 {
            let found = in_chunks(&loaded, &ids, |_| 1 + draws.below(40));
            same(&found, &expected, &format!("{name}, random calls {trial}"));
        }
        let sequences: Vec<Vec<u32>> = [150, 1, 97].map(|n| ids[..n].to_vec()).into();
        let found = packed(&loaded, &sequences, || draws.below(30));
        for (sequence, found) in sequences.iter().zip(&found) {
            same(found, &whole(&loaded, sequence), &format!("{name}, {} tokens in a pack", sequence.len()));
        }
        same(&through_files(&loaded, &ids, || 1 + draws.below(60)), &expected, &format!("{name}, through files"));
    }
}

#[test]
fn mamba2_does_not_see_cuts_on_its_grid_and_hardly_others() {
    for name in MAMBA2 {
        let loaded = load(name);
        // A call of `prefill` takes a multiple of the grid.
        let grid = match &loaded.model.config.layers[0].mixer {
            hognose_model::config::Mixer::Mamba2(m) => m.chunk_size,
            other => panic!("{other:?}"),
        };
        assert_eq!(Session::new(&loaded.model, 1).unwrap().prefill_tokens() % grid, 0);
        let mut draws = Draws::new(2);
        let ids = draws.ids(5 * grid + 11, vocabulary(&loaded));
        let expected = whole(&loaded, &ids);
        near(&in_chunks(&loaded, &ids, |_| 1), &expected, &format!("{name}, one at a time"));
        let sequences: Vec<Vec<u32>> = [ids.len(), 1, 2 * grid + 1].map(|n| ids[..n].to_vec()).into();
        for trial in 0..3 {
            let found = in_chunks(&loaded, &ids, |_| grid * (1 + draws.below(3)));
            same(&found, &expected, &format!("{name}, calls on the grid {trial}"));
            let found = in_chunks(&loaded, &ids, |_| 1 + draws.below(2 * grid));
            near(&found, &expected, &format!("{name}, random calls {trial}"));
            let on_grid = packed(&loaded, &sequences, || grid * draws.below(3));
            let anywhere = packed(&loaded, &sequences, || draws.below(2 * grid));
            for ((sequence, on_grid), anywhere) in sequences.iter().zip(&on_grid).zip(&anywhere) {
                let expected = whole(&loaded, sequence);
                same(on_grid, &expected, &format!("{name}, {} tokens on the grid in a pack", sequence.len()));
                near(anywhere, &expected, &format!("{name}, {} tokens in a pack", sequence.len()));
            }
        }
        same(&through_files(&loaded, &ids, || 2 * grid), &expected, &format!("{name}, through files on the grid"));
        near(&through_files(&loaded, &ids, || 1 + draws.below(grid)), &expected, &format!("{name}, through files"));
    }
}

#[test]
fn lengths_far_past_a_chunk_and_of_one() {
    for name in ["hf/mamba", "hf/mamba2"] {
        let loaded = load(name);
        let mut draws = Draws::new(3);
        let ids = draws.ids(LONG, vocabulary(&loaded));
        let expected = whole(&loaded, &ids);
        assert!(expected.0.iter().all(|v| v.is_finite()), "{name}");
        // The front door cuts by itself, on the grid.
        let found = hognose::forward(&loaded.model, &ids).unwrap();
        assert!(found == expected.0, "{name}: off by {:e}", distance(&found, &expected.0));
        let found = in_chunks(&loaded, &ids, |_| 1 + draws.below(700));
        if name == "hf/mamba" {
            same(&found, &expected, name)
        } else {
            near(&found, &expected, name)
        }

        let mut session = Session::new(&loaded.model, 1).unwrap();
        let last = session.prefill(&ids, |_| {}).unwrap();
        assert!(last == expected.0[expected.0.len() - vocabulary(&loaded)..], "{name}: prefill");
        assert!(session.state(0).values() == expected.1, "{name}: the state after prefill");

        let one = hognose::forward(&loaded.model, &ids[..1]).unwrap();
        assert!(distance(&one, &expected.0[..vocabulary(&loaded)]) <= OFF_GRID, "{name}: one token");
    }
}

#[test]
fn a_session_refuses_what_does_not_fit() {
    let (loaded, other) = (load("hf/mamba"), load("hf/mamba_wide_rank"));
    let mut session = Session::new(&loaded.model, 2).unwrap();
    let pack = |lengths: &[usize]| Pack::from_lengths(lengths.iter().copied()).unwrap();
    let rows = vocabulary(&loaded) as u32;
    let text = |result: Result<Vec<f32>, hognose_model::Error>| result.unwrap_err().to_string();
    assert!(text(session.run(&[1, rows], &pack(&[1, 1]), &[])).contains("outside the vocabulary"));
    assert!(text(session.run(&[1, 2], &pack(&[2]), &[])).contains("2 sequences"));
    assert!(text(session.run(&[1, 2], &pack(&[2, 1]), &[])).contains("pack of 3 tokens"));
    assert!(text(session.run(&[1, 2], &pack(&[1, 1]), &[2])).contains("row 2"));
    let foreign = State::zero(&other.model.config, other.model.weights.fingerprint());
    assert!(session.set_state(0, &foreign).unwrap_err().to_string().contains("belongs to the model"));
    // No tokens are no work.
    assert_eq!(session.run(&[], &pack(&[0, 0]), &[]).unwrap(), Vec::<f32>::new());
    // What was refused left no trace.
    assert_eq!((session.position(0), session.position(1)), (0, 0));
    assert!(session.state(0).values().iter().all(|v| *v == 0.0));
}
