//! What happens to scores and weights between the two products, as compile-time policies.
//!
//! A [`Policy`] says which keys a row sees and which weights dropout keeps. The tensor core
//! rungs are generic over it and ask it in one place; what a policy does not need costs
//! nothing. A new kind of mask (a sliding window, a bias) is a new policy, not a change
//! of a main loop.
//!
//! | policy | keys a row sees | dropout |
//! |---|---|---|
//! | [`Full`] | all | no |
//! | [`Causal`] | up to its own position, aligned to the bottom right | no |
//! | [`General`] | chosen when it runs: causal or not, padding or not | if given |
//!
//! The parts work on fragments as [`simt::mma`] lays them out: lane `4 g + t` holds rows `g`
//! and `g + 8` of 16, and of every 8 columns those at `2 t` and `2 t + 1`. Sets of a lane's
//! columns are bits: bit `2 n + e` is column `8 n + 2 t + e`.

use simt::{compiler::opaque, global::Global, unroll, warp};

use crate::{
    args::{AttentionArgs, DropoutArgs},
    dropout, fragment, softmax,
};

/// Which keys a row sees and which weights are kept.
pub trait Policy: Copy {
    /// Whether it decides at run time, which takes registers.
    const GENERAL: bool;

    /// The policy for head `h` of batch entry `b`.
    ///
    /// # Safety
    /// `args.mask` must be empty or hold `[B, Nk]` bytes.
    unsafe fn new(args: &AttentionArgs, b: u32, h: u32) -> Self;

    /// Whether later rows see more keys than earlier ones.
    fn is_causal(args: &AttentionArgs) -> bool;

    /// The first key that row `i` does not see by its position.
    fn end_of_row(&self, i: u32) -> u32;

    /// Whether every key is seen by every row whose position allows it: no padding.
    fn by_position_only(&self) -> bool;

    /// Of the keys `j + 8 n + e` with `n < N` and `e < 2`, those that are not padding; `j` is
    /// the lane's first key, and all lanes of the warp ask.
    fn visible_keys<const N: usize>(&self, j: u32) -> u32;

    /// The first key that is not padding, Nk if there is none; all lanes of the warp ask.
    fn first_key(&self) -> u32;

    /// What dropout is given; a threshold of 0 drops nothing.
    fn dropout(&self) -> DropoutArgs;

    /// Whether dropout is on.
    fn drops(&self) -> bool;

    /// Of the weights of row `i` at the keys `j + 8 n + e`, those that dropout keeps. `j` is
    /// even.
    fn kept_weights<const N: usize>(&self, i: u32, j: u32) -> u32;
}

/// The sums of a lane's rows `i` and `i + 8` as [`softmax::checked_fused_sum`] says; all lanes of
/// the warp ask.
#[inline(always)]
pub fn checked_sums<P: Policy>(policy: &P, i: u32, m_i: [f32; 2], l_i: [f32; 2]) -> [f32; 2] {
    // What takes a search is searched for only where the answer matters.
    let search = P::GENERAL && warp::any(l_i[0] == 0.0 || l_i[1] == 0.0);
    let first_key = if search { policy.first_key() } else { 0 };
    [0, 1].map(|r: usize| {
        let sees_a_key = || first_key < policy.end_of_row(i + 8 * r as u32);
        softmax::checked_fused_sum(m_i[r], l_i[r], sees_a_key)
    })
}

/// Keys of the tiles that rows from 0 to `end_i` have to visit: what comes after is
/// hidden from all of them.
#[inline(always)]
pub fn end_of_tile<P: Policy>(policy: &P, end_i: u32, seq_q: u32) -> u32 {
    policy.end_of_row(end_i.min(seq_q) - 1)
}

/// Whether a tile whose keys end at `end_j` has anything to hide from rows from `first_i`
/// on. The rows' ends ascend, so that the first row sees least.
#[inline(always)]
pub fn needs_mask<P: Policy>(policy: &P, first_i: u32, end_j: u32) -> bool {
    !policy.by_position_only() || end_j > policy.end_of_row(first_i)
}

