//! The queries of all heads that share keys, as rows of one tile: row `r` is query `r / group` of head
//! `r % group` of the group. Positions ascend with the rows, as in a tile of one head.

use core::ops::Range;

use simt::{compiler::opaque, scalar::Scalar, thread, unroll};

use crate::{
    args::DecodeArgs,
    decode::cache,
    parts::{fragment, head::Head, policy::Policy, schedule::divide},
};

/// A tile of packed rows, of one head of K and V of one sequence.
#[derive(Clone, Copy)]
pub struct RowTile<'a> {
    args: &'a DecodeArgs,
    /// The sequence.
    pub b: u32,
    /// The head of K and V.
    pub h_kv: u32,
    /// The first row.
    pub first_row: u32,
    /// Keys of the sequence.
    pub length: u32,
}

/// A row: the keys that it sees, and its query.
#[derive(Clone, Copy)]
pub struct PackedRow {
    /// The policy of its head.
    pub policy: Policy,
    /// Query row of its head.
    pub i: u32,
}

impl<'a> RowTile<'a> {
    /// The tile of 16 rows from `first_row` on.
    #[inline(always)]
    #[must_use]
    pub fn new(args: &'a DecodeArgs, b: u32, h_kv: u32, first_row: u32) -> Self {
        // SAFETY: the launch has the lengths that it states, and `b` is less than B.
        let length = unsafe { cache::length(&args.cache, b, args.forward.shape.seq_k) };
        Self { args, b, h_kv, first_row, length }
    }

    /// The same rows, where the sequence has as many keys as the launch allows.
    #[inline(always)]
    #[must_use]
    pub fn longest(&self) -> Self {
        Self { length: self.args.forward.shape.seq_k, ..*self }
    }

    /// Rows of a group.
    #[inline(always)]
    #[must_use]
    pub fn rows(args: &DecodeArgs) -> u32 {
        args.forward.shape.seq_q * Head::group()
    }

    /// The tile of this block and its part of the keys, where the grid's `x` counts row tiles, then
    /// heads of K and V, then parts, then sequences.
    #[inline(always)]
    #[must_use]
    pub fn of_block(args: &'a DecodeArgs) -> (Self, u32) {
        let tiles = Self::rows(args).div_ceil(fragment::ROWS);
        let (rest, tile) = divide(thread::block_idx_x(), tiles);
        let (rest, h_kv) = divide(rest, args.forward.shape.heads / Head::group());
        let (b, part) = divide(rest, args.parts.splits);
        (Self::new(args, b, h_kv, tile * fragment::ROWS), part)
    }

    /// Whether the group has row `r` of the tile.
    #[inline(always)]
    #[must_use]
    pub fn has(&self, r: u32) -> bool {
        self.first_row + r < Self::rows(self.args)
    }

    /// Row `r` of the tile, or the last row of the group.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, r: u32) -> PackedRow {
        let row = (self.first_row + r).min(Self::rows(self.args) - 1);
        let (i, member) = (row / Head::group(), row % Head::group());
        let h = self.h_kv * Head::group() + member;
        let mut head = Head::new(&self.args.forward, self.b, h);
        head.seq_k = self.length;
        // SAFETY: slopes and sinks have the shapes that `args.scores` states; there is no padding
        // mask and no bias.
        PackedRow { policy: unsafe { Policy::new(&self.args.forward, head) }, i }
    }

    /// Tiles of `tile` keys that any row sees a key of by its position.
    #[inline(always)]
    #[must_use]
    pub fn key_tiles(&self, tile: u32) -> Range<u32> {
        let (first, last) = (self.row(0), self.row(fragment::ROWS - 1));
        first.policy.key_tiles(first.i, last.i + 1, tile)
    }

    /// Whether no row sees any of the `keys` keys from `first_key` on.
    #[inline(always)]
    #[must_use]
    pub fn sees_nothing(&self, first_key: u32, keys: u32) -> bool {
        let end = if Policy::is_causal() {
            let last = self.row(fragment::ROWS - 1);
            last.policy.end_of_row(last.i)
        } else {
            self.length
        };
        let first = self.row(0);
        first_key >= end
            || Policy::is_left_bounded() && first_key + keys <= first.policy.begin_of_row(first.i)
    }

    /// Shapes the scores of a warp's tile of keys, and sets hidden ones to -inf.
    #[inline(always)]
    pub fn shape_and_hide<T: Scalar, const N: usize>(&self, s: &mut [[f32; 4]; N], first_key: u32) {
        let (row, column) = fragment::row_and_column();
        let j = first_key + column;
        if Policy::shapes_scores() {
            unroll!(for R in 0..2 {
                let PackedRow { policy, i } = self.row(row + 8 * R as u32);
                policy.shape_row::<T, N>(s, R, i, j);
            });
        }
        // Opaque: each tile computes the ends of the rows, and no register keeps them.
        let tile = Self { first_row: opaque(self.first_row), ..*self };
        let (first, last) = (tile.row(0), tile.row(fragment::ROWS - 1));
        let (from, end) = (last.policy.whole_from(last.i), first.policy.whole_keys(first.i));
        if first_key + 8 * N as u32 > end || Policy::is_left_bounded() && first_key < from {
            let rows = [tile.row(row), tile.row(row + 8)];
            let begins = rows.map(|row| row.policy.begin_of_row(row.i).saturating_sub(j));
            let ends = rows.map(|row| row.policy.end_of_row(row.i).saturating_sub(j));
            Policy::hide_outside(s, begins, ends, u32::MAX);
        }
    }
}

/// The tiles of part `part` of `splits`: parts differ by one tile at most, and parts without tiles come
/// last.
#[inline(always)]
#[must_use]
pub fn part_of(tiles: &Range<u32>, part: u32, splits: u32) -> Range<u32> {
    let (each, longer) = divide(tiles.end - tiles.start, splits);
    let start = tiles.start + part * each + part.min(longer);
    start..start + each + u32::from(part < longer)
}

/// How many of `splits` parts have a tile.
#[inline(always)]
#[must_use]
pub fn parts_with_keys(tiles: &Range<u32>, splits: u32) -> u32 {
    (tiles.end - tiles.start).min(splits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_and_the_empty_ones_are_last() {
        for tiles in [0..0, 3..4, 0..16, 7..24, 1..98] {
            for splits in [1, 2, 3, 5, 17, 97, 200] {
                let parts: Vec<_> = (0..splits).map(|part| part_of(&tiles, part, splits)).collect();
                assert_eq!(
                    parts.iter().cloned().flatten().collect::<Vec<_>>(),
                    tiles.clone().collect::<Vec<_>>()
                );
                let with_keys = parts.iter().filter(|part| !part.is_empty()).count() as u32;
                assert_eq!(with_keys, parts_with_keys(&tiles, splits));
                assert!(parts[with_keys as usize..].iter().all(|part| part.is_empty()));
                let lengths = || parts.iter().map(|part| part.len());
                assert!(lengths().max() <= lengths().min().map(|least| least + 1));
            }
        }
    }
}
