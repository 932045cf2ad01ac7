//! rustc's part: `kernels-gpu` to PTX, every module at the same time.
//!
//! Cargo builds `core` and the crates below the kernels once, in a target folder of
//! its own. The kernels themselves are then compiled by rustc directly, one process a
//! module: cargo would run them one after the other behind the lock of that folder.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs, thread};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::post::{self, Ptx};
use crate::{MODULES, Module, Workspace, sources};

const TARGET: &str = "nvptx64-nvidia-cuda";

/// Flags of every crate. The MIR pass JumpThreading may copy the code behind an `if`
/// into both branches, and a barrier that exists twice is a barrier that half of the
/// block waits at: it stays off. No kernel can report a panic, so none carries the
/// text of one.
const COMMON_FLAGS: &[&str] = &[
    "-Zmir-enable-passes=-JumpThreading",
    "-Zlocation-detail=none",
    "-Csymbol-mangling-version=v0",
    "-Cpanic=abort",
];

/// Further flags of the kernels themselves.
const KERNEL_FLAGS: &[&str] = &[
    "--crate-name=kernels_gpu",
    "--crate-type=rlib",
    "--edition=2024",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Cdebuginfo=0",
    "-Cmetadata=kernels_gpu",
];

/// The result of [`build`].
#[derive(Debug)]
pub struct Build {
    /// Fingerprint of the sources it was made from.
    pub sources: String,
    /// First line of `rustc --version`.
    pub rustc: String,
    /// The modules that hold at least one entry, in the order of [`MODULES`].
    pub modules: Vec<Built>,
}

/// One module of a [`Build`].
#[derive(Debug)]
pub struct Built {
    /// The module.
    pub module: Module,
    /// Its processed text.
    pub ptx: Ptx,
}

/// Compiles every module from the sources of `workspace`.
///
/// # Errors
/// When `rust-src` is missing (the message says how to add it), when the kernels do
/// not compile (the message is rustc's), or when the text is not what
/// [`post::process`] accepts.
pub fn build(workspace: &Workspace) -> Result<Build> {
    let rustc = Rustc::find()?;
    ensure!(
        rustc.has_source(),
        "compiling the kernels to PTX needs the source of `core`, which {} lacks; \
         add it with: rustup component add rust-src",
        rustc.version
    );
    let sources = sources::fingerprint(workspace.root())?;
    let externs = build_dependencies(workspace, &rustc)?;
    let folder = workspace.target();

    let built: Result<Vec<Built>> = thread::scope(|scope| {
        let jobs: Vec<_> = MODULES
            .iter()
            .map(|module| {
                let (rustc, externs, folder) = (&rustc, &externs, &folder);
                let source = Path::new("kernels-gpu/src/lib.rs");
                scope.spawn(move || emit(workspace, rustc, externs, folder, source, *module))
            })
            .collect();
        jobs.into_iter()
            .map(|job| job.join().map_err(|_| anyhow!("a PTX build thread panicked"))?)
            .collect()
    });
    let modules = built?.into_iter().filter(|built| !built.ptx.entries.is_empty()).collect();
    Ok(Build { sources, rustc: rustc.version, modules })
}

/// Compiles a crate of its own, `source`, against the crates below the kernels, as one module.
///
/// # Errors
/// As [`build`].
pub fn source(workspace: &Workspace, source: &Path, module: Module) -> Result<Ptx> {
    let rustc = Rustc::find()?;
    ensure!(rustc.has_source(), "{} lacks the source of `core`", rustc.version);
    let externs = build_dependencies(workspace, &rustc)?;
    let folder = workspace.target().join("source");
    Ok(emit(workspace, &rustc, &externs, &folder, source, module)?.ptx)
}

/// The compiler in use.
#[derive(Debug)]
pub struct Rustc {
    program: OsString,
    /// First line of its `--version`.
    pub version: String,
    sysroot: PathBuf,
}

impl Rustc {
    /// Asks `$RUSTC`, or `rustc` on the path, who it is.
    ///
    /// # Errors
    /// When there is none that answers.
    pub fn find() -> Result<Self> {
        let program = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let ask = |arguments: &[&str]| -> Result<String> {
            let output = succeed(Command::new(&program).args(arguments))?;
            Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned())
        };
        let version = ask(&["--version"])?;
        let sysroot = ask(&["--print", "sysroot"])?.into();
        Ok(Self { program, version, sysroot })
    }

    /// Whether the source of `core` is installed (the component `rust-src`).
    #[must_use]
    pub fn has_source(&self) -> bool {
        self.sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file()
    }
}

