//! Which query tile of which head a block works on: longest first, heads that share the
//! L2 cache together.
//!
//! In a causal launch the last query tile of a head visits all its keys and the first
//! one next to none. Blocks start in the order of their index; if the long ones come last,
//! most of the GPU waits for them. So tiles come in descending order. Taking all heads
//! at once would then stream every head's keys and values through the cache at the
//! same time: heads are taken in sections, whose keys and values fit
//! ([`longest_first`], one block per tile) or that have a tile for every block
//! ([`in_sections`], blocks that take tile after tile).

use simt::compiler::opaque;

use crate::{
    args::AttentionArgs,
    parts::{head::Head, policy::Policy, queue::QUEUE_WORDS},
};

/// The share of the L2 cache (50 MB on an H100) that a section of heads may occupy, in KiB.
const SECTION_KIB: u32 = 32 << 10;

/// A block's share of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Head, counted over the batch.
    pub head: u32,
    /// Query tile of the head.
    pub q_tile: u32,
}

/// A tile of query rows of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryTile {
    /// Batch entry.
    pub b: u32,
    /// Head.
    pub h: u32,
    /// The first row.
    pub first_row: u32,
}

impl QueryTile {
    /// The tile of `rows` rows that a piece of work is. Work that is not there, past the last
    /// place, is any tile.
    #[inline(always)]
    #[must_use]
    pub fn of(args: &AttentionArgs, work: Work, rows: u32) -> Self {
        let (b, h) = divide(work.head, args.shape.heads);
        Self { b, h, first_row: work.q_tile.wrapping_mul(rows) }
    }

    /// Its head.
    #[inline(always)]
    #[must_use]
    pub fn head(&self, args: &AttentionArgs) -> Head {
        Head::new(args, self.b, self.h)
    }

    /// Whether it has no rows: a packed sequence is shorter than the longest, for which tiles are
    /// counted.
    #[inline(always)]
    #[must_use]
    pub fn is_empty(&self, args: &AttentionArgs) -> bool {
        Head::is_packed() && self.head(args).ends_before(self.first_row)
    }
}

/// Query tiles of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Heads of all batch entries.
    pub heads: u32,
    /// Query tiles of a head.
    pub num_q_tiles: u32,
}

impl Extent {
    /// The tiles of `rows` rows.
    #[inline(always)]
    #[must_use]
    pub fn new(args: &AttentionArgs, rows: u32) -> Self {
        Self {
            heads: args.shape.batch * args.shape.heads,
            num_q_tiles: args.shape.seq_q.div_ceil(rows),
        }
    }

    /// The same, of which the compiler knows nothing: computed where it is asked for.
    #[inline(always)]
    #[must_use]
    pub fn anew(args: &AttentionArgs, rows: u32) -> Self {
        let heads = opaque(args.shape.batch) * opaque(args.shape.heads);
        Self { heads, num_q_tiles: opaque(args.shape.seq_q).div_ceil(rows) }
    }

    /// Tasks: every tile of every head.
    #[inline(always)]
    #[must_use]
    pub const fn tasks(&self) -> u32 {
        self.heads * self.num_q_tiles
    }
}

/// The tile of `rows` rows at a place in the order of work; a row of K and one of V take
/// `row_bytes` bytes together.
#[inline(always)]
#[must_use]
pub fn query_tile(args: &AttentionArgs, place: u32, rows: u32, row_bytes: u64) -> QueryTile {
    let Extent { heads, num_q_tiles } = Extent::anew(args, rows);
    let work = if Policy::is_causal() {
        let head_bytes = opaque(args.shape.seq_k) as u64 * row_bytes;
        longest_first(place, num_q_tiles, heads, (head_bytes >> 10) as u32)
    } else {
        in_order(place, num_q_tiles)
    };
    QueryTile::of(args, work, rows)
}

