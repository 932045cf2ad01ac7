//! `verify`: each kernel's O and LSE against attention in f64, with a verdict by a
//! threshold and by the 2x rule, and how the differences spread.

mod terminal;

use anyhow::Result;
use flash_attention::{
    DType, Error, Problem,
    registry::KernelSpec,
    session::{Inputs, Session, Work},
};

use crate::{
    accuracy::{Oracle, complaint},
    compare::{device_line, foresee},
    failure::{Outcome, Usage},
    inputs::Tensors,
    interrupt, machine,
    options::{Defaults, VerifyArgs},
    output,
    progress::{Progress, print_lines},
    results::{Check, Results, Row, Status},
    table,
};

/// The lab's precision experiment.
const LAB: Defaults =
    Defaults { seq: &[512], batch: 2, heads: 12, head_dim: 64, dtype: DType::F32 };
/// A part of it, so that the emulator is through in seconds.
const EMULATED: Defaults = Defaults { batch: 1, heads: 2, ..LAB };
/// Multiplications that the oracle may spend on a sequence length before rows are sampled:
/// all of the lab's experiment.
const ORACLE_BUDGET: usize = 1 << 30;
/// The threshold of the lab's experiment, which is in f32. Narrower types cannot keep it
/// for every input: there the 2x rule decides.
const F32_THRESHOLD: f64 = 1e-3;

/// Runs the command.
///
/// # Errors
/// What is wrong with the request; or a file that could not be written, after the
/// differences were printed.
pub fn run(args: &VerifyArgs) -> Result<Outcome> {
    if let Some(threshold) = args.threshold.filter(|t| t.is_nan() || *t <= 0.0) {
        let reason = format!("threshold = {threshold} is not possible: it must be above 0");
        return Err(Usage(reason).into());
    }
    if let Some(path) = &args.json {
        output::check_file(path)?;
    }
    let opened = machine::open(args.problem.device, args.problem.memory_limit)?;
    let session = Session::new(opened.device.clone());
    let defaults = if opened.info.emulated { EMULATED } else { LAB };
    let problems = args.problem.problems(&defaults)?;
    let kernels = args.problem.chosen_kernels(&problems, &session.target())?;
    let options = args.problem.recorded(&problems, &kernels);
    let mut results = machine::results("verify", &opened, options);
    let mut heading = device_line(&opened);
    if opened.info.emulated && args.problem.batch.is_none() && args.problem.heads.is_none() {
        heading += "\nThe defaults are smaller here than on a GPU, to end within seconds: --batch 2 --heads 12 \
                    makes them the same.";
    }
    print_lines(&format!("{heading}\n{}", results.options));

    interrupt::listen();
    let progress = Progress::new(problems.len() * (1 + kernels.len()));
    let mut failure = None;
    for problem in &problems {
        let (rows, checks) = (results.rows.len(), results.checks.len());
        failure = verify_one(&session, problem, &kernels, args, &mut results, &progress).err();
        progress.print(&summary(problem, &results.rows[rows..], &results.checks[checks..]));
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
    if let Some(path) = &args.json {
        results.write_json(path)?;
    }
    failure.map_or(Ok(outcome), Err)
}

/// Runs every kernel once on one problem, and compares.
fn verify_one(
    session: &Session,
    problem: &Problem,
    kernels: &[&'static KernelSpec],
    args: &VerifyArgs,
    results: &mut Results,
    progress: &Progress,
) -> Result<()> {
    let mut able = Vec::new();
    for &kernel in kernels {
        let (row, can_run) = foresee(session, kernel, problem)?;
        if can_run { able.push((kernel, row)) } else { results.rows.push(row) }
    }
    // Tensors may be too large for this computer when none of the kernels can run.
    if able.is_empty() {
        return Ok(());
    }
    progress.doing(format!("N {}: inputs and their attention in f64", problem.seq_q()));
    let tensors = Tensors::random(problem, args.problem.seed);
    let inputs = tensors.inputs();
    let rows = args.rows.unwrap_or_else(|| Oracle::affordable_rows(problem, ORACLE_BUDGET));
    let oracle = Oracle::new(problem, &inputs, rows);
    progress.step();
    let threshold = args.threshold.or((problem.dtype() == DType::F32).then_some(F32_THRESHOLD));
    for (kernel, mut row) in able {
        if interrupt::requested() {
            break;
        }
        progress.doing(format!("N {}: {}", problem.seq_q(), kernel.name));
        match run_once(session, kernel, problem, &inputs, &oracle, threshold) {
            Ok((checks, peak)) => {
                row.peak_bytes = Some(peak);
                row.max_abs_err = checks.first().map(|o| o.abs.max);
                if let Some(bad) = checks.iter().find(|check| !check.passed()) {
                    row.status = Status::Failed;
                    row.reason = complaint(bad);
                }
                results.checks.extend(checks);
            }
            Err(error) => {
                row.status = if error.is_out_of_memory() { Status::Oom } else { Status::Failed };
                row.reason = error.to_string();
            }
        }
        results.rows.push(row);
        progress.step();
    }
    Ok(())
}

fn run_once(
    session: &Session,
    kernel: &'static KernelSpec,
    problem: &Problem,
    inputs: &Inputs<'_>,
    oracle: &Oracle,
    threshold: Option<f64>,
) -> Result<([Check; 2], u64), Error> {
    let prepared = session.prepare(kernel, problem, inputs)?;
    prepared.launch()?;
    let outputs = prepared.attention().outputs_without_weights()?;
    Ok((oracle.checks(kernel.name, &outputs, threshold), prepared.memory().peak))
}

/// What is printed for one sequence length.
fn summary(problem: &Problem, rows: &[Row], checks: &[Check]) -> String {
    let mut text = format!("\nN = {}", problem.seq_q());
    if let Some(o) = checks.iter().find(|check| check.tensor == "o") {
        let rows = |elements: u64| elements / problem.head_dim() as u64;
        if o.compared < o.elements {
            let (some, all) = (rows(o.compared), rows(o.elements));
            text += &format!("; {some} of {all} rows compared, spread over the tensor");
        }
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
