//! A problem that several ranks share, and each rank's part of it.

use std::ops::Range;

use flash_attention::{Problem, Window, problem::Layout};

use crate::{
    error::Error,
    schedule::{self, Grid, Order, Part, Segment, chunk},
};

/// Attention that several ranks share. Every rank holds some rows of Q, K and V, of all heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    problem: Problem,
    grid: Grid,
    order: Order,
    /// The start offsets of packed sequences in Q and K.
    cu_seqlens: Option<[Vec<u32>; 2]>,
}

/// The ring members' parts of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Runs of rows of the whole tensor, in the order of the member's memory.
    pub runs: Vec<Range<usize>>,
    pub segments: Vec<Segment>,
    /// Of packed sequences: where the sequences of each segment begin in it.
    pub cu_seqlens: Vec<Vec<u32>>,
}

impl Member {
    pub(crate) fn rows(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.local.end)
    }
}

/// A part, and the segments that it is of where sequences are packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub part: Part,
    pub packed: Option<[usize; 2]>,
}

impl Share {
    /// A problem over the ranks of a grid, in the order of rows that balances it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for heads that the grid does not divide; [`Error::Unsupported`] for what ranks
    /// cannot share.
    pub fn new(problem: Problem, grid: Grid) -> Result<Self, Error> {
        Self::build(problem, grid, None)
    }

    /// As [`Share::new`], of packed sequences that begin at these rows of Q and of K.
    ///
    /// # Errors
    /// As [`Share::new`].
    pub fn packed(problem: Problem, grid: Grid, cu_seqlens: [&[u32]; 2]) -> Result<Self, Error> {
        Self::build(problem, grid, Some(cu_seqlens.map(<[u32]>::to_vec)))
    }

    fn build(
        problem: Problem,
        grid: Grid,
        cu_seqlens: Option<[Vec<u32>; 2]>,
    ) -> Result<Self, Error> {
        let order = Order::of(problem.bounds());
        let share = Self { problem, grid, order, cu_seqlens };
        share.check()?;
        Ok(share)
    }

    /// The same ranks with their rows in that order.
    #[must_use]
    pub const fn order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    fn check(&self) -> Result<(), Error> {
        let (p, grid) = (&self.problem, self.grid);
        if grid.ranks() == 0 {
            let given = format!("{} x {}", grid.heads, grid.context);
            let remedy = "there is at least one".into();
            return Err(Error::Invalid { what: "ranks", given, remedy });
        }
        for (what, heads) in [("heads", p.heads()), ("heads of K and V", p.kv_heads())] {
            if heads % grid.heads != 0 {
                let remedy = format!(
                    "{} ranks divide them: choose a multiple, or divide the context",
                    grid.heads
                );
                return Err(Error::Invalid { what, given: heads.to_string(), remedy });
            }
        }
        let heads = "share the sequence on one GPU, or leave it out";
        for (has, what) in [
            (p.dropout().is_some(), "dropout"),
            (p.has_mask(), "a padding mask"),
            (p.bias().is_some(), "an additive bias"),
            (p.alibi().is_some(), "ALiBi"),
            (p.has_sinks(), "sinks"),
        ] {
            if has {
                return Err(Error::Unsupported { what, by: "several GPUs", remedy: heads });
            }
        }
        let Some([cu_q, cu_k]) = &self.cu_seqlens else {
            if p.varlen().is_some() {
                let (what, given) = ("where packed sequences begin", "nothing".into());
                let remedy = "give cu_seqlens of Q and K to Share::packed".into();
                return Err(Error::Invalid { what, given, remedy });
            }
            return Ok(());
        };
        if p.varlen().is_none() {
            let given = "two lists".into();
            let remedy = "the problem has no packed sequences: make it with Problem::packed".into();
            return Err(Error::Invalid { what: "cu_seqlens", given, remedy });
        }
        // Says what is wrong with the lists.
        Problem::packed(cu_q, cu_k, p.heads(), p.head_dim()).map(drop)?;
        let (whole, causal) = (Window::default(), Window { left: None, right: Some(0) });
        let ring = "context";
        if grid.context > 1 && ![whole, causal].contains(&p.window()) {
            return Err(Error::Unsupported {
                what: "a window over packed sequences",
                by: ring,
                remedy: "divide the heads, or use causal or full attention",
            });
        }
        if grid.context > 1 && p.window() == causal && cu_q != cu_k {
            return Err(Error::Unsupported {
                what: "causal attention of packed sequences with more or fewer keys than rows",
                by: ring,
                remedy: "divide the heads, or give as many keys as rows",
            });
        }
        Ok(())
    }

