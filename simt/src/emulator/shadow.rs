//! A block's shared memory and the record beside it that finds races.
//!
//! The record has a cell for every two bytes: who wrote last, and who has read since.
//! Every check is a comparison with the accessing lane's clock, O(1) an access.

use std::panic::Location;

use super::{
    clock::{Clock, Time},
    fault::{FaultKind, Site},
};

/// Bytes that one cell of the record stands for: the smallest element kernels use.
const CELL_BYTES: u32 = 2;

/// Readers told apart since the last write. Three serve a producer and consumer
/// warpgroups; more are merged, which is exact under block-wide barriers.
const READERS: usize = 3;

/// Stands for several lanes of one warp in [`Read::lane`].
const SEVERAL_LANES: u16 = u16::MAX;
/// Stands for several warps in [`Read::warp`].
const SEVERAL_WARPS: u8 = u8::MAX;

/// Stands for an atomic operation in [`Write::lane`].
const ATOMIC: u16 = u16::MAX;

/// Source location as a distance from [`origin`], half the size of a pointer.
type Place = i32;

fn origin() -> *const Location<'static> {
    #[track_caller]
    fn here() -> &'static Location<'static> {
        Location::caller()
    }
    here()
}

fn place(location: &'static Location<'static>) -> Place {
    let distance =
        (location as *const Location).cast::<u8>() as isize - origin().cast::<u8>() as isize;
    Place::try_from(distance).unwrap_or(0)
}

fn location(place: Place) -> Option<&'static Location<'static>> {
    // SAFETY: a non-zero place is the distance of a `&'static Location` of this program.
    (place != 0).then(|| unsafe { &*origin().cast::<u8>().offset(place as isize).cast() })
}

#[derive(Clone, Copy, Default)]
struct Write {
    time: Time,
    place: Place,
    lane: u16,
}

#[derive(Clone, Copy, Default)]
struct Read {
    time: Time,
    place: Place,
    lane: u16,
    warp: u8,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    write: Write,
    reads: [Read; READERS],
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
    fn warp(&self) -> u8 {
        (self.lane / 32) as u8
    }

    fn site(&self) -> Site {
        Site { lane: self.lane.into(), location: Some(self.location) }
    }

    fn knows_write(&self, write: &Write) -> bool {
        if write.time <= self.clock.floor || write.lane == self.lane {
            return true;
        }
        write.lane != ATOMIC
            && self.clock.knows(write.lane, usize::from(write.lane / 32), write.time)
    }

    fn knows_read(&self, read: &Read) -> bool {
        if read.time <= self.clock.floor || read.lane == self.lane {
            return true;
        }
        match (read.warp, read.lane) {
            (SEVERAL_WARPS, _) => false,
            (warp, SEVERAL_LANES) => self.clock.knows_warp(warp.into(), read.time),
            (warp, lane) => self.clock.knows(lane, warp.into(), read.time),
        }
    }
}

/// Shared memory of the block that runs. Offsets are in bytes.
pub(crate) struct SharedMemory {
    bytes: Vec<u128>,
    cells: Vec<Cell>,
    len: u32,
    /// Cells stamped before this belong to an earlier block.
    begin: Time,
}

impl SharedMemory {
    pub fn new() -> Self {
        Self { bytes: Vec::new(), cells: Vec::new(), len: 0, begin: 1 }
    }

    /// Makes it `len` bytes long and forgets what was there before time `begin`.
    pub fn reset(&mut self, len: u32, begin: Time) {
        self.len = 0;
        self.begin = begin;
        self.grow(len);
    }

    /// Forgets every stamp, when time starts anew.
    pub fn clear(&mut self) {
        self.cells.fill(Cell::default());
    }

    /// Adds `bytes` bytes, aligned to 128, and returns their offset.
    pub fn extend(&mut self, bytes: u32) -> u32 {
        let offset = self.len.next_multiple_of(128);
        self.grow(offset + bytes);
        offset
    }

