//! Linear projections `y = x wᵀ + bias`, the first two rungs: naive and tiled.
//!
//! The ideas: `linear_naive` writes the formula down, a thread per element of `y`.
//! `linear_tiled` reads every element once per tile instead of once per product: a block
//! keeps tiles of `x` and `w` in shared memory, and each thread a 4 x 4 piece of `y` in
//! registers.
//!
//! ```text
//! acc = 0                                  TILE x TILE of y, 4 x 4 a thread
//! for each slice of DEPTH input features:
//!     load x, w                            TILE x DEPTH each, as f32, transposed
//!     acc += x wᵀ
//! y = acc + bias
//! ```
//!
//! Memory: naive reads 2 elements for 2 FLOP. Tiled reads 2 * TILE elements from global
//! memory for 2 * TILE² FLOP, and 8 from shared memory for 32; 8,704 bytes of static
//! shared memory.
//!
//! Measured: not measured yet. Limits: scalar fma; `linear_mma` has the tensor cores.
//!
//! Source: Volkov and Demmel, "Benchmarking GPUs to Tune Dense Linear Algebra", 2008
//! (tiles in registers over tiles in shared memory).

use half::{bf16, f16};
use simt::{math, memory::Memory, scalar::Scalar, shared::Shared, shared_array, thread, unroll};

use crate::{
    args::{Buffer, LinearArgs},
    entries,
};

/// Rows and columns of a block of [`linear_naive`].
pub const NAIVE_TILE: u32 = 16;
/// Rows and columns of `y` that a block of [`linear_tiled`] computes.
pub const TILE: u32 = 64;
/// Threads of a block of [`linear_tiled`]: 16 x 16, each with a 4 x 4 piece.
pub const TILED_THREADS: u32 = 256;

/// Rows and columns of a thread's piece.
const PIECE: usize = 4;
/// Threads side by side over the rows, and over the columns.
const SIDE: u32 = TILE / PIECE as u32;
/// Input features of a slice.
const DEPTH: u32 = 16;
/// Elements from one input feature to the next in a shared tile: 16-byte aligned, and
/// padded so that the transposing writes fall into different banks.
const PITCH: u32 = TILE + 4;

const _: () = assert!(SIDE * SIDE == TILED_THREADS, "every piece has its thread");
const _: () = assert!(DEPTH * TILE % TILED_THREADS == 0, "every load has its thread");

/// Element `column` of the bias, 0 where there is none.
///
/// # Safety
/// The buffer must be empty or longer than `column` elements.
#[inline(always)]
pub(crate) unsafe fn bias_at<T: Scalar>(bias: &Buffer, column: u32) -> f32 {
    if bias.is_empty() {
        return 0.0;
    }
    // SAFETY: the caller vouches for the buffer.
    unsafe { bias.view::<T>() }.read(column.into()).to_f32()
}

/// `y = x wᵀ + bias`, as the formula says.
///
/// # Layout
/// `x: [rows, in]`, `w: [out, in]`, `bias: [out]` or empty, `y: [rows, out]`.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads, a thread per element; `x` counts rows in blocks of 16, `y`
/// columns. Within a block `x` counts columns, so that neighbours write side by side.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn linear_naive<T: Scalar>(args: &LinearArgs) {
    let row = thread::block_idx_x() * NAIVE_TILE + thread::thread_idx_y();
    let column = thread::block_idx_y() * NAIVE_TILE + thread::thread_idx_x();
    if row >= args.rows || column >= args.out_features {
        return;
    }
    // SAFETY: the caller vouches for the buffers.
    let (x, w, y) = unsafe { (args.x.view::<T>(), args.w.view::<T>(), args.y.view_mut::<T>()) };
    let features = args.in_features as u64;
    let (x_row, w_row) = (row as u64 * features, column as u64 * features);
    let mut acc = 0.0;
    for i in 0..features {
        acc = math::fma(x.read(x_row + i).to_f32(), w.read(w_row + i).to_f32(), acc);
    }
    // SAFETY: the caller vouches for the buffer.
    acc += unsafe { bias_at::<T>(&args.bias, column) };
    y.write(row as u64 * args.out_features as u64 + column as u64, T::from_f32(acc));
}

