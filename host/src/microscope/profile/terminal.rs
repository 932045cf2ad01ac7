//! A profile as text: the source with its counts, the launches, the totals and the bound.

use super::{
    Profile,
    columns::{Column, bytes, short},
    counted::{Counted, CountedLine},
};
use crate::{format, microscope::source};

/// Lines without counts that are printed between two that have some.
const GAP: u32 = 3;

/// The work that the counts leave out.
pub const UNSEEN: &str = "\
Counted are the primitives that the emulator sees: memory, barriers, waits, collectives, products of tensor \
cores, and functions of math (fma is two FLOP). Plain + - * / of f32 and integers are not seen, so that the \
scalar units have more to do than is counted.";

/// Everything, fitted to `width` columns.
#[must_use]
pub fn text(profile: &Profile, width: Option<usize>) -> String {
    let columns = Column::of(&profile.counted);
    let mut text = format!("{}\n", profile.title);
    for (file, lines) in profile.counted.files() {
        text += &format!("\n{file}\n");
        text += &annotated(file, &lines, &columns, width);
    }
    let help = |column: &Column| format!("  {:<12}{}\n", column.name, column.help);
    text += "\ncolumns\n";
    text += &columns.iter().map(help).collect::<String>();
    text += &format!("  {UNSEEN}\n");
    text += &format!("\n{}", launches(profile));
    text += &format!("\n{}", totals(profile));
    text += &format!("\n{}", bound(profile));
    text.trim_end().to_owned()
}

/// The counted lines of a file with those between them.
fn annotated(
    file: &str,
    lines: &[&CountedLine],
    columns: &[Column],
    width: Option<usize>,
) -> String {
    let cells: Vec<Vec<String>> =
        lines.iter().map(|line| columns.iter().map(|c| c.cell(line)).collect()).collect();
    let used: Vec<usize> =
        (0..columns.len()).filter(|&i| cells.iter().any(|cells| !cells[i].is_empty())).collect();
    let chars = |text: &str| text.chars().count();
    let widest = |i: usize| {
        let cells = cells.iter().map(|cells| chars(&cells[i]));
        cells.max().unwrap_or(0).max(chars(columns[i].name))
    };
    let row = |number: &str, cell: &dyn Fn(usize) -> String, code: &str| {
        let mut row = format!("{number:>5}");
        for &i in &used {
            let cell = cell(i);
            row += &" ".repeat(widest(i) + 2 - chars(&cell));
            row += &cell;
        }
        row += &format!("  │ {code}");
        let row = row.trim_end();
        match width {
            Some(width) if chars(row) > width => row.chars().take(width - 1).chain(['…']).collect(),
            _ => row.to_owned(),
        }
    };
    let mut rows = vec![row("line", &|i| columns[i].name.to_owned(), "")];
    let code: Vec<&str> = source::text(file).lines().collect();
    let code = |number: u32| code.get(number as usize - 1).copied().unwrap_or_default();
    // An indent that all lines share says nothing.
    let indent = |text: &str| text.len() - text.trim_start().len();
    let common = lines.iter().map(|line| indent(code(line.line.number))).min().unwrap_or(0);
    let code = |number: u32| {
        let text = code(number);
        &text[common.min(indent(text))..]
    };
    let mut last = None;
    for (line, cells) in lines.iter().zip(&cells) {
        let number = line.line.number;
        if let Some(last) = last {
            if number - last > GAP + 1 {
                rows.push(row("", &|_| String::new(), "⋮"));
            } else {
                let between = last + 1..number;
                rows.extend(between.map(|n| row(&n.to_string(), &|_| String::new(), code(n))));
            }
        }
        rows.push(row(&number.to_string(), &|i| cells[i].clone(), code(number)));
        last = Some(number);
    }
    rows.join("\n") + "\n"
}

