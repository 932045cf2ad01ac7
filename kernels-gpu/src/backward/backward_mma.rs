//! backward_mma: all five products on the tensor cores, by mma.sync, each computed once.
//!
//! The idea: keys stay, rows pass. A warp keeps 16 keys, and computes its scores transposed: `Sᵀ = K Qᵀ`
//! and `dPᵀ = V dOᵀ` leave the tensor core with keys as rows. In this form P and dS are operand A of
//! `dV += Pᵀ dO` and `dK += dSᵀ Q`. Only dS goes through shared memory, because every warp adds to dQ:
//! atomics sum `dQ += dS K` in global memory.
//!
//! Change from backward_tiled: tensor cores; five products, not seven; copies run ahead.
//!
//! ```text
//! start to copy K, V
//! for each head of the group:
//!     start to copy Q, dO of the first tile of rows that sees a key
//!     for each such tile:
//!         wait for the copies; barrier
//!         start to copy the next Q, dO                  into the other stage
//!         Sᵀ = K Qᵀ; dPᵀ = V dOᵀ                        BC / 16 warps, 16 keys each
//!         Pᵀ = exp2(Sᵀ - LSE); dSᵀ = Pᵀ ∘ (dPᵀ - delta)
//!         dV += Pᵀ dO; dK += dSᵀ Q                      dSᵀ to shared memory on the way
//!         barrier
//!         dq_acc += dS K                                16 rows and half of the columns per warp
//! dK * scale, dV
//! ```
//!
//! Above D = 128 the accumulators of 16 keys, 2 D registers per lane, are too many. Two warps then share
//! 16 keys: each computes half of the scores, for half of the rows, and half of the columns of dK and
//! dV; P goes through shared memory too.
//!
//! | D | keys | warps per fragment of 16 keys | registers per lane of dK, dV, Sᵀ, dPᵀ | shared bytes |
//! |---|---|---|---|---|
//! | 64 | 128 | 1 | 32, 32, 32, 32 | 81,928 |
//! | 128 | 128 | 1 | 64, 64, 32, 32 | 147,464 |
//! | 256 | 64 | 2 | 64, 64, 16, 16 | 213,000 |
//!
//! The sums of dQ lie in memory in the order of the registers: 16 rows and 8 columns are 128 neighbours,
//! so each of a lane's four additions is one line of 128 bytes per warp
//! ([`convert`](super::convert) puts them in rows).
//!
//! The order of the sums of dQ is not fixed: bits differ from run to run where more than two tiles of keys
//! add to a row. [`order`] fixes it for calls that ask for it.
//!
//! Measured: 275 TFLOP/s at D 128 and 212 at D 64 (H200, f16, 16k tokens, N 8192). Limits: f16 and bf16; a fragment of B serves one product of a
//! warp, 16 FLOP per byte of shared memory.
//!
//! Source: Dao, "FlashAttention-2", 2023, algorithm 2 and section 3.2.

