//! `decode`: a few queries against caches of several lengths, contiguous and paged. The command
//! verifies each cache against f64 and then times it, on a GPU over several copies of the cache in
//! turn, launched one by one and replayed from a graph. Peers do the same.

use std::{num::NonZeroU32, path::PathBuf};

use anyhow::Result;
use clap::Args;
use flash_attention::{
    DType, Error, Layout, Problem, Tensor, Window,
    backend::{Device, Instruments},
    registry::{self, Decode, Pages},
    session::{DecodeInputs, Inputs, Outputs, PreparedDecode, Session, Work, work},
    verify::{Verification, verify_decode_rows},
};
use serde::Serialize;

use crate::{
    failure::{Outcome, Usage},
    interrupt,
    machine::{self, DeviceChoice},
    options::{CacheArgs, ProblemArgs},
    output,
    peers::{self, DecodeJob, PYTHON, Peers},
    progress::{Progress, print_lines},
    results::Status,
    table, values,
};

/// Multiplications that attention in f64 may take per line; this limit sets the number of sampled
/// rows.
const BUDGET: usize = 1 << 30;
/// Timed runs on a GPU, and under the emulator.
const ITERS: [usize; 2] = [30, 1];
/// Launches back to back for each timed run, and the least number of launches of a graph.
const TOGETHER: usize = 20;
/// Between two reads of a copy of the cache come copies of as many bytes as this many L2 caches.
const COLD: u64 = 2;

/// The default values of options.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Keys.
    pub seq_k: &'static [usize],
    /// Keys of a page; 0 is a contiguous cache.
    pub page_size: &'static [usize],
    /// Heads, and heads of K and V.
    pub heads: [usize; 2],
    /// Features of a head.
    pub head_dim: usize,
}

/// On a GPU.
pub const ON_GPU: Defaults = Defaults {
    seq_k: &[4096, 32_768, 131_072],
    page_size: &[0, 16, 64, 256],
    heads: [32, 4],
    head_dim: 128,
};
/// Under the emulator.
pub const EMULATED: Defaults =
    Defaults { seq_k: &[256, 1000], page_size: &[0, 16], heads: [8, 2], head_dim: 64 };

impl std::fmt::Display for Defaults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seq_k, page_size, heads: [heads, kv_heads], head_dim } = self;
        let list = |numbers: &[usize]| {
            numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        };
        let (seq_k, page_size) = (list(seq_k), list(page_size));
        write!(
            f,
            "--seq-k {seq_k} --page-size {page_size} --heads {heads} --kv-heads {kv_heads} \
             --head-dim {head_dim}"
        )
    }
}

/// Arguments of `decode`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct DecodeCommandArgs {
    /// Keys of each sequence, separated by commas
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = values::count)]
    pub seq_k: Option<Vec<usize>>,
    /// Sequences
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = values::count)]
    pub batch: usize,
    /// Queries of each sequence: the last sees all keys, the one before all but the last
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = values::count)]
    pub queries: usize,
    /// Heads
    #[arg(long, value_name = "H", value_parser = values::count)]
    pub heads: Option<usize>,
    /// Heads of K and V, each shared by the same number of heads of Q
    #[arg(long, value_name = "H", value_parser = values::count)]
    pub kv_heads: Option<usize>,
    /// Features of a head
    #[arg(long, value_name = "D", value_parser = values::count)]
    pub head_dim: Option<usize>,
    /// Storage type of the tensors: f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = values::dtype)]
    pub dtype: DType,
    /// Let row i see only keys from i + Nk - Nq - L to i + Nk - Nq + R; -1 means no bound
    #[arg(long, value_name = "L,R", allow_hyphen_values = true, value_parser = values::window)]
    pub window: Option<Window>,
    /// Caches.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Timed runs
    #[arg(long, value_name = "COUNT", value_parser = values::runs)]
    pub iters: Option<usize>,
    /// Where to run: auto (a GPU if there is one), gpu, gpu:1 (a certain one) or cpu
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 42, value_parser = values::seed)]
    pub seed: u64,
    /// Memory of the emulator, such as 512MiB or 2GiB; half of the free memory unless given
    #[arg(long, value_name = "SIZE", value_parser = values::bytes)]
    pub memory_limit: Option<u64>,
    /// Run PyTorch, FlashAttention's CuTe kernel (contiguous caches) and FlashInfer (pages) beside the
    /// kernels, by graph replay, where python3 (or the Python that FLASH_ATTENTION_PYTHON names) has
    /// them: all of them, or the listed ones
    #[arg(long, value_name = "PEER,…", value_delimiter = ',', num_args = 0.., require_equals = true, value_parser = peers::DECODE_ON_GPU)]
    pub peers: Option<Vec<String>>,
    /// Print every column, however wide the terminal is
    #[arg(long)]
    pub wide: bool,
    /// Write the lines as a JSON array; - is standard output, and text goes to standard error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Rows to verify, where `verify` says how many.
    #[arg(skip)]
    pub rows: Option<usize>,
    /// Whether to measure times.
    #[arg(skip = true)]
    pub timed: bool,
}

