//! What the command line accepts.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hognose::{DType, Device};
use hognose_train::config::Recomputation;

/// State space models: train, run and study them.
#[derive(Debug, Parser)]
#[command(name = "hognose", version, about, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model; without arguments a small one, on the text that ships with hognose.
    Train(TrainArgs),
    /// Continue a prompt.
    Generate(GenerateArgs),
    /// Logits, loss and gradients of given token ids, from file to file.
    Forward(ForwardArgs),
    /// Say what a checkpoint or state file is.
    Inspect(InspectArgs),
    /// How well a model does.
    Eval(EvalArgs),
    /// Convert a checkpoint between formats, without loss.
    Convert(ConvertArgs),
    /// A step of the theory computed, checked and drawn; without a name, what there is.
    Explain(ExplainArgs),
    /// Write a checkpoint as a GGUF file with matrices of fewer bits.
    Quantize(QuantizeArgs),
    /// Measure speed and the share of the machine's ceiling that it is.
    Bench(BenchArgs),
}

/// A wrong use of the command line, found after parsing: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Where and in what precision to compute.
#[derive(Clone, Debug, Args)]
pub struct Compute {
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,
    /// Type of the matrices in products; on a GPU also of stored activations. States, norms and parameters that are
    /// trained stay f32. q8_0 and q4_k are for using a model on a CPU.
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    /// Threads on the CPU [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    Cpu,
    Cuda,
    Auto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecomputeArg {
    Layers,
    Cheap,
}

impl RecomputeArg {
    pub fn recomputation(self) -> Recomputation {
        match self {
            RecomputeArg::Layers => Recomputation::Layers,
            RecomputeArg::Cheap => Recomputation::Cheap,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    F32,
    Bf16,
    /// Blocks of 32 numbers with a scale, 8 bits each.
    #[value(name = "q8_0")]
    Q8,
    /// Blocks of 256 numbers with scales and minima, 4 bits each; the output matrix takes 6 bits.
    #[value(name = "q4_k")]
    Q4K,
}

impl DTypeArg {
    pub fn dtype(self) -> DType {
        match self {
            DTypeArg::F32 => DType::F32,
            DTypeArg::Bf16 => DType::BF16,
            DTypeArg::Q8 => DType::Q8_0,
            DTypeArg::Q4K => DType::Q4_K,
        }
    }

    /// Refuses types that only weights for inference have.
    pub fn check_trains(self) -> Result<(), Usage> {
        match self.dtype() {
            DType::F32 | DType::BF16 => Ok(()),
            dtype => Err(Usage(format!("{dtype} is a type of weights that are only read; use f32 or bf16 here"))),
        }
    }
}

impl Compute {
    /// The device asked for.
    pub fn device(&self) -> anyhow::Result<Device> {
        open_device(self.device, self.threads.map(|n| n as usize))
    }
}

/// Opens a device; says so where there is no GPU and the CPU computes instead.
pub fn open_device(device: DeviceArg, threads: Option<usize>) -> anyhow::Result<Device> {
    match device {
        DeviceArg::Cpu => Ok(Device::cpu(threads)?),
        DeviceArg::Cuda => Ok(Device::cuda(0)?),
        DeviceArg::Auto => {
            let (device, why_not) = Device::auto(threads)?;
            if let Some(why) = why_not {
                say_cpu(&why);
            }
            Ok(device)
        }
    }
}

/// Says that the CPU computes where a GPU might have.
pub fn say_cpu(why: &str) {
    eprintln!("computing on the CPU, since there is no GPU to use ({why})");
}

#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct TrainArgs {
    /// Settings in TOML; arguments on the command line come before it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Model to train from scratch: tiny, mamba-130m, mamba2-130m, …
    #[arg(long)]
    pub preset: Option<String>,
    /// Checkpoint to train on from (fine-tuning): a folder or a hub id.
    #[arg(long, value_name = "PATH", conflicts_with = "preset")]
    pub model: Option<String>,
    /// Text: files, folders and globs of .txt and .jsonl, plain, .gz, .zst or .xz [default: the text that ships].
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<String>,
    /// Field of the text in .jsonl files.
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,
    /// A tokenizer.json; without it and without one in --model, tokens are bytes.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Folder for the run [default: runs/NAME, then runs/NAME-2 and so on].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Optimizer steps.
    #[arg(long)]
    pub steps: Option<u64>,
    /// Tokens of a window.
    #[arg(long)]
    pub length: Option<usize>,
    /// Windows of a micro-batch, over all devices.
    #[arg(long)]
    pub batch: Option<usize>,
    /// Micro-batches of a step.
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// Compute layers, or only what costs little, again in the backward pass instead of keeping it: less memory, more time.
    #[arg(long, value_name = "layers|cheap", num_args = 0..=1, default_missing_value = "layers", hide_possible_values = true)]
    pub recompute: Option<RecomputeArg>,
    /// GPUs that share each batch, by number, separated by commas [default: the first one].
    #[arg(long, value_name = "0,1", value_delimiter = ',')]
    pub devices: Vec<usize>,
    /// Largest learning rate.
    #[arg(long)]
    pub lr: Option<f64>,
    /// Minutes after which training must have ended: the learning rate starts to fall in time.
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Go on with a run from its latest checkpoint.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "preset", "model", "data", "field", "tokenizer", "out", "length", "batch", "accumulate", "recompute", "lr", "seed", "dtype"])]
    pub resume: Option<PathBuf>,
    /// Seed of initialisation, data order and dropout.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Print the plan and stop before the first step.
    #[arg(long)]
    pub plan_only: bool,
    #[command(flatten)]
    pub compute: Compute,
}

