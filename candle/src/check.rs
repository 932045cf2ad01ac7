//! From tensors and options to a problem, or to an error that names the wrong tensor or option.

use candle_core::{DType, Error, Result, Tensor, bail};
use flash_attention::{Alibi, Bias, Layout, Problem, ProblemBuilder};

use crate::options::{Options, Varlen};

/// An error of the library as one of candle.
pub fn wrap(error: flash_attention::Error) -> Error {
    Error::wrap(error)
}

/// The problem of a call; its tensors are checked.
pub fn problem(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options) -> Result<Problem> {
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        if tensor.dtype() != q.dtype() {
            bail!("{name} is {:?}, and q {:?}: they must be of one type", tensor.dtype(), q.dtype())
        }
        check_device(name, tensor, q)?;
        if tensor.dims().last().is_some_and(|&d| d > 1) && tensor.stride().last() != Some(&1) {
            bail!(
                "the last dimension of {name} must be contiguous, and its strides are {:?}: transpose \
                 others, or call contiguous()",
                tensor.stride()
            )
        }
    }
    let builder = match &options.varlen {
        Some(varlen) => packed(q, k, v, varlen, options.page_table.as_ref())?,
        None => dense(q, k, v, options.layout, options.page_table.as_ref())?,
    };
    let builder = builder
        .dtype(dtype(q)?)
        .causal(options.causal)
        .window(options.window)
        .scale(options.scale)
        .softcap(options.softcap)
        .dropout(options.dropout)
        .mask(options.mask.is_some())
        .sinks(options.sinks.is_some());
    let alibi = options.alibi_slopes.as_ref().map(|slopes| match slopes.rank() {
        2 => Alibi::PerBatchAndHead,
        _ => Alibi::PerHead,
    });
    let bias = match &options.bias {
        Some(bias) => {
            let (b, h, ..) = bias.dims4()?;
            Some(Bias { per_batch: b > 1, per_head: h > 1 })
        }
        None => None,
    };
    let p = builder.alibi(alibi).bias(bias).build().map_err(wrap)?;
    if options.key_lengths.is_some() && p.varlen().is_some() {
        bail!("packed sequences have no key_lengths: cu_seqlens_k says where keys end")
    }
    let lengths = Some(vec![p.batch()]);
    for (name, tensor, dtype, shape) in [
        ("mask", &options.mask, DType::U8, p.mask_shape()),
        ("alibi_slopes", &options.alibi_slopes, DType::F32, p.alibi_shape()),
        ("bias", &options.bias, q.dtype(), p.bias_shape()),
        ("sinks", &options.sinks, DType::F32, p.sinks_shape()),
        ("key_lengths", &options.key_lengths, DType::U32, lengths),
    ] {
        if let (Some(tensor), Some(shape)) = (tensor, shape) {
            check(name, tensor, q, dtype, &shape)?;
        }
    }
    Ok(p)
}

/// Extents `[B, H, N, D]` of a tensor; of a cache in pages, `[pages, H, page_size, D]`.
fn extents(name: &str, tensor: &Tensor, layout: Layout, in_pages: bool) -> Result<[usize; 4]> {
    match (tensor.dims(), layout) {
        (&[b, heads, rows, d], Layout::HeadsFirst)
        | (&[b, rows, heads, d], Layout::TokensFirst) => Ok([b, heads, rows, d]),
        _ => {
            let order = match (in_pages, layout) {
                (false, Layout::HeadsFirst) => "[B, H, N, D]",
                (false, Layout::TokensFirst) => "[B, N, H, D]",
                (true, Layout::HeadsFirst) => "[pages, H, page_size, D]",
                (true, Layout::TokensFirst) => "[pages, page_size, H, D]",
            };
            bail!("{name} has shape {:?}: it must be {order}", tensor.shape())
        }
    }
}

/// A problem of tensors of rank 4.
fn dense(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: Layout,
    page_table: Option<&Tensor>,
) -> Result<ProblemBuilder> {
    let of = |name, tensor| extents(name, tensor, layout, page_table.is_some() && name != "q");
    let ([b, heads, seq_q, d], k_extents, v_extents) = (of("q", q)?, of("k", k)?, of("v", v)?);
    let [k_b, kv_heads, k_rows, k_d] = k_extents;
    let seq_k = match page_table {
        Some(table) => keys_in_pages(table, q, b, [k_b, k_rows])?,
        None if k_b != b => {
            bail!("k has shape {:?}, and q {:?}: B and D must agree", k.shape(), q.shape())
        }
        None => k_rows,
    };
    if k_d != d {
        bail!("k has shape {:?}, and q {:?}: B and D must agree", k.shape(), q.shape())
    }
    if v_extents[..3] != k_extents[..3] {
        bail!("v has shape {:?}, and k {:?}: all but D must agree", v.shape(), k.shape())
    }
    let builder = Problem::builder(b, heads, seq_q, d).kv_heads(kv_heads).seq_k(seq_k);
    Ok(builder.head_dim_v(v_extents[3]).layout(layout))
}

