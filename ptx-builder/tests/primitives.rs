//! Each primitive's device body is the instruction that was reviewed: `primitives/lib.rs` has one
//! entry for each, `primitives/expected.ptx` what they become. An inverted predicate, a fence or an
//! alignment that is lost, a wait for one group too few: none of them shows on a machine without a
//! GPU, but here.

use std::{env, fs, path::Path};

use ptx_builder::{MODULES, Workspace, compile};

/// Set to write what is expected anew, after a change of a primitive. Read the difference!
const UPDATE: &str = "UPDATE_EXPECT";

/// What depends on the compiler's version and not on a primitive goes: its name, and the numbers
/// of registers' declarations and labels stay as they are.
fn normalised(text: &str) -> String {
    text.lines().filter(|line| !line.starts_with("//")).map(|line| line.to_owned() + "\n").collect()
}

/// Name and text of each entry.
fn entries(text: &str) -> Vec<(&str, &str)> {
    let entries = text.split(".visible .entry ").skip(1);
    entries.map(|entry| (entry.split('(').next().unwrap_or_default(), entry.trim_end())).collect()
}

#[test]
#[ignore = "compiles for the GPU, with rust-src; .ci/run runs it"]
fn primitives_are_the_instructions_that_were_reviewed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/primitives");
    let module = MODULES.iter().find(|module| module.name == "sm_90a").expect("Hopper's module");
    let ptx = compile::source(&Workspace::of_this_crate(), &folder.join("lib.rs"), *module)
        .expect("the primitives compile");
    let text = normalised(&ptx.text);
    let file = folder.join("expected.ptx");
    if env::var_os(UPDATE).is_some() {
        fs::write(&file, &text).expect("the file can be written");
    }
    let expected = fs::read_to_string(&file).expect("the expected text");
    let (found, expected) = (entries(&text), entries(&expected));
    let names = |entries: &[(&str, &str)]| -> Vec<String> {
        entries.iter().map(|(name, _)| (*name).to_owned()).collect()
    };
    assert_eq!(names(&found), names(&expected), "the entries; {UPDATE}=1 writes them");
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert_eq!(found, expected, "{name} is not what was reviewed; {UPDATE}=1 writes it anew");
    }
    // What stands in front of the entries: the alignment of shared memory.
    assert!(text.contains(".extern .shared .align 1024 .b8 simt_dynamic_shared[];"), "{text}");
}

/// Every public function of `simt` with a device body has an entry: a new one is not forgotten.
#[test]
fn every_primitive_has_an_entry() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let entries = fs::read_to_string(root.join("ptx-builder/tests/primitives/lib.rs")).unwrap();
    for module in ["async_copy", "barrier", "cluster", "mbarrier", "tma", "turn", "warpgroup"] {
        let text = fs::read_to_string(root.join(format!("simt/src/{module}.rs"))).unwrap();
        let mut function = "";
        for line in text.lines() {
            let words = line.trim().trim_start_matches("pub ").trim_start_matches("unsafe ");
            if let Some(rest) = words.strip_prefix("fn ") {
                function = rest.split(['(', '<']).next().unwrap_or_default();
            }
            if line.contains("core::arch::asm!") && !function.is_empty() {
                let called = [format!("{function}("), format!("{function}::<")];
                assert!(
                    called.iter().any(|call| entries.contains(call.as_str())),
                    "{module}::{function} has an instruction, but no entry in primitives/lib.rs"
                );
            }
        }
    }
}
