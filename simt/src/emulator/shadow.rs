//! A block's shared memory and the record beside it that finds races.
//!
//! The record has a cell for every two bytes: a stamp of who wrote last, and stamps of
//! who has read. A stamp is a time and a lane in one 64-bit word, time on top, and the
//! stamps of neighbouring cells are neighbours, so that the usual access, to words that a
//! block-wide barrier has ordered, is a few comparisons over a run of them.

use std::{ops::Range, panic::Location};

use super::{
    clock::{Clock, MAX_WARPS, Time},
    fault::{FaultKind, Site},
};

/// From the shared memory of one block of a cluster to the next one's, in bytes: what the
/// addresses in wgmma's descriptors can tell apart.
pub(crate) const WINDOW: u32 = 1 << 18;

/// Bytes that one cell of the record stands for: the smallest element kernels use.
const CELL_BYTES: u32 = 2;

/// Stamps of readers a cell has. Each warp has its own of them, see [`reader_slot`].
const READERS: usize = 4;

/// Stands for an atomic operation in a stamp of a write.
pub(super) const ATOMIC: u16 = u16::MAX;
/// In a stamp of a read: several lanes of the warp in the low bits.
const SEVERAL_LANES: u16 = 0x8000;
/// In a stamp of a read: lanes of several warps, in the warpgroups whose bits are set.
const SEVERAL_WARPS: u16 = 0x4000;
/// In a stamp of a read: agents among several, or lanes of several blocks of a cluster.
const SEVERAL_BLOCKS: u16 = u16::MAX - 1;

/// Time of an asynchronous copy that has not landed: later than any, so that no barrier
/// orders anything after it.
const PENDING: Time = Time::MAX;

/// In the time of a stamp: the access is an agent's. It makes the stamp later than any
/// floor, since block-wide barriers do not order agents.
const OF_AGENT: Time = 1 << (Time::BITS - 1);

/// The stamp of a warp's reads. Warps 0 to 3 have one each, and so have the first warps
/// of the warpgroups 0 to 3. Warps that share one are merged, which is exact under
/// block-wide barriers.
#[inline]
fn reader_slot(warp: u16) -> usize {
    usize::from(warp + warp / 4) % READERS
}

/// Where the shared memory of the block of that rank begins.
#[inline]
pub(crate) fn window(rank: usize) -> u32 {
    rank as u32 * WINDOW
}

/// Time and lane of an access; 0 is none.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Stamp(u64);

impl Stamp {
    #[inline]
    pub fn new(time: Time, lane: u16) -> Self {
        Self(u64::from(time) << 16 | u64::from(lane))
    }
    #[inline]
    pub fn time(self) -> Time {
        let time = (self.0 >> 16) as Time;
        if time == PENDING { time } else { time & !OF_AGENT }
    }
    #[inline]
    pub fn lane(self) -> u16 {
        self.0 as u16
    }
    #[inline]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }
}

/// Source location as a distance from [`ORIGIN`], half the size of a pointer; 0 is none.
pub(super) type PackedPlace = i32;

/// A fixed point of the program. A static, because the address of a constant may differ
/// from one place that names it to another.
static ORIGIN: u8 = 0;

#[inline]
pub(super) fn place(location: &'static Location<'static>) -> PackedPlace {
    let distance = std::ptr::from_ref(location) as isize - &raw const ORIGIN as isize;
    PackedPlace::try_from(distance).unwrap_or(0)
}

pub(super) fn location(place: PackedPlace) -> Option<&'static Location<'static>> {
    let address = (&raw const ORIGIN as isize + place as isize) as *const Location<'static>;
    // SAFETY: a place that is not 0 is the distance of a location of this program.
    (place != 0).then(|| unsafe { &*address })
}

/// Who accesses, and when.
#[derive(Clone, Copy)]
pub(crate) struct Access<'a> {
    pub lane: u16,
    pub now: Time,
    pub clock: &'a Clock,
    pub location: &'static Location<'static>,
}

