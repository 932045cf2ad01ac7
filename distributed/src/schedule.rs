//! The rows of each rank, and the parts of attention that a rank computes at each step: plain
//! functions of numbers, the same for every device.
//!
//! ```text
//! rows of a sequence in 2 W chunks, W = 4:   0 1 2 3 4 5 6 7
//! contiguous: rank r holds chunks 2r, 2r+1   0 0 1 1 2 2 3 3
//! zigzag: chunks r and 2 W - 1 - r           0 1 2 3 3 2 1 0
//! ```
//!
//! Causal attention gives the last rows all the work. In zigzag order each rank has a chunk of the
//! beginning and its counterpart of the end, and all have as many pairs of row and key to compute in
//! every step of the ring.

use std::ops::Range;

use flash_attention::Window;

/// How ranks share the work: `heads * context` of them. Rank `c * heads + h` has the heads' share `h`
/// and the context's share `c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Ranks that divide heads between them (Ulysses: all-to-all before and after the kernel).
    pub heads: usize,
    /// Groups that divide the keys between them (ring).
    pub context: usize,
}

impl Grid {
    /// All ranks divide the heads.
    #[must_use]
    pub const fn of_heads(ranks: usize) -> Self {
        Self { heads: ranks, context: 1 }
    }

    /// All ranks divide the context.
    #[must_use]
    pub const fn of_context(ranks: usize) -> Self {
        Self { heads: 1, context: ranks }
    }

    /// The number of ranks.
    #[must_use]
    pub const fn ranks(self) -> usize {
        self.heads * self.context
    }

    /// A rank's share of the heads and of the context.
    #[must_use]
    pub const fn place(self, rank: usize) -> (usize, usize) {
        (rank % self.heads, rank / self.heads)
    }

    /// The rank of a place.
    #[must_use]
    pub const fn rank(self, head: usize, context: usize) -> usize {
        context * self.heads + head
    }
}

/// The order that assigns the rows of a sequence to the members of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Rows that follow each other.
    Contiguous,
    /// A chunk of the beginning and its counterpart of the end: balances causal attention.
    Zigzag,
}

impl Order {
    /// The order that balances attention with the given window.
    #[must_use]
    pub const fn of(window: Window) -> Self {
        match window {
            Window { left: None, right: Some(_) } => Self::Zigzag,
            _ => Self::Contiguous,
        }
    }

    /// The chunks that member `c` of `members` holds, in the order of its memory, and how many there
    /// are in all.
    #[must_use]
    pub fn chunks(self, members: usize, c: usize) -> (Vec<usize>, usize) {
        match self {
            // One member has everything: nothing to cut.
            _ if members == 1 => (vec![0], 1),
            Self::Contiguous => (vec![c], members),
            Self::Zigzag => (vec![c, 2 * members - 1 - c], 2 * members),
        }
    }
}

/// Part `c` of `count` parts of `n` rows, which differ by one row at most.
#[must_use]
pub const fn chunk(n: usize, count: usize, c: usize) -> Range<usize> {
    n * c / count..n * (c + 1) / count
}

/// Rows that follow each other in a sequence and in a member's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// In the member's memory.
    pub local: Range<usize>,
    /// The first in the sequence.
    pub first: usize,
}

/// The segments of `n` rows that a member of the ring holds.
#[must_use]
pub fn segments(n: usize, order: Order, members: usize, c: usize) -> Vec<Segment> {
    let (chunks, count) = order.chunks(members, c);
    let mut end = 0;
    let segment = |at: usize| {
        let rows = chunk(n, count, at);
        let local = end..end + rows.len();
        end = local.end;
        Segment { local, first: rows.start }
    };
    chunks.into_iter().map(segment).filter(|segment| !segment.local.is_empty()).collect()
}

/// Attention of some rows over some keys of a block, both by their place in the memory of their
/// holder: a separate problem, whose window is aligned to the bottom right like every window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Rows.
    pub rows: Range<usize>,
    /// Keys.
    pub keys: Range<usize>,
    /// The window of a row, without bounds that hide no key.
    pub window: Window,
}

