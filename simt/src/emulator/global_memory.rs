//! The record of global memory that finds races on it: within a block as in shared memory, by
//! what threads know of each other; between blocks by what each has read and written, compared
//! when it ends, since nothing orders the blocks of a launch.
//!
//! The record has a cell for every 16 bytes, which is what most accesses are, and eight for
//! those that are also accessed by parts.

use std::{
    collections::HashMap,
    slice,
    sync::{Mutex, PoisonError},
};

use super::{
    clock::Time,
    fault::{FaultKind, Site},
    shadow::{ATOMIC, Access, PackedPlace, Stamp, location, merged, place, who},
};
use crate::Dim3;

const PAGE: u64 = 4096;
const GRANULE: u64 = 16;
const GRANULES: usize = (PAGE / GRANULE) as usize;
/// Bytes of the smallest element that kernels write.
const CELL: u64 = 2;
const CELLS: usize = (GRANULE / CELL) as usize;
/// Pages whose record is kept for the next block.
const KEPT_PAGES: usize = 2048;
/// Pages that are found without a look into the table.
const RECENT: usize = 16;

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GlobalAccess {
    Read,
    Write,
    Atomic,
}

impl GlobalAccess {
    /// How a fault calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "atomic",
        }
    }
}

/// The last write, and the readers since.
#[derive(Clone, Copy, Default)]
struct Cell {
    write: Stamp,
    read: Stamp,
    write_place: PackedPlace,
    read_place: PackedPlace,
}

/// 16 bytes: one cell, or one more than the index of eight in [`GlobalMemory::parts`]; and which
/// of the eight were written, updated atomically and read in this block.
#[derive(Clone, Copy, Default)]
struct Granule {
    cell: Cell,
    parts: u32,
    written: u8,
    updated: u8,
    read: u8,
}

struct Page {
    number: u64,
    /// When the block began that the record is of.
    begin: Time,
    granules: Box<[Granule; GRANULES]>,
}

/// The record of the blocks that run together.
#[derive(Default)]
pub(crate) struct GlobalMemory {
    pages: Vec<Page>,
    index: HashMap<u64, usize>,
    recent: [(u64, usize); RECENT],
    parts: Vec<[Cell; CELLS]>,
    /// Pages that these blocks have accessed.
    touched: Vec<usize>,
    begin: Time,
    /// Warps of these blocks.
    warps: usize,
}

impl GlobalMemory {
    /// Forgets accesses before time `begin`.
    pub fn reset(&mut self, begin: Time, warps: usize) {
        (self.begin, self.warps) = (begin, warps);
        self.parts.clear();
        self.touched.clear();
        self.recent = Default::default();
        if self.pages.len() > KEPT_PAGES {
            self.clear();
        }
    }

