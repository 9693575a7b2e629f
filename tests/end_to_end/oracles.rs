//! What other people's code computed (tests/data/oracles), computed by the program.

use std::path::Path;

use crate::common::*;

/// Bounds on max |difference| / max |expected| of logits and gradients, f32 on the CPU.
struct Bounds {
    logits: f32,
    gradients: f32,
}

const EXACT: Bounds = Bounds { logits: 2e-5, gradients: 2e-4 };
/// The kernels of mamba-ssm that made these results multiply in tf32.
const TF32: Bounds = Bounds { logits: 5e-4, gradients: 5e-3 };
/// Matrices rounded to bf16, everything else in f32: bf16 keeps 8 bits, so a rounding is off by up to 2⁻⁹ = 2e-3, and
/// a few layers of them add up. Measured on the eight: 1.1e-3 to 5.0e-3.
const BF16_LOGITS: f32 = 1e-2;

fn bounds(name: &str) -> Bounds {
    if name.starts_with("official/mamba2") { TF32 } else { EXACT }
}

fn forward(model: &Path, expected: &Path, out: &Path, more: &[&str]) -> Tensors {
    let mut args = vec!["forward", "--model", arg(model), "--ids", arg(expected), "--out", arg(out)];
    args.extend(more);
    assert_eq!(succeeds(&args), "");
    read_tensors(out)
}

#[test]
fn logits_loss_and_gradients() {
    let scratch = folder();
    for name in ORACLES {
        let file = oracle(name).join("expected.safetensors");
        let expected = read_tensors(&file);
        let found = forward(&oracle(name), &file, &scratch.path().join("out.safetensors"), &["--grads"]);
        let Bounds { logits, gradients } = bounds(name);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, (shape, values)) in &expected {
            assert_eq!(&found[tensor].0, shape, "{name}: {tensor}");
            let bound = if tensor.starts_with("grad.") { gradients } else { logits };
            let far = distance(&found[tensor].1, values);
            assert!(far <= bound, "{name}: {tensor} is off by {far:e}, more than {bound:e}");
        }
    }
}

#[test]
fn greedy_continuations() {
    for name in ORACLES {
        let file = oracle(name).join("expected.safetensors");
        for (prompt, greedy) in read_ids(&file, "input_ids").iter().zip(read_ids(&file, "greedy")) {
            let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
            let (model, ids) = (oracle(name), ids.join(","));
            let args = ["generate", "--model", arg(&model), "--ids", &ids, "--temperature", "0"];
            let more = ["--max-new-tokens", "24", "--json", "--ignore-eos"];
            let found = object(&succeeds(&[&args[..], &more[..]].concat()));
            assert_eq!(found["ids"], serde_json::json!(greedy), "{name}");
            assert_eq!(found["prompt_ids"], serde_json::json!(prompt), "{name}");
        }
    }
}

#[test]
fn bf16_matrices_stay_near() {
    let scratch = folder();
    for name in ORACLES {
        let file = oracle(name).join("expected.safetensors");
        let expected = read_tensors(&file);
        let found = forward(&oracle(name), &file, &scratch.path().join("out.safetensors"), &["--dtype", "bf16"]);
        let far = distance(&found["logits"].1, &expected["logits"].1);
        assert!(far <= BF16_LOGITS, "{name}: logits are off by {far:e}");
        assert!(far > bounds(name).logits, "{name}: off by {far:e} only, as if nothing were rounded");
    }
}

#[test]
fn threads_and_instruction_sets_agree() {
    let scratch = folder();
    for name in ORACLES {
        let file = oracle(name).join("expected.safetensors");
        let out = scratch.path().join("out.safetensors");
        let one = forward(&oracle(name), &file, &out, &["--grads", "--threads", "1"]);
        let three = forward(&oracle(name), &file, &out, &["--grads", "--threads", "3"]);
        assert_eq!(one, three, "{name}: the number of threads changes the result");
        let model = oracle(name);
        let args = ["forward", "--model", arg(&model), "--ids", arg(&file), "--out", arg(&out), "--grads"];
        let mut portable = command(&args);
        portable.env("HOGNOSE_ISA", "portable");
        assert_eq!(finish(portable).code, 0, "{name}");
        for (tensor, (_, values)) in read_tensors(&out) {
            let bound = if tensor.starts_with("grad.") { EXACT.gradients } else { EXACT.logits };
            let far = distance(&values, &one[&tensor].1);
            assert!(far <= bound, "{name}: {tensor} in portable code is off by {far:e}");
        }
    }
}

#[test]
fn converting_loses_nothing() {
    let scratch = folder();
    for (i, name) in ORACLES.into_iter().enumerate() {
        let [there, back, out] = ["there", "back", "out"].map(|n| scratch.path().join(format!("{n}{i}")));
        let file = oracle(name).join("expected.safetensors");
        let model = oracle(name);
        if name == "hf/falcon_mamba" {
            fails(1, &["convert", arg(&model), arg(&there)], &["original format cannot express", "Falcon-Mamba"]);
            assert!(!there.exists());
            continue;
        }
        assert_eq!(succeeds(&["convert", arg(&model), arg(&there)]), "");
        let expected = forward(&model, &file, &out, &[]);
        assert_eq!(forward(&there, &file, &out, &[]), expected, "{name}");
        succeeds(&["convert", arg(&there), arg(&back)]);
        let open = |path: &Path| hognose_model::checkpoint::Checkpoint::open(path).unwrap();
        let (first, other, last) = (open(&model), open(&there), open(&back));
        assert_eq!((first.format, &first.config), (last.format, &last.config), "{name}");
        assert_ne!(first.format, other.format, "{name}");
        assert_eq!(first.tensors(), last.tensors(), "{name}");
        for tensor in first.tensors() {
            let [a, b] = [&first, &last].map(|c| c.bytes(&tensor.name).unwrap());
            assert_eq!(a, b, "{name}: {}", tensor.name);
        }
        fails(1, &["convert", arg(&model), arg(&there)], &["already exists"]);
    }
}

/// Bounds on logits with matrices in blocks and activations of 8 bits in products, everything else in f32. Rows of these models have 64 to 160 numbers, so q4_k
/// takes 8 bits, too.
const Q8_LOGITS: f32 = 5e-2;

#[test]
fn matrices_in_blocks_stay_near() {
    let scratch = folder();
    for name in ORACLES {
        let file = oracle(name).join("expected.safetensors");
        let expected = read_tensors(&file);
        let out = scratch.path().join("out.safetensors");
        let eight = forward(&oracle(name), &file, &out, &["--dtype", "q8_0"]);
        let far = distance(&eight["logits"].1, &expected["logits"].1);
        assert!(far <= Q8_LOGITS, "{name}: logits are off by {far:e}");
        assert!(far > bounds(name).logits, "{name}: off by {far:e} only, as if nothing were rounded");
        let four = forward(&oracle(name), &file, &out, &["--dtype", "q4_k", "--threads", "1"]);
        assert_eq!(four["logits"], eight["logits"], "{name}");
        let more = ["--grads", "--dtype", "q8_0"];
        let model = oracle(name);
        let args = ["forward", "--model", arg(&model), "--ids", arg(&file), "--out", arg(&out)];
        fails(2, &[&args[..], &more[..]].concat(), &["q8_0", "f32"]);
    }
}
