//! decode_e4m3: decode_split of a cache in e4m3, half as many bytes as in 16-bit types.
//!
//! The idea: a decode waits for bytes, so codes stay codes until they are in registers. There they become
//! f16, which holds each code exactly, and f16 products follow.
//!
//! ```text
//! memory --cp.async--> codes in shared memory --ldmatrix--> registers --widen--> f16 --> mma.sync
//! ```
//!
//! A matrix load brings 16-bit elements, here pairs of codes. Four codes of a register become two registers of
//! B: [`Widen`] gives codes 0 and 2, and codes 1 and 3. The other operand makes the same exchange:
//!
//! ```text
//! S = Q Kᵀ   a lane's four codes are columns 4 t to 4 t + 3 of a key. The product takes its columns 2 t, 2 t + 1
//!            and 2 t + 8, 2 t + 9 from 4 t, 4 t + 2 and 4 t + 1, 4 t + 3: of Q as well, loaded once in that order
//! O += P V   transposed, they are columns 2 g and 2 g + 1 of keys 2 t and 2 t + 1: the even columns of 16 are a
//!            product, and the odd ones the next
//! ```
//!
//! Scales. A head's scale of K, and the factor of the widened codes, multiply the scores; the scale of V, and
//! this factor, multiply O. Queries in bf16 become f16 too: the power of two that brings a row's largest element
//! to 2^15 multiplies the row, and the inverse multiplies its scores. An element below 2^-32 of the row's largest
//! loses digits, as it would in the f32 sum.
//!
//! | D | keys per warp | stages | bytes of a stage | shared bytes | blocks | bytes in flight |
//! |---|---|---|---|---|---|---|
//! | 64 | 32 | 3 | 4,096 | 49,152 | 4 | 131,072 |
//! | 128 | 32 | 3 | 8,192 | 98,304 | 2 | 131,072 |
//! | 256 | 32 | 2 | 16,384 | 131,072 | 1 | 65,536 |
//!
//! By counting: a byte takes part in 32 FLOP, 600 a cycle of a multiprocessor of an H200. Four codes cost eleven
//! integer instructions, or three with sm_90a's conversion. A tile of D = 128 has 8,192 bytes, 64 registers of
//! each lane: 700 or 190 instructions, beside about 500 others. In the 250 ns that memory takes to bring it, the
//! four schedulers of a multiprocessor issue about 1,700.
//!
//! Measured (f16 queries, 32 heads on 4, D 128, one H200, graph replay): 7.8, 14.5 and 41.3 us for 4,096,
//! 32,768 and 131,072 keys, where decode_split took 8.0, 21.3 and 67.1; 65.3 us for 64 sequences of 4,096
//! keys (4.1 TB/s), where it took 122.
//!
//! Limits: as decode_split, and head dims are multiples of 16.
//!
//! Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (the numbers).

