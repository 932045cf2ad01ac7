//! Ctrl-C: the first asks the run to stop after what it is doing, and the second
//! ends the program.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

static STOP: AtomicBool = AtomicBool::new(false);
static HANDLER: OnceLock<()> = OnceLock::new();

/// Starts listening. Where a handler cannot be set, Ctrl-C ends the program as usual.
pub fn listen() {
    HANDLER.get_or_init(|| {
        let result = ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("stopping after this run; Ctrl-C again ends at once");
        });
        if let Err(error) = result {
            eprintln!("note: Ctrl-C will discard results: {error}");
        }
    });
}

/// Whether the run should stop.
#[must_use]
pub fn requested() -> bool {
    STOP.load(Ordering::Relaxed)
}
