//! flash_async: the next tile arrives during the arithmetic on this one.
//!
//! The idea: two stages of K and V. A thread starts copies (`cp.async`) into one stage, and
//! goes on computing with the other; nothing passes through its registers.
//!
//! Change from flash_swizzled: the loop. Loads and arithmetic took turns, with two
//! barriers per tile; now they overlap, with one.
//!
//! ```text
//! start to copy Q, and K, V of tile 0 to stage 0
//! for each tile:
//!     wait for the copies; barrier
//!     start to copy K, V of the next tile to the other stage  |  both at
//!     S = Q Kᵀ; softmax; O += P V                             |  the same time
//! ```
//!
//! ```text
//! stage 0   copy 0 | compute 0 | copy 2    | compute 2 | ...
//! stage 1          | copy 1    | compute 1 | copy 3    | ...
//!                  ^           ^           ^
//!                  barrier: the copy is there for all, and the other stage is done with
//! ```
//!
//! Memory: Q and two stages of K and V: 40,960 bytes at D = 64, 81,920 at D = 128. A copy has
//! as long as a tile's arithmetic to arrive: 64 x 64 x 4 D FLOP.
//!
//! Measured: 0.238 ms (H100; f16, batch 4, 12 heads, N 2048, D 64). Limits: a warp still has 16
//! rows, every score goes through a mask, and O is rescaled each time (see flash_pipelined).
//!
//! Source: NVIDIA, "CUDA C++ Programming Guide", "Asynchronous Data Copies"; PTX ISA,
//! "cp.async".

use half::{bf16, f16};
use simt::{
    async_copy,
    layout::{Swizzled, TileLayout},
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, warp,
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        attend::{BC, BR, FragmentRows, SharedTiles, THREADS},
        columns::Columns,
        fragment::{self, SharedQueries},
        head::Head,
        online,
        policy::Policy,
        tile::{self, KvStages},
    },
};

/// Dynamic shared memory of a block in bytes: the stages of K and V, and Q.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    (tile::STAGES * 2 * BC + BR) * d as u32 * 2
}

/// Flash attention forward, copies beside the arithmetic.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// A block per tile of BR rows, head and batch entry, along `x`; within it as in flash_mma.
///
/// # Shared memory
/// [`shared_bytes`], dynamic: two stages of K and V, then Q.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are
/// multiples of 16 bytes, and the launch the threads and shared memory stated here.
#[inline(always)]
pub unsafe fn flash_async<T: Scalar, const D: usize, const COLUMN_TILES: usize>(
    args: &AttentionArgs,
) where
    Ampere: TensorCore<T>,
{
    const { assert!(D == 8 * COLUMN_TILES) };

    // Who am I.
    let (head, q_tile) = Head::of_block(args, args.shape.seq_q.div_ceil(BR));
    let first_row = q_tile * BR;
    if head.ends_before(first_row) {
        return;
    }
    let warp_row = warp::warp_id() * fragment::ROWS;
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    let (policy, q, kv, q_smem) = unsafe {
        (
            Policy::new(args, head),
            head.queries::<T>(&args.tensors.q).of_columns(Columns::of_keys()),
            KvStages::<T, D, BC, THREADS>::new(
                head.keys(&args.tensors.k).of_columns(Columns::of_keys()),
                head.keys(&args.tensors.v).of_columns(Columns::of_values()),
            ),
            Shared::<T>::dynamic(KvStages::<T, D, BC, THREADS>::BYTES, Swizzled::<D>::len(BR)),
        )
    };
    let queries = SharedQueries::<T, Swizzled<D>>::new(q_smem, warp_row);

    let mut warp = FragmentRows::<COLUMN_TILES>::new(first_row + warp_row);
    let kv_tiles = policy.key_tiles(first_row, first_row + BR, BC);
    if !kv_tiles.is_empty() {
        tile::load_async::<T, Swizzled<D>, D, BR, THREADS>(&q, first_row, q_smem);
        kv.start(kv_tiles.start, kv_tiles.start % tile::STAGES);
        async_copy::commit();
    }
    for kv_tile in kv_tiles.clone() {
        let stage = kv_tile % tile::STAGES;
        // Hazard: this thread's copies of the tile may not have landed.
        async_copy::wait::<0>();
        // Hazards: tiles are read by threads that did not copy them; and the other stage,
        // which is overwritten next, may still be read for the tile before.
        thread::sync_threads();
        if kv_tile + 1 < kv_tiles.end {
            kv.start(kv_tile + 1, stage ^ 1);
            async_copy::commit();
        }
        let (k, v) = kv.tiles(stage);
        let tiles = SharedTiles { q: queries, k, v, first_key: kv_tile * BC };
        warp.attend::<T, Ampere, Swizzled<D>, D>(&policy, tiles);
    }

    // Normalise, store O and LSE.
    let first_row = warp.first_row;
    // SAFETY: the buffers have the shapes that `args` says.
    unsafe {
        online::store::<T, Ampere, COLUMN_TILES>(args, &policy, first_row, warp.acc_o, &warp.rows);
    };
}

entries! {
    /// Instances of [`flash_async`].
    pub static ENTRIES: AttentionArgs => "sm_80", threads THREADS, min_blocks 2;
    flash_async: T in [f16, bf16], d D in [64, 128] = flash_async::<T, D, { D / 8 }>;
}
