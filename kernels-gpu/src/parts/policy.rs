//! Which keys a row sees, which tiles that makes it visit, and which weights dropout keeps:
//! written once, asked by every rung.
//!
//! The features of a launch are [specialisation constants](crate::constants): on a GPU a question
//! about a feature is answered when the entry is compiled, and what is off is gone. A new kind of
//! mask is a constant and an answer here, not a change of a main loop.
//!
//! Scalar rungs ask for one weight at a time ([`Policy::sees`]). The tensor core rungs ask for a
//! lane's part of a tile, laid out as [`simt::mma`] has it: lane `4 g + t` holds rows `g`
//! and `g + 8` of 16, and of every 8 columns `2 t` and `2 t + 1`. Sets of a lane's
//! columns are bits: bit `2 n + e` is column `8 n + 2 t + e`.

use simt::{compiler::opaque, global::Global, unroll, warp};

use crate::{
    args::{AttentionArgs, Keys, Scores},
    constants::Constants,
    parts::{dropout, fragment, head::Head, softmax},
};

mod scores;

/// The keys that the rows of one head see, the shaping of their scores, and the weights that dropout
/// keeps.
#[derive(Clone, Copy)]
pub struct Policy {
    /// The head.
    pub head: Head,
    keys: Keys,
    scores: Scores,
}

/// Positions.
impl Policy {
    /// The policy for a head.
    ///
    /// # Safety
    /// Of what the launch has: `args.keys.padding` must hold `[B, Nk]` bytes; `args.scores.alibi`,
    /// `bias` and `sinks` must have the shapes that they state.
    #[inline(always)]
    #[must_use]
    pub const unsafe fn new(args: &AttentionArgs, head: Head) -> Self {
        Self { head, keys: args.keys, scores: args.scores }
    }

    /// Whether rows see keys up to their own position, or some further: later rows see later keys.
    #[inline(always)]
    #[must_use]
    pub fn is_causal() -> bool {
        Constants::causal() != 0
    }

    /// Whether a window ends to the left: later rows do not see the first keys.
    #[inline(always)]
    #[must_use]
    pub fn is_left_bounded() -> bool {
        Constants::left() != 0
    }

    /// Rows and keys. Opaque: what follows from them would be kept from one tile to the next.
    #[inline(always)]
    fn lengths(&self) -> (u32, u32) {
        (opaque(self.head.seq_q), opaque(self.head.seq_k))
    }

    /// The first key that row `i` sees by its position, and may be beyond its last one. Positions
    /// are aligned to the bottom right: the last row is at the last key, whatever the two lengths.
    #[inline(always)]
    #[must_use]
    pub fn begin_of_row(&self, i: u32) -> u32 {
        if !Self::is_left_bounded() {
            return 0;
        }
        let (seq_q, seq_k) = self.lengths();
        (i + seq_k).saturating_sub(seq_q.saturating_add(self.keys.left))
    }

    /// The first key that row `i` does not see by its position.
    #[inline(always)]
    #[must_use]
    pub fn end_of_row(&self, i: u32) -> u32 {
        let (seq_q, seq_k) = self.lengths();
        if !Self::is_causal() {
            return seq_k;
        }
        let mut end = i + 1 + seq_k;
        if Constants::causal() == 2 {
            end = end.saturating_add(self.keys.right);
        }
        end.saturating_sub(seq_q).min(seq_k)
    }

    /// Tiles of `tile` keys that the rows from `first_i` to before `end_i` see any key of by their
    /// positions: the others need not be visited.
    #[inline(always)]
    #[must_use]
    pub fn key_tiles(&self, first_i: u32, end_i: u32, tile: u32) -> core::ops::Range<u32> {
        let end = self.end_of_tile(end_i).div_ceil(tile);
        if Self::is_left_bounded() {
            (self.begin_of_row(first_i) / tile).min(end)..end
        } else {
            0..end
        }
    }