impl DecodeCommandArgs {
    /// The arguments for the problem of `compare` or `verify` with `--level decode`.
    ///
    /// # Errors
    /// An option that is not for caches, or has more numbers than a decode has.
    pub fn of(problem: &ProblemArgs) -> Result<Self> {
        let ProblemArgs { shape, cache, kernels, device, memory_limit } = problem;
        refuse(&[
            (shape.tokens.is_some(), "--tokens"),
            (shape.hidden.is_some(), "--hidden"),
            (shape.head_dim_v.is_some(), "--head-dim-v"),
            (shape.softcap.is_some(), "--softcap"),
            (shape.alibi, "--alibi"),
            (shape.sinks, "--sinks"),
            (shape.varlen, "--varlen"),
            (shape.mask, "--mask"),
            (shape.dropout != 0.0, "--dropout"),
            (shape.deterministic, "--deterministic"),
            (kernels.is_some(), "--kernels"),
        ])?;
        let queries = match shape.seq.as_deref() {
            None => 1,
            Some(&[queries]) => queries,
            Some(_) => {
                let reason = "--seq has several numbers: --level decode has one number of queries";
                return Err(Usage(reason.into()).into());
            }
        };
        Ok(Self {
            seq_k: shape.seq_k.clone(),
            batch: shape.batch.unwrap_or(1),
            queries,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: shape.dtype.unwrap_or(DType::F16),
            window: shape.window,
            cache: cache.clone(),
            iters: None,
            device: *device,
            seed: shape.seed,
            memory_limit: *memory_limit,
            peers: None,
            wide: false,
            json: None,
            rows: None,
            timed: true,
        })
    }
}

/// Refuses options that caches do not have.
///
/// # Errors
/// The option.
pub fn refuse(options: &[(bool, &str)]) -> Result<()> {
    let Some((_, option)) = options.iter().find(|&&(given, _)| given) else { return Ok(()) };
    Err(Usage(format!("{option} is not for --level decode: leave it out")).into())
}

/// One cache, measured with one kernel.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DecodeRow {
    /// `decode`, or the name of a peer.
    pub kernel: String,
    /// Whether this is another library's implementation.
    pub peer: bool,
    /// How it ended.
    pub status: Status,
    /// The reason for a failure; empty otherwise.
    pub reason: String,
    /// Keys of each sequence.
    pub seq_k: usize,
    /// Keys of a page; 0 is a contiguous cache.
    pub page_size: usize,
    /// Parts that the keys of a sequence were split into, where they are known.
    pub splits: Option<u32>,
    /// Bytes of the keys and values that are read.
    pub cache_bytes: u64,
    /// Copies of the cache that back-to-back launches and replays read in turn.
    pub caches: usize,
    /// Median time from a cold L2 cache in milliseconds, where it was measured.
    pub median_ms: Option<f64>,
    /// Time of a launch among others, back to back, in milliseconds.
    pub sustained_ms: Option<f64>,
    /// Time of a launch in a replayed graph, in milliseconds. `None` under the emulator.
    pub replayed_ms: Option<f64>,
    /// The rate at which the keys and values are read, from a cold L2 cache, as a share of the
    /// GPU's memory copy rate, measured in the same run. `None` under the emulator.
    pub share_of_copy: Option<f64>,
    /// The same share of the replayed launches.
    pub replayed_share_of_copy: Option<f64>,
    /// Largest error of O, where there is an O.
    pub max_abs_err: Option<f64>,
    /// Whether O and the LSE are right by the 2x rule; of a peer O alone.
    pub passed: bool,
}

