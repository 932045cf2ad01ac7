//! Copies from global to shared memory that run beside the threads: `cp.async`, from sm_80 on.
//!
//! A thread starts copies of 16 bytes, closes them into a group with [`commit`], and
//! waits for groups with [`wait`]. After the wait the bytes are there for the thread that
//! copied them; the others need a barrier after it. Under the emulator a copy lands at
//! the wait and not before: an access to its destination until then is a fault.

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{SyncKind, current, global_memory::GlobalAccess};
use crate::{global::Global, memory::Memory, shared::Shared};

/// Bytes of a copy.
pub const BYTES: u32 = 16;

/// Starts to copy 16 bytes, from element `from` of `source` to element `to` of `tile`,
/// or 16 bytes of zeros where `inside` is false (`from` may then be anything).
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn copy_or_zero<T: Memory>(
    tile: Shared<T>,
    to: u32,
    source: Global<T>,
    from: u64,
    inside: bool,
) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: `Shared::dynamic` and `Global::new` ask that every index is in bounds; with a source
    // size of 0 nothing is read.
    unsafe {
        core::arch::asm!(
            "cp.async.cg.shared.global.L2::128B [{0}], [{1}], 16, {2};",
            in(reg32) tile.address_of(to),
            in(reg64) source.address_of(from),
            in(reg32) if inside { BYTES } else { 0 },
            options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        let address = inside.then(|| source.check::<[u32; 4]>(from, GlobalAccess::Read, at));
        current::checked(|b| {
            tile.check::<[u32; 4]>(b, to, "asynchronous copy", at)?;
            b.copy_async(tile.address_of(to), address, at)
        });
    }
}

/// Starts to copy 16 bytes, from element `from` of `source` to element `to` of `tile`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn copy<T: Memory>(tile: Shared<T>, to: u32, source: Global<T>, from: u64) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: `Shared::dynamic` and `Global::new` ask that every index is in bounds.
    unsafe {
        core::arch::asm!(
            "cp.async.cg.shared.global.L2::128B [{0}], [{1}], 16;",
            in(reg32) tile.address_of(to),
            in(reg64) source.address_of(from),
            options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    copy_or_zero(tile, to, source, from, true);
}

/// Makes this thread's copies since the last commit a group, which may be empty.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn commit() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no precondition.
    unsafe {
        core::arch::asm!("cp.async.commit_group;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        current::with(|b| b.commit_copies(at));
    }
}

/// Waits until all of this thread's groups have landed but the newest `PENDING`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn wait<const PENDING: u32>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no precondition.
    unsafe {
        core::arch::asm!("cp.async.wait_group {0};", const PENDING, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        if let Some(pending) = current::pending(SyncKind::CopyWait, PENDING, at) {
            current::with(|b| b.wait_copies(pending as usize, at));
        }
    }
}
