//! decode_append: new keys and values take their places in the cache, rotated on the way.
//!
//! Lengths already count the new tokens, so the launch that follows attends to them: of `Nnew` tokens,
//! token `t` has position `length - Nnew + t`. A token with a position below 0 is left out.
//!
//! ```text
//! rotary embedding of a pair of columns (x, y) at position p, with the angle a = p * theta:
//!     x' = x cos a - y sin a
//!     y' = y cos a + x sin a             pairs: (c, c + R / 2), or (2 c, 2 c + 1) if interleaved
//! ```
//!
//! A cache in e4m3 gets the code that is nearest to a value divided by its head's scale; a rotated key is rounded
//! once, to its code.
//!
//! One block per token. Each thread moves 16 bytes at a time: eight columns, and their partners where the pairs
//! are half a row apart. The launch itself bounds it: 8 heads of 128 columns are 4 KB per token.
//!
//! Not measured. Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.4.2.

use half::{bf16, f16};
use simt::{
    e4m3,
    global::{Global, GlobalMut},
    math,
    memory::Memory,
    thread, unroll,
};

use crate::{
    args::{AppendArgs, AppendShape, Buffer, Tensor},
    decode::cache,
    entries,
    parts::{chunk::Chunk, schedule::divide},
};

/// Threads of a block.
pub const THREADS: u32 = 128;
/// Columns that a thread moves at a time.
const CHUNK: u32 = 8;

/// Appends keys and values, and rotates the keys and the queries of the same tokens.
///
/// # Layout
/// As [`AppendArgs`] says.
///
/// # Thread mapping
/// One block of [`THREADS`] threads per token `b Nnew + t`, along `x`.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are multiples of 16 bytes. No two
/// sequences may have the same place for a new key.
#[inline(always)]
pub unsafe fn decode_append<T: Chunk, E: Stored<T>>(args: &AppendArgs) {
    let AppendShape { seq_new, seq_k, heads, kv_heads, head_dim, head_dim_v, .. } = args.shape;
    let (b, t) = divide(thread::block_idx_x(), seq_new);
    // SAFETY: the lengths are empty or `[B]`, as the shapes above say, and `b` is a block's.
    let length = unsafe { cache::length(&args.cache, b, seq_k) };
    if length + t < seq_new {
        return;
    }
    let position = length + t - seq_new;
    // SAFETY: the position is before the sequence's end.
    let page = unsafe { cache::page_of(&args.cache, b, position) };
    let (k_chunks, v_chunks) = (head_dim / CHUNK, head_dim_v / CHUNK);
    let k_end = kv_heads * k_chunks;
    let v_end = k_end + kv_heads * v_chunks;
    let end = v_end + heads * k_chunks;
    let new = |tensor: &Tensor, h: u32| tensor.head(b, h) + t as u64 * tensor.stride_n;
    let cached = |tensor: &Tensor, h: u32| cache::row(tensor, (b, h), page, position);
    // SAFETY: scales are as `AppendArgs` says.
    let scale = |scales: &Buffer, h: u32| unsafe { E::scale(scales, h) };
    let mut chunk = thread::thread_idx_x();
    while chunk < end {
        // SAFETY: the tensors have the shapes stated above, and each place has one writer.
        unsafe {
            if chunk < k_end {
                let (h, c) = divide(chunk, k_chunks);
                let from = view::<T>(&args.k_new, new(&args.k_new, h));
                let to = view_mut::<E>(&args.k, cached(&args.k, h));
                rotate(args, position, from, to, scale(&args.scales.k, h), c);
            } else if chunk < v_end {
                let (h, c) = divide(chunk - k_end, v_chunks);
                let from = view::<T>(&args.v_new, new(&args.v_new, h));
                let to = view_mut::<E>(&args.v, cached(&args.v, h));
                copy(from, to, scale(&args.scales.v, h), c);
            } else {
                let (h, c) = divide(chunk - v_end, k_chunks);
                let from = view::<T>(&args.q, new(&args.q, h));
                let to = view_mut::<T>(&args.q_rotated, new(&args.q_rotated, h));
                rotate(args, position, from, to, 1.0, c);
            }
        }
        chunk += THREADS;
    }
}

/// The elements of a tensor from `first` on.
///
/// # Safety
/// As for [`Buffer::view`](crate::args::Buffer::view).
#[inline(always)]
unsafe fn view<T: Memory>(tensor: &Tensor, first: u64) -> Global<T> {
    // SAFETY: the tensor is allocated and aligned, as stated above.
    unsafe { tensor.buffer.view::<T>() }.skip(first)
}

/// The same, to be written.
///
/// # Safety
/// As for [`Buffer::view_mut`](crate::args::Buffer::view_mut).
#[inline(always)]
unsafe fn view_mut<T: Memory>(tensor: &Tensor, first: u64) -> (GlobalMut<T>, u64) {
    // SAFETY: the tensor is allocated, aligned and writable, as stated above.
    (unsafe { tensor.buffer.view_mut::<T>() }, first)
}

