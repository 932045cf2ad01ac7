//! `compare --gpus` and `verify --gpus`: attention and its gradients shared by several GPUs, by
//! heads, by context and by both. Ranks are threads of this process, each with a GPU through NCCL,
//! or each with an emulator.

use std::sync::Arc;

use anyhow::Result;
use clap::{Args, ValueEnum};
use flash_attention::{
    DType, GpuDevice, Problem, Tensor,
    backend::Memory,
    oracle,
    registry::{find, find_backward},
    session::{Gradients, Inputs, Outputs},
    verify::{verify, verify_gradients},
};
use flash_attention_distributed::{
    Error as SeveralError, Grid, Share,
    communicator::{NcclCommunicator, ThreadCommunicator},
    emulated,
    engine::GpuEngine,
    measure::Times,
    nccl::Nccl,
    peers::{Peers, TIME_LIMIT},
    whole::{Run, Setup, all, on_threads, run_rank},
};

use crate::{
    failure::{Outcome, Usage},
    inputs::{cu_seqlens, gradient_of_o},
    machine,
    options::{Defaults, ProblemArgs},
    progress::print_lines,
    results::LevelChoice,
    table, values,
};

/// The most ranks: each is a thread, with a GPU or an emulator.
const MOST_RANKS: usize = 256;
/// On GPUs: enough work to hide the ring's transfers.
pub const ON_GPU: Defaults =
    Defaults { seq: &[32_768], batch: 1, heads: 16, head_dim: 128, dtype: DType::F16 };
/// Small enough for emulators.
pub const EMULATED: Defaults =
    Defaults { seq: &[128], batch: 1, heads: 4, head_dim: 32, dtype: DType::F16 };
/// The maximum number of tokens whose gradients are compared with f64: the cost of each grows with
/// a head's rows.
const MOST_TOKENS_OF_GRADIENTS: usize = 2048;
/// Timed runs unless given.
pub const RUNS: usize = 3;
/// Rows of O that are compared with f64, where there are more.
const ROWS: usize = 2048;

/// The way in which GPUs share attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Parallel {
    /// They divide the heads
    Heads,
    /// They divide the keys, in a ring
    Context,
    /// Two divide the heads, the ring links those pairs
    Both,
}

impl Parallel {
    const fn name(self) -> &'static str {
        match self {
            Self::Heads => "heads",
            Self::Context => "context",
            Self::Both => "both",
        }
    }

    /// The ranks for this number of GPUs; `None` where there are too few for both.
    fn grid(self, gpus: usize) -> Option<Grid> {
        match self {
            Self::Heads => Some(Grid::of_heads(gpus)),
            Self::Context => Some(Grid::of_context(gpus)),
            Self::Both if gpus >= 4 && gpus.is_multiple_of(2) => {
                Some(Grid { heads: 2, context: gpus / 2 })
            }
            Self::Both => None,
        }
    }
}

/// The options of both commands for several GPUs.
#[derive(Args, Clone, Debug)]
pub struct GpusArgs {
    /// Share attention between this many GPUs; on the CPU each is a thread with an emulator
    #[arg(long, value_name = "COUNT", value_parser = values::count)]
    pub gpus: Option<usize>,
    /// How they share it (--gpus), separated by commas: all that their number allows unless given
    #[arg(long, value_name = "WAY,…", value_delimiter = ',', requires = "gpus")]
    pub parallel: Option<Vec<Parallel>>,
}

/// One way to share one pass of one problem.
#[derive(Clone, Debug)]
pub struct GpusRow {
    /// How.
    pub parallel: &'static str,
    /// Ranks for heads and for context.
    pub grid: Grid,
    /// The pass.
    pub pass: &'static str,
    /// The times, if measured.
    pub times: Option<Times>,
    /// The speed, relative to the number of GPUs times one GPU's speed.
    pub efficiency: Option<f64>,
    /// The maximum bytes that a rank sends.
    pub sent: u64,
    /// The peak memory of a GPU, both passes together.
    pub peak: u64,
    /// The largest error of O, or of a gradient, where it was compared with f64.
    pub error: Option<f64>,
    /// Whether all are right by the 2x rule.
    pub passed: bool,
}

/// Refuses options that only a single device takes.
///
/// # Errors
/// The first one given.
pub fn refuse(options: &[(bool, &str)]) -> Result<(), Usage> {
    let reason = |option| format!("{option} is not for several GPUs: leave it or --gpus out");
    options
        .iter()
        .find(|(given, _)| *given)
        .map_or(Ok(()), |(_, option)| Err(Usage(reason(option))))
}

