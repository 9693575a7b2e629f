//! Checkpoints, states and id files that are damaged or something else.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::common::*;

/// Folders with copies of a checkpoint, each damaged in its own way, and a file of ids to run through them.
struct Damage {
    scratch: tempfile::TempDir,
    ids: PathBuf,
}

impl Damage {
    fn new() -> Damage {
        let scratch = folder();
        let ids = scratch.path().join("ids.safetensors");
        write_ids(&ids, &[1, 3], &[1, 2, 3]);
        Damage { scratch, ids }
    }

    fn copy(&self, from: &str) -> PathBuf {
        let to = self.scratch.path().join("model");
        let _ = fs::remove_dir_all(&to);
        copy(&oracle(from), &to);
        to
    }

    /// A copy with one file changed.
    fn file(&self, from: &str, file: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
        let model = self.copy(from);
        let mut bytes = fs::read(model.join(file)).unwrap();
        change(&mut bytes);
        fs::write(model.join(file), bytes).unwrap();
        model
    }

    /// A copy with one key of config.json changed.
    fn key(&self, from: &str, key: &str, value: Value) -> PathBuf {
        self.file(from, "config.json", |bytes| {
            let mut config: Value = serde_json::from_slice(bytes).unwrap();
            config[key] = value;
            *bytes = config.to_string().into_bytes();
        })
    }

    /// `forward` and `inspect` must refuse the model.
    fn refused(&self, model: &Path, words: &[&str]) {
        let out = self.scratch.path().join("out");
        fails(1, &["forward", "--model", arg(model), "--ids", arg(&self.ids), "--out", arg(&out)], words);
        assert!(!out.exists());
        fails(1, &["inspect", arg(model)], words);
    }

    /// `forward` and `convert` must refuse the model; `inspect` looks at no numbers.
    fn refused_when_read(&self, model: &Path, words: &[&str]) {
        let out = self.scratch.path().join("out");
        fails(1, &["forward", "--model", arg(model), "--ids", arg(&self.ids), "--out", arg(&out)], words);
        fails(1, &["convert", arg(model), arg(&out)], words);
        assert!(!out.exists());
    }
}

#[test]
fn damaged_safetensors() {
    let damage = Damage::new();
    let weights = "model.safetensors";
    let change = |change: fn(&mut Vec<u8>)| damage.file("hf/mamba", weights, change);
    damage.refused(&change(|b| b.truncate(b.len() - 100)), &[weights, "cut short or damaged"]);
    damage.refused(&change(|b| b.truncate(100)), &[weights, "not a valid safetensors file"]);
    damage.refused(&change(Vec::clear), &[weights, "0 bytes"]);
    damage.refused(
        &change(|b| b[..8].copy_from_slice(&(1u64 << 50).to_le_bytes())),
        &[weights, "header of 1125899906842624"],
    );
    damage.refused(&change(|b| b[8..40].fill(b'x')), &[weights, "not a valid safetensors file"]);
    damage.refused(&change(|b| b.extend([0; 64])), &[weights, "do not end where the file does"]);
    damage.refused_when_read(
        &change(|b| {
            let end = b.len();
            b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        }),
        &[weights, "holds NaN", "damaged"],
    );
    let model = damage.copy("hf/mamba");
    write_tensor(&model.join(weights), "something.else", Dtype::F32, &[1], &[0; 4]);
    damage.refused(&model, &["backbone.embeddings.weight", "[320, 64]", "is missing"]);
    fs::remove_file(model.join(weights)).unwrap();
    damage.refused(&model, &["no weights found", "pytorch_model.bin"]);
    fs::create_dir(model.join(weights)).unwrap();
    damage.refused(&model, &[weights]);
}

#[test]
fn damaged_torch_files() {
    let damage = Damage::new();
    let weights = "pytorch_model.bin";
    let change = |change: fn(&mut Vec<u8>)| damage.file("official/mamba2", weights, change);
    damage.refused(&change(|b| b.truncate(b.len() - 1000)), &[weights, "cut short"]);
    damage.refused(&change(|b| b.fill(7)), &[weights, "zip archive"]);
    damage.refused(&change(Vec::clear), &[weights]);
    damage.refused_when_read(
        &change(|b| {
            let middle = b.len() / 2;
            b[middle] ^= 0x55;
        }),
        &[weights, "checksum"],
    );
    // A bare pickle that would run `touch`: refused before anything in it is looked up.
    let trap = damage.scratch.path().join("trap");
    let pickle = format!("cposix\nsystem\n(S'touch {}'\ntR.", trap.display());
    damage.refused(
        &damage.file("official/mamba2", weights, |b| *b = pickle.into_bytes()),
        &[weights, "not a file of tensors"],
    );
    assert!(!trap.exists());
}

