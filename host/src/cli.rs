//! The command line, and the completions and manual pages made from it.

use anyhow::Result;
use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::{
    compare::CompareArgs,
    decode::DecodeCommandArgs,
    failure::{Outcome, Usage},
    help,
    microscope::{break_sync::BreakArgs, profile::ProfileArgs, trace::TraceArgs},
    progress::print_lines,
    report::ReportArgs,
    run::RunArgs,
    verify::VerifyArgs,
};

/// FlashAttention kernels in Rust: look at them, compare them, verify them.
#[derive(Debug, Parser)]
#[command(name = "flash-attention", version, max_term_width = 100, after_long_help = help::PROGRAM)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the driver, the GPUs and the kernels that each can run
    Env,
    /// Measure kernels, and the module around them, side by side: time, memory, error
    #[command(after_help = help::compare_defaults(), after_long_help = help::compare())]
    Compare(Box<CompareArgs>),
    /// Compare outputs of each kernel, and of the module around it, with f64
    #[command(after_help = help::verify_defaults(), after_long_help = help::verify())]
    Verify(Box<VerifyArgs>),
    /// Verify and measure a few queries against caches, contiguous and paged
    #[command(after_help = help::decode_defaults(), after_long_help = help::decode())]
    Decode(Box<DecodeCommandArgs>),
    /// Compute attention, or the attention module, of your own tensors, from a safetensors file
    #[command(after_long_help = help::RUN)]
    Run(Box<RunArgs>),
    /// Leave out a barrier, wait or fence of a kernel, and see what the emulator says
    #[command(after_long_help = help::BREAK)]
    Break(Box<BreakArgs>),
    /// Count what a kernel does line by line, and what bounds it on a GPU
    #[command(after_long_help = help::PROFILE)]
    Profile(Box<ProfileArgs>),
    /// Trace what warps, copies and tensor cores do, for Perfetto or Chrome: an estimate of time
    #[command(after_long_help = help::TRACE)]
    Trace(Box<TraceArgs>),
    /// Make the report of a run again, from the run's JSON
    #[command(after_long_help = help::REPORT)]
    Report(ReportArgs),
    /// Print completions for a shell
    #[command(after_long_help = help::COMPLETIONS)]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page of the program, or of one of its commands
    #[command(after_long_help = help::MAN)]
    Man {
        /// A command
        command: Option<String>,
    },
}

/// Prints completions.
pub fn completions(shell: Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "flash-attention", &mut script);
    print_lines(String::from_utf8_lossy(&script).trim_end());
    Outcome::Good
}

/// Prints the manual page of the program, or of a command.
///
/// # Errors
/// [`Usage`] for an unknown command.
pub fn man(command: Option<&str>) -> Result<Outcome> {
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let page = match command {
        None => &program,
        Some(name) => program.find_subcommand(name).ok_or_else(|| {
            let names: Vec<&str> = program.get_subcommands().map(clap::Command::get_name).collect();
            Usage(format!("unknown command '{name}': the commands are {}", names.join(", ")))
        })?,
    };
    let mut text = Vec::new();
    let source = concat!("flash-attention ", env!("CARGO_PKG_VERSION"));
    clap_mangen::Man::new(page.clone()).source(source).render(&mut text)?;
    print_lines(String::from_utf8_lossy(&text).trim_end());
    Ok(Outcome::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
