//! Tables of rows and of checks. They fit a width: the terminal's, or 80 columns where standard
//! output is no terminal. The least important columns are left out first; `--wide` prints all
//! columns. Where standard output is no terminal, cells contain no blanks, for programs that read
//! them.

use std::io::IsTerminal;

use comfy_table::{CellAlignment, ContentArrangement, Table, TableComponent, presets};

use flash_attention_distributed::measure::Times;

use crate::{
    decode::DecodeRow,
    format,
    gpus::GpusRow,
    results::{Check, Row, Status},
};

/// Columns where standard output is no terminal.
const WIDTH: usize = 80;
/// Blanks beside a cell, on both sides together.
const PADDING: usize = 2;

/// The width that tables must fit; `None` where `wide` asks for every column.
#[must_use]
pub fn width(wide: bool) -> Option<usize> {
    let terminal = || terminal_size::terminal_size_of(std::io::stdout());
    (!wide).then(|| terminal().map_or(WIDTH, |(width, _)| width.0.into()))
}

/// A column of a table.
struct Column {
    name: &'static str,
    /// Columns of a higher rank are left out earlier; 0 never.
    rank: usize,
    cells: Vec<String>,
}

impl Column {
    fn width(&self) -> usize {
        let widest = self.cells.iter().map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(self.name.chars().count()) + PADDING
    }
}

/// Leaves out columns until the others fit.
fn fit(columns: &mut Vec<Column>, width: Option<usize>) {
    let Some(width) = width else { return };
    while columns.iter().map(Column::width).sum::<usize>() > width {
        let Some(least) = columns.iter().map(|c| c.rank).max().filter(|&rank| rank > 0) else {
            return;
        };
        columns.retain(|column| column.rank != least);
    }
}

/// A table for standard output.
fn table(columns: Vec<Column>, width: Option<usize>) -> String {
    draw(columns, width, std::io::stdout().is_terminal())
}

