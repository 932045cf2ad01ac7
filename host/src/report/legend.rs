//! The looks of the lines, and the legend below the panels that names them.

use std::f64::consts::{FRAC_PI_2, TAU};

use kuva::{
    plot::{line::LineStyle, scatter::MarkerShape},
    render::render::{PathData, Primitive, Scene, TextAnchor},
};

use super::panel::{Line, Panel};

/// Colours of the lines: (name for the page's style sheet, on white).
const COLOURS: [(&str, &str); 16] = [
    ("var(--line0)", "#b93a0c"),
    ("var(--line1)", "#1d6fb8"),
    ("var(--line2)", "#23803c"),
    ("var(--line3)", "#8b3fa8"),
    ("var(--line4)", "#96690a"),
    ("var(--line5)", "#0b7a7a"),
    ("var(--line6)", "#d6246e"),
    ("var(--line7)", "#6b7684"),
    ("var(--line8)", "#111827"),
    ("var(--line9)", "#e08600"),
    ("var(--line10)", "#00a0d6"),
    ("var(--line11)", "#77952b"),
    ("var(--line12)", "#5c3d1e"),
    ("var(--line13)", "#3b33c4"),
    ("var(--line14)", "#8f1239"),
    ("var(--line15)", "#12b886"),
];
/// Markers. Their number is coprime to the number of colours, so a repeated colour has another
/// marker.
const MARKERS: [MarkerShape; 7] = [
    MarkerShape::Circle,
    MarkerShape::Square,
    MarkerShape::Triangle,
    MarkerShape::Diamond,
    MarkerShape::TriangleDown,
    MarkerShape::Star,
    MarkerShape::Pentagon,
];

/// Colour of a style in the page, whose style sheet has light and dark colours.
pub fn colour_on_page(style: usize) -> &'static str {
    COLOURS[style % COLOURS.len()].0
}

/// Colour of a style on white.
pub fn colour_on_white(style: usize) -> &'static str {
    COLOURS[style % COLOURS.len()].1
}

/// Marker of a style.
pub fn marker(style: usize) -> MarkerShape {
    MARKERS[style % MARKERS.len()]
}

/// Length of a sample of a line, in pixels, and the height of a row of the legend.
const SAMPLE: f64 = 30.0;
const ROW: f64 = 20.0;
/// Size of the legend's text, and the mean width of its letters.
const TEXT: u32 = 12;
const LETTER: f64 = 0.6 * TEXT as f64;
/// Space around the legend and between its columns.
const SPACE: f64 = 24.0;
/// Size of a marker, as in the panels.
pub const MARKER: f64 = 4.0;

