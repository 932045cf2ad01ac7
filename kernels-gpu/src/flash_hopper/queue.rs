//! Which tasks a block takes, one after the other.

use simt::{atomic, compiler::opaque, global::GlobalMut, thread};

use super::tiles::Tiles;
use crate::{
    args::AttentionArgs,
    policy::Policy,
    schedule::{self, Groups, Work},
};

/// Bytes of an element of K and one of V.
const KEY_AND_VALUE_BYTES: u32 = 4;

/// Where a block gets its work from: the queue of its group, if it is in one, then that of all
/// blocks.
///
/// A word for each queue counts what was asked for. Every block asks each of its queues until it
/// is refused; the last one to be refused finds the count at its end and sets it to 0 again.
#[derive(Clone, Copy)]
pub(super) struct Queue {
    /// That of all blocks, then those of the groups.
    words: GlobalMut<u32>,
    num_q_tiles: u32,
    heads: u32,
    causal: bool,
    /// Whether tasks take different times.
    uneven: bool,
    groups: Groups,
    /// The group whose queue is asked.
    group: Option<u32>,
}

impl Queue {
    /// The queues of a block, and its first work, which it need not ask for.
    ///
    /// # Safety
    /// `args.queue` must hold [`schedule::QUEUE_WORDS`] zeros before the launch.
    #[inline(always)]
    pub unsafe fn begin<P: Policy>(args: &AttentionArgs, tiles: Tiles) -> (Self, Option<Work>) {
        let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
        let heads = args.batch * args.heads;
        let num_q_tiles = args.seq_q.div_ceil(tiles.rows());
        let causal = P::is_causal(args);
        // Bytes of a head's K and V.
        let head_bytes = args.seq_k.saturating_mul(tiles.d * KEY_AND_VALUE_BYTES);
        // With three consumers the producer has no registers for more than one queue.
        let groups = if causal && tiles.consumers == 2 {
            Groups::of(heads, num_q_tiles, head_bytes, blocks)
        } else {
            Groups::NONE
        };
        // SAFETY: passed on to the caller.
        let words = unsafe { args.queue.view_mut::<u32>() };
        let uneven = causal || !args.seq_q.is_multiple_of(tiles.rows());
        let mut queue = Self { words, num_q_tiles, heads, causal, uneven, groups, group: None };
        if let Some((group, rank)) = groups.of_block(block) {
            queue.group = Some(group);
            return (queue, Some(queue.of_group(group, rank)));
        }
        let first = if groups.heads > 0 { queue.for_all(queue.ask_all()) } else { queue.at(block) };
        (queue, first)
    }

    /// Asks for work. The answer takes its time: [`work`](Self::work) waits for it.
    #[inline(always)]
    pub fn ask(&self) -> u32 {
        match self.group {
            Some(group) => {
                let tasks = self.groups.heads * self.num_q_tiles;
                atomic::increment_global_u32(self.words, u64::from(1 + group), tasks - 1)
            }
            None => self.ask_all(),
        }
    }

    /// The work that an answer stands for, if there is any left.
    #[inline(always)]
    pub fn work(&mut self, answer: u32) -> Option<Work> {
        let Some(group) = self.group else {
            return self.for_all(answer);
        };
        // Each block of the group began with one.
        let place = Groups::SIZE + answer;
        if place < self.groups.heads * self.num_q_tiles {
            return Some(self.of_group(group, place));
        }
        self.group = None;
        self.for_all(self.ask_all())
    }

    #[inline(always)]
    fn of_group(&self, group: u32, place: u32) -> Work {
        let Work { head, q_tile } = schedule::in_order(place, self.num_q_tiles);
        // Longest first.
        let q_tile = self.num_q_tiles - 1 - q_tile;
        Work { head: head * self.groups.count + group, q_tile }
    }

    /// Tasks for all blocks that none asks for, since blocks begin with them.
    #[inline(always)]
    fn given(&self) -> u32 {
        if self.groups.heads > 0 { 0 } else { thread::grid_dim_x() }
    }

    #[inline(always)]
    fn ask_all(&self) -> u32 {
        let tasks = (self.heads - self.groups.all_heads()) * self.num_q_tiles;
        let asks = tasks - self.given() + thread::grid_dim_x();
        atomic::increment_global_u32(self.words, 0, asks - 1)
    }

    #[inline(always)]
    fn for_all(&self, answer: u32) -> Option<Work> {
        self.at(self.given() + answer)
    }

    /// The work at a place of those for all blocks.
    #[inline(always)]
    fn at(&self, place: u32) -> Option<Work> {
        let heads = self.heads - self.groups.all_heads();
        if place >= heads * self.num_q_tiles {
            return None;
        }
        let work = if self.uneven {
            // The short ones of a section come last. Opaque: computed where it is used, since
            // the producer is short of registers.
            let together = schedule::section(opaque(self.num_q_tiles), heads, thread::grid_dim_x());
            schedule::in_sections(place, self.num_q_tiles, heads, together, self.causal)
        } else {
            schedule::in_order(place, self.num_q_tiles)
        };
        Some(Work { head: self.groups.all_heads() + work.head, ..work })
    }
}
