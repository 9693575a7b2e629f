//! What each command prints, and how it refuses to be used wrongly.

use std::fs;

use crate::common::*;

const MODEL: &str = "hf/mamba";

#[test]
fn usage() {
    assert!(succeeds(&["--version"]).starts_with("hognose "));
    let help = succeeds(&["--help"]);
    for command in ["train", "generate", "forward", "eval", "inspect", "convert", "quantize", "explain", "bench"] {
        assert!(help.contains(command), "{command}");
        assert!(succeeds(&[command, "--help"]).contains("Usage: hognose"), "{command}");
    }
    assert_eq!(hognose(&[]).code, 2);
    fails(2, &["fly"], &["unrecognized subcommand 'fly'"]);
    fails(2, &["generate"], &["--model"]);
    fails(2, &["forward", "--model", "x"], &["--ids", "--out"]);
    fails(2, &["generate", "--model", "x", "--ids", "1", "--prompt", "a"], &["cannot be used with"]);
}

#[test]
fn generate_streams_ids_where_there_is_no_tokenizer() {
    let model = oracle(MODEL);
    let args = ["generate", "--model", arg(&model), "--ids", "1,2,3", "--temperature", "0", "--max-new-tokens", "4"];
    let json = object(&succeeds(&[&args[..], &["--json"]].concat()));
    let documented = ["finish_reason", "ids", "prompt_ids", "prompt_seconds", "seconds", "text", "tokens_per_second"];
    assert_eq!(keys(&json), documented);
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(json["prompt_ids"], serde_json::json!([1, 2, 3]));
    let ids: Vec<String> = json["ids"].as_array().unwrap().iter().map(|v| v.to_string()).collect();
    assert_eq!(succeeds(&args).trim_end(), ids.join(" "));
    let none = object(&succeeds(&[&args[..8], &["0", "--json"]].concat()));
    assert_eq!((none["ids"].to_string().as_str(), &none["finish_reason"]), ("[]", &json["finish_reason"]));
}

#[test]
fn the_same_seed_draws_the_same_tokens() {
    let model = oracle(MODEL);
    let draw = |seed: &str, more: &[&str]| {
        let args = ["generate", "--model", arg(&model), "--ids", "4", "--max-new-tokens", "12", "--seed", seed];
        succeeds(&[&args[..], &["--ignore-eos", "--temperature", "30"], more].concat())
    };
    assert_eq!(draw("1", &[]), draw("1", &["--threads", "1"]));
    assert_ne!(draw("1", &[]), draw("2", &[]));
    let greedy = draw("1", &["--top-k", "1"]);
    assert_eq!(greedy, draw("2", &["--min-p", "1"]));
}