/// How a cache keeps elements of a type.
pub trait Stored<T: Chunk>: Memory {
    /// The scale of head `h`: values are divided by it before they are stored.
    ///
    /// # Safety
    /// `scales` must be f32 `[Hkv]`, where the type has scales.
    unsafe fn scale(scales: &Buffer, h: u32) -> f32;

    /// Stores a chunk that was not changed.
    fn keep(to: GlobalMut<Self>, index: u64, chunk: [u32; 4], scale: f32);

    /// Stores eight values.
    fn store(to: GlobalMut<Self>, index: u64, values: [f32; 8], scale: f32);
}

/// As they are.
impl<T: Chunk> Stored<T> for T {
    #[inline(always)]
    unsafe fn scale(_: &Buffer, _: u32) -> f32 {
        1.0
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn keep(to: GlobalMut<T>, index: u64, chunk: [u32; 4], _: f32) {
        to.write_as(index, chunk);
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn store(to: GlobalMut<T>, index: u64, values: [f32; 8], _: f32) {
        to.write_as(index, T::pack(values));
    }
}

/// As codes of e4m3.
impl<T: Chunk> Stored<T> for u8 {
    #[inline(always)]
    unsafe fn scale(scales: &Buffer, h: u32) -> f32 {
        // SAFETY: the scales are f32, as stated above.
        unsafe { scales.view::<f32>() }.read(h as u64)
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn keep(to: GlobalMut<u8>, index: u64, chunk: [u32; 4], scale: f32) {
        <u8 as Stored<T>>::store(to, index, T::unpack(chunk), scale);
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn store(to: GlobalMut<u8>, index: u64, values: [f32; 8], scale: f32) {
        let mut codes = [0u32; 2];
        unroll!(for E in 0..8 {
            codes[E / 4] |= (e4m3::from_f32(values[E] / scale) as u32) << (E % 4 * 8);
        });
        to.write_as(index, codes);
    }
}

/// Copies chunk `c` of a row.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn copy<T: Chunk, E: Stored<T>>(
    from: Global<T>,
    (to, first): (GlobalMut<E>, u64),
    scale: f32,
    c: u32,
) {
    let column = (c * CHUNK) as u64;
    E::keep(to, first + column, from.read_as::<[u32; 4]>(column), scale);
}

/// Rotates chunk `c` of a row, and with it the chunk half the rotated columns to its right. It reads both
/// before it writes either, so a row may be rotated in place.
///
/// # Safety
/// `args.cos` and `args.sin` must be `[positions, rotary_dim / 2]`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
unsafe fn rotate<T: Chunk, E: Stored<T>>(
    args: &AppendArgs,
    position: u32,
    from: Global<T>,
    to: (GlobalMut<E>, u64),
    scale: f32,
    c: u32,
) {
    let AppendShape { rotary_dim, positions, interleaved, .. } = args.shape;
    if c * CHUNK >= rotary_dim {
        copy(from, to, scale, c);
        return;
    }
    let half = rotary_dim / 2;
    // SAFETY: both have a row for each position, as stated above.
    let (cos, sin) = unsafe { (args.cos.view::<f32>(), args.sin.view::<f32>()) };
    let angles = position.min(positions.wrapping_sub(1)) as u64 * half as u64;
    let column = c * CHUNK;
    let (to, first) = to;
    if interleaved != 0 {
        let mut chunk = load(from, column);
        unroll!(for PAIR in 0..4 {
            let at = angles + (column / 2 + PAIR as u32) as u64;
            let pair = [chunk[2 * PAIR], chunk[2 * PAIR + 1]];
            let [x, y] = turned(pair, cos.read(at), sin.read(at));
            chunk[2 * PAIR] = x;
            chunk[2 * PAIR + 1] = y;
        });
        E::store(to, first + column as u64, chunk, scale);
    } else if column < half {
        let (mut left, mut right) = (load(from, column), load(from, column + half));
        unroll!(for E in 0..8 {
            let at = angles + (column + E as u32) as u64;
            let [x, y] = turned([left[E], right[E]], cos.read(at), sin.read(at));
            left[E] = x;
            right[E] = y;
        });
        E::store(to, first + column as u64, left, scale);
        E::store(to, first + (column + half) as u64, right, scale);
    }
}

/// A pair turned by an angle.
#[inline(always)]
fn turned([x, y]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [math::fma(x, cos, -(y * sin)), math::fma(y, cos, x * sin)]
}

/// Eight columns of a row.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn load<T: Chunk>(from: Global<T>, column: u32) -> [f32; 8] {
    T::unpack(from.read_as(column as u64))
}

entries! {
    /// Instances of [`decode_append`].
    pub static ENTRIES: AppendArgs => "sm_80", threads THREADS, min_blocks 1;
    decode_append: T in [f16, bf16] = decode_append::<T, T>;
}

entries! {
    /// Instances of [`decode_append`] that make codes of e4m3.
    pub static E4M3: AppendArgs => "sm_80", threads THREADS, min_blocks 1;
    decode_append_e4m3: T in [f16, bf16] = decode_append::<T, u8>;
}
