//! The end of a command: exit codes, and the one line that says why.
//!
//! 0: done and right. 1: a verdict was bad, or work failed. 2: the request cannot be met as it
//! stands. 128 + signal (130: Ctrl-C): stopped by a signal; the results so far are still printed
//! and written.

use std::{fmt, process::ExitCode};

use flash_attention::error::Unsupported;
use flash_attention_distributed::Error as SeveralError;

use crate::interrupt;

/// The result of a command that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All work is done and right.
    Good,
    /// A verdict was bad, or a row failed.
    Bad,
    /// A signal came first.
    Interrupted,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Good => Self::SUCCESS,
            Outcome::Bad => Self::from(1),
            Outcome::Interrupted => Self::from(interrupt::exit_code()),
        }
    }
}

/// A request that cannot be met as it stands: the wrong value and the right one.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The exit code for an error.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let usage = error.chain().any(|cause| {
        cause.is::<Usage>()
            || cause.is::<Unsupported>()
            || cause.downcast_ref::<flash_attention::Error>().is_some_and(|e| e.is_usage())
            || cause.downcast_ref::<SeveralError>().is_some_and(|e| e.is_usage())
    });
    if usage { 2 } else { 1 }
}

/// `error: …` on one line: colons join the causes, and line ends become spaces.
#[must_use]
pub fn line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Some errors tell their cause themselves.
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    format!("error: {}", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Clap's message about arguments, without its usage and hints on further lines; the whole help if
/// no command was given.
#[must_use]
pub fn clap_line(error: &clap::Error) -> String {
    let text = error.to_string();
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return text.trim_end().to_owned();
    }
    let first = text.split("\n\n").next().unwrap_or(&text);
    let tip = text.lines().map(str::trim).find_map(|line| line.strip_prefix("tip: "));
    let mut line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some(tip) = tip {
        line = format!("{line} ({tip})");
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_decide_the_exit_code() {
        let usage: Result<(), _> = Err(Usage("seq = 0".into()));
        let error = usage.context("while\nreading").unwrap_err();
        assert_eq!(
            (exit_code(&error), line(&error).as_str()),
            (2, "error: while reading: seq = 0")
        );
        assert_eq!(exit_code(&anyhow::anyhow!("broken")), 1);
        let missing = flash_attention::Error::UnknownDType { given: "f8".into() };
        assert_eq!(exit_code(&missing.into()), 2);
        let unsupported = Unsupported { kernel: "naive", reason: "needs more".into() };
        assert_eq!(exit_code(&unsupported.clone().into()), 2);
        assert_eq!(exit_code(&flash_attention::Error::from(unsupported).into()), 2);
        let shared = SeveralError::Unsupported { what: "dropout", by: "heads", remedy: "none" };
        assert_eq!(exit_code(&shared.into()), 2);
        let lost = SeveralError::Lost { rank: 1, reason: "ended".into() };
        assert_eq!(exit_code(&lost.into()), 1);
        let failed = flash_attention::Error::BadAddress { address: 0, bytes: 1 };
        assert_eq!(exit_code(&failed.into()), 1);
    }

    #[test]
    fn a_reason_is_told_once() {
        let source = std::io::Error::other("no such file");
        let error = flash_attention::Error::Io { path: "a".into(), source };
        assert_eq!(line(&error.into()), "error: a: no such file");
    }
}
