//! The block that a worker thread runs: who its lanes are, where each one waits, its
//! shared memory and its clocks. The primitives of this crate call in here.

use std::{
    cell::Cell,
    panic::{Location, resume_unwind},
    ptr,
};

use super::{
    Launch, Stats, banks,
    bulk::BulkCopies,
    clock::{Clock, MAX_WARPS, Time},
    copies::{Copies, Copy},
    fault::{FaultKind, Site},
    lanes::{FaultPayload, LaneYielder},
    mbarriers::Mbarriers,
    shadow::{Access, SharedMemory},
    tensor_core::TensorCores,
};
use crate::Dim3;

/// Named barriers of a block.
pub(crate) const NAMED_BARRIERS: usize = 16;
/// Registers that a lane hands to a collective, at most.
pub(crate) const COLLECTIVE_REGISTERS: usize = 16;

type Place = &'static Location<'static>;

/// Whether and why a lane waits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LaneState {
    Ready,
    AtBarrier { id: u32, at: Place },
    InCollective { name: &'static str, at: Place },
    AtMbarrier { address: u32, parity: u32, at: Place },
    AtWgmma { at: Place },
    Done,
}

pub(crate) struct LaneStatus {
    pub state: LaneState,
    pub clock: Clock,
    /// Time of its last proxy fence: what it wrote up to then, copies and wgmma see.
    pub fenced: Time,
    yielder: *const LaneYielder,
}

/// Registers of the 32 lanes of a warp.
pub(crate) type WarpRegisters = [[u32; COLLECTIVE_REGISTERS]; 32];

/// A collective in the making: who has come, with what.
#[derive(Default)]
struct Collective {
    name: &'static str,
    at: Option<Place>,
    expected: u32,
    arrived: u32,
    input: WarpRegisters,
    output: WarpRegisters,
}

struct NamedBarrier {
    expected: u32,
    arrived: Vec<(u16, Place)>,
    waiting: Vec<u16>,
    clock: Clock,
}

/// One block and everything in it.
pub(crate) struct Block {
    pub grid_dim: Dim3,
    pub block_dim: Dim3,
    pub block_idx: Dim3,
    pub current: usize,
    pub lanes: Vec<LaneStatus>,
    pub shared: SharedMemory,
    pub stats: Stats,
    pub time: Time,
    pub mbarriers: Mbarriers,
    pub bulk: BulkCopies,
    pub tensor_cores: TensorCores,
    /// Whether anyone but the lanes has accessed shared memory.
    pub has_agents: bool,
    threads: usize,
    dynamic_shared_bytes: u32,
    statics: Vec<(*const u8, u32)>,
    indices: Vec<Dim3>,
    /// One collective per warp; its own box, so that it can leave while it is computed.
    warps: Vec<Box<Collective>>,
    spare: Option<Box<Collective>>,
    barriers: Vec<NamedBarrier>,
    copies: Copies,
    kernel: Option<*const (dyn Fn() + Sync)>,
}

