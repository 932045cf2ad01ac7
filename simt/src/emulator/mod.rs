//! The emulator: runs a kernel's blocks on the CPU and checks what a GPU would not.
//!
//! Every lane of a block is a coroutine. A lane runs until a barrier or a warp
//! collective, where it is suspended until the others have come; blocks are spread
//! over the CPU's cores. Between two such points the lanes of a block run one after
//! another, so a race does not show in the results. It is found by the record kept
//! beside each word of shared memory ([`shadow`](self)), which knows who wrote and
//! who read it, and by the clocks that say which accesses are ordered.
//!
//! What is reported, each as a [`Fault`] with the kernel's source line: races on shared
//! memory, reads of shared memory that nothing wrote, accesses out of bounds or
//! misaligned (shared and global), accesses to where an asynchronous copy has not landed,
//! barriers that not all threads reach, collectives
//! reached by some lanes of a warp only, and panics. Races on global memory are not
//! looked for.
//!
//! Bulk copies and tensor cores work beside the lanes, as agents of the same record. A
//! bulk load lands when no lane can go on without it, and is a race to read before its
//! mbarrier was waited for; a wgmma product is NaN until it is waited for, and writing to
//! its operands before is a race. Missing proxy fences and arrivals are reported too, and a
//! wait for an mbarrier that on a GPU could come a phase too late.
//!
//! The blocks of a cluster run together, as one block of several windows of shared memory.

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
mod lanes;
pub(crate) mod mbarriers;
mod options;
mod progress;
pub(crate) mod registers;
mod schedule;
mod shadow;
pub(crate) mod tensor_core;
pub(crate) mod tensor_map;

use std::{
    cell::RefCell,
    ops::AddAssign,
    sync::atomic::{AtomicU64, Ordering},
};

use rayon::prelude::*;

use lanes::Engine;
use schedule::Random;

pub use fault::{Fault, FaultKind, Site};
pub use options::{Alteration, Change, Checks, Options, Sites, SyncKind, SyncSite};

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

/// What was counted while a launch ran, over all its blocks.
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

thread_local! {
    /// Block engines of this worker thread, with their pools of lanes: one, and as many as a
    /// launch with a seed runs in turn.
    static ENGINES: RefCell<Vec<Engine>> = const { RefCell::new(Vec::new()) };
}

/// Clusters that a launch with a seed has under way at a time.
const RESIDENT: usize = 3;
/// Steps of a cluster before another one's turn, at most.
const TURN: usize = 64;

/// Runs `kernel` once for every thread of the launch, with the default [`Options`].
///
/// # Errors
/// As [`launch_with`].
pub fn launch(launch: Launch, kernel: &(dyn Fn() + Sync)) -> Result<Stats, Fault> {
    launch_with(launch, &Options::default(), kernel)
}

/// Runs `kernel` once for every thread of the launch.
///
/// # Errors
/// The fault of the first block that had one, in grid order among those that ran, or in the
/// order of the seed; other blocks may not have run.
pub fn launch_with(
    launch: Launch,
    options: &Options,
    kernel: &(dyn Fn() + Sync),
) -> Result<Stats, Fault> {
    if let Some(reason) = launch.obstacle() {
        return Err(Fault::launch(reason));
    }
    let clusters = launch.grid.count() / u64::from(launch.cluster);
    let result = if options.seed == 0 {
        side_by_side(launch, options, clusters, kernel)
    } else {
        in_turn(launch, options, clusters, kernel)
    };
    result.map_err(|fault| *fault)
}

/// Runs clusters on all cores.
fn side_by_side(
    launch: Launch,
    options: &Options,
    clusters: u64,
    kernel: &(dyn Fn() + Sync),
) -> Result<Stats, Box<Fault>> {
    // The least index of a cluster that failed; those after it need not run.
    let failed = AtomicU64::new(u64::MAX);
    let (stats, fault) = (0..clusters)
        .into_par_iter()
        .map(|index| {
            if index > failed.load(Ordering::Relaxed) {
                return (Stats::default(), None);
            }
            let result = ENGINES.with(|engines| {
                let mut engines = engines.borrow_mut();
                if engines.is_empty() {
                    engines.push(Engine::new());
                }
                engines[0].run_block(launch, options, index, kernel)
            });
            match result {
                Ok(stats) => (stats, None),
                Err(fault) => {
                    failed.fetch_min(index, Ordering::Relaxed);
                    (Stats::default(), Some((index, fault)))
                }
            }
        })
        .reduce(
            || (Stats::default(), None),
            |(mut stats, a), (more, b)| {
                stats += more;
                let first = match (a, b) {
                    (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
                    (a, b) => a.or(b),
                };
                (stats, first)
            },
        );
    fault.map_or(Ok(stats), |(_, fault)| Err(fault))
}

/// Runs clusters on this core, a few at a time, in the order that the seed chooses.
fn in_turn(
    launch: Launch,
    options: &Options,
    clusters: u64,
    kernel: &(dyn Fn() + Sync),
) -> Result<Stats, Box<Fault>> {
    let mut random = Random::new(options.seed, u64::MAX);
    let mut waiting: Vec<u64> = (0..clusters).collect();
    let mut idle = ENGINES.take();
    while idle.len() < RESIDENT.min(waiting.len()) {
        idle.push(Engine::new());
    }
    let mut running: Vec<Engine> = Vec::new();
    let mut stats = Stats::default();
    let mut run = || loop {
        while running.len() < RESIDENT
            && !waiting.is_empty()
            && let Some(mut engine) = idle.pop()
        {
            let index = waiting.swap_remove(random.below(waiting.len()));
            let started = engine.start(launch, options, index, kernel);
            running.push(engine);
            started?;
        }
        if running.is_empty() {
            return Ok(());
        }
        let turn = random.below(running.len());
        for _ in 0..=random.below(TURN) {
            if running[turn].step()? {
                stats += running[turn].stats();
                idle.push(running.swap_remove(turn));
                break;
            }
        }
    };
    let result = run();
    // Lanes of a cluster that has not ended stand in the middle of the kernel.
    running.iter_mut().for_each(Engine::abandon);
    idle.append(&mut running);
    ENGINES.set(idle);
    result.map(|()| stats)
}
