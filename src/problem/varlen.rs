//! Sequences of different lengths, packed one after the other.

use super::{MAX_SEQ, Problem, ProblemBuilder};
use crate::error::Error;

/// Sequences of different lengths, packed one after the other without padding: batch entry `b` of Q
/// has the rows from `cu_seqlens_q[b]` to before `cu_seqlens_q[b + 1]`, and its keys lie likewise.
///
/// Then Q and O are `[total_q, H, D]`, K and V `[total_k, Hkv, D]`, the LSE is `[H, total_q]`, and
/// the lengths of the problem are the longest sequence's lengths. Sequences may be empty. Kernels
/// never read rows and keys beyond the last sequence, and leave O and LSE there unchanged.
///
/// ```
/// use flash_attention::Problem;
///
/// // Sequences of 3, 0 and 7 rows, which see 5, 2 and no keys.
/// let packed = Problem::packed(&[0, 3, 3, 10], &[0, 5, 7, 7], 4, 64)?.causal(true).build()?;
/// assert_eq!((packed.batch(), packed.seq_q(), packed.seq_k()), (3, 7, 5));
/// assert_eq!(packed.q_shape(), [1, 10, 4, 64]);
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Varlen {
    /// Rows of Q and O.
    pub total_q: usize,
    /// Rows of K and V.
    pub total_k: usize,
}

/// One sequence of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its first row in Q and O.
    pub first_q: usize,
    /// Query rows.
    pub seq_q: usize,
    /// Its first row in K and V.
    pub first_k: usize,
    /// Keys.
    pub seq_k: usize,
}

impl Sequence {
    /// Sequence `b` of the sequences that begin at these rows of Q and these rows of K. Panics
    /// where there are too few.
    #[must_use]
    pub fn at(cu_seqlens_q: &[u32], cu_seqlens_k: &[u32], b: usize) -> Self {
        let span = |at: &[u32]| (at[b] as usize, at[b + 1].saturating_sub(at[b]) as usize);
        let ((first_q, seq_q), (first_k, seq_k)) = (span(cu_seqlens_q), span(cu_seqlens_k));
        Self { first_q, seq_q, first_k, seq_k }
    }

    /// The sequences that begin at these rows of Q and these rows of K.
    pub fn all(cu_seqlens_q: &[u32], cu_seqlens_k: &[u32]) -> impl Iterator<Item = Self> {
        let count = cu_seqlens_q.len().min(cu_seqlens_k.len()).saturating_sub(1);
        (0..count).map(|b| Self::at(cu_seqlens_q, cu_seqlens_k, b))
    }
}

