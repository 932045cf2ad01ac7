//! Mbarriers: phases that count arrivals and bytes, and the lanes that wait for them.

use super::{
    block::{Block, LaneState},
    clock::{Agent, Clock, Time, warpgroup_of},
    current,
    fault::{FaultKind, Place, Site},
    options::{Alteration, SyncKind},
    record::Action,
};
use crate::hardware::MBARRIER_BYTES;

/// Mbarriers that the blocks of a cluster may have together under the emulator: each is an
/// agent of its own.
pub(crate) const MAX_MBARRIERS: usize = Agent::MBARRIERS;

/// To whom an arrival releases, and from whom a wait acquires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Block,
    Cluster,
}

struct Mbarrier {
    address: u32,
    arrivals: u32,
    /// Arrivals that the current phase still waits for.
    pending: u32,
    /// Bytes announced less bytes landed, in the current phase.
    bytes: i64,
    /// Phases completed.
    phases: u32,
    /// When the last two of them completed, the last one first.
    completed_at: [Time; 2],
    /// Who has arrived in the current phase, and in the last one.
    arrived: Vec<Arrival>,
    arrived_before: Vec<Arrival>,
    /// Whether bytes were announced in the current phase, and in the last one.
    with_bytes: (bool, bool),
    /// The clock that the arrivals of the current phase released.
    arriving: Clock,
    /// Whether threads of another block have released to this one, in the current phase and in
    /// the last.
    remote: (bool, bool),
    /// The clock that all completed phases released, which a wait acquires.
    complete: Clock,
    initialised_by: u16,
    initialised_at: Time,
    /// Lanes that wait, and where.
    waiting: Vec<(u16, Scope, Place)>,
    /// Lanes that have seen the last completed phase.
    seen: Vec<Seen>,
}

/// That a lane has arrived.
#[derive(Clone, Copy)]
struct Arrival {
    lane: u16,
    time: Time,
    at: Place,
}

impl Arrival {
    fn site(self) -> Site {
        site(self.lane, self.at)
    }
}

/// That a lane has found a phase complete.
struct Seen {
    lane: u16,
    time: Time,
    /// Number of the next product that its warpgroup starts, and its time when it has been.
    product: u64,
    gathered: Option<Time>,
    at: Place,
}

impl Mbarrier {
    const BYTES: u32 = MBARRIER_BYTES;

    /// A lane for which the phase that the arrivals complete can be over before it looks for the
    /// phase before: parities are all it has to go by, so that it would wait for ever. The
    /// arrivals must know of every lane that has looked, or of a product that it took part in
    /// since.
    fn missed(&self) -> Option<Site> {
        let missed = self.seen.iter().find(|seen| {
            let (lane, clock) = (seen.lane, &self.arriving);
            let agent = Agent::warpgroup(warpgroup_of(lane)).index();
            !clock.knows(lane, usize::from(lane / 32), seen.time)
                && seen.gathered.is_none_or(|time| clock.warps[agent] < time)
        });
        missed.map(|seen| site(seen.lane, seen.at))
    }
}

fn site(lane: u16, at: Place) -> Site {
    Site { lane: lane.into(), location: Some(at) }
}

/// The mbarriers of a block.
#[derive(Default)]
pub(crate) struct Mbarriers(Vec<Mbarrier>);

impl Mbarriers {
    pub fn reset(&mut self) {
        self.0.clear();
    }

    /// Notes that all lanes of warpgroup `group` have asked for product `number`.
    pub fn gathered(&mut self, group: usize, number: u64, time: Time) {
        for seen in self.0.iter_mut().flat_map(|m| &mut m.seen) {
            if warpgroup_of(seen.lane) == group && seen.product == number {
                seen.gathered = Some(time);
            }
        }
    }

    /// Address of the one at `index`, and its current phase.
    pub fn phase(&self, index: usize) -> (u32, u32) {
        (self.0[index].address, self.0[index].phases)
    }

    /// State of the one at `address`, for the report of a deadlock.
    pub fn describe(&self, address: u32) -> String {
        self.0.iter().find(|m| m.address == address).map_or_else(String::new, |m| {
            format!(
                ", whose phase {} lacks {} of {} arrivals and {} bytes",
                m.phases, m.pending, m.arrivals, m.bytes
            )
        })
    }
}