    /// Forgets everything, when time starts anew.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.index.clear();
        self.recent = Default::default();
    }

    /// Records an access to `bytes` bytes, unless it races. Whether these blocks have accessed
    /// any of them in that way for the first time.
    #[inline]
    pub fn access(
        &mut self,
        kind: GlobalAccess,
        address: u64,
        bytes: u64,
        by: Access<'_>,
    ) -> Result<bool, FaultKind> {
        let (mut from, end) = (address, address + bytes);
        let mut is_new = false;
        while from < end {
            let to = end.min((from | (GRANULE - 1)) + 1);
            match self.access_granule(kind, from, to - from, &by) {
                Ok(new) => is_new |= new,
                Err(part) => return Err(self.race(kind, from, part, &by)),
            }
            from = to;
        }
        Ok(is_new)
    }

    /// As [`access`](Self::access), within 16 bytes; the error is the part of them that races.
    ///
    /// Part of its caller, and `by` with it: copies of that take longer than all checks.
    #[inline(always)]
    fn access_granule(
        &mut self,
        kind: GlobalAccess,
        address: u64,
        bytes: u64,
        by: &Access<'_>,
    ) -> Result<bool, usize> {
        let page = self.page(address / PAGE);
        let granule = &mut self.pages[page].granules[(address % PAGE / GRANULE) as usize];
        let in_granule = address % GRANULE;
        let first = (in_granule / CELL) as usize;
        let end = (in_granule + bytes).div_ceil(CELL) as usize;
        let mask = (((1u16 << end) - 1) & !((1 << first) - 1)) as u8;
        let accessed = match kind {
            GlobalAccess::Read => &mut granule.read,
            GlobalAccess::Write => &mut granule.written,
            GlobalAccess::Atomic => &mut granule.updated,
        };
        let is_new = *accessed & mask != mask;
        *accessed |= mask;
        let check = Check { kind, warps: self.warps, by };
        if mask != u8::MAX && granule.parts == 0 {
            self.parts.push([granule.cell; CELLS]);
            granule.parts = self.parts.len() as u32;
        }
        let cells = match granule.parts {
            0 => slice::from_mut(&mut granule.cell),
            parts => &mut self.parts[parts as usize - 1][first..end],
        };
        for (part, cell) in cells.iter_mut().enumerate() {
            if check.other(cell).is_some() {
                return Err(first + part);
            }
            check.record(cell);
        }
        Ok(is_new)
    }

    /// The fault of an access to part `part` of 16 bytes.
    #[cold]
    fn race(
        &mut self,
        kind: GlobalAccess,
        address: u64,
        part: usize,
        by: &Access<'_>,
    ) -> FaultKind {
        let page = self.page(address / PAGE);
        let granule = self.pages[page].granules[(address % PAGE / GRANULE) as usize];
        let cell = self.cell(&granule, part);
        let other = Check { kind, warps: self.warps, by }.other(cell);
        let (stamp, place) = match other {
            Some(GlobalAccess::Read) => (cell.read, cell.read_place),
            _ => (cell.write, cell.write_place),
        };
        let other_what = match other {
            Some(GlobalAccess::Read) => GlobalAccess::Read,
            _ if stamp.lane() == ATOMIC => GlobalAccess::Atomic,
            _ => GlobalAccess::Write,
        };
        let lane = who(stamp, other_what != GlobalAccess::Read);
        FaultKind::GlobalRace {
            address,
            what: kind.name(),
            this: by.site(),
            other_what: other_what.name(),
            other: Site { lane, location: location(place) },
            other_block: None,
        }
    }

    /// The record of part `part` of 16 bytes.
    fn cell<'a>(&'a self, granule: &'a Granule, part: usize) -> &'a Cell {
        match granule.parts {
            0 => &granule.cell,
            parts => &self.parts[parts as usize - 1][part],
        }
    }

    #[inline]
    fn page(&mut self, number: u64) -> usize {
        let (recent, page) = self.recent[number as usize % RECENT];
        if recent == number && number != 0 { page } else { self.find_page(number) }
    }

    #[cold]
    fn find_page(&mut self, number: u64) -> usize {
        let page = *self.index.entry(number).or_insert_with(|| {
            let granules = Box::new([Granule::default(); GRANULES]);
            self.pages.push(Page { number, begin: 0, granules });
            self.pages.len() - 1
        });
        let found = &mut self.pages[page];
        if found.begin != self.begin {
            found.begin = self.begin;
            found.granules.fill(Granule::default());
            self.touched.push(page);
        }
        self.recent[number as usize % RECENT] = (number, page);
        page
    }

    /// The last access of a kind to part `part` of a granule, by a block.
    fn last(&self, block: u32, granule: &Granule, part: usize, is_read: bool) -> Last {
        let cell = self.cell(granule, part);
        if is_read {
            Last { block, lane: who(cell.read, false), place: cell.read_place }
        } else {
            Last { block, lane: who(cell.write, true), place: cell.write_place }
        }
    }
}

/// An access to be checked against a cell, of which every stamp is of the blocks that run.
#[derive(Clone, Copy)]
struct Check<'a> {
    kind: GlobalAccess,
    warps: usize,
    by: &'a Access<'a>,
}

