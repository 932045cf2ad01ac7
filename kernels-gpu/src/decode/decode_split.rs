//! decode_split: attention of a few rows and a part of the keys, at the speed of memory.
//!
//! The idea: each warp streams its own keys through its own ring of stages. No barrier of the block stands
//! between a warp and its copies, so while some warps compute, the copies of the others run.
//!
//! ```text
//! copy Q to the last stage; copy the warp's first STAGES - 1 tiles of K and V
//! for each tile of the part:                        KEYS keys per warp, 4 KEYS per block
//!     wait for the oldest copy; barrier of the warp
//!     start to copy the tile STAGES - 1 further on to the stage that was just read
//!     S = Q Kᵀ; shape; hide; raise m; P = exp2(S * scale - m); l += rowsum(P); O += P V
//! barrier of the block: O, m and l of its warps become one
//! one part: O / l and LSE; several: O, m and l to memory, for decode_combine
//! ```
//!
//! ```text
//!                 keys of a part ->
//!               |  4 KEYS   |  4 KEYS   |
//! 16 rows of    | 0 | 1 | 2 | 3 | 0 | 1 | 2 | 3 |    the warp that has them, for all 16 rows
//! the group
//! ```
//!
//! | D | keys per warp | stages | bytes of a stage | shared bytes | blocks | bytes in flight |
//! |---|---|---|---|---|---|---|
//! | 64 | 32 | 3 | 8,192 | 98,304 | 2 | 131,072 |
//! | 128 | 16 | 3 | 8,192 | 98,304 | 2 | 131,072 |
//! | 256 | 16 | 2 | 16,384 | 131,072 | 1 | 65,536 |
//!
//! By counting: a byte of K or V takes part in 16 rows' products, 16 FLOP per byte, and a multiprocessor
//! of an H200 is fed about 18 bytes per cycle: 300 FLOP per cycle, where `mma.sync` does 2,048 and more.
//! Bytes in flight decide. A copy takes about 1 µs from request to arrival under load, in which memory
//! brings 4.3 TB/s / 132 = 33 KB to each multiprocessor: the last column is several times as much. For 8,192
//! bytes a warp issues about 400 instructions, a fourth of the number that four schedulers issue meanwhile.
//!
//! Copies are of 16 bytes per lane, eight lanes side by side on 128 bytes of a row. Tiles are
//! swizzled: neither a copy nor a matrix load meets a bank twice. Q stays in registers, and passes through
//! the stage that is still empty. In the end the warps' sums of O lie in their stages, in rows 8 words longer
//! than D, so the 16 lanes of a pass write to 32 different banks.
//!
//! Rows past 16 (heads of a group times queries) are further blocks, which find keys and values in the L2
//! cache. Not measured.
//!
//! Limits: f16 and bf16, a positive scale; no padding mask, dropout or bias.
//!
//! Sources: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023 (the split);
//! Ainslie et al., "GQA", 2023; Kwon et al., "Efficient Memory Management for Large Language Model Serving
//! with PagedAttention", 2023 (pages).

use half::{bf16, f16};
use simt::{
    async_copy,
    compiler::opaque,
    layout::{Swizzled, TileLayout},
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use crate::{
    args::DecodeArgs,
    decode::{
        cache::{Cache, Element},
        rows::{RowTile, part_of},
        sums::{Merged, WARPS, WarpSums, store},
    },
    entries,
    parts::{
        columns::Columns,
        fragment::{self, RegisterQueries, SharedQueries},
        online::{self, RowState},
        policy::Policy,
        tile::for_each_chunk,
    },
};

/// Threads of a block.
pub const THREADS: u32 = WARPS * warp::LANES;
/// Rows of a block: the queries of the heads of a group.
pub const ROWS: u32 = fragment::ROWS;

/// The words by which a row of a warp's O is longer than D: a pass writes eight words to each of four rows.
const PAD: u32 = 8;

/// Keys of a warp's tile.
const fn warp_keys(d: usize) -> u32 {
    if d <= 64 { 32 } else { 16 }
}

/// Keys of a block's tile: parts of a sequence are whole tiles.
#[must_use]
pub const fn keys(d: usize) -> u32 {
    WARPS * warp_keys(d)
}

/// Stages of a warp.
const fn stages(d: usize) -> u32 {
    if d <= 128 { 3 } else { 2 }
}

/// Blocks that a multiprocessor has room for.
const fn blocks(d: usize) -> u32 {
    if d <= 128 { 2 } else { 1 }
}

/// Elements per stage: K, then V.
const fn stage_elems(d: usize) -> u32 {
    2 * warp_keys(d) * d as u32
}

/// Dynamic shared memory of a block in bytes.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    WARPS * stages(d) * stage_elems(d) * 2
}

