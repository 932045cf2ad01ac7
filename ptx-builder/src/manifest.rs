//! `manifest.json`: what the pack of PTX beside it was made from, and what each text must
//! hash to. The texts are recorded and not the pack, whose bytes depend on the compressor.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::sources::MANIFEST;
use crate::{MODULES, Module, compile::Build, pack};

/// A folder of PTX as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Fingerprint of the kernel sources ([`crate::sources::fingerprint`]).
    pub sources: String,
    /// First line of `rustc --version` of the compiler that made the text.
    pub rustc: String,
    /// The modules that hold entries, in the order of [`MODULES`].
    pub modules: Vec<ModuleRecord>,
}

/// One module of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleRecord {
    /// The module.
    pub module: Module,
    /// SHA-256 of its text, in hexadecimal.
    pub sha256: String,
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
                sha256: sha256(&built.ptx.text),
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
        let path = folder.join(MANIFEST);
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
                    sha256: string(record, "sha256")?,
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
                let value = json!({ "sha256": record.sha256, "entries": record.entries });
                (record.module.name.to_owned(), value)
            })
            .collect();
        let value = json!({ "sources": self.sources, "rustc": self.rustc, "modules": modules });
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{value:#}");
        text
    }

    /// The texts in the pack of `folder`, if they are the recorded ones.
    ///
    /// # Errors
    /// When the pack cannot be read, or names the first module that is missing or differs.
    pub fn texts(&self, folder: &Path) -> Result<Vec<pack::Text>> {
        let texts = pack::read(folder)?;
        for record in &self.modules {
            let name = record.module.name;
            let text = texts.iter().find(|(module, _)| *module == record.module);
            let (_, text) = text.with_context(|| format!("the pack holds no module {name}"))?;
            let found = sha256(text);
            if found != record.sha256 {
                bail!(
                    "{name} is not the text its manifest records (sha256 {found}, recorded {})",
                    record.sha256
                );
            }
        }
        ensure!(texts.len() == self.modules.len(), "the pack holds a module without a record");
        Ok(texts)
    }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a build's pack and its manifest into `folder`; the manifest, and the bytes of
/// the pack.
///
/// # Errors
/// When the folder cannot be written.
pub fn write(build: &Build, folder: &Path) -> Result<(Manifest, usize)> {
    let texts: Vec<_> =
        build.modules.iter().map(|built| (built.module, &*built.ptx.text)).collect();
    let bytes = pack::write(&texts, folder)?;
    let manifest = Manifest::of(build);
    fs::write(folder.join(MANIFEST), manifest.to_json())
        .with_context(|| format!("cannot write to {}", folder.display()))?;
    Ok((manifest, bytes))
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
        let (written, _) = write(&build(), &folder).unwrap();
        assert_eq!(Manifest::read(&folder).unwrap(), Some(written.clone()));
        assert!(crate::sources::belong(&folder, "abc") && !crate::sources::belong(&folder, "ab"));
        let text = build().modules.remove(0).ptx.text;
        assert_eq!(written.texts(&folder).unwrap(), [(MODULES[1], text)]);

        for (texts, what) in [
            (vec![(MODULES[1], ".version 7.1\n")], "sm_80 is not the text"),
            (vec![(MODULES[0], ".version 7.0\n")], "holds no module sm_80"),
            (vec![(MODULES[1], ".version 7.0\n"), (MODULES[0], "")], "without a record"),
        ] {
            pack::write(&texts, &folder).unwrap();
            let error = written.texts(&folder).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
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
