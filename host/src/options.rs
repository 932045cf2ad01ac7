//! The options that `compare` and `verify` share, and the defaults of each device.

use std::fmt;

use anyhow::Result;
use clap::Args;
use flash_attention::{
    Alibi, DType, Dropout, Error, Problem, Varlen, Window,
    error::Unsupported,
    problem::head_dim_of,
    registry::{Operation as _, Target},
};

use crate::{
    failure::Usage,
    inputs::cu_seqlens,
    machine::DeviceChoice,
    results::{Level, LevelChoice, Options},
    subject::{Kernel, Kind, kind},
    values,
};

/// The problem that a command runs.
#[derive(Args, Clone, Debug)]
pub struct ShapeArgs {
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
    /// Heads of K and V, each shared by the same number of heads of Q; as many as Q has unless
    /// given
    #[arg(long, value_name = "H", value_parser = values::count)]
    pub kv_heads: Option<usize>,
    /// Keys; as many as queries unless given. With --level decode several, separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = values::count)]
    pub seq_k: Option<Vec<usize>>,
    /// Features over all heads; divided by the heads it is the head dim
    #[arg(long, value_name = "SIZE", value_parser = values::count, conflicts_with = "head_dim")]
    pub hidden: Option<usize>,
    /// Features of a head
    #[arg(long, value_name = "D", value_parser = values::count)]
    pub head_dim: Option<usize>,
    /// Features of a head of V and O; as many as of Q and K unless given
    #[arg(long, value_name = "D", value_parser = values::count)]
    pub head_dim_v: Option<usize>,
    /// Storage type of the tensors: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", value_parser = values::dtype)]
    pub dtype: Option<DType>,
    /// Let row i see only keys up to i + Nk - Nq
    #[arg(long)]
    pub causal: bool,
    /// Let row i see only keys from i + Nk - Nq - L to i + Nk - Nq + R; -1 means no bound
    #[arg(long, value_name = "L,R", allow_hyphen_values = true, value_parser = values::window)]
    pub window: Option<Window>,
    /// Cap scores: C tanh(s / C) replaces s
    #[arg(long, value_name = "C", value_parser = values::number)]
    pub softcap: Option<f32>,
    /// Lower scores with the distance of row and key (ALiBi), by the usual slope of each head,
    /// 2^(-8 h / H)
    #[arg(long)]
    pub alibi: bool,
    /// Give each head a random score that joins the sum of its rows' weights and has no value
    #[arg(long)]
    pub sinks: bool,
    /// Pack sequences of random lengths, up to N, one after the other without padding
    #[arg(long, conflicts_with = "mask")]
    pub varlen: bool,
    /// Hide a random tail of each batch entry's keys, up to half of them
    #[arg(long)]
    pub mask: bool,
    /// Drop attention weights with this probability
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = values::number)]
    pub dropout: f32,
    /// Ask for gradients with the same bits each time (--level backward)
    #[arg(long)]
    pub deterministic: bool,
    /// Seed of the random inputs and of dropout
    #[arg(long, default_value_t = 42, value_parser = values::seed)]
    pub seed: u64,
}

/// The options of caches.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Caches (--level decode)")]
pub struct CacheArgs {
    /// Keys of a page, separated by commas; 0 is a contiguous cache
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = values::count_or_none)]
    pub page_size: Option<Vec<usize>>,
    /// Storage type of the cache: the tensors', or e4m3 with a scale for each head of K and of V
    #[arg(long, value_name = "TYPE", value_parser = values::dtype)]
    pub cache_dtype: Option<DType>,
    /// Split the keys of a sequence into this many parts, in place of the number with the least cost
    #[arg(long, value_name = "COUNT", value_parser = values::splits)]
    pub splits: Option<u32>,
}

impl CacheArgs {
    /// Refuses options of caches at another level.
    ///
    /// # Errors
    /// The option.
    pub fn refuse(&self) -> Result<()> {
        let given = [
            (self.page_size.is_some(), "--page-size"),
            (self.cache_dtype.is_some(), "--cache-dtype"),
            (self.splits.is_some(), "--splits"),
        ];
        let Some((_, option)) = given.into_iter().find(|&(given, _)| given) else { return Ok(()) };
        Err(Usage(format!("{option} is for caches: add --level decode")).into())
    }
}

/// The options of both `compare` and `verify`.
#[derive(Args, Clone, Debug)]
pub struct ProblemArgs {
    /// The problem.
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Caches.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Kernels by name, separated by commas; every kernel of the level unless given
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = values::kernel())]
    pub kernels: Option<Vec<String>>,
    /// Where to run: auto (a GPU if there is one), gpu, gpu:1 (a certain one) or cpu
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Memory of the emulator, such as 512MiB or 2GiB; half of the free memory unless given
    #[arg(long, value_name = "SIZE", value_parser = values::bytes)]
    pub memory_limit: Option<u64>,
}

/// The default values of options.
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

