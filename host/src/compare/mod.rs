//! `compare`: kernels side by side, each verified and then timed, one table per sequence length. A
//! kernel that does not fit, is not supported or fails still has a row, and the run goes on.

mod args;
mod beside;
mod measure;
mod stats;
mod timeout;

use std::thread;

use std::path::Path;

use anyhow::Result;
use flash_attention::{
    Problem, module,
    registry::{Target, best_for},
    session::Session,
};

use crate::{
    decode::{self, DecodeCommandArgs},
    failure::{self, Outcome},
    gpus, interrupt,
    machine::{self, Opened},
    options::Defaults,
    output::{self, Output},
    peers::{self, Peers},
    progress::{Progress, print_lines, warn},
    report,
    results::{Level, LevelChoice, Options, Repeats, Results, Row, Status},
    subject::{Effort, Kernel, Kind, foresee},
    table,
};
use measure::Bench;
use timeout::Watch;

pub use args::CompareArgs;

/// The lab's experiment, on a GPU.
pub const ON_GPU: Defaults = Defaults {
    seq: &[512, 1024, 2048],
    batch: 4,
    heads: 12,
    head_dim: 64,
    dtype: flash_attention::DType::F16,
};
/// The number of runs on a GPU.
pub const REPEATS_ON_GPU: Repeats = Repeats { warmup: 5, iters: 30, sustained: None };
/// Small enough that every kernel finishes in 10 seconds on two cores.
pub const EMULATED: Defaults = Defaults { seq: &[64, 128, 256], batch: 1, heads: 2, ..ON_GPU };
/// The number of runs under the emulator.
pub const REPEATS_EMULATED: Repeats = Repeats { warmup: 0, iters: 2, sustained: None };

/// The arguments of `decode` for `--level decode`.
fn decode_args(args: &CompareArgs) -> Result<DecodeCommandArgs> {
    decode::refuse(&[
        (args.several.gpus.is_some(), "--gpus"),
        (args.warmup.is_some(), "--warmup"),
        (args.sustained.is_some(), "--sustained"),
        (args.timeout.is_some(), "--timeout"),
        (args.csv.is_some(), "--csv"),
        (args.report.is_some(), "--report"),
    ])?;
    let (iters, wide) = (args.iters, args.wide);
    let (peers, json) = (args.peers.clone(), args.json.clone());
    Ok(DecodeCommandArgs { iters, peers, wide, json, ..DecodeCommandArgs::of(&args.problem)? })
}

/// Runs the command.
///
/// # Errors
/// A wrong request, found before any measurement; or a file that could not be written, after the
/// results were printed.
pub fn run(args: &CompareArgs) -> Result<Outcome> {
    if args.level == LevelChoice::Decode {
        return decode::run(&decode_args(args)?);
    }
    args.problem.cache.refuse()?;
    if let Some(gpus) = args.several.gpus {
        gpus::refuse(&[
            (args.json.is_some(), "--json"),
            (args.csv.is_some(), "--csv"),
            (args.report.is_some(), "--report"),
            (args.peers.is_some(), "--peers"),
            (args.warmup.is_some(), "--warmup"),
            (args.sustained.is_some(), "--sustained"),
            (args.timeout.is_some(), "--timeout"),
        ])?;
        let parallel = args.several.parallel.as_deref();
        let runs = args.iters.unwrap_or(gpus::RUNS);
        return gpus::run(&args.problem, gpus, parallel, (runs, args.wide));
    }
    let files = Files::open(args)?;
    let opened = machine::open(args.problem.device, args.problem.memory_limit)?;
    let (defaults, repeats) =
        if opened.info.emulated { (EMULATED, REPEATS_EMULATED) } else { (ON_GPU, REPEATS_ON_GPU) };
    let repeats = Repeats {
        warmup: args.warmup.unwrap_or(repeats.warmup),
        iters: args.iters.unwrap_or(repeats.iters),
        sustained: args.sustained,
    };
    let session = Session::new(opened.device.clone());
    let problems = args.problem.shape.problems(&defaults, args.level)?;
    let kernels = args.problem.chosen_kernels(&problems, &session.target(), args.level)?;
    let options =
        Options { repeats, level: args.level, ..args.problem.recorded(&problems, &kernels) };
    let mut results = machine::results("compare", &opened, options);
    let backends = args.peers.as_ref().map(|names| peers::backends(opened.info.emulated, names));
    let backends = backends.transpose()?;
    interrupt::listen();
    print_lines(&heading(args, &opened, &results.options, &problems));
    let mut peers = match backends {
        Some(backends) => beside::start(&opened, args.problem.device, backends),
        None => None,
    };
    results.options.peers = peers.is_some();

    let of_problem = |p| args.level.levels().map(move |level| (args.problem.kind(level), p));
    let all: Vec<_> = problems.iter().flat_map(of_problem).collect();
    let progress = Progress::new(all.len() * kernels.len() * (1 + repeats.warmup + repeats.iters));
    let watch = Watch::new(args.timeout);
    let run = Run {
        session: &session,
        kernels: &kernels,
        repeats,
        seed: args.problem.shape.seed,
        output: Printed { progress: &progress, width: table::width(args.wide) },
        watch: &watch,
    };
    let printed = run.output;
    let failure = thread::scope(|scope| {
        let over = watch.until_dropped();
        if args.timeout.is_some() {
            scope.spawn(|| watch.wait(|results| timed_out(results, &printed, &files)));
        }
        let failure = run.compare_all(&all, &mut peers, &mut results).err();
        drop(over);
        failure
    });
    drop(progress);
    files.write(&results)?;
    if let Some(error) = failure {
        return Err(error);
    }
    let outcome = outcome(&results);
    if outcome == Outcome::Bad && !results.rows.iter().any(measured) {
        print_lines("\nno kernel was measured: the reasons are above");
    }
    Ok(outcome)
}

