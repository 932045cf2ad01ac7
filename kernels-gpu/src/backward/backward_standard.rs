//! backward_standard: P and dS in memory, and every product on its best GEMM.
//!
//! The idea: the formulas of `backward_naive`, done well. It is the baseline that a rung without N x N
//! matrices has to beat.
//!
//! ```text
//! prepare: delta = rowsum(dO ∘ O)                                       eight threads per row
//! scores:  S = Q Kᵀ; dP = dO Vᵀ                one block per 128 x 64 of both; hidden tiles skipped
//!          P = exp2(S - LSE); dS = P ∘ (dP - delta)                     in registers, then stored
//! queries: dQ = dS K * scale                   one block per 128 rows; only keys that are seen
//! keys:    dK = dSᵀ Q * scale                  one block per 128 keys; only rows that see them,
//! values:  dV = Pᵀ dO                          of all heads that share K and V
//! ```
//!
//! Change from backward_naive: the five products run on tensor cores, over tiles
//! ([`gemm::mma`](crate::parts::gemm::mma), which `standard` and the projections share), and read P
//! and dS transposed in place. The kernel skips tiles that no row sees. Two N x N matrices still go
//! through memory.
//!
//! A framework without a fused kernel makes five launches, with S and dP in memory. Then
//! `P = exp(S - LSE)` of a rounded S has an error that the plain algorithm avoids, since it sums the same
//! rounded scores. Here S and dP of a tile share registers: neither is rounded, and the kernel writes
//! two matrices instead of four.
//!
//! Memory: P and dS are written once; dV reads P, dK and dQ read dS. Five times B*H*Nq*Nk elements of
//! the storage type for 10 D FLOP each: in f16 D FLOP per byte, where tensor cores need hundreds. The
//! operands of the products come from L2: a tile of C of 128 x 128 takes 256 elements for each
//! of its terms.
//!
//! Measured: 215 TFLOP/s at D 128 and 141 at D 64 (H200, f16, 16k tokens, N 8192). Limits: memory grows with N². f32 has scalar products.
//!
//! Source: Dao et al., "FlashAttention", 2022, appendix B.2 and algorithm 0.

use core::ops::Range;

use half::{bf16, f16};
use simt::{
    math,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    thread, unroll,
};

use crate::{
    args::BackwardArgs,
    entries,
    parts::{
        fragment,
        gemm::{KMajor, Matrix, MatrixMut, MnMajor, Plain, Scaled, mma, tiled},
        gradient::{self, Row},
        head::Head,
        policy::Policy,
        schedule::divide,
    },
};

pub use crate::forward::standard::{
    MMA_THREADS, MMA_TILE, TILED_THREADS, TILED_TILE, output_columns, output_shared_bytes,
};

/// Keys of a tile of [`scores`] on tensor cores: its sums of S and dP take as many registers as one
/// product of twice the columns.
pub const SCORES_KEYS: u32 = MMA_TILE / 2;
/// Dynamic shared memory of a block of [`scores`] in bytes.
pub const SCORES_SHARED_BYTES: u32 = mma::shared_bytes(SCORES_KEYS);

/// Products of a warp of [`scores`] along the rows, and along the keys: 64 x 32.
const SCORES_TILES: (usize, usize) = (4, 4);

/// The products of one warp in a tile of `columns` columns of a gradient: along the rows, along the
/// columns.
const fn tiles(columns: usize) -> (usize, usize) {
    match columns {
        128 => (4, 8),
        _ => (2, columns / 8),
    }
}

/// Whether P and dS exist in a tile of `tile` rows and `tile` keys: where rows, or keys, ask for it by
/// the ranges below. (Each of the two may name a tile beside those that the other names.)
#[inline(always)]
fn exists(policy: &Policy, row_tile: u32, key_tile: u32, tile: u32) -> bool {
    let of_rows = policy.key_tiles(row_tile * tile, (row_tile + 1) * tile, tile);
    let of_keys = policy.query_tiles(key_tile * tile, (key_tile + 1) * tile, tile);
    of_rows.contains(&key_tile) || of_keys.contains(&row_tile)
}

/// The keys from which a tile of rows has dQ: whole tiles, up to the last key.
#[inline(always)]
fn keys_of(policy: &Policy, first_row: u32, tile: u32) -> Range<u32> {
    let tiles = policy.key_tiles(first_row, first_row + tile, tile);
    within(tiles, tile, policy.head.seq_k)
}

