//! linear_naive: a projection `y = x wᵀ + bias` as the formula says.
//!
//! The idea: one thread per element of `y`.
//!
//! ```text
//! y[r, c] = dot(x[r, :], w[c, :]) + bias[c]
//! ```
//!
//! Memory: 2 elements are read for 2 FLOP. No shared memory.
//!
//! Measured: 148 ms (16,384 rows, 2048 features in and out, f16, one H100 80GB HBM3). Limits: every
//! product reads both of its factors from memory.
//!
//! Source: PyTorch, `torch.nn.Linear`.

use half::{bf16, f16};
use simt::{math, scalar::Scalar, thread};

use super::{Dw, Dx, LinearProduct, Y};
use crate::{
    args::LinearArgs,
    entries,
    parts::gemm::{Epilogue as _, Storage as _},
};

/// Rows and columns of a block.
pub const TILE: u32 = 16;

/// A product of a projection, as its formula says.
///
/// # Layout
/// `x: [rows, in]`, `w: [out, in]`, `bias: [out]` or empty, `y: [rows, out]`.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads, a thread per element; `x` counts rows in blocks of 16, `y`
/// columns. Within a block `x` counts columns, so that neighbours write side by side.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn linear_naive<T: Scalar, P: LinearProduct>(args: &LinearArgs) {
    let row = thread::block_idx_x() * TILE + thread::thread_idx_y();
    let column = thread::block_idx_y() * TILE + thread::thread_idx_x();
    // SAFETY: the buffers have the shapes that `args` says.
    let product = unsafe { P::product::<T>(args) };
    if !product.c.place().has(row, column) {
        return;
    }
    let mut acc = 0.0;
    for term in 0..product.depth {
        let (a, b) = (P::A::place(row, term), P::B::place(column, term));
        acc = math::fma(product.a.read(a.0, a.1).to_f32(), product.b.read(b.0, b.1).to_f32(), acc);
    }
    let value = product.epilogue.apply(acc, product.epilogue.column(column));
    product.c.write_if_inside(row, column, T::from_f32(value));
}

entries! {
    /// Instances of [`linear_naive`] for [`Y`].
    pub static ENTRIES: LinearArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    linear_naive: T in [f32, f16, bf16] = linear_naive::<T, Y>;
}
entries! {
    /// Instances of [`linear_naive`] for [`Dx`].
    pub static DX: LinearArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    linear_naive: T in [f32, f16, bf16], "_dx" = linear_naive::<T, Dx>;
}
entries! {
    /// Instances of [`linear_naive`] for [`Dw`].
    pub static DW: LinearArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    linear_naive: T in [f32, f16, bf16], "_dw" = linear_naive::<T, Dw>;
}
