//! Attention on the CPU: blocked, on every thread of rayon's pool, in f32 arithmetic. Not the emulator:
//! no kernel of a GPU runs here.
//!
//! Each task multiplies tiles by the `gemm` crate, as candle does, and has the softmax between the products
//! in loops that become vector instructions of the widest kind that the CPU has.

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
