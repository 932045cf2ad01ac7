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

/// Time in synchronisations; 0 is before everything.
pub(crate) type Time = u32;

/// Warps of the largest block.
pub(crate) const MAX_WARPS: usize = 32;

/// What one lane, or one barrier, knows of the others.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    /// Every lane's accesses up to this time are known.
    pub floor: Time,
    /// Every access of warp `w` up to `warps[w]` is known.
    pub warps: [Time; MAX_WARPS],
    /// Every access of lane `l` up to `t` is known, for each `(l, t)`.
    pub lanes: Vec<(u16, Time)>,
}

impl Clock {
    pub fn new(floor: Time) -> Self {
        Self { floor, warps: [0; MAX_WARPS], lanes: Vec::new() }
    }

    /// Forgets all but the floor.
    pub fn reset(&mut self, floor: Time) {
        self.floor = floor;
        self.warps = [0; MAX_WARPS];
        self.lanes.clear();
    }

    /// Whether the accesses of `lane` (of `warp`) at `time` are known.
    #[inline]
    pub fn knows(&self, lane: u16, warp: usize, time: Time) -> bool {
        time <= self.floor
            || time <= self.warps[warp]
            || self.lanes.iter().any(|&(l, t)| l == lane && time <= t)
    }

    /// Whether the accesses of every lane of `warp` at `time` are known.
    #[inline]
    pub fn knows_warp(&self, warp: usize, time: Time) -> bool {
        time <= self.floor || time <= self.warps[warp]
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
        let floor = self.floor;
        self.lanes.retain(|&(_, t)| t > floor);
    }

    /// Learns the accesses of one lane up to `time`.
    pub fn learn_lane(&mut self, lane: u16, time: Time) {
        match self.lanes.iter_mut().find(|(l, _)| *l == lane) {
            Some(entry) => entry.1 = entry.1.max(time),
            None => self.lanes.push((lane, time)),
        }
    }
}
