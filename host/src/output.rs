//! Files: found writable before anything is measured, written afterwards, read back.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufReader, BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};

use crate::{
    failure::Usage,
    results::{Results, Row, SCHEMA},
};

/// Fails when a file cannot be written there. What stands in it is kept.
///
/// # Errors
/// [`Usage`] with the system's reason.
pub fn check_file(path: &Path) -> Result<()> {
    let existed = path.exists();
    let opened = OpenOptions::new().append(true).create(true).open(path);
    opened.map_err(|error| unwritable(path, &error))?;
    if !existed {
        fs::remove_file(path).map_err(|error| unwritable(path, &error))?;
    }
    Ok(())
}

/// Makes a folder, and fails when no file can be written in it.
///
/// # Errors
/// [`Usage`] with the system's reason.
pub fn check_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| unwritable(path, &error))?;
    check_file(&path.join("results.json"))
}

fn unwritable(path: &Path, error: &std::io::Error) -> anyhow::Error {
    Usage(format!("{} cannot be written: {error}", path.display())).into()
}

impl Results {
    /// Writes the document.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let write = || -> Result<()> {
            let mut file = BufWriter::new(File::create(path)?);
            serde_json::to_writer_pretty(&mut file, self)?;
            writeln!(file)?;
            Ok(file.flush()?)
        };
        write().with_context(|| format!("{} could not be written", path.display()))
    }

    /// Reads a document back.
    ///
    /// # Errors
    /// [`Usage`] when the file cannot be read, is not such a document, or is of a later
    /// schema.
    pub fn read_json(path: &Path) -> Result<Self> {
        let unreadable = |reason: String| Usage(format!("{}: {reason}", path.display()));
        let file = File::open(path).map_err(|e| unreadable(e.to_string()))?;
        let results: Self = serde_json::from_reader(BufReader::new(file))
            .map_err(|e| unreadable(format!("not results of this program: {e}")))?;
        if results.schema != SCHEMA {
            let schema = results.schema;
            let reason = format!("schema {schema}, this program reads schema {SCHEMA}");
            return Err(unreadable(reason).into());
        }
        Ok(results)
    }

    /// Writes the rows as CSV, with the names of the fields in the first line.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_csv(&self, path: &Path) -> Result<()> {
        let write = || -> Result<()> {
            let mut writer = csv::Writer::from_path(path)?;
            for row in &self.rows {
                writer.serialize(row)?;
            }
            Ok(writer.flush()?)
        };
        write().with_context(|| format!("{} could not be written", path.display()))
    }
}

/// Reads rows back from CSV.
///
/// # Errors
/// [`Usage`] when the file cannot be read or is not such a table.
pub fn read_csv(path: &Path) -> Result<Vec<Row>> {
    let unreadable = |e: csv::Error| Usage(format!("{}: {e}", path.display()));
    let mut reader = csv::Reader::from_path(path).map_err(unreadable)?;
    let rows: Result<Vec<Row>, _> = reader.deserialize().collect();
    Ok(rows.map_err(unreadable)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure;

    #[test]
    fn documents_and_tables_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let row = Row { reason: "a, \"b\"".into(), min_ms: Some(0.25), ..Row::default() };
        let rows = vec![row, Row::default()];
        let results = Results { schema: SCHEMA, rows, ..Results::default() };
        let (json, csv) = (folder.path().join("a.json"), folder.path().join("a.csv"));
        check_file(&json).unwrap();
        assert!(!json.exists());
        results.write_json(&json).unwrap();
        results.write_csv(&csv).unwrap();
        check_file(&json).unwrap();
        assert_eq!(Results::read_json(&json).unwrap(), results);
        assert_eq!(read_csv(&csv).unwrap(), results.rows);
    }

    #[test]
    fn what_cannot_be_written_or_read_is_a_usage_error() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/such/file.json");
        for error in [
            check_file(&missing).unwrap_err(),
            check_file(folder.path()).unwrap_err(),
            Results::read_json(&missing).unwrap_err(),
            read_csv(&missing).unwrap_err(),
        ] {
            assert_eq!(failure::exit_code(&error), 2, "{error}");
        }
        let later = folder.path().join("later.json");
        Results { schema: SCHEMA + 1, ..Results::default() }.write_json(&later).unwrap();
        assert!(Results::read_json(&later).unwrap_err().to_string().contains("schema 2"));
    }
}
