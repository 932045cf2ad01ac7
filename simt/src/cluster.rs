//! Clusters: neighbouring blocks that run at the same time, see each other's shared memory,
//! and have a barrier of their own. From sm_90 on; names as in cooperative groups.
//!
//! A kernel states the size of its clusters with its launch bounds
//! ([`launch_bounds!`](crate::launch_bounds)), and its grid is a multiple of it along x. All
//! blocks are clusters of one otherwise.
//!
//! Blocks do not start at the same moment, nor end: before the first access to another block
//! and after the last, all [`sync`], unless another synchronisation orders them.

use core::marker::PhantomData;

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{FaultKind, barriers, current};
use crate::{memory::Memory, shared::Shared};

/// Index of this block in its cluster.
#[inline(always)]
#[must_use]
pub fn block_rank() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let rank: u32;
        // SAFETY: reads a special register.
        unsafe {
            core::arch::asm!("mov.u32 {0}, %cluster_ctarank;", out(reg32) rank,
                options(pure, nomem, nostack));
        }
        rank
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        current::with(|b| b.rank() as u32)
    }
}

/// Blocks of the cluster.
#[inline(always)]
#[must_use]
pub fn num_blocks() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let blocks: u32;
        // SAFETY: reads a special register.
        unsafe {
            core::arch::asm!("mov.u32 {0}, %cluster_nctarank;", out(reg32) blocks,
                options(pure, nomem, nostack));
        }
        blocks
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        current::with(|b| b.blocks() as u32)
    }
}

/// Waits until every thread of the cluster is here, none of which may have returned; orders
/// their memory accesses. The threads of a warp must reach it at the same place.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier has no precondition but that all threads reach it.
    unsafe {
        core::arch::asm!(
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
            options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    barriers::sync_cluster(Location::caller());
}

/// The shared memory that the block of rank `rank` has where this block has `view`.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn map_shared_rank<T: Memory>(view: Shared<T>, rank: u32) -> Distributed<T> {
    #[cfg(target_arch = "nvptx64")]
    let address = {
        let address: u32;
        // SAFETY: computes an address.
        unsafe {
            core::arch::asm!("mapa.shared::cluster.u32 {0}, {1}, {2};", out(reg32) address,
                in(reg32) view.address(), in(reg32) rank, options(pure, nomem, nostack));
        }
        address
    };
    #[cfg(not(target_arch = "nvptx64"))]
    let address = {
        let at = Location::caller();
        current::checked(|b| b.map_shared_rank(view.address(), rank, at))
    };
    Distributed {
        address,
        len: view.len(),
        #[cfg(not(target_arch = "nvptx64"))]
        rank,
        element: PhantomData,
    }
}

/// A view of shared memory of a block of the cluster, this one or another.
#[derive(Clone, Copy, Debug)]
pub struct Distributed<T> {
    address: u32,
    len: u32,
    #[cfg(not(target_arch = "nvptx64"))]
    rank: u32,
    element: PhantomData<T>,
}

impl<T: Memory> Distributed<T> {
    /// Elements of the view.
    #[inline(always)]
    #[must_use]
    pub const fn len(self) -> u32 {
        self.len
    }

    /// Whether the view has no element.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Address of element `index` in the cluster's window.
    #[inline(always)]
    #[must_use]
    pub const fn address_of(self, index: u32) -> u32 {
        self.address + index * T::BYTES
    }

    /// Reads element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read(self, index: u32) -> T {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the view that was mapped was made for these indices (`Shared::dynamic`).
        unsafe {
            T::ld_cluster(self.address_of(index))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let at = Location::caller();
            current::checked(|b| {
                self.check(index, "read", b.site(at))?;
                let from = b.distributed_read(self.rank, self.address_of(index), T::BYTES, at)?;
                // SAFETY: `distributed_read` checked bounds and alignment.
                Ok(unsafe { from.cast::<T>().read() })
            })
        }
    }

    /// Writes element `index`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write(self, index: u32, value: T) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the view that was mapped was made for these indices (`Shared::dynamic`).
        unsafe {
            T::st_cluster(self.address_of(index), value);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let at = Location::caller();
            current::checked(|b| {
                self.check(index, "write", b.site(at))?;
                let to = b.distributed_write(self.rank, self.address_of(index), T::BYTES, at)?;
                // SAFETY: `distributed_write` checked bounds and alignment.
                unsafe { to.cast::<T>().write(value) };
                Ok(())
            })
        }
    }

    #[cfg(not(target_arch = "nvptx64"))]
    fn check(
        self,
        index: u32,
        what: &'static str,
        this: crate::emulator::Site,
    ) -> Result<(), FaultKind> {
        let (index, len) = (index.into(), self.len.into());
        if index < len {
            return Ok(());
        }
        Err(FaultKind::OutOfBounds { space: "shared", what, index, len, this })
    }
}
