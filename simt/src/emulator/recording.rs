//! The work of one cluster while a launch records: lanes' accesses are put together to the requests of
//! their warp, counted by place, and kept in order where that was asked for.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    mem::discriminant,
    ptr,
    sync::{Mutex, PoisonError},
};

use super::{
    Launch, banks,
    block::Block,
    current,
    fault::Place,
    record::{Action, ClusterTrace, Counts, Event, LaunchRecord, LineRecord, Recorder},
};
use crate::hardware::{FULL_MASK, LANES};

const WARP: usize = LANES as usize;
/// Bytes of a sector of global memory.
pub(super) const SECTOR: u64 = 32;

/// Hashes the address of a place.
#[derive(Default)]
struct PlaceHasher(u64);

impl Hasher for PlaceHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}

type PlaceMap<K, V> = HashMap<K, V, BuildHasherDefault<PlaceHasher>>;

/// The counts at a place, and the accesses that are not yet put together.
struct Counted {
    at: Place,
    counts: Counts,
    /// Times that the warp that meets now has executed it, and its threads did: a place may make
    /// several kinds of accesses, of which each says so.
    warps: u64,
    threads: u64,
}

/// The n-th accesses of a warp's lanes at a place.
struct Round {
    /// Lanes that have come.
    mask: u32,
    addresses: [u64; WARP],
    event: usize,
}

/// The work of a warp at a place, of one kind.
struct Series {
    place: usize,
    action: Action,
    /// Times that each lane came since the warp met.
    seen: [u32; WARP],
    /// The most of these.
    most: u32,
    /// Bytes of an access.
    bytes: u32,
    /// Number of the first round that is open.
    first: u32,
    open: VecDeque<Round>,
    /// The event that its next times belong to.
    event: usize,
}

#[derive(Default)]
struct WarpRecording {
    series: Vec<Series>,
    index: PlaceMap<(usize, std::mem::Discriminant<Action>), usize>,
    /// Series of which lanes have come since the warp met.
    touched: Vec<usize>,
    events: Vec<(usize, Event)>,
    /// Events from here on may still grow.
    growing: usize,
    /// Lanes that have returned.
    done: u32,
}

/// The work of a cluster so far.
pub(crate) struct Recording {
    cluster: u64,
    block_warps: usize,
    traced: bool,
    places: Vec<Counted>,
    place_index: PlaceMap<usize, usize>,
    warps: Vec<WarpRecording>,
}

impl Recording {
    pub fn new(recorder: &Recorder, launch: &Launch, cluster: u64) -> Self {
        let block_warps = launch.block.count().div_ceil(WARP as u64) as usize;
        let mut warps = Vec::new();
        warps.resize_with(block_warps * launch.cluster as usize, WarpRecording::default);
        Self {
            cluster,
            block_warps,
            traced: recorder.traces(cluster),
            places: Vec::new(),
            place_index: PlaceMap::default(),
            warps,
        }
    }

    fn place(&mut self, at: Place) -> usize {
        let places = &mut self.places;
        *self.place_index.entry(ptr::from_ref(at).addr()).or_insert_with(|| {
            places.push(Counted { at, counts: Counts::default(), warps: 0, threads: 0 });
            places.len() - 1
        })
    }

    /// Adds to the counts of a place.
    pub fn count(&mut self, at: Place, counts: Counts) {
        let place = self.place(at);
        self.places[place].counts += counts;
    }

