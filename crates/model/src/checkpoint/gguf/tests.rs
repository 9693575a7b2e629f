use super::*;
use crate::checkpoint::{Checkpoint, Format, convert, quantize};
use hognose_core::quant::Kind;
use std::path::PathBuf;

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/oracles").join(name)
}

/// A checkpoint of other programs as a GGUF file.
fn written(name: &str, tokenizer: Option<&Tokenizer>, dtype: Option<Dtype>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let checkpoint = Checkpoint::open(oracle(name)).unwrap();
    quantize(&checkpoint, tokenizer, &path, dtype, &mut |_, _| ()).unwrap();
    (folder, path)
}

#[test]
fn there_and_back() {
    for name in ["official/mamba1", "official/mamba2", "hf/mamba2", "hf/falcon_mamba"] {
        let before = Checkpoint::open(oracle(name)).unwrap();
        let (folder, path) = written(name, None, None);
        let after = Checkpoint::open(&path).unwrap();
        assert_eq!((after.format, &after.config), (Format::Gguf, &before.config), "{name}");
        let back = folder.path().join("back");
        convert(&path, &back, Format::HuggingFace).unwrap();
        let back = Checkpoint::open(&back).unwrap();
        for t in before.tensors() {
            let [x, y, z] = [&before, &after, &back].map(|c| c.read_f32(&t.name).unwrap());
            let same = |a: &[f32], b: &[f32]| match t.name.ends_with(".A_log") {
                // The file holds A in f32, whose logarithm is off by the rounding of A.
                true => a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 2.0 * f32::EPSILON * (1.0 + a.abs())),
                false => a == b,
            };
            assert!(same(&x, &y) && y == z, "{name}: {}", t.name);
        }
    }
}

#[test]
fn types_give_way_where_rows_do_not_fit() {
    let (_folder, path) = written("hf/mamba", None, Some(Dtype::Blocks(Kind::Q4_K)));
    let found = Checkpoint::open(&path).unwrap();
    let dtype = |name: &str| found.info(name).unwrap().dtype;
    assert_eq!(dtype("backbone.embedding.weight"), Dtype::Blocks(Kind::Q8_0));
    assert_eq!(dtype("backbone.layers.0.mixer.dt_proj.weight"), Dtype::F16);
    assert_eq!(dtype("backbone.layers.0.mixer.conv1d.weight"), Dtype::F32);
    assert_eq!(dtype("backbone.layers.0.mixer.A_log"), Dtype::F32);
}

#[test]
fn what_llama_cpp_does_not_compute_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let refused = [
        ("official/mamba1_layernorm_untied", "LayerNorm"),
        ("official/mamba2_groups_mlp", "MLP"),
        ("hf/mamba_wide_rank", "biases"),
    ];
    for (name, word) in refused {
        let checkpoint = Checkpoint::open(oracle(name)).unwrap();
        let error = quantize(&checkpoint, None, &path, None, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(word) && !path.exists(), "{name}: {error}");
    }
}

#[test]
fn a_tokenizer_comes_back() {
    let (_folder, path) = written("hf/mamba", Some(&Tokenizer::Bytes), None);
    assert!(tokenizer(&path).unwrap().unwrap().is_bytes());
    let (_folder, path) = written("hf/mamba", None, None);
    assert!(tokenizer(&path).unwrap().is_none());
    let error = Tokenizer::load(&path).unwrap_err().to_string();
    assert!(error.contains("model.gguf"), "{error}");
}

/// No damage panics or asks for memory by a number in the file: errors, or (in the numbers themselves) a checkpoint.
#[test]
fn damaged_files_are_errors() {
    let (folder, path) = written("hf/mamba", Some(&Tokenizer::Bytes), None);
    let bytes = std::fs::read(&path).unwrap();
    let header = 1 + bytes.windows(13).rposition(|w| w == b"output_norm.w").unwrap();
    for length in (0..header).step_by(97).chain([bytes.len() - 40]) {
        assert!(container::read(&bytes[..length]).is_err(), "{length} bytes");
    }
    let damaged = folder.path().join("damaged.gguf");
    for at in (0..header).step_by(61) {
        for value in [0, 0x7f, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let _ = container::read(&bytes);
        }
    }
    for at in (4..header).step_by(1009) {
        let mut bytes = bytes.clone();
        bytes[at] = 0xff;
        std::fs::write(&damaged, &bytes).unwrap();
        let _ = (Checkpoint::open(&damaged).map(|_| ()), tokenizer(&damaged).map(|_| ()));
    }
}

#[test]
fn counts_are_not_believed() {
    let start = |tensors: u64, values: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(values.to_le_bytes());
        bytes
    };
    assert!(
        container::read(b"GGUF").is_err() && container::read(b"").is_err() && container::read(b"GGML\x03").is_err()
    );
    assert!(container::read(&start(u64::MAX, 0)).unwrap_err().contains("cut short"));
    assert!(container::read(&start(0, u64::MAX)).unwrap_err().contains("cut short"));
    let mut array = start(0, 1);
    array.extend([1, 0, 0, 0, 0, 0, 0, 0, b'k', 9, 0, 0, 0, 10, 0, 0, 0]);
    array.extend(u64::MAX.to_le_bytes());
    assert!(container::read(&array).unwrap_err().contains("more than any file"));
    let old = b"GGUF\x01\0\0\0";
    assert!(container::read(old).unwrap_err().contains("version 1"));
    assert!(container::read(b"GGUF\0\0\0\x03").unwrap_err().contains("byte order"));
}

