//! `verify`: each kernel's O and LSE against attention in f64, and the output of the module
//! around it against the module in f64, with a verdict by a threshold and by the 2x rule, and
//! how the differences spread.

mod terminal;

use anyhow::Result;
use flash_attention::{DType, Problem, registry::KernelSpec, session::Session};

use crate::{
    accuracy::complaint,
    compare::device_line,
    failure::Outcome,
    interrupt, machine,
    options::{Defaults, VerifyArgs},
    output,
    progress::{Progress, print_lines},
    results::{Check, Level, Options, Results, Row, Status},
    subject::{Effort, Subject, foresee},
    table,
};

/// The lab's precision experiment.
pub const LAB: Defaults =
    Defaults { seq: &[512], batch: 2, heads: 12, head_dim: 64, dtype: DType::F32 };
/// A part of it, so that the emulator is through in seconds.
pub const EMULATED: Defaults = Defaults { batch: 1, heads: 2, ..LAB };
/// Multiplications that the oracle may spend on a sequence length before rows are sampled:
/// all of the lab's experiment.
const ORACLE_BUDGET: usize = 1 << 30;
/// The same for a module, in the lab's experiment about 3.3 * 10^9.
const MODULE_ORACLE_BUDGET: usize = 1 << 32;
/// The threshold of the lab's experiment, which is in f32. Narrower types cannot keep it
/// for every input: there the 2x rule decides.
const F32_THRESHOLD: f64 = 1e-3;

/// Runs the command.
///
/// # Errors
/// What is wrong with the request; or a file that could not be written, after the
/// differences were printed.
pub fn run(args: &VerifyArgs) -> Result<Outcome> {
    let [json] = output::open_all([("--json", args.json.as_deref())])?;
    let opened = machine::open(args.problem.device, args.problem.memory_limit)?;
    let session = Session::new(opened.device.clone());
    let defaults = if opened.info.emulated { EMULATED } else { LAB };
    let problems = args.problem.problems(&defaults)?;
    let kernels = args.problem.chosen_kernels(&problems, &session.target())?;
    let options = Options { level: args.level, ..args.problem.recorded(&problems, &kernels) };
    let mut results = machine::results("verify", &opened, options);
    let mut heading = device_line(&opened);
    if opened.info.emulated && args.problem.batch.is_none() && args.problem.heads.is_none() {
        heading += "\nThe defaults are smaller here than on a GPU, to end within seconds: --batch 2 --heads 12 \
                    makes them the same.";
    }
    interrupt::listen();
    print_lines(&format!("{heading}\n{}", results.options));

    let all: Vec<_> =
        problems.iter().flat_map(|p| args.level.levels().map(move |level| (level, p))).collect();
    let progress = Progress::new(all.len() * (1 + kernels.len()));
    let mut failure = None;
    for (level, problem) in all {
        let (rows, checks) = (results.rows.len(), results.checks.len());
        let run = Run { session: &session, kernels: &kernels, args };
        failure = run.verify_one(level, problem, &mut results, &progress).err();
        let (rows, checks) = (&results.rows[rows..], &results.checks[checks..]);
        progress.print(&summary(level, problem, rows, checks));
        results.interrupted = interrupt::requested();
        if results.interrupted || failure.is_some() {
            break;
        }
    }
    drop(progress);
    let outcome = outcome(&results);
    if failure.is_none() {
        print_lines(match outcome {
            Outcome::Good => "\nverdict: every kernel that ran is right",
            Outcome::Bad => "\nverdict: WRONG, see above",
            Outcome::Interrupted => "\nverdict: stopped before every kernel was compared",
        });
    }
    if let Some(json) = json {
        results.write_json(&json)?;
    }
    failure.map_or(Ok(outcome), Err)
}

/// What is the same for every problem.
struct Run<'a> {
    session: &'a Session,
    kernels: &'a [&'static KernelSpec],
    args: &'a VerifyArgs,
}

impl Run<'_> {
    /// Runs every kernel once on one problem, and compares.
    fn verify_one(
        &self,
        level: Level,
        problem: &Problem,
        results: &mut Results,
        progress: &Progress,
    ) -> Result<()> {
        let &Self { session, kernels, args } = self;
        let mut able = Vec::new();
        for &kernel in kernels {
            let (row, can_run) = foresee(session, level, kernel, problem)?;
            if can_run { able.push((kernel, row)) } else { results.rows.push(row) }
        }
        // Tensors may be too large for this computer when none of the kernels can run.
        if able.is_empty() {
            return Ok(());
        }
        progress.doing(format!("N {}, {level}: inputs and outputs in f64", problem.seq_q()));
        let budget = match level {
            Level::Attention => ORACLE_BUDGET,
            Level::Module => MODULE_ORACLE_BUDGET,
        };
        let effort = args.rows.map_or(Effort::Multiplications(budget), Effort::Rows);
        let subject = Subject::new(session, level, problem, args.problem.seed, effort)?;
        progress.step();
        let f32_threshold = (problem.dtype() == DType::F32).then_some(F32_THRESHOLD);
        let threshold = args.threshold.or(f32_threshold);
        for (kernel, mut row) in able {
            if interrupt::requested() {
                break;
            }
            progress.doing(format!("N {}, {level}: {}", problem.seq_q(), kernel.name));
            match subject.run(kernel, threshold) {
                Ok(ran) => {
                    row.peak_bytes = Some(ran.peak_bytes);
                    row.workspace_bytes = Some(ran.workspace_bytes);
                    row.max_abs_err = ran.checks.first().map(|o| o.abs.max);
                    if let Some(bad) = ran.checks.iter().find(|check| !check.passed()) {
                        row.status = Status::Failed;
                        row.reason = complaint(bad);
                    }
                    results.checks.extend(ran.checks);
                }
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

/// What is printed for one sequence length and level.
fn summary(level: Level, problem: &Problem, rows: &[Row], checks: &[Check]) -> String {
    let mut text = format!("\nN = {}, {level}", problem.seq_q());
    if let Some(first) = checks.first().filter(|first| first.compared < first.elements) {
        let (width, what) = match level {
            Level::Attention => (problem.head_dim(), "rows"),
            Level::Module => (problem.heads() * problem.head_dim(), "tokens"),
        };
        let (some, all) = (first.compared / width as u64, first.elements / width as u64);
        text += &format!("; {some} of {all} {what} compared, spread over the tensor");
    }
    if !checks.is_empty() {
        text += &format!("\n{}", table::checks(checks));
    }
    text += &table::reasons(rows);
    for check in checks {
        text += &format!("\n\n{}", terminal::histograms(check));
    }
    text
}

fn outcome(results: &Results) -> Outcome {
    let bad = |row: &Row| matches!(row.status, Status::Failed);
    if results.interrupted {
        Outcome::Interrupted
    } else if results.rows.iter().any(bad) || results.checks.is_empty() {
        Outcome::Bad
    } else {
        Outcome::Good
    }
}