    /// The series of an action of `lane` at a place, and whether it is the first lane to come there
    /// for that time.
    fn come(&mut self, lane: usize, action: Action, at: Place) -> (usize, bool) {
        let place = self.place(at);
        let traced = self.traced;
        let warp = &mut self.warps[lane / WARP];
        let key = (place, discriminant(&action));
        let index = match warp.index.get(&key) {
            Some(&index) => index,
            None => {
                warp.index.insert(key, warp.series.len());
                warp.series.push(Series {
                    place,
                    action: action.clone(),
                    seen: [0; WARP],
                    most: 0,
                    bytes: 0,
                    first: 0,
                    open: VecDeque::new(),
                    event: usize::MAX,
                });
                warp.series.len() - 1
            }
        };
        let series = &mut warp.series[index];
        let seen = &mut series.seen[lane % WARP];
        *seen += 1;
        let is_first = *seen > series.most;
        if traced && !is_first && matches!(action, Action::Barrier(_)) {
            // No lane goes on before the last has come: what the others did until then comes first.
            let event = &mut warp.events[series.event].1;
            let moved = event.clone();
            event.times = 0;
            series.event = warp.events.len();
            warp.events.push((place, moved));
            warp.growing = warp.events.len();
        }
        if is_first {
            if series.most == 0 {
                warp.touched.push(index);
            }
            series.most = *seen;
            if traced {
                let splits = action.splits();
                let grows = series.event >= warp.growing && series.event < warp.events.len();
                if !grows || splits {
                    series.event = warp.events.len();
                    let counts = Counts::default();
                    let (file, line) = (at.file(), at.line());
                    warp.events.push((place, Event { file, line, action, times: 0, counts }));
                }
                warp.events[series.event].1.times += 1;
                if splits {
                    warp.growing = warp.events.len();
                }
            }
        }
        (index, is_first)
    }

    /// An access of a lane.
    pub fn access(&mut self, lane: usize, action: Action, address: u64, bytes: u32, at: Place) {
        let (index, is_first) = self.come(lane, action, at);
        let place = self.warps[lane / WARP].series[index].place;
        let warp = &mut self.warps[lane / WARP];
        let series = &mut warp.series[index];
        series.bytes = bytes;
        let number = series.seen[lane % WARP] - 1;
        if is_first {
            let (mask, addresses) = (0, [0; WARP]);
            series.open.push_back(Round { mask, addresses, event: series.event });
        }
        let round = &mut series.open[(number - series.first) as usize];
        round.mask |= 1 << (lane % WARP);
        round.addresses[lane % WARP] = address;
        while series.open.front().is_some_and(|round| round.mask | warp.done == FULL_MASK) {
            let Some(round) = series.open.pop_front() else { break };
            series.first += 1;
            let counts = request(&series.action, series.bytes, &round);
            self.places[place].counts += counts;
            if let Some((_, event)) = warp.events.get_mut(round.event) {
                event.counts += counts;
            }
        }
    }

    /// Arithmetic of a lane, or of one lane for its warp.
    pub fn work(&mut self, lane: usize, action: Action, counts: Counts, at: Place) {
        let (index, _) = self.come(lane, action, at);
        let warp = &mut self.warps[lane / WARP];
        let series = &warp.series[index];
        self.places[series.place].counts += counts;
        if let Some((_, event)) = warp.events.get_mut(series.event) {
            event.counts += counts;
        }
    }

    /// A synchronisation that a lane comes to. Its warp's first lane says which it is, and how much it
    /// does, which is not counted at the place.
    pub fn event(&mut self, lane: usize, action: Action, counts: Counts, at: Place) {
        let waits = action.waits();
        let (index, is_first) = self.come(lane, action, at);
        if !is_first {
            return;
        }
        let warp = &mut self.warps[lane / WARP];
        let series = &warp.series[index];
        self.places[series.place].counts.waits += u64::from(waits);
        if let Some((_, event)) = warp.events.get_mut(series.event) {
            event.counts += counts;
        }
    }

    /// The work that a warp's lanes of `mask` do together, at once.
    pub fn together(&mut self, warp: usize, mask: u32, action: Action, counts: Counts, at: Place) {
        let first = mask.trailing_zeros() as usize;
        let (waits, (index, _)) = (action.waits(), self.come(warp * WARP + first, action, at));
        let warp = &mut self.warps[warp];
        let series = &mut warp.series[index];
        for lane in (first + 1..WARP).filter(|lane| mask >> lane & 1 == 1) {
            series.seen[lane] += 1;
        }
        let place = &mut self.places[series.place];
        place.counts += Counts { waits: waits.into(), ..counts };
        if let Some((_, event)) = warp.events.get_mut(series.event) {
            event.counts += counts;
        }
    }

