//! A thread's part of Sᵀ and dPᵀ: S becomes P, and P becomes dS, in the same registers.
//!
//! A thread has two keys, `j` and `j + 8`, and two of every 8 rows, `i + 8 g` and the next:
//! element `[g][e]` belongs to row `i + 8 g + e % 2` and key `j + 8 (e / 2)`.

use simt::{
    math,
    shared::Shared,
    unroll,
    wgmma::{Accumulator, Fragments, Operand, WaitGroup},
};

use crate::parts::policy::Policy;

/// Sᵀ or dPᵀ of a consumer in a thread's registers. It becomes `Weights` as the operand of a
/// product; `i` and `j` are row and key of the thread's first element.
pub trait ScoreTile<Weights>: WaitGroup {
    /// Before any product.
    fn zero() -> Self;

    /// The factor of each score's gradient where there is a cap, rounded to the storage type.
    fn slopes<T: Operand>(&self, policy: &Policy) -> Weights;

    /// Multiplies each gradient by its slope where there is a cap.
    fn apply_slopes<T: Operand>(&mut self, slopes: Weights);

    /// Softcap, ALiBi and bias. Returns the [`slopes`](Self::slopes).
    fn shape<T: Operand>(&mut self, policy: &Policy, i: u32, j: u32) -> Weights;

    /// Hides keys that the rows do not see: their scores become -inf.
    fn hide(&mut self, policy: &Policy, i: u32, j: u32);

    /// P replaces S: exp2 of the scaled scores less the rows' LSE.
    fn weigh(&mut self, scale_log2: f32, minus_lse: Rows);

    /// The weights that dropout keeps: bit `2 g + e % 2` of word `e / 2`.
    fn kept(policy: &Policy, i: u32, j: u32) -> [u32; 2];

    /// Rounded to the storage type, in the order that products take; 0 where dropout keeps nothing.
    fn pack<T: Operand>(&self, kept: [u32; 2]) -> Weights;

    /// As [`pack`](Self::pack) of all, each times its slope where there is a cap.
    fn pack_shaped<T: Operand>(&self, slopes: Weights) -> Weights;

    /// dS replaces dP in step `step` of 16 rows: `P (dP - delta)`, with dP times `rescale` where dropout
    /// kept the weight, and 0 elsewhere. `p` has the step's P, as [`pack_shaped`](Self::pack_shaped) has
    /// it.
    fn differentiate_step<T: Operand>(
        &mut self,
        step: usize,
        p: [u32; 4],
        kept: [u32; 2],
        rescale: f32,
        delta: Rows,
    );

    /// dS replaces P: `P (dP - delta)`, with dP times `rescale` where dropout kept the weight, and 0
    /// elsewhere.
    fn differentiate<T: Operand>(
        &mut self,
        dp: &Self,
        kept: [u32; 2],
        rescale: f32,
        delta: Rows,
        slopes: Weights,
    );
}

/// A value of each of a tile's rows that belong to a thread: two of every 8.
#[derive(Clone, Copy)]
pub struct Rows {
    /// All values of a stage, and where the thread's first row is among them.
    from: Shared<f32>,
    column: u32,
    /// The values of the first groups of 8 rows, which have been read, and how many groups they are.
    early: [[f32; 2]; 8],
    groups: usize,
}

impl Rows {
    /// The rows of a stage's values, each read when it is needed.
    #[inline(always)]
    #[must_use]
    pub fn later(from: Shared<f32>, column: u32) -> Self {
        Self { from, column, early: [[0.0; 2]; 8], groups: 0 }
    }

    /// The same, the first `GROUPS` groups of 8 read now.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn now<const GROUPS: usize>(from: Shared<f32>, column: u32) -> Self {
        let mut rows = Self::later(from, column);
        unroll!(for G in 0..8 {
            if G < GROUPS {
                rows.early[G] = rows.pair(G);
            }
        });
        rows.groups = GROUPS;
        rows
    }

    /// The values of a group's two rows.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn pair(self, group: usize) -> [f32; 2] {
        if group < self.groups {
            self.early[group]
        } else {
            self.from.read_as::<[u32; 2]>(self.column + 8 * group as u32).map(f32::from_bits)
        }
    }
}

