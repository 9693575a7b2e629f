//! Memory that a run needs on each device, known before anything is taken, and what to change where it is too much.

use hognose_core::error::human_bytes;
use hognose_core::{DType, Device, Graph, Plan};
use hognose_model::config::ModelConfig;
use hognose_model::state::LayerState;
use hognose_model::weights::{Form, Weights};

use crate::config::{Dtype, Recomputation, TrainConfig};
use crate::error::Error;
use crate::evaluate::SEGMENT_GRID;
use crate::step::{GradientPlan, StepShape};

/// Bytes that a GPU needs beside what plans know of: kernels, captured runs, the workspaces of cuBLASLt and NCCL.
const GPU_RESERVE: u64 = 512 << 20;

/// How a run holds its parameters.
pub(crate) fn form(device: &Device, config: &TrainConfig) -> Form {
    let dtype = match config.dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
    };
    Form::training(device, dtype)
}

/// The shape of a micro-batch of `windows` windows in which each is a segment.
pub(crate) fn shape(form: Form, config: &TrainConfig, windows: usize) -> StepShape {
    StepShape {
        form,
        tokens: config.length * windows,
        segments: windows.next_multiple_of(SEGMENT_GRID),
        carry_state: config.carry_state,
        gradients: true,
        accumulate: config.accumulation > 1,
        dropout: config.dropout as f32,
        recompute: config.recompute.into(),
    }
}

/// Bytes that one device needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// Parameters, gradients and moments.
    pub persistent: u64,
    /// What the device needs for itself.
    pub reserve: u64,
    /// All intermediate tensors of a micro-batch.
    pub arena: u64,
    /// What they would take without sharing.
    pub unshared: u64,
    /// States that lanes carry.
    pub states: u64,
}

impl Need {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.persistent + self.reserve + self.arena + self.states
    }

    fn of(
        device: &Device,
        form: Form,
        plan: &dyn Fn(Graph) -> Result<Plan, hognose_core::Error>,
        model: &ModelConfig,
        config: &TrainConfig,
        devices: usize,
    ) -> Result<Need, Error> {
        // The largest share of any rank.
        let windows = config.batch.div_ceil(devices);
        let weights = |form: &Form| Weights::required_bytes(device, model, form) as u64;
        let reserve = if matches!(device, Device::Cuda(_)) { GPU_RESERVE } else { 0 };
        let persistent = weights(&form) + 3 * weights(&Form::Training(DType::F32));
        let shape = shape(form, config, windows);
        let plan = plan(GradientPlan::graph(model, &shape)?)?;
        let state: usize = model.layers.iter().map(|l| 4 * LayerState::of(l).values()).sum();
        let states = if config.carry_state { config.batch + 2 * shape.segments } else { 0 };
        Ok(Need {
            persistent,
            reserve,
            arena: plan.arena_bytes() as u64,
            unshared: plan.unshared_bytes() as u64,
            states: (state * states) as u64,
        })
    }
}

/// What the run needs on this device, one of `devices`; refused if it is more than `available`.
///
/// # Errors
/// [`Error::Memory`] with the numbers, and with what would be needed otherwise; sizes that the model's ops refuse.
pub(crate) fn check(
    device: &Device,
    model: &ModelConfig,
    config: &TrainConfig,
    devices: usize,
    available: u64,
) -> Result<Need, Error> {
    check_with(device, &|graph| device.plan(graph), model, config, devices, available)
}

fn check_with(
    device: &Device,
    plan: &dyn Fn(Graph) -> Result<Plan, hognose_core::Error>,
    model: &ModelConfig,
    config: &TrainConfig,
    devices: usize,
    available: u64,
) -> Result<Need, Error> {
    // A model that is far too large is refused before a plan is made of it.
    let parameters = 4 * Weights::required_bytes(device, model, &Form::Training(DType::F32)) as u64;
    let too_much = |needed: u64, advice: String| Error::Memory {
        needed: human_bytes(needed),
        device: device.describe(),
        available: human_bytes(available),
        advice,
    };
    if parameters > available {
        let advice = "that is parameters, gradients and the optimizer's moments alone: choose a smaller model, or a \
                      device with more memory";
        return Err(too_much(parameters, advice.into()));
    }
    let need = Need::of(device, form(device, config), plan, model, config, devices)?;
    if need.total() <= available {
        return Ok(need);
    }
    let mut advice = format!(
        "{} of it are parameters, gradients and moments, {} intermediate results",
        human_bytes(need.persistent),
        human_bytes(need.arena + need.states)
    );
    if need.reserve > 0 {
        advice.push_str(&format!(", {} are for kernels and libraries", human_bytes(need.reserve)));
    }
    let mut found = Vec::new();
    for (what, other) in dials(config, devices, matches!(device, Device::Cuda(_))) {
        let total = Need::of(device, form(device, &other), plan, model, &other, devices)?.total();
        let fits = if total <= available { ", which fits" } else { "" };
        found.push((total, format!("{} with {what}{fits}", human_bytes(total))));
    }
    found.sort_by_key(|f| f.0);
    if !found.is_empty() {
        let found: Vec<String> = found.into_iter().map(|f| f.1).collect();
        advice.push_str(&format!("; it would be {}", found.join("; ")));
    }
    Err(too_much(need.total(), advice))
}