/// Builds `core` and the crates below the kernels; returns how rustc is told of them.
///
/// `kernels-gpu` itself is built too, without a module and so without an entry: what
/// is wrong in its sources is reported here, once instead of once a module.
fn build_dependencies(workspace: &Workspace, rustc: &Rustc) -> Result<Vec<OsString>> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // An outer build's settings (clippy's wrapper, flags for the host) are not for this one.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let inherited = ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"];
        if inherited.contains(&&*text)
            || text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_BUILD_")
        {
            command.env_remove(&name);
        }
    }
    command
        .current_dir(workspace.root())
        .env("RUSTC", &rustc.program)
        .env("RUSTC_BOOTSTRAP", "1")
        // Warnings belong to the host's build of the same sources, which clippy checks.
        .env(
            "RUSTFLAGS",
            format!("{} -Ctarget-cpu={} -Awarnings", COMMON_FLAGS.join(" "), MODULES[0].name),
        )
        .args(["build", "--release", "--package", "kernels-gpu", "--lib"])
        .arg("--no-default-features")
        .args(["-Zbuild-std=core", "--target", TARGET, "--target-dir"])
        .arg(workspace.target())
        // Nothing links these objects: only their metadata is read.
        .args(["--config", "profile.release.codegen-units=16"])
        .arg("--message-format=json-render-diagnostics");
    let output = succeed(&mut command).context("the kernels do not compile for the GPU")?;

    let mut externs = Vec::new();
    let mut folders: BTreeSet<PathBuf> = BTreeSet::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        // The folder of every artifact, since a library may need a procedural macro.
        folders.extend(files(&message).filter_map(Path::parent).map(Path::to_path_buf));
        let Some((name, path)) = library(&message) else { continue };
        if name == "kernels_gpu" {
            continue;
        }
        let kind = if matches!(&*name, "core" | "compiler_builtins") { "noprelude:" } else { "" };
        let mut value = OsString::from(format!("--extern={kind}{name}="));
        value.push(path);
        externs.push(value);
    }
    ensure!(!externs.is_empty(), "cargo reported no library for {TARGET}");
    for folder in folders {
        let mut value = OsString::from("-Ldependency=");
        value.push(folder);
        externs.push(value);
    }
    Ok(externs)
}

/// The files of an artifact that one of cargo's messages reports.
fn files(message: &Value) -> impl Iterator<Item = &Path> {
    let artifact = message["reason"] == "compiler-artifact";
    let files = message["filenames"].as_array().filter(|_| artifact);
    files.into_iter().flatten().filter_map(Value::as_str).map(Path::new)
}

/// Name and metadata file of a library for the GPU, from one of cargo's messages.
fn library(message: &Value) -> Option<(String, &Path)> {
    let path = files(message).find(|file| file.extension().is_some_and(|e| e == "rmeta"))?;
    let for_gpu = path.components().any(|part| part.as_os_str() == TARGET);
    let name = message["target"]["name"].as_str()?.replace('-', "_");
    for_gpu.then_some((name, path))
}

/// Compiles one module and processes its text.
fn emit(
    workspace: &Workspace,
    rustc: &Rustc,
    externs: &[OsString],
    folder: &Path,
    source: &Path,
    module: Module,
) -> Result<Built> {
    let folder = folder.join(module.name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let raw = folder.join("kernels_gpu.s");
    let mut command = Command::new(&rustc.program);
    command
        .current_dir(workspace.root())
        .env("RUSTC_BOOTSTRAP", "1")
        .arg(source)
        .args(["--target", TARGET, "-Zunstable-options", "--cap-lints=allow"])
        .args(KERNEL_FLAGS)
        .args(COMMON_FLAGS)
        .arg(format!("-Ctarget-cpu={}", module.name))
        .arg(format!("-Ctarget-feature=+{}", module.ptx_feature))
        .arg(format!("--cfg=feature=\"{}\"", module.name))
        .args(externs)
        .args(["--emit=asm", "--out-dir"])
        .arg(&folder);
    succeed(&mut command).with_context(|| format!("module {} does not compile", module.name))?;
    let text =
        fs::read_to_string(&raw).with_context(|| format!("cannot read {}", raw.display()))?;
    let ptx = post::process(&text).with_context(|| format!("in {}", raw.display()))?;
    Ok(Built { module, ptx })
}

/// Runs a command to its end; its output, or what it complained about as the error.
pub(crate) fn succeed(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{program} ended with {}:\n{}", output.status, complaint.trim_end());
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn libraries_are_read_from_cargos_messages() {
        let file = format!("/t/{TARGET}/release/deps/libsimt-1.rmeta");
        let message = json!({
            "reason": "compiler-artifact",
            "target": { "name": "simt" },
            "filenames": [file.replace("rmeta", "rlib"), file],
        });
        assert_eq!(library(&message), Some(("simt".into(), Path::new(&file))));
        assert_eq!(library(&json!({ "reason": "build-finished" })), None);
    }

    #[test]
    fn a_procedural_macro_of_the_host_is_no_library() {
        let message = json!({
            "reason": "compiler-artifact",
            "target": { "name": "zerocopy-derive" },
            "filenames": ["/t/release/deps/libzerocopy_derive-1.so"],
        });
        assert_eq!(library(&message), None);
    }
}
