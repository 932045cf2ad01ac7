//! The record of a launch, line by line and in order. [`Options::recorder`](super::Options) fills it;
//! a program reads it to show a kernel at work.
//!
//! Lanes of a warp run one after the other here. What they do between two points at which the warp
//! meets (a collective, a barrier) is put together again: the n-th time that each lane comes to a place
//! is one instruction of the warp.

use std::{
    ops::AddAssign,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{Launch, fault::Place};

/// Launches that record at this moment: what cannot ask its block for nothing, such as arithmetic, asks
/// this first.
static RECORDING: AtomicUsize = AtomicUsize::new(0);

/// Whether any launch records.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    RECORDING.load(Ordering::Relaxed) != 0
}

/// Keeps [`is_on`] true while a launch records.
pub(super) struct On(bool);

impl On {
    pub fn new(recorder: Option<&Recorder>) -> Self {
        let is_on = recorder.is_some();
        RECORDING.fetch_add(usize::from(is_on), Ordering::Relaxed);
        Self(is_on)
    }
}

impl Drop for On {
    fn drop(&mut self) {
        RECORDING.fetch_sub(usize::from(self.0), Ordering::Relaxed);
    }
}

/// Collects the records of launches.
#[derive(Debug, Default)]
pub struct Recorder {
    /// Clusters (blocks, where there are none) whose events are kept in order, from the first on.
    traced: u64,
    launches: Mutex<Vec<LaunchRecord>>,
}

impl Recorder {
    /// One that counts by line, and keeps the events of the first `traced` clusters of each launch in
    /// their order.
    #[must_use]
    pub fn new(traced: u64) -> Self {
        Self { traced, launches: Mutex::default() }
    }

    /// The launches so far, in the order in which they ended, and forgets them.
    #[must_use]
    pub fn take(&self) -> Vec<LaunchRecord> {
        std::mem::take(&mut self.launches.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn traces(&self, cluster: u64) -> bool {
        cluster < self.traced
    }

    pub(super) fn add(&self, launch: LaunchRecord) {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner).push(launch);
    }
}

/// The record of one launch.
#[derive(Clone, Debug)]
pub struct LaunchRecord {
    /// Its name, by [`Options::name`](super::Options::name).
    pub name: &'static str,
    /// Its extent.
    pub launch: Launch,
    /// Places of the source, in its order.
    pub lines: Vec<LineRecord>,
    /// The events of clusters that were asked for, in the order of the clusters.
    pub traces: Vec<ClusterTrace>,
}

/// The actions at one place of the source.
#[derive(Clone, Debug)]
pub struct LineRecord {
    /// Source file.
    pub file: &'static str,
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
    /// The counts.
    pub counts: Counts,
    /// How often the warps of each cluster that came here did: the cluster's index, and the number.
    pub clusters: Vec<(u64, u64)>,
}

/// The counts of a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Times that a warp executed it.
    pub warps: u64,
    /// Times that a thread did.
    pub threads: u64,
    /// Requests of warps to global memory.
    pub global_requests: u64,
    /// Sectors of 32 bytes that they touch.
    pub global_sectors: u64,
    /// Bytes that threads, or copies, asked to read.
    pub global_bytes_read: u64,
    /// Bytes that they asked to write.
    pub global_bytes_written: u64,
    /// Requests of warps to shared memory.
    pub shared_requests: u64,
    /// Passes over the 32 banks that they take.
    pub shared_passes: u64,
    /// Passes that they would take without bank conflicts.
    pub shared_passes_least: u64,
    /// Bytes read from shared memory: by threads, bulk stores and wgmma.
    pub shared_bytes_read: u64,
    /// Bytes written to it: by threads and copies.
    pub shared_bytes_written: u64,
    /// Floating-point operations of `math` by threads (`fma` is two), special functions apart.
    pub flops: u64,
    /// Exponentials, logarithms, reciprocals, hyperbolic tangents by threads.
    pub special: u64,
    /// Floating-point operations on tensor cores.
    pub tensor_flops: u64,
    /// Instructions of tensor cores: of a warp (`mma`) or a warpgroup (`wgmma`).
    pub tensor_instructions: u64,
    /// Times that a warp came to a barrier or a wait.
    pub waits: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.warps += other.warps;
        self.threads += other.threads;
        self.global_requests += other.global_requests;
        self.global_sectors += other.global_sectors;
        self.global_bytes_read += other.global_bytes_read;
        self.global_bytes_written += other.global_bytes_written;
        self.shared_requests += other.shared_requests;
        self.shared_passes += other.shared_passes;
        self.shared_passes_least += other.shared_passes_least;
        self.shared_bytes_read += other.shared_bytes_read;
        self.shared_bytes_written += other.shared_bytes_written;
        self.flops += other.flops;
        self.special += other.special;
        self.tensor_flops += other.tensor_flops;
        self.tensor_instructions += other.tensor_instructions;
        self.waits += other.waits;
    }
}

