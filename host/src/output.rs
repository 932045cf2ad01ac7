//! Files that a command writes: checked as writable before any computation, and written afterwards
//! in the way of other programs. Also reads results back.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::{
    failure::Usage,
    progress,
    results::{Results, Row, SCHEMA},
};

/// The target of one file that a command writes.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    to: To,
}

#[derive(Debug)]
enum To {
    /// Standard output, asked for as `-`.
    Stdout,
    /// A regular file, or none yet, with the symbolic links that lead to it resolved.
    File(PathBuf),
    /// A device or a pipe. It stays open: a pipe's reader ends when its last writer does.
    Stream(File),
}

impl Output {
    /// Checks whether a file can be written there, and keeps its contents.
    ///
    /// # Errors
    /// [`Usage`] with the system's reason.
    pub fn open(path: &Path) -> Result<Self> {
        Self::try_open(path).map_err(|error| {
            let reason = match error.kind() {
                io::ErrorKind::IsADirectory => "it is a directory: name a file in it".into(),
                _ => error.to_string(),
            };
            Usage(format!("{} cannot be written: {reason}", path.display())).into()
        })
    }

    fn try_open(path: &Path) -> io::Result<Self> {
        let to = match fs::metadata(path) {
            _ if path == Path::new("-") => To::Stdout,
            // `/dev/stdout`, whose file a rename would put another in the place of.
            Ok(there) if is_stdout(&there) => To::Stdout,
            Ok(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(there) if !there.is_file() => To::Stream(open_stream(path, &there)?),
            Ok(_) => {
                OpenOptions::new().append(true).open(path)?;
                To::File(resolve(path))
            }
            Err(_) => {
                let target = resolve(path);
                OpenOptions::new().write(true).create_new(true).open(&target)?;
                fs::remove_file(&target)?;
                To::File(target)
            }
        };
        Ok(Self { path: path.to_owned(), to })
    }

    /// Writes the file. A regular file changes atomically, and a failure leaves it unchanged. A
    /// file that cannot be replaced (it has several names, belongs to another user, or its
    /// directory is not writable) is written in place.
    ///
    /// # Errors
    /// The system's reason, with the file's name.
    pub fn write(&self, contents: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let written = match &self.to {
            To::Stdout => match fill(&mut io::stdout().lock(), contents) {
                Err(error) if is_broken_pipe(&error) => Ok(()),
                result => result,
            },
            To::Stream(file) => fill(file, contents),
            To::File(target) => replace(target, contents),
        };
        written.with_context(|| format!("{} could not be written", self.path.display()))
    }

    /// The given name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both targets are the same file.
    fn is_same(&self, other: &Self) -> bool {
        match (&self.to, &other.to) {
            (To::Stdout, To::Stdout) => true,
            (To::File(one), To::File(other)) => is_same_file(one, other),
            _ => false,
        }
    }

    /// Whether the target is the file with this name.
    #[must_use]
    pub fn is_file(&self, path: &Path) -> bool {
        matches!(&self.to, To::File(target) if is_same_file(target, path))
    }
}

/// Opens the requested files of a command, each with the option that names it. If one is standard
/// output, text goes to standard error from now on.
///
/// # Errors
/// [`Usage`] for a file that cannot be written, or that two options name.
pub fn open_all<const N: usize>(files: [(&str, Option<&Path>); N]) -> Result<[Option<Output>; N]> {
    let mut opened: [Option<Output>; N] = [const { None }; N];
    for (index, (option, path)) in files.iter().enumerate() {
        let Some(path) = path else { continue };
        let output = Output::open(path)?;
        let earlier = opened.iter().position(|o| o.as_ref().is_some_and(|o| o.is_same(&output)));
        if let Some(earlier) = earlier {
            let (path, earlier) = (path.display(), files[earlier].0);
            let reason = format!("{option} {path} is what {earlier} writes: name another file");
            return Err(Usage(reason).into());
        }
        opened[index] = Some(output);
    }
    if opened.iter().flatten().any(|output| matches!(output.to, To::Stdout)) {
        progress::print_to_stderr();
    }
    Ok(opened)
}

/// Makes a folder, and fails if no file can be written in it.
///
/// # Errors
/// [`Usage`] with the system's reason.
pub fn check_folder(path: &Path) -> Result<()> {
    let made = fs::create_dir_all(path);
    made.map_err(|error| Usage(format!("{} cannot be written: {error}", path.display())))?;
    Output::open(&path.join("results.json"))?;
    Ok(())
}

/// The name that symbolic links lead to; the file may not exist yet.
fn resolve(path: &Path) -> PathBuf {
    let mut target = path.to_owned();
    // As many as Linux follows.
    for _ in 0..40 {
        let Ok(next) = fs::read_link(&target) else { break };
        target = folder_of(&target).join(next);
    }
    target
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        // A file that is not there yet has its folder's path.
        let folder = || Some(fs::canonicalize(folder_of(path)).ok()?.join(path.file_name()?));
        fs::canonicalize(path).ok().or_else(folder)
    };
    let file = |path: &Path| fs::metadata(path).ok().as_ref().and_then(identity);
    let same = |one: Option<_>, other| one.is_some() && one == other;
    same(file(one), file(other)) || place(one).is_some() && place(one) == place(other)
}

