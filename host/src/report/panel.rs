//! The contents of the pictures: lines with error bars on named axes, taken from the results.
//! `picture.rs` draws them.

use super::analysis::{Baseline, Series, View, moved, style, time};
use crate::{
    format,
    results::{Check, Histogram, Level, Results, Row, Status},
};

/// An axis: its label and its scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// The label.
    pub label: String,
    /// Its scale.
    pub scale: Scale,
}

/// Scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Even steps from 0 on.
    Linear,
    /// Powers of two.
    Log2,
    /// Powers of ten.
    Log10,
}

impl Scale {
    /// The place of a value on an axis of this scale, in even steps.
    #[must_use]
    pub fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log2 => value.log2(),
            Self::Log10 => value.log10(),
        }
    }

    /// The value at a place.
    #[must_use]
    pub fn value(self, place: f64) -> f64 {
        match self {
            Self::Linear => place,
            Self::Log2 => place.exp2(),
            Self::Log10 => 10f64.powf(place),
        }
    }
}

/// One value, with the spread around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The place on the x axis.
    pub x: f64,
    /// The value.
    pub y: f64,
    /// The lowest and highest value of the spread.
    pub spread: Option<(f64, f64)>,
}

/// A line of a panel.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Name for the legend.
    pub name: String,
    /// The number of its colour and marker.
    pub style: usize,
    /// Whether the line is dashed: it is not one of our kernels.
    pub dashed: bool,
    /// Whether the line is drawn as steps: a histogram.
    pub steps: bool,
    /// Its points, ascending in x.
    pub points: Vec<Point>,
    /// The index of the line among lines that lie on each other, and their number.
    pub stacked: (usize, usize),
}

/// A horizontal or vertical reference line.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// The line's name.
    pub label: String,
    /// Where.
    pub at: f64,
    /// Whether it stands upright.
    pub vertical: bool,
}

/// One picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Part of file names and anchors.
    pub id: String,
    /// Title.
    pub title: String,
    /// The meaning of the error bars, or another note below the picture.
    pub note: String,
    /// The x axis.
    pub x: Axis,
    /// The y axis.
    pub y: Axis,
    /// The lines.
    pub lines: Vec<Line>,
    /// The reference lines.
    pub marks: Vec<Mark>,
}

/// Time, memory, speed-up and memory saved of one level; bytes moved replace the emulator's times.
#[must_use]
pub fn four(results: &Results, view: &View<'_>) -> Vec<Panel> {
    let emulated = results.device.emulated;
    let first = if emulated { traffic_panel(view) } else { time_panel(view) };
    let mut panels = vec![first, memory_panel(results, view)];
    if let Some(baseline) = view.baseline {
        panels.push(if emulated {
            fewer_panel(view, baseline)
        } else {
            speedup_panel(view, baseline)
        });
        panels.push(saved_panel(view, baseline));
    }
    panels.retain(|panel| !panel.lines.is_empty());
    panels
}

fn seq_axis() -> Axis {
    Axis { label: "sequence length N".into(), scale: Scale::Log2 }
}

fn lines(view: &View<'_>, points: impl Fn(&Series<'_>) -> Vec<Point>) -> Vec<Line> {
    let line = |s: &Series<'_>| Line {
        name: s.kernel.into(),
        style: s.style,
        dashed: s.peer,
        steps: false,
        points: points(s),
        stacked: (0, 1),
    };
    view.series.iter().map(line).filter(|l| !l.points.is_empty()).collect()
}

/// Finds lines that lie on each other, where only the last would be visible. They are drawn one
/// within the other, with their markers side by side. Names them in a sentence.
fn stack(lines: &mut [Line]) -> String {
    // Closer than a line is wide: 2 pixels of 340.
    let near = |a: f64, b: f64| (a - b).abs() <= 6e-3 * a.abs().max(b.abs());
    let same = |a: &Line, b: &Line| {
        a.points.len() == b.points.len()
            && a.points.iter().zip(&b.points).all(|(a, b)| a.x == b.x && near(a.y, b.y))
    };
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        match groups.iter_mut().find(|group| same(&lines[group[0]], line)) {
            Some(group) => group.push(index),
            None => groups.push(vec![index]),
        }
    }
    let mut text = String::new();
    for group in groups.into_iter().filter(|group| group.len() > 1) {
        for (place, &index) in group.iter().enumerate() {
            lines[index].stacked = (place, group.len());
        }
        let names: Vec<String> = group.iter().map(|&index| lines[index].name.clone()).collect();
        text += &format!(" Alike: {}.", format::list(&names));
    }
    text
}

/// Logarithmic where the largest value is more than `8` times the smallest; a linear axis would
/// flatten the smaller values.
fn scale(lines: &[Line]) -> Scale {
    let values = || lines.iter().flat_map(|l| &l.points).map(|p| p.y);
    let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    if low > 0.0 && high > 8.0 * low { Scale::Log10 } else { Scale::Linear }
}