impl DecodeRow {
    /// Gigabytes of keys and values per second.
    #[must_use]
    pub fn rate(&self, ms: f64) -> f64 {
        self.cache_bytes as f64 / ms * 1e-6
    }

    /// Sets the shares of the rate at which the memory is copied.
    fn compare_with_copy(&mut self, copy_rate: Option<f64>) {
        let share = |ms: Option<f64>| copy_rate.zip(ms).map(|(rate, ms)| self.rate(ms) / rate);
        let shares = [share(self.median_ms), share(self.replayed_ms)];
        [self.share_of_copy, self.replayed_share_of_copy] = shares;
    }
}

/// One decode with several copies of the cache, each launch with the next copy.
struct Rotation {
    copies: Vec<PreparedDecode>,
    next: usize,
}

impl Work for Rotation {
    fn device(&self) -> &dyn Device {
        self.copies[0].device()
    }

    fn start(&mut self) -> std::result::Result<(), Error> {
        let copy = self.next;
        self.next = (copy + 1) % self.copies.len();
        self.copies[copy].start()
    }
}

/// Runs the command.
///
/// # Errors
/// An invalid request, a failed run, or a file that cannot be written; the lines are printed before
/// the file is written.
pub fn run(args: &DecodeCommandArgs) -> Result<Outcome> {
    let [json] = output::open_all([("--json", args.json.as_deref())])?;
    let opened = machine::open(args.device, args.memory_limit)?;
    let session = Session::new(opened.device.clone());
    let emulated = opened.info.emulated;
    let defaults = if emulated { EMULATED } else { ON_GPU };
    let decodes = decodes(args, &defaults)?;
    // A problem that cannot run is refused before anything is drawn.
    for decode in &decodes {
        let plan = registry::best_for(decode, &session.target())?.plan;
        let (needed, free) = (plan.peak_bytes(), opened.device.memory_info()?.free);
        if needed > free {
            return Err(Error::OutOfMemory { device: opened.device.name(), needed, free }.into());
        }
    }
    let names = args.peers.as_ref().map(|names| peers::decode_backends(emulated, names));
    let names = names.transpose()?;
    interrupt::listen();
    let instruments = opened.device.instruments().filter(|_| args.timed);
    let copy_rate = instruments.map_or(Ok(None), Instruments::copy_rate)?;
    print_lines(&heading(&opened, &decodes, copy_rate));
    let mut beside = names.and_then(|names| start_peers(&opened, args.device, names));
    let iters = args.iters.unwrap_or(ITERS[usize::from(emulated)]);
    let progress = Progress::new(decodes.len());
    let mut rows = Vec::new();
    for decode in &decodes {
        if interrupt::requested() {
            break;
        }
        let page_size = decode.pages().map_or(0, |pages| pages.page_size);
        progress.doing(format!("Nk {}, pages of {page_size}", decode.problem().seq_k()));
        let drawn = Drawn::new(decode, args.seed)?;
        let (mut row, outputs) = measure(&session, decode, &drawn, args, iters)?;
        row.compare_with_copy(copy_rate);
        let ours = row.clone();
        rows.push(row);
        if let Some(process) = &mut beside {
            progress.doing(format!("Nk {}, pages of {page_size}: peers", ours.seq_k));
            match measure_peers(process, decode, &drawn, (&ours, outputs), args, iters) {
                Ok(of_peers) => rows.extend(of_peers.into_iter().map(|mut row| {
                    row.compare_with_copy(copy_rate);
                    row
                })),
                Err(error) => {
                    progress.print(&format!("no further rows of peers: {error:#}"));
                    beside = None;
                }
            }
        }
        progress.step();
    }
    drop(progress);
    print_lines(&format!("\n{}", table::decodes(&rows, table::width(args.wide))));
    if let Some(json) = json {
        json.write(|file| Ok(serde_json::to_writer_pretty(file, &rows)?))?;
    }
    if interrupt::requested() {
        return Ok(Outcome::Interrupted);
    }
    let good = rows.iter().all(|row| row.passed || row.peer);
    // A peer's error is its own: it has a line with the reason.
    print_lines(if good && rows.iter().any(|row| row.peer) {
        "\nverdict: every line of decode is right"
    } else if good {
        "\nverdict: every line is right"
    } else {
        "\nverdict: WRONG, see above"
    });
    Ok(if good { Outcome::Good } else { Outcome::Bad })
}

