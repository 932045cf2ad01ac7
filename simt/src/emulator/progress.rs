//! Blocks that work for ever: accesses and switches without progress are counted, and what
//! the threads do when there are too many is the report.

use std::collections::HashMap;

use super::{
    block::Block,
    fault::{FaultKind, Place, Site},
};

/// Accesses that are looked at when the budget is used up, before that is reported.
const WATCHED: u64 = 20_000;
/// Places that the report names.
const NAMED: usize = 3;

/// How often which thread came where, since the budget was used up.
#[derive(Default)]
pub(crate) struct Visits(HashMap<(Place, usize), u64>);

impl Block {
    /// Notes that something has been done that a kernel that ends does only so often.
    #[inline]
    pub fn progress(&mut self) {
        self.idle = 0;
    }

    /// Reports the work of a block whose budget is used up.
    #[cold]
    pub(super) fn spins(&mut self, at: Option<Place>) -> Result<(), FaultKind> {
        if self.idle == self.options.budget + 1 {
            self.visits.0.clear();
        }
        if let Some(at) = at {
            *self.visits.0.entry((at, self.current)).or_default() += 1;
        }
        if self.idle < self.options.budget.saturating_add(WATCHED) {
            return Ok(());
        }
        let mut visits: Vec<_> = self.visits.0.iter().map(|(&key, &count)| (count, key)).collect();
        visits.sort_by_key(|&(count, (at, lane))| (u64::MAX - count, at.line(), lane));
        let busiest: Vec<String> = visits
            .iter()
            .take(NAMED)
            .map(|&(count, (at, lane))| {
                let site = Site { lane: lane as u32, location: Some(at) };
                format!("{site}, {count} times")
            })
            .collect();
        Err(FaultKind::Livelock {
            steps: self.options.budget,
            busiest: busiest.join("; "),
            others: self.what_lanes_do(),
        })
    }
}