impl Block {
    /// Index of the mbarrier at `address` in the block of that rank, which the current lane must
    /// know to be initialised.
    pub(super) fn mbarrier(
        &self,
        rank: usize,
        address: u32,
        at: Place,
    ) -> Result<usize, FaultKind> {
        let this = self.site(at);
        if !self.shared.holds(rank, address, Mbarrier::BYTES) {
            let message =
                format!("an mbarrier at byte {address}, outside of the block's shared memory");
            return Err(FaultKind::Misuse { message, this });
        }
        let Some(index) = self.mbarriers.0.iter().position(|m| m.address == address) else {
            let message = format!(
                "no mbarrier was initialised at byte {address} of shared memory: call init first"
            );
            return Err(FaultKind::Misuse { message, this });
        };
        let m = &self.mbarriers.0[index];
        let clock = &self.lanes[self.current].clock;
        let warp = usize::from(m.initialised_by / 32);
        if usize::from(m.initialised_by) != self.current
            && !clock.knows(m.initialised_by, warp, m.initialised_at)
        {
            let message = format!(
                "the mbarrier at byte {address} was initialised by thread {}, with no barrier between",
                m.initialised_by
            );
            return Err(FaultKind::Misuse { message, this });
        }
        if !self.shared.is_last_write(address, m.initialised_by, m.initialised_at) {
            let message = format!("the mbarrier at byte {address} was overwritten by other data");
            return Err(FaultKind::Misuse { message, this });
        }
        Ok(index)
    }

    /// Checks that copies which someone who knows `clock` starts see the initialised barrier.
    pub(super) fn check_mbarrier_fence(
        &self,
        index: usize,
        clock: &Clock,
        at: Place,
    ) -> Result<(), FaultKind> {
        let m = &self.mbarriers.0[index];
        let maker = &self.lanes[usize::from(m.initialised_by)];
        if maker.known_fence(m.initialised_by, clock) >= m.initialised_at {
            return Ok(());
        }
        let message = format!(
            "the mbarrier at byte {} is used by a copy, but thread {} did not call fence_init \
             after initialising it and before the barrier that tells this thread",
            m.address, m.initialised_by
        );
        Err(FaultKind::Misuse { message, this: self.site(at) })
    }

    /// Counts `bytes` bytes that a copy brought, which was started by who knew `clock`.
    pub(super) fn complete_bytes(
        &mut self,
        index: usize,
        bytes: u32,
        clock: &Clock,
    ) -> Result<(), FaultKind> {
        self.mbarriers.0[index].arriving.join_mbarriers(clock);
        self.mbarriers.0[index].bytes -= i64::from(bytes);
        self.try_complete_phase(index)
    }

    fn try_complete_phase(&mut self, index: usize) -> Result<(), FaultKind> {
        let m = &mut self.mbarriers.0[index];
        if m.pending != 0 || m.bytes != 0 {
            return Ok(());
        }
        m.phases += 1;
        m.completed_at = [self.time, m.completed_at[0]];
        m.arrived_before = std::mem::take(&mut m.arrived);
        m.with_bytes = (false, m.with_bytes.0);
        m.remote = (false, m.remote.0);
        m.pending = m.arrivals;
        m.complete.join(&m.arriving);
        m.arriving.reset(0);
        // The bytes that landed in this phase: waiting for it makes them readable.
        let agent = Agent::mbarrier(index);
        m.complete.warps[agent.index()] = self.time;
        let m = &mut self.mbarriers.0[index];
        self.time += 1;
        m.seen.clear();
        for (lane, scope, at) in std::mem::take(&mut m.waiting) {
            self.see_phase(index, lane, scope, at)?;
            self.set_state(lane.into(), LaneState::Ready);
        }
        Ok(())
    }

    /// A lane finds the last phase complete.
    fn see_phase(
        &mut self,
        index: usize,
        lane: u16,
        scope: Scope,
        at: Place,
    ) -> Result<(), FaultKind> {
        let m = &mut self.mbarriers.0[index];
        if m.remote.1 && scope == Scope::Block {
            let message = format!(
                "threads of another block arrived at the mbarrier at byte {}: only wait_cluster \
                 orders what they did",
                m.address
            );
            let this = Site { lane: lane.into(), location: Some(at) };
            return Err(FaultKind::Misuse { message, this });
        }
        let status = &mut self.lanes[usize::from(lane)];
        status.clock.join(&m.complete);
        status.last_wait = Some(m.address);
        let product = self.tensor_cores.asked(lane);
        m.seen.push(Seen { lane, time: self.time, product, gathered: None, at });
        Ok(())
    }
}

/// Makes what the current lane has written visible to copies and wgmma; `kind` says by which name.
pub(crate) fn fence(kind: SyncKind, at: Place) {
    if !current::left_out(kind, at) {
        current::with(|b| {
            b.record_event(|| Action::Fence, at);
            b.fence_proxy_async();
        });
    }
}

