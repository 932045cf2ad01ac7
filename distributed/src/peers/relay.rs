//! Connections of processes: everybody's to rank 0, which passes on what it hears.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use super::board::{Board, Event};
use crate::error::Error;

/// Between two signs of life.
pub(super) const BEAT: Duration = Duration::from_millis(250);
/// The longest frame: nobody says as much.
const MOST_BYTES: u32 = 16 << 20;
/// The first bytes of a connection, and the version of the protocol.
const HELLO: &[u8; 8] = b"fa-rank1";

/// The other ends that a rank speaks to: all ranks for rank 0, rank 0 for the others.
type Ends = Mutex<Vec<(usize, TcpStream)>>;

/// A rank's connections.
#[derive(Debug)]
pub(super) struct Relay {
    ends: Arc<Ends>,
    ended: Arc<AtomicBool>,
}

impl Relay {
    /// Rank 0's: waits for all others.
    pub(super) fn listen(
        address: &str,
        world: usize,
        board: &Arc<Board>,
        reached: &Arc<AtomicU64>,
        limit: Duration,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Connection { what: format!("listening at {address}"), source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let deadline = Instant::now() + limit;
        let mut ends: Vec<(usize, TcpStream)> = Vec::new();
        while ends.len() + 1 < world {
            match listener.accept() {
                // Whoever is none of the ranks is not listened to.
                Ok((end, _)) => ends.extend(welcome(end, world, deadline).filter(|(rank, _)| {
                    *rank > 0 && *rank < world && ends.iter().all(|(other, _)| other != rank)
                })),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        let ranks = (1..world).filter(|r| ends.iter().all(|(other, _)| other != r));
                        let at = address.to_owned();
                        return Err(Error::Late { ranks: ranks.collect(), at, limit });
                    }
                    thread::sleep(Duration::from_millis(2));
                }
                Err(source) => return Err(failed(source)),
            }
        }
        Self::start(0, ends, board, reached).map_err(failed)
    }

    /// Another rank's.
    pub(super) fn call(
        address: &str,
        [rank, world]: [usize; 2],
        board: &Arc<Board>,
        reached: &Arc<AtomicU64>,
        limit: Duration,
    ) -> Result<Self, Error> {
        let failed =
            |source| Error::Connection { what: format!("calling rank 0 at {address}"), source };
        let deadline = Instant::now() + limit;
        let connect = || {
            let mut last = io::ErrorKind::NotFound.into();
            for at in address.to_socket_addrs()? {
                let left = deadline.saturating_duration_since(Instant::now());
                match TcpStream::connect_timeout(&at, left.max(Duration::from_millis(1))) {
                    Ok(end) => return Ok(end),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        loop {
            match connect() {
                Ok(mut end) => {
                    let hello = [&HELLO[..], &number(rank), &number(world)].concat();
                    end.write_all(&hello).map_err(failed)?;
                    return Self::start(rank, vec![(0, end)], board, reached).map_err(failed);
                }
                Err(error) if Instant::now() >= deadline => return Err(failed(error)),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Listens to every end, and gives signs of life.
    fn start(
        rank: usize,
        ends: Vec<(usize, TcpStream)>,
        board: &Arc<Board>,
        reached: &Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let mut readers = Vec::new();
        for (other, end) in &ends {
            end.set_nodelay(true)?;
            // A rank that reads nothing any more must not stop this one.
            end.set_write_timeout(Some(Duration::from_secs(2)))?;
            end.set_read_timeout(None)?;
            readers.push((*other, end.try_clone()?));
        }
        let relay = Self { ends: Arc::new(Mutex::new(ends)), ended: Arc::default() };
        for (other, end) in readers {
            let (board, ends) = (board.clone(), Arc::downgrade(&relay.ends));
            thread::spawn(move || listen_to(other, end, &board, &ends, rank == 0));
        }
        let (ends, ended) = (Arc::downgrade(&relay.ends), relay.ended.clone());
        let reached = reached.clone();
        thread::spawn(move || {
            while !ended.load(Relaxed)
                && let Some(ends) = ends.upgrade()
            {
                send(&ends, rank, &Event::Reached(reached.load(Relaxed)), None);
                drop(ends);
                thread::sleep(BEAT);
            }
        });
        Ok(relay)
    }

    pub(super) fn say(&self, rank: usize, event: &Event) {
        send(&self.ends, rank, event, None);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
        for (_, end) in self.ends.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // Earlier words are still delivered, and the words of others are still read until they end.
            _ = end.shutdown(Shutdown::Write);
        }
    }
}

/// The rank that a connection is from.
fn welcome(mut end: TcpStream, world: usize, deadline: Instant) -> Option<(usize, TcpStream)> {
    end.set_nonblocking(false).ok()?;
    let left = deadline.saturating_duration_since(Instant::now());
    end.set_read_timeout(Some(left.clamp(Duration::from_millis(1), Duration::from_secs(5))))
        .ok()?;
    let mut hello = [0; 16];
    end.read_exact(&mut hello).ok()?;
    let number = |at: usize| {
        let bytes = [hello[at], hello[at + 1], hello[at + 2], hello[at + 3]];
        u32::from_le_bytes(bytes) as usize
    };
    (hello[..8] == *HELLO && number(12) == world).then(|| (number(8), end))
}

fn number(n: usize) -> [u8; 4] {
    (n as u32).to_le_bytes()
}

/// Hears a rank until it ends.
fn listen_to(other: usize, mut end: TcpStream, board: &Board, ends: &Weak<Ends>, passes_on: bool) {
    let heard = |from: usize, event: Event| {
        if passes_on && let Some(ends) = ends.upgrade() {
            send(&ends, from, &event, Some(other));
        }
        board.apply(from, event);
    };
    while let Ok((from, event)) = receive(&mut end) {
        // Rank 0 passes on what others say; the others speak for themselves.
        heard(if passes_on { other } else { from }, event);
    }
    heard(other, Event::Lost("closed its connection: its process has ended".into()));
}

/// Sends an event to all ends but one.
fn send(ends: &Ends, rank: usize, event: &Event, but: Option<usize>) {
    let (kind, value, bytes): (u8, u64, &[u8]) = match event {
        Event::Said { round, bytes } => (0, *round, bytes),
        Event::Reached(exchange) => (1, *exchange, &[]),
        Event::Lost(reason) => (3, 0, reason.as_bytes()),
        Event::Left => (4, 0, &[]),
    };
    let frame =
        [&[kind], &number(rank)[..], &value.to_le_bytes(), &number(bytes.len()), bytes].concat();
    let ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
    for (_, mut end) in ends.iter().filter(|(other, _)| Some(*other) != but).map(|(r, e)| (r, e)) {
        // An end that is gone is noticed by its reader.
        _ = end.write_all(&frame);
    }
}

fn receive(end: &mut TcpStream) -> io::Result<(usize, Event)> {
    let mut head = [0; 17];
    end.read_exact(&mut head)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (rank, length) = (word(1) as usize, word(13));
    let value = u64::from(word(5)) | u64::from(word(9)) << 32;
    if length > MOST_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length as usize];
    end.read_exact(&mut bytes)?;
    let event = match head[0] {
        0 => Event::Said { round: value, bytes },
        1 => Event::Reached(value),
        3 => Event::Lost(String::from_utf8_lossy(&bytes).into_owned()),
        4 => Event::Left,
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    Ok((rank, event))
}
