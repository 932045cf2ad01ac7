//! Bulk copies as agents of their own: a load lands as late as it can, a store reads its
//! shared memory as late as it may, and writes when it is waited for or the block ends.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use half::{bf16, f16};

use super::{
    block::{Block, fenced},
    clock::{Agent, Clock, Time},
    current,
    fault::{FaultKind, Place, Site},
    global_memory::GlobalAccess,
    options::SyncKind,
    record::{Action, Counts},
    recording::Sectors,
    shadow::{Access, window},
    tensor_map::{Element, TensorMapSpec},
};
use crate::hardware::TensorMap;

struct Load {
    map: TensorMapSpec,
    coordinates: Vec<u32>,
    /// Where the box goes, and the mbarrier where its bytes count: one for each block.
    destinations: Vec<(u32, usize)>,
    /// The accesses that the starting lane knew.
    clock: Clock,
    lane: u16,
    at: Place,
}

/// The effect of a store on the elements in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Write {
    Replace,
    Add,
}

struct Store {
    map: TensorMapSpec,
    coordinates: Vec<u32>,
    source: u32,
    write: Write,
    lane: u16,
    /// Number of the lane's group; `None` until it is committed.
    group: Option<u64>,
    time: Time,
    at: Place,
    /// The box's bytes, once they have been read.
    taken: Option<Vec<u8>>,
}

/// Copies in flight.
#[derive(Default)]
pub(crate) struct BulkCopies {
    /// Oldest first.
    loads: Vec<Load>,
    stores: Vec<Store>,
    /// Groups committed so far, by lane.
    groups: Vec<(u16, u64)>,
}

impl BulkCopies {
    pub fn reset(&mut self) {
        self.loads.clear();
        self.stores.clear();
        self.groups.clear();
    }
}

impl Block {
    /// The map of a copy of `rank` dimensions.
    fn tensor_map(&self, map: u64, rank: usize, at: Place) -> Result<TensorMapSpec, FaultKind> {
        let bytes = map as *const TensorMap;
        let misuse = |message| Err(FaultKind::Misuse { message, this: self.site(at) });
        if bytes.is_null() || !bytes.is_aligned() {
            return misuse(format!(
                "a tensor map at {map:#x}: the address must be a multiple of 64"
            ));
        }
        // SAFETY: the address is that of a live map, as the copy asks, and is aligned.
        let Some(spec) = TensorMapSpec::decode(unsafe { &*bytes }) else {
            return misuse(format!("the bytes at {map:#x} are not an encoded tensor map"));
        };
        if spec.dims.len() != rank {
            let of_map = spec.dims.len();
            return misuse(format!("a copy of {rank} dimensions with a tensor map of {of_map}"));
        }
        Ok(spec)
    }

    /// The accesses that the current lane knows, its own included.
    fn own_knowledge(&self) -> Clock {
        let mut clock = self.lanes[self.current].clock.clone();
        clock.learn_lane(self.current as u16, self.time);
        clock
    }

    /// Checks a box in the shared memory of the block of that rank.
    fn check_box(
        &self,
        map: &TensorMapSpec,
        rank: usize,
        address: u32,
        what: &'static str,
        at: Place,
    ) -> Result<(), FaultKind> {
        let (bytes, this) = (map.box_bytes(), self.site(at));
        if address % map.alignment() != 0 {
            let (address, bytes) = (address.into(), map.alignment());
            return Err(FaultKind::Misaligned { space: "shared", what, address, bytes, this });
        }
        if !self.shared.holds(rank, address, bytes) {
            let index = address.wrapping_sub(window(rank)).into();
            let len = self.shared.len().into();
            return Err(FaultKind::OutOfBounds { space: "shared", what, index, len, this });
        }
        Ok(())
    }

    /// Loads that have not landed.
    pub(super) fn loads_on_their_way(&self) -> usize {
        self.bulk.loads.len()
    }

