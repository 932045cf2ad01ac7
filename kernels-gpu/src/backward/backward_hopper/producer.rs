//! The producer: one thread that starts every copy.

use simt::{
    mbarrier::Mbarrier,
    thread, tma,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use super::{Geometry, HopperMaps, Rings, consumer::RowTiles, tiles::Tiles};
use crate::{args::BackwardArgs, parts::pipeline::Stage};

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
    // All chunks of a tile: rows from `row` on.
    let copy = |to: u32, map: u64, rows: u32, [row, h, b]: [u32; 3], full: Mbarrier| {
        for chunk in 0..const { G::TILES.d / CHUNK_COLUMNS } {
            let to = to + chunk * rows * CHUNK_ROW_BYTES;
            let from = [chunk * CHUNK_COLUMNS, row, h, b];
            // SAFETY: the parameter holds the maps; the ring keeps readers away.
            unsafe { tma::load_4d(to, map, from, full) };
        }
    };
    let mut work = RowTiles::of_block::<G>(args);
    let Some(mut at) = work.next() else { return };
    let first_key = thread::block_idx_x() * Tiles::KEYS;
    let key = [first_key, at.head.h_kv, at.head.b];
    rings.k.arrive_expect_tx(tiles.k_bytes());
    copy(smem, maps.address::<1>(), Tiles::KEYS, key, rings.k);

    let mut stage = Stage::FIRST;
    loop {
        let row = at.tile * tiles.rows;
        let from = [row, at.head.h, at.head.b];
        let row_from = [row, at.head.b * args.forward.shape.heads + at.head.h, 0, 0];
        let bytes = tiles.q_bytes() + tiles.row_bytes();
        let (to, to_row) = (stage.index() * tiles.q_bytes(), stage.index() * tiles.row_bytes());

        let full = rings.q.acquire(stage, bytes);
        copy(smem + tiles.q() + to, maps.address::<0>(), tiles.rows, from, full);
        // SAFETY: as above.
        unsafe { tma::load_4d(smem + tiles.lse() + to_row, maps.address::<4>(), row_from, full) };

        if stage == Stage::FIRST {
            rings.v.arrive_expect_tx(tiles.k_bytes());
            copy(smem + tiles.v(), maps.address::<2>(), Tiles::KEYS, key, rings.v);
        }

        let full = rings.d_o.acquire(stage, bytes);
        copy(smem + tiles.d_o() + to, maps.address::<3>(), tiles.rows, from, full);
        // SAFETY: as above.
        unsafe { tma::load_4d(smem + tiles.delta() + to_row, maps.address::<5>(), row_from, full) };

        stage.advance();
        let Some(next) = work.next() else { return };
        at = next;
    }
}