    /// The whole problem.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The ranks.
    #[must_use]
    pub const fn grid(&self) -> Grid {
        self.grid
    }

    /// The runs of rows of Q and O that a rank holds, in the order of its memory; of packed sequences, of
    /// their rows together.
    #[must_use]
    pub fn q_rows(&self, rank: usize) -> Vec<Range<usize>> {
        self.rank_rows(&self.member(rank / self.grid.heads, 0), rank)
    }

    /// The same of K and V.
    #[must_use]
    pub fn k_rows(&self, rank: usize) -> Vec<Range<usize>> {
        self.rank_rows(&self.member(rank / self.grid.heads, 1), rank)
    }

    fn rank_rows(&self, member: &Member, rank: usize) -> Vec<Range<usize>> {
        let (h, _) = self.grid.place(rank);
        let own = chunk(member.rows(), self.grid.heads, h);
        let mut at = 0;
        let mut runs = Vec::new();
        for run in &member.runs {
            let (from, to) = (own.start.max(at), own.end.min(at + run.len()));
            if from < to {
                runs.push(run.start + from - at..run.start + to - at);
            }
            at += run.len();
        }
        runs
    }

    /// Rows of Q (0) or of K (1) that a member of the ring holds.
    pub(crate) fn member(&self, c: usize, tensor: usize) -> Member {
        let members = self.grid.context;
        let p = &self.problem;
        let Some(cu_seqlens) = &self.cu_seqlens else {
            let n = [p.seq_q(), p.seq_k()][tensor];
            let segments = schedule::segments(n, self.order, members, c);
            let runs = segments.iter().map(|s| s.first..s.first + s.local.len()).collect();
            return Member { runs, segments, cu_seqlens: Vec::new() };
        };
        let cu = &cu_seqlens[tensor];
        let (chunks, count) = self.order.chunks(members, c);
        let (mut runs, mut segments, mut lists, mut end) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for of_sequence in chunks {
            let (start, mut list) = (end, vec![0]);
            for at in cu.windows(2) {
                let [first, last] = [at[0] as usize, at[1] as usize];
                let rows = chunk(last - first, count, of_sequence);
                end += rows.len();
                list.push((end - start) as u32);
                if !rows.is_empty() {
                    runs.push(first + rows.start..first + rows.end);
                }
            }
            // Chunks take the place of rows: what matters is which comes before which.
            segments.push(Segment { local: start..end, first: of_sequence });
            lists.push(list);
        }
        Member { runs, segments, cu_seqlens: lists }
    }

    /// The work of member `c` with the keys of member `s`.
    pub(crate) fn parts(&self, c: usize, s: usize) -> Vec<Assignment> {
        let (p, rows, keys) = (&self.problem, self.member(c, 0), self.member(s, 1));
        if self.grid.context == 1 {
            // The problem itself, with the rows that see no key.
            let part = Part { rows: 0..rows.rows(), keys: 0..keys.rows(), window: p.window() };
            let packed = self.cu_seqlens.is_some().then_some([0, 0]);
            return vec![Assignment { part, packed }];
        }
        if self.cu_seqlens.is_none() {
            let lengths = [p.seq_q(), p.seq_k()];
            let parts = schedule::parts(&rows.segments, &keys.segments, p.bounds(), lengths);
            return parts.into_iter().map(|part| Assignment { part, packed: None }).collect();
        }
        let mut parts = Vec::new();
        for (i, q) in rows.segments.iter().enumerate() {
            for (j, k) in keys.segments.iter().enumerate() {
                let window = match p.causal() {
                    true if k.first > q.first => continue,
                    true if k.first < q.first => Window::default(),
                    _ => p.window(),
                };
                if q.local.is_empty() || k.local.is_empty() {
                    continue;
                }
                let part = Part { rows: q.local.clone(), keys: k.local.clone(), window };
                parts.push(Assignment { part, packed: Some([i, j]) });
            }
        }
        parts
    }

    /// The problem of a part, of the heads that a rank computes.
    pub(crate) fn problem_of(&self, c: usize, s: usize, of: &Assignment) -> Result<Problem, Error> {
        let (p, heads) = (&self.problem, self.grid.heads);
        let (own_heads, d) = (p.heads() / heads, p.head_dim());
        let builder = match of.packed {
            Some([i, j]) => {
                let (rows, keys) = (self.member(c, 0), self.member(s, 1));
                Problem::packed(&rows.cu_seqlens[i], &keys.cu_seqlens[j], own_heads, d)?
            }
            None => Problem::builder(p.batch(), own_heads, of.part.rows.len(), d)
                .seq_k(of.part.keys.len())
                .layout(p.layout()),
        };
        let problem = builder
            .kv_heads(p.kv_heads() / heads)
            .head_dim_v(p.head_dim_v())
            .dtype(p.dtype())
            .window(of.part.window)
            .scale(Some(p.scale()))
            .softcap(p.softcap());
        Ok(problem.build()?)
    }

