//! Records the commit that the program is built from.

use std::{env, fmt::Write as _, fs, path::Path, process::Command};

/// The folder of the kernels' sources, below the root.
const KERNELS: &str = "kernels-gpu/src";

/// The folders whose contents decide whether the work tree differs from the commit.
const SOURCES: [&str; 5] = ["src", "build.rs", "../src", "../kernels-gpu/src", "../simt/src"];

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// Writes a table of the kernels' source files, as `include_str!` of each: an installed program has
/// them without the repository.
fn embed_kernels() {
    let of = |name| env::var(name).unwrap_or_default();
    let root = Path::new(&of("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    collect(&root, KERNELS, &mut files);
    files.sort();
    let mut table = String::from("&[\n");
    for file in files {
        let path = root.join(&file);
        let _ = writeln!(table, "    ({file:?}, include_str!({path:?})),");
    }
    table += "]\n";
    let to = Path::new(&of("OUT_DIR")).join("kernel_sources.rs");
    if let Err(error) = fs::write(&to, table) {
        panic!("{} cannot be written: {error}", to.display());
    }
}

/// Names of the Rust files below `folder`, which is below `root`, with `/` between their parts.
fn collect(root: &Path, folder: &str, files: &mut Vec<String>) {
    let entries = fs::read_dir(root.join(folder));
    let entries = entries.unwrap_or_else(|error| panic!("{folder} cannot be read: {error}"));
    for entry in entries.flatten() {
        let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            collect(root, &name, files);
        } else if name.ends_with(".rs") {
            files.push(name);
        }
    }
}

fn main() {
    let commit = git(&["describe", "--always", "--tags", "--dirty"]);
    println!("cargo::rustc-env=HOST_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    embed_kernels();
    // A commit moves the log of HEAD, wherever HEAD is attached.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
}
