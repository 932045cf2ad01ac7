//! Rows of a sequence as tensor maps see them: plain, and of packed sequences.
//!
//! The copy engine knows one end of a dimension, that of the tensor. Of packed sequences each has an
//! end of its own: what lies past it must be loaded as zeros, and nothing may be stored there. Two
//! further dimensions do that. In a map with dimensions `[D, 2^30, H, 2^31, 2^31]`, whose strides in
//! bytes are `s` from row to row, `t` from head to head, again `s`, and last `2^34 - s`, the
//! coordinates
//!
//! ```text
//! x = 2^30 - rows + row      of dimension 1: past its end exactly where row >= rows
//! y = first + rows           of dimension 3
//! z = 2^30                   of dimension 4
//! ```
//!
//! lead to `base + h t + (x + y) s + z (2^34 - s)`. Since `z 2^34 = 2^64`, and addresses are computed
//! modulo 2^64, that is `base + h t + (first + row) s`: the row. The end of dimension 1 is the
//! sequence's.
//!
//! Source: Triton, `triton/tools/ragged_tma.py`.

use simt::{mbarrier::Mbarrier, tma};

use crate::parts::head::Head;

/// The most rows of a packed sequence.
pub const MAX_ROWS: u32 = 1 << 30;

/// Dimensions, in elements, of the map of packed sequences with `heads` heads of `d` columns, fastest
/// first; and the bytes from one index to the next for each dimension but the first, where heads are
/// `head` and rows `row` bytes apart.
#[must_use]
pub const fn map(d: u64, heads: u64, head: u64, row: u64) -> ([u64; 5], [u64; 4]) {
    let dims = [d, MAX_ROWS as u64, heads, 1 << 31, 1 << 31];
    // Above 0 and below 2^40, whatever the row.
    let back = (1 << 34) - row % (1 << 34);
    (dims, [row, head, row, back])
}

/// The rows of one head in a tensor.
#[derive(Clone, Copy, Debug)]
pub struct MapRows {
    b: u32,
    h: u32,
    /// The sequence's first row, and how many it has.
    first: u32,
    rows: u32,
}

impl MapRows {
    /// The rows of Q or O.
    #[inline(always)]
    pub const fn queries(head: &Head) -> Self {
        Self { b: head.b, h: head.h, first: head.first_q, rows: head.seq_q }
    }

    /// The rows of K or V.
    #[inline(always)]
    pub const fn keys(head: &Head) -> Self {
        Self { b: head.b, h: head.h_kv, first: head.first_k, rows: head.seq_k }
    }

    /// Starts to load the box at `column` and `row`.
    ///
    /// # Safety
    /// As for [`tma::load_4d`]; the map is as [`map`] states.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn load(self, to: u32, map: u64, column: u32, row: u32, full: Mbarrier) {
        // SAFETY: map, destination and barrier are as `tma::load_4d` asks, as stated above.
        unsafe {
            if Head::is_packed() {
                tma::load_5d(to, map, self.ragged(column, row), full);
            } else {
                tma::load_4d(to, map, [column, row, self.h, self.b], full);
            }
        }
    }

    /// Starts to store the box at `column` and `row` where `condition` holds.
    ///
    /// # Safety
    /// As for [`tma::store_4d`]; the map is as [`map`] states.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn store_if(self, condition: bool, map: u64, column: u32, row: u32, from: u32) {
        // SAFETY: map and source are as `tma::store_4d` asks, as stated above.
        unsafe {
            if Head::is_packed() {
                tma::store_5d_if(condition, map, self.ragged(column, row), from);
            } else {
                tma::store_4d_if(condition, map, [column, row, self.h, self.b], from);
            }
        }
    }

    #[inline(always)]
    const fn ragged(self, column: u32, row: u32) -> [u32; 5] {
        [column, MAX_ROWS - self.rows + row, self.h, self.first + self.rows, MAX_ROWS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The address of every row is that of the tensor, for every stride that a map may have.
    #[test]
    fn rows_are_where_the_tensor_has_them() {
        for row_bytes in [16, 256, 1 << 20, (1 << 34) - 16, 1 << 34, (1 << 34) + 16, (1 << 40) - 16]
        {
            let (dims, strides) = map(64, 3, 128, row_bytes);
            assert!(strides.iter().all(|&s| s > 0 && s % 16 == 0 && s < 1 << 40), "{strides:?}");
            for (first, rows, row) in
                [(0, 1, 0), (7, 5, 4), (0, MAX_ROWS, MAX_ROWS - 1), (1 << 30, 9, 2)]
            {
                let place = MapRows { b: 5, h: 2, first, rows };
                let to = place.ragged(0, row).map(u64::from);
                assert!(to.iter().zip(dims).all(|(&x, dim)| x < dim), "{to:?}");
                let address = (1..5).fold(4096u64, |address, d| {
                    address.wrapping_add(to[d].wrapping_mul(strides[d - 1]))
                });
                let expected = u64::from(first + row).wrapping_mul(row_bytes);
                assert_eq!(address, expected.wrapping_add(4096 + 2 * 128), "{row_bytes} {first}");
                let past = place.ragged(0, rows).map(u64::from);
                assert_eq!(past[1], dims[1], "the row after the last is outside");
            }
        }
    }
}
