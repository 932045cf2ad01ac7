//! One picture of speed: TFLOP/s over sequence length, our kernels and their peers, from the rows
//! that a run wrote as CSV. `docs/img/speed.svg` is made of a record by `examples/speed_picture.rs`.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use maud::html;
use serde::Deserialize;

/// The columns of a row that the picture needs.
#[derive(Debug, Deserialize)]
struct Row {
    kernel: String,
    level: String,
    device: String,
    batch: usize,
    heads: usize,
    seq: usize,
    head_dim: usize,
    dtype: String,
    causal: bool,
    tflops: Option<f64>,
    peer: bool,
}

/// The rows that a picture shows: attention in f16 of this problem.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Head dim.
    pub head_dim: usize,
    /// Whether attention is causal.
    pub causal: bool,
}

/// A kernel and its points, ascending in N.
struct Line {
    kernel: String,
    peer: bool,
    points: Vec<(usize, f64)>,
}

impl Line {
    fn last(&self) -> f64 {
        self.points.last().map_or(0.0, |point| point.1)
    }
}

/// The picture's size, in units of the view box. The text stays legible where a phone shows it 340
/// pixels wide.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 400.0;
/// Edges of the axes: the names of the lines stand to their right.
const LEFT: f64 = 36.0;
const RIGHT: f64 = 318.0;
const TOP: f64 = 72.0;
const BOTTOM: f64 = 362.0;
/// The distance between two names.
const ROW: f64 = 15.5;

/// Colours in light and dark, for every viewer: the background belongs to the picture.
const STYLE: &str = "svg{--bg:#fff;--ink:#1f2933;--soft:#5b6875;--grid:#e3e6ea;--best:#b93a0c;\
    --ours:#1d6fb8;--peer:#5b6875}\
    @media(prefers-color-scheme:dark){svg{--bg:#14171b;--ink:#e6e9ec;--soft:#a3aeb9;--grid:#30363e;\
    --best:#ff8f63;--ours:#71b5f5;--peer:#b9c3cd}}\
    text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--ink)}\
    .title{font-size:17px;font-weight:600}.soft{fill:var(--soft);font-size:12px}\
    .grid{stroke:var(--grid)}.axis{stroke:var(--soft)}\
    .best,.ours,.peer{fill:none;stroke-width:2}.best{stroke:var(--best);stroke-width:3.5}\
    .ours{stroke:var(--ours)}.peer{stroke:var(--peer);stroke-dasharray:6 4}.leader{stroke-width:.8;stroke-dasharray:none}\
    text.best{fill:var(--best);stroke:none;font-weight:600}text.ours{fill:var(--ours);stroke:none}\
    text.peer{fill:var(--peer);stroke:none}";

/// Draws the picture. Where several runs of a record have the same kernel and N, the first stands.
///
/// # Errors
/// When the text is no CSV of rows, or when the rows of the problem are of several devices, numbers
/// of tokens or hidden sizes, which one picture may not mix.
pub fn picture(csv: &str, shown: Shown) -> Result<String> {
    let rows = rows(csv, shown)?;
    let lines = lines(&rows);
    let seqs = {
        let mut seqs: Vec<usize> = rows.iter().map(|row| row.seq).collect();
        seqs.sort_unstable();
        seqs.dedup();
        seqs
    };
    let (low, high) = ((seqs[0] as f64).log2(), (seqs[seqs.len() - 1] as f64).log2());
    let x = |seq: usize| {
        LEFT + (RIGHT - LEFT) * ((seq as f64).log2() - low) / (high - low).max(f64::MIN_POSITIVE)
    };
    let most = lines.iter().flat_map(|line| &line.points).fold(0.0, |most, p| p.1.max(most));
    let step = step(most);
    let top = (most / step).ceil() * step;
    let y = |tflops: f64| BOTTOM - (BOTTOM - TOP) * tflops / top;

    let first = &rows[0];
    let mask = if shown.causal { "causal" } else { "full" };
    let problem = format!(
        "{}, D {}, {mask}, {}, {} tokens, hidden {}",
        first.device,
        shown.head_dim,
        first.dtype,
        first.batch * first.seq,
        first.heads * first.head_dim
    );
    let title = "Attention, forward: TFLOP/s over N";
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="720" height="600" role="img" aria-label="{title}. {}"><style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" rx="8" style="fill:var(--bg)"/>"#,
        escaped(&problem)
    );
    let mut text = |class: &str, x: f64, y: f64, anchor: &str, content: &str| {
        let content = escaped(content);
        _ = writeln!(
            svg,
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{content}</text>"#
        );
    };
    text("title", 14.0, 26.0, "start", title);
    text("soft", 14.0, 45.0, "start", &problem);
    text("soft", RIGHT, BOTTOM + 32.0, "end", "sequence length N");
    for &seq in &seqs {
        text("soft", x(seq), BOTTOM + 16.0, "middle", &seq.to_string());
    }
    for mark in 0..=(top / step).round() as usize {
        let value = mark as f64 * step;
        text("soft", LEFT - 5.0, y(value) + 4.0, "end", &format!("{value}"));
    }
    let names = places(&lines, y);
    let best = lines.iter().position(|line| !line.peer);
    let class = |index: usize| match (lines[index].peer, best == Some(index)) {
        (true, _) => "peer",
        (false, true) => "best",
        (false, false) => "ours",
    };
    for (index, (line, place)) in lines.iter().zip(&names).enumerate() {
        let name = format!("{} {}", line.kernel, rounded(line.last()));
        text(class(index), RIGHT + 22.0, place + 4.0, "start", &name);
    }
    for mark in 0..=(top / step).round() as usize {
        let (at, class) = (y(mark as f64 * step), if mark == 0 { "axis" } else { "grid" });
        _ = writeln!(svg, r#"<path class="{class}" d="M{LEFT} {at:.1}H{RIGHT}"/>"#);
    }
    // From the slowest to the fastest, which lies on top.
    for (index, (line, place)) in lines.iter().zip(&names).enumerate().rev() {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|&(seq, tflops)| format!("{:.1} {:.1}", x(seq), y(tflops)))
            .collect();
        let (class, end) = (class(index), y(line.last()));
        _ = writeln!(svg, r#"<path class="{class}" d="M{}"/>"#, points.join("L"));
        _ = writeln!(
            svg,
            r#"<path class="{class} leader" d="M{:.1} {end:.1}L{:.1} {place:.1}"/>"#,
            x(line.points[line.points.len() - 1].0) + 2.0,
            RIGHT + 19.0
        );
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// The rows of the problem that have a time, as the file has them.
fn rows(csv: &str, shown: Shown) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for row in csv::Reader::from_reader(csv.as_bytes()).deserialize() {
        let row: Row = row.context("a row of `compare --csv`")?;
        let is_shown = row.level == "attention"
            && row.dtype == "f16"
            && row.head_dim == shown.head_dim
            && row.causal == shown.causal;
        if is_shown && row.tflops.is_some() {
            rows.push(row);
        }
    }
    let of = |row: &Row| (row.device.clone(), row.batch * row.seq, row.heads * row.head_dim);
    ensure!(!rows.is_empty(), "no row of attention in f16 has {shown:?} and a time");
    let first = of(&rows[0]);
    for row in &rows {
        ensure!(of(row) == first, "rows of {first:?} and of {:?}: one picture has one", of(row));
    }
    Ok(rows)
}

/// Lines by speed at their last N, the fastest first.
fn lines(rows: &[Row]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let at = lines.iter().position(|line| line.kernel == row.kernel).unwrap_or_else(|| {
            let kernel = row.kernel.clone();
            lines.push(Line { kernel, peer: row.peer, points: Vec::new() });
            lines.len() - 1
        });
        let points = &mut lines[at].points;
        if points.iter().all(|point| point.0 != row.seq) {
            points.extend(row.tflops.map(|tflops| (row.seq, tflops)));
        }
    }
    for line in &mut lines {
        line.points.sort_unstable_by_key(|point| point.0);
    }
    lines.sort_by(|a, b| b.last().total_cmp(&a.last()));
    lines
}

