//! The command line's arguments, and the defaults that depend on the device.

use std::{fmt, path::PathBuf, str::FromStr};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use flash_attention::{
    DType, Dropout, Problem,
    problem::head_dim_of,
    registry::{self, KERNELS, KernelSpec, Target},
};

use crate::{
    failure::Usage,
    help, peers,
    report::ReportArgs,
    results::{LevelChoice, Options},
    run::RunArgs,
    values,
};

/// FlashAttention kernels in Rust: look at them, compare them, verify them.
#[derive(Debug, Parser)]
#[command(name = "flash-attention", version, max_term_width = 100, after_long_help = help::PROGRAM)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the driver, the GPUs and which kernels each can run
    Env,
    /// Measure kernels, and the module around them, side by side: time, memory, error
    #[command(after_help = help::compare_defaults(), after_long_help = help::compare())]
    Compare(Box<CompareArgs>),
    /// Compare outputs of each kernel, and of the module around it, with f64
    #[command(after_help = help::verify_defaults(), after_long_help = help::verify())]
    Verify(Box<VerifyArgs>),
    /// Compute attention, or the attention module, of your own tensors, from a safetensors file
    #[command(after_long_help = help::RUN)]
    Run(Box<RunArgs>),
    /// Make the report of a run anew from the JSON that it wrote
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

/// What both `compare` and `verify` take.
#[derive(Args, Clone, Debug)]
pub struct ProblemArgs {
    /// Sequence lengths, separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = values::count)]
    pub seq: Option<Vec<usize>>,
    /// Batch entries
    #[arg(long, value_name = "B", value_parser = values::count)]
    pub batch: Option<usize>,
    /// Tokens over all batch entries: each sequence length N gets TOKENS / N entries
    #[arg(long, value_name = "TOKENS", value_parser = values::count, conflicts_with = "batch")]
    pub tokens: Option<usize>,
    /// Heads
    #[arg(long, value_name = "H", value_parser = values::count)]
    pub heads: Option<usize>,
    /// Features over all heads; divided by the heads it is the head dim
    #[arg(long, value_name = "SIZE", value_parser = values::count, conflicts_with = "head_dim")]
    pub hidden: Option<usize>,
    /// Features of a head
    #[arg(long, value_name = "D", value_parser = values::count)]
    pub head_dim: Option<usize>,
    /// Storage type of the tensors: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", value_parser = values::dtype)]
    pub dtype: Option<DType>,
    /// Let row i see keys up to i only
    #[arg(long)]
    pub causal: bool,
    /// Hide a random tail of each batch entry's keys, up to half of them
    #[arg(long)]
    pub mask: bool,
    /// Drop attention weights with this probability
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = values::number)]
    pub dropout: f32,
    /// Kernels by name, separated by commas; every kernel unless given
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = values::kernel())]
    pub kernels: Option<Vec<String>>,
    /// Where to run: auto (a GPU if there is one), gpu, gpu:1 (a certain one) or cpu
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Seed of the random inputs and of dropout
    #[arg(long, default_value_t = 42, value_parser = values::seed)]
    pub seed: u64,
    /// Memory that the emulator has, as 512MiB or 2GiB; half of what is free unless given
    #[arg(long, value_name = "SIZE", value_parser = values::bytes)]
    pub memory_limit: Option<u64>,
}

/// Arguments of `compare`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct CompareArgs {
    /// The problem.
    #[command(flatten)]
    pub problem: ProblemArgs,
    /// What to run: attention alone, the multi-head attention module with its projections, or
    /// both
    #[arg(long, value_name = "LEVEL", default_value_t = LevelChoice::Both)]
    pub level: LevelChoice,
    /// Timed runs of each kernel
    #[arg(long, value_name = "COUNT", value_parser = values::count)]
    pub iters: Option<usize>,
    /// Runs before those
    #[arg(long, value_name = "COUNT", value_parser = values::count_or_none)]
    pub warmup: Option<usize>,
    /// Launch each kernel back to back for about this long too: on a GPU the rate that its
    /// power limit leaves
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds)]
    pub sustained: Option<f64>,
    /// Most time that one launch may take: one that takes longer is reported, and ends the run
    #[arg(long, value_name = "SECONDS", value_parser = values::timeout)]
    pub timeout: Option<f64>,
    /// Run PyTorch's attention beside the kernels, where python3 (or the Python that
    /// FLASH_ATTENTION_PYTHON names) has PyTorch: every backend, or those listed
    #[arg(long, value_name = "BACKEND,…", value_delimiter = ',', num_args = 0.., require_equals = true, value_parser = peers::ON_GPU)]
    pub peers: Option<Vec<String>>,
    /// Print every column, however wide the terminal is
    #[arg(long)]
    pub wide: bool,
    /// Write everything measured as JSON; - is standard output, and text goes to standard error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the rows as CSV; - as with --json
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a report into this directory: one page, pictures, JSON and CSV
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
}

