//! Between candle's tensors on the CPU and the kernels of [`cpu`](crate::cpu).

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use flash_attention::{Problem, problem::Sequence};
use half::{bf16, f16};

use crate::{
    check::wrap,
    cpu::{self, Beside, Element, Pages, Passed, Rows, Wanted},
    op::{Call, Gradients},
    options::Varlen,
};

type Stored<'a> = (&'a CpuStorage, &'a Layout);

/// O and the LSE.
pub fn forward(call: &Call, qkv: [Stored<'_>; 3]) -> Result<(CpuStorage, CpuStorage)> {
    fn of<T: Element + WithDType>(
        call: &Call,
        qkv: [Stored<'_>; 3],
    ) -> Result<(CpuStorage, CpuStorage)> {
        with_call(call, qkv, |call: &cpu::Call<'_, T>| {
            let (o, lse) = cpu::forward(call);
            Ok((T::to_cpu_storage_owned(o), CpuStorage::F32(lse)))
        })
    }
    match call.problem.dtype() {
        flash_attention::DType::F32 => of::<f32>(call, qkv),
        flash_attention::DType::F16 => of::<f16>(call, qkv),
        flash_attention::DType::BF16 => of::<bf16>(call, qkv),
        flash_attention::DType::E4M3 => bail!("attention has f32, f16 and bf16"),
    }
}

/// The requested gradients; `d_o` is contiguous.
pub fn backward(
    call: &Call,
    qkvo: [&Tensor; 4],
    lse: &Tensor,
    d_o: &Tensor,
    wanted: Wanted,
) -> Result<Gradients> {
    match call.problem.dtype() {
        flash_attention::DType::F32 => backward_of::<f32>(call, qkvo, lse, d_o, wanted),
        flash_attention::DType::F16 => backward_of::<f16>(call, qkvo, lse, d_o, wanted),
        flash_attention::DType::BF16 => backward_of::<bf16>(call, qkvo, lse, d_o, wanted),
        flash_attention::DType::E4M3 => bail!("attention has f32, f16 and bf16"),
    }
}

fn backward_of<T: Element + WithDType>(
    call: &Call,
    [q, k, v, o]: [&Tensor; 4],
    lse: &Tensor,
    d_o: &Tensor,
    wanted: Wanted,
) -> Result<Gradients> {
    let guards = [q, k, v, o, lse, d_o].map(Tensor::storage_and_layout);
    let mut stored = Vec::with_capacity(guards.len());
    for (storage, layout) in &guards {
        stored.push((on_cpu(storage)?, *layout));
    }
    let lse = &stored[4].0.as_slice::<f32>()?[stored[4].1.start_offset()..];
    let p = &call.problem;
    let [o_rows, d_o_rows] = [rows::<T>(p, stored[3])?, rows(p, stored[5])?];
    let gradients =
        with_call(call, [stored[0], stored[1], stored[2]], |call: &cpu::Call<'_, T>| {
            Ok(cpu::backward(call, &Passed { o: o_rows, lse, d_o: d_o_rows }, wanted))
        })?;
    let device = q.device();
    let [dq, dk, dv] = gradients.qkv;
    let qkv = if wanted.qkv {
        let of = |numbers, like: &Tensor| Tensor::from_vec(numbers, like.shape(), device);
        Some([of(dq, q)?, of(dk, k)?, of(dv, v)?])
    } else {
        None
    };
    let shaped = |shape: Option<Vec<usize>>| shape.unwrap_or_default();
    let bias = gradients.bias.map(|x| Tensor::from_vec(x, shaped(p.bias_shape()), device));
    let sinks = gradients.sinks.map(|x| Tensor::from_vec(x, shaped(p.sinks_shape()), device));
    Ok(Gradients { qkv, bias: bias.transpose()?, sinks: sinks.transpose()? })
}

fn on_cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("the tensors of a call must be on one device"),
    }
}

/// Rows of Q, K, V or O: `[B, H, N, D]` in the order of the layout, or packed `[total, H, D]`.
fn rows<'a, T: WithDType>(p: &Problem, (storage, layout): Stored<'a>) -> Result<Rows<'a, T>> {
    let data = &storage.as_slice::<T>()?[layout.start_offset()..];
    let strides = crate::op::strides(p, layout);
    Ok(Rows { data, strides, d: layout.dims().last().copied().unwrap_or_default() })
}

