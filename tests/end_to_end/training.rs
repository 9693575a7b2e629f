//! Runs of a very small model, from text to folder.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use hognose::{Device, TrainConfig};
use hognose_core::cuda::Cuda;
use hognose_train::config::{Dtype, Recomputation};
use hognose_train::report::{Observer, Silent, StepReport};
use hognose_train::trainer;

use crate::common::*;

/// Steps of the runs that are compared with each other.
const STEPS: u64 = 8;

/// A very small run over small texts.
struct Tiny {
    scratch: tempfile::TempDir,
    config: TrainConfig,
}

impl Tiny {
    fn new(change: impl FnOnce(&mut TrainConfig)) -> Tiny {
        let scratch = folder();
        let texts = scratch.path().join("texts");
        write_texts(&texts, 8, 60);
        let mut config = TrainConfig {
            steps: STEPS,
            length: 32,
            batch: 2,
            threads: Some(2),
            eval_every: 0,
            checkpoint_every: 0,
            sample_every: 0,
            ..TrainConfig::default()
        };
        config.data.paths = vec![texts];
        config.data.validation_fraction = 0.2;
        for (key, value) in [("d_model", 16), ("n_layer", 2)] {
            config.model.insert(key.into(), value.into());
        }
        change(&mut config);
        Tiny { scratch, config }
    }

    fn path(&self, name: &str) -> String {
        arg(&self.scratch.path().join(name)).to_string()
    }

    /// Writes the configuration and returns the arguments of a run into the folder `name`.
    fn args(&self, name: &str) -> Vec<String> {
        let file = self.path("config.toml");
        fs::write(&file, self.config.to_toml().unwrap()).unwrap();
        ["train", "--config", &file, "--out", &self.path(name)].map(String::from).into()
    }

    /// Trains through the command line.
    fn run(&self, name: &str) -> String {
        let args = self.args(name);
        succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
        self.path(name)
    }

    /// Trains through the command line, which must refuse; then there is no folder.
    fn refuses(&self, code: i32, more: &[&str], words: &[&str]) {
        let args = self.args("refused");
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        fails(code, &args, words);
        assert!(!Path::new(&self.path("refused")).exists(), "{more:?}");
    }

    /// Trains through the library on that many CPUs, and stops after a step as if Ctrl-C had been pressed.
    fn run_until_on(&self, name: &str, step: u64, devices: usize) -> String {
        struct Stop(u64, u64);
        impl Observer for Stop {
            fn step(&mut self, step: &StepReport) {
                self.1 = step.step;
            }
            fn interrupted(&mut self) -> bool {
                self.1 >= self.0
            }
        }
        let path = self.path(name);
        let cpus = (0..devices).map(|_| Device::cpu(self.config.threads).unwrap()).collect();
        let outcome =
            trainer::train(self.config.clone(), cpus, Path::new(&path), false, &mut Stop(step, 0)).unwrap().unwrap();
        assert_eq!(outcome.interrupted, step <= self.config.steps);
        assert_eq!((outcome.step, outcome.steps), (step.min(self.config.steps), self.config.steps));
        path
    }

    fn run_until(&self, name: &str, step: u64) -> String {
        self.run_until_on(name, step, 1)
    }

    /// Trains through the library on that many CPUs.
    fn run_on(&self, name: &str, devices: usize) -> String {
        self.run_until_on(name, u64::MAX, devices)
    }
}

/// One line of metrics.jsonl without what depends on the clock.
type Metric = (u64, Option<f64>, Option<f64>, Option<f64>);

