//! The trace event format that Perfetto and Chrome read. Source: "Trace Event Format", the document of the
//! Chromium project.

use std::collections::{BTreeMap, HashSet};

use flash_attention::backend::cpu::emulator::Action;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    costs,
    timeline::{Slice, Timeline, Track},
};
use crate::microscope::source::Line;

/// Clocks are written as nanoseconds; the format counts microseconds.
const CLOCKS_PER_UNIT: f64 = 1000.0;
/// Threads of a process that are no warps come after these.
const FIRST_AGENT: usize = 1000;

/// A whole document.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    /// The events.
    pub trace_events: Vec<Value>,
    /// How times are shown.
    pub display_time_unit: &'static str,
    /// Notes for the reader.
    pub other_data: BTreeMap<&'static str, String>,
}

impl Document {
    /// An empty document about `title`.
    #[must_use]
    pub fn new(title: &str) -> Self {
        let note = format!(
            "An estimate: the emulator's order of events with stated costs, in which 1 ns stands for 1 clock. {}",
            costs::STATED
        );
        Self {
            trace_events: Vec::new(),
            display_time_unit: "ns",
            other_data: BTreeMap::from([("kernel", title.to_owned()), ("time", note)]),
        }
    }

    /// Adds a cluster, whose first block is process number `process`, from `begin` clocks on.
    pub fn add(&mut self, timeline: &Timeline, cluster: &Cluster, begin: f64) {
        self.name_tracks(timeline, cluster);
        for slice in &timeline.slices {
            self.trace_events.push(complete(slice, cluster, begin));
        }
        let begin_of = |slice: &Slice| (slice.track, slice.start.to_bits());
        let begins: HashSet<(Track, u64)> = timeline.slices.iter().map(begin_of).collect();
        for (id, arrow) in timeline.arrows.iter().enumerate() {
            let id = (cluster.first_process << 32) + id;
            let (from, to) = (&timeline.slices[arrow.from], &timeline.slices[arrow.to]);
            // An arrow into a wait ends where the wait does, one to an agent where its work begins. At
            // the end of a wait a viewer finds the slice that begins there. That one has to be later
            // than the cause, since viewers turn arrows round that lead to an earlier slice.
            let at = match to.track {
                Track::Warp(_) if begins.contains(&(to.track, to.end.to_bits())) => to.end,
                Track::Warp(_) => within(to, to.end),
                _ => to.start,
            };
            let leaves = within(from, from.end.min(at));
            let flow = |phase: &str, slice: &Slice, at: f64| {
                let (pid, tid) = cluster.place(slice.track);
                let mut event = json!({
                    "ph": phase, "id": id, "name": "leads to", "cat": "flow",
                    "pid": pid, "tid": tid, "ts": (begin + at) / CLOCKS_PER_UNIT,
                });
                if phase == "f" {
                    event["bp"] = "e".into();
                }
                event
            };
            self.trace_events.push(flow("s", from, leaves));
            self.trace_events.push(flow("f", to, at));
        }
        let mut bytes: BTreeMap<usize, i64> = BTreeMap::new();
        for &(block, at, change) in &timeline.in_flight {
            let now = bytes.entry(block).or_default();
            *now += change;
            self.trace_events.push(json!({
                "ph": "C", "name": "shared memory in flight", "pid": cluster.first_process + block,
                "ts": (begin + at) / CLOCKS_PER_UNIT, "args": { "bytes": *now },
            }));
        }
    }

    fn name_tracks(&mut self, timeline: &Timeline, cluster: &Cluster) {
        let mut tracks: Vec<Track> = timeline.slices.iter().map(|slice| slice.track).collect();
        tracks.sort_unstable();
        tracks.dedup();
        let mut blocks: Vec<usize> = tracks.iter().map(|&t| cluster.place(t).0).collect();
        blocks.dedup();
        for pid in blocks {
            let block = cluster.first_block + (pid - cluster.first_process) as u64;
            let name = format!("{}, block {block}", cluster.name);
            self.trace_events.push(json!({
                "ph": "M", "name": "process_name", "pid": pid, "args": { "name": name },
            }));
        }
        for track in tracks {
            let (pid, tid) = cluster.place(track);
            let name = match track {
                Track::Warp(warp) => format!("warp {}", warp % cluster.block_warps),
                Track::Copies(_) => "cp.async".to_owned(),
                Track::CopyEngine(_) => "copy engine (TMA)".to_owned(),
                Track::TensorCores(_) => "tensor cores (wgmma)".to_owned(),
            };
            for (what, args) in [
                ("thread_name", json!({ "name": name })),
                ("thread_sort_index", json!({ "sort_index": tid })),
            ] {
                self.trace_events
                    .push(json!({ "ph": "M", "name": what, "pid": pid, "tid": tid, "args": args }));
            }
        }
    }
}

