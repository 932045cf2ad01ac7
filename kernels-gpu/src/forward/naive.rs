//! naive: attention as the textbook has it, in three kernels.
//!
//! The idea: write the formula down. `S = Q Kᵀ * scale`, `P = softmax(S)`, `O = P V`, each
//! a kernel of its own, with the N x N matrix in global memory between them.
//!
//! ```text
//! scores:  S[i, j] = dot(Q[i, :], K[j, :]) * scale      one thread per (i, j)
//! softmax: P[i, :] = exp(S[i, :] - max) / sum           one warp per row
//! output:  O[i, d] = sum_j P[i, j] * V[j, d]            one thread per (i, d)
//! ```
//!
//! Memory: the matrix holds B*H*Nq*Nk elements of the storage type, written twice, read
//! three times by the softmax and by D threads for the output. Every score reads
//! 2*D elements for 2*D FLOP: one FLOP per element, where a GPU needs hundreds to be
//! busy. No shared memory.
//!
//! Measured: 39.3 ms (H100; f16, batch 4, 12 heads, N 2048, D 64). Limits: memory grows with
//! N². It can return the attention weights, since they stand in memory.
//!
//! Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1;
//! Dao et al., "FlashAttention", 2022, algorithm 0.

use half::{bf16, f16};
use simt::{math, scalar::Scalar, thread, warp};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{columns::Columns, head::Head, policy::Policy, score::dot, softmax},
};

/// Keys and rows of a block of `scores`: 16 neighbouring threads read the same query
/// row, and neighbouring rows share their keys through the cache.
pub const SCORES_TILE: u32 = 16;
/// Threads of a block of `softmax`: four warps, hence four rows.
pub const SOFTMAX_THREADS: u32 = 128;
/// Rows of a block of `softmax`.
pub const SOFTMAX_ROWS: u32 = SOFTMAX_THREADS / warp::LANES;
/// Threads of a block of `output`.
pub const OUTPUT_THREADS: u32 = 128;

/// `S = Q Kᵀ * scale`, with hidden entries at -inf, in log2 units, of which the storage type
/// holds one for [`softmax::STORED_UNIT`].
///
/// # Layout
/// `q: [B, H, Nq, D]`, `k: [B, H, Nk, D]`, `weights: [B, H, Nq, Nk]`.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads; `x` counts tiles of keys, head after head, `y` tiles of rows.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn scores<T: Scalar, const D: usize>(args: &AttentionArgs) {
    let (head, kv_tile) = Head::of_block(args, args.shape.seq_k.div_ceil(SCORES_TILE));
    let j = kv_tile * SCORES_TILE + thread::thread_idx_x();
    let i = thread::block_idx_y() * SCORES_TILE + thread::thread_idx_y();
    if i >= head.seq_q || j >= head.seq_k {
        return;
    }
    // SAFETY: the buffers have the shapes that `args` says.
    let (weights, policy) =
        unsafe { (args.scratch.weights.view_mut::<T>(), Policy::new(args, head)) };
    // SAFETY: the buffers have the shapes that `args` says.
    let s = unsafe { dot::<T, D, D>(args, head, (i, j)) };
    let s = if policy.sees(i, j) {
        policy.shape_score::<T>(s, args.scores.scale, i, j) * policy.scale_log2()
    } else {
        f32::NEG_INFINITY
    };
    weights.write(head.weight(i, j), T::from_f32(s / softmax::STORED_UNIT));
}

