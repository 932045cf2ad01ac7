//! The faults of a kernel, as a typed error with its source line.

use std::{fmt, panic::Location};

/// A line of a kernel.
pub(crate) type Place = &'static Location<'static>;

use super::clock::Agent;
use crate::Dim3;

/// A place in a kernel's source and who was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Lane, counted over the block, and on over the blocks of its cluster; from 1024 on bulk
    /// copies and tensor cores, and beyond them the threads of a warp and the constants here.
    pub lane: u32,
    /// Source line, where it is known.
    pub location: Option<&'static Location<'static>>,
}

impl Site {
    /// Threads of several warps, of which the last access is known.
    pub const SEVERAL_WARPS: u32 = u32::MAX;
    /// Threads that made atomic accesses.
    pub const ATOMICS: u32 = u32::MAX - 1;
    /// The base to which a warp's number is added, for several of its threads.
    pub const OF_WARP: u32 = 1 << 31;
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.lane, Agent::describe(self.lane)) {
            (_, Some(agent)) => f.write_str(&agent)?,
            (Self::SEVERAL_WARPS, _) => f.write_str("threads of several warps")?,
            (Self::ATOMICS, _) => f.write_str("atomic operations")?,
            (lane, _) if lane >= Self::OF_WARP => {
                write!(f, "threads of warp {}", lane - Self::OF_WARP)?;
            }
            (lane, _) => write!(f, "thread {lane}")?,
        }
        match self.location {
            Some(at) => write!(f, " at {}:{}", at.file(), at.line()),
            None => Ok(()),
        }
    }
}

