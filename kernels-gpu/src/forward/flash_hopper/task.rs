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

/// A tile of query rows, and the KV tiles that it sees.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub tile: QueryTile,
    /// The first tile of keys that any of its rows sees.
    pub first_tile: u32,
    /// The end of these tiles; 0 if there are none.
    pub end_tile: u32,
}

impl Task {
    /// The task that a piece of work is.
    ///
    /// # Safety
    /// As for [`Policy::new`].
    #[inline(always)]
    pub unsafe fn of(args: &AttentionArgs, tiles: Tiles, work: Work) -> Self {
        let tile = QueryTile::of(args, work, tiles.rows());
        // SAFETY: mask, slopes, bias and sinks have their shapes, as `Policy::new` asks.
        let policy = unsafe { Policy::new(args, tile.head(args)) };
        let seen = policy.key_tiles(tile.first_row, tile.first_row + tiles.rows(), tiles.keys);
        let end_tile = if seen.is_empty() { 0 } else { seen.end };
        Self { tile, first_tile: seen.start, end_tile }
    }

    /// Tiles of keys.
    #[inline(always)]
    pub const fn num_tiles(&self) -> u32 {
        if self.end_tile == 0 { 0 } else { self.end_tile - self.first_tile }
    }

    /// Its first row.
    #[inline(always)]
    pub const fn first_row(&self) -> u32 {
        self.tile.first_row
    }
}

/// The channels between producer and consumers: rings of tiles of K and V, and for each consumer
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

/// A task in shared memory: its fields in their order, padded to twice 16 bytes, so that the first
/// four are one load.
pub(super) const TASK_WORDS: u32 = 8;
/// In place of `end_tile`: there is no further task.
const END: u32 = u32::MAX;

impl<S: Depth> Inbox<S> {
    /// Producer: waits for a free stage of Q, and announces a task (or that there is none) and
    /// `bytes` bytes of Q. Returns the barrier that they count at.
    #[inline(always)]
    pub fn announce(&self, stage: Stage<S>, task: Option<Task>, bytes: u32) -> Mbarrier {
        self.ring.wait_empty(stage);
        let tile = QueryTile { b: 0, h: 0, first_row: 0 };
        let end = Task { tile, first_tile: 0, end_tile: END };
        let Task { tile: QueryTile { b, h, first_row }, first_tile, end_tile } =
            task.unwrap_or(end);
        let first = stage.index() * TASK_WORDS;
        self.words.write(first, b);
        self.words.write(first + 1, h);
        self.words.write(first + 2, first_row);
        self.words.write(first + 3, end_tile);
        if Policy::is_left_bounded() {
            self.words.write(first + 4, first_tile);
        }
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
        let first_tile = if Policy::is_left_bounded() { word(4) } else { 0 };
        let task = Task { tile, first_tile, end_tile: word(3) };
        (task.end_tile != END).then_some(task)
    }
}
