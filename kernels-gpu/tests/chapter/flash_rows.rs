//! flash_rows: one warp per row, online softmax, nothing shared.

use half::{bf16, f16};
use simt::{math, scalar::Scalar, warp};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{head::Head, policy::Policy, softmax},
};

/// Threads of a block: four warps, hence four rows.
pub const THREADS: u32 = 128;
/// Query rows of a block.
pub const BR: u32 = THREADS / warp::LANES;

/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// One warp per row; lane `t` has the columns `t, t + 32, …` of Q and O.
///
/// # Safety
/// The buffers of `args` must have these shapes, and nobody else may write to O and LSE.
#[inline(always)]
pub unsafe fn flash_rows<T: Scalar, const D: usize, const COLUMNS: usize>(args: &AttentionArgs) {
    const { assert!(D == COLUMNS * warp::LANES as usize) };
    let (head, q_tile) = Head::of_block(args, args.shape.seq_q.div_ceil(BR));
    let i = q_tile * BR + warp::warp_id();
    if i >= head.seq_q {
        return; // The whole warp leaves: collectives need all of its lanes.
    }
    let lane = warp::lane_id() as u64;
    // SAFETY: the buffers have these shapes, and nobody else writes O and LSE.
    let (q, k, v, o, lse, policy) = unsafe {
        (
            args.tensors.q.buffer.view::<T>(),
            args.tensors.k.buffer.view::<T>(),
            args.tensors.v.buffer.view::<T>(),
            args.tensors.o.buffer.view_mut::<T>(),
            args.tensors.lse.view_mut::<f32>(),
            Policy::new(args, head),
        )
    };
    let q_row = head.query(&args.tensors.q, i);
    let q_reg: [f32; COLUMNS] =
        core::array::from_fn(|c| q.read(q_row + lane + 32 * c as u64).to_f32());

    let (mut m_i, mut l_i, mut acc_o) = (f32::NEG_INFINITY, 0.0, [0.0f32; COLUMNS]);
    for j in 0..policy.end_of_row(i) {
        // S = Q Kᵀ: every lane has a share of the dot product.
        let k_row = head.key(&args.tensors.k, j);
        let mut s = 0.0;
        for c in 0..COLUMNS {
            s = math::fma(q_reg[c], k.read(k_row + lane + 32 * c as u64).to_f32(), s);
        }
        let s = warp::reduce_add::<32>(s) * args.scores.scale_log2;
        let s = if policy.sees(i, j) { s } else { f32::NEG_INFINITY };

        // Online softmax, for a tile of one key.
        let m_new = math::max(m_i, s);
        let m_used = softmax::safe_max(m_new);
        let (alpha, p) = (math::exp2(m_i - m_used), math::exp2(s - m_used));
        (m_i, l_i) = (m_new, math::fma(l_i, alpha, p));
        let p = policy.kept(i, j, p);

        // O += P V.
        let v_row = head.key(&args.tensors.v, j);
        for c in 0..COLUMNS {
            let value = v.read(v_row + lane + 32 * c as u64).to_f32();
            acc_o[c] = math::fma(p, value, acc_o[c] * alpha);
        }
    }

    let l_i = softmax::checked_sum(l_i, || policy.sees_any(i));
    let o_row = head.query(&args.tensors.o, i);
    for c in 0..COLUMNS {
        let value = T::from_f32(acc_o[c] * softmax::normaliser(l_i));
        o.write(o_row + lane + 32 * c as u64, value);
    }
    if lane == 0 {
        lse.write(head.row(i), softmax::log_sum_exp(m_i, l_i));
    }
}

entries! {
    /// Instances of [`flash_rows`].
    pub static ENTRIES: AttentionArgs => "sm_75", threads THREADS, min_blocks 1;
    flash_rows: T in [f32, f16, bf16], d D in [64] = flash_rows::<T, D, { D / 32 }>;
}