/// Attention of a part of the keys of each sequence.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `lse: [B, H, Nq]`; keys and values as [`Cache::new`] says; parts as
/// [`PartsArgs`](crate::args::PartsArgs) says.
///
/// # Thread mapping
/// [`THREADS`] threads; blocks along `x`: tiles of [`ROWS`] packed rows, then heads of K and V, then parts,
/// then sequences. A part without keys leaves nothing.
///
/// # Shared memory
/// [`shared_bytes`], dynamic: the stages of warp 0, then of warp 1, …; in the end each warp's O, maxima and
/// sums in their place.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are multiples of 16 bytes,
/// and the launch the threads and shared memory stated here.
#[inline(always)]
pub unsafe fn decode_split<
    T: Scalar + Element,
    const D: usize,
    const D_STEPS: usize,
    const COLUMN_TILES: usize,
    const KEYS: u32,
    const KEY_TILES: usize,
    const STAGES: u32,
    const PENDING: u32,
>(
    args: &DecodeArgs,
) where
    Ampere: TensorCore<T>,
{
    const {
        assert!(D == 8 * COLUMN_TILES && D == 16 * D_STEPS, "whole products over D");
        assert!(KEYS == warp_keys(D) && KEYS as usize == 8 * KEY_TILES);
        assert!(STAGES == stages(D) && PENDING + 2 == STAGES);
        assert!(ROWS * D as u32 <= stage_elems(D), "Q fits a stage");
        assert!(
            WarpSums::<D, PAD>::WORDS * 4 <= STAGES * stage_elems(D) * 2,
            "O fits a warp's stages"
        );
    }
    // Who am I.
    let (tile, part) = RowTile::of_block(args);
    let warp_id = warp::uniform(opaque(thread::thread_idx_x()) / warp::LANES);
    let stage_elems = const { stage_elems(D) };
    let first_byte = warp_id * STAGES * stage_elems * T::BYTES;
    // SAFETY: the launch gives the shared memory, and the buffers have the shapes stated above.
    let (stages, cache) = unsafe {
        (
            Shared::<T>::dynamic(first_byte, STAGES * stage_elems),
            Cache::<T>::new(args, tile.b, tile.h_kv, tile.length),
        )
    };
    let stage_tiles = |stage: u32| {
        let both = stages.slice(stage * stage_elems, stage_elems);
        let half = stage_elems / 2;
        (both.slice(0, half), both.slice(half, half))
    };

    // Load Q, which does not wait for the sequence's length, and the first tiles.
    let q_smem = stages.slice((STAGES - 1) * stage_elems, const { ROWS * D as u32 });
    // SAFETY: Q has the shape stated above.
    unsafe { load_queries::<T, Swizzled<D>, D, ROWS, { warp::LANES }>(args, &tile, q_smem) };
    let first_key = |kv_tile: u32| kv_tile * const { keys(D) } + warp_id * KEYS;
    let look_up =
        |cache: &Cache<_>, kv_tile: u32| cache.look_up_first::<KEYS, STAGES>(first_key(kv_tile));
    // The part follows from the sequence's length, and its pages from the part: two reads of memory, one after the
    // other. So the block finds both for the longest sequence that the launch allows, while this sequence's
    // length is on its way, and again only if this one is shorter.
    let longest = tile.longest();
    let mut tiles = part_of(&longest.key_tiles(const { keys(D) }), part, args.parts.splits);
    let mut pages = look_up(&cache.with_length(longest.length), tiles.start);
    if tile.length != longest.length {
        tiles = part_of(&tile.key_tiles(const { keys(D) }), part, args.parts.splits);
        pages = look_up(&cache, tiles.start);
    }
    if tiles.is_empty() && args.parts.splits > 1 {
        // Hazard: Q is still on its way to memory that the next block may have.
        async_copy::commit();
        async_copy::wait::<0>();
        return;
    }
    let start = |kv_tile: u32, looked_up: u32, stage: u32| {
        let (k_smem, v_smem) = stage_tiles(stage);
        let n = kv_tile - tiles.start;
        cache.start::<D, KEYS>((first_key(kv_tile), n), looked_up, k_smem, v_smem);
    };
    unroll!(for STAGE in 0..2 {
        if (STAGE as u32) + 1 < STAGES {
            if tiles.start + (STAGE as u32) < tiles.end {
                start(tiles.start + STAGE as u32, pages[STAGE], STAGE as u32);
            }
            async_copy::commit();
        }
    });
    let mut looked_up = pages[STAGES as usize - 1];

    async_copy::wait::<PENDING>();
    // Hazard: lanes that did not copy Q read it.
    warp::sync_warp(warp::FULL_MASK);
    let queries =
        RegisterQueries::<1, D_STEPS>::load(SharedQueries::<T, Swizzled<D>>::new(q_smem, 0));

    let mut rows = RowState::EMPTY;
    let mut acc_o = [[[0.0f32; 4]; COLUMN_TILES]];
    let scale_log2 = Policy::scale_log2_of(&args.forward.scores);
    let mut stage = 0;
    for kv_tile in tiles.clone() {
        async_copy::wait::<PENDING>();
        // Hazards: K and V are read by lanes that did not copy them; and the stage that is filled next
        // may still be read for the tile before (or Q in it).
        warp::sync_warp(warp::FULL_MASK);
        let further = kv_tile + (STAGES - 1);
        if further < tiles.end {
            start(further, looked_up, if stage == 0 { STAGES - 1 } else { stage - 1 });
        }
        async_copy::commit();
        let next = further + 1;
        if next < tiles.end && Cache::<T>::has_to_look_up::<KEYS>(next - tiles.start) {
            looked_up = cache.look_up::<KEYS>(first_key(next));
        }

        let first_key = first_key(kv_tile);
        if !tile.sees_nothing(first_key, KEYS) {
            let (k_smem, v_smem) = stage_tiles(stage);
            // S = Q Kᵀ.
            let mut s = [[[0.0f32; 4]; KEY_TILES]];
            let k = (k_smem, fragment::b_origin::<Swizzled<D>>(0));
            fragment::add_scores::<T, Ampere, Swizzled<D>, D, KEY_TILES, 1>(&mut s, queries, k);
            tile.shape_and_hide::<T, KEY_TILES>(&mut s[0], first_key);

            // Online softmax: O and the sums are rescaled only where a maximum has moved far.
            let maxima = online::maxima(&s[0], scale_log2);
            if warp::any(rows.outgrown(maxima)) {
                let alpha = rows.raise(maxima);
                fragment::scale_rows(&mut acc_o[0], alpha);
            }

            // P, and O += P V, 16 keys at a time.
            let v = (v_smem, fragment::a_origin::<Swizzled<D>>(0));
            unroll!(for STEP in 0..2 {
                if STEP < KEY_TILES / 2 {
                    let left = rows.weigh(s[0][2 * STEP], scale_log2);
                    let right = rows.weigh(s[0][2 * STEP + 1], scale_log2);
                    let p = fragment::pack_a::<T, Ampere>(left, right);
                    let key = 16 * STEP as u32;
                    fragment::add_output_step::<T, Ampere, Swizzled<D>, COLUMN_TILES, 1, 1>(
                        &mut acc_o,
                        [p],
                        v,
                        key,
                    );
                }
            });
        }
        stage = if stage == STAGES - 1 { 0 } else { stage + 1 };
    }

    // The warps' O, maxima and sums become one.
    let sums_of = |warp: u32| {
        // SAFETY: the launch gives the shared memory of all stages.
        unsafe { WarpSums::<D, PAD>::new(warp * STAGES * stage_elems * T::BYTES) }
    };
    // Hazard: the stages, which are overwritten, may still be read by slower lanes of this warp.
    warp::sync_warp(warp::FULL_MASK);
    sums_of(warp_id).write(&acc_o[0], &rows);
    // Hazard: all threads read the sums that the warps wrote.
    thread::sync_threads();
    unroll!(for PASS in 0..4 {
        if (PASS as u32) < const { ROWS * D as u32 / 8 / THREADS } {
            let chunk = opaque(thread::thread_idx_x()) + PASS as u32 * THREADS;
            let (r, column) = (chunk / (D as u32 / 8), chunk % (D as u32 / 8) * 8);
            let merged = Merged::of::<D, PAD>(sums_of, r, column);
            // SAFETY: O, the LSE and the parts have the shapes stated above.
            unsafe {
                store::<T>(args, &tile, (part, &tiles), (r, column), merged, const { keys(D) })
            };
        }
    });
}

