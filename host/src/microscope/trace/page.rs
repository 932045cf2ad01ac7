//! The steps as one page: the source, S, P, m, l and O, shared memory and the lanes, step by step.

use anyhow::Result;
use maud::{DOCTYPE, PreEscaped, html};

use super::steps::Steps;
use crate::report::page::head;

const OWN_STYLE: &str = include_str!("steps.css");
const SCRIPT: &str = include_str!("steps.js");

/// The page; `title` is the kernel and its problem.
///
/// # Errors
/// None that numbers can cause.
pub fn page(title: &str, steps: &Steps) -> Result<String> {
    // The end tag of a script would end the data.
    let data = serde_json::to_string(steps)?.replace("</", "<\\/");
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            (head(html! { "Step by step: " (title) }, OWN_STYLE))
            body {
                h1 { "Step by step" }
                p.lead { (title) ": the first block" }
                div.controls role="group" aria-label="Steps" {
                    button type="button" id="first" title="Home" { "first" }
                    button type="button" id="back" title="←" { "← back" }
                    button type="button" id="next" title="→" { "next →" }
                    button type="button" id="tile" title="Page down" { "next tile" }
                    input type="range" id="at" min="0" max=(steps.steps.len() - 1) value="0" aria-label="Step";
                    span id="count" {}
                }
                div.now aria-live="polite" { h2 id="title" {} p id="note" {} }
                div.view {
                    div.code { @for (i, excerpt) in steps.sources.iter().enumerate() {
                        h3 { (excerpt.file) }
                        pre { @for (line, number) in excerpt.lines.iter().zip(excerpt.first..) {
                            span.line id={ "l" (i) "-" (number) } {
                                span.number { (number) } (line) "\n"
                            }
                        } }
                    } }
                    div.state {
                        @for (i, title) in steps.numbers.figures.iter().enumerate() {
                            figure { h3 id={ "title" (i) } { (title) } canvas id={ "figure" (i) } {} }
                        }
                        p.readout id="readout" { "Point at a cell to read its number." }
                        h3 { "Shared memory" }
                        div.memory id="memory" {}
                        h3 { "Lanes" }
                        div.lanes id="lanes" {}
                        p.key {
                            span.work {} " at work" span.wait {} " wait at the barrier"
                        }
                    }
                }
                p.note {
                    "The page computes the numbers in f64 from the same inputs, tile by tile as the kernel goes. Keys: \
                     ← and → a step, page up and page down a tile, home and end."
                }
                script type="application/json" id="data" { (PreEscaped(data)) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    Ok(markup.into_string())
}
