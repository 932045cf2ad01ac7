//! A tile of a matrix product in scalar arithmetic: tiles in shared memory, pieces in
//! registers. For every storage type and every GPU.
//!
//! ```text
//! acc = 0                                  TILE x TILE of C, 4 x 4 per thread
//! for each slice of DEPTH terms:
//!     load A, B                            TILE x DEPTH each, as f32, term by term
//!     acc += A B
//! C = epilogue(acc)
//! ```

use simt::{math, memory::Memory, scalar::Scalar, shared::Shared, shared_array, thread, unroll};

use super::{Epilogue, Matrix, MatrixMut, Product, Storage};

/// Rows and columns of C that a block computes.
pub const TILE: u32 = 64;
/// Threads of a block: 16 x 16, each with a 4 x 4 piece.
pub const THREADS: u32 = 256;

/// Rows and columns of a thread's piece.
const PIECE: usize = 4;
/// Threads side by side over the rows, and over the columns.
const SIDE: u32 = TILE / PIECE as u32;
/// Terms of a slice.
const DEPTH: u32 = 16;
/// Elements from one term to the next in a shared tile: 16-byte aligned, and padded so that
/// the transposing writes fall into different banks.
const PITCH: u32 = TILE + 4;

const _: () = assert!(SIDE * SIDE == THREADS, "every piece has its thread");
const _: () = assert!(DEPTH * TILE % THREADS == 0, "every load has its thread");

/// The sums of a thread.
pub type Sums = [[f32; PIECE]; PIECE];

/// This thread's first row and column in a tile.
#[inline(always)]
#[must_use]
pub fn place() -> (u32, u32) {
    let tid = thread::thread_idx_x();
    (tid / SIDE * PIECE as u32, tid % SIDE * PIECE as u32)
}

/// Computes the tile of TILE x TILE elements of C from `first_row` and `first_column` on.
///
/// # Thread mapping
/// Thread `t` has rows `4 (t / 16)..` and columns `4 (t % 16)..`.
///
/// # Shared memory
/// Static, 8,704 bytes: the slices of A and B, as f32, term by term.
#[inline(always)]
pub fn tile<T: Scalar, A: Storage, B: Storage, E: Epilogue>(
    product: &Product<T, E>,
    first_row: u32,
    first_column: u32,
) {
    let mut acc = [[0.0f32; PIECE]; PIECE];
    let Product { a, b, c, depth, epilogue } = product;
    let first = (first_row, first_column);
    accumulate::<T, A, B>(&mut acc, (a, b, *depth), first);
    store(c, epilogue, &acc, first);
}

/// Adds the product of A and B, over the first `depth` terms, to the sums of the tile from row and
/// column `first` on.
///
/// # Thread mapping, shared memory
/// As for [`tile`].
#[inline(always)]
pub fn accumulate<T: Scalar, A: Storage, B: Storage>(
    acc: &mut Sums,
    (a_matrix, b_matrix, depth): (&Matrix<T>, &Matrix<T>, u32),
    (first_row, first_column): (u32, u32),
) {
    // Who am I.
    let tid = thread::thread_idx_x();
    let (row, column) = place();
    let a_smem = shared_array!(f32; (DEPTH * PITCH) as usize);
    let b_smem = shared_array!(f32; (DEPTH * PITCH) as usize);

    for slice in 0..depth.div_ceil(DEPTH) {
        let first_term = slice * DEPTH;
        // Hazard: the slice before may still be read while this one is written.
        thread::sync_threads();
        for element in (tid..DEPTH * TILE).step_by(THREADS as usize) {
            let (line, term) = A::share(element, TILE, DEPTH);
            let place = A::place(first_row + line, first_term + term);
            a_smem.write(term * PITCH + line, a_matrix.read_or_zero(place.0, place.1).to_f32());
            let (line, term) = B::share(element, TILE, DEPTH);
            let place = B::place(first_column + line, first_term + term);
            b_smem.write(term * PITCH + line, b_matrix.read_or_zero(place.0, place.1).to_f32());
        }
        // Hazard: the slices are read by threads that did not write them.
        thread::sync_threads();

        // acc += A B
        for term in 0..DEPTH {
            let a = read_vector(a_smem, term * PITCH + row);
            let b = read_vector(b_smem, term * PITCH + column);
            unroll!(for R in 0..4 {
                unroll!(for C in 0..4 {
                    acc[R][C] = math::fma(a[R], b[C], acc[R][C]);
                });
            });
        }
    }
}

/// Writes the sums of the tile from row and column `first` on, as the epilogue makes them.
///
/// # Thread mapping
/// As for [`tile`].
#[inline(always)]
pub fn store<T: Scalar, E: Epilogue>(
    c: &MatrixMut<T>,
    epilogue: &E,
    acc: &Sums,
    (first_row, first_column): (u32, u32),
) {
    let (row, column) = place();
    unroll!(for C in 0..4 {
        let column = first_column + column + C as u32;
        let of_column = epilogue.column(column);
        unroll!(for R in 0..4 {
            let row = first_row + row + R as u32;
            let value = epilogue.apply(acc[R][C], of_column);
            c.write_if_inside(row, column, T::from_f32(value));
        });
    });
}

/// Four neighbouring elements in one 16-byte load.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn read_vector(tile: Shared<f32>, index: u32) -> [f32; PIECE] {
    tile.read_as::<[u32; PIECE]>(index).map(f32::from_bits)
}

const _: () = assert!(<[u32; PIECE] as Memory>::BYTES == 16, "one load");