fn heading(opened: &machine::Opened, decodes: &[Decode], copy_rate: Option<f64>) -> String {
    let mut text = opened.to_string();
    if opened.info.emulated {
        text += "\nEmulated times show the algorithm, not GPU speed.";
    }
    if let Some(p) = decodes.first().map(Decode::problem) {
        text += &format!(
            "\nbatch {}, heads {}/{}, head dim {}, {}, {} queries; GB/s of keys and values in {}",
            p.batch(),
            p.heads(),
            p.kv_heads(),
            p.head_dim(),
            p.dtype(),
            p.seq_q(),
            decodes.first().map_or(p.dtype(), Decode::stored)
        );
    }
    if let Some(rate) = copy_rate {
        text += &format!("\na copy of the GPU's memory: {rate:.0} GB/s, read and written");
    }
    text
}

/// The requested caches: every length with every page size.
fn decodes(args: &DecodeCommandArgs, defaults: &Defaults) -> Result<Vec<Decode>> {
    let seq_k = args.seq_k.as_deref().unwrap_or(defaults.seq_k);
    let page_sizes = args.cache.page_size.as_deref().unwrap_or(defaults.page_size);
    let [heads, kv_heads] = defaults.heads;
    let heads = args.heads.unwrap_or(heads);
    let kv_heads = args.kv_heads.unwrap_or(kv_heads);
    let head_dim = args.head_dim.unwrap_or(defaults.head_dim);
    let splits = args.cache.splits.and_then(NonZeroU32::new);
    let mut decodes = Vec::new();
    for &keys in seq_k {
        let problem = Problem::builder(args.batch, heads, args.queries, head_dim)
            .kv_heads(kv_heads)
            .seq_k(keys)
            .dtype(args.dtype)
            .causal(true)
            .window(args.window.unwrap_or_default())
            .layout(Layout::TokensFirst)
            .build()?;
        for &page_size in page_sizes {
            let decode = if page_size == 0 {
                Decode::new(problem)
            } else {
                let number = |n: usize, of: &str| {
                    let wrong = || Usage(format!("{of}: {n} is more than {}", u32::MAX));
                    u32::try_from(n).map_err(|_| wrong())
                };
                let all_pages = format!("pages of {page_size} keys");
                let max_pages = keys.div_ceil(page_size);
                Decode::paged(
                    problem,
                    Pages {
                        page_size: number(page_size, "--page-size")?,
                        pages: number(args.batch.saturating_mul(max_pages), &all_pages)?,
                        max_pages: number(max_pages, &all_pages)?,
                    },
                )?
            };
            let decode = decode.cache_dtype(args.cache.cache_dtype.unwrap_or(args.dtype))?;
            decodes.push(decode.splits(splits));
        }
    }
    Ok(decodes)
}

/// The inputs of a decode, drawn.
struct Drawn {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Vec<i32>,
    table: Option<Vec<i32>>,
    /// Of the heads, where the cache has scales.
    scales: Option<Vec<f32>>,
}

