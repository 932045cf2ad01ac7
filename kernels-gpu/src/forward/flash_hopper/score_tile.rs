//! The work of a thread on its scores of a tile: S becomes P in place.

use simt::{
    math, unroll, warp,
    wgmma::{Accumulator, Fragments, Operand, WaitGroup},
};

use crate::parts::policy::Policy;

/// Rows of S that a thread has.
pub const ROWS: usize = 2;

/// S of a consumer in a thread's registers: groups of 8 keys, two rows of each. `Weights` is P as the
/// operand of the second product; `i` and `j` are row and key of the thread's first score.
pub trait ScoreTile<Weights>: WaitGroup {
    /// Scores before any product.
    fn zero() -> Self;

    /// Softcap, ALiBi and bias.
    fn shape<T: Operand>(&mut self, policy: &Policy, i: u32, j: u32);

    /// Hides keys that the rows do not see: their scores become -inf.
    fn hide(&mut self, policy: &Policy, i: u32, j: u32);

    /// The maxima of the rows, in log2 units, over their four threads.
    fn maxima(&self, scale_log2: f32) -> [f32; ROWS];

    /// P replaces S: exp2 of the scaled scores less `m`. Returns the sums of this thread's.
    fn weigh(&mut self, scale_log2: f32, m: [f32; ROWS]) -> [f32; ROWS];

    /// Dropout; then P rounded to the storage type, in the order that the product takes. The sums
    /// keep what is dropped here.
    fn drop_and_pack<T: Operand>(&mut self, policy: &Policy, i: u32, j: u32) -> Weights;
}

impl<const GROUPS: usize, const STEPS: usize> ScoreTile<Fragments<STEPS>> for Accumulator<GROUPS>
where
    Self: WaitGroup,
{
    #[inline(always)]
    fn zero() -> Self {
        Self::zero()
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn shape<T: Operand>(&mut self, policy: &Policy, i: u32, j: u32) {
        policy.shape_scores::<T, GROUPS, 1>(core::array::from_mut(self.values_mut()), i, j);
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn hide(&mut self, policy: &Policy, i: u32, j: u32) {
        policy.hide(core::array::from_mut(self.values_mut()), i, j);
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn maxima(&self, scale_log2: f32) -> [f32; ROWS] {
        let s = self.values();
        // Four chains, here and in the sums, so that they do not wait for each other.
        let mut max = s[0];
        unroll!(for G in 0..16 {
            if G + 1 < GROUPS {
                unroll!(for E in 0..4 {
                    max[E] = math::max(max[E], s[G + 1][E]);
                });
            }
        });
        [
            warp::reduce_max::<4>(math::max(max[0], max[1])) * scale_log2,
            warp::reduce_max::<4>(math::max(max[2], max[3])) * scale_log2,
        ]
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn weigh(&mut self, scale_log2: f32, m: [f32; ROWS]) -> [f32; ROWS] {
        let s = self.values_mut();
        let mut sum = [0.0f32; 4];
        unroll!(for G in 0..16 {
            if G < GROUPS {
                unroll!(for E in 0..4 {
                    s[G][E] = math::exp2(math::fma(s[G][E], scale_log2, -m[E / 2]));
                    sum[E] += s[G][E];
                });
            }
        });
        [sum[0] + sum[1], sum[2] + sum[3]]
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn drop_and_pack<T: Operand>(&mut self, policy: &Policy, i: u32, j: u32) -> Fragments<STEPS> {
        const { assert!(GROUPS == 2 * STEPS, "a step is two groups") };
        let kept = policy.kept_weights::<GROUPS>(i, j);
        let s = self.values_mut();
        unroll!(for G in 0..16 {
            if G < GROUPS {
                Policy::drop_weights(&mut s[G], kept, G);
            }
        });
        let s = self.values();
        let mut p = [[0; 4]; STEPS];
        unroll!(for K in 0..8 {
            if K < STEPS {
                p[K] = [
                    T::pack(s[2 * K][0], s[2 * K][1]),
                    T::pack(s[2 * K][2], s[2 * K][3]),
                    T::pack(s[2 * K + 1][0], s[2 * K + 1][1]),
                    T::pack(s[2 * K + 1][2], s[2 * K + 1][3]),
                ];
            }
        });
        p
    }
}