    /// Lets a load land: that of place `index` among those on their way, oldest first.
    pub(super) fn land_load(&mut self, index: usize) -> Result<(), FaultKind> {
        let load = self.bulk.loads.remove(index);
        let shared = self.shared.at(0);
        let mut read = 0;
        load.map.for_each_unit(&load.coordinates, |offset, address, valid| {
            let mut unit = [0u8; 16];
            // SAFETY: these bytes are within the map's tensor, which is allocated, as the copy
            // asks.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    address as *const u8,
                    unit.as_mut_ptr(),
                    valid as usize,
                );
            }
            for (destination, _) in &load.destinations {
                let to = destination + load.map.swizzled(offset);
                // SAFETY: `check_box` found the box within shared memory.
                unsafe { shared.add(to as usize).cast::<[u8; 16]>().write(unit) };
            }
            read += u64::from(valid);
        });
        self.stats.global_bytes_read += read;
        for (_, mbarrier) in load.destinations {
            self.complete_bytes(mbarrier, load.map.box_bytes(), &load.clock)?;
        }
        Ok(())
    }

    /// Reads the bytes of a store, if they have not been read.
    fn take_store(&mut self, store: &mut Store) {
        let shared = self.shared.at(0);
        store.taken.get_or_insert_with(|| {
            let mut bytes = vec![0; store.map.box_bytes() as usize];
            for (unit, to) in bytes.chunks_exact_mut(16).enumerate() {
                let from = store.source + store.map.swizzled(16 * unit as u32);
                // SAFETY: `check_box` found the box within shared memory.
                unsafe {
                    let from = shared.add(from as usize);
                    std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), 16);
                }
            }
            bytes
        });
    }

    /// Writes the bytes of a store, which have been read.
    fn land_store(&mut self, store: &Store) {
        let taken = store.taken.as_ref().expect("a store reads before it writes");
        let mut written = 0;
        store.map.for_each_unit(&store.coordinates, |offset, address, valid| {
            let from = taken[offset as usize..].as_ptr();
            // SAFETY: the box has these bytes; the map's tensor is allocated, as the copy asks.
            unsafe {
                match store.write {
                    Write::Replace => {
                        std::ptr::copy_nonoverlapping(from, address as *mut u8, valid as usize);
                    }
                    Write::Add => add(store.map.element, from, address, valid),
                }
            }
            written += u64::from(valid);
        });
        self.stats.global_bytes_written += written;
    }

    /// Records a bulk copy that the current lane starts: a load with its destinations, or a store.
    fn record_bulk(
        &mut self,
        map: &TensorMapSpec,
        coordinates: &[u32],
        destinations: Option<&[(u32, usize)]>,
        at: Place,
    ) {
        if self.recording.is_none() {
            return;
        }
        let mut sectors = Sectors::default();
        map.for_each_unit(coordinates, |_, address, valid| sectors.add(address, valid));
        let mut counts =
            Counts { global_requests: 1, global_sectors: sectors.count, ..Counts::default() };
        let box_bytes = u64::from(map.box_bytes());
        let action = match destinations {
            Some(destinations) => {
                counts.global_bytes_read = sectors.bytes;
                counts.shared_bytes_written = box_bytes * destinations.len() as u64;
                let phase = |&(_, index): &(u32, usize)| self.mbarriers.phase(index);
                Action::BulkLoad(destinations.iter().map(phase).collect())
            }
            None => {
                counts.global_bytes_written = sectors.bytes;
                counts.shared_bytes_read = box_bytes;
                Action::BulkStore
            }
        };
        if let Some(recording) = &mut self.recording {
            recording.count(at, counts);
        }
        self.record_event_of(|| (action, counts), at);
    }

    /// Lets stores land, and checks that no copy reads or writes shared memory when the blocks end.
    pub(super) fn finish_bulk(&mut self) -> Result<(), FaultKind> {
        let stores = std::mem::take(&mut self.bulk.stores);
        for store in stores {
            if store.taken.is_some() {
                self.land_store(&store);
            } else {
                self.bulk.stores.push(store);
            }
        }
        if let Some(load) = self.bulk.loads.first() {
            return Err(FaultKind::Misuse {
                message: "the kernel ended before this bulk load was waited for".to_owned(),
                this: Site { lane: load.lane.into(), location: Some(load.at) },
            });
        }
        match self.bulk.stores.first() {
            None => Ok(()),
            Some(store) => Err(FaultKind::Misuse {
                message:
                    "the kernel ended before this bulk store was waited for with wait_group_read"
                        .to_owned(),
                this: Site { lane: store.lane.into(), location: Some(store.at) },
            }),
        }
    }
}