/// Quotient and remainder. A divisor of zero counts as one: nothing is launched then, and
/// the compiler sees that there is nothing to panic about.
#[inline(always)]
#[must_use]
pub fn divide(a: u32, b: u32) -> (u32, u32) {
    let b = b.max(1);
    (a / b, a % b)
}

/// Work of block `block` when all tiles take the same time: head after head.
#[inline(always)]
#[must_use]
pub fn in_order(block: u32, num_q_tiles: u32) -> Work {
    let (head, q_tile) = divide(block, num_q_tiles);
    Work { head, q_tile }
}

/// Heads of a section that has a tile for each of about `blocks` blocks: sections are of one
/// size, but that the last may be smaller.
#[inline(always)]
#[must_use]
pub fn section(num_q_tiles: u32, heads: u32, blocks: u32) -> u32 {
    let heads_needed = divide(blocks, num_q_tiles).0.max(1);
    let sections = divide(heads, heads_needed).0.max(1);
    heads.div_ceil(sections)
}

/// Work at `place` in sections of `section_heads` heads, in each of them tile by tile:
/// `last_first`, or with the last tile, which may be a short one, last. Past the last place it
/// gives some work that is not there.
#[inline(always)]
#[must_use]
pub fn in_sections(
    place: u32,
    num_q_tiles: u32,
    heads: u32,
    section_heads: u32,
    last_first: bool,
) -> Work {
    let (section, in_section) = divide(place, section_heads * num_q_tiles);
    // The last section may have fewer heads. A place past the last one, whose work no block does,
    // wraps around.
    let first = section.wrapping_mul(section_heads);
    let (tile, head) = divide(in_section, section_heads.min(heads.wrapping_sub(first)));
    let q_tile = if last_first { num_q_tiles.wrapping_sub(1).wrapping_sub(tile) } else { tile };
    Work { head: first.wrapping_add(head), q_tile }
}

/// What the heads that all groups work on at a time may occupy of the L2 cache in bytes: Q and O
/// pass through it as well.
const GROUPS_BYTES: u32 = 20 << 20;

/// How blocks that stay share heads: groups of neighbours work through heads of their own, and
/// what is left over is for all blocks, so that they end at the same time.
///
/// A GPU's L2 cache has two halves, and what a block reads from the other half crosses a bridge
/// that short launches fill. Neighbouring blocks sit at the same half: if all that read a head's
/// keys and values are neighbours, these cross once at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups.
    pub count: u32,
    /// Heads that each group has.
    pub heads: u32,
}

impl Groups {
    /// Blocks of a group.
    pub const SIZE: u32 = 4;
    /// No groups: all heads are for all blocks.
    pub const NONE: Self = Self { count: 0, heads: 0 };

    /// The groups of `blocks` blocks for `heads` heads of `num_q_tiles` tiles, each with this number of bytes
    /// of keys and values: as many rounds of a head a group as leave one for all blocks, if the
    /// cache holds what is read at a time.
    #[inline(always)]
    #[must_use]
    pub fn of(heads: u32, num_q_tiles: u32, head_bytes: u32, blocks: u32) -> Self {
        let count = (blocks / Self::SIZE).min(QUEUE_WORDS - 1);
        let rounds = divide(heads, count).0.saturating_sub(1);
        let fits = count > 0 && head_bytes <= GROUPS_BYTES / count.max(1);
        // Each block of a group begins with a task.
        if fits && rounds * num_q_tiles >= Self::SIZE {
            Self { count, heads: rounds }
        } else {
            Self::NONE
        }
    }

    /// Group and place in it of a block that is in one.
    #[inline(always)]
    #[must_use]
    pub fn of_block(self, block: u32) -> Option<(u32, u32)> {
        let group = block / Self::SIZE;
        (self.heads > 0 && group < self.count).then_some((group, block % Self::SIZE))
    }

    /// The number of heads of all groups, which come first.
    #[inline(always)]
    #[must_use]
    pub const fn all_heads(self) -> u32 {
        self.count * self.heads
    }
}

