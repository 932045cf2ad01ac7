//! The emulator: runs a kernel's blocks on the CPU, with checks that a GPU does not make.
//!
//! Every lane of a block is a coroutine. A lane runs until a barrier or a warp
//! collective, where it is suspended until the others have come; blocks are spread
//! over the CPU's cores. Between two such points the lanes of a block run one after
//! another, so a race does not show in the results. It is found by the record kept
//! beside each word of shared memory ([`shadow`](self)), which knows who wrote and
//! who read it, and by the clocks that say which accesses are ordered.
//!
//! The emulator reports, each as a [`Fault`] with the kernel's source line: races on shared
//! and on global memory, reads of shared memory that nothing wrote, accesses out of bounds or
//! misaligned (shared and global), accesses to where an asynchronous copy has not landed,
//! barriers that not all threads reach, collectives reached by some lanes of a warp only,
//! blocks that go on for ever, and panics.
//!
//! A launch takes [`Options`]: a seed that chooses what runs next, checks to be left out, and
//! a change of one synchronisation, so that tests can see whether it is needed.
//!
//! Bulk copies and tensor cores work beside the lanes, as agents of the same record. A
//! bulk load lands when no lane can go on without it, and is a race to read before its
//! mbarrier was waited for; a wgmma product is NaN until it is waited for, and writing to
//! its operands before is a race. Missing proxy fences and arrivals are reported too, and a
//! wait for an mbarrier that on a GPU could come a phase too late.
//!
//! A [`Recorder`] counts the actions of launches by source line, and keeps their order.
//!
//! The blocks of a cluster run together, as one block of several windows of shared memory.
//!
//! Without the feature `emulator` nothing can be launched, and neither coroutines nor a
//! thread pool are compiled.

// Without lanes nothing is launched, so that most of the checks are never called.
#![cfg_attr(not(feature = "emulator"), allow(dead_code))]

mod accesses;
mod banks;
pub(crate) mod barriers;
pub(crate) mod block;
pub(crate) mod bulk;
mod clock;
pub(crate) mod cluster;
pub(crate) mod collectives;
mod copies;
pub(crate) mod current;
mod fault;
pub(crate) mod global_memory;
#[cfg_attr(not(feature = "emulator"), path = "no_lanes.rs")]
mod lanes;
#[cfg(feature = "emulator")]
mod launch;
pub(crate) mod mbarriers;
mod options;
mod progress;
pub(crate) mod record;
pub(crate) mod recording;
pub(crate) mod registers;
mod schedule;
mod shadow;
pub(crate) mod tensor_core;
pub(crate) mod tensor_map;
#[cfg(feature = "emulator")]
mod together;
pub(crate) mod turns;

use std::ops::AddAssign;

pub use fault::{Fault, FaultKind, Site};
#[cfg(feature = "emulator")]
pub use launch::{launch, launch_with};
pub use options::{Alteration, Change, Checks, Options, Sites, SyncKind, SyncSite};

pub use record::{Action, ClusterTrace, Counts, Event, LaunchRecord, LineRecord, Recorder, Visit};

use crate::Dim3;

/// Threads of a block that a GPU allows.
pub const MAX_THREADS: u64 = 1024;
/// Blocks of a cluster that every GPU with clusters allows.
pub const MAX_CLUSTER: u32 = 8;
/// Shared memory that a block may have on the largest GPU so far (H100), in bytes.
pub const MAX_SHARED_BYTES: u32 = 232_448;

/// Extent of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks of the grid.
    pub grid: Dim3,
    /// Threads of a block.
    pub block: Dim3,
    /// Blocks of a cluster, neighbours in `grid.x`; 1 without clusters.
    pub cluster: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
}

impl Launch {
    /// Threads of all blocks of a cluster.
    fn cluster_threads(&self) -> usize {
        (self.block.count() * u64::from(self.cluster)) as usize
    }

    /// Why no GPU, or not the emulator, runs it.
    fn obstacle(&self) -> Option<String> {
        let (threads, cluster) = (self.block.count(), self.cluster);
        if threads == 0 || threads > MAX_THREADS {
            return Some(format!("a block of {threads} threads: it must have 1 to {MAX_THREADS}"));
        }
        if self.shared_bytes > MAX_SHARED_BYTES {
            let bytes = self.shared_bytes;
            return Some(format!(
                "{bytes} bytes of shared memory for a block: the most is {MAX_SHARED_BYTES}"
            ));
        }
        if !(1..=MAX_CLUSTER).contains(&cluster) || self.grid.x % cluster != 0 {
            let x = self.grid.x;
            return Some(format!(
                "clusters of {cluster} blocks in a grid of {x} along x: a cluster has 1 to \
                 {MAX_CLUSTER} blocks, and they must divide the grid"
            ));
        }
        // Warpgroups are counted over the cluster, and so are the clocks of warps.
        let all = self.cluster_threads() as u64;
        if cluster > 1 && (threads % 128 != 0 || all > MAX_THREADS) {
            return Some(format!(
                "clusters of {cluster} blocks of {threads} threads: the emulator takes whole \
                 warpgroups, and up to {MAX_THREADS} threads a cluster"
            ));
        }
        None
    }
}

/// The counts of a launch, over all its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes read from global memory, as the kernel asked for them.
    pub global_bytes_read: u64,
    /// Bytes written to global memory.
    pub global_bytes_written: u64,
    /// Bytes read from shared memory.
    pub shared_bytes_read: u64,
    /// Bytes written to shared memory.
    pub shared_bytes_written: u64,
    /// Passes over shared memory beyond the one that an access without bank conflicts
    /// takes; counted for matrix loads and 16-byte asynchronous copies.
    pub bank_conflicts: u64,
    /// Block-wide barriers passed, summed over blocks.
    pub barriers: u64,
}

impl AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        self.global_bytes_read += other.global_bytes_read;
        self.global_bytes_written += other.global_bytes_written;
        self.shared_bytes_read += other.shared_bytes_read;
        self.shared_bytes_written += other.shared_bytes_written;
        self.bank_conflicts += other.bank_conflicts;
        self.barriers += other.barriers;
    }
}
