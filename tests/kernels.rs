//! Every kernel that the models use compiles for every generation of GPUs, without a GPU: NVRTC is all that this needs.
//! Where it is missing the test says so and passes, unless `HOGNOSE_TEST_NVRTC` is set, as CI does.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use hognose::{DType, ModelConfig};
use hognose_core::cuda::compile::compile;
use hognose_core::cuda::library::Library;
use hognose_core::cuda::{Properties, Variant};
use hognose_core::graph::{Layout, Recompute};
use hognose_core::{Graph, Plan};
use hognose_model::network::has_step;
use hognose_model::session::{choice_graph, graph};
use hognose_model::weights::Form;
use hognose_model::{pattern, presets};
use hognose_train::step::{GradientPlan, StepShape, UpdatePlan};

/// Compute capabilities: A100, H100, B200, RTX 50.
const ARCHS: [(u32, u32); 4] = [(8, 0), (9, 0), (10, 0), (12, 0)];

/// Programs whose kernels may keep a few registers in memory, with the most bytes over architectures and versions of the
/// compiler: counters of outer loops, sizes and addresses that are used once a tile or once a token. In the inner loops
/// every register holds data.
const ALLOWED_SPILLS: [(&str, u32); 8] = [
    ("selective_scan_grad", 32),
    ("sample", 20),
    ("scan_step", 8),
    ("ssd", 8),
    ("ssd_recurrence", 12),
    ("gather_rows", 8),
    ("step_linear", 8),
    ("rnn", 8),
];

/// Layers that no published model has.
const HYBRID: &str = "attention(headdim=64), attention(heads=4, kv_heads=2, headdim=128), gated_conv, \
                      lstm(d_inner=100), gru, s4d(discretization=bilinear), s4, h3, \
                      s6(discretization=zoh), s6(a=lin, dt=fixed, c=fixed), s6(a=legs, b=fixed, discretization=zoh), vim";

/// Graphs of a model: training, a prompt, steps of one and of many sequences.
fn graphs(config: &ModelConfig, dtype: DType) -> Vec<Graph> {
    let training = |dropout, recompute| StepShape {
        form: Form::Training(dtype),
        tokens: 4096,
        segments: 8,
        carry_state: false,
        gradients: true,
        accumulate: true,
        dropout,
        recompute,
    };
    let form = Form::Inference(dtype, Layout::Rows);
    let mut all = vec![
        GradientPlan::graph(config, &training(0.0, Recompute::Nothing)).unwrap(),
        GradientPlan::graph(config, &training(0.1, Recompute::All)).unwrap(),
        UpdatePlan::graph(1 << 20, std::iter::once(0..1000).collect(), dtype == DType::BF16).unwrap(),
    ];
    for (slots, tokens, rows) in [(1, 2048, 1), (1, 1, 1), (4, 4, 4), (64, 64, 64)] {
        all.push(graph(config, &form, slots, tokens, rows).unwrap());
    }
    for (slots, tokens, penalty) in [(1, 1, false), (12, 12, true), (30, 24, false), (64, 64, false)] {
        if has_step(config, &form, tokens) {
            all.push(choice_graph(config, &form, slots, tokens, penalty).unwrap());
        }
    }
    let blocks = Form::Inference(DType::Q8_0, Layout::Rows);
    if dtype == DType::BF16 {
        all.push(graph(config, &blocks, 1, 2048, 1).unwrap());
        for tokens in [1, 12, 64] {
            if has_step(config, &blocks, tokens) {
                all.push(choice_graph(config, &blocks, tokens, tokens, false).unwrap());
            }
        }
    }
    // One long sequence is cut in time.
    let long = StepShape { tokens: 32_768, segments: 1, ..training(0.0, Recompute::Nothing) };
    all.push(GradientPlan::graph(config, &long).unwrap());
    all
}

/// Bytes spilled by the kernels that a log speaks of.
fn spills(log: &str) -> u32 {
    log.lines()
        .filter_map(|line| {
            line.split("bytes stack frame, ").nth(1)?.split(" bytes spill stores").next()?.trim().parse::<u32>().ok()
        })
        .max()
        .unwrap_or(0)
}

#[test]
fn every_kernel_compiles_for_every_gpu() {
    if let Err(error) = Library::Nvrtc.load() {
        assert!(std::env::var_os("HOGNOSE_TEST_NVRTC").is_none(), "{error}");
        eprintln!("not tested: {error}");
        return;
    }
    let mut needed: HashMap<(String, (u32, u32)), Variant> = HashMap::new();
    let hybrid =
        ModelConfig { layers: pattern::layers(HYBRID, 256).unwrap(), d_model: 256, ..presets::preset("tiny").unwrap() };
    let published = ["tiny", "mamba-130m", "mamba2-130m"].map(|name| presets::preset(name).unwrap());
    let configs: Vec<ModelConfig> = published.into_iter().chain([hybrid]).collect();
    for arch in ARCHS {
        let gpu = Properties::of_arch(arch);
        for config in &configs {
            for dtype in [DType::F32, DType::BF16] {
                for graph in graphs(config, dtype) {
                    let plan = Plan::for_gpu(graph, &gpu).unwrap();
                    let variants = plan.variants(&gpu).unwrap();
                    needed.extend(variants.into_iter().map(|(key, variant)| ((key, arch), variant)));
                }
            }
        }
    }
    assert!(!needed.is_empty());
    let needed: Vec<_> = needed.into_iter().collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(((key, arch), variant)) = needed.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let failure = match compile(variant, &format!("sm_{}{}", arch.0, arch.1)) {
                        Err(error) => Some(error.to_string()),
                        Ok(compiled) => {
                            let most = ALLOWED_SPILLS.iter().find(|a| a.0 == variant.program.name).map_or(0, |a| a.1);
                            let found = spills(&compiled.log);
                            (found > most).then(|| format!("{key} for {arch:?} spills {found} bytes\n{}", compiled.log))
                        }
                    };
                    failures.lock().unwrap().extend(failure);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} of {} kernels:\n{}", failures.len(), needed.len(), failures.join("\n"));
    eprintln!("{} kernels compiled", needed.len());
}
