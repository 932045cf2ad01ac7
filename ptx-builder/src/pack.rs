//! The file that is checked in and embedded: every module's text in one zstd stream.
//!
//! A line `// module sm_80` stands before each text. The modules have much in common, so
//! that one stream is much smaller than a stream a module.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::sources::PACK;
use crate::{MODULES, Module};

/// How a line begins that names the module of the text below it.
const HEADING: &str = "// module ";
/// zstd's highest level that decoders need no more memory for.
const LEVEL: i32 = 19;

/// The text of one module.
pub type Text = (Module, String);

/// Writes the pack of `texts` into `folder`; its size in bytes.
///
/// # Errors
/// When the file cannot be written.
pub fn write(texts: &[(Module, &str)], folder: &Path) -> Result<usize> {
    let mut all = String::new();
    for (module, text) in texts {
        all.push_str(&format!("{HEADING}{}\n{text}", module.name));
    }
    let packed = zstd::bulk::compress(all.as_bytes(), LEVEL).context("cannot compress the PTX")?;
    let path = folder.join(PACK);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&path, &packed))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(packed.len())
}

/// The texts that the pack in `folder` holds.
///
/// # Errors
/// When it is missing or no pack.
pub fn read(folder: &Path) -> Result<Vec<Text>> {
    let path = folder.join(PACK);
    let read = || -> Result<Vec<Text>> {
        let all = zstd::decode_all(fs::File::open(&path)?)?;
        split(&String::from_utf8(all)?)
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn split(all: &str) -> Result<Vec<Text>> {
    let mut parts = all.split(HEADING);
    ensure!(parts.next() == Some(""), "its text begins with no module");
    parts
        .map(|part| {
            let (name, text) = part.split_once('\n').context("a module has no text")?;
            let module = MODULES.iter().find(|module| module.name == name);
            let module = module.with_context(|| format!("there is no module {name}"))?;
            Ok((*module, text.to_owned()))
        })
        .collect()
}

/// Name and text of each entry of a module, the text from its name on.
pub fn entries(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split(".entry ").skip(1).map(|entry| (entry.split('(').next().unwrap_or(""), entry))
}

/// How an entry begins.
pub const START: &str = ".visible .entry ";

/// One entry without what precedes the module's entries.
#[must_use]
pub fn body(text: &str, name: &str) -> Option<String> {
    let (_, body) = entries(text).find(|(entry, _)| *entry == name)?;
    let body = body.strip_suffix(".visible ").unwrap_or(body);
    Some(format!("{START}{body}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = ".version 7.0\n\n.visible .entry a(\n)\n{\n\tret;\n}\n\
                        .visible .entry ab(\n)\n{\n\ttrap;\n}\n";

    #[test]
    fn what_is_packed_is_read_again() {
        let folder = std::env::temp_dir().join(format!("ptx-pack-{}", std::process::id()));
        let bytes = write(&[(MODULES[0], TEXT), (MODULES[2], ".version 8.3\n")], &folder).unwrap();
        assert_eq!(fs::metadata(folder.join(PACK)).unwrap().len(), bytes as u64);
        let texts = read(&folder).unwrap();
        assert_eq!(texts, [(MODULES[0], TEXT.to_owned()), (MODULES[2], ".version 8.3\n".into())]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_is_no_pack_says_so() {
        let error = read(Path::new("/nowhere")).unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/modules.ptx.zst"), "{error:#}");
        for (text, what) in [
            (".version 7.0\n", "begins with no module"),
            ("// module sm_1\n.version 7.0\n", "no module sm_1"),
            ("// module sm_80", "has no text"),
        ] {
            let error = split(text).unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