    /// Tiles of `tile` rows of which any sees a key from `first_j` to before `end_j` by its position:
    /// the others need not be visited.
    #[inline(always)]
    #[must_use]
    pub fn query_tiles(&self, first_j: u32, end_j: u32, tile: u32) -> core::ops::Range<u32> {
        let Head { seq_q, seq_k, .. } = self.head;
        // The rows that see a key are neighbours: `begin_of_row` and `end_of_row` ascend.
        let mut first = 0;
        if Self::is_causal() {
            let right = if Constants::causal() == 2 { self.keys.right } else { 0 };
            first = (first_j + seq_q).saturating_sub(seq_k.saturating_add(right));
        }
        let mut end = seq_q;
        if Self::is_left_bounded() {
            let behind = (end_j.min(seq_k) + seq_q).saturating_add(self.keys.left);
            end = end.min(behind.saturating_sub(seq_k));
        }
        let end = end.div_ceil(tile);
        (first / tile).min(end)..end
    }

    /// Of the tiles of `tile` keys that rows before `end_i` are visited by, the last: where a tile of rows
    /// that ends at `end_i` is among the [`query_tiles`](Self::query_tiles) of any tile of keys, those that
    /// have it are neighbours up to this one.
    #[inline(always)]
    #[must_use]
    pub fn last_key_tile(&self, end_i: u32, tile: u32) -> u32 {
        let (seq_q, seq_k) = self.lengths();
        let last = seq_k.div_ceil(tile) - 1;
        if !Self::is_causal() {
            return last;
        }
        let right = if Constants::causal() == 2 { self.keys.right } else { 0 };
        let seen = seq_k.saturating_add(right).saturating_add(end_i - 1).saturating_sub(seq_q);
        last.min(seen / tile)
    }

    /// The first key that no row before `end_i` sees by its position: tiles of keys from there
    /// on need not be visited.
    #[inline(always)]
    #[must_use]
    pub fn end_of_tile(&self, end_i: u32) -> u32 {
        self.end_of_row(end_i.min(self.head.seq_q) - 1)
    }

    /// The end of the keys that the rows from `first_i` on all see: tiles below are whole, but for
    /// the tiles before [`whole_from`](Self::whole_from). 0 where padding or a bias may hide any.
    #[inline(always)]
    #[must_use]
    pub fn whole_keys(&self, first_i: u32) -> u32 {
        // The rows' ends ascend, so that the first row sees least.
        if Self::is_padded() || Self::is_biased() { 0 } else { self.end_of_row(first_i) }
    }

    /// The first key that all rows up to `last_i` see, if they see it at all.
    #[inline(always)]
    #[must_use]
    pub fn whole_from(&self, last_i: u32) -> u32 {
        // The rows' beginnings ascend too.
        self.begin_of_row(last_i)
    }
}

/// Padding.
impl Policy {
    /// Whether there is a padding mask.
    #[inline(always)]
    #[must_use]
    pub fn is_padded() -> bool {
        Constants::padding() != 0
    }

    #[inline(always)]
    fn is_no_padding(&self, padding_row: u64, key: u32) -> bool {
        // SAFETY: `new` asks that the mask, if there is one, is `[B, Nk]`.
        let padding: Global<u8> = unsafe { self.keys.padding.view() };
        key < self.head.seq_k && padding.read(padding_row + key as u64) != 0
    }

    /// Whether tiles below the first one visited may have keys that a row does not see.
    #[inline(always)]
    #[must_use]
    pub fn hides() -> bool {
        Self::is_causal() || Self::is_left_bounded() || Self::is_padded() || Self::is_biased()
    }

    /// Whether row `i` sees key `j`.
    #[inline(always)]
    #[must_use]
    pub fn sees(&self, i: u32, j: u32) -> bool {
        self.begin_of_row(i) <= j
            && j < self.end_of_row(i)
            && (!Self::is_padded() || self.is_no_padding(self.head.padding_row(), j))
    }

