//! Every explanation computes, keeps its own checks and leaves pictures.

use std::fs::File;
use std::io::BufReader;

use crate::common::*;

const NAMES: [&str; 9] = ["ssm", "zoh", "representations", "hippo", "s4-kernel", "selection", "scan", "ssd", "kalman"];

fn explain(name: &str, more: &[&str]) -> serde_json::Map<String, serde_json::Value> {
    let folder = folder();
    let args = ["explain", name, "--json", "--device", "cpu", "--out", arg(folder.path())];
    let json = object(&succeeds(&[&args[..], more].concat()));
    assert_eq!(keys(&json), ["checks", "figure", "files", "name", "seconds", "tables", "text", "title"]);
    let checks = json["checks"].as_array().unwrap();
    assert!(checks.len() > 4 && checks.iter().all(|c| c["passed"] == true), "{name}: {checks:?}");
    let path = |kind: &str| json["files"][kind].as_str().unwrap().to_string();
    let mut png = png::Decoder::new(BufReader::new(File::open(path("png")).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; png.output_buffer_size()];
    let info = png.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height), (1600, 1000));
    let svg = std::fs::read_to_string(path("svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    json
}

#[test]
fn all_names_keep_their_checks() {
    let listed = object(&succeeds(&["explain", "--json"]));
    assert_eq!(listed.keys().map(String::as_str).collect::<Vec<_>>(), NAMES);
    for name in NAMES {
        let json = explain(name, &[]);
        assert!(json["text"].as_str().unwrap().len() > 500, "{name}");
    }
}

#[test]
fn models_of_ones_own_are_looked_into() {
    for name in ["selection", "ssd"] {
        explain(name, &["--text", "a"]);
        fails(2, &["explain", name, "--device", "cpu", "--text", ""], &["0 tokens", "1 to 512"]);
    }
    let model = oracle("hf/mamba");
    fails(2, &["explain", "ssd", "--device", "cpu", "--model", arg(&model)], &["no tokenizer.json"]);
    // Mamba-1, whose channels each have a step and a matrix of their own.
    let copied = folder();
    copy(&model, copied.path());
    for (name, contents) in hognose::Tokenizer::Bytes.files() {
        std::fs::write(copied.path().join(name), contents).unwrap();
    }
    for name in ["selection", "ssd"] {
        explain(name, &["--model", arg(copied.path()), "--text", "a whale"]);
    }
}

#[test]
fn explain_refuses() {
    fails(2, &["explain", "s5"], &["\"s5\"", "ssm, zoh", "kalman"]);
    fails(2, &["explain", "zoh", "--text", "x"], &["selection and ssd", "zoh"]);
    let file = folder();
    let taken = file.path().join("taken");
    std::fs::write(&taken, "").unwrap();
    fails(1, &["explain", "zoh", "--out", arg(&taken)], &["cannot make the folder"]);
}
