//! The sources that decide what the PTX says, and their fingerprint.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{Workspace, compile};

/// Files and folders the kernels are compiled from, relative to the root.
///
/// A build script watches exactly these for changes.
pub const WATCHED: &[&str] =
    &["kernels-gpu/src", "kernels-gpu/Cargo.toml", "simt/src", "simt/Cargo.toml"];

/// The part of `simt` that exists on the host only: it cannot change the PTX.
const HOST_ONLY: &[&str] = &["simt/src/emulator", "simt/src/emulator.rs"];

/// Fingerprint of the kernel sources and of the flags they are compiled with.
///
/// Comment lines, blank lines and line endings do not count: a documentation edit
/// leaves the checked-in PTX valid.
///
/// # Errors
/// When a source cannot be read.
pub fn fingerprint(workspace: &Workspace) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(compile::recipe());
    for relative in files(workspace)? {
        let path = workspace.root().join(&relative);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("cannot read the kernel source {}", path.display()))?;
        hasher.update(format!("\n== {relative}\n"));
        hasher.update(significant(&text));
    }
    Ok(hex(&hasher.finalize()))
}

/// Fingerprint of one text, line endings normalised.
#[must_use]
pub fn fingerprint_text(text: &str) -> String {
    hex(&Sha256::digest(text.replace("\r\n", "\n")))
}

/// Every file that counts, relative to the root with `/` between parts, sorted.
fn files(workspace: &Workspace) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for watched in WATCHED {
        collect(workspace.root(), Path::new(watched), &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn collect(root: &Path, relative: &Path, found: &mut Vec<String>) -> Result<()> {
    let name = relative.to_string_lossy().replace('\\', "/");
    if HOST_ONLY.contains(&name.as_str()) {
        return Ok(());
    }
    let path = root.join(relative);
    if path.is_dir() {
        let children =
            fs::read_dir(&path)
                .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
                .with_context(|| format!("cannot list the kernel sources in {}", path.display()))?;
        for child in children {
            collect(root, &PathBuf::from(relative).join(child.file_name()), found)?;
        }
    } else if name.ends_with(".rs") || name.ends_with(".toml") {
        found.push(name);
    }
    Ok(())
}

/// The lines that a compiler sees: not blank, not wholly a comment.
fn significant(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    for line in text.lines().map(str::trim_end) {
        if !line.is_empty() && !line.trim_start().starts_with("//") {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace(name: &str, kernel: &str) -> Workspace {
        let root = std::env::temp_dir().join(format!("ptx-builder-{}-{name}", std::process::id()));
        for folder in ["kernels-gpu/src", "simt/src/emulator"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("kernels-gpu/src/lib.rs"), kernel).unwrap();
        fs::write(root.join("kernels-gpu/Cargo.toml"), "[package]\n").unwrap();
        fs::write(root.join("simt/src/lib.rs"), "pub mod emulator;\n").unwrap();
        fs::write(root.join("simt/Cargo.toml"), "[package]\n").unwrap();
        fs::write(root.join("simt/src/emulator/mod.rs"), kernel).unwrap();
        Workspace::new(root)
    }

    fn fingerprint_of(name: &str, kernel: &str) -> String {
        let workspace = workspace(name, kernel);
        let print = fingerprint(&workspace).unwrap();
        fs::remove_dir_all(workspace.root()).unwrap();
        print
    }

    #[test]
    fn line_endings_comments_and_blank_lines_do_not_count() {
        let plain = fingerprint_of("plain", "fn a() {}\nfn b() {}\n");
        assert_eq!(plain, fingerprint_of("crlf", "fn a() {}\r\nfn b() {}\r\n"));
        assert_eq!(plain, fingerprint_of("docs", "//! Doc.\nfn a() {}\n\n    // b\nfn b() {}\n"));
    }

    #[test]
    fn code_counts_and_the_emulator_does_not() {
        let before = workspace("code", "fn a() {}\n");
        let first = fingerprint(&before).unwrap();
        fs::write(before.root().join("simt/src/emulator/mod.rs"), "fn other() {}\n").unwrap();
        assert_eq!(first, fingerprint(&before).unwrap());
        fs::write(before.root().join("simt/src/lib.rs"), "pub mod emulator;\nfn x() {}\n").unwrap();
        assert_ne!(first, fingerprint(&before).unwrap());
        fs::remove_dir_all(before.root()).unwrap();
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = fingerprint(&Workspace::new("/nowhere")).unwrap_err();
        assert!(format!("{error:#}").contains("kernels-gpu"), "{error:#}");
    }
}