    /// Whether row `i` surely sees a key: not where a bias may hide all.
    #[inline(always)]
    #[must_use]
    pub fn sees_any(&self, i: u32) -> bool {
        !Self::is_biased() && (self.begin_of_row(i)..self.end_of_row(i)).any(|j| self.sees(i, j))
    }

    /// Bit `e`: whether key `j + e` of `count` is not padding. Each lane for itself.
    #[inline(always)]
    #[must_use]
    pub fn not_padding(&self, j: u32, count: u32) -> u32 {
        if !Self::is_padded() {
            return u32::MAX;
        }
        let row = self.head.padding_row();
        let mut visible = 0;
        for e in 0..count {
            visible |= u32::from(self.is_no_padding(row, j + e)) << e;
        }
        visible
    }

    /// The keys among `j + 8 n + e`, with `n < N` and `e < 2`, that are not padding; `j` is
    /// the lane's first key, and all lanes of the warp ask.
    #[inline(always)]
    #[must_use]
    fn visible_keys<const N: usize>(&self, j: u32) -> u32 {
        if !Self::is_padded() {
            return u32::MAX;
        }
        let row = self.head.padding_row();
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

    /// The first key that is not padding, Nk if there is none; all lanes of the warp ask, where
    /// there is a padding mask.
    #[inline(always)]
    #[must_use]
    fn first_key(&self) -> u32 {
        let (row, lane) = (self.head.padding_row(), warp::lane_id());
        let mut key = 0;
        while key < self.head.seq_k {
            let found = warp::ballot(self.is_no_padding(row, key + lane));
            if found != 0 {
                return key + found.trailing_zeros();
            }
            key += warp::LANES;
        }
        key
    }

    /// Sets hidden scores to -inf. `i` is the row of the lane's first score, `j` its key; the
    /// fragments are 16 rows each.
    #[inline(always)]
    pub fn hide<const N: usize, const F: usize>(&self, s: &mut [[[f32; 4]; N]; F], i: u32, j: u32) {
        let visible = self.visible_keys::<N>(j);
        unroll!(for FRAGMENT in 0..2 {
            if FRAGMENT < F {
                let i = i + FRAGMENT as u32 * fragment::ROWS;
                let ends = [self.end_of_row(i), self.end_of_row(i + 8)];
                let ends = ends.map(|end| end.saturating_sub(j));
                let begins = [self.begin_of_row(i), self.begin_of_row(i + 8)];
                let begins = begins.map(|begin| begin.saturating_sub(j));
                Self::hide_outside(&mut s[FRAGMENT], begins, ends, visible);
            }
        });
    }

    /// Sets the scores of a fragment that are before `begins` or from `ends` on in a lane's two rows,
    /// counted from its first key, to -inf; and the scores of keys that are not among `visible`.
    #[inline(always)]
    pub fn hide_outside<const N: usize>(
        s: &mut [[f32; 4]; N],
        begins: [u32; 2],
        ends: [u32; 2],
        visible: u32,
    ) {
        unroll!(for TILE in 0..16 {
            if TILE < N {
                unroll!(for E in 0..4 {
                    let column = (8 * TILE + E % 2) as u32;
                    let padding = visible >> (2 * TILE + E % 2) & 1 == 0;
                    let before = Self::is_left_bounded() && column < begins[E / 2];
                    if before || column >= ends[E / 2] || padding {
                        s[TILE][E] = f32::NEG_INFINITY;
                    }
                });
            }
        });
    }

    /// As [`hide`](Self::hide), of scores that are transposed: element `[n][e]` is that of row
    /// `i + 8 n + e % 2` and key `j + 8 (e / 2)`.
    #[inline(always)]
    pub fn hide_transposed<const N: usize>(&self, s: &mut [[f32; 4]; N], i: u32, j: u32) {
        unroll!(for R in 0..2 {
            // Opaque: what follows from a key would be kept from one tile to the next.
            let j = opaque(j + 8 * R as u32);
            let hidden = j >= self.head.seq_k
                || Self::is_padded() && !self.is_no_padding(self.head.padding_row(), j);
            // The rows that see the key are neighbours.
            let rows = self.query_tiles(j, j + 1, 1);
            let begin = if hidden { u32::MAX } else { rows.start.saturating_sub(i) };
            let end = rows.end.saturating_sub(i);
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..2 {
                        let row = (8 * TILE + E) as u32;
                        let after = Self::is_left_bounded() && row >= end;
                        if row < begin || after {
                            s[TILE][2 * R + E] = f32::NEG_INFINITY;
                        }
                    });
                }
            });
        });
    }

    /// The sums of a lane's rows `i` and `i + 8` as [`softmax::checked_fused_sum`] says; all lanes
    /// of the warp ask.
    #[inline(always)]
    #[must_use]
    pub fn checked_sums(&self, i: u32, m_i: [f32; 2], l_i: [f32; 2]) -> [f32; 2] {
        if Self::is_padded() && Self::is_left_bounded() {
            let check = |r: usize| {
                let i = i + 8 * r as u32;
                softmax::checked_fused_sum(m_i[r], l_i[r], || self.sees_any(i))
            };
            return [check(0), check(1)];
        }
        // The search runs only where its answer matters.
        let search = Self::is_padded() && warp::any(l_i[0] == 0.0 || l_i[1] == 0.0);
        let first_key = if search { self.first_key() } else { 0 };
        [0, 1].map(|r: usize| {
            let i = i + 8 * r as u32;
            // Not a closure that only a lost row asks: a comparison costs less than a branch.
            // A bias may have hidden all keys.
            let sees_a_key = first_key.max(self.begin_of_row(i)) < self.end_of_row(i);
            softmax::checked_fused_sum(m_i[r], l_i[r], || sees_a_key && !Self::is_biased())
        })
    }
}

