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
