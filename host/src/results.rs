//! The measurements of a run, written to JSON and read back. `docs/json.md` describes the document,
//! which is the interface to programs that plot or compare.

use std::fmt;

use flash_attention::{DType, Problem, Window};
use serde::{Deserialize, Serialize};

use crate::format;

/// Version of the document. It rises when a field changes its meaning or disappears; new fields
/// leave it unchanged.
pub const SCHEMA: u32 = 1;

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Results {
    /// [`SCHEMA`] of the program that wrote this.
    pub schema: u32,
    /// Subcommand that was run: `compare`, `verify` or `run`.
    pub command: String,
    /// When, UTC, as `2025-01-31T12:00:00Z`.
    pub created: String,
    /// Version of the program.
    pub version: String,
    /// `git describe` of the source it was built from, or `unknown`.
    pub commit: String,
    /// The computer.
    pub machine: Machine,
    /// The device that ran the kernels.
    pub device: DeviceInfo,
    /// The CUDA driver, where there is one.
    pub driver: Option<Driver>,
    /// The options.
    pub options: Options,
    /// Whether the run was stopped (by a signal, or a launch that took too long) before everything
    /// was measured.
    pub interrupted: bool,
    /// One row per kernel, sequence length and level.
    pub rows: Vec<Row>,
    /// One comparison with the f64 oracle per kernel, sequence length, level and tensor.
    pub checks: Vec<Check>,
}

/// The computer that a run was made on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Operating system.
    pub os: String,
    /// Architecture of the CPU.
    pub arch: String,
    /// Name of the CPU, where it is known.
    pub cpu: Option<String>,
    /// Threads that the emulator uses.
    pub threads: usize,
    /// Memory in bytes, where it is known.
    pub memory_bytes: Option<u64>,
}

/// Where kernels ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceInfo {
    /// Name of the GPU or of the emulator.
    pub name: String,
    /// Whether kernels were emulated: times then show the algorithm, not GPU speed.
    pub emulated: bool,
    /// Compute capability, as `9.0`.
    pub compute_capability: String,
    /// Memory in bytes; none under an emulator without a limit.
    pub memory_bytes: Option<u64>,
    /// Maximum dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

/// The CUDA driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Driver {
    /// Version of the driver, as `580.65`, where it is known.
    pub version: Option<String>,
    /// Newest CUDA version that the driver supports, as `13.0`.
    pub cuda: String,
}

/// The options, with defaults filled in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Sequence lengths.
    pub seq: Vec<usize>,
    /// Tokens over the batch, where each sequence length has as many batch entries as that
    /// takes.
    pub tokens: Option<usize>,
    /// The problem of the first sequence length, in the first storage type where kernels ran in
    /// several.
    #[serde(flatten)]
    pub problem: ProblemRecord,
    /// Kernels, by name.
    pub kernels: Vec<String>,
    /// How often each was run.
    #[serde(flatten)]
    pub repeats: Repeats,
    /// Seed of inputs and dropout.
    pub seed: u64,
    /// The level.
    pub level: LevelChoice,
    /// Whether PyTorch was run beside the kernels.
    pub peers: bool,
    /// Whether gradients with the same bits each time were asked for.
    pub deterministic: bool,
}

impl fmt::Display for Options {
    /// The problem in one line: `batch 4, heads 12, head dim 64 (hidden 768), f16`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ProblemRecord { batch, heads, head_dim, dtype, .. } = self.problem;
        let hidden = heads * head_dim;
        match self.tokens {
            Some(tokens) => f.write_str(&format::counted(tokens, "token"))?,
            None => write!(f, "batch {batch}")?,
        }
        write!(f, ", heads {heads}, head dim {head_dim} (hidden {hidden}), {dtype}")?;
        write!(f, "{}", self.problem.features())?;
        if self.deterministic { f.write_str(", deterministic") } else { Ok(()) }
    }
}

/// The features of a problem beyond plain attention, as text: `, causal, softcap 50`.
#[derive(Clone, Copy, Debug)]
pub struct FeaturesText<'a>(&'a ProblemRecord);