    /// The lanes of a warp stand at one place: what they did before is put together.
    pub fn meet(&mut self, warp: usize) {
        let warp = &mut self.warps[warp];
        for &index in &warp.touched {
            let series = &mut warp.series[index];
            let counted = &mut self.places[series.place];
            for round in series.open.drain(..) {
                let counts = request(&series.action, series.bytes, &round);
                counted.counts += counts;
                if let Some((_, event)) = warp.events.get_mut(round.event) {
                    event.counts += counts;
                }
            }
            counted.warps = counted.warps.max(series.most.into());
            let threads = series.seen.iter().map(|&n| u64::from(n)).sum();
            counted.threads = counted.threads.max(threads);
            (series.seen, series.most, series.first) = ([0; WARP], 0, 0);
        }
        for index in warp.touched.drain(..) {
            let counted = &mut self.places[warp.series[index].place];
            counted.counts.warps += std::mem::take(&mut counted.warps);
            counted.counts.threads += std::mem::take(&mut counted.threads);
        }
    }

    /// A lane returns from the kernel.
    pub fn lane_done(&mut self, lane: usize) {
        self.warps[lane / WARP].done |= 1 << (lane % WARP);
    }
}

/// The accesses of a round as a request of the warp.
fn request(action: &Action, bytes: u32, round: &Round) -> Counts {
    let lanes = (0..WARP).filter(|lane| round.mask >> lane & 1 == 1);
    let all = u64::from(round.mask.count_ones()) * u64::from(bytes);
    let mut counts = Counts::default();
    match action {
        Action::GlobalRead | Action::GlobalWrite | Action::GlobalAtomic => {
            let first = lanes.clone().map(|lane| round.addresses[lane] / SECTOR);
            let last = lanes.map(|lane| (round.addresses[lane] + u64::from(bytes) - 1) / SECTOR);
            let mut sectors: Vec<u64> = first.chain(last).collect();
            sectors.sort_unstable();
            sectors.dedup();
            (counts.global_requests, counts.global_sectors) = (1, sectors.len() as u64);
            match action {
                Action::GlobalRead => counts.global_bytes_read = all,
                _ => counts.global_bytes_written = all,
            }
        }
        _ => {
            let (passes, least) = banks::passes(round.mask, &round.addresses, bytes);
            counts.shared_requests = 1;
            (counts.shared_passes, counts.shared_passes_least) = (passes, least);
            match action {
                Action::SharedRead => counts.shared_bytes_read = all,
                Action::SharedAtomic => {
                    (counts.shared_bytes_read, counts.shared_bytes_written) = (all, all);
                }
                _ => counts.shared_bytes_written = all,
            }
        }
    }
    counts
}

/// Sectors of pieces of global memory that come in the order of their addresses.
#[derive(Default)]
pub(super) struct Sectors {
    last: Option<u64>,
    pub count: u64,
    pub bytes: u64,
}

impl Sectors {
    pub fn add(&mut self, address: u64, bytes: u32) {
        if bytes == 0 {
            return;
        }
        self.bytes += u64::from(bytes);
        for sector in address / SECTOR..=(address + u64::from(bytes) - 1) / SECTOR {
            if self.last != Some(sector) {
                self.last = Some(sector);
                self.count += 1;
            }
        }
    }
}

impl Block {
    /// Records an access of the current lane.
    #[cold]
    #[inline(never)]
    pub(super) fn record_access(&mut self, action: Action, address: u64, bytes: u32, at: Place) {
        let lane = self.current;
        if let Some(recording) = &mut self.recording {
            recording.access(lane, action, address, bytes, at);
        }
    }

    /// Records a synchronisation that the current lane comes to.
    pub(super) fn record_event(&mut self, action: impl FnOnce() -> Action, at: Place) {
        self.record_event_of(|| (action(), Counts::default()), at);
    }