impl Access<'_> {
    #[inline]
    fn warp(&self) -> u16 {
        self.lane / 32
    }

    #[inline]
    pub(super) fn stamp(&self) -> Stamp {
        let is_agent = usize::from(self.warp()) >= MAX_WARPS && self.now != PENDING;
        Stamp::new(self.now | if is_agent { OF_AGENT } else { 0 }, self.lane)
    }

    /// Whether a stamp of reads stands for this read already: for its lane, for several of its
    /// warp, or for several warps with its own, at this time.
    #[inline]
    pub(super) fn is_in(&self, read: Stamp) -> bool {
        let several_of = |warps: u16| warps & (SEVERAL_LANES | SEVERAL_WARPS) == SEVERAL_WARPS;
        read == self.stamp()
            || read == Stamp::new(self.now, SEVERAL_LANES | self.warp())
            || (read.0 >> 16 == u64::from(self.now)
                && several_of(read.lane())
                && usize::from(self.warp()) < MAX_WARPS
                && read.lane() >> (self.warp() / 4) & 1 != 0)
    }

    pub(super) fn site(&self) -> Site {
        Site { lane: self.lane.into(), location: Some(self.location) }
    }

    /// Whether the accesses of every lane of the block that has these warps are known.
    fn knows_block(&self, warps: &Range<usize>, time: Time) -> bool {
        time <= self.clock.floor || warps.clone().all(|warp| self.clock.knows_warp(warp, time))
    }

    /// `warps` are the warps of the block whose memory it is.
    #[inline]
    pub(super) fn knows_write(&self, write: Stamp, warps: &Range<usize>) -> bool {
        let (lane, time) = (write.lane(), write.time());
        if lane == ATOMIC {
            return self.knows_block(warps, time);
        }
        // A lane knows what it did. Bulk loads, which write, are in no order.
        (lane == self.lane && time != PENDING && usize::from(self.warp()) < MAX_WARPS)
            || self.clock.knows(lane, usize::from(lane / 32), time)
    }

    /// `warps` are the warps of the block whose memory it is.
    #[inline]
    pub(super) fn knows_read(&self, read: Stamp, warps: &Range<usize>) -> bool {
        let (lane, time) = (read.lane(), read.time());
        if lane == self.lane {
            return true;
        }
        match lane {
            SEVERAL_BLOCKS => time <= self.clock.floor,
            l if l & SEVERAL_LANES != 0 => {
                self.clock.knows_warp(usize::from(l & !SEVERAL_LANES), time)
            }
            l if l & SEVERAL_WARPS != 0 => {
                let is_reader = |warp: &usize| l >> (warp / 4) & 1 != 0;
                let mut readers = warps.clone().filter(is_reader);
                time <= self.clock.floor || readers.all(|warp| self.clock.knows_warp(warp, time))
            }
            l => self.clock.knows(l, usize::from(l / 32), time),
        }
    }
}

/// Shared memory of the blocks that run together, each with a window of its own. Offsets
/// are in bytes, from the first window on.
pub(crate) struct SharedMemory {
    bytes: Vec<u128>,
    writes: Vec<Stamp>,
    reads: [Vec<Stamp>; READERS],
    /// Where the last write and the last new reader of a cell stand in the source.
    write_places: Vec<PackedPlace>,
    read_places: Vec<PackedPlace>,
    windows: u32,
    /// Warps of a block.
    warps: usize,
    /// Bytes of a block.
    len: u32,
    /// Cells stamped before this belong to an earlier block.
    begin: Time,
}

impl SharedMemory {
    pub fn new() -> Self {
        Self {
            bytes: Vec::new(),
            writes: Vec::new(),
            reads: Default::default(),
            write_places: Vec::new(),
            read_places: Vec::new(),
            windows: 1,
            warps: 0,
            len: 0,
            begin: 1,
        }
    }

