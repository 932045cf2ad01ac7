//! Accesses of the blocks of a cluster to each other's shared memory, beyond what holds within
//! a block: a block that is reached must have started, and must not end before.

use super::{
    block::Block,
    clock::{Clock, Time},
    fault::{FaultKind, Place, Site},
    shadow::window,
};

/// That a lane, or an agent, has reached into another block.
pub(crate) struct RemoteAccess {
    lane: u16,
    /// Rank of the block that it reached into.
    rank: usize,
    time: Time,
    at: Place,
}

impl Block {
    /// Where in the block of that rank lies what the current lane's block has at `address`.
    pub fn map_shared_rank(&self, address: u32, rank: u32, at: Place) -> Result<u32, FaultKind> {
        let blocks = self.blocks();
        if rank as usize >= blocks {
            let message = format!("block {rank} of a cluster of {blocks}: ranks begin with 0");
            return Err(FaultKind::Misuse { message, this: self.site(at) });
        }
        let offset = address.wrapping_sub(self.shared_window());
        Ok(window(rank as usize).wrapping_add(offset))
    }

    /// Notes that the current lane reaches into the block of that rank now.
    pub(super) fn reach(&mut self, rank: usize, at: Place) -> Result<(), FaultKind> {
        self.reach_as(self.current as u16, rank, self.time, at)
    }

    /// Notes that `lane`, the current one or an agent that it starts, reaches into the block of
    /// that rank at that time. The current lane must know that block to have started.
    pub(super) fn reach_as(
        &mut self,
        lane: u16,
        rank: usize,
        time: Time,
        at: Place,
    ) -> Result<(), FaultKind> {
        if rank == self.rank() {
            return Ok(());
        }
        let begin = self.shared.begin();
        let (threads, clock) = (self.block_threads(), &self.lanes[self.current].clock);
        let lanes = rank * threads..(rank + 1) * threads;
        let has_started = clock.floor >= begin
            || clock.warps[lanes.start / 32..lanes.end / 32].iter().any(|&time| time >= begin)
            || clock.lanes.iter().any(|&(l, time)| lanes.contains(&l.into()) && time >= begin);
        if !has_started {
            let message = format!(
                "shared memory of block {rank} of the cluster used before that block is known to \
                 have started: call cluster::sync first"
            );
            return Err(FaultKind::Misuse { message, this: self.site(at) });
        }
        self.remote.retain(|r| (r.lane, r.rank) != (lane, rank));
        self.remote.push(RemoteAccess { lane, rank, time, at });
        Ok(())
    }

    /// Notes that `lanes` release to other blocks what they know and did.
    pub(super) fn release_to_cluster(&mut self, lanes: &[u16]) {
        let now = self.tick();
        let mut released = std::mem::replace(&mut self.released, Clock::new(0));
        self.release(&mut released, lanes, now);
        self.released = released;
    }

    /// Checks that what the current lane reads was released to it, where a lane of another
    /// block wrote it.
    pub(super) fn check_released(
        &self,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<(), FaultKind> {
        let threads = self.block_threads();
        for (lane, time, place) in self.shared.last_writes(offset, bytes) {
            let is_lane = usize::from(lane) < self.threads();
            let is_foreign = is_lane && usize::from(lane) / threads != self.rank();
            if is_foreign && !self.released.knows(lane, usize::from(lane / 32), time) {
                let writer = Site { lane: lane.into(), location: place };
                let message = format!(
                    "shared memory at byte {offset}, written by {writer} of another block, is \
                     read before it was released to the cluster (by arrive_at or cluster::sync)"
                );
                return Err(FaultKind::Misuse { message, this: self.site(at) });
            }
        }
        Ok(())
    }

    /// Checks and records a read of shared memory of the block of that rank; returns where
    /// the bytes are.
    pub fn distributed_read(
        &mut self,
        rank: u32,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*const u8, FaultKind> {
        self.reach(rank as usize, at)?;
        self.read_in(rank as usize, offset, bytes, at)
    }

    /// Checks and records a write of shared memory of the block of that rank; returns where
    /// the bytes go.
    pub fn distributed_write(
        &mut self,
        rank: u32,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*mut u8, FaultKind> {
        self.reach(rank as usize, at)?;
        self.write_in(rank as usize, offset, bytes, at)
    }

    /// Checks that no block can end while another still reaches into its shared memory: one of
    /// its threads must know of the access when it ends.
    pub(super) fn finish_remote(&self) -> Result<(), FaultKind> {
        let threads = self.block_threads();
        let unknown = self.remote.iter().find(|remote| {
            let lanes = &self.lanes[remote.rank * threads..(remote.rank + 1) * threads];
            let warp = usize::from(remote.lane / 32);
            !lanes.iter().any(|lane| lane.clock.knows(remote.lane, warp, remote.time))
        });
        match unknown {
            None => Ok(()),
            Some(remote) => Err(FaultKind::Misuse {
                message: format!(
                    "block {0} of the cluster can end before this access to its shared memory: \
                     let block {0} wait for the access, or call cluster::sync at the end",
                    remote.rank
                ),
                this: Site { lane: remote.lane.into(), location: Some(remote.at) },
            }),
        }
    }
}
