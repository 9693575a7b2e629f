//! GGUF files through every command that takes a model.

use std::fs;

use crate::common::*;

#[test]
fn a_file_is_a_model_everywhere() {
    let scratch = folder();
    let (model, file) = (oracle("hf/mamba2"), scratch.path().join("model.gguf"));
    let quantize = ["quantize", arg(&model), arg(&file), "--type"];
    let json = object(&succeeds(&[&quantize[..], &["f32", "--json"]].concat()));
    let documented = ["bytes_after", "bytes_before", "file_bytes", "largest_error", "notes", "path", "tensors"];
    assert_eq!(keys(&json), documented);
    assert_eq!(json["file_bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!(json["largest_error"], 0.0);
    fails(1, &[&quantize[..], &["f32"]].concat(), &["already exists"]);
    fails(2, &[&quantize[..], &["q3_k"]].concat(), &["q8_0", "q4_k", "bf16"]);

    let expected = read_tensors(&model.join("expected.safetensors"));
    let out = scratch.path().join("out.safetensors");
    let ids = model.join("expected.safetensors");
    succeeds(&["forward", "--model", arg(&file), "--ids", arg(&ids), "--out", arg(&out), "--device", "cpu"]);
    let distance = distance(&read_tensors(&out)["logits"].1, &expected["logits"].1);
    assert!(distance < 1e-5, "{distance}");

    let inspected = object(&succeeds(&["inspect", "--json", arg(&file)]));
    assert_eq!((&inspected["format"], &inspected["model_type"]), (&"gguf".into(), &"mamba2".into()));
    let back = scratch.path().join("back");
    succeeds(&["convert", arg(&file), arg(&back)]);
    let small = scratch.path().join("small.gguf");
    succeeds(&["quantize", arg(&back), arg(&small), "--type", "q8_0"]);
    assert!(fs::metadata(&small).unwrap().len() * 2 < fs::metadata(&file).unwrap().len());
    let generate =
        ["generate", "--ids", "1,2,3", "--max-new-tokens", "8", "--temperature", "0", "--json", "--device", "cpu"];
    let ids = |path| object(&succeeds(&[&generate[..], &["--model", arg(path)]].concat()))["ids"].clone();
    assert_eq!(ids(&file), ids(&model));
    assert_eq!(ids(&small).as_array().unwrap().len(), 8);
    let bench = ["bench", "--model", arg(&small), "--length", "8", "--repeat", "1", "--json", "--device", "cpu"];
    assert_eq!(object(&succeeds(&bench))["dtype"], "as stored");
}

/// A file that llama.cpp quantised, with its tokenizer.
#[test]
fn a_file_of_llama_cpp() {
    let file = oracle("../gguf/types.gguf");
    let args = ["generate", "--model", arg(&file), "--prompt", "Call me ", "--max-new-tokens", "4", "--device", "cpu"];
    let json = object(&succeeds(&[&args[..], &["--json"]].concat()));
    assert_eq!(json["prompt_ids"].as_array().unwrap()[..3], [256, 67, 97]);
    let scratch = folder();
    let cut = scratch.path().join("cut.gguf");
    let bytes = fs::read(&file).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    fails(1, &["generate", "--model", arg(&cut), "--ids", "1"], &["cut.gguf", "past the end of the file"]);
    fs::write(&cut, [&bytes[..3000], &[0xff; 64], &bytes[3064..]].concat()).unwrap();
    fails(1, &["generate", "--model", arg(&cut), "--prompt", "a"], &["cut.gguf"]);
}
