//! `manifest.json`: what the PTX beside it was made from, and what it must hash to.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::sources::fingerprint_text;
use crate::{MODULES, Module, compile::Build};

/// Name of the manifest in a folder of PTX.
pub const FILE: &str = "manifest.json";

/// A folder of PTX as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Fingerprint of the kernel sources and flags ([`crate::sources::fingerprint`]).
    pub sources: String,
    /// First line of `rustc --version` of the compiler that made the text.
    pub rustc: String,
    /// The modules that hold entries, in the order of [`MODULES`].
    pub modules: Vec<ModuleRecord>,
}

/// One module of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleRecord {
    /// Which module.
    pub module: Module,
    /// Fingerprint of its text ([`fingerprint_text`]).
    pub text: String,
    /// How many entries it holds.
    pub entries: usize,
}

impl Manifest {
    /// The manifest of a fresh build.
    #[must_use]
    pub fn of(build: &Build) -> Self {
        let modules = build
            .modules
            .iter()
            .map(|built| ModuleRecord {
                module: built.module,
                text: fingerprint_text(&built.ptx.text),
                entries: built.ptx.entries.len(),
            })
            .collect();
        Self { sources: build.sources.clone(), rustc: build.rustc.clone(), modules }
    }

    /// Reads the manifest of a folder; `None` when there is none.
    ///
    /// # Errors
    /// When the file cannot be read or is no manifest.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        match fs::read_to_string(&path) {
            Ok(text) => {
                Self::parse(&text).map(Some).with_context(|| format!("in {}", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("not JSON")?;
        let string = |value: &Value, key: &str| -> Result<String> {
            let found = value.get(key).and_then(Value::as_str);
            Ok(found.with_context(|| format!("no text under {key:?}"))?.to_owned())
        };
        let listed = value.get("modules").and_then(Value::as_object);
        let listed = listed.context("no object under \"modules\"")?;
        let mut modules = Vec::new();
        for module in MODULES {
            if let Some(record) = listed.get(module.name) {
                let entries = record.get("entries").and_then(Value::as_u64);
                modules.push(ModuleRecord {
                    module: *module,
                    text: string(record, "sha256")?,
                    entries: usize::try_from(entries.context("no number under \"entries\"")?)?,
                });
            }
        }
        ensure!(modules.len() == listed.len(), "\"modules\" names one that does not exist");
        Ok(Self { sources: string(&value, "sources")?, rustc: string(&value, "rustc")?, modules })
    }

    /// The text of the file.
    #[must_use]
    pub fn to_json(&self) -> String {
        let modules: Map<String, Value> = self
            .modules
            .iter()
            .map(|record| {
                let value = json!({ "sha256": record.text, "entries": record.entries });
                (record.module.name.to_owned(), value)
            })
            .collect();
        let value = json!({ "sources": self.sources, "rustc": self.rustc, "modules": modules });
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{value:#}");
        text
    }

    /// Checks that every module's text in `folder` is the one recorded.
    ///
    /// # Errors
    /// Names the first module that is missing or differs.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        for record in &self.modules {
            let path = folder.join(file_name(&record.module));
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let found = fingerprint_text(&text);
            if found != record.text {
                bail!(
                    "{} is not the text its manifest records (sha256 {found}, recorded {})",
                    path.display(),
                    record.text
                );
            }
        }
        Ok(())
    }
}

/// Name of a module's file.
#[must_use]
pub fn file_name(module: &Module) -> String {
    format!("{}.ptx", module.name)
}

/// Writes a build's modules and their manifest into `folder`, and removes the files
/// of modules that no longer hold an entry.
///
/// # Errors
/// When the folder cannot be written.
pub fn write(build: &Build, folder: &Path) -> Result<Manifest> {
    let context = || format!("cannot write to {}", folder.display());
    fs::create_dir_all(folder).with_context(context)?;
    for module in MODULES {
        let path = folder.join(file_name(module));
        match build.modules.iter().find(|built| built.module == *module) {
            Some(built) => fs::write(&path, &built.ptx.text).with_context(context)?,
            None if path.exists() => fs::remove_file(&path).with_context(context)?,
            None => {}
        }
    }
    let manifest = Manifest::of(build);
    fs::write(folder.join(FILE), manifest.to_json()).with_context(context)?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compile::Built, post::Ptx};

    fn build() -> Build {
        let ptx = Ptx { text: ".version 7.0\n".into(), entries: vec![], local_memory: vec![] };
        Build {
            sources: "abc".into(),
            rustc: "rustc 1.0.0".into(),
            modules: vec![Built { module: MODULES[1], ptx }],
        }
    }

    #[test]
    fn what_is_written_reads_back_and_verifies() {
        let folder = std::env::temp_dir().join(format!("ptx-manifest-{}", std::process::id()));
        let written = write(&build(), &folder).unwrap();
        assert_eq!(Manifest::read(&folder).unwrap(), Some(written.clone()));
        written.verify(&folder).unwrap();

        fs::write(folder.join("sm_80.ptx"), ".version 7.0\r\n").unwrap();
        written.verify(&folder).unwrap();

        fs::write(folder.join("sm_80.ptx"), ".version 7.1\n").unwrap();
        let error = written.verify(&folder).unwrap_err().to_string();
        assert!(error.contains("sm_80.ptx is not the text"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn no_manifest_is_none_and_a_broken_one_says_where() {
        assert_eq!(Manifest::read(Path::new("/nowhere")).unwrap(), None);
        for (text, what) in [
            ("{", "not JSON"),
            (r#"{"modules": {}}"#, "sources"),
            (r#"{"sources": "", "rustc": "", "modules": {"sm_1": {}}}"#, "does not exist"),
            (r#"{"sources": "", "rustc": "", "modules": {"sm_80": {}}}"#, "sha256"),
        ] {
            let error = format!("{:#}", Manifest::parse(text).unwrap_err());
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
