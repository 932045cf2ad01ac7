//! Named barriers of the consumers: turns of two at the tensor cores, and the warps of one.

use simt::{barrier, warpgroup};

use super::CONSUMER_ROWS;

/// The named barriers of a block; 0 is the barrier of the whole block.
#[derive(Clone, Copy)]
pub(super) enum NamedBarrier {
    /// A consumer's, by its number. Two consumers that take turns wait at it until the other has
    /// started its products; without turns the consumer's own warps meet there.
    Consumer(u32),
}

impl NamedBarrier {
    /// The barrier of the consumer whose rows begin at `own_rows`.
    #[inline(always)]
    pub const fn of(own_rows: u32) -> Self {
        Self::Consumer(own_rows / CONSUMER_ROWS)
    }

    /// Turns: lets the other one start.
    #[inline(always)]
    pub fn pass(self) {
        let Self::Consumer(own) = self;
        barrier::arrive(Self::Consumer(1 - own), 2 * warpgroup::THREADS);
    }

    /// Turns: waits until the other one has started.
    #[inline(always)]
    pub fn await_other(self) {
        barrier::sync(self, 2 * warpgroup::THREADS);
    }

    /// No turns: waits until all four warps are here.
    #[inline(always)]
    pub fn gather(self) {
        barrier::sync(self, warpgroup::THREADS);
    }
}

impl barrier::Named for NamedBarrier {
    #[inline(always)]
    fn id(self) -> u32 {
        let Self::Consumer(consumer) = self;
        1 + consumer
    }
}
