//! Attention on 1 to 8 GPUs: time, what of the transfers is hidden, efficiency, memory, and whether the
//! result is that of one GPU.
//!
//! ```text
//! flash-attention-scaling --ranks 2                       a process for each GPU, through NCCL
//! flash-attention-scaling --ranks 2 --one-gpu             threads on streams of the first GPU
//! flash-attention-scaling --ranks 2 --kill 1              rank 1 ends in the middle: what the others say
//! flash-attention-scaling --ranks 2 --hang 1              rank 1 stands still
//! flash-attention-scaling --model           the tables of the chapter, from the model
//!   --tokens 32768,131072   --kv-heads 16,8   --grids heads,context,both   --masks full,causal
//!   --deterministic         gradients with the same bits each time
//!   --no-check              without the run on one GPU that results are compared with
//!   --limit 60              seconds that a rank may keep the others waiting
//! ```

use std::{
    env,
    process::{Command, ExitCode},
    sync::Arc,
    time::{Duration, Instant},
};

use flash_attention::{
    DType, GpuDevice, Problem,
    backend::{DeviceBuffer, Memory},
    half::f16,
    raw::Region,
};
use flash_attention_distributed::{
    Attention, Error, Grid, Share,
    attention::{self, BackwardTensors, ForwardTensors},
    communicator::{Communicator, NcclCommunicator, ThreadCommunicator, Transfer},
    engine::{Engine, GpuEngine},
    measure::{Times, Transfers, WithoutComputation, WithoutTransfers},
    model::{H200, Work, table},
    nccl::Nccl,
    peers::Peers,
    whole::on_threads,
};

const HEADS: usize = 16;
const D: usize = 128;
/// Rows of random numbers that tensors repeat, a prime, so that heads differ.
const PATTERN: usize = 4093;

#[derive(Clone, Debug)]
struct Options {
    ranks: usize,
    one_gpu: bool,
    model: bool,
    kill: Option<usize>,
    hang: Option<usize>,
    tokens: Vec<usize>,
    kv_heads: Vec<usize>,
    grids: Vec<String>,
    masks: Vec<String>,
    deterministic: bool,
    check: bool,
    limit: Duration,
}