/// The settings common to every problem.
struct Run<'a> {
    session: &'a Session,
    kernels: &'a [Kernel],
    repeats: Repeats,
    seed: u64,
    output: Printed<'a>,
    watch: &'a Watch,
}

/// The terminal for rows.
#[derive(Clone, Copy)]
struct Printed<'a> {
    progress: &'a Progress,
    width: Option<usize>,
}

impl Run<'_> {
    /// Measures and prints every problem at each level.
    fn compare_all(
        &self,
        all: &[(&dyn Kind, &Problem)],
        peers: &mut Option<Peers>,
        results: &mut Results,
    ) -> Result<()> {
        for &(kind, problem) in all {
            let before = results.rows.len();
            let compared = self.compare_one(kind, problem, peers, results);
            self.output.print(&mut results.rows[before..]);
            results.interrupted = interrupt::requested();
            compared?;
            if results.interrupted {
                break;
            }
        }
        Ok(())
    }

    /// Measures every kernel on one problem; rows are added as they are ready.
    fn compare_one(
        &self,
        kind: &dyn Kind,
        problem: &Problem,
        peers: &mut Option<Peers>,
        results: &mut Results,
    ) -> Result<()> {
        let &Self { session, kernels, repeats, seed, watch, output: Printed { progress, .. } } =
            self;
        let problem = kind.pose(problem)?;
        let foreseen = kernels.iter().map(|kernel| foresee(session, kind, kernel.name, &problem));
        let foreseen = foreseen.collect::<Result<Vec<_>, _>>()?;
        // Tensors may be too large for this computer when none of the kernels can run.
        if foreseen.iter().all(|row| row.status != Status::Ok) {
            results.rows.extend(foreseen);
            return Ok(());
        }
        let level = kind.level();
        progress.doing(format!("N {}, {level}: inputs and outputs in f64", problem.seq_q()));
        let subject = kind.draw(session, problem, seed, Effort::Quick)?;
        let bench = Bench { subject: &*subject, repeats, watch };
        for mut row in foreseen {
            row.flops = subject.flops();
            if interrupt::requested() {
                break;
            }
            if row.status != Status::Ok {
                results.rows.push(row);
                continue;
            }
            watch.expect(results, &row);
            let Some((row, checks)) = bench.measure(row, progress) else { break };
            results.rows.push(row);
            results.checks.extend(checks);
        }
        if !interrupt::requested() {
            beside::measure(peers, &bench, results, progress);
        }
        Ok(())
    }
}

