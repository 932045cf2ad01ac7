//! What the library's build script calls: the PTX to embed, compiled only if needed.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::compile::{self, Rustc};
use crate::manifest::{self, Manifest};
use crate::{Workspace, sources};

/// Name of the environment variable that says which PTX to embed.
pub const VARIABLE: &str = "FLASH_ATTENTION_PTX";
/// Its value for a library that can run kernels under the emulator only.
pub const EMULATOR_ONLY: &str = "emulator-only";
/// File that [`write_table`] makes.
pub const TABLE: &str = "ptx_modules.rs";

/// PTX that belongs to the kernel sources as they are now.
#[derive(Debug)]
pub struct Prepared {
    /// Folder of the modules; `None` when none are to be embedded.
    pub folder: Option<PathBuf>,
    /// What it holds.
    pub manifest: Option<Manifest>,
    /// Kernels that were just compiled and keep an array in local memory.
    pub local_memory: Vec<String>,
}

/// Finds or makes the PTX of the kernel sources.
///
/// In this order: nothing if `wish` (the value of [`VARIABLE`]) is `emulator-only`;
/// the checked-in PTX if it was made from these sources; what an earlier build left
/// in `out`; else a fresh compilation into `out`.
///
/// # Errors
/// When `wish` is another word, when checked-in text is not what its manifest
/// records, or when the kernels cannot be compiled; the message names the cure.
pub fn prepare(workspace: &Workspace, out: &Path, wish: Option<&str>) -> Result<Prepared> {
    match wish {
        None | Some("") => {}
        Some(EMULATOR_ONLY) => {
            return Ok(Prepared { folder: None, manifest: None, local_memory: Vec::new() });
        }
        Some(other) => bail!(
            "{VARIABLE}={other} means nothing; unset it, or set it to {EMULATOR_ONLY} to \
             build without PTX"
        ),
    }
    let sources = sources::fingerprint(workspace)?;
    let found = |folder: PathBuf, manifest: Manifest| Prepared {
        folder: Some(folder),
        manifest: Some(manifest),
        local_memory: Vec::new(),
    };

    let checked_in = workspace.checked_in();
    if let Some(manifest) = Manifest::read(&checked_in)?.filter(|m| m.sources == sources) {
        manifest.verify(&checked_in)?;
        return Ok(found(checked_in, manifest));
    }
    let rustc = Rustc::find()?;
    if let Ok(Some(manifest)) = Manifest::read(out)
        && manifest.sources == sources
        && manifest.rustc == rustc.version
        && manifest.verify(out).is_ok()
    {
        return Ok(found(out.to_path_buf(), manifest));
    }
    if !rustc.has_source() {
        bail!(
            "the kernels were edited, so that the checked-in PTX no longer fits, and {} \
             has no source of `core` to compile them with; add it with: rustup component \
             add rust-src, or build for the emulator alone with: \
             {VARIABLE}={EMULATOR_ONLY} cargo build",
            rustc.version
        );
    }
    let build = compile::build(workspace)?;
    let manifest = manifest::write(&build, out)?;
    let local_memory = build.modules.into_iter().flat_map(|built| built.ptx.local_memory).collect();
    Ok(Prepared { local_memory, ..found(out.to_path_buf(), manifest) })
}

/// Writes the Rust expression of the embedded modules, a `&[PtxModule]`, to `out`.
///
/// # Errors
/// When it cannot be written.
pub fn write_table(prepared: &Prepared, out: &Path) -> Result<()> {
    let mut table = String::from("&[\n");
    if let (Some(folder), Some(manifest)) = (&prepared.folder, &prepared.manifest) {
        for record in &manifest.modules {
            let module = record.module;
            let file = folder.join(manifest::file_name(&module));
            // Writing to a String cannot fail.
            let _ = writeln!(
                table,
                "    PtxModule {{ name: {:?}, compute_capability: {:?}, exact: {:?}, \
                 text: include_str!({:?}) }},",
                module.name, module.compute_capability, module.exact, file
            );
        }
    }
    table.push_str("]\n");
    let path = out.join(TABLE);
    fs::write(&path, table).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MODULES;
    use crate::manifest::ModuleRecord;

    #[test]
    fn emulator_only_embeds_nothing_and_looks_at_nothing() {
        let nowhere = Workspace::new("/nowhere");
        let prepared = prepare(&nowhere, Path::new("/nowhere"), Some(EMULATOR_ONLY)).unwrap();
        assert!(prepared.folder.is_none());
    }

    #[test]
    fn another_word_is_refused_with_the_right_one() {
        let nowhere = Workspace::new("/nowhere");
        let error = prepare(&nowhere, Path::new("/nowhere"), Some("none")).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("FLASH_ATTENTION_PTX=none"), "{error}");
        assert!(error.contains(EMULATOR_ONLY), "{error}");
    }

    #[test]
    fn the_table_names_each_module_and_its_file() {
        let out = std::env::temp_dir().join(format!("ptx-embed-{}", std::process::id()));
        fs::create_dir_all(&out).unwrap();
        let record = ModuleRecord { module: MODULES[2], text: String::new(), entries: 1 };
        let manifest =
            Manifest { sources: String::new(), rustc: String::new(), modules: vec![record] };
        let prepared = Prepared {
            folder: Some("/ptx".into()),
            manifest: Some(manifest),
            local_memory: Vec::new(),
        };
        write_table(&prepared, &out).unwrap();
        let table = fs::read_to_string(out.join(TABLE)).unwrap();
        assert!(table.contains(r#"name: "sm_90a", compute_capability: (9, 0), exact: true"#));
        assert!(table.contains(r#"include_str!("/ptx/sm_90a.ptx")"#), "{table}");
        fs::remove_dir_all(out).unwrap();
    }
}
