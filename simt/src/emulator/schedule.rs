//! The next event: which ready warp runs, whether a bulk load lands, and which one.

use super::clock::MAX_WARPS;

/// Numbers that look random, the same for the same seed. Source: Steele, Lea and Flood,
/// "Fast splittable pseudorandom number generators", 2014.
#[derive(Clone, Copy, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ stream);
        // Streams that differ in a bit differ in all of them after this.
        random.0 = random.next();
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }
}

/// The next event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The ready lanes of a warp run, from lane `first` on (and round), each until it waits.
    Warp { warp: usize, first: u32, backwards: bool },
    /// A load lands.
    Load,
    /// Nothing can happen.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Warps in turn; a load lands when no lane can go on, the oldest first.
    Forward,
    /// The reverse order: the last warp first, the newest load first.
    Backward,
    /// Any ready warp; loads at any time.
    Any,
    /// Warps, and the copy engine, by priorities that change now and then: someone is late for
    /// long. Source: Burckhardt, Kothari, Musuvathi and Nagarakatte, "A randomized scheduler with
    /// probabilistic guarantees of finding bugs", 2010.
    Priorities,
}

/// Choices from one change of priority to the next, on average.
const PRIORITY_CHANGE: usize = 48;
/// Choices from one early load to the next, on average, where any order will do.
const EARLY_LOAD: usize = 6;
/// The copy engine's place among the priorities.
const COPY_ENGINE: usize = MAX_WARPS;

/// The choices of one cluster.
pub(super) struct Schedule {
    order: Order,
    random: Random,
    /// The warp after the one that ran last.
    cursor: usize,
    priorities: [i64; MAX_WARPS + 1],
    lowest: i64,
}

impl Schedule {
    /// The schedule of cluster `index` under a seed.
    pub fn new(seed: u64, index: u64) -> Self {
        let mut random = Random::new(seed, index);
        let order = match seed {
            0 => Order::Forward,
            1 => Order::Backward,
            s if s % 2 == 0 => Order::Any,
            _ => Order::Priorities,
        };
        let priorities = std::array::from_fn(|_| (random.next() >> 1) as i64);
        Self { order, random, cursor: 0, priorities, lowest: -1 }
    }

    /// Chooses, where `ready` has a mask of ready lanes for each warp, and `loads` says whether
    /// any load is on its way.
    pub fn next(&mut self, ready: &[u32], loads: bool) -> Next {
        let nobody = if loads { Next::Load } else { Next::Nothing };
        let warps = ready.len();
        match self.order {
            Order::Forward => {
                let found = (0..warps).map(|i| (self.cursor + i) % warps).find(|&w| ready[w] != 0);
                let Some(warp) = found else { return nobody };
                self.cursor = (warp + 1) % warps;
                Next::Warp { warp, first: 0, backwards: false }
            }
            Order::Backward => {
                let found =
                    (1..=warps).map(|i| (self.cursor + warps - i) % warps).find(|&w| ready[w] != 0);
                let Some(warp) = found else { return nobody };
                self.cursor = warp;
                Next::Warp { warp, first: 31, backwards: true }
            }
            Order::Any => {
                let count = ready.iter().filter(|&&mask| mask != 0).count();
                if count == 0 || loads && self.random.below(EARLY_LOAD) == 0 {
                    return nobody;
                }
                let chosen = self.random.below(count);
                let warp = ready.iter().enumerate().filter(|(_, mask)| **mask != 0).nth(chosen);
                self.warp(warp.map_or(0, |(warp, _)| warp))
            }
            Order::Priorities => {
                let ready = (0..warps).filter(|&w| ready[w] != 0);
                let engine = loads.then_some(COPY_ENGINE);
                let Some(chosen) = ready.chain(engine).max_by_key(|&who| self.priorities[who])
                else {
                    return Next::Nothing;
                };
                if self.random.below(PRIORITY_CHANGE) == 0 {
                    self.priorities[chosen] = self.lowest;
                    self.lowest -= 1;
                }
                if chosen == COPY_ENGINE { Next::Load } else { self.warp(chosen) }
            }
        }
    }

    fn warp(&mut self, warp: usize) -> Next {
        let bits = self.random.next();
        Next::Warp { warp, first: bits as u32 % 32, backwards: bits >> 32 & 1 == 1 }
    }

    /// The next of `count` loads to land, oldest first.
    pub fn load(&mut self, count: usize) -> usize {
        match self.order {
            Order::Forward => 0,
            Order::Backward => count - 1,
            Order::Any | Order::Priorities => self.random.below(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seed: u64, choices: usize) -> Vec<Next> {
        let mut schedule = Schedule::new(seed, 0);
        (0..choices).map(|_| schedule.next(&[1, 0, 1, 1], true)).collect()
    }

    fn warps(choices: &[Next]) -> Vec<usize> {
        let warp = |next: &Next| match next {
            Next::Warp { warp, .. } => Some(*warp),
            _ => None,
        };
        choices.iter().filter_map(warp).collect()
    }

    #[test]
    fn in_order_and_backwards() {
        assert_eq!(warps(&run(0, 4)), [0, 2, 3, 0]);
        assert_eq!(warps(&run(1, 4)), [3, 2, 0, 3]);
        for seed in [0, 1] {
            let mut schedule = Schedule::new(seed, 0);
            assert_eq!(schedule.next(&[0, 0], true), Next::Load);
            assert_eq!(schedule.next(&[0, 0], false), Next::Nothing);
            assert_eq!(schedule.load(3), if seed == 0 { 0 } else { 2 });
        }
    }

    #[test]
    fn other_seeds_differ_repeat_and_leave_nobody_out() {
        for seed in 2..8 {
            let choices = run(seed, 4000);
            assert_eq!(choices, run(seed, 4000));
            assert_ne!(choices, run(seed + 1, 4000));
            for warp in [0, 2, 3] {
                assert!(warps(&choices).contains(&warp), "seed {seed}: warp {warp} never runs");
            }
            assert!(!warps(&choices).contains(&1), "seed {seed}: a warp that is not ready runs");
            assert!(choices.contains(&Next::Load), "seed {seed}: no load lands early");
        }
    }

    #[test]
    fn somebody_is_late_for_long_under_priorities() {
        let longest = |seed| {
            let choices = run(seed, 4000);
            let mut gap = 0;
            choices.split(|next| matches!(next, Next::Warp { warp: 2, .. })).for_each(|others| {
                gap = gap.max(others.len());
            });
            gap
        };
        assert!(longest(3) > 100, "{}", longest(3));
    }
}
