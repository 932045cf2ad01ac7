//! A block, or the blocks of a cluster: who the lanes are, where each one waits, their
//! shared memory and their clocks; how they start and end.
//!
//! The blocks of a cluster run as one: their lanes are counted on from block to block, and
//! so are the windows of their shared memory ([`shadow::WINDOW`](super::shadow::WINDOW)).

use std::ptr;

use super::{
    Launch, Options, Stats,
    barriers::{BarrierId, NamedBarrier, cluster_barrier},
    bulk::BulkCopies,
    clock::{Clock, Time},
    cluster::RemoteAccess,
    collectives::Collective,
    copies::Copies,
    fault::{FaultKind, Place, Site},
    global_memory::GlobalMemory,
    lanes::LaneYielder,
    mbarriers::Mbarriers,
    options::{Alteration, SyncKind, SyncSite},
    progress::Visits,
    recording::Recording,
    registers::Registers,
    shadow::SharedMemory,
    tensor_core::TensorCores,
    turns::{self, Waiting},
};
use crate::Dim3;

/// Whether and why a lane waits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LaneState {
    Ready,
    AtBarrier { id: BarrierId, at: Place },
    InCollective { name: &'static str, at: Place },
    AtMbarrier { address: u32, parity: u32, at: Place },
    AtTurn { address: u64, turn: u32, at: Place },
    AtWgmma { at: Place },
    AtRegisters { need: u32, at: Place },
    Done,
}

pub(crate) struct LaneStatus {
    /// Changed by [`Block::set_state`].
    pub state: LaneState,
    pub clock: Clock,
    /// Times of its proxy fences: what it wrote up to one, copies and wgmma see, if whoever
    /// starts them knows of the fence.
    pub fences: Vec<Time>,
    /// The mbarrier whose phase it has seen last.
    pub last_wait: Option<u32>,
    pub(super) yielder: *const LaneYielder,
}

impl LaneStatus {
    /// The last of its proxy fences that `clock` knows of; 0 if there is none.
    pub fn known_fence(&self, lane: u16, clock: &Clock) -> Time {
        let known = |&&time: &&Time| clock.knows(lane, usize::from(lane / 32), time);
        self.fences.iter().rev().find(known).copied().unwrap_or(0)
    }
}

/// Up to when copies and wgmma of the block of that rank, started by who knows `clock`, see what
/// `lane` wrote, of blocks of `threads` threads: never, if it is a lane of another block, since
/// its fence is for the memory of its own.
pub(crate) fn fenced(
    lanes: &[LaneStatus],
    threads: usize,
    rank: usize,
    clock: &Clock,
    lane: u16,
) -> Time {
    let is_own = usize::from(lane) / threads == rank;
    if is_own { lanes[usize::from(lane)].known_fence(lane, clock) } else { 0 }
}

/// The blocks of a cluster (one, unless the launch has clusters) and everything in them.
pub(crate) struct Block {
    pub grid_dim: Dim3,
    pub block_dim: Dim3,
    /// Index of the first block.
    first_block: Dim3,
    pub current: usize,
    pub lanes: Vec<LaneStatus>,
    /// A mask of the ready lanes of each warp.
    pub ready: Vec<u32>,
    pub options: Options,
    /// Whether `options` has something to do with synchronisations.
    watches_sites: bool,
    pub shared: SharedMemory,
    pub(super) global: GlobalMemory,
    pub stats: Stats,
    pub time: Time,
    pub mbarriers: Mbarriers,
    pub bulk: BulkCopies,
    pub tensor_cores: TensorCores,
    pub(super) registers: Registers,
    /// Lanes that wait for turns.
    pub(super) turns: Vec<Waiting>,
    /// Accesses and switches since the last progress.
    pub(super) idle: u64,
    pub(super) visits: Visits,
    /// The launch's record of this cluster.
    pub(super) recording: Option<Box<Recording>>,
    /// Whether anyone but the lanes has accessed shared memory.
    pub has_agents: bool,
    /// Blocks of the cluster.
    blocks: usize,
    /// Threads of each.
    block_threads: usize,
    pub(super) dynamic_shared_bytes: u32,
    pub(super) statics: Vec<(*const u8, u32)>,
    indices: Vec<Dim3>,
    /// One collective per warp; its own box, so that it can leave while it is computed.
    pub(super) warps: Vec<Box<Collective>>,
    pub(super) spare: Option<Box<Collective>>,
    pub(super) barriers: Vec<NamedBarrier>,
    pub(super) copies: Copies,
    /// The last access of each lane to the shared memory of each other block.
    pub(super) remote: Vec<RemoteAccess>,
    /// Accesses that lanes have released to other blocks.
    pub(super) released: Clock,
    pub(super) kernel: Option<*const (dyn Fn() + Sync)>,
}

