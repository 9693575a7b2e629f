//! Models whose layers differ, given as a pattern: trained, saved, loaded, continued, cut in any way.

use std::fs;

use hognose::{DType, Device, LoadOptions, Loaded};

use crate::common::*;
use crate::cuts::{Outcome, in_chunks, near, packed, same, through_files, whole};

/// Layers that are sequential in time: cuts change no bit.
const EXACT: &str = "mamba1(d_state=4), 2*attention(heads=2, kv_heads=1, headdim=8, window=20)+mlp, mamba1(d_conv=1)";
/// S6 with and without each of its parts.
const S6: &str = "s6(d_state=4, discretization=zoh), s6(d_state=4, a=lin, dt=fixed, gate=false), \
                  s6(d_state=4, a=legs, b=fixed, discretization=zoh, d_conv=0), s6(d_state=3, a=random, c=fixed), \
                  s6(d_state=4, a=inv, dt=fixed, b=fixed, c=fixed, d_conv=1), s6(a=constant, gate=false, d_conv=0)";
/// Time-invariant layers, in every form.
const LINEAR: &str = "s4d(d_state=8), s4(d_state=8)+mlp, h3(d_state=8, init=legs), \
                      s4d(d_state=4, init=inv, discretization=bilinear), s4d(d_state=4, init=random)";
/// The baselines are sequential in time, too.
const BASELINES: &str = "gated_conv(d_conv=5), lstm(d_inner=12), gru+mlp";
/// With a layer that adds in another order where cuts are off its grid.
const ALL: &str = "mamba2(d_state=8, chunk_size=16), mamba1+mlp, attention(heads=2, headdim=8)+mlp";

/// Trains a small model of a pattern for a few steps and returns its folder.
fn train(scratch: &std::path::Path, pattern: &str) -> String {
    let [texts, file, run] = ["texts", "config.toml", "run"].map(|n| arg(&scratch.join(n)).to_string());
    write_texts(texts.as_ref(), 8, 60);
    let run_settings = "steps = 12\nlength = 32\nbatch = 2\neval_every = 6\nsample_every = 0\ncarry_state = true\n";
    let model = format!("[model]\nd_model = 16\nlayers = {pattern}\n");
    fs::write(&file, format!("{run_settings}[optimizer]\nlr = 0.01\n{model}")).unwrap();
    succeeds(&["train", "--config", &file, "--data", &texts, "--out", &run, "--threads", "2"]);
    run
}

fn load(run: &str) -> Loaded {
    let options = LoadOptions { device: Some(Device::cpu(Some(2)).unwrap()), dtype: Some(DType::F32), tokenizer: None };
    hognose::load(run, &options).unwrap()
}