/// The rows from which a tile of keys has dK and dV: whole tiles, up to the last row.
#[inline(always)]
fn rows_of(policy: &Policy, first_key: u32, tile: u32) -> Range<u32> {
    let tiles = policy.query_tiles(first_key, first_key + tile, tile);
    within(tiles, tile, policy.head.seq_q)
}

/// The elements of some tiles, up to `end`.
#[inline(always)]
fn within(tiles: Range<u32>, tile: u32, end: u32) -> Range<u32> {
    let end = (tiles.end * tile).min(end);
    (tiles.start * tile).min(end)..end
}

/// The work of a block of scores.
struct ScoreTile {
    policy: Policy,
    first_row: u32,
    first_key: u32,
}

impl ScoreTile {
    /// The tile of this block, of `tile` rows and `keys` keys, a part of `tile`; `None` if there is none.
    ///
    /// # Safety
    /// As for [`scores`].
    #[inline(always)]
    unsafe fn of_block(args: &BackwardArgs, tile: u32, keys: u32) -> Option<Self> {
        let forward = &args.forward;
        let head = Head::of_block_yz(forward)?;
        let (row_tile, key_tile) =
            divide(thread::block_idx_x(), forward.shape.seq_k.div_ceil(keys));
        let (first_row, first_key) = (row_tile * tile, key_tile * keys);
        if head.ends_before(first_row) || head.keys_end_before(first_key) {
            return None;
        }
        // SAFETY: the launch states the mask, slopes and bias that it has, as for `scores`.
        let policy = unsafe { Policy::new(forward, head) };
        exists(&policy, row_tile, first_key / tile, tile).then_some(Self {
            policy,
            first_row,
            first_key,
        })
    }
}

/// The operands of S and dP: Q and K, dO and V.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
unsafe fn operands<T: Scalar>(args: &BackwardArgs, head: &Head) -> [Matrix<T>; 4] {
    let (shape, tensors) = (&args.forward.shape, &args.forward.tensors);
    // SAFETY: Q, K, V and dO have the shapes stated above.
    unsafe {
        [
            head.query_matrix(&tensors.q, shape.head_dim),
            head.key_matrix(&tensors.k, shape.head_dim),
            head.query_matrix(&args.gradients.d_o, shape.head_dim_v),
            head.key_matrix(&tensors.v, shape.head_dim_v),
        ]
    }
}

/// P after dropout and dS of a head, to be written.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
unsafe fn matrices<T: Scalar>(args: &BackwardArgs, head: &Head) -> [MatrixMut<T>; 2] {
    let (weights, d_scores) = (&args.forward.scratch.weights, &args.steps.d_scores);
    // SAFETY: both are `[B, H, Nq, Nk]`, and written here alone.
    unsafe {
        [
            MatrixMut::new(head.score_matrix(weights), weights),
            MatrixMut::new(head.score_matrix(d_scores), d_scores),
        ]
    }
}