    /// Makes it `windows` windows of `len` bytes, of blocks of `warps` warps, and forgets what
    /// was there before time `begin`.
    pub fn reset(&mut self, windows: u32, warps: usize, len: u32, begin: Time) {
        (self.windows, self.warps) = (windows, warps);
        self.len = 0;
        self.begin = begin;
        self.grow(len);
    }

    /// Forgets every stamp, when time starts anew.
    pub fn clear(&mut self) {
        self.writes.fill(Stamp::default());
        for reads in &mut self.reads {
            reads.fill(Stamp::default());
        }
    }

    /// Adds `bytes` bytes to each window, aligned to 128, and returns their offset there.
    pub fn extend(&mut self, bytes: u32) -> u32 {
        let offset = self.len.next_multiple_of(128);
        self.grow(offset + bytes);
        offset
    }

    fn grow(&mut self, len: u32) {
        self.len = len;
        let len = (self.windows - 1) * WINDOW + len;
        let (words, cells) = (len.div_ceil(16) as usize, len.div_ceil(CELL_BYTES) as usize);
        if self.bytes.len() < words {
            self.bytes.resize(words, 0);
        }
        if self.writes.len() < cells {
            self.writes.resize(cells, Stamp::default());
            for reads in &mut self.reads {
                reads.resize(cells, Stamp::default());
            }
            self.write_places.resize(cells, 0);
            self.read_places.resize(cells, 0);
        }
    }

    /// Warps of the block that has what is at `offset`.
    fn warps_at(&self, offset: u32) -> Range<usize> {
        let rank = (offset / WINDOW) as usize;
        rank * self.warps..(rank + 1) * self.warps
    }

    /// When the blocks that run began.
    pub fn begin(&self) -> Time {
        self.begin
    }

    /// Bytes of a window.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether `bytes` bytes at `offset` are of the window of `rank`.
    #[inline]
    pub fn holds(&self, rank: usize, offset: u32, bytes: u32) -> bool {
        let start = offset.wrapping_sub(window(rank));
        u64::from(start) + u64::from(bytes) <= u64::from(self.len)
    }

    /// The bytes at `offset`, which the caller has checked to be in bounds.
    #[inline]
    pub fn at(&mut self, offset: u32) -> *mut u8 {
        // SAFETY: `offset` is at most `len`, which the allocation covers.
        unsafe { self.bytes.as_mut_ptr().cast::<u8>().add(offset as usize) }
    }

    /// Records a read of `bytes` bytes, unless it races or reads what nothing wrote.
    #[inline]
    pub fn read(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        // One body for each size of access, so that its loops have constant bounds.
        match bytes {
            16 => self.read_cells::<8>(offset, by),
            8 => self.read_cells::<4>(offset, by),
            4 => self.read_cells::<2>(offset, by),
            _ => (offset..offset + bytes)
                .step_by(CELL_BYTES as usize)
                .try_for_each(|offset| self.read_cells::<1>(offset, by)),
        }
    }

    fn read_cells<const N: usize>(&mut self, offset: u32, by: Access<'_>) -> Result<(), FaultKind> {
        let first = (offset / CELL_BYTES) as usize;
        let cells = first..first + N;
        // The usual case: every word was written in this block, before the last barrier.
        let (begin, end) = (Stamp::new(self.begin, 0).0, Stamp::new(by.clock.floor, u16::MAX).0);
        let writes = &self.writes[cells.clone()];
        if !writes.iter().fold(true, |ok, w| ok & (w.0 >= begin) & (w.0 <= end)) {
            self.check_writes(offset, N as u32 * CELL_BYTES, by)?;
        }
        let new = by.stamp();
        let warps = self.warps_at(offset);
        let several = Stamp::new(by.now, SEVERAL_LANES | by.warp());
        let reads = &mut self.reads[reader_slot(by.warp())][cells.clone()];
        if reads.iter().fold(true, |ok, &r| ok & ((r == new) | (r == several))) {
            return Ok(());
        }
        if reads.iter().fold(true, |ok, r| ok & (r.0 <= end)) {
            reads.fill(new);
        } else {
            for read in reads {
                *read = merged(*read, new, &by, &warps);
            }
        }
        self.read_places[cells].fill(place(by.location));
        Ok(())
    }

