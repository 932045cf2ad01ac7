//! Arguments of the decode kernels.

use super::{AttentionArgs, Buffer, Tensor};

/// Arguments of every decode kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DecodeArgs {
    /// Where the keys of each sequence are.
    pub cache: CacheArgs,
    /// The parts that the blocks of a sequence hand on.
    pub parts: PartsArgs,
    /// Of a cache in e4m3.
    pub scales: ScaleArgs,
    /// The call. `shape.seq_k` is the longest that a sequence may be. K and V are the cache: their
    /// batch entries are pages where the constant `page` is not 0.
    pub forward: AttentionArgs,
}

/// The factors of a cache's codes in e4m3, f32 `[Hkv]` each; empty for other caches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ScaleArgs {
    /// Keys.
    pub k: Buffer,
    /// Values.
    pub v: Buffer,
}

/// Where the keys of each sequence are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheArgs {
    /// Keys of each sequence, i32 `[B]`; less than 0 is none, more than `shape.seq_k` is that many.
    /// Empty: all have `shape.seq_k`.
    pub lengths: Buffer,
    /// Page `key / page` of each sequence, i32 `[B, max_pages]`. A page beyond the last is the last one.
    /// Read if the constant `page` is not 0, and only up to a sequence's length.
    pub page_table: Buffer,
    /// Pages that there are.
    pub pages: u32,
    /// Entries of the page table for each sequence.
    pub max_pages: u32,
}

/// The parts that the blocks of a sequence hand on: of each row, O under the maximum of the part's scores, that
/// maximum, and the sum of the part's weights.
///
/// An LSE would say as much as maximum and sum; but one of 1e4 rounds by 2^-11, and weights that
/// parts are merged by would be off by as much.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PartsArgs {
    /// f32 `[splits, B, H, Nq, Dv]`.
    pub o: Buffer,
    /// Maximum in log2 units and sum, f32 `[splits, B, H, Nq, 2]`.
    pub sums: Buffer,
    /// Parts that the keys of a sequence are split into. With one, O and the LSE are written at once.
    pub splits: u32,
    /// For the alignment of what follows.
    pub padding: u32,
}

/// Arguments of [`decode_append`](crate::decode::decode_append).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AppendArgs {
    /// New keys, `[B, Hkv, Nnew, D]`.
    pub k_new: Tensor,
    /// New values, `[B, Hkv, Nnew, Dv]`.
    pub v_new: Tensor,
    /// Queries of the new tokens, `[B, H, Nnew, D]`: rotated as the keys are. Read if `shape.heads` is not 0.
    pub q: Tensor,
    /// Where rotated queries go; it may be `q`.
    pub q_rotated: Tensor,
    /// Keys, as [`DecodeArgs`] has them.
    pub k: Tensor,
    /// Values, likewise.
    pub v: Tensor,
    /// Where the keys of each sequence are. Lengths count the new keys.
    pub cache: CacheArgs,
    /// Cosines, f32 `[positions, rotary_dim / 2]`.
    pub cos: Buffer,
    /// Sines, likewise.
    pub sin: Buffer,
    /// Extents.
    pub shape: AppendShape,
    /// Of a cache in e4m3.
    pub scales: ScaleArgs,
}

/// Extents of the appended keys and values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AppendShape {
    /// New tokens of each sequence, Nnew.
    pub seq_new: u32,
    /// The longest that a sequence may be.
    pub seq_k: u32,
    /// Heads of Q that are rotated; 0: Q is none of this launch's business.
    pub heads: u32,
    /// Heads of K and V.
    pub kv_heads: u32,
    /// Columns of Q and K, D.
    pub head_dim: u32,
    /// Columns of V, Dv.
    pub head_dim_v: u32,
    /// Columns that are rotated, from the first on, a multiple of 16; 0: none.
    pub rotary_dim: u32,
    /// Positions that there are angles for.
    pub positions: u32,
    /// 1: pairs are neighbours, columns `2 c` and `2 c + 1`. 0: columns `c` and `c + rotary_dim / 2`.
    pub interleaved: u32,
    /// For the alignment of the struct.
    pub padding: u32,
}