impl Drawn {
    fn new(decode: &Decode, seed: u64) -> Result<Self> {
        let p = decode.problem();
        let draw = |dtype, shape: [usize; 4], stream: u64| {
            Tensor::random(dtype, &shape, seed.wrapping_mul(3).wrapping_add(stream), 0.0)
        };
        let stored = decode.stored();
        // Any scales will do that are no powers of two.
        let scales = || (0..p.kv_heads()).map(|h| 0.75 + h as f32 / 64.0).collect();
        Ok(Self {
            q: draw(p.dtype(), p.q_shape(), 0),
            k: draw(stored, decode.k_shape(), 1),
            v: draw(stored, decode.v_shape(), 2),
            lengths: vec![i32::try_from(p.seq_k())?; p.batch()],
            table: decode.pages().map(|pages| shuffled(pages.pages, seed)),
            scales: decode.has_scales().then(scales),
        })
    }

    fn inputs(&self) -> DecodeInputs<'_> {
        DecodeInputs {
            tensors: Inputs::new(&self.q, &self.k, &self.v),
            seqused_k: Some(&self.lengths),
            page_table: self.table.as_deref(),
            scales: self.scales.as_deref().map(|scales| [scales, scales]),
        }
    }
}

/// How many rows are compared with f64.
fn rows_to_verify(decode: &Decode, args: &DecodeCommandArgs) -> usize {
    let p = decode.problem();
    let affordable = (BUDGET / (p.seq_k() * (p.head_dim() + p.head_dim_v())).max(1)).max(64);
    args.rows.unwrap_or(affordable)
}

/// Copies of a cache that leave an L2 cache cold for each read, where that many fit in free memory; at
/// least two.
fn copies(cache_bytes: u64, l2_bytes: u64, copies_that_fit: u64) -> usize {
    let between = (COLD * l2_bytes).div_ceil(cache_bytes.max(1)).max(1);
    (1 + between).min(copies_that_fit.max(1)) as usize
}

/// Verifies one decode, and times it if asked to. Gives O and LSE too.
fn measure(
    session: &Session,
    decode: &Decode,
    drawn: &Drawn,
    args: &DecodeCommandArgs,
    iters: usize,
) -> Result<(DecodeRow, Outputs)> {
    let (p, inputs, device) = (decode.problem(), drawn.inputs(), session.device());
    let plan = registry::best_for(decode, &session.target())?.plan;
    let mut prepared = session.prepare_decode(plan.clone(), &inputs)?;
    prepared.launch()?;
    let outputs = prepared.outputs()?;
    let verification = verify_decode_rows(decode, &inputs, &outputs, rows_to_verify(decode, args))?;
    let cache_bytes = decode.cache_bytes(std::iter::repeat_n(p.seq_k(), p.batch()));
    let Verification { o, .. } = &verification;
    let mut row = DecodeRow {
        kernel: "decode".into(),
        seq_k: p.seq_k(),
        page_size: decode.pages().map_or(0, |pages| pages.page_size as usize),
        splits: Some(plan.splits()),
        cache_bytes,
        caches: 1,
        max_abs_err: Some(o.max_abs),
        passed: verification.passes(),
        ..DecodeRow::default()
    };
    if !args.timed {
        return Ok((row, outputs));
    }
    row.median_ms = median(work::time_ms(device, &mut prepared, 1, iters)?);
    let mut rotation = Rotation { copies: vec![prepared], next: 0 };
    if let Some(l2_bytes) = device.instruments().and_then(Instruments::l2_bytes) {
        // Half of what is free: peers need the other.
        let fit = 1 + device.memory_info()?.free / (2 * plan.peak_bytes()).max(1);
        row.caches = copies(cache_bytes, l2_bytes, fit);
        while rotation.copies.len() < row.caches {
            rotation.copies.push(session.prepare_decode(plan.clone(), &inputs)?);
        }
        // A launch of each is behind it, so that a graph has nothing but their kernels.
        (1..row.caches).try_for_each(|copy| rotation.copies[copy].launch())?;
    }
    let runs = if device.is_emulated() { 1 } else { TOGETHER * iters };
    row.sustained_ms = Some(work::sustained_ms(device, &mut rotation, runs)?);
    let together = in_a_graph(row.caches);
    row.replayed_ms = work::replayed_ms(device, &mut rotation, together, runs)?;
    Ok((row, outputs))
}

