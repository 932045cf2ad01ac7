//! standard: attention in three kernels, none of them naive.
//!
//! The idea: the work of a framework without a fused kernel, done well. Two matrix products
//! by the best tiles there are, and between them a softmax that reads a row once and
//! writes it once. It is the baseline that a flash kernel has to beat.
//!
//! Change from naive: the products run on tensor cores, over tiles
//! ([`gemm::mma`](crate::parts::gemm::mma), which the projections share); rows of the softmax stand
//! in shared memory and move 16 bytes at a time; tiles above the diagonal of a causal mask
//! are left out of both products. What did not: the N x N matrix goes through memory.
//!
//! ```text
//! scores:  S = Q Kᵀ * scale                one block per 128 x 128 of S; hidden tiles skipped
//! softmax: P[i, :] = exp(S[i, :] - max) / sum; LSE[i]       one warp or one block per row
//! output:  O = P V                         one block per 128 rows; only keys that are seen
//! ```
//!
//! Memory: S is written, read, and replaced by P, which is read again: four times B*H*Nq*Nk
//! elements of the storage type, next to which Q, K, V and O are small. Each element stands
//! for 4 D FLOP: D = 64 and f16 make 32 FLOP per byte, where tensor cores need hundreds.
//!
//! S and P are stored in the type of the tensors. The 2x rule decides: the plain algorithm
//! that it measures with rounds both, so that f32 in memory would be twice the traffic for
//! an exactness that is not asked for; and the weights can be returned as they stand. Scores
//! are in natural units, not in the log2(e) of naive, and stored in units of 16
//! ([`STORED_UNIT`]): f16 ends at 65,504, which is then a score of 2^20.
//!
//! Measured: 0.657 ms (H100; f16, batch 4, 12 heads, N 2048, D 64). Limits: memory grows with
//! N². f32 has scalar products (see `linear_mma.rs` for why).
//!
//! Source: Dao et al., "FlashAttention", 2022, algorithm 0.

use half::{bf16, f16};
use simt::{
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    thread,
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        gemm::{KMajor, MatrixMut, MnMajor, Plain, Product, Scaled, mma, tiled},
        head::Head,
        policy::Policy,
        softmax::STORED_UNIT,
    },
};

pub mod softmax;

/// Rows and keys of a tile of the scores on tensor cores; rows of a tile of the output.
pub const MMA_TILE: u32 = mma::BM;
/// Threads of their blocks.
pub const MMA_THREADS: u32 = mma::THREADS;
/// Dynamic shared memory of a block of [`scores`] in bytes.
pub const SCORES_SHARED_BYTES: u32 = mma::shared_bytes(MMA_TILE);
/// Columns of a tile of the output on tensor cores, widest first.
pub const OUTPUT_COLUMNS: [u32; 3] = [128, 96, 64];
/// Rows and columns of the tiles of f32.
pub const TILED_TILE: u32 = tiled::TILE;
/// Threads of their blocks.
pub const TILED_THREADS: u32 = tiled::THREADS;

/// Columns of a tile of the output for a head dim: the width that computes the fewest columns beside it.
#[must_use]
pub const fn output_columns(d: u32) -> u32 {
    let [mut best, ..] = OUTPUT_COLUMNS;
    let mut i = 1;
    while i < OUTPUT_COLUMNS.len() {
        let columns = OUTPUT_COLUMNS[i];
        if d.next_multiple_of(columns) < d.next_multiple_of(best) {
            best = columns;
        }
        i += 1;
    }
    best
}

/// The products of one warp of [`output`] in a tile of `columns` columns: along the rows, along the
/// columns.
const fn output_tiles(columns: usize) -> (usize, usize) {
    match columns {
        128 => (4, 8),
        _ => (2, columns / 8),
    }
}

/// Dynamic shared memory of a block of [`output`] in bytes.
#[must_use]
pub const fn output_shared_bytes(columns: u32) -> u32 {
    mma::shared_bytes(columns)
}

/// A block's tile of a product: the product, and the tile's first row and first column.
type Tile<T, E> = (Product<T, E>, u32, u32);

/// The product of a block of scores: `S = Q Kᵀ * scale`, in tiles of `tile` rows and keys. `None`
/// for a tile that is hidden: its scores are never read.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
unsafe fn scores_product<T: Scalar>(args: &AttentionArgs, tile: u32) -> Option<Tile<T, Scaled>> {
    let (head, kv_tile) = Head::of_block(args, args.shape.seq_k.div_ceil(tile));
    let first_row = thread::block_idx_y() * tile;
    if head.ends_before(first_row) {
        return None;
    }
    // SAFETY: the buffers have the shapes that `args` says.
    unsafe {
        let policy = Policy::new(args, head);
        if !policy.key_tiles(first_row, first_row + tile, tile).contains(&kv_tile) {
            return None;
        }
        let product = Product {
            a: head.query_matrix(&args.tensors.q, args.shape.head_dim),
            b: head.key_matrix(&args.tensors.k, args.shape.head_dim),
            c: MatrixMut::new(head.weight_matrix(args), &args.scratch.weights),
            depth: args.shape.head_dim,
            epilogue: Scaled(args.scores.scale / STORED_UNIT),
        };
        Some((product, first_row, kv_tile * tile))
    }
}