/// Sets hidden scores to -inf. `i` is the row of the lane's first score, `j` its key; the
/// fragments are 16 rows each.
#[inline(always)]
pub fn hide<P: Policy, const N: usize, const F: usize>(
    policy: &P,
    s: &mut [[[f32; 4]; N]; F],
    i: u32,
    j: u32,
) {
    let visible = policy.visible_keys::<N>(j);
    unroll!(for FRAGMENT in 0..2 {
        if FRAGMENT < F {
            let i = i + FRAGMENT as u32 * fragment::ROWS;
            let ends = [policy.end_of_row(i), policy.end_of_row(i + 8)];
            let ends = ends.map(|end| end.saturating_sub(j));
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..4 {
                        let column = (8 * TILE + E % 2) as u32;
                        let padding = visible >> (2 * TILE + E % 2) & 1 == 0;
                        if column >= ends[E / 2] || padding {
                            s[FRAGMENT][TILE][E] = f32::NEG_INFINITY;
                        }
                    });
                }
            });
        }
    });
}

/// Of a lane's weights in the rows `i` and `i + 8`, those that dropout keeps; `i` and `j` as
/// for [`hide`].
#[inline(always)]
pub fn kept_weights<P: Policy, const N: usize>(policy: &P, i: u32, j: u32) -> [u32; 2] {
    if !policy.drops() {
        return [u32::MAX; 2];
    }
    [policy.kept_weights::<N>(i, j), policy.kept_weights::<N>(i + 8, j)]
}

/// Sets dropped weights of the `tile`-th 8 keys to 0. The others are not scaled up here but
/// all at once, with the normaliser.
#[inline(always)]
pub fn drop_weights<P: Policy>(policy: &P, p: &mut [f32; 4], kept: [u32; 2], tile: usize) {
    if !policy.drops() {
        return;
    }
    unroll!(for E in 0..4 {
        if kept[E / 2] >> (2 * tile + E % 2) & 1 == 0 {
            p[E] = 0.0;
        }
    });
}

/// Every row sees every key.
#[derive(Clone, Copy, Debug)]
pub struct Full {
    seq_k: u32,
}

/// Row `i` sees keys `j <= i + Nk - Nq`.
#[derive(Clone, Copy, Debug)]
pub struct Causal {
    seq_q: u32,
    seq_k: u32,
}

/// No dropout.
const NO_DROPOUT: DropoutArgs = DropoutArgs { seed: 0, threshold: 0, rescale: 1.0 };

/// What policies without padding and dropout have in common.
macro_rules! by_position {
    () => {
        const GENERAL: bool = false;

        #[inline(always)]
        fn by_position_only(&self) -> bool {
            true
        }
        #[inline(always)]
        fn visible_keys<const N: usize>(&self, _: u32) -> u32 {
            u32::MAX
        }
        #[inline(always)]
        fn first_key(&self) -> u32 {
            0
        }
        #[inline(always)]
        fn dropout(&self) -> DropoutArgs {
            NO_DROPOUT
        }
        #[inline(always)]
        fn drops(&self) -> bool {
            false
        }
        #[inline(always)]
        fn kept_weights<const N: usize>(&self, _: u32, _: u32) -> u32 {
            u32::MAX
        }
    };
}

impl Policy for Full {
    #[inline(always)]
    unsafe fn new(args: &AttentionArgs, _: u32, _: u32) -> Self {
        Self { seq_k: args.seq_k }
    }
    #[inline(always)]
    fn is_causal(_: &AttentionArgs) -> bool {
        false
    }
    #[inline(always)]
    fn end_of_row(&self, _: u32) -> u32 {
        self.seq_k
    }
    by_position!();
}