use half::{bf16, f16};
use simt::{
    async_copy,
    compiler::opaque,
    e4m3::{ByConversion, ByShifts, Widen},
    layout::{CHUNK, Swizzled, TileLayout},
    matrix,
    mma::{Ampere, Multiply, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use crate::{
    args::DecodeArgs,
    decode::{
        cache::Cache,
        decode_split::load_queries,
        rows::{RowTile, part_of},
        sums::{Merged, WARPS, WarpSums, store},
    },
    entries,
    parts::{
        fragment,
        online::{self, RowState},
        policy::Policy,
    },
};

/// Threads of a block.
pub const THREADS: u32 = WARPS * warp::LANES;
/// Rows of a block: the queries of the heads of a group.
pub const ROWS: u32 = fragment::ROWS;
/// Keys of a warp's tile.
const WARP_KEYS: u32 = 32;
/// Keys of a block's tile: parts of a sequence are whole tiles.
pub const KEYS: u32 = WARPS * WARP_KEYS;
/// Products side by side over a warp's keys.
const KEY_TILES: usize = WARP_KEYS as usize / 8;
/// The words by which a row of a warp's O is longer than D: a pass writes 16 words to each of two rows.
const PAD: u32 = 16;

/// Stages of a warp.
const fn stages(d: usize) -> u32 {
    if d <= 128 { 3 } else { 2 }
}

/// Blocks that a multiprocessor has room for.
const fn blocks(d: usize) -> u32 {
    if d <= 64 {
        4
    } else if d <= 128 {
        2
    } else {
        1
    }
}

/// Pairs of codes per stage: K, then V.
const fn stage_pairs(d: usize) -> u32 {
    WARP_KEYS * d as u32
}

/// Bytes of a pair of codes.
const PAIR_BYTES: u32 = 2;

/// Dynamic shared memory of a block in bytes.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    WARPS * stages(d) * stage_pairs(d) * PAIR_BYTES
}

/// Attention of a part of the keys of each sequence, from a cache in e4m3.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `lse: [B, H, Nq]`; keys and values as [`Cache::new`] says, with scales f32 `[Hkv]`; parts as [`PartsArgs`](crate::args::PartsArgs) says.
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
pub unsafe fn decode_e4m3<
    T: HalfQueries,
    W: Widen,
    const D: usize,
    const PAIRS: usize,
    const D_STEPS: usize,
    const COLUMN_TILES: usize,
    const STAGES: u32,
    const PENDING: u32,
>(
    args: &DecodeArgs,
) where
    Ampere: TensorCore<T>,
{
    const {
        assert!(D == 2 * PAIRS && D == 8 * COLUMN_TILES && D == 16 * D_STEPS, "whole products");
        assert!(STAGES == stages(D) && PENDING + 2 == STAGES);
        assert!(ROWS * D as u32 <= stage_pairs(D), "Q fits a stage");
        assert!(
            WarpSums::<D, PAD>::WORDS * 4 <= STAGES * stage_pairs(D) * PAIR_BYTES,
            "O fits a warp's stages"
        );
    }
    // Who am I.
    let (tile, part) = RowTile::of_block(args);
    let warp_id = warp::uniform(opaque(thread::thread_idx_x()) / warp::LANES);
    let stage_pairs = const { stage_pairs(D) };
    let first_byte = warp_id * STAGES * stage_pairs * PAIR_BYTES;
    // SAFETY: the launch gives the shared memory, and the buffers have the shapes stated above. Q passes through
    // the last stage, which is filled when it has been read.
    let (stages, q_smem, cache, k_scale) = unsafe {
        let q_byte = first_byte + (STAGES - 1) * stage_pairs * PAIR_BYTES;
        (
            Shared::<u16>::dynamic(first_byte, STAGES * stage_pairs),
            Shared::<T>::dynamic(q_byte, const { ROWS * D as u32 }),
            Cache::<u16>::new(args, tile.b, tile.h_kv, tile.length),
            args.scales.k.view::<f32>().read(tile.h_kv as u64),
        )
    };
    let stage_tiles = |stage: u32| {
        let both = stages.slice(stage * stage_pairs, stage_pairs);
        let half = stage_pairs / 2;
        (both.slice(0, half), both.slice(half, half))
    };

    // Load Q, which does not wait for the sequence's length, and the first tiles.
    // SAFETY: Q has the shape stated above.
    unsafe { load_queries::<T, Swizzled<D>, D, ROWS, { warp::LANES }>(args, &tile, q_smem) };
    let first_key = |kv_tile: u32| kv_tile * KEYS + warp_id * WARP_KEYS;
    let look_up = |cache: &Cache<_>, kv_tile: u32| {
        cache.look_up_first::<WARP_KEYS, STAGES>(first_key(kv_tile))
    };
    // The part follows from the sequence's length, and its pages from the part: two reads of memory, one after the
    // other. So the block finds both for the longest sequence that the launch allows, while this sequence's
    // length is on its way, and again only if this one is shorter.
    let longest = tile.longest();
    let mut tiles = part_of(&longest.key_tiles(KEYS), part, args.parts.splits);
    let mut pages = look_up(&cache.with_length(longest.length), tiles.start);
    if tile.length != longest.length {
        tiles = part_of(&tile.key_tiles(KEYS), part, args.parts.splits);
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
        cache.start::<PAIRS, WARP_KEYS>((first_key(kv_tile), n), looked_up, k_smem, v_smem);
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
    let mut q = interleaved_rows::<T, Swizzled<D>, D_STEPS>(q_smem);
    let [upper, lower] = T::into_halves(&mut q);
    let scales = [k_scale * W::FACTOR * upper, k_scale * W::FACTOR * lower];

    let mut rows = RowState::EMPTY;
    let mut acc_o = [[0.0f32; 4]; COLUMN_TILES];
    let scale_log2 = Policy::scale_log2_of(&args.forward.scores);
    let mut stage = 0;
    // The ring of decode_split, written out here too: `break` and `profile` name a barrier and a line by the
    // kernel's own file, which a shared loop with closures for its steps would take them out of.
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
        if Cache::<u16>::has_to_look_up::<WARP_KEYS>(next - tiles.start) {
            looked_up = cache.look_up::<WARP_KEYS>(first_key(next));
        }

        let first_key = first_key(kv_tile);
        if !tile.sees_nothing(first_key, WARP_KEYS) {
            let (k_smem, v_smem) = stage_tiles(stage);
            // S = Q Kᵀ.
            let mut s = [[0.0f32; 4]; KEY_TILES];
            add_scores::<W, Swizzled<PAIRS>, D_STEPS>(&mut s, &q, k_smem);
            fragment::scale_rows(&mut s, scales);
            tile.shape_and_hide::<T, KEY_TILES>(&mut s, first_key);

            // Online softmax: O and the sums are rescaled only where a maximum has moved far.
            let maxima = online::maxima(&s, scale_log2);
            if warp::any(rows.outgrown(maxima)) {
                let alpha = rows.raise(maxima);
                fragment::scale_rows(&mut acc_o, alpha);
            }

            // P, and O += P V, 16 keys at a time.
            unroll!(for STEP in 0..2 {
                let left = rows.weigh(s[2 * STEP], scale_log2);
                let right = rows.weigh(s[2 * STEP + 1], scale_log2);
                let p = fragment::pack_a::<f16, Ampere>(left, right);
                let key = 16 * STEP as u32;
                add_output_step::<W, Swizzled<PAIRS>, COLUMN_TILES>(&mut acc_o, p, v_smem, key);
            });
        }
        stage = if stage == STAGES - 1 { 0 } else { stage + 1 };
    }

    // The warps' O, maxima and sums become one.
    let sums_of = |warp: u32| {
        // SAFETY: the launch gives the shared memory of all stages.
        unsafe { WarpSums::<D, PAD>::new(warp * STAGES * stage_pairs * PAIR_BYTES) }
    };
    // Hazard: the stages, which are overwritten, may still be read by slower lanes of this warp.
    warp::sync_warp(warp::FULL_MASK);
    sums_of(warp_id).write_interleaved(&acc_o, &rows);
    // Hazard: all threads read the sums that the warps wrote.
    thread::sync_threads();
    // SAFETY: the scales have the shape stated above.
    let v_scale = unsafe { args.scales.v.view::<f32>().read(opaque(tile.h_kv) as u64) };
    unroll!(for PASS in 0..4 {
        if (PASS as u32) < const { ROWS * D as u32 / 8 / THREADS } {
            let chunk = opaque(thread::thread_idx_x()) + PASS as u32 * THREADS;
            let (r, column) = (chunk / (D as u32 / 8), chunk % (D as u32 / 8) * 8);
            let mut merged = Merged::of::<D, PAD>(sums_of, r, column);
            unroll!(for E in 0..8 {
                merged.o[E] *= v_scale * W::FACTOR;
            });
            // SAFETY: O, the LSE and the parts have the shapes stated above.
            unsafe { store::<T>(args, &tile, (part, &tiles), (r, column), merged, KEYS) };
        }
    });
}

/// Q's 16 rows as operands A, 16 columns each: of the columns 4 t to 4 t + 3 of lane `t` of a row, the even ones
/// come first.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn interleaved_rows<T: Scalar, L: TileLayout, const STEPS: usize>(
    q_smem: Shared<T>,
) -> [[u32; 4]; STEPS] {
    let lane = opaque(warp::lane_id());
    let (g, right) = (lane / 4, lane % 4 * 4);
    let mut a = [[0; 4]; STEPS];
    unroll!(for STEP in 0..16 {
        if STEP < STEPS {
            let column = 16 * STEP as u32 + right;
            unroll!(for R in 0..2 {
                let chunk = L::index(g + 8 * R as u32, column / CHUNK * CHUNK);
                let [low, high] = q_smem.read_as::<[u32; 2]>(chunk + column % CHUNK);
                a[STEP][R] = low & 0xffff | high << 16;
                a[STEP][R + 2] = low >> 16 | high & 0xffff_0000;
            });
        }
    });
    a
}

