//! merge: a part of attention, or of a gradient, joins the sum of the parts before it.
//!
//! Attention over some of the keys gives each row an O and an LSE. Two such parts become one as the
//! online softmax joins two tiles; gradients of two parts are added:
//!
//! ```text
//! m = max(LSE_sum, LSE_part);  a = exp(LSE_sum - m);  b = exp(LSE_part - m)
//! O = (a O_sum + b O_part) / (a + b);  LSE = m + log(a + b)          weighted
//! G = G_sum + G_part                                                 not weighted
//! ```
//!
//! The sum is f32; a part is in the storage type, as the kernel that computed it left it. The last merge
//! writes the storage type. Two empty parts are empty: O = 0, LSE = -inf.
//!
//! Memory, for each column of a row: 2 bytes of the part and 4 of the sum read, 4 or 2 written. No
//! shared memory. Not measured.

use core::f32::consts::{LN_2, LOG2_E};

use half::{bf16, f16};
use simt::{global::Global, math, thread, unroll, warp};

use crate::{
    args::MergeArgs,
    entries,
    parts::{
        chunk::{Chunk, MAX_ELEMENTS},
        schedule::divide,
        softmax,
    },
};

/// Threads of a block.
pub const THREADS: u32 = 128;
/// Threads of a row: each takes every eighth chunk of the part.
pub const ROW_THREADS: u32 = 8;
/// Rows of a block.
pub const ROWS: u32 = THREADS / ROW_THREADS;

/// Flag: there is a sum already.
pub const SUM: u32 = 1;
/// Flag: there is a part.
pub const PART: u32 = 2;
/// Flag: sum and part are weighted by their LSE.
pub const WEIGHTED: u32 = 4;
/// Flag: the result goes to `out` in the storage type, and not to the sum.
pub const OUT: u32 = 8;

/// Merges a part into a sum.
///
/// # Layout
/// As [`MergeArgs`] says. D is a multiple of 8.
///
/// # Thread mapping
/// Eight neighbouring threads per row, [`ROWS`] rows per block, along `x`.
///
/// # Safety
/// The buffers of `args` must have these shapes, as far as its flags ask for them, with addresses and
/// strides that are multiples of 16 bytes. Nobody else may write the sum and the result.
#[inline(always)]
pub unsafe fn merge<T: Chunk>(args: &MergeArgs) {
    let MergeArgs { rows, total_rows, columns, flags, lse_stride, .. } = *args;
    let (lane, row) = (thread::thread_idx_x() % ROW_THREADS, thread::thread_idx_x() / ROW_THREADS);
    let place = thread::block_idx_x() * ROWS + row;
    let is_row = place < total_rows;
    let place = place.min(total_rows - 1);
    let (matrix, i) = divide(place, rows);
    let (b, h) = divide(matrix, args.heads);
    let has = |flag: u32| flags & flag != 0;
    // SAFETY: the buffers have the shapes stated above.
    let (part, before, sum, out) = unsafe {
        (
            args.part.buffer.view::<T>(),
            args.sum.buffer.view::<f32>(),
            args.sum.buffer.view_mut::<f32>(),
            args.out.buffer.view_mut::<T>(),
        )
    };
    // SAFETY: as above.
    let (part_lse, sum_lse, new_lse) = unsafe {
        (
            args.part_lse.view::<f32>(),
            args.sum_lse.view::<f32>(),
            if has(OUT) { args.out_lse } else { args.sum_lse }.view_mut::<f32>(),
        )
    };
    let lse_row = matrix as u64 * lse_stride + i as u64;

    // How much of the sum and of the part there is in the result.
    let (mut of_sum, mut of_part, mut lse) = (1.0, 1.0, f32::NEG_INFINITY);
    if has(WEIGHTED) {
        // Past the last row: another warp writes that row's LSE.
        let of = |flag: u32, lse: Global<f32>, at: u64| {
            if has(flag) && is_row { lse.read(at) } else { f32::NEG_INFINITY }
        };
        let (old, joins) = (of(SUM, sum_lse, lse_row), of(PART, part_lse, place as u64));
        let m = math::max(old, joins);
        let m_used = softmax::safe_max(m);
        let a = math::exp2((old - m_used) * LOG2_E);
        let b = math::exp2((joins - m_used) * LOG2_E);
        let normaliser = softmax::normaliser(a + b);
        (of_sum, of_part) = (a * normaliser, b * normaliser);
        lse = if a + b == 0.0 { m } else { math::fma(math::log2(a + b), LN_2, m_used) };
    }
    // Hazard: the LSE that all threads of a row read is written by its first below.
    warp::sync_warp(u32::MAX);
    if !is_row {
        return;
    }

    let row_of = |tensor: &crate::args::Tensor| tensor.head(b, h) + i as u64 * tensor.stride_n;
    let (part_row, sum_row, out_row) = (row_of(&args.part), row_of(&args.sum), row_of(&args.out));
    for column in (lane * T::ELEMENTS..columns).step_by((ROW_THREADS * T::ELEMENTS) as usize) {
        let column = column as u64;
        let mut values = [0.0; MAX_ELEMENTS];
        if has(PART) {
            values = T::unpack(part.read_as(part_row + column));
            unroll!(for E in 0..8 {
                values[E] *= of_part;
            });
        }
        if has(SUM) {
            unroll!(for FOUR in 0..2 {
                if 4 * (FOUR as u32) < T::ELEMENTS {
                    let four = before.read_as::<[u32; 4]>(sum_row + column + 4 * FOUR as u64);
                    unroll!(for E in 0..4 {
                        let at = 4 * FOUR + E;
                        values[at] = math::fma(f32::from_bits(four[E]), of_sum, values[at]);
                    });
                }
            });
        }
        if has(OUT) {
            out.write_as(out_row + column, T::pack(values));
        } else {
            unroll!(for FOUR in 0..2 {
                if 4 * (FOUR as u32) < T::ELEMENTS {
                    let mut four = [0u32; 4];
                    unroll!(for E in 0..4 {
                        four[E] = values[4 * FOUR + E].to_bits();
                    });
                    sum.write_as(sum_row + column + 4 * FOUR as u64, four);
                }
            });
        }
    }
    if has(WEIGHTED) && lane == 0 {
        new_lse.write(lse_row, lse);
    }
}

entries! {
    /// Instances of [`merge()`].
    pub static ENTRIES: MergeArgs => "sm_80", threads THREADS, min_blocks 1;
    merge: T in [f32, f16, bf16] = merge::<T>;
}
