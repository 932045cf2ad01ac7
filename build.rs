//! Has the kernels' PTX ready for `src/ptx.rs` to embed: the checked-in text while it
//! belongs to the kernel sources, else freshly compiled (see `docs/rust-to-ptx.md`).

use std::path::PathBuf;
use std::process::ExitCode;

use ptx_builder::{Workspace, embed, sources};

fn main() -> ExitCode {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let Some(out) = std::env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=cargo sets no OUT_DIR for this build script");
        return ExitCode::FAILURE;
    };
    let workspace = Workspace::new(root);

    println!("cargo::rerun-if-env-changed={}", embed::VARIABLE);
    for watched in sources::WATCHED {
        println!("cargo::rerun-if-changed={watched}");
    }
    // A path that does not exist would make every build run this script.
    if workspace.checked_in().exists() {
        println!("cargo::rerun-if-changed=kernels-gpu/ptx");
    }

    let wish = std::env::var(embed::VARIABLE).ok();
    let done = embed::prepare(&workspace, &out.join("ptx"), wish.as_deref())
        .and_then(|prepared| embed::write_table(&prepared, &out).map(|()| prepared));
    match done {
        Ok(prepared) => {
            for function in prepared.local_memory {
                println!("cargo::warning={function} keeps an array in local memory: slow on a GPU");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            for line in format!("{error:#}").lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}