impl fmt::Display for FeaturesText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = self.0;
        if let Some(kv_heads) = p.kv_heads.filter(|&kv_heads| kv_heads != p.heads) {
            write!(f, ", heads of K and V {kv_heads}")?;
        }
        if let Some(head_dim_v) = p.head_dim_v {
            write!(f, ", values of {head_dim_v}")?;
        }
        if let Some(seq_k) = p.seq_k {
            write!(f, ", {seq_k} keys")?;
        }
        if p.causal {
            f.write_str(", causal")?;
        }
        let [left, right] = p.window;
        // A causal mask has said the right bound.
        let right = right.filter(|_| !p.causal);
        if left.is_some() || right.is_some() {
            write!(f, ", window {}", Window { left, right })?;
        }
        if let Some(softcap) = p.softcap {
            write!(f, ", softcap {softcap}")?;
        }
        for (given, name) in [
            (p.alibi, ", ALiBi"),
            (p.bias, ", bias"),
            (p.sinks, ", sinks"),
            (p.varlen, ", packed sequences of random lengths"),
            (p.mask, ", padding mask"),
        ] {
            if given {
                f.write_str(name)?;
            }
        }
        if p.dropout > 0.0 {
            write!(f, ", dropout {}", p.dropout)?;
        }
        Ok(())
    }
}

/// A problem without its sequence length, in the form for documents and other processes. (A [`Row`]
/// repeats its part as fields: CSV has no structs in structs.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProblemRecord {
    /// Batch entries.
    pub batch: usize,
    /// Heads of Q.
    pub heads: usize,
    /// Heads of K and V; a document without them has as many as of Q.
    pub kv_heads: Option<usize>,
    /// Keys, where their number differs from the queries'.
    pub seq_k: Option<usize>,
    /// Elements of a row.
    pub head_dim: usize,
    /// Elements of a row of V and O, where their number differs from Q's and K's.
    pub head_dim_v: Option<usize>,
    /// Storage type.
    #[serde(with = "text")]
    pub dtype: DType,
    /// Whether rows see keys up to their own position only.
    pub causal: bool,
    /// Keys before and after its own position that a row sees; `null` is no bound.
    pub window: [Option<u32>; 2],
    /// Cap of scores.
    pub softcap: Option<f32>,
    /// Whether scores fall with distance, by ALiBi.
    pub alibi: bool,
    /// Whether a bias joins scores.
    pub bias: bool,
    /// Whether each head has a sink.
    pub sinks: bool,
    /// Whether sequences of random lengths are packed one after the other.
    pub varlen: bool,
    /// Whether there is a padding mask.
    pub mask: bool,
    /// Probability that a weight is dropped.
    pub dropout: f32,
}

impl ProblemRecord {
    /// The features beyond plain attention, as text.
    #[must_use]
    pub const fn features(&self) -> FeaturesText<'_> {
        FeaturesText(self)
    }
}

impl From<&Problem> for ProblemRecord {
    fn from(problem: &Problem) -> Self {
        Self {
            batch: problem.batch(),
            heads: problem.heads(),
            kv_heads: Some(problem.kv_heads()),
            seq_k: Some(problem.seq_k()).filter(|&seq_k| seq_k != problem.seq_q()),
            head_dim: problem.head_dim(),
            head_dim_v: Some(problem.head_dim_v()).filter(|&d| d != problem.head_dim()),
            dtype: problem.dtype(),
            causal: problem.causal(),
            window: [problem.window().left, problem.window().right],
            softcap: problem.softcap(),
            alibi: problem.alibi().is_some(),
            bias: problem.bias().is_some(),
            sinks: problem.has_sinks(),
            varlen: problem.varlen().is_some(),
            mask: problem.has_mask(),
            dropout: problem.dropout().map_or(0.0, |dropout| dropout.p),
        }
    }
}

/// How often a kernel is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Repeats {
    /// Timed runs.
    pub iters: usize,
    /// Untimed runs before the timed runs.
    pub warmup: usize,
    /// Seconds of back-to-back runs after the timed runs, if requested.
    pub sustained: Option<f64>,
}

