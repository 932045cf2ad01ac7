//! The known state of all ranks.

use std::{
    collections::BTreeMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The longest sleep between two looks: a rank that stands still says nothing.
const LOOK: Duration = Duration::from_millis(20);

/// A message of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Its bytes of a meeting.
    Said { round: u64, bytes: Vec<u8> },
    /// It is there, and has begun as many exchanges.
    Reached(u64),
    /// It is lost.
    Lost(String),
    /// It has done its work.
    Left,
}

#[derive(Debug)]
struct Rank {
    said: BTreeMap<u64, Vec<u8>>,
    reached: u64,
    heard: Instant,
    lost: Option<String>,
    left: bool,
}

#[derive(Debug)]
pub(super) struct Board {
    ranks: Mutex<Vec<Rank>>,
    changed: Condvar,
    /// The rank whose copy it is; none if all ranks share it, and nobody needs to be heard of.
    of: Option<usize>,
}

impl Board {
    pub(super) fn new(world: usize, of: Option<usize>) -> Self {
        let rank = |_| Rank {
            said: BTreeMap::new(),
            reached: 0,
            heard: Instant::now(),
            lost: None,
            left: false,
        };
        Self { ranks: Mutex::new((0..world).map(rank).collect()), changed: Condvar::new(), of }
    }

    fn ranks(&self) -> MutexGuard<'_, Vec<Rank>> {
        // Each change is complete before anything can panic.
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn apply(&self, rank: usize, event: Event) {
        let mut ranks = self.ranks();
        let Some(of) = ranks.get_mut(rank) else { return };
        of.heard = Instant::now();
        match event {
            Event::Said { round, bytes } => {
                of.said.insert(round, bytes);
                // All have passed the meeting before the last when one comes to the next.
                of.said.retain(|&old, _| old + 2 > round);
            }
            Event::Reached(exchange) => of.reached = exchange,
            Event::Lost(reason) if !of.left => _ = of.lost.get_or_insert(reason),
            Event::Lost(_) => {}
            Event::Left => of.left = true,
        }
        drop(ranks);
        self.changed.notify_all();
    }

    /// The words of all ranks in a meeting, once all have spoken.
    pub(super) fn said(&self, round: u64) -> Option<Vec<Vec<u8>>> {
        self.ranks().iter().map(|rank| rank.said.get(&round).cloned()).collect()
    }

    /// Who has said nothing in a meeting yet.
    pub(super) fn silent(&self, round: u64) -> Vec<usize> {
        self.those(|rank| !rank.said.contains_key(&round))
    }

    /// Who has come least far, if not as far as `own`, and the exchange that they did not come to.
    pub(super) fn last(&self, own: u64) -> (Vec<usize>, u64) {
        let least = self.ranks().iter().map(|rank| rank.reached).min().unwrap_or(own).min(own);
        (self.those(|rank| rank.reached == least && least < own), (least + 1).min(own))
    }

    fn those(&self, which: impl Fn(&Rank) -> bool) -> Vec<usize> {
        let ranks = self.ranks();
        ranks.iter().enumerate().filter(|(_, rank)| which(rank)).map(|(at, _)| at).collect()
    }

    /// Why a rank is lost, if it is: it may say nothing for `most`.
    pub(super) fn lost(&self, rank: usize, most: Duration) -> Option<String> {
        let ranks = self.ranks();
        let of = &ranks[rank];
        let silence = of.heard.elapsed();
        // Once rank 0 has left, nobody passes on what the others say.
        let may_be_silent = of.left || ranks[0].left;
        let is_heard = self.of.is_none_or(|own| own == rank) || may_be_silent || silence <= most;
        let silent = || (!is_heard).then(|| format!("has said nothing for {silence:.1?}"));
        of.lost.clone().or_else(silent)
    }

    pub(super) fn has_left(&self, rank: usize) -> bool {
        self.ranks()[rank].left
    }

    /// Waits until something is said, or a little.
    pub(super) fn wait(&self) {
        drop(self.changed.wait_timeout(self.ranks(), LOOK));
    }
}
