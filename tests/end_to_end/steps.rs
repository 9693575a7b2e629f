//! Generation of one and of several sequences. What runs on a GPU is tested where `HOGNOSE_TEST_CUDA` asks for one.

use std::ops::ControlFlow;

use hognose::{DType, Device, Finish, GenerateOptions, LoadOptions, Loaded, Sampling, Session};
use hognose_core::Pack;
use hognose_engine::sampling::argmax;
use hognose_engine::{generate, generate_all};

use crate::common::*;

/// bf16 activations of a GPU against f32 activations of a CPU, both with bf16 weights: max |difference| / max |expected|.
const BF16_ACTIVATIONS: f32 = 3e-2;

fn load(name: &str, device: Device, dtype: DType) -> Loaded {
    let options = LoadOptions { device: Some(device), dtype: Some(dtype), tokenizer: None };
    hognose::load(arg(&oracle(name)), &options).unwrap()
}

fn cpu() -> Device {
    Device::cpu(Some(2)).unwrap()
}

/// The GPU, if the tests were asked to use one.
fn gpu() -> Option<Device> {
    let asked = std::env::var_os("HOGNOSE_TEST_CUDA").is_some_and(|v| v != "emulate");
    asked.then(|| Device::cuda(0).unwrap())
}

fn greedy(n: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens: n, sampling: Sampling::greedy(), eos: Vec::new() }
}

/// Token by token: the likeliest continuation, and the state before its last token.
fn by_hand(loaded: &Loaded, prompt: &[u32], n: usize) -> (Vec<u32>, Vec<f32>) {
    let mut session = Session::new(&loaded.model, 1).unwrap();
    let one = Pack::from_lengths([1]).unwrap();
    let mut ids = prompt.to_vec();
    for at in 0..prompt.len() + n - 1 {
        let logits = session.run(&[ids[at]], &one, &[0]).unwrap();
        if at + 1 >= prompt.len() {
            ids.push(argmax(&logits));
        }
    }
    (ids[prompt.len()..].to_vec(), session.state(0).values().to_vec())
}

#[test]
fn several_sequences_go_on_as_each_by_itself() {
    for name in ["hf/mamba", "official/mamba2"] {
        let loaded = load(name, cpu(), DType::F32);
        let mut draws = Draws::new(3);
        let vocabulary = loaded.model.config.vocab_size;
        let prompts: Vec<Vec<u32>> = (0..5).map(|i| draws.ids(1 + 7 * i, vocabulary)).collect();
        let sampling = |i: u64| Sampling { seed: i, top_k: 20, repetition_penalty: 1.1, ..Sampling::default() };
        let options: Vec<GenerateOptions> = (0..5)
            .map(|i| GenerateOptions { max_new_tokens: 3 * i, sampling: sampling(i as u64), eos: Vec::new() })
            .collect();
        let mut session = Session::new(&loaded.model, prompts.len()).unwrap();
        let all = generate_all(&mut session, &prompts, &options, |_, _| ControlFlow::Continue(())).unwrap();
        for ((prompt, options), found) in prompts.iter().zip(&options).zip(all) {
            let mut session = Session::new(&loaded.model, 1).unwrap();
            let alone = generate(&mut session, None, prompt, options, |_| ControlFlow::Continue(())).unwrap();
            assert_eq!((found.ids, found.finish), (alone.ids, alone.finish), "{name}");
        }
    }
}

#[test]
fn steps_on_a_gpu_give_the_logits_of_a_cpu() {
    let Some(device) = gpu() else { return };
    for name in ORACLES {
        let (expected, found) = (load(name, cpu(), DType::BF16), load(name, device.clone(), DType::BF16));
        let vocabulary = found.model.config.vocab_size;
        for slots in [1, 3, 20] {
            let mut sessions = [&expected, &found].map(|l| Session::new(&l.model, slots).unwrap());
            if !sessions[1].has_steps(slots) {
                eprintln!("{name} has no steps of its own");
                break;
            }
            let (one, rows) = (Pack::from_lengths(vec![1; slots]).unwrap(), (0..slots).collect::<Vec<_>>());
            let mut draws = Draws::new(5);
            for _ in 0..12 {
                let ids = draws.ids(slots, vocabulary);
                let [a, b] = sessions.each_mut().map(|s| s.run(&ids, &one, &rows).unwrap());
                let far = distance(&b, &a);
                assert!(far <= BF16_ACTIVATIONS, "{name}, {slots} slots: logits are off by {far:e}");
            }
            let [a, b] = sessions.each_mut().map(|s| s.state(slots - 1).values().to_vec());
            let far = distance(&b, &a);
            assert!(far <= BF16_ACTIVATIONS, "{name}, {slots} slots: states are off by {far:e}");
        }
    }
}

#[test]
fn a_gpu_that_chooses_goes_on_as_by_hand() {
    let Some(device) = gpu() else { return };
    for name in ORACLES {
        let loaded = load(name, device.clone(), DType::BF16);
        let mut session = Session::new(&loaded.model, 1).unwrap();
        // Stopped where states were set aside, in between, and at the end.
        for (most, stop) in [(90, 90), (200, 64), (200, 65), (200, 130), (40, 7)] {
            let (ids, state) = by_hand(&loaded, &[5], stop);
            let mut seen = 0;
            let found = generate(&mut session, None, &[5], &greedy(most), |event| {
                seen += usize::from(matches!(event, hognose_engine::generate::Event::Token(_)));
                if seen == stop { ControlFlow::Break(Finish::Stop) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
            assert_eq!(found.ids, ids, "{name}, {stop} of {most}");
            assert_eq!(found.state.values(), state, "{name}, {stop} of {most}: the states differ");
            assert_eq!(found.state.position, stop as u64, "{name}");
        }
    }
}

#[test]
fn several_sequences_on_a_gpu_go_on_as_each_by_itself() {
    let Some(device) = gpu() else { return };
    for name in ["hf/mamba", "official/mamba2"] {
        let loaded = load(name, device.clone(), DType::BF16);
        let prompts: Vec<Vec<u32>> = (0..9).map(|i| vec![3 * i + 1]).collect();
        for temperature in [0.0, 1.0] {
            let sampling =
                |i| Sampling { seed: i, temperature, top_p: 0.9, repetition_penalty: 1.1, ..Sampling::default() };
            let options: Vec<GenerateOptions> = (0..9)
                .map(|i| GenerateOptions { max_new_tokens: 5 * i, sampling: sampling(i as u64), eos: Vec::new() })
                .collect();
            let mut session = Session::new(&loaded.model, prompts.len()).unwrap();
            let all = generate_all(&mut session, &prompts, &options, |_, _| ControlFlow::Continue(())).unwrap();
            for ((prompt, options), found) in prompts.iter().zip(&options).zip(all) {
                let mut session = Session::new(&loaded.model, 1).unwrap();
                let alone = generate(&mut session, None, prompt, options, |_| ControlFlow::Continue(())).unwrap();
                assert_eq!((found.ids, found.finish), (alone.ids, alone.finish), "{name}, temperature {temperature}");
            }
        }
    }
}
