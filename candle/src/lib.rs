//! Attention for candle.
//!
//! [`flash_attn`] and its variants have the signatures of candle-flash-attn: replace the crate's name.
//! [`attention`] has more: sinks, an additive bias, padding masks, caches, dropout.
//! [`attention_with_lse`] gives the log-sum-exp too. All have gradients, except of caches, in f32, f16 and
//! bf16, on CPUs and, with feature `cuda`, on GPUs.
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor, Var};
//! use flash_attention_candle::{Options, attention, flash_attn};
//!
//! # fn main() -> Result<()> {
//! let device = Device::cuda_if_available(0)?;
//! let random = |heads| Tensor::randn(0f32, 1., (2, 128, heads, 64), &device);
//! // [B, N, H, D]; 8 heads share 2 of keys and values.
//! let (q, k, v) = (Var::from_tensor(&random(8)?)?, random(2)?, random(2)?);
//! let o = flash_attn(&q, &k, &v, 0.125, true)?;
//! // [B, H, N, D]: a transposed view will do.
//! let [q_t, k_t, v_t] = [q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?];
//! let same = attention(&q_t, &k_t, &v_t, &Options { causal: true, ..Options::default() })?;
//! assert_eq!(o.dims(), [2, 128, 8, 64]);
//! assert_eq!(same.dims(), [2, 8, 128, 64]);
//! let gradients = o.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&q).unwrap().dims(), q.dims());
//! # Ok(())
//! # }
//! ```
//!
//! # On a GPU
//! With feature `cuda` a tensor on a CUDA device is computed on that device, in its context, on its stream.
//! Kernels read tensors through their strides, without a copy; outputs come from candle's allocator.
//! One case may copy Q and O: packed queries against a cache in pages, unless each sequence has one query.
//! The launches of a problem are planned once. The crate opens the driver's functions on first use: it
//! exports no `cu*` symbol, and takes none of candle's.
//!
//! # On a CPU
//! The `gemm` crate multiplies tiles, as it does for candle, on every thread of rayon's pool; arithmetic is
//! f32. Neither pass stores an `Nq x Nk` matrix.
//!
//! # Shapes, types, strides, errors
//! | | |
//! |---|---|
//! | types | f32, f16, bf16, one for Q, K, V and bias; candle-flash-attn has f16 and bf16 |
//! | Q, O | `[B, Nq, H, D]` for [`flash_attn`] and its variants, `[B, H, Nq, D]` or either for [`attention`]; packed `[total_q, H, D]` |
//! | K, V | as Q, with Nk keys and Hkv heads, which divides H; in pages `[pages, page_size, Hkv, D]`, or `[pages, Hkv, page_size, D]` as Q has it |
//! | page table | u32 or i32 `[B, max_pages]` |
//! | D | on GPUs multiples of 8 up to 256 (candle-flash-attn: 512); on CPUs up to 256. V may have another D than Q and K |
//! | strides | any, as long as the last dimension is contiguous; on GPUs steps and addresses are multiples of 16 bytes |
//! | slopes, sinks | f32 `[H]` (slopes: `[B, H]` too) |
//! | bias | `[B or 1, H or 1, Nq, Nk]`, any strides |
//! | padding mask | u8 `[B, Nk]` |
//! | lengths | u32 `[B + 1]` (`cu_seqlens`), u32 `[B]` (`key_lengths`), contiguous; on GPUs `key_lengths` and page tables go with f16 and bf16, without bias, padding mask and dropout |
//! | scale | above 0, at most 262144 |
//! | LSE | f32 `[B, H, Nq]`; packed `[H, total_q]`; natural log; no gradient |
//! | a row that sees no key | O = 0, LSE = -inf or the sink, no gradient |
//!
//! An error is a [`candle_core::Error`] that names the tensor, its value, and the right one: a shape, a
//! type, a device, strides, numbers out of range. On a GPU only the device sees the numbers of `cu_seqlens`,
//! `key_lengths` and page tables: the call does not check them.

#![warn(missing_debug_implementations)]

mod check;
mod compat;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod on_cpu;
mod op;
mod options;
mod paged;

pub use compat::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed,
    flash_attn_varlen_windowed, flash_attn_windowed,
};
pub use flash_attention::{Dropout, Layout, Window};
pub use op::{attention, attention_with_lse};
pub use options::{Options, Varlen};

/// The page from candle-flash-attn, compiled as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
