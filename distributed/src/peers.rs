//! Messages between ranks on the host: their arguments, their progress, and their signs of life. No
//! message goes through a GPU.
//!
//! Threads of one process share a board. Each process has a copy of the board, which connections to
//! rank 0 keep in step: a rank sends its messages to rank 0, which relays them. A process that ends
//! closes its connection, so the others know at once. A process that hangs sends no message for the
//! time limit.

mod board;
mod relay;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::error::Error;
use board::{Board, Event};
use relay::Relay;

/// The default time limit.
pub const TIME_LIMIT: Duration = Duration::from_secs(60);

/// One rank's line to the others.
#[derive(Debug)]
pub struct Peers {
    rank: usize,
    world: usize,
    limit: Duration,
    /// How long a process may say nothing: longer than between two signs of life, whatever the limit.
    silence: Duration,
    board: Arc<Board>,
    relay: Option<Relay>,
    round: AtomicU64,
    reached: Arc<AtomicU64>,
}

impl Peers {
    /// The ranks of one process, to be given to a thread each.
    #[must_use]
    pub fn of_threads(world: usize, limit: Duration) -> Vec<Self> {
        let board = Arc::new(Board::new(world, None));
        let peers = |rank| Self::new(rank, world, limit, board.clone());
        (0..world).map(peers).collect()
    }

    /// Rank `rank` of `world` processes, which meet at `address` (`host:port`), where rank 0 listens.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank beyond the last; [`Error::Connection`] and [`Error::Late`] where the
    /// ranks do not meet within the limit.
    pub fn connect(
        rank: usize,
        world: usize,
        address: &str,
        limit: Duration,
    ) -> Result<Self, Error> {
        if rank >= world {
            let remedy = format!("with {world} ranks it is below {world}");
            return Err(Error::Invalid { what: "rank", given: rank.to_string(), remedy });
        }
        let board = Arc::new(Board::new(world, Some(rank)));
        let reached = Arc::new(AtomicU64::new(0));
        let relay = match (world, rank) {
            (1, _) => None,
            (_, 0) => Some(Relay::listen(address, world, &board, &reached, limit)?),
            _ => Some(Relay::call(address, [rank, world], &board, &reached, limit)?),
        };
        let mut peers = Self::new(rank, world, limit, board);
        (peers.relay, peers.reached) = (relay, reached);
        Ok(peers)
    }

    /// As [`Peers::connect`], from what launchers as torchrun set: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, and
    /// `MASTER_PORT`, whose successor is used, since the launcher itself listens there.
    ///
    /// # Errors
    /// [`Error::Invalid`] names a variable that is missing or no number; as [`Peers::connect`].
    pub fn from_environment(limit: Duration) -> Result<Self, Error> {
        let (rank, world, address) = of_variables(|name| std::env::var(name).ok())?;
        Self::connect(rank, world, &address, limit)
    }

    fn new(rank: usize, world: usize, limit: Duration, board: Arc<Board>) -> Self {
        let (round, reached) = (AtomicU64::new(0), Arc::default());
        let silence = limit.max(4 * relay::BEAT);
        Self { rank, world, limit, silence, board, relay: None, round, reached }
    }

    /// This rank.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    #[must_use]
    pub const fn world(&self) -> usize {
        self.world
    }

    /// The time limit for a rank that keeps the others waiting.
    #[must_use]
    pub const fn limit(&self) -> Duration {
        self.limit
    }

    fn say(&self, event: Event) {
        if let Some(relay) = &self.relay {
            relay.say(self.rank, &event);
        }
        self.board.apply(self.rank, event);
    }

