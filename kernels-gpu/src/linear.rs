//! Linear projections `y = x wᵀ + bias`, the first two rungs: naive and tiled.
//!
//! The ideas: `linear_naive` writes the formula down, a thread per element of `y`.
//! `linear_tiled` reads every element once per tile instead of once per product: a block
//! keeps tiles of `x` and `w` in shared memory, and each thread a 4 x 4 piece of `y` in
//! registers. The tile is [`gemm::tiled::tile`](crate::gemm::tiled::tile).
//!
//! ```text
//! acc = 0                                  TILE x TILE of y, 4 x 4 a thread
//! for each slice of DEPTH input features:
//!     load x, w                            TILE x DEPTH each, as f32, transposed
//!     acc += x wᵀ
//! y = acc + bias
//! ```
//!
//! Memory: naive reads 2 elements for 2 FLOP. Tiled reads 2 * TILE elements from global
//! memory for 2 * TILE² FLOP, and 8 from shared memory for 32; 8,704 bytes of static
//! shared memory.
//!
//! Measured: linear_naive 148 ms, linear_tiled 5.29 ms (16,384 rows, 2048 features in and out, f16,
//! one H100 80GB HBM3). Limits: scalar fma; `linear_mma` has the tensor cores.
//!
//! Source: Volkov and Demmel, "Benchmarking GPUs to Tune Dense Linear Algebra", 2008
//! (tiles in registers over tiles in shared memory).

use half::{bf16, f16};
use simt::{math, scalar::Scalar, thread};

use crate::{
    args::LinearArgs,
    entries,
    gemm::{Biased, Epilogue, Product, Transposed, tiled},
};

/// Rows and columns of a block of [`linear_naive`].
pub const NAIVE_TILE: u32 = 16;
/// Rows and columns of `y` that a block of [`linear_tiled`] computes.
pub const TILE: u32 = tiled::TILE;
/// Threads of a block of [`linear_tiled`].
pub const TILED_THREADS: u32 = tiled::THREADS;

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
    let row = thread::block_idx_x() * NAIVE_TILE + thread::thread_idx_y();
    let column = thread::block_idx_y() * NAIVE_TILE + thread::thread_idx_x();
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

/// `y = x wᵀ + bias` over tiles in shared memory.
///
/// # Layout
/// As for [`linear_naive`].
///
/// # Thread mapping
/// A block per tile of 64 x 64 elements of `y`; `x` counts tiles of rows, `y` tiles of
/// columns. Within a block as in [`tiled::tile`].
///
/// # Shared memory
/// Static: that of the tile.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn linear_tiled<T: Scalar>(args: &LinearArgs) {
    // SAFETY: the buffers have the shapes that `args` says.
    let product = unsafe { Product::linear(args) };
    tiled::tile::<T, Transposed, Biased<T>>(
        &product,
        thread::block_idx_x() * TILE,
        thread::block_idx_y() * TILE,
    );
}

entries! {
    /// Instances of [`linear_naive`].
    pub static NAIVE: LinearArgs => "sm_75", threads NAIVE_TILE * NAIVE_TILE, min_blocks 1;
    linear_naive_f32 = linear_naive::<f32>;
    linear_naive_f16 = linear_naive::<f16>;
    linear_naive_bf16 = linear_naive::<bf16>;
}
entries! {
    /// Instances of [`linear_tiled`].
    pub static TILED: LinearArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    linear_tiled_f32 = linear_tiled::<f32>;
    linear_tiled_f16 = linear_tiled::<f16>;
    linear_tiled_bf16 = linear_tiled::<bf16>;
}