/// P after dropout, and dS.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `d_o: [B, H, Nq, Dv]`, `k: [B, Hkv, Nk, D]`, `v: [B, Hkv, Nk, Dv]`,
/// `weights, d_scores: [B, H, Nq, Nk]`.
///
/// # Thread mapping
/// One block per tile of 128 rows and 64 keys; `x` counts tiles of keys, and with each of them tiles of
/// rows, `y` and `z` heads. Within it as in [`mma::tile`].
///
/// # Shared memory
/// Dynamic, [`SCORES_SHARED_BYTES`].
///
/// # Safety
/// The buffers of `args` must have these shapes, the launch the threads and shared memory stated here,
/// and [`prepare`](super::prepare) must have run.
#[inline(always)]
pub unsafe fn scores<T: Scalar, C: TensorCore<T>>(args: &BackwardArgs) {
    const KEYS: usize = SCORES_KEYS as usize;
    const M: usize = SCORES_TILES.0;
    const N: usize = SCORES_TILES.1;
    // SAFETY: the buffers have the shapes stated above.
    let tile = unsafe { ScoreTile::of_block(args, MMA_TILE, SCORES_KEYS) };
    let Some(ScoreTile { policy, first_row, first_key }) = tile else { return };
    let shape = &args.forward.shape;
    let first = (first_row, first_key);
    let (mut s, mut dp) = ([[[0.0f32; 4]; N]; M], [[[0.0f32; 4]; N]; M]);
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    unsafe {
        let [q, k, d_o, v] = operands::<T>(args, &policy.head);
        let of_s = (&q, &k, shape.head_dim);
        mma::accumulate::<T, C, KMajor, KMajor, KEYS, M, N>(&mut s, of_s, first);
        // Hazard: the stages, which dO and V overwrite next, may still be read for S.
        thread::sync_threads();
        let of_dp = (&d_o, &v, shape.head_dim_v);
        mma::accumulate::<T, C, KMajor, KMajor, KEYS, M, N>(&mut dp, of_dp, first);

        let (row, key) = mma::place::<KEYS, M, N>();
        let (i, j) = (first_row + row, first_key + key);
        unroll!(for FRAGMENT in 0..4 {
            let i = i + FRAGMENT as u32 * fragment::ROWS;
            gradients::<T, N>(args, &policy, (i, j), &mut s[FRAGMENT], &mut dp[FRAGMENT]);
        });

        let [weights, d_scores] = matrices::<T>(args, &policy.head);
        mma::store::<T, C, Plain, KEYS, M, N>(&weights, &Plain, &s, first);
        mma::store::<T, C, Plain, KEYS, M, N>(&d_scores, &Plain, &dp, first);
    }
}

/// P after dropout and dS of a lane's part of a fragment, in place of S and dP: rows `i` and `i + 8`,
/// keys `j + 8 n` and the next.
///
/// # Safety
/// `delta` and `minus_lse_log2` of `args.steps` must hold the rows.
#[inline(always)]
unsafe fn gradients<T: Scalar, const N: usize>(
    args: &BackwardArgs,
    policy: &Policy,
    (i, j): (u32, u32),
    s: &mut [[f32; 4]; N],
    dp: &mut [[f32; 4]; N],
) {
    // The same for all lanes: the first of the 16 rows, the first key and the one past the last.
    let (first_i, first_j) = (i - i % 8, j - j % 8);
    let (last_i, end_j) = (first_i + fragment::ROWS - 1, first_j + 8 * N as u32);
    let is_whole = policy.whole_from(last_i) <= first_j && end_j <= policy.whole_keys(first_i);
    let visible = if is_whole { [u32::MAX; 2] } else { bits::<N>(i, j, |i, j| policy.sees(i, j)) };
    let kept = if Policy::drops() {
        bits::<N>(i, j, |i, j| policy.kept(i, j, 1.0) != 0.0)
    } else {
        [u32::MAX; 2]
    };
    let scale = args.forward.scores.scale;
    unroll!(for R in 0..2 {
        let i = i + 8 * R as u32;
        // SAFETY: the caller says that the rows are there.
        let row = unsafe { Row::read(args, policy.head, i) };
        unroll!(for TILE in 0..4 {
            if TILE < N {
                unroll!(for E in 0..2 {
                    let (at, bit) = (2 * R + E, 2 * TILE + E);
                    let raw = s[TILE][at];
                    let shaped = policy.shape_score::<T>(raw, scale, i, j + (8 * TILE + E) as u32);
                    let mut x = math::fma(shaped, policy.scale_log2(), row.minus_lse_log2);
                    // Not by way of its score: see `gradient::of_shaped`.
                    if visible[R] >> bit & 1 == 0 {
                        x = f32::NEG_INFINITY;
                    }
                    let weight = math::exp2(x);
                    let (mut p, mut gradient) = (weight, dp[TILE][at]);
                    if Policy::drops() {
                        let factor = if kept[R] >> bit & 1 == 0 { 0.0 } else { policy.rescale() };
                        (p, gradient) = (weight * factor, gradient * factor);
                    }
                    s[TILE][at] = p;
                    let slope = policy.score_slope::<T>(raw);
                    dp[TILE][at] = weight * (gradient - row.delta) * slope;
                });
            }
        });
    });
}

