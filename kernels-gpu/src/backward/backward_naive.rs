//! backward_naive: the gradients by the formulas, with P and dS in memory.
//!
//! The idea: write the formulas down. Weights come back from the scores and the LSE, `P =
//! exp(S - LSE)`; P and dS are materialised, and each gradient is a product with one of them.
//!
//! ```text
//! prepare: delta = rowsum(dO ∘ O)                                       eight threads per row
//! scores:  P[i, j]  = exp(dot(Q[i, :], K[j, :]) * scale - LSE[i])       one thread per (i, j)
//!          dP       = dot(dO[i, :], V[j, :])
//!          dS[i, j] = P[i, j] * (dP - delta[i])
//! queries: dQ[i, d] = sum_j dS[i, j] * K[j, d] * scale                  one thread per (i, d)
//! keys:    dK[j, d] = sum_i dS[i, j] * Q[i, d] * scale                  one thread per (j, d)
//!          dV[j, d] = sum_i P[i, j] * dO[i, d]
//! ```
//!
//! Memory: two matrices of B*H*Nq*Nk elements of the storage type, each written once and read by D
//! threads. No shared memory.
//!
//! Measured: not measured yet. Limits: memory grows with N²; as slow as `naive`.
//!
//! Source: Dao et al., "FlashAttention", 2022, appendix B.2.

use half::{bf16, f16};
use simt::{math, scalar::Scalar, thread};

use crate::{
    args::{BackwardArgs, Shape, Tensor},
    entries,
    parts::{
        gradient::{self, Row},
        head::Head,
        policy::Policy,
        schedule::divide,
        softmax::SPAN,
    },
};

/// Keys and rows of a block of `scores`.
pub const TILE: u32 = 16;
/// Threads of a block of `queries` and of `keys`.
pub const THREADS: u32 = 128;

/// P after dropout, and dS.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `d_o: [B, H, Nq, Dv]`, `k: [B, Hkv, Nk, D]`, `v: [B, Hkv, Nk, Dv]`,
/// `weights, d_scores: [B, H, Nq, Nk]`.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads; `x` counts tiles of keys, and with each of them tiles of rows, `y` and `z`
/// heads.
///
/// # Safety
/// The buffers of `args` must have these shapes, and [`prepare`](super::prepare) must have run.
#[inline(always)]
pub unsafe fn scores<T: Scalar>(args: &BackwardArgs) {
    let forward = &args.forward;
    let Some(head) = Head::of_block_yz(forward) else { return };
    let (i, j) = place(&forward.shape);
    if i >= head.seq_q || j >= head.seq_k {
        return;
    }
    // SAFETY: the buffers have the shapes stated above; row and key exist.
    let (weights, d_scores, policy, row, products) = unsafe {
        (
            forward.scratch.weights.view_mut::<T>(),
            args.steps.d_scores.view_mut::<T>(),
            Policy::new(forward, head),
            Row::read(args, head, i),
            products::<T>(args, &head, (i, j)),
        )
    };
    let scale = forward.scores.scale;
    let (p, ds) = gradient::of_score::<T>(&policy, scale, row, (i, j), products);
    weights.write(head.weight(i, j), T::from_f32(p));
    d_scores.write(head.weight(i, j), T::from_f32(ds));
}

/// Row and key of this thread of a 16 x 16 block, where the grid's `x` counts tiles of keys, and with each of
/// them tiles of rows. They may lie past the last row and key, where tiles overhang.
#[inline(always)]
pub(super) fn place(shape: &Shape) -> (u32, u32) {
    let (row_tile, key_tile) = divide(thread::block_idx_x(), shape.seq_k.div_ceil(TILE));
    (row_tile * TILE + thread::thread_idx_y(), key_tile * TILE + thread::thread_idx_x())
}

/// `Q[i] · K[j]` and `dO[i] · V[j]` of a head.
///
/// # Safety
/// The buffers of `args` must have the shapes that it says; row and key exist.
#[inline(always)]
pub(super) unsafe fn products<T: Scalar>(
    args: &BackwardArgs,
    head: &Head,
    (i, j): (u32, u32),
) -> (f32, f32) {
    let (shape, tensors, d_o) = (&args.forward.shape, &args.forward.tensors, &args.gradients.d_o);
    let (q, k, v) = (&tensors.q, &tensors.k, &tensors.v);
    // SAFETY: the rows have that many columns.
    unsafe {
        (
            dot::<T>((q, head.query(q, i)), (k, head.key(k, j)), shape.head_dim),
            dot::<T>((d_o, head.query(d_o, i)), (v, head.key(v, j)), shape.head_dim_v),
        )
    }
}

/// The dot product of two rows, each from its first element on, [`SPAN`] products at a time.
///
/// # Safety
/// The tensors must hold `columns` elements there.
#[inline(always)]
unsafe fn dot<T: Scalar>(a: (&Tensor, u64), b: (&Tensor, u64), columns: u32) -> f32 {
    // SAFETY: the tensors hold `columns` elements there, as stated above.
    let views = unsafe { (a.0.buffer.view::<T>(), b.0.buffer.view::<T>()) };
    let mut sum = 0.0;
    for first in (0..columns).step_by(SPAN) {
        let mut part = 0.0;
        for d in first as u64..(first + SPAN as u32).min(columns) as u64 {
            part = math::fma(views.0.read(a.1 + d).to_f32(), views.1.read(b.1 + d).to_f32(), part);
        }
        sum += part;
    }
    sum
}

