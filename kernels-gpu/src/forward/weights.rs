//! weights: the attention weights that a flash kernel did not keep, computed again.
//!
//! The idea: a row of weights follows from Q and K alone. A group of threads goes over the keys
//! of its row twice: once for the maximum and the sum of exponentials, once for the weights.
//! The log-sum-exp, which the flash kernel left, would spare the first time, but not for large
//! scores: at 1e4 the spacing of f32 is 1e-3, and its sum was rounded otherwise. So the weights
//! of a row sum to 1, whatever the size of the scores. For callers who want to look at the
//! weights; attention never needs them.
//!
//! ```text
//! for each key of this thread:  s = Q[i, :] · K[j, :];  m, l = running maximum and sum
//! m, l of the row, over its threads
//! for each key of this thread:  P[i, j] = exp((s - m) * scale) / l, or 0 if hidden; dropout
//! ```
//!
//! Memory: writes the B*H*Nq*Nk weights once, in the storage type; reads 4 D elements for
//! each. No shared memory.
//!
//! Measured: not measured yet. Limits: slower than the scores of `naive`, and as large.
//!
//! Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

use half::{bf16, f16};
use simt::{math, scalar::Scalar, thread, warp};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{head::Head, policy::Policy, score::dot, softmax},
};

/// Rows of a block, and threads of a row.
pub const TILE: u32 = 16;

/// `P = softmax(Q Kᵀ * scale)`, 0 where a key is hidden; then dropout.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `k: [B, H, Nk, D]`, `weights: [B, H, Nq, Nk]`.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads: `y` is the row, its threads take every sixteenth key; `x` of the
/// grid counts groups of 16 rows, head after head.
///
/// # Safety
/// The buffers of `args` must have these shapes, and the launch the threads stated here.
#[inline(always)]
pub unsafe fn weights<T: Scalar, const D: usize>(args: &AttentionArgs) {
    let (head, rows) = Head::of_block(args, args.shape.seq_q.div_ceil(TILE));
    if head.ends_before(rows * TILE) {
        return;
    }
    let (tx, row) = (thread::thread_idx_x(), rows * TILE + thread::thread_idx_y());
    // Threads past the last row take part in the warp's collectives, and write nothing.
    let (i, inside) = (row.min(head.seq_q - 1), row < head.seq_q);
    // SAFETY: the buffers have the shapes stated above.
    let (weights, policy) =
        unsafe { (args.scratch.weights.view_mut::<T>(), Policy::new(args, head)) };
    // SAFETY: row and key exist.
    let dot = |j: u32| unsafe { dot::<T, D, { softmax::SPAN }>(args, head, (i, j)) };
    let score = |j: u32| policy.shape_score::<T>(dot(j), args.scores.scale, i, j);
    // The difference first: of scores of like size it is exact.
    let weight = |s: f32, m: f32| math::exp2((s - m) * policy.scale_log2());

    // Maximum and sum, unscaled: the scale is positive.
    let (mut m_i, mut l_i) = (f32::NEG_INFINITY, 0.0);
    let first = policy.begin_of_row(i);
    for j in (first + tx..policy.end_of_row(i)).step_by(TILE as usize) {
        if policy.sees(i, j) {
            let s = score(j);
            let m_new = math::max(m_i, s);
            let m_used = softmax::safe_max(m_new);
            l_i = math::fma(l_i, weight(m_i, m_used), weight(s, m_used));
            m_i = m_new;
        }
    }
    let m_row = warp::reduce_max::<TILE>(m_i);
    let m_used = softmax::safe_max(m_row);
    let l_i = warp::reduce_add::<TILE>(l_i * weight(m_i, m_used));
    let l_i = softmax::checked_sum(l_i, || policy.sees_any(i));
    let (_, l_i, factor) = policy.with_sink(m_row * policy.scale_log2(), l_i);
    let normaliser = softmax::normaliser(l_i) * factor;

    if !inside {
        return;
    }
    for j in (tx..head.seq_k).step_by(TILE as usize) {
        let p = if policy.sees(i, j) { weight(score(j), m_used) * normaliser } else { 0.0 };
        weights.write(head.weight(i, j), T::from_f32(policy.kept(i, j, p)));
    }
}

entries! {
    /// Instances of [`weights()`].
    pub static ENTRIES: AttentionArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    weights: T in [f32, f16, bf16], d D in [32, 64, 96, 128, 160, 192, 224, 256] = weights::<T, D>;
}
