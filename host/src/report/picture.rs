//! Draws panels with kuva: as SVG with the page's colours, as standalone SVG, and as PNG.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use kuva::{
    RasterBackend,
    backend::svg::SvgBackend,
    plot::{annotations::ReferenceLine, line::LinePlot, scatter::ScatterPlot},
    prelude::{Layout, Plot, Theme, TickFormat},
    render::figure::Figure,
};

use super::{
    legend,
    panel::{Axis, Line, Panel, Point, Scale},
};
use crate::format;

/// Pixels of a PNG for each of the panel's.
const PNG_SCALE: f32 = 2.0;

/// The distance between markers that stand side by side, as a share of the axis.
const MARKER_SHIFT: f64 = 0.02;

/// The place of a picture.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the page, whose style sheet has light and dark colours.
    Page,
    /// In a separate file, on white.
    File,
}

impl Place {
    fn line(self, style: usize) -> &'static str {
        match self {
            Self::Page => legend::colour_on_page(style),
            Self::File => legend::colour_on_white(style),
        }
    }

    /// Width and height of a panel. Small in the page, so that its text stays legible when a phone
    /// shrinks it.
    const fn size(self) -> (f64, f64) {
        match self {
            Self::Page => (460.0, 340.0),
            Self::File => (600.0, 440.0),
        }
    }

    fn mark(self) -> &'static str {
        if self == Self::Page { "var(--soft)" } else { "#5b6875" }
    }

    fn theme(self) -> Theme {
        let (ink, grid, background) = match self {
            Self::Page => ("var(--ink)", "var(--grid)", "none"),
            Self::File => ("#1f2933", "#d9dde2", "#ffffff"),
        };
        Theme {
            background: background.into(),
            axis_color: ink.into(),
            tick_color: ink.into(),
            text_color: ink.into(),
            grid_color: grid.into(),
            legend_bg: background.into(),
            legend_border: "none".into(),
            font_family: (self == Self::Page).then(|| "system-ui, sans-serif".into()),
            ..Theme::light()
        }
    }
}

