//! The keys that a row sees by position.

use std::fmt;

/// The number of keys that a row sees before and after its own position; `None` means no bound.
///
/// The last row's own position is the last key: row `i` of `Nq` is at `i + Nk - Nq`, which lies
/// before the first key for the first rows of `Nq > Nk`.
///
/// ```
/// use flash_attention::Window;
///
/// // Row 4 of 5 is at key 6 of 7, and sees itself and the two before it.
/// let sliding = Window { left: Some(2), right: Some(0) };
/// let seen: Vec<usize> = (0..7).filter(|&j| sliding.sees(4, j, 5, 7)).collect();
/// assert_eq!(seen, [4, 5, 6]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Window {
    /// Keys before its own position that a row sees.
    pub left: Option<u32>,
    /// Keys after its own position that a row sees; 0 is a causal mask.
    pub right: Option<u32>,
}

impl Window {
    /// Row `i` of `seq_q` sees key `j` of `seq_k`:
    /// `i + Nk - Nq - left <= j <= i + Nk - Nq + right`. Lengths up to
    /// [`MAX_SEQ`](super::MAX_SEQ).
    #[must_use]
    pub const fn sees(self, i: usize, j: usize, seq_q: usize, seq_k: usize) -> bool {
        // How far the key lies behind the row; lengths and bounds are below 2^32.
        let after = j as i64 - (i as i64 + seq_k as i64 - seq_q as i64);
        let by_left = match self.left {
            Some(left) => after >= -(left as i64),
            None => true,
        };
        let by_right = match self.right {
            Some(right) => after <= right as i64,
            None => true,
        };
        by_left && by_right
    }

    /// The same window without bounds that hide no key. A left bound hides most from the last row,
    /// and a right bound from the first row.
    #[must_use]
    pub const fn without_idle_bounds(self, seq_q: usize, seq_k: usize) -> Self {
        if seq_q == 0 || seq_k == 0 {
            return Self { left: None, right: None };
        }
        let left = match self.left {
            Some(left) if (left as usize) < seq_k - 1 => Some(left),
            _ => None,
        };
        let right = match self.right {
            Some(right) if (right as usize) < seq_q - 1 => Some(right),
            _ => None,
        };
        Self { left, right }
    }

    /// The number of pairs of a row and a key that it sees.
    #[must_use]
    pub fn visible_pairs(self, seq_q: usize, seq_k: usize) -> u64 {
        let (seq_q, seq_k) = (seq_q as i64, seq_k as i64);
        // 1 + 2 + ... + n.
        let sum = |n: i64| if n > 0 { (n as u64 * (n as u64 + 1)) / 2 } else { 0 };
        // From the last row upwards a right bound hides one key more in each row, up to all of
        // them; from the first row downwards a left bound does.
        let hidden = |bound: Option<u32>, rows: i64, keys: i64, most: i64| {
            bound.map_or(0, |bound| {
                let largest = rows.max(keys) - 1 - i64::from(bound);
                sum(largest) - sum(largest - most)
            })
        };
        let right = hidden(self.right, seq_q, 0, seq_k);
        let left = hidden(self.left, 0, seq_k, seq_q);
        // No key is hidden by both bounds of a row.
        seq_q as u64 * seq_k as u64 - right - left
    }
}

impl fmt::Display for Window {
    /// `left,right`, with -1 for no bound.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = |bound: Option<u32>| bound.map_or(-1, i64::from);
        write!(f, "{},{}", bound(self.left), bound(self.right))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every window over every pair of small lengths, and bounds at the end of 32 bits.
    fn every(mut check: impl FnMut(Window, usize, usize)) {
        let bounds = || (0..8).chain([u32::MAX - 1, u32::MAX]).map(Some).chain([None]);
        for (seq_q, seq_k) in (0..7).flat_map(|q| (0..7).map(move |k| (q, k))) {
            for (left, right) in bounds().flat_map(|l| bounds().map(move |r| (l, r))) {
                check(Window { left, right }, seq_q, seq_k);
            }
        }
    }

    #[test]
    fn a_window_is_as_the_inequality_says() {
        every(|window, seq_q, seq_k| {
            for (i, j) in (0..seq_q).flat_map(|i| (0..seq_k).map(move |j| (i, j))) {
                let own = i as i128 + seq_k as i128 - seq_q as i128;
                let from = window.left.map_or(i128::MIN, |left| own - i128::from(left));
                let to = window.right.map_or(i128::MAX, |right| own + i128::from(right));
                let expected = (from..=to).contains(&(j as i128));
                assert_eq!(window.sees(i, j, seq_q, seq_k), expected, "{window:?} {i} {j}");
            }
        });
    }

    #[test]
    fn bounds_go_exactly_where_they_hide_nothing() {
        every(|window, seq_q, seq_k| {
            let all = |window: Window| {
                (0..seq_q).all(|i| (0..seq_k).all(|j| window.sees(i, j, seq_q, seq_k)))
            };
            let kept = window.without_idle_bounds(seq_q, seq_k);
            let (left, right) = (Window { right: None, ..window }, Window { left: None, ..window });
            assert_eq!(kept.left.is_none(), all(left), "{window:?} {seq_q} {seq_k}");
            assert_eq!(kept.right.is_none(), all(right), "{window:?} {seq_q} {seq_k}");
        });
    }

    #[test]
    fn pairs_are_counted_exactly() {
        every(|window, seq_q, seq_k| {
            let row = |i| (0..seq_k).filter(|&j| window.sees(i, j, seq_q, seq_k)).count();
            let expected = (0..seq_q).map(row).sum::<usize>() as u64;
            assert_eq!(window.visible_pairs(seq_q, seq_k), expected, "{window:?} {seq_q} {seq_k}");
        });
        let (long, window) =
            (super::super::MAX_SEQ, Window { left: Some(1), right: Some(u32::MAX) });
        let hidden = (long as u64 - 2) * (long as u64 - 1) / 2;
        assert_eq!(window.visible_pairs(long, long), (long as u64).pow(2) - hidden);
    }

    #[test]
    fn no_bound_prints_as_minus_one() {
        assert_eq!(Window { left: Some(128), right: None }.to_string(), "128,-1");
    }
}
