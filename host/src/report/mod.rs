//! The report of a run: pictures, tables and one page that holds them all. The page's statements
//! come from the figures (`analysis`).

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::{
    failure::Outcome,
    output::{self, Output},
    progress::print_lines,
    results::Results,
};

pub mod analysis;
mod legend;
pub(crate) mod page;
pub mod panel;
mod picture;
pub mod speed;

/// The files of a report.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The page, which needs no other file.
    pub html: PathBuf,
    /// All measurements, in a form that can be read back.
    pub json: PathBuf,
    /// The rows.
    pub csv: PathBuf,
    /// The pictures, each as SVG and as PNG.
    pub pictures: Vec<PathBuf>,
}

/// Writes the report of a run into a directory, and makes the directory if it is missing.
///
/// # Errors
/// The file that could not be written, and the reason.
pub fn write(results: &Results, dir: &Path) -> Result<Paths> {
    output::check_folder(dir)?;
    let put = |name: &str, data: &[u8]| -> Result<PathBuf> {
        let path = dir.join(name);
        Output::open(&path)?.write(|to| Ok(to.write_all(data)?))?;
        Ok(path)
    };
    let (json, csv) = (dir.join("results.json"), dir.join("results.csv"));
    results.write_json(&Output::open(&json)?)?;
    results.write_csv(&Output::open(&csv)?)?;

    let title = page::title(results);
    let mut figures = Vec::new();
    for view in analysis::views(results) {
        let heading = format!("{title}: {}", view.level);
        figures.push((format!("{}-panels", view.level), heading, panel::four(results, &view)));
    }
    figures.push(("differences".into(), title, panel::differences(results)));
    let mut pictures = Vec::new();
    for (name, title, panels) in figures.iter().filter(|(.., panels)| !panels.is_empty()) {
        let (svg, png) = picture::figure(title, panels)?;
        pictures.push(put(&format!("{name}.svg"), svg.as_bytes())?);
        pictures.push(put(&format!("{name}.png"), &png)?);
    }

    let conclusions = analysis::conclusions(results);
    let beside = pictures.iter().chain([&json, &csv]).filter_map(|path| path.file_name());
    let files: Vec<String> = beside.map(|name| name.to_string_lossy().into_owned()).collect();
    let html = put("index.html", page::page(results, &conclusions, &files).as_bytes())?;
    Ok(Paths { html, json, csv, pictures })
}

/// Arguments of `report`.
#[derive(Args, Clone, Debug)]
pub struct ReportArgs {
    /// What `compare --json`, `verify --json` or an earlier report wrote
    #[arg(value_name = "RESULTS.json")]
    pub results: PathBuf,
    /// Directory for the report
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Makes the report of an earlier run anew.
///
/// # Errors
/// When the file cannot be read or is not a results document; as [`write()`].
pub fn remake(args: &ReportArgs) -> Result<Outcome> {
    let paths = write(&Results::read_json(&args.results)?, &args.out)?;
    print_lines(&format!("wrote {}", paths.html.display()));
    Ok(Outcome::Good)
}

#[cfg(test)]
mod tests;
