//! What can be wrong with a kernel, as a typed error with its source line.

use std::{fmt, panic::Location};

/// A line of a kernel.
pub(crate) type Place = &'static Location<'static>;

use super::clock::Agent;
use crate::Dim3;

/// A place in a kernel's source and the lane that was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Lane, counted over the block, and on over the blocks of its cluster; from 1024 on bulk
    /// copies and tensor cores.
    pub lane: u32,
    /// Source line, where it is known.
    pub location: Option<&'static Location<'static>>,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Agent::describe(self.lane) {
            Some(agent) => write!(f, "{agent}")?,
            None => write!(f, "thread {}", self.lane)?,
        }
        match self.location {
            Some(at) => write!(f, " at {}:{}", at.file(), at.line()),
            None => Ok(()),
        }
    }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// Two accesses to one word of shared memory that no barrier orders.
    #[error(
        "race on shared memory at byte {offset}: {what} by {this}, and {other_what} by {other}, with no barrier between"
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
        /// What is wrong, and what would be right.
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
    /// A launch that no GPU accepts.
    #[error("launch refused: {0}")]
    Launch(String),
}

/// A fault and the block it happened in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What went wrong.
    pub kind: FaultKind,
    /// Index of the block, the first of its cluster, where one had started.
    pub block: Option<Dim3>,
}

impl Fault {
    pub(super) fn launch(message: String) -> Self {
        Self { kind: FaultKind::Launch(message), block: None }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.block {
            Some(b) => write!(f, "block ({}, {}, {}): {}", b.x, b.y, b.z, self.kind),
            None => self.kind.fmt(f),
        }
    }
}

impl std::error::Error for Fault {}
