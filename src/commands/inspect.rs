//! `hognose inspect`: say what a checkpoint or state file is.

use std::io::Write;
use std::path::Path;

use hognose::ModelConfig;
use hognose_core::DType;
use hognose_core::error::human_bytes;
use hognose_core::graph::Layout;
use hognose_model::checkpoint;
use hognose_model::config::{LayerConfig, ParamSpec};
use hognose_model::pattern;
use hognose_model::state::{self, LayerState};
use hognose_model::weights::{Form, matrix_shape};

use crate::args::InspectArgs;
use crate::terminal::thousands;

pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let path = Path::new(&args.path);
    let mut out = std::io::stdout().lock();
    if path.is_file() && !checkpoint::is_gguf(path) {
        let Some(lines) = state::describe(path) else {
            anyhow::bail!(
                "{} is a file, but neither a state file of hognose nor a GGUF file; for another checkpoint give its \
                 folder (with config.json)",
                path.display()
            );
        };
        if args.json {
            let object: serde_json::Map<_, _> = lines.into_iter().map(|(k, v)| (k, v.into())).collect();
            writeln!(out, "{}", serde_json::Value::Object(object))?;
        } else {
            writeln!(out, "state file {}", path.display())?;
            for (key, value) in lines {
                writeln!(out, "  {key:<9} {value}")?;
            }
        }
        return Ok(());
    }
    let folder = hognose_model::hub::resolve(&args.path)?;
    let found = checkpoint::describe(&folder)?;
    let memory = Memory::of(&found.config);
    if args.json {
        let mut object = serde_json::to_value(&found)?;
        object["memory"] = serde_json::json!({
            "weights_f32": memory.weights_f32, "weights_bf16": memory.weights_bf16,
            "state": memory.state, "training": memory.training,
        });
        writeln!(out, "{object}")?;
        return Ok(());
    }
    let config = &found.config;
    writeln!(out, "{}", folder.display())?;
    writeln!(out, "  architecture {} ({} format, model_type {})", found.architecture, found.format, found.model_type)?;
    let tied = if config.tie_embeddings { "tied" } else { "untied" };
    writeln!(out, "  vocabulary   {} in {} rows, {tied}", thousands(config.vocab_size as u64), config.padded_vocab)?;
    writeln!(
        out,
        "  layers       {} of width {}: {}",
        config.n_layer(),
        config.d_model,
        pattern::outline(&config.layers)
    )?;
    let mut kinds: Vec<&LayerConfig> = Vec::new();
    for layer in &config.layers {
        if !kinds.contains(&layer) {
            writeln!(out, "               {}", pattern::full(layer))?;
            kinds.push(layer);
        }
    }
    let dtypes: Vec<String> = found.dtypes.iter().map(|(d, n)| format!("{} in {d}", thousands(*n))).collect();
    writeln!(out, "  parameters   {} ({})", thousands(found.parameters), dtypes.join(", "))?;
    writeln!(
        out,
        "  tokenizer    {}",
        found.tokenizer.as_deref().unwrap_or("none: generate from --ids or --tokenizer")
    )?;
    let (f32, bf16) = (human_bytes(memory.weights_f32), human_bytes(memory.weights_bf16));
    writeln!(
        out,
        "  memory       {f32} of weights as f32, {bf16} as bf16; {} of state a sequence",
        human_bytes(memory.state)
    )?;
    writeln!(out, "               {} to train, beside activations", human_bytes(memory.training))?;
    writeln!(out, "\n  {} tensors", found.tensors.len())?;
    for tensor in &found.tensors {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        writeln!(out, "  {:<52} {:<5} [{}]", tensor.native_name, tensor.dtype.to_string(), shape.join(", "))?;
    }
    Ok(())
}

/// Bytes that uses of a model need.
struct Memory {
    weights_f32: u64,
    weights_bf16: u64,
    state: u64,
    training: u64,
}

impl Memory {
    fn of(config: &ModelConfig) -> Memory {
        let bytes = |form: Form| -> u64 {
            let bytes = |p: &ParamSpec| {
                let (rows, cols) = matrix_shape(&p.shape);
                (rows * form.of(p, config).0.row_bytes(cols)) as u64
            };
            config.parameters().iter().map(bytes).sum()
        };
        let state = config.layers.iter().map(|l| 4 * LayerState::of(l).values() as u64).sum();
        Memory {
            weights_f32: bytes(Form::Inference(DType::F32, Layout::Rows)),
            weights_bf16: bytes(Form::Inference(DType::BF16, Layout::Rows)),
            state,
            // Parameters, gradients and two moments.
            training: 4 * bytes(Form::Training(DType::F32)),
        }
    }
}