/// The identity of a file, independent of its names.
#[cfg(unix)]
fn identity(file: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    Some((file.dev(), file.ino()))
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> Option<(u64, u64)> {
    None
}

/// Whether this file or pipe is standard output. Devices do not count: two outputs to `/dev/null`
/// or a terminal do not conflict.
#[cfg(unix)]
fn is_stdout(there: &Metadata) -> bool {
    use std::os::{fd::AsFd as _, unix::fs::FileTypeExt as _};
    let stdout = io::stdout().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    (there.is_file() || there.file_type().is_fifo())
        && stdout.is_ok_and(|stdout| identity(&stdout) == identity(there))
}

#[cfg(not(unix))]
fn is_stdout(_: &Metadata) -> bool {
    false
}

/// Opens a device or a pipe without waiting for the pipe's reader.
#[cfg(unix)]
fn open_stream(path: &Path, there: &Metadata) -> io::Result<File> {
    use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};

    use rustix::{fs, io::Errno};

    let at_once = fs::OFlags::NONBLOCK;
    let opened =
        OpenOptions::new().write(true).custom_flags(at_once.bits().cast_signed()).open(path);
    let nobody_reads = Some(Errno::NXIO.raw_os_error());
    let file = opened.map_err(|error| {
        if there.file_type().is_fifo() && error.raw_os_error() == nobody_reads {
            io::Error::other("it is a pipe that nobody reads: start its reader first")
        } else {
            error
        }
    })?;
    fs::fcntl_setfl(&file, fs::fcntl_getfl(&file)? - at_once)?;
    Ok(file)
}

#[cfg(not(unix))]
fn open_stream(path: &Path, _: &Metadata) -> io::Result<File> {
    OpenOptions::new().write(true).open(path)
}

fn fill(to: impl Write, contents: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let mut to = BufWriter::with_capacity(1 << 16, to);
    contents(&mut to)?;
    Ok(to.flush()?)
}

/// Writes a file beside the target, and replaces the target with it.
fn replace(target: &Path, contents: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let old = fs::metadata(target).ok();
    let mut new = match (new_beside(target, old.as_ref()), &old) {
        (Ok(Some(new)), _) => new,
        (Err(error), None) => return Err(error.into()),
        _ => return fill(File::create(target)?, contents),
    };
    fill(new.as_file_mut(), contents)?;
    // A file that is mounted by itself has a place that no other can take.
    new.persist(target).map(drop).or_else(|kept| {
        let mut from = kept.file.reopen()?;
        io::copy(&mut from, &mut File::create(target)?)?;
        Ok(())
    })
}

