//! Sees to it that the PTX in the library belongs to the kernel sources.
//!
//! `kernels-gpu` packs the checked-in PTX. In a checkout of the repository whose kernels
//! were edited since, the PTX is compiled again (see `docs/rust-to-ptx.md`), and the
//! library embeds that (`cfg(fresh_ptx)`). A published package has nothing to check.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::{env, io};

#[path = "build/sources.rs"]
#[allow(dead_code)] // The builder needs the rest.
mod sources;

fn main() -> ExitCode {
    println!("cargo::rustc-check-cfg=cfg(fresh_ptx)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let in_repository = root.join("ptx-builder").is_dir();
    if !in_repository || env::var_os("CARGO_FEATURE_PTX").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed=kernels-gpu/ptx");
    for watched in sources::WATCHED {
        println!("cargo::rerun-if-changed={watched}");
    }
    match fresh_ptx(root) {
        Ok(true) => println!("cargo::rustc-cfg=fresh_ptx"),
        Ok(false) => {}
        Err(error) => {
            for line in error.to_string().lines() {
                println!("cargo::error={line}");
            }
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Leaves PTX of the sources in `$OUT_DIR/ptx` and answers true, unless the checked-in
/// PTX is of these sources.
fn fresh_ptx(root: &Path) -> io::Result<bool> {
    let sources = sources::fingerprint(root)?;
    if sources::belong(&root.join("kernels-gpu/ptx"), &sources) {
        return Ok(false);
    }
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo sets no OUT_DIR"))?;
    let folder = Path::new(&out).join("ptx");
    // An earlier run of this script may have left it.
    if !sources::belong(&folder, &sources) {
        compile(root, &folder)?;
    }
    Ok(true)
}

/// Has `ptx-builder` compile the kernels into `folder`.
fn compile(root: &Path, folder: &Path) -> io::Result<()> {
    let target = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), |target| root.join(target));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        // The outer build's settings (clippy's wrapper, target, flags) are not for this one.
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .args(["run", "--quiet", "--package", "ptx-builder"])
        // The lock of the outer build's target folder is taken.
        .arg("--target-dir")
        .arg(target.join("ptx").join("builder"))
        .args(["--", "write", "--dir"])
        .arg(folder)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    for warning in said.lines().filter_map(|line| line.strip_prefix("warning: ")) {
        println!("cargo::warning={warning}");
    }
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "the kernels were edited, so that the checked-in PTX no longer fits, and compiling \
         them failed; to build without PTX, leave out the feature `ptx`: cargo build \
         --no-default-features --features emulator\n{}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    )))
}
