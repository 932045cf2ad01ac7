//! From tensors and options to a problem, or to an error that names what is wrong.

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
        Some(varlen) => packed(q, k, v, varlen)?,
        None => dense(q, k, v, options.layout)?,
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

/// A problem of tensors of rank 4.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, layout: Layout) -> Result<ProblemBuilder> {
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        if tensor.rank() != 4 {
            let order = match layout {
                Layout::HeadsFirst => "[B, H, N, D]",
                Layout::TokensFirst => "[B, N, H, D]",
            };
            bail!("{name} has shape {:?}: it must be {order}", tensor.shape())
        }
    }
    let dims = |tensor: &Tensor| -> Result<[usize; 4]> {
        let (b, second, third, d) = tensor.dims4()?;
        Ok(match layout {
            Layout::HeadsFirst => [b, second, third, d],
            Layout::TokensFirst => [b, third, second, d],
        })
    };
    let ([b, heads, seq_q, d], [k_b, kv_heads, seq_k, k_d]) = (dims(q)?, dims(k)?);
    let [v_b, v_heads, v_seq, d_v] = dims(v)?;
    if [k_b, k_d] != [b, d] {
        bail!("k has shape {:?}, and q {:?}: B and D must agree", k.shape(), q.shape())
    }
    if [v_b, v_heads, v_seq] != [k_b, kv_heads, seq_k] {
        bail!("v has shape {:?}, and k {:?}: all but D must agree", v.shape(), k.shape())
    }
    let builder = Problem::builder(b, heads, seq_q, d).kv_heads(kv_heads).seq_k(seq_k);
    Ok(builder.head_dim_v(d_v).layout(layout))
}

/// A problem of packed sequences.
fn packed(q: &Tensor, k: &Tensor, v: &Tensor, varlen: &Varlen) -> Result<ProblemBuilder> {
    for (name, tensor) in [("q", q), ("k", k), ("v", v)] {
        if tensor.rank() != 3 {
            bail!("{name} has shape {:?}: packed sequences are [total, H, D]", tensor.shape())
        }
    }
    let ((total_q, heads, d), (total_k, kv_heads, k_d)) = (q.dims3()?, k.dims3()?);
    let (v_total, v_heads, d_v) = v.dims3()?;
    if k_d != d {
        bail!("k has shape {:?}, and q {:?}: D must agree", k.shape(), q.shape())
    }
    if [v_total, v_heads] != [total_k, kv_heads] {
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
    let totals = flash_attention::Varlen { total_q, total_k };
    let builder = Problem::builder(numbers - 1, heads, (*max_seqlen_q).max(1), d);
    let builder = builder.kv_heads(kv_heads).seq_k(*max_seqlen_k).head_dim_v(d_v);
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