fn draw(mut columns: Vec<Column>, width: Option<usize>, terminal: bool) -> String {
    fit(&mut columns, width);
    let mut table = Table::new();
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.load_preset(presets::NOTHING);
    let heading = |name: &str| if terminal { name.to_owned() } else { name.replace(' ', "_") };
    if terminal {
        table.set_style(TableComponent::HeaderLines, '─');
    }
    table.set_header(columns.iter().map(|column| heading(column.name)));
    let rows = columns.first().map_or(0, |column| column.cells.len());
    for row in 0..rows {
        table.add_row(columns.iter().map(|column| column.cells[row].as_str()));
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        let alignment = if index == 0 { CellAlignment::Left } else { CellAlignment::Right };
        column.set_cell_alignment(alignment);
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A dash for a value that was not measured; blanks are left out.
fn cell<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".into(), |v| show(v).replace(' ', ""))
}

fn bytes(value: Option<u64>) -> String {
    cell(value, |b| format::bytes(b as f64))
}

/// The rows of one sequence length and level, with the reasons for failed rows below. Unsupported
/// problems appear only there.
#[must_use]
pub fn rows(rows: &[Row], width: Option<usize>) -> String {
    let shown: Vec<&Row> = rows.iter().filter(|row| row.status != Status::Unsupported).collect();
    let emulated = rows.iter().any(|row| row.emulated);
    let mut columns = Vec::new();
    // Time matters most on a GPU; under the emulator the counts matter more.
    let mut add = |name, on_gpu, under_emulator, cell: &dyn Fn(&Row) -> String| {
        let rank = if emulated { under_emulator } else { on_gpu };
        columns.push(Column { name, rank, cells: shown.iter().map(|row| cell(row)).collect() });
    };
    let number = |value: Option<f64>| cell(value, format::digits);
    let percent = |value: Option<f64>| cell(value, |s| format!("{:.1}%", 100.0 * s));
    add("kernel", 0, 0, &|row| row.kernel.clone());
    add("mean ms", 13, 14, &|row| number(row.mean_ms));
    add("std", 9, 10, &|row| number(row.std_ms));
    add("min", 11, 12, &|row| number(row.min_ms));
    add("median ms", 0, 0, &|row| match row.status {
        Status::Ok => number(row.median_ms),
        status => status.to_string(),
    });
    add("max", 12, 13, &|row| number(row.max_ms));
    add("TFLOP/s", 5, 15, &|row| number(row.tflops));
    if rows.iter().any(|row| row.sustained_ms.is_some()) {
        add("sustained ms", 1, 1, &|row| number(row.sustained_ms));
        add("sustained TFLOP/s", 8, 16, &|row| number(row.sustained_tflops));
    }
    if rows.iter().any(|row| row.forward_ms.is_some()) {
        add("forward ms", 0, 0, &|row| number(row.forward_ms));
        add("backward ms", 0, 0, &|row| number(row.backward_ms));
    }
    add("× naive", 2, 7, &|row| number(row.speedup));
    add("peak", 3, 1, &|row| {
        bytes(if row.status == Status::Oom { row.needed_bytes } else { row.peak_bytes })
    });
    if rows.iter().any(|row| row.forward_peak_bytes.is_some()) {
        add("forward peak", 4, 1, &|row| bytes(row.forward_peak_bytes));
    }
    add("saved", 6, 5, &|row| percent(row.memory_saved));
    if rows.iter().any(|row| row.kernel == "standard") {
        add("× standard", 7, 8, &|row| number(row.speedup_standard));
        add("saved vs standard", 14, 11, &|row| percent(row.memory_saved_standard));
    }
    if rows.iter().any(|row| row.global_bytes_read.is_some()) {
        add("FLOP", 15, 6, &|row| {
            let ran = row.status == Status::Ok;
            cell(ran.then_some(row.flops), |flop| format!("{flop:.2e}"))
        });
        add("read", 10, 2, &|row| bytes(row.global_bytes_read));
        add("written", 10, 3, &|row| bytes(row.global_bytes_written));
    }
    add("max error", 4, 4, &|row| cell(row.max_abs_err, |error| format!("{error:.1e}")));
    table(columns, width) + &reasons(rows)
}

/// One line per row with a reason.
#[must_use]
pub fn reasons(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows.iter().filter(|row| !row.reason.is_empty()) {
        text += &format!("\n  {} ({}): {}", row.kernel, row.status, row.reason);
    }
    text
}

/// The measured caches.
#[must_use]
pub fn decodes(rows: &[DecodeRow], width: Option<usize>) -> String {
    let mut columns = Vec::new();
    let mut add = |name, rank, cell: &dyn Fn(&DecodeRow) -> String| {
        columns.push(Column { name, rank, cells: rows.iter().map(cell).collect() });
    };
    let timed = rows.iter().any(|row| row.median_ms.is_some());
    let replayed = rows.iter().any(|row| row.replayed_ms.is_some());
    let micros = |ms| cell(ms, |ms: f64| format::digits(1e3 * ms));
    let rate = |row: &DecodeRow, ms| cell(ms, |ms| format::digits(row.rate(ms)));
    let percent = |share| cell(share, |share: f64| format!("{:.0}%", 100.0 * share));
    if rows.iter().any(|row| row.peer) {
        add("kernel", 0, &|row| row.kernel.clone());
    }
    add("Nk", 0, &|row| row.seq_k.to_string());
    add("page", 0, &|row| match row.page_size {
        0 => "-".to_owned(),
        page_size => page_size.to_string(),
    });
    add("splits", 2, &|row| cell(row.splits, |splits| splits.to_string()));
    if timed {
        add("median µs", 0, &|row| micros(row.median_ms));
        add("GB/s", if replayed { 5 } else { 0 }, &|row| rate(row, row.median_ms));
    }
    if rows.iter().any(|row| row.share_of_copy.is_some()) {
        add("of a copy", if replayed { 4 } else { 1 }, &|row| percent(row.share_of_copy));
    }
    if timed {
        add("back to back µs", 0, &|row| micros(row.sustained_ms));
        add("GB/s", if replayed { 6 } else { 0 }, &|row| rate(row, row.sustained_ms));
    }
    if replayed {
        add("replayed µs", 0, &|row| micros(row.replayed_ms));
        add("GB/s", 0, &|row| rate(row, row.replayed_ms));
        if rows.iter().any(|row| row.replayed_share_of_copy.is_some()) {
            add("of a copy", 1, &|row| percent(row.replayed_share_of_copy));
        }
    }
    add("max error", 3, &|row| cell(row.max_abs_err, |error| format!("{error:.1e}")));
    add("≤ 2 × plain", 0, &|row| match (row.max_abs_err, row.passed) {
        (None, _) => row.status.to_string(),
        (_, true) => "yes".to_owned(),
        (_, false) => "NO".to_owned(),
    });
    let mut text = table(columns, width);
    for row in rows.iter().filter(|row| !row.reason.is_empty()) {
        let page = if row.page_size == 0 {
            String::new()
        } else {
            format!(", pages of {}", row.page_size)
        };
        text +=
            &format!("\n  {}, Nk {}{page} ({}): {}", row.kernel, row.seq_k, row.status, row.reason);
    }
    text
}

/// The ways in which several GPUs share attention.
#[must_use]
pub fn gpus(rows: &[GpusRow], width: Option<usize>) -> String {
    let mut columns = Vec::new();
    let mut add = |name, rank, cell: &dyn Fn(&GpusRow) -> String| {
        columns.push(Column { name, rank, cells: rows.iter().map(cell).collect() });
    };
    let ms = |show: fn(&Times) -> f64| {
        move |row: &GpusRow| cell(row.times.as_ref(), |times| format::digits(show(times)))
    };
    let percent = |value: f64| format!("{:.0}%", 100.0 * value);
    add("parallel", 0, &|row| row.parallel.to_owned());
    add("heads x context", 5, &|row| format!("{}x{}", row.grid.heads, row.grid.context));
    add("pass", 0, &|row| row.pass.to_owned());
    if rows.iter().any(|row| row.times.is_some()) {
        add("ms", 0, &ms(|times| times.all));
        add("computation", 4, &ms(|times| times.computation));
        add("transfers", 3, &ms(|times| times.transfers));
        let sends = |row: &GpusRow| row.times.filter(|_| row.sent > 0);
        add("hidden", 1, &|row| cell(sends(row), |times| percent(times.hidden())));
        add("efficiency", 0, &|row| cell(row.efficiency, percent));
    }
    add("sent", 2, &|row| bytes(Some(row.sent)));
    add("peak", 1, &|row| bytes(Some(row.peak)));
    add("max error", 2, &|row| cell(row.error, |error| format!("{error:.1e}")));
    add("≤ 2 × plain", 0, &|row| match (row.error, row.passed) {
        (None, _) => "-".to_owned(),
        (_, passed) => if passed { "yes" } else { "NO" }.to_owned(),
    });
    table(columns, width)
}

/// Differences from the oracle with verdicts, one line per kernel and tensor.
#[must_use]
pub fn checks(checks: &[Check], width: Option<usize>) -> String {
    let mut columns = Vec::new();
    let mut add = |name, rank, cell: &dyn Fn(&Check) -> String| {
        columns.push(Column { name, rank, cells: checks.iter().map(cell).collect() });
    };
    let number = |x: f64| format!("{x:.2e}");
    let verdict = |good: bool| if good { "yes" } else { "NO" }.to_owned();
    add("kernel", 0, &|c| c.kernel.clone());
    add("tensor", 0, &|c| c.tensor.clone());
    add("max abs", 0, &|c| number(c.abs.max));
    add("mean abs", 3, &|c| number(c.abs.mean));
    add("median abs", 6, &|c| number(c.abs.median));
    add("max rel", 4, &|c| number(c.rel.max));
    add("mean rel", 7, &|c| number(c.rel.mean));
    add("median rel", 8, &|c| number(c.rel.median));
    add("rms rel", 5, &|c| number(c.rel_rms));
    add("plain", 1, &|c| number(c.plain_max_abs));
    if checks.iter().any(|c| c.threshold.is_some()) {
        add("≤ threshold", 0, &|c| verdict(c.within_threshold));
    }
    add("≤ 2 × plain", 0, &|c| verdict(c.within_twice));
    table(columns, width)
}

#[cfg(test)]
mod tests {
    use flash_attention::verify::{Differences, Yardstick};

    use super::*;

    #[test]
    fn rows_that_did_not_end_well_say_why() {
        let good = Row {
            kernel: "naive".into(),
            median_ms: Some(1.25),
            peak_bytes: Some(3 << 20),
            ..Row::default()
        };
        let bad = Row {
            kernel: "other".into(),
            status: Status::Oom,
            reason: "needs 9 GiB".into(),
            needed_bytes: Some(9 << 30),
            ..Row::default()
        };
        let no = Row {
            kernel: "third".into(),
            status: Status::Unsupported,
            reason: "has no f16".into(),
            ..Row::default()
        };
        let text = rows(&[good, bad, no], None);
        assert!(text.contains("1.25") && text.contains("3.00MiB"), "{text}");
        assert!(text.contains("9.00GiB") && text.contains("other (oom): needs 9 GiB"), "{text}");
        assert_eq!(text.matches("third").count(), 1, "{text}");
        assert!(text.contains("third (unsupported): has no f16"), "{text}");
        assert!(!text.contains("standard"));
    }

    /// The headings, which contain blanks on a terminal.
    fn names(text: &str) -> Vec<String> {
        let line = text.lines().next().unwrap();
        let names = line.split("  ").map(str::trim).filter(|name| !name.is_empty());
        names.map(|name| name.replace(' ', "_")).collect()
    }

    #[test]
    fn tables_fit_and_keep_what_matters() {
        let row = |emulated| Row {
            kernel: "flash_pipelined".into(),
            mean_ms: Some(1234.5),
            std_ms: Some(1234.5),
            min_ms: Some(1234.5),
            median_ms: Some(1234.5),
            max_ms: Some(1234.5),
            tflops: Some(1234.5),
            speedup: Some(1234.5),
            speedup_standard: Some(1234.5),
            memory_saved: Some(0.1234),
            memory_saved_standard: Some(0.1234),
            peak_bytes: Some(1023 << 20),
            global_bytes_read: Some(1023 << 20),
            global_bytes_written: Some(1023 << 20),
            max_abs_err: Some(1e-10),
            flops: 1e10,
            emulated,
            ..Row::default()
        };
        for emulated in [false, true] {
            let standard = Row { kernel: "standard".into(), ..row(emulated) };
            let rows = [row(emulated), standard];
            let wide = names(&super::rows(&rows, None));
            assert_eq!(wide.len(), 16);
            let mut before = 0;
            for width in [20, 80, 100, 160, 200] {
                let text = super::rows(&rows, Some(width));
                let fits = text.lines().all(|line| line.chars().count() <= width);
                assert!(fits || width == 20, "{width}\n{text}");
                let shown = names(&text);
                assert!(shown.len() >= before && shown.iter().all(|name| wide.contains(name)));
                before = shown.len();
                assert!(shown.contains(&"kernel".into()) && shown.contains(&"median_ms".into()));
                let first = if emulated { "read" } else { "×_naive" };
                assert!(width < 80 || shown.contains(&first.into()), "{text}");
                assert!(width < 80 || shown.contains(&"max_error".into()), "{text}");
            }
            assert_eq!(names(&super::rows(&rows, Some(200))), wide);
        }
    }

    #[test]
    fn tables_are_as_wide_as_their_columns_on_a_terminal_too() {
        for terminal in [false, true] {
            let column =
                |name, rank, cell: &str| Column { name, rank, cells: vec![cell.into(); 2] };
            let columns =
                || vec![column("a b", 0, "1234"), column("c", 1, "1"), column("d", 2, "2")];
            let widest = |width| {
                let text = draw(columns(), Some(width), terminal);
                text.lines().map(|line| line.chars().count()).max().unwrap()
            };
            // Without the blank at the end, where there is no line below the headings.
            let end = usize::from(!terminal);
            assert_eq!([12, 11, 8].map(widest), [12 - end, 9 - end, 6 - end]);
        }
    }

    #[test]
    fn verdicts_fit_80_columns() {
        let exact = Differences::new(&[1.0], &[1.0]);
        let bad = Check {
            kernel: "flash_pipelined".into(),
            tensor: "lse".into(),
            threshold: Some(1e-3),
            within_threshold: false,
            within_twice: true,
            ..crate::accuracy::check(&exact, Yardstick::default(), None)
        };
        let text = checks(&[bad], Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(names(&text)[names(&text).len() - 2..], ["≤_threshold", "≤_2_×_plain"]);
        let last: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last[last.len() - 2..], ["NO", "yes"], "{text}");
    }
}