/// Arguments of `verify`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct VerifyArgs {
    /// The problem.
    #[command(flatten)]
    pub problem: ProblemArgs,
    /// What to verify: attention alone, the multi-head attention module with its projections, or
    /// both
    #[arg(long, value_name = "LEVEL", default_value_t = LevelChoice::Both)]
    pub level: LevelChoice,
    /// Largest absolute difference that passes; 1e-3 in f32, none in f16 and bf16,
    /// where twice the plain algorithm's error alone decides
    #[arg(long, value_name = "MAX", value_parser = values::threshold)]
    pub threshold: Option<f64>,
    /// Rows of O, and tokens of a module's output, to compare, spread over the tensor; every one
    /// unless given, as far as that takes seconds
    #[arg(long, value_name = "COUNT", value_parser = values::count)]
    pub rows: Option<usize>,
    /// Print every column, however wide the terminal is
    #[arg(long)]
    pub wide: bool,
    /// Write every difference's summary as JSON; - is standard output, and text goes to standard
    /// error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one, else the emulator.
    Auto,
    /// The GPU of that number.
    Gpu(u32),
    /// The emulator.
    Cpu,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu" => Ok(Self::Gpu(0)),
            _ => text
                .strip_prefix("gpu:")
                .and_then(|index| index.parse().ok())
                .map(Self::Gpu)
                .ok_or_else(|| "use auto, gpu, gpu:1 or cpu".to_owned()),
        }
    }
}

/// What is run where nothing else is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Sequence lengths.
    pub seq: &'static [usize],
    /// Batch entries.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Storage type.
    pub dtype: DType,
}

impl fmt::Display for Defaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seq, batch, heads, head_dim, dtype } = self;
        let seq = seq.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        write!(
            f,
            "--seq {seq} --batch {batch} --heads {heads} --head-dim {head_dim} --dtype {dtype}"
        )
    }
}

impl ProblemArgs {
    /// The problems, one a sequence length, checked.
    ///
    /// # Errors
    /// What value is wrong and what would be right.
    pub fn problems(&self, defaults: &Defaults) -> Result<Vec<Problem>> {
        let heads = self.heads.unwrap_or(defaults.heads);
        let head_dim = match (self.head_dim, self.hidden) {
            (Some(head_dim), _) => head_dim,
            (None, Some(hidden)) => head_dim_of(hidden, heads)?,
            (None, None) => defaults.head_dim,
        };
        let batch = |n: usize| match self.tokens {
            Some(tokens) if n == 0 || tokens == 0 || tokens % n != 0 => Err(Usage(format!(
                "--tokens {tokens} is no multiple of the sequence length {n}: use one of every --seq"
            ))),
            Some(tokens) => Ok(tokens / n),
            None => Ok(self.batch.unwrap_or(defaults.batch)),
        };
        let seq = self.seq.as_deref().unwrap_or(defaults.seq);
        let problem = |&n: &usize| {
            let builder = Problem::builder(batch(n)?, heads, n, head_dim)
                .dtype(self.dtype.unwrap_or(defaults.dtype))
                .causal(self.causal)
                .mask(self.mask)
                .dropout(Some(Dropout { p: self.dropout, seed: self.seed }));
            Ok(builder.build()?)
        };
        seq.iter().map(problem).collect()
    }

    /// The kernels, in the order of the ladder or as they were asked for. One that can do none of
    /// the problems is among them, as long as another can do one.
    ///
    /// # Errors
    /// An unknown kernel; one that is listed twice; or no kernel that can do any problem.
    pub fn chosen_kernels(
        &self,
        problems: &[Problem],
        target: &Target,
    ) -> Result<Vec<&'static KernelSpec>> {
        let mut kernels: Vec<&'static KernelSpec> = Vec::new();
        match &self.kernels {
            None => kernels.extend(KERNELS),
            Some(names) => {
                for name in names {
                    let kernel = registry::find(name)?;
                    if kernels.iter().any(|k| k.name == kernel.name) {
                        let reason = format!("kernel {name} is listed twice: list it once");
                        return Err(Usage(reason).into());
                    }
                    kernels.push(kernel);
                }
            }
        }
        let obstacles =
            || kernels.iter().flat_map(|k| problems.iter().map(|p| k.supports(p, target)));
        if obstacles().all(|obstacle| obstacle.is_err()) {
            if self.kernels.is_none() {
                problems.iter().try_for_each(|p| registry::check_head_dim(p.head_dim()))?;
            }
            obstacles().collect::<Result<(), _>>()?;
        }
        Ok(kernels)
    }
}

impl ProblemArgs {
    /// What results record of the problems that are run.
    #[must_use]
    pub fn recorded(&self, problems: &[Problem], kernels: &[&KernelSpec]) -> Options {
        let Some(first) = problems.first() else { return Options::default() };
        Options {
            seq: problems.iter().map(Problem::seq_q).collect(),
            batch: first.batch(),
            tokens: self.tokens,
            heads: first.heads(),
            head_dim: first.head_dim(),
            dtype: first.dtype(),
            causal: first.causal(),
            mask: first.has_mask(),
            dropout: self.dropout,
            kernels: kernels.iter().map(|k| k.name.to_owned()).collect(),
            seed: self.seed,
            ..Options::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn devices_parse() {
        assert_eq!("gpu:3".parse(), Ok(DeviceChoice::Gpu(3)));
        assert!("gpu:x".parse::<DeviceChoice>().is_err());
    }
}