    /// Records a read by a bulk copy or by wgmma: as [`read`](Self::read), and what lanes
    /// wrote must have been fenced by them, up to the time that `fenced` gives.
    pub fn read_async(
        &mut self,
        offset: u32,
        bytes: u32,
        by: Access<'_>,
        fenced: impl Fn(u16) -> Time,
    ) -> Result<(), FaultKind> {
        self.read(offset, bytes, by)?;
        for cell in cells(offset, bytes) {
            let write = self.writes[cell];
            let lane = write.lane();
            if usize::from(lane / 32) < MAX_WARPS && write.time() > fenced(lane) {
                let writer =
                    Site { lane: lane.into(), location: location(self.write_places[cell]) };
                return Err(FaultKind::ProxyFence { offset, this: by.site(), writer });
            }
        }
        Ok(())
    }

    /// Lane, time and place of the last writes of the cells of `bytes` bytes.
    pub fn last_writes(
        &self,
        offset: u32,
        bytes: u32,
    ) -> impl Iterator<Item = (u16, Time, Option<&'static Location<'static>>)> {
        cells(offset, bytes).map(|cell| {
            let write = self.writes[cell];
            (write.lane(), write.time(), location(self.write_places[cell]))
        })
    }

    /// Whether the last write at `offset` is that of `lane` before time `before`.
    pub fn is_last_write(&self, offset: u32, lane: u16, before: Time) -> bool {
        let write = self.writes[(offset / CELL_BYTES) as usize];
        write.lane() == lane && write.time() <= before
    }

    #[cold]
    fn check_writes(&self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        for cell in cells(offset, bytes) {
            let write = self.writes[cell];
            if write.time() < self.begin {
                return Err(FaultKind::Uninitialised { offset, this: by.site() });
            }
            if !by.knows_write(write, &self.warps_at(offset)) {
                return Err(after_write(offset, "read", by, write, self.write_places[cell]));
            }
        }
        Ok(())
    }

    /// Records a write of `bytes` bytes, unless it races.
    #[inline]
    pub fn write(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        self.order_before_write(offset, bytes, by, "write")?;
        let cells = cells(offset, bytes);
        self.writes[cells.clone()].fill(by.stamp());
        self.write_places[cells].fill(place(by.location));
        Ok(())
    }

    /// Records the start of an asynchronous copy to `bytes` bytes, unless it races. Until
    /// [`land`](Self::land), every access to them is a fault.
    pub fn pend(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        self.write(offset, bytes, Access { now: PENDING, ..by })
    }

    /// Records that an asynchronous copy has landed: from now on it is a write of `lane`
    /// made at `now`.
    pub fn land(&mut self, offset: u32, bytes: u32, lane: u16, now: Time) {
        self.writes[cells(offset, bytes)].fill(Stamp::new(now, lane));
    }

    /// Records an atomic update of `bytes` bytes. Atomics do not race with each other.
    pub fn atomic(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        let cells = cells(offset, bytes);
        if self.writes[cells.clone()].iter().any(|w| w.time() < self.begin) {
            return Err(FaultKind::Uninitialised { offset, this: by.site() });
        }
        self.order_before_write(offset, bytes, by, "atomic")?;
        self.writes[cells.clone()].fill(Stamp::new(by.now, ATOMIC));
        self.write_places[cells].fill(place(by.location));
        Ok(())
    }

    /// Checks that all earlier accesses happen before this one, which writes.
    #[inline]
    fn order_before_write(
        &mut self,
        offset: u32,
        bytes: u32,
        by: Access<'_>,
        what: &'static str,
    ) -> Result<(), FaultKind> {
        let cells = cells(offset, bytes);
        let end = Stamp::new(by.clock.floor, u16::MAX).0;
        let before = |stamps: &[Stamp]| stamps.iter().fold(true, |ok, s| ok & (s.0 <= end));
        let reads = self.reads.iter().fold(true, |ok, r| ok & before(&r[cells.clone()]));
        if reads & before(&self.writes[cells]) {
            return Ok(());
        }
        self.check_all(offset, bytes, by, what)
    }