/// The product of a block of output: `O = P V`, over the keys that its `tile` rows see, in tiles of
/// `columns` columns. `None` where there are no rows.
///
/// # Safety
/// As for [`output`].
#[inline(always)]
unsafe fn output_product<T: Scalar>(
    args: &AttentionArgs,
    tile: u32,
    columns: u32,
) -> Option<Tile<T, Plain>> {
    let (head, q_tile) = Head::of_block(args, args.shape.seq_q.div_ceil(tile));
    let first_row = q_tile * tile;
    if head.ends_before(first_row) {
        return None;
    }
    // SAFETY: the buffers have the shapes that `args` says.
    unsafe {
        let policy = Policy::new(args, head);
        let o = head.query_matrix(&args.tensors.o, args.shape.head_dim_v);
        let product = Product {
            a: head.weight_matrix(args),
            b: head.key_matrix(&args.tensors.v, args.shape.head_dim_v),
            c: MatrixMut::new(o, &args.tensors.o.buffer),
            depth: policy.end_of_tile(first_row + tile),
            epilogue: Plain,
        };
        Some((product, first_row, thread::block_idx_y() * columns))
    }
}

/// `S = Q Kᵀ * scale`, in natural units, of which the storage type holds one for [`STORED_UNIT`];
/// nothing is hidden yet.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `k: [B, H, Nk, D]`, `weights: [B, H, Nq, Nk]`.
///
/// # Thread mapping
/// A block per tile of 128 x 128; `x` counts tiles of keys, head after head, `y` tiles of rows.
/// Within it as in [`mma::tile`].
///
/// # Shared memory
/// Dynamic, [`SCORES_SHARED_BYTES`].
///
/// # Safety
/// The buffers of `args` must have these shapes, and the launch the threads and shared memory
/// stated here.
#[inline(always)]
pub unsafe fn scores<T: Scalar, C: TensorCore<T>>(args: &AttentionArgs) {
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    unsafe {
        if let Some((product, row, column)) = scores_product::<T>(args, MMA_TILE) {
            mma::tile::<T, C, KMajor, KMajor, Scaled, { MMA_TILE as usize }, 4, 8>(
                &product, row, column,
            );
        }
    }
}

/// As [`scores`], in scalar arithmetic: tiles of 64 x 64, static shared memory.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
pub unsafe fn scores_tiled<T: Scalar>(args: &AttentionArgs) {
    // SAFETY: the buffers have the shapes that `args` says.
    if let Some((product, row, column)) = unsafe { scores_product::<T>(args, TILED_TILE) } {
        tiled::tile::<T, KMajor, KMajor, Scaled>(&product, row, column);
    }
}

/// `O = P V`, in tiles of `COLUMNS` columns of the head; a warp has M_TILES x N_TILES products.
///
/// # Layout
/// `weights: [B, H, Nq, Nk]`, `v: [B, H, Nk, D]`, `o: [B, H, Nq, D]`.
///
/// # Thread mapping
/// A block per 128 rows and head (`x`), and COLUMNS columns (`y`). Within it as in [`mma::tile`].
///
/// # Shared memory
/// Dynamic, [`output_shared_bytes`]`(COLUMNS)`.
///
/// # Safety
/// As for [`scores`]; [`softmax::softmax_rows`] must have run.
#[inline(always)]
pub unsafe fn output<
    T: Scalar,
    C: TensorCore<T>,
    const COLUMNS: usize,
    const M_TILES: usize,
    const N_TILES: usize,
>(
    args: &AttentionArgs,
) {
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    unsafe {
        if let Some((product, row, column)) = output_product(args, MMA_TILE, COLUMNS as u32) {
            mma::tile::<T, C, KMajor, MnMajor, Plain, COLUMNS, M_TILES, N_TILES>(
                &product, row, column,
            );
        }
    }
}

/// As [`output`], in scalar arithmetic: tiles of 64 x 64, static shared memory.
///
/// # Safety
/// As for [`output`].
#[inline(always)]
pub unsafe fn output_tiled<T: Scalar>(args: &AttentionArgs) {
    // SAFETY: the buffers have the shapes that `args` says.
    let tile = unsafe { output_product::<T>(args, TILED_TILE, TILED_TILE) };
    if let Some((product, row, column)) = tile {
        tiled::tile::<T, KMajor, MnMajor, Plain>(&product, row, column);
    }
}

entries! {
    /// Instances of [`scores`].
    pub static SCORES: AttentionArgs => "sm_80", threads MMA_THREADS, min_blocks 2;
    standard_scores: T in [f16, bf16] = scores::<T, Ampere>;
}
entries! {
    /// Instances of [`output`], by the columns of a tile.
    pub static OUTPUT: AttentionArgs => "sm_80", threads MMA_THREADS, min_blocks 2;
    standard_output: T in [f16, bf16], x COLUMNS in [64, 96, 128] = output::<
        T,
        Ampere,
        COLUMNS,
        { output_tiles(COLUMNS).0 },
        { output_tiles(COLUMNS).1 },
    >;
}
entries! {
    /// Instances of [`scores_tiled`].
    pub static TILED_SCORES: AttentionArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    standard_scores: T in [f32] = scores_tiled::<T>;
}
entries! {
    /// Instances of [`output_tiled`].
    pub static TILED_OUTPUT: AttentionArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    standard_output: T in [f32] = output_tiled::<T>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_tiles_waste_as_little_as_can_be() {
        let columns = [32, 64, 96, 128, 160, 192, 224, 256].map(output_columns);
        assert_eq!(columns, [64, 64, 96, 128, 96, 96, 128, 128]);
    }
}