/// `P = softmax(S)` in place, and the log-sum-exp of each row; then dropout.
///
/// # Layout
/// `weights: [B, H, Nq, Nk]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// A warp per row, four rows per block; `x` counts groups of rows, head after head.
///
/// # Safety
/// As for [`scores`], which must have run.
#[inline(always)]
pub unsafe fn softmax_rows<T: Scalar>(args: &AttentionArgs) {
    let (head, rows) = Head::of_block(args, args.shape.seq_q.div_ceil(SOFTMAX_ROWS));
    let i = rows * SOFTMAX_ROWS + warp::warp_id();
    let lane = warp::lane_id();
    if i >= head.seq_q {
        return;
    }
    // SAFETY: the buffers have the shapes that `args` says.
    let (weights, lse, policy) = unsafe {
        (
            args.scratch.weights.view_mut::<T>(),
            args.tensors.lse.view_mut::<f32>(),
            Policy::new(args, head),
        )
    };
    let row = head.weight(i, 0);
    let score = |j: u32| weights.read(row + j as u64).to_f32() * softmax::STORED_UNIT;

    let mut m_i = f32::NEG_INFINITY;
    for j in (lane..head.seq_k).step_by(warp::LANES as usize) {
        m_i = math::max(m_i, score(j));
    }
    let m_i = warp::reduce_max::<32>(m_i);
    let m_used = softmax::safe_max(m_i);

    let mut l_i = 0.0;
    for j in (lane..head.seq_k).step_by(warp::LANES as usize) {
        l_i += math::exp2(score(j) - m_used);
    }
    let l_i = softmax::checked_sum(warp::reduce_add::<32>(l_i), || policy.sees_any(i));
    let (m_lse, l_i, factor) = policy.with_sink(m_i, l_i);
    let normaliser = softmax::normaliser(l_i) * factor;

    for j in (lane..head.seq_k).step_by(warp::LANES as usize) {
        let p = math::exp2(score(j) - m_used) * normaliser;
        weights.write(row + j as u64, T::from_f32(policy.kept(i, j, p)));
    }
    if lane == 0 {
        lse.write(head.row(i), softmax::log_sum_exp(m_lse, l_i));
    }
}

/// `O = P V`.
///
/// # Layout
/// `weights: [B, H, Nq, Nk]`, `v: [B, H, Nk, D]`, `o: [B, H, Nq, D]`.
///
/// # Thread mapping
/// A thread per element of O with D columns, of which fewer may be there; `x` counts blocks of them,
/// head after head.
///
/// # Safety
/// As for [`scores`]; [`softmax_rows`] must have run.
#[inline(always)]
pub unsafe fn output<T: Scalar, const D: usize>(args: &AttentionArgs) {
    let blocks = (args.shape.seq_q * D as u32).div_ceil(OUTPUT_THREADS);
    let (head, block) = Head::of_block(args, blocks);
    let element = block * OUTPUT_THREADS + thread::thread_idx_x();
    let (i, d) = (element / D as u32, element % D as u32);
    if i >= head.seq_q || !Columns::of_values().has(d) {
        return;
    }
    // SAFETY: the buffers have the shapes that `args` says.
    let (weights, v, o) = unsafe {
        (
            args.scratch.weights.view::<T>(),
            args.tensors.v.buffer.view::<T>(),
            args.tensors.o.buffer.view_mut::<T>(),
        )
    };
    let row = head.weight(i, 0);
    let column = head.key(&args.tensors.v, 0) + d as u64;
    let mut acc = 0.0;
    for j in 0..head.seq_k as u64 {
        let p = weights.read(row + j).to_f32();
        acc = math::fma(p, v.read(column + j * args.tensors.v.stride_n).to_f32(), acc);
    }
    o.write(head.query(&args.tensors.o, i) + d as u64, T::from_f32(acc));
}

entries! {
    /// Instances of [`scores`].
    pub static SCORES: AttentionArgs => "sm_75", threads SCORES_TILE * SCORES_TILE, min_blocks 1;
    naive_scores: T in [f32, f16, bf16], d D in [32, 64, 96, 128] = scores::<T, D>;
}
entries! {
    /// Instances of [`softmax_rows`].
    pub static SOFTMAX: AttentionArgs => "sm_75", threads SOFTMAX_THREADS, min_blocks 1;
    naive_softmax: T in [f32, f16, bf16] = softmax_rows::<T>;
}
entries! {
    /// Instances of [`output`].
    pub static OUTPUT: AttentionArgs => "sm_75", threads OUTPUT_THREADS, min_blocks 1;
    naive_output: T in [f32, f16, bf16], d D in [32, 64, 96, 128] = output::<T, D>;
}