    fn grow(&mut self, len: u32) {
        self.len = len;
        let (words, cells) = (len.div_ceil(16) as usize, len.div_ceil(CELL_BYTES) as usize);
        if self.bytes.len() < words {
            self.bytes.resize(words, 0);
        }
        if self.cells.len() < cells {
            self.cells.resize(cells, Cell::default());
        }
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    /// The bytes at `offset`, which the caller has checked to be in bounds.
    pub fn at(&mut self, offset: u32) -> *mut u8 {
        // SAFETY: `offset` is at most `len`, which the allocation covers.
        unsafe { self.bytes.as_mut_ptr().cast::<u8>().add(offset as usize) }
    }

    fn cells(&mut self, offset: u32, bytes: u32) -> &mut [Cell] {
        let (first, last) = (offset / CELL_BYTES, (offset + bytes).div_ceil(CELL_BYTES));
        &mut self.cells[first as usize..last as usize]
    }

    /// Records a read of `bytes` bytes, unless it races or reads what nothing wrote.
    #[inline]
    pub fn read(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        let begin = self.begin;
        let warp = by.warp();
        for cell in self.cells(offset, bytes) {
            if cell.write.time < begin {
                return Err(FaultKind::Uninitialised { offset, this: by.site() });
            }
            if !by.knows_write(&cell.write) {
                return Err(race(offset, "read", by, "write", cell.write.lane, cell.write.place));
            }
            let first = &mut cell.reads[0];
            if first.time == by.now && first.warp == warp {
                if first.lane != by.lane {
                    first.lane = SEVERAL_LANES;
                }
            } else {
                remember_read(&mut cell.reads, begin, by);
            }
        }
        Ok(())
    }

    /// Records a write of `bytes` bytes, unless it races.
    #[inline]
    pub fn write(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        let begin = self.begin;
        let place = place(by.location);
        for cell in self.cells(offset, bytes) {
            if cell.write.time >= begin && !by.knows_write(&cell.write) {
                return Err(race(offset, "write", by, "write", cell.write.lane, cell.write.place));
            }
            for read in &cell.reads {
                if read.time >= begin && !by.knows_read(read) {
                    return Err(race(offset, "write", by, "read", read.lane, read.place));
                }
            }
            cell.write = Write { time: by.now, place, lane: by.lane };
            cell.reads = [Read::default(); READERS];
        }
        Ok(())
    }

    /// Records an atomic update of `bytes` bytes. Atomics do not race with each other.
    pub fn atomic(&mut self, offset: u32, bytes: u32, by: Access<'_>) -> Result<(), FaultKind> {
        let begin = self.begin;
        for cell in self.cells(offset, bytes) {
            if cell.write.time < begin {
                return Err(FaultKind::Uninitialised { offset, this: by.site() });
            }
            if cell.write.lane != ATOMIC && !by.knows_write(&cell.write) {
                return Err(race(offset, "atomic", by, "write", cell.write.lane, cell.write.place));
            }
            for read in &cell.reads {
                if read.time >= begin && !by.knows_read(read) {
                    return Err(race(offset, "atomic", by, "read", read.lane, read.place));
                }
            }
            cell.write = Write { time: by.now, place: place(by.location), lane: ATOMIC };
            cell.reads = [Read::default(); READERS];
        }
        Ok(())
    }
}

/// Keeps `by` among the readers of a cell.
fn remember_read(reads: &mut [Read; READERS], begin: Time, by: Access<'_>) {
    let warp = by.warp();
    let mut new = Read { time: by.now, place: place(by.location), lane: by.lane, warp };
    // A reader of the same warp: the new one stands for both.
    if let Some(old) = reads.iter_mut().find(|r| r.time >= begin && r.warp == warp) {
        if !by.knows_read(old) {
            new.lane = SEVERAL_LANES;
        }
        *old = new;
        return;
    }
    // A free place, or one whose reader came before this one anyway.
    if let Some(old) = reads.iter_mut().find(|r| r.time < begin || by.knows_read(r)) {
        *old = new;
        return;
    }
    // No place: the last stands for several warps, at the latest time.
    reads[READERS - 1] = Read { lane: SEVERAL_LANES, warp: SEVERAL_WARPS, ..new };
}

fn race(
    offset: u32,
    what: &'static str,
    by: Access<'_>,
    other_what: &'static str,
    lane: u16,
    place: Place,
) -> FaultKind {
    let other = Site { lane: lane.into(), location: location(place) };
    FaultKind::Race { offset, what, this: by.site(), other_what, other }
}