#[test]
fn configurations_that_are_none() {
    let damage = Damage::new();
    let replace = |text: &[u8]| damage.file("hf/mamba", "config.json", |b| *b = text.to_vec());
    damage.refused(&replace(b"hello"), &["config.json", "not valid JSON", "line 1"]);
    damage.refused(&replace(b"[1]"), &["config.json", "expected an object"]);
    damage.refused(&replace(b"\xff\xfe\x00"), &["config.json", "UTF-8"]);
    damage.refused(&replace(b""), &["config.json", "not valid JSON"]);
    damage.refused(&damage.key("hf/mamba", "model_type", json!("llama")), &["model_type \"llama\"", "mamba2"]);
    damage.refused(&damage.key("hf/mamba", "model_type", json!(null)), &["\"model_type\" is missing"]);
    let model = damage.copy("hf/mamba");
    fs::remove_file(model.join("config.json")).unwrap();
    let run = hognose(&["inspect", arg(&model)]);
    refused(1, &run, &["no config.json"], &["config.json", "cannot read"]);
    assert_eq!(run.stderr.matches("No such file").count(), 1, "a cause is told once: {}", run.stderr);
}

#[test]
fn sizes_that_make_no_model() {
    let damage = Damage::new();
    for (model, key, name) in [
        ("hf/mamba", "hidden_size", "d_model"),
        ("hf/mamba", "num_hidden_layers", "number of layers"),
        ("hf/mamba", "vocab_size", "vocab_size"),
        ("hf/mamba", "state_size", "d_state"),
        ("hf/mamba", "conv_kernel", "d_conv"),
        ("hf/mamba", "intermediate_size", "d_inner"),
        ("hf/mamba2", "chunk_size", "chunk_size"),
        ("hf/mamba2", "n_groups", "ngroups"),
        ("hf/mamba2", "head_dim", "head_dim"),
        ("official/mamba1", "d_model", "d_model"),
        ("official/mamba1", "n_layer", "number of layers"),
    ] {
        damage.refused(&damage.key(model, key, json!(0)), &["config.json", name]);
        for bad in [json!(-1), json!(1.5), json!("x"), json!(1e30)] {
            damage.refused(&damage.key(model, key, bad), &["config.json", &format!("\"{key}\" is"), "whole number"]);
        }
        damage.refused(&damage.key(model, key, json!(1_000_000_000_000u64)), &["config.json", "1000000000000"]);
    }
    damage.refused(&damage.key("hf/mamba2", "n_groups", json!(3)), &["number of heads (8)", "ngroups (3)"]);
    damage.refused(&damage.key("hf/mamba2", "time_step_limit", json!([1, 0])), &["dt_limit"]);
    damage.refused(&damage.key("hf/mamba", "layer_norm_epsilon", json!(-1)), &["norm_eps is -1"]);
    // Sizes that could be, but are not those of the weights.
    damage.refused(&damage.key("hf/mamba", "hidden_size", json!(65)), &["[320, 64]", "[320, 65]"]);
    damage.refused(&damage.key("hf/mamba", "num_hidden_layers", json!(4)), &["layers.3.norm.weight", "is missing"]);
    damage.refused(&damage.key("hf/mamba", "num_hidden_layers", json!(2)), &["layers.2.", "does not belong"]);
}

#[test]
fn infinity_in_json_as_python_writes_it() {
    let damage = Damage::new();
    let out = damage.scratch.path().join("out");
    let text = |b: &mut Vec<u8>| {
        let config: Value = serde_json::from_slice(b).unwrap();
        let mut config = config.as_object().unwrap().clone();
        config.shift_remove("time_step_limit");
        let text = serde_json::to_string(&config).unwrap();
        *b = text.replacen('{', "{\"time_step_limit\": [0.0, Infinity], ", 1).into_bytes();
    };
    let model = damage.file("hf/mamba2", "config.json", text);
    succeeds(&["forward", "--model", arg(&model), "--ids", arg(&damage.ids), "--out", arg(&out)]);
}