/// One panel for the page.
#[must_use]
pub fn inline(panel: &Panel) -> String {
    let svg = kuva::render_to_svg(plots(panel, Place::Page), layout(panel, Place::Page));
    // Without a fixed size the page decides; and names must not meet other panels' names.
    let label = panel.title.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;");
    let (width, height) = Place::Page.size();
    let size = format!(r#"width="{width}" height="{height}""#);
    let view = format!(r#"viewBox="0 0 {width} {height}" role="img" aria-label="{label}""#);
    svg.replacen(&size, &view, 1).replace("kuva-clip-", &format!("{}-clip-", panel.id))
}

/// Several panels as one SVG and one PNG on white.
///
/// # Errors
/// An error of the rasteriser.
pub fn figure(title: &str, panels: &[Panel]) -> Result<(String, Vec<u8>)> {
    let (width, height) = Place::File.size();
    let columns = panels.len().clamp(1, 2);
    let mut scene = Figure::new(panels.len().div_ceil(columns), columns)
        .with_title(title)
        .with_title_size(16)
        .with_plots(panels.iter().map(|p| plots(p, Place::File)).collect())
        .with_layouts(panels.iter().map(|p| layout(p, Place::File)).collect())
        .with_cell_size(width, height)
        .render();
    legend::add(&mut scene, panels);
    let svg = SvgBackend::new().render_scene(&scene);
    let png = RasterBackend::new().with_scale(PNG_SCALE).render_scene(&scene);
    Ok((svg, png.map_err(|e| anyhow!("{e}")).context("drawing the PNG")?))
}

/// The lines, and on top of them the markers with their error bars.
fn plots(panel: &Panel, place: Place) -> Vec<Plot> {
    let lines = panel.lines.iter().map(|line| line_of(panel, line, place));
    lines.chain(panel.lines.iter().map(|line| markers_of(panel, line, place))).collect()
}

fn line_of(panel: &Panel, line: &Line, place: Place) -> Plot {
    let at = |p: &Point| (panel.x.scale.place(p.x), panel.y.scale.place(p.y));
    let points: Vec<(f64, f64)> = line.points.iter().map(at).collect();
    // Bars that lie on each other are drawn from the widest to the thinnest.
    let (index, count) = line.stacked;
    let width = 2.0 + 2.5 * (count - 1 - index) as f64;
    let drawn = LinePlot::new()
        .with_data(points)
        .with_color(place.line(line.style))
        .with_stroke_width(width);
    if line.dashed { drawn.with_dashed().into() } else { drawn.into() }
}

fn markers_of(panel: &Panel, line: &Line, place: Place) -> Plot {
    // A histogram has one marker, where it is highest.
    let highest = || line.points.iter().copied().max_by(|a, b| a.y.total_cmp(&b.y));
    let marked = if line.steps { highest().into_iter().collect() } else { line.points.clone() };
    let shift = MARKER_SHIFT * side_by_side(line) * range(panel, true).span();
    let at = |p: &Point| (panel.x.scale.place(p.x) + shift, panel.y.scale.place(p.y));
    let bars = marked.iter().map(|p| {
        let y = panel.y.scale.place(p.y);
        p.spread.map_or((0.0, 0.0), |(low, high)| {
            (y - panel.y.scale.place(low), panel.y.scale.place(high) - y)
        })
    });
    // Bars of no length would be drawn as dashes across each marker.
    let has_bars = marked.iter().any(|p| p.spread.is_some_and(|(low, high)| high > low));
    let markers = ScatterPlot::new()
        .with_data(marked.iter().map(at).collect::<Vec<_>>())
        .with_color(place.line(line.style))
        .with_marker(legend::marker(line.style))
        .with_size(legend::MARKER);
    if has_bars { markers.with_y_err_asymmetric(bars).into() } else { markers.into() }
}

/// The number of markers by which a line's markers stand to the right of their place.
fn side_by_side(line: &Line) -> f64 {
    let (index, count) = line.stacked;
    index as f64 - (count - 1) as f64 / 2.0
}

fn layout(panel: &Panel, place: Place) -> Layout {
    let plots = plots(panel, place);
    let (width, height) = place.size();
    let (x, y) = (range(panel, true), range(panel, false));
    let mut layout = Layout::auto_from_plots(&plots)
        .with_theme(place.theme())
        .with_width(width)
        .with_height(height)
        .with_title(panel.title.as_str())
        .with_x_label(panel.x.label.as_str())
        .with_y_label(panel.y.label.as_str())
        .with_title_size(15)
        .with_label_size(13)
        .with_tick_size(12)
        .with_body_size(12)
        .with_x_axis_min(x.low)
        .with_x_axis_max(x.high)
        .with_x_tick_step(x.step)
        .with_y_axis_min(y.low)
        .with_y_axis_max(y.high)
        .with_y_tick_step(y.step)
        .with_x_tick_format(ticks(&panel.x))
        .with_y_tick_format(ticks(&panel.y));
    for mark in &panel.marks {
        let axis = if mark.vertical { &panel.x } else { &panel.y };
        let at = axis.scale.place(mark.at);
        let line =
            if mark.vertical { ReferenceLine::vertical(at) } else { ReferenceLine::horizontal(at) };
        layout = layout
            .with_reference_line(line.with_color(place.mark()).with_label(mark.label.as_str()));
    }
    layout
}

/// Ends and steps of an axis, as places on its scale.
struct Range {
    low: f64,
    high: f64,
    step: f64,
}

impl Range {
    const fn span(&self) -> f64 {
        self.high - self.low
    }
}

fn range(panel: &Panel, horizontal: bool) -> Range {
    let axis = if horizontal { &panel.x } else { &panel.y };
    let points = panel.lines.iter().flat_map(|l| &l.points);
    let marks = panel.marks.iter().filter(|m| m.vertical == horizontal).map(|m| m.at);
    let values = points.flat_map(|p| {
        let (low, high) = p.spread.unwrap_or((p.y, p.y));
        if horizontal { [p.x, p.x] } else { [low, high] }
    });
    let places: Vec<f64> =
        values.chain(marks).map(|v| axis.scale.place(v)).filter(|v| v.is_finite()).collect();
    let low = places.iter().copied().fold(f64::INFINITY, f64::min);
    let high = places.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if low > high {
        return Range { low: 0.0, high: 1.0, step: 0.5 };
    }
    match axis.scale {
        // Air, so that markers and bars stand clear of the frame.
        Scale::Log2 => {
            let step = ((high - low) / 6.0).ceil().max(1.0);
            let beside = panel.lines.iter().map(|l| side_by_side(l).abs()).fold(0.0, f64::max);
            let air = 0.3f64.max((high - low) * 1.5 * MARKER_SHIFT * (beside + 1.0));
            Range { low: low - air, high: high + air, step }
        }
        Scale::Log10 => {
            // Room for the name of an upright mark, which stands to its right: a sixth of the
            // axis, and no less than most of a decade.
            let upright = horizontal && !panel.marks.is_empty();
            let high = if upright { high + ((high - low) / 6.0).max(0.7) } else { high };
            let (low, high) = (low.floor(), high.ceil().max(low.floor() + 1.0));
            Range { low, high, step: ((high - low) / 6.0).ceil().max(1.0) }
        }
        Scale::Linear => {
            let (low, high) = (low.min(0.0), if high > 0.0 { high * 1.05 } else { 0.0 });
            let step = nice_step((high - low).max(1e-12) / 5.0);
            Range { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
        }
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|m| m * power).find(|&s| s >= least).unwrap_or(10.0 * power)
}

fn ticks(axis: &Axis) -> TickFormat {
    let scale = axis.scale;
    TickFormat::Custom(Arc::new(move |place| {
        let value = scale.value(place);
        match scale {
            Scale::Linear | Scale::Log2 => plain(value),
            Scale::Log10 => plain_power(place),
        }
    }))
}

/// `0.5`, `1024`: without trailing zeros.
fn plain(value: f64) -> String {
    let rounded = (value * 1e6).round() / 1e6;
    if rounded.abs() >= 65_536.0 && rounded % 1024.0 == 0.0 {
        return format!("{}k", rounded / 1024.0);
    }
    format!("{rounded}")
}

/// `0.01`, `100`, and powers of ten beyond that as `1e-7`.
fn plain_power(exponent: f64) -> String {
    let rounded = exponent.round();
    if (rounded - exponent).abs() > 1e-6 {
        return format::digits(10f64.powf(exponent));
    }
    if (-3.0..=5.0).contains(&rounded) {
        format!("{}", (10f64.powf(rounded) * 1e6).round() / 1e6)
    } else {
        format!("1e{rounded}")
    }
}