fn launches(profile: &Profile) -> String {
    let mut text = String::from("launches\n");
    for (index, launch) in profile.counted.launches.iter().enumerate() {
        let cluster = match launch.cluster {
            1 => String::new(),
            blocks => format!(" in clusters of {blocks}"),
        };
        text += &format!(
            "  {}  {}: {} of {} threads{cluster}, {} dynamic shared memory; reads {}, writes {} of global memory\n",
            index + 1,
            launch.name,
            format::counted(launch.blocks as usize, "block"),
            launch.threads,
            format::bytes(f64::from(launch.shared_bytes)),
            bytes(launch.total.global_bytes_read),
            bytes(launch.total.global_bytes_written)
        );
    }
    text
}

/// The totals, each with its name.
#[must_use]
pub fn total_rows(profile: &Profile) -> Vec<(&'static str, String)> {
    let c = &profile.counted.total;
    let mut rows = vec![
        ("FLOP by convention", short(profile.flops as u64)),
        ("FLOP on tensor cores", short(c.tensor_flops)),
        ("instructions of tensor cores", short(c.tensor_instructions)),
        ("scalar FLOP counted", short(c.flops)),
        ("special functions", short(c.special)),
        ("global memory read", bytes(c.global_bytes_read)),
        ("global memory written", bytes(c.global_bytes_written)),
    ];
    if let Some(sectors) = Counted::sectors_per_request(c) {
        let all = bytes(32 * c.global_sectors);
        rows.push(("sectors per request", format!("{}, {all} in all", format::digits(sectors))));
    }
    let conflicts = Counted::conflicts(c);
    let share = 100.0 * conflicts as f64 / (c.shared_passes_least.max(1)) as f64;
    rows.extend([
        ("shared memory read", bytes(c.shared_bytes_read)),
        ("shared memory written", bytes(c.shared_bytes_written)),
        ("passes over shared memory", short(c.shared_passes)),
        (
            "of these by bank conflicts",
            format!("{} ({}% more)", short(conflicts), format::digits(share)),
        ),
        ("waits of warps", short(c.waits)),
    ]);
    rows
}

fn totals(profile: &Profile) -> String {
    let rows = total_rows(profile);
    let row = |(name, value): (&str, String)| format!("  {name:<30}{value}\n");
    format!("totals\n{}", rows.into_iter().map(row).collect::<String>())
}

/// Seconds with their unit.
#[must_use]
pub fn time(seconds: f64) -> String {
    format!("{} µs", format::digits(1e6 * seconds))
}

/// The bound in a sentence.
#[must_use]
pub fn conclusion(profile: &Profile) -> String {
    let (bound, gpu) = (profile.roofline.bound(), &profile.gpu);
    format!(
        "{}: at the figures of {} its part of these counts takes {}, and no run is faster, however well the \
         rest overlaps. A small problem does not fill the GPU and takes longer.",
        bound.unit,
        gpu.title,
        time(bound.seconds)
    )
}

fn bound(profile: &Profile) -> String {
    let (roofline, gpu) = (&profile.roofline, &profile.gpu);
    let mut text = format!("roofline, {}\n", gpu.title);
    for bound in &roofline.bounds {
        let (unit, of) = (bound.unit, bound.of);
        let work = match of {
            "bytes" => bytes(bound.work as u64),
            _ => format!("{} {of}", short(bound.work as u64)),
        };
        text += &format!("  {unit:<20}{work:>15}{:>14}\n", time(bound.seconds));
    }
    text += &format!(
        "  {} FLOP for each byte that must move ({}), {} for each that was asked for\n",
        format::digits(roofline.intensity()),
        bytes(roofline.least_bytes as u64),
        format::digits(roofline.intensity_asked())
    );
    text += &format!("  bound: {}\n", conclusion(profile));
    if let Some(obstacle) = &profile.obstacle {
        text += &format!("  {obstacle}\n");
    }
    if let Some((ms, of)) = &profile.measured {
        text += &format!("  measured: {} ({of})\n", format::millis(*ms));
    }
    text + &format!("  figures: {}\n", gpu.source)
}
