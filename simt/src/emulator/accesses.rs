//! Accesses to a block's shared memory: each is checked, recorded and counted.

use std::ptr;

use super::{
    banks,
    block::{Block, LaneStatus},
    clock::Time,
    copies::Copy,
    fault::{FaultKind, Place},
    global_memory::GlobalAccess,
    options::SyncKind,
    record::Action,
    shadow::{Access, window},
};

impl Block {
    /// Checks and records a read of shared memory; returns where the bytes are.
    #[inline]
    pub fn shared_read(
        &mut self,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*const u8, FaultKind> {
        self.read_in(self.rank(), offset, bytes, at)
    }

    /// [`shared_read`](Self::shared_read) in the block of that rank.
    #[inline]
    pub(super) fn read_in(
        &mut self,
        rank: usize,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*const u8, FaultKind> {
        self.shared_bounds(rank, offset, bytes, "read", at)?;
        self.count_step(Some(at))?;
        self.stats.shared_bytes_read += u64::from(bytes);
        if self.recording.is_some() {
            self.record_access(Action::SharedRead, offset.into(), bytes, at);
        }
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.read(offset, bytes, by)?;
        if self.blocks() > 1 {
            self.check_released(offset, bytes, at)?;
        }
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
        self.write_in(self.rank(), offset, bytes, at)
    }

    /// [`shared_write`](Self::shared_write) in the block of that rank.
    #[inline]
    pub(super) fn write_in(
        &mut self,
        rank: usize,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*mut u8, FaultKind> {
        self.shared_bounds(rank, offset, bytes, "write", at)?;
        self.stats.shared_bytes_written += u64::from(bytes);
        if self.recording.is_some() {
            self.record_access(Action::SharedWrite, offset.into(), bytes, at);
        }
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
        self.shared_bounds(self.rank(), offset, bytes, "asynchronous copy", at)?;
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.pend(offset, bytes, by)?;
        if self.recording.is_some() {
            self.record_access(Action::CopyStart, offset.into(), bytes, at);
        }
        let (lane, present) = (self.current, self.present(self.warp()));
        if let Some(offsets) =
            self.copies.start(lane, present.count_ones(), Copy { offset, source, at })
        {
            self.stats.bank_conflicts += banks::conflicts(&offsets);
        }
        Ok(())
    }

    /// Makes the current lane's copies since the last commit a group.
    pub fn commit_copies(&mut self, at: Place) {
        if self.alteration(SyncKind::CopyCommit, at).is_none() {
            self.record_event(|| Action::CopyCommit, at);
            self.copies.commit(self.current);
        }
    }

    /// Lets the current lane's groups land, all but the newest `pending`.
    pub fn wait_copies(&mut self, pending: usize, at: Place) {
        self.record_event(|| Action::CopyWait(pending as u32), at);
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

    /// Checks and records an atomic update of shared memory; returns where the bytes are.
    pub fn shared_atomic(
        &mut self,
        offset: u32,
        bytes: u32,
        at: Place,
    ) -> Result<*mut u8, FaultKind> {
        self.shared_bounds(self.rank(), offset, bytes, "atomic", at)?;
        self.count_step(Some(at))?;
        if self.recording.is_some() {
            self.record_access(Action::SharedAtomic, offset.into(), bytes, at);
        }
        let by = access(&self.lanes, self.current, self.time, at);
        self.shared.atomic(offset, bytes, by)?;
        Ok(self.shared.at(offset))
    }

    /// Checks an access to the shared memory of the block of that rank.
    #[inline]
    fn shared_bounds(
        &self,
        rank: usize,
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
        if !self.shared.holds(rank, offset, bytes) {
            return Err(FaultKind::OutOfBounds {
                space: "shared",
                what,
                index: offset.wrapping_sub(window(rank)).into(),
                len: self.shared.len().into(),
                this: self.site(at),
            });
        }
        Ok(())
    }

    /// Checks, records and counts an access to global memory by the current lane.
    #[inline]
    pub fn access_global(
        &mut self,
        kind: GlobalAccess,
        address: u64,
        bytes: u64,
        at: Place,
    ) -> Result<(), FaultKind> {
        match kind {
            GlobalAccess::Read => self.stats.global_bytes_read += bytes,
            _ => self.stats.global_bytes_written += bytes,
        }
        if self.recording.is_some() {
            let action = match kind {
                GlobalAccess::Read => Action::GlobalRead,
                GlobalAccess::Write => Action::GlobalWrite,
                GlobalAccess::Atomic => Action::GlobalAtomic,
            };
            self.record_access(action, address, bytes as u32, at);
        }
        self.count_step(Some(at))?;
        if !self.options.checks.global_races {
            if kind != GlobalAccess::Atomic {
                self.progress();
            }
            return Ok(());
        }
        let by = access(&self.lanes, self.current, self.time, at);
        if self.global.access(kind, address, bytes, by)? {
            self.progress();
        }
        Ok(())
    }

    /// Checks and records an access to global memory by an agent that the current lane starts.
    pub(super) fn access_global_as(
        &mut self,
        kind: GlobalAccess,
        address: u64,
        bytes: u64,
        by: Access<'_>,
    ) -> Result<(), FaultKind> {
        if self.options.checks.global_races
            && bytes > 0
            && self.global.access(kind, address, bytes, by)?
        {
            self.progress();
        }
        Ok(())
    }

    /// Bytes of dynamic shared memory that the launch gave.
    pub fn dynamic_shared_bytes(&self) -> u32 {
        self.dynamic_shared_bytes
    }

    /// Where the shared memory of the current lane's block begins.
    pub fn shared_window(&self) -> u32 {
        window(self.rank())
    }

    /// Address of the static shared array that `key` stands for.
    pub fn static_shared(&mut self, key: *const u8, bytes: u32) -> u32 {
        let offset = match self.statics.iter().find(|(k, _)| *k == key) {
            Some(&(_, offset)) => offset,
            None => {
                let offset = self.shared.extend(bytes);
                self.statics.push((key, offset));
                offset
            }
        };
        self.shared_window() + offset
    }
}

/// The current lane as the maker of an access.
#[inline]
fn access(lanes: &[LaneStatus], current: usize, now: Time, location: Place) -> Access<'_> {
    Access { lane: current as u16, now, clock: &lanes[current].clock, location }
}
