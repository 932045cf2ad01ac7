//! Which accesses are ordered: a clock per lane.
//!
//! A block counts time in synchronisations: every release (a barrier completed, a
//! warp synchronised, an arrival) takes the current time and advances it. An access
//! is stamped with the time at which it was made. What a lane knows of another is
//! the latest time up to which the other's accesses happen before its own next one.
//!
//! Block-wide barriers make all lanes equal, so most of what a lane knows is one
//! number, the floor. Beside it stands what it knows of single warps (warp barriers,
//! barriers of some warps) and of single lanes (an arrival that one lane made for
//! itself).
//!
//! Bulk copies and tensor cores access shared memory beside the lanes. Each is an
//! [`Agent`], counted on after the warps; the floor says nothing of them, since no
//! barrier of the block waits for them.

use crate::hardware::WARPGROUP_THREADS;

/// Time in synchronisations; 0 is before everything.
pub(crate) type Time = u32;

/// Warps of the largest block.
pub(crate) const MAX_WARPS: usize = 32;

/// The warpgroup of a lane.
pub(crate) fn warpgroup_of(lane: u16) -> usize {
    usize::from(lane) / WARPGROUP_THREADS as usize
}

/// Who accesses shared memory without being a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Agent(usize);

impl Agent {
    /// Warpgroups of the largest block.
    pub const WARPGROUPS: usize = MAX_WARPS / 4;
    /// Mbarriers that are told apart.
    pub const MBARRIERS: usize = 48;
    const COUNT: usize = 2 * Self::WARPGROUPS + Self::MBARRIERS;

    /// The wgmma products of a warpgroup.
    pub fn warpgroup(group: usize) -> Self {
        Self(MAX_WARPS + group)
    }

    /// The bulk stores that lanes of `lane`'s warpgroup start.
    pub fn store(lane: u16) -> Self {
        Self(MAX_WARPS + Self::WARPGROUPS + warpgroup_of(lane))
    }

    /// The bulk loads that count at the mbarrier of that index.
    pub fn mbarrier(index: usize) -> Self {
        Self(MAX_WARPS + 2 * Self::WARPGROUPS + index)
    }

    /// Its place in [`Clock::warps`].
    pub fn index(self) -> usize {
        self.0
    }

    /// The number that stands for it among the lanes.
    pub fn lane(self) -> u16 {
        (self.0 * 32) as u16
    }

    /// The meaning of a lane's number beyond the lanes.
    pub fn describe(lane: u32) -> Option<String> {
        let agent = (lane as usize / 32).checked_sub(MAX_WARPS)?;
        match agent / Self::WARPGROUPS {
            0 => Some(format!("wgmma of warpgroup {agent}")),
            1 => Some(format!("a bulk store of warpgroup {}", agent - Self::WARPGROUPS)),
            _ if agent < Self::COUNT => Some("a bulk load".to_owned()),
            _ => None,
        }
    }
}

/// The knowledge of one lane, or one barrier, of the others.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    /// Every lane's accesses up to this time are known.
    pub floor: Time,
    /// Every access of warp `w` up to `warps[w]` is known; agents come after the warps.
    pub warps: [Time; MAX_WARPS + Agent::COUNT],
    /// Every access of lane `l` up to `t` is known, for each `(l, t)`.
    pub lanes: Vec<(u16, Time)>,
}

impl Clock {
    pub fn new(floor: Time) -> Self {
        Self { floor, warps: [0; MAX_WARPS + Agent::COUNT], lanes: Vec::new() }
    }

    /// Forgets all but the floor.
    pub fn reset(&mut self, floor: Time) {
        self.floor = floor;
        self.warps = [0; MAX_WARPS + Agent::COUNT];
        self.lanes.clear();
    }

    /// Whether the accesses of `lane` (of `warp`) at `time` are known.
    #[inline]
    pub fn knows(&self, lane: u16, warp: usize, time: Time) -> bool {
        (time <= self.floor && warp < MAX_WARPS)
            || time <= self.warps[warp]
            || self.lanes.iter().any(|&(l, t)| l == lane && time <= t)
    }

    /// Whether the accesses of every lane of `warp` at `time` are known.
    #[inline]
    pub fn knows_warp(&self, warp: usize, time: Time) -> bool {
        (time <= self.floor && warp < MAX_WARPS) || time <= self.warps[warp]
    }

    /// Keeps only what `other` knows too.
    pub fn meet(&mut self, other: &Clock) {
        let of_lane = |clock: &Clock, lane: u16| {
            let single = clock.lanes.iter().find(|(l, _)| *l == lane).map_or(0, |&(_, t)| t);
            single.max(clock.floor).max(clock.warps[usize::from(lane / 32)])
        };
        let both = self.lanes.iter().chain(&other.lanes);
        let lanes = both.map(|&(l, _)| (l, of_lane(self, l).min(of_lane(other, l)))).collect();
        self.lanes = lanes;
        for (warp, mine) in self.warps.iter_mut().enumerate() {
            let floors = if warp < MAX_WARPS { (self.floor, other.floor) } else { (0, 0) };
            *mine = (*mine).max(floors.0).min(other.warps[warp].max(floors.1));
        }
        self.floor = self.floor.min(other.floor);
    }

    /// Learns what `other` knows.
    pub fn join(&mut self, other: &Clock) {
        self.floor = self.floor.max(other.floor);
        for (mine, theirs) in self.warps.iter_mut().zip(&other.warps) {
            *mine = (*mine).max(*theirs);
        }
        for &(lane, time) in &other.lanes {
            self.learn_lane(lane, time);
        }
        // A clock that knows the whole warp up to a time need not know a lane up to it.
        let (floor, warps) = (self.floor, self.warps);
        self.lanes.retain(|&(l, t)| t > floor.max(warps[usize::from(l / 32)]));
    }

    /// Learns what `other` knows of mbarriers' phases.
    pub fn join_mbarriers(&mut self, other: &Clock) {
        let first = Agent::mbarrier(0).index();
        for (mine, theirs) in self.warps[first..].iter_mut().zip(&other.warps[first..]) {
            *mine = (*mine).max(*theirs);
        }
    }

    /// Learns the accesses of one lane up to `time`.
    pub fn learn_lane(&mut self, lane: u16, time: Time) {
        match self.lanes.iter_mut().find(|(l, _)| *l == lane) {
            Some(entry) => entry.1 = entry.1.max(time),
            None => self.lanes.push((lane, time)),
        }
    }
}
