//! The warps that add dQ to memory: parts of it come through shared memory.
//!
//! A part is 16 KB, in the order of its consumer's registers, and one bulk reduction adds it. The consumer
//! writes it and goes on; only its next part waits until this one has been read. Each consumer has a warp of
//! its own here, so that neither part waits for the other's turn.

use simt::{
    barrier,
    compiler::opaque,
    tma,
    warp::{self, FULL_MASK},
    warpgroup,
};

use super::{
    Geometry, NamedBarrier,
    consumer::{RowTiles, part_of},
    tiles::{DQ_ELEMENTS, Tiles},
};
use crate::{args::BackwardArgs, backward::order::Part, parts::policy::Policy};

/// Threads at the barriers of a part: its consumer and its warp here.
pub(super) const THREADS: u32 = warpgroup::THREADS + warp::LANES;

/// Adds the parts of dQ of consumer `own` to memory, tile by tile.
///
/// # Safety
/// As for [`backward_hopper`](super::backward_hopper()); the whole warp calls it.
#[inline(always)]
pub(super) unsafe fn add_parts<G: Geometry>(args: &BackwardArgs, smem: u32, own: u32) {
    let rows = const { G::TILES.rows };
    // SAFETY: `dq_acc` is f32 `[B, H, Nq', D]`.
    let dq_acc = unsafe { args.steps.dq_acc.view_mut::<f32>() };
    let mut work = RowTiles::of_block::<G>(args);
    let mut next = work.next();
    if next.is_some() {
        barrier::arrive(NamedBarrier::DqEmpty(own), THREADS);
    }
    while let Some(at) = next {
        // SAFETY: positions read no memory.
        let policy = unsafe { Policy::new(&args.forward, at.head) };
        let turn = Part {
            first_row: at.tile * rows,
            rows,
            part: own,
            place: G::place(),
            keys: const { G::TILES.keys },
        };
        // SAFETY: every block that has keys for these rows comes here.
        unsafe { turn.wait(args, &policy) };
        // Hazard: the consumer may not have written its part.
        barrier::sync(NamedBarrier::DqFull(own), THREADS);
        if opaque(warp::lane_id()) == 0 {
            let to = part_of::<G>(&at.head, at.tile, own);
            let from = smem + const { G::TILES.dq() } + own * Tiles::DQ_BYTES;
            // SAFETY: the consumer writes this part only when it has been waited for.
            unsafe { tma::reduce_add_f32(dq_acc, to, from, DQ_ELEMENTS) };
        }
        tma::commit_group();
        next = work.next();
        if next.is_some() {
            // Hazard: the reduction may still read the part that the consumer writes next.
            tma::wait_group_read::<0>();
            warp::sync_warp(FULL_MASK);
            barrier::arrive(NamedBarrier::DqEmpty(own), THREADS);
        }
        if const { G::ORDERED } {
            // Hazard: the next block adds to the same rows.
            tma::wait_group::<0>();
            // SAFETY: as above.
            unsafe { turn.pass(args, &policy) };
        }
    }
    tma::wait_group_read::<0>();
}
