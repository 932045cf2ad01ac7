//! linear_bias: the gradient of a projection's bias, for every rung.
//!
//! ```text
//! db[c] = sum over r of dy[r, c]
//! ```
//!
//! A block has 32 bytes of each row, which is what memory delivers at a time: few columns, hence many
//! blocks. A thread sums 16 bytes of every 256th row in registers; then the lanes of a warp, and
//! then the warps, in a fixed order: the same bits each time.
//!
//! Memory: reads dy once, 1 FLOP per element. Shared memory: 1,024 bytes, static. Measured: not
//! measured.
//!
//! Source: the derivative of `y = x wᵀ + bias` by the bias is 1 in every row.

use half::{bf16, f16};
use simt::{shared_array, thread, unroll, warp};

use super::{LinearProduct as _, Y};
use crate::{
    args::LinearArgs,
    entries,
    parts::{
        chunk::{Chunk, MAX_ELEMENTS},
        gemm::Matrix,
    },
};

/// Threads of a block.
pub const THREADS: u32 = 512;
/// Chunks of 16 bytes that a block has of each row.
const CHUNKS: u32 = 2;
/// Rows that a block reads at a time.
const ROWS: u32 = THREADS / CHUNKS;
/// Rows that a warp reads at a time.
const WARP_ROWS: u32 = warp::LANES / CHUNKS;
/// Rows of a thread that are on their way at the same time.
const AHEAD: u32 = 4;
const WARPS: u32 = THREADS / warp::LANES;
/// The most columns of a block.
const MAX_COLUMNS: u32 = CHUNKS * MAX_ELEMENTS as u32;

/// Columns of a block, given the bytes of an element.
#[must_use]
pub const fn columns(element_bytes: u32) -> u32 {
    CHUNKS * 16 / element_bytes
}

/// `db = column sums of dy`; nothing where there is no bias.
///
/// # Layout
/// `y: [rows, out]` holds dy; `bias: [out]` or empty is written.
///
/// # Thread mapping
/// A block of [`THREADS`] threads per [`columns`] columns. The first half of a warp has the first
/// chunk of 16 rows, the second half the second.
///
/// # Shared memory
/// Static: the sums of each warp.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn linear_bias<T: Chunk>(args: &LinearArgs) {
    if args.bias.is_empty() {
        return;
    }
    let of_warps = shared_array!(f32; (WARPS * MAX_COLUMNS) as usize);
    // SAFETY: the buffers have the shapes stated above.
    let (dy, db) = unsafe { (Y::product::<T>(args).c.place(), args.bias.view_mut::<T>()) };

    // Who am I.
    let (lane, warp) = (warp::lane_id(), warp::warp_id());
    let block_columns = const { columns(T::BYTES) };
    let first_column = thread::block_idx_x() * block_columns;
    let own_column = lane / WARP_ROWS * T::ELEMENTS;

    let is_aligned = dy.is_aligned();
    let mut sums = [0.0; MAX_ELEMENTS];
    let mut row = warp * WARP_ROWS + lane % WARP_ROWS;
    while row < dy.rows {
        let mut values = [[0.0; MAX_ELEMENTS]; AHEAD as usize];
        unroll!(for I in 0..4 {
            let row = row + I as u32 * ROWS;
            values[I] = chunk_of(&dy, is_aligned, row, first_column + own_column);
        });
        unroll!(for I in 0..4 {
            unroll!(for C in 0..8 {
                sums[C] += values[I][C];
            });
        });
        row += AHEAD * ROWS;
    }

    unroll!(for C in 0..8 {
        if (C as u32) < T::ELEMENTS {
            let sum = warp::reduce_add::<WARP_ROWS>(sums[C]);
            if lane % WARP_ROWS == 0 {
                of_warps.write(warp * block_columns + own_column + C as u32, sum);
            }
        }
    });
    // Hazard: sums are read by threads that did not write them.
    thread::sync_threads();
    let column = thread::thread_idx_x();
    if column < block_columns && first_column + column < dy.columns {
        let mut sum = 0.0;
        for warp in 0..WARPS {
            sum += of_warps.read(warp * block_columns + column);
        }
        db.write((first_column + column).into(), T::from_f32(sum));
    }
}

/// The values of 16 bytes of a row; 0 outside.
#[inline(always)]
fn chunk_of<T: Chunk>(
    dy: &Matrix<T>,
    is_aligned: bool,
    row: u32,
    column: u32,
) -> [f32; MAX_ELEMENTS] {
    if is_aligned {
        return T::unpack(dy.chunk_or_zero(row, column));
    }
    let mut values = [0.0; MAX_ELEMENTS];
    unroll!(for C in 0..8 {
        if (C as u32) < T::ELEMENTS {
            values[C] = dy.read_or_zero(row, column + C as u32).to_f32();
        }
    });
    values
}

entries! {
    /// Instances of [`linear_bias`].
    pub static ENTRIES: LinearArgs => "sm_75", threads THREADS, min_blocks 1;
    linear_bias: T in [f32, f16, bf16] = linear_bias::<T>;
}