impl Block {
    pub fn new() -> Self {
        let none = Dim3::new(0, 0, 0);
        Self {
            grid_dim: none,
            block_dim: none,
            first_block: none,
            current: 0,
            lanes: Vec::new(),
            ready: Vec::new(),
            options: Options::default(),
            watches_sites: false,
            shared: SharedMemory::new(),
            global: GlobalMemory::default(),
            stats: Stats::default(),
            time: 1,
            mbarriers: Mbarriers::default(),
            bulk: BulkCopies::default(),
            tensor_cores: TensorCores::default(),
            registers: Registers::default(),
            turns: Vec::new(),
            idle: 0,
            visits: Visits::default(),
            recording: None,
            has_agents: false,
            blocks: 1,
            block_threads: 0,
            dynamic_shared_bytes: 0,
            statics: Vec::new(),
            indices: Vec::new(),
            warps: Vec::new(),
            spare: None,
            barriers: Vec::new(),
            copies: Copies::default(),
            remote: Vec::new(),
            released: Clock::new(0),
            kernel: None,
        }
    }

    /// Gets ready to run the cluster of `launch` that begins with block `first_block`.
    pub fn start(
        &mut self,
        launch: Launch,
        options: &Options,
        first_block: Dim3,
        kernel: &(dyn Fn() + Sync),
    ) {
        self.options = options.clone();
        self.watches_sites = options.change.is_some() || options.sites.is_some();
        self.idle = 0;
        let threads = launch.cluster_threads();
        // The stamp of a copy that never landed would outlive its block.
        if self.copies.reset(threads) || self.time > Time::MAX / 2 {
            self.shared.clear();
            self.global.clear();
            self.time = 1;
        }
        // Time goes on from block to block, so that the record of shared memory need
        // not be wiped: what was stamped before `begin` belongs to another block.
        let begin = self.time + 1;
        self.time = begin;
        let warps = (launch.block.count() as usize).div_ceil(32);
        self.shared.reset(launch.cluster, warps, launch.shared_bytes, begin);
        self.global.reset(begin, warps * launch.cluster as usize);
        self.dynamic_shared_bytes = launch.shared_bytes;
        self.statics.clear();
        self.stats = Stats::default();
        self.grid_dim = launch.grid;
        self.first_block = first_block;
        self.blocks = launch.cluster as usize;
        self.block_threads = launch.block.count() as usize;
        if self.block_dim != launch.block {
            self.block_dim = launch.block;
            self.indices = (0..launch.block.count()).map(|i| launch.block.unravel(i)).collect();
        }
        while self.lanes.len() < threads {
            self.lanes.push(LaneStatus {
                state: LaneState::Done,
                clock: Clock::new(0),
                fences: Vec::new(),
                last_wait: None,
                yielder: ptr::null(),
            });
        }
        for lane in &mut self.lanes[..threads] {
            lane.state = LaneState::Ready;
            lane.clock.reset(begin - 1);
            lane.fences.clear();
            lane.last_wait = None;
        }
        self.ready.clear();
        self.ready.extend((0..threads.div_ceil(32)).map(|warp| match threads - warp * 32 {
            n if n >= 32 => u32::MAX,
            n => (1 << n) - 1,
        }));
        self.registers.reset(self.blocks, self.block_threads);
        self.turns.clear();
        self.mbarriers.reset();
        self.bulk.reset();
        self.tensor_cores.reset(threads);
        self.remote.clear();
        self.released.reset(0);
        self.has_agents = false;
        let warps = threads.div_ceil(32);
        while self.warps.len() < warps {
            self.warps.push(Box::default());
        }
        for warp in &mut self.warps {
            warp.reset();
        }
        self.barriers.resize_with(cluster_barrier(self.blocks) + 1, NamedBarrier::new);
        for barrier in &mut self.barriers {
            barrier.reset();
        }
        // SAFETY: only the lifetime changes; `run_block` does not return before every
        // lane is done with the kernel or dropped.
        self.kernel = Some(unsafe {
            std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync)>(
                ptr::from_ref(kernel),
            )
        });
    }

    #[inline]
    pub fn thread_idx(&self) -> Dim3 {
        self.indices[self.current - self.rank() * self.block_threads]
    }

    /// Index of the current lane's block in the grid.
    #[inline]
    pub fn block_idx(&self) -> Dim3 {
        let first = self.first_block;
        Dim3::new(first.x + self.rank() as u32, first.y, first.z)
    }

    /// Rank in the cluster of the current lane's block.
    #[inline]
    pub fn rank(&self) -> usize {
        // Asked at every access: no division where there is one block only.
        if self.blocks == 1 { 0 } else { self.current / self.block_threads }
    }

    /// Blocks of the cluster.
    #[inline]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    #[inline]
    pub fn warp(&self) -> usize {
        self.current / 32
    }

    /// Threads of the cluster.
    #[inline]
    pub fn threads(&self) -> usize {
        self.blocks * self.block_threads
    }

    /// Threads of each block.
    #[inline]
    pub fn block_threads(&self) -> usize {
        self.block_threads
    }

    /// Mask of the lanes that warp `warp` has: all but in a block's last warp.
    #[inline]
    pub fn present(&self, warp: usize) -> u32 {
        match self.threads() - warp * 32 {
            n if n >= 32 => u32::MAX,
            n => (1 << n) - 1,
        }
    }

    /// Notes the action of a lane.
    #[inline]
    pub fn set_state(&mut self, lane: usize, state: LaneState) {
        let bit = 1 << (lane % 32);
        match state {
            LaneState::Ready => self.ready[lane / 32] |= bit,
            _ => self.ready[lane / 32] &= !bit,
        }
        self.lanes[lane].state = state;
    }

    /// The launch's change to the synchronisation of that kind at `at`.
    #[inline]
    pub fn alteration(&self, kind: SyncKind, at: Place) -> Option<Alteration> {
        if self.watches_sites { self.watched_site(kind, at) } else { None }
    }

    #[cold]
    fn watched_site(&self, kind: SyncKind, at: Place) -> Option<Alteration> {
        let site = SyncSite::new(kind, at);
        if let Some(sites) = &self.options.sites {
            sites.note(site);
        }
        self.options.change.filter(|change| change.site == site).map(|change| change.alteration)
    }

    /// Counts an access, or a switch between lanes.
    #[inline]
    pub fn count_step(&mut self, at: Option<Place>) -> Result<(), FaultKind> {
        self.idle += 1;
        if self.idle > self.options.budget { self.spins(at) } else { Ok(()) }
    }

    pub fn all_done(&self) -> bool {
        self.lanes[..self.threads()].iter().all(|l| matches!(l.state, LaneState::Done))
    }

    /// Checks the conditions that must hold when every lane has returned.
    pub fn finish(&mut self) -> Result<(), FaultKind> {
        self.finish_barriers()?;
        if let Some((lane, at)) = self.copies.unfinished() {
            return Err(FaultKind::Misuse {
                message: "the kernel ended while an asynchronous copy was on its way: wait for \
                          every group"
                    .into(),
                this: Site { lane, location: Some(at) },
            });
        }
        self.finish_bulk()?;
        self.finish_products()?;
        self.finish_registers()?;
        self.finish_remote()
    }

    /// Makes the current lane's writes so far visible to copies and wgmma.
    pub fn fence_proxy_async(&mut self) {
        let now = self.tick();
        self.lanes[self.current].fences.push(now);
    }

    /// Describes why no lane can go on.
    pub fn deadlock(&self) -> FaultKind {
        FaultKind::Divergence(format!("no thread can go on{}", self.what_lanes_do()))
    }

    /// The places of all lanes, in groups of lanes that do the same.
    pub(super) fn what_lanes_do(&self) -> String {
        let mut text = String::new();
        let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
        for (lane, status) in self.lanes[..self.threads()].iter().enumerate() {
            let what = match status.state {
                LaneState::Ready => "ready".to_owned(),
                LaneState::Done => "done".to_owned(),
                LaneState::AtBarrier { id, at } => {
                    format!("wait at {id} at {}:{}", at.file(), at.line())
                }
                LaneState::InCollective { name, at } => {
                    format!("wait in {name} at {}:{}", at.file(), at.line())
                }
                LaneState::AtMbarrier { address, parity, at } => format!(
                    "wait for parity {parity} at {}:{} of the mbarrier at byte {address}{}",
                    at.file(),
                    at.line(),
                    self.mbarriers.describe(address)
                ),
                LaneState::AtRegisters { need, at } => format!(
                    "wait at {}:{} for {need} registers a warp, where block {} has {} left",
                    at.file(),
                    at.line(),
                    lane / self.block_threads,
                    self.free_registers(lane / self.block_threads)
                ),
                LaneState::AtTurn { address, turn, at } => format!(
                    "wait at {}:{} for {}",
                    at.file(),
                    at.line(),
                    turns::describe(address, turn)
                ),
                LaneState::AtWgmma { at } => format!(
                    "wait at {}:{} for a wgmma product that not all of their warpgroup asked for",
                    at.file(),
                    at.line()
                ),
            };
            match groups.iter_mut().find(|(w, _)| *w == what) {
                Some((_, lanes)) => lanes.push(lane),
                None => groups.push((what, vec![lane])),
            }
        }
        for (what, lanes) in groups {
            let (first, last) = (lanes[0], lanes[lanes.len() - 1]);
            text += &format!("; {} thread(s) ({first} to {last}) {what}", lanes.len());
        }
        text
    }

    /// The current lane at `at`, for a fault's message.
    #[inline]
    pub fn site(&self, at: Place) -> Site {
        Site { lane: self.current as u32, location: Some(at) }
    }

    /// Calls `f` in the name of another lane of the block.
    pub fn as_lane<R>(&mut self, lane: usize, f: impl FnOnce(&mut Self) -> R) -> R {
        let current = std::mem::replace(&mut self.current, lane);
        let result = f(self);
        self.current = current;
        result
    }
}
