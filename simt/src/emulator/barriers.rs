//! Barriers of a block, and what lanes know of each other's accesses after them.

use super::{
    block::{Block, LaneState},
    clock::{Clock, MAX_WARPS, Time},
    collectives::{WarpCall, collective},
    current::{checked, suspend, with},
    fault::{FaultKind, Place, Site},
};

/// Named barriers of a block.
pub(crate) const NAMED_BARRIERS: usize = 16;

/// Who has come to a named barrier, who waits there, and what they know.
pub(super) struct NamedBarrier {
    expected: u32,
    arrived: Vec<(u16, Place)>,
    waiting: Vec<u16>,
    clock: Clock,
}

impl NamedBarrier {
    pub fn new() -> Self {
        Self { expected: 0, arrived: Vec::new(), waiting: Vec::new(), clock: Clock::new(0) }
    }

    /// Forgets what another block did.
    pub fn reset(&mut self) {
        (self.expected, self.clock.floor) = (0, 0);
        self.clock.reset(0);
        self.arrived.clear();
        self.waiting.clear();
    }
}

impl Block {
    /// Fails if a barrier still waits for others when every lane has returned.
    pub(super) fn finish_barriers(&self) -> Result<(), FaultKind> {
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
    let threads = with(|b| b.threads() as u32);
    barrier(0, threads, at);
}

/// Waits at named barrier `id` of `expected` threads.
pub(crate) fn barrier(id: u32, expected: u32, at: Place) {
    let suspended = checked(|b| {
        let lane = b.current as u16;
        b.come_to_barrier(id, expected, &[lane], at)?;
        let barrier = &mut b.barriers[id as usize];
        barrier.waiting.push(lane);
        if barrier.arrived.len() < expected as usize {
            b.lanes[usize::from(lane)].state = LaneState::AtBarrier { id, at };
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
    let _: [u32; 0] = collective("arrive", u32::MAX, [id, expected], at, |call: WarpCall<'_>| {
        if let Some(other) = call.lanes().find(|&lane| call.input[lane][0] != id) {
            return Err(FaultKind::Divergence(format!(
                "lanes of warp {} arrive at barrier {id} and, lane {other}, at another",
                call.warp
            )));
        }
        let (lanes, b) = (call.lanes_of_block(), call.block);
        b.come_to_barrier(id, expected, &lanes, at)?;
        // What these lanes did so far is released now, not when the last one comes.
        let now = b.tick();
        let mut clock = std::mem::replace(&mut b.barriers[id as usize].clock, Clock::new(0));
        b.release(&mut clock, &lanes, now);
        b.barriers[id as usize].clock = clock;
        if b.barriers[id as usize].arrived.len() >= expected as usize {
            complete_barrier(b, id)?;
        }
        Ok(())
    });
}

impl Block {
    /// Counts `lanes` at a barrier.
    fn come_to_barrier(
        &mut self,
        id: u32,
        expected: u32,
        lanes: &[u16],
        at: Place,
    ) -> Result<(), FaultKind> {
        if id as usize >= NAMED_BARRIERS || expected == 0 || expected as usize > self.threads() {
            return Err(FaultKind::Misuse {
                message: format!(
                    "barrier {id} of {expected} threads: there are barriers 0 to {} of 1 to {} threads",
                    NAMED_BARRIERS - 1,
                    self.threads()
                ),
                this: self.site(at),
            });
        }
        let this = self.site(at);
        let barrier = &mut self.barriers[id as usize];
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
        barrier.arrived.extend(lanes.iter().map(|&lane| (lane, at)));
        Ok(())
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
    if waiting.len() == b.threads() {
        b.stats.barriers += 1;
        b.synchronise(&waiting);
    } else {
        let now = b.tick();
        // Those that only arrived have released what they did before.
        b.release(&mut clock, &waiting, now);
        for &lane in &waiting {
            b.lanes[usize::from(lane)].clock.join(&clock);
        }
    }
    for lane in waiting {
        b.lanes[usize::from(lane)].state = LaneState::Ready;
    }
    Ok(())
}