/// Whether dropout keeps element `e` of group `group`.
#[inline(always)]
fn keeps(kept: [u32; 2], group: usize, e: usize) -> bool {
    kept[e / 2] >> (2 * group + e % 2) & 1 != 0
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
    fn slopes<T: Operand>(&self, policy: &Policy) -> Fragments<STEPS> {
        let (s, mut slopes) = (self.values(), [[0; 4]; STEPS]);
        if Policy::caps_scores() {
            unroll!(for G in 0..16 {
                if G < GROUPS {
                    unroll!(for R in 0..2 {
                        let slope = [0, 1].map(|e: usize| policy.score_slope::<T>(s[G][2 * R + e]));
                        slopes[G / 2][G % 2 * 2 + R] = T::pack(slope[0], slope[1]);
                    });
                }
            });
        }
        slopes
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn apply_slopes<T: Operand>(&mut self, slopes: Fragments<STEPS>) {
        let s = self.values_mut();
        if Policy::caps_scores() {
            unroll!(for G in 0..16 {
                if G < GROUPS {
                    unroll!(for R in 0..2 {
                        let (low, high) = T::unpack(slopes[G / 2][G % 2 * 2 + R]);
                        s[G][2 * R] *= low;
                        s[G][2 * R + 1] *= high;
                    });
                }
            });
        }
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn shape<T: Operand>(&mut self, policy: &Policy, i: u32, j: u32) -> Fragments<STEPS> {
        if !Policy::shapes_scores() {
            return [[0; 4]; STEPS];
        }
        let slopes = self.slopes::<T>(policy);
        policy.shape_transposed::<T, GROUPS>(self.values_mut(), i, j);
        slopes
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn hide(&mut self, policy: &Policy, i: u32, j: u32) {
        policy.hide_transposed(self.values_mut(), i, j);
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn weigh(&mut self, scale_log2: f32, minus_lse: Rows) {
        let s = self.values_mut();
        unroll!(for G in 0..16 {
            if G < GROUPS {
                let minus_lse = minus_lse.pair(G);
                unroll!(for E in 0..4 {
                    s[G][E] = math::exp2(math::fma(s[G][E], scale_log2, minus_lse[E % 2]));
                });
            }
        });
    }

    #[inline(always)]
    fn kept(policy: &Policy, i: u32, j: u32) -> [u32; 2] {
        let mut kept = [u32::MAX; 2];
        if Policy::drops() {
            kept = [0; 2];
            // Not unrolled: each weight takes ten rounds of Philox.
            for bit in 0..2 * GROUPS as u32 {
                let i = i + bit / 2 * 8 + bit % 2;
                kept[0] |= u32::from(policy.kept(i, j, 1.0) != 0.0) << bit;
                kept[1] |= u32::from(policy.kept(i, j + 8, 1.0) != 0.0) << bit;
            }
        }
        kept
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn pack<T: Operand>(&self, kept: [u32; 2]) -> Fragments<STEPS> {
        const { assert!(GROUPS == 2 * STEPS, "a step is two groups") };
        let s = self.values();
        let mut p = [[0; 4]; STEPS];
        unroll!(for G in 0..16 {
            if G < GROUPS {
                unroll!(for R in 0..2 {
                    let value = [0, 1].map(|e: usize| {
                        let dropped = Policy::drops() && !keeps(kept, G, 2 * R + e);
                        if dropped { 0.0 } else { s[G][2 * R + e] }
                    });
                    p[G / 2][G % 2 * 2 + R] = T::pack(value[0], value[1]);
                });
            }
        });
        p
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn pack_shaped<T: Operand>(&self, slopes: Fragments<STEPS>) -> Fragments<STEPS> {
        if !Policy::caps_scores() {
            return self.pack::<T>([u32::MAX; 2]);
        }
        let s = self.values();
        let mut p = [[0; 4]; STEPS];
        unroll!(for G in 0..16 {
            if G < GROUPS {
                unroll!(for R in 0..2 {
                    let (low, high) = T::unpack(slopes[G / 2][G % 2 * 2 + R]);
                    p[G / 2][G % 2 * 2 + R] = T::pack(s[G][2 * R] * low, s[G][2 * R + 1] * high);
                });
            }
        });
        p
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn differentiate_step<T: Operand>(
        &mut self,
        step: usize,
        p: [u32; 4],
        kept: [u32; 2],
        rescale: f32,
        delta: Rows,
    ) {
        let s = self.values_mut();
        unroll!(for HALF in 0..2 {
            let group = 2 * step + HALF;
            let delta = delta.pair(group);
            unroll!(for R in 0..2 {
                let (low, high) = T::unpack(p[2 * HALF + R]);
                unroll!(for E in 0..2 {
                    let e = 2 * R + E;
                    let mut dp = s[group][e];
                    if Policy::drops() {
                        dp = if keeps(kept, group, e) { dp * rescale } else { 0.0 };
                    }
                    s[group][e] = [low, high][E] * (dp - delta[E]);
                });
            });
        });
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn differentiate<T: Operand>(
        &mut self,
        dp: &Self,
        kept: [u32; 2],
        rescale: f32,
        delta: Rows,
        slopes: Fragments<STEPS>,
    ) {
        let (s, dp) = (self.values_mut(), dp.values());
        unroll!(for G in 0..16 {
            if G < GROUPS {
                let delta = delta.pair(G);
                unroll!(for E in 0..4 {
                    let mut dp = dp[G][E];
                    if Policy::drops() {
                        dp = if keeps(kept, G, E) { dp * rescale } else { 0.0 };
                    }
                    s[G][E] *= dp - delta[E % 2];
                });
            }
        });
        self.apply_slopes::<T>(slopes);
    }
}
