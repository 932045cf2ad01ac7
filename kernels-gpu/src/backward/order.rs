//! The order of the sums of dQ, for calls that want the same bits each time.
//!
//! The blocks of one head add to the same rows of dQ, and a sum of rounded numbers depends on its order.
//! Here the last keys of a row come first. One count per part of a tile of rows says whose turn it is:
//! the warp that adds a part waits for its turn, adds, and passes the turn on.
//!
//! ```text
//! rows           keys, causal            turns of each tile of rows
//!            0    1    2    3
//!   0        x                           0
//!   1        x    x                      1, 0
//!   2        x    x    x                 2, 1, 0
//!   3        x    x    x    x            3, 2, 1, 0
//! ```
//!
//! Every wait ends. A block may only wait for a block that is running or has ended, but a GPU starts blocks
//! in any order. So each block draws a ticket as it starts, and the ticket gives the block its keys: the last
//! keys of a head come first, so every wait is for a smaller ticket.
//!
//! Waits are short. In a causal launch the block of keys `k` begins with the row at the diagonal, where its turn
//! is the first, and reaches row `r` when the blocks before it have left that row. In other launches all
//! blocks begin with the first row, and the first wait puts them in a line. Blocks that follow should find
//! the same distance: the tickets of such a launch go through the heads of a section together, and a
//! block that ends makes room for the same keys of another head.
//!
//! Source: the order of turns is this project's; the tickets come from Merrill and Garland, "Single-pass
//! parallel prefix scan with decoupled look-back", 2016.

use simt::{
    atomic,
    compiler::opaque,
    global::GlobalMut,
    shared::Shared,
    thread, turn,
    warp::{self, FULL_MASK},
};

use crate::{
    args::BackwardArgs,
    constants::Constants,
    parts::{head::Head, policy::Policy, schedule},
};

/// Rows per turn: a tile of 64 rows has room for the turns of 16 parts.
const TURN_ROWS: u32 = 4;
/// Words before the turns, of which the first counts tickets: a sector of its own.
const TICKETS: u64 = 8;
/// Blocks that run at a time, about: one on each multiprocessor of an H100 or H200, of which they have up to 132.
const AT_A_TIME: u32 = 128;
/// Bytes of a [`Place`] in shared memory.
pub const PLACE_BYTES: u32 = 8;

/// Words of `args.forward.scratch.queue`, for `padded_rows` rows over all heads.
#[must_use]
pub const fn words(padded_rows: u64) -> u64 {
    TICKETS + padded_rows / TURN_ROWS as u64
}

/// # Safety
/// The queue must have [`words`].
#[inline(always)]
unsafe fn queue(args: &BackwardArgs) -> GlobalMut<u32> {
    // SAFETY: passed on to the caller.
    unsafe { args.forward.scratch.queue.view_mut::<u32>() }
}

/// Sets every turn of padded row `i` of `head` to the first block, in the launch before: the threads of the
/// row call it, `lane` among them.
///
/// # Safety
/// The queue must have [`words`].
#[inline(always)]
pub unsafe fn clear_turns(args: &BackwardArgs, head: &Head, i: u32, lane: u32) {
    if Constants::ordered() != 0 && lane == 0 && i % TURN_ROWS == 0 {
        // SAFETY: passed on to the caller.
        let queue = unsafe { queue(args) };
        queue.write(TICKETS + head.padded_row(i) / TURN_ROWS as u64, 0);
    }
}

/// Sets the count of tickets to 0, in the launch before: every thread calls it.
///
/// # Safety
/// As for [`clear_turns`].
#[inline(always)]
pub unsafe fn clear_tickets(args: &BackwardArgs) {
    if Constants::ordered() != 0
        && Head::number_of_block() == 0
        && thread::block_idx_x() == 0
        && thread::thread_idx_x() == 0
    {
        // SAFETY: passed on to the caller.
        unsafe { queue(args).write(0, 0) };
    }
}

/// The keys of a block, by its index in the grid or by its ticket, which shared memory
/// keeps.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Byte offset in dynamic shared memory.
    at: u32,
    /// Whether there is an order.
    ordered: bool,
}

