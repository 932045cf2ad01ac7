//! Attention on the CPU: blocked, on every thread of rayon's pool, in f32 arithmetic. It runs no GPU
//! kernel and does not use the emulator.
//!
//! Each task multiplies tiles by the `gemm` crate, as candle does. The softmax between the products is in
//! loops that become vector instructions of the widest kind that the CPU has.

mod backward;
mod call;
mod element;
mod forward;
mod math;
mod matmul;

pub use backward::{Passed, Wanted, backward};
pub use call::{Beside, Call, Pages, Rows};
pub use element::Element;
pub use forward::forward;
