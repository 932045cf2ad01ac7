//! The sources that decide what the PTX says, and their fingerprint.
//!
//! `build.rs` and `ptx-builder` share this file, so it needs nothing but `std`: whoever
//! depends on the library compiles no builder.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// Name of the file that holds every module's PTX, compressed.
pub const PACK: &str = "modules.ptx.zst";
/// Name of the file beside it that says what it was made from.
pub const MANIFEST: &str = "manifest.json";

/// Files and folders the PTX is made from, made by and packed by, relative to the root.
///
/// A build script watches exactly these for changes.
pub const WATCHED: &[&str] = &[
    "kernels-gpu/src",
    "ptx-builder/src/compile.rs",
    "ptx-builder/src/lib.rs",
    "ptx-builder/src/pack.rs",
    "ptx-builder/src/post.rs",
    "simt/src",
];

/// The part of `simt` that exists on the host only: it cannot change the PTX.
const HOST_ONLY: &[&str] = &["simt/src/emulator", "simt/src/emulator.rs"];

/// Fingerprint of the files below `root` that decide what the PTX says.
///
/// Comment lines, blank lines and line endings do not count: a documentation edit
/// leaves the checked-in PTX valid.
///
/// # Errors
/// Names the file or folder that cannot be read.
pub fn fingerprint(root: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for watched in WATCHED {
        collect(root, Path::new(watched), &mut files)?;
    }
    files.sort();
    let mut hash = Fnv::new();
    for relative in files {
        let path = root.join(&relative);
        let text = fs::read_to_string(&path).map_err(|error| naming(&path, &error))?;
        hash.take(format!("== {relative}\n").as_bytes());
        for line in text.lines().map(str::trim_end) {
            if !line.is_empty() && !line.trim_start().starts_with("//") {
                hash.take(line.as_bytes());
                hash.take(b"\n");
            }
        }
    }
    Ok(format!("{:032x}", hash.0))
}

/// Whether the pack in `folder` was made from the sources of that fingerprint.
#[must_use]
pub fn belong(folder: &Path, fingerprint: &str) -> bool {
    let line = format!("\"sources\": \"{fingerprint}\"");
    folder.join(PACK).is_file()
        && fs::read_to_string(folder.join(MANIFEST)).is_ok_and(|manifest| manifest.contains(&line))
}

/// Adds every file that counts to `files`, relative to the root with `/` between parts.
fn collect(root: &Path, relative: &Path, files: &mut Vec<String>) -> io::Result<()> {
    let name = relative.to_string_lossy().replace('\\', "/");
    if HOST_ONLY.contains(&name.as_str()) {
        return Ok(());
    }
    let path = root.join(relative);
    if path.is_dir() {
        for child in fs::read_dir(&path).map_err(|error| naming(&path, &error))? {
            collect(root, &PathBuf::from(relative).join(child?.file_name()), files)?;
        }
    } else if name.ends_with(".rs") {
        files.push(name);
    }
    Ok(())
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()))
}

/// FNV-1a with 128 bits: enough to notice an edit, which nobody forges.
struct Fnv(u128);

impl Fnv {
    const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up repository, removed when dropped.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, kernel: &str) -> Self {
            let root = std::env::temp_dir().join(format!("sources-{}-{name}", std::process::id()));
            for watched in WATCHED {
                let path = root.join(watched);
                let file = if watched.contains('.') { path } else { path.join("lib.rs") };
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, kernel).unwrap();
            }
            fs::create_dir_all(root.join("simt/src/emulator")).unwrap();
            Self(root)
        }

        fn fingerprint(&self) -> String {
            fingerprint(&self.0).unwrap()
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn line_endings_comments_and_blank_lines_do_not_count() {
        let plain = Root::new("plain", "fn a() {}\nfn b() {}\n").fingerprint();
        assert_eq!(plain, Root::new("crlf", "fn a() {}\r\nfn b() {}\r\n").fingerprint());
        let docs = "//! Doc.\nfn a() {}\n\n    // b\nfn b() {}\n";
        assert_eq!(plain, Root::new("docs", docs).fingerprint());
    }

    #[test]
    fn code_and_the_builders_flags_count_and_the_emulator_does_not() {
        let root = Root::new("code", "fn a() {}\n");
        let first = root.fingerprint();
        fs::write(root.0.join("simt/src/emulator/mod.rs"), "fn other() {}\n").unwrap();
        assert_eq!(first, root.fingerprint());
        for watched in WATCHED {
            let path = root.0.join(watched);
            let file = if path.is_dir() { path.join("lib.rs") } else { path };
            fs::write(&file, "fn a() {}\nfn x() {}\n").unwrap();
            assert_ne!(first, root.fingerprint(), "{watched}");
            fs::write(&file, "fn a() {}\n").unwrap();
        }
        assert_eq!(first, root.fingerprint());
    }

    #[test]
    fn a_pack_belongs_to_the_sources_that_its_manifest_names() {
        let root = Root::new("belong", "fn a() {}\n");
        let print = root.fingerprint();
        assert!(!belong(&root.0, &print), "there is no manifest and no pack");
        let manifest = format!("{{ \"sources\": \"{print}\" }}");
        fs::write(root.0.join(MANIFEST), manifest).unwrap();
        assert!(!belong(&root.0, &print), "there is no pack");
        fs::write(root.0.join(PACK), "").unwrap();
        assert!(belong(&root.0, &print));
        assert!(!belong(&root.0, "another"));
    }

    #[test]
    fn a_missing_source_is_named() {
        let error = fingerprint(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nowhere/"), "{error}");
    }
}
