//! A ring of shared-memory stages between one producer and several consumers.
//!
//! Each stage has two mbarriers: *full*, which a copy completes, and *empty*, at which
//! every consumer arrives when it is done. A [`Stage`] is where in the ring someone is,
//! with the parity of the barriers' phase there.

use core::marker::PhantomData;

use simt::{mbarrier::Mbarrier, shared::Shared};

/// How many stages a ring has.
pub trait Depth: Copy {
    /// Stages, a power of two.
    const STAGES: u32;
}

/// `N` stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stages<const N: u32>;

impl<const N: u32> Depth for Stages<N> {
    const STAGES: u32 = N;
}

/// A place in a ring: how many stages went before, which says both
/// where in the ring that is and on which round, in one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage<S> {
    count: u32,
    depth: PhantomData<S>,
}

impl<S: Depth> Stage<S> {
    /// The first stage, on the first round.
    pub const FIRST: Self = Self { count: 0, depth: PhantomData };

    /// Index of the stage.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> u32 {
        self.count % S::STAGES
    }

    /// Parity of the phase: 0 on the first round, 1 on the second, and so on.
    #[inline(always)]
    #[must_use]
    pub const fn parity(self) -> u32 {
        self.count / S::STAGES % 2
    }

    /// The stage before.
    #[inline(always)]
    #[must_use]
    pub const fn before(self) -> Self {
        Self { count: self.count.wrapping_sub(1), depth: PhantomData }
    }

    /// Goes to the next stage.
    #[inline(always)]
    pub fn advance(&mut self) {
        // After 2^32 stages the count starts again at the same place, if the depth divides it.
        const { assert!(S::STAGES.is_power_of_two()) };
        self.count = self.count.wrapping_add(1);
    }
}

/// The barriers of a ring, one ring per kind of tile.
#[derive(Clone, Copy)]
pub struct Ring<S> {
    barriers: Shared<u64>,
    depth: PhantomData<S>,
}

impl<S: Depth> Ring<S> {
    /// Barriers of a ring, in elements of 8 bytes.
    pub const BARRIERS: u32 = 2 * S::STAGES;

    /// The ring whose barriers are in `barriers`, from element `first` on.
    #[inline(always)]
    #[must_use]
    pub const fn new(barriers: Shared<u64>, first: u32) -> Self {
        Self { barriers: barriers.slice(first, Self::BARRIERS), depth: PhantomData }
    }

    /// Initialises the barriers for `consumers` arrivals per stage; by one thread.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn init(&self, consumers: u32) {
        for index in 0..S::STAGES {
            self.full(index).init(1);
            self.empty(index).init(consumers);
        }
    }

    /// Completed when the stage's data is there.
    #[inline(always)]
    #[must_use]
    pub const fn full(&self, index: u32) -> Mbarrier {
        Mbarrier::at(self.barriers, index)
    }

    /// Completed when every consumer is done with the stage's data.
    #[inline(always)]
    #[must_use]
    pub const fn empty(&self, index: u32) -> Mbarrier {
        Mbarrier::at(self.barriers, S::STAGES + index)
    }

    /// Producer: waits until the stage may be overwritten, and announces `bytes` bytes.
    /// Returns the barrier that copies into the stage count at.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn acquire(&self, stage: Stage<S>, bytes: u32) -> Mbarrier {
        self.wait_empty(stage);
        self.announce(stage, bytes)
    }

    /// Producer: waits until the stage may be overwritten.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn wait_empty(&self, stage: Stage<S>) {
        // Hazard: consumers may still read what the copy overwrites. On the first round
        // the parity is that of the phase before the first, and there is no wait.
        self.empty(stage.index()).wait(stage.parity() ^ 1);
    }

    /// Producer: announces `bytes` bytes of a stage that is empty. Returns the barrier that
    /// copies into it count at.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn announce(&self, stage: Stage<S>, bytes: u32) -> Mbarrier {
        let full = self.full(stage.index());
        full.arrive_expect_tx(bytes);
        full
    }

    /// Consumer: waits until the stage's data is there.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn wait(&self, stage: Stage<S>) {
        // Hazard: the copy may not have landed.
        self.full(stage.index()).wait(stage.parity());
    }

    /// Consumer: whether the stage's data is there, asked once. `true` stands for [`wait`](Self::wait).
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn is_full(&self, stage: Stage<S>) -> bool {
        self.full(stage.index()).is_complete(stage.parity())
    }

    /// Consumer: gives the stage back; by one thread of each.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn release(&self, stage: Stage<S>) {
        // Hazard: what was read must have been read before the producer's next copy.
        self.empty(stage.index()).arrive();
    }

    /// [`release`](Self::release) to the producer of the block of rank `rank` of the cluster.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn release_at(&self, stage: Stage<S>, rank: u32) {
        // Hazard: as for `release`.
        self.empty(stage.index()).signal_at(rank);
    }
}