/// An empty file in the target's folder, with the target's present or future mode; `None` where it
/// cannot replace the old file without a visible difference.
#[cfg(unix)]
fn new_beside(target: &Path, old: Option<&Metadata>) -> io::Result<Option<NamedTempFile>> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    // As open(2) makes them: the umask takes away.
    let mode = fs::Permissions::from_mode(0o666);
    let new = tempfile::Builder::new().permissions(mode).tempfile_in(folder_of(target))?;
    if let Some(old) = old {
        let made = new.as_file().metadata()?;
        if old.nlink() > 1 || (old.uid(), old.gid()) != (made.uid(), made.gid()) {
            return Ok(None);
        }
        new.as_file().set_permissions(old.permissions())?;
    }
    Ok(Some(new))
}

#[cfg(not(unix))]
fn new_beside(target: &Path, _: Option<&Metadata>) -> io::Result<Option<NamedTempFile>> {
    NamedTempFile::new_in(folder_of(target)).map(Some)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| match cause.downcast_ref::<serde_json::Error>() {
        Some(json) => json.io_error_kind() == Some(io::ErrorKind::BrokenPipe),
        None => cause.downcast_ref::<io::Error>().is_some_and(kind),
    })
}

impl Results {
    /// Writes the document.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_json(&self, output: &Output) -> Result<()> {
        output.write(|to| {
            serde_json::to_writer_pretty(&mut *to, self)?;
            Ok(writeln!(to)?)
        })
    }

    /// Reads a document back.
    ///
    /// # Errors
    /// [`Usage`] when the file cannot be read, is not such a document, or has a later schema.
    pub fn read_json(path: &Path) -> Result<Self> {
        let unreadable = |reason: String| Usage(format!("{}: {reason}", path.display()));
        let file = File::open(path).map_err(|e| unreadable(e.to_string()))?;
        let results: Self = serde_json::from_reader(BufReader::new(file)).map_err(|e| {
            unreadable(match e.classify() {
                serde_json::error::Category::Io => e.to_string(),
                _ => format!(
                    "not results of this program ({e}): give what compare --json, verify --json \
                     or a report wrote"
                ),
            })
        })?;
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
    pub fn write_csv(&self, output: &Output) -> Result<()> {
        output.write(|to| {
            let mut writer = csv::Writer::from_writer(to);
            for row in &self.rows {
                writer.serialize(row)?;
            }
            Ok(writer.flush()?)
        })
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
        let output = Output::open(&json).unwrap();
        assert!(!json.exists());
        results.write_json(&output).unwrap();
        results.write_csv(&Output::open(&csv).unwrap()).unwrap();
        Output::open(&json).unwrap();
        assert_eq!(Results::read_json(&json).unwrap(), results);
        assert_eq!(read_csv(&csv).unwrap(), results.rows);
    }

    #[test]
    fn what_cannot_be_written_or_read_is_a_usage_error() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/such/file.json");
        for error in [
            Output::open(&missing).unwrap_err(),
            Output::open(folder.path()).unwrap_err(),
            Results::read_json(&missing).unwrap_err(),
            read_csv(&missing).unwrap_err(),
        ] {
            assert_eq!(failure::exit_code(&error), 2, "{error}");
        }
        let later = folder.path().join("later.json");
        let results = Results { schema: SCHEMA + 1, ..Results::default() };
        results.write_json(&Output::open(&later).unwrap()).unwrap();
        assert!(Results::read_json(&later).unwrap_err().to_string().contains("schema 2"));
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "old").unwrap();
        let output = Output::open(&path).unwrap();
        let failing = output.write(|to| {
            to.write_all(b"new")?;
            anyhow::bail!("broken")
        });
        assert!(format!("{:#}", failing.unwrap_err()).contains("a could not be written: broken"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn one_file_for_two_options_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("a"), folder.path().join(".").join("a"));
        let both = |one: &Path, other: &Path| {
            open_all([("--json", Some(one)), ("--csv", Some(other))]).map(drop)
        };
        for (one, other) in [(&one, &one), (&one, &other)] {
            let error = both(one, other).unwrap_err().to_string();
            assert!(error.contains("is what --json writes: name another file"), "{error}");
        }
        both(&one, &folder.path().join("b")).unwrap();
        both(Path::new("/dev/null"), Path::new("/dev/null")).unwrap();
    }
}
