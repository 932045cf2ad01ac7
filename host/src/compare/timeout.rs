//! `--timeout`: a launch that does not end. A device that hangs answers no request, and the thread
//! that waits for it cannot be stopped. So another thread watches the clock. When a launch has used
//! up its time, that thread reports the results so far and ends the process.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::results::{Results, Row, Status};

/// Watches launches.
#[derive(Default)]
pub struct Watch {
    limit: Option<Duration>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The time at which the running launch has used up its limit.
    deadline: Option<Instant>,
    /// The report for that case.
    report: Results,
    /// No launch will follow.
    over: bool,
}

impl Watch {
    /// Seconds that a launch may take; without a value there is no limit.
    #[must_use]
    pub fn new(seconds: Option<f64>) -> Self {
        Self { limit: seconds.map(Duration::from_secs_f64), ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The launches that follow belong to this row, and come after these results.
    pub fn expect(&self, results: &Results, row: &Row) {
        let Some(limit) = self.limit else { return };
        let mut report = results.clone();
        report.rows.push(Row {
            status: Status::Timeout,
            reason: format!("a launch took longer than {} s (--timeout)", limit.as_secs_f64()),
            ..row.clone()
        });
        self.state().report = report;
    }

    /// Runs a launch, or launches that are known to take `beyond` together.
    pub fn launch<T>(&self, beyond: Duration, launch: impl FnOnce() -> T) -> T {
        let Some(limit) = self.limit else { return launch() };
        self.state().deadline = Some(Instant::now() + limit + beyond);
        self.changed.notify_one();
        let result = launch();
        self.state().deadline = None;
        result
    }

    /// When this is dropped no launch follows, and [`Watch::wait`] returns.
    pub fn until_dropped(&self) -> Over<'_> {
        Over(self)
    }

    /// Waits for the end, or for a launch that takes too long. In that case `report` gets the
    /// results and must end the process. Meanwhile its thread blocks the other threads, so that
    /// none of them also reports.
    pub fn wait(&self, report: impl FnOnce(Results)) {
        let mut state = self.state();
        loop {
            let left = state.deadline.map(|d| d.saturating_duration_since(Instant::now()));
            state = match left {
                _ if state.over => return,
                Some(Duration::ZERO) => return report(std::mem::take(&mut state.report)),
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Ends a watch.
pub struct Over<'a>(&'a Watch);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.changed.notify_one();
    }
}

/// Ends the process without asking the driver to tidy up, which would wait for the device.
pub fn end_process(code: i32) -> ! {
    // SAFETY: it takes no pointers and returns to nobody.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);

    #[test]
    fn a_launch_that_hangs_is_reported_with_what_came_before() {
        let watch = Watch::new(Some(LIMIT.as_secs_f64()));
        let (sender, receiver) = mpsc::channel();
        let rows = thread::scope(|scope| {
            scope.spawn(|| watch.wait(|results| sender.send(results).unwrap()));
            let done = Row { kernel: "done".into(), ..Row::default() };
            let results = Results { rows: vec![done], ..Results::default() };
            watch.expect(&results, &Row { kernel: "hung".into(), ..Row::default() });
            // It hangs until it is reported.
            watch.launch(Duration::ZERO, || receiver.recv().unwrap().rows)
        });
        assert_eq!((rows[0].kernel.as_str(), rows[0].status), ("done", Status::Ok));
        assert_eq!((rows[1].kernel.as_str(), rows[1].status), ("hung", Status::Timeout));
        assert!(rows[1].reason.contains("longer than 0.02 s"), "{}", rows[1].reason);
    }

    #[test]
    fn launches_in_time_are_not() {
        for seconds in [None, Some(30.0)] {
            let watch = Watch::new(seconds);
            thread::scope(|scope| {
                scope.spawn(|| watch.wait(|_| panic!("reported")));
                watch.expect(&Results::default(), &Row::default());
                assert_eq!(watch.launch(Duration::ZERO, || 7), 7);
                drop(watch.until_dropped());
            });
        }
        // Launches that are long together have their time: between launches there is no limit.
        let watch = Watch::new(Some(LIMIT.as_secs_f64()));
        thread::scope(|scope| {
            scope.spawn(|| watch.wait(|_| panic!("reported")));
            watch.launch(Duration::from_secs(60), || thread::sleep(3 * LIMIT));
            thread::sleep(3 * LIMIT);
            drop(watch.until_dropped());
        });
    }
}
