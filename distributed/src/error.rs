//! Errors between ranks. Each message is one line that names the rank or the value that is
//! wrong, and what would be right.

use std::time::Duration;

/// Everything that can go wrong in attention over several ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error on one rank alone.
    #[error(transparent)]
    Attention(#[from] flash_attention::Error),
    /// A value that cannot be.
    #[error("{what} = {given} is not possible: {remedy}")]
    Invalid {
        /// Name of the value.
        what: &'static str,
        /// The value given.
        given: String,
        /// The right value.
        remedy: String,
    },
    /// A problem that ranks cannot share in that way.
    #[error("{what} cannot be shared between ranks by {by}: {remedy}")]
    Unsupported {
        /// The problem's value.
        what: &'static str,
        /// How it was to be shared.
        by: &'static str,
        /// The supported alternative.
        remedy: &'static str,
    },
    /// Ranks were called with different values. Nothing was sent.
    #[error(
        "rank {rank} was called with {what} = {theirs}, this rank with {ours}: all need the same"
    )]
    Differs {
        /// The other rank.
        rank: usize,
        /// The value's name.
        what: String,
        /// The other rank's value.
        theirs: String,
        /// This rank's.
        ours: String,
    },
    /// A rank has gone.
    #[error("rank {rank} is lost: it {reason}")]
    Lost {
        /// The rank.
        rank: usize,
        /// The known reason.
        reason: String,
    },
    /// Ranks are alive but make no progress.
    #[error("{} did not come to {at} within {limit:?}", ranks_text(ranks))]
    Late {
        /// The ranks; empty where all came and the transfer does not end.
        ranks: Vec<usize>,
        /// The exchange in which the others wait.
        at: String,
        /// How long they waited.
        limit: Duration,
    },
    /// NCCL's library cannot be used.
    #[error("no NCCL: {reason}; {remedy}")]
    NoNccl {
        /// The missing part.
        reason: String,
        /// The remedy.
        remedy: String,
    },
    /// A call into NCCL failed.
    #[error("NCCL: {call} failed: {message}")]
    Nccl {
        /// The function.
        call: &'static str,
        /// NCCL's own words.
        message: String,
    },
    /// Ranks cannot reach each other.
    #[error("{what}: {source}")]
    Connection {
        /// The attempt.
        what: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether the request was wrong, as opposed to work that failed.
    #[must_use]
    pub const fn is_usage(&self) -> bool {
        match self {
            Self::Attention(error) => error.is_usage(),
            Self::Invalid { .. }
            | Self::Unsupported { .. }
            | Self::Differs { .. }
            | Self::NoNccl { .. } => true,
            Self::Lost { .. } | Self::Late { .. } | Self::Nccl { .. } | Self::Connection { .. } => {
                false
            }
        }
    }
}

fn ranks_text(ranks: &[usize]) -> String {
    match ranks {
        [] => "a transfer between ranks that are all there".into(),
        [rank] => format!("rank {rank}"),
        ranks => {
            let list: Vec<_> = ranks.iter().map(ToString::to_string).collect();
            format!("ranks {}", list.join(", "))
        }
    }
}
