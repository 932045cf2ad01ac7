//! The producer of a block.

use simt::{
    mbarrier::Mbarrier,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use super::{
    HopperMaps,
    geometry::Geometry,
    queue::Tasks,
    task::{Rings, Task},
    tiles::{CONSUMER_ROWS, tile_bytes},
};
use crate::{
    args::AttentionArgs,
    parts::{
        pipeline::{Ring, Stage},
        ragged::MapRows,
        schedule::QueryTile,
    },
};

/// The producer: one thread that takes tasks and starts every copy of the block, as far ahead
/// as the rings have room.
///
/// # Safety
/// As for [`flash_hopper`](super::flash_hopper()).
#[inline(always)]
pub(super) unsafe fn produce<G: Geometry>(
    args: &AttentionArgs,
    maps: HopperMaps,
    smem: u32,
    rings: Rings<G>,
) {
    let tiles = const { G::TILES };
    maps.prefetch();
    // All chunks of a tile of `d` columns: rows from `row` on.
    let copy = |of: MapRows,
                destination: u32,
                map: u64,
                (rows, d): (u32, u32),
                row: u32,
                full: Mbarrier| {
        for chunk in 0..d.div_ceil(CHUNK_COLUMNS) {
            let to = destination + chunk * rows * CHUNK_ROW_BYTES;
            // SAFETY: the parameter holds the maps; the ring keeps readers away.
            unsafe { of.load(to, map, chunk * CHUNK_COLUMNS, row, full) };
        }
    };
    let copy_q = |stage: Stage<G::QStages>, task: Task| {
        for consumer in 0..G::CONSUMERS {
            let (row, head) = (task.first_row() + consumer * CONSUMER_ROWS, task.tile.head(args));
            // A consumer past the last row has no Q, and none has without keys.
            let any = task.end_tile > 0 && row < head.seq_q;
            let bytes = if any { const { tile_bytes(CONSUMER_ROWS, G::TILES.d) } } else { 0 };
            let full = rings.of(consumer).announce(stage, Some(task), bytes);
            if any {
                let to = smem
                    + stage.index() * const { G::TILES.q_bytes() }
                    + consumer * const { tile_bytes(CONSUMER_ROWS, G::TILES.d) };
                let (of, q) = (MapRows::queries(&head), maps.address::<0>());
                copy(of, to, q, (CONSUMER_ROWS, tiles.d), row, full);
            }
        }
    };
    // A tile of K or V, of `d` columns: into a stage of the ring, whose first is at `to`.
    let copy_keys = |ring: Ring<G::KvStages>,
                     (to, d): (u32, u32),
                     map: u64,
                     stage: Stage<G::KvStages>,
                     task: Task,
                     tile: u32| {
        let head = task.tile.head(args);
        let bytes = tile_bytes(tiles.keys, d);
        let to = to + stage.index() * bytes;
        let full = ring.acquire(stage, bytes);
        let of = MapRows::keys(&head);
        copy(of, smem + to, map, (tiles.keys, d), tile * tiles.keys, full);
    };
    let copy_k = |stage, task, tile| {
        copy_keys(rings.k, (tiles.k(), tiles.d), maps.address::<1>(), stage, task, tile);
    };
    let copy_v = |stage, task, tile| {
        copy_keys(rings.v, (tiles.v(), tiles.d_v), maps.address::<2>(), stage, task, tile);
    };
    // Stages of Q, and of K; V, which is needed and has its stage free a tile later, is one
    // behind.
    let (mut q_stage, mut stage) = (Stage::FIRST, Stage::FIRST);
    // The task before, whose last V is still to come.
    let mut before: Option<Task> = None;
    // SAFETY: the queue holds zeros before the launch, as `AttentionArgs::queue` says.
    let (mut queue, mut next) = unsafe { Tasks::begin(args, tiles) };
    while let Some(work) = next {
        if QueryTile::of(args, work, tiles.rows()).is_empty(args) {
            next = queue.work(queue.ask());
            continue;
        }
        // SAFETY: the mask has the shape that `args` says.
        let task = unsafe { Task::of(args, tiles, work) };
        // Asked for late: a block that asks early may keep a task that another block has time for.
        // Before the last tile, so that the answer is there after it.
        let mut answer = 0;
        if task.num_tiles() <= 1 {
            answer = queue.ask();
        }
        // One stage of Q is free only when all else of the task before is under way.
        if G::TILES.q_stages > 1 && task.end_tile > 0 {
            copy_q(q_stage, task);
        }
        if task.end_tile > 0 {
            copy_k(stage, task, task.end_tile - 1);
        }
        if let Some(before) = before.take() {
            copy_v(stage.before(), before, before.first_tile);
        }
        if G::TILES.q_stages == 1 || task.end_tile == 0 {
            copy_q(q_stage, task);
        }
        q_stage.advance();
        if task.end_tile > 0 {
            stage.advance();
            for tile in (task.first_tile + 1..task.end_tile).rev() {
                if tile == task.first_tile + 1 {
                    answer = queue.ask();
                }
                copy_k(stage, task, tile - 1);
                copy_v(stage.before(), task, tile);
                stage.advance();
            }
            before = Some(task);
        }
        next = queue.work(answer);
    }
    if let Some(before) = before {
        copy_v(stage.before(), before, before.first_tile);
    }
    for consumer in 0..G::CONSUMERS {
        rings.of(consumer).announce(q_stage, None, 0);
    }
}