/// The scores of a lane for whose row and key `holds`: bit `2 n + e` of the first is row `i` at
/// key `j + 8 n + e`, of the second row `i + 8`.
#[inline(always)]
fn bits<const N: usize>(i: u32, j: u32, holds: impl Fn(u32, u32) -> bool) -> [u32; 2] {
    let mut bits = [0; 2];
    // Not unrolled: `holds` may be long.
    for n in 0..2 * N as u32 {
        let key = j + 8 * (n / 2) + n % 2;
        bits[0] |= u32::from(holds(i, key)) << n;
        bits[1] |= u32::from(holds(i + 8, key)) << n;
    }
    bits
}

/// As [`scores`], in scalar arithmetic: tiles of 64 x 64, static shared memory.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
pub unsafe fn scores_tiled<T: Scalar>(args: &BackwardArgs) {
    // SAFETY: the buffers have the shapes stated for `scores`.
    let tile = unsafe { ScoreTile::of_block(args, TILED_TILE, TILED_TILE) };
    let Some(ScoreTile { policy, first_row, first_key }) = tile else { return };
    let (shape, scale) = (&args.forward.shape, args.forward.scores.scale);
    let first = (first_row, first_key);
    // SAFETY: the buffers have the shapes that `args` says.
    let ([q, k, d_o, v], [weights, d_scores]) =
        unsafe { (operands::<T>(args, &policy.head), matrices::<T>(args, &policy.head)) };
    let (mut s, mut dp) = ([[0.0f32; 4]; 4], [[0.0f32; 4]; 4]);
    tiled::accumulate::<T, KMajor, KMajor>(&mut s, (&q, &k, shape.head_dim), first);
    tiled::accumulate::<T, KMajor, KMajor>(&mut dp, (&d_o, &v, shape.head_dim_v), first);

    let (row, key) = tiled::place();
    let (i, j) = (first_row + row, first_key + key);
    unroll!(for R in 0..4 {
        let i = i + R as u32;
        // SAFETY: rows up to the end of a tile are padded ones.
        let row = unsafe { Row::read(args, policy.head, i) };
        unroll!(for C in 0..4 {
            let place = (i, j + C as u32);
            let both = (s[R][C], dp[R][C]);
            (s[R][C], dp[R][C]) = gradient::of_score::<T>(&policy, scale, row, place, both);
        });
    });
    tiled::store(&weights, &Plain, &s, first);
    tiled::store(&d_scores, &Plain, &dp, first);
}

/// The block's tile of dQ of `tile` rows and `columns` columns: head, first row, first column. `None`
/// if there is none.
#[inline(always)]
fn queries_tile(args: &BackwardArgs, tile: u32, columns: u32) -> Option<(Head, u32, u32)> {
    let forward = &args.forward;
    let head = Head::of_block_yz(forward)?;
    let column_tiles = forward.shape.head_dim.div_ceil(columns);
    let (row_tile, column_tile) = divide(thread::block_idx_x(), column_tiles);
    let first_row = row_tile * tile;
    (!head.ends_before(first_row)).then_some((head, first_row, column_tile * columns))
}

/// dS and K of the keys that the `tile` rows from `first_row` on see.
///
/// # Safety
/// As for [`queries`].
#[inline(always)]
unsafe fn queries_operands<T: Scalar>(
    args: &BackwardArgs,
    head: Head,
    first_row: u32,
    tile: u32,
) -> (Matrix<T>, Matrix<T>, u32) {
    let (forward, columns) = (&args.forward, args.forward.shape.head_dim);
    // SAFETY: dS, K and what a policy reads have the shapes stated for `queries`.
    unsafe {
        let keys = keys_of(&Policy::new(forward, head), first_row, tile);
        let depth = keys.end - keys.start;
        let d_scores = head.score_matrix(&args.steps.d_scores).part(0..head.seq_q, keys.clone());
        let k = head.key_matrix(&forward.tensors.k, columns).part(keys, 0..columns);
        (d_scores, k, depth)
    }
}

/// dQ of a head, to be written.
///
/// # Safety
/// As for [`queries`].
#[inline(always)]
unsafe fn dq<T: Scalar>(args: &BackwardArgs, head: &Head) -> MatrixMut<T> {
    let dq = &args.gradients.dq;
    // SAFETY: dQ is `[B, H, Nq, D]`, and this block alone has its tile.
    unsafe { MatrixMut::new(head.query_matrix(dq, args.forward.shape.head_dim), &dq.buffer) }
}

