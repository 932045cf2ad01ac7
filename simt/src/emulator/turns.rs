//! Turns that lanes wait for in global memory. Counts are read and changed by the CPU's own acquire and
//! release, since blocks run side by side.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{
    block::{Block, LaneState},
    current,
    fault::Place,
    options::SyncKind,
};

/// A lane that waits for a turn.
pub(crate) struct Waiting {
    lane: usize,
    address: u64,
    turn: u32,
}

/// The count at an address that a view has checked.
fn count(address: u64) -> &'static AtomicU32 {
    // SAFETY: bounds and alignment are checked, and the memory outlives the launch; no more than this
    // module needs lives as long as the reference says.
    unsafe { AtomicU32::from_ptr(address as *mut u32) }
}

/// Waits; `address` checks the access and says where the count is.
pub(crate) fn wait(address: impl FnOnce() -> u64, turn: u32, at: Place) {
    if current::left_out(SyncKind::TurnWait, at) {
        return;
    }
    let address = address();
    let waits = current::with(|b| {
        let waits = count(address).load(Ordering::Acquire) != turn;
        if waits {
            b.turns.push(Waiting { lane: b.current, address, turn });
            b.set_state(b.current, LaneState::AtTurn { address, turn, at });
        }
        waits
    });
    if waits {
        current::suspend();
    }
}

/// Passes the turn on; `address` likewise.
pub(crate) fn pass(address: impl FnOnce() -> u64, at: Place) {
    if current::left_out(SyncKind::TurnPass, at) {
        return;
    }
    count(address()).fetch_add(1, Ordering::Release);
}

/// A turn that a lane waits for, for a report.
pub(super) fn describe(address: u64, turn: u32) -> String {
    let now = count(address).load(Ordering::Relaxed);
    format!("turn {turn} of the count at {address:#x}, which is {now}")
}

impl Block {
    /// Wakes the lanes whose turn it is.
    #[inline]
    pub(super) fn look_at_turns(&mut self) {
        if !self.turns.is_empty() {
            self.wake();
        }
    }

    #[cold]
    fn wake(&mut self) {
        let mut turns = std::mem::take(&mut self.turns);
        turns.retain(|waiting| {
            let waits = count(waiting.address).load(Ordering::Acquire) != waiting.turn;
            if !waits {
                self.set_state(waiting.lane, LaneState::Ready);
                self.progress();
            }
            waits
        });
        self.turns = turns;
    }
}