#[test]
fn a_pattern_trains_saves_loads_and_generates() {
    let scratch = folder();
    let run = train(scratch.path(), &format!("[{ALL:?}, \"mamba1\"]"));
    let losses: Vec<f64> = fs::read_to_string(format!("{run}/metrics.jsonl"))
        .unwrap()
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64())
        .collect();
    assert!(losses.len() == 12 && losses[11] < losses[0] - 0.5, "{losses:?}");
    // What is written says what the layers are, and is read back.
    let config: serde_json::Value = serde_json::from_slice(&fs::read(format!("{run}/config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "hognose");
    let text = succeeds(&["inspect", &run]);
    assert!(text.contains("mamba2, mamba1+mlp, attention+mlp, mamba1"), "{text}");
    assert!(text.contains("mamba2(d_inner=32") && text.contains("backbone.layers.1.mlp.fc1.weight"), "{text}");
    let generate = ["generate", "--model", &run, "--prompt", "the sea ", "--json", "--temperature", "0"];
    let found = object(&succeeds(&[&generate[..], &["--max-new-tokens", "12"]].concat()));
    let ids = found["ids"].as_array().unwrap();
    assert_eq!(ids.len(), 12);
    // The same through a saved state.
    let state = arg(&scratch.path().join("state")).to_string();
    let first = object(&succeeds(&[&generate[..], &["--max-new-tokens", "5", "--save-state", &state]].concat()));
    assert_eq!(first["ids"].as_array().unwrap()[..], ids[..5]);
    let rest = ["generate", "--model", &run, "--load-state", &state, "--json", "--temperature", "0"];
    let rest = object(&succeeds(&[&rest[..], &["--max-new-tokens", "7"]].concat()));
    assert_eq!(rest["ids"].as_array().unwrap()[..], ids[5..]);
    succeeds(&["train", "--resume", &run, "--steps", "14"]);
    // The original format describes one kind of layer.
    let out = arg(&scratch.path().join("original")).to_string();
    fails(1, &["convert", &run, &out, "--format", "original"], &["layers differ"]);
}

fn check(exact: bool, found: &Outcome, expected: &Outcome, what: &str) {
    if exact { same(found, expected, what) } else { near(found, expected, what) }
}

#[test]
fn layers_in_a_row_do_not_see_the_cuts() {
    for (pattern, exact) in [(EXACT, true), (S6, true), (LINEAR, true), (BASELINES, true), (ALL, false)] {
        let scratch = folder();
        let loaded = load(&train(scratch.path(), &format!("{pattern:?}")));
        let mut draws = Draws::new(4);
        let ids = draws.ids(90, 256);
        let expected = whole(&loaded, &ids);
        check(exact, &in_chunks(&loaded, &ids, |_| 1), &expected, "one at a time");
        for trial in 0..3 {
            check(
                exact,
                &in_chunks(&loaded, &ids, |_| 1 + draws.below(40)),
                &expected,
                &format!("random calls {trial}"),
            );
        }
        let sequences: Vec<Vec<u32>> = [90, 1, 57].map(|n| ids[..n].to_vec()).into();
        for (sequence, found) in sequences.iter().zip(&packed(&loaded, &sequences, || draws.below(30))) {
            check(exact, found, &whole(&loaded, sequence), &format!("{} tokens in a pack", sequence.len()));
        }
        check(exact, &through_files(&loaded, &ids, || 1 + draws.below(40)), &expected, "through files");
    }
}

#[test]
fn impossible_layers_are_named() {
    let scratch = folder();
    let [file, texts] = ["config.toml", "texts"].map(|n| scratch.path().join(n));
    write_texts(&texts, 3, 60);
    for (model, words) in [
        ("layers = \"mamba1, mamba7\"", &["mamba7", "known are mamba1, mamba2"][..]),
        ("layers = 3", &["layers is 3", "a pattern such as"]),
        ("layers = [\"mamba1\", 2]", &["a pattern such as"]),
        ("layers = \"mamba1(d_state=0)\"", &["layer 0: d_state is 0"]),
        ("layers = \"2*mamba1, mamba2(headdim=3)\"", &["layer 2: d_ssm", "headdim"]),
        ("layers = \"mamba1\"\nheaddim = 4", &["headdim", "known are", "d_state"]),
        ("layers = \"attention(window=0)\"", &["layer 0: window is 0"]),
        ("layers = \"attention(rotary_dims=3)\"", &["rotary_dims (3) is not a multiple of a pair (2)"]),
        ("layers = \"attention(rotary_dims=64)\"", &["rotary_dims is 64"]),
        ("layers = \"attention(heads=3, kv_heads=2)\"", &["heads (3)", "kv_heads"]),
        ("layers = \"attention(rotary_base=1)\"", &["rotary_base is 1"]),
        ("layers = \"s6(d_state=3, a=lin)\"", &["layer 0: d_state (3) is not a multiple of a conjugate pair (2)"]),
        ("layers = \"s6(d_state=0)\"", &["layer 0: d_state is 0"]),
        ("layers = \"s6(a=hippo)\"", &["unknown variant `hippo`", "`real`, `random`", "`legs`"]),
        ("layers = \"s6(dt=no)\"", &["unknown variant `no`", "`selective` or `fixed`"]),
        ("layers = \"s6(discretization=tustin)\"", &["`euler` or `zoh`"]),
        ("layers = \"s4(d_state=3)\"", &["layer 0: d_state (3) is not a multiple of a conjugate pair"]),
        ("layers = \"s4d(init=tri)\"", &["tri", "lin", "legs"]),
        ("layers = \"h3(d_conv=0)\"", &["layer 0: d_conv is 0"]),
        ("layers = \"lstm(d_inner=0)\"", &["layer 0: d_inner is 0"]),
        ("layers = \"gated_conv(d_conv=0)\"", &["layer 0: d_conv is 0"]),
        ("layers = \"mamba1\"\nbias = 4", &["bias", "expected a boolean"]),
    ] {
        fs::write(&file, format!("[model]\nd_model = 16\n{model}\n")).unwrap();
        fails(1, &["train", "--config", arg(&file), "--data", arg(&texts), "--plan-only"], words);
    }
}