    /// The bytes of every rank, by rank: all ranks call it, and each gets all of them.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Late`] names a rank that does not come.
    pub fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let round = self.round.fetch_add(1, Relaxed);
        self.say(Event::Said { round, bytes: bytes.to_vec() });
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(all) = self.board.said(round) {
                return Ok(all);
            }
            let missing = self.board.silent(round);
            for &rank in &missing {
                let is_there = self.check_rank(rank);
                // A rank that speaks and leaves between two looks has spoken.
                if self.board.silent(round).contains(&rank) {
                    is_there?;
                }
            }
            if Instant::now() >= deadline {
                let at = format!("meeting {}", round + 1);
                return Err(Error::Late { ranks: missing, at, limit: self.limit });
            }
            self.board.wait();
        }
    }

    /// Compares named values with the values of all ranks.
    ///
    /// # Errors
    /// [`Error::Differs`] with the first that is not the same everywhere, on every rank; as
    /// [`Peers::gather`].
    pub fn agree(&self, values: &[(&str, String)]) -> Result<(), Error> {
        let text: Vec<_> = values.iter().map(|(what, value)| format!("{what}\t{value}")).collect();
        let all = self.gather(text.join("\n").as_bytes())?;
        let parsed: Vec<String> =
            all.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
        for (rank, theirs) in parsed.iter().enumerate() {
            let mut ours = text.iter();
            for line in theirs.split('\n') {
                let ours = ours.next().map_or("", String::as_str);
                if line == ours {
                    continue;
                }
                let (what, theirs) = line.split_once('\t').unwrap_or((line, ""));
                let ours = ours.split_once('\t').map_or(ours, |(_, value)| value);
                return Err(Error::Differs {
                    rank,
                    what: what.into(),
                    theirs: theirs.into(),
                    ours: ours.into(),
                });
            }
        }
        Ok(())
    }

    /// Says that this rank begins its next exchange, by the number of it. Other processes hear of it with
    /// the next sign of life, four times a second: this costs no call to the system.
    pub fn reach(&self) -> u64 {
        let exchange = self.reached.fetch_add(1, Relaxed) + 1;
        self.board.apply(self.rank, Event::Reached(exchange));
        exchange
    }

    /// The number of exchanges that this rank has begun.
    #[must_use]
    pub fn reached(&self) -> u64 {
        self.reached.load(Relaxed)
    }

    /// Whether all ranks are there.
    ///
    /// # Errors
    /// [`Error::Lost`] names one that is not.
    pub fn check(&self) -> Result<(), Error> {
        (0..self.world).try_for_each(|rank| match self.board.lost(rank, self.silence) {
            Some(reason) => Err(Error::Lost { rank, reason }),
            None => Ok(()),
        })
    }

    /// As [`Peers::check`], of a rank that something is still expected of: it must not have left either.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn check_rank(&self, rank: usize) -> Result<(), Error> {
        self.check()?;
        if self.board.has_left(rank) {
            let reason = "has left before the work was done".into();
            return Err(Error::Lost { rank, reason });
        }
        Ok(())
    }

    /// The error of a wait that took longer than the limit: it names the ranks that have come least far,
    /// unless this is one of them.
    #[must_use]
    pub fn late(&self) -> Error {
        let (ranks, next) = self.board.last(self.reached());
        Error::Late { ranks, at: format!("exchange {next}"), limit: self.limit }
    }

    /// Tells the others that this rank cannot go on.
    pub fn give_up(&self, reason: &str) {
        self.say(Event::Lost(format!("gave up: {reason}")));
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        let event =
            if std::thread::panicking() { Event::Lost("panicked".into()) } else { Event::Left };
        self.say(event);
    }
}

/// Rank, world and address from a launcher's variables.
fn of_variables(
    get: impl Fn(&'static str) -> Option<String>,
) -> Result<(usize, usize, String), Error> {
    let number = |what: &'static str, default: Option<&str>| {
        let given = get(what).or(default.map(Into::into)).unwrap_or_default();
        given.parse::<usize>().map_err(|_| {
            let remedy = "launchers as torchrun set this variable to a number".into();
            Error::Invalid { what, given: format!("'{given}'"), remedy }
        })
    };
    let [rank, world] = [number("RANK", None)?, number("WORLD_SIZE", None)?];
    let host = get("MASTER_ADDR").unwrap_or_else(|| "127.0.0.1".into());
    let port = number("MASTER_PORT", Some("29500"))?;
    if port >= usize::from(u16::MAX) {
        let remedy = "the port after it is used: at most 65534".into();
        return Err(Error::Invalid { what: "MASTER_PORT", given: port.to_string(), remedy });
    }
    Ok((rank, world, format!("{host}:{}", port + 1)))
}

#[cfg(test)]
mod tests;