/// A storage type of Q, whose rows can be f16.
pub trait HalfQueries: Scalar {
    /// Makes operands A of f16 from operands of this type. Returns what the scores of rows `g` and `g + 8` are
    /// to be multiplied by.
    fn into_halves<const STEPS: usize>(a: &mut [[u32; 4]; STEPS]) -> [f32; 2];
}

impl HalfQueries for f16 {
    #[inline(always)]
    fn into_halves<const STEPS: usize>(_: &mut [[u32; 4]; STEPS]) -> [f32; 2] {
        [1.0; 2]
    }
}

impl HalfQueries for bf16 {
    #[inline(always)]
    fn into_halves<const STEPS: usize>(a: &mut [[u32; 4]; STEPS]) -> [f32; 2] {
        /// Biased exponents of a row's largest element: 2^15, before it, below f16's largest, 65,504.
        const TARGET: u32 = 127 + 15;
        /// The largest biased exponent whose inverse is a normal number too.
        const LARGEST: u32 = 253;
        const ABSOLUTE: u32 = 0x7fff_0000;
        let mut inverse = [0.0; 2];
        unroll!(for R in 0..2 {
            let mut largest = 0;
            unroll!(for STEP in 0..16 {
                if STEP < STEPS {
                    unroll!(for HALF in 0..2 {
                        let pair = a[STEP][R + 2 * HALF];
                        largest = largest.max(pair & ABSOLUTE).max(pair << 16 & ABSOLUTE);
                    });
                }
            });
            let largest = warp::reduce_max::<4>(f32::from_bits(largest));
            let exponent = (TARGET + 127 - (largest.to_bits() >> 23)).min(LARGEST);
            let factor = f32::from_bits(exponent << 23);
            inverse[R] = f32::from_bits((2 * 127 - exponent) << 23);
            unroll!(for STEP in 0..16 {
                if STEP < STEPS {
                    unroll!(for HALF in 0..2 {
                        let pair = a[STEP][R + 2 * HALF];
                        let low = f32::from_bits(pair << 16) * factor;
                        let high = f32::from_bits(pair & 0xffff_0000) * factor;
                        a[STEP][R + 2 * HALF] = <Ampere as TensorCore<f16>>::pack(low, high);
                    });
                }
            });
        });
        inverse
    }
}

