//! `hognose quantize`: write a checkpoint as a GGUF file with matrices of fewer bits.

use std::collections::BTreeMap;
use std::io::Write;

use hognose::Tokenizer;
use hognose_core::error::human_bytes;
use hognose_core::quant::Kind;
use hognose_model::checkpoint::{Checkpoint, Dtype, Quantized, quantize};

use crate::args::{QuantizeArgs, WeightType};
use crate::terminal;

pub fn run(args: QuantizeArgs) -> anyhow::Result<()> {
    let dtype = match args.r#type {
        WeightType::Q8_0 => Dtype::Blocks(Kind::Q8_0),
        WeightType::Q6K => Dtype::Blocks(Kind::Q6_K),
        WeightType::Q4K => Dtype::Blocks(Kind::Q4_K),
        WeightType::Bf16 => Dtype::BF16,
        WeightType::F16 => Dtype::F16,
        WeightType::F32 => Dtype::F32,
    };
    let input = hognose_model::hub::resolve(&args.input)?;
    let checkpoint = Checkpoint::open(&input)?;
    let tokenizer = match &args.tokenizer {
        Some(file) => Some(Tokenizer::load(file)?),
        None => Tokenizer::find(&input)?,
    };
    if checkpoint.tensors().iter().any(|t| matches!(t.dtype, Dtype::Blocks(_))) {
        eprintln!("warning: {} is quantised already; its errors add to those of {dtype}", input.display());
    }
    let bar = terminal::bar(0, "quantize {wide_bar} {percent} %, {eta} left");
    let written = quantize(&checkpoint, tokenizer.as_ref(), &args.output, Some(dtype), &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    written.notes.iter().for_each(|note| eprintln!("note: {note}"));
    if args.json {
        let mut object = serde_json::to_value(&written)?;
        object["path"] = args.output.display().to_string().into();
        writeln!(std::io::stdout(), "{object}")?;
    } else {
        eprintln!("{}", describe(&written, &args.output.display().to_string()));
    }
    Ok(())
}

/// `model.gguf: 492.6 MiB → 131.2 MiB (125 q8_0, 76 f32); largest error 0.58 % in backbone…`
fn describe(written: &Quantized, path: &str) -> String {
    let mut types: BTreeMap<String, usize> = BTreeMap::new();
    written.tensors.iter().for_each(|t| *types.entry(t.dtype.to_string()).or_default() += 1);
    let types: Vec<String> = types.iter().map(|(dtype, count)| format!("{count} tensors in {dtype}")).collect();
    let worst = written.tensors.iter().max_by(|a, b| a.error.total_cmp(&b.error)).filter(|t| t.error > 0.0);
    let error = worst.map_or("no errors".into(), |t| {
        format!("largest error {:.3} % of the root mean square, in {}", 100.0 * t.error, t.name)
    });
    let [before, after] = [written.bytes_before, written.file_bytes].map(human_bytes);
    format!("{path}: {before} → {after}; {}; {error}", types.join(", "))
}
