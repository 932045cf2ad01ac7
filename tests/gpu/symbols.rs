//! Symbols of compiled code, read from the files beside a test's executable.

use std::{collections::BTreeSet, env, fs, path::PathBuf};

use object::{Object, ObjectSymbol, read::archive::ArchiveFile};

/// The names that are the CUDA driver's: `cuInit`, say, `cu` and a capital.
pub fn of_the_driver(names: &BTreeSet<String>) -> Vec<&str> {
    let capital = |rest: &str| rest.starts_with(|c: char| c.is_ascii_uppercase());
    names.iter().map(String::as_str).filter(|n| n.strip_prefix("cu").is_some_and(capital)).collect()
}

/// What this test's executable defines, or asks a library for.
#[allow(dead_code, reason = "one of the tests that share this file does without")]
pub fn of_executable() -> BTreeSet<String> {
    let bytes = fs::read(executable()).expect("this test's executable");
    let file = object::File::parse(&*bytes).expect("an executable");
    file.symbols().chain(file.dynamic_symbols()).filter_map(name).collect()
}

/// What the newest library of that crate defines.
pub fn defined_in_library(crate_name: &str) -> BTreeSet<String> {
    let folder = executable().parent().expect("the folder of this test").to_owned();
    let prefix = format!("lib{crate_name}-");
    let newest = fs::read_dir(&folder)
        .expect("the folder of this test")
        .map(|entry| entry.expect("an entry of the folder").path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(&prefix) && name.ends_with(".rlib"))
        })
        .max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).expect("a time"));
    let path = newest.unwrap_or_else(|| panic!("no {prefix}*.rlib in {}", folder.display()));
    let bytes = fs::read(path).expect("the library");
    let archive = ArchiveFile::parse(&*bytes).expect("an archive");
    let mut names = BTreeSet::new();
    for member in archive.members() {
        let data = member.and_then(|member| member.data(&*bytes)).expect("a member");
        // Beside objects there is the compiler's metadata.
        if let Ok(file) = object::File::parse(data) {
            names.extend(file.symbols().filter(|symbol| symbol.is_definition()).filter_map(name));
        }
    }
    names
}

fn executable() -> PathBuf {
    env::current_exe().expect("the path of this test")
}

/// A symbol's name as the source has it: some systems put a line before it.
fn name<'a>(symbol: impl ObjectSymbol<'a>) -> Option<String> {
    Some(symbol.name().ok()?.trim_start_matches('_').to_owned())
}
