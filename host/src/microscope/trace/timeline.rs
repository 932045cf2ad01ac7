//! Puts the events of a cluster on a line of time: each warp goes on with the costs of what it does, and
//! waits for what it waited for under the emulator.

use std::collections::{BTreeMap, HashMap};

use flash_attention::backend::cpu::emulator::{Action, ClusterTrace, Event, Visit};

use super::costs;

/// Warps of a warpgroup.
const WARPGROUP: usize = 4;

/// Who does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Track {
    /// A warp, counted over the cluster.
    Warp(usize),
    /// Asynchronous copies (`cp.async`) of a warp's block.
    Copies(usize),
    /// The copy engine (TMA) of a block.
    CopyEngine(usize),
    /// The tensor cores of a block, as wgmma uses them.
    TensorCores(usize),
}

/// Something that takes time.
#[derive(Clone, Debug)]
pub struct Slice {
    /// Who.
    pub track: Track,
    /// Clocks.
    pub start: f64,
    /// Clocks.
    pub end: f64,
    /// The work, and its place.
    pub event: Event,
}

/// That the end of a wait, or the begin of an agent's work, follows from something: two slices by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrow {
    /// The slice that causes it.
    pub from: usize,
    /// The slice that begins, or ends its wait.
    pub to: usize,
}

/// The order of a cluster, with its estimate of time.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// Everything that takes time.
    pub slices: Vec<Slice>,
    /// The arrows from a cause to its effect.
    pub arrows: Vec<Arrow>,
    /// Clocks and bytes by which what is on its way to shared memory of a block changes.
    pub in_flight: Vec<(usize, f64, i64)>,
}

/// When something is complete, and the slices that it came of.
#[derive(Clone, Debug, Default)]
struct Gathering {
    /// How many are still missing.
    missing: usize,
    time: f64,
    /// The slice that came last.
    last: Option<usize>,
}

impl Gathering {
    fn add(&mut self, time: f64, slice: usize) {
        self.missing -= 1;
        if time >= self.time {
            (self.time, self.last) = (time, Some(slice));
        }
    }
}

/// A group of copies of a warp.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    time: f64,
    slice: Option<usize>,
}

#[derive(Default)]
struct Warp {
    time: f64,
    next: usize,
    /// The slice of its wait, while it waits.
    waiting: Option<usize>,
    /// Its copies since the last commit, and its groups.
    copies: [Group; 2],
    groups: [Vec<Group>; 2],
}

/// Asynchronous copies, and bulk stores, in [`Warp::groups`].
const COPIES: usize = 0;
const STORES: usize = 1;

struct Run<'a> {
    trace: &'a ClusterTrace,
    timeline: Timeline,
    warps: Vec<Warp>,
    barriers: HashMap<Visit, Gathering>,
    phases: HashMap<(u32, u32), Gathering>,
    /// By warpgroup and number.
    products: BTreeMap<(usize, u64), Gathering>,
    /// When each agent is free again.
    free: HashMap<Track, f64>,
}

impl Timeline {
    /// The timeline of a cluster.
    #[must_use]
    pub fn new(trace: &ClusterTrace) -> Self {
        let mut run = Run {
            trace,
            timeline: Self::default(),
            warps: trace.warps.iter().map(|_| Warp::default()).collect(),
            barriers: HashMap::new(),
            phases: HashMap::new(),
            products: BTreeMap::new(),
            free: HashMap::new(),
        };
        run.expect();
        while run.step() {}
        run.timeline.in_flight.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        run.timeline
    }

    /// Clocks from the begin to the end.
    #[must_use]
    pub fn clocks(&self) -> f64 {
        self.slices.iter().map(|slice| slice.end).fold(0.0, f64::max)
    }
}