impl Check<'_> {
    /// The access that races with this one: the last write, or a read since.
    #[inline(always)]
    fn other(&self, cell: &Cell) -> Option<GlobalAccess> {
        let (by, warps) = (self.by, &(0..self.warps));
        let both_atomic = self.kind == GlobalAccess::Atomic && cell.write.lane() == ATOMIC;
        if !cell.write.is_none() && !both_atomic && !by.knows_write(cell.write, warps) {
            return Some(GlobalAccess::Write);
        }
        if self.kind != GlobalAccess::Read
            && !cell.read.is_none()
            && !by.knows_read(cell.read, warps)
        {
            return Some(GlobalAccess::Read);
        }
        None
    }

    #[inline(always)]
    fn record(&self, cell: &mut Cell) {
        let by = self.by;
        if self.kind == GlobalAccess::Read {
            if by.is_in(cell.read) {
                return;
            }
            cell.read = match cell.read.is_none() {
                true => by.stamp(),
                false => merged(cell.read, by.stamp(), by, &(0..self.warps)),
            };
            cell.read_place = place(by.location);
            return;
        }
        // Accesses ordered after this write are ordered after earlier reads too; but who read is
        // still asked for when the block ends.
        cell.write = match self.kind {
            GlobalAccess::Atomic => Stamp::new(by.now, ATOMIC),
            _ => by.stamp(),
        };
        cell.write_place = place(by.location);
    }
}

/// Who accessed 16 bytes last.
#[derive(Clone, Copy, Default)]
struct Last {
    /// Index of the block in the grid.
    block: u32,
    lane: u32,
    place: PackedPlace,
}

impl Last {
    fn site(self) -> Site {
        Site { lane: self.lane, location: location(self.place) }
    }
}

/// Accesses of blocks to 16 bytes: to which parts, and by which block last.
#[derive(Clone, Copy, Default)]
struct Summary {
    written: u8,
    updated: u8,
    read: u8,
    writer: Last,
    reader: Last,
}

/// Accesses to global memory of the launch's ended blocks.
#[derive(Default)]
pub(crate) struct BetweenBlocks(Mutex<HashMap<u64, Box<[Summary; GRANULES]>>>);

impl BetweenBlocks {
    /// Adds what the cluster that begins with block `block` of the grid did, unless it races with
    /// another one.
    pub fn add(&self, memory: &GlobalMemory, block: u64, grid: Dim3) -> Result<(), FaultKind> {
        let block = block as u32;
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for page in memory.touched.iter().map(|&page| &memory.pages[page]) {
            let summaries = pages
                .entry(page.number)
                .or_insert_with(|| Box::new([Summary::default(); GRANULES]));
            for (index, (granule, others)) in page.granules.iter().zip(&mut **summaries).enumerate()
            {
                let written = granule.written | granule.updated;
                if written | granule.read == 0 {
                    continue;
                }
                let part = |mask: u8| mask.trailing_zeros() as usize;
                if let Some((mask, what, other_what)) = conflict(granule, others) {
                    let (is_read, of_reader) =
                        (what == GlobalAccess::Read, other_what == GlobalAccess::Read);
                    let other = if of_reader { others.reader } else { others.writer };
                    return Err(FaultKind::GlobalRace {
                        address: page.number * PAGE
                            + index as u64 * GRANULE
                            + part(mask) as u64 * CELL,
                        what: what.name(),
                        this: memory.last(block, granule, part(mask), is_read).site(),
                        other_what: other_what.name(),
                        other: other.site(),
                        other_block: Some(grid.unravel(other.block.into())),
                    });
                }
                if written != 0 {
                    others.writer = memory.last(block, granule, part(written), false);
                }
                if granule.read != 0 {
                    others.reader = memory.last(block, granule, part(granule.read), true);
                }
                others.written |= granule.written;
                others.updated |= granule.updated;
                others.read |= granule.read;
            }
        }
        Ok(())
    }
}

/// Parts of 16 bytes where a block and others before it did what must be ordered, and what.
fn conflict(granule: &Granule, others: &Summary) -> Option<(u8, GlobalAccess, GlobalAccess)> {
    use GlobalAccess::{Atomic, Read, Write};
    // Hardly ever anything: most memory is only read, or accessed by one block.
    let (written, by_others) = (granule.written | granule.updated, others.written | others.updated);
    if written & (by_others | others.read) | granule.read & by_others == 0 {
        return None;
    }
    let conflicts = [
        (granule.written & others.written, Write, Write),
        (granule.written & others.updated, Write, Atomic),
        (granule.updated & others.written, Atomic, Write),
        (granule.written & others.read, Write, Read),
        (granule.updated & others.read, Atomic, Read),
        (granule.read & others.written, Read, Write),
        (granule.read & others.updated, Read, Atomic),
    ];
    conflicts.into_iter().find(|(mask, ..)| *mask != 0)
}
