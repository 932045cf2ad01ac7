//! From a score to its gradient, one at a time, for the scalar rungs of the backward pass.

use simt::{math, scalar::Scalar};

use crate::{
    args::BackwardArgs,
    parts::{head::Head, policy::Policy},
};

/// The numbers that [`prepare`](crate::backward::prepare) left for a row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// `rowsum(dO ∘ O)`.
    pub delta: f32,
    /// Minus the LSE in log2 units; -inf makes every weight 0.
    pub minus_lse_log2: f32,
}

impl Row {
    /// Row `i` of a head, one of its padded rows.
    ///
    /// # Safety
    /// `delta` and `minus_lse_log2` of `args.steps` must be `[B, H, Nq']`, and written before the launch.
    #[inline(always)]
    #[must_use]
    pub unsafe fn read(args: &BackwardArgs, head: Head, i: u32) -> Self {
        // SAFETY: the buffers have these shapes.
        let (delta, minus_lse_log2) =
            unsafe { (args.steps.delta.view::<f32>(), args.steps.minus_lse_log2.view::<f32>()) };
        let index = head.padded_row(i);
        Self { delta: delta.read(index), minus_lse_log2: minus_lse_log2.read(index) }
    }
}

/// P after dropout and dS of row `i` and key `j`, of `s = Q[i] · K[j]` and `dp = dO[i] · V[j]`.
#[inline(always)]
#[must_use]
pub fn of_score<T: Scalar>(
    policy: &Policy,
    scale: f32,
    row: Row,
    place: (u32, u32),
    (s, dp): (f32, f32),
) -> (f32, f32) {
    let (p, d_shaped) = of_shaped::<T>(policy, scale, row, place, (s, dp));
    (p, d_shaped * policy.score_slope::<T>(s))
}

/// As [`of_score`], of the score after the cap: the gradient of a bias, which joins it there.
#[inline(always)]
#[must_use]
pub fn of_shaped<T: Scalar>(
    policy: &Policy,
    scale: f32,
    row: Row,
    (i, j): (u32, u32),
    (s, dp): (f32, f32),
) -> (f32, f32) {
    if !policy.sees(i, j) {
        // Not by way of its score: keys past the last have a score of 0, and `exp2(0 - lse)` of a
        // row whose scores are all far below 0 is infinite.
        return (0.0, 0.0);
    }
    let shaped = policy.shape_score::<T>(s, scale, i, j);
    let p = math::exp2(math::fma(shaped, policy.scale_log2(), row.minus_lse_log2));
    let kept = policy.kept(i, j, 1.0);
    (p * kept, p * (dp * kept - row.delta))
}
