//! What the end-to-end tests share: running the program, reading and writing tensors, small texts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

/// The checkpoints with reference results, in both formats.
pub const ORACLES: [&str; 8] = [
    "hf/mamba",
    "hf/mamba_wide_rank",
    "hf/mamba2",
    "hf/falcon_mamba",
    "official/mamba1",
    "official/mamba1_layernorm_untied",
    "official/mamba2",
    "official/mamba2_groups_mlp",
];

/// The folder of an oracle.
pub fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles").join(name)
}

/// A folder that goes away with the test.
pub fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// How the program ended and what it said.
#[derive(Debug)]
pub struct Run {
    /// 128 + the number of the signal, as in a shell, where one ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// The program, not yet started. The environment of whoever runs the tests does not reach it, nor does a GPU.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hognose"));
    command.args(args).stdin(Stdio::null()).env("HF_HUB_OFFLINE", "1").env_remove("HOGNOSE_ISA");
    command.env("CUDA_VISIBLE_DEVICES", "-1");
    command
}

/// Runs the program to its end. A panic fails the test, wherever it happens.
pub fn hognose(args: &[&str]) -> Run {
    finish(command(args))
}

pub fn finish(mut command: Command) -> Run {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let run = Run { code: exit_code(output.status), stdout: text(&output.stdout), stderr: text(&output.stderr) };
    assert!(!run.stderr.contains("panicked"), "{command:?}: {run:?}");
    run
}

pub fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().or(status.signal().map(|s| 128 + s)).unwrap()
}

/// Runs the program, which must succeed; returns what it wrote to stdout.
pub fn succeeds(args: &[&str]) -> String {
    let run = hognose(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    run.stdout
}

/// Runs the program, which must refuse with this code, all of these words in its message and nothing on stdout.
pub fn fails(code: i32, args: &[&str], words: &[&str]) {
    refused(code, &hognose(args), args, words);
}

/// Checks a refusal.
pub fn refused(code: i32, run: &Run, args: &[&str], words: &[&str]) {
    assert_eq!(run.code, code, "{args:?}: {}", run.stderr);
    assert_eq!(run.stdout, "", "{args:?}");
    let last = run.stderr.rsplit_once("\nerror: ").map(|(_, message)| message);
    let message =
        last.or(run.stderr.strip_prefix("error: ")).unwrap_or_else(|| panic!("{args:?}: no error in {run:?}"));
    for word in words {
        assert!(message.contains(word), "{args:?}: no {word:?} in {message:?}");
    }
}

/// The one JSON object in a text.
pub fn object(text: &str) -> serde_json::Map<String, serde_json::Value> {
    assert_eq!(text.lines().count(), 1, "expected one line, found {text:?}");
    match serde_json::from_str(text).unwrap() {
        serde_json::Value::Object(map) => map,
        other => panic!("expected an object, found {other}"),
    }
}

/// The keys of an object, sorted.
pub fn keys(object: &serde_json::Map<String, serde_json::Value>) -> Vec<&str> {
    let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Tensors of a file by name: shapes and numbers.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Reads all f32 tensors of a file.
pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().filter(|(_, view)| view.dtype() == Dtype::F32);
    let values =
        |view: &TensorView<'_>| view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensors.map(|(name, view)| (name.to_string(), (view.shape().to_vec(), values(&view)))).collect()
}

/// Reads a tensor of ids, `[rows, columns]`.
pub fn read_ids(path: &Path, name: &str) -> Vec<Vec<u32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let ids: Vec<u32> = view.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
    ids.chunks_exact(view.shape()[1]).map(<[u32]>::to_vec).collect()
}

/// Writes a file with the tensor `input_ids`.
pub fn write_ids(path: &Path, shape: &[usize], ids: &[i64]) {
    let bytes: Vec<u8> = ids.iter().flat_map(|i| i.to_le_bytes()).collect();
    write_tensor(path, "input_ids", Dtype::I64, shape, &bytes);
}

/// Writes a file with one tensor.
pub fn write_tensor(path: &Path, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
    let view = TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    std::fs::write(path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
}

/// max |a − b| / max |b|: how far `found` is from `expected`. NaN where there is one.
pub fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| {
        values.fold(0f32, |max, v| if v.is_nan() || max.is_nan() { f32::NAN } else { max.max(v.abs()) })
    };
    let difference = largest(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    difference / largest(&mut expected.iter().copied())
}

/// A copy of a folder's files that may be changed.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::write(to.join(entry.file_name()), std::fs::read(entry.path()).unwrap()).unwrap();
    }
}

/// Numbers that look random and are the same every time (Knuth's linear congruential generator).
pub struct Draws(u64);

impl Draws {
    pub fn new(seed: u64) -> Draws {
        Draws(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// From 0 up to but not including `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end
    }

    pub fn ids(&mut self, n: usize, vocabulary: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocabulary) as u32).collect()
    }
}

/// Writes texts of words into a folder, one file a document.
pub fn write_texts(folder: &Path, files: usize, words: usize) {
    const WORDS: [&str; 12] =
        ["the", "sea", "whale", "ship", "of", "white", "and", "harpoon", "captain", "é", "wind", "deep."];
    std::fs::create_dir_all(folder).unwrap();
    let mut draws = Draws::new(7);
    for file in 0..files {
        let text: Vec<&str> = (0..words).map(|_| WORDS[draws.below(WORDS.len())]).collect();
        std::fs::write(folder.join(format!("{file:02}.txt")), text.join(" ")).unwrap();
    }
}
