//! Takes the place of the published crate of this name (`[patch.crates-io]` in the
//! root `Cargo.toml`).
//!
//! cust's build script calls [`include_cuda`] to find an installed CUDA toolkit, and
//! panics without one. It needs nothing from a toolkit but the driver library to
//! link to, and `cuda-driver` stands in for that.

/// Tells cargo to link nothing.
pub fn include_cuda() {}
