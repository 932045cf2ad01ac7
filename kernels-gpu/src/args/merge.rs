//! The arguments of [`merge`](crate::merge).

use super::{Buffer, Tensor};

/// Arguments of [`merge`](crate::merge::merge).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MergeArgs {
    /// The part that joins, `[B, H, N, D]` in the storage type.
    pub part: Tensor,
    /// The sum so far, f32 `[B, H, N, D]`.
    pub sum: Tensor,
    /// Where the result goes in the storage type, `[B, H, N, D]`.
    pub out: Tensor,
    /// LSE of the part, f32 `[B, H, N]`.
    pub part_lse: Buffer,
    /// LSE of the sum, f32, a row of each head after the other.
    pub sum_lse: Buffer,
    /// LSE of the result, likewise.
    pub out_lse: Buffer,
    /// Elements from one head to the next in the LSE of the sum and of the result.
    pub lse_stride: u64,
    /// Heads, H.
    pub heads: u32,
    /// Rows of a head, N.
    pub rows: u32,
    /// Rows of all heads, `B H N`.
    pub total_rows: u32,
    /// Columns, D.
    pub columns: u32,
    /// A sum of the constants of [`merge`](crate::merge).
    pub flags: u32,
    /// For the alignment of the struct.
    pub padding: u32,
}
