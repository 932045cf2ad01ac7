//! `verify`: each kernel's O and LSE against attention in f64, and the output of the module around
//! it against the module in f64, with verdicts by a threshold and by the 2x rule, and the spread of
//! the differences.

mod terminal;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use flash_attention::{DType, Error, Problem, session::Session};

use crate::{
    accuracy::complaint,
    decode::{self, DecodeCommandArgs},
    failure::Outcome,
    format,
    gpus::{self, GpusArgs},
    interrupt, machine,
    options::{Defaults, ProblemArgs},
    output,
    progress::{Progress, print_lines},
    results::{Check, LevelChoice, Options, Results, Row, Status},
    subject::{Effort, Kernel, Kind, foresee},
    table, values,
};

/// The lab's precision experiment.
pub const LAB: Defaults =
    Defaults { seq: &[512], batch: 2, heads: 12, head_dim: 64, dtype: DType::F32 };
/// A part of the experiment, so that the emulator finishes in seconds.
pub const EMULATED: Defaults = Defaults { batch: 1, heads: 2, ..LAB };
/// The threshold of the lab's experiment, which is in f32. Narrower types cannot meet it for every
/// input, so the 2x rule decides there.
const F32_THRESHOLD: f64 = 1e-3;

/// Arguments of `verify`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct VerifyArgs {
    /// The problem.
    #[command(flatten)]
    pub problem: ProblemArgs,
    /// Verify attention alone, the multi-head attention module with its projections, both, the
    /// gradients of attention, those of the module, or a few queries against caches
    #[arg(long, value_name = "LEVEL", default_value_t = LevelChoice::Both)]
    pub level: LevelChoice,
    /// Several GPUs.
    #[command(flatten)]
    pub several: GpusArgs,
    /// Largest absolute difference that passes; 1e-3 in f32, none in f16 and bf16,
    /// where twice the plain algorithm's error alone decides
    #[arg(long, value_name = "MAX", value_parser = values::threshold)]
    pub threshold: Option<f64>,
    /// Rows of O, tokens of a module's output, or rows of Q in whole heads whose gradients to
    /// compare, spread over the tensor; every one unless given, as far as that takes seconds. Where a
    /// head has more rows, dO is 0 in the others; for a module's gradients dy is 0 for other tokens
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

/// The arguments of `decode` for `--level decode`: it measures no time.
fn decode_args(args: &VerifyArgs) -> Result<DecodeCommandArgs> {
    decode::refuse(&[
        (args.several.gpus.is_some(), "--gpus"),
        (args.threshold.is_some(), "--threshold"),
    ])?;
    let (rows, wide, json) = (args.rows, args.wide, args.json.clone());
    let args = DecodeCommandArgs::of(&args.problem)?;
    Ok(DecodeCommandArgs { timed: false, rows, wide, json, ..args })
}

/// Runs the command.
///
/// # Errors
/// A wrong request; or a file that could not be written, after the differences were printed.
pub fn run(args: &VerifyArgs) -> Result<Outcome> {
    if args.level == LevelChoice::Decode {
        return decode::run(&decode_args(args)?);
    }
    args.problem.cache.refuse()?;
    if let Some(gpus) = args.several.gpus {
        gpus::refuse(&[
            (args.json.is_some(), "--json"),
            (args.threshold.is_some(), "--threshold"),
            (args.rows.is_some(), "--rows"),
        ])?;
        let parallel = args.several.parallel.as_deref();
        return gpus::run(&args.problem, gpus, parallel, (0, args.wide));
    }
    let [json] = output::open_all([("--json", args.json.as_deref())])?;
    let opened = machine::open(args.problem.device, args.problem.memory_limit)?;
    let session = Session::new(opened.device.clone());
    let defaults = if opened.info.emulated { EMULATED } else { LAB };
    let groups = groups(args, &defaults, &session)?;
    // They are never empty: a kernel that is asked for belongs to one.
    let first = groups.first().map_or(&[][..], |group| &group.problems);
    let kernels: Vec<_> = groups.iter().flat_map(|group| group.kernels.iter().copied()).collect();
    let options = Options { level: args.level, ..args.problem.recorded(first, &kernels) };
    let mut results = machine::results("verify", &opened, options);
    let mut heading = opened.to_string();
    if opened.info.emulated
        && args.problem.shape.batch.is_none()
        && args.problem.shape.heads.is_none()
    {
        heading += "\nThe defaults are smaller here than on a GPU, to end within seconds: --batch 2 --heads 12 \
                    makes them the same.";
    }
    heading += &format!("\n{}", results.options);
    for group in groups.iter().skip(1) {
        let names: Vec<String> = group.kernels.iter().map(|k| k.name.to_owned()).collect();
        let first = results.options.problem.dtype;
        heading += &format!(
            "\nin {}, for want of {first}: {}; --dtype runs every kernel in one type",
            group.dtype,
            format::list(&names)
        );
    }
    interrupt::listen();
    print_lines(&heading);

    let steps = groups.iter().map(|g| g.problems.len() * (1 + g.kernels.len())).sum::<usize>();
    let progress = Progress::new(args.level.levels().count() * steps);
    let mut failure = None;
    let each = groups.iter().flat_map(|group| {
        let of_problem =
            move |p| args.level.levels().map(move |level| (group, p, args.problem.kind(level)));
        group.problems.iter().flat_map(of_problem)
    });
    for (group, problem, kind) in each {
        let (rows, checks) = (results.rows.len(), results.checks.len());
        let run = Run { session: &session, kernels: &group.kernels, args };
        failure = run.verify_one(kind, problem, &mut results, &progress).err();
        let (rows, checks) = (&results.rows[rows..], &results.checks[checks..]);
        progress.print(&summary(kind, problem, rows, checks, table::width(args.wide)));
        results.interrupted = interrupt::requested();
        if results.interrupted || failure.is_some() {
            break;
        }
    }
    drop(progress);
    let (outcome, verdict) = verdict(&results);
    if failure.is_none() {
        print_lines(&format!("\nverdict: {verdict}"));
    }
    if let Some(json) = json {
        results.write_json(&json)?;
    }
    failure.map_or(Ok(outcome), Err)
}

