//! Attention in candle's own operations, for programs that compare.
#![allow(dead_code, reason = "no program that shares this uses everything")]

use candle_core::{D, DType, Device, Result, Tensor};
use flash_attention_candle::Window;

/// `softmax(Q Kᵀ / sqrt(D) + hidden) V` of `[B, H, N, D]`. Heads of K and V are repeated where there are
/// fewer.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, hidden: Option<&Tensor>) -> Result<Tensor> {
    let (_, heads, _, d) = q.dims4()?;
    let (k, v) = (repeat(k, heads)?, repeat(v, heads)?);
    let scores = (q.contiguous()?.matmul(&k.t()?)? * (1.0 / (d as f64).sqrt()))?;
    let scores = match hidden {
        Some(hidden) => scores.broadcast_add(hidden)?,
        None => scores,
    };
    // softmax_last_dim is faster and has no gradient.
    let weights = if scores.track_op() {
        candle_nn::ops::softmax(&scores, D::Minus1)?
    } else {
        candle_nn::ops::softmax_last_dim(&scores)?
    };
    weights.matmul(&v)
}

fn repeat(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, kv_heads, n, d) = x.dims4()?;
    let group = heads / kv_heads;
    if group == 1 {
        return x.contiguous();
    }
    x.unsqueeze(2)?.broadcast_as((b, kv_heads, group, n, d))?.reshape((b, heads, n, d))
}

/// The mask that hides keys from rows, `[rows, keys]`: -inf outside of the window, 0 inside.
pub fn hidden(
    rows: usize,
    keys: usize,
    window: Window,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let of = |i, j| if window.sees(i, j, rows, keys) { 0.0 } else { f32::NEG_INFINITY };
    let mut numbers = Vec::with_capacity(rows * keys);
    for i in 0..rows {
        numbers.extend((0..keys).map(|j| of(i, j)));
    }
    Tensor::from_vec(numbers, (rows, keys), device)?.to_dtype(dtype)
}

/// A causal mask.
pub fn causal(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    hidden(n, n, Window { left: None, right: Some(0) }, dtype, device)
}

/// The device of a name: `cpu`, or `cuda` with feature `cuda`.
pub fn device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::new_cuda(0),
        other => candle_core::bail!("{other:?} is no device: cpu or cuda"),
    }
}

/// The number that follows `--name` on the command line, or the text.
pub fn argument<T: std::str::FromStr>(name: &str, default: T) -> Result<T> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name).skip(1);
    match arguments.next() {
        None => Ok(default),
        Some(text) => match text.parse() {
            Ok(value) => Ok(value),
            Err(_) => candle_core::bail!("{name} {text}: it cannot be read"),
        },
    }
}
