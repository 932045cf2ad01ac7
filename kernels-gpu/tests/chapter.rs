//! The kernel of docs/adding-a-kernel.md, compiled and run as a module of a kernel crate.

mod chapter {
    pub mod flash_rows;
}
mod common;

use chapter::flash_rows;
use common::Case;
use half::{bf16, f16};
// What the kernel finds in its crate.
use kernels_gpu::{args, entries, parts};
use simt::emulator::{self, Launch};

const CHAPTER: &str = include_str!("../../docs/adding-a-kernel.md");
const KERNEL: &str = include_str!("chapter/flash_rows.rs");

#[test]
fn the_chapter_shows_this_kernel() {
    assert!(CHAPTER.contains(&format!("```rust\n{KERNEL}```")), "copy one into the other");
}

#[test]
fn it_computes_attention() {
    let launch = |dtype: &str| {
        let entry = flash_rows::ENTRIES.find(dtype, 64).expect("an entry of that type");
        assert_eq!(entry.symbol, format!("flash_rows_{dtype}_d64"));
        move |args: &args::AttentionArgs| {
            let grid = common::blocks_of(args, flash_rows::BR);
            let launch =
                Launch { grid, block: flash_rows::THREADS.into(), cluster: 1, shared_bytes: 0 };
            let address = std::ptr::from_ref(args) as usize;
            // SAFETY: the arguments describe buffers that outlive the launch.
            let kernel = || unsafe { (entry.run)(address as *const _) };
            emulator::launch_with(launch, &common::options(), &kernel)
                .unwrap_or_else(|fault| panic!("{fault}"))
        }
    };
    let plain = Case { heads: 2, ..Case::new(5, 9, 64) };
    plain.check::<f32>(launch("f32"));
    plain.check::<bf16>(launch("bf16"));
    let all = Case { causal: true, padding: true, dropout: 0.25, interleaved: true, ..plain };
    all.check::<f16>(launch("f16"));
}