/// Runs either command: `timed_runs` of each pass, after both were verified.
///
/// # Errors
/// A wrong request; an error of a rank.
pub fn run(
    problem: &ProblemArgs,
    gpus: usize,
    parallel: Option<&[Parallel]>,
    (timed_runs, wide): (usize, bool),
) -> Result<Outcome> {
    if gpus > MOST_RANKS {
        let reason = format!("--gpus {gpus} is too many: one process has at most {MOST_RANKS}");
        return Err(Usage(reason).into());
    }
    let opened = machine::open(problem.device, problem.memory_limit)?;
    let emulated = opened.info.emulated;
    let defaults = if emulated { EMULATED } else { ON_GPU };
    let problems = problem.shape.problems(&defaults, LevelChoice::Backward)?;
    let each = [Parallel::Heads, Parallel::Context, Parallel::Both];
    let ways: Vec<(&str, Grid)> = match parallel {
        None => each.into_iter().filter_map(|way| Some((way.name(), way.grid(gpus)?))).collect(),
        Some(ways) => ways
            .iter()
            .map(|way| {
                let grid = way.grid(gpus).ok_or_else(|| {
                    Usage(format!(
                        "--parallel both needs an even number of GPUs from 4 on, not {gpus}"
                    ))
                })?;
                Ok((way.name(), grid))
            })
            .collect::<Result<_, Usage>>()?,
    };
    let ranks = if emulated { "threads with an emulator" } else { "GPUs through NCCL" };
    let of_times = if emulated && timed_runs > 0 {
        "\nEmulated times show nothing of GPUs; what is sent, and memory, is the same on any machine."
    } else {
        ""
    };
    // What cannot be shared is refused before the first line is printed.
    let one = (gpus > 1).then_some(("one", Grid::of_heads(1)));
    let grids: Vec<_> = one.into_iter().chain(ways).collect();
    let runs: Vec<_> = problems
        .iter()
        .map(|p| OfProblem::new(problem, p, &grids, timed_runs))
        .collect::<Result<_>>()?;
    print_lines(&format!("{opened}\n{gpus} ranks, {ranks}{of_times}"));
    let mut outcome = Outcome::Good;
    for run in &runs {
        let rows = run.rows(gpus, emulated)?;
        if rows.iter().any(|row| !row.passed) {
            outcome = Outcome::Bad;
        }
        let table = table::gpus(&rows, table::width(wide));
        print_lines(&format!("\nN = {}\n{table}", run.problem.seq_q()));
    }
    if timed_runs == 0 {
        let verdict =
            if outcome == Outcome::Good { "every way is right" } else { "NOT all are right" };
        print_lines(&format!("\nverdict: {verdict}"));
    }
    Ok(outcome)
}

struct OfProblem<'a> {
    problem: &'a Problem,
    seed: u64,
    /// Offsets of queries and of keys, where sequences are packed.
    lists: Option<[Vec<u32>; 2]>,
    /// Each way to share it, with its grid of ranks and their work.
    setups: Vec<(&'static str, Grid, Setup)>,
}