/// The keys that the page table has room for in each of `batch` sequences. The cache has `pages` pages of
/// `page_size` keys.
fn keys_in_pages(
    table: &Tensor,
    q: &Tensor,
    batch: usize,
    [pages, page_size]: [usize; 2],
) -> Result<usize> {
    if pages == 0 || page_size == 0 {
        bail!("k has {pages} pages of {page_size} keys: both must be at least 1")
    }
    if !matches!(table.dtype(), DType::U32 | DType::I32) {
        bail!("page_table is {:?}: it must be U32 or I32", table.dtype())
    }
    check_device("page_table", table, q)?;
    match table.dims() {
        &[entries, columns] if entries == batch => Ok(columns * page_size),
        _ => bail!("page_table has shape {:?}: it must be [{batch}, max_pages]", table.shape()),
    }
}

/// A problem of packed sequences.
fn packed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    varlen: &Varlen,
    page_table: Option<&Tensor>,
) -> Result<ProblemBuilder> {
    let of = |name, tensor: &Tensor| {
        if page_table.is_some() && name != "q" {
            return extents(name, tensor, Layout::TokensFirst, true);
        }
        match tensor.dims() {
            &[total, heads, d] => Ok([1, heads, total, d]),
            _ => bail!("{name} has shape {:?}: packed sequences are [total, H, D]", tensor.shape()),
        }
    };
    let ([_, heads, total_q, d], k_extents, v_extents) = (of("q", q)?, of("k", k)?, of("v", v)?);
    let [k_b, kv_heads, k_rows, k_d] = k_extents;
    if k_d != d {
        bail!("k has shape {:?}, and q {:?}: D must agree", k.shape(), q.shape())
    }
    if v_extents[..3] != k_extents[..3] {
        bail!("v has shape {:?}, and k {:?}: all but D must agree", v.shape(), k.shape())
    }
    let Varlen { cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k } = varlen;
    let numbers = cu_seqlens_q.dims1()?;
    if numbers < 2 {
        bail!("cu_seqlens_q has {numbers} numbers: B sequences have B + 1, and B is at least 1")
    }
    for (name, tensor) in [("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)] {
        check(name, tensor, q, DType::U32, &[numbers])?;
        if !tensor.is_contiguous() {
            bail!("{name} must be contiguous, and its strides are {:?}", tensor.stride())
        }
    }
    let total_k = match page_table {
        Some(table) => {
            let room = keys_in_pages(table, q, numbers - 1, [k_b, k_rows])?;
            if *max_seqlen_k > room {
                bail!(
                    "max_seqlen_k = {max_seqlen_k}: page_table {:?} has room for {room} keys in pages \
                     of {k_rows}",
                    table.shape()
                )
            }
            // Keys in pages are not packed: there are as many as sequences have.
            *max_seqlen_k
        }
        None => k_rows,
    };
    let totals = flash_attention::Varlen { total_q, total_k };
    let builder = Problem::builder(numbers - 1, heads, (*max_seqlen_q).max(1), d);
    let builder = builder.kv_heads(kv_heads).seq_k(*max_seqlen_k).head_dim_v(v_extents[3]);
    Ok(builder.varlen(Some(totals)))
}

/// The storage type.
fn dtype(q: &Tensor) -> Result<flash_attention::DType> {
    match q.dtype() {
        DType::F32 => Ok(flash_attention::DType::F32),
        DType::F16 => Ok(flash_attention::DType::F16),
        DType::BF16 => Ok(flash_attention::DType::BF16),
        other => bail!("q is {other:?}: attention has F32, F16 and BF16"),
    }
}

/// A tensor beside Q, K and V.
fn check(name: &str, tensor: &Tensor, q: &Tensor, dtype: DType, shape: &[usize]) -> Result<()> {
    if tensor.dtype() != dtype {
        bail!("{name} is {:?}: it must be {dtype:?}", tensor.dtype())
    }
    if tensor.dims() != shape {
        bail!("{name} has shape {:?}: it must be {shape:?}", tensor.shape())
    }
    check_device(name, tensor, q)
}

fn check_device(name: &str, tensor: &Tensor, q: &Tensor) -> Result<()> {
    if !tensor.device().same_device(q.device()) {
        let (given, wanted) = (tensor.device().location(), q.device().location());
        bail!("{name} lies on {given:?}, and q on {wanted:?}: they must be on one device")
    }
    Ok(())
}