    /// Batch entries as they lie in memory: packed sequences are one.
    pub(crate) const fn batch(&self) -> usize {
        if self.cu_seqlens.is_some() { 1 } else { self.problem.batch() }
    }

    /// Whether the heads of a token are neighbours in memory.
    pub(crate) fn tokens_first(&self) -> bool {
        self.problem.layout() == Layout::TokensFirst
    }

    /// Shape of a tensor that a rank holds `rows` rows of.
    #[must_use]
    pub fn local_shape(&self, heads: usize, rows: usize, columns: usize) -> [usize; 4] {
        self.problem.layout().shape(self.batch(), heads, rows, columns)
    }

    /// The values that all ranks must be called with, by name.
    pub(crate) fn header(&self) -> Vec<(&'static str, String)> {
        let p = &self.problem;
        vec![
            ("ranks for heads and context", format!("{} x {}", self.grid.heads, self.grid.context)),
            ("order", format!("{:?}", self.order)),
            ("dtype", p.dtype().to_string()),
            ("batch", p.batch().to_string()),
            ("heads", p.heads().to_string()),
            ("heads of K and V", p.kv_heads().to_string()),
            ("rows", p.seq_q().to_string()),
            ("keys", p.seq_k().to_string()),
            ("head dim", format!("{} and {}", p.head_dim(), p.head_dim_v())),
            ("window", p.window().to_string()),
            ("scale", p.scale().to_string()),
            ("softcap", format!("{:?}", p.softcap())),
            ("layout", format!("{:?}", p.layout())),
            ("packed sequences", format!("{:?}", self.cu_seqlens)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_rows() {
        let problem = Problem::builder(1, 8, 37, 32).causal(true).build().unwrap();
        for grid in [(1, 1), (4, 1), (1, 5), (2, 3)].map(|(heads, context)| Grid { heads, context })
        {
            let share = Share::new(problem, grid).unwrap();
            let mut rows: Vec<_> =
                (0..grid.ranks()).flat_map(|rank| share.q_rows(rank)).flatten().collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..37).collect::<Vec<_>>(), "{grid:?}");
        }
        let cu = [0, 5, 5, 30, 37];
        let packed = Problem::packed(&cu, &cu, 4, 32).unwrap().causal(true).build().unwrap();
        let share = Share::packed(packed, Grid { heads: 2, context: 2 }, [&cu, &cu]).unwrap();
        let mut rows: Vec<_> = (0..4).flat_map(|rank| share.k_rows(rank)).flatten().collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..37).collect::<Vec<_>>());
    }

    #[test]
    fn what_ranks_cannot_share_is_refused() {
        let message = |problem: Problem, grid| Share::new(problem, grid).unwrap_err().to_string();
        let builder = || Problem::builder(1, 4, 64, 32);
        let text = message(builder().kv_heads(2).build().unwrap(), Grid::of_heads(4));
        assert!(
            text.starts_with("heads of K and V = 2 is not possible: 4 ranks divide them"),
            "{text}"
        );
        let text = message(builder().mask(true).build().unwrap(), Grid::of_context(2));
        assert!(text.starts_with("a padding mask cannot be shared between ranks"), "{text}");
        let cu = [0, 20, 64];
        let windowed = Problem::packed(&cu, &cu, 4, 32).unwrap();
        let windowed = windowed.window(Window { left: Some(3), right: Some(0) }).build().unwrap();
        let error = Share::packed(windowed, Grid::of_context(2), [&cu, &cu]).unwrap_err();
        assert!(error.to_string().starts_with("a window over packed sequences cannot"), "{error}");
        Share::packed(windowed, Grid::of_heads(2), [&cu, &cu]).unwrap();
        let other = [0, 21, 64];
        let causal = Problem::packed(&cu, &other, 4, 32).unwrap().causal(true).build().unwrap();
        let error = Share::packed(causal, Grid::of_context(2), [&cu, &other]).unwrap_err();
        assert!(error.to_string().contains("more or fewer keys than rows"), "{error}");
        assert!(message(windowed, Grid::of_heads(2)).contains("Share::packed"));
    }
}
