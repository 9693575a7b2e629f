//! Readers that go away, interrupts, texts of every kind.

use std::io::Read;
use std::process::{Command, Stdio};

use crate::common::*;

/// A byte-level model with random weights, whose ids are text.
fn bytes_model(scratch: &std::path::Path) -> String {
    let [texts, config, run] = ["texts", "config.toml", "run"].map(|n| scratch.join(n));
    write_texts(&texts, 4, 60);
    let settings = "steps = 1\nlength = 32\nbatch = 1\nsample_every = 0\n[model]\nd_model = 16\nn_layer = 1\n";
    std::fs::write(&config, settings).unwrap();
    succeeds(&["train", "--config", arg(&config), "--data", arg(&texts), "--out", arg(&run)]);
    arg(&run).to_string()
}

/// Generation that would take long.
fn endless(model: &str, more: &[&str]) -> Command {
    let args = ["generate", "--model", model, "--ids", "1", "--max-new-tokens", "1000000000", "--ignore-eos"];
    let mut generate = command(&[&args[..], more].concat());
    generate.stdout(Stdio::piped()).stderr(Stdio::piped());
    generate
}

#[test]
fn a_reader_that_has_enough_ends_generation_quietly() {
    let model = oracle("hf/mamba");
    let mut child = endless(arg(&model), &[]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 16]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(exit_code(output.status), 0, "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{stderr}");
}

#[test]
fn a_full_device_is_an_error() {
    let model = oracle("hf/mamba");
    let mut generate = command(&["generate", "--model", arg(&model), "--ids", "1", "--max-new-tokens", "3"]);
    generate.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap()).stderr(Stdio::piped());
    let output = generate.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(exit_code(output.status), 1, "{stderr}");
    assert!(stderr.contains("error: writing to stdout"), "{stderr}");
}

#[test]
fn control_c_ends_generation_and_keeps_the_state() {
    let scratch = folder();
    let state = scratch.path().join("state");
    let model = oracle("hf/mamba");
    let mut child = endless(arg(&model), &["--save-state", arg(&state)]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 16]).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(exit_code(output.status), 130, "{stderr}");
    assert!(rest.ends_with('\n') && stderr.contains("(interrupted)"), "{stderr}");
    succeeds(&["generate", "--model", arg(&model), "--load-state", arg(&state), "--max-new-tokens", "2"]);
}

#[test]
fn prompts_of_every_kind() {
    let scratch = folder();
    let model = bytes_model(scratch.path());
    for prompt in ["été 漢字 🐍", "\u{1}\u{7f}\u{200b}\u{feff}", "a\nb\tc", "-", "--prompt", "\"'\\", " "] {
        let assigned = format!("--prompt={prompt}");
        let args =
            ["generate", "--model", &model, &assigned, "--max-new-tokens", "5", "--json", "--stop", "", "--stop", "é"];
        let found = object(&succeeds(&args));
        let expected: Vec<u32> = std::iter::once(256).chain(prompt.bytes().map(u32::from)).collect();
        assert_eq!(found["prompt_ids"], serde_json::json!(expected), "{prompt:?}");
    }
    // What is streamed and what --json holds are the same text.
    let args = ["generate", "--model", &model, "--prompt", "the", "--max-new-tokens", "200", "--ignore-eos"];
    let streamed = succeeds(&args);
    let json = object(&succeeds(&[&args[..], &["--json"]].concat()));
    assert_eq!(streamed.strip_suffix('\n').unwrap(), json["text"].as_str().unwrap());
    // A stop text of one letter that certainly comes is not part of the text.
    let stop = json["text"].as_str().unwrap().chars().nth(20).unwrap().to_string();
    let stopped = object(&succeeds(&[&args[..], &["--json", "--stop", &stop]].concat()));
    assert_eq!(stopped["finish_reason"], "stop");
    assert!(!stopped["text"].as_str().unwrap().contains(&stop));
    let not_utf8 = std::ffi::OsStr::new("x");
    let mut args = command(&["generate", "--model", &model, "--prompt"]);
    args.arg(std::os::unix::ffi::OsStrExt::from_bytes(&[not_utf8.as_encoded_bytes(), b"\xff"].concat()[..])
        as &std::ffi::OsStr);
    refused(2, &finish(args), &["not UTF-8"], &["UTF-8"]);
}