/// The levels that a run covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LevelChoice {
    /// Attention alone: Q, K, V in, O and LSE out.
    #[default]
    Attention,
    /// The multi-head attention module with its projections.
    Module,
    /// Both.
    Both,
    /// The gradients of attention: dQ, dK and dV.
    Backward,
    /// A forward and a backward pass of the module.
    #[serde(rename = "module-backward")]
    ModuleBackward,
    /// A few queries against caches of keys and values: the command `decode`, which has a table of its own.
    Decode,
}

impl fmt::Display for LevelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Attention => "attention",
            Self::Module => "module",
            Self::Both => "both",
            Self::Backward => "backward",
            Self::ModuleBackward => "module-backward",
            Self::Decode => "decode",
        })
    }
}

impl LevelChoice {
    /// The levels covered.
    pub fn levels(self) -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(move |&level| self.covers(level))
    }

    /// Whether a level is covered.
    #[must_use]
    pub const fn covers(self, level: Level) -> bool {
        matches!(
            (self, level),
            (Self::Both | Self::Attention, Level::Attention)
                | (Self::Both | Self::Module, Level::Module)
                | (Self::Backward, Level::Backward)
                | (Self::ModuleBackward, Level::ModuleBackward)
        )
    }
}

/// The level of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Attention alone.
    #[default]
    Attention,
    /// The whole forward pass of the module.
    Module,
    /// The gradients of attention.
    Backward,
    /// A forward and a backward pass of the module.
    #[serde(rename = "module-backward")]
    ModuleBackward,
}

impl Level {
    /// Every level, in the order in which a run takes them.
    pub const ALL: [Self; 4] =
        [Self::Attention, Self::Module, Self::Backward, Self::ModuleBackward];

    /// Whether gradients are computed.
    #[must_use]
    pub const fn is_backward(self) -> bool {
        matches!(self, Self::Backward | Self::ModuleBackward)
    }

    /// Whether the module is run, with its projections.
    #[must_use]
    pub const fn is_module(self) -> bool {
        matches!(self, Self::Module | Self::ModuleBackward)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Attention => "attention",
            Self::Module => "module",
            Self::Backward => "backward",
            Self::ModuleBackward => "module-backward",
        })
    }
}

/// How a row ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Measured, and right.
    #[default]
    Ok,
    /// It needs more memory than was free.
    Oom,
    /// The kernel cannot do this problem, or not on this device.
    Unsupported,
    /// It failed, or its output was wrong.
    Failed,
    /// A launch took longer than it was given, and ended the run.
    Timeout,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Oom => "oom",
            Self::Unsupported => "unsupported",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
        })
    }
}