impl Options {
    /// Both passes of a rank.
    fn attention(
        &self,
        share: &Share,
        rank: usize,
        engine: &GpuEngine,
    ) -> Result<Attention, Error> {
        let kernels =
            attention::Options { deterministic: self.deterministic, ..Default::default() };
        Attention::with(share, rank, &engine.target(), kernels)?.with_backward()
    }
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        ranks: 1,
        one_gpu: false,
        model: false,
        kill: None,
        hang: None,
        tokens: vec![32 << 10, 128 << 10, 512 << 10],
        kv_heads: vec![16, 8],
        grids: ["heads", "context", "both"].map(String::from).to_vec(),
        masks: ["full", "causal"].map(String::from).to_vec(),
        deterministic: false,
        check: true,
        limit: Duration::from_secs(60),
    };
    let mut arguments = env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{name} needs a value"));
        let number = |text: String| text.parse::<usize>().map_err(|_| format!("no number: {text}"));
        let numbers = |text: String| -> Result<Vec<usize>, String> {
            text.split(',').map(|n| number(n.into())).collect()
        };
        let words = |text: String| text.split(',').map(String::from).collect();
        match &name[..] {
            "--ranks" => options.ranks = number(value()?)?,
            "--one-gpu" => options.one_gpu = true,
            "--model" => options.model = true,
            "--kill" => options.kill = Some(number(value()?)?),
            "--hang" => options.hang = Some(number(value()?)?),
            "--tokens" => options.tokens = numbers(value()?)?,
            "--kv-heads" => options.kv_heads = numbers(value()?)?,
            "--grids" => options.grids = words(value()?),
            "--masks" => options.masks = words(value()?),
            "--deterministic" => options.deterministic = true,
            "--no-check" => options.check = false,
            "--limit" => options.limit = Duration::from_secs(number(value()?)? as u64),
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    if options.model {
        for tokens in [4 << 10, 32 << 10] {
            println!("{}k tokens for each GPU\n\n{}", tokens >> 10, table(&H200, tokens));
        }
        return ExitCode::SUCCESS;
    }
    let done = if env::var_os("RANK").is_some() {
        process(&options)
    } else if options.one_gpu {
        threads(&options)
    } else {
        return spawn(&options);
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rank {}: error: {error}", env::var("RANK").unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// Starts a process for each rank, as a launcher does.
fn spawn(options: &Options) -> ExitCode {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map_or(29_500, |address| address.port() - 1);
    let start = |rank: usize| {
        Command::new(env::current_exe()?)
            .args(env::args().skip(1))
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", options.ranks.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .spawn()
    };
    let children: std::io::Result<Vec<_>> = (0..options.ranks).map(start).collect();
    match children {
        Ok(children) => {
            let mut all_well = true;
            for mut child in children {
                all_well &= child.wait().is_ok_and(|status| status.success());
            }
            if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: starting a rank: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A rank that is a process with a GPU.
fn process(options: &Options) -> Result<(), Error> {
    let local = env::var("LOCAL_RANK").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let engine = GpuEngine::open(local)?;
    let memory = Memory::new(Arc::new(GpuDevice::open(local)?));
    let peers = Peers::from_environment(options.limit)?;
    let nccl = Nccl::get()?;
    if peers.rank() == 0 {
        let (major, minor, patch) = nccl.version();
        println!(
            "{}, NCCL {major}.{minor}.{patch} of {}",
            memory.device().name(),
            nccl.path().display()
        );
    }
    let communicator = NcclCommunicator::new(nccl, peers, &engine)?;
    bandwidth(&engine, &memory, &communicator)?;
    rank(options, &engine, &memory, &communicator)
}

/// Ranks that are threads on one GPU.
fn threads(options: &Options) -> Result<(), Error> {
    let first = GpuEngine::open(0)?;
    let communicators = ThreadCommunicator::ranks(options.ranks, options.limit).into_iter();
    let ranks = communicators.map(|communicator| Ok((communicator, first.sibling()?)));
    let ranks: Vec<_> = ranks.collect::<Result<_, Error>>()?;
    let ended = on_threads(ranks, |(communicator, engine)| {
        let memory = Memory::new(Arc::new(GpuDevice::open(0)?));
        rank(options, &engine, &memory, &communicator)
    });
    let mut failed = Vec::new();
    for (rank, ended) in ended.into_iter().enumerate() {
        if let Err(error) = ended {
            eprintln!("rank {rank}: error: {error}");
            failed.push(error);
        }
    }
    failed.pop().map_or(Ok(()), Err)
}

/// Measures the rate at which NCCL moves bytes from each rank to the next and back at once.
fn bandwidth(
    engine: &GpuEngine,
    memory: &Arc<Memory>,
    communicator: &NcclCommunicator,
) -> Result<(), Error> {
    let peers = communicator.peers();
    let (rank, world) = (peers.rank(), peers.world());
    if world == 1 {
        return Ok(());
    }
    for bytes in [1 << 20, 16 << 20, 64 << 20, 256 << 20] {
        let (from, to) = (memory.filled(bytes, 1)?, memory.filled(bytes, 0)?);
        memory.device().synchronize()?;
        let transfers = [
            Transfer::send((rank + 1) % world, from.region()),
            Transfer::receive((rank + world - 1) % world, to.region()),
        ];
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            peers.gather(&[])?;
            let runs = 10;
            let start = engine.now()?;
            engine.fork()?;
            for _ in 0..runs {
                // SAFETY: the buffers are live until the ranks are done.
                unsafe { communicator.exchange(engine, &transfers) }?;
            }
            engine.join(&engine.mark()?)?;
            let end = engine.now()?;
            communicator.finish(engine)?;
            best = best.min(engine.elapsed_ms(&start, &end)? / f64::from(runs));
        }
        if rank == 0 {
            println!(
                "NCCL, {} MiB to the next rank and from the one before: {best:.3} ms, {:.0} GB/s each way",
                bytes >> 20,
                bytes as f64 / best / 1e6
            );
        }
    }
    Ok(())
}

/// A case of the table.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    kv_heads: usize,
    causal: bool,
    grid: Grid,
}

impl Case {
    fn problem(&self) -> Result<Problem, Error> {
        let builder = Problem::builder(1, HEADS, self.tokens, D).kv_heads(self.kv_heads);
        Ok(builder.dtype(DType::F16).causal(self.causal).build()?)
    }
}

fn grids(options: &Options) -> Vec<Grid> {
    let ranks = options.ranks;
    let of = |name: &String| match &name[..] {
        "heads" => Some(Grid::of_heads(ranks)),
        "context" => Some(Grid::of_context(ranks)),
        // Two ranks have no two of both.
        "both" => (ranks >= 4).then_some(Grid { heads: 2, context: ranks / 2 }),
        _ => None,
    };
    options.grids.iter().filter_map(of).collect()
}

fn rank<C: Communicator<GpuEngine>>(
    options: &Options,
    engine: &GpuEngine,
    memory: &Arc<Memory>,
    communicator: &C,
) -> Result<(), Error> {
    let peers = communicator.peers();
    if peers.rank() == 0 {
        println!(
            "| tokens | KV heads | mask | heads x context | pass | ms | one GPU ms | speed-up | \
             efficiency | model | transfers ms | hidden | MiB sent | GB/s | peak MiB | repeats | differs by |"
        );
        println!("|{}", "---|".repeat(17));
    }
    for &tokens in &options.tokens {
        for &kv_heads in &options.kv_heads {
            for mask in &options.masks {
                let mut alone = None;
                for grid in grids(options) {
                    let case = Case { tokens, kv_heads, causal: mask == "causal", grid };
                    measure(options, &case, &mut alone, engine, memory, communicator)?;
                }
            }
        }
    }
    Ok(())
}

/// One rank's tensors.
struct Tensors {
    inputs: [DeviceBuffer; 4],
    outputs: [DeviceBuffer; 5],
    workspace: DeviceBuffer,
}

impl Tensors {
    fn of(attention: &Attention, memory: &Arc<Memory>) -> Result<Self, Error> {
        let (share, rank) = (attention.share(), attention.rank());
        let p = share.problem();
        let [n, m] = attention.local_rows();
        let rows = |of: Vec<std::ops::Range<usize>>| of.into_iter().flatten().collect::<Vec<_>>();
        let (q_rows, k_rows) = (rows(share.q_rows(rank)), rows(share.k_rows(rank)));
        let input = |heads: usize, rows: &[usize], seed: u64| {
            let pattern = pattern(seed);
            let mut data: Vec<u16> = Vec::with_capacity(heads * rows.len() * D);
            for h in 0..heads {
                for row in rows {
                    let at = (row * 31 + h * 97) % PATTERN * D;
                    data.extend_from_slice(&pattern[at..at + D]);
                }
            }
            memory.upload(&data)
        };
        let inputs = [
            input(p.heads(), &q_rows, 1)?,
            input(p.kv_heads(), &k_rows, 2)?,
            input(p.kv_heads(), &k_rows, 3)?,
            input(p.heads(), &q_rows, 4)?,
        ];
        let poisoned = |bytes: usize| memory.filled(bytes as u64, 0xff);
        let (q, k) = (p.heads() * n * D * 2, p.kv_heads() * m * D * 2);
        let outputs =
            [poisoned(q)?, poisoned(p.heads() * n * 4)?, poisoned(q)?, poisoned(k)?, poisoned(k)?];
        let workspace = memory.filled(attention.workspace_bytes(), 0)?;
        memory.device().synchronize()?;
        Ok(Self { inputs, outputs, workspace })
    }

    fn forward(&self) -> ForwardTensors {
        let region = DeviceBuffer::region;
        let [q, k, v, _] = &self.inputs;
        let [o, lse, ..] = &self.outputs;
        ForwardTensors { q: region(q), k: region(k), v: region(v), o: region(o), lse: region(lse) }
    }

    fn backward(&self) -> BackwardTensors {
        let region = DeviceBuffer::region;
        let [.., dq, dk, dv] = &self.outputs;
        BackwardTensors {
            forward: self.forward(),
            d_o: region(&self.inputs[3]),
            dq: region(dq),
            dk: region(dk),
            dv: region(dv),
        }
    }

    /// The bytes of O, the LSE and the gradients.
    fn results(&self) -> Result<[Vec<u16>; 5], Error> {
        let [o, lse, dq, dk, dv] = &self.outputs;
        Ok([o.to_vec()?, lse.to_vec()?, dq.to_vec()?, dk.to_vec()?, dv.to_vec()?])
    }
}

/// Rows of numbers about normal, with a mean for V.
fn pattern(seed: u64) -> Vec<u16> {
    let mean = if seed == 3 { 0.5 } else { 0.0 };
    let tensor = flash_attention::Tensor::random(DType::F16, &[PATTERN, D], seed, mean);
    tensor.as_bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

/// One GPU alone: milliseconds of both passes, and the results.
struct Alone {
    ms: [f64; 2],
    results: [Vec<u16>; 5],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

/// Starts a pass.
///
/// # Safety
/// The tensors are live until the ranks are done.
unsafe fn start<E: Engine, C: Communicator<E>>(
    attention: &Attention,
    pass: Pass,
    tensors: &Tensors,
    engine: &E,
    communicator: &C,
) -> Result<(), Error> {
    let workspace: Region = tensors.workspace.region();
    // SAFETY: the tensors are live until the ranks are done, as stated above.
    unsafe {
        match pass {
            Pass::Forward => attention.forward(engine, communicator, &tensors.forward(), workspace),
            Pass::Backward => {
                attention.backward(engine, communicator, &tensors.backward(), workspace)
            }
        }
    }
}

/// Milliseconds of a pass on the slowest rank: of a few, the median.
fn time<C: Communicator<GpuEngine>>(
    engine: &GpuEngine,
    communicator: &C,
    mut start: impl FnMut() -> Result<(), Error>,
) -> Result<f64, Error> {
    let peers = communicator.peers();
    let mut once = || {
        peers.gather(&[])?;
        let begin = engine.now()?;
        start()?;
        let end = engine.now()?;
        communicator.finish(engine)?;
        let own = engine.elapsed_ms(&begin, &end)?;
        let all = peers.gather(&own.to_le_bytes())?;
        let ms = |bytes: &Vec<u8>| <[u8; 8]>::try_from(&bytes[..]).map_or(0.0, f64::from_le_bytes);
        Ok::<f64, Error>(all.iter().map(ms).fold(0.0, f64::max))
    };
    let first = once()?;
    let runs = ((400.0 / first) as usize).clamp(1, 7);
    let mut times = (0..runs).map(|_| once()).collect::<Result<Vec<_>, _>>()?;
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn alone(
    options: &Options,
    case: &Case,
    engine: &GpuEngine,
    memory: &Arc<Memory>,
) -> Result<Alone, Error> {
    let limit = options.limit;
    let share = Share::new(case.problem()?, Grid::of_context(1))?;
    let attention = options.attention(&share, 0, engine)?;
    let tensors = Tensors::of(&attention, memory)?;
    let Some(communicator) = ThreadCommunicator::<GpuEngine>::ranks(1, limit).pop() else {
        return Err(Error::Late { ranks: Vec::new(), at: "a run alone".into(), limit });
    };
    let mut ms = [0.0; 2];
    for (pass, ms) in [Pass::Forward, Pass::Backward].into_iter().zip(&mut ms) {
        // SAFETY: the tensors are live until the device is done.
        let start = || unsafe { start(&attention, pass, &tensors, engine, &communicator) };
        *ms = time(engine, &communicator, start)?;
    }
    Ok(Alone { ms, results: tensors.results()? })
}

fn measure<C: Communicator<GpuEngine>>(
    options: &Options,
    case: &Case,
    one_gpu: &mut Option<Option<Alone>>,
    engine: &GpuEngine,
    memory: &Arc<Memory>,
    communicator: &C,
) -> Result<(), Error> {
    let peers = communicator.peers();
    if one_gpu.is_none() {
        // In turns, so that ranks of one GPU do not slow each other down.
        for turn in 0..peers.world() {
            let is_own = turn == peers.rank();
            if options.check && (is_own && options.one_gpu || !options.one_gpu && turn == 0) {
                *one_gpu = Some(match alone(options, case, engine, memory) {
                    Ok(alone) => Some(alone),
                    Err(Error::Attention(error)) if error.is_out_of_memory() => None,
                    Err(error) => return Err(error),
                });
            }
            peers.gather(&[])?;
        }
        one_gpu.get_or_insert(None);
    }
    let alone = one_gpu.as_ref().and_then(Option::as_ref);
    let part = Memory::new(memory.device().clone());
    let share = Share::new(case.problem()?, case.grid)?;
    let attention = options.attention(&share, peers.rank(), engine)?;
    let tensors = Tensors::of(&attention, &part)?;
    // SAFETY: the workspace is live until the ranks are done.
    unsafe { attention.prepare(engine, communicator, tensors.workspace.region()) }?;
    let mut rows = Vec::new();
    for (number, pass) in [Pass::Forward, Pass::Backward].into_iter().enumerate() {
        // SAFETY: the tensors are live until the ranks are done, here and below.
        let run = || unsafe { start(&attention, pass, &tensors, engine, communicator) };
        if options.kill.is_some() || options.hang.is_some() {
            return lose(options, engine, communicator, run);
        }
        let mut times = Times { all: time(engine, communicator, run)?, ..Times::default() };
        let first = tensors.results()?;
        run()?;
        communicator.finish(engine)?;
        let second = tensors.results()?;
        let names = ["O", "LSE", "dQ", "dK", "dV"];
        let of_pass = if pass == Pass::Forward { 0..2 } else { 2..5 };
        let differ: Vec<_> =
            of_pass.clone().filter(|&i| first[i] != second[i]).map(|i| names[i]).collect();
        let repeats =
            if differ.is_empty() { "yes".into() } else { format!("not {}", differ.join(", ")) };
        let differences = alone.map(|alone| compare(&attention, alone, &second, of_pass));
        times.computation = time(engine, communicator, || {
            // SAFETY: as above.
            unsafe { start(&attention, pass, &tensors, engine, &WithoutTransfers(communicator)) }
        })?;
        times.transfers = time(engine, communicator, || {
            let (engine, transfers) = (WithoutComputation(engine), Transfers(communicator));
            // SAFETY: the tensors are live until the ranks are done, as stated above.
            unsafe { start(&attention, pass, &tensors, &engine, &transfers) }
        })?;
        let bytes = match pass {
            Pass::Forward => attention.forward_bytes_sent(),
            Pass::Backward => attention.backward_bytes_sent(),
        };
        let ranks = case.grid.ranks();
        let work = Work {
            tokens: case.tokens,
            heads: HEADS,
            kv_heads: case.kv_heads,
            head_dim: D,
            causal: case.causal,
            backward: pass == Pass::Backward,
        };
        let model = H200.predict(&work, case.grid);
        let one = alone.map(|alone| alone.ms[number]);
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        rows.push(format!(
            "| {} | {} | {} | {} x {} | {} | {:.3} | {} | {} | {} | {:.3} ms, {:.3} | {:.3} | {:.0} % | {:.1} | {:.0} | {:.0} | {repeats} | {} |",
            case.tokens,
            case.kv_heads,
            if case.causal { "causal" } else { "full" },
            case.grid.heads,
            case.grid.context,
            if pass == Pass::Forward { "forward" } else { "backward" },
            times.all,
            or_dash(one.map(|ms| format!("{ms:.3}"))),
            or_dash(one.map(|ms| format!("{:.3}", ms / times.all))),
            or_dash(one.map(|ms| format!("{:.3}", ms / times.all / ranks as f64))),
            model.seconds * 1e3,
            model.efficiency(ranks),
            times.transfers,
            times.hidden() * 100.0,
            bytes as f64 / f64::from(1 << 20),
            bytes as f64 / times.transfers / 1e6,
            part.peak() as f64 / f64::from(1 << 20),
            or_dash(differences),
        ));
    }
    for row in rows.into_iter().filter(|_| peers.rank() == 0) {
        println!("{row}");
    }
    Ok(())
}

/// Passes until a rank is lost.
fn lose<C: Communicator<GpuEngine>>(
    options: &Options,
    engine: &GpuEngine,
    communicator: &C,
    run: impl Fn() -> Result<(), Error>,
) -> Result<(), Error> {
    let rank = communicator.peers().rank();
    let mut begin = Instant::now();
    let mut passes = || {
        for pass in 0..1000 {
            if pass == 20 {
                begin = Instant::now();
                if options.kill == Some(rank) {
                    println!("rank {rank} ends now");
                    std::process::abort();
                }
                if options.hang == Some(rank) {
                    println!("rank {rank} stands still");
                    std::thread::sleep(3 * options.limit);
                }
            }
            run()?;
            communicator.finish(engine)?;
        }
        Ok(())
    };
    let ended = passes();
    if let Err(error) = &ended {
        println!("rank {rank} after {:.2} s: {error}", begin.elapsed().as_secs_f64());
    }
    ended
}

/// The largest difference of this rank's rows from one GPU's, against the largest value.
fn compare(
    attention: &Attention,
    alone: &Alone,
    own: &[Vec<u16>; 5],
    of_pass: std::ops::Range<usize>,
) -> String {
    let (share, rank) = (attention.share(), attention.rank());
    let p = share.problem();
    let [q_rows, k_rows] = [share.q_rows(rank), share.k_rows(rank)]
        .map(|runs| runs.into_iter().flatten().collect::<Vec<_>>());
    let names = ["O", "LSE", "dQ", "dK", "dV"];
    let mut texts = Vec::new();
    for i in of_pass {
        let (heads, rows, n) = if i < 3 {
            (p.heads(), &q_rows, p.seq_q())
        } else {
            (p.kv_heads(), &k_rows, p.seq_k())
        };
        // Two halves of an f32 are read as one number.
        let columns = if i == 1 { 2 } else { D };
        let (mut most, mut largest) = (0f32, 0f32);
        for h in 0..heads {
            for (at, row) in rows.iter().enumerate() {
                let of = |values: &[u16], first: usize| -> Vec<f32> {
                    let values = &values[first * columns..(first + 1) * columns];
                    if i == 1 {
                        let bits = u32::from(values[0]) | u32::from(values[1]) << 16;
                        return vec![f32::from_bits(bits)];
                    }
                    values.iter().map(|&bits| f16::from_bits(bits).to_f32()).collect()
                };
                let one = of(&alone.results[i], h * n + row);
                for (a, b) in of(&own[i], h * rows.len() + at).into_iter().zip(one) {
                    let difference = (a - b).abs();
                    most = if difference.is_nan() { f32::INFINITY } else { most.max(difference) };
                    largest = largest.max(b.abs());
                }
            }
        }
        texts.push(format!("{} {most:.1e} of {largest:.1e}", names[i]));
    }
    texts.join(", ")
}
