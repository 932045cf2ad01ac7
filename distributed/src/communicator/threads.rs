//! Ranks that are threads of one process: on emulators of their own, or on streams of one GPU.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Communicator, Direction, Transfer};
use crate::{engine::Engine, error::Error, peers::Peers};

/// The channel between two ranks: the offer of one to the other, with its length, and the reply.
struct Mail<E: Engine> {
    parcels: VecDeque<(E::Parcel, u64)>,
    receipts: VecDeque<E::Receipt>,
}

/// The mail of all pairs of ranks, `(from, to)`.
type Post<E> = Mutex<HashMap<(usize, usize), Mail<E>>>;

/// A rank of one process. A transfer is a copy by the rank that receives.
pub struct ThreadCommunicator<E: Engine> {
    peers: Peers,
    post: Arc<Post<E>>,
}

impl<E: Engine> fmt::Debug for ThreadCommunicator<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadCommunicator").field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl<E: Engine> ThreadCommunicator<E> {
    /// The ranks, to be given to a thread each. A rank may keep the others waiting for `limit`.
    #[must_use]
    pub fn ranks(world: usize, limit: Duration) -> Vec<Self> {
        let post = Arc::new(Mutex::default());
        let peers = Peers::of_threads(world, limit).into_iter();
        peers.map(|peers| Self { peers, post: Arc::clone(&post) }).collect()
    }

    fn post(&self) -> MutexGuard<'_, HashMap<(usize, usize), Mail<E>>> {
        // Each change is complete before anything can panic.
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_mail<T>(&self, from: usize, to: usize, change: impl FnOnce(&mut Mail<E>) -> T) -> T {
        let mut post = self.post();
        let mail = post
            .entry((from, to))
            .or_insert_with(|| Mail { parcels: VecDeque::new(), receipts: VecDeque::new() });
        change(mail)
    }

    /// The value that another rank has put there, once it has.
    fn take<T>(&self, peer: usize, look: impl Fn() -> Option<T>) -> Result<T, Error> {
        let begin = Instant::now();
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            if let Err(error) = self.peers.check_rank(peer) {
                // It may have come before its sender left.
                return look().ok_or(error);
            }
            if begin.elapsed() > self.peers.limit() {
                return Err(self.peers.late());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

impl<E: Engine> Communicator<E> for ThreadCommunicator<E> {
    fn peers(&self) -> &Peers {
        &self.peers
    }

    unsafe fn exchange(&self, engine: &E, transfers: &[Transfer]) -> Result<(), Error> {
        let own = self.peers.rank();
        self.peers.reach();
        let is = |direction| transfers.iter().filter(move |t: &&Transfer| t.direction == direction);
        for &Transfer { peer, region, .. } in is(Direction::Send) {
            // SAFETY: the region is live until the lane has passed the transfer, as `exchange`
            // asks.
            let parcel = unsafe { engine.offer(region) }?;
            self.with_mail(own, peer, |mail| mail.parcels.push_back((parcel, region.bytes)));
        }
        for &Transfer { peer, region, .. } in is(Direction::Receive) {
            let next = || self.with_mail(peer, own, |mail| mail.parcels.pop_front());
            let (parcel, bytes) = self.take(peer, next)?;
            if bytes != region.bytes {
                return Err(Error::Differs {
                    rank: peer,
                    what: "the bytes of a transfer".into(),
                    theirs: bytes.to_string(),
                    ours: region.bytes.to_string(),
                });
            }
            // SAFETY: the region is live, and the other rank sends as many bytes, as `exchange`
            // asks.
            let receipt = unsafe { engine.accept(&parcel, region) }?;
            self.with_mail(peer, own, |mail| mail.receipts.push_back(receipt));
        }
        for &Transfer { peer, .. } in is(Direction::Send) {
            let receipt =
                self.take(peer, || self.with_mail(own, peer, |mail| mail.receipts.pop_front()))?;
            engine.settle(receipt)?;
        }
        Ok(())
    }
}
