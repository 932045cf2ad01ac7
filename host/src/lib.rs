//! The command line's parts, as a library, so that tests and other programs can read its output.

pub mod accuracy;
pub mod cli;
pub mod compare;
pub mod decode;
pub mod env;
pub mod failure;
pub mod format;
pub mod gpus;
pub mod help;
pub mod inputs;
pub mod interrupt;
pub mod machine;
pub mod microscope;
pub mod options;
pub mod output;
pub mod peers;
pub mod progress;
pub mod report;
pub mod results;
pub mod run;
pub mod subject;
pub mod table;
pub mod values;
pub mod verify;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

/// Reads the arguments, runs the command and reports its result.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            progress::warn(&failure::clap_line(&error));
            return ExitCode::from(2);
        }
        Err(help) => {
            progress::print_lines(help.to_string().trim_end());
            return ended(ExitCode::SUCCESS);
        }
    };
    let outcome = match &cli.command {
        Command::Env => Ok(env::run()),
        Command::Compare(args) => compare::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Decode(args) => decode::run(args),
        Command::Run(args) => run::run(args),
        Command::Break(args) => microscope::break_sync::run(args),
        Command::Profile(args) => microscope::profile::run(args),
        Command::Trace(args) => microscope::trace::run(args),
        Command::Report(args) => report::remake(args),
        Command::Completions { shell } => Ok(cli::completions(*shell)),
        Command::Man { command } => cli::man(command.as_deref()),
    };
    ended(match outcome {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            progress::warn(&failure::line(&error));
            ExitCode::from(failure::exit_code(&error))
        }
    })
}

/// The exit code of a command, or of a failure to print its text.
fn ended(code: ExitCode) -> ExitCode {
    let Some(error) = progress::failure() else { return code };
    progress::warn(&format!("error: standard output could not be written: {error}"));
    if code == ExitCode::SUCCESS { ExitCode::FAILURE } else { code }
}