/// Blocks that llama.cpp encoded, against what its Python package decodes: CRC-32 of the numbers as little-endian f32.
#[test]
fn blocks_of_llama_cpp() {
    let expected = [
        ("token_embd.weight", "q5_1", 0x6eabe28b),
        ("blk.0.ssm_in.weight", "q4_0", 0x5581927a),
        ("blk.0.ssm_out.weight", "q4_k", 0x46438b32),
        ("blk.1.ssm_in.weight", "q4_1", 0x98836427),
        ("blk.1.ssm_out.weight", "q5_k", 0xfc02d2d8),
        ("blk.2.ssm_in.weight", "q5_0", 0x507b56a9),
        ("blk.2.ssm_out.weight", "q6_k", 0x4c8f3416),
    ];
    let path = oracle("../gguf/types.gguf");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(Tokenizer::find(&path).unwrap().unwrap().is_bytes());
    assert_eq!((checkpoint.model_type.as_str(), checkpoint.config.vocab_size), ("mamba2", 257));
    for (name, dtype, crc) in expected {
        let info = checkpoint.tensors().iter().find(|t| t.native_name == name).unwrap();
        let values = checkpoint.read_f32(&info.name).unwrap();
        assert_eq!(info.dtype.to_string(), dtype);
        assert_eq!(crc32fast::hash(bytemuck::cast_slice(&values)), crc, "{name}");
    }
}

/// A tokenizer.json with merges, special tokens and a token for the beginning.
fn small_tokenizer() -> serde_json::Value {
    let alphabet = crate::tokenizer::byte_alphabet();
    let mut vocabulary: serde_json::Map<_, _> =
        alphabet.iter().enumerate().map(|(b, c)| (c.to_string(), b.into())).collect();
    for (i, token) in ["th", "the", "Ġthe", "12"].into_iter().enumerate() {
        vocabulary.insert(token.into(), (256 + i).into());
    }
    let added = |id: u32, content: &str, special: bool| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    let bytes =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": bytes,
        "added_tokens": [added(260, "<s>", true), added(261, "    ", false)],
        "pre_tokenizer": bytes,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [["t", "h"], ["th", "e"], ["Ġ", "the"], ["1", "2"]]},
    })
}

const TEXTS: [&str; 4] = ["the 12 mothers' theme", "  the    the\n\n", "naïve 1212 <s>the", ""];

/// The same ids from the keys that llama.cpp reads as from the tokenizer.json that they were made of.
#[test]
fn merges_come_back_without_the_json() {
    let cuts = [
        ("gpt-2", serde_json::Value::Null),
        (
            "starcoder",
            serde_json::json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}),
        ),
    ];
    for (name, description) in cuts {
        let mut json = small_tokenizer();
        if !description.is_null() {
            json["pre_tokenizer"] = description;
        }
        let original = Tokenizer::from_json(Path::new("x"), json.to_string().into_bytes(), Vec::new()).unwrap();
        let (folder, path) = written("hf/mamba", Some(&original), None);
        let bytes = std::fs::read(&path).unwrap();
        let at = |word: &[u8]| bytes.windows(word.len()).position(|w| w == word).unwrap();
        assert!(at(name.as_bytes()) > at(b"tokenizer.ggml.pre"));
        // Another name hides the key.
        let mut hidden = bytes.clone();
        hidden[at(b"tokenizer.huggingface.json")] = b'x';
        let other = folder.path().join("hidden.gguf");
        std::fs::write(&other, hidden).unwrap();
        for path in [path, other] {
            let again = tokenizer(&path).unwrap().unwrap();
            for text in TEXTS {
                for special in [true, false] {
                    let [a, b] = [&original, &again].map(|t| t.encode(text.as_bytes(), special).unwrap());
                    assert_eq!(a, b, "{name}: {text:?}");
                    assert_eq!(original.decode(&a).unwrap(), again.decode(&b).unwrap());
                }
            }
            assert_eq!(again.vocab_size(), 262);
        }
    }
}

#[test]
fn a_tokenizer_that_llama_cpp_cannot_have_is_kept_whole() {
    let mut json = small_tokenizer();
    json["pre_tokenizer"]["add_prefix_space"] = true.into();
    let original = Tokenizer::from_json(Path::new("x"), json.to_string().into_bytes(), Vec::new()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let checkpoint = Checkpoint::open(oracle("hf/mamba")).unwrap();
    let report = quantize(&checkpoint, Some(&original), &path, None, &mut |_, _| ()).unwrap();
    assert!(report.notes[0].contains("llama.cpp"), "{:?}", report.notes);
    let again = tokenizer(&path).unwrap().unwrap();
    assert_eq!(original.encode(b"the 12", true).unwrap(), again.encode(b"the 12", true).unwrap());
}