impl ShapeArgs {
    /// The problems, one per sequence length, checked.
    ///
    /// # Errors
    /// The wrong value and the right one.
    pub fn problems(&self, defaults: &Defaults, level: LevelChoice) -> Result<Vec<Problem>> {
        let of_attention = [
            (self.kv_heads.is_some(), "--kv-heads"),
            (self.seq_k.is_some(), "--seq-k"),
            (self.head_dim_v.is_some(), "--head-dim-v"),
            (self.alibi, "--alibi"),
            (self.sinks, "--sinks"),
            (self.varlen, "--varlen"),
        ];
        if let Some((_, option)) = of_attention.into_iter().find(|&(given, _)| given)
            && level.levels().any(Level::is_module)
        {
            let reason = format!("{option} is not for the module: add --level attention");
            return Err(Usage(reason).into());
        }
        if self.deterministic && !level.levels().any(Level::is_backward) {
            let reason = "--deterministic is for gradients: add --level backward";
            return Err(Usage(reason.into()).into());
        }
        let seq_k = match self.seq_k.as_deref() {
            None => None,
            Some(&[keys]) => Some(keys),
            Some(_) => {
                let reason = "--seq-k has several numbers, for caches: add --level decode";
                return Err(Usage(reason.into()).into());
            }
        };
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
            let (batch, seq_k) = (batch(n)?, seq_k.unwrap_or(n));
            let totals = || {
                let [total_q, total_k] = cu_seqlens(batch, [n, seq_k], self.seed)
                    .map(|at| at.last().map_or(0, |&end| end as usize));
                Varlen { total_q, total_k }
            };
            let builder = Problem::builder(batch, heads, n, head_dim)
                .dtype(self.dtype.unwrap_or(defaults.dtype))
                .kv_heads(self.kv_heads.unwrap_or(heads))
                .seq_k(seq_k)
                .varlen(self.varlen.then(totals))
                .head_dim_v(self.head_dim_v.unwrap_or(head_dim))
                .causal(self.causal)
                .window(self.window.unwrap_or_default())
                .softcap(self.softcap)
                .alibi(self.alibi.then_some(Alibi::PerHead))
                .sinks(self.sinks)
                .mask(self.mask)
                .dropout(Some(Dropout { p: self.dropout, seed: self.seed }));
            Ok(builder.build()?)
        };
        seq.iter().map(problem).collect()
    }
}

impl ProblemArgs {
    /// The kind of a level, with these options.
    #[must_use]
    pub fn kind(&self, level: Level) -> &'static dyn Kind {
        kind(level, self.shape.deterministic)
    }

    /// The kernels of the levels, which all have the same kernels, in the order of the ladder or in
    /// the requested order. A kernel that supports none of the problems stays in the list, as long
    /// as another supports one.
    ///
    /// # Errors
    /// An unknown kernel, a kernel listed twice, or no kernel that supports any of the problems.
    pub fn chosen_kernels(
        &self,
        problems: &[Problem],
        target: &Target,
        levels: LevelChoice,
    ) -> Result<Vec<Kernel>> {
        let Some(kind) = levels.levels().next().map(|level| self.kind(level)) else {
            return Ok(Vec::new());
        };
        let all = kind.kernels();
        let mut kernels: Vec<Kernel> = Vec::new();
        match &self.kernels {
            None => kernels.extend(&all),
            Some(names) => {
                for name in names {
                    let Some(kernel) = all.iter().find(|kernel| kernel.name == name) else {
                        let level = kind.level();
                        let known = all.iter().map(|kernel| kernel.name).collect::<Vec<_>>();
                        let known = known.join(", ");
                        let reason =
                            format!("{name} is no kernel of --level {level}: it has {known}");
                        return Err(Usage(reason).into());
                    };
                    if kernels.iter().any(|k| k.name == kernel.name) {
                        let reason = format!("kernel {name} is listed twice: list it once");
                        return Err(Usage(reason).into());
                    }
                    kernels.push(*kernel);
                }
            }
        }
        let supports =
            |kernel: &Kernel, problem| match kind.needed_bytes(kernel.name, problem, target) {
                Err(Error::Unsupported(obstacle)) => Err(obstacle),
                _ => Ok(()),
            };
        let obstacles =
            || kernels.iter().flat_map(|k| problems.iter().map(move |p| supports(k, p)));
        if obstacles().all(|obstacle| obstacle.is_err()) {
            if self.kernels.is_none() {
                problems.iter().try_for_each(Problem::check_sizes)?;
            }
            obstacles().collect::<Result<(), Unsupported>>()?;
        }
        Ok(kernels)
    }

    /// The problems' record in results.
    #[must_use]
    pub fn recorded(&self, problems: &[Problem], kernels: &[Kernel]) -> Options {
        let Some(first) = problems.first() else { return Options::default() };
        Options {
            seq: problems.iter().map(Problem::seq_q).collect(),
            tokens: self.shape.tokens,
            problem: first.into(),
            kernels: kernels.iter().map(|k| k.name.to_owned()).collect(),
            seed: self.shape.seed,
            deterministic: self.shape.deterministic,
            ..Options::default()
        }
    }
}
