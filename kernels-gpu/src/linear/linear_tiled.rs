//! linear_tiled: tiles in shared memory, pieces in registers.
//!
//! The idea: read every element once per tile instead of once per product. A block keeps tiles of
//! `x` and `w` in shared memory, and each thread a 4 x 4 piece of `y` in registers. The tile is
//! [`gemm::tiled::tile`](crate::parts::gemm::tiled::tile).
//!
//! ```text
//! acc = 0                                  TILE x TILE of y, 4 x 4 per thread
//! for each slice of DEPTH input features:
//!     load x, w                            TILE x DEPTH each, as f32, transposed
//!     acc += x wᵀ
//! y = acc + bias
//! ```
//!
//! Memory: 2 * TILE elements are read from global memory for 2 * TILE² FLOP, and 8 from shared
//! memory for 32; 8,704 bytes of static shared memory.
//!
//! Measured: 5.29 ms (16,384 rows, 2048 features in and out, f16, one H100 80GB HBM3). Limits:
//! scalar fma; `linear_mma` has the tensor cores.
//!
//! Source: Volkov and Demmel, "Benchmarking GPUs to Tune Dense Linear Algebra", 2008
//! (tiles in registers over tiles in shared memory).

use half::{bf16, f16};
use simt::{scalar::Scalar, thread};

use super::{Dw, Dx, LinearProduct, Y};
use crate::{
    args::LinearArgs,
    entries,
    parts::gemm::{Biased, tiled},
};

/// Rows and columns of `y` that a block computes.
pub const TILE: u32 = tiled::TILE;
/// Threads of a block.
pub const THREADS: u32 = tiled::THREADS;

/// A product of a projection over tiles in shared memory.
///
/// # Layout
/// `x: [rows, in]`, `w: [out, in]`, `bias: [out]` or empty, `y: [rows, out]`.
///
/// # Thread mapping
/// A block per tile of 64 x 64 elements of the result; `x` counts tiles of rows, `y` tiles of
/// columns. Within a block as in [`tiled::tile`].
///
/// # Shared memory
/// Static: that of the tile.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn linear_tiled<T: Scalar, P: LinearProduct>(args: &LinearArgs) {
    // SAFETY: the buffers have the shapes that `args` says.
    let product = unsafe { P::product::<T>(args) };
    tiled::tile::<T, P::A, P::B, Biased<T>>(
        &product,
        thread::block_idx_x() * TILE,
        thread::block_idx_y() * TILE,
    );
}

entries! {
    /// Instances of [`linear_tiled`] for [`Y`].
    pub static ENTRIES: LinearArgs => "sm_75", threads THREADS, min_blocks 2;
    linear_tiled: T in [f32, f16, bf16] = linear_tiled::<T, Y>;
}
entries! {
    /// Instances of [`linear_tiled`] for [`Dx`].
    pub static DX: LinearArgs => "sm_75", threads THREADS, min_blocks 2;
    linear_tiled: T in [f32, f16, bf16], "_dx" = linear_tiled::<T, Dx>;
}
entries! {
    /// Instances of [`linear_tiled`] for [`Dw`].
    pub static DW: LinearArgs => "sm_75", threads THREADS, min_blocks 2;
    linear_tiled: T in [f32, f16, bf16], "_dw" = linear_tiled::<T, Dw>;
}
