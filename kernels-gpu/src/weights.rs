//! weights: the attention weights that a flash kernel did not keep, computed again.
//!
//! The idea: the log-sum-exp of a row is all that its weights have in common, so that each
//! follows from one dot product: `P[i, j] = exp(Q[i, :] · K[j, :] * scale - LSE[i])`. For
//! whoever wants to look at the weights; attention itself never needs them.
//!
//! Memory: writes the B*H*Nq*Nk weights once, in the storage type; reads 2 D elements for
//! each. No shared memory.
//!
//! Measured: not measured yet. Limits: as slow as the scores of `naive`, and as large.
//!
//! Source: Dao et al., "FlashAttention", 2022, section 3.1 (recomputation), which does so in
//! the backward pass.

use half::{bf16, f16};
use simt::{math, scalar::Scalar, thread};

use crate::{
    args::AttentionArgs,
    dropout, entries,
    mask::Mask,
    naive::{batch_and_head, dot, weight_index},
    softmax,
};

/// Keys and rows of a block.
pub const TILE: u32 = 16;

/// `P = exp(Q Kᵀ * scale - LSE)`, 0 where a key is hidden; then dropout.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `k: [B, H, Nk, D]`, `lse: [B, H, Nq]`, `weights: [B, H, Nq, Nk]`.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads, a thread a weight; `x` counts keys, `y` rows, `z` heads.
///
/// # Safety
/// The buffers of `args` must have these shapes, and hold what an attention kernel made of
/// the same arguments.
#[inline(always)]
pub unsafe fn weights<T: Scalar, const D: usize>(args: &AttentionArgs) {
    let (b, h) = batch_and_head(args);
    let j = thread::block_idx_x() * TILE + thread::thread_idx_x();
    let i = thread::block_idx_y() * TILE + thread::thread_idx_y();
    if i >= args.seq_q || j >= args.seq_k {
        return;
    }
    // SAFETY: the caller vouches for the buffers.
    let (lse, weights, mask) =
        unsafe { (args.lse.view::<f32>(), args.weights.view_mut::<T>(), Mask::new(args, b)) };
    // SAFETY: the caller vouches for the buffers.
    let s = unsafe { dot::<T, D, { softmax::SPAN }>(args, (b, h), (i, j)) };
    let lse = lse.read(args.row(b, h, i));
    // A row that sees no key has LSE = -inf, which is not touched.
    let p = if mask.sees(i, j) { softmax::exp(math::fma(s, args.scale, -lse)) } else { 0.0 };
    let p = dropout::apply(&args.dropout, (b, h, i, j), p);
    weights.write(weight_index(args, b, h, i, j), T::from_f32(p));
}

entries! {
    /// Instances of [`weights()`].
    pub static ENTRIES: AttentionArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    weights_f32_d32 = weights::<f32, 32>;
    weights_f32_d64 = weights::<f32, 64>;
    weights_f32_d96 = weights::<f32, 96>;
    weights_f32_d128 = weights::<f32, 128>;
    weights_f32_d160 = weights::<f32, 160>;
    weights_f32_d192 = weights::<f32, 192>;
    weights_f32_d224 = weights::<f32, 224>;
    weights_f32_d256 = weights::<f32, 256>;
    weights_f16_d32 = weights::<f16, 32>;
    weights_f16_d64 = weights::<f16, 64>;
    weights_f16_d96 = weights::<f16, 96>;
    weights_f16_d128 = weights::<f16, 128>;
    weights_f16_d160 = weights::<f16, 160>;
    weights_f16_d192 = weights::<f16, 192>;
    weights_f16_d224 = weights::<f16, 224>;
    weights_f16_d256 = weights::<f16, 256>;
    weights_bf16_d32 = weights::<bf16, 32>;
    weights_bf16_d64 = weights::<bf16, 64>;
    weights_bf16_d96 = weights::<bf16, 96>;
    weights_bf16_d128 = weights::<bf16, 128>;
    weights_bf16_d160 = weights::<bf16, 160>;
    weights_bf16_d192 = weights::<bf16, 192>;
    weights_bf16_d224 = weights::<bf16, 224>;
    weights_bf16_d256 = weights::<bf16, 256>;
}
