//! Linear projections `y = x wᵀ + bias`, third rung: tensor cores.
//!
//! The idea: the products of a tile are `mma.sync` instructions, and the slices of `x` and
//! `w` that they need are already on their way while the slice before is multiplied.
//!
//! Change from linear_tiled: tiles of 128 x 128 in place of 64 x 64, kept in the storage
//! type and swizzled; a warp holds 64 x 64 of `y` in registers; copies are asynchronous,
//! two slices ahead, with one barrier a slice in place of two. The tile is
//! [`gemm::mma::tile`](crate::parts::gemm::mma::tile), which standard attention is made of too.
//!
//! ```text
//! for each slice of 32 input features:
//!     acc += x wᵀ                          128 x 128 of y, 64 x 64 per warp
//! y = acc + bias
//! ```
//!
//! Memory: 256 elements from global memory for 32,768 FLOP: 64 FLOP per byte; 49,152 bytes of
//! dynamic shared memory. 128 f32 registers of a thread hold its part of `y`.
//!
//! Heads: `y` is `[B, N, H * D]`, which read as `[B, N, H, D]` is what the attention kernels
//! take through strides. So heads are split without a transpose.
//!
//! Measured: 0.355 ms, 387 TFLOP/s, where linear_tiled took 5.29 ms (16,384 rows, 2048 features in
//! and out, f16, one H100 80GB HBM3). Limits: f16 and bf16; f32 stays on linear_tiled, since a tf32
//! product keeps 11 of the 24 bits of an f32, which the 2x rule does not let pass. Matrices
//! whose rows are no multiple of 16 bytes are read and written one element at a time.
//!
//! Source: NVIDIA, "CUTLASS: Efficient GEMM in CUDA" (tiles of block, warp and instruction);
//! PTX ISA, "Matrix Fragments for mma.m16n8k16".

use half::{bf16, f16};
use simt::{
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    thread,
};

use super::{Dw, Dx, LinearProduct, Y};
use crate::{
    args::LinearArgs,
    entries,
    parts::gemm::{Biased, mma},
};

/// Rows and columns of the result that a block computes.
pub const TILE: u32 = mma::BM;
/// Threads of a block.
pub const THREADS: u32 = mma::THREADS;
/// Dynamic shared memory of a block in bytes.
pub const SHARED_BYTES: u32 = mma::shared_bytes(TILE);

/// A product of a projection on tensor cores `C`.
///
/// # Layout
/// `x: [rows, in]`, `w: [out, in]`, `bias: [out]` or empty, `y: [rows, out]`.
///
/// # Thread mapping
/// A block per tile of 128 x 128 elements of the result; the grid has as many blocks in `x` as there
/// are tiles of rows, in `y` as there are tiles of columns. Within a block as in
/// [`mma::tile`].
///
/// # Shared memory
/// Dynamic, [`SHARED_BYTES`].
///
/// # Safety
/// The buffers of `args` must have these shapes, and the launch the grid, the threads and the
/// shared memory stated here.
#[inline(always)]
pub unsafe fn linear_mma<T: Scalar, C: TensorCore<T>, P: LinearProduct>(args: &LinearArgs) {
    // Blocks start in the order of `x`, then `y`. They take the tiles of a row one after the
    // other, so that blocks at work at the same time share rows of x and w.
    let block = thread::block_idx_y() * thread::grid_dim_x() + thread::block_idx_x();
    // There is at least one; saying so spares the check for a division by zero.
    let column_tiles = thread::grid_dim_y().max(1);
    let (row_tile, column_tile) = (block / column_tiles, block % column_tiles);

    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    unsafe {
        mma::tile::<T, C, P::A, P::B, Biased<T>, { TILE as usize }, 4, 8>(
            &P::product(args),
            row_tile * TILE,
            column_tile * TILE,
        );
    }
}

entries! {
    /// Instances of [`linear_mma`] for [`Y`].
    pub static ENTRIES: LinearArgs => "sm_80", threads THREADS, min_blocks 2;
    linear_mma: T in [f16, bf16] = linear_mma::<T, Ampere, Y>;
}
entries! {
    /// Instances of [`linear_mma`] for [`Dx`].
    pub static DX: LinearArgs => "sm_80", threads THREADS, min_blocks 2;
    linear_mma: T in [f16, bf16], "_dx" = linear_mma::<T, Ampere, Dx>;
}
entries! {
    /// Instances of [`linear_mma`] for [`Dw`].
    pub static DW: LinearArgs => "sm_80", threads THREADS, min_blocks 2;
    linear_mma: T in [f16, bf16], "_dw" = linear_mma::<T, Ampere, Dw>;
}
