//! Barriers in shared memory that also count bytes: how asynchronous copies are waited for.
//!
//! An [`Mbarrier`] goes through phases, of parity 0, 1, 0, … A phase completes when the
//! arrivals it was initialised for have come and every byte that was announced
//! ([`Mbarrier::arrive_expect_tx`]) has landed. [`Mbarrier::wait`] names the parity of
//! the phase it waits for; on a fresh barrier parity 1 counts as complete, which is how a
//! producer's first pass over empty stages does not wait.
//!
//! An arrival releases the accesses that its thread made and knew; a wait acquires the released
//! accesses and the copied bytes. From sm_90 on.
//!
//! Threads of the other blocks of a [`cluster`](crate::cluster) may arrive
//! ([`Mbarrier::arrive_at`]); the block that has the barrier waits for them with
//! [`Mbarrier::wait_cluster`].

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{
    SyncKind,
    mbarriers::{self, Scope},
};
use crate::{hardware::MBARRIER_BYTES, shared::Shared};

/// Asks with `$instruction` whether the phase of that parity has completed.
#[cfg(target_arch = "nvptx64")]
macro_rules! ask {
    ($instruction:literal, $barrier:expr, $parity:expr) => {{
        let done: u32;
        // SAFETY: an element of a view of `u64`: eight bytes of shared memory, aligned to 8.
        unsafe {
            core::arch::asm!(
                "{{ .reg .pred done;",
                concat!($instruction, " done, [{1}], {2};"),
                "selp.u32 {0}, 1, 0, done; }}",
                out(reg32) done, in(reg32) $barrier.address, in(reg32) $parity, options(nostack)
            );
        }
        done != 0
    }};
}

/// One barrier: 8 bytes of shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Mbarrier {
    address: u32,
}

impl Mbarrier {
    /// Bytes of one barrier.
    pub const BYTES: u32 = MBARRIER_BYTES;

    /// The barrier that is element `index` of `view`.
    #[inline(always)]
    #[must_use]
    pub const fn at(view: Shared<u64>, index: u32) -> Self {
        Self { address: view.address_of(index) }
    }

    /// Its address in the shared window, for instructions that take one.
    #[inline(always)]
    #[must_use]
    pub const fn address(self) -> u32 {
        self.address
    }

    /// Makes it a barrier of `arrivals` arrivals a phase. One thread does this; then comes
    /// [`fence_init`], and a barrier of the block before others use it.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn init(self, arrivals: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: an element of a view of `u64`: eight bytes of shared memory, aligned to 8.
        unsafe {
            core::arch::asm!("mbarrier.init.shared::cta.b64 [{0}], {1};",
                in(reg32) self.address, in(reg32) arrivals, options(nostack));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::init(self.address, arrivals, Location::caller());
    }

    /// Arrives once.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn arrive(self) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: an element of a view of `u64`: eight bytes of shared memory, aligned to 8.
        unsafe {
            core::arch::asm!("mbarrier.arrive.shared::cta.b64 _, [{0}];",
                in(reg32) self.address, options(nostack));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::arrive(self.address, Location::caller());
    }

    /// Arrives once at the barrier that the block of rank `rank` of the cluster has where this
    /// block has this one.
    ///
    /// The arrival releases writes that this thread made or knows to the other block, which
    /// costs a fence of the whole GPU; [`signal_at`](Self::signal_at) has none.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn arrive_at(self, rank: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: an element of a view of `u64`: eight bytes of shared memory, aligned to 8.
        unsafe {
            core::arch::asm!(
                "{{ .reg .b32 there; mapa.shared::cluster.u32 there, {0}, {1};",
                "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }}",
                in(reg32) self.address, in(reg32) rank, options(nostack)
            );
        }
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::arrive_at(self.address, rank, Scope::Cluster, Location::caller());
    }

    /// [`arrive_at`](Self::arrive_at) that releases no writes to the other block: it says that
    /// something may be overwritten by copies, such as a tile that products have read. The plain
    /// [`wait`](Self::wait) goes with it. (The memory model orders nothing by it; CUTLASS's
    /// pipelines give stages back in the same way.)
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn signal_at(self, rank: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: an element of a view of `u64`: eight bytes of shared memory, aligned to 8.
        unsafe {
            core::arch::asm!(
                "{{ .reg .b32 there; mapa.shared::cluster.u32 there, {0}, {1};",
                "mbarrier.arrive.shared::cluster.b64 _, [there]; }}",
                in(reg32) self.address, in(reg32) rank, options(nostack)
            );
        }
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::arrive_at(self.address, rank, Scope::Block, Location::caller());
    }

    /// Announces `bytes` bytes that copies will bring in this phase, and arrives once.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn arrive_expect_tx(self, bytes: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: an element of a view of `u64`: eight bytes of shared memory, aligned to 8.
        unsafe {
            core::arch::asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};",
                in(reg32) self.address, in(reg32) bytes, options(nostack));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::arrive_expect_tx(self.address, bytes, Location::caller());
    }

    /// Waits until the phase of `parity` (0 or 1) has completed. The next phase must not
    /// complete before every thread that waits has seen this one: with its parity gone by, it
    /// would wait for the one after.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn wait(self, parity: u32) {
        #[cfg(target_arch = "nvptx64")]
        while !ask!("mbarrier.try_wait.parity.shared::cta.b64", self, parity) {}
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::wait(self.address, parity, Scope::Block, Location::caller());
    }

    /// Whether the phase of `parity` (0 or 1) has completed: asks once. `true` acquires as
    /// [`wait`](Self::wait) does, and the next phase must not complete before either.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn is_complete(self, parity: u32) -> bool {
        #[cfg(target_arch = "nvptx64")]
        return ask!("mbarrier.test_wait.parity.shared::cta.b64", self, parity);
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::is_complete(self.address, parity, Scope::Block, Location::caller())
    }

    /// [`wait`](Self::wait), which also acquires what other blocks of the cluster released.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn wait_cluster(self, parity: u32) {
        #[cfg(target_arch = "nvptx64")]
        while !ask!("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64", self, parity) {}
        #[cfg(not(target_arch = "nvptx64"))]
        mbarriers::wait(self.address, parity, Scope::Cluster, Location::caller());
    }
}

/// Makes initialised barriers visible to asynchronous copies; by the thread that
/// initialised them, before the barrier of the block that hands them out.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn fence_init() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a fence has no precondition.
    unsafe {
        core::arch::asm!(
            "fence.mbarrier_init.release.cluster; fence.proxy.async;",
            options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    mbarriers::fence(SyncKind::FenceInit, Location::caller());
}

/// Makes this thread's ordinary writes to its block's shared memory visible to bulk copies and to
/// wgmma; by each thread that wrote, before the barrier that hands the data on.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn fence_proxy_async() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a fence has no precondition.
    unsafe {
        core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    mbarriers::fence(SyncKind::FenceProxyAsync, Location::caller());
}
