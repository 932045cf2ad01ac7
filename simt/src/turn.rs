//! Turns: blocks that do something one after another, in an order that the kernel fixes, by a count in
//! global memory.
//!
//! A block [waits](wait) until the count is its own number, does what is to be done in order, and
//! [passes](pass) the turn on. Nothing promises that two blocks of a launch run at the same time. So a
//! block may wait only for blocks that have started before it, and these for none that come later: a
//! kernel numbers its blocks itself, by an atomic operation as each one starts.

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{global_memory::GlobalAccess, turns};
use crate::global::GlobalMut;

/// Waits until element `index` is `turn`. Acquires: what the blocks did before they passed the turn on
/// comes before what this thread does next, and, after a barrier, before what others do.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn wait(counts: GlobalMut<u32>, index: u64, turn: u32) {
    #[cfg(target_arch = "nvptx64")]
    loop {
        let count: u32;
        // SAFETY: indices are in bounds, as the function that made the view asks.
        unsafe {
            core::arch::asm!("ld.acquire.gpu.global.b32 {0}, [{1}];", out(reg32) count,
                in(reg64) counts.address_of(index), options(nostack));
        }
        if count == turn {
            break;
        }
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        turns::wait(|| counts.as_global().check::<u32>(index, GlobalAccess::Atomic, at), turn, at);
    }
}

/// Adds 1 to element `index`. Releases: what this thread did before, and what others did before a
/// barrier that it came to, comes before what those do that wait for the turn.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn pass(counts: GlobalMut<u32>, index: u64) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: indices are in bounds, as the function that made the view asks.
    unsafe {
        core::arch::asm!("red.release.gpu.global.add.u32 [{0}], 1;",
            in(reg64) counts.address_of(index), options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        turns::pass(|| counts.as_global().check::<u32>(index, GlobalAccess::Atomic, at), at);
    }
}
