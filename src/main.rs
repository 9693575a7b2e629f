//! The command line: raw arguments → validated arguments → a call into the crates.

mod args;
mod commands;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let result = match cli.command {
        args::Command::Train(args) => commands::train::run(args),
        args::Command::Generate(args) => commands::generate::run(args),
        args::Command::Forward(args) => commands::forward::run(args),
        args::Command::Inspect(args) => commands::inspect::run(args),
        args::Command::Convert(args) => commands::convert::run(args),
        args::Command::Bench(args) => commands::bench::run(args),
    };
    match result {
        // What was asked for was not done to the end: the shell's code for an interrupt.
        Ok(()) if terminal::interrupted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<args::Usage>() { 2 } else { 1 })
        }
    }
}
