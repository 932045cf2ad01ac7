//! Values of a warp's 16 rows on their way through shared memory, laid out as wgmma's operands are.

use simt::{
    layout::{Swizzled, TileLayout},
    matrix,
    shared::Shared,
    unroll,
    warp::{self, FULL_MASK},
    wgmma::{CHUNK_COLUMNS, Operand},
};

use super::tiles::WARP_KEYS;
use crate::{args::Tensor, parts::columns::Columns};

/// Writes a warp's part of dSᵀ, 16 keys and all rows of a tile, to where it begins in a buffer; chunks have
/// `keys` keys.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(super) fn share_scores<T: Operand>(buffer: Shared<T>, keys: u32, lane: u32, ds: &[[u32; 4]]) {
    const STRIP: u32 = WARP_KEYS * CHUNK_COLUMNS;
    // Lane 8 m + r says where row r of matrix m goes, of four: the second is below the first, the
    // others to their right.
    let place = Swizzled::<{ CHUNK_COLUMNS as usize }>::index(lane % 16, lane / 16 * 8);
    unroll!(for STEP in 0..16 {
        if STEP < ds.len() {
            let chunk = STEP as u32 / 4 * (keys * CHUNK_COLUMNS);
            let place =
                Swizzled::<{ CHUNK_COLUMNS as usize }>::right(place, 16 * (STEP as u32 % 4));
            matrix::store_x4(buffer.slice(chunk, STRIP), place, ds[STEP]);
        }
    });
}

/// Where a warp's rows of a gradient go.
pub(super) struct Destination<'a> {
    /// The gradient.
    pub to: &'a Tensor,
    /// Its element at the warp's first row.
    pub first: u64,
    /// Rows from there on that exist.
    pub rows: u32,
    /// Columns that exist.
    pub columns: Columns,
    /// The factor of the values.
    pub factor: f32,
}

/// Stores a warp's 16 rows of a gradient: each row at once, by neighbouring threads. They pass through `tile`,
/// shared memory from the warp's first row on, in chunks of `chunk_rows` rows.
///
/// # Safety
/// `to.to` must be a tensor of `T` with these rows, its address and strides multiples of 16 bytes, and no other
/// warp writes them. Nobody may read or write the warp's rows in that shared memory any more.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(super) unsafe fn store_rows<T: Operand>(
    tile: Shared<T>,
    chunk_rows: u32,
    lane: u32,
    to: &Destination<'_>,
    values: &[[f32; 4]],
) {
    let d = 8 * values.len() as u32;
    let mut packed = [[0; 4]; 16];
    unroll!(for G in 0..32 {
        if G < values.len() {
            unroll!(for R in 0..2 {
                let pair = [0, 1].map(|e: usize| values[G][2 * R + e] * to.factor);
                packed[G / 2][G % 2 * 2 + R] = T::pack(pair[0], pair[1]);
            });
        }
    });
    // Hazard: lanes may still read what passed before.
    warp::sync_warp(FULL_MASK);
    share_scores::<T>(tile, chunk_rows, lane, &packed[..values.len() / 2]);
    // Hazard: lanes read what others have written.
    warp::sync_warp(FULL_MASK);
    // 16 bytes of each thread; with 192 columns the last eight threads have none.
    let threads = d / 8;
    let rows_at_once = warp::LANES / threads;
    let (own_row, column) = (lane / threads, lane % threads * 8);
    // SAFETY: the tensor has the rows, as stated above.
    let view = unsafe { to.to.buffer.view_mut::<T>() };
    unroll!(for PASS in 0..16 {
        let row = own_row + PASS as u32 * rows_at_once;
        if PASS as u32 * rows_at_once < WARP_KEYS
            && own_row < rows_at_once
            && row < to.rows
            && to.columns.has(column)
        {
            let chunk = column / CHUNK_COLUMNS * (chunk_rows * CHUNK_COLUMNS);
            let from = Swizzled::<{ CHUNK_COLUMNS as usize }>::index(row, column % CHUNK_COLUMNS);
            let eight = tile.read_as::<[u32; 4]>(chunk + from);
            view.write_as(to.first + row as u64 * to.to.stride_n + column as u64, eight);
        }
    });
}
