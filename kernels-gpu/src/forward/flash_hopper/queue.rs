//! Which tasks a block takes, one after the other.

use simt::{compiler::opaque, thread};

use super::tiles::Tiles;
use crate::{
    args::AttentionArgs,
    parts::{
        head::Head,
        policy::Policy,
        queue::Queue,
        schedule::{self, Extent, Groups, Work},
    },
};

/// Bytes of an element of K or V.
const ELEMENT_BYTES: u32 = 2;

/// Where a block gets its work from: the queue of its group, if it is in one, then that of all
/// blocks.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    /// The queue of all blocks.
    of_all: Queue,
    extent: Extent,
    /// Whether tasks take different times.
    uneven: bool,
    groups: Groups,
    /// The group whose queue is asked.
    group: Option<u32>,
}

impl Tasks {
    /// The tasks of a block, and the first of them, which it need not ask for.
    ///
    /// # Safety
    /// `args.scratch.queue` must hold [`QUEUE_WORDS`](crate::parts::queue::QUEUE_WORDS) zeros
    /// before the launch.
    #[inline(always)]
    pub unsafe fn begin(args: &AttentionArgs, tiles: Tiles) -> (Self, Option<Work>) {
        let (block, blocks) = (thread::block_idx_x(), thread::grid_dim_x());
        let extent = Extent::new(args, tiles.rows());
        // Bytes of a head's K and V.
        let head_bytes = args.shape.seq_k.saturating_mul((tiles.d + tiles.d_v) * ELEMENT_BYTES);
        // With three consumers the producer has no registers for more than one queue.
        // Packed sequences differ in length, so that groups of heads would end at different times.
        let grouped = Policy::is_causal() && !Head::is_packed();
        let groups = if grouped && tiles.consumers == 2 {
            Groups::of(extent.heads, extent.num_q_tiles, head_bytes, blocks)
        } else {
            Groups::NONE
        };
        let of_all = Queue {
            // SAFETY: the queue holds zeros before the launch, as stated above.
            words: unsafe { args.scratch.queue.view_mut() },
            index: 0,
            tasks: (extent.heads - groups.all_heads()) * extent.num_q_tiles,
            // Blocks without a group begin with a task.
            given: if groups.heads > 0 { 0 } else { blocks },
            blocks,
        };
        let uneven = Policy::is_causal()
            || Head::is_packed()
            || !args.shape.seq_q.is_multiple_of(tiles.rows());
        let mut tasks = Self { of_all, extent, uneven, groups, group: None };
        if let Some((group, rank)) = groups.of_block(block) {
            tasks.group = Some(group);
            return (tasks, Some(tasks.of_group(group, rank)));
        }
        let place = if groups.heads > 0 { of_all.place(of_all.ask()) } else { Some(block) };
        (tasks, place.map(|place| tasks.at(place)))
    }

    /// Asks for work. The answer takes its time: [`work`](Self::work) waits for it.
    #[inline(always)]
    pub fn ask(&self) -> u32 {
        match self.group {
            Some(group) => self.queue_of(group).ask(),
            None => self.of_all.ask(),
        }
    }

    /// The work that an answer stands for, if there is any left.
    #[inline(always)]
    pub fn work(&mut self, mut answer: u32) -> Option<Work> {
        if let Some(group) = self.group {
            if let Some(place) = self.queue_of(group).place(answer) {
                return Some(self.of_group(group, place));
            }
            self.group = None;
            answer = self.of_all.ask();
        }
        self.of_all.place(answer).map(|place| self.at(place))
    }

    /// The queue of a group: each of its blocks begins with a task.
    #[inline(always)]
    fn queue_of(&self, group: u32) -> Queue {
        let tasks = self.groups.heads * self.extent.num_q_tiles;
        let (given, blocks) = (Groups::SIZE, Groups::SIZE);
        Queue { index: 1 + group, tasks, given, blocks, ..self.of_all }
    }

    #[inline(always)]
    fn of_group(&self, group: u32, place: u32) -> Work {
        let Work { head, q_tile } = schedule::in_order(place, self.extent.num_q_tiles);
        // Longest first.
        let q_tile = self.extent.num_q_tiles - 1 - q_tile;
        Work { head: head * self.groups.count + group, q_tile }
    }

    /// The work at a place among the tasks for all blocks.
    #[inline(always)]
    fn at(&self, place: u32) -> Work {
        let Extent { heads, num_q_tiles } = self.extent;
        let heads = heads - self.groups.all_heads();
        let work = if self.uneven {
            // The short ones of a section come last. Opaque: computed where it is used, since
            // the producer is short of registers.
            let together = schedule::section(opaque(num_q_tiles), heads, thread::grid_dim_x());
            schedule::in_sections(place, num_q_tiles, heads, together, Policy::is_causal())
        } else {
            schedule::in_order(place, num_q_tiles)
        };
        Work { head: self.groups.all_heads() + work.head, ..work }
    }
}