#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct GenerateArgs {
    /// A checkpoint: a folder, a GGUF file, or an id of the Hugging Face hub.
    #[arg(long, value_name = "PATH|HUB_ID")]
    pub model: String,
    /// Text to continue.
    #[arg(long, conflicts_with = "ids")]
    pub prompt: Option<String>,
    /// Token ids to continue, separated by commas.
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub ids: Option<Vec<u32>>,
    /// A tokenizer.json, where the model's folder has none.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Only the K likeliest tokens; 0 takes all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Only the likeliest tokens that together reach probability P.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Only tokens at least P times as likely as the likeliest.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Makes tokens that occurred less likely; 1 changes nothing.
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Text that ends the generation (may be given several times).
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the state at the end, to go on from later.
    #[arg(long, value_name = "FILE")]
    pub save_state: Option<PathBuf>,
    /// Go on from a state that --save-state wrote with the same model.
    #[arg(long, value_name = "FILE")]
    pub load_state: Option<PathBuf>,
    /// Go on past tokens that end the text.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Print one JSON object instead of streaming text.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub compute: Compute,
}

#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// A checkpoint: a folder, a GGUF file, or an id of the Hugging Face hub.
    #[arg(long, value_name = "PATH|HUB_ID")]
    pub model: String,
    /// A safetensors file with `input_ids` (batch, length), int64.
    #[arg(long, value_name = "FILE")]
    pub ids: PathBuf,
    /// The safetensors file to write: `logits`, `loss` and with --grads `grad.NAME`.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Gradients of the loss, too, under the checkpoint's own names.
    #[arg(long)]
    pub grads: bool,
    #[command(flatten)]
    pub compute: Compute,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    pub command: EvalCommand,
}

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Predict every token of texts from everything before it in its document.
    Perplexity(PerplexityArgs),
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// A checkpoint: a folder, or an id of the Hugging Face hub.
    #[arg(long, value_name = "PATH|HUB_ID")]
    pub model: String,
    /// Text: files, folders and globs of .txt and .jsonl, plain, .gz, .zst or .xz.
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    pub data: Vec<String>,
    /// Field of the text in .jsonl files.
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub field: String,
    /// A tokenizer.json, where the model's folder has none.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Only the first N bytes of the texts.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_bytes: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub compute: Compute,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint's folder, a GGUF file, a hub id or a state file.
    pub path: String,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The checkpoint's folder, GGUF file or hub id.
    pub input: String,
    /// The folder (for GGUF the file) to write; it must not exist.
    pub output: PathBuf,
    /// Format to write [default: GGUF where OUTPUT ends in .gguf, original from Hugging Face, else Hugging Face].
    #[arg(long, alias = "to", value_enum)]
    pub format: Option<FormatArg>,
}

#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// The checkpoint's folder, GGUF file or hub id.
    pub input: String,
    /// The GGUF file to write; it must not exist.
    pub output: PathBuf,
    /// Type of the matrices; everything else is f32. With q4_k the output matrix takes q6_k, and rows that do not fit
    /// take q8_0 or f16.
    #[arg(long, value_name = "TYPE", value_enum)]
    pub r#type: WeightType,
    /// A tokenizer.json to put into the file instead of the checkpoint's.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Print one JSON object: bytes before and after, the type and the error of each tensor.
    #[arg(long)]
    pub json: bool,
}

/// Types of matrices in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q6_k")]
    Q6K,
    #[value(name = "q4_k")]
    Q4K,
    Bf16,
    F16,
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// config.json + pytorch_model.bin of mamba-ssm.
    Original,
    /// config.json + model.safetensors of transformers.
    Huggingface,
    /// One file for llama.cpp, each matrix in the type it has.
    Gguf,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// What to explain [default: list what there is].
    pub name: Option<String>,
    /// Folder for the picture, NAME.svg and NAME.png.
    #[arg(long, value_name = "FOLDER", default_value = "explain")]
    pub out: PathBuf,
    /// With selection and ssd: a checkpoint to look into [default: a small one that ships].
    #[arg(long, value_name = "PATH|HUB_ID")]
    pub model: Option<String>,
    /// With selection and ssd: the text that the model reads.
    #[arg(long)]
    pub text: Option<String>,
    /// Print one JSON object: text, checks, tables and the numbers of the picture.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub compute: Compute,
}

#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct BenchArgs {
    /// A preset (random weights) or a checkpoint.
    #[arg(long, value_name = "PRESET|PATH")]
    pub model: Option<String>,
    /// What to measure.
    #[arg(long, value_enum, default_value_t = Mode::Decode)]
    pub mode: Mode,
    /// An op to measure by itself, at the sizes of --model (or of mamba-130m, mamba2-130m).
    #[arg(long, value_name = "NAME")]
    pub op: Option<String>,
    /// Sequences at once.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Tokens of a sequence (prefill, train), or tokens to generate (decode).
    #[arg(long, default_value_t = 256)]
    pub length: usize,
    /// Measurements.
    #[arg(long, default_value_t = 5)]
    pub repeat: usize,
    /// Channels of the mixer, with --op: instead of the model's.
    #[arg(long, value_parser = positive)]
    pub width: Option<usize>,
    /// With --mode train: compute layers, or only what costs little, again instead of keeping it.
    #[arg(long, value_name = "layers|cheap", num_args = 0..=1, default_missing_value = "layers", hide_possible_values = true)]
    pub recompute: Option<RecomputeArg>,
    /// Print what each kind of op takes by itself.
    #[arg(long)]
    pub profile: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub compute: Compute,
}

/// A whole number from 1 up.
fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number from 1 up".to_string())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Prefill,
    Decode,
    Train,
}