/// Work of block `block` when later tiles take longer. `head_kib` is the size of a
/// head's keys and values.
#[inline(always)]
#[must_use]
pub fn longest_first(block: u32, num_q_tiles: u32, heads: u32, head_kib: u32) -> Work {
    let section_heads = divide(SECTION_KIB, head_kib).0.max(1).min(heads);
    in_sections(block, num_q_tiles, heads, section_heads, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order of all tiles, as (tile, head).
    fn order(heads: u32, tiles: u32, at: impl Fn(u32) -> Work) -> Vec<(u32, u32)> {
        (0..heads * tiles).map(at).map(|work| (work.q_tile, work.head)).collect()
    }

    #[test]
    fn every_tile_of_every_head_comes_once() {
        for (heads, tiles, head_kib) in
            [(1, 1, 1), (7, 5, SECTION_KIB / 3), (16, 9, SECTION_KIB * 2), (3, 4, 0)]
        {
            let mut orders = vec![
                order(heads, tiles, |place| in_order(place, tiles)),
                order(heads, tiles, |place| longest_first(place, tiles, heads, head_kib)),
            ];
            for blocks in [1, 2, 20, 1000] {
                let together = section(tiles, heads, blocks);
                for last_first in [false, true] {
                    let at = |place| in_sections(place, tiles, heads, together, last_first);
                    orders.push(order(heads, tiles, at));
                }
            }
            let all: Vec<_> = (0..tiles).flat_map(|t| (0..heads).map(move |h| (t, h))).collect();
            for mut order in orders {
                order.sort_unstable();
                assert_eq!(order, all);
            }
        }
    }

    #[test]
    fn tiles_descend_within_a_section() {
        let order = order(3, 4, |place| longest_first(place, 4, 3, 1));
        assert_eq!(order[..4], [(3, 0), (3, 1), (3, 2), (2, 0)]);
        // Two heads fit a section: the third comes after both are done.
        let last = longest_first(8, 4, 3, SECTION_KIB / 2);
        assert_eq!(last, Work { head: 2, q_tile: 3 });
    }

    #[test]
    fn a_section_keeps_the_blocks_busy() {
        // Ten heads of four tiles, twelve blocks: three heads at a time would leave one alone,
        // so that sections have four.
        assert_eq!(section(4, 10, 12), 4);
        let order = order(10, 4, |place| in_sections(place, 4, 10, 4, false));
        // Tile by tile, the last one last; then the next section.
        assert_eq!(order[3..5], [(0, 3), (1, 0)]);
        assert_eq!(order[15..17], [(3, 3), (0, 4)]);
    }

    #[test]
    fn groups_leave_a_round_for_all_blocks() {
        // An H100: 33 groups; 512 heads are 15 rounds and 17 heads more.
        let groups = Groups::of(512, 4, 256 << 10, 132);
        assert_eq!(groups, Groups { count: 33, heads: 14 });
        assert_eq!((groups.of_block(0), groups.of_block(131)), (Some((0, 0)), Some((32, 3))));
        // 134 blocks: the last two are in no group.
        assert_eq!(Groups::of(512, 4, 256 << 10, 134).of_block(132), None);
    }

    #[test]
    fn no_groups_where_they_gain_nothing() {
        let heads = |heads, tiles, bytes, blocks| Groups::of(heads, tiles, bytes, blocks).heads;
        // One round only; too much for the cache; too few blocks; no task for each block.
        assert_eq!(heads(65, 4, 1, 132), 0);
        assert_eq!(heads(512, 32, 1 << 20, 132), 0);
        assert_eq!(heads(512, 4, 1, 3), 0);
        assert_eq!((heads(4, 1, 1, 4), heads(5, 1, 1, 4)), (0, 4));
        assert_eq!(Groups::NONE.of_block(0), None);
    }
}
