//! Records the commit that the program is built from.

use std::process::Command;

/// The folders whose contents decide whether the work tree differs from the commit.
const SOURCES: [&str; 5] = ["src", "build.rs", "../src", "../kernels-gpu/src", "../simt/src"];

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

fn main() {
    let commit = git(&["describe", "--always", "--tags", "--dirty"]);
    println!("cargo::rustc-env=HOST_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    // A commit moves the log of HEAD, wherever HEAD is attached.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
}
