//! Tiles in f32 and their products in scalar arithmetic: the work of a block of [`THREADS`] threads
//! with tiles of [`ROWS`] rows.
//!
//! ```text
//!              32 rows of B             thread (ty, tx), 16 x 8 of them:
//!           +------------+              rows     2 ty, 2 ty + 1 of A
//! 32 rows   | A Bᵀ: 2 x 4|              columns  tx, tx + 8, tx + 16, tx + 24 of A Bᵀ
//!   of A    | a thread   |              of sums  4 columns of every 32, from 4 tx on
//!           +------------+
//! ```
//!
//! Rows are padded by 4 elements, so that 8 rows start in 8 different groups of 4 banks.

use simt::{math, scalar::Scalar, shared::Shared, thread, unroll};

use crate::{
    args::Tensor,
    parts::{columns::Columns, softmax::SPAN},
};

/// Rows of a tile.
pub const ROWS: u32 = 32;
/// Threads of a block: 16 pairs of rows times 8 groups of columns.
pub const THREADS: u32 = 128;
/// Threads side by side over columns.
pub const COLUMN_THREADS: u32 = 8;
/// Rows that a thread owns.
pub const OWN_ROWS: usize = 2;
/// Columns of `A Bᵀ` that a thread owns.
pub const OWN_COLUMNS: usize = (ROWS / COLUMN_THREADS) as usize;
/// Elements of a 16-byte load.
pub const VECTOR: usize = 4;
/// Columns of a sum that the threads side by side cover with one vector each.
pub const COLUMN_STEP: usize = COLUMN_THREADS as usize * VECTOR;
/// Groups of columns of the largest head dim.
pub const MAX_GROUPS: usize = 128 / COLUMN_STEP;

const _: () = assert!(
    OWN_ROWS == 2 && OWN_COLUMNS == 4 && VECTOR == 4 && MAX_GROUPS == 4,
    "the bounds of unroll! below are these"
);
const _: () =
    assert!(ROWS == OWN_ROWS as u32 * THREADS / COLUMN_THREADS, "every row has its threads");

/// A thread's part of the sum of a tile: two rows, four columns of every 32.
pub type Sum = [[[f32; VECTOR]; MAX_GROUPS]; OWN_ROWS];

/// A sum of nothing.
pub const EMPTY: Sum = [[[0.0; VECTOR]; MAX_GROUPS]; OWN_ROWS];

/// This thread's `(ty, tx)`.
#[inline(always)]
#[must_use]
pub fn place() -> (u32, u32) {
    let tid = thread::thread_idx_x();
    (tid / COLUMN_THREADS, tid % COLUMN_THREADS)
}

/// Elements from one row to the next in a tile of `columns` columns.
#[must_use]
pub const fn pitch(columns: usize) -> u32 {
    (columns + VECTOR) as u32
}

/// Elements of a tile of `columns` columns.
#[must_use]
pub const fn len(columns: usize) -> u32 {
    ROWS * pitch(columns)
}

/// Loads rows from `first_row` on into a tile; rows and columns past the end are 0, so that what is
/// computed from them and hidden later is finite.
///
/// # Safety
/// The `seq` rows of a head of the tensor begin at element `head`.
#[inline(always)]
pub unsafe fn load<T: Scalar, const D: usize>(
    tensor: &Tensor,
    columns: Columns,
    head: u64,
    first_row: u32,
    seq: u32,
    tile: Shared<f32>,
) {
    // SAFETY: the rows are in the tensor, as stated above; none is read beyond `seq`.
    let view = unsafe { tensor.buffer.view::<T>() };
    for element in (thread::thread_idx_x()..ROWS * D as u32).step_by(THREADS as usize) {
        let (row, column) = (element / D as u32, element % D as u32);
        let value = if first_row + row < seq && columns.has(column) {
            let index = head + (first_row + row) as u64 * tensor.stride_n + column as u64;
            view.read(index).to_f32()
        } else {
            0.0
        };
        tile.write(row * pitch(D) + column, value);
    }
}