#[test]
fn generate_refuses() {
    let model = oracle(MODEL);
    let (with, none) = (|more: &[&'static str]| [&["generate", "--model", arg(&model)], more].concat(), &[][..]);
    for (code, more, words) in [
        (2, none, &["--prompt, --ids or --load-state"][..]),
        (2, &["--prompt", ""], &["prompt is empty"]),
        (2, &["--ids", ""], &["--ids"]),
        (2, &["--ids", "1,-2"], &["-2"]),
        (2, &["--ids", "1.5"], &["1.5"]),
        (2, &["--prompt", "hi"], &["no tokenizer.json", "--ids"]),
        (2, &["--ids", "1", "--stop", "x"], &["--stop needs a tokenizer"]),
        (2, &["--ids", "1", "--top-k", "-1"], &["invalid value '-1'", "--top-k"]),
        (2, &["--ids", "1", "--top-p", "2"], &["--top-p", "is 2"]),
        (2, &["--ids", "1", "--top-p", "0"], &["--top-p"]),
        (2, &["--ids", "1", "--min-p", "1.5"], &["--min-p"]),
        (2, &["--ids", "1", "--temperature", "-1"], &["--temperature", "is -1"]),
        (2, &["--ids", "1", "--temperature", "nan"], &["--temperature"]),
        (2, &["--ids", "1", "--repetition-penalty", "0"], &["--repetition-penalty"]),
        (2, &["--ids", "1", "--max-new-tokens", "99999999999999999999"], &["--max-new-tokens"]),
        (2, &["--ids", "1", "--threads", "0"], &["--threads"]),
        (2, &["--ids", "1", "--threads", "99999999"], &["--threads"]),
        (1, &["--ids", "1", "--device", "cuda"], &["CUDA: "]),
        (2, &["--ids", "1", "--device", "abacus"], &["abacus"]),
        (2, &["--ids", "1", "--dtype", "f64"], &["f64"]),
        (1, &["--ids", "320"], &["320", "outside the vocabulary of 320"]),
        (1, &["--ids", "4294967295"], &["4294967295", "outside"]),
        (1, &["--ids", "1", "--tokenizer", "/no/such/file"], &["/no/such/file"]),
        (1, &["--ids", "1", "--tokenizer", "Cargo.toml"], &["Cargo.toml", "not a tokenizer"]),
    ] {
        fails(code, &with(more), words);
    }
    for (name, words) in [
        ("/no/such/folder", "no such file or folder"),
        ("mamba-130m", "no such file or folder"),
        ("someone/some-model", "HF_HUB_OFFLINE is set"),
        (arg(&model.join("config.json")), "no such folder"),
        (env!("CARGO_MANIFEST_DIR"), "config.json"),
    ] {
        fails(1, &["generate", "--model", name, "--ids", "1"], &[name, words]);
    }
}

#[test]
fn an_instruction_set_that_is_none() {
    let model = oracle(MODEL);
    let args = ["generate", "--model", arg(&model), "--ids", "1"];
    let mut nonsense = command(&args);
    nonsense.env("HOGNOSE_ISA", "mmx");
    refused(1, &finish(nonsense), &args, &["HOGNOSE_ISA", "mmx", "portable"]);
}

#[test]
fn inspect_describes_every_checkpoint() {
    for name in ORACLES {
        let model = oracle(name);
        let json = object(&succeeds(&["inspect", "--json", arg(&model)]));
        let documented = [
            "architecture",
            "bytes",
            "config",
            "dtypes",
            "format",
            "memory",
            "model_type",
            "parameters",
            "path",
            "tensors",
            "tokenizer",
        ];
        assert_eq!(keys(&json), documented, "{name}");
        let format = if name.starts_with("official") { "original" } else { "huggingface" };
        assert_eq!(json["format"], format, "{name}");
        let count =
            |t: &serde_json::Value| t["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product::<u64>();
        let tensors = json["tensors"].as_array().unwrap();
        assert_eq!(json["parameters"], tensors.iter().map(count).sum::<u64>(), "{name}");
        let text = succeeds(&["inspect", arg(&model)]);
        for tensor in tensors {
            assert!(text.contains(tensor["native_name"].as_str().unwrap()), "{name}: {tensor}");
        }
        assert!(text.contains(&format!("{} tensors", tensors.len())), "{name}: {text}");
    }
}

#[test]
fn inspect_reads_states_and_refuses_the_rest() {
    let scratch = folder();
    let state = scratch.path().join("state");
    let model = oracle(MODEL);
    let args = ["generate", "--model", arg(&model), "--ids", "9,8,7", "--max-new-tokens", "2", "--temperature", "0"];
    succeeds(&[&args[..], &["--save-state", arg(&state)]].concat());
    let json = object(&succeeds(&["inspect", "--json", arg(&state)]));
    assert_eq!(keys(&json), ["bytes", "format", "model", "pending", "position", "tensors", "version"]);
    assert_eq!(json["position"], "4");
    assert!(succeeds(&["inspect", arg(&state)]).contains("hognose-state"));
    fails(1, &["inspect", "/no/such"], &["/no/such"]);
    fails(1, &["inspect", arg(&model.join("model.safetensors"))], &["neither a state file", "give its folder"]);
    fails(1, &["inspect", arg(&model.join("config.json"))], &["neither a state file"]);
    fails(1, &["inspect", arg(scratch.path())], &["config.json"]);
}

#[test]
fn convert_refuses() {
    let scratch = folder();
    let model = oracle(MODEL);
    let to = scratch.path().join("to");
    fails(1, &["convert", "/no/such", arg(&to)], &["/no/such"]);
    fails(1, &["convert", arg(&model), arg(scratch.path())], &["already exists"]);
    fails(2, &["convert", arg(&model), arg(&to), "--format", "onnx"], &["onnx", "original", "huggingface", "gguf"]);
    assert!(!to.exists());
    let file = scratch.path().join("file");
    fs::write(&file, "precious").unwrap();
    fails(1, &["convert", arg(&model), arg(&file)], &["already exists"]);
    fails(1, &["convert", arg(&model), arg(&file.join("below"))], &["cannot create the folder"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn bench_measures_models() {
    let model = oracle("hf/mamba2");
    for (mode, length) in [("prefill", "40"), ("decode", "3"), ("train", "24")] {
        for name in ["tiny", arg(&model)] {
            let args = ["bench", "--model", name, "--mode", mode, "--batch", "2", "--length", length, "--repeat", "2"];
            let json = object(&succeeds(&[&args[..], &["--json"]].concat()));
            let documented = [
                "batch",
                "ceiling",
                "device",
                "dtype",
                "length",
                "mode",
                "model",
                "peak_bytes",
                "seconds",
                "tokens_per_second",
            ];
            assert_eq!(keys(&json), documented, "{name} {mode}");
            assert_eq!(keys(json["ceiling"].as_object().unwrap()), ["bandwidth", "bound", "flops", "share"]);
            assert_eq!(keys(json["seconds"].as_object().unwrap()), ["max", "median", "min"]);
            assert_eq!((&json["mode"], &json["batch"]), (&mode.into(), &2.into()));
            let positive = |v: &serde_json::Value| v.as_f64().is_some_and(|v| v > 0.0 && v.is_finite());
            assert!(positive(&json["tokens_per_second"]) && positive(&json["peak_bytes"]), "{json:?}");
        }
    }
    let text = succeeds(&["bench", "--model", "tiny", "--length", "2", "--repeat", "1"]);
    assert!(text.contains("tokens/s") && text.contains("at the peak"), "{text}");
}

#[test]
fn bench_refuses() {
    for (code, more, words) in [
        (2, &[][..], &["--model", "--op"][..]),
        (2, &["--model", "nope"], &["no preset \"nope\"", "tiny"]),
        (2, &["--op", "nope"], &["\"nope\"", "selective_scan", "ssd"]),
        (2, &["--model", "tiny", "--batch", "0"], &["--batch is 0"]),
        (2, &["--model", "tiny", "--length", "0"], &["--length is 0"]),
        (2, &["--model", "tiny", "--repeat", "0"], &["--repeat is 0"]),
        (2, &["--model", "tiny", "--batch", "-1"], &["-1", "--batch"]),
        (2, &["--model", "tiny", "--mode", "dance"], &["dance", "prefill"]),
        // This product once wrapped around to 0 and was measured.
        (2, &["--op", "linear", "--batch", "4294967296", "--length", "4294967296"], &["2³¹"]),
        (2, &["--model", "tiny", "--batch", "4294967296", "--length", "4294967296"], &["2³¹"]),
        (1, &["--model", "tiny", "--mode", "train", "--length", "99999999"], &["not enough memory"]),
        (1, &["--model", "tiny", "--batch", "99999999", "--length", "2"], &["not enough memory"]),
        (1, &["--op", "ssd", "--model", "tiny"], &["Mamba-2"]),
        (1, &["--model", "/no/such/model"], &["/no/such/model"]),
    ] {
        fails(code, &[&["bench"], more].concat(), words);
    }
}

#[test]
fn bench_measures_ops() {
    let args = ["bench", "--op", "causal_conv1d", "--length", "16", "--repeat", "1", "--model", "tiny"];
    let text = succeeds(&args);
    assert!(text.contains("causal_conv1d forward"), "{text}");
    object(&succeeds(&[&args[..], &["--json"]].concat()));
}

/// Without a GPU, or without a driver that can be used, `cuda` is an error in one sentence and `auto` is the CPU.
#[test]
fn without_a_gpu() {
    let scratch = folder();
    let libraries = scratch.path();
    let model = oracle("hf/mamba");
    let run = |device: &str, change: &dyn Fn(&mut std::process::Command)| {
        let mut generate =
            command(&["generate", "--model", arg(&model), "--ids", "1", "--max-new-tokens", "4", "--device", device]);
        change(&mut generate);
        finish(generate)
    };
    let as_it_is = |_: &mut std::process::Command| {};
    let bare = |c: &mut std::process::Command| {
        c.env_clear().env("CUDA_VISIBLE_DEVICES", "-1");
    };
    // Files that are no libraries, and a library that lacks what is needed.
    let broken = |c: &mut std::process::Command| {
        c.env("HOGNOSE_CUDA_LIBRARIES", libraries);
    };
    for name in ["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13"] {
        std::fs::write(libraries.join(name), "not a library").unwrap();
    }
    let cpu = run("cpu", &as_it_is);
    assert_eq!(cpu.code, 0, "{cpu:?}");
    let check = |change: &dyn Fn(&mut std::process::Command)| {
        let cuda = run("cuda", change);
        refused(1, &cuda, &["--device", "cuda"], &["CUDA: "]);
        assert_eq!(cuda.stderr.lines().count(), 1, "{cuda:?}");
        assert!(!cuda.stderr.trim_end().contains(". "), "more than a sentence: {cuda:?}");
        let auto = run("auto", change);
        assert_eq!((auto.code, &auto.stdout), (0, &cpu.stdout), "{auto:?}");
        let first = auto.stderr.lines().next().unwrap_or_default();
        assert!(first.starts_with("computing on the CPU, since there is no GPU to use (CUDA: "), "{auto:?}");
        assert_eq!(auto.stderr.matches("computing on the CPU").count(), 1);
    };
    check(&as_it_is);
    check(&bare);
    check(&broken);
    let source = libraries.join("old.c");
    std::fs::write(&source, "int cuInit(unsigned flags) { return 0; }").unwrap();
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).args([&libraries.join("libcuda.so.1"), &source]);
    assert!(compiler.status().unwrap().success());
    check(&broken);
}