/// The events of one cluster.
#[derive(Clone, Debug)]
pub struct ClusterTrace {
    /// Its index.
    pub cluster: u64,
    /// Warps of a block.
    pub block_warps: usize,
    /// The events of each warp, counted on from block to block, in the warp's order.
    pub warps: Vec<Vec<Event>>,
}

/// The work of a warp at a place. Where a loop comes back to it before the next synchronisation, all of its
/// times are one event.
#[derive(Clone, Debug)]
pub struct Event {
    /// Source file.
    pub file: &'static str,
    /// Line.
    pub line: u32,
    /// The action.
    pub action: Action,
    /// How often.
    pub times: u64,
    /// Bytes, sectors, passes, operations.
    pub counts: Counts,
}

/// An action of a warp.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Reads global memory.
    GlobalRead,
    /// Writes global memory.
    GlobalWrite,
    /// Updates global memory atomically.
    GlobalAtomic,
    /// Reads shared memory.
    SharedRead,
    /// Writes shared memory.
    SharedWrite,
    /// Updates shared memory atomically.
    SharedAtomic,
    /// Computes with functions of `math`.
    Math,
    /// A product of `mma`.
    Mma,
    /// Exchanges registers in a collective of that name.
    Collective(&'static str),
    /// Starts copies with `cp.async`.
    CopyStart,
    /// Makes its copies a group.
    CopyCommit,
    /// Waits for its groups of copies, all but this number of the newest.
    CopyWait(u32),
    /// Waits for the lanes of the warp.
    WarpBarrier,
    /// Waits at a barrier: its place in the cluster, and how often that was opened before.
    Barrier(Visit),
    /// Arrives at a barrier without waiting.
    BarrierArrive(Visit),
    /// Waits for a phase of the mbarrier at an address; none where the barrier is fresh.
    MbarrierWait(u32, Option<u32>),
    /// Arrives in a phase of the mbarrier at an address.
    MbarrierArrive(u32, u32),
    /// Starts a bulk load whose bytes count in a phase of the mbarrier at each address.
    BulkLoad(Vec<(u32, u32)>),
    /// Starts a bulk store.
    BulkStore,
    /// Makes its stores a group.
    BulkCommit,
    /// Waits until its groups of stores have read their memory, all but this number of the newest.
    BulkWait(u32),
    /// Starts product `number` of its warpgroup.
    WgmmaStart(u64),
    /// Waits for the products of its warpgroup below that number.
    WgmmaWait(u64),
    /// Makes its writes visible to copies and wgmma.
    Fence,
}

/// A time that a barrier was, or is, opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Visit {
    /// The number of the barrier in the cluster: 16 for each block, and then the cluster's own.
    pub slot: usize,
    /// Times that it was opened before.
    pub opened: u64,
}

impl Action {
    /// Whether it synchronises or hands work to an agent: what a loop does before and after it are
    /// events of their own.
    pub(super) fn splits(&self) -> bool {
        !matches!(
            self,
            Self::GlobalRead
                | Self::GlobalWrite
                | Self::GlobalAtomic
                | Self::SharedRead
                | Self::SharedWrite
                | Self::SharedAtomic
                | Self::Math
                | Self::Mma
                | Self::Collective(_)
                | Self::CopyStart
        )
    }

    /// Whether it waits.
    pub(super) fn waits(&self) -> bool {
        matches!(
            self,
            Self::CopyWait(_)
                | Self::WarpBarrier
                | Self::Barrier(_)
                | Self::MbarrierWait(..)
                | Self::BulkWait(_)
                | Self::WgmmaWait(_)
        )
    }
}

impl LineRecord {
    pub(super) fn new(at: Place) -> Self {
        Self {
            file: at.file(),
            line: at.line(),
            column: at.column(),
            counts: Counts::default(),
            clusters: Vec::new(),
        }
    }
}