/// The fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// Two accesses to one word of shared memory that no barrier orders.
    #[error(
        "race on shared memory at byte {offset}: {what} by {this}, and {other_what} by {other}, with no barrier between (or other synchronisation that orders them)"
    )]
    Race {
        /// Byte offset in the block's shared memory.
        offset: u32,
        /// This access: "read" or "write".
        what: &'static str,
        /// Who makes it.
        this: Site,
        /// The earlier access.
        other_what: &'static str,
        /// Who made it.
        other: Site,
    },
    /// Two accesses to the same bytes of global memory that nothing orders, at least one of
    /// them a write, not both atomic. The same value written twice is a race too.
    #[error(
        "race on global memory at address {address:#x}: {what} by {this}, and {other_what} by {other}{}, with nothing that orders them: {}",
        .other_block.map_or(String::new(), |b| format!(" of block ({}, {}, {})", b.x, b.y, b.z)),
        if .other_block.is_some() { "nothing orders the blocks of a launch, and only atomic operations may meet" } else { "a barrier must come between" }
    )]
    GlobalRace {
        /// The address.
        address: u64,
        /// This access: "read", "write" or "atomic".
        what: &'static str,
        /// Who makes it.
        this: Site,
        /// The other access.
        other_what: &'static str,
        /// Who made it.
        other: Site,
        /// The block that made it, if it is not this one.
        other_block: Option<Dim3>,
    },
    /// A phase of an mbarrier that can be over before someone has looked for the one before.
    #[error(
        "phase {phase} of the mbarrier at byte {address} can complete before {this} has looked for the phase before, and that wait would then never return: nothing orders it before the arrival of {arrival}{}: the arrivals must come after every wait (by a barrier between, or one arrival for each warp that waits)",
        .cause.map_or(String::new(), |c| format!(", which went on at the arrival of {c}"))
    )]
    PhaseMissed {
        /// Byte offset in shared memory.
        address: u32,
        /// Number of the phase, the first being 0.
        phase: u32,
        /// The wait that is not ordered before.
        this: Site,
        /// The arrival that completes the phase.
        arrival: Site,
        /// The arrival that the arriving thread has waited for last, where it has waited.
        cause: Option<Site>,
    },
    /// A wait for a phase of an mbarrier by who does not know the phase before to be complete.
    #[error(
        "wait for phase {phase} of the mbarrier at byte {address} by {this}, which does not know phase {} to be complete: until it is, its parity is that of an older phase, and the wait returns at once. Wait for every phase, or synchronise with a thread that did",
        .phase - 1
    )]
    PhaseUnknown {
        /// Byte offset in shared memory.
        address: u32,
        /// Number of the phase, the first being 0.
        phase: u32,
        /// Who waits.
        this: Site,
    },
    /// An arrival at an mbarrier by who does not know the phase before to be complete.
    #[error(
        "arrival of {this} in phase {phase} of the mbarrier at byte {address}, which does not know phase {} to be complete: it may come earlier and count there. Wait for what the arrival answers first",
        .phase - 1
    )]
    ArrivalUnknown {
        /// Byte offset in shared memory.
        address: u32,
        /// Number of the phase, the first being 0.
        phase: u32,
        /// Who arrives.
        this: Site,
    },
    /// An access to shared memory where an asynchronous copy is on its way.
    #[error(
        "{what} of shared memory at byte {offset} by {this}, while the asynchronous copy of {copy} has not landed there: it must be waited for first"
    )]
    Pending {
        /// Byte offset in the block's shared memory.
        offset: u32,
        /// This access: "read" or "write".
        what: &'static str,
        /// Who makes it.
        this: Site,
        /// Who started the copy.
        copy: Site,
    },
    /// A read of shared memory that nothing has written.
    #[error("read of shared memory at byte {offset}, which nothing has written yet, by {this}")]
    Uninitialised {
        /// Byte offset in the block's shared memory.
        offset: u32,
        /// Who reads.
        this: Site,
    },
    /// An ordinary write that a bulk copy or wgmma reads without a proxy fence between.
    #[error(
        "shared memory at byte {offset}, written by {writer}, is read by {this} with no fence_proxy_async of the writer between"
    )]
    ProxyFence {
        /// Byte offset in the block's shared memory.
        offset: u32,
        /// Who reads.
        this: Site,
        /// Who wrote, and has not called the fence since.
        writer: Site,
    },
    /// A look at an accumulator whose product is still in flight.
    #[error("accumulator of a wgmma product in flight used by {this}: call wait_group on it first")]
    AccumulatorInFlight {
        /// Who looks.
        this: Site,
    },
    /// An access outside of a view.
    #[error("{space} {what} out of bounds by {this}: element {index} of {len}")]
    OutOfBounds {
        /// "shared" or "global".
        space: &'static str,
        /// "read" or "write".
        what: &'static str,
        /// Element asked for.
        index: u64,
        /// Elements of the view.
        len: u64,
        /// Who asks.
        this: Site,
    },
    /// An address that is not a multiple of the access's size.
    #[error(
        "misaligned {space} {what} by {this}: address {address:#x} is not a multiple of {bytes}"
    )]
    Misaligned {
        /// "shared" or "global".
        space: &'static str,
        /// "read" or "write".
        what: &'static str,
        /// The address.
        address: u64,
        /// Size of the access in bytes.
        bytes: u32,
        /// Who accesses.
        this: Site,
    },
    /// Threads that wait at barriers or collectives which the others do not reach.
    #[error("divergence: {0}")]
    Divergence(String),
    /// Wrong use of a primitive; the text says which.
    #[error("{message}, by {this}")]
    Misuse {
        /// The wrong use, and the right one.
        message: String,
        /// Who did it.
        this: Site,
    },
    /// A panic of the kernel.
    #[error("panic of {this}: {message}")]
    Panic {
        /// The panic's message.
        message: String,
        /// Who panicked.
        this: Site,
    },
    /// A block that goes on and on without progress.
    #[error("no progress in {steps} accesses and switches between threads: {busiest}{others}")]
    Livelock {
        /// The launch's budget.
        steps: u64,
        /// Who came where most often at the end.
        busiest: String,
        /// Where all threads are.
        others: String,
    },
    /// The machine has not enough memory to emulate a block.
    #[error("not enough memory for {0}")]
    Memory(String),
    /// A launch that no GPU accepts.
    #[error("launch refused: {0}")]
    Launch(String),
    /// [`Options::stop`](super::Options::stop) became true.
    #[error("stopped on request")]
    Stopped,
}

/// A fault and the block it happened in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The fault.
    pub kind: FaultKind,
    /// Index of the block, the first of its cluster, where one had started.
    pub block: Option<Dim3>,
    /// Seed of the launch. The same seed, if it is not 0, gives the same fault again.
    pub seed: u64,
}

impl Fault {
    /// Of no block.
    pub(super) fn of_launch(kind: FaultKind) -> Self {
        Self { kind, block: None, seed: 0 }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.block {
            Some(b) => write!(f, "block ({}, {}, {}): {}", b.x, b.y, b.z, self.kind)?,
            None => self.kind.fmt(f)?,
        }
        if self.seed != 0 { write!(f, " (seed {})", self.seed) } else { Ok(()) }
    }
}

impl std::error::Error for Fault {}