/// A sample of a line for the page: its colour, dashes and marker.
pub fn sample(line: &Line) -> String {
    let dashes = line.dashed.then(|| LineStyle::Dashed.dasharray()).flatten();
    let dashes = dashes.map_or_else(String::new, |d| format!(r#" stroke-dasharray="{d}""#));
    let marker = format!(r#"<path d="{}"/>"#, outline(line.style, SAMPLE / 2.0, ROW / 2.0));
    let colour = colour_on_page(line.style);
    format!(
        r#"<svg viewBox="0 0 {SAMPLE} {ROW}" width="{SAMPLE}" height="{ROW}" aria-hidden="true" fill="{colour}"><path d="M0,{0} H{SAMPLE}" stroke="{colour}" stroke-width="2"{dashes}/>{marker}</svg>"#,
        ROW / 2.0
    )
}

/// Adds the legend of `panels` below a scene: names in columns.
pub fn add(scene: &mut Scene, panels: &[Panel]) {
    let mut lines: Vec<&Line> = Vec::new();
    for line in panels.iter().flat_map(|p| &p.lines) {
        if !lines.iter().any(|l| l.name == line.name) {
            lines.push(line);
        }
    }
    let letters = lines.iter().map(|l| l.name.len()).max().unwrap_or(0) as f64;
    let column = SAMPLE + 8.0 + letters * LETTER + SPACE;
    let columns = (((scene.width - SPACE) / column) as usize).clamp(1, lines.len().max(1));
    let left = (scene.width - columns as f64 * column + SPACE) / 2.0;
    let top = scene.height + ROW / 2.0;
    for (i, line) in lines.iter().enumerate() {
        let (x, y) = (left + (i % columns) as f64 * column, top + (i / columns) as f64 * ROW);
        add_entry(scene, line, x, y);
    }
    scene.height = top + lines.len().div_ceil(columns) as f64 * ROW;
}

fn add_entry(scene: &mut Scene, line: &Line, x: f64, y: f64) {
    let colour = colour_on_white(line.style);
    scene.add(Primitive::Line {
        x1: x,
        y1: y,
        x2: x + SAMPLE,
        y2: y,
        stroke: colour.into(),
        stroke_width: 2.0,
        stroke_dasharray: line.dashed.then(|| LineStyle::Dashed.dasharray()).flatten(),
    });
    scene.add(Primitive::Path(Box::new(PathData {
        d: outline(line.style, x + SAMPLE / 2.0, y),
        fill: Some(colour.into()),
        stroke: colour.into(),
        stroke_width: 0.5,
        opacity: None,
        stroke_dasharray: None,
    })));
    scene.add(Primitive::Text {
        x: x + SAMPLE + 8.0,
        // The base line, a third of the letters' height below the middle.
        y: y + f64::from(TEXT) / 3.0,
        content: line.name.clone(),
        size: TEXT,
        anchor: TextAnchor::Start,
        rotate: None,
        bold: false,
        color: None,
    });
}

/// Outline of a style's marker around a point, as an SVG path.
fn outline(style: usize, x: f64, y: f64) -> String {
    // Corners, the direction of the first one in turns from the top, radius of every corner
    // and of every second one.
    let (corners, turn, radius, second) = match marker(style) {
        MarkerShape::Square => (4, 0.125, 1.4, 1.4),
        MarkerShape::Triangle => (3, 0.0, 1.2, 1.2),
        MarkerShape::Diamond => (4, 0.0, 1.3, 1.3),
        MarkerShape::TriangleDown => (3, 0.5, 1.2, 1.2),
        MarkerShape::Star => (10, 0.0, 1.4, 0.55),
        MarkerShape::Pentagon => (5, 0.0, 1.2, 1.2),
        _ => (24, 0.0, 1.0, 1.0),
    };
    let corner = |i: usize| {
        let angle = (turn + i as f64 / corners as f64) * TAU - FRAC_PI_2;
        let r = MARKER * if i % 2 == 0 { radius } else { second };
        format!("{:.2},{:.2}", x + r * angle.cos(), y + r * angle.sin())
    };
    format!("M{} Z", (0..corners).map(corner).collect::<Vec<_>>().join(" L"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn styles_differ() {
        let colours: HashSet<_> = (0..16).map(colour_on_white).collect();
        assert_eq!(colours.len(), 16);
        let both: HashSet<_> =
            (0..100).map(|s| (colour_on_page(s), format!("{:?}", marker(s)))).collect();
        assert_eq!(both.len(), 100);
        let outlines: HashSet<_> = (0..MARKERS.len()).map(|s| outline(s, 0.0, 0.0)).collect();
        assert_eq!(outlines.len(), MARKERS.len());
    }

    #[test]
    fn the_page_has_a_light_and_a_dark_value_of_every_colour() {
        let sheet = include_str!("style.css");
        for (name, on_white) in COLOURS {
            let variable = name.trim_start_matches("var(").trim_end_matches(')');
            assert_eq!(sheet.matches(&format!("{variable}: #")).count(), 2, "{variable}");
            assert!(sheet.contains(&format!("{variable}: {on_white}")), "{variable}");
        }
    }
}
