//! FlashAttention kernels in Rust.

pub mod backend;
pub mod dtype;
pub mod error;
pub mod oracle;
pub mod problem;
pub mod ptx;
pub mod registry;
pub mod session;
pub mod tensor;
pub mod verify;

pub use backend::{CpuDevice, Device, GpuDevice};
pub use dtype::DType;
pub use error::Error;
pub use problem::{Dropout, Layout, Problem};
pub use tensor::Tensor;