impl Part {
    /// Pairs of row and key that are computed.
    #[must_use]
    pub fn pairs(&self) -> u64 {
        self.window.visible_pairs(self.rows.len(), self.keys.len())
    }

    fn is_full(&self) -> bool {
        self.window == Window::default()
    }
}

/// The parts of a member's rows over the keys of one member, in a problem of `seq_q` rows and `seq_k`
/// keys.
#[must_use]
pub fn parts(
    rows: &[Segment],
    keys: &[Segment],
    window: Window,
    [seq_q, seq_k]: [usize; 2],
) -> Vec<Part> {
    let causal = Window { left: None, right: Some(0) };
    if window == causal && seq_q == seq_k && rows == keys && !rows.is_empty() {
        // Its own keys: what lies earlier in the sequence lies earlier in memory.
        let all = 0..rows[rows.len() - 1].local.end;
        let window = window.without_idle_bounds(all.len(), all.len());
        return vec![Part { rows: all.clone(), keys: all, window }];
    }
    let shift = seq_k as i64 - seq_q as i64;
    let mut parts: Vec<Part> = Vec::new();
    for (q, k) in rows.iter().flat_map(|q| keys.iter().map(move |k| (q, k))) {
        let Some(part) = part_of(q, k, window, shift) else { continue };
        // Whole neighbours are one problem.
        let joined = parts.iter_mut().rev().find(|other| {
            let keys_follow = other.rows == part.rows && other.keys.end == part.keys.start;
            let rows_follow = other.keys == part.keys && other.rows.end == part.rows.start;
            other.is_full() && part.is_full() && (keys_follow || rows_follow)
        });
        match joined {
            Some(other) => {
                other.rows = other.rows.start..part.rows.end;
                other.keys = other.keys.start..part.keys.end;
            }
            None => parts.push(part),
        }
    }
    // Two pairs of neighbours that were joined along the keys may be neighbours along the rows.
    if let [a, b] = &parts[..]
        && a.is_full()
        && b.is_full()
        && a.keys == b.keys
        && a.rows.end == b.rows.start
    {
        let (rows, keys) = (a.rows.start..b.rows.end, a.keys.clone());
        parts = vec![Part { rows, keys, window: Window::default() }];
    }
    parts
}

/// The part of one segment of rows over one segment of keys: without the rows that see none of the keys
/// and the keys that no row sees at the ends, so that the window is one aligned to the bottom right.
fn part_of(q: &Segment, k: &Segment, window: Window, shift: i64) -> Option<Part> {
    let span = |segment: &Segment, shift: i64| {
        let first = segment.first as i64 + shift;
        [first, first + segment.local.len() as i64]
    };
    // Where rows and keys stand in the sequence of the keys.
    let ([q_first, q_last], [k_first, k_last]) = (span(q, shift), span(k, 0));
    let ([mut q0, mut q1], [mut k0, mut k1]) = ([q_first, q_last], [k_first, k_last]);
    if let Some(right) = window.right.map(i64::from) {
        k1 = k1.min(q1 + right);
        q0 = q0.max(k0 - right);
    }
    if let Some(left) = window.left.map(i64::from) {
        q1 = q1.min(k1 + left);
        k0 = k0.max(q0 - left);
    }
    if q0 >= q1 || k0 >= k1 {
        return None;
    }
    let behind = q1 - k1;
    let bound = |bound: Option<u32>, by: i64| bound.map(|b| (i64::from(b) + by) as u32);
    let window = Window { left: bound(window.left, -behind), right: bound(window.right, behind) };
    let local = |segment: &Segment, first: i64, [from, to]: [i64; 2]| {
        let place = |at: i64| segment.local.start + (at - first) as usize;
        place(from)..place(to)
    };
    let (rows, keys) = (local(q, q_first, [q0, q1]), local(k, k_first, [k0, k1]));
    let window = window.without_idle_bounds(rows.len(), keys.len());
    Some(Part { rows, keys, window })
}

/// The member whose keys member `c` has at a step of the ring: each passes its block on to the next.
#[must_use]
pub const fn source(members: usize, c: usize, step: usize) -> usize {
    (c + members - step % members) % members
}