    #[cold]
    fn check_all(
        &mut self,
        offset: u32,
        bytes: u32,
        by: Access<'_>,
        what: &'static str,
    ) -> Result<(), FaultKind> {
        let warps = self.warps_at(offset);
        for cell in cells(offset, bytes) {
            let write = self.writes[cell];
            let both_atomic = what == "atomic" && write.lane() == ATOMIC;
            if write.time() >= self.begin && !both_atomic && !by.knows_write(write, &warps) {
                return Err(after_write(offset, what, by, write, self.write_places[cell]));
            }
            for reads in &mut self.reads {
                let read = reads[cell];
                if read.time() >= self.begin && !by.knows_read(read, &warps) {
                    return Err(race(offset, what, by, "read", read, self.read_places[cell]));
                }
                // Accesses ordered after this write are ordered after that read too.
                reads[cell] = Stamp::default();
            }
        }
        Ok(())
    }
}

#[inline]
fn cells(offset: u32, bytes: u32) -> Range<usize> {
    (offset / CELL_BYTES) as usize..(offset + bytes).div_ceil(CELL_BYTES) as usize
}

/// The stamp that stands for an earlier read and a new one, of memory of the block that has
/// these warps.
#[inline]
pub(super) fn merged(old: Stamp, new: Stamp, by: &Access<'_>, warps: &Range<usize>) -> Stamp {
    // Whoever is ordered after the new read is then ordered after the old one too.
    if by.knows_read(old, warps) {
        return new;
    }
    let is_own = |warp: u16| warps.contains(&warp.into());
    let of_group = |warp: u16| SEVERAL_WARPS | 1 << (warp / 4);
    let several =
        |old: u16| if is_own(by.warp()) { old | of_group(by.warp()) } else { SEVERAL_BLOCKS };
    let lane = match old.lane() {
        SEVERAL_BLOCKS => SEVERAL_BLOCKS,
        l if l & SEVERAL_LANES == 0 && l & SEVERAL_WARPS != 0 => several(l),
        l => {
            let warp = if l & SEVERAL_LANES != 0 { l & !SEVERAL_LANES } else { l / 32 };
            match warp == by.warp() {
                true => SEVERAL_LANES | warp,
                false if is_own(warp) => several(of_group(warp)),
                false => SEVERAL_BLOCKS,
            }
        }
    };
    Stamp::new(by.now, lane)
}

/// The fault of an access after a write that it does not know.
#[cold]
fn after_write(
    offset: u32,
    what: &'static str,
    by: Access<'_>,
    write: Stamp,
    place: PackedPlace,
) -> FaultKind {
    if write.time() == PENDING {
        let copy = Site { lane: write.lane().into(), location: location(place) };
        return FaultKind::Pending { offset, what, this: by.site(), copy };
    }
    race(offset, what, by, "write", write, place)
}

fn race(
    offset: u32,
    what: &'static str,
    by: Access<'_>,
    other_what: &'static str,
    stamp: Stamp,
    place: PackedPlace,
) -> FaultKind {
    let other = Site { lane: who(stamp, other_what == "write"), location: location(place) };
    FaultKind::Race { offset, what, this: by.site(), other_what, other }
}

/// Who the lane of a stamp, of a write or a read, is to a [`Site`].
pub(super) fn who(stamp: Stamp, is_write: bool) -> u32 {
    match stamp.lane() {
        ATOMIC if is_write => Site::ATOMICS,
        SEVERAL_BLOCKS => Site::SEVERAL_WARPS,
        lane if lane & SEVERAL_LANES != 0 => Site::OF_WARP + u32::from(lane & !SEVERAL_LANES),
        lane if lane & SEVERAL_WARPS != 0 => Site::SEVERAL_WARPS,
        lane => lane.into(),
    }
}
