//! The features of attention beside the two products and the softmax.

use candle_core::Tensor;
use flash_attention::{Dropout, Layout, Window};

/// The features of [`attention`](crate::attention) beside the two products and the softmax. The default is
/// plain attention of `[B, H, N, D]`.
///
/// ```
/// use flash_attention_candle::{Layout, Options, Window};
///
/// // As Mistral's layers: causal, 4096 keys, tensors as a projection leaves them.
/// let options = Options {
///     layout: Layout::TokensFirst,
///     causal: true,
///     window: Window { left: Some(4095), right: None },
///     ..Options::default()
/// };
/// # _ = options;
/// ```
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Order of the dimensions of Q, K, V and O: `[B, H, N, D]`, or `[B, N, H, D]` as candle-flash-attn has
    /// them. Packed sequences are `[total, H, D]` in either.
    pub layout: Layout,
    /// The factor of the products `Q Kᵀ`; `1 / sqrt(D)` unless given.
    pub scale: Option<f32>,
    /// Whether row `i` sees the keys `j <= i + Nk - Nq` only.
    pub causal: bool,
    /// How far before and after its own position, `i + Nk - Nq`, a row sees keys.
    pub window: Window,
    /// `cap * tanh(s / cap)` takes the place of a scaled score.
    pub softcap: Option<f32>,
    /// ALiBi, f32 `[H]` or `[B, H]`: `-slope * |i + Nk - Nq - j|` joins a score. Slopes get no gradient.
    pub alibi_slopes: Option<Tensor>,
    /// The bias, added to scores: `[B or 1, H or 1, Nq, Nk]` in the type of Q; -inf hides a key. It gets a
    /// gradient where it is part of a graph.
    pub bias: Option<Tensor>,
    /// A score for each head that joins the sum and has no value, f32 `[H]`. It gets a gradient where it
    /// is part of a graph.
    pub sinks: Option<Tensor>,
    /// Padding mask, u8 `[B, Nk]`: 0 hides a key.
    pub mask: Option<Tensor>,
    /// Keys of the cache per batch entry, u32 `[B]`; attention never reads keys beyond. A causal
    /// row is aligned to these ends. No gradients.
    pub key_lengths: Option<Tensor>,
    /// The pages of each sequence, u32 or i32 `[B, max_pages]`. K and V are then caches in pages:
    /// `[pages, page_size, Hkv, D]` if tokens come first or queries are packed, else
    /// `[pages, Hkv, page_size, D]`. Key `j` of sequence `b` is key `j % page_size` of page
    /// `page_table[b][j / page_size]`. `key_lengths` or `cu_seqlens_k` give the number of keys; without
    /// them each sequence fills its pages. Attention never reads pages beyond the last key. No gradients.
    pub page_table: Option<Tensor>,
    /// Dropout of weights. Both passes of a call drop the same weights; each call needs its own seed.
    pub dropout: Option<Dropout>,
    /// Sequences with their own lengths, packed one after the other.
    pub varlen: Option<Varlen>,
}

/// Where packed sequences begin: then Q and O are `[total_q, H, D]`, K and V `[total_k, Hkv, D]`.
#[derive(Clone, Debug)]
pub struct Varlen {
    /// The begins of the sequences in Q, and the end of the last: u32 `[B + 1]`, from 0 on, ascending. With a
    /// page table every row of Q belongs to a sequence.
    pub cu_seqlens_q: Tensor,
    /// The begins in K and V; for a cache in pages, sums of lengths.
    pub cu_seqlens_k: Tensor,
    /// Rows of the longest sequence, or more.
    pub max_seqlen_q: usize,
    /// Keys of the longest sequence, or more.
    pub max_seqlen_k: usize,
}