/// Changes that lower the need, each alone, and all that do not change what is computed together.
fn dials(config: &TrainConfig, devices: usize, gpu: bool) -> Vec<(String, TrainConfig)> {
    let mut found = Vec::new();
    let mut all = (Vec::new(), config.clone());
    if config.recompute == Recomputation::Nothing {
        let cheap = TrainConfig { recompute: Recomputation::Cheap, ..config.clone() };
        found.push(("--recompute cheap".to_string(), cheap));
    }
    if config.recompute != Recomputation::Layers {
        found.push(("--recompute".to_string(), TrainConfig { recompute: Recomputation::Layers, ..config.clone() }));
        all.0.push("--recompute".to_string());
        all.1.recompute = Recomputation::Layers;
    }
    if gpu && config.dtype == Dtype::F32 {
        found.push(("--dtype bf16".to_string(), TrainConfig { dtype: Dtype::Bf16, ..config.clone() }));
        all.0.push("--dtype bf16".to_string());
        all.1.dtype = Dtype::Bf16;
    }
    // As many tokens in a step, in more micro-batches.
    let with_batch = |batch: usize, from: &TrainConfig| {
        let accumulation = config.accumulation * config.batch / batch;
        let what = format!("--batch {batch} --accumulate {accumulation}");
        (what, TrainConfig { batch, accumulation, ..from.clone() })
    };
    if config.batch.is_multiple_of(2) && config.batch >= 2 * devices {
        found.push(with_batch(config.batch / 2, config));
    }
    if config.length > 1 {
        let length = config.length / 2;
        found.push((format!("--length {length}"), TrainConfig { length, ..config.clone() }));
    }
    let least = (devices..=config.batch).find(|batch| config.batch.is_multiple_of(*batch));
    if let Some(batch) = least.filter(|batch| *batch < config.batch) {
        let (what, smallest) = with_batch(batch, &all.1);
        all.0.push(what);
        all.1 = smallest;
    }
    if all.0.len() > 1 {
        found.push((all.0.join(" "), all.1));
    }
    found
}

#[cfg(test)]
mod tests {
    use hognose_core::cuda::Properties;
    use hognose_model::presets;

    use super::*;

    fn refused(config: &TrainConfig, devices: usize, available: u64) -> String {
        let device = Device::cpu(Some(1)).unwrap();
        let model = presets::preset(&config.preset).unwrap();
        check(&device, &model, config, devices, available).unwrap_err().to_string()
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_dials_that_help() {
        let config = TrainConfig { length: 512, batch: 8, ..TrainConfig::default() };
        let device = Device::cpu(Some(1)).unwrap();
        let model = presets::preset(&config.preset).unwrap();
        let need = check(&device, &model, &config, 1, u64::MAX).unwrap();
        check(&device, &model, &config, 1, need.total()).unwrap();
        let message = refused(&config, 1, need.total() - 1);
        for part in [
            human_bytes(need.total()).as_str(),
            "on cpu",
            "with --recompute, which fits",
            "with --batch 4 --accumulate 2, which fits",
            "with --length 256, which fits",
            "with --recompute --batch 1 --accumulate 8, which fits",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(!message.contains("bf16"), "{message}");
        // Two devices need less each, and cannot share one window.
        assert!(check(&device, &model, &config, 2, need.total()).unwrap().total() < need.total());
        assert!(refused(&config, 2, need.persistent + 1).contains("--batch 2 --accumulate 4"));
        assert!(refused(&config, 1, 1000).contains("smaller model"));
    }

    #[test]
    fn dials_are_those_that_are_left() {
        let most = TrainConfig {
            recompute: Recomputation::Layers,
            dtype: Dtype::Bf16,
            batch: 1,
            length: 1,
            ..TrainConfig::default()
        };
        assert!(dials(&most, 1, true).is_empty());
        let names = |config: &TrainConfig, devices, gpu| {
            dials(config, devices, gpu).into_iter().map(|d| d.0).collect::<Vec<_>>()
        };
        let config = TrainConfig { batch: 6, accumulation: 2, length: 100, ..TrainConfig::default() };
        let expected = [
            "--recompute cheap",
            "--recompute",
            "--dtype bf16",
            "--batch 3 --accumulate 4",
            "--length 50",
            "--recompute --dtype bf16 --batch 2 --accumulate 6",
        ];
        assert_eq!(names(&config, 2, true), expected);
    }

    #[test]
    fn the_need_of_a_gpu_is_known_without_one() {
        let gpu = Properties::of_arch((9, 0));
        let plan = |graph| Plan::for_gpu(graph, &gpu);
        let device = Device::cpu(Some(1)).unwrap();
        let model = presets::preset("mamba-130m").unwrap();
        // As a GPU holds them.
        let form = |config: &TrainConfig| match config.dtype {
            Dtype::F32 => Form::Training(DType::F32),
            Dtype::Bf16 => Form::Training(DType::BF16),
        };
        let need = |config: &TrainConfig| Need::of(&device, form(config), &plan, &model, config, 1).unwrap();
        let f32 = TrainConfig { length: 2048, batch: 2, ..TrainConfig::default() };
        let bf16 = TrainConfig { dtype: Dtype::Bf16, ..f32.clone() };
        assert!(need(&bf16).arena < need(&f32).arena);
        assert!(need(&bf16).persistent > need(&f32).persistent, "a rounded copy of the parameters");
        assert!(need(&TrainConfig { recompute: Recomputation::Layers, ..bf16.clone() }).arena < need(&bf16).arena);
    }
}
