//! The page: one HTML file with everything in it.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    analysis::{Conclusion, Tone, View, kernels, time, views},
    legend,
    panel::{self, Panel},
    picture,
};
use crate::{
    format,
    results::{Check, Level, Results, Row, Status},
};

const STYLE: &str = include_str!("style.css");

/// The page of a run.
#[must_use]
pub fn page(results: &Results, conclusions: &[Conclusion]) -> String {
    let views = views(results);
    let title = title(results);
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p.lead { (setting(results)) }
                ul.findings { @for c in conclusions { (finding(c)) } }
                @for view in &views {
                    h2 { (heading(view.level)) }
                    div.panels { @for p in panel::four(results, view) { (figure(&p)) } }
                    h2 { (heading(view.level)) " in figures" }
                    (rows(results, view))
                }
                @if !results.checks.is_empty() {
                    h2 { "Differences from the f64 oracle" }
                    div.panels {
                        @for p in panel::differences(results, &kernels(results)) { (figure(&p)) }
                    }
                    h2 { "Differences in figures" }
                    (checks(&results.checks))
                }
                h2 { "How this was measured" }
                (circumstances(results))
            }
        }
    };
    markup.into_string()
}

/// What the run is, in a line.
#[must_use]
pub fn title(results: &Results) -> String {
    let what = match results.command.as_str() {
        "verify" => "Attention kernels verified",
        _ => "Attention kernels compared",
    };
    format!("{what} on {}", results.device.name)
}

fn setting(results: &Results) -> String {
    let o = &results.options;
    let mut text = format!(
        "batch {}, {} heads, head dim {}, {}{}",
        o.batch,
        o.heads,
        o.head_dim,
        o.dtype,
        if o.causal { ", causal" } else { "" },
    );
    if o.mask {
        text += ", padding mask";
    }
    if o.dropout > 0.0 {
        text += &format!(", dropout {}", o.dropout);
    }
    text
}

const fn heading(level: Level) -> &'static str {
    match level {
        Level::Attention => "Attention",
        Level::Module => "Multi-head attention module",
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

/// A figure that may be missing.
fn maybe(value: Option<f64>, show: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "–".into(), show)
}

fn rows(results: &Results, view: &View<'_>) -> Markup {
    let counted = view.series.iter().flat_map(|s| &s.rows).any(|r| r.global_bytes_read.is_some());
    let mut rows: Vec<&Row> = results.rows.iter().filter(|r| r.level == view.level).collect();
    rows.sort_by_key(|r| r.seq);
    let first = |i: usize| i > 0 && rows[i].seq != rows[i - 1].seq;
    html! {
        div.table { table {
            thead { tr {
                th { "N" } th { "kernel" } th { "median ms" } th { "mean ± std" }
                th { "min … max" } th { "TFLOP/s" } th { "peak memory" }
                @if let Some(b) = view.baseline {
                    th { "× " (b.name()) } th { "saved" }
                }
                @if counted { th { "bytes moved" } }
                th { "max |ΔO|" }
            } }
            tbody { @for (i, r) in rows.iter().enumerate() {
                tr class=[first(i).then_some("first")] {
                    td { (r.seq) } td { (r.kernel) }
                    @if r.status == Status::Ok { (measured(r, view, counted)) }
                    @else { (not_measured(r, view, counted)) }
                }
            } }
        } }
    }
}

fn measured(r: &Row, view: &View<'_>, counted: bool) -> Markup {
    let moved = r.global_bytes_read.zip(r.global_bytes_written).map(|(a, b)| (a + b) as f64);
    let mean = r.mean_ms.zip(r.std_ms);
    let ends = r.min_ms.zip(r.max_ms);
    html! {
        td { (maybe(time(r), format::digits)) }
        td { (mean.map_or_else(|| "–".into(), |(m, s)| {
            format!("{} ± {}", format::digits(m), format::digits(s))
        })) }
        td { (ends.map_or_else(|| "–".into(), |(a, b)| {
            format!("{} … {}", format::digits(a), format::digits(b))
        })) }
        td { (maybe(r.tflops, format::digits)) }
        td { (maybe(r.peak_bytes.map(|b| b as f64), format::bytes)) }
        @if let Some(b) = view.baseline {
            td { (maybe(b.speedup(r), |s| format!("{s:.2}"))) }
            td { (maybe(b.memory_saved(r), |s| format!("{:.1} %", s * 100.0))) }
        }
        @if counted { td { (maybe(moved, format::bytes)) } }
        td { (maybe(r.max_abs_err, format::scientific)) }
    }
}

fn not_measured(r: &Row, view: &View<'_>, counted: bool) -> Markup {
    let columns = 6 + usize::from(counted) + if view.baseline.is_some() { 2 } else { 0 };
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

fn checks(checks: &[Check]) -> Markup {
    html! {
        div.table { table {
            thead { tr {
                th { "N" } th { "kernel" } th { "tensor" } th { "max abs" } th { "mean abs" }
                th { "median abs" } th { "max rel" } th { "mean rel" } th { "median rel" }
                th { "rms rel" } th { "plain algorithm" } th { "compared" } th { "verdict" }
            } }
            tbody { @for c in checks { tr {
                td { (c.seq) } td { (c.kernel) } td { (c.tensor) }
                td { (format::scientific(c.abs.max)) } td { (format::scientific(c.abs.mean)) }
                td { (format::scientific(c.abs.median)) } td { (format::scientific(c.rel.max)) }
                td { (format::scientific(c.rel.mean)) } td { (format::scientific(c.rel.median)) }
                td { (format::scientific(c.rel_rms)) }
                td { (format::scientific(c.plain_max_abs)) }
                td { (format::count(c.compared as i64)) }
                td class=[(!c.passed()).then_some("bad")] { (verdict(c)) }
            } } }
        } }
    }
}

fn verdict(c: &Check) -> String {
    let mut text = String::from(if c.passed() { "passed" } else { "failed" });
    if !c.within_twice {
        text += ": more than twice the plain algorithm's";
    }
    if let (false, Some(threshold)) = (c.within_threshold, c.threshold) {
        text += &format!(": above {}", format::scientific(threshold));
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
                (m.threads) " threads" (memory(m.memory_bytes)) ", " (m.os) " " (m.arch)
            }
            dt { "Problem" } dd { (setting(results)) "; N = " (seqs.join(", ")) }
            dt { "Runs" }
            dd { (o.iters) " timed after " (o.warmup) " to warm up; seed " (o.seed) }
            dt { "FLOP" }
            dd { "by convention 4·B·H·N·N·D, half of that when causal; projections of a module are added" }
            dt { "Program" }
            dd { "version " (results.version) ", commit " (results.commit) ", " (results.created) }
        }
    }
}