impl Run<'_> {
    /// Counts who will come where.
    fn expect(&mut self) {
        for (warp, events) in self.trace.warps.iter().enumerate() {
            for event in events {
                match &event.action {
                    Action::Barrier(visit) | Action::BarrierArrive(visit) => {
                        self.barriers.entry(*visit).or_default().missing += 1;
                    }
                    Action::MbarrierArrive(address, phase) => {
                        self.phases.entry((*address, *phase)).or_default().missing += 1;
                    }
                    Action::BulkLoad(phases) => {
                        for phase in phases {
                            self.phases.entry(*phase).or_default().missing += 1;
                        }
                    }
                    Action::WgmmaStart(number) => {
                        self.products.entry((warp / WARPGROUP, *number)).or_default().missing += 1;
                    }
                    _ => {}
                }
            }
        }
    }

    /// The earliest warp that can go on does one thing. False when all are done.
    fn step(&mut self) -> bool {
        let open = |w: &usize| self.warps[*w].next < self.trace.warps[*w].len();
        let by_time = |a: &usize, b: &usize| self.warps[*a].time.total_cmp(&self.warps[*b].time);
        let all = || (0..self.warps.len()).filter(open);
        // A warp whose wait never ends here (its record was cut off) goes on last.
        let ready = all().filter(|&warp| self.is_ready(warp)).min_by(by_time);
        let Some(warp) = ready.or_else(|| all().min_by(by_time)) else { return false };
        self.advance(warp);
        true
    }

    /// The events that the next event of a warp waits for, once the warp has come there.
    fn awaited(&self, warp: usize) -> Vec<&Gathering> {
        match &self.trace.warps[warp][self.warps[warp].next].action {
            Action::Barrier(visit) => self.barriers.get(visit).into_iter().collect(),
            Action::MbarrierWait(address, Some(phase)) => {
                self.phases.get(&(*address, *phase)).into_iter().collect()
            }
            Action::WgmmaWait(number) => {
                let group = warp / WARPGROUP;
                self.products.range((group, 0)..(group, *number)).map(|(_, g)| g).collect()
            }
            _ => Vec::new(),
        }
    }

    fn is_ready(&self, warp: usize) -> bool {
        self.warps[warp].waiting.is_none()
            || self.awaited(warp).iter().all(|gathering| gathering.missing == 0)
    }

    fn block(&self, warp: usize) -> usize {
        warp / self.trace.block_warps.max(1)
    }

    fn slice(&mut self, track: Track, start: f64, end: f64, event: &Event) -> usize {
        self.timeline.slices.push(Slice { track, start, end, event: event.clone() });
        self.timeline.slices.len() - 1
    }

    fn arrow(&mut self, from: usize, to: usize) {
        self.timeline.arrows.push(Arrow { from, to });
    }

    /// Lets an agent work on what slice `by` has started: it needs `busy` clocks, and is through
    /// `latency` later.
    fn agent(
        &mut self,
        (track, by): (Track, usize),
        ready: f64,
        (busy, latency): (f64, f64),
        event: &Event,
    ) -> (usize, f64) {
        // Something that moves nothing can be seen too.
        let busy = busy.max(1.0);
        let free = self.free.entry(track).or_default();
        let start = ready.max(*free);
        *free = start + busy;
        let end = start + busy + latency;
        // The next may begin while this one is still on its way: what is drawn is its own time.
        let slice = self.slice(track, start, start + busy, event);
        self.arrow(by, slice);
        (slice, end)
    }

    /// The next event of a warp, or the end of its wait.
    fn advance(&mut self, warp: usize) {
        let trace = self.trace;
        let event = &trace.warps[warp][self.warps[warp].next];
        if let Some(slice) = self.warps[warp].waiting.take() {
            return self.end_wait(warp, slice);
        }
        let start = self.warps[warp].time;
        let end = start + costs::of(&event.action, event.times, &event.counts);
        let slice = self.slice(Track::Warp(warp), start, end, event);
        let block = self.block(warp);
        let bytes = |bytes: u64| bytes as f64 / costs::COPY_BYTES;
        match &event.action {
            Action::Barrier(visit) => {
                self.gather_barrier(*visit, start, slice);
                self.warps[warp].waiting = Some(slice);
                return;
            }
            Action::MbarrierWait(_, Some(_)) | Action::WgmmaWait(_) => {
                self.warps[warp].waiting = Some(slice);
                return;
            }
            Action::BarrierArrive(visit) => self.gather_barrier(*visit, end, slice),
            Action::MbarrierArrive(address, phase) => {
                if let Some(gathering) = self.phases.get_mut(&(*address, *phase)) {
                    gathering.add(end, slice);
                }
            }
            Action::BulkLoad(phases) => {
                let moved = event.counts.shared_bytes_written;
                let (track, work) =
                    (Track::CopyEngine(block), (bytes(moved), costs::GLOBAL_LATENCY));
                let (copy, landed) = self.agent((track, slice), end, work, event);
                for phase in phases {
                    if let Some(gathering) = self.phases.get_mut(phase) {
                        gathering.add(landed, copy);
                    }
                }
                self.on_its_way(block, end, landed, moved);
            }
            Action::BulkStore => {
                let work = (bytes(event.counts.shared_bytes_read), costs::SHARED_LATENCY);
                let (copy, read) = self.agent((Track::CopyEngine(block), slice), end, work, event);
                self.join(warp, STORES, read, copy);
            }
            Action::CopyStart => {
                let moved = event.counts.shared_bytes_written;
                let work = (bytes(moved), costs::GLOBAL_LATENCY);
                let (copy, landed) = self.agent((Track::Copies(block), slice), end, work, event);
                self.join(warp, COPIES, landed, copy);
                self.on_its_way(block, end, landed, moved);
            }
            Action::CopyCommit => self.commit(warp, COPIES),
            Action::BulkCommit => self.commit(warp, STORES),
            Action::CopyWait(pending) => return self.wait_group(warp, COPIES, *pending, slice),
            Action::BulkWait(pending) => return self.wait_group(warp, STORES, *pending, slice),
            Action::WgmmaStart(number) => self.start_product(warp, *number, (end, slice), event),
            _ => {}
        }
        self.proceed(warp, end);
    }

    fn proceed(&mut self, warp: usize, time: f64) {
        self.warps[warp].time = time;
        self.warps[warp].next += 1;
    }

    fn end_wait(&mut self, warp: usize, slice: usize) {
        let came = self.timeline.slices[slice].start;
        let awaited = self.awaited(warp).into_iter();
        let latest = awaited.max_by(|a, b| a.time.total_cmp(&b.time));
        let (time, cause) =
            latest.map_or((came, None), |gathering| (gathering.time, gathering.last));
        let end = came.max(time) + costs::EXCHANGE;
        self.timeline.slices[slice].end = end;
        if let Some(cause) = cause.filter(|&cause| cause != slice && time > came) {
            self.arrow(cause, slice);
        }
        self.proceed(warp, end);
    }

    fn gather_barrier(&mut self, visit: Visit, time: f64, slice: usize) {
        if let Some(gathering) = self.barriers.get_mut(&visit) {
            gathering.add(time, slice);
        }
    }

    /// A product starts when the warps of its group have asked for it.
    fn start_product(
        &mut self,
        warp: usize,
        number: u64,
        (end, slice): (f64, usize),
        event: &Event,
    ) {
        let key = (warp / WARPGROUP, number);
        let Some(gathering) = self.products.get_mut(&key) else { return };
        if gathering.missing > 1 {
            return gathering.add(end, slice);
        }
        let ready = gathering.time.max(end);
        let work = event.counts.tensor_flops as f64 / (costs::TENSOR * WARPGROUP as f64);
        let track = Track::TensorCores(self.block(warp));
        let (product, done) =
            self.agent((track, slice), ready, (work, costs::TENSOR_LATENCY), event);
        if let Some(gathering) = self.products.get_mut(&key) {
            gathering.add(done, product);
        }
    }

    fn on_its_way(&mut self, block: usize, from: f64, to: f64, bytes: u64) {
        let bytes = bytes as i64;
        self.timeline.in_flight.extend([(block, from, bytes), (block, to, -bytes)]);
    }

    fn join(&mut self, warp: usize, kind: usize, time: f64, slice: usize) {
        let group = &mut self.warps[warp].copies[kind];
        if time >= group.time {
            *group = Group { time, slice: Some(slice) };
        }
    }

    fn commit(&mut self, warp: usize, kind: usize) {
        let group = std::mem::take(&mut self.warps[warp].copies[kind]);
        self.warps[warp].groups[kind].push(group);
    }

    /// Waits for the groups of a warp, all but the newest `pending`.
    fn wait_group(&mut self, warp: usize, kind: usize, pending: u32, slice: usize) {
        let groups = &self.warps[warp].groups[kind];
        let complete = &groups[..groups.len().saturating_sub(pending as usize)];
        let latest = complete.iter().max_by(|a, b| a.time.total_cmp(&b.time)).copied();
        let came = self.timeline.slices[slice].start;
        let Group { time, slice: cause } = latest.unwrap_or_default();
        let end = came.max(time) + costs::ISSUE;
        self.timeline.slices[slice].end = end;
        if let Some(cause) = cause.filter(|_| time > came) {
            self.arrow(cause, slice);
        }
        self.proceed(warp, end);
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use flash_attention::backend::cpu::emulator::Counts;

    use super::*;

    fn event(line: u32, action: Action, counts: Counts) -> Event {
        Event { file: "a.rs", line, action, times: 1, counts }
    }

    fn timeline(warps: Vec<Vec<Event>>) -> Timeline {
        let block_warps = warps.len();
        Timeline::new(&ClusterTrace { cluster: 0, block_warps, warps })
    }

    fn of(timeline: &Timeline, track: Track, line: u32) -> &Slice {
        let found = timeline.slices.iter().find(|s| s.track == track && s.event.line == line);
        found.unwrap_or_else(|| panic!("line {line} of {track:?}"))
    }

    fn flops(flops: u64) -> Counts {
        Counts { flops, ..Counts::default() }
    }

    #[test]
    fn a_barrier_opens_when_the_last_warp_is_there() {
        let barrier = Action::Barrier(Visit { slot: 0, opened: 0 });
        let warp = |work| {
            vec![
                event(1, Action::Math, flops(work)),
                event(2, barrier.clone(), Counts::default()),
                event(3, Action::Math, flops(64)),
            ]
        };
        let timeline = timeline(vec![warp(64), warp(6400)]);
        let [fast, slow] = [0, 1].map(|warp| of(&timeline, Track::Warp(warp), 2).clone());
        assert_relative_eq!(fast.start, 1.0);
        assert_relative_eq!(slow.start, 100.0);
        assert_relative_eq!(fast.end, 100.0 + costs::EXCHANGE);
        assert_relative_eq!(slow.end, fast.end);
        // The slow one lets the fast one go on, and waits for nobody.
        let arrows: Vec<_> = timeline.arrows.iter().map(|a| [a.from, a.to]).collect();
        let index = |slice: &Slice| {
            timeline.slices.iter().position(|s| (s.track, s.start) == (slice.track, slice.start))
        };
        assert_eq!(arrows, [[index(&slow).unwrap(), index(&fast).unwrap()]]);
        assert_relative_eq!(timeline.clocks(), fast.end + 1.0);
    }

    #[test]
    fn a_load_ends_the_wait_for_its_mbarrier() {
        let bytes = |n| Counts { shared_bytes_written: n, ..Counts::default() };
        let timeline = timeline(vec![
            vec![
                event(1, Action::MbarrierArrive(64, 0), Counts::default()),
                event(2, Action::BulkLoad(vec![(64, 0)]), bytes(6400)),
                event(3, Action::BulkLoad(vec![(128, 0)]), bytes(640)),
            ],
            vec![
                event(4, Action::MbarrierWait(64, None), Counts::default()),
                event(5, Action::MbarrierWait(64, Some(0)), Counts::default()),
            ],
        ]);
        let engine = Track::CopyEngine(0);
        let load = of(&timeline, engine, 2);
        assert_relative_eq!(load.start, 2.0 * costs::ISSUE);
        assert_relative_eq!(load.end - load.start, 100.0);
        // The engine moves one after the other; what is on its way overlaps.
        assert_relative_eq!(of(&timeline, engine, 3).start, load.end);
        let wait = of(&timeline, Track::Warp(1), 5);
        assert_relative_eq!(wait.end, load.end + costs::GLOBAL_LATENCY + costs::EXCHANGE);
        let from_load = timeline.arrows.iter().filter(|arrow| {
            timeline.slices[arrow.from].track == engine && timeline.slices[arrow.to].event.line == 5
        });
        assert_eq!(from_load.count(), 1);
        let left: i64 = timeline.in_flight.iter().map(|(_, _, change)| change).sum();
        assert_eq!((left, timeline.in_flight.len()), (0, 4));
    }

    #[test]
    fn a_product_waits_for_its_warpgroup_and_runs_beside_it() {
        let product = |flops| Counts { tensor_flops: flops, ..Counts::default() };
        let warp = |work| {
            vec![
                event(1, Action::Math, flops(work)),
                event(2, Action::WgmmaStart(0), product(40_960)),
                event(3, Action::Math, flops(64)),
                event(4, Action::WgmmaWait(1), Counts::default()),
            ]
        };
        let timeline = timeline(vec![warp(64), warp(64), warp(64), warp(640)]);
        let cores = of(&timeline, Track::TensorCores(0), 2);
        assert_relative_eq!(cores.start, 10.0 + costs::ISSUE);
        assert_relative_eq!(cores.end - cores.start, 10.0);
        for warp in 0..4 {
            assert!(of(&timeline, Track::Warp(warp), 3).end < cores.end);
            let wait = of(&timeline, Track::Warp(warp), 4);
            assert_relative_eq!(wait.end, cores.end + costs::TENSOR_LATENCY + costs::EXCHANGE);
        }
    }

    #[test]
    fn groups_of_copies_are_waited_for_but_the_newest() {
        let bytes = Counts { shared_bytes_written: 6400, ..Counts::default() };
        let copy = |line| event(line, Action::CopyStart, bytes);
        let commit = || event(9, Action::CopyCommit, Counts::default());
        let wait = |line, pending| event(line, Action::CopyWait(pending), Counts::default());
        let timeline =
            timeline(vec![vec![copy(1), commit(), copy(2), commit(), wait(3, 1), wait(4, 0)]]);
        let [first, second] = [1, 2].map(|line| of(&timeline, Track::Copies(0), line).end);
        let [one, all] = [3, 4].map(|line| of(&timeline, Track::Warp(0), line).end);
        assert_relative_eq!(one, first + costs::GLOBAL_LATENCY + costs::ISSUE);
        assert_relative_eq!(all, second + costs::GLOBAL_LATENCY + costs::ISSUE);
    }

    /// A record that was cut off ends all the same.
    #[test]
    fn a_wait_for_nobody_ends() {
        let visit = Visit { slot: 0, opened: 0 };
        let timeline = timeline(vec![vec![
            event(1, Action::MbarrierWait(8, Some(3)), Counts::default()),
            event(2, Action::WgmmaWait(5), Counts::default()),
            event(3, Action::Barrier(visit), Counts::default()),
        ]]);
        assert_eq!(timeline.slices.len(), 3);
    }
}