pub(crate) fn init(address: u32, arrivals: u32, at: Place) {
    current::checked(|b| {
        let this = b.site(at);
        if arrivals == 0 || arrivals as usize > b.threads() {
            let threads = b.threads();
            let message = format!("an mbarrier of {arrivals} arrivals: it needs 1 to {threads}");
            return Err(FaultKind::Misuse { message, this });
        }
        b.shared_write(address, Mbarrier::BYTES, at)?;
        let initialised_at = b.tick();
        b.mbarriers.0.retain(|m| m.address != address);
        if b.mbarriers.0.len() == MAX_MBARRIERS {
            let message =
                format!("the emulator has no more than {MAX_MBARRIERS} mbarriers a cluster");
            return Err(FaultKind::Misuse { message, this });
        }
        b.has_agents = true;
        b.mbarriers.0.push(Mbarrier {
            address,
            arrivals,
            pending: arrivals,
            bytes: 0,
            phases: 0,
            completed_at: [0; 2],
            arrived: Vec::new(),
            arrived_before: Vec::new(),
            with_bytes: (false, false),
            arriving: Clock::new(0),
            remote: (false, false),
            complete: Clock::new(0),
            initialised_by: b.current as u16,
            initialised_at,
            waiting: Vec::new(),
            seen: Vec::new(),
        });
        Ok(())
    });
}

pub(crate) fn arrive(address: u32, at: Place) {
    if current::left_out(SyncKind::MbarrierArrive, at) {
        return;
    }
    let rank = current::with(|b| b.rank() as u32);
    arrive_in(rank, address, 0, Scope::Block, at);
}

pub(crate) fn arrive_expect_tx(address: u32, bytes: u32, at: Place) {
    if current::left_out(SyncKind::MbarrierExpect, at) {
        return;
    }
    let rank = current::with(|b| b.rank() as u32);
    arrive_in(rank, address, bytes, Scope::Block, at);
}

pub(crate) fn arrive_at(address: u32, rank: u32, scope: Scope, at: Place) {
    if current::left_out(SyncKind::MbarrierArrive, at) {
        return;
    }
    let address = current::checked(|b| b.map_shared_rank(address, rank, at));
    arrive_in(rank, address, 0, scope, at);
}

/// Arrives at an mbarrier of the block of that rank.
fn arrive_in(rank: u32, address: u32, bytes: u32, scope: Scope, at: Place) {
    current::checked(|b| {
        b.reach(rank as usize, at)?;
        let is_remote = rank as usize != b.rank() && scope == Scope::Cluster;
        if scope == Scope::Cluster {
            b.release_to_cluster(&[b.current as u16]);
        }
        let index = b.mbarrier(rank as usize, address, at)?;
        b.check_arrival(index, at)?;
        let (barrier, phase) = b.mbarriers.phase(index);
        b.record_event(|| Action::MbarrierArrive(barrier, phase), at);
        let now = b.tick();
        let lane = b.current as u16;
        let mut clock = std::mem::replace(&mut b.mbarriers.0[index].arriving, Clock::new(0));
        b.release(&mut clock, &[lane], now);
        let m = &mut b.mbarriers.0[index];
        m.arriving = clock;
        m.remote.0 |= is_remote;
        if m.pending == 0 {
            let others: Vec<_> = m.arrived.iter().map(|a| a.site().to_string()).collect();
            let message = format!(
                "more than {} arrivals in phase {} of the mbarrier at byte {address}, where {} \
                 arrived before",
                m.arrivals,
                m.phases,
                others.join(" and ")
            );
            return Err(FaultKind::Misuse { message, this: site(lane, at) });
        }
        let arrival = Arrival { lane, time: now, at };
        m.arrived.push(arrival);
        m.with_bytes.0 |= bytes > 0;
        m.pending -= 1;
        m.bytes += i64::from(bytes);
        if m.pending == 0
            && let Some(this) = m.missed()
            && b.options.checks.missed_phases
        {
            return Err(b.phase_missed(index, this, arrival));
        }
        b.try_complete_phase(index)
    });
}

impl Block {
    /// The fault of a phase that an arrival completes before `this` has looked for the one before.
    fn phase_missed(&self, index: usize, this: Site, arrival: Arrival) -> FaultKind {
        let m = &self.mbarriers.0[index];
        // The arrival that let the arriving lane go on: if any came too early, this one did.
        let cause = self.lanes[usize::from(arrival.lane)].last_wait.and_then(|address| {
            let waited_for = self.mbarriers.0.iter().find(|m| m.address == address)?;
            waited_for.arrived_before.last().map(|arrival| arrival.site())
        });
        FaultKind::PhaseMissed {
            address: m.address,
            phase: m.phases,
            this,
            arrival: arrival.site(),
            cause,
        }
    }

