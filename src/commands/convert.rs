//! `hognose convert`: from one checkpoint format to another, without loss.

use hognose_model::checkpoint::{self, Format};

use crate::args::{ConvertArgs, FormatArg};

pub fn run(args: ConvertArgs) -> anyhow::Result<()> {
    let input = hognose_model::hub::resolve(&args.input)?;
    let (from, _, _) = checkpoint::read_config(&input)?;
    let to = match (args.format, from) {
        (Some(FormatArg::Gguf), _) => Format::Gguf,
        (None, _) if args.output.extension().is_some_and(|e| e == "gguf") => Format::Gguf,
        (Some(FormatArg::Original), _) | (None, Format::HuggingFace) => Format::Original,
        (Some(FormatArg::Huggingface), _) | (None, Format::Original | Format::Gguf) => Format::HuggingFace,
    };
    checkpoint::convert(&input, &args.output, to)?;
    eprintln!("{} ({from}) → {} ({to})", input.display(), args.output.display());
    Ok(())
}