/// Kernels that run in the same storage type, and their problems.
struct Group {
    dtype: DType,
    kernels: Vec<Kernel>,
    problems: Vec<Problem>,
}

/// One group for the requested type. Without a request, every kernel runs in the default type or,
/// if it lacks that type, in its first type.
///
/// # Errors
/// A wrong request.
fn groups(args: &VerifyArgs, defaults: &Defaults, session: &Session) -> Result<Vec<Group>> {
    let mut dtypes = vec![args.problem.shape.dtype.unwrap_or(defaults.dtype)];
    if args.problem.shape.dtype.is_none() {
        dtypes.extend(DType::ALL.iter().filter(|&&dtype| dtype != defaults.dtype));
    }
    let mut groups = Vec::new();
    for &dtype in &dtypes {
        let problems = args.problem.shape.problems(&Defaults { dtype, ..*defaults }, args.level)?;
        groups.push(Group { dtype, kernels: Vec::new(), problems });
    }
    let all: Vec<Problem> = groups.iter().flat_map(|group| group.problems.clone()).collect();
    for kernel in args.problem.chosen_kernels(&all, &session.target(), args.level)? {
        let own = groups.iter().position(|group| kernel.dtypes.contains(&group.dtype));
        groups[own.unwrap_or(0)].kernels.push(kernel);
    }
    groups.retain(|group| !group.kernels.is_empty());
    Ok(groups)
}

/// The settings common to every problem.
struct Run<'a> {
    session: &'a Session,
    kernels: &'a [Kernel],
    args: &'a VerifyArgs,
}

impl Run<'_> {
    /// Runs every kernel once on one problem, and compares.
    fn verify_one(
        &self,
        kind: &dyn Kind,
        problem: &Problem,
        results: &mut Results,
        progress: &Progress,
    ) -> Result<()> {
        let &Self { session, kernels, args } = self;
        let (level, problem) = (kind.level(), kind.pose(problem)?);
        let mut able = Vec::new();
        for kernel in kernels {
            let row = foresee(session, kind, kernel.name, &problem)?;
            if row.status == Status::Ok { &mut able } else { &mut results.rows }.push(row);
        }
        // Tensors may be too large for this computer when none of the kernels can run.
        if able.is_empty() {
            return Ok(());
        }
        progress.doing(format!("N {}, {level}: inputs and outputs in f64", problem.seq_q()));
        let effort = args.rows.map_or(Effort::Thorough, Effort::Rows);
        let subject = kind.draw(session, problem, args.problem.shape.seed, effort)?;
        progress.step();
        let f32_threshold = (problem.dtype() == DType::F32).then_some(F32_THRESHOLD);
        let threshold = args.threshold.or(f32_threshold);
        for mut row in able {
            row.flops = subject.flops();
            if interrupt::requested() {
                break;
            }
            progress.doing(format!("N {}, {level}: {}", problem.seq_q(), row.kernel));
            match subject.run(&row.kernel, threshold, &|work| work.launch()) {
                Ok(ran) => {
                    ran.write_to(&mut row);
                    if let Some(bad) = ran.checks.iter().find(|check| !check.passed()) {
                        row.status = Status::Failed;
                        row.reason = complaint(bad);
                    }
                    results.checks.extend(ran.checks);
                }
                Err(Error::Stopped) => break,
                Err(error) => {
                    let oom = error.is_out_of_memory();
                    row.status = if oom { Status::Oom } else { Status::Failed };
                    row.reason = error.to_string();
                }
            }
            results.rows.push(row);
            progress.step();
        }
        Ok(())
    }
}

/// The output for one sequence length and level.
fn summary(
    kind: &dyn Kind,
    problem: &Problem,
    rows: &[Row],
    checks: &[Check],
    width: Option<usize>,
) -> String {
    let mut text = format!("\nN = {}, {}, {}", problem.seq_q(), kind.level(), problem.dtype());
    if let Some(first) = checks.first().filter(|first| first.compared < first.elements) {
        let (width, what) = kind.compared(problem);
        let (some, all) = (first.compared / width as u64, first.elements / width as u64);
        text += &format!("; {some} of {all} {what} compared, spread over the tensor");
    }
    if !checks.is_empty() {
        text += &format!("\n{}", table::checks(checks, width));
    }
    text += &table::reasons(rows);
    for check in checks {
        text += &format!("\n\n{}", terminal::histograms(check));
    }
    text
}

/// The end of the command, with its last message.
fn verdict(results: &Results) -> (Outcome, &'static str) {
    if results.interrupted {
        (Outcome::Interrupted, "stopped before every kernel was compared")
    } else if results.checks.iter().any(|check| !check.passed()) {
        (Outcome::Bad, "WRONG, see above")
    } else if results.rows.iter().any(|row| row.status == Status::Failed) {
        (Outcome::Bad, "a kernel failed, see above")
    } else if results.checks.is_empty() {
        (Outcome::Bad, "none: nothing ran, for the reasons above")
    } else {
        (Outcome::Good, "every kernel that ran is right")
    }
}