fn time_panel(view: &View<'_>) -> Panel {
    let point = |r: &Row| {
        let spread = r.min_ms.zip(r.max_ms);
        Some(Point { x: r.seq as f64, y: time(r)?, spread })
    };
    let lines = lines(view, |s| s.measured().filter_map(point).collect());
    Panel {
        id: format!("{}-time", view.level),
        title: "Time".into(),
        note: "Median; bars from the fastest to the slowest run.".into(),
        x: seq_axis(),
        y: Axis { label: "ms".into(), scale: scale(&lines) },
        lines,
        marks: Vec::new(),
    }
}

fn memory_panel(results: &Results, view: &View<'_>) -> Panel {
    let mut lines = lines(view, |s| {
        let points = s.memory().into_iter();
        points.map(|(x, y)| Point { x, y: y / MIB, spread: None }).collect()
    });
    let alike = stack(&mut lines);
    let highest = lines.iter().flat_map(|l| &l.points).map(|p| p.y).fold(0.0, f64::max);
    let limit = results.device.memory_bytes.map(|b| b as f64 / MIB);
    // A limit far above everything measured would press the lines together.
    let marks = limit.filter(|&at| at < 30.0 * highest).map(|at| Mark {
        label: format!("{} of the device", format::bytes(at * MIB)),
        at,
        vertical: false,
    });
    let oom = view.series.iter().flat_map(|s| &s.rows).any(|r| r.status == Status::Oom);
    let note = if oom {
        "Counted to the byte, inputs and output included; beyond the memory there is: predicted."
    } else {
        "Counted to the byte, inputs and output included."
    };
    Panel {
        id: format!("{}-memory", view.level),
        title: "Peak memory".into(),
        note: format!("{note}{alike}"),
        x: seq_axis(),
        y: Axis { label: "MiB".into(), scale: scale(&lines) },
        lines,
        marks: marks.into_iter().collect(),
    }
}

/// Bytes of a MiB.
const MIB: f64 = 1024.0 * 1024.0;

fn traffic_panel(view: &View<'_>) -> Panel {
    let mut lines = lines(view, |s| {
        let points = s.traffic().into_iter();
        points.map(|(x, y)| Point { x, y: y / MIB, spread: None }).collect()
    });
    let alike = stack(&mut lines);
    Panel {
        id: format!("{}-traffic", view.level),
        title: "Bytes moved in global memory".into(),
        note: format!("Read and written, as counted: before any cache.{alike}"),
        x: seq_axis(),
        y: Axis { label: "MiB".into(), scale: scale(&lines) },
        lines,
        marks: Vec::new(),
    }
}

fn fewer_panel(view: &View<'_>, baseline: Baseline) -> Panel {
    let name = baseline.name();
    let base = view.series.iter().find(|s| s.kernel == name);
    let base_bytes = |seq: usize| moved(base?.measured().find(|r| r.seq == seq)?);
    let point = |r: &Row| {
        let y = base_bytes(r.seq)? as f64 / moved(r)? as f64;
        Some(Point { x: r.seq as f64, y, spread: None })
    };
    let mut lines = lines(view, |s| {
        if s.kernel == name {
            return Vec::new();
        }
        s.measured().filter_map(point).collect()
    });
    let alike = stack(&mut lines);
    Panel {
        id: format!("{}-fewer", view.level),
        title: format!("Bytes moved, against {name}"),
        note: format!("Bytes that {name} moves for each byte of a kernel's.{alike}"),
        x: seq_axis(),
        y: Axis { label: format!("times fewer than {name}"), scale: scale(&lines) },
        lines,
        marks: vec![Mark { label: name.into(), at: 1.0, vertical: false }],
    }
}

fn speedup_panel(view: &View<'_>, baseline: Baseline) -> Panel {
    let relative = |r: &Row| Some(r.std_ms? / r.mean_ms?);
    let base_spread = |seq: usize| {
        let base = view.series.iter().find(|s| s.kernel == baseline.name())?;
        base.measured().find(|r| r.seq == seq).and_then(relative)
    };
    let point = |r: &Row| {
        let y = baseline.speedup(r)?;
        // The relative deviations of two independent times add in quadrature.
        let spread = base_spread(r.seq).zip(relative(r)).map(|(a, b)| {
            let deviation = a.hypot(b).min(0.9);
            (y * (1.0 - deviation), y * (1.0 + deviation))
        });
        Some(Point { x: r.seq as f64, y, spread })
    };
    let lines = lines(view, |s| {
        if s.kernel == baseline.name() {
            return Vec::new();
        }
        s.measured().filter_map(point).collect()
    });
    Panel {
        id: format!("{}-speedup", view.level),
        title: format!("Speed-up over {}", baseline.name()),
        note: "Ratio of medians; bars: one standard deviation of the ratio.".into(),
        x: seq_axis(),
        y: Axis { label: format!("times as fast as {}", baseline.name()), scale: scale(&lines) },
        lines,
        marks: vec![Mark { label: baseline.name().into(), at: 1.0, vertical: false }],
    }
}

