//! How a launch runs: its seed, its checks, and the synchronisations that it leaves out on purpose.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{fault::Place, record::Recorder};
use crate::hardware::MAX_CONSTANTS;

/// How a launch runs and what it checks.
#[derive(Clone, Debug)]
pub struct Options {
    /// Chooses which ready warp runs next, which bulk load lands and when, and which block
    /// goes first. With 0 threads run in order and blocks side by side on the CPU's cores.
    /// With any other seed one core runs the launch, several blocks in turn, so that the same
    /// seed gives the same run.
    pub seed: u64,
    /// The launch's specialisation constants, in the order of their declaration.
    pub constants: [u32; MAX_CONSTANTS],
    /// Checks that a launch can do without.
    pub checks: Checks,
    /// Accesses to memory and switches between lanes that a block may make without reaching
    /// any part of global memory for the first time. A block that makes more is a fault: it
    /// spins.
    pub budget: u64,
    /// A change of one synchronisation, to see whether anything finds it.
    pub change: Option<Change>,
    /// Where to note every synchronisation that the launch passes.
    pub sites: Option<Arc<Sites>>,
    /// Name of the launch, for records of it.
    pub name: &'static str,
    /// The recorder of the launch, line by line.
    pub recorder: Option<Arc<Recorder>>,
    /// Once this is true the launch ends, with [`FaultKind::Stopped`](super::FaultKind::Stopped),
    /// when lanes next wait.
    pub stop: Option<Arc<AtomicBool>>,
}

impl Options {
    /// The budget of [`Options::default`]: some ten seconds of work.
    pub const BUDGET: u64 = 1 << 30;

    /// The default options with that seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Whether the launch is to end.
    pub(super) fn stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            constants: [0; MAX_CONSTANTS],
            checks: Checks::default(),
            budget: Self::BUDGET,
            change: None,
            sites: None,
            name: "",
            recorder: None,
            stop: None,
        }
    }
}

/// Classes of checks that a launch can switch off. All are on by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Races on global memory, between threads of a block and between blocks. Without them a
    /// block that goes round and round over the same global memory is not found to spin.
    pub global_races: bool,
    /// Waits for an mbarrier that could miss their phase, or return before it is complete.
    pub missed_phases: bool,
}

impl Default for Checks {
    fn default() -> Self {
        Self { global_races: true, missed_phases: true }
    }
}

/// Kinds of synchronisation that a launch can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum SyncKind {
    /// `sync_threads`, and waiting at a named barrier.
    Barrier,
    /// Arriving at a named barrier.
    BarrierArrive,
    ClusterBarrier,
    WarpBarrier,
    MbarrierWait,
    MbarrierArrive,
    /// Announcing bytes, and arriving.
    MbarrierExpect,
    FenceInit,
    FenceProxyAsync,
    CopyCommit,
    CopyWait,
    BulkCommit,
    BulkWait,
    WgmmaWait,
    /// Waiting for a turn.
    TurnWait,
    /// Passing the turn on.
    TurnPass,
    /// Giving registers back.
    RegistersDecrease,
    /// Taking registers.
    RegistersIncrease,
}

impl SyncKind {
    /// The possible changes of a synchronisation of this kind.
    #[must_use]
    pub fn alterations(self) -> &'static [Alteration] {
        match self {
            Self::MbarrierWait => &[Alteration::LeaveOut, Alteration::OtherParity],
            Self::CopyWait | Self::BulkWait | Self::WgmmaWait => {
                &[Alteration::LeaveOut, Alteration::OneMorePending]
            }
            _ => &[Alteration::LeaveOut],
        }
    }
}

/// A synchronisation in a kernel's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SyncSite {
    /// Source file.
    pub file: &'static str,
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
    /// The kind of synchronisation there.
    pub kind: SyncKind,
}

impl SyncSite {
    pub(super) fn new(kind: SyncKind, at: Place) -> Self {
        Self { file: at.file(), line: at.line(), column: at.column(), kind }
    }
}

impl fmt::Display for SyncSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {}:{}:{}", self.kind, self.file, self.line, self.column)
    }
}

/// A change of a synchronisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alteration {
    /// It does nothing.
    LeaveOut,
    /// A wait lets one group more stay on its way.
    OneMorePending,
    /// A wait names the other parity.
    OtherParity,
}

/// A change of one synchronisation, every time that a thread comes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The synchronisation.
    pub site: SyncSite,
    /// The change.
    pub alteration: Alteration,
}

/// The synchronisations that launches have passed.
#[derive(Debug, Default)]
pub struct Sites(Mutex<BTreeSet<SyncSite>>);

impl Sites {
    /// The sites noted so far, in the order of the source.
    #[must_use]
    pub fn list(&self) -> Vec<SyncSite> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    pub(super) fn note(&self, site: SyncSite) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(site);
    }
}
