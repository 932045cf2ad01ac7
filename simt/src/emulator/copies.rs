//! Asynchronous copies on their way. They land when the lane that started them waits for
//! their group, as late as they may on a GPU, so that a forgotten wait always shows.

use std::collections::VecDeque;

use super::fault::Place;

/// A copy of 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    /// Where it goes in shared memory.
    pub offset: u32,
    /// Global address that it comes from; zeros if there is none.
    pub source: Option<u64>,
    /// Where it was started.
    pub at: Place,
}

impl Copy {
    pub const BYTES: u32 = 16;
}

/// One lane's copies.
#[derive(Default)]
struct LaneCopies {
    /// Since the last commit.
    open: Vec<Copy>,
    /// Groups that have not been waited for, oldest first.
    groups: VecDeque<Vec<Copy>>,
    /// Copies that this lane started in this block.
    started: usize,
}

/// Where the n-th copies of a warp's lanes went, for each n from `first` on. Lanes take
/// turns in any order, so that each place comes with its lane.
#[derive(Default)]
struct Rounds {
    first: usize,
    rounds: VecDeque<Vec<(usize, u32)>>,
}

/// The copies of a block.
#[derive(Default)]
pub(crate) struct Copies {
    lanes: Vec<LaneCopies>,
    warps: Vec<Rounds>,
}

impl Copies {
    /// Forgets everything; whether anything was on its way.
    pub fn reset(&mut self, threads: usize) -> bool {
        let pending = self.unfinished().is_some();
        for lane in &mut self.lanes {
            lane.open.clear();
            lane.groups.clear();
            lane.started = 0;
        }
        for warp in &mut self.warps {
            warp.first = 0;
            warp.rounds.clear();
        }
        if self.lanes.len() < threads {
            self.lanes.resize_with(threads, LaneCopies::default);
            self.warps.resize_with(threads.div_ceil(32), Rounds::default);
        }
        pending
    }

    /// Adds a copy of `lane`. When each of the `present` lanes of its warp has started as
    /// many copies, returns where those went, lane by lane: one instruction of the warp.
    pub fn start(&mut self, lane: usize, present: u32, copy: Copy) -> Option<Vec<u32>> {
        let this = &mut self.lanes[lane];
        this.open.push(copy);
        let index = this.started;
        this.started += 1;
        let warp = &mut self.warps[lane / 32];
        let round = index.checked_sub(warp.first)?;
        while warp.rounds.len() <= round {
            warp.rounds.push_back(Vec::with_capacity(32));
        }
        warp.rounds[round].push((lane, copy.offset));
        if round > 0 || warp.rounds[0].len() < present as usize {
            return None;
        }
        warp.first += 1;
        let mut places = warp.rounds.pop_front()?;
        places.sort_unstable();
        Some(places.into_iter().map(|(_, offset)| offset).collect())
    }

    /// Closes the group of `lane`.
    pub fn commit(&mut self, lane: usize) {
        let this = &mut self.lanes[lane];
        let group = std::mem::take(&mut this.open);
        this.groups.push_back(group);
    }

    /// Takes the copies of `lane`'s groups, all but the newest `pending` groups.
    pub fn finish(&mut self, lane: usize, pending: usize) -> Vec<Copy> {
        let groups = &mut self.lanes[lane].groups;
        let landed = groups.len().saturating_sub(pending);
        groups.drain(..landed).flatten().collect()
    }

    /// A copy that nobody has waited for, and its lane.
    pub fn unfinished(&self) -> Option<(u32, Place)> {
        self.lanes.iter().enumerate().find_map(|(lane, copies)| {
            let copy = copies.groups.iter().flatten().chain(&copies.open).next()?;
            Some((lane as u32, copy.at))
        })
    }
}