/// Starts to copy Q for this warp, with 0 in rows that do not exist; the caller commits and waits.
///
/// # Safety
/// `args.forward.tensors.q` must be `[B, H, Nq, D]`, its address and strides multiples of 16 bytes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(super) unsafe fn load_queries<
    T: Scalar,
    L: TileLayout,
    const D: usize,
    const ROWS: u32,
    const LANES: u32,
>(
    args: &DecodeArgs,
    tile: &RowTile<'_>,
    q_smem: Shared<T>,
) {
    let q = &args.forward.tensors.q;
    // SAFETY: Q has the shape stated above.
    let q_gmem = unsafe { q.buffer.view::<T>() };
    let lane = warp::lane_id();
    for_each_chunk!(L, D, ROWS, lane of LANES, |index, (row, below), (column, right)| {
        let of_row = tile.row(row + below);
        let from = of_row.policy.head.query(q, of_row.i) + (column + right) as u64;
        let inside = tile.has(row + below) && Columns::of_keys().has(column + right);
        async_copy::copy_or_zero(q_smem, index, q_gmem, from, inside);
    });
}

entries! {
    /// Instances of [`decode_split`].
    pub static ENTRIES: DecodeArgs => "sm_80", threads THREADS, min_blocks blocks(D);
    decode_split: T in [f16, bf16], d D in [64, 128, 256] = decode_split::<
        T,
        D,
        { D / 16 },
        { D / 8 },
        { warp_keys(D) },
        { warp_keys(D) as usize / 8 },
        { stages(D) },
        { stages(D) - 2 },
    >;
}
