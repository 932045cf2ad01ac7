//! The pipeline's commands, run in a checkout of the repository.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{env, fs};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ptx_builder::manifest::{self, Manifest};
use ptx_builder::{
    MODULES, Module, Workspace, combinations, compile, overlap, pack, ptxas, sources,
};

const USAGE: &str = "\
ptx-builder: from the kernels' Rust to checked-in PTX

usage: cargo run -p ptx-builder -- COMMAND

  write [--dir DIR]       compile every module and write kernels-gpu/ptx, or DIR
  check                   fail unless the checked-in PTX belongs to the sources
  check --rebuild         also compile every module and compare the text; it must be
                          identical when this rustc is the one of the manifest
  text [ENTRY]            print the checked-in PTX, or one entry of it
  ptxas [--dir DIR]       assemble every entry for every architecture that loads it;
                          fail on a spill, a stack frame, local memory, a warning,
                          or products that are waited for before the work beside them
  disassemble ENTRY ARCH [CONSTANTS]
                          print the machine code of one entry, for example for sm_90 and
                          with causal or causal+padding on; full, all off, unless given
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let workspace = Workspace::of_this_crate();
    let done = match arguments.as_slice() {
        ["write"] => write(&workspace, &workspace.checked_in()),
        ["write", "--dir", folder] => write(&workspace, Path::new(folder)),
        ["check"] => check(&workspace).map(drop),
        ["check", "--rebuild"] => check_rebuild(&workspace),
        ["text"] => text(&workspace),
        ["text", entry] => text_of(&workspace, entry),
        ["ptxas"] => assemble(&workspace, &workspace.checked_in()),
        ["ptxas", "--dir", folder] => assemble(&workspace, Path::new(folder)),
        ["disassemble", entry, arch] => disassemble(&workspace, entry, arch, "full"),
        ["disassemble", entry, arch, constants] => disassemble(&workspace, entry, arch, constants),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(workspace: &Workspace, folder: &Path) -> Result<()> {
    let build = compile::build(workspace)?;
    ensure!(!build.modules.is_empty(), "no kernel has an entry");
    let (_, bytes) = manifest::write(&build, folder)?;
    for built in &build.modules {
        let (name, ptx) = (built.module.name, &built.ptx);
        let (entries, kib) = (ptx.entries.len(), ptx.text.len() / 1024);
        println!("{name}: {entries} entries, {kib} KiB");
        for function in &ptx.local_memory {
            println!("warning: {function} keeps an array in local memory");
        }
    }
    let kib = bytes / 1024;
    println!("{kib} KiB written to {} with {}", folder.display(), build.rustc);
    Ok(())
}

/// The checked-in manifest, if it and the pack belong to the sources.
fn check(workspace: &Workspace) -> Result<Manifest> {
    let folder = workspace.checked_in();
    let cure = "write it with: cargo run -p ptx-builder -- write";
    let manifest = Manifest::read(&folder)?
        .with_context(|| format!("no PTX is checked in at {}; {cure}", folder.display()))?;
    ensure!(
        manifest.sources == sources::fingerprint(workspace.root())?,
        "the checked-in PTX is older than the kernel sources; {cure}"
    );
    manifest.texts(&folder).context(cure)?;
    let entries: usize = manifest.modules.iter().map(|record| record.entries).sum();
    println!("the checked-in PTX belongs to the sources: {entries} entries, {}", manifest.rustc);
    Ok(manifest)
}

fn check_rebuild(workspace: &Workspace) -> Result<()> {
    let checked_in = check(workspace)?;
    let build = compile::build(workspace)?;
    let folder = workspace.target().join("rebuilt");
    let (rebuilt, _) = manifest::write(&build, &folder)?;
    println!("rebuilt into {}", folder.display());
    if rebuilt.modules == checked_in.modules {
        println!("the rebuilt text is identical to the checked-in text");
        return Ok(());
    }
    let differing: Vec<&str> = MODULES
        .iter()
        .filter(|module| {
            let of = |manifest: &Manifest| {
                manifest.modules.iter().find(|record| record.module == **module).cloned()
            };
            of(&rebuilt) != of(&checked_in)
        })
        .map(|module| module.name)
        .collect();
    let differing = differing.join(", ");
    if rebuilt.rustc == checked_in.rustc {
        bail!("the same compiler makes another text for {differing}: {}", rebuilt.rustc);
    }
    println!(
        "the text differs for {differing}, as another compiler's may: {}, checked in by {}",
        rebuilt.rustc, checked_in.rustc
    );
    Ok(())
}

fn text(workspace: &Workspace) -> Result<()> {
    let texts = pack::read(&workspace.checked_in())?;
    print(&texts.into_iter().map(|(_, text)| text).collect::<String>())
}

fn text_of(workspace: &Workspace, entry: &str) -> Result<()> {
    print(&find(workspace, entry)?.1)
}

/// Prints a text; a reader that has seen enough is no error.
fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// One checked-in entry, and its module.
fn find(workspace: &Workspace, entry: &str) -> Result<(Module, String)> {
    pack::read(&workspace.checked_in())?
        .into_iter()
        .find_map(|(module, text)| Some((module, pack::entry(&text, entry)?)))
        .with_context(|| format!("no checked-in module has the entry {entry}"))
}

fn assemble(workspace: &Workspace, folder: &Path) -> Result<()> {
    let texts = pack::read(folder)?;
    let cubins = workspace.target().join("cubins");
    let units = ptxas::units(&texts);
    let report = ptxas::assemble(&units, &cubins)?;
    print!("{}", ptxas::table(&report));
    let mut complaints = ptxas::local_memory(&texts);
    complaints.extend(ptxas::complaints(&report));
    for unit in &units {
        if unit.text.contains("wgmma") {
            for arch in unit.module.assemble_for {
                complaints.extend(overlap::complaints(&ptxas::cubin(&cubins, unit, arch))?);
            }
        }
    }
    for complaint in &complaints {
        println!("{complaint}");
    }
    ensure!(complaints.is_empty(), "{} complaints about {}", complaints.len(), folder.display());
    println!(
        "no spill or stack frame beyond those listed, no local memory, no warning, no wait before its work"
    );
    Ok(())
}

fn disassemble(workspace: &Workspace, entry: &str, arch: &str, constants: &str) -> Result<()> {
    let (_, text) = find(workspace, entry)?;
    let combination = combinations::parse(constants, &text).map_err(|what| anyhow!(what))?;
    let text = combinations::specialise(entry, &text, &combination);
    let (ptxas, nvdisasm) = (ptxas::find_tool("ptxas")?, ptxas::find_tool("nvdisasm")?);
    let ptx = workspace.target().join(format!("{entry}.{constants}.ptx"));
    let cubin = workspace.target().join(format!("{entry}.{constants}.{arch}.cubin"));
    fs::create_dir_all(workspace.target())
        .and_then(|()| fs::write(&ptx, text))
        .with_context(|| format!("cannot write {}", ptx.display()))?;
    run(Command::new(ptxas).arg(format!("-arch={arch}")).arg(ptx).arg("-o").arg(&cubin))?;
    run(Command::new(nvdisasm).arg("-c").arg(cubin))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}