/// Where a cluster stands in the document.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// Its launch's entry.
    pub name: &'static str,
    /// Number of its first block.
    pub first_block: u64,
    /// Process of its first block.
    pub first_process: usize,
    /// Warps of a block.
    pub block_warps: usize,
}

impl Cluster {
    /// Process and thread of a track.
    fn place(&self, track: Track) -> (usize, usize) {
        let (block, thread) = match track {
            Track::Warp(warp) => (warp / self.block_warps, warp % self.block_warps),
            Track::Copies(block) => (block, FIRST_AGENT),
            Track::CopyEngine(block) => (block, FIRST_AGENT + 1),
            Track::TensorCores(block) => (block, FIRST_AGENT + 2),
        };
        (self.first_process + block, thread + 1)
    }
}

/// A slice as an event with a duration.
fn complete(slice: &Slice, cluster: &Cluster, begin: f64) -> Value {
    let (pid, tid) = cluster.place(slice.track);
    let event = &slice.event;
    let mut args = json!({ "at": format!("{}:{}", event.file, event.line), "times": event.times });
    if let Some(line) = Line::of(event.file, event.line) {
        args["source"] = line.text().into();
        if let Some(comment) = line.comment().filter(|_| is_wait(&event.action)) {
            args["why"] = comment.into();
        }
    }
    let c = &event.counts;
    for (name, value) in [
        ("global bytes read", c.global_bytes_read),
        ("global bytes written", c.global_bytes_written),
        ("sectors", c.global_sectors),
        ("shared bytes read", c.shared_bytes_read),
        ("shared bytes written", c.shared_bytes_written),
        ("passes", c.shared_passes),
        ("bank conflicts", c.shared_passes - c.shared_passes_least),
        ("FLOP", c.flops),
        ("special functions", c.special),
        ("tensor FLOP", c.tensor_flops),
    ] {
        if value > 0 {
            args[name] = value.into();
        }
    }
    let file = event.file.rsplit(['/', '\\']).next().unwrap_or_default();
    json!({
        "ph": "X",
        "name": format!("{} · {file}:{}", name(slice), event.line),
        "cat": if is_wait(&event.action) { "wait" } else { "work" },
        "pid": pid,
        "tid": tid,
        "ts": (begin + slice.start) / CLOCKS_PER_UNIT,
        "dur": (slice.end - slice.start) / CLOCKS_PER_UNIT,
        "args": args,
    })
}

/// `at`, or the last whole clock of the slice: at its end a viewer finds the next slice of the track.
fn within(slice: &Slice, at: f64) -> f64 {
    at.min(slice.end - 1.0).max(slice.start)
}

fn is_wait(action: &Action) -> bool {
    matches!(
        action,
        Action::Barrier(_)
            | Action::WarpBarrier
            | Action::MbarrierWait(..)
            | Action::CopyWait(_)
            | Action::BulkWait(_)
            | Action::WgmmaWait(_)
    )
}

/// The name of a slice, in a few words.
fn name(slice: &Slice) -> &'static str {
    let by_warp = matches!(slice.track, Track::Warp(_));
    match (&slice.event.action, by_warp) {
        (Action::GlobalRead, _) => "read global",
        (Action::GlobalWrite, _) => "write global",
        (Action::GlobalAtomic, _) => "atomic global",
        (Action::SharedRead, _) => "read shared",
        (Action::SharedWrite, _) => "write shared",
        (Action::SharedAtomic, _) => "atomic shared",
        (Action::Math, _) => "arithmetic",
        (Action::Mma, _) => "mma",
        (Action::Collective(name), _) => name,
        (Action::CopyStart, true) => "start cp.async",
        (Action::CopyStart, false) => "cp.async",
        (Action::CopyCommit, _) => "commit cp.async",
        (Action::CopyWait(_), _) => "wait for cp.async",
        (Action::WarpBarrier, _) => "barrier of the warp",
        (Action::Barrier(_), _) => "barrier",
        (Action::BarrierArrive(_), _) => "arrive at barrier",
        (Action::MbarrierWait(..), _) => "wait for mbarrier",
        (Action::MbarrierArrive(..), _) => "arrive at mbarrier",
        (Action::BulkLoad(_), true) => "start load",
        (Action::BulkLoad(_), false) => "load",
        (Action::BulkStore, true) => "start store",
        (Action::BulkStore, false) => "store",
        (Action::BulkCommit, _) => "commit stores",
        (Action::BulkWait(_), _) => "wait for stores",
        (Action::WgmmaStart(_), true) => "start wgmma",
        (Action::WgmmaStart(_), false) => "wgmma",
        (Action::WgmmaWait(_), _) => "wait for wgmma",
        (Action::Fence, _) => "fence",
    }
}
