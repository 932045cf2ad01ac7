//! FlashAttention kernels in Rust.
//!
//! A [`Problem`] describes the attention to compute, the [`registry`] finds the kernels that
//! support it, and a [`Session`](session::Session) runs a kernel on a [`Device`]:
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
//!     let inputs = Inputs::new(&q, &k, &v);
//!     let (outputs, memory) = session.run(kernel, &problem, &inputs)?;
//!     println!("{}: O {:?}, peak {} bytes", kernel.name, outputs.o.shape(), memory.peak);
//!     Ok(())
//! }
//! ```
//!
//! # Which type do I start with?
//!
//! | you have | start with | example |
//! |---|---|---|
//! | vectors on the host | [`Tensor`], [`Problem`], [`Session::run`](session::Session::run) | `examples/own_vectors.rs` |
//! | a model's layers | [`MultiHeadAttention`](module::MultiHeadAttention) and its [`Forward`](module::Forward) buffers | `examples/layers.rs` |
//! | tensors that stay on the device | [`Session::attention`](session::Session::attention), [`DeviceTensor`](backend::DeviceTensor) | [`session::Attention`] |
//! | a cache of keys and values | [`KvCache`](session::KvCache), or [`Session::decode`](session::Session::decode) on your own | [`session::KvCache`] |
//! | your own context, stream and device memory | [`raw::Plan`], [`raw::Context`] | `examples/raw_pointers.rs` |
//! | your own loader for PTX | [`raw::Plan::launches`], [`ptx`] | |
//! | a kernel to choose, or a table to print | [`registry`] | |
//! | a result to check | [`oracle`], [`verify`] | |
//!
//! # Features
//! All are on by default. `emulator`: kernels also run on the CPU ([`CpuDevice`]), with every
//! access checked; without it, the build compiles no kernel for the host. `ptx`: the kernels' PTX,
//! for GPUs. `safetensors`: weights from files ([`module::Weights::load`]). `verify`:
//! [`Tensor::random`], [`oracle`] and [`verify`].

#![warn(missing_debug_implementations)]

pub mod backend;
pub mod dtype;
pub mod error;
pub mod module;
#[cfg(feature = "verify")]
pub mod oracle;
pub mod problem;
pub mod ptx;
pub mod raw;
pub mod registry;
pub mod session;
pub mod tensor;
#[cfg(feature = "verify")]
pub mod verify;

#[cfg(feature = "emulator")]
pub use backend::CpuDevice;
pub use backend::{Device, GpuDevice};
pub use dtype::{DType, E4m3};
pub use error::Error;
pub use half;
pub use problem::{Alibi, Bias, Dropout, Extras, Layout, Problem, ProblemBuilder, Varlen, Window};
pub use tensor::Tensor;

/// The README's examples, compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The page on the library, compiled as tests.
#[cfg(all(doctest, feature = "emulator", feature = "safetensors", feature = "verify"))]
#[doc = include_str!("../docs/library.md")]
struct LibraryPage;

/// The chapter for readers of CUDA C++, compiled as tests.
#[cfg(all(doctest, feature = "emulator"))]
#[doc = include_str!("../docs/cuda-and-rust.md")]
struct CudaAndRust;

/// The chapter on decoding, compiled as tests.
#[cfg(all(doctest, feature = "emulator", feature = "verify"))]
#[doc = include_str!("../docs/decode.md")]
struct Decoding;

/// The chapter on packed sequences, compiled as tests.
#[cfg(all(doctest, feature = "emulator", feature = "verify"))]
#[doc = include_str!("../docs/varlen.md")]
struct PackedSequences;
