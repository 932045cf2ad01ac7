//! Ctrl-C, SIGTERM and SIGHUP: the first asks the run to stop, which the emulator does at once and a
//! GPU after its launch, and the second ends the program.

use std::{
    process::exit,
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use crate::progress::warn;

/// Number of the first signal; 0 before any signal.
static SIGNAL: AtomicU8 = AtomicU8::new(0);
static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static HANDLER: OnceLock<()> = OnceLock::new();

/// Starts listening. On failure, a signal ends the program as usual.
pub fn listen() {
    HANDLER.get_or_init(|| {
        if let Err(error) = start() {
            warn(&format!("note: a signal will discard results: {error}"));
        }
    });
}

/// Whether the run should stop.
#[must_use]
pub fn requested() -> bool {
    SIGNAL.load(Ordering::Relaxed) != 0
}

/// True once the run should stop.
#[must_use]
pub fn stop() -> Arc<AtomicBool> {
    STOP.clone()
}

/// The exit code of a stopped run, as shells report it: 128 and the signal.
#[must_use]
pub fn exit_code() -> u8 {
    128 + SIGNAL.load(Ordering::Relaxed)
}

fn received(signal: u8) {
    if requested() {
        exit(i32::from(128 + signal));
    }
    SIGNAL.store(signal, Ordering::Relaxed);
    STOP.store(true, Ordering::Relaxed);
    warn("stopping; a second signal (Ctrl-C) ends at once");
}

#[cfg(unix)]
fn start() -> std::io::Result<()> {
    use signal_hook::{
        consts::{SIGHUP, SIGINT, SIGTERM},
        iterator::Signals,
    };

    // An ignored signal stays ignored: SIGHUP under nohup, SIGINT of a script's background job.
    let signals = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| !is_ignored(signal));
    let mut signals = Signals::new(signals)?;
    let wait = move || signals.forever().filter_map(|s| u8::try_from(s).ok()).for_each(received);
    std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}

/// Whether the program was started with this signal ignored.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    // A line `SigIgn:` with a bit for each signal; only Linux has it.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let bits = bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    bits >> (signal - 1) & 1 == 1
}

#[cfg(not(unix))]
fn start() -> Result<(), ctrlc::Error> {
    const SIGINT: u8 = 2;
    ctrlc::set_handler(|| received(SIGINT))
}