    /// Records a synchronisation, with how much it does.
    pub(super) fn record_event_of(&mut self, event: impl FnOnce() -> (Action, Counts), at: Place) {
        let lane = self.current;
        if let Some(recording) = &mut self.recording {
            let (action, counts) = event();
            recording.event(lane, action, counts, at);
        }
    }

    /// Records what a warp does at once.
    pub(crate) fn record_together(
        &mut self,
        (warp, mask): (usize, u32),
        action: Action,
        counts: Counts,
        at: Place,
    ) {
        if let Some(recording) = &mut self.recording {
            recording.together(warp, mask, action, counts, at);
        }
    }

    /// Records a collective that has been computed: its lanes stand at one place.
    #[cold]
    #[inline(never)]
    pub(super) fn record_collective(
        &mut self,
        name: &'static str,
        warp: usize,
        mask: u32,
        at: Place,
    ) {
        let action = match name {
            "sync_warp" => Some(Action::WarpBarrier),
            // The code that does their work records it.
            "arrive" | "wait_group" | "load_chunk" => None,
            name if ["m16n8k", "load_x", "store_x"].iter().any(|n| name.starts_with(n)) => None,
            _ => Some(Action::Collective(name)),
        };
        if let Some(action) = action {
            self.record_together((warp, mask), action, Counts::default(), at);
        }
        if mask == self.present(warp) {
            self.record_meeting(warp);
        }
    }

    /// Records that the lanes of a warp stand at one place.
    pub(super) fn record_meeting(&mut self, warp: usize) {
        if let Some(recording) = &mut self.recording {
            recording.meet(warp);
        }
    }
}

/// Records arithmetic of the current lane, if its launch records.
#[cold]
#[inline(never)]
pub(crate) fn math(flops: u64, special: u64, at: Place) {
    current::if_inside(|b| {
        let lane = b.current;
        if let Some(recording) = &mut b.recording {
            let counts = Counts { flops, special, ..Counts::default() };
            recording.work(lane, Action::Math, counts, at);
        }
    });
}

/// The work of a launch's clusters so far.
#[derive(Default)]
pub(super) struct Gathered(Mutex<Launched>);

#[derive(Default)]
struct Launched {
    /// By file, line and column.
    lines: BTreeMap<(&'static str, u32, u32), LineRecord>,
    traces: Vec<ClusterTrace>,
}

impl Gathered {
    /// Adds a cluster that has ended.
    pub fn add(&self, mut recording: Recording) {
        for warp in 0..recording.warps.len() {
            recording.meet(warp);
        }
        let mut gathered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Launched { lines, traces } = &mut *gathered;
        for Counted { at, counts, .. } in &recording.places {
            let key = (at.file(), at.line(), at.column());
            let line = lines.entry(key).or_insert_with(|| LineRecord::new(at));
            line.counts += *counts;
            // A place may have several addresses.
            match line.clusters.last_mut() {
                Some((cluster, warps)) if *cluster == recording.cluster => *warps += counts.warps,
                _ => line.clusters.push((recording.cluster, counts.warps)),
            }
        }
        if recording.traced {
            let is_there = |event: &Event| event.times > 0;
            let events = |warp: WarpRecording| {
                warp.events.into_iter().map(|(_, event)| event).filter(is_there).collect()
            };
            traces.push(ClusterTrace {
                cluster: recording.cluster,
                block_warps: recording.block_warps,
                warps: recording.warps.into_iter().map(events).collect(),
            });
        }
    }

    /// The record of a launch that has ended.
    pub fn finish(self, name: &'static str, launch: Launch) -> LaunchRecord {
        let launched = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Launched { lines, mut traces } = launched;
        traces.sort_by_key(|trace| trace.cluster);
        let mut lines: Vec<LineRecord> = lines.into_values().collect();
        for line in &mut lines {
            line.clusters.sort_unstable();
        }
        LaunchRecord { name, launch, lines, traces }
    }
}