fn metrics(run: &str) -> Vec<Metric> {
    let text = fs::read_to_string(format!("{run}/metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let v: serde_json::Value = serde_json::from_str(line).unwrap();
        let number = |key: &str| v.get(key).map(|n| n.as_f64().unwrap());
        (v["step"].as_u64().unwrap(), number("loss"), number("gradient_norm"), number("validation_bits_per_byte"))
    };
    text.lines().map(line).collect()
}

fn losses(run: &str) -> Vec<f64> {
    metrics(run).iter().filter_map(|m| m.1).collect()
}

fn weights(run: &str) -> Vec<u8> {
    fs::read(format!("{run}/model.safetensors")).unwrap()
}

fn latest(run: &str) -> String {
    fs::read_to_string(format!("{run}/checkpoints/latest")).unwrap().trim().to_string()
}

/// Everything that has a state of its own, switched on.
fn with_everything(config: &mut TrainConfig) {
    config.dropout = 0.1;
    config.accumulation = 2;
    config.carry_state = true;
    config.eval_every = 3;
}

#[test]
fn a_resumed_run_goes_on_bit_for_bit() {
    for change in [with_everything as fn(&mut TrainConfig), |_| {}] {
        let tiny = Tiny::new(change);
        let whole = tiny.run("whole");
        assert_eq!(losses(&whole).len() as u64, STEPS);
        for step in [1, 5] {
            let cut = tiny.run_until(&format!("cut{step}"), step);
            assert_eq!(latest(&cut), format!("step-{step:08}"));
            assert_eq!(losses(&cut).len() as u64, step);
            assert_eq!(succeeds(&["train", "--resume", &cut]), "");
            assert_eq!(metrics(&cut), metrics(&whole), "stopped after {step}");
            assert_eq!(weights(&cut), weights(&whole), "stopped after {step}");
        }
    }
}

/// How far losses and norms of gradients on several devices may be from those on one, relatively: sums in another order,
/// over the steps of these runs.
const DEVICES_BOUND: f64 = 1e-4;

fn assert_close(found: &[Metric], expected: &[Metric], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (a, b) in found.iter().zip(expected) {
        assert_eq!(a.0, b.0, "{what}");
        for (a, b) in [(a.1, b.1), (a.2, b.2), (a.3, b.3)] {
            let close = match (a, b) {
                (Some(a), Some(b)) => (a - b).abs() <= DEVICES_BOUND * b.abs(),
                (a, b) => a == b,
            };
            assert!(close, "{what}: {a:?} is not {b:?}");
        }
    }
}

#[test]
fn devices_that_share_a_batch_train_the_same_model() {
    for change in [with_everything as fn(&mut TrainConfig), |_| {}] {
        let tiny = Tiny::new(|config| {
            change(config);
            config.batch = 5;
            config.checkpoint_every = 3;
        });
        let one = tiny.run("one");
        let expected = metrics(&one);
        for devices in [2, 3] {
            let run = tiny.run_on(&format!("on{devices}"), devices);
            assert_close(&metrics(&run), &expected, &format!("{devices} devices"));
            let again = tiny.run_on(&format!("again{devices}"), devices);
            assert_eq!(weights(&again), weights(&run), "two runs on {devices} devices differ");
            // Another number of devices goes on where these stopped.
            let cut = tiny.run_until_on(&format!("cut{devices}"), 5, devices);
            assert_eq!(latest(&cut), "step-00000005");
            succeeds(&["train", "--resume", &cut]);
            assert_close(&metrics(&cut), &expected, &format!("{devices} devices, then one"));
        }
    }
}

#[test]
fn what_stops_one_device_stops_all() {
    let tiny = Tiny::new(|c| {
        c.optimizer.lr = 1e30;
        c.schedule.warmup = Some(0);
        c.checkpoint_every = 1;
    });
    let train = |name: &str, devices: usize| {
        let cpus = (0..devices).map(|_| Device::cpu(Some(1)).unwrap()).collect();
        let path = tiny.path(name);
        trainer::train(tiny.config.clone(), cpus, Path::new(&path), false, &mut Silent).unwrap_err().to_string()
    };
    let message = train("astray", 2);
    for part in ["step 2: the loss is not finite", "backbone.", "step-00000001"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(train("too-many", 3).contains("a batch of 2 cannot be shared by 3 devices"));
}

#[test]
fn threads_and_recomputation_change_nothing() {
    let base = Tiny::new(with_everything);
    let (expected, expected_weights) = (base.run("a"), weights(&base.path("a")));
    let changes: [fn(&mut TrainConfig); 4] = [
        |c| c.threads = Some(1),
        |c| c.threads = Some(3),
        |c| c.recompute = Recomputation::Cheap,
        |c| c.recompute = Recomputation::Layers,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let other = Tiny::new(|config| {
            with_everything(config);
            change(config);
        });
        let run = other.run("b");
        assert_eq!(metrics(&run), metrics(&expected), "change {i}");
        assert_eq!(weights(&run), expected_weights, "change {i}");
    }
}

/// How far losses of the short runs in bf16 may be from those in f32, relatively: operands of products have 8 bits.
const BF16_BOUND: f64 = 0.01;

#[test]
fn products_in_bf16_train_nearly_the_same_and_repeat() {
    let full = Tiny::new(with_everything);
    let rounded = |threads| {
        Tiny::new(|config| {
            with_everything(config);
            config.dtype = Dtype::Bf16;
            config.threads = Some(threads);
        })
    };
    let two = rounded(2);
    let run = two.run("two");
    let (found, expected) = (losses(&run), losses(&full.run("f32")));
    assert_ne!(found, expected, "nothing was rounded");
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() <= BF16_BOUND * b, "{found:?} is not near {expected:?}");
    }
    let alone = rounded(1);
    let one = alone.run("one");
    assert_eq!(metrics(&one), metrics(&run), "threads change bits");
    assert!(weights(&one) == weights(&run), "threads change bits");
    let cut = two.run_until("cut", 5);
    succeeds(&["train", "--resume", &cut]);
    assert_eq!(metrics(&cut), metrics(&run), "resumed");
    assert!(weights(&cut) == weights(&run), "resumed");
}

