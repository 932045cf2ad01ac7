//! One row: a kernel on a problem, verified first and then timed.

use flash_attention::{
    Error, Problem,
    registry::KernelSpec,
    session::{Inputs, Session, Work},
};

use super::stats::{Times, runs_in, write_sustained};
use crate::{
    accuracy::{Oracle, complaint},
    format, interrupt,
    progress::Progress,
    results::{Check, Row, Status},
};

/// How often a kernel is run.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// Runs that are not timed.
    pub warmup: usize,
    /// Runs that are.
    pub iters: usize,
    /// Seconds of runs back to back after those.
    pub sustained: Option<f64>,
}

/// A row with what is known before anything runs.
#[must_use]
pub fn row(session: &Session, kernel: &str, problem: &Problem) -> Row {
    let device = session.device();
    Row {
        kernel: kernel.into(),
        device: device.name(),
        batch: problem.batch(),
        heads: problem.heads(),
        seq: problem.seq_q(),
        head_dim: problem.head_dim(),
        dtype: problem.dtype(),
        causal: problem.causal(),
        emulated: device.is_emulated(),
        flops: problem.flops(),
        ..Row::default()
    }
}

/// What can be said of a kernel without running it: a row that ends here because the
/// kernel cannot do the problem, or because its memory is not free.
///
/// # Errors
/// When the device does not answer.
pub fn foresee(
    session: &Session,
    kernel: &KernelSpec,
    problem: &Problem,
) -> Result<(Row, bool), Error> {
    let mut row = row(session, kernel.name, problem);
    match kernel.supports(problem, &session.target()) {
        Err(Error::Unsupported { reason, .. }) => {
            row.status = Status::Unsupported;
            row.reason = reason;
            return Ok((row, false));
        }
        other => other?,
    }
    row.needed_bytes = Some(kernel.peak_bytes(problem, &session.target()));
    match session.check_fits(kernel, problem) {
        Err(Error::OutOfMemory { needed, free, .. }) => {
            row.status = Status::Oom;
            row.free_bytes = Some(free);
            row.reason = format!(
                "needs {}, {} were free: not tried",
                format::bytes(needed as f64),
                format::bytes(free as f64)
            );
            Ok((row, false))
        }
        other => other.map(|()| (row, true)),
    }
}

/// What is needed to measure kernels on one problem.
pub struct Bench<'a> {
    /// The device.
    pub session: &'a Session,
    /// The problem.
    pub problem: &'a Problem,
    /// Its tensors.
    pub inputs: Inputs<'a>,
    /// The right answer.
    pub oracle: &'a Oracle,
    /// How often kernels run.
    pub repeats: Repeats,
}

impl Bench<'_> {
    /// Verifies and times a kernel. What goes wrong on the way ends in the row.
    pub fn measure(
        &self,
        kernel: &'static KernelSpec,
        mut row: Row,
        progress: &Progress,
    ) -> (Row, Vec<Check>) {
        let mut checks = Vec::new();
        if let Err(error) = self.try_measure(kernel, &mut row, &mut checks, progress) {
            if error.is_out_of_memory() {
                row.status = Status::Oom;
                row.free_bytes = self.session.device().memory_info().ok().map(|m| m.free);
                row.reason = format!("ran out in spite of the prediction: {error}");
            } else {
                row.status = Status::Failed;
                row.reason = error.to_string();
            }
        }
        (row, checks)
    }

    fn try_measure(
        &self,
        kernel: &'static KernelSpec,
        row: &mut Row,
        checks: &mut Vec<Check>,
        progress: &Progress,
    ) -> Result<(), Error> {
        let device = self.session.device();
        let prepared = self.session.prepare(kernel, self.problem, &self.inputs)?;
        let memory = prepared.memory();
        row.peak_bytes = Some(memory.peak);
        row.workspace_bytes = Some(memory.workspace);

        let title = format!("N {}: {}", self.problem.seq_q(), kernel.name);
        progress.doing(format!("{title}: verifying"));
        device.take_counters();
        prepared.launch()?;
        if let Some(counters) = device.take_counters() {
            row.global_bytes_read = Some(counters.global_bytes_read);
            row.global_bytes_written = Some(counters.global_bytes_written);
        }
        let outputs = prepared.attention().outputs_without_weights()?;
        checks.extend(self.oracle.checks(kernel.name, &outputs, None));
        row.max_abs_err = checks.first().map(|o| o.abs.max);
        progress.step();
        if let Some(bad) = checks.iter().find(|check| !check.passed()) {
            row.status = Status::Failed;
            row.reason = complaint(bad);
            return Ok(());
        }
        self.time(&prepared, row, &title, progress)
    }

    fn time(
        &self,
        prepared: &impl Work,
        row: &mut Row,
        title: &str,
        progress: &Progress,
    ) -> Result<(), Error> {
        progress.doing(format!("{title}: warming up"));
        for _ in 0..self.repeats.warmup {
            if interrupt::requested() {
                break;
            }
            prepared.launch()?;
            progress.step();
        }
        let mut times = Vec::with_capacity(self.repeats.iters);
        for run in 0..self.repeats.iters {
            if interrupt::requested() {
                break;
            }
            progress.doing(format!("{title}: run {} of {}", run + 1, self.repeats.iters));
            times.extend(prepared.time_ms(0, 1)?);
            progress.step();
        }
        match Times::of(&times) {
            Some(times) => times.write_to(row),
            None => row.reason = "stopped before it was timed".into(),
        }
        if let Some(seconds) = self.repeats.sustained.filter(|_| !interrupt::requested()) {
            progress.doing(format!("{title}: back to back"));
            let runs = runs_in(seconds, row);
            write_sustained(row, prepared.sustained_ms(runs)?);
        }
        Ok(())
    }
}
