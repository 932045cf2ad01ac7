//! Compiles `kernels-gpu` to PTX, one module per architecture, and checks the result.
//!
//! The part that `cuda_builder` plays in a rust-cuda project, on the `nvptx64` backend
//! that is part of rustc:
//!
//! 1. [`compile`] builds the crates below the kernels once for `nvptx64-nvidia-cuda`
//!    and then lets one rustc per module emit PTX, all at the same time;
//! 2. [`post`] turns that text into what is checked in: launch bounds in place, dead
//!    functions and comments gone, no name that depends on the machine;
//! 3. [`pack`] compresses it, and [`manifest`] records which sources it was made from, so
//!    that a build without a kernel edit compiles no kernel at all;
//! 4. [`ptxas`] assembles every entry in its [`combinations`] of constants and reports registers,
//!    spills and warnings, and [`overlap`] checks that softmax stays beside the products.
//!
//! `docs/rust-to-ptx.md` tells the story with its reasons.

pub mod combinations;
pub mod compile;
pub mod manifest;
pub mod overlap;
pub mod pack;
pub mod post;
pub mod ptxas;
#[path = "../../build/sources.rs"]
pub mod sources;

use std::path::{Path, PathBuf};

/// A PTX module: the entries that need the same least architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Name of the module, of the cargo feature of `kernels-gpu` that selects its
    /// entries, and of the `target-cpu` given to rustc.
    pub name: &'static str,
    /// LLVM's target feature that sets the PTX `.version`. As low as the module's
    /// instructions allow, since it bounds the drivers that accept the text.
    pub ptx_feature: &'static str,
    /// The architectures for which ptxas assembles it: every generation that would load it.
    pub assemble_for: &'static [&'static str],
}

/// Every module, least architecture first.
pub const MODULES: &[Module] = &[
    Module {
        name: "sm_75",
        ptx_feature: "ptx70",
        assemble_for: &["sm_75", "sm_80", "sm_90", "sm_100"],
    },
    Module { name: "sm_80", ptx_feature: "ptx74", assemble_for: &["sm_80", "sm_90", "sm_100"] },
    Module { name: "sm_90a", ptx_feature: "ptx83", assemble_for: &["sm_90a"] },
];

/// Where things lie in the repository.
#[derive(Clone, Debug)]
pub struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The workspace whose root `Cargo.toml` is in `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The workspace this crate was built from.
    #[must_use]
    pub fn of_this_crate() -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        Self::new(here.parent().unwrap_or(here))
    }

    /// The repository's root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the checked-in pack and its manifest.
    #[must_use]
    pub fn checked_in(&self) -> PathBuf {
        self.root.join("kernels-gpu").join("ptx")
    }

    /// Target folder of the PTX builds: not the outer build's, whose lock is taken.
    #[must_use]
    pub fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.root.join("target"), |dir| self.root.join(dir))
            .join("ptx")
    }
}