impl<'a> OfProblem<'a> {
    fn new(
        args: &ProblemArgs,
        problem: &'a Problem,
        grids: &[(&'static str, Grid)],
        timed_runs: usize,
    ) -> Result<Self> {
        let (p, seed) = (problem, args.shape.seed);
        let lists = p.varlen().map(|_| cu_seqlens(p.batch(), [p.seq_q(), p.seq_k()], seed));
        let setup = |grid| -> Result<Setup> {
            let share = match &lists {
                Some([q, k]) => Share::packed(*p, grid, [q, k])?,
                None => Share::new(*p, grid)?,
            };
            let mut setup = Setup { timed_runs, ..Setup::of(share) };
            setup.options.deterministic = args.shape.deterministic;
            for name in args.kernels.iter().flatten() {
                match (find(name), find_backward(name)) {
                    (Ok(kernel), _) => setup.options.kernel = Some(kernel),
                    (_, Ok(kernel)) => setup.options.backward = Some(kernel),
                    (Err(unknown), _) => return Err(unknown.into()),
                }
            }
            Ok(setup)
        };
        let setups = grids
            .iter()
            .map(|&(name, grid)| Ok((name, grid, setup(grid)?)))
            .collect::<Result<_>>()?;
        Ok(Self { problem, seed, lists, setups })
    }

    fn rows(&self, gpus: usize, emulated: bool) -> Result<Vec<GpusRow>> {
        let (p, seed) = (self.problem, self.seed);
        let draw =
            |shape: [usize; 4], at| Tensor::random(p.dtype(), &shape, seed.wrapping_add(at), 0.0);
        let (q, k, v) = (draw(p.q_shape(), 0), draw(p.k_shape(), 1), draw(p.v_shape(), 2));
        let d_o = gradient_of_o(p, seed);
        let with_gradients = p.seq_q().max(p.seq_k()) <= MOST_TOKENS_OF_GRADIENTS;
        let mut rows: Vec<GpusRow> = Vec::new();
        for (parallel, grid, setup) in &self.setups {
            let run = if emulated {
                emulated::run(setup, [&q, &k, &v], Some(&d_o))?
            } else {
                on_gpus(setup, [&q, &k, &v], &d_o)?
            };
            let mut inputs = Inputs::new(&q, &k, &v);
            if let Some([q, k]) = &self.lists {
                (inputs.cu_seqlens_q, inputs.cu_seqlens_k) = (Some(&q[..]), Some(&k[..]));
            }
            let outputs = Outputs { o: run.o.clone(), lse: run.lse.clone(), weights: None };
            let verdict = verify(p, &inputs, &outputs, &oracle::sample_rows(p, ROWS));
            let mut errors = [(Some(verdict.o.max_abs), verdict.passes()), (None, true)];
            if let (true, Some([dq, dk, dv])) = (with_gradients, run.gradients.clone()) {
                let gradients = Gradients { dq, dk, dv, d_bias: None, d_sinks: None };
                let heads: Vec<_> = (0..p.batch() * p.kv_heads()).collect();
                let verdict = verify_gradients(p, &inputs, &d_o, &gradients, &heads);
                let largest = verdict.each().map(|(_, d, _)| d.max_abs).fold(0.0, f64::max);
                errors[1] = (Some(largest), verdict.passes());
            }
            rows.extend(of_run(parallel, *grid, &run, errors));
        }
        let alone: Vec<_> = rows.iter().take(2).map(|row| row.times).collect();
        for row in rows.iter_mut().filter(|_| gpus > 1) {
            let at = usize::from(row.pass == "backward");
            row.efficiency = alone[at]
                .zip(row.times)
                .map(|(one, own)| one.all / own.all / row.grid.ranks() as f64);
        }
        Ok(rows)
    }
}

/// The rows of both passes.
fn of_run(
    parallel: &'static str,
    grid: Grid,
    run: &Run,
    errors: [(Option<f64>, bool); 2],
) -> [GpusRow; 2] {
    let row = |at: usize, pass| GpusRow {
        parallel,
        grid,
        pass,
        times: run.times[at],
        efficiency: None,
        sent: run.bytes_sent.iter().map(|sent| sent[at]).max().unwrap_or_default(),
        peak: run.peak_bytes.iter().copied().max().unwrap_or_default(),
        error: errors[at].0,
        passed: errors[at].1,
    };
    [row(0, "forward"), row(1, "backward")]
}

/// Runs ranks as threads, each on the GPU with the rank's number.
fn on_gpus(setup: &Setup, qkv: [&Tensor; 3], d_o: &Tensor) -> Result<Run> {
    let nccl = (setup.share.grid().ranks() > 1).then(Nccl::get).transpose()?;
    let rank = |peers: Peers| -> Result<_, SeveralError> {
        let gpu = peers.rank() as u32;
        let engine = GpuEngine::open(gpu)?;
        let memory = Memory::new(Arc::new(GpuDevice::open(gpu)?));
        match &nccl {
            Some(nccl) => {
                let communicator = NcclCommunicator::new(nccl.clone(), peers, &engine)?;
                run_rank(setup, qkv, Some(d_o), (&engine, &memory), &communicator)
            }
            None => {
                let alone = ThreadCommunicator::ranks(1, TIME_LIMIT).remove(0);
                run_rank(setup, qkv, Some(d_o), (&engine, &memory), &alone)
            }
        }
    };
    let peers = Peers::of_threads(setup.share.grid().ranks(), setup.limit);
    let ranks = on_threads(peers, rank);
    Ok(Run::join(&setup.share, &all(ranks)?))
}