use half::{bf16, f16};
use simt::{
    async_copy, atomic,
    compiler::opaque,
    layout::{Swizzled, TileLayout},
    math, matrix,
    mma::{Ampere, Multiply, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use super::order::{self, Part, Place};
use crate::{
    args::{BackwardArgs, Tensor},
    entries,
    parts::{
        columns::Columns,
        fragment::{self, Queries, SharedQueries},
        head::Head,
        policy::Policy,
        tile,
    },
};

/// Threads of a block: eight warps.
pub const THREADS: u32 = 256;
/// Query rows of a tile.
pub const BR: u32 = 64;

const WARPS: u32 = THREADS / warp::LANES;
/// Stages of Q and dO: copies fill one during the arithmetic on the other.
const STAGES: u32 = 2;
/// Warps that share 16 rows of dQ.
const ROW_WARPS: u32 = WARPS / (BR / fragment::ROWS);
/// Products of 8 rows in a tile.
const ROW_TILES: usize = BR as usize / 8;

const _: () = assert!(super::ROW_PADDING % BR == 0, "rows past the last are padded ones");
const _: () = assert!(ROW_WARPS == 2, "the columns of dQ are divided by two");

/// Warps that share 16 keys, for head dim `d`.
#[must_use]
pub const fn split(d: usize) -> u32 {
    if d <= 128 { 1 } else { 2 }
}

/// Keys of a tile.
#[must_use]
pub const fn keys(d: usize) -> u32 {
    WARPS / split(d) * fragment::ROWS
}

/// Dynamic shared memory of a block in bytes: its tiles, and its place.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    tile_bytes(d) + order::PLACE_BYTES
}

/// Bytes of K, V, the stages of Q and dO, dS, and P where two warps share keys.
const fn tile_bytes(d: usize) -> u32 {
    (2 * (keys(d) + STAGES * BR) * d as u32 + split(d) * keys(d) * BR) * 2
}

/// The tiles of a block in shared memory.
struct Tiles<T, const D: usize> {
    k: Shared<T>,
    v: Shared<T>,
    /// Q and dO of each stage.
    stages: Shared<T>,
    /// dSᵀ: keys as rows.
    ds: Shared<T>,
    /// Pᵀ, where two warps share keys; else dSᵀ.
    p: Shared<T>,
}

impl<T: Scalar, const D: usize> Tiles<T, D> {
    /// Elements of a tile of Q or dO.
    const ROWS: u32 = BR * D as u32;

    /// # Safety
    /// The launch must give [`shared_bytes`].
    #[inline(always)]
    unsafe fn new() -> Self {
        let of_keys = const { keys(D) * D as u32 };
        let of_scores = const { keys(D) * BR };
        // SAFETY: the launch gives the shared memory, as stated above.
        let all = unsafe { Shared::<T>::dynamic(0, const { tile_bytes(D) / 2 }) };
        let behind = 2 * of_keys + 2 * STAGES * Self::ROWS;
        Self {
            k: all.slice(0, of_keys),
            v: all.slice(of_keys, of_keys),
            stages: all.slice(2 * of_keys, 2 * STAGES * Self::ROWS),
            ds: all.slice(behind, of_scores),
            p: all.slice(behind + const { (split(D) - 1) * keys(D) * BR }, of_scores),
        }
    }

    /// Q and dO of a stage.
    #[inline(always)]
    fn stage(&self, stage: u32) -> (Shared<T>, Shared<T>) {
        let first = 2 * stage * Self::ROWS;
        (self.stages.slice(first, Self::ROWS), self.stages.slice(first + Self::ROWS, Self::ROWS))
    }

    /// Starts to copy a tile of Q and dO into a stage; the caller waits.
    ///
    /// # Safety
    /// The tensors of `args` must have the shapes that it says.
    #[inline(always)]
    unsafe fn start(&self, args: &BackwardArgs, head: Head, first_row: u32, stage: u32) {
        let (q_smem, d_o_smem) = self.stage(stage);
        // Not a loop over the two: an argument whose address varies is copied to local memory.
        // SAFETY: Q and dO are `[B, H, Nq, D]`.
        let (q, d_o) = unsafe {
            (
                head.queries::<T>(&args.forward.tensors.q).of_columns(Columns::of_keys()),
                head.queries::<T>(&args.gradients.d_o).of_columns(Columns::of_values()),
            )
        };
        tile::load_async::<T, Swizzled<D>, D, BR, THREADS>(&q, first_row, q_smem);
        tile::load_async::<T, Swizzled<D>, D, BR, THREADS>(&d_o, first_row, d_o_smem);
        async_copy::commit();
    }
}

/// The place of a warp in its block.
#[derive(Clone, Copy)]
struct WarpPlace {
    /// Its first key of the tile.
    key: u32,
    /// Its number among the warps that share its keys.
    part: u32,
}

/// The gradients, but for the scale of dQ.
///
/// # Layout
/// `q, d_o: [B, H, Nq, D]`, `k, v, dk, dv: [B, Hkv, Nk, D]`, `dq_acc: [B, H, Nq', dq_columns]`, each
/// head in the order that the header states.
///
/// # Thread mapping
/// One block per tile of [`keys`] keys (`x`) and head of K over the batch (`y`, `z`); its warps as in the
/// file's header.
///
/// # Shared memory
/// [`shared_bytes`], dynamic.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are multiples of 16
/// bytes, the launch the threads and shared memory stated here, and [`prepare`](super::prepare) must
/// have run.
#[inline(always)]
pub unsafe fn backward_mma<
    T: Scalar,
    const D: usize,
    const BC: u32,
    const SPLIT: usize,
    const COLUMN_TILES: usize,
    const SCORE_TILES: usize,
    const DQ_TILES: usize,
    const ORDERED: bool,
>(
    args: &BackwardArgs,
) where
    Ampere: TensorCore<T>,
{
    const {
        assert!(BC == keys(D) && SPLIT == split(D) as usize);
        assert!(COLUMN_TILES * SPLIT * 8 == D && SCORE_TILES * SPLIT == ROW_TILES);
        assert!(DQ_TILES * 8 * ROW_WARPS as usize == D && D % 32 == 0);
    }
    // Who am I.
    let forward = &args.forward;
    let place_in_order = Place::at(const { tile_bytes(D) }, ORDERED);
    // SAFETY: the launch gives the shared memory, and the queue has its words.
    unsafe { place_in_order.draw(args) };
    let number = place_in_order.number();
    let Some(of_keys) = Head::of_kv_number(forward, number) else { return };
    let first_key = place_in_order.key_tile() * BC;
    if of_keys.keys_end_before(first_key) {
        return;
    }
    let warp_id = warp::uniform(warp::warp_id());
    let key_warps = const { BC / fragment::ROWS };
    let place = WarpPlace { key: warp_id % key_warps * fragment::ROWS, part: warp_id / key_warps };
    // SAFETY: the launch gives the shared memory.
    let tiles = unsafe { Tiles::<T, D>::new() };
    // Load K and V.
    // SAFETY: K and V are `[B, Hkv, Nk, D]`.
    let (k, v) =
        unsafe { (of_keys.keys::<T>(&forward.tensors.k), of_keys.keys::<T>(&forward.tensors.v)) };
    let (k, v) = (k.of_columns(Columns::of_keys()), v.of_columns(Columns::of_values()));
    tile::load_async::<T, Swizzled<D>, D, BC, THREADS>(&k, first_key, tiles.k);
    tile::load_async::<T, Swizzled<D>, D, BC, THREADS>(&v, first_key, tiles.v);
    async_copy::commit();

    let (mut dk, mut dv) = ([[0.0f32; 4]; COLUMN_TILES], [[0.0f32; 4]; COLUMN_TILES]);
    for member in 0..Head::group() {
        let head = Head::of_group(forward, number, member);
        // SAFETY: the buffers have the shapes stated above.
        let policy = unsafe { Policy::new(forward, head) };
        let row_tiles = policy.query_tiles(first_key, first_key + BC, BR);
        if row_tiles.is_empty() {
            continue;
        }
        // Hazard: the stage may still be read for the head before.
        thread::sync_threads();
        // SAFETY: the buffers have the shapes stated above.
        unsafe { tiles.start(args, head, row_tiles.start * BR, 0) };
        let mut stage = 0;
        for row_tile in row_tiles.clone() {
            let first_row = row_tile * BR;
            async_copy::wait::<0>();
            // Hazards: Q and dO (K and V, at first) are read by threads that did not copy them; the
            // other stage, dS and P, which are overwritten next, may still be read for the tile before.
            thread::sync_threads();
            if row_tile + 1 < row_tiles.end {
                // SAFETY: the buffers have the shapes stated above.
                unsafe { tiles.start(args, head, first_row + BR, stage ^ 1) };
            }
            let (q_smem, d_o_smem) = tiles.stage(stage);

            // Sᵀ = K Qᵀ, dPᵀ = V dOᵀ [16, BR / SPLIT] of this warp.
            let row = place.part * const { BR / SPLIT as u32 };
            let b = fragment::b_origin::<Swizzled<D>>(row);
            let (mut s, mut dp) = ([[[0.0f32; 4]; SCORE_TILES]], [[[0.0f32; 4]; SCORE_TILES]]);
            let a = SharedQueries::<T, Swizzled<D>>::new(tiles.k, place.key);
            fragment::add_scores::<T, Ampere, Swizzled<D>, D, SCORE_TILES, 1>(
                &mut s,
                a,
                (q_smem, b),
            );
            let a = SharedQueries::<T, Swizzled<D>>::new(tiles.v, place.key);
            fragment::add_scores::<T, Ampere, Swizzled<D>, D, SCORE_TILES, 1>(
                &mut dp,
                a,
                (d_o_smem, b),
            );
            let ([mut p], [mut ds]) = (s, dp);

            // P and dS replace them.
            let (g, column) = fragment::row_and_column();
            let (i, j) = (first_row + row + column, first_key + place.key + g);
            // SAFETY: rows up to the end of a tile are padded ones.
            unsafe { gradients::<T, SCORE_TILES>(args, &policy, (i, j), &mut p, &mut ds) };

            // dSᵀ to shared memory, for dQ.
            store_scores::<T, SCORE_TILES>(tiles.ds, place.key + g, row, column, &ds);
            if SPLIT == 1 {
                // dV += Pᵀ dO; dK += dSᵀ Q [16, D] of this warp.
                let b = fragment::a_origin::<Swizzled<D>>(0);
                fragment::add_output::<T, Ampere, Swizzled<D>, SCORE_TILES, COLUMN_TILES>(
                    &mut dv,
                    &p,
                    (d_o_smem, b),
                );
                fragment::add_output::<T, Ampere, Swizzled<D>, SCORE_TILES, COLUMN_TILES>(
                    &mut dk,
                    &ds,
                    (q_smem, b),
                );
                // Hazard: dS is read by warps that did not write it.
                thread::sync_threads();
            } else {
                store_scores::<T, SCORE_TILES>(tiles.p, place.key + g, row, column, &p);
                // Hazard: P and dS are read by warps that did not write them.
                thread::sync_threads();
                // The same, of half of the columns: [16, D / 2] of this warp.
                let b = Swizzled::<D>::right(fragment::a_origin::<Swizzled<D>>(0), 16 * place.part);
                add_keys::<T, D, COLUMN_TILES>(&mut dv, (tiles.p, place.key), (d_o_smem, b));
                add_keys::<T, D, COLUMN_TILES>(&mut dk, (tiles.ds, place.key), (q_smem, b));
            }

            // dQ += dS K [16, D / 2] of this warp.
            let (rows_of_dq, part) = (warp_id / ROW_WARPS * fragment::ROWS, warp_id % ROW_WARPS);
            let mut dq = [[0.0f32; 4]; DQ_TILES];
            // Transposed as it is loaded: keys are the terms.
            let a = fragment::b_origin::<Swizzled<{ BR as usize }>>(0);
            let a = Swizzled::<{ BR as usize }>::right(a, rows_of_dq);
            let b = Swizzled::<D>::right(fragment::a_origin::<Swizzled<D>>(0), 16 * part);
            unroll!(for STEP in 0..8 {
                if STEP < const { BC as usize / 16 } {
                    let key = 16 * STEP as u32;
                    let down = Swizzled::<{ BR as usize }>::down(a, key);
                    let a = matrix::load_x4_transposed(tiles.ds, down);
                    add_half::<T, D, DQ_TILES>(&mut dq, a, (tiles.k, b), key);
                }
            });
            let own = Part { first_row, rows: BR, part: warp_id, place: place_in_order, keys: BC };
            // SAFETY: the rows are padded ones, and other blocks add atomically too; each block that has
            // keys for them does.
            unsafe {
                own.wait(args, &policy);
                add_to_memory::<D, DQ_TILES>(args, head, first_row + rows_of_dq, part, &dq);
                own.pass(args, &policy);
            }
            stage ^= 1;
        }
    }

    // Copies that no row asked for.
    async_copy::wait::<0>();
    // Found again, and opaque: kept, they would take registers of the loop.
    let of_keys = Head::of_group(forward, opaque(place_in_order.number()), 0);
    let first_key = opaque(place_in_order.key_tile()) * BC;
    let (scale, first, part) = (forward.scores.scale, first_key + place.key, place.part);
    let (dk_tensor, dv_tensor) = (&args.gradients.dk, &args.gradients.dv);
    // SAFETY: dK and dV are `[B, Hkv, Nk, D]`; this warp alone has these columns of these rows.
    unsafe {
        let (keys, values) = (Columns::of_keys(), Columns::of_values());
        store::<T, SPLIT, COLUMN_TILES>(&dk, scale, (dk_tensor, keys), of_keys, first, part);
        let rescale = rescale(args);
        store::<T, SPLIT, COLUMN_TILES>(&dv, rescale, (dv_tensor, values), of_keys, first, part);
    }
}

/// The factor of kept weights, which dV takes once.
#[inline(always)]
fn rescale(args: &BackwardArgs) -> f32 {
    if Policy::drops() { args.forward.scores.dropout.rescale } else { 1.0 }
}

/// P after dropout, not scaled up, and dS of a lane's scores: `i` is the row of the first, `j` its key.
/// Of every 8 columns, which are rows of Q, lane `4 g + t` has `2 t` and `2 t + 1`; its keys are `j` and
/// `j + 8`.
///
/// # Safety
/// `delta` and `minus_lse_log2` of `args.steps` must hold the rows.
#[inline(always)]
unsafe fn gradients<T: Scalar, const N: usize>(
    args: &BackwardArgs,
    policy: &Policy,
    (i, j): (u32, u32),
    s: &mut [[f32; 4]; N],
    dp: &mut [[f32; 4]; N],
) {
    let last = i + 8 * N as u32;
    // The same for all lanes: the first of 16 keys, and of 8 rows.
    let (first_j, end_j) = (j - j % fragment::ROWS, j - j % fragment::ROWS + fragment::ROWS);
    let first_i = i - i % 8;
    let is_whole = policy.whole_from(last) <= first_j && end_j <= policy.whole_keys(first_i);
    let visible = if is_whole { [u32::MAX; 2] } else { bits::<N>(i, j, |i, j| policy.sees(i, j)) };
    let kept = if Policy::drops() {
        bits::<N>(i, j, |i, j| policy.kept(i, j, 1.0) != 0.0)
    } else {
        [u32::MAX; 2]
    };
    // SAFETY: both hold the rows, as stated above.
    let (delta, minus_lse_log2) =
        unsafe { (args.steps.delta.view::<f32>(), args.steps.minus_lse_log2.view::<f32>()) };
    let row = policy.head.padded_row(i);
    let scale = args.forward.scores.scale;
    unroll!(for TILE in 0..8 {
        if TILE < N {
            let at = row + 8 * TILE as u64;
            let minus_lse = minus_lse_log2.read_as::<[u32; 2]>(at).map(f32::from_bits);
            let delta = delta.read_as::<[u32; 2]>(at).map(f32::from_bits);
            unroll!(for E in 0..4 {
                let (i, j) = (i + (8 * TILE + E % 2) as u32, j + 8 * (E / 2) as u32);
                let bit = 2 * TILE + E % 2;
                let raw = s[TILE][E];
                let shaped = policy.shape_score::<T>(raw, scale, i, j);
                let mut x = math::fma(shaped, policy.scale_log2(), minus_lse[E % 2]);
                if visible[E / 2] >> bit & 1 == 0 {
                    x = f32::NEG_INFINITY;
                }
                let weight = math::exp2(x);
                let (mut p, mut gradient) = (weight, dp[TILE][E]);
                if Policy::drops() {
                    let is_kept = kept[E / 2] >> bit & 1 != 0;
                    p = if is_kept { weight } else { 0.0 };
                    gradient = if is_kept { gradient * policy.rescale() } else { 0.0 };
                }
                s[TILE][E] = p;
                dp[TILE][E] = weight * (gradient - delta[E % 2]) * policy.score_slope::<T>(raw);
            });
        }
    });
}

/// The scores of a lane for whose row and key `holds`: bit `2 n + e` of the first is row
/// `i + 8 n + e` at key `j`, of the second at `j + 8`.
#[inline(always)]
fn bits<const N: usize>(i: u32, j: u32, holds: impl Fn(u32, u32) -> bool) -> [u32; 2] {
    let mut bits = [0; 2];
    // Not unrolled: `holds` may be long.
    for n in 0..2 * N as u32 {
        let row = i + 8 * (n / 2) + n % 2;
        bits[0] |= u32::from(holds(row, j)) << n;
        bits[1] |= u32::from(holds(row, j + 8)) << n;
    }
    bits
}

/// Writes a lane's part of Pᵀ or dSᵀ, from row `first` of Q on, to keys `key` and `key + 8`.
#[inline(always)]
fn store_scores<T: Scalar, const N: usize>(
    tile: Shared<T>,
    key: u32,
    first: u32,
    column: u32,
    values: &[[f32; 4]; N],
) where
    Ampere: TensorCore<T>,
{
    unroll!(for TILE in 0..8 {
        if TILE < N {
            let index = Swizzled::<{ BR as usize }>::index(key, first + 8 * TILE as u32) + column;
            let [a, b, c, d] = values[TILE];
            tile.write_as::<u32>(index, Ampere::pack(a, b));
            let below = Swizzled::<{ BR as usize }>::down(index, 8);
            tile.write_as::<u32>(below, Ampere::pack(c, d));
        }
    });
}

/// `sum += Pᵀ dO`, or dSᵀ and Q, of 16 keys from `key` on of a tile and half of the columns.
#[inline(always)]
fn add_keys<T: Scalar, const D: usize, const O: usize>(
    sum: &mut [[f32; 4]; O],
    (tile, key): (Shared<T>, u32),
    b: (Shared<T>, u32),
) where
    Ampere: TensorCore<T>,
{
    let scores = SharedQueries::<T, Swizzled<{ BR as usize }>>::new(tile, key);
    unroll!(for STEP in 0..4 {
        let [a] = Queries::<1>::step(&scores, STEP);
        add_half::<T, D, O>(sum, a, b, 16 * STEP as u32);
    });
}

/// `sum += A B` of half of B's columns, 16 of every 32: `b` is from [`fragment::a_origin`], 16 columns
/// to the right for the second half. `term`: the row of B that A's first column belongs to.
#[inline(always)]
fn add_half<T: Scalar, const D: usize, const O: usize>(
    sum: &mut [[f32; 4]; O],
    a: [u32; 4],
    (b_smem, b): (Shared<T>, u32),
    term: u32,
) where
    Ampere: TensorCore<T>,
{
    unroll!(for PAIR in 0..8 {
        if PAIR < O / 2 {
            let right = Swizzled::<D>::right(b, PAIR as u32 * 32);
            let b = matrix::load_x4_transposed(b_smem, Swizzled::<D>::down(right, term));
            Ampere::multiply(&mut sum[2 * PAIR], a, [b[0], b[1]]);
            Ampere::multiply(&mut sum[2 * PAIR + 1], a, [b[2], b[3]]);
        }
    });
}

/// Elements of 16 rows and 8 columns of dq_acc.
const FRAGMENT: u64 = 128;

/// Adds 16 rows from `first_row` on, half of their columns, to dq_acc.
///
/// # Safety
/// `dq_acc` must be `[B, H, Nq', D]`, with these rows.
#[inline(always)]
unsafe fn add_to_memory<const D: usize, const O: usize>(
    args: &BackwardArgs,
    head: Head,
    first_row: u32,
    part: u32,
    dq: &[[f32; 4]; O],
) {
    // SAFETY: `dq_acc` holds the rows, as stated above.
    let dq_acc = unsafe { args.steps.dq_acc.view_mut::<f32>() };
    let first = head.padded_row(first_row) * D as u64 + warp::lane_id() as u64;
    unroll!(for TILE in 0..16 {
        if TILE < O {
            let column_tile = (TILE / 2 * 4 + TILE % 2) as u64 + 2 * part as u64;
            unroll!(for E in 0..4 {
                let index = first + column_tile * FRAGMENT + 32 * E as u64;
                let _ = atomic::add_global_f32(dq_acc, index, dq[TILE][E]);
            });
        }
    });
}

/// Stores a warp's 16 rows from `first_row` on of dK or dV, times a factor: all columns, or of two
/// warps' the `part`-th 16 of every 32.
///
/// # Safety
/// The tensor must be `[B, Hkv, Nk, D]`; no other thread writes these columns of these rows.
#[inline(always)]
unsafe fn store<T: Scalar, const SPLIT: usize, const O: usize>(
    sum: &[[f32; 4]; O],
    factor: f32,
    (tensor, columns): (&Tensor, Columns),
    head: Head,
    first_row: u32,
    part: u32,
) where
    Ampere: TensorCore<T>,
{
    // SAFETY: the rows are in the tensor, and these columns have no other writer, as
    // stated above.
    let view = unsafe { tensor.buffer.view_mut::<T>() };
    let (g, column) = fragment::row_and_column();
    unroll!(for R in 0..2 {
        let j = first_row + g + 8 * R as u32;
        if j < head.seq_k {
            let row = head.key(tensor, j) + (column + 16 * part) as u64;
            unroll!(for TILE in 0..16 {
                let right = (TILE / 2 * 16 * SPLIT + TILE % 2 * 8) as u64;
                if TILE < O && columns.has(right as u32 + 16 * part) {
                    let [low, high] = [sum[TILE][2 * R], sum[TILE][2 * R + 1]];
                    let pair = Ampere::pack(low * factor, high * factor);
                    view.write_as::<u32>(row + right, pair);
                }
            });
        }
    });
}

macro_rules! instances {
    ($(#[$meta:meta])* $table:ident, $end:literal, $ordered:literal) => {
        entries! {
            $(#[$meta])*
            pub static $table: BackwardArgs => "sm_80", threads THREADS, min_blocks 1;
            backward_mma: T in [f16, bf16], d D in [32, 64, 96, 128, 160, 192, 224, 256], $end =
                backward_mma::<
                    T,
                    D,
                    { keys(D) },
                    { split(D) as usize },
                    { D / 8 / split(D) as usize },
                    { ROW_TILES / split(D) as usize },
                    { D / 16 },
                    $ordered,
                >;
        }
    };
}

instances! {
    /// Instances of [`backward_mma()`] that sum dQ in the order in which the blocks come.
    ENTRIES, "", false
}

instances! {
    /// Instances of [`backward_mma()`] that sum dQ in a fixed order.
    ORDERED_ENTRIES, "_ordered", true
}
