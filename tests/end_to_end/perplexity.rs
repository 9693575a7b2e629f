//! The cost of texts, as the command computes it in pieces and as it follows from all logits at once.

use hognose::{LoadOptions, Tokenizer};
use hognose_model::session::next_token_loss;

use crate::common::*;

/// Lengths of documents: one token, a piece that is filled up, one that is full, several.
const LENGTHS: [usize; 5] = [1, 40, 512, 700, 33];
/// Pieces and filling change no bit of the logits; sums of nats are added in another order.
const ORDER_BOUND: f64 = 1e-12;

/// A checkpoint with bytes as tokens.
fn model_of_bytes(name: &str, folder: &std::path::Path) {
    copy(&oracle(name), folder);
    Tokenizer::Bytes.save(folder).unwrap();
}

#[test]
fn pieces_cost_what_the_whole_costs() {
    for name in ["hf/mamba", "hf/mamba2"] {
        let scratch = folder();
        let (model, texts) = (scratch.path().join("model"), scratch.path().join("texts.jsonl"));
        model_of_bytes(name, &model);
        let mut draws = Draws::new(5);
        let mut documents: Vec<String> = Vec::new();
        for length in LENGTHS {
            documents.push((0..length).map(|_| char::from(b'a' + draws.below(26) as u8)).collect());
        }
        let lines: Vec<String> = documents.iter().map(|d| serde_json::json!({ "body": d }).to_string()).collect();
        std::fs::write(&texts, lines.join("\n")).unwrap();

        let options = LoadOptions { device: Some(hognose::Device::cpu(Some(1)).unwrap()), ..Default::default() };
        let loaded = hognose::load(arg(&model), &options).unwrap();
        let mut nats = 0.0;
        for document in &documents {
            let ids: Vec<u32> = loaded.start().into_iter().chain(document.bytes().map(u32::from)).collect();
            assert_eq!(ids.len(), document.len() + 1);
            let logits = hognose::forward(&loaded.model, &ids).unwrap();
            nats += next_token_loss(&logits, &ids, loaded.model.config.padded_vocab);
        }
        let tokens = LENGTHS.iter().sum::<usize>() as f64;

        let args = ["eval", "perplexity", "--model", arg(&model), "--data", arg(&texts), "--field", "body"];
        let json = object(&succeeds(&[&args[..], &["--json"]].concat()));
        let documented = [
            "bits_per_byte",
            "bytes",
            "documents",
            "model",
            "nats_per_token",
            "perplexity",
            "seconds",
            "tokens",
            "tokens_per_second",
        ];
        assert_eq!(keys(&json), documented);
        assert_eq!((json["tokens"].as_f64(), json["bytes"].as_f64()), (Some(tokens), Some(tokens)));
        assert_eq!(json["documents"], LENGTHS.len());
        let found = |key: &str| json[key].as_f64().unwrap();
        let near = |a: f64, b: f64| (a - b).abs() <= ORDER_BOUND * b.abs();
        assert!(near(found("nats_per_token"), nats / tokens), "{name}: {json:?}, expected {}", nats / tokens);
        assert!(near(found("perplexity"), found("nats_per_token").exp()), "{json:?}");
        // A token is a byte here.
        assert!(near(found("bits_per_byte"), nats / tokens / std::f64::consts::LN_2), "{json:?}");
        let text = succeeds(&args);
        assert!(text.starts_with(&format!("perplexity {:.4}, ", found("perplexity"))), "{text}");
    }
}

#[test]
fn a_limit_keeps_characters_whole() {
    let scratch = folder();
    let (model, texts) = (scratch.path().join("model"), scratch.path().join("texts"));
    model_of_bytes("hf/mamba", &model);
    std::fs::create_dir(&texts).unwrap();
    std::fs::write(texts.join("1.txt"), "abé").unwrap();
    std::fs::write(texts.join("2.txt"), "cd").unwrap();
    let args = ["eval", "perplexity", "--model", arg(&model), "--data", arg(&texts), "--json", "--max-bytes"];
    for (limit, bytes, documents) in [("1", 1, 1), ("3", 2, 1), ("4", 4, 1), ("5", 5, 2), ("1000", 6, 2)] {
        let json = object(&succeeds(&[&args[..], &[limit]].concat()));
        assert_eq!((&json["bytes"], &json["documents"]), (&bytes.into(), &documents.into()), "{limit}");
    }
}

#[test]
fn perplexity_refuses() {
    let scratch = folder();
    let (model, text, bad) =
        (scratch.path().join("model"), scratch.path().join("text.txt"), scratch.path().join("bad.jsonl"));
    model_of_bytes("hf/mamba", &model);
    std::fs::write(&text, "a text").unwrap();
    std::fs::write(&bad, "{}").unwrap();
    let bare = oracle("hf/mamba");
    for (code, model, data, more, words) in [
        (2, arg(&bare), arg(&text), &[][..], &["no tokenizer.json", "--tokenizer"][..]),
        (1, "/no/such/model", arg(&text), &[], &["/no/such/model"]),
        (1, arg(&model), "/no/such.txt", &[], &["/no/such.txt"]),
        (1, arg(&model), arg(&bad), &[], &["bad.jsonl", "\"text\""]),
        (2, arg(&model), arg(&text), &["--max-bytes", "0"], &["--max-bytes"]),
        (2, arg(&model), arg(&text), &["--dtype", "f64"], &["f64"]),
    ] {
        fails(code, &[&["eval", "perplexity", "--model", model, "--data", data], more].concat(), words);
    }
    fails(2, &["eval", "perplexity", "--model", "x"], &["--data"]);
    std::fs::write(&text, "é").unwrap();
    let args = ["eval", "perplexity", "--model", arg(&model), "--data", arg(&text), "--max-bytes", "1"];
    fails(2, &args, &["--max-bytes is 1"]);
}
