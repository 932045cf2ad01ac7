//! Barriers of a block and of a cluster, and what lanes know of each other's accesses after them.

use std::fmt;

use super::{
    block::{Block, LaneState},
    clock::{Clock, MAX_WARPS, Time},
    collectives::{WarpCall, collective},
    current::{checked, left_out, suspend, with},
    fault::{FaultKind, Place, Site},
    options::SyncKind,
    record::{Action, Counts, Visit},
};
use crate::hardware::LANES;

/// Named barriers of a block.
const NAMED_BARRIERS: usize = 16;

/// Where the barrier of the cluster stands in [`Block::barriers`]: after its blocks' barriers.
pub(super) fn cluster_barrier(blocks: usize) -> usize {
    blocks * NAMED_BARRIERS
}

/// The barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierId {
    /// One of a block's, by the block's rank in its cluster.
    Named { rank: usize, number: u32 },
    /// The barrier of the cluster.
    Cluster,
}

impl fmt::Display for BarrierId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named { rank: 0, number } => write!(f, "barrier {number}"),
            Self::Named { rank, number } => write!(f, "barrier {number} of block {rank}"),
            Self::Cluster => f.write_str("the cluster's barrier"),
        }
    }
}

/// Who has come to a named barrier, who waits there, and what they know.
pub(super) struct NamedBarrier {
    expected: u32,
    arrived: Vec<(u16, Place)>,
    waiting: Vec<u16>,
    clock: Clock,
    /// Times that it was opened.
    opened: u64,
}

impl NamedBarrier {
    pub fn new() -> Self {
        Self {
            expected: 0,
            arrived: Vec::new(),
            waiting: Vec::new(),
            clock: Clock::new(0),
            opened: 0,
        }
    }

    /// Forgets what another block did.
    pub fn reset(&mut self) {
        (self.expected, self.clock.floor, self.opened) = (0, 0, 0);
        self.clock.reset(0);
        self.arrived.clear();
        self.waiting.clear();
    }
}

impl Block {
    /// Fails if a barrier still waits for others when every lane has returned.
    pub(super) fn finish_barriers(&self) -> Result<(), FaultKind> {
        for (slot, barrier) in self.barriers.iter().enumerate() {
            if let Some(&(lane, at)) = barrier.arrived.first() {
                return Err(FaultKind::Misuse {
                    message: format!(
                        "the kernel ended with {} of {} threads arrived at named barrier {}",
                        barrier.arrived.len(),
                        barrier.expected,
                        slot % NAMED_BARRIERS
                    ),
                    this: Site { lane: lane.into(), location: Some(at) },
                });
            }
        }
        Ok(())
    }

    /// Takes the current time for a release, and lets time go on.
    pub fn tick(&mut self) -> Time {
        let now = self.time;
        self.time += 1;
        now
    }