/// `dQ = dS K * scale`.
///
/// # Layout
/// `d_scores: [B, H, Nq, Nk]`, `k: [B, Hkv, Nk, D]`, `dq: [B, H, Nq, D]`.
///
/// # Thread mapping
/// One thread per element of dQ; `x` counts them over a head, `y` and `z` heads.
///
/// # Safety
/// As for [`scores`], which must have run.
#[inline(always)]
pub unsafe fn queries<T: Scalar>(args: &BackwardArgs) {
    let forward = &args.forward;
    let Some(head) = Head::of_block_yz(forward) else { return };
    let element = thread::index_1d();
    let columns = forward.shape.head_dim;
    let (i, d) = divide(element, columns);
    if i >= head.seq_q {
        return;
    }
    // SAFETY: the buffers have the shapes stated above.
    let (d_scores, k, dq) = unsafe {
        (
            args.steps.d_scores.view::<T>(),
            forward.tensors.k.buffer.view::<T>(),
            args.gradients.dq.buffer.view_mut::<T>(),
        )
    };
    let mut sum = 0.0;
    for j in 0..head.seq_k {
        let ds = d_scores.read(head.weight(i, j)).to_f32();
        let k = k.read(head.key(&forward.tensors.k, j) + d as u64).to_f32();
        sum = math::fma(ds, k, sum);
    }
    let index = head.query(&args.gradients.dq, i) + d as u64;
    dq.write(index, T::from_f32(sum * forward.scores.scale));
}

/// `dK = dSᵀ Q * scale` and `dV = Pᵀ dO`, over the heads that share K and V.
///
/// # Layout
/// `weights, d_scores: [B, H, Nq, Nk]`, `q: [B, H, Nq, D]`, `d_o: [B, H, Nq, Dv]`,
/// `dk: [B, Hkv, Nk, D]`, `dv: [B, Hkv, Nk, Dv]`.
///
/// # Thread mapping
/// One thread per key and column of K or V; `x` counts them over a head of K, `y` and `z` heads of K.
///
/// # Safety
/// As for [`scores`], which must have run.
#[inline(always)]
pub unsafe fn keys<T: Scalar>(args: &BackwardArgs) {
    let forward = &args.forward;
    let Some(first) = Head::of_kv_block_yz(forward) else { return };
    let number = Head::number_of_block();
    let element = thread::index_1d();
    let (columns, columns_v) = (forward.shape.head_dim, forward.shape.head_dim_v);
    let (j, d) = divide(element, columns.max(columns_v));
    if j >= first.seq_k {
        return;
    }
    // SAFETY: the buffers have the shapes stated above.
    let (weights, d_scores, q, d_o, dk, dv) = unsafe {
        (
            forward.scratch.weights.view::<T>(),
            args.steps.d_scores.view::<T>(),
            forward.tensors.q.buffer.view::<T>(),
            args.gradients.d_o.buffer.view::<T>(),
            args.gradients.dk.buffer.view_mut::<T>(),
            args.gradients.dv.buffer.view_mut::<T>(),
        )
    };
    let (mut sum_k, mut sum_v) = (0.0, 0.0);
    for member in 0..Head::group() {
        let head = Head::of_group(forward, number, member);
        for i in 0..head.seq_q {
            let ds = d_scores.read(head.weight(i, j)).to_f32();
            let p = weights.read(head.weight(i, j)).to_f32();
            if d < columns {
                let q = q.read(head.query(&forward.tensors.q, i) + d as u64).to_f32();
                sum_k = math::fma(ds, q, sum_k);
            }
            if d < columns_v {
                let d_o = d_o.read(head.query(&args.gradients.d_o, i) + d as u64).to_f32();
                sum_v = math::fma(p, d_o, sum_v);
            }
        }
    }
    let index = |tensor: &Tensor| first.key(tensor, j) + d as u64;
    if d < columns {
        dk.write(index(&args.gradients.dk), T::from_f32(sum_k * forward.scores.scale));
    }
    if d < columns_v {
        dv.write(index(&args.gradients.dv), T::from_f32(sum_v));
    }
}

entries! {
    /// Instances of [`scores`].
    pub static SCORES: BackwardArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    backward_naive_scores: T in [f32, f16, bf16] = scores::<T>;
}
entries! {
    /// Instances of [`queries`].
    pub static QUERIES: BackwardArgs => "sm_75", threads THREADS, min_blocks 1;
    backward_naive_queries: T in [f32, f16, bf16] = queries::<T>;
}
entries! {
    /// Instances of [`keys`].
    pub static KEYS: BackwardArgs => "sm_75", threads THREADS, min_blocks 1;
    backward_naive_keys: T in [f32, f16, bf16] = keys::<T>;
}
