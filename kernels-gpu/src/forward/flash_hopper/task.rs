//! Tasks, and how the producer hands them to the consumers.

use simt::{mbarrier::Mbarrier, shared::Shared, warp};

use super::{geometry::Geometry, tiles::Tiles};
use crate::{
    args::AttentionArgs,
    parts::{
        pipeline::{Depth, Ring, Stage},
        policy::Policy,
        schedule::{QueryTile, Work},
    },
};

/// A tile of query rows, and what it sees.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub tile: QueryTile,
    /// Tiles of keys that any of its rows sees.
    pub num_kv_tiles: u32,
}

impl Task {
    /// The task that a piece of work is.
    ///
    /// # Safety
    /// As for [`Policy::new`].
    #[inline(always)]
    pub unsafe fn of(args: &AttentionArgs, tiles: Tiles, work: Work) -> Self {
        let tile = QueryTile::of(args, work, tiles.rows());
        // SAFETY: passed on to the caller.
        let policy = unsafe { Policy::new(args, tile.head(args)) };
        let end = policy.end_of_tile(tile.first_row + tiles.rows());
        Self { tile, num_kv_tiles: end.div_ceil(tiles.keys) }
    }

    /// Its first row.
    #[inline(always)]
    pub const fn first_row(&self) -> u32 {
        self.tile.first_row
    }
}

/// What goes between producer and consumers: rings of tiles of K and V, and for each consumer
/// its tasks with their Q.
pub(super) struct Rings<G: Geometry> {
    pub k: Ring<G::KvStages>,
    pub v: Ring<G::KvStages>,
    /// The barriers of each consumer's Q, one ring after the other.
    pub q: Shared<u64>,
    /// The tasks of each consumer, likewise: [`TASK_WORDS`] for each stage of Q.
    pub tasks: Shared<u32>,
}

impl<G: Geometry> Rings<G> {
    /// The tasks of a consumer.
    #[inline(always)]
    pub fn of(&self, consumer: u32) -> Inbox<G::QStages> {
        let words = const { G::TILES.q_stages * TASK_WORDS };
        Inbox {
            ring: Ring::new(self.q, consumer * Ring::<G::QStages>::BARRIERS),
            words: self.tasks.slice(consumer * words, words),
        }
    }
}

/// A consumer's tasks: its rows of Q, and with them what task they belong to.
#[derive(Clone, Copy)]
pub(super) struct Inbox<S> {
    pub ring: Ring<S>,
    words: Shared<u32>,
}

/// A task in shared memory: its fields in their order.
pub(super) const TASK_WORDS: u32 = 4;
/// In place of `num_kv_tiles`: there is no further task.
const END: u32 = u32::MAX;

impl<S: Depth> Inbox<S> {
    /// Producer: waits for a free stage of Q, and announces a task (or that there is none) and
    /// so many bytes of Q. Returns the barrier that they count at.
    #[inline(always)]
    pub fn announce(&self, stage: Stage<S>, task: Option<Task>, bytes: u32) -> Mbarrier {
        self.ring.wait_empty(stage);
        let end = Task { tile: QueryTile { b: 0, h: 0, first_row: 0 }, num_kv_tiles: END };
        let Task { tile: QueryTile { b, h, first_row }, num_kv_tiles } = task.unwrap_or(end);
        let first = stage.index() * TASK_WORDS;
        self.words.write(first, b);
        self.words.write(first + 1, h);
        self.words.write(first + 2, first_row);
        self.words.write(first + 3, num_kv_tiles);
        // Hazard: the consumer reads the task; announcing comes after the writes.
        self.ring.announce(stage, bytes)
    }

    /// Consumer: waits for Q and its task; `None` when there is no further one.
    #[inline(always)]
    pub fn receive(&self, stage: Stage<S>) -> Option<Task> {
        self.ring.wait(stage);
        let first = stage.index() * TASK_WORDS;
        let word = |index: u32| warp::uniform(self.words.read(first + index));
        let tile = QueryTile { b: word(0), h: word(1), first_row: word(2) };
        let task = Task { tile, num_kv_tiles: word(3) };
        (task.num_kv_tiles != END).then_some(task)
    }
}