/// Dropout.
impl Policy {
    /// Whether weights are dropped.
    #[inline(always)]
    #[must_use]
    pub fn drops() -> bool {
        Constants::dropout() != 0
    }

    /// The weight `p` of row `i` and key `j` after dropout: 0, or scaled up.
    #[inline(always)]
    #[must_use]
    pub fn kept(&self, i: u32, j: u32, p: f32) -> f32 {
        if !Self::drops() {
            return p;
        }
        dropout::apply(&self.scores.dropout, (self.head.b, self.head.h, i, j), p)
    }

    /// The factor of kept weights. Where the weights have not taken it, the normaliser does.
    #[inline(always)]
    #[must_use]
    pub fn rescale(&self) -> f32 {
        if Self::drops() { self.scores.dropout.rescale } else { 1.0 }
    }

    /// The draws for the weights of row `i` at the four keys from `4 * j4` on.
    #[inline(always)]
    fn draws(&self, i: u32, j4: u32) -> [u32; 4] {
        // Opaque: the round keys of Philox are made where they are used, and not kept.
        let [low, high] =
            [self.scores.dropout.seed as u32, (self.scores.dropout.seed >> 32) as u32];
        let seed = opaque(low) as u64 | (opaque(high) as u64) << 32;
        dropout::draws(seed, opaque(self.head.b), opaque(self.head.h), i, j4)
    }

    /// As [`Policy::kept`] for the four keys from `j` on, a multiple of four.
    #[inline(always)]
    #[must_use]
    pub fn kept_four(&self, i: u32, j: u32, p: [f32; 4]) -> [f32; 4] {
        if !Self::drops() {
            return p;
        }
        let draws = self.draws(i, j / 4);
        let kept = |e: usize| draws[e] >= self.scores.dropout.threshold;
        [0, 1, 2, 3].map(|e: usize| if kept(e) { p[e] * self.scores.dropout.rescale } else { 0.0 })
    }