#[test]
fn the_model_learns_and_its_folder_is_complete() {
    let tiny = Tiny::new(|c| {
        c.steps = 60;
        c.checkpoint_every = 25;
        c.eval_every = 20;
        c.sample_every = 30;
    });
    let run = tiny.run("run");
    let losses = losses(&run);
    assert_eq!(losses.len(), 60);
    let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
    assert!(mean(&losses[50..]) < 0.7 * mean(&losses[..5]), "{losses:?}");
    let held_out: Vec<f64> = metrics(&run).iter().filter_map(|m| m.3).collect();
    assert!(held_out.last().unwrap() < &(0.8 * held_out[0]), "{held_out:?}");

    let files = ["config.toml", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    let records = ["metrics.jsonl", "loss.png", "baselines.json", "checkpoints/latest", "checkpoints/best"];
    for file in files.into_iter().chain(records) {
        assert!(fs::metadata(format!("{run}/{file}")).is_ok_and(|m| m.len() > 0), "{file}");
    }
    assert!(fs::read(format!("{run}/loss.png")).unwrap().starts_with(b"\x89PNG"));
    let events = fs::read_dir(&run)
        .unwrap()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("events.out.tfevents"));
    assert_eq!(events.count(), 1);
    assert_eq!(latest(&run), "step-00000060");
    let leftovers = fs::read_dir(format!("{run}/checkpoints")).unwrap().count();
    assert!(leftovers <= 4, "latest, best and what they point to; found {leftovers}");
    // The resolved configuration says what was trained, and trains the same again.
    let config = TrainConfig::load(Path::new(&format!("{run}/config.toml"))).unwrap();
    assert_eq!(config, tiny.config.clone().resolve().unwrap());

    let text =
        object(&succeeds(&["generate", "--model", &run, "--prompt", "the ", "--json", "--max-new-tokens", "20"]));
    assert_eq!(text["ids"].as_array().unwrap().len(), 20);
    // A finished run is left alone by steps that it has done already.
    fails(1, &["train", "--resume", &run, "--steps", "59"], &["has done 60 steps already"]);
    assert_eq!(TrainConfig::load(Path::new(&format!("{run}/config.toml"))).unwrap(), config);
    succeeds(&["train", "--resume", &run, "--steps", "62"]);
    assert_eq!(latest(&run), "step-00000062");
}