/// `S += Q Kᵀ`, with K as codes in shared memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn add_scores<W: Widen, L: TileLayout, const D_STEPS: usize>(
    s: &mut [[f32; 4]; KEY_TILES],
    q: &[[u32; 4]; D_STEPS],
    k_smem: Shared<u16>,
) {
    let k = fragment::b_origin::<L>(0);
    // A load brings two keys' products of two steps.
    unroll!(for STEPS in 0..8 {
        if STEPS < D_STEPS / 2 {
            let right = L::right(k, STEPS as u32 * 16);
            unroll!(for PAIR in 0..2 {
                let codes = matrix::load_x4(k_smem, L::down(right, PAIR as u32 * 16));
                unroll!(for KEY_TILE in 0..2 {
                    unroll!(for STEP in 0..2 {
                        multiply(
                            &mut s[2 * PAIR + KEY_TILE],
                            q[2 * STEPS + STEP],
                            W::widen(codes[2 * KEY_TILE + STEP]),
                        );
                    });
                });
            });
        }
    });
}

/// `O += P V` for the 16 keys from `key` of the tile on, with V as codes in shared memory: even products over O
/// have the even columns.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn add_output_step<W: Widen, L: TileLayout, const COLUMN_TILES: usize>(
    acc_o: &mut [[f32; 4]; COLUMN_TILES],
    p: [u32; 4],
    v_smem: Shared<u16>,
    key: u32,
) {
    let v = fragment::a_origin::<L>(0);
    unroll!(for FOUR in 0..8 {
        if FOUR < COLUMN_TILES / 4 {
            let right = L::right(v, FOUR as u32 * 16);
            let codes = matrix::load_x4_transposed(v_smem, L::down(right, key));
            unroll!(for PAIR in 0..2 {
                let first = W::widen(codes[2 * PAIR]);
                let second = W::widen(codes[2 * PAIR + 1]);
                unroll!(for ODD in 0..2 {
                    multiply(&mut acc_o[4 * FOUR + 2 * PAIR + ODD], p, [first[ODD], second[ODD]]);
                });
            });
        }
    });
}

/// A product of f16.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn multiply(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    <Ampere as Multiply<f16>>::multiply(c, a, b);
}

entries! {
    /// Instances of [`decode_e4m3`].
    pub static ENTRIES: DecodeArgs => "sm_80", threads THREADS, min_blocks blocks(D);
    decode_e4m3: T in [f16, bf16], d D in [64, 128, 256] = decode_e4m3::<
        T,
        ByShifts,
        D,
        { D / 2 },
        { D / 16 },
        { D / 8 },
        { stages(D) },
        { stages(D) - 2 },
    >;
}

entries! {
    /// Instances of [`decode_e4m3`] with the conversion of codes that Hopper has.
    pub static HOPPER: DecodeArgs => "sm_90a", threads THREADS, min_blocks blocks(D);
    decode_e4m3_hopper: T in [f16, bf16], d D in [64, 128, 256] = decode_e4m3::<
        T,
        ByConversion,
        D,
        { D / 2 },
        { D / 16 },
        { D / 8 },
        { stages(D) },
        { stages(D) - 2 },
    >;
}
