//! Named barriers: turns of two consumers at the tensor cores, and the warps of one.

use simt::{barrier, warpgroup};

use super::CONSUMER_ROWS;

/// Whose turn it is to start products: named barriers at which one consumer waits until
/// the other has started its own.
#[derive(Clone, Copy)]
pub(super) struct Turn(u32);

impl Turn {
    /// That of the consumer whose rows begin at `own_rows`.
    #[inline(always)]
    pub const fn of(own_rows: u32) -> Self {
        Self(1 + own_rows / CONSUMER_ROWS)
    }

    /// Lets the other one start.
    #[inline(always)]
    pub fn pass(self) {
        barrier::arrive(Self(3 - self.0), 2 * warpgroup::THREADS);
    }

    /// Waits until the other one has started.
    #[inline(always)]
    pub fn await_other(self) {
        barrier::sync(self, 2 * warpgroup::THREADS);
    }
}

impl barrier::Named for Turn {
    #[inline(always)]
    fn id(self) -> u32 {
        self.0
    }
}

/// The four warps of a consumer, where there are no turns.
#[derive(Clone, Copy)]
pub(super) struct Together(u32);

impl Together {
    /// Those of the consumer whose rows begin at `own_rows`.
    #[inline(always)]
    pub const fn of(own_rows: u32) -> Self {
        Self(1 + own_rows / CONSUMER_ROWS)
    }

    /// Waits until all four are here.
    #[inline(always)]
    pub fn sync(self) {
        barrier::sync(self, warpgroup::THREADS);
    }
}

impl barrier::Named for Together {
    #[inline(always)]
    fn id(self) -> u32 {
        self.0
    }
}