impl Problem {
    /// Starts a problem of packed sequences: see [`Varlen`]. `cu_seqlens_q` and `cu_seqlens_k`
    /// begin with 0, ascend, and have one number more than there are sequences.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] where they break these rules.
    pub fn packed(
        cu_seqlens_q: &[u32],
        cu_seqlens_k: &[u32],
        heads: usize,
        head_dim: usize,
    ) -> Result<ProblemBuilder, Error> {
        let batch = cu_seqlens_q.len().saturating_sub(1);
        let [q, k] = [("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)].map(
            |(what, cu_seqlens)| {
                check(what, cu_seqlens, batch, [MAX_SEQ; 2])?;
                let longest = cu_seqlens.windows(2).map(|at| at[1] - at[0]).max();
                let total = cu_seqlens.last().copied();
                Ok::<_, Error>([longest, total].map(|n| n.unwrap_or_default() as usize))
            },
        );
        let ([longest_q, total_q], [longest_k, total_k]) = (q?, k?);
        // A problem has a row, though no sequence may have one.
        Ok(Self::builder(batch, heads, longest_q.max(1), head_dim)
            .seq_k(longest_k)
            .varlen(Some(Varlen { total_q, total_k })))
    }

    /// Shape of `cu_seqlens_q` and of `cu_seqlens_k`, u32 `[B + 1]`, where sequences are packed.
    #[must_use]
    pub fn cu_seqlens_shape(&self) -> Option<Vec<usize>> {
        self.varlen.map(|_| vec![self.batch + 1])
    }

    /// As [`Problem::flops`], for packed sequences with their own lengths.
    #[must_use]
    pub fn flops_of(&self, sequences: impl Iterator<Item = Sequence>) -> f64 {
        let pairs = sequences.map(|of| self.pairs(of.seq_q, of.seq_k)).sum::<f64>();
        self.flops_of_pairs(self.heads as f64 * pairs)
    }

    /// Checks the start offsets of packed sequences.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] names the wrong number.
    pub(crate) fn check_cu_seqlens(&self, what: &'static str, at: &[u32]) -> Result<(), Error> {
        let Some(Varlen { total_q, total_k }) = self.varlen else { return Ok(()) };
        let limits =
            if what == "cu_seqlens_q" { [self.seq_q, total_q] } else { [self.seq_k, total_k] };
        check(what, at, self.batch, limits)
    }
}

/// Checks the start offsets of sequences: no sequence is longer than `longest`, and all together are no
/// longer than `total`.
fn check(
    what: &'static str,
    cu_seqlens: &[u32],
    batch: usize,
    [longest, total]: [usize; 2],
) -> Result<(), Error> {
    let wrong = |given: String, remedy: String| Err(Error::InvalidValue { what, given, remedy });
    if cu_seqlens.is_empty() || cu_seqlens.len() != batch + 1 {
        let remedy = format!("{batch} sequences have {} of them", batch + 1);
        return wrong(format!("{} numbers", cu_seqlens.len()), remedy);
    }
    if cu_seqlens[0] != 0 {
        return wrong(format!("{} first", cu_seqlens[0]), "the first must be 0".into());
    }
    for (b, at) in cu_seqlens.windows(2).enumerate() {
        let given = || format!("{} before {} (sequence {b})", at[0], at[1]);
        if at[1] < at[0] {
            return wrong(given(), "they must ascend".into());
        }
        if (at[1] - at[0]) as usize > longest {
            return wrong(given(), format!("the longest sequence of the problem has {longest}"));
        }
        if at[1] as usize > total {
            return wrong(given(), format!("there are {total} rows"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Window,
        problem::{Bias, Layout},
    };

    #[test]
    fn sizes_are_those_of_packed_tensors() {
        let p = Problem::packed(&[0, 3, 3, 10], &[0, 5, 7, 7], 4, 32).unwrap().kv_heads(2);
        let p = p.build().unwrap();
        assert_eq!((p.q_shape(), p.k_shape()), ([1, 10, 4, 32], [1, 7, 2, 32]));
        assert_eq!((p.lse_shape(), p.rows()), ([1, 4, 10], 40));
        assert_eq!(p.weights_shape(), [3, 4, 7, 5]);
        assert_eq!(p.layout(), Layout::TokensFirst);
        let beside = 2 * 4 * 4;
        assert_eq!(p.input_bytes(), (10 * 4 + 2 * 7 * 2) * 32 * 4 + beside);
        assert_eq!(p.output_bytes(), 10 * 4 * (32 * 4 + 4));
        let sequences = || Sequence::all(&[0, 3, 3, 10], &[0, 5, 7, 7]);
        assert_eq!(p.flops_of(sequences()), 4.0 * 4.0 * 15.0 * 32.0);
        let window = p.to_builder().window(Window { left: Some(1), right: Some(0) });
        assert_eq!(window.build().unwrap().flops_of(sequences()), 4.0 * 4.0 * 6.0 * 32.0);
        let nothing = Problem::packed(&[0, 0], &[0, 0], 1, 32).unwrap();
        let nothing = nothing.varlen(Some(Varlen { total_q: 2, total_k: 0 })).build().unwrap();
        assert_eq!((nothing.seq_q(), nothing.seq_k(), nothing.k_elements()), (1, 0, 0));
    }

    #[test]
    fn wrong_places_are_named() {
        let packed = |q: &[u32], k: &[u32]| Problem::packed(q, k, 1, 32).map(drop);
        for (q, k, what) in [
            (&[][..], &[0, 1][..], "cu_seqlens_q = 0 numbers"),
            (&[0, 4], &[0], "cu_seqlens_k = 1 numbers is not possible: 1 sequences have 2"),
            (&[1, 4], &[0, 1], "cu_seqlens_q = 1 first is not possible: the first must be 0"),
            (
                &[0, 4, 3],
                &[0, 1, 2],
                "cu_seqlens_q = 4 before 3 (sequence 1) is not possible: they must ascend",
            ),
        ] {
            let message = packed(q, k).unwrap_err().to_string();
            assert!(message.contains(what), "{message}");
        }
        let p = Problem::packed(&[0, 4, 6], &[0, 4, 6], 1, 32).unwrap().build().unwrap();
        let message = |at: &[u32]| p.check_cu_seqlens("cu_seqlens_k", at).unwrap_err().to_string();
        assert!(message(&[0, 5, 6]).contains("the longest sequence of the problem has 4"));
        assert!(message(&[0, 4, 7]).contains("there are 6 rows"));
        assert!(p.check_cu_seqlens("cu_seqlens_q", &[0, 2, 5]).is_ok());
    }

    #[test]
    fn what_has_no_meaning_for_packed_sequences_is_refused() {
        let packed = || Problem::packed(&[0, 4, 6], &[0, 4, 6], 1, 32).unwrap();
        let message = |builder: ProblemBuilder| builder.build().unwrap_err().to_string();
        let text = message(packed().mask(true));
        assert!(text.contains("padding mask") && text.contains("packed"), "{text}");
        let text = message(packed().bias(Some(Bias::default())));
        assert!(text.contains("bias") && text.contains("packed"), "{text}");
        let text = message(packed().varlen(Some(Varlen { total_q: 0, total_k: 0 })));
        assert!(text.contains("rows of packed q = 0"), "{text}");
    }
}
