//! Queues of tasks for blocks that stay: whichever block is done takes the next task.
//!
//! ```text
//! tasks      0 1 2 3 | 4 5 6 7 8 9        given: one to each block, which none asks for
//! answers              0 1 2 3 4 5 6 7 8 9
//!                                  ^ refused: each block once, then the count is 0 again
//! ```

use simt::{atomic, global::GlobalMut};

/// Words of the queues of a launch: one for all blocks, the others for
/// [`Groups`](crate::parts::schedule::Groups).
pub const QUEUE_WORDS: u32 = 128;

/// A queue of `tasks` tasks for `blocks` blocks, which begin with the first `given` of them.
///
/// A word counts what was asked for. Every block asks until it is refused, so that the last one
/// to be refused finds the count at its end, and sets it to 0 again for the next launch.
#[derive(Clone, Copy)]
pub struct Queue {
    /// The queues' words, and which of them this one is.
    pub words: GlobalMut<u32>,
    /// Index of the word.
    pub index: u32,
    /// Tasks.
    pub tasks: u32,
    /// Tasks that none asks for.
    pub given: u32,
    /// Blocks that ask.
    pub blocks: u32,
}

impl Queue {
    /// Asks for a task. The answer takes its time: [`place`](Self::place) waits for it.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn ask(&self) -> u32 {
        let asks = self.tasks - self.given + self.blocks;
        atomic::increment_global_u32(self.words, u64::from(self.index), asks - 1)
    }

    /// The task that an answer stands for, if there is any left.
    #[inline(always)]
    #[must_use]
    pub fn place(&self, answer: u32) -> Option<u32> {
        let place = self.given + answer;
        (place < self.tasks).then_some(place)
    }
}