/// `dQ = dS K * scale`, in tiles of `COLUMNS` columns; a warp has M x N products.
///
/// # Layout
/// `d_scores: [B, H, Nq, Nk]`, `k: [B, Hkv, Nk, D]`, `dq: [B, H, Nq, D]`.
///
/// # Thread mapping
/// One block per 128 rows and COLUMNS columns; `x` counts tiles of columns, and with each of them tiles
/// of rows, `y` and `z` heads. Within it as in [`mma::tile`].
///
/// # Shared memory
/// Dynamic, [`output_shared_bytes`]`(COLUMNS)`.
///
/// # Safety
/// As for [`scores`], which must have run.
#[inline(always)]
pub unsafe fn queries<
    T: Scalar,
    C: TensorCore<T>,
    const COLUMNS: usize,
    const M: usize,
    const N: usize,
>(
    args: &BackwardArgs,
) {
    let tile = queries_tile(args, MMA_TILE, COLUMNS as u32);
    let Some((head, first_row, first_column)) = tile else { return };
    let first = (first_row, first_column);
    let mut sums = [[[0.0f32; 4]; N]; M];
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    unsafe {
        let (d_scores, k, depth) = queries_operands::<T>(args, head, first_row, MMA_TILE);
        let operands = (&d_scores, &k, depth);
        mma::accumulate::<T, C, KMajor, MnMajor, COLUMNS, M, N>(&mut sums, operands, first);
        let epilogue = Scaled(args.forward.scores.scale);
        mma::store::<T, C, Scaled, COLUMNS, M, N>(&dq(args, &head), &epilogue, &sums, first);
    }
}

/// As [`queries`], in scalar arithmetic: tiles of 64 x 64, static shared memory.
///
/// # Safety
/// As for [`queries`].
#[inline(always)]
pub unsafe fn queries_tiled<T: Scalar>(args: &BackwardArgs) {
    let tile = queries_tile(args, TILED_TILE, TILED_TILE);
    let Some((head, first_row, first_column)) = tile else { return };
    let first = (first_row, first_column);
    // SAFETY: the buffers have the shapes that `args` says.
    let ((d_scores, k, depth), dq) =
        unsafe { (queries_operands::<T>(args, head, first_row, TILED_TILE), dq::<T>(args, &head)) };
    let mut sums = [[0.0f32; 4]; 4];
    tiled::accumulate::<T, KMajor, MnMajor>(&mut sums, (&d_scores, &k, depth), first);
    tiled::store(&dq, &Scaled(args.forward.scores.scale), &sums, first);
}

/// A gradient that is a sum over rows: dK or dV.
pub trait OfKeys {
    /// Columns of the gradient.
    fn columns(args: &BackwardArgs) -> u32;

    /// The factor of the gradient when it is stored.
    fn factor(args: &BackwardArgs) -> f32;

    /// The transposed operand `[Nq, Nk]` of a head, and the other one, `[Nq, columns]`.
    ///
    /// # Safety
    /// As for [`keys`].
    unsafe fn operands<T: Scalar>(args: &BackwardArgs, head: &Head) -> [Matrix<T>; 2];

    /// The gradient of a head of K, to be written.
    ///
    /// # Safety
    /// As for [`keys`].
    unsafe fn gradient<T: Scalar>(args: &BackwardArgs, head: &Head) -> MatrixMut<T>;
}

/// `dK = dSᵀ Q * scale`.
#[derive(Clone, Copy, Debug)]
pub struct Dk;

impl OfKeys for Dk {
    #[inline(always)]
    fn columns(args: &BackwardArgs) -> u32 {
        args.forward.shape.head_dim
    }
    #[inline(always)]
    fn factor(args: &BackwardArgs) -> f32 {
        args.forward.scores.scale
    }
    #[inline(always)]
    unsafe fn operands<T: Scalar>(args: &BackwardArgs, head: &Head) -> [Matrix<T>; 2] {
        let q = &args.forward.tensors.q;
        // SAFETY: Q, K, V and dO have the shapes stated above.
        unsafe {
            [head.score_matrix(&args.steps.d_scores), head.query_matrix(q, Self::columns(args))]
        }
    }
    #[inline(always)]
    unsafe fn gradient<T: Scalar>(args: &BackwardArgs, head: &Head) -> MatrixMut<T> {
        let dk = &args.gradients.dk;
        // SAFETY: the gradient is a tensor of the keys, and this block alone has its tile.
        unsafe { MatrixMut::new(head.key_matrix(dk, Self::columns(args)), &dk.buffer) }
    }
}

