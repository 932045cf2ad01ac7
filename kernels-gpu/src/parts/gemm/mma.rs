//! A tile of a matrix product on tensor cores, its operands brought by asynchronous copies.
//!
//! ```text
//! start to load slices 0 .. STAGES - 1     BM x DEPTH of A, DEPTH x BN of B each
//! acc = 0                                  BM x BN, in registers
//! for each slice of DEPTH terms:
//!     wait for it                          the next STAGES - 2 are on their way
//!     start to load slice + STAGES - 1     into the stage that was used up before
//!     acc += A B                           DEPTH / 16 steps of mma.sync
//! C = epilogue(acc)
//! ```
//!
//! ```text
//!              BN columns                 four warps, each 16 M_TILES x 8 N_TILES;
//!          +--------+--------+            for BN = 128: two by two, 64 x 64 each
//!   64     | warp 0 | warp 1 |
//!  rows    +--------+--------+
//!          | warp 2 | warp 3 |
//!          +--------+--------+
//! ```
//!
//! A warp with 64 x 64 loads four fragments of A and four pairs of B, 4 KiB of shared memory,
//! for 32 instructions of 4,096 FLOP: 32 FLOP per byte.

use simt::{
    async_copy,
    layout::{CHUNK, Swizzled, TileLayout},
    mma::TensorCore,
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use super::{Epilogue, Matrix, MatrixMut, Product, Storage};
use crate::parts::{fragment, online::transpose_quad, tile};

/// Rows of C that a block computes.
pub const BM: u32 = 128;
/// Terms of a slice: two steps of the instruction.
pub const DEPTH: u32 = 32;
/// Slices in shared memory: one in use, the others on their way. With BN = 128 they take
/// 48 KiB, which every GPU gives to a block without being asked.
pub const STAGES: u32 = 3;
/// Threads of a block: four warps.
pub const THREADS: u32 = tile::FOUR_WARPS;

/// Warps of a block.
const WARPS: u32 = THREADS / warp::LANES;
/// Columns of four products side by side: a row's four lanes store 16 bytes each.
const QUAD: u32 = 32;

const _: () = assert!(DEPTH == 2 * 16, "the steps are written out");

/// Dynamic shared memory of a block in bytes, for tiles of `columns` columns of C.
#[must_use]
pub const fn shared_bytes(columns: u32) -> u32 {
    STAGES * (BM + columns) * DEPTH * 2
}

/// Loads ROWS x COLUMNS elements of a matrix from `row` and `column` on into a tile, by
/// asynchronous copies where it [is aligned](Matrix::is_aligned), else one element at a
/// time. What is outside of the matrix is 0. The caller commits, waits, and then has a
/// barrier.
#[inline(always)]
pub fn load<T: Scalar, L: TileLayout, const COLUMNS: usize, const ROWS: usize>(
    matrix: &Matrix<T>,
    row: u32,
    column: u32,
    to: Shared<T>,
) {
    if matrix.is_aligned() {
        let tid = thread::thread_idx_x();
        tile::for_each_chunk!(L, COLUMNS, ROWS, tid of THREADS, |index, (r, below), (c, right)| {
            let (row, column) = (row + r + below, column + c + right);
            let from = matrix.index(row, column);
            async_copy::copy_or_zero(to, index, matrix.view, from, matrix.has(row, column));
        });
    } else {
        // Neighbouring threads take neighbouring elements.
        for element in (thread::thread_idx_x()..(ROWS * COLUMNS) as u32).step_by(THREADS as usize) {
            let (r, c) = (element / COLUMNS as u32, element % COLUMNS as u32);
            to.write(element_index::<L>(r, c), matrix.read_or_zero(row + r, column + c));
        }
    }
}

/// The sums of a warp, `[M_TILES][N_TILES]` products of 16 x 8.
pub type Sums<const M_TILES: usize, const N_TILES: usize> = [[[f32; 4]; N_TILES]; M_TILES];

/// Rows and columns of C at which this thread's warp begins.
#[inline(always)]
fn place_of_warp<const BN: usize, const M_TILES: usize, const N_TILES: usize>() -> (u32, u32) {
    let side_by_side = const {
        let side_by_side = BN as u32 / (8 * N_TILES as u32);
        assert!(side_by_side * 8 * N_TILES as u32 == BN as u32, "columns are divided evenly");
        assert!(WARPS / side_by_side * 16 * M_TILES as u32 == BM, "every row has its warp");
        assert!(M_TILES <= 4 && N_TILES <= 16 && N_TILES % 4 == 0, "as the loops are written");
        side_by_side
    };
    let warp = warp::warp_id();
    (
        warp / side_by_side * const { 16 * M_TILES as u32 },
        warp % side_by_side * const { 8 * N_TILES as u32 },
    )
}

/// This lane's first row and column of C in a tile: it has this row and the one 8 below of every 16
/// rows of its warp's, this column and the next of every 8 columns.
#[inline(always)]
#[must_use]
pub fn place<const BN: usize, const M_TILES: usize, const N_TILES: usize>() -> (u32, u32) {
    let (warp_row, warp_column) = place_of_warp::<BN, M_TILES, N_TILES>();
    let (g, column) = fragment::row_and_column();
    (warp_row + g, warp_column + column)
}

/// Computes the tile of BM x BN elements of C from `first_row` and `first_column` on.
///
/// # Thread mapping
/// As in the header; lane `4 g + t` of a warp has rows `g` and `g + 8` of every 16, columns
/// `2 t` and `2 t + 1` of every 8.
///
/// # Shared memory
/// Dynamic, [`shared_bytes`]`(BN)`: the stages of A, then the stages of B.
///
/// # Safety
/// The launch must give the threads and the shared memory stated here.
#[inline(always)]
pub unsafe fn tile<
    T: Scalar,
    C: TensorCore<T>,
    A: Storage,
    B: Storage,
    E: Epilogue,
    const BN: usize,
    const M_TILES: usize,
    const N_TILES: usize,
>(
    product: &Product<T, E>,
    first_row: u32,
    first_column: u32,
) {
    let mut acc: Sums<M_TILES, N_TILES> = [[[0.0; 4]; N_TILES]; M_TILES];
    let Product { a, b, c, depth, epilogue } = product;
    let (operands, first) = ((a, b, *depth), (first_row, first_column));
    // SAFETY: the launch gives the threads and the shared memory stated above.
    unsafe {
        accumulate::<T, C, A, B, BN, M_TILES, N_TILES>(&mut acc, operands, first);
        store::<T, C, E, BN, M_TILES, N_TILES>(c, epilogue, &acc, first);
    }
}

/// Adds the product of A and B, over the first `depth` terms, to the sums of the tile from row
/// and column `first` on. Between two calls the block has a barrier: the stages of the first may still
/// be read.
///
/// # Thread mapping, shared memory
/// As for [`tile()`].
///
/// # Safety
/// As for [`tile()`].
#[inline(always)]
pub unsafe fn accumulate<
    T: Scalar,
    C: TensorCore<T>,
    A: Storage,
    B: Storage,
    const BN: usize,
    const M_TILES: usize,
    const N_TILES: usize,
>(
    acc: &mut Sums<M_TILES, N_TILES>,
    (a, b, depth): (&Matrix<T>, &Matrix<T>, u32),
    (first_row, first_column): (u32, u32),
) {
    const {
        let whole = BN as u32 == 8 * N_TILES as u32 || N_TILES % 8 == 0;
        assert!(!B::IS_MN || whole, "a warp begins at a whole span");
        assert!(!A::IS_MN || M_TILES.is_power_of_two(), "a warp begins at a power of two of rows");
    }
    let (a_len, b_len) = const { (BM * DEPTH, BN as u32 * DEPTH) };

    // Who am I.
    let (warp_row, warp_column) = place_of_warp::<BN, M_TILES, N_TILES>();
    let a_origin = A::a_origin::<{ BM as usize }>(warp_row);
    let b_origin = B::b_origin::<BN>(warp_column);
    // SAFETY: the launch gives the shared memory.
    let (a_stages, b_stages) = unsafe {
        (
            Shared::<T>::dynamic(0, STAGES * a_len),
            Shared::<T>::dynamic(STAGES * a_len * T::BYTES, STAGES * b_len),
        )
    };

    let num_slices = depth.div_ceil(DEPTH);
    let load_slice = |slice: u32, stage: u32| {
        if slice < num_slices {
            let term = slice * DEPTH;
            let a_smem = a_stages.slice(stage * a_len, a_len);
            A::load::<T, { BM as usize }>(a, first_row, term, a_smem);
            let b_smem = b_stages.slice(stage * b_len, b_len);
            B::load::<T, BN>(b, first_column, term, b_smem);
        }
        // An empty group too: slices and groups are counted alike.
        async_copy::commit();
    };
    for slice in 0..STAGES - 1 {
        load_slice(slice, slice);
    }

    let (mut stage, mut free_stage) = (0, STAGES - 1);
    for slice in 0..num_slices {
        // Hazard: this thread's copies of the slice may not have landed.
        async_copy::wait::<{ STAGES - 2 }>();
        // Hazards: the slice was loaded by all threads; and the free stage, which is
        // overwritten next, may still be read until every warp is done with it.
        thread::sync_threads();
        load_slice(slice + STAGES - 1, free_stage);

        let a_smem = a_stages.slice(stage * a_len, a_len);
        let b_smem = b_stages.slice(stage * b_len, b_len);
        unroll!(for STEP in 0..2 {
            let term = 16 * STEP as u32;
            let mut a = [[0u32; 4]; M_TILES];
            unroll!(for M in 0..4 {
                if M < M_TILES {
                    let row = 16 * M as u32;
                    a[M] = A::fragments::<T, { BM as usize }>(a_smem, a_origin, row, term);
                }
            });
            unroll!(for PAIR in 0..8 {
                if PAIR < N_TILES / 2 {
                    let b = B::fragments::<T, BN>(b_smem, b_origin, 16 * PAIR as u32, term);
                    unroll!(for M in 0..4 {
                        if M < M_TILES {
                            C::multiply(&mut acc[M][2 * PAIR], a[M], [b[0], b[1]]);
                            C::multiply(&mut acc[M][2 * PAIR + 1], a[M], [b[2], b[3]]);
                        }
                    });
                }
            });
        });
        free_stage = stage;
        stage = if stage == STAGES - 1 { 0 } else { stage + 1 };
    }
}

/// Writes the sums of the tile from row and column `first` on, as the epilogue makes them.
///
/// # Thread mapping, shared memory
/// As for [`tile()`]: C takes the place of the stages where it is not aligned.
///
/// # Safety
/// As for [`tile()`].
#[inline(always)]
pub unsafe fn store<
    T: Scalar,
    C: TensorCore<T>,
    E: Epilogue,
    const BN: usize,
    const M_TILES: usize,
    const N_TILES: usize,
>(
    c: &MatrixMut<T>,
    epilogue: &E,
    acc: &Sums<M_TILES, N_TILES>,
    (first_row, first_column): (u32, u32),
) {
    const {
        assert!(BM * BN as u32 * 2 <= shared_bytes(BN as u32), "C fits where the stages were");
    }
    let (warp_row, warp_column) = place_of_warp::<BN, M_TILES, N_TILES>();
    let aligned = c.place.is_aligned();
    // SAFETY: the launch gives the stages, and C is no larger.
    let c_smem = unsafe { Shared::<T>::dynamic(0, BM * BN as u32) };
    if !aligned {
        // Hazard: other warps may still read the stages, or what was stored before, that C is put in
        // place of.
        thread::sync_threads();
    }
    let (g, column) = fragment::row_and_column();
    unroll!(for Q in 0..4 {
        if Q < N_TILES / 4 {
            let quad = warp_column + Q as u32 * QUAD;
            let mut of_column = [[0.0; 2]; 4];
            unroll!(for TILE in 0..4 {
                let at = first_column + quad + 8 * TILE as u32 + column;
                of_column[TILE] = [epilogue.column(at), epilogue.column(at + 1)];
            });
            unroll!(for M in 0..4 {
                if M < M_TILES {
                    unroll!(for HALF in 0..2 {
                        let pack = |tile: usize| {
                            let sums = acc[M][4 * Q + tile];
                            C::pack(
                                epilogue.apply(sums[2 * HALF], of_column[tile][0]),
                                epilogue.apply(sums[2 * HALF + 1], of_column[tile][1]),
                            )
                        };
                        // Eight columns to each of the row's four lanes.
                        let chunk = transpose_quad([pack(0), pack(1), pack(2), pack(3)]);
                        let row = warp_row + (16 * M as u32 + 8 * HALF as u32) + g;
                        let column = quad + 4 * column;
                        if aligned {
                            c.write_chunk_if_inside(first_row + row, first_column + column, chunk);
                        } else {
                            c_smem.write_as(Swizzled::<BN>::index(row, column), chunk);
                        }
                    });
                }
            });
        }
    });
    if !aligned {
        // Hazard: elements are read by threads that did not write them.
        thread::sync_threads();
        // Neighbouring threads take neighbouring elements.
        for element in (thread::thread_idx_x()..BM * BN as u32).step_by(THREADS as usize) {
            let (row, column) = (element / BN as u32, element % BN as u32);
            let value = c_smem.read(element_index::<Swizzled<BN>>(row, column));
            c.write_if_inside(first_row + row, first_column + column, value);
        }
    }
}

/// Index of any element of a tile.
#[inline(always)]
fn element_index<L: TileLayout>(row: u32, column: u32) -> u32 {
    L::index(row, column / CHUNK * CHUNK) + column % CHUNK
}
