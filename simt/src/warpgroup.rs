//! Four neighbouring warps, which run wgmma together and give and take registers.

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::registers::{self, Direction};
pub use crate::hardware::{WARPGROUP_THREADS as THREADS, registers_at_launch};
use crate::{thread, warp};

/// Index of this warpgroup in its block, as a value that the compiler knows to be the
/// same in all lanes, so that branches on it are uniform.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn id() -> u32 {
    warp::uniform(thread::index_in_block() / THREADS)
}

/// Index of this thread in its warpgroup.
#[inline(always)]
#[must_use]
pub fn thread_id() -> u32 {
    thread::index_in_block() % THREADS
}

/// Whether the registers of a block, with a multiprocessor to itself, suffice for these numbers per
/// thread, one per warpgroup. If not, [`increase_registers`] waits for ever.
#[must_use]
pub const fn registers_suffice(of_warpgroups: &[u32]) -> bool {
    let count = of_warpgroups.len() as u32;
    let (mut sum, mut group) = (0, 0);
    while group < of_warpgroups.len() {
        sum += of_warpgroups[group];
        group += 1;
    }
    sum <= count * registers_at_launch(count * THREADS)
}

/// Gives registers back until each thread of this warpgroup has `N`: a multiple of 8
/// from 24 to 256. All its warps call it, and the kernel has launch bounds.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn decrease_registers<const N: u32>() {
    const { assert!(N % 8 == 0 && 24 <= N && N <= 256) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the assembler keeps the code after it within `N` registers.
    unsafe {
        core::arch::asm!("setmaxnreg.dec.sync.aligned.u32 {n};", n = const N, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    registers::change(Direction::Decrease, N, Location::caller());
}

/// Takes registers until each thread of this warpgroup has `N`, waiting until others have
/// given them back. As [`decrease_registers`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn increase_registers<const N: u32>() {
    const { assert!(N % 8 == 0 && 24 <= N && N <= 256) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as for `decrease_registers`.
    unsafe {
        core::arch::asm!("setmaxnreg.inc.sync.aligned.u32 {n};", n = const N, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    registers::change(Direction::Increase, N, Location::caller());
}