    /// Checks that the current lane knows the phase before the one that it arrives in to be
    /// complete, or every arrival of it where there was nothing else: as long as it is not, the
    /// arrival counts in that one.
    fn check_arrival(&self, index: usize, at: Place) -> Result<(), FaultKind> {
        let m = &self.mbarriers.0[index];
        let clock = &self.lanes[self.current].clock;
        let is_known = m.phases == 0
            || clock.warps[Agent::mbarrier(index).index()] >= m.completed_at[0]
            || !m.with_bytes.1
                && m.arrived_before.iter().all(|arrival| {
                    usize::from(arrival.lane) == self.current
                        || clock.knows(arrival.lane, usize::from(arrival.lane / 32), arrival.time)
                });
        if is_known || !self.options.checks.missed_phases {
            return Ok(());
        }
        let (address, phase) = (m.address, m.phases);
        Err(FaultKind::ArrivalUnknown { address, phase, this: self.site(at) })
    }

    /// Checks that the current lane knows the phase before the one that it waits for to be
    /// complete: as long as it is not, that parity belongs to an older one.
    fn check_phase_before(&self, index: usize, waits: bool, at: Place) -> Result<(), FaultKind> {
        let m = &self.mbarriers.0[index];
        // It waits for phase `phases`, or has found phase `phases - 1` complete.
        let (before, completed_at) = if waits {
            (m.phases.checked_sub(1), m.completed_at[0])
        } else {
            (m.phases.checked_sub(2), m.completed_at[1])
        };
        let Some(before) = before else { return Ok(()) };
        let known = self.lanes[self.current].clock.warps[Agent::mbarrier(index).index()];
        if known >= completed_at || !self.options.checks.missed_phases {
            return Ok(());
        }
        let (address, phase) = (m.address, before + 1);
        Err(FaultKind::PhaseUnknown { address, phase, this: self.site(at) })
    }

    /// The mbarrier whose phase of `parity` is not complete. If it is, the current lane has seen it.
    fn incomplete_phase(
        &mut self,
        address: u32,
        parity: u32,
        scope: Scope,
        at: Place,
    ) -> Result<Option<usize>, FaultKind> {
        if parity > 1 {
            let message = format!("parity {parity}: the phases of an mbarrier have parity 0 or 1");
            return Err(FaultKind::Misuse { message, this: self.site(at) });
        }
        let index = self.mbarrier(self.rank(), address, at)?;
        let lane = self.current as u16;
        // Phase n has parity n % 2; the one before the first counts as complete.
        let is_incomplete = self.mbarriers.0[index].phases % 2 == parity;
        self.check_phase_before(index, is_incomplete, at)?;
        if is_incomplete {
            return Ok(Some(index));
        }
        let m = &self.mbarriers.0[index];
        if m.pending == 0 && self.options.checks.missed_phases {
            let last = *m.arrived.last().expect("a phase without pending arrivals had one");
            return Err(self.phase_missed(index, site(lane, at), last));
        }
        let phase = self.mbarriers.0[index].phases.checked_sub(1);
        self.record_event(|| Action::MbarrierWait(address, phase), at);
        self.see_phase(index, lane, scope, at)?;
        Ok(None)
    }
}

pub(crate) fn wait(address: u32, parity: u32, scope: Scope, at: Place) {
    let Some(parity) = altered(parity, at) else { return };
    let suspended = current::checked(|b| {
        let Some(index) = b.incomplete_phase(address, parity, scope, at)? else { return Ok(false) };
        let (_, phase) = b.mbarriers.phase(index);
        b.record_event(|| Action::MbarrierWait(address, Some(phase)), at);
        b.mbarriers.0[index].waiting.push((b.current as u16, scope, at));
        b.set_state(b.current, LaneState::AtMbarrier { address, parity, at });
        Ok(true)
    });
    if suspended {
        current::suspend();
    }
}

pub(crate) fn is_complete(address: u32, parity: u32, scope: Scope, at: Place) -> bool {
    let Some(parity) = altered(parity, at) else { return true };
    current::checked(|b| Ok(b.incomplete_phase(address, parity, scope, at)?.is_none()))
}

/// The parity that a lane asks for, as the launch alters it; `None`: it takes the phase for complete.
fn altered(parity: u32, at: Place) -> Option<u32> {
    match current::with(|b| b.alteration(SyncKind::MbarrierWait, at)) {
        Some(Alteration::LeaveOut) => None,
        Some(Alteration::OtherParity) => Some(parity ^ 1),
        _ => Some(parity),
    }
}
