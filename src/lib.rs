//! FlashAttention kernels in Rust.

pub mod backend;
pub mod dtype;
pub mod error;

pub use dtype::DType;
pub use error::Error;