/// The heights of the names: beside the ends of their lines, and `ROW` apart.
fn places(lines: &[Line], y: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut places: Vec<f64> = lines.iter().map(|line| y(line.last())).collect();
    let mut lowest = BOTTOM;
    for place in places.iter_mut().rev() {
        *place = place.min(lowest);
        lowest = *place - ROW;
    }
    places
}

/// The step of an axis with 4 to 10 steps: 1, 2 or 5 times a power of ten.
fn step(most: f64) -> f64 {
    let power = 10f64.powf((most / 10.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|digit| digit * power)
        .into_iter()
        .find(|s| most / s <= 10.0)
        .unwrap_or(power)
}

fn escaped(text: &str) -> String {
    html!((text)).into_string()
}

/// Three digits, as the records have them.
fn rounded(tflops: f64) -> String {
    if tflops < 100.0 { format!("{tflops:.1}") } else { format!("{tflops:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = include_str!("../../../benches/record/2026-11-27-h100.csv");

    /// The README's picture is the record's. `cargo run -p host --example speed_picture` makes it.
    #[test]
    fn the_picture_in_the_readme_is_made_of_the_record() {
        let made = picture(RECORD, Shown { head_dim: 128, causal: true }).unwrap();
        assert_eq!(made, include_str!("../../../docs/img/speed.svg"));
        // Every kernel that the record times, and both peers.
        assert_eq!(made.matches(" leader").count(), 11);
        for name in ["flash_hopper 715", "torch-cudnn 595", "torch-flash 323", "naive 0.7"] {
            assert!(made.contains(name), "{name}");
        }
    }

    #[test]
    fn one_picture_has_one_problem() {
        let head = RECORD.lines().next().unwrap();
        let none = picture(head, Shown { head_dim: 128, causal: true }).unwrap_err();
        assert!(none.to_string().starts_with("no row"), "{none}");
        // 4 x 512 tokens beside 32 x 512.
        let row = RECORD.lines().nth(1).unwrap();
        let other = row.replacen(",32,16,512,", ",4,16,512,", 1);
        assert_ne!(row, other);
        let mixed = format!("{head}\n{row}\n{other}\n");
        let mixed = picture(&mixed, Shown { head_dim: 128, causal: true }).unwrap_err();
        assert!(mixed.to_string().contains("one picture"), "{mixed}");
    }

    #[test]
    fn names_keep_their_distance() {
        let line = |last: f64| Line { kernel: String::new(), peer: false, points: vec![(1, last)] };
        let lines = [line(300.0), line(299.0), line(1.0), line(0.5)];
        let places = places(&lines, |tflops| BOTTOM - tflops / 2.0);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= ROW - 1e-9), "{places:?}");
        assert!(places.iter().all(|place| (TOP..=BOTTOM).contains(place)), "{places:?}");
        assert_eq!([step(715.0), step(95.0), step(12.0)], [100.0, 10.0, 2.0]);
    }
}
