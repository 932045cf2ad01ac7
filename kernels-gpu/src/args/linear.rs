//! The arguments of the linear kernels.

use super::Buffer;

/// The arguments of every linear kernel: the tensors of `y = x wᵀ + bias`, or their gradients. Which of
/// them a kernel reads and which it writes is said by its
/// [`LinearProduct`](crate::linear::LinearProduct).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinearArgs {
    /// Input or its gradient, `[rows, in_features]` row-major.
    pub x: Buffer,
    /// Weight or its gradient, `[out_features, in_features]` row-major (PyTorch's `nn.Linear`).
    pub w: Buffer,
    /// Bias or its gradient, `[out_features]`; empty when there is none.
    pub bias: Buffer,
    /// Output or its gradient, `[rows, out_features]` row-major.
    pub y: Buffer,
    /// Rows of `x`.
    pub rows: u32,
    /// Columns of `x`.
    pub in_features: u32,
    /// Columns of `y`.
    pub out_features: u32,
}
