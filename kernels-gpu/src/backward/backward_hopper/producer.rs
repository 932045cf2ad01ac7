//! The producer: one thread that starts every copy.

use simt::{
    mbarrier::Mbarrier,
    tma,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use super::{Geometry, HopperMaps, Rings, consumer::RowTiles};
use crate::{
    args::BackwardArgs,
    parts::{pipeline::Stage, ragged::MapRows},
};

/// Starts to load a tile of `rows` rows from `row` on and `d` columns, chunk by chunk.
///
/// # Safety
/// As for [`MapRows::load`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(super) unsafe fn copy_tile(
    of: MapRows,
    to: u32,
    map: u64,
    (rows, d): (u32, u32),
    row: u32,
    full: Mbarrier,
) {
    for chunk in 0..d / CHUNK_COLUMNS {
        let to = to + chunk * rows * CHUNK_ROW_BYTES;
        // SAFETY: passed on to the caller.
        unsafe { of.load(to, map, chunk * CHUNK_COLUMNS, row, full) };
    }
}

/// Brings K and V, and then the tiles of Q and dO in the order that the consumers want them.
///
/// # Safety
/// As for [`backward_hopper`](super::backward_hopper()).
#[inline(always)]
pub(super) unsafe fn produce<G: Geometry>(
    args: &BackwardArgs,
    maps: HopperMaps,
    smem: u32,
    rings: Rings,
) {
    let tiles = const { G::TILES };
    maps.prefetch();
    // SAFETY: the parameter holds the maps; the ring keeps readers away.
    let copy = |of, to, map, size, row, full| unsafe { copy_tile(of, to, map, size, row, full) };
    let mut work = RowTiles::of_block::<G>(args);
    let Some(mut at) = work.next() else { return };
    let first_key = G::place().key_tile() * tiles.keys;
    let keys = MapRows::keys(&at.head);
    let (k, v) = ((tiles.keys, tiles.d), (tiles.keys, tiles.d_v));
    let (q, d_o) = ((tiles.rows, tiles.d), (tiles.rows, tiles.d_v));
    rings.k.arrive_expect_tx(tiles.k_bytes());
    copy(keys, smem, maps.address::<1>(), k, first_key, rings.k);

    let mut stage = Stage::FIRST;
    loop {
        let row = at.tile * tiles.rows;
        let rows = MapRows::queries(&at.head);
        let row_from = [row, at.head.b * args.forward.shape.heads + at.head.h, 0, 0];
        let to_row = stage.index() * tiles.row_bytes();

        let full = rings.q.acquire(stage, tiles.q_bytes() + tiles.row_bytes());
        let to = smem + tiles.q() + stage.index() * tiles.q_bytes();
        copy(rows, to, maps.address::<0>(), q, row, full);
        // SAFETY: as above.
        unsafe { tma::load_4d(smem + tiles.lse() + to_row, maps.address::<4>(), row_from, full) };

        if stage == Stage::FIRST {
            rings.v.arrive_expect_tx(tiles.v_bytes());
            copy(keys, smem + tiles.v(), maps.address::<2>(), v, first_key, rings.v);
        }

        let full = rings.d_o.acquire(stage, tiles.d_o_bytes() + tiles.row_bytes());
        let to = smem + tiles.d_o() + stage.index() * tiles.d_o_bytes();
        copy(rows, to, maps.address::<3>(), d_o, row, full);
        // SAFETY: as above.
        unsafe { tma::load_4d(smem + tiles.delta() + to_row, maps.address::<5>(), row_from, full) };

        stage.advance();
        let Some(next) = work.next() else { return };
        at = next;
    }
}
