//! The file that is checked in and embedded: every entry's text in a zstd frame of its own.
//!
//! A program that launches a kernel needs one entry of the modules' 35 MB, and unpacks no
//! other. One stream of everything would be a third smaller.
//!
//! The first frame is the index. It has a line for each frame after it, in their order: for a
//! module's head, all that precedes the module's entries, and then for each of its entries.
//!
//! ```text
//! module sm_75 133
//! entry naive_scores_f32_d64 2141
//! ```
//!
//! The number is the bytes of the frame. A head and an entry make a text that stands alone; a head
//! and all the entries below it make the module.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use zstd::bulk::Compressor;

use crate::sources::PACK;
use crate::{MODULES, Module};

/// zstd's highest level that decoders need no more memory for.
const LEVEL: i32 = 19;

/// How an entry begins.
pub const START: &str = ".visible .entry ";

/// The text of one module.
pub type Text = (Module, String);

/// Writes the pack of `texts` into `folder`; its size in bytes.
///
/// # Errors
/// When the file cannot be written.
pub fn write(texts: &[(Module, &str)], folder: &Path) -> Result<usize> {
    let packed = pack(texts).context("cannot compress the PTX")?;
    let path = folder.join(PACK);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&path, &packed))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(packed.len())
}

fn pack(texts: &[(Module, &str)]) -> Result<Vec<u8>> {
    let mut compressor = Compressor::new(LEVEL)?;
    let (mut index, mut frames) = (String::new(), Vec::new());
    for (module, text) in texts {
        let entries = entries(text).map(|(name, entry)| ("entry", name, entry));
        for (kind, name, text) in [("module", module.name, head(text))].into_iter().chain(entries) {
            let frame = compressor.compress(text.as_bytes())?;
            index.push_str(&format!("{kind} {name} {}\n", frame.len()));
            frames.extend(frame);
        }
    }
    let mut packed = compressor.compress(index.as_bytes())?;
    packed.extend(frames);
    Ok(packed)
}

/// The texts that the pack in `folder` holds.
///
/// # Errors
/// When it is missing or no pack.
pub fn read(folder: &Path) -> Result<Vec<Text>> {
    let path = folder.join(PACK);
    let read = || unpack(&fs::read(&path)?);
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn unpack(mut packed: &[u8]) -> Result<Vec<Text>> {
    let index = unpack_frame(&mut packed)?;
    let mut texts: Vec<Text> = Vec::new();
    for line in index.lines() {
        let before = packed.len();
        let text = unpack_frame(&mut packed)?;
        let bytes = (before - packed.len()).to_string();
        match (line.split(' ').collect::<Vec<_>>().as_slice(), texts.last_mut()) {
            (["module", name, of], _) if *of == bytes => {
                let module = MODULES.iter().find(|module| module.name == *name);
                let module = module.with_context(|| format!("there is no module {name}"))?;
                texts.push((*module, text));
            }
            (["entry", _, of], Some((_, module))) if *of == bytes => module.push_str(&text),
            _ => bail!("its index has a line that is wrong: {line}"),
        }
    }
    ensure!(packed.is_empty(), "its index ends before its frames");
    Ok(texts)
}

/// The text of the frame that `packed` begins with, which is then behind it.
fn unpack_frame(packed: &mut &[u8]) -> Result<String> {
    let decoder = zstd::Decoder::with_buffer(packed)?.single_frame();
    Ok(std::io::read_to_string(decoder)?)
}

/// The text in front of a module's entries.
#[must_use]
pub fn head(text: &str) -> &str {
    text.split(START).next().unwrap_or(text)
}

/// Name and text of each entry of a module.
pub fn entries(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = &text[head(text).len()..];
    std::iter::from_fn(move || {
        let after = rest.strip_prefix(START)?;
        let end = after.find(START).map_or(rest.len(), |at| START.len() + at);
        let entry;
        (entry, rest) = rest.split_at(end);
        Some((after.split('(').next().unwrap_or(""), entry))
    })
}

/// A module with one of its entries only: a text that stands alone.
#[must_use]
pub fn entry(text: &str, name: &str) -> Option<String> {
    let (_, entry) = entries(text).find(|(of, _)| *of == name)?;
    Some(format!("{}{entry}", head(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = ".version 7.0\n.global .u32 g;\n.visible .entry a(\n)\n{\n\t{\n\t}\n\tret;\n}\n\
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
    fn the_index_gives_every_frame_its_bytes() {
        let packed = pack(&[(MODULES[0], TEXT)]).unwrap();
        let mut rest = &packed[..];
        let index = unpack_frame(&mut rest).unwrap();
        let mut found = Vec::new();
        for line in index.lines() {
            let (name, bytes) = line.rsplit_once(' ').unwrap();
            let mut frame = rest.split_off(..bytes.parse().unwrap()).unwrap();
            found.push((name, unpack_frame(&mut frame).unwrap()));
            assert!(frame.is_empty(), "{line}");
        }
        assert!(rest.is_empty());
        let expected = [
            ("module sm_75", ".version 7.0\n.global .u32 g;\n"),
            ("entry a", ".visible .entry a(\n)\n{\n\t{\n\t}\n\tret;\n}\n"),
            ("entry ab", ".visible .entry ab(\n)\n{\n\ttrap;\n}\n"),
        ];
        assert_eq!(found, expected.map(|(name, text)| (name, text.to_owned())));
    }

    #[test]
    fn one_entry_can_be_had_without_the_others() {
        let only = ".version 7.0\n.global .u32 g;\n.visible .entry ab(\n)\n{\n\ttrap;\n}\n";
        assert_eq!(entry(TEXT, "ab").as_deref(), Some(only));
        assert!(entry(TEXT, "a").unwrap().ends_with("{\n\t{\n\t}\n\tret;\n}\n"));
        assert_eq!(entry(TEXT, "b"), None);
    }

    #[test]
    fn what_is_no_pack_says_so() {
        let error = read(Path::new("/nowhere")).unwrap_err();
        assert!(format!("{error:#}").contains("/nowhere/modules.ptx.zst"), "{error:#}");

        let frame = |text: &str| zstd::bulk::compress(text.as_bytes(), LEVEL).unwrap();
        let head = frame(".version 7.0\n");
        let bytes = head.len();
        for (index, what) in [
            (String::new(), "ends before its frames"),
            (format!("module sm_1 {bytes}\n"), "no module sm_1"),
            (format!("module sm_75 {}\n", bytes + 1), "is wrong: module sm_75"),
            (format!("entry a {bytes}\n"), "is wrong: entry a"),
            (format!("module sm_75 {bytes}\nentry a 9\n"), ""),
        ] {
            let error = unpack(&[frame(&index), head.clone()].concat()).unwrap_err().to_string();
            assert!(error.contains(what), "{index}: {error}");
        }
    }
}
