//! The command line: raw arguments → validated arguments → a call into the crates.

/// As the standard macro of this name, but does not panic where nobody reads stderr any more: a training run goes on
/// when the program that showed its messages ends.
macro_rules! eprintln {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

mod args;
mod commands;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use peak_alloc::PeakAlloc;

/// The system's allocator, which also counts bytes: `explain` says what its computations need.
#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let result = match cli.command {
        args::Command::Train(args) => commands::train::run(args),
        args::Command::Generate(args) => commands::generate::run(args),
        args::Command::Forward(args) => commands::forward::run(args),
        args::Command::Eval(args) => commands::eval::run(args),
        args::Command::Inspect(args) => commands::inspect::run(args),
        args::Command::Convert(args) => commands::convert::run(args),
        args::Command::Explain(args) => commands::explain::run(args),
        args::Command::Quantize(args) => commands::quantize::run(args),
        args::Command::Bench(args) => commands::bench::run(args),
    };
    match result {
        // What was asked for was not done to the end: the shell's code for an interrupt.
        Ok(()) if terminal::interrupted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough, as `head` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::from(if error.is::<args::Usage>() { 2 } else { 1 })
        }
    }
}

/// The error and its causes. Messages that quote their cause, as those of files do, are not followed by it again.
fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text {
        text if text.is_empty() => cause,
        text if text.contains(&cause) => text,
        text => format!("{text}: {cause}"),
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    };
    error.chain().any(is)
}