impl Printed<'_> {
    /// Prints the rows of one problem at one level.
    fn print(&self, rows: &mut [Row]) {
        stats::fill_ratios(rows);
        let Some(Row { seq, level, .. }) = rows.first() else { return };
        let heading = format!("\nN = {seq}, {level}");
        self.progress.print(&format!("{heading}\n{}", table::rows(rows, self.width)));
    }
}

/// Reports the results from before a launch that did not end, and ends the process.
fn timed_out(mut results: Results, output: &Printed<'_>, files: &Files<'_>) {
    results.interrupted = true;
    let of = |row: &Row| (row.seq, row.level);
    let last = results.rows.last().map(of);
    let before = results.rows.iter().rposition(|row| Some(of(row)) != last);
    output.print(&mut results.rows[before.map_or(0, |index| index + 1)..]);
    output.progress.clear();
    let code = files.write(&results).err().map_or(1, |error| {
        warn(&failure::line(&error));
        failure::exit_code(&error)
    });
    timeout::end_process(code.into());
}

/// The header: the coming measurement, and its device.
fn heading(args: &CompareArgs, opened: &Opened, options: &Options, problems: &[Problem]) -> String {
    let mut text = opened.to_string();
    if opened.info.emulated {
        text += "\nEmulated times show the algorithm, not GPU speed. FLOP, bytes read and written in \
                 global memory, and peak memory are comparable on any machine.";
        if args.problem.shape.seq.is_none() && args.problem.shape.batch.is_none() {
            text += "\nThe defaults are smaller here than on a GPU, to end within seconds.";
        }
    }
    let module = problems.first().filter(|_| args.level.levels().any(Level::is_module));
    let target = Target::of(&*opened.device);
    if let Some(Ok([linear, _])) = module.map(|p| module::best_linear(p, &target)) {
        text += &format!("\nThe module's projections are by {}", linear.kernel().name);
        if let Some(Ok(best)) = module
            .filter(|_| args.level.covers(Level::ModuleBackward))
            .map(|p| best_for(p, &target))
        {
            text += &format!(", and its forward pass by {}", best.kernel.name);
        }
        text.push('.');
    }
    let Repeats { warmup, iters, .. } = options.repeats;
    text + &format!(
        "\n{options}; warm-ups {warmup}, runs {iters}; × and saved are against {}, by the median",
        if args.level.levels().any(Level::is_backward) { "backward_naive" } else { "naive" }
    )
}

/// The requested files.
struct Files<'a> {
    json: Option<Output>,
    csv: Option<Output>,
    report: Option<&'a Path>,
}

impl<'a> Files<'a> {
    fn open(args: &'a CompareArgs) -> Result<Self> {
        let report = args.report.as_deref();
        report.map_or(Ok(()), output::check_folder)?;
        let of_report = |name| report.map(|folder| folder.join(name));
        let [report_json, report_csv] = ["results.json", "results.csv"].map(of_report);
        let [json, csv, ..] = output::open_all([
            ("--json", args.json.as_deref()),
            ("--csv", args.csv.as_deref()),
            ("--report", report_json.as_deref()),
            ("--report", report_csv.as_deref()),
        ])?;
        Ok(Self { json, csv, report })
    }

    fn write(&self, results: &Results) -> Result<()> {
        // Each file is tried, whatever became of the one before.
        let json = self.json.as_ref().map_or(Ok(()), |output| results.write_json(output));
        let csv = self.csv.as_ref().map_or(Ok(()), |output| results.write_csv(output));
        let report = self.report.map_or(Ok(()), |folder| {
            let paths = report::write(results, folder)?;
            print_lines(&format!("\nwrote {}", paths.html.display()));
            Ok(())
        });
        json.and(csv).and(report)
    }
}

/// Whether a row of one of our kernels was measured.
fn measured(row: &Row) -> bool {
    row.status == Status::Ok && !row.peer
}

fn outcome(results: &Results) -> Outcome {
    let failed = |row: &Row| row.status == Status::Failed && !row.peer;
    if results.interrupted {
        Outcome::Interrupted
    } else if results.rows.iter().any(failed) || !results.rows.iter().any(measured) {
        Outcome::Bad
    } else {
        Outcome::Good
    }
}
