//! Launches in a context, and on a stream, that the caller owns. No type of another
//! library is in this interface: handles are `*mut c_void`, addresses are `u64`.

pub mod context;
pub(crate) mod failure;
mod kernels;

pub use context::Context;
pub use kernels::why_not;
