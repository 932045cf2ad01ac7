//! The page: one self-contained HTML file.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    analysis::{Conclusion, Tone, View, moved, time, views},
    legend,
    panel::{self, Panel},
    picture,
};
use crate::{
    format,
    results::{Check, Level, Results, Row, Status},
};

const STYLE: &str = include_str!("style.css");

/// The head of a page: its title, and the style of every page with the page's own.
pub(crate) fn head(title: Markup, own_style: &str) -> Markup {
    html! {
        head {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width, initial-scale=1";
            title { (title) }
            style { (PreEscaped(STYLE)) (PreEscaped(own_style)) }
        }
    }
}

/// The page of a run. `files` stand beside it.
#[must_use]
pub fn page(results: &Results, conclusions: &[Conclusion], files: &[String]) -> String {
    let views = views(results);
    let title = title(results);
    let mut sections: Vec<(String, Markup)> = Vec::new();
    for view in &views {
        let name = heading(view.level);
        let panels = html! { div.panels { @for p in panel::four(results, view) { (figure(&p)) } } };
        sections.push((name.into(), panels));
        let name = format!("{name} in figures");
        sections.push((name.clone(), rows(results, view, &name)));
    }
    if !results.checks.is_empty() {
        let panels =
            html! { div.panels { @for p in panel::differences(results) { (figure(&p)) } } };
        sections.push(("Differences from the f64 oracle".into(), panels));
        let name = "Differences in figures";
        sections.push((name.into(), checks(&results.checks, name)));
    }
    sections.push(("How this was measured".into(), circumstances(results)));
    if !files.is_empty() {
        let links = html! { ul.files { @for file in files { li { a href=(file) { (file) } } } } };
        sections.push(("Files".into(), links));
    }
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            (head(html! { (title) }, ""))
            body {
                h1 { (title) }
                p.lead { (setting(results)) }
                nav aria-label="Contents" { ul.contents {
                    @for (name, _) in &sections { li { a href={ "#" (anchor(name)) } { (name) } } }
                } }
                ul.findings { @for c in conclusions { (finding(c)) } }
                @for (name, content) in &sections {
                    h2 id=(anchor(name)) { (name) }
                    (content)
                }
            }
        }
    };
    markup.into_string()
}

/// The anchor of a section.
pub(crate) fn anchor(name: &str) -> String {
    name.to_lowercase().replace(' ', "-")
}

/// A table that scrolls sideways, also with the keyboard.
fn scrolled(name: &str, table: &Markup) -> Markup {
    html! { div.table tabindex="0" role="region" aria-label=(name) { (table) } }
}

/// The run, in one line.
#[must_use]
pub fn title(results: &Results) -> String {
    let what = match results.command.as_str() {
        "verify" => "Attention kernels verified",
        _ => "Attention kernels compared",
    };
    format!("{what} on {}", results.device.name)
}

fn setting(results: &Results) -> String {
    let o = &results.options.problem;
    format!(
        "batch {}, {}, head dim {}, {}{}",
        o.batch,
        format::counted(o.heads, "head"),
        o.head_dim,
        o.dtype,
        o.features(),
    )
}

const fn heading(level: Level) -> &'static str {
    match level {
        Level::Attention => "Attention",
        Level::Module => "Multi-head attention module",
        Level::Backward => "Gradients of attention",
        Level::ModuleBackward => "Forward and backward pass of the module",
    }
}

fn finding(c: &Conclusion) -> Markup {
    let class = match c.tone {
        Tone::Finding => "finding",
        Tone::Caution => "caution",
        Tone::Failure => "failure",
    };
    html! { li class=(class) { b { (c.topic) } (c.text) } }
}

fn figure(p: &Panel) -> Markup {
    html! {
        figure {
            (PreEscaped(picture::inline(p)))
            figcaption {
                ul.legend {
                    @for line in &p.lines {
                        li { (PreEscaped(legend::sample(line))) (line.name) }
                    }
                }
                (p.note)
            }
        }
    }
}

/// An optional figure.
fn maybe(value: Option<f64>, show: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "–".into(), show)
}

fn rows(results: &Results, view: &View<'_>, name: &str) -> Markup {
    let mut rows: Vec<&Row> = results.rows.iter().filter(|r| r.level == view.level).collect();
    rows.sort_by_key(|r| r.seq);
    let first = |i: usize| i > 0 && rows[i].seq != rows[i - 1].seq;
    let columns = columns(results, view);
    scrolled(
        name,
        &html! { table {
            thead { tr { th { "N" } th { "kernel" } @for (heading, _) in &columns { th { (heading) } } } }
            tbody { @for (i, r) in rows.iter().enumerate() {
                tr class=[first(i).then_some("first")] {
                    td { (r.seq) } td { (r.kernel) }
                    @if r.status == Status::Ok { @for (_, show) in &columns { td { (show(r)) } } }
                    @else { (not_measured(r, columns.len())) }
                }
            } }
        } },
    )
}

/// A column of the rows: its heading, and its value for a measured row.
type Column = (String, Box<dyn Fn(&Row) -> String>);

