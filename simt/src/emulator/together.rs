//! Blocks that wait for each other.
//!
//! No block can know whether its turn will come while another block runs. So a block whose lanes all
//! wait tells its launch, which lets others go on, and finds a deadlock where none can.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

/// How long every block that runs must wait, side by side, to count as a deadlock: longer than a
/// thread between two blocks takes.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at the counts.
const PAUSE: Duration = Duration::from_micros(50);

/// The blocks of a launch that run side by side, and which of them only wait for turns.
#[derive(Default)]
pub(super) struct Together {
    running: AtomicUsize,
    waiting: AtomicUsize,
}

/// A block among those that run side by side.
pub(super) struct Companion<'a> {
    together: &'a Together,
    waits: bool,
    /// Since when every block was found to wait.
    all_since: Option<Instant>,
}

impl Together {
    /// One block more.
    pub fn join(&self) -> Companion<'_> {
        self.running.fetch_add(1, Ordering::SeqCst);
        Companion { together: self, waits: false, all_since: None }
    }
}

impl Companion<'_> {
    /// The block has gone on.
    #[inline]
    pub fn goes_on(&mut self) {
        if self.waits {
            self.together.waiting.fetch_sub(1, Ordering::SeqCst);
            (self.waits, self.all_since) = (false, None);
        }
    }

    /// The block waits: lets others go on for a while. Whether none has been able to for long.
    pub fn pauses(&mut self) -> bool {
        let Together { running, waiting } = self.together;
        if !self.waits {
            waiting.fetch_add(1, Ordering::SeqCst);
            self.waits = true;
        }
        if waiting.load(Ordering::SeqCst) < running.load(Ordering::SeqCst) {
            self.all_since = None;
        } else if self.all_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            return true;
        }
        thread::sleep(PAUSE);
        false
    }
}

impl Drop for Companion<'_> {
    fn drop(&mut self) {
        self.goes_on();
        self.together.running.fetch_sub(1, Ordering::SeqCst);
    }
}