impl Place {
    /// The place in the [`PLACE_BYTES`] at byte `at` of dynamic shared memory.
    #[inline(always)]
    #[must_use]
    pub const fn at(at: u32, ordered: bool) -> Self {
        Self { at, ordered }
    }

    /// The words. Opaque: each use reads them, and no register keeps them.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn words(self) -> Shared<u32> {
        // SAFETY: whoever made the place has the memory, and `draw` has a barrier.
        unsafe {
            let words = Shared::<u32>::dynamic(self.at, PLACE_BYTES / 4);
            Shared::from_raw(opaque(words.address()), words.len())
        }
    }

    /// Draws the block's ticket, where there is an order: by all threads, before anything else.
    ///
    /// # Safety
    /// The launch must give [`PLACE_BYTES`] at the place, and the queue must have [`words`].
    #[inline(always)]
    pub unsafe fn draw(self, args: &BackwardArgs) {
        if self.ordered {
            if thread::thread_idx_x() == 0 {
                // SAFETY: passed on to the caller.
                let ticket = atomic::add_global_u32(unsafe { queue(args) }, 0, 1);
                let tiles = thread::grid_dim_x();
                let heads = thread::grid_dim_y() * thread::grid_dim_z();
                // With a diagonal the blocks of a head do not stand in line.
                let section = if Policy::is_causal() {
                    1
                } else {
                    schedule::section(tiles, heads, AT_A_TIME)
                };
                let work = schedule::in_sections(ticket, tiles, heads, section, true);
                self.words().write(0, work.q_tile);
                self.words().write(1, work.head);
            }
            // Hazard: threads that did not write the place read it.
            thread::sync_threads();
        }
    }

    /// The tile of keys.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn key_tile(self) -> u32 {
        if self.ordered { self.words().read(0) } else { thread::block_idx_x() }
    }

    /// The number of the head of K, counted over the batch.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn number(self) -> u32 {
        if self.ordered { self.words().read(1) } else { Head::number_of_block() }
    }
}

/// A warp's part of a tile of rows.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The first row of the tile, a multiple of 64.
    pub first_row: u32,
    /// The rows of the tile.
    pub rows: u32,
    /// Number of the part, below 16.
    pub part: u32,
    /// The keys of the warp's block.
    pub place: Place,
    /// The keys of a tile.
    pub keys: u32,
}

impl Part {
    /// Waits for this part's turn, where there is an order: by all lanes of the warp, before they add.
    ///
    /// # Safety
    /// The queue must have [`words`], and every block that has keys for these rows must wait for the part
    /// once and [`pass`](Self::pass) it, with tickets in the order of [`Place::draw`].
    #[inline(always)]
    pub unsafe fn wait(self, args: &BackwardArgs, policy: &Policy) {
        if self.place.ordered {
            if opaque(warp::lane_id()) == 0 {
                let last = policy.last_key_tile(opaque(self.first_row) + self.rows, self.keys);
                let before = last - self.place.key_tile();
                // SAFETY: the queue has the words, as stated above.
                turn::wait(unsafe { queue(args) }, self.index(policy), before);
            }
            // Hazard: other lanes add too, and only one has waited for the sums of the blocks before.
            warp::sync_warp(FULL_MASK);
        }
    }

    /// Passes the turn on, where there is an order: by all lanes of the warp, when they have added.
    ///
    /// # Safety
    /// As for [`wait`](Self::wait).
    #[inline(always)]
    pub unsafe fn pass(self, args: &BackwardArgs, policy: &Policy) {
        if self.place.ordered {
            // Hazard: the turn is over when every lane has added.
            warp::sync_warp(FULL_MASK);
            if opaque(warp::lane_id()) == 0 {
                // SAFETY: the queue has the words, as stated above.
                turn::pass(unsafe { queue(args) }, self.index(policy));
            }
        }
    }

    /// Index of its count. Opaque: one lane finds it twice a tile, and no register keeps it.
    #[inline(always)]
    fn index(self, policy: &Policy) -> u64 {
        let mut head = policy.head;
        head.b = opaque(head.b);
        let row = head.padded_row(opaque(self.first_row));
        TICKETS + row / TURN_ROWS as u64 + self.part as u64
    }
}