/// Adds the elements of `bytes` bytes at `from` to those at global address `to`, each at
/// once, since other blocks may do so at the same time.
///
/// # Safety
/// Both must be valid and aligned for the elements.
unsafe fn add(element: Element, from: *const u8, to: u64, bytes: u32) {
    for offset in (0..bytes).step_by(element.bytes() as usize) {
        let to = to + u64::from(offset);
        // SAFETY: both addresses are valid for `bytes` bytes and aligned, as stated above.
        unsafe {
            let from = from.add(offset as usize);
            match element {
                Element::F32 => {
                    let value = from.cast::<f32>().read();
                    let sum = |old| Some((f32::from_bits(old) + value).to_bits());
                    let there = AtomicU32::from_ptr(to as *mut u32);
                    _ = there.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum);
                }
                Element::F16 => {
                    let value = from.cast::<f16>().read().to_f32();
                    let sum = |old| f16::from_f32(f16::from_bits(old).to_f32() + value).to_bits();
                    update(to, sum);
                }
                Element::Bf16 => {
                    let value = from.cast::<bf16>().read().to_f32();
                    let sum = |old| bf16::from_f32(bf16::from_bits(old).to_f32() + value).to_bits();
                    update(to, sum);
                }
            }
        }
    }
}

/// Replaces the 16 bits at a global address by what `f` makes of them.
///
/// # Safety
/// The address must be valid and aligned.
unsafe fn update(address: u64, f: impl Fn(u16) -> u16) {
    // SAFETY: the address is valid and aligned, as stated above.
    let there = unsafe { AtomicU16::from_ptr(address as *mut u16) };
    _ = there.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(f(old)));
}

pub(crate) fn load(destination: u32, map: u64, coordinates: &[u32], mbarrier: u32, at: Place) {
    let own = current::with(|b| 1 << b.rank());
    load_multicast(destination, map, coordinates, mbarrier, own, at);
}

pub(crate) fn load_multicast(
    destination: u32,
    map: u64,
    coordinates: &[u32],
    mbarrier: u32,
    blocks: u16,
    at: Place,
) {
    current::checked(|b| {
        let map = b.tensor_map(map, coordinates.len(), at)?;
        if blocks == 0 {
            let message = "a multicast load to no block: one bit for each is needed".to_owned();
            return Err(FaultKind::Misuse { message, this: b.site(at) });
        }
        let mut destinations = Vec::new();
        for rank in (0..u16::BITS).filter(|rank| blocks >> rank & 1 == 1) {
            let destination = b.map_shared_rank(destination, rank, at)?;
            let mbarrier = b.map_shared_rank(mbarrier, rank, at)?;
            b.check_box(&map, rank as usize, destination, "bulk load", at)?;
            let index = b.mbarrier(rank as usize, mbarrier, at)?;
            let clock = b.own_knowledge();
            b.check_mbarrier_fence(index, &clock, at)?;
            let now = b.tick();
            // The write is the barrier's: who waits for the phase knows of it. It must come
            // after everything there that the lane that starts it does not know to be over.
            let lane = Agent::mbarrier(index).lane();
            let by = Access { lane, now, clock: &clock, location: at };
            b.shared.write(destination, map.box_bytes(), by)?;
            if destinations.is_empty() {
                // Read once, for all blocks.
                let mut read = Ok(());
                map.for_each_unit(coordinates, |_, address, valid| {
                    if read.is_ok() {
                        let bytes = valid.into();
                        read = b.access_global_as(GlobalAccess::Read, address, bytes, by);
                    }
                });
                read?;
            }
            b.stats.shared_bytes_written += u64::from(map.box_bytes());
            b.reach_as(lane, rank as usize, now, at)?;
            destinations.push((destination, index));
        }
        b.record_bulk(&map, coordinates, Some(&destinations), at);
        let (lane, clock) = (b.current as u16, b.own_knowledge());
        let coordinates = coordinates.to_vec();
        b.bulk.loads.push(Load { map, coordinates, destinations, clock, lane, at });
        Ok(())
    });
}

pub(crate) fn store(map: u64, coordinates: &[u32], source: u32, at: Place) {
    write(Write::Replace, map, coordinates, source, at);
}

pub(crate) fn reduce_add(map: u64, coordinates: &[u32], source: u32, at: Place) {
    write(Write::Add, map, coordinates, source, at);
}

