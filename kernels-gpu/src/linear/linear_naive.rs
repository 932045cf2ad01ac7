//! linear_naive: a projection `y = x wᵀ + bias` as the formula says.
//!
//! The idea: a thread per element of `y`.
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

use crate::{
    args::LinearArgs,
    entries,
    parts::gemm::{Biased, Epilogue},
};

/// Rows and columns of a block.
pub const TILE: u32 = 16;

/// `y = x wᵀ + bias`, as the formula says.
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
pub unsafe fn linear_naive<T: Scalar>(args: &LinearArgs) {
    let row = thread::block_idx_x() * TILE + thread::thread_idx_y();
    let column = thread::block_idx_y() * TILE + thread::thread_idx_x();
    if row >= args.rows || column >= args.out_features {
        return;
    }
    // SAFETY: the buffers have the shapes that `args` says.
    let (x, w, y) = unsafe { (args.x.view::<T>(), args.w.view::<T>(), args.y.view_mut::<T>()) };
    let features = args.in_features as u64;
    let (x_row, w_row) = (row as u64 * features, column as u64 * features);
    let mut acc = 0.0;
    for i in 0..features {
        acc = math::fma(x.read(x_row + i).to_f32(), w.read(w_row + i).to_f32(), acc);
    }
    // SAFETY: the bias is empty or `[out]`.
    let bias = unsafe { Biased::<T>::new(&args.bias) };
    let value = bias.apply(acc, bias.column(column));
    y.write(row as u64 * args.out_features as u64 + column as u64, T::from_f32(value));
}

entries! {
    /// Instances of [`linear_naive`].
    pub static ENTRIES: LinearArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    linear_naive: T in [f32, f16, bf16] = linear_naive::<T>;
}