/// The median of times; of two in the middle the longer.
fn median(mut times: Vec<f64>) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}

/// Launches of a graph: every copy of the cache as often.
const fn in_a_graph(caches: usize) -> usize {
    TOGETHER.div_ceil(caches) * caches
}

/// Starts the peers' process, or says in one line why peers will have no rows.
fn start_peers(
    opened: &machine::Opened,
    choice: DeviceChoice,
    names: Vec<&'static str>,
) -> Option<Peers> {
    match Peers::start(opened.info.emulated, choice, names) {
        Ok(peers) => {
            let (names, version) = (peers.backends().join(", "), peers.version());
            print_lines(&format!("peers: {names}, with PyTorch {version}, on the same caches"));
            Some(peers)
        }
        Err(error) => {
            print_lines(&format!(
                "no rows of peers: {error:#}; {PYTHON} names a Python that has them"
            ));
            None
        }
    }
}

/// The peers' rows beside ours, over as many copies of the cache.
fn measure_peers(
    peers: &mut Peers,
    decode: &Decode,
    drawn: &Drawn,
    (ours, outputs): (&DecodeRow, Outputs),
    args: &DecodeCommandArgs,
    iters: usize,
) -> Result<Vec<DecodeRow>> {
    let together = in_a_graph(ours.caches);
    let job = DecodeJob {
        stored: decode.stored().to_string(),
        window: args.window.is_some(),
        page_size: ours.page_size,
        page_table: drawn.table.as_deref(),
        caches: ours.caches,
        together,
        replays: (TOGETHER * iters).div_ceil(together),
        iters,
    };
    let mut rows = Vec::new();
    for measured in peers.measure_decode(decode.problem(), [&drawn.q, &drawn.k, &drawn.v], &job)? {
        let mut row = DecodeRow {
            kernel: measured.name,
            peer: true,
            status: measured.status,
            reason: measured.reason,
            splits: measured.splits,
            median_ms: median(measured.times_ms),
            sustained_ms: None,
            replayed_ms: measured.replayed_ms,
            max_abs_err: None,
            passed: false,
            ..ours.clone()
        };
        if let Some(o) = measured.outputs.into_iter().next() {
            // A peer gives no LSE: ours has passed or failed on its own row.
            let outputs = Outputs { o, lse: outputs.lse.clone(), weights: None };
            let rows = rows_to_verify(decode, args);
            let verification = verify_decode_rows(decode, &drawn.inputs(), &outputs, rows)?;
            row.max_abs_err = Some(verification.o.max_abs);
            let limit = &verification.credit.o;
            row.passed = limit.allows(verification.o.max_abs);
            if !row.passed {
                row.status = Status::Failed;
                let (error, limit) = (verification.o.max_abs, limit.limit());
                row.reason = format!("O is wrong: an error of {error:.1e}, limit {limit:.1e}");
            }
        }
        rows.push(row);
    }
    Ok(rows)
}

/// The numbers of all pages in random order.
fn shuffled(pages: u32, seed: u64) -> Vec<i32> {
    let draws = Tensor::random(DType::F32, &[pages as usize], !seed, 0.0).to_f32();
    let mut order: Vec<i32> = (0..pages).map(|page| page as i32).collect();
    order.sort_by(|&a, &b| draws[a as usize].total_cmp(&draws[b as usize]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_reads_of_a_copy_lie_two_caches_of_the_gpu() {
        const MIB: u64 = 1 << 20;
        // 8 MiB in a GPU with an L2 of 50: 100 MiB are twelve and a half copies more.
        assert_eq!(copies(8 * MIB, 50 * MIB, 1000), 14);
        assert_eq!(copies(8 * MIB, 50 * MIB, 3), 3);
        // A copy that evicts everything, the other.
        assert_eq!((copies(268 * MIB, 50 * MIB, 1000), copies(268 * MIB, 50 * MIB, 1)), (2, 1));
        assert_eq!(copies(0, 0, 1000), 2);
        assert_eq!([1, 2, 14, 33].map(in_a_graph), [20, 20, 28, 33]);
    }
}
