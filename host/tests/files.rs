//! Files are written as other programs write theirs, standard output too, and a signal loses
//! nothing.
#![cfg(unix)]

mod common;

use std::{
    fs::{self, File, Permissions},
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _, symlink},
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{host, run};
use flash_attention::{DType, Tensor};
use host::results::Results;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tempfile::TempDir;

const COMPARE: [&str; 9] =
    ["compare", "--seq", "32", "--heads", "1", "--iters", "1", "--kernels", "naive"];
const VERIFY: [&str; 9] =
    ["verify", "--seq", "32", "--heads", "1", "--kernels", "naive", "--level", "attention"];

/// A folder with `in.safetensors`.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let [q, k, v] = [1, 2, 3].map(|seed| Tensor::random(DType::F32, &[1, 1, 8, 32], seed, 0.0));
        let view = |t| TensorView::new(Dtype::F32, vec![1, 1, 8, 32], Tensor::as_bytes(t)).unwrap();
        let views = [("q", view(&q)), ("k", view(&k)), ("v", view(&v))];
        safetensors::serialize_to_file(views, None, &folder.path("in.safetensors")).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn pipe(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        path
    }

    /// `run` to that output.
    fn to(&self, output: impl AsRef<Path>) -> Command {
        let mut command = host();
        command.args(["run", "--input"]).arg(self.path("in.safetensors"));
        command.arg("--output").arg(output.as_ref());
        command
    }

    /// Every command with an option that names a file, and the file.
    fn writers(&self) -> Vec<(Command, PathBuf)> {
        let with = |args: &[&str], option: &str| {
            let path = self.path(&option[2..]);
            let mut command = host();
            command.args(args).arg(option).arg(&path);
            (command, path)
        };
        let output = self.path("output");
        vec![
            (self.to(&output), output),
            with(&COMPARE, "--json"),
            with(&COMPARE, "--csv"),
            with(&VERIFY, "--json"),
        ]
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn good(command: &mut Command) -> (String, String) {
    let (code, stdout, stderr) = run(command);
    assert_eq!(code, 0, "{command:?}: {stdout}{stderr}");
    (stdout, stderr)
}

#[test]
fn links_modes_and_other_names_stay() {
    let folder = Folder::new();
    let made_by_others = folder.path("others");
    File::create(&made_by_others).unwrap();
    for (mut command, path) in folder.writers() {
        let _ = fs::remove_file(&path);
        good(&mut command);
        assert_eq!(mode(&path), mode(&made_by_others), "{command:?}");
        assert!(fs::metadata(&path).unwrap().len() > 0);

        // A link to a file, which has a mode of its own.
        let target = folder.path("target");
        fs::rename(&path, &target).unwrap();
        fs::write(&target, "old").unwrap();
        fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        symlink("target", &path).unwrap();
        good(&mut command);
        assert!(path.is_symlink() && mode(&target) == 0o640, "{command:?}");
        assert!(fs::metadata(&target).unwrap().len() > 3, "{command:?}");

        // A link to a file that is not there yet.
        fs::remove_file(&target).unwrap();
        good(&mut command);
        assert!(path.is_symlink() && target.is_file(), "{command:?}");

        // A second name of the file.
        let second = folder.path("second");
        fs::hard_link(&target, &second).unwrap();
        fs::write(&second, "old").unwrap();
        good(&mut command);
        assert_eq!(fs::read(&second).unwrap(), fs::read(&target).unwrap(), "{command:?}");
        assert!(fs::read(&second).unwrap() != b"old");
        for path in [path, target, second] {
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn a_report_writes_through_links() {
    let folder = Folder::new();
    let report = folder.path("report");
    fs::create_dir(&report).unwrap();
    symlink("../page", report.join("index.html")).unwrap();
    symlink("../document", report.join("results.json")).unwrap();
    good(host().args(COMPARE).arg("--report").arg(&report));
    assert!(folder.path("page").is_file() && report.join("index.html").is_symlink());
    let document = folder.path("document");
    assert!(Results::read_json(&document).is_ok() && report.join("results.json").is_symlink());
    fs::remove_file(folder.path("page")).unwrap();
    good(host().arg("report").arg(&document).arg("--out").arg(&report));
    assert!(folder.path("page").is_file() && report.join("index.html").is_symlink());
}

#[test]
fn devices_are_written_to() {
    let folder = Folder::new();
    good(&mut folder.to("/dev/null"));
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    for mut full in [folder.to("/dev/full"), {
        let mut command = host();
        command.args(COMPARE).args(["--json", "/dev/full"]);
        command
    }] {
        let (code, _, stderr) = run(&mut full);
        let expected = "error: /dev/full could not be written: No space left on device";
        assert!(code == 1 && stderr.starts_with(expected), "{code} {stderr}");
    }
}

#[test]
fn a_pipe_needs_a_reader() {
    let folder = Folder::new();
    let pipe = folder.pipe("output");
    for name in ["json", "csv"] {
        folder.pipe(name);
    }
    for (mut command, _) in folder.writers() {
        let (code, stdout, stderr) = run(&mut command);
        assert!(code == 2 && stdout.is_empty(), "{command:?}: {code} {stdout}");
        assert!(stderr.contains("a pipe that nobody reads: start its reader first"), "{stderr}");
    }
    let reader = thread::spawn({
        let pipe = pipe.clone();
        move || fs::read(pipe).unwrap()
    });
    // The reader has the pipe open when a writer can open it.
    while rustix::fs::open(
        &pipe,
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map(|writer| (good(&mut folder.to(&pipe)), writer))
    .is_err()
    {
        thread::yield_now();
    }
    let bytes = reader.join().unwrap();
    assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), 2);
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
}

#[test]
fn input_may_be_a_pipe_and_no_directory_or_device() {
    let folder = Folder::new();
    let pipe = folder.pipe("in");
    let bytes = fs::read(folder.path("in.safetensors")).unwrap();
    let writer = thread::spawn({
        let pipe = pipe.clone();
        move || fs::write(pipe, bytes).unwrap()
    });
    good(host().args(["run", "--input"]).arg(&pipe).arg("--output").arg(folder.path("out")));
    writer.join().unwrap();
    for (input, reason) in [(folder.0.path(), "a directory"), (Path::new("/dev/zero"), "a device")]
    {
        let (code, _, stderr) = run(host().args(["run", "--check", "--input"]).arg(input));
        assert!(code == 2 && stderr.contains(&format!("it is {reason}: name a")), "{stderr}");
    }
}

#[test]
fn a_dash_is_standard_output() {
    let (stdout, stderr) = good(host().args(COMPARE).args(["--json", "-"]));
    let results: Results = serde_json::from_str(&stdout).unwrap();
    assert!(results.rows.len() == 2 && stderr.contains("N = 32, attention"), "{stderr}");
    let (stdout, stderr) = good(host().args(COMPARE).args(["--csv", "-"]));
    assert_eq!(csv::Reader::from_reader(stdout.as_bytes()).records().count(), 2);
    assert!(stderr.contains("N = 32, attention"), "{stderr}");
    let (stdout, stderr) = good(host().args(VERIFY).args(["--json", "-"]));
    assert!(serde_json::from_str::<Results>(&stdout).is_ok() && stderr.contains("verdict: "));
    // Its other name.
    let (stdout, _) = good(host().args(VERIFY).args(["--json", "/dev/stdout"]));
    assert!(serde_json::from_str::<Results>(&stdout).is_ok(), "{stdout}");
    let folder = Folder::new();
    let output = folder.to("-").output().unwrap();
    assert_eq!(SafeTensors::deserialize(&output.stdout).unwrap().len(), 2);

    let same = folder.path("same");
    for path in [Path::new("-"), &same] {
        let both = ["--json", "--csv"].map(|option| [option.as_ref(), path.as_os_str()]);
        let (code, stdout, stderr) = run(host().args(COMPARE).args(both.concat()));
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        let name = path.display();
        assert!(stderr.contains(&format!("--csv {name} is what --json writes: name another")));
        assert!(!same.exists());
    }
}

#[test]
fn standard_output_that_is_full_is_an_error() {
    let folder = Folder::new();
    let mut of_run = folder.to("/dev/null");
    let with = |args: &[&str]| {
        let mut command = host();
        command.args(args);
        command
    };
    let json = folder.path("json");
    let mut compare = with(&COMPARE);
    compare.arg("--json").arg(&json);
    let mut all = [with(&["env"]), with(&["--help"]), with(&VERIFY), compare];
    for command in all.iter_mut().chain([&mut of_run]) {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let Output { status, stderr, .. } = command.stdout(full).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        let expected = "error: standard output could not be written: No space left on device";
        assert!(stderr.starts_with(expected), "{command:?}: {stderr}");
        assert_eq!((status.code(), stderr.lines().count()), (Some(1), 1), "{command:?}: {stderr}");
    }
    // What was measured is saved all the same.
    assert_eq!(Results::read_json(&json).unwrap().rows.len(), 2);
    // Standard error may be full as well.
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let status = host().arg("env").stdout(full()).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    let status = host().arg("typo").stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn a_reader_who_leaves_is_no_error() {
    for args in [&["env"][..], &["--help"], &VERIFY, &[&COMPARE[..], &["--json", "-"]].concat()] {
        let mut command = host();
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        let of_file = args.contains(&"-");
        assert!(status.code() == Some(0) && (of_file || stderr.is_empty()), "{args:?}: {stderr}");
        assert!(!stderr.contains("error: "), "{args:?}: {stderr}");
    }
}

/// A run that does not end by itself, once it listens for signals.
struct Endless {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Endless {
    fn start(command: &mut Command) -> Self {
        // Whoever started the tests may ignore signals, as nohup does: the program would too.
        let listen = || {
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                // SAFETY: it may be called between fork and exec, and these signals can be set.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // SAFETY: `listen` allocates nothing and takes no lock.
        unsafe { command.pre_exec(listen) };
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut endless = Self { child, stdout };
        endless.read_to("");
        endless
    }

    /// Reads standard output up to a line with that part.
    fn read_to(&mut self, part: &str) {
        let mut line = String::new();
        while line.is_empty() || !line.contains(part) {
            line.clear();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "no {part:?}");
        }
    }

    fn signal(&self, name: &str) {
        let kill = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    /// Waits until it has answered the first signal.
    fn answered(&mut self) {
        let mut line = String::new();
        let mut stderr = BufReader::new(self.child.stderr.as_mut().unwrap());
        stderr.read_line(&mut line).unwrap();
        assert!(line.starts_with("stopping; "), "{line}");
    }
}

fn endless(json: &Path) -> Command {
    let mut command = host();
    let lengths: Vec<String> = (1..2000).map(|n| n.to_string()).collect();
    command.args(["compare", "--seq", &lengths.join(","), "--json"]).arg(json);
    command.args(["--heads", "1", "--iters", "1", "--kernels", "naive", "--level", "attention"]);
    command
}

/// The microscope's commands print nothing before they are done, and stop wherever they are: while the inputs
/// are drawn, by a forward pass of their own, and while the kernel runs.
#[cfg(target_os = "linux")]
#[test]
fn the_microscope_stops_for_a_signal() {
    for (command, kernel) in [("break", "backward_naive"), ("profile", "naive"), ("trace", "naive")]
    {
        let mut program = host();
        program.args([command, "--kernel", kernel, "--seq", "600", "--heads", "1"]);
        if command == "trace" {
            program.args(["--out", "-"]);
        }
        let child = program.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        let handles_signals = || {
            let status = std::fs::read_to_string(&status).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            u64::from_str_radix(caught.trim(), 16).unwrap() >> (libc::SIGTERM - 1) & 1 == 1
        };
        while !handles_signals() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let kill = Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8(text).unwrap());
        assert_eq!(status.code(), Some(143), "{command}: {stdout}{stderr}");
        assert!(
            stdout.is_empty() && stderr.starts_with("stopping; "),
            "{command}: {stdout}{stderr}"
        );
        assert!(!stderr.contains("error"), "{command}: {stderr}");
    }
}

#[test]
fn signals_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let json = folder.path().join(name);
        let mut run = Endless::start(&mut endless(&json));
        run.read_to("N = 3");
        run.signal(name);
        let _ = run.stdout.read_to_end(&mut Vec::new());
        assert_eq!(run.child.wait().unwrap().code(), Some(code), "{name}");
        let results = Results::read_json(&json).unwrap();
        assert!(results.interrupted && results.rows.len() >= 2, "{name}");
        assert!(results.rows[..2].iter().all(|row| row.mean_ms.is_some()), "{name}");
    }
}

/// Longer than a busy machine takes to end a process.
const SOON: Duration = Duration::from_secs(30);

/// A launch of the emulator that takes minutes does not hold up the end.
#[test]
fn a_launch_that_runs_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("json");
    let long = ["compare", "--seq", "8,65536", "--batch", "1", "--heads", "1", "--iters", "1"];
    let rest = ["--level", "attention", "--kernels", "flash_tiled"];
    let mut run = Endless::start(host().args(long).args(rest).arg("--json").arg(&json));
    run.read_to("N = 8");
    // The tensors of the next length are drawn within a second; before that a signal ends it too.
    std::thread::sleep(Duration::from_secs(3));
    let sent = Instant::now();
    run.signal("TERM");
    let _ = run.stdout.read_to_end(&mut Vec::new());
    assert_eq!(run.child.wait().unwrap().code(), Some(143));
    assert!(sent.elapsed() < SOON, "{:?}", sent.elapsed());
    let results = Results::read_json(&json).unwrap();
    let lengths: Vec<usize> = results.rows.iter().map(|row| row.seq).collect();
    assert!(results.interrupted && lengths == [8], "{lengths:?}");
}

#[test]
fn a_second_signal_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("json");
    // Before the launch, which a signal would stop, the outputs in f64 take long.
    let long =
        ["verify", "--seq", "65536", "--heads", "1", "--kernels", "flash_tiled", "--rows", "1"];
    let mut run = Endless::start(host().args(long).arg("--json").arg(&json));
    run.signal("TERM");
    run.answered();
    let sent = Instant::now();
    run.signal("HUP");
    assert_eq!(run.child.wait().unwrap().code(), Some(129));
    assert!(sent.elapsed() < SOON && !json.exists());
}

#[test]
fn what_is_ignored_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("json");
    let command = endless(&json);
    // As nohup starts a program.
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(command.get_program());
    shell.args(command.get_args());
    for (name, value) in command.get_envs() {
        shell.env(name, value.unwrap());
    }
    let mut run = Endless::start(&mut shell);
    run.signal("HUP");
    run.signal("TERM");
    let _ = run.stdout.read_to_end(&mut Vec::new());
    let status = run.child.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(143), None));
    run.answered();
}
