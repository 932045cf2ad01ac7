//! The arguments of `compare`.

use std::path::PathBuf;

use clap::Args;

use crate::{gpus::GpusArgs, options::ProblemArgs, peers, results::LevelChoice, values};

/// Arguments of `compare`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct CompareArgs {
    /// The problem.
    #[command(flatten)]
    pub problem: ProblemArgs,
    /// Run attention alone, the multi-head attention module with its projections, both, the
    /// gradients of attention, a forward and a backward pass of the module, or a few queries against
    /// caches, as the command decode does
    #[arg(long, value_name = "LEVEL", default_value_t = LevelChoice::Both)]
    pub level: LevelChoice,
    /// Several GPUs.
    #[command(flatten)]
    pub several: GpusArgs,
    /// Timed runs of each kernel
    #[arg(long, value_name = "COUNT", value_parser = values::runs)]
    pub iters: Option<usize>,
    /// Untimed runs of each kernel before the timed runs
    #[arg(long, value_name = "COUNT", value_parser = values::runs_or_none)]
    pub warmup: Option<usize>,
    /// Also launch each kernel back to back for about this long: on a GPU, the rate at its power
    /// limit
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds)]
    pub sustained: Option<f64>,
    /// Time limit of one launch: a longer launch is reported, and ends the run
    #[arg(long, value_name = "SECONDS", value_parser = values::timeout)]
    pub timeout: Option<f64>,
    /// Run PyTorch's attention and FlashAttention's packages, or their gradients, beside the kernels (at
    /// level decode, the peers of the command decode),
    /// where python3 (or the Python that FLASH_ATTENTION_PYTHON names) has them: all of them, or the
    /// listed ones
    #[arg(long, value_name = "BACKEND,…", value_delimiter = ',', num_args = 0.., require_equals = true, value_parser = peers::ALL)]
    pub peers: Option<Vec<String>>,
    /// Print every column, however wide the terminal is
    #[arg(long)]
    pub wide: bool,
    /// Write all measurements as JSON; - is standard output, and text goes to standard error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the rows as CSV; - as with --json
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a report into this directory: one page, pictures, JSON and CSV
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
}