thread_local! {
    static CURRENT: Cell<*mut Block> = const { Cell::new(ptr::null_mut()) };
    static PANIC_LOCATION: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Marks a block as the one that this thread runs, while it lives.
pub(super) struct Entered;

impl Entered {
    pub fn new(block: &mut Block) -> Self {
        CURRENT.set(block);
        Self
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(ptr::null_mut());
    }
}

pub(super) fn is_inside() -> bool {
    !CURRENT.get().is_null()
}

pub(super) fn set_panic_location(location: Option<&Location<'_>>) {
    // SAFETY: the locations that panics carry are constants of the program.
    PANIC_LOCATION.set(location.map(|l| unsafe { &*ptr::from_ref(l).cast() }));
}

pub(super) fn take_panic_location() -> Option<Place> {
    PANIC_LOCATION.take()
}

/// Calls `f` with the block that this thread runs. `f` must not suspend the lane.
#[inline]
pub(crate) fn with<R>(f: impl FnOnce(&mut Block) -> R) -> R {
    let block = CURRENT.get();
    assert!(!block.is_null(), "a GPU primitive was called outside of emulator::launch");
    // SAFETY: `Entered` keeps the pointer valid; one lane runs at a time and `f` does
    // not suspend, so that this is the only reference.
    f(unsafe { &mut *block })
}

/// Like [`with`]; an error ends the launch with that fault.
#[inline]
pub(crate) fn checked<R>(f: impl FnOnce(&mut Block) -> Result<R, FaultKind>) -> R {
    match with(f) {
        Ok(value) => value,
        Err(kind) => fail(kind),
    }
}

/// Ends the launch with a fault, by unwinding the lane.
#[cold]
pub(crate) fn fail(kind: FaultKind) -> ! {
    resume_unwind(Box::new(FaultPayload(kind)))
}

/// Suspends the current lane until the scheduler finds it ready again.
pub(crate) fn suspend() {
    let yielder = with(|b| b.lanes[b.current].yielder);
    // SAFETY: the lane's coroutine owns the yielder and is the one that runs.
    unsafe { (*yielder).suspend(()) }
}

/// Runs the kernel as the current lane.
pub(super) fn run_current_lane(yielder: &LaneYielder) {
    let kernel = with(|b| {
        b.lanes[b.current].yielder = yielder;
        b.kernel.expect("a block that runs has a kernel")
    });
    // SAFETY: the launch keeps the kernel alive until all its blocks are done.
    unsafe { (*kernel)() };
    with(|b| b.lanes[b.current].state = LaneState::Done);
}

impl Block {
    pub fn new() -> Self {
        let none = Dim3::new(0, 0, 0);
        Self {
            grid_dim: none,
            block_dim: none,
            block_idx: none,
            current: 0,
            lanes: Vec::new(),
            shared: SharedMemory::new(),
            stats: Stats::default(),
            time: 1,
            mbarriers: Mbarriers::default(),
            bulk: BulkCopies::default(),
            tensor_cores: TensorCores::default(),
            has_agents: false,
            threads: 0,
            dynamic_shared_bytes: 0,
            statics: Vec::new(),
            indices: Vec::new(),
            warps: Vec::new(),
            spare: None,
            barriers: (0..NAMED_BARRIERS)
                .map(|_| NamedBarrier {
                    expected: 0,
                    arrived: Vec::new(),
                    waiting: Vec::new(),
                    clock: Clock::new(0),
                })
                .collect(),
            copies: Copies::default(),
            kernel: None,
        }
    }

    /// Gets ready to run block `block_idx` of `launch`.
    pub fn start(&mut self, launch: Launch, block_idx: Dim3, kernel: &(dyn Fn() + Sync)) {
        // The stamp of a copy that never landed would outlive its block.
        if self.copies.reset(launch.block.count() as usize) || self.time > Time::MAX / 2 {
            self.shared.clear();
            self.time = 1;
        }
        // Time goes on from block to block, so that the record of shared memory need
        // not be wiped: what was stamped before `begin` belongs to another block.
        let begin = self.time + 1;
        self.time = begin;
        self.shared.reset(launch.shared_bytes, begin);
        self.dynamic_shared_bytes = launch.shared_bytes;
        self.statics.clear();
        self.stats = Stats::default();
        self.grid_dim = launch.grid;
        self.block_idx = block_idx;
        self.threads = launch.block.count() as usize;
        if self.block_dim != launch.block {
            self.block_dim = launch.block;
            self.indices = (0..launch.block.count()).map(|i| launch.block.unravel(i)).collect();
        }
        while self.lanes.len() < self.threads {
            self.lanes.push(LaneStatus {
                state: LaneState::Done,
                clock: Clock::new(0),
                fenced: 0,
                yielder: ptr::null(),
            });
        }
        for lane in &mut self.lanes[..self.threads] {
            lane.state = LaneState::Ready;
            lane.clock.reset(begin - 1);
            lane.fenced = 0;
        }
        self.mbarriers.reset();
        self.bulk.reset();
        self.tensor_cores.reset(self.threads);
        self.has_agents = false;
        let warps = self.threads.div_ceil(32);
        while self.warps.len() < warps {
            self.warps.push(Box::default());
        }
        for warp in &mut self.warps {
            (warp.at, warp.expected, warp.arrived) = (None, 0, 0);
        }
        for barrier in &mut self.barriers {
            (barrier.expected, barrier.clock.floor) = (0, 0);
            barrier.clock.reset(0);
            barrier.arrived.clear();
            barrier.waiting.clear();
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
        self.indices[self.current]
    }

    #[inline]
    pub fn warp(&self) -> usize {
        self.current / 32
    }

    /// Threads of the block.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Mask of the lanes that warp `warp` has: all but in a block's last warp.
    pub fn present(&self, warp: usize) -> u32 {
        match self.threads - warp * 32 {
            n if n >= 32 => u32::MAX,
            n => (1 << n) - 1,
        }
    }

    pub fn all_done(&self) -> bool {
        self.lanes[..self.threads].iter().all(|l| matches!(l.state, LaneState::Done))
    }

    /// Checks what must hold when every lane has returned.
    pub fn finish(&mut self) -> Result<(), FaultKind> {
        for (id, barrier) in self.barriers.iter().enumerate() {
            if let Some(&(lane, at)) = barrier.arrived.first() {
                return Err(FaultKind::Misuse {
                    message: format!(
                        "the kernel ended with {} of {} threads arrived at named barrier {id}",
                        barrier.arrived.len(),
                        barrier.expected
                    ),
                    this: Site { lane: lane.into(), location: Some(at) },
                });
            }
        }
        if let Some((lane, at)) = self.copies.unfinished() {
            return Err(FaultKind::Misuse {
                message: "the kernel ended while an asynchronous copy was on its way: wait for \
                          every group"
                    .into(),
                this: Site { lane, location: Some(at) },
            });
        }
        self.finish_bulk()?;
        self.finish_products()
    }

    /// Makes what the current lane has written so far visible to copies and wgmma.
    pub fn fence_proxy_async(&mut self) {
        self.lanes[self.current].fenced = self.tick();
    }

    /// Describes why no lane can go on.
    pub fn deadlock(&self) -> FaultKind {
        let mut text = String::from("no thread can go on");
        let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
        for (lane, status) in self.lanes[..self.threads].iter().enumerate() {
            let what = match status.state {
                LaneState::Ready => "ready".to_owned(),
                LaneState::Done => "done".to_owned(),
                LaneState::AtBarrier { id, at } => {
                    format!("wait at barrier {id} at {}:{}", at.file(), at.line())
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
        FaultKind::Divergence(text)
    }

    /// The current lane at `at`, for a fault's message.
    #[inline]
    pub fn site(&self, at: Place) -> Site {
        Site { lane: self.current as u32, location: Some(at) }
    }

    /// Checks and records a read of shared memory; returns where the bytes are.
    #[inline]
    pub fn shared_read(
        &mut self,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*const u8, FaultKind> {
        self.shared_bounds(offset, bytes, "read", at)?;
        self.stats.shared_bytes_read += u64::from(bytes);
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.read(offset, bytes, by)?;
        Ok(self.shared.at(offset))
    }

    /// Checks and records a write of shared memory; returns where the bytes go.
    #[inline]
    pub fn shared_write(
        &mut self,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*mut u8, FaultKind> {
        self.shared_bounds(offset, bytes, "write", at)?;
        self.stats.shared_bytes_written += u64::from(bytes);
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.write(offset, bytes, by)?;
        Ok(self.shared.at(offset))
    }

    /// Starts an asynchronous copy of 16 bytes from global address `source`, or of zeros.
    pub fn copy_async(
        &mut self,
        offset: u32,
        source: Option<u64>,
        at: Place,
    ) -> Result<(), FaultKind> {
        let bytes = Copy::BYTES;
        self.shared_bounds(offset, bytes, "asynchronous copy", at)?;
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.pend(offset, bytes, by)?;
        let (lane, present) = (self.current, self.present(self.warp()));
        if let Some(offsets) =
            self.copies.start(lane, present.count_ones(), Copy { offset, source, at })
        {
            self.stats.bank_conflicts += banks::conflicts(&offsets);
        }
        Ok(())
    }

    /// Makes the current lane's copies since the last commit a group.
    pub fn commit_copies(&mut self) {
        self.copies.commit(self.current);
    }

    /// Lets the current lane's groups land, all but the newest `pending`.
    pub fn wait_copies(&mut self, pending: usize) {
        let (lane, now) = (self.current as u16, self.time);
        for copy in self.copies.finish(self.current, pending) {
            self.stats.shared_bytes_written += u64::from(Copy::BYTES);
            self.shared.land(copy.offset, Copy::BYTES, lane, now);
            let to = self.shared.at(copy.offset);
            match copy.source {
                // SAFETY: bounds were checked on both sides when the copy was started.
                Some(source) => unsafe {
                    ptr::copy_nonoverlapping(source as *const u8, to, Copy::BYTES as usize);
                },
                // SAFETY: as above.
                None => unsafe { ptr::write_bytes(to, 0, Copy::BYTES as usize) },
            }
        }
    }

    /// Counts the bank conflicts of a warp that moves 16 bytes at each of `offsets`.
    pub fn count_conflicts(&mut self, offsets: &[u32]) {
        self.stats.bank_conflicts += banks::conflicts(offsets);
    }

    /// Calls `f` in the name of another lane of the block.
    pub fn as_lane<R>(&mut self, lane: usize, f: impl FnOnce(&mut Self) -> R) -> R {
        let current = std::mem::replace(&mut self.current, lane);
        let result = f(self);
        self.current = current;
        result
    }

    /// Checks and records an atomic update of shared memory; returns where the bytes are.
    pub fn shared_atomic(
        &mut self,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*mut u8, FaultKind> {
        self.shared_bounds(offset, bytes, "atomic", at)?;
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.atomic(offset, bytes, by)?;
        Ok(self.shared.at(offset))
    }

    #[inline]
    fn shared_bounds(
        &self,
        offset: u32,
        bytes: u32,
        what: &'static str,
        at: Place,
    ) -> Result<(), FaultKind> {
        if offset % bytes.next_power_of_two() != 0 {
            return Err(FaultKind::Misaligned {
                space: "shared",
                what,
                address: offset.into(),
                bytes,
                this: self.site(at),
            });
        }
        if u64::from(offset) + u64::from(bytes) > u64::from(self.shared.len()) {
            return Err(FaultKind::OutOfBounds {
                space: "shared",
                what,
                index: offset.into(),
                len: self.shared.len().into(),
                this: self.site(at),
            });
        }
        Ok(())
    }

    /// Bytes of dynamic shared memory that the launch gave.
    pub fn dynamic_shared_bytes(&self) -> u32 {
        self.dynamic_shared_bytes
    }

    /// Offset of the static shared array that `key` stands for.
    pub fn static_shared(&mut self, key: *const u8, bytes: u32) -> u32 {
        if let Some(&(_, offset)) = self.statics.iter().find(|(k, _)| *k == key) {
            return offset;
        }
        let offset = self.shared.extend(bytes);
        self.statics.push((key, offset));
        offset
    }

    /// Takes the current time for a release, and lets time go on.
    pub fn tick(&mut self) -> Time {
        let now = self.time;
        self.time += 1;
        now
    }

    /// Makes `lanes` know each other's accesses so far.
    fn synchronise(&mut self, lanes: &[u16]) {
        let now = self.tick();
        if lanes.len() == self.threads && !self.has_agents {
            for &lane in lanes {
                self.lanes[usize::from(lane)].clock.floor = now;
            }
            return;
        }
        let mut joined = Clock::new(0);
        self.release(&mut joined, lanes, now);
        for &lane in lanes {
            self.lanes[usize::from(lane)].clock.join(&joined);
        }
        if lanes.len() == self.threads {
            for &lane in lanes {
                self.lanes[usize::from(lane)].clock.floor = now;
            }
        }
    }

    /// Adds to `clock` what `lanes` know and did up to `now`.
    pub fn release(&self, clock: &mut Clock, lanes: &[u16], now: Time) {
        let mut of_warp = [0u32; MAX_WARPS];
        for &lane in lanes {
            clock.join(&self.lanes[usize::from(lane)].clock);
            of_warp[usize::from(lane / 32)] |= 1 << (lane % 32);
        }
        for (warp, &mask) in of_warp.iter().enumerate() {
            if mask == 0 {
                continue;
            }
            if mask == self.present(warp) {
                clock.warps[warp] = clock.warps[warp].max(now);
            } else {
                for lane in (0..32).filter(|l| mask >> l & 1 == 1) {
                    clock.learn_lane((warp * 32) as u16 + lane, now);
                }
            }
        }
    }
}

/// The current lane as the maker of an access.
#[inline]
fn access(lanes: &[LaneStatus], current: usize, now: Time, location: Place) -> Access<'_> {
    Access { lane: current as u16, now, clock: &lanes[current].clock, location }
}

/// `bar.sync 0`: every thread of the block.
pub(crate) fn sync_threads(at: Place) {
    let threads = with(|b| b.threads() as u32);
    barrier(0, threads, true, at);
}

/// Arrives at named barrier `id` of `expected` threads, and waits there if `wait`.
pub(crate) fn barrier(id: u32, expected: u32, wait: bool, at: Place) {
    let suspended = checked(|b| {
        let lane = b.current as u16;
        if id as usize >= NAMED_BARRIERS || expected == 0 || expected as usize > b.threads() {
            return Err(FaultKind::Misuse {
                message: format!(
                    "barrier {id} of {expected} threads: there are barriers 0 to {} of 1 to {} threads",
                    NAMED_BARRIERS - 1,
                    b.threads()
                ),
                this: b.site(at),
            });
        }
        let this = b.site(at);
        let barrier = &mut b.barriers[id as usize];
        if barrier.arrived.is_empty() {
            barrier.expected = expected;
        } else if barrier.expected != expected {
            return Err(FaultKind::Misuse {
                message: format!(
                    "barrier {id} of {expected} threads, where others came to it as one of {}",
                    barrier.expected
                ),
                this,
            });
        }
        barrier.arrived.push((lane, at));
        if wait {
            barrier.waiting.push(lane);
        }
        if barrier.arrived.len() < expected as usize {
            if wait {
                b.lanes[usize::from(lane)].state = LaneState::AtBarrier { id, at };
            } else {
                // What this lane did so far is released now, not when the last one comes.
                let now = b.tick();
                let mut clock =
                    std::mem::replace(&mut b.barriers[id as usize].clock, Clock::new(0));
                b.release(&mut clock, &[lane], now);
                b.barriers[id as usize].clock = clock;
            }
            return Ok(wait);
        }
        complete_barrier(b, id)?;
        Ok(false)
    });
    if suspended {
        suspend();
    }
}

fn complete_barrier(b: &mut Block, id: u32) -> Result<(), FaultKind> {
    let barrier = &mut b.barriers[id as usize];
    let arrived = std::mem::take(&mut barrier.arrived);
    let waiting = std::mem::take(&mut barrier.waiting);
    let mut clock = std::mem::replace(&mut barrier.clock, Clock::new(0));
    // The threads of a warp must come to a barrier at the same place.
    let mut places: [Option<Place>; MAX_WARPS] = [None; MAX_WARPS];
    for &(lane, at) in &arrived {
        let first = places[usize::from(lane / 32)].get_or_insert(at);
        if *first != at {
            return Err(FaultKind::Divergence(format!(
                "threads of warp {} came to barrier {id} at {}:{} and at {}:{}",
                lane / 32,
                first.file(),
                first.line(),
                at.file(),
                at.line()
            )));
        }
    }
    let lanes: Vec<u16> = arrived.iter().map(|&(lane, _)| lane).collect();
    if waiting.len() == b.threads {
        b.stats.barriers += 1;
        b.synchronise(&waiting);
    } else {
        let now = b.tick();
        b.release(&mut clock, &lanes, now);
        for &lane in &waiting {
            b.lanes[usize::from(lane)].clock.join(&clock);
        }
    }
    for lane in waiting {
        b.lanes[usize::from(lane)].state = LaneState::Ready;
    }
    Ok(())
}

/// What the last lane of a collective does for all.
pub(crate) struct WarpCall<'a> {
    /// The block.
    pub block: &'a mut Block,
    /// Index of the warp in the block.
    pub warp: usize,
    /// Lanes that take part.
    pub mask: u32,
    /// What each lane brought.
    pub input: &'a WarpRegisters,
    /// What each lane gets.
    pub output: &'a mut WarpRegisters,
}

/// A collective of the lanes of `mask` in the current warp: each brings registers, the
/// last to come computes what all of them get.
pub(crate) fn collective<const I: usize, const O: usize>(
    name: &'static str,
    mask: u32,
    input: [u32; I],
    at: Place,
    compute: impl FnOnce(WarpCall<'_>) -> Result<(), FaultKind>,
) -> [u32; O] {
    const { assert!(I <= COLLECTIVE_REGISTERS && O <= COLLECTIVE_REGISTERS) };
    let suspended = checked(|b| {
        let (lane, warp) = (b.current % 32, b.warp());
        let mask = mask & b.present(warp);
        let this = b.site(at);
        if mask >> lane & 1 == 0 {
            return Err(FaultKind::Misuse {
                message: format!(
                    "{name} with the mask {mask:#010x}, which lacks lane {lane} itself"
                ),
                this,
            });
        }
        let call = &mut b.warps[warp];
        if call.arrived == 0 {
            (call.name, call.at, call.expected) = (name, Some(at), mask);
        } else if call.name != name || call.expected != mask || call.at != Some(at) {
            let other = call.at.map_or(String::new(), |p| format!(" at {}:{}", p.file(), p.line()));
            return Err(FaultKind::Divergence(format!(
                "{this} is in {name} with mask {mask:#010x} while lanes {:#010x} of its warp are in {}{other} with mask {:#010x}",
                call.arrived, call.name, call.expected
            )));
        }
        call.arrived |= 1 << lane;
        call.input[lane][..I].copy_from_slice(&input);
        if call.arrived != mask {
            b.lanes[b.current].state = LaneState::InCollective { name, at };
            return Ok(true);
        }
        call.arrived = 0;
        // The registers leave the block while `compute` has all of it.
        let spare = b.spare.take().unwrap_or_default();
        let mut call = std::mem::replace(&mut b.warps[warp], spare);
        let result = compute(WarpCall {
            block: b,
            warp,
            mask,
            input: &call.input,
            output: &mut call.output,
        });
        b.spare = Some(std::mem::replace(&mut b.warps[warp], call));
        for other in (0..32).filter(|l| mask >> l & 1 == 1) {
            b.lanes[warp * 32 + other].state = LaneState::Ready;
        }
        result.map(|()| false)
    });
    if suspended {
        suspend();
    }
    with(|b| {
        let mut registers = [0; O];
        registers.copy_from_slice(&b.warps[b.warp()].output[b.current % 32][..O]);
        registers
    })
}

impl WarpCall<'_> {
    /// Indices in the warp of the lanes that take part.
    pub fn lanes(&self) -> impl Iterator<Item = usize> + use<> {
        let mask = self.mask;
        (0..32).filter(move |l| mask >> l & 1 == 1)
    }

    /// Orders the memory accesses of the lanes that take part.
    pub fn synchronise(&mut self) {
        let base = (self.warp * 32) as u16;
        let lanes: Vec<u16> = self.lanes().map(|l| base + l as u16).collect();
        self.block.synchronise(&lanes);
    }
}
