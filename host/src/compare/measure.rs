//! One row: a kernel on a problem, verified first and then timed.

use std::{thread, time::Duration};

use flash_attention::{
    Error,
    module::Passes,
    session::work::{self, Work},
};

use super::{
    stats::{Times, runs_in, write_sustained},
    timeout::Watch,
};
use crate::{
    accuracy::complaint,
    interrupt,
    progress::Progress,
    results::{Check, Repeats, Row, Status},
    subject::{Subject, Timed},
};

/// The pause before each row that is measured at the power limit, so that earlier work has not
/// warmed the GPU for any row. The same length as in `peers.py`.
const REST: Duration = Duration::from_millis(500);

/// The setup for measuring kernels on one problem.
pub struct Bench<'a> {
    /// The problem with its tensors.
    pub subject: &'a dyn Subject,
    /// The number of runs.
    pub repeats: Repeats,
    /// The time limit of a launch.
    pub watch: &'a Watch,
}

impl Bench<'_> {
    /// Verifies and times a kernel. Errors end in the row. There is no row if a signal came before
    /// the kernel was verified.
    pub fn measure(&self, mut row: Row, progress: &Progress) -> Option<(Row, Vec<Check>)> {
        let mut checks = Vec::new();
        if let Err(error) = self.try_measure(&mut row, &mut checks, progress) {
            if matches!(error, Error::Stopped) {
                return None;
            } else if error.is_out_of_memory() {
                row.status = Status::Oom;
                let memory = self.subject.session().device().memory_info();
                row.free_bytes = memory.ok().map(|m| m.free);
                row.reason = format!("ran out in spite of the prediction: {error}");
            } else {
                row.status = Status::Failed;
                row.reason = error.to_string();
            }
        }
        Some((row, checks))
    }

    fn try_measure(
        &self,
        row: &mut Row,
        checks: &mut Vec<Check>,
        progress: &Progress,
    ) -> Result<(), Error> {
        let title = format!("N {}, {}: {}", row.seq, row.level, row.kernel);
        progress.doing(format!("{title}: verifying"));
        let launch = |work: &mut dyn Work| self.watch.launch(Duration::ZERO, || work.launch());
        let mut ran = self.subject.run(&row.kernel, None, &launch)?;
        ran.write_to(row);
        checks.extend(ran.checks);
        progress.step();
        if let Some(bad) = checks.iter().find(|check| !check.passed()) {
            row.status = Status::Failed;
            row.reason = complaint(bad);
            return Ok(());
        }
        self.time(&mut *ran.work, row, &title, progress)
    }

    fn time(
        &self,
        work: &mut dyn Timed,
        row: &mut Row,
        title: &str,
        progress: &Progress,
    ) -> Result<(), Error> {
        let device = self.subject.session().device();
        if self.repeats.sustained.is_some() && !device.is_emulated() {
            thread::sleep(REST);
        }
        progress.doing(format!("{title}: warming up"));
        for _ in 0..self.repeats.warmup {
            if interrupt::requested() {
                break;
            }
            if unless_stopped(self.watch.launch(Duration::ZERO, || work.launch()))?.is_none() {
                break;
            }
            progress.step();
        }
        let mut times = Vec::with_capacity(self.repeats.iters);
        for run in 0..self.repeats.iters {
            if interrupt::requested() {
                break;
            }
            progress.doing(format!("{title}: run {} of {}", run + 1, self.repeats.iters));
            let timed = || work::time_ms(device, work, 0, 1);
            match unless_stopped(self.watch.launch(Duration::ZERO, timed))? {
                Some(more) => times.extend(more),
                None => break,
            }
            progress.step();
        }
        match Times::of(&times) {
            Some(times) => times.write_to(row),
            None => row.reason = "stopped before it was timed".into(),
        }
        self.time_passes(work, row, title, progress)?;
        if let Some(seconds) = self.repeats.sustained.filter(|_| !interrupt::requested()) {
            progress.doing(format!("{title}: back to back"));
            let runs = runs_in(seconds, row);
            // A GPU may be slower at its power limit than it was in a burst.
            let together = Duration::from_secs_f64(4.0 * seconds);
            let sustained = || work::sustained_ms(device, work, runs);
            if let Some(ms) = unless_stopped(self.watch.launch(together, sustained))? {
                write_sustained(row, ms);
            }
        }
        Ok(())
    }

    /// Times the forward and the backward pass alone, where there are both.
    fn time_passes(
        &self,
        work: &mut dyn Timed,
        row: &mut Row,
        title: &str,
        progress: &Progress,
    ) -> Result<(), Error> {
        let passes = [
            (Passes::Forward, "forward", &mut row.forward_ms),
            (Passes::Backward, "backward", &mut row.backward_ms),
        ];
        for (pass, name, to) in passes {
            if interrupt::requested() || !work.take(pass) {
                return Ok(());
            }
            progress.doing(format!("{title}: {name} alone"));
            let device = self.subject.session().device();
            let timed = || work::time_ms(device, work, 0, self.repeats.iters);
            let together = Duration::from_secs(0);
            let Some(times) = unless_stopped(self.watch.launch(together, timed))? else { break };
            *to = Times::of(&times).map(|times| times.median());
        }
        work.take(Passes::Both);
        Ok(())
    }
}

/// The result of launches that no signal stopped.
fn unless_stopped<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(Error::Stopped) => Ok(None),
        other => other.map(Some),
    }
}