/// `dV = Pᵀ dO`.
#[derive(Clone, Copy, Debug)]
pub struct Dv;

impl OfKeys for Dv {
    #[inline(always)]
    fn columns(args: &BackwardArgs) -> u32 {
        args.forward.shape.head_dim_v
    }
    #[inline(always)]
    fn factor(_: &BackwardArgs) -> f32 {
        1.0
    }
    #[inline(always)]
    unsafe fn operands<T: Scalar>(args: &BackwardArgs, head: &Head) -> [Matrix<T>; 2] {
        let d_o = &args.gradients.d_o;
        // SAFETY: Q, K, V and dO have the shapes stated above.
        unsafe { [head.weight_matrix(&args.forward), head.query_matrix(d_o, Self::columns(args))] }
    }
    #[inline(always)]
    unsafe fn gradient<T: Scalar>(args: &BackwardArgs, head: &Head) -> MatrixMut<T> {
        let dv = &args.gradients.dv;
        // SAFETY: the gradient is a tensor of the keys, and this block alone has its tile.
        unsafe { MatrixMut::new(head.key_matrix(dv, Self::columns(args)), &dv.buffer) }
    }
}

/// The block's tile of dK or dV: the first head of Q that shares the head of K, first key, first column.
/// `None` if there is none.
#[inline(always)]
fn keys_tile<G: OfKeys>(args: &BackwardArgs, tile: u32, columns: u32) -> Option<(Head, u32, u32)> {
    let head = Head::of_kv_block_yz(&args.forward)?;
    let column_tiles = G::columns(args).div_ceil(columns);
    let (key_tile, column_tile) = divide(thread::block_idx_x(), column_tiles);
    let first_key = key_tile * tile;
    (!head.keys_end_before(first_key)).then_some((head, first_key, column_tile * columns))
}

/// The two operands of [`OfKeys::operands`] in the rows of head `member` of the block's group that see
/// the `tile` keys from `first_key` on, and how many these are.
///
/// # Safety
/// As for [`keys`].
#[inline(always)]
unsafe fn keys_operands<T: Scalar, G: OfKeys>(
    args: &BackwardArgs,
    member: u32,
    first_key: u32,
    tile: u32,
) -> (Matrix<T>, Matrix<T>, u32) {
    let head = Head::of_group(&args.forward, Head::number_of_block(), member);
    // SAFETY: the buffers have the shapes stated for `keys`.
    unsafe {
        let rows = rows_of(&Policy::new(&args.forward, head), first_key, tile);
        let depth = rows.end - rows.start;
        let [scores, other] = G::operands::<T>(args, &head);
        let columns = 0..G::columns(args);
        (scores.part(rows.clone(), 0..head.seq_k), other.part(rows, columns), depth)
    }
}

/// dK or dV, over the heads that share K and V, in tiles of `COLUMNS` columns; a warp has M x N products.
///
/// # Layout
/// `weights, d_scores: [B, H, Nq, Nk]`, `q: [B, H, Nq, D]`, `d_o: [B, H, Nq, Dv]`,
/// `dk: [B, Hkv, Nk, D]`, `dv: [B, Hkv, Nk, Dv]`.
///
/// # Thread mapping
/// One block per 128 keys and COLUMNS columns; `x` counts tiles of columns, and with each of them tiles of
/// keys, `y` and `z` heads of K. Within it as in [`mma::tile`].
///
/// # Shared memory
/// Dynamic, [`output_shared_bytes`]`(COLUMNS)`.
///
/// # Safety
/// As for [`scores`], which must have run.
#[inline(always)]
pub unsafe fn keys<
    T: Scalar,
    C: TensorCore<T>,
    G: OfKeys,
    const COLUMNS: usize,
    const M: usize,
    const N: usize,
