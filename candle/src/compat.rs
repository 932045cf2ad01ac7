//! The functions of candle-flash-attn, with its signatures: tensors `[B, N, H, D]`, packed ones
//! `[total, H, D]`.

use candle_core::{Result, Tensor, bail};
use flash_attention::{Layout, Window};

use crate::{Options, Varlen, attention};

/// Options of one of these functions.
fn options(softmax_scale: f32, left: Option<usize>, right: Option<usize>) -> Options {
    // No sequence is longer than a bound of 32 bits.
    let bound = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    Options {
        layout: Layout::TokensFirst,
        scale: Some(softmax_scale),
        window: Window { left: left.map(bound), right: right.map(bound) },
        ..Options::default()
    }
}

/// The right bound of a causal mask.
const fn right_of(causal: bool) -> Option<usize> {
    if causal { Some(0) } else { None }
}

/// The cap; 0 stands for none.
fn cap(softcap: f32) -> Option<f32> {
    (softcap != 0.0).then_some(softcap)
}

/// Packed sequences, of Q and of K.
fn packed([q, k]: [&Tensor; 2], [max_seqlen_q, max_seqlen_k]: [usize; 2]) -> Option<Varlen> {
    let [cu_seqlens_q, cu_seqlens_k] = [q.clone(), k.clone()];
    Some(Varlen { cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k })
}

/// `softmax(Q Kᵀ scale) V`.
///
/// `q`: `[B, Nq, H, D]`; `k`, `v`: `[B, Nk, Hkv, D]`, where `Hkv` divides `H`. The result has the shape of
/// `q`. A causal row `i` sees the keys `j <= i + Nk - Nq`.
///
/// # Errors
/// [What is wrong](crate#shapes-types-strides-errors) with a tensor.
pub fn flash_attn(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    attention(q, k, v, &options(softmax_scale, None, right_of(causal)))
}

/// As [`flash_attn`], where row `i` sees that many keys before and after key `i + Nk - Nq`. A right bound
/// of 0 is a causal mask; a missing bound hides no key.
///
/// # Errors
/// As [`flash_attn`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    attention(q, k, v, &options(softmax_scale, window_size_left, window_size_right))
}

/// As [`flash_attn`], with ALiBi's slopes, f32 `[H]`.
///
/// # Errors
/// As [`flash_attn`].
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let alibi_slopes = Some(alibi_slopes.clone());
    let options = options(softmax_scale, None, right_of(causal));
    attention(q, k, v, &Options { alibi_slopes, ..options })
}

/// As [`flash_attn_windowed`], with ALiBi's slopes, f32 `[H]`.
///
/// # Errors
/// As [`flash_attn`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let alibi_slopes = Some(alibi_slopes.clone());
    let options = options(softmax_scale, window_size_left, window_size_right);
    attention(q, k, v, &Options { alibi_slopes, ..options })
}

/// As [`flash_attn_windowed`], with ALiBi's slopes where they are given, and a cap of scaled scores,
/// `softcap * tanh(s / softcap)`; 0 is none.
///
/// # Errors
/// As [`flash_attn`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let options = Options {
        alibi_slopes: alibi_slopes.cloned(),
        softcap: cap(softcap),
        ..options(softmax_scale, window_size_left, window_size_right)
    };
    attention(q, k, v, &options)
}

/// Attention of packed sequences.
///
/// `q`: `[total_q, H, D]`; `k`, `v`: `[total_k, Hkv, D]`; `seqlens_q`, `seqlens_k`: u32 `[B + 1]`, where the
/// sequences begin in `q` and in `k`, from 0 on, and past the last. No sequence has more than
/// `max_seqlen_q` rows or `max_seqlen_k` keys: on a GPU only the device sees the numbers. The result has the
/// shape of `q`.
///
/// # Errors
/// As [`flash_attn`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let varlen = packed([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]);
    let options = options(softmax_scale, None, right_of(causal));
    attention(q, k, v, &Options { varlen, ..options })
}

/// As [`flash_attn_varlen`], in a window as of [`flash_attn_windowed`].
///
/// # Errors
/// As [`flash_attn`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let varlen = packed([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]);
    let options = options(softmax_scale, window_size_left, window_size_right);
    attention(q, k, v, &Options { varlen, ..options })
}

/// As [`flash_attn_varlen`], with ALiBi's slopes, f32 `[H]`.
///
/// # Errors
/// As [`flash_attn`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let varlen = packed([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]);
    let alibi_slopes = Some(alibi_slopes.clone());
    let options = options(softmax_scale, None, right_of(causal));
    attention(q, k, v, &Options { alibi_slopes, varlen, ..options })
}

/// As [`flash_attn_varlen_windowed`], with ALiBi's slopes, f32 `[H]`.
///
/// # Errors
/// As [`flash_attn`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let varlen = packed([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]);
    let alibi_slopes = Some(alibi_slopes.clone());
    let options = options(softmax_scale, window_size_left, window_size_right);
    attention(q, k, v, &Options { alibi_slopes, varlen, ..options })
}

/// As [`flash_attn_varlen_windowed`], with ALiBi's slopes where they are given, and a cap of scaled scores;
/// 0 is none.
///
/// # Errors
/// As [`flash_attn`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let options = Options {
        alibi_slopes: alibi_slopes.cloned(),
        softcap: cap(softcap),
        varlen: packed([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]),
        ..options(softmax_scale, window_size_left, window_size_right)
    };
    attention(q, k, v, &options)
}

/// As [`flash_attn_varlen_windowed`], for a cache in pages, with a cap of scaled scores where it is given.
///
/// `q`: `[total_q, H, D]`; `k`, `v`: `[pages, page_block_size, Hkv, D]`; `block_table`: u32 or i32
/// `[B, max_pages]`. Key `j` of sequence `b` is key `j % page_block_size` of page
/// `block_table[b][j / page_block_size]`. `seqlens_k` holds cumulative lengths; it indexes nothing in `k`. The
/// call never reads pages beyond a length. Every row of `q` must belong to a sequence: `seqlens_q` ends at
/// `total_q`. The function has no gradients.
///
/// On a GPU each sequence takes the time of `max_seqlen_q` queries: the function serves decoding.
///
/// # Errors
/// As [`flash_attn`]; `mm_prefix_ranges` must be `None`.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_paged_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    block_table: &Tensor,
    mm_prefix_ranges: Option<&Tensor>,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    page_block_size: usize,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if mm_prefix_ranges.is_some() {
        bail!(
            "mm_prefix_ranges is given: only a window and a causal mask are supported, so pass None"
        )
    }
    if let &[_, rows, ..] = k.dims()
        && rows != page_block_size
    {
        bail!("page_block_size = {page_block_size}: k has shape {:?}, pages of {rows}", k.shape())
    }
    let options = Options {
        softcap: softcap.and_then(cap),
        varlen: packed([seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k]),
        page_table: Some(block_table.clone()),
        ..options(softmax_scale, window_size_left, window_size_right)
    };
    attention(q, k, v, &options)
}