#[test]
fn id_files() {
    let scratch = folder();
    let model = oracle("hf/mamba");
    let [file, out] = ["ids", "out"].map(|n| scratch.path().join(n));
    let args = ["forward", "--model", arg(&model), "--ids", arg(&file), "--out", arg(&out)];
    fails(1, &args, &["ids", "No such file"]);
    for (shape, ids, words) in [
        (&[1, 3][..], &[1, -2, 3][..], &["id -2", "position 1"][..]),
        (&[1, 3], &[1, 2, 1 << 40], &["id 1099511627776", "position 2"]),
        (&[1, 3], &[1, 320, 3], &["320", "outside the vocabulary of 320"]),
        (&[3], &[1, 2, 3], &["shape [3]", "(batch, length)"]),
        (&[1, 1, 3], &[1, 2, 3], &["shape [1, 1, 3]"]),
        (&[1, 0], &[], &["empty"]),
        (&[0, 4], &[], &["empty"]),
    ] {
        write_ids(&file, shape, ids);
        fails(1, &args, words);
    }
    write_tensor(&file, "input_ids", Dtype::F32, &[1, 1], &[0; 4]);
    fails(1, &args, &["F32", "expected I64"]);
    write_tensor(&file, "ids", Dtype::I64, &[1, 1], &[0; 8]);
    fails(1, &args, &["no tensor input_ids", "it has ids"]);
    fs::write(&file, b"not this").unwrap();
    fails(1, &args, &["not a valid safetensors file"]);
    assert!(!out.exists());

    // 32-bit ids mean the same, and one token has logits but no loss.
    write_tensor(&file, "input_ids", Dtype::I32, &[1, 2], &[5, 0, 0, 0, 6, 0, 0, 0]);
    succeeds(&args);
    let narrow = read_tensors(&out);
    write_ids(&file, &[1, 2], &[5, 6]);
    succeeds(&args);
    assert_eq!(read_tensors(&out), narrow);
    write_ids(&file, &[1, 1], &[5]);
    let run = hognose(&args);
    assert_eq!(run.code, 0);
    assert!(run.stderr.contains("one token predicts nothing"), "{}", run.stderr);
    let one = read_tensors(&out);
    assert!(one["loss"].1[0].is_nan());
    assert!(distance(&one["logits"].1, &narrow["logits"].1[..320]) <= 1e-6);
    fails(1, &[&args[..], &["--grads"]].concat(), &["at least 2"]);
    fails(2, &[&args[..], &["--grads", "--dtype", "bf16"]].concat(), &["f32"]);
    let elsewhere = scratch.path().join("no/where");
    let mut lost = args;
    lost[6] = arg(&elsewhere);
    fails(1, &lost, &["cannot save"]);
    lost[6] = arg(scratch.path());
    fails(1, &lost, &["cannot save"]);
}

#[test]
fn state_files() {
    let scratch = folder();
    let [state, other] = ["state", "other"].map(|n| scratch.path().join(n));
    let (model, mamba2) = (oracle("hf/mamba"), oracle("hf/mamba2"));
    let greedy = ["generate", "--model", arg(&model), "--temperature", "0", "--ignore-eos", "--json"];
    let run = |more: &[&str]| object(&succeeds(&[&greedy[..], more].concat()))["ids"].as_array().unwrap().clone();
    // Through a state file, a text goes on as if it had not been interrupted.
    let whole = run(&["--ids", "5,6,7", "--max-new-tokens", "12"]);
    let first = run(&["--ids", "5,6,7", "--max-new-tokens", "5", "--save-state", arg(&state)]);
    let rest = run(&["--load-state", arg(&state), "--max-new-tokens", "7"]);
    assert_eq!([first, rest].concat(), whole);

    let load = |model: &Path, file: &Path, words: &[&str]| {
        fails(1, &["generate", "--model", arg(model), "--load-state", arg(file)], words);
    };
    load(&mamba2, &state, &["belongs to the model", "saved from"]);
    load(&model, &model.join("model.safetensors"), &["not a state file"]);
    load(&model, &model.join("config.json"), &["not a state file"]);
    load(&model, &scratch.path().join("none"), &["none cannot be read: No such file"]);
    load(&model, scratch.path(), &["cannot be read"]);
    let bytes = fs::read(&state).unwrap();
    fs::write(&other, &bytes[..bytes.len() - 8]).unwrap();
    load(&model, &other, &["other"]);
    let text = String::from_utf8_lossy(&bytes[8..]).into_owned();
    let header = &text[..text.rfind('}').unwrap() + 1];
    for (from, to, words) in [
        ("\"version\":\"1\"", "\"version\":\"9\"", &["version 9", "reads 1"]),
        ("\"position\":\"7\"", "\"position\":\"x\"", &["no valid position", "other"]),
    ] {
        assert!(header.contains(from), "{header}");
        let at = 8 + header.find(from).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&other, changed).unwrap();
        load(&model, &other, words);
    }
    let mut nan = bytes.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&other, nan).unwrap();
    load(&model, &other, &["not finite"]);
    let save = |to: &Path| {
        hognose(&["generate", "--model", arg(&model), "--ids", "1", "--max-new-tokens", "2", "--save-state", arg(to)])
    };
    let lost = save(&scratch.path().join("no/where"));
    assert!(lost.code == 1 && lost.stderr.contains("cannot save"), "{lost:?}");
}
