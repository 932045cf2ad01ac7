//! What the linear kernels are given.

use super::Buffer;

/// What every linear kernel is given: `y = x wᵀ + bias`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinearArgs {
    /// Input, `[rows, in_features]` row-major.
    pub x: Buffer,
    /// Weight, `[out_features, in_features]` row-major (PyTorch's `nn.Linear`).
    pub w: Buffer,
    /// Bias, `[out_features]`; empty when there is none.
    pub bias: Buffer,
    /// Output, `[rows, out_features]` row-major.
    pub y: Buffer,
    /// Rows of `x`.
    pub rows: u32,
    /// Columns of `x`.
    pub in_features: u32,
    /// Columns of `y`.
    pub out_features: u32,
}
