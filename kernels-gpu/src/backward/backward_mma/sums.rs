//! The sums: dK and dV in registers, dQ in memory.

use simt::{
    atomic,
    layout::{Swizzled, TileLayout},
    matrix,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    unroll, warp,
};

use super::HALVES;
use crate::{
    args::{BackwardArgs, Tensor},
    parts::{
        columns::Columns,
        fragment::{self, ROWS, add_output_step},
        head::Head,
    },
};

/// `sum += Pᵀ dO`, or dSᵀ and Q, over this warp's rows, from registers: `b` as for
/// [`add_output_step`], from its first row on.
#[inline(always)]
pub(super) fn add_own<T: Scalar, const D: usize, const N: usize, const O: usize, const F: usize>(
    sum: &mut [[[f32; 4]; O]; F],
    scores: &[[[f32; 4]; N]; F],
    b: (Shared<T>, u32),
) where
    Ampere: TensorCore<T>,
{
    unroll!(for STEP in 0..4 {
        if STEP < N / 2 {
            let mut a = [[0; 4]; F];
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    let of_keys = &scores[FRAGMENT];
                    a[FRAGMENT] =
                        fragment::pack_a::<T, Ampere>(of_keys[2 * STEP], of_keys[2 * STEP + 1]);
                }
            });
            add_output_step::<T, Ampere, Swizzled<D>, O, F, HALVES>(sum, a, b, 16 * STEP as u32);
        }
    });
}

/// Pᵀ or dSᵀ in shared memory, from a key and a row on.
pub(super) struct ScoresAt<T> {
    pub tile: Shared<T>,
    pub key: u32,
    pub row: u32,
}

/// As [`add_own`] over the other warp's rows, from shared memory.
#[inline(always)]
pub(super) fn add_other<
    T: Scalar,
    const D: usize,
    const COLUMNS: usize,
    const O: usize,
    const F: usize,
>(
    sum: &mut [[[f32; 4]; O]; F],
    ScoresAt { tile, key, row }: ScoresAt<T>,
    b: (Shared<T>, u32),
) where
    Ampere: TensorCore<T>,
{
    let a = fragment::a_origin::<Swizzled<COLUMNS>>(key);
    let a = Swizzled::<COLUMNS>::right(a, row);
    unroll!(for STEP in 0..4 {
        if STEP < COLUMNS / HALVES as usize / 16 {
            let right = Swizzled::<COLUMNS>::right(a, 16 * STEP as u32);
            let mut of_keys = [[0; 4]; F];
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    let down = FRAGMENT as u32 * ROWS;
                    let at = Swizzled::<COLUMNS>::down(right, down);
                    of_keys[FRAGMENT] = matrix::load_x4(tile, at);
                }
            });
            add_output_step::<T, Ampere, Swizzled<D>, O, F, HALVES>(
                sum,
                of_keys,
                b,
                16 * STEP as u32,
            );
        }
    });
}

/// Elements of 16 rows and 8 columns of dq_acc.
const FRAGMENT_ELEMS: u64 = 128;

/// Adds the rows of dQ from `first_row` on, the warp's part of their columns, to dq_acc.
///
/// # Safety
/// `dq_acc` must be `[B, H, Nq', D]`, with these rows.
#[inline(always)]
pub(super) unsafe fn add_to_memory<
    const D: usize,
    const O: usize,
    const F: usize,
    const PARTS: u32,
>(
    args: &BackwardArgs,
    head: Head,
    first_row: u32,
    part: u32,
    dq: &[[[f32; 4]; O]; F],
) {
    // SAFETY: `dq_acc` holds the rows, as stated above.
    let dq_acc = unsafe { args.steps.dq_acc.view_mut::<f32>() };
    let first = head.padded_row(first_row) * D as u64 + warp::lane_id() as u64;
    unroll!(for FRAGMENT in 0..2 {
        if FRAGMENT < F {
            let first = first + (FRAGMENT as u32 * ROWS) as u64 * D as u64;
            unroll!(for TILE in 0..16 {
                if TILE < O {
                    let column_tile = (TILE / 2 * 2) as u32 * PARTS + (TILE % 2) as u32 + 2 * part;
                    unroll!(for E in 0..4 {
                        let index = first + column_tile as u64 * FRAGMENT_ELEMS + 32 * E as u64;
                        let _ = atomic::add_global_f32(dq_acc, index, dq[FRAGMENT][TILE][E]);
                    });
                }
            });
        }
    });
}

/// Stores a warp's rows from `first_row` on of dK or dV, times a factor: 16 of every 32 columns.
///
/// # Safety
/// The tensor must be `[B, Hkv, Nk, D]`; no other thread writes these columns of these rows.
#[inline(always)]
pub(super) unsafe fn store<T: Scalar, const O: usize, const F: usize>(
    sum: &[[[f32; 4]; O]; F],
    factor: f32,
    (tensor, columns): (&Tensor, Columns),
    head: Head,
    first_row: u32,
    half: u32,
) where
    Ampere: TensorCore<T>,
{
    // SAFETY: the rows are in the tensor, and these columns have no other writer, as
    // stated above.
    let view = unsafe { tensor.buffer.view_mut::<T>() };
    let (g, column) = fragment::row_and_column();
    unroll!(for ROW in 0..4 {
        let (fragment, r) = (ROW / 2, ROW % 2);
        let j = first_row + g + 8 * ROW as u32;
        if fragment < F && j < head.seq_k {
            let row = head.key(tensor, j) + (column + 16 * half) as u64;
            unroll!(for TILE in 0..16 {
                let right = TILE as u32 / 2 * 16 * HALVES + TILE as u32 % 2 * 8;
                if TILE < O && columns.has(right + 16 * half) {
                    let [low, high] = [sum[fragment][TILE][2 * r], sum[fragment][TILE][2 * r + 1]];
                    let pair = Ampere::pack(low * factor, high * factor);
                    view.write_as::<u32>(row + right as u64, pair);
                }
            });
        }
    });
}
