//! Terminal output: text on standard output, progress on standard error.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A file uses standard output.
static TO_STDERR: AtomicBool = AtomicBool::new(false);
/// The first failure to print.
static FAILURE: OnceLock<io::Error> = OnceLock::new();

/// A bar with the given number of steps.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar on standard error.
    #[must_use]
    pub fn new(steps: usize) -> Self {
        if !io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let target = ProgressDrawTarget::stderr();
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({elapsed})");
        Self(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// Shows the current work.
    pub fn doing(&self, what: impl Into<String>) {
        self.0.set_message(what.into());
        self.0.tick();
    }

    /// One step is done.
    pub fn step(&self) {
        self.0.inc(1);
    }

    /// Removes the bar.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }

    /// Prints with the bar hidden.
    pub fn print(&self, text: &str) {
        self.0.suspend(|| print_lines(text));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Prints to standard output, or to standard error if a file goes to standard output. A closed pipe
/// (`| head`) is no failure. Any other failure is reported at the end of the program, so that files
/// are written first ([`failure`]).
pub fn print_lines(text: &str) {
    if TO_STDERR.load(Ordering::Relaxed) {
        return warn(text);
    }
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            FAILURE.get_or_init(|| error);
        }
        _ => {}
    }
}

/// Prints to standard error. A failure here has no place left to be reported.
pub fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// From now on text goes to standard error.
pub fn print_to_stderr() {
    TO_STDERR.store(true, Ordering::Relaxed);
}

/// The reason that text could not be printed.
#[must_use]
pub fn failure() -> Option<&'static io::Error> {
    FAILURE.get()
}
