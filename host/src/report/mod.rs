//! The report of a run: pictures, tables and one page that holds them all. What the page
//! says about the figures is worked out from them (`analysis`).

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use flash_attention::Error;

use crate::results::{Results, SCHEMA};

pub mod analysis;
pub mod format;
mod page;
pub mod panel;
mod picture;

/// The files of a report.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The page, which needs none of the others.
    pub html: PathBuf,
    /// Everything that was measured, as it can be read back.
    pub json: PathBuf,
    /// The rows.
    pub csv: PathBuf,
    /// The pictures, each as SVG and as PNG.
    pub pictures: Vec<PathBuf>,
}

/// Writes the report of a run into a directory, which is made if need be.
///
/// # Errors
/// Which file could not be written, and why.
pub fn write(results: &Results, dir: &Path) -> Result<Paths> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    fs::create_dir_all(dir).map_err(io(dir))?;
    let put = |name: &str, data: &[u8]| -> Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, data).map_err(io(&path))?;
        Ok(path)
    };
    let json = put("results.json", &serde_json::to_vec_pretty(results)?)?;
    let csv = put("results.csv", &csv_rows(results)?)?;

    let mut figures = Vec::new();
    for view in analysis::views(results) {
        let name = format!("{}-panels", view.level);
        figures.push((name, panel::four(results, &view)));
    }
    let kernels = analysis::kernels(results);
    figures.push(("differences".into(), panel::differences(results, &kernels)));
    let mut pictures = Vec::new();
    for (name, panels) in figures.iter().filter(|(_, panels)| !panels.is_empty()) {
        let (svg, png) = picture::figure(&page::title(results), panels)?;
        pictures.push(put(&format!("{name}.svg"), svg.as_bytes())?);
        pictures.push(put(&format!("{name}.png"), &png)?);
    }

    let conclusions = analysis::conclusions(results);
    let html = put("index.html", page::page(results, &conclusions).as_bytes())?;
    Ok(Paths { html, json, csv, pictures })
}

/// Reads what `compare --json`, `verify --json` or an earlier report wrote.
///
/// # Errors
/// Why the file cannot be read, or that it is no such document.
pub fn read(path: &Path) -> Result<Results> {
    let path = path.to_owned();
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(Error::Io { path, source }.into()),
    };
    let remedy = "use a file written by compare --json or verify --json";
    let reason = match serde_json::from_slice::<Results>(&text) {
        Ok(results) if (1..=SCHEMA).contains(&results.schema) => return Ok(results),
        Ok(Results { schema: 0, .. }) => format!("not a results document (no schema): {remedy}"),
        Ok(newer) => format!(
            "schema {}, but this program reads up to {SCHEMA}: use a newer program",
            newer.schema
        ),
        Err(error) => format!("not a results document ({error}): {remedy}"),
    };
    Err(Error::BadFile { path, reason }.into())
}

fn csv_rows(results: &Results) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in &results.rows {
        writer.serialize(row)?;
    }
    writer.into_inner().context("writing the table as CSV")
}

#[cfg(test)]
mod tests;