/// One kernel at one sequence length. What was not measured is `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// Name of the kernel, or `torch-…` for a peer.
    pub kernel: String,
    /// The level.
    pub level: Level,
    /// Name of the device.
    pub device: String,
    /// Batch entries.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Sequence length.
    pub seq: usize,
    /// Elements of a row.
    pub head_dim: usize,
    /// Storage type.
    #[serde(with = "text")]
    pub dtype: DType,
    /// Whether rows see keys up to their own position only.
    pub causal: bool,
    /// How it ended.
    pub status: Status,
    /// The reason for a failure; empty otherwise.
    pub reason: String,
    /// Mean time of a run in milliseconds.
    pub mean_ms: Option<f64>,
    /// Standard deviation of the times (of the sample, `n - 1`).
    pub std_ms: Option<f64>,
    /// Shortest time.
    pub min_ms: Option<f64>,
    /// Longest time.
    pub max_ms: Option<f64>,
    /// Median time.
    pub median_ms: Option<f64>,
    /// 10^12 floating-point operations per second, from the median time.
    pub tflops: Option<f64>,
    /// Mean time per run of many runs back to back, in milliseconds.
    pub sustained_ms: Option<f64>,
    /// 10^12 floating-point operations per second, from the back-to-back time.
    pub sustained_tflops: Option<f64>,
    /// Median time of the forward pass alone, where both passes are measured.
    pub forward_ms: Option<f64>,
    /// Median time of the backward pass alone, likewise.
    pub backward_ms: Option<f64>,
    /// Peak of the forward pass's device memory alone, likewise.
    pub forward_peak_bytes: Option<u64>,
    /// Peak of device memory, in bytes, including inputs, outputs and parameters.
    pub peak_bytes: Option<u64>,
    /// Device memory beyond inputs and outputs, and parameters of a module, in bytes.
    pub workspace_bytes: Option<u64>,
    /// Peak memory predicted before the launch.
    pub needed_bytes: Option<u64>,
    /// Free memory at that time; on `oom` rows.
    pub free_bytes: Option<u64>,
    /// Median time of `naive`, or of `backward_naive`, divided by this kernel's.
    pub speedup: Option<f64>,
    /// Share of `naive`'s peak memory that this kernel saves; negative if it needs more.
    pub memory_saved: Option<f64>,
    /// Median time of `standard` (for gradients `backward_standard`) divided by this kernel's.
    pub speedup_standard: Option<f64>,
    /// Share of `standard`'s peak memory that this kernel saves.
    pub memory_saved_standard: Option<f64>,
    /// Largest absolute difference of O, of a module's y, of dQ or of a module's dx from the f64 oracle,
    /// over the rows compared.
    pub max_abs_err: Option<f64>,
    /// Whether the times are the emulator's: the algorithm, not GPU speed.
    pub emulated: bool,
    /// Floating-point operations of the problem, by convention; with the projections at module
    /// level.
    pub flops: f64,
    /// Bytes that the kernel read from global memory, counted by the emulator.
    pub global_bytes_read: Option<u64>,
    /// Bytes that the kernel wrote to global memory, counted by the emulator.
    pub global_bytes_written: Option<u64>,
    /// Whether this is another library's implementation.
    pub peer: bool,
    /// Heads of K and V.
    pub kv_heads: Option<usize>,
    /// Keys; for packed sequences the maximum per sequence, like `seq`.
    pub seq_k: Option<usize>,
    /// Keys before its own position that a row sees; `null` is no bound.
    pub window_left: Option<u32>,
    /// Keys after its own position that a row sees; `null` is no bound.
    pub window_right: Option<u32>,
    /// Cap of scores.
    pub softcap: Option<f32>,
    /// Whether scores fall with distance, by ALiBi.
    pub alibi: bool,
    /// Whether a bias joins scores.
    pub bias: bool,
    /// Whether each head has a sink.
    pub sinks: bool,
    /// Whether sequences of random lengths are packed one after the other.
    pub varlen: bool,
    /// Whether there is a padding mask.
    pub mask: bool,
    /// Probability that a weight is dropped.
    pub dropout: f32,
    /// Whether gradients with the same bits each time were asked for.
    pub deterministic: bool,
}

impl Row {
    /// Bytes of the parameters of a module and of their gradients, which its peak memory includes.
    #[must_use]
    pub const fn parameter_bytes(&self) -> u64 {
        let hidden = (self.heads * self.head_dim) as u64;
        match self.level {
            Level::Attention | Level::Backward => 0,
            Level::Module => 4 * (hidden * hidden + hidden) * self.dtype.size() as u64,
            // Their gradients, too.
            Level::ModuleBackward => 8 * (hidden * hidden + hidden) * self.dtype.size() as u64,
        }
    }
}