/// Adds `elements` f32 to those at a global address, whose bounds are checked.
pub(crate) fn reduce_add_flat(address: u64, elements: u32, source: u32, at: Place) {
    let map = TensorMapSpec {
        address,
        element: Element::F32,
        dims: vec![elements.into()],
        strides_bytes: vec![],
        box_dims: vec![elements],
        swizzle_bytes: 0,
    };
    current::checked(|b| b.start_store(Write::Add, map, &[0], source, at));
}

fn write(write: Write, map: u64, coordinates: &[u32], source: u32, at: Place) {
    current::checked(|b| {
        let map = b.tensor_map(map, coordinates.len(), at)?;
        b.start_store(write, map, coordinates, source, at)
    });
}

impl Block {
    /// Starts a store of the current lane.
    fn start_store(
        &mut self,
        write: Write,
        map: TensorMapSpec,
        coordinates: &[u32],
        source: u32,
        at: Place,
    ) -> Result<(), FaultKind> {
        let b = self;
        b.check_box(&map, b.rank(), source, "bulk store", at)?;
        let now = b.tick();
        b.has_agents = true;
        let (lane, rank, threads) = (b.current as u16, b.rank(), b.block_threads());
        let clock = &b.own_knowledge();
        let agent = Agent::store(lane).lane();
        // Elements outside of the tensor are not stored, and need not have been written.
        let mut read = Ok(());
        let kind = match write {
            Write::Replace => GlobalAccess::Write,
            Write::Add => GlobalAccess::Atomic,
        };
        map.for_each_unit(coordinates, |offset, address, valid| {
            if valid > 0 && read.is_ok() {
                let by = Access { lane: agent, now, clock, location: at };
                let fenced = |lane: u16| fenced(&b.lanes, threads, rank, clock, lane);
                read = b.shared.read_async(source + map.swizzled(offset), valid, by, fenced);
                if read.is_ok() {
                    read = b.access_global_as(kind, address, valid.into(), by);
                }
            }
        });
        read?;
        b.stats.shared_bytes_read += u64::from(map.box_bytes());
        b.record_bulk(&map, coordinates, None, at);
        let (group, coordinates) = (None, coordinates.to_vec());
        let (time, taken) = (now, None);
        let store = Store { map, coordinates, source, write, lane, group, time, at, taken };
        b.bulk.stores.push(store);
        Ok(())
    }
}

pub(crate) fn commit_group(at: Place) {
    if current::left_out(SyncKind::BulkCommit, at) {
        return;
    }
    current::with(|b| {
        b.record_event(|| Action::BulkCommit, at);
        let lane = b.current as u16;
        let copies = &mut b.bulk;
        let count = match copies.groups.iter_mut().find(|(l, _)| *l == lane) {
            Some((_, count)) => count,
            None => {
                copies.groups.push((lane, 0));
                &mut copies.groups.last_mut().expect("just pushed").1
            }
        };
        for store in copies.stores.iter_mut().filter(|s| s.lane == lane && s.group.is_none()) {
            store.group = Some(*count);
        }
        *count += 1;
    });
}

pub(crate) fn wait_group_read(pending: u32, at: Place) {
    wait(pending, false, at);
}

pub(crate) fn wait_group(pending: u32, at: Place) {
    wait(pending, true, at);
}

/// Waits until groups have read their shared memory, or also have written.
fn wait(pending: u32, performed: bool, at: Place) {
    let Some(pending) = current::pending(SyncKind::BulkWait, pending, at) else { return };
    current::with(|b| {
        b.record_event(|| Action::BulkWait(pending), at);
        let lane = b.current as u16;
        let committed = b.bulk.groups.iter().find(|(l, _)| *l == lane).map_or(0, |g| g.1);
        let complete = committed.saturating_sub(pending.into());
        let stores = std::mem::take(&mut b.bulk.stores);
        for mut store in stores {
            let waited_for = store.lane == lane && store.group.is_some_and(|g| g < complete);
            if waited_for {
                b.take_store(&mut store);
                let known = &mut b.lanes[b.current].clock.warps[Agent::store(lane).index()];
                *known = (*known).max(store.time);
            }
            if waited_for && performed {
                b.land_store(&store);
            } else {
                b.bulk.stores.push(store);
            }
        }
    });
}
