//! The block that a worker thread runs, as the primitives of this crate find it.

use std::{
    cell::Cell,
    panic::{Location, resume_unwind},
    ptr,
};

use super::{
    block::{Block, LaneState},
    fault::{FaultKind, Place},
    lanes::{FaultPayload, LaneYielder},
    options::{Alteration, SyncKind},
};

thread_local! {
    static CURRENT: Cell<*mut Block> = const { Cell::new(ptr::null_mut()) };
    static PANIC_LOCATION: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Marks a block as the one that this thread runs, while it lives.
pub(super) struct Entered;

impl Entered {
    pub fn new(block: &mut Block) -> Self {
        CURRENT.set(block);
        Self
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(ptr::null_mut());
    }
}

pub(super) fn is_inside() -> bool {
    !CURRENT.get().is_null()
}

pub(super) fn set_panic_location(location: Option<&Location<'_>>) {
    // SAFETY: the locations that panics carry are constants of the program.
    PANIC_LOCATION.set(location.map(|l| unsafe { &*ptr::from_ref(l).cast() }));
}

pub(super) fn take_panic_location() -> Option<Place> {
    PANIC_LOCATION.take()
}

/// Calls `f` with the block that this thread runs. `f` must not suspend the lane.
#[inline]
pub(crate) fn with<R>(f: impl FnOnce(&mut Block) -> R) -> R {
    // Without lanes no block is ever entered. The compiler then drops `f`, and with it all checks.
    let block = if cfg!(feature = "emulator") { CURRENT.get() } else { ptr::null_mut() };
    assert!(!block.is_null(), "a GPU primitive was called outside of emulator::launch");
    // SAFETY: `Entered` keeps the pointer valid; one lane runs at a time and `f` does
    // not suspend, so that this is the only reference.
    f(unsafe { &mut *block })
}

/// [`with`], where a block runs.
#[cfg_attr(not(feature = "emulator"), allow(dead_code))]
pub(super) fn if_inside(f: impl FnOnce(&mut Block)) {
    if is_inside() {
        with(f);
    }
}

/// Like [`with`]; an error ends the launch with that fault.
#[inline]
pub(crate) fn checked<R>(f: impl FnOnce(&mut Block) -> Result<R, FaultKind>) -> R {
    match with(f) {
        Ok(value) => value,
        Err(kind) => fail(kind),
    }
}

/// Ends the launch with a fault, by unwinding the lane.
#[cold]
pub(crate) fn fail(kind: FaultKind) -> ! {
    resume_unwind(Box::new(FaultPayload(kind)))
}

/// Whether the launch leaves out the synchronisation of that kind at `at`.
#[inline]
pub(crate) fn left_out(kind: SyncKind, at: Place) -> bool {
    with(|b| b.alteration(kind, at)) == Some(Alteration::LeaveOut)
}

/// How many groups a wait of that kind at `at` leaves on their way, of which the kernel says
/// `pending`; `None` if the launch leaves it out.
#[inline]
pub(crate) fn pending(kind: SyncKind, pending: u32, at: Place) -> Option<u32> {
    match with(|b| b.alteration(kind, at)) {
        Some(Alteration::LeaveOut) => None,
        Some(Alteration::OneMorePending) => Some(pending + 1),
        _ => Some(pending),
    }
}

/// Suspends the current lane until the scheduler finds it ready again.
pub(crate) fn suspend() {
    let yielder = with(|b| b.lanes[b.current].yielder);
    // SAFETY: the lane's coroutine owns the yielder and is the one that runs.
    unsafe { (*yielder).suspend(()) }
}

/// Runs the kernel as the current lane.
pub(super) fn run_current_lane(yielder: &LaneYielder) {
    let kernel = with(|b| {
        b.lanes[b.current].yielder = yielder;
        b.kernel.expect("a block that runs has a kernel")
    });
    // SAFETY: the launch keeps the kernel alive until all its blocks are done.
    unsafe { (*kernel)() };
    with(|b| {
        b.set_state(b.current, LaneState::Done);
        let lane = b.current;
        if let Some(recording) = &mut b.recording {
            recording.lane_done(lane);
        }
    });
}