impl Policy for Causal {
    #[inline(always)]
    unsafe fn new(args: &AttentionArgs, _: u32, _: u32) -> Self {
        Self { seq_q: args.seq_q, seq_k: args.seq_k }
    }
    #[inline(always)]
    fn is_causal(_: &AttentionArgs) -> bool {
        true
    }
    #[inline(always)]
    fn end_of_row(&self, i: u32) -> u32 {
        (i + 1 + self.seq_k).saturating_sub(self.seq_q).min(self.seq_k)
    }
    by_position!();
}

/// Everything that [`AttentionArgs`] can ask for, looked up as the kernel runs.
///
/// It asks through [`opaque`], so that nothing of this takes registers of the main loop: a
/// decision is taken again for each tile, and Philox's round keys are made where they are
/// used.
#[derive(Clone, Copy)]
pub struct General {
    position: Causal,
    causal: u32,
    /// Whether there is a padding mask.
    padded: u32,
    padding: Global<u8>,
    dropout: DropoutArgs,
    b: u32,
    h: u32,
}

impl General {
    /// Where the batch entry's row of the padding mask begins.
    #[inline(always)]
    fn padding_row(&self) -> u64 {
        opaque(self.b) as u64 * self.position.seq_k as u64
    }

    #[inline(always)]
    fn is_no_padding(&self, padding_row: u64, key: u32) -> bool {
        key < self.position.seq_k && self.padding.read(padding_row + key as u64) != 0
    }

    /// Bit `e`: whether key `j + e` of `count` is not padding. Each lane for itself, where
    /// there is a padding mask.
    #[inline(always)]
    #[must_use]
    pub fn not_padding(&self, j: u32, count: u32) -> u32 {
        let row = self.padding_row();
        let mut visible = 0;
        for e in 0..count {
            visible |= u32::from(self.is_no_padding(row, j + e)) << e;
        }
        visible
    }
}

impl Policy for General {
    const GENERAL: bool = true;