#[test]
fn rows_that_fill_up_the_vocabulary_are_never_generated() {
    // 257 ids in 264 rows, all about equally likely after one step.
    let run = Tiny::new(|c| c.steps = 1);
    let path = run.run("run");
    let args = ["generate", "--model", &path, "--prompt", "a", "--json", "--ignore-eos", "--max-new-tokens", "1500"];
    let found = object(&succeeds(&args));
    let ids: Vec<u64> = found["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
    assert_eq!(ids.len(), 1500);
    assert!(ids.iter().all(|id| *id < 257), "{ids:?}");
}

#[test]
fn fine_tuning_starts_from_the_other_runs_weights() {
    let first = Tiny::new(|c| c.steps = 40);
    let from = first.run("first");
    let tuned = Tiny::new(|c| {
        c.init = Some(from.clone().into());
        c.model.clear();
        c.steps = 2;
    });
    let run = tuned.run("tuned");
    assert!(losses(&run)[0] < 0.8 * losses(&from)[0], "{} after {}", losses(&run)[0], losses(&from)[0]);
    assert_ne!(weights(&run), weights(&from));
    let out = tuned.path("by-argument");
    let texts = first.path("texts");
    succeeds(&["train", "--model", &from, "--data", &texts, "--steps", "1", "--length", "32", "--out", &out]);
    assert_eq!(losses(&out).len(), 1);
}

#[test]
fn an_existing_folder_is_never_trained_over() {
    let tiny = Tiny::new(|c| c.steps = 2);
    let run = tiny.run("run");
    let before = (weights(&run), metrics(&run));
    let args = tiny.args("run");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    fails(1, &args, &["exists and is not empty", "--resume"]);
    assert_eq!((weights(&run), metrics(&run)), before);
    let texts = tiny.path("texts");
    let file = format!("{texts}/00.txt");
    let with = |out| ["train", "--config", args[2], "--out", out].map(str::to_string);
    for out in [&texts, &file] {
        let listing = || fs::read_dir(&texts).unwrap().count();
        let files = listing();
        let args = with(out);
        fails(1, &args.each_ref().map(String::as_str), &["exists"]);
        assert_eq!(listing(), files, "nothing is left behind in {out}");
    }
}

#[test]
fn bad_settings_are_named() {
    let tiny = Tiny::new(|_| {});
    tiny.refuses(2, &["--steps", "0"], &["steps is 0", "from 1 up"]);
    tiny.refuses(2, &["--batch", "0"], &["batch is 0"]);
    tiny.refuses(2, &["--length", "0"], &["length is 0"]);
    tiny.refuses(2, &["--accumulate", "0"], &["accumulation is 0"]);
    tiny.refuses(2, &["--accumulate", "99999999999999999"], &["accumulation is 99999999999999999", "65536"]);
    tiny.refuses(2, &["--lr", "-1"], &["optimizer.lr is -1"]);
    tiny.refuses(2, &["--lr", "nan"], &["optimizer.lr is NaN"]);
    tiny.refuses(2, &["--minutes", "0"], &["minutes is 0"]);
    tiny.refuses(2, &["--threads", "0"], &["--threads"]);
    tiny.refuses(2, &["--device", "cpu", "--devices", "0,1"], &["devices is [0, 1]", "numbers of GPUs"]);
    tiny.refuses(2, &["--devices", "1,0,1"], &["devices is [1, 0, 1]", "each GPU once"]);
    tiny.refuses(2, &["--devices", "0,1,2"], &["batch is 2", "each of the devices"]);
    tiny.refuses(2, &["--devices", "0,x"], &["--devices", "'x'"]);
    tiny.refuses(2, &["--preset", "nope"], &["no preset \"nope\"", "mamba-130m"]);
    if Cuda::count() == 0 {
        tiny.refuses(1, &["--device", "cuda"], &["libcuda", "NVIDIA driver"]);
        tiny.refuses(1, &["--devices", "0,1"], &["libcuda", "NVIDIA driver"]);
    }
    tiny.refuses(1, &["--length", "99999999"], &["fewer than", "smaller length"]);
    tiny.refuses(1, &["--batch", "9999999999999999"], &["more than one step can hold"]);
}

#[test]
fn bad_configuration_files_are_named() {
    let scratch = folder();
    let [file, texts] = ["config.toml", "texts"].map(|n| scratch.path().join(n));
    write_texts(&texts, 3, 60);
    for (text, code, words) in [
        ("steps = \"x\"", 1, &["line 1", "steps"][..]),
        ("nonsense = 1", 1, &["nonsense", "checkpoint_every"]),
        ("}{", 1, &["line 1"]),
        ("preset = \"nope\"", 1, &["no preset \"nope\""]),
        ("dropout = 1.5", 2, &["dropout is 1.5"]),
        ("device = \"cpu\"\ndevices = [1]", 2, &["devices is [1]", "numbers of GPUs"]),
        ("[model]\nd_model = -4", 1, &["d_model is -4"]),
        ("[model]\nd_model = 99999999", 1, &["parameters", "taken for real"]),
        ("[model]\nfoo = 3", 1, &["foo", "known are d_model"]),
        // These once wrapped around, or asked for more memory than there is.
        ("[model]\nn_layer = 9223372036854775807", 1, &["n_layer is 9223372036854775807"]),
        ("[model]\nn_layer = 4000000000", 1, &["number of layers is 65537"]),
        ("[model]\nexpand = 144115188075855873", 1, &["expand is 144115188075855873"]),
    ] {
        fs::write(&file, text).unwrap();
        let args = ["train", "--config", arg(&file), "--data", arg(&texts), "--plan-only"];
        fails(code, &args, words);
    }
    fails(1, &["train", "--config", arg(&texts)], &["cannot read the configuration"]);
    fails(1, &["train", "--resume", arg(&texts)], &["not the folder of a run", "config.toml"]);
    fails(2, &["train", "--resume", arg(&texts), "--lr", "1"], &["--lr"]);
}

#[test]
fn data_without_text_is_named() {
    let tiny = Tiny::new(|_| {});
    let make = |name: &str, bytes: &[u8]| {
        let path = tiny.path(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let empty = tiny.path("empty");
    fs::create_dir(&empty).unwrap();
    let no_text = tiny.path("pictures");
    fs::create_dir(&no_text).unwrap();
    make("pictures/a.png", b"\x89PNG");
    tiny.refuses(1, &["--data", &empty], &["empty"]);
    tiny.refuses(1, &["--data", &no_text], &["pictures"]);
    tiny.refuses(1, &["--data", &make("zero.txt", b"")], &["data is empty"]);
    tiny.refuses(1, &["--data", &make("short.txt", b"abc")], &["3 tokens", "smaller length"]);
    tiny.refuses(1, &["--data", &make("field.jsonl", b"{\"txt\":\"abc\"}\n")], &["line 1", "\"text\"", "\"txt\""]);
    tiny.refuses(1, &["--data", &make("broken.jsonl", b"{\"text\":\"abc\"}\nnot json\n")], &["line 2"]);
    tiny.refuses(1, &["--data", &make("bad.txt.gz", b"abc")], &["bad.txt.gz"]);
    tiny.refuses(1, &["--data", &make("bad.txt.zst", b"abc")], &["bad.txt.zst"]);
    tiny.refuses(1, &["--data", &make("picture.png", b"abc")], &["picture.png", ".jsonl"]);
    tiny.refuses(1, &["--data", &tiny.path("nowhere")], &["nowhere"]);
    tiny.refuses(1, &["--data", &tiny.path("no*.txt")], &["matches no file"]);
    tiny.refuses(1, &["--tokenizer", &make("tokenizer.json", b"{}")], &["tokenizer.json"]);
    // Bytes are bytes, whatever they mean.
    let latin = make("latin.txt", &[0xe9; 400]);
    let args = tiny.args("bytes");
    let args: Vec<&str> = args.iter().map(String::as_str).chain(["--data", &latin, "--steps", "1"]).collect();
    succeeds(&args);
}

#[test]
fn numbers_that_go_astray_stop_the_run() {
    let tiny = Tiny::new(|c| {
        c.optimizer.lr = 1e30;
        c.schedule.warmup = Some(0);
        c.checkpoint_every = 1;
    });
    let args = tiny.args("run");
    let words = ["step 2: the loss is not finite", "backbone.", "last good checkpoint is", "step-00000001"];
    fails(1, &args.iter().map(String::as_str).collect::<Vec<_>>(), &words);
    assert_eq!(latest(&tiny.path("run")), "step-00000001");
    // Its numbers are finite, what they lead to is not; nobody is left to find that out alone.
    let model = tiny.path("run") + "/checkpoints/step-00000001";
    fails(1, &["generate", "--model", &model, "--prompt", "a"], &["not finite", "damaged"]);
    let [ids, out] = ["ids", "out"].map(|n| tiny.path(n));
    write_ids(Path::new(&ids), &[1, 3], &[1, 2, 3]);
    let forward = hognose(&["forward", "--model", &model, "--ids", &ids, "--out", &out]);
    assert!(forward.code == 0 && forward.stderr.contains("not all finite"), "{}", forward.stderr);
}

#[test]
fn a_full_disk_leaves_the_previous_checkpoint() {
    let tiny = Tiny::new(|c| c.steps = 2);
    let run = tiny.run("run");
    let before = (latest(&run), weights(&run));
    // No file may grow past 60 KiB; the optimizer's memory is larger. The signal of that is ignored, so that writing
    // fails as it does on a full disk.
    let script = format!("trap '' XFSZ; ulimit -f 60; exec \"$0\" train --resume '{run}' --steps 4");
    let limited = |script: &str| {
        let mut shell = Command::new("bash");
        shell.args(["-c", script, env!("CARGO_BIN_EXE_hognose")]).stdin(Stdio::null());
        finish(shell)
    };
    refused(1, &limited(&script), &["disk full"], &["cannot save", "optimizer.safetensors", "File too large"]);
    assert_eq!((latest(&run), weights(&run)), before);
    let entries: Vec<_> =
        fs::read_dir(format!("{run}/checkpoints")).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(entries.iter().all(|e| !e.to_string_lossy().ends_with(".tmp")), "{entries:?}");
    succeeds(&["generate", "--model", &run, "--prompt", "the", "--max-new-tokens", "2"]);
    succeeds(&["train", "--resume", &run, "--steps", "4"]);
    assert_eq!(losses(&run).len(), 4);
}

#[test]
fn a_run_folder_that_was_damaged_is_not_resumed() {
    let tiny = Tiny::new(|c| c.steps = 2);
    let run = tiny.run("run");
    let checkpoint = format!("{run}/checkpoints/{}", latest(&run));
    let config = format!("{run}/config.toml");
    let refuses = |file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, words: &[&str]| {
        let before = fs::read(file).unwrap();
        fs::write(file, change(before.clone())).unwrap();
        fails(1, &["train", "--resume", &run, "--steps", "3"], words);
        fs::write(file, before).unwrap();
    };
    let replace = |from: &'static str, to: &'static str| {
        move |text: Vec<u8>| {
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains(from), "{text}");
            text.replace(from, to).into_bytes()
        }
    };
    refuses(&config, &|_| b"garbage {".to_vec(), &["config.toml", "line 1"]);
    // Sizes that the checkpoint does not have: memory past its ends must not be read.
    refuses(&config, &replace("n_layer = 2", "n_layer = 3"), &["other sizes", "config.toml"]);
    refuses(&config, &replace("d_model = 16", "d_model = 64"), &["other sizes", "config.toml"]);
    refuses(&config, &replace("/texts\"", "/nowhere\""), &["nowhere"]);
    refuses(&format!("{checkpoint}/trainer.json"), &|_| b"{}".to_vec(), &["trainer.json is damaged"]);
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    refuses(&format!("{checkpoint}/optimizer.safetensors"), &half, &["optimizer.safetensors is damaged"]);
    refuses(&format!("{checkpoint}/model.safetensors"), &half, &["model.safetensors", "cut short or damaged"]);
    refuses(&format!("{run}/checkpoints/latest"), &|_| b"none".to_vec(), &["no checkpoint"]);
    let text = tiny.path("texts/03.txt");
    refuses(&text, &|bytes| [bytes, b"more".to_vec()].concat(), &["trained on other data"]);
    succeeds(&["train", "--resume", &run, "--steps", "3"]);
    assert_eq!(losses(&run).len(), 3);
}

/// Starts a run that would take long, and waits until it has done a few steps.
fn start_endless(tiny: &Tiny, name: &str) -> Child {
    let args = tiny.args(name);
    let mut train = command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    train.args(["--steps", "100000000"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = train.spawn().unwrap();
    let metrics = tiny.path(name) + "/metrics.jsonl";
    for _ in 0..3000 {
        if fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() >= 3) {
            return child;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("no step was done in a minute: {:?}", child.wait_with_output().unwrap());
}

fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn control_c_saves_and_says_how_to_go_on() {
    let tiny = Tiny::new(|_| {});
    let child = start_endless(&tiny, "run");
    // Meanwhile nobody else can train into the folder.
    let run = tiny.path("run");
    fails(1, &["train", "--resume", &run], &["another process"]);
    let args = tiny.args("run");
    fails(1, &args.iter().map(String::as_str).collect::<Vec<_>>(), &["exists and is not empty"]);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(exit_code(output.status), 130, "{stderr}");
    assert!(stderr.contains(&format!("hognose train --resume {run}")), "{stderr}");
    assert_eq!(latest(&run), format!("step-{:08}", losses(&run).len()));
    assert!(output.stdout.is_empty());
}

#[test]
fn training_goes_on_where_nobody_reads_its_messages() {
    let tiny = Tiny::new(|c| c.steps = 20);
    let args = tiny.args("run");
    let mut train = command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = train.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(exit_code(child.wait().unwrap()), 0);
    assert_eq!(losses(&tiny.path("run")).len(), 20);
}

#[test]
fn a_plan_writes_nothing() {
    let tiny = Tiny::new(|_| {});
    let args = tiny.args("planned");
    let found = hognose(&args.iter().map(String::as_str).chain(["--plan-only"]).collect::<Vec<_>>());
    assert_eq!((found.code, found.stdout.as_str()), (0, ""));
    for word in ["parameters", "arena", "free", "in 6 documents", "in 2 held out"] {
        assert!(found.stderr.contains(word), "{word}: {}", found.stderr);
    }
    assert!(!Path::new(&tiny.path("planned")).exists());
}