    /// The weights of a lane in the rows `i` and `i + 8` that dropout keeps; `i` and `j` as
    /// for [`hide`](Self::hide).
    #[inline(always)]
    #[must_use]
    pub fn kept_weights<const N: usize>(&self, i: u32, j: u32) -> [u32; 2] {
        if !Self::drops() {
            return [u32::MAX; 2];
        }
        [self.kept_in_row::<N>(i, j), self.kept_in_row::<N>(i + 8, j)]
    }

    /// The weights of row `i` at the keys `j + 8 n + e` that dropout keeps. `j` is
    /// even.
    #[inline(always)]
    fn kept_in_row<const N: usize>(&self, i: u32, j: u32) -> u32 {
        let mut kept = 0;
        // Not unrolled: each tile takes ten rounds of Philox.
        for tile in 0..N as u32 {
            let key = j + 8 * tile;
            let draws = self.draws(i, key / 4);
            let (first, second) =
                if key % 4 == 0 { (draws[0], draws[1]) } else { (draws[2], draws[3]) };
            kept |= u32::from(first >= self.scores.dropout.threshold) << (2 * tile);
            kept |= u32::from(second >= self.scores.dropout.threshold) << (2 * tile + 1);
        }
        kept
    }

    /// Sets dropped weights of the `tile`-th 8 keys to 0. The others are not scaled up here but
    /// all at once, with the normaliser.
    #[inline(always)]
    pub fn drop_weights(p: &mut [f32; 4], kept: [u32; 2], tile: usize) {
        if !Self::drops() {
            return;
        }
        unroll!(for E in 0..4 {
            if kept[E / 2] >> (2 * tile + E % 2) & 1 == 0 {
                p[E] = 0.0;
            }
        });
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use simt::emulator::{self, Launch, Options};

    use super::*;
    use crate::args::{DropoutArgs, Scores, Shape};

    /// Asks the policy of a problem, as one thread of a launch.
    fn ask(constants: Constants, args: AttentionArgs, question: impl Fn(Policy) + Sync) {
        let options = Options { constants: constants.values(), ..Options::default() };
        let launch = Launch { grid: 1.into(), block: 1.into(), cluster: 1, shared_bytes: 0 };
        let kernel = || {
            // SAFETY: there is no padding mask.
            question(unsafe { Policy::new(&args, Head::new(&args, 3, 2)) });
        };
        emulator::launch_with(launch, &options, &kernel).unwrap_or_else(|fault| panic!("{fault}"));
    }

    fn args(seq_q: u32, seq_k: u32) -> AttentionArgs {
        let shape = Shape { seq_q, seq_k, ..Shape::default() };
        AttentionArgs { shape, ..AttentionArgs::default() }
    }

    const CAUSAL: Constants = Constants { causal: 1, ..Constants::NONE };

    #[test]
    fn a_row_sees_up_to_the_diagonal_at_the_bottom_right() {
        ask(CAUSAL, args(4, 6), |policy| {
            assert_eq!([0, 1, 3, 9].map(|i| policy.end_of_row(i)), [3, 4, 6, 6]);
            assert!(policy.sees(1, 3) && !policy.sees(1, 4));
        });
        // More rows than keys: the first see nothing.
        ask(CAUSAL, args(5, 2), |policy| {
            assert_eq!([0, 2, 3, 4].map(|i| policy.end_of_row(i)), [0, 0, 1, 2]);
            assert_eq!(policy.end_of_tile(64), 2);
            assert_eq!([0, 4].map(|i| policy.whole_keys(i)), [0, 2]);
            assert_eq!([2, 3].map(|i| policy.sees_any(i)), [false, true]);
        });
    }

    #[test]
    fn without_causal_every_row_sees_every_key() {
        ask(Constants::default(), args(5, 2), |policy| {
            assert_eq!([0, 9].map(|i| policy.end_of_row(i)), [2, 2]);
            assert_eq!(policy.whole_keys(0), 2);
        });
    }

    /// Every answer about positions, against the definition of a window.
    #[test]
    fn a_window_is_what_its_definition_says() {
        const TILE: u32 = 3;
        const KEYS: u32 = 4;
        let bounds = [0, 1, 2, 5, 40, u32::MAX - 1, u32::MAX];
        for (left, right) in bounds.into_iter().flat_map(|l| bounds.map(|r| (l, r))) {
            for (seq_q, seq_k) in [(1, 1), (7, 7), (9, 4), (4, 11), (1, 10)] {
                let constants = Constants { causal: 2, left: 1, ..Constants::NONE };
                let keys = Keys { left, right, ..Keys::default() };
                ask(constants, AttentionArgs { keys, ..args(seq_q, seq_k) }, |policy| {
                    let sees = |i: u32, j: u32| {
                        let ahead = i64::from(i) + i64::from(seq_k) - i64::from(seq_q);
                        let from = ahead - i64::from(left);
                        (from..=ahead + i64::from(right)).contains(&i64::from(j))
                    };
                    for i in 0..seq_q {
                        for j in 0..seq_k {
                            assert_eq!(policy.sees(i, j), sees(i, j), "{left} {right} {i} {j}");
                        }
                        assert_eq!(policy.sees_any(i), (0..seq_k).any(|j| sees(i, j)));
                    }
                    for first in 0..seq_q {
                        let rows = first..(first + 4).min(seq_q);
                        let tiles = policy.key_tiles(first, first + 4, TILE);
                        let (from, end) = (policy.whole_from(first + 3), policy.whole_keys(first));
                        for j in 0..seq_k {
                            let seen = rows.clone().filter(|&i| sees(i, j)).count();
                            assert!(seen == 0 || tiles.contains(&(j / TILE)), "a tile is missed");
                            let whole = (from..end).contains(&j);
                            assert!(!whole || seen == rows.len(), "{j} is not whole for {rows:?}");
                        }
                    }
                    for first in 0..seq_k {
                        let end = (first + 4).min(seq_k);
                        let tiles = policy.query_tiles(first, first + 4, TILE);
                        for i in 0..seq_q {
                            let seen = (first..end).any(|j| sees(i, j));
                            assert!(!seen || tiles.contains(&(i / TILE)), "a tile is missed");
                        }
                        for tile in tiles {
                            let rows = tile * TILE..(tile + 1) * TILE;
                            let seen = rows.clone().any(|i| (first..end).any(|j| sees(i, j)));
                            let last = tile == seq_q.div_ceil(TILE) - 1;
                            assert!(seen || last, "{rows:?} need not be visited by {first}");
                        }
                    }
                    for tile in 0..seq_q.div_ceil(TILE) {
                        let visits = |keys: &u32| {
                            let first = keys * KEYS;
                            policy.query_tiles(first, first + KEYS, TILE).contains(&tile)
                        };
                        let visitors: Vec<_> = (0..seq_k.div_ceil(KEYS)).filter(visits).collect();
                        let Some(&first) = visitors.first() else { continue };
                        let last = policy.last_key_tile((tile + 1) * TILE, KEYS);
                        assert!(visitors.into_iter().eq(first..=last), "{left} {right} {tile}");
                    }
                });
            }
        }
    }

    #[test]
    fn bits_stand_for_a_lanes_columns() {
        let dropout = DropoutArgs { seed: 5, threshold: dropout::threshold(0.4), rescale: 1.0 };
        let constants = Constants { dropout: 1, ..Constants::default() };
        let scores = Scores { dropout, ..Scores::default() };
        ask(constants, AttentionArgs { scores, ..args(9, 70) }, |policy| {
            for t in 0..4 {
                let kept = policy.kept_weights::<8>(6, 16 + 2 * t);
                for (row, kept) in [6, 14].into_iter().zip(kept) {
                    for n in 0..8 {
                        for e in 0..2 {
                            let key = 16 + 8 * n + 2 * t + e;
                            let expected = dropout::keeps(&dropout, 3, 2, row, key);
                            assert_eq!(kept >> (2 * n + e) & 1 == 1, expected, "key {key}");
                        }
                    }
                }
            }
        });
    }
}
