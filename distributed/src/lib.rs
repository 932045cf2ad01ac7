//! FlashAttention over several GPUs.
//!
//! A [`Grid`] says how ranks share the work: they divide the heads (Ulysses), the context (ring), or
//! both. Each rank has a device ([`Engine`](engine::Engine)), a line to the others on the host
//! ([`Peers`](peers::Peers)), and a [`Communicator`](communicator::Communicator) that moves memory between
//! the devices: NCCL between GPUs, copies between threads of one process. [`Attention`] is then the same
//! code for all of them, forward and backward:
//!
//! ```
//! use std::time::Duration;
//!
//! use flash_attention::{DType, Problem, Tensor};
//! use flash_attention_distributed::{Grid, emulated, whole::Setup};
//!
//! // Two ranks on emulators, which divide the keys of causal attention.
//! let problem = Problem::builder(1, 2, 64, 32).dtype(DType::F16).causal(true).build()?;
//! let random = |seed| Tensor::random(DType::F16, &problem.q_shape(), seed, 0.0);
//! let (q, k, v) = (random(1), random(2), random(3));
//! let share = Setup::new(problem, Grid::of_context(2))?;
//! let run = emulated::run(&share, [&q, &k, &v], None)?;
//! assert_eq!(run.o.shape(), problem.o_shape());
//! # Ok::<(), flash_attention_distributed::Error>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`schedule`] | who holds which rows, and what is computed at each step |
//! | [`share`] | a problem and its ranks: local shapes, what cannot be shared |
//! | [`peers`] | what ranks tell each other on the host; lost and late ranks |
//! | [`engine`] | a rank's device: kernels, copies, and two lanes |
//! | [`communicator`] | transfers between devices |
//! | [`nccl`] | NCCL's library, opened when it is first wanted |
//! | [`attention`] | the work of a rank |
//! | [`emulated`] | ranks as threads on the CPU, from tensors to tensors |
//! | [`whole`] | a rank from tensors on the host to its rows, on any device |
//! | [`measure`] | the computation of a pass alone, its transfers alone |
//! | [`model`] | what a step costs, for any number of GPUs |

#![warn(missing_debug_implementations)]

pub mod attention;
pub mod communicator;
#[cfg(feature = "emulator")]
pub mod emulated;
pub mod engine;
pub mod error;
pub mod measure;
pub mod model;
pub mod nccl;
pub mod peers;
pub mod schedule;
pub mod share;
pub mod whole;

pub use attention::Attention;
pub use error::Error;
pub use schedule::{Grid, Order};
pub use share::Share;

/// The chapter, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../../docs/distributed.md")]
struct Chapter;
