//! Named barriers: `bar.sync` and `bar.arrive` of some of a block's warps.
//!
//! A block has 16 of them; number 0 is that of
//! [`sync_threads`](crate::thread::sync_threads). A kernel names its own with an enum, so
//! that no number is used for two things:
//!
//! ```
//! use simt::barrier::Named;
//!
//! #[derive(Clone, Copy)]
//! enum Barrier {
//!     Full = 1,
//!     Empty = 2,
//! }
//!
//! impl Named for Barrier {
//!     fn id(self) -> u32 {
//!         self as u32
//!     }
//! }
//! ```

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::barriers;

/// A kernel's enum of named barriers.
pub trait Named: Copy {
    /// Number of the barrier, 1 to 15.
    fn id(self) -> u32;
}

/// Waits at the barrier until `threads` threads have come, this one included, and orders
/// what those did before it. `threads` is a multiple of 32, the same for all.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync(barrier: impl Named, threads: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier has no precondition but that its threads reach it.
    unsafe {
        core::arch::asm!("bar.sync {0}, {1};", in(reg32) barrier.id(), in(reg32) threads,
            options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    barriers::barrier(barrier.id(), threads, Location::caller());
}

/// Comes to the barrier without waiting: what this thread did before is ordered before
/// the accesses of the threads that wait there.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn arrive(barrier: impl Named, threads: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as for `sync`.
    unsafe {
        core::arch::asm!("bar.arrive {0}, {1};", in(reg32) barrier.id(), in(reg32) threads,
            options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    barriers::arrive(barrier.id(), threads, Location::caller());
}
