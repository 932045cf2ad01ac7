//! Progress on a terminal; nothing where standard error is not one.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of so many steps.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar on standard error.
    #[must_use]
    pub fn new(steps: usize) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let target = ProgressDrawTarget::stderr();
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({elapsed})");
        Self(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// Says what is being done now.
    pub fn doing(&self, what: impl Into<String>) {
        self.0.set_message(what.into());
        self.0.tick();
    }

    /// One step is done.
    pub fn step(&self) {
        self.0.inc(1);
    }

    /// Prints with the bar out of the way.
    pub fn print(&self, text: &str) {
        self.0.suspend(|| print_lines(text));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Prints to standard output; a reader who has left (`| head`) is no failure.
pub fn print_lines(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    // Nothing is left to be told to a reader who has gone.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
