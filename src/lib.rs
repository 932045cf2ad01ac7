//! FlashAttention kernels in Rust.
//!
//! A [`Problem`] says what is to be computed, the [`registry`] which kernels can, a
//! [`Session`](session::Session) runs one on a [`Device`]:
//!
//! ```
//! use std::sync::Arc;
//!
//! use flash_attention::{
//!     CpuDevice, DType, Device, Error, GpuDevice, Problem, Tensor, registry,
//!     session::{Inputs, Session},
//! };
//!
//! fn main() -> Result<(), Error> {
//!     // A GPU if there is one, else the emulator.
//!     let device: Arc<dyn Device> = match GpuDevice::open(0) {
//!         Ok(gpu) => Arc::new(gpu),
//!         Err(_) => Arc::new(CpuDevice::new()),
//!     };
//!     let session = Session::new(device);
//!     // Batch 1, 2 heads, 128 tokens, head dim 64.
//!     let problem = Problem::builder(1, 2, 128, 64).dtype(DType::F16).causal(true).build()?;
//!     let random = |seed| Tensor::random(DType::F16, &problem.q_shape(), seed, 0.0);
//!     let (q, k, v) = (random(1), random(2), random(3));
//!     let kernel = registry::best_for(&problem, &session.target())?.kernel;
//!     let inputs = Inputs { q: &q, k: &k, v: &v, mask: None };
//!     let (outputs, memory) = session.run(kernel, &problem, &inputs)?;
//!     println!("{}: O {:?}, peak {} bytes", kernel.name, outputs.o.shape(), memory.peak);
//!     Ok(())
//! }
//! ```

pub mod backend;
pub mod dtype;
pub mod error;
pub mod module;
pub mod oracle;
pub mod problem;
pub mod ptx;
pub mod raw;
pub mod registry;
pub mod session;
pub mod tensor;
pub mod verify;

#[cfg(feature = "emulator")]
pub use backend::CpuDevice;
pub use backend::{Device, GpuDevice};
pub use dtype::DType;
pub use error::Error;
pub use half;
pub use problem::{Dropout, Layout, Problem};
pub use tensor::Tensor;

/// The README's examples, compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