fn saved_panel(view: &View<'_>, baseline: Baseline) -> Panel {
    let point = |r: &Row| {
        let y = baseline.memory_saved(r)? * 100.0;
        Some(Point { x: r.seq as f64, y, spread: None })
    };
    let mut lines = lines(view, |s| {
        if s.kernel == baseline.name() {
            return Vec::new();
        }
        s.measured().filter_map(point).collect()
    });
    let alike = stack(&mut lines);
    Panel {
        id: format!("{}-saved", view.level),
        title: format!("Memory saved over {}", baseline.name()),
        note: format!("Share of its peak memory that a kernel does without.{alike}"),
        x: seq_axis(),
        y: Axis { label: "%".into(), scale: Scale::Linear },
        lines,
        marks: Vec::new(),
    }
}

/// Absolute and relative difference of the output from the oracle, at the longest checked sequence;
/// two panels per level.
#[must_use]
pub fn differences(results: &Results) -> Vec<Panel> {
    // Of several tensors the first.
    let outputs = || results.checks.iter().filter(|c| ["o", "y", "dq", "dx"].contains(&&*c.tensor));
    let Some(longest) = outputs().map(|c| c.seq).max() else { return Vec::new() };
    let levels = Level::ALL.map(|level| {
        let checks = outputs().filter(|c| c.seq == longest && c.level == level);
        (level, checks.collect::<Vec<&Check>>())
    });
    let several = levels.iter().filter(|(_, checks)| !checks.is_empty()).count() > 1;
    let panels = |(level, checks): &(Level, Vec<&Check>)| {
        let suffix = if several { format!(", {level}") } else { String::new() };
        level_differences(results, *level, &suffix, checks)
    };
    levels.iter().filter(|(_, checks)| !checks.is_empty()).flat_map(panels).collect()
}

/// The panels of one level. `suffix` goes to the end of titles.
fn level_differences(
    results: &Results,
    level: Level,
    suffix: &str,
    checks: &[&Check],
) -> Vec<Panel> {
    let lines = |histogram: fn(&Check) -> &Histogram| -> Vec<Line> {
        let line = |c: &&Check| Line {
            name: c.kernel.clone(),
            style: style(results, &c.kernel),
            dashed: false,
            steps: true,
            points: steps(histogram(c)),
            stacked: (0, 1),
        };
        checks.iter().map(line).filter(|l| !l.points.is_empty()).collect()
    };
    let panel = |id: &str, what: &str, mut lines: Vec<Line>, marks: Vec<Mark>| {
        let alike = stack(&mut lines);
        let note = "Share of the elements of the output in each bin; exact ones are not drawn.";
        Panel {
            id: format!("{level}-difference-{id}"),
            title: format!("{what} difference from f64, N = {}{suffix}", checks[0].seq),
            note: format!("{note}{alike}"),
            x: Axis { label: format!("{} difference", what.to_lowercase()), scale: Scale::Log10 },
            y: Axis { label: "% of elements".into(), scale: Scale::Linear },
            lines,
            marks,
        }
    };
    // The bound is one only where all lines share it.
    let bound = 2.0 * checks[0].plain_max_abs;
    let shared =
        bound > 0.0 && bound.is_finite() && checks.iter().all(|c| 2.0 * c.plain_max_abs == bound);
    let mark = shared.then(|| Mark { label: "allowed".into(), at: bound, vertical: true });
    let mut panels = vec![
        panel("absolute", "Absolute", lines(|c| &c.abs_histogram), mark.into_iter().collect()),
        panel("relative", "Relative", lines(|c| &c.rel_histogram), Vec::new()),
    ];
    panels.retain(|panel| !panel.lines.is_empty());
    panels
}

/// A histogram as the corners of its steps, in percent, from 0 to 0.
fn steps(histogram: &Histogram) -> Vec<Point> {
    let total: u64 = histogram.counts.iter().sum::<u64>() + histogram.zeros;
    if histogram.counts.is_empty() {
        return Vec::new();
    }
    let mut points = vec![Point { x: histogram.bin_start(0), y: 0.0, spread: None }];
    for (bin, &count) in histogram.counts.iter().enumerate() {
        let y = 100.0 * count as f64 / total as f64;
        points.push(Point { x: histogram.bin_start(bin), y, spread: None });
        points.push(Point { x: histogram.bin_start(bin + 1), y, spread: None });
    }
    points.push(Point { x: histogram.bin_start(histogram.counts.len()), y: 0.0, spread: None });
    points
}
