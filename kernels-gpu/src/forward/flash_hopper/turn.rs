//! Named barriers of the consumers: turns of two at the tensor cores, and the warps of one.

use simt::{barrier, warpgroup};

use super::CONSUMER_ROWS;

/// The named barrier of a consumer. Two consumers that take turns wait at it until the other
/// has started its products; without turns the consumer's own warps meet there.
#[derive(Clone, Copy)]
pub(super) struct Own(NamedBarrier);

/// The named barriers of a block; 0 is the barrier of the whole block.
#[derive(Clone, Copy)]
enum NamedBarrier {
    /// That of a consumer, by its number.
    Consumer(u32),
}

impl Own {
    /// That of the consumer whose rows begin at `own_rows`.
    #[inline(always)]
    pub const fn of(own_rows: u32) -> Self {
        Self(NamedBarrier::Consumer(own_rows / CONSUMER_ROWS))
    }

    /// Turns: lets the other one start.
    #[inline(always)]
    pub fn pass(self) {
        let NamedBarrier::Consumer(own) = self.0;
        barrier::arrive(NamedBarrier::Consumer(1 - own), 2 * warpgroup::THREADS);
    }

    /// Turns: waits until the other one has started.
    #[inline(always)]
    pub fn await_other(self) {
        barrier::sync(self.0, 2 * warpgroup::THREADS);
    }

    /// No turns: waits until all four warps are here.
    #[inline(always)]
    pub fn gather(self) {
        barrier::sync(self.0, warpgroup::THREADS);
    }
}

impl barrier::Named for NamedBarrier {
    #[inline(always)]
    fn id(self) -> u32 {
        let Self::Consumer(consumer) = self;
        1 + consumer
    }
}