/// A kernel's output tensor, compared with the f64 oracle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Name of the kernel, or `torch-…` for a peer.
    pub kernel: String,
    /// The level.
    pub level: Level,
    /// Sequence length.
    pub seq: usize,
    /// Storage type.
    #[serde(with = "text")]
    pub dtype: DType,
    /// `o` or `lse`; `y` for the output of a module; `dq`, `dk` or `dv`.
    pub tensor: String,
    /// Elements compared.
    pub compared: u64,
    /// Elements of the tensor; more than `compared` where rows were sampled.
    pub elements: u64,
    /// Largest, mean and median absolute difference.
    pub abs: Spread,
    /// The same for the difference relative to the oracle's value.
    pub rel: Spread,
    /// Root of the summed squares of the differences, divided by the root of the oracle's summed
    /// squares.
    #[serde(with = "number")]
    pub rel_rms: f64,
    /// Largest absolute difference of the plain algorithm in the same precision from the oracle,
    /// over several draws where few rows are compared. A kernel may have twice this difference.
    #[serde(with = "number")]
    pub plain_max_abs: f64,
    /// Requested bound on the largest absolute difference, if any.
    pub threshold: Option<f64>,
    /// Whether `abs.max` is within the threshold; true where none was given.
    pub within_threshold: bool,
    /// Whether the error is at most twice the plain algorithm's.
    pub within_twice: bool,
    /// Index of the worst element, `[b, h, i, d]` or `[b, h, i]`; `[b, n, feature]` of a module.
    pub worst_index: Vec<usize>,
    /// The kernel's value there.
    #[serde(with = "number")]
    pub worst_got: f64,
    /// The oracle's value there.
    #[serde(with = "number")]
    pub worst_expected: f64,
    /// How often each size of absolute difference occurs.
    pub abs_histogram: Histogram,
    /// How often each size of relative difference occurs.
    pub rel_histogram: Histogram,
}

impl Check {
    /// Whether both verdicts are good.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.within_threshold && self.within_twice
    }
}

/// Summary of many differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Largest.
    #[serde(with = "number")]
    pub max: f64,
    /// Mean.
    #[serde(with = "number")]
    pub mean: f64,
    /// Median.
    #[serde(with = "number")]
    pub median: f64,
}

/// Counts on a logarithmic scale. Bin `i` counts values from `10^(first + i / per_decade)`
/// to `10^(first + (i + 1) / per_decade)`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Histogram {
    /// Power of ten at which the first bin begins.
    pub first: i32,
    /// Bins of a power of ten.
    pub per_decade: u32,
    /// Values in each bin.
    pub counts: Vec<u64>,
    /// Values that are zero, which no bin holds.
    pub zeros: u64,
}

impl Histogram {
    /// The lower edge of bin `index`.
    #[must_use]
    pub fn bin_start(&self, index: usize) -> f64 {
        10f64.powf(f64::from(self.first) + index as f64 / f64::from(self.per_decade.max(1)))
    }
}

/// Values that are written as the text they display as and parse from.
pub(crate) mod text {
    use std::{fmt::Display, str::FromStr};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<T: Display, S: Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(d: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// Numbers that may not be finite. JSON has no number for such values, so they are written as
/// `"inf"`, `"-inf"` and `"NaN"`.
mod number {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Finite(f64),
        Text(String),
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    pub fn serialize<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { s.serialize_f64(*value) } else { s.collect_str(value) }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        match Number::deserialize(d)? {
            Number::Finite(value) => Ok(value),
            Number::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_reads_back_as_it_was() {
        let row = Row { dtype: DType::BF16, mean_ms: Some(1.5), ..Row::default() };
        let check = Check {
            kernel: "naive".into(),
            level: Level::Module,
            seq: 4,
            dtype: DType::F16,
            tensor: "y".into(),
            compared: 1,
            elements: 2,
            abs: Spread { max: 1e-9, mean: 1e-10, median: 0.0 },
            rel: Spread::default(),
            rel_rms: 2e-9,
            plain_max_abs: 0.1,
            threshold: None,
            within_threshold: true,
            within_twice: true,
            worst_index: vec![0, 1, 2, 3],
            worst_got: f64::NEG_INFINITY,
            worst_expected: 1.0,
            abs_histogram: Histogram { first: -9, per_decade: 4, counts: vec![1, 0], zeros: 3 },
            rel_histogram: Histogram::default(),
        };
        let results = Results { rows: vec![row], checks: vec![check], ..Results::default() };
        let json = serde_json::to_string(&results).unwrap();
        assert!(json.contains(r#""dtype":"bf16""#) && json.contains(r#""level":"module""#));
        assert_eq!(serde_json::from_str::<Results>(&json).unwrap(), results);
    }
}