/// `A Bᵀ` of this thread, [`SPAN`] products at a time.
#[inline(always)]
#[must_use]
pub fn product<const D: usize>(
    a: Shared<f32>,
    b: Shared<f32>,
    (ty, tx): (u32, u32),
) -> [[f32; OWN_COLUMNS]; OWN_ROWS] {
    let mut sum = [[0.0; OWN_COLUMNS]; OWN_ROWS];
    for first in (0..D as u32).step_by(SPAN) {
        let mut part = [[0.0; OWN_COLUMNS]; OWN_ROWS];
        for d in (first..first + SPAN as u32).step_by(VECTOR) {
            let a_reg: [[f32; VECTOR]; OWN_ROWS] = core::array::from_fn(|r| {
                read_vector(a, (ty * OWN_ROWS as u32 + r as u32) * pitch(D) + d)
            });
            unroll!(for COLUMN in 0..4 {
                let row = tx + COLUMN as u32 * COLUMN_THREADS;
                let b_reg = read_vector(b, row * pitch(D) + d);
                unroll!(for R in 0..2 {
                    for e in 0..VECTOR {
                        part[R][COLUMN] = math::fma(a_reg[R][e], b_reg[e], part[R][COLUMN]);
                    }
                });
            });
        }
        unroll!(for R in 0..2 {
            unroll!(for COLUMN in 0..4 {
                sum[R][COLUMN] += part[R][COLUMN];
            });
        });
    }
    sum
}

/// `sum += factors ⊗ B[row]` of this thread: a factor for each of its rows.
#[inline(always)]
pub fn add_row<const D: usize>(
    sum: &mut Sum,
    factors: [f32; OWN_ROWS],
    b: Shared<f32>,
    row: u32,
    tx: u32,
) {
    unroll!(for GROUP in 0..4 {
        if GROUP < D / COLUMN_STEP {
            let column = (GROUP * COLUMN_STEP) as u32 + tx * VECTOR as u32;
            let b_reg = read_vector(b, row * pitch(D) + column);
            unroll!(for R in 0..2 {
                for e in 0..VECTOR {
                    sum[R][GROUP][e] = math::fma(factors[R], b_reg[e], sum[R][GROUP][e]);
                }
            });
        }
    });
}

/// Writes this thread's part of a sum times `factor` to the rows of a head from `first_row` on, and
/// the columns, that there are.
///
/// # Safety
/// The `seq` rows of a head of the tensor begin at element `head`, and no other block writes them.
#[inline(always)]
pub unsafe fn store<T: Scalar, const D: usize>(
    sum: &Sum,
    factor: f32,
    tensor: &Tensor,
    columns: Columns,
    (head, first_row, seq): (u64, u32, u32),
) {
    let (ty, tx) = place();
    // SAFETY: the rows are in the tensor and have no other writer, as stated above.
    let view = unsafe { tensor.buffer.view_mut::<T>() };
    unroll!(for R in 0..2 {
        let row = first_row + ty * OWN_ROWS as u32 + R as u32;
        if row < seq {
            unroll!(for GROUP in 0..4 {
                let column = (GROUP * COLUMN_STEP) as u32 + tx * VECTOR as u32;
                if GROUP < D / COLUMN_STEP && columns.has(column) {
                    for e in 0..VECTOR {
                        let index =
                            head + row as u64 * tensor.stride_n + (column + e as u32) as u64;
                        view.write(index, T::from_f32(sum[R][GROUP][e] * factor));
                    }
                }
            });
        }
    });
}

/// Four neighbouring elements in one 16-byte load.
#[inline(always)]
#[must_use]
pub fn read_vector(tile: Shared<f32>, index: u32) -> [f32; VECTOR] {
    tile.read_as::<[u32; VECTOR]>(index).map(f32::from_bits)
}
