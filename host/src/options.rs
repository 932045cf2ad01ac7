//! The command line's arguments, and the defaults that depend on the device.

use std::{path::PathBuf, str::FromStr};

use anyhow::Result;
use clap::{Args, Parser, Subcommand, builder::RangedU64ValueParser};
use flash_attention::{
    DType, Dropout, Problem,
    problem::head_dim_of,
    registry::{self, KERNELS, KernelSpec, Target},
};

use crate::{
    failure::Usage,
    report::ReportArgs,
    results::{LevelChoice, Options},
    run::RunArgs,
};

/// FlashAttention kernels in Rust: look at them, compare them, verify them.
#[derive(Debug, Parser)]
#[command(name = "flash-attention", version, about, max_term_width = 100)]
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
    Compare(Box<CompareArgs>),
    /// Compare outputs of each kernel, and of the module around it, with f64
    Verify(Box<VerifyArgs>),
    /// Compute attention, or the attention module, of your own tensors, from a safetensors file
    Run(Box<RunArgs>),
    /// Make the report of a run anew from the JSON that it wrote
    Report(ReportArgs),
}

/// What both `compare` and `verify` take.
#[derive(Args, Clone, Debug)]
pub struct ProblemArgs {
    /// Sequence lengths, separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub seq: Option<Vec<usize>>,
    /// Batch entries
    #[arg(long, value_name = "B")]
    pub batch: Option<usize>,
    /// Tokens over all batch entries: each sequence length N gets TOKENS / N entries
    #[arg(long, value_name = "TOKENS", conflicts_with = "batch")]
    pub tokens: Option<usize>,
    /// Heads
    #[arg(long, value_name = "H")]
    pub heads: Option<usize>,
    /// Features over all heads; divided by the heads it is the head dim
    #[arg(long, value_name = "SIZE", conflicts_with = "head_dim")]
    pub hidden: Option<usize>,
    /// Features of a head
    #[arg(long, value_name = "D")]
    pub head_dim: Option<usize>,
    /// Storage type of the tensors: f32, f16 or bf16
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<DType>,
    /// Let row i see keys up to i only
    #[arg(long)]
    pub causal: bool,
    /// Hide a random tail of each batch entry's keys, up to half of them
    #[arg(long)]
    pub mask: bool,
    /// Drop attention weights with this probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub dropout: f32,
    /// Kernels by name, separated by commas; every kernel unless given
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub kernels: Option<Vec<String>>,
    /// Where to run: auto (a GPU if there is one), gpu, gpu:1 (a certain one) or cpu
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Seed of the random inputs and of dropout
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Memory that the emulator has, as 512MiB or 2GiB; half of what is free unless given
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub memory_limit: Option<u64>,
}

/// Arguments of `compare`.
#[derive(Args, Clone, Debug)]
pub struct CompareArgs {
    /// The problem.
    #[command(flatten)]
    pub problem: ProblemArgs,
    /// What to run: attention alone, the multi-head attention module with its projections, or
    /// both
    #[arg(long, value_name = "LEVEL", default_value_t = LevelChoice::Both)]
    pub level: LevelChoice,
    /// Timed runs of each kernel
    #[arg(long, value_name = "COUNT", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub iters: Option<usize>,
    /// Runs before those
    #[arg(long, value_name = "COUNT")]
    pub warmup: Option<usize>,
    /// Launch each kernel back to back for about this long too: on a GPU the rate that its
    /// power limit leaves
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub sustained: Option<f64>,
    /// Run PyTorch's attention beside the kernels, where python3 (or the Python that
    /// FLASH_ATTENTION_PYTHON names) has PyTorch: every backend, or those listed
    #[arg(long, value_name = "BACKEND,…", value_delimiter = ',', num_args = 0.., require_equals = true)]
    pub peers: Option<Vec<String>>,
    /// Write everything measured as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the rows as CSV
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a report into this directory: one page, pictures, JSON and CSV
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
}

/// Arguments of `verify`.
#[derive(Args, Clone, Debug)]
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
    #[arg(long, value_name = "MAX")]
    pub threshold: Option<f64>,
    /// Rows of O, and tokens of a module's output, to compare, spread over the tensor; every one
    /// unless given, as far as that takes seconds
    #[arg(long, value_name = "COUNT", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub rows: Option<usize>,
    /// Write every difference's summary as JSON
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

/// Bytes, with a binary unit or none.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        unit => return Err(format!("unknown unit {unit}: use KiB, MiB or GiB")),
    };
    let count: u64 = digits.parse().map_err(|_| "use a whole number, as in 512MiB".to_owned())?;
    count.checked_mul(1 << shift).ok_or_else(|| "more than an address can span".to_owned())
}

/// A time that something can be repeated for.
fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && seconds <= 60.0 => Ok(seconds),
        _ => Err("use a number of seconds above 0, up to 60".into()),
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

    /// The kernels, in the order of the ladder or as they were asked for.
    ///
    /// # Errors
    /// An unknown kernel; one that was asked for by name and can do none of the
    /// problems; or no kernel that can do any.
    pub fn chosen_kernels(
        &self,
        problems: &[Problem],
        target: &Target,
    ) -> Result<Vec<&'static KernelSpec>> {
        let obstacle = |kernel: &KernelSpec| {
            let mut reasons = problems.iter().map(|p| kernel.supports(p, target).err());
            let first = reasons.next().flatten()?;
            reasons.all(|r| r.is_some()).then_some(first)
        };
        let Some(names) = &self.kernels else {
            let able = KERNELS.iter().any(|kernel| obstacle(kernel).is_none());
            return match KERNELS.iter().find_map(obstacle) {
                Some(error) if !able => Err(error.into()),
                _ => Ok(KERNELS.iter().collect()),
            };
        };
        let mut kernels: Vec<&'static KernelSpec> = Vec::new();
        for name in names {
            let kernel = registry::find(name)?;
            if let Some(error) = obstacle(kernel) {
                return Err(error.into());
            }
            if kernels.iter().any(|k| k.name == kernel.name) {
                return Err(Usage(format!("kernel {name} is listed twice: list it once")).into());
            }
            kernels.push(kernel);
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
    fn devices_and_sizes_parse() {
        assert_eq!("gpu:3".parse(), Ok(DeviceChoice::Gpu(3)));
        assert!("gpu:x".parse::<DeviceChoice>().is_err());
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert_eq!(parse_bytes("70"), Ok(70));
        assert_eq!(parse_seconds("0.5"), Ok(0.5));
        assert!(parse_seconds("0").is_err() && parse_seconds("NaN").is_err());
        assert!(parse_bytes("2GB").is_err() && parse_bytes("99999999999GiB").is_err());
    }
}