/// `y = x wᵀ + bias` over tiles in shared memory.
///
/// # Layout
/// As for [`linear_naive`].
///
/// # Thread mapping
/// A block per tile of 64 x 64 elements of `y`; `x` counts tiles of rows, `y` tiles of
/// columns. Thread `t` has rows `4 (t / 16)..` and columns `4 (t % 16)..` of it.
///
/// # Shared memory
/// Static: the slices of `x` and `w`, transposed.
///
/// # Safety
/// The buffers of `args` must have these shapes.
#[inline(always)]
pub unsafe fn linear_tiled<T: Scalar>(args: &LinearArgs) {
    // Who am I.
    let tid = thread::thread_idx_x();
    let (ty, tx) = (tid / SIDE, tid % SIDE);
    let first_row = thread::block_idx_x() * TILE;
    let first_column = thread::block_idx_y() * TILE;
    let x_smem = shared_array!(f32; (DEPTH * PITCH) as usize);
    let w_smem = shared_array!(f32; (DEPTH * PITCH) as usize);

    let mut acc = [[0.0f32; PIECE]; PIECE];
    let num_slices = args.in_features.div_ceil(DEPTH);
    for slice in 0..num_slices {
        // Hazard: the slice before may still be read while this one is written.
        thread::sync_threads();
        // SAFETY: the caller vouches for the buffers.
        unsafe {
            load_slice::<T>(&args.x, first_row, args.rows, slice, args.in_features, x_smem);
            load_slice::<T>(
                &args.w,
                first_column,
                args.out_features,
                slice,
                args.in_features,
                w_smem,
            );
        }
        // Hazard: the slices are read by threads that did not write them.
        thread::sync_threads();

        // acc += x wᵀ
        for i in 0..DEPTH {
            let x_reg = read_vector(x_smem, i * PITCH + ty * PIECE as u32);
            let w_reg = read_vector(w_smem, i * PITCH + tx * PIECE as u32);
            unroll!(for R in 0..4 {
                unroll!(for C in 0..4 {
                    acc[R][C] = math::fma(x_reg[R], w_reg[C], acc[R][C]);
                });
            });
        }
    }

    // Add the bias, store y.
    // SAFETY: the caller vouches for the buffer.
    let y = unsafe { args.y.view_mut::<T>() };
    unroll!(for C in 0..4 {
        let column = first_column + tx * PIECE as u32 + C as u32;
        if column < args.out_features {
            // SAFETY: the column is one of the bias's.
            let bias = unsafe { bias_at::<T>(&args.bias, column) };
            unroll!(for R in 0..4 {
                let row = first_row + ty * PIECE as u32 + R as u32;
                if row < args.rows {
                    let index = row as u64 * args.out_features as u64 + column as u64;
                    y.write(index, T::from_f32(acc[R][C] + bias));
                }
            });
        }
    });
}

/// Loads DEPTH columns of TILE rows from `first_row` on, transposed; what is outside of
/// the matrix is 0 and adds nothing.
///
/// # Safety
/// The buffer must hold `rows` rows of `columns` elements.
#[inline(always)]
unsafe fn load_slice<T: Scalar>(
    matrix: &Buffer,
    first_row: u32,
    rows: u32,
    slice: u32,
    columns: u32,
    tile: Shared<f32>,
) {
    // SAFETY: the caller vouches for the buffer.
    let view = unsafe { matrix.view::<T>() };
    for element in (thread::thread_idx_x()..DEPTH * TILE).step_by(TILED_THREADS as usize) {
        // Neighbouring threads read neighbouring columns of a row.
        let (r, c) = (element / DEPTH, element % DEPTH);
        let (row, column) = (first_row + r, slice * DEPTH + c);
        let inside = row < rows && column < columns;
        let value = if inside {
            view.read(row as u64 * columns as u64 + column as u64).to_f32()
        } else {
            0.0
        };
        tile.write(c * PITCH + r, value);
    }
}

/// Four neighbouring elements in one 16-byte load.
#[inline(always)]
fn read_vector(tile: Shared<f32>, index: u32) -> [f32; PIECE] {
    tile.read_as::<[u32; PIECE]>(index).map(f32::from_bits)
}

const _: () = assert!(<[u32; PIECE] as Memory>::BYTES == 16, "one load");

entries! {
    /// Instances of [`linear_naive`].
    pub static NAIVE: LinearArgs => "sm_75", threads NAIVE_TILE * NAIVE_TILE, min_blocks 1;
    linear_naive_f32 = linear_naive::<f32>;
    linear_naive_f16 = linear_naive::<f16>;
    linear_naive_bf16 = linear_naive::<bf16>;
}
entries! {
    /// Instances of [`linear_tiled`].
    pub static TILED: LinearArgs => "sm_75", threads TILED_THREADS, min_blocks 2;
    linear_tiled_f32 = linear_tiled::<f32>;
    linear_tiled_f16 = linear_tiled::<f16>;
    linear_tiled_bf16 = linear_tiled::<bf16>;
}