    #[inline(always)]
    unsafe fn new(args: &AttentionArgs, b: u32, h: u32) -> Self {
        Self {
            position: Causal { seq_q: args.seq_q, seq_k: args.seq_k },
            causal: args.causal,
            padded: u32::from(!args.mask.is_empty()),
            // SAFETY: the mask is empty or holds `[B, Nk]` bytes.
            padding: unsafe { args.mask.view::<u8>() },
            dropout: args.dropout,
            b,
            h,
        }
    }
    #[inline(always)]
    fn is_causal(args: &AttentionArgs) -> bool {
        args.causal != 0
    }
    #[inline(always)]
    fn end_of_row(&self, i: u32) -> u32 {
        if opaque(self.causal) != 0 { self.position.end_of_row(i) } else { self.position.seq_k }
    }
    #[inline(always)]
    fn by_position_only(&self) -> bool {
        opaque(self.padded) == 0
    }
    #[inline(always)]
    fn visible_keys<const N: usize>(&self, j: u32) -> u32 {
        if self.by_position_only() {
            return u32::MAX;
        }
        let row = self.padding_row();
        // Each lane looks at other keys, a byte each, and tells the others: 32 a vote.
        let (lane, column) = (warp::lane_id(), fragment::row_and_column().1);
        let mut visible = 0;
        unroll!(for WORD in 0..4 {
            if WORD < N.div_ceil(4) {
                let key = j - column + 32 * WORD as u32 + lane;
                let word = warp::ballot(self.is_no_padding(row, key)) >> column;
                unroll!(for TILE in 0..4 {
                    visible |= (word >> (8 * TILE) & 3) << (2 * (4 * WORD + TILE));
                });
            }
        });
        visible
    }
    #[inline(always)]
    fn first_key(&self) -> u32 {
        if self.by_position_only() {
            return 0;
        }
        let (row, lane) = (self.padding_row(), warp::lane_id());
        let mut key = 0;
        while key < self.position.seq_k {
            let found = warp::ballot(self.is_no_padding(row, key + lane));
            if found != 0 {
                return key + found.trailing_zeros();
            }
            key += warp::LANES;
        }
        key
    }
    #[inline(always)]
    fn dropout(&self) -> DropoutArgs {
        self.dropout
    }
    #[inline(always)]
    fn drops(&self) -> bool {
        opaque(self.dropout.threshold) != 0
    }
    #[inline(always)]
    fn kept_weights<const N: usize>(&self, i: u32, j: u32) -> u32 {
        let mut kept = 0;
        // A loop that stays one: ten rounds of Philox for each tile are not to be unrolled.
        for tile in 0..N as u32 {
            let [low, high] = [self.dropout.seed as u32, (self.dropout.seed >> 32) as u32];
            let seed = opaque(low) as u64 | (opaque(high) as u64) << 32;
            let key = j + 8 * tile;
            let draws = dropout::draws(seed, opaque(self.b), opaque(self.h), i, key / 4);
            let (first, second) =
                if key % 4 == 0 { (draws[0], draws[1]) } else { (draws[2], draws[3]) };
            kept |= u32::from(first >= self.dropout.threshold) << (2 * tile);
            kept |= u32::from(second >= self.dropout.threshold) << (2 * tile + 1);
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(seq_q: u32, seq_k: u32, causal: u32) -> AttentionArgs {
        AttentionArgs { seq_q, seq_k, causal, ..AttentionArgs::default() }
    }

    #[test]
    fn a_row_sees_up_to_the_diagonal_at_the_bottom_right() {
        // SAFETY: there is no padding mask.
        let causal = unsafe { Causal::new(&args(4, 6, 1), 0, 0) };
        assert_eq!([0, 1, 3, 9].map(|i| causal.end_of_row(i)), [3, 4, 6, 6]);
        // More rows than keys: the first see nothing.
        // SAFETY: as above.
        let causal = unsafe { Causal::new(&args(5, 2, 1), 0, 0) };
        assert_eq!([0, 2, 3, 4].map(|i| causal.end_of_row(i)), [0, 0, 1, 2]);
        assert_eq!(end_of_tile(&causal, 64, 5), 2);
        assert!(needs_mask(&causal, 0, 1) && !needs_mask(&causal, 4, 2));
    }

    #[test]
    fn policies_agree_where_they_mean_the_same() {
        for (seq_q, seq_k) in [(1, 1), (7, 20), (20, 7)] {
            // SAFETY: there is no padding mask.
            let (full, causal, general_full, general_causal) = unsafe {
                (
                    Full::new(&args(seq_q, seq_k, 0), 0, 0),
                    Causal::new(&args(seq_q, seq_k, 1), 0, 0),
                    General::new(&args(seq_q, seq_k, 0), 0, 0),
                    General::new(&args(seq_q, seq_k, 1), 0, 0),
                )
            };
            for i in 0..40 {
                assert_eq!(full.end_of_row(i), general_full.end_of_row(i));
                assert_eq!(causal.end_of_row(i), general_causal.end_of_row(i));
            }
        }
    }

    #[test]
    fn bits_stand_for_a_lanes_columns() {
        let args = AttentionArgs {
            dropout: DropoutArgs { seed: 5, threshold: dropout::threshold(0.4), rescale: 1.0 },
            ..args(9, 70, 0)
        };
        // SAFETY: there is no padding mask.
        let policy = unsafe { General::new(&args, 3, 2) };
        for t in 0..4 {
            let kept = policy.kept_weights::<8>(6, 16 + 2 * t);
            for n in 0..8 {
                for e in 0..2 {
                    let key = 16 + 8 * n + 2 * t + e;
                    let expected = dropout::keeps(&args.dropout, 3, 2, 6, key);
                    assert_eq!(kept >> (2 * n + e) & 1 == 1, expected, "key {key}");
                }
            }
        }
    }
}
