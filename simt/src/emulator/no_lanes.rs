//! The lanes without the feature `emulator`: none can exist.

use super::fault::FaultKind;

/// As in `lanes.rs`; without lanes there is none.
pub(super) enum LaneYielder {}

impl LaneYielder {
    pub fn suspend(&self, (): ()) {
        match *self {}
    }
}

/// As in `lanes.rs`.
pub(super) struct FaultPayload(pub FaultKind);