    /// Makes `lanes` know each other's accesses so far.
    pub(super) fn synchronise(&mut self, lanes: &[u16]) {
        let now = self.tick();
        if lanes.len() == self.threads() && !self.has_agents {
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
        if lanes.len() == self.threads() {
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

/// `bar.sync 0`: every thread of the block.
pub(crate) fn sync_threads(at: Place) {
    let threads = with(|b| b.block_threads() as u32);
    wait_at(SyncKind::Barrier, |b| BarrierId::Named { rank: b.rank(), number: 0 }, threads, at);
}

/// `barrier.cluster`: every thread of the cluster.
pub(crate) fn sync_cluster(at: Place) {
    let threads = with(|b| b.threads() as u32);
    wait_at(SyncKind::ClusterBarrier, |_| BarrierId::Cluster, threads, at);
}

/// Waits at named barrier `number` of `expected` threads.
pub(crate) fn barrier(number: u32, expected: u32, at: Place) {
    checked(|b| check_warps(b, expected, at));
    wait_at(SyncKind::Barrier, |b| BarrierId::Named { rank: b.rank(), number }, expected, at);
}

/// Checks that whole warps are expected: a barrier counts those.
fn check_warps(b: &Block, expected: u32, at: Place) -> Result<(), FaultKind> {
    if expected % LANES == 0 {
        return Ok(());
    }
    let message = format!(
        "a named barrier of {expected} threads: it needs whole warps, a multiple of {LANES}"
    );
    Err(FaultKind::Misuse { message, this: b.site(at) })
}

fn wait_at(kind: SyncKind, id: impl FnOnce(&Block) -> BarrierId, expected: u32, at: Place) {
    if left_out(kind, at) {
        return;
    }
    let suspended = checked(|b| {
        let (lane, id) = (b.current as u16, id(b));
        let slot = b.come_to_barrier(id, expected, &[lane], at)?;
        let opened = b.barriers[slot].opened;
        b.record_event(|| Action::Barrier(Visit { slot, opened }), at);
        let barrier = &mut b.barriers[slot];
        barrier.waiting.push(lane);
        if barrier.arrived.len() < expected as usize {
            b.set_state(usize::from(lane), LaneState::AtBarrier { id, at });
            return Ok(true);
        }
        complete_barrier(b, id)?;
        Ok(false)
    });
    if suspended {
        suspend();
    }
}

/// Arrives at named barrier `id` of `expected` threads, a warp at a time, as the hardware
/// does.
pub(crate) fn arrive(id: u32, expected: u32, at: Place) {
    if left_out(SyncKind::BarrierArrive, at) {
        return;
    }
    checked(|b| check_warps(b, expected, at));
    let _: [u32; 0] = collective("arrive", u32::MAX, [id, expected], at, |call: WarpCall<'_>| {
        if let Some(other) = call.lanes().find(|&lane| call.input[lane][0] != id) {
            return Err(FaultKind::Divergence(format!(
                "lanes of warp {} arrive at barrier {id} and, lane {other}, at another",
                call.warp
            )));
        }
        let (lanes, b) = (call.lanes_of_block(), call.block);
        let id = BarrierId::Named { rank: b.rank(), number: id };
        let slot = b.come_to_barrier(id, expected, &lanes, at)?;
        let (opened, together) = (b.barriers[slot].opened, (call.warp, call.mask));
        let action = Action::BarrierArrive(Visit { slot, opened });
        b.record_together(together, action, Counts::default(), at);
        // The work of these lanes so far is released now, not when the last lane comes.
        let now = b.tick();
        let mut clock = std::mem::replace(&mut b.barriers[slot].clock, Clock::new(0));
        b.release(&mut clock, &lanes, now);
        b.barriers[slot].clock = clock;
        if b.barriers[slot].arrived.len() >= expected as usize {
            complete_barrier(b, id)?;
        }
        Ok(())
    });
}

impl Block {
    /// Where a barrier stands in [`Block::barriers`].
    fn slot(&self, id: BarrierId) -> usize {
        match id {
            BarrierId::Named { rank, number } => rank * NAMED_BARRIERS + number as usize,
            BarrierId::Cluster => cluster_barrier(self.blocks()),
        }
    }

    /// Counts `lanes` at a barrier; returns where it stands.
    fn come_to_barrier(
        &mut self,
        id: BarrierId,
        expected: u32,
        lanes: &[u16],
        at: Place,
    ) -> Result<usize, FaultKind> {
        let this = self.site(at);
        let (threads, named) = match id {
            BarrierId::Named { number, .. } => (self.block_threads(), number as usize),
            BarrierId::Cluster => (self.threads(), 0),
        };
        if named >= NAMED_BARRIERS || expected == 0 || expected as usize > threads {
            let last = NAMED_BARRIERS - 1;
            let message = format!(
                "{id} of {expected} threads: there are barriers 0 to {last} of 1 to {threads} threads"
            );
            return Err(FaultKind::Misuse { message, this });
        }
        let slot = self.slot(id);
        let barrier = &mut self.barriers[slot];
        if barrier.arrived.is_empty() {
            barrier.expected = expected;
        } else if barrier.expected != expected {
            return Err(FaultKind::Misuse {
                message: format!(
                    "{id} of {expected} threads, where others came to it as one of {}",
                    barrier.expected
                ),
                this,
            });
        }
        barrier.arrived.extend(lanes.iter().map(|&lane| (lane, at)));
        Ok(slot)
    }
}

fn complete_barrier(b: &mut Block, id: BarrierId) -> Result<(), FaultKind> {
    let slot = b.slot(id);
    let barrier = &mut b.barriers[slot];
    barrier.opened += 1;
    let arrived = std::mem::take(&mut barrier.arrived);
    let waiting = std::mem::take(&mut barrier.waiting);
    let mut clock = std::mem::replace(&mut barrier.clock, Clock::new(0));
    // The threads of a warp must come to a barrier together, at the same place.
    let mut places: [Option<Place>; MAX_WARPS] = [None; MAX_WARPS];
    let mut masks = [0u32; MAX_WARPS];
    for &(lane, at) in &arrived {
        masks[usize::from(lane / 32)] |= 1 << (lane % 32);
        let first = places[usize::from(lane / 32)].get_or_insert(at);
        if *first != at {
            return Err(FaultKind::Divergence(format!(
                "threads of warp {} came to {id} at {}:{} and at {}:{}",
                lane / 32,
                first.file(),
                first.line(),
                at.file(),
                at.line()
            )));
        }
    }
    for (warp, (&mask, at)) in masks.iter().zip(places).enumerate() {
        let Some(at) = at else { continue };
        if mask != b.present(warp) {
            return Err(FaultKind::Divergence(format!(
                "lanes {mask:#010x} of warp {warp} came to {id} at {}:{} without the others",
                at.file(),
                at.line()
            )));
        }
    }
    if id == BarrierId::Cluster {
        b.release_to_cluster(&waiting);
    }
    if waiting.len() >= b.block_threads() {
        b.stats.barriers += 1;
        b.synchronise(&waiting);
    } else {
        let now = b.tick();
        // Lanes that only arrived have released their earlier work.
        b.release(&mut clock, &waiting, now);
        for &lane in &waiting {
            b.lanes[usize::from(lane)].clock.join(&clock);
        }
    }
    if b.recording.is_some() {
        let met = (0..MAX_WARPS).filter(|&warp| masks[warp] != 0);
        met.for_each(|warp| b.record_meeting(warp));
    }
    for lane in waiting {
        b.set_state(lane.into(), LaneState::Ready);
    }
    Ok(())
}