/// The columns after N and kernel. The emulator's times are named as such, and no ratios are made
/// from them.
fn columns(results: &Results, view: &View<'_>) -> Vec<Column> {
    let emulated = results.device.emulated;
    let mut columns: Vec<Column> = Vec::new();
    let mut add = |name: &str, show: fn(&Row) -> String| {
        columns.push((name.to_owned(), Box::new(show)));
    };
    let ms = if emulated { "median ms (emulated)" } else { "median ms" };
    add(ms, |r| maybe(time(r), format::digits));
    add("mean ± std", |r| {
        let text = |(m, s)| format!("{} ± {}", format::digits(m), format::digits(s));
        r.mean_ms.zip(r.std_ms).map_or_else(|| "–".into(), text)
    });
    add("min … max", |r| {
        let text = |(a, b)| format!("{} … {}", format::digits(a), format::digits(b));
        r.min_ms.zip(r.max_ms).map_or_else(|| "–".into(), text)
    });
    if !emulated {
        add("TFLOP/s", |r| maybe(r.tflops, format::digits));
    }
    add("peak memory", |r| maybe(r.peak_bytes.map(|b| b as f64), format::bytes));
    if let Some(b) = view.baseline {
        if !emulated {
            let speedup = move |r: &Row| maybe(b.speedup(r), |s| format!("{s:.2}"));
            columns.push((format!("× {}", b.name()), Box::new(speedup)));
        }
        let saved = move |r: &Row| maybe(b.memory_saved(r), |s| format!("{:.1} %", s * 100.0));
        columns.push((format!("saved vs {}", b.name()), Box::new(saved)));
    }
    let mut add = |name: &str, show: fn(&Row) -> String| {
        columns.push((name.to_owned(), Box::new(show)));
    };
    if view.series.iter().flat_map(|s| &s.rows).any(|r| moved(r).is_some()) {
        add("bytes moved", |r| maybe(moved(r).map(|b| b as f64), format::bytes));
    }
    let output = match view.level {
        Level::Attention => "max |ΔO|",
        Level::Module => "max |Δy|",
        Level::Backward => "max |ΔdQ|",
        Level::ModuleBackward => "max |Δdx|",
    };
    add(output, |r| maybe(r.max_abs_err, format::scientific));
    columns
}

fn not_measured(r: &Row, columns: usize) -> Markup {
    let status = match r.status {
        Status::Oom => "out of memory".to_owned(),
        other => other.to_string(),
    };
    let mut why = r.reason.clone();
    if why.is_empty()
        && let Some(needed) = r.needed_bytes
    {
        why = format!("needs {}", format::bytes(needed as f64));
    }
    html! { td.why colspan=(columns) { b { (status) } @if !why.is_empty() { ": " (why) } } }
}

fn checks(checks: &[Check], name: &str) -> Markup {
    let types = checks.iter().any(|c| c.dtype != checks[0].dtype);
    let levels = checks.iter().any(|c| c.level != checks[0].level);
    scrolled(
        name,
        &html! { table {
            thead { tr {
                th { "N" } th { "kernel" }
                @if levels { th { "level" } }
                @if types { th { "type" } }
                th { "tensor" } th { "verdict" } th { "max abs" } th { "plain algorithm" }
                th { "mean abs" } th { "median abs" } th { "max rel" } th { "mean rel" }
                th { "median rel" } th { "rms rel" } th { "compared" }
            } }
            tbody { @for c in checks { tr {
                td { (c.seq) } td { (c.kernel) }
                @if levels { td { (c.level) } }
                @if types { td { (c.dtype) } }
                td { (c.tensor) }
                td class=[(!c.passed()).then_some("bad")] { (verdict(c)) }
                td { (format::scientific(c.abs.max)) } td { (format::scientific(c.plain_max_abs)) }
                td { (format::scientific(c.abs.mean)) } td { (format::scientific(c.abs.median)) }
                td { (format::scientific(c.rel.max)) } td { (format::scientific(c.rel.mean)) }
                td { (format::scientific(c.rel.median)) } td { (format::scientific(c.rel_rms)) }
                td { (format::count(c.compared as i64)) }
            } } }
        } },
    )
}

fn verdict(c: &Check) -> String {
    let mut text = String::from(if c.passed() { "passed" } else { "failed" });
    if !c.within_twice {
        text += ": > 2 × plain";
    }
    if let (false, Some(threshold)) = (c.within_threshold, c.threshold) {
        text += &format!(": > {}", format::scientific(threshold));
    }
    text
}

fn circumstances(results: &Results) -> Markup {
    let (o, d, m) = (&results.options, &results.device, &results.machine);
    let driver = results.driver.as_ref().map(|driver| match &driver.version {
        Some(version) => format!("{version}, CUDA {}", driver.cuda),
        None => format!("CUDA {}", driver.cuda),
    });
    let memory =
        |b: Option<u64>| b.map_or_else(String::new, |b| format!(", {}", format::bytes(b as f64)));
    let seqs: Vec<String> = o.seq.iter().map(usize::to_string).collect();
    html! {
        dl {
            dt { "Device" }
            dd {
                (d.name) (memory(d.memory_bytes)) ", compute capability " (d.compute_capability) ", "
                (format::bytes(f64::from(d.shared_bytes))) " shared memory a block"
                @if !d.emulated { ", " (d.multiprocessors) " multiprocessors" }
            }
            @if let Some(driver) = driver { dt { "Driver" } dd { (driver) } }
            dt { "Computer" }
            dd {
                @if let Some(cpu) = &m.cpu { (cpu) ", " }
                (format::counted(m.threads, "thread")) (memory(m.memory_bytes)) ", " (m.os) " " (m.arch)
            }
            dt { "Problem" } dd { (setting(results)) "; N = " (seqs.join(", ")) }
            dt { "Runs" }
            dd { (o.repeats.iters) " timed after " (o.repeats.warmup) " to warm up; seed " (o.seed) }
            dt { "FLOP" }
            dd {
                "by convention 4·B·H·N·N·D, half of that when causal; in another window 4·D for each row and "
                "key that it sees; of packed sequences with the lengths of each; projections of a module are "
                "added"
            }
            dt { "Program" }
            dd { "version " (results.version) ", commit " (results.commit) ", " (results.created) }
        }
    }
}