/// The change to the sum of O after a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joins {
    /// No part before had any of its rows: there is no sum yet.
    pub first: bool,
    /// No part after has any of its rows: the result is written.
    pub last: bool,
}

/// The way in which the parts of a member join, by the rows of each in the order of computation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merges {
    /// For each part.
    pub joins: Vec<Joins>,
    /// Whether all rows begin with an empty sum: some would else have none when a part joins, or never.
    pub begin_empty: bool,
    /// Rows whose sum is written at the end.
    pub finish: Vec<Range<usize>>,
}

impl Merges {
    /// The merges of parts with these rows, of `n` rows.
    #[must_use]
    pub fn of(n: usize, parts: &[Range<usize>]) -> Self {
        let meets = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
        let covered = |by: &[Range<usize>], rows: &Range<usize>| {
            rows.clone().all(|i| by.iter().any(|part| part.contains(&i)))
        };
        // Only where parts begin or end does anything change.
        let mut cuts: Vec<usize> = parts.iter().flat_map(|r| [r.start, r.end]).collect();
        cuts.extend([0, n]);
        cuts.sort_unstable();
        cuts.dedup();
        let pieces: Vec<Range<usize>> = cuts.windows(2).map(|at| at[0]..at[1]).collect();
        let has = |by: &[Range<usize>], piece: &Range<usize>| {
            covered(by, &(piece.start..piece.start + 1))
        };
        let begin_empty = pieces.iter().any(|piece| !has(parts, piece))
            || parts.iter().enumerate().any(|(at, part)| {
                let of_part = pieces.iter().filter(|piece| meets(part, piece));
                let before = of_part.filter(|piece| has(&parts[..at], piece)).count();
                before > 0 && before < pieces.iter().filter(|piece| meets(part, piece)).count()
            });
        let joins: Vec<Joins> = parts
            .iter()
            .enumerate()
            .map(|(at, part)| Joins {
                first: !begin_empty && !parts[..at].iter().any(|other| meets(other, part)),
                last: !parts[at + 1..].iter().any(|other| meets(other, part)),
            })
            .collect();
        let written: Vec<_> =
            parts.iter().zip(&joins).filter(|(_, j)| j.last).map(|(r, _)| r.clone()).collect();
        let mut finish: Vec<Range<usize>> = Vec::new();
        for piece in pieces.into_iter().filter(|piece| !has(&written, piece)) {
            match finish.last_mut() {
                Some(before) if before.end == piece.start => before.end = piece.end,
                _ => finish.push(piece),
            }
        }
        Self { joins, begin_empty, finish }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOWS: [Window; 6] = [
        Window { left: None, right: None },
        Window { left: None, right: Some(0) },
        Window { left: Some(5), right: Some(0) },
        Window { left: Some(0), right: Some(3) },
        Window { left: None, right: Some(7) },
        Window { left: Some(40), right: None },
    ];

    /// Over all steps, every pair of row and key that the problem has is in exactly one part of the
    /// rank that holds the row, for every order, window, and lengths that divide evenly or not.
    #[test]
    fn parts_are_the_problem_cut() {
        for (members, order, window) in (1..=8).flat_map(|w| {
            let orders = [Order::Contiguous, Order::Zigzag];
            orders.into_iter().flat_map(move |o| WINDOWS.map(|window| (w, o, window)))
        }) {
            for [seq_q, seq_k] in [[32, 32], [37, 37], [5, 5], [20, 37], [37, 20]] {
                let mut seen = vec![0; seq_q * seq_k];
                for c in 0..members {
                    let rows = segments(seq_q, order, members, c);
                    for step in 0..members {
                        let keys = segments(seq_k, order, members, source(members, c, step));
                        for part in parts(&rows, &keys, window, [seq_q, seq_k]) {
                            count(&part, &rows, &keys, seq_k, &mut seen);
                        }
                    }
                }
                for (at, times) in seen.into_iter().enumerate() {
                    let (i, j) = (at / seq_k, at % seq_k);
                    let expected = u32::from(window.sees(i, j, seq_q, seq_k));
                    assert_eq!(
                        times, expected,
                        "{members} {order:?} {window} {seq_q} {seq_k}: {i} {j}"
                    );
                }
            }
        }
    }

    fn count(part: &Part, rows: &[Segment], keys: &[Segment], seq_k: usize, seen: &mut [u32]) {
        let global = |segments: &[Segment], local: usize| {
            let of = segments.iter().find(|s| s.local.contains(&local)).unwrap();
            of.first + local - of.local.start
        };
        let (nq, nk) = (part.rows.len(), part.keys.len());
        for (i, j) in (0..nq).flat_map(|i| (0..nk).map(move |j| (i, j))) {
            if part.window.sees(i, j, nq, nk) {
                let row = global(rows, part.rows.start + i);
                let key = global(keys, part.keys.start + j);
                seen[row * seq_k + key] += 1;
            }
        }
    }

    /// In zigzag order all ranks compute as much in every step of causal attention, by one problem
    /// each; in contiguous order the last has twice the mean in all.
    #[test]
    fn zigzag_balances_causal_attention() {
        let causal = Window { left: None, right: Some(0) };
        for members in 2..=8 {
            let n = 2 * members * 16;
            let work = |order, c, step| {
                let rows = segments(n, order, members, c);
                let keys = segments(n, order, members, source(members, c, step));
                let parts = parts(&rows, &keys, causal, [n, n]);
                (parts.iter().map(Part::pairs).sum::<u64>(), parts.len())
            };
            for step in 0..members {
                let all: Vec<_> = (0..members).map(|c| work(Order::Zigzag, c, step)).collect();
                assert!(all.iter().all(|&one| one == all[0]), "{members} {step}: {all:?}");
                assert_eq!(all[0].1, 1);
            }
            let total =
                |c| (0..members).map(|step| work(Order::Contiguous, c, step).0).sum::<u64>();
            let pairs = causal.visible_pairs(n, n) as f64;
            let most = total(members - 1) as f64 * members as f64 / pairs;
            assert!(most > 2.0 - 1.2 / members as f64, "{members}: {most}");
        }
    }

    /// Rows and chunks that a rank holds are a partition, and places of ranks are one to one.
    #[test]
    fn every_row_has_one_holder() {
        for (members, n) in (1..=8).flat_map(|w| [1, 7, 64, 65].map(|n| (w, n))) {
            for order in [Order::Contiguous, Order::Zigzag] {
                let mut rows: Vec<usize> = (0..members)
                    .flat_map(|c| segments(n, order, members, c))
                    .flat_map(|s| s.first..s.first + s.local.len())
                    .collect();
                rows.sort_unstable();
                assert_eq!(rows, (0..n).collect::<Vec<_>>());
            }
        }
        let grid = Grid { heads: 3, context: 4 };
        for rank in 0..grid.ranks() {
            let (h, c) = grid.place(rank);
            assert_eq!(grid.rank(h, c), rank);
        }
    }

    #[test]
    fn sums_begin_and_end_where_rows_do() {
        let flags = |n, parts: &[[usize; 2]]| {
            let parts: Vec<_> = parts.iter().map(|&[from, to]| from..to).collect();
            let merges = Merges::of(n, &parts);
            let joins: Vec<_> = merges.joins.iter().map(|j| (j.first, j.last)).collect();
            let finish: Vec<_> = merges.finish.iter().map(|rows| [rows.start, rows.end]).collect();
            (joins, merges.begin_empty, finish)
        };
        let (first, last, neither) = ((true, false), (false, true), (false, false));
        // The first rank of a causal ring of two: its last rows see the other's keys too.
        assert_eq!(flags(8, &[[0, 8], [4, 8]]), (vec![first, last], false, vec![[0, 4]]));
        // All rows in both steps.
        assert_eq!(flags(8, &[[0, 8], [0, 8]]), (vec![first, last], false, vec![]));
        // A part with rows that had one before and rows that had none.
        assert_eq!(flags(8, &[[0, 4], [2, 8]]), (vec![neither, last], true, vec![[0, 2]]));
        // Rows without any key.
        assert_eq!(flags(8, &[[2, 4]]), (vec![last], true, vec![[0, 2], [4, 8]]));
        assert_eq!(flags(2, &[]), (vec![], true, vec![[0, 2]]));
    }
}