/// Calls with the tensors as the kernels take them.
fn with_call<T: Element + WithDType, R>(
    call: &Call,
    [q, k, v]: [Stored<'_>; 3],
    then: impl FnOnce(&cpu::Call<'_, T>) -> Result<R>,
) -> Result<R> {
    let (p, options) = (&call.problem, &call.options);
    // Rows of a bias are read in place.
    let bias = match &options.bias {
        Some(bias) if p.seq_k() > 1 && bias.stride()[3] != 1 => Some(bias.contiguous()?),
        other => other.clone(),
    };
    let guard = bias.as_ref().map(Tensor::storage_and_layout);
    let bias = match &guard {
        Some((storage, layout)) => {
            let data = &on_cpu(storage)?.as_slice::<T>()?[layout.start_offset()..];
            // A dimension of 1 repeats.
            let stride = |at: usize| if layout.dims()[at] > 1 { layout.stride()[at] } else { 0 };
            Some(Rows { data, strides: [stride(0), stride(1), stride(2)], d: p.seq_k() })
        }
        None => None,
    };
    let beside = Beside {
        mask: numbers(options.mask.as_ref())?,
        alibi_slopes: numbers(options.alibi_slopes.as_ref())?,
        bias,
        sinks: numbers(options.sinks.as_ref())?,
    };
    let sequences = match &options.varlen {
        Some(varlen) => packed(p, varlen, options.page_table.is_some())?,
        None => {
            let lengths: Option<Vec<u32>> = numbers(options.key_lengths.as_ref())?;
            dense(p, lengths.as_deref())?
        }
    };
    let pages = match &options.page_table {
        Some(table) => Some(pages(table, p, k.1, &sequences)?),
        None => None,
    };
    let [q, k, v] = [rows(p, q)?, rows(p, k)?, rows(p, v)?];
    then(&cpu::Call { problem: *p, q, k, v, beside, sequences, pages })
}

/// The pages of the sequences; the pages that a call reads are checked.
fn pages(table: &Tensor, p: &Problem, k: &Layout, sequences: &[Sequence]) -> Result<Pages> {
    let (_, per_sequence) = table.dims2()?;
    let [count, page_size] = crate::op::pages(p, k);
    let numbers = table.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
    for (b, of) in sequences.iter().enumerate() {
        let read = of.seq_k.div_ceil(page_size);
        for (at, &page) in numbers[b * per_sequence..][..read].iter().enumerate() {
            if !usize::try_from(page).is_ok_and(|page| page < count) {
                bail!("page_table[{b}, {at}] = {page}: there are {count} pages")
            }
        }
    }
    let numbers = numbers.into_iter().map(|page| usize::try_from(page).unwrap_or(count)).collect();
    Ok(Pages { numbers, per_sequence, page_size })
}

/// The numbers of a tensor in order.
fn numbers<T: WithDType>(tensor: Option<&Tensor>) -> Result<Option<Vec<T>>> {
    tensor.map(|tensor| tensor.flatten_all()?.to_vec1()).transpose()
}

/// The batch entries.
fn dense(p: &Problem, lengths: Option<&[u32]>) -> Result<Vec<Sequence>> {
    let of = |seq_k| Sequence { first_q: 0, seq_q: p.seq_q(), first_k: 0, seq_k };
    let Some(lengths) = lengths else { return Ok(vec![of(p.seq_k()); p.batch()]) };
    if let Some((b, length)) = lengths.iter().enumerate().find(|(_, n)| **n as usize > p.seq_k()) {
        bail!("key_lengths[{b}] = {length}: there are {} keys", p.seq_k())
    }
    Ok(lengths.iter().map(|&length| of(length as usize)).collect())
}

/// Packed sequences, checked. Of a cache in pages only queries are packed.
fn packed(p: &Problem, varlen: &Varlen, in_pages: bool) -> Result<Vec<Sequence>> {
    let [q, k] = [&varlen.cu_seqlens_q, &varlen.cu_seqlens_k].map(Tensor::to_vec1::<u32>);
    let (q, k) = (q?, k?);
    let actual =
        Problem::packed(&q, &k, p.heads(), p.head_dim()).and_then(|builder| builder.build());
    let actual = actual.map_err(wrap)?;
    for (name, given, most, of) in [
        ("max_seqlen_q", p.seq_q(), actual.seq_q(), "rows"),
        ("max_seqlen_k", p.seq_k(), actual.seq_k(), "keys"),
    ] {
        if given < most {
            bail!("{name} = {given}: a sequence has {most} {of}")
        }
    }
    let (Some(given), Some(actual)) = (p.varlen(), actual.varlen()) else { return Ok(Vec::new()) };
    if in_pages && actual.total_q != given.total_q {
        let (end, total) = (actual.total_q, given.total_q);
        bail!("cu_seqlens_q ends at {end}: q has {total} rows, and each must be of a sequence")
    }
    for (name, total, end) in [
        ("cu_seqlens_q", given.total_q, actual.total_q),
        ("cu_seqlens_k", given.total_k, actual.total_k),
    ] {
        if end > total && !in_pages {
            bail!("{name} ends at {end}: there are {total} rows")
        }
    }
    Ok(Sequence::all(&q, &k).collect())
}