>(
    args: &BackwardArgs,
) {
    let tile = keys_tile::<G>(args, MMA_TILE, COLUMNS as u32);
    let Some((of_keys, first_key, first_column)) = tile else { return };
    let first = (first_key, first_column);
    let mut sums = [[[0.0f32; 4]; N]; M];
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    unsafe {
        for member in 0..Head::group() {
            let (a, b, depth) = keys_operands::<T, G>(args, member, first_key, MMA_TILE);
            // Hazard: the stages may still be read for the head before.
            thread::sync_threads();
            let operands = (&a, &b, depth);
            mma::accumulate::<T, C, MnMajor, MnMajor, COLUMNS, M, N>(&mut sums, operands, first);
        }
        let (to, epilogue) = (G::gradient::<T>(args, &of_keys), Scaled(G::factor(args)));
        mma::store::<T, C, Scaled, COLUMNS, M, N>(&to, &epilogue, &sums, first);
    }
}

/// As [`keys`], in scalar arithmetic: tiles of 64 x 64, static shared memory.
///
/// # Safety
/// As for [`keys`].
#[inline(always)]
pub unsafe fn keys_tiled<T: Scalar, G: OfKeys>(args: &BackwardArgs) {
    let tile = keys_tile::<G>(args, TILED_TILE, TILED_TILE);
    let Some((of_keys, first_key, first_column)) = tile else { return };
    let first = (first_key, first_column);
    let mut sums = [[0.0f32; 4]; 4];
    for member in 0..Head::group() {
        // SAFETY: the buffers have the shapes that `args` says.
        let (a, b, depth) = unsafe { keys_operands::<T, G>(args, member, first_key, TILED_TILE) };
        tiled::accumulate::<T, MnMajor, MnMajor>(&mut sums, (&a, &b, depth), first);
    }
    // SAFETY: the buffers have the shapes that `args` says; this block alone has these keys.
    let to = unsafe { G::gradient::<T>(args, &of_keys) };
    tiled::store(&to, &Scaled(G::factor(args)), &sums, first);
}

entries! {
    /// Instances of [`scores`].
    pub static SCORES: BackwardArgs => "sm_80", threads MMA_THREADS, min_blocks 2;
    backward_standard_scores: T in [f16, bf16] = scores::<T, Ampere>;
}
entries! {
    /// Instances of [`queries`], by the columns of a tile.
    pub static QUERIES: BackwardArgs => "sm_80", threads MMA_THREADS, min_blocks 2;
    backward_standard_queries: T in [f16, bf16], x COLUMNS in [64, 96, 128] = queries::<
        T,
        Ampere,
        COLUMNS,
        { tiles(COLUMNS).0 },
        { tiles(COLUMNS).1 },
    >;
}
entries! {
    /// Instances of [`keys`] for [`Dk`], by the columns of a tile.
    pub static KEYS: BackwardArgs => "sm_80", threads MMA_THREADS, min_blocks 2;
    backward_standard_keys: T in [f16, bf16], x COLUMNS in [64, 96, 128] = keys::<
        T,
        Ampere,
        Dk,
        COLUMNS,
        { tiles(COLUMNS).0 },
        { tiles(COLUMNS).1 },
    >;
}
entries! {
    /// Instances of [`keys`] for [`Dv`], by the columns of a tile.
    pub static VALUES: BackwardArgs => "sm_80", threads MMA_THREADS, min_blocks 2;
    backward_standard_values: T in [f16, bf16], x COLUMNS in [64, 96, 128] = keys::<
        T,
        Ampere,
        Dv,
        COLUMNS,
        { tiles(COLUMNS).0 },
        { tiles(COLUMNS).1 },
    >;
}
entries! {
    /// Instances of [`scores_tiled`].
    pub static TILED_SCORES: BackwardArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    backward_standard_scores: T in [f32] = scores_tiled::<T>;
}
entries! {
    /// Instances of [`queries_tiled`].
    pub static TILED_QUERIES: BackwardArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    backward_standard_queries: T in [f32] = queries_tiled::<T>;
}
entries! {
    /// Instances of [`keys_tiled`] for [`Dk`].
    pub static TILED_KEYS: BackwardArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    backward_standard_keys: T in [f32] = keys_tiled::<T, Dk>;
}
entries! {
    /// Instances of [`keys_tiled`] for [`Dv`].
    pub static TILED_VALUES: BackwardArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    backward_standard_values: T in [f32] = keys_tiled::<T, Dv>;
}
