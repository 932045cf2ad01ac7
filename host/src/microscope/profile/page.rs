//! A profile as one page: the source with heat, tables to sort, the roofline.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    Profile,
    columns::{Column, bytes, short},
    counted::CountedLine,
    roofline::Roofline,
    terminal::{UNSEEN, conclusion, time, total_rows},
};
use crate::{
    format,
    microscope::{gpu::Gpu, source},
    report::page::{anchor, head},
};

const OWN_STYLE: &str = include_str!("profile.css");
const SCRIPT: &str = include_str!("profile.js");

/// The page.
#[must_use]
pub fn page(profile: &Profile) -> String {
    let columns = Column::of(&profile.counted);
    let sections: Vec<(&str, Markup)> = vec![
        ("What bounds it", bound(profile)),
        ("Totals", totals(profile)),
        ("Lines", lines(profile, &columns)),
        ("Source", sources(profile, &columns)),
    ];
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            (head(html! { "Profile of " (profile.title) }, OWN_STYLE))
            body {
                h1 { "Profile of " (profile.kernel) }
                p.lead { (profile.title) ", counted by the emulator" }
                nav aria-label="Contents" { ul.contents {
                    @for (name, _) in &sections { li { a href={ "#" (anchor(name)) } { (name) } } }
                } }
                ul.findings {
                    li.finding { b { "Bound" } (conclusion(profile)) }
                    @if let Some(obstacle) = &profile.obstacle {
                        li.caution { b { "Not there" } (obstacle) }
                    }
                    @if let Some((ms, of)) = &profile.measured {
                        li.finding { b { "Measured" } (format::millis(*ms)) " (" (of) ")" }
                    }
                    li.caution { b { "Not counted" } (UNSEEN) }
                }
                @for (name, content) in &sections {
                    h2 id=(anchor(name)) { (name) }
                    (content)
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    markup.into_string()
}

/// Where a line stands in the page.
fn line_anchor(line: &CountedLine) -> String {
    let file = line.line.file.trim_start_matches("kernels-gpu/src/").replace(['/', '.'], "-");
    format!("{file}-{}", line.line.number)
}

fn bound(profile: &Profile) -> Markup {
    let (roofline, gpu) = (&profile.roofline, &profile.gpu);
    let longest = roofline.bound().seconds.max(f64::MIN_POSITIVE);
    html! {
        div.panels {
            figure {
                (PreEscaped(picture(roofline, gpu, gpu.tensor_of(profile.dtype))))
                figcaption {
                    "FLOP/s that " (gpu.title) " can reach over the FLOP for each byte of memory traffic. "
                    b { "●" } " every byte of inputs and outputs moves once: "
                    (format::digits(roofline.intensity())) " FLOP/B; "
                    b { "○" } " every sector that was asked for moves, as without caches: "
                    (format::digits(roofline.intensity_asked())) " FLOP/B."
                }
            }
            div.table {
                table.units {
                    thead { tr { th { "unit" } th { "work" } th { "time alone" } th { "" } } }
                    tbody { @for b in &roofline.bounds { tr {
                        td { (b.unit) }
                        td { (work(b.work, b.of)) }
                        td { (time(b.seconds)) }
                        td.bar { span style={ "width:" (format!("{:.1}", 100.0 * b.seconds / longest)) "%" } {} }
                    } } }
                }
            }
        }
        p.note { "Figures: " (gpu.source) "." }
    }
}

fn work(work: f64, of: &str) -> String {
    match of {
        "bytes" => bytes(work as u64),
        _ => format!("{} {of}", short(work as u64)),
    }
}

fn totals(profile: &Profile) -> Markup {
    html! {
        dl { @for (name, value) in total_rows(profile) { dt { (name) } dd { (value) } } }
        div.table tabindex="0" role="region" aria-label="Launches" {
            table.units {
                thead { tr {
                    th { "launch" } th { "entry" } th { "blocks" } th { "threads" } th { "cluster" } th { "shared memory" }
                    th { "global read" } th { "written" }
                } }
                tbody { @for (i, launch) in profile.counted.launches.iter().enumerate() { tr {
                    td { (i + 1) } td { (launch.name) } td { (launch.blocks) } td { (launch.threads) } td { (launch.cluster) }
                    td { (format::bytes(f64::from(launch.shared_bytes))) }
                    td { (bytes(launch.total.global_bytes_read)) } td { (bytes(launch.total.global_bytes_written)) }
                } } }
            }
        }
    }
}

/// All lines in one table that can be sorted.
fn lines(profile: &Profile, columns: &[Column]) -> Markup {
    html! {
        p.note { "A click on a heading sorts; again, the other way round." }
        div.table tabindex="0" role="region" aria-label="Lines" {
            table.lines.sortable {
                thead { tr {
                    th { button type="button" { "line" } }
                    @for c in columns { th { button type="button" title=(c.help) { (c.name) } } }
                    th.code { "source" }
                } }
                tbody { @for (index, line) in profile.counted.lines.iter().enumerate() { tr {
                    td data-v=(index) { a href={ "#" (line_anchor(line)) } { (short_name(line)) } }
                    @for c in columns { td data-v=((c.value)(line)) { (c.cell(line)) } }
                    td.code { code { (line.line.text()) } }
                } } }
            }
        }
        dl { @for c in columns { dt { (c.name) } dd { (c.help) } } }
    }
}

fn short_name(line: &CountedLine) -> String {
    let file = line.line.file.rsplit('/').next().unwrap_or_default();
    format!("{file}:{}", line.line.number)
}

/// The files, each line with its counts. Colours say how much of the most a line has.
fn sources(profile: &Profile, columns: &[Column]) -> Markup {
    let most: Vec<f64> = columns
        .iter()
        .map(|c| profile.counted.lines.iter().map(|l| (c.value)(l)).fold(0.0, f64::max))
        .collect();
    html! {
        p.heat {
            label for="heat" { "Colour by " }
            select id="heat" { @for (i, c) in columns.iter().enumerate() { option value=(i) { (c.name) } } }
        }
        @for (file, lines) in profile.counted.files() {
            h3 { (file) }
            div.table tabindex="0" role="region" aria-label=(file) {
                table.source {
                    thead { tr {
                        th { "line" }
                        @for c in columns { th title=(c.help) { (c.name) } }
                        th.code { "source" }
                    } }
                    tbody { @for (i, text) in source::text(file).lines().enumerate() {
                        (source_line(i as u32 + 1, text, &lines, columns, &most))
                    } }
                }
            }
        }
    }
}

fn source_line(
    number: u32,
    text: &str,
    lines: &[&CountedLine],
    columns: &[Column],
    most: &[f64],
) -> Markup {
    let Ok(index) = lines.binary_search_by_key(&number, |line| line.line.number) else {
        return html! { tr {
            td { (number) }
            @if !columns.is_empty() { td colspan=(columns.len()) {} }
            td.code { code { (text) } }
        } };
    };
    let line = lines[index];
    // Counts spread over decades: each is a step of the same size.
    let share = |value: f64, most: f64| match (value, most) {
        (0.0, _) | (_, 0.0) => 0.0,
        (value, most) => (1.0 + (value / most).log10() / 4.0).clamp(0.08, 1.0),
    };
    let heat: Vec<String> = columns
        .iter()
        .zip(most)
        .map(|(c, &most)| format!("{:.2}", share((c.value)(line), most)))
        .collect();
    let first = heat.first().cloned().unwrap_or_default();
    html! {
        tr.counted id=(line_anchor(line)) data-heat=(heat.join(",")) style={ "--heat:" (first) } {
            td { (number) }
            @for c in columns { td { (c.cell(line)) } }
            td.code { code { (text) } }
        }
    }
}

/// The roofline as SVG in the page's colours: both axes in powers of ten.
fn picture(roofline: &Roofline, gpu: &Gpu, tensor: f64) -> String {
    const WIDTH: f64 = 460.0;
    const HEIGHT: f64 = 300.0;
    const LEFT: f64 = 52.0;
    const BOTTOM: f64 = 262.0;
    const TOP: f64 = 14.0;
    const RIGHT: f64 = 436.0;
    // FLOP for each byte from 0.1 to 10,000; FLOP/s from 10^10 to 10^15.
    let x =
        |intensity: f64| LEFT + (intensity.log10() + 1.0).clamp(0.0, 5.0) / 5.0 * (RIGHT - LEFT);
    let y = |rate: f64| BOTTOM - (rate.log10() - 10.0).clamp(0.0, 5.2) / 5.2 * (BOTTOM - TOP);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"Roofline of {}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\" fill=\"var(--ink)\">",
        gpu.title
    );
    for power in -1..=4 {
        let at = x(10f64.powi(power));
        svg += &format!(
            "<path d=\"M{at:.1} {TOP}V{BOTTOM}\" stroke=\"var(--grid)\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            BOTTOM + 15.0,
            10f64.powi(power)
        );
    }
    for power in 10..=15 {
        let at = y(10f64.powi(power));
        let label = match power {
            10 => "10 G",
            11 => "100 G",
            12 => "1 T",
            13 => "10 T",
            14 => "100 T",
            _ => "1 P",
        };
        svg += &format!(
            "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" stroke=\"var(--grid)\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (peak, name, colour) in
        [(tensor, "tensor cores", "var(--line1)"), (gpu.scalar, "scalar units", "var(--line2)")]
    {
        let ridge = peak / gpu.memory;
        let begin = 10f64.powi(-1);
        svg += &format!(
            "<path d=\"M{:.1} {:.1}L{:.1} {:.1}H{RIGHT}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{RIGHT}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"{colour}\">{name}</text>",
            x(begin),
            y(begin * gpu.memory),
            x(ridge),
            y(peak),
            y(peak) - 5.0
        );
    }
    let roof = if roofline.uses_tensor_cores() { tensor } else { gpu.scalar };
    for (intensity, fill) in
        [(roofline.intensity(), "var(--line0)"), (roofline.intensity_asked(), "var(--card)")]
    {
        let at = (x(intensity), y((intensity * gpu.memory).min(roof)));
        svg += &format!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{fill}\" stroke=\"var(--line0)\" stroke-width=\"2\"/>",
            at.0, at.1
        );
    }
    svg += &format!(
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">FLOP for each byte of memory</text></svg>",
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 32.0
    );
    svg
}
