//! One score at a time, for the scalar kernels that materialise the weights.

use simt::{math, scalar::Scalar};

use crate::{
    args::AttentionArgs,
    parts::{columns::Columns, head::Head},
};

/// `Q[i, :] · K[j, :]` of a head.
///
/// SPAN products are summed at a time: D, which is the plain sum, or [`softmax::SPAN`](crate::parts::softmax::SPAN).
///
/// # Safety
/// Q and K must have the shapes that `args` says, and these rows.
#[inline(always)]
pub unsafe fn dot<T: Scalar, const D: usize, const SPAN: usize>(
    args: &AttentionArgs,
    head: Head,
    (i, j): (u32, u32),
) -> f32 {
    const { assert!(D % SPAN == 0) };
    // SAFETY: the buffers have the shapes that `args` says.
    let (q, k) = unsafe { (args.tensors.q.buffer.view::<T>(), args.tensors.k.buffer.view::<T>()) };
    let (q_row, k_row) = (head.query(&args.tensors.q, i), head.key(&args.tensors.k, j));
    let columns = Columns::of_keys();
    let mut s = 0.0;
    if columns == Columns::ALL {
        for first in (0..D as u64).step_by(SPAN) {
            let mut part = 0.0;
            for d in first..first + SPAN as u64 {
                part = math::fma(q.read(q_row + d).to_f32(), k.read(k_row + d).to_f32(), part);
            }
            s += part;
        }
        return s;
    }
    let end = columns.of(D as u32) as u64;
    for first in (0..end).step_by(SPAN) {
        let mut part = 0.0;
        for d in first..end.min(first + SPAN as u64) {
            part = math::fma(q.read(q_row + d).to_f32(), k.read(k_row + d).to_f32(), part);
        }
        s += part;
    }
    s
}
