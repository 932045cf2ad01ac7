//! Tables of rows and of checks: with lines between columns on a terminal; elsewhere
//! columns apart by blanks and no blank inside a cell, for whatever reads them next.

use std::io::IsTerminal;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::{
    format,
    results::{Check, Row, Status},
};

/// A table for standard output.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.set_content_arrangement(ContentArrangement::Disabled);
    if std::io::stdout().is_terminal() {
        table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    } else {
        table.load_preset(presets::NOTHING);
    }
    table.set_header(header);
    for (index, column) in table.column_iter_mut().enumerate() {
        let alignment = if index == 0 { CellAlignment::Left } else { CellAlignment::Right };
        column.set_cell_alignment(alignment);
    }
    table
}

fn finish(table: &Table) -> String {
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// What was not measured is a dash; blanks are left out.
fn cell<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".into(), |v| show(v).replace(' ', ""))
}

fn bytes(value: Option<u64>) -> String {
    cell(value, |b| format::bytes(b as f64))
}

/// The rows of one sequence length and level, with the reasons of those that did not end
/// well below. What a kernel does not support is said there only.
#[must_use]
pub fn rows(rows: &[Row]) -> String {
    let with_standard = rows.iter().any(|row| row.kernel == "standard");
    let counted = rows.iter().any(|row| row.global_bytes_read.is_some());
    let sustained = rows.iter().any(|row| row.sustained_ms.is_some());
    let mut header = vec!["kernel", "mean ms", "std", "min", "median", "max", "TFLOP/s"];
    if sustained {
        header.extend(["sustained ms", "sustained TFLOP/s"]);
    }
    header.extend(["× naive", "peak", "saved"]);
    if with_standard {
        header.extend(["× standard", "saved vs standard"]);
    }
    if counted {
        header.extend(["FLOP", "read", "written"]);
    }
    header.push("max error");
    let header: Vec<String> = header.iter().map(|name| heading(name)).collect();
    let mut table = table(&header.iter().map(String::as_str).collect::<Vec<_>>());
    for row in rows.iter().filter(|row| row.status != Status::Unsupported) {
        let number = |value: Option<f64>| cell(value, format::digits);
        let percent = |value: Option<f64>| cell(value, |s| format!("{:.1}%", 100.0 * s));
        let mean =
            if row.status == Status::Ok { number(row.mean_ms) } else { row.status.to_string() };
        let mut cells = vec![row.kernel.clone(), mean];
        cells.extend([row.std_ms, row.min_ms, row.median_ms, row.max_ms, row.tflops].map(number));
        if sustained {
            cells.extend([row.sustained_ms, row.sustained_tflops].map(number));
        }
        cells.push(number(row.speedup));
        let peak = if row.status == Status::Oom { row.needed_bytes } else { row.peak_bytes };
        cells.extend([bytes(peak), percent(row.memory_saved)]);
        if with_standard {
            cells.extend([number(row.speedup_standard), percent(row.memory_saved_standard)]);
        }
        if counted {
            let ran = row.status == Status::Ok;
            cells.push(cell(ran.then_some(row.flops), |flop| format!("{flop:.2e}")));
            cells.extend([bytes(row.global_bytes_read), bytes(row.global_bytes_written)]);
        }
        cells.push(cell(row.max_abs_err, |error| format!("{error:.1e}")));
        table.add_row(cells);
    }
    finish(&table) + &reasons(rows)
}

/// A line for each row that has something to say.
#[must_use]
pub fn reasons(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows.iter().filter(|row| !row.reason.is_empty()) {
        text += &format!("\n  {} ({}): {}", row.kernel, row.status, row.reason);
    }
    text
}

/// A heading without blanks where standard output is read by a program.
fn heading(name: &str) -> String {
    if std::io::stdout().is_terminal() { name.into() } else { name.replace(' ', "_") }
}

/// Differences from the oracle with verdicts, one line a kernel and tensor.
#[must_use]
pub fn checks(checks: &[Check]) -> String {
    let header = [
        "kernel",
        "tensor",
        "max abs",
        "mean abs",
        "median abs",
        "max rel",
        "mean rel",
        "median rel",
        "rms rel",
        "plain max abs",
        "≤ threshold",
        "≤ 2 × plain",
    ];
    let header = header.map(heading);
    let mut table = table(&header.each_ref().map(String::as_str));
    let verdict = |good: bool| if good { "yes" } else { "NO" }.to_owned();
    for check in checks {
        let mut cells = vec![check.kernel.clone(), check.tensor.clone()];
        let (abs, rel) = (&check.abs, &check.rel);
        let (abs, rel) =
            ([abs.max, abs.mean, abs.median], [rel.max, rel.mean, rel.median, check.rel_rms]);
        let numbers = abs.into_iter().chain(rel).chain([check.plain_max_abs]);
        cells.extend(numbers.map(|x| format!("{x:.2e}")));
        cells.extend([verdict(check.within_threshold), verdict(check.within_twice)]);
        table.add_row(cells);
    }
    finish(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_did_not_end_well_say_why() {
        let good = Row {
            kernel: "naive".into(),
            mean_ms: Some(1.25),
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
        let text = rows(&[good, bad, no]);
        assert!(text.contains("1.25") && text.contains("3.00MiB"), "{text}");
        assert!(text.contains("9.00GiB") && text.contains("other (oom): needs 9 GiB"), "{text}");
        assert_eq!(text.matches("third").count(), 1, "{text}");
        assert!(text.contains("third (unsupported): has no f16"), "{text}");
        assert!(!text.contains("standard"));
    }
}
