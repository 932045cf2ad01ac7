//! backward_mma: all five products on the tensor cores, by mma.sync, each computed once.
//!
//! The idea: keys stay, rows pass. Two warps have the same 32 keys, and each computes their scores with half of
//! the rows, transposed: `Sᵀ = K Qᵀ` and `dPᵀ = V dOᵀ` leave the tensor core with keys as rows. In this form P
//! and dS are operand A of `dV += Pᵀ dO` and `dK += dSᵀ Q`, of which each warp has half of the columns: its own rows
//! come from registers, the other warp's through shared memory. Every warp reads dS from there for dQ, which
//! atomics sum in global memory.
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
//!         Sᵀ = K Qᵀ; Pᵀ = exp2(Sᵀ - LSE)                32 keys and half of the rows per warp
//!         dPᵀ = V dOᵀ - delta; dSᵀ = Pᵀ ∘ dPᵀ           the product begins with -delta
//!         Pᵀ, dSᵀ to shared memory
//!         dV += Pᵀ dO; dK += dSᵀ Q                      32 keys and half of the columns; own rows
//!         barrier
//!         dV += Pᵀ dO; dK += dSᵀ Q                      the other warp's rows
//!         dq_acc += dS K                                32 rows and some of the columns per warp
//! dK * scale, dV
//! ```
//!
//! ```text
//!             rows                            columns
//!         | half 0 | half 1 |             | half 0 | half 1 |
//! 32 keys | warp 0 | warp 4 |     32 keys | warp 0 | warp 4 |     16 of every 32 columns are half 0
//! 32 keys | warp 1 | warp 5 |     32 keys | warp 1 | warp 5 |
//! ...                             ...
//!     Sᵀ, dPᵀ, P, dS                       dK, dV
//! ```
//!
//! | D | tile, rows x keys | keys per warp | registers per lane of dK, dV, Sᵀ, dPᵀ | shared bytes |
//! |---|---|---|---|---|
//! | 64 | 128 x 128 | 32 | 32, 32, 64, 64 | 163,848 |
//! | 64, less memory | 64 x 128 | 32 | 32, 32, 32, 32 | 98,312 |
//! | 128 | 64 x 128 | 32 | 64, 64, 32, 32 | 163,848 |
//! | 256 | 64 x 64 | 16 | 64, 64, 16, 16 | 213,000 |
//!
//! By counting: at D = 128 a tile of 10.5 MFLOP moves 608 KB through shared memory, 17 FLOP per byte, which takes
//! 4,750 clocks at 128 bytes each. With 16 keys and all rows per warp it would move 784 KB. Its products take
//! 2,560 clocks at the rate of wgmma, which mma.sync does not reach.
//!
//! P comes before dP: its exponentials run beside the products of dP. LSE and delta are read before the first
//! product, so that no thread waits for global memory.
//!
//! The sums of dQ lie in memory in the order of the registers: 16 rows and 8 columns are 128 neighbours,
//! so each of a lane's four additions is one line of 128 bytes per warp
//! ([`convert`](super::convert) puts them in rows).
//!
//! The order of the sums of dQ is not fixed: bits differ from run to run where more than two tiles of keys
//! add to a row. [`order`] fixes it for calls that ask for it.
//!
//! Measured: 334 TFLOP/s at D 128 and 298 at D 64 (H200, f16, 16k tokens, N 8192), where 16 keys per warp reached
//! 269 and 221. Tensor cores are busy for half of the time. Limits: f16 and bf16.
//!
//! | file | contents |
//! |---|---|
//! | `scores` | P and dS of a warp's scores |
//! | `sums` | dK, dV and dQ |
//!
//! Source: Dao, "FlashAttention-2", 2023, algorithm 2 and section 3.2.

use half::{bf16, f16};
use simt::{
    async_copy,
    compiler::opaque,
    layout::{Swizzled, TileLayout},
    matrix,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use super::order::{self, Part, Place};
use crate::{
    args::BackwardArgs,
    entries,
    parts::{
        columns::Columns,
        fragment::{self, ROWS, SharedQueries, add_output_step},
        head::Head,
        policy::Policy,
        tile,
    },
};

mod scores;
mod sums;

use scores::{OfRows, differentiate, store_scores, weigh};
use sums::{ScoresAt, add_other, add_own, add_to_memory, store};

/// Threads of a block: eight warps.
pub const THREADS: u32 = 256;
/// Query rows of a tile.
pub const BR: u32 = 64;
/// Query rows of a tile of the entries [`TALL_ENTRIES`]. An operand that is read from shared memory serves more
/// products; P and dS have twice the size.
pub const TALL_BR: u32 = 128;
/// Warps that share keys: each computes the scores of half of the rows, and half of the columns of dK and dV.
const HALVES: u32 = 2;
/// Stages of Q and dO: copies fill one during the arithmetic on the other.
const STAGES: u32 = 2;

const WARPS: u32 = THREADS / warp::LANES;
/// Pairs of warps along the keys.
const KEY_WARPS: u32 = WARPS / HALVES;

const _: () = assert!(
    super::ROW_PADDING % TALL_BR == 0 && TALL_BR % BR == 0,
    "rows past the last are padded ones"
);

/// Fragments of 16 keys per pair of warps, for head dim `d`: above 128, the accumulators of two are too many.
const fn key_fragments(d: usize) -> usize {
    if d <= 128 { 2 } else { 1 }
}

/// Keys of a tile.
#[must_use]
pub const fn keys(d: usize) -> u32 {
    KEY_WARPS * key_fragments(d) as u32 * ROWS
}

/// Query rows of a tile on a GPU that has room for them.
#[must_use]
pub const fn rows(d: usize) -> u32 {
    if d <= 64 { TALL_BR } else { BR }
}

/// Fragments of 16 rows of dQ per warp, in tiles of `br` rows.
const fn dq_fragments(d: usize, br: u32) -> usize {
    if br == TALL_BR || d % 64 == 0 { 2 } else { 1 }
}

/// Warps that share rows of dQ: each has as many columns.
const fn dq_parts(d: usize, br: u32) -> u32 {
    WARPS * dq_fragments(d, br) as u32 * ROWS / br
}

/// Dynamic shared memory of a block in bytes, for tiles of `br` rows: its tiles, and its place.
#[must_use]
pub const fn shared_bytes(d: usize, br: u32) -> u32 {
    tile_bytes(d, br) + order::PLACE_BYTES
}

/// Bytes of K, V, the stages of Q and dO, P and dS.
const fn tile_bytes(d: usize, br: u32) -> u32 {
    (2 * (keys(d) + STAGES * br) * d as u32 + 2 * keys(d) * br) * 2
}

/// The tiles of a block in shared memory.
struct Tiles<T, const D: usize, const BR: u32> {
    k: Shared<T>,
    v: Shared<T>,
    /// Q and dO of each stage.
    stages: Shared<T>,
    /// Pᵀ: keys as rows.
    p: Shared<T>,
    /// dSᵀ.
    ds: Shared<T>,
}

impl<T: Scalar, const D: usize, const BR: u32> Tiles<T, D, BR> {
    /// Elements of a tile of Q or dO.
    const TILE: u32 = BR * D as u32;

    /// # Safety
    /// The launch must give [`shared_bytes`].
    #[inline(always)]
    unsafe fn new() -> Self {
        let of_keys = const { keys(D) * D as u32 };
        let of_scores = const { keys(D) * BR };
        // SAFETY: the launch gives the shared memory, as stated above.
        let all = unsafe { Shared::<T>::dynamic(0, const { tile_bytes(D, BR) / 2 }) };
        let behind = 2 * of_keys + 2 * STAGES * Self::TILE;
        Self {
            k: all.slice(0, of_keys),
            v: all.slice(of_keys, of_keys),
            stages: all.slice(2 * of_keys, 2 * STAGES * Self::TILE),
            p: all.slice(behind, of_scores),
            ds: all.slice(behind + of_scores, of_scores),
        }
    }

    /// Q and dO of a stage.
    #[inline(always)]
    fn stage(&self, stage: u32) -> (Shared<T>, Shared<T>) {
        let first = 2 * stage * Self::TILE;
        (self.stages.slice(first, Self::TILE), self.stages.slice(first + Self::TILE, Self::TILE))
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
    /// Which half of the rows and of the columns it has.
    half: u32,
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
    const F: usize,
    const BR: u32,
    const COLUMNS: usize,
    const SCORE_TILES: usize,
    const COLUMN_TILES: usize,
    const DQ_F: usize,
    const DQ_TILES: usize,
    const DQ_PARTS: u32,
    const ORDERED: bool,
>(
    args: &BackwardArgs,
) where
    Ampere: TensorCore<T>,
{
    const {
        assert!(BC == keys(D) && F == key_fragments(D));
        assert!(COLUMNS == BR as usize && SCORE_TILES * HALVES as usize * 8 == COLUMNS);
        assert!(COLUMN_TILES * HALVES as usize * 8 == D && D % 32 == 0);
        assert!(DQ_F == dq_fragments(D, BR) && DQ_PARTS == dq_parts(D, BR));
        assert!(DQ_TILES * DQ_PARTS as usize * 8 == D && DQ_TILES % 2 == 0);
    }
    // Who am I.
    let forward = &args.forward;
    let place_in_order = Place::at(const { tile_bytes(D, BR) }, ORDERED);
    // SAFETY: the launch gives the shared memory, and the queue has its words.
    unsafe { place_in_order.draw(args) };
    let number = place_in_order.number();
    let Some(of_keys) = Head::of_kv_number(forward, number) else { return };
    let first_key = place_in_order.key_tile() * BC;
    if of_keys.keys_end_before(first_key) {
        return;
    }
    let warp_id = warp::uniform(warp::warp_id());
    let place = WarpPlace {
        key: warp_id % KEY_WARPS * const { key_fragments(D) as u32 * ROWS },
        half: warp_id / KEY_WARPS,
    };
    // SAFETY: the launch gives the shared memory.
    let tiles = unsafe { Tiles::<T, D, BR>::new() };
    // Load K and V.
    // SAFETY: K and V are `[B, Hkv, Nk, D]`.
    let (k, v) =
        unsafe { (of_keys.keys::<T>(&forward.tensors.k), of_keys.keys::<T>(&forward.tensors.v)) };
    let (k, v) = (k.of_columns(Columns::of_keys()), v.of_columns(Columns::of_values()));
    tile::load_async::<T, Swizzled<D>, D, BC, THREADS>(&k, first_key, tiles.k);
    tile::load_async::<T, Swizzled<D>, D, BC, THREADS>(&v, first_key, tiles.v);
    async_copy::commit();

    let (mut dk, mut dv) = ([[[0.0f32; 4]; COLUMN_TILES]; F], [[[0.0f32; 4]; COLUMN_TILES]; F]);
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

            // Sᵀ = K Qᵀ: of this warp's keys, its half of the rows. P replaces it.
            let row = place.half * const { BR / HALVES };
            // SAFETY: rows up to the end of a tile are padded ones.
            let of_rows = unsafe { OfRows::<SCORE_TILES>::load(args, head, first_row + row) };
            let b = fragment::b_origin::<Swizzled<D>>(row);
            let mut p = [[[0.0f32; 4]; SCORE_TILES]; F];
            let a = SharedQueries::<T, Swizzled<D>>::new(tiles.k, place.key);
            fragment::add_scores::<T, Ampere, Swizzled<D>, D, SCORE_TILES, F>(
                &mut p,
                a,
                (q_smem, b),
            );
            let at = (first_row + row, first_key + place.key);
            let slopes = weigh::<T, SCORE_TILES, F>(args, &policy, at, &of_rows, &mut p);

            // dPᵀ = V dOᵀ. dS replaces it.
            let mut ds = of_rows.minus_delta();
            let a = SharedQueries::<T, Swizzled<D>>::new(tiles.v, place.key);
            fragment::add_scores::<T, Ampere, Swizzled<D>, D, SCORE_TILES, F>(
                &mut ds,
                a,
                (d_o_smem, b),
            );
            differentiate::<SCORE_TILES, F>(&policy, at, &of_rows, &slopes, &mut p, &mut ds);

            // Pᵀ and dSᵀ to shared memory, for the other warp of these keys, and for dQ.
            store_scores::<T, COLUMNS, SCORE_TILES, F>(tiles.p, (place.key, row), &p);
            store_scores::<T, COLUMNS, SCORE_TILES, F>(tiles.ds, (place.key, row), &ds);

            // dV += Pᵀ dO; dK += dSᵀ Q: of this warp's keys, its half of the columns. First over its own rows.
            let b = Swizzled::<D>::right(fragment::a_origin::<Swizzled<D>>(row), 16 * place.half);
            add_own::<T, D, SCORE_TILES, COLUMN_TILES, F>(&mut dv, &p, (d_o_smem, b));
            add_own::<T, D, SCORE_TILES, COLUMN_TILES, F>(&mut dk, &ds, (q_smem, b));
            // Hazard: P and dS are read by warps that did not write them.
            thread::sync_threads();
            // Then over the other warp's.
            let row = const { BR / HALVES } - row;
            let b = Swizzled::<D>::right(fragment::a_origin::<Swizzled<D>>(row), 16 * place.half);
            let of_scores = |tile| ScoresAt { tile, key: place.key, row };
            add_other::<T, D, COLUMNS, COLUMN_TILES, F>(&mut dv, of_scores(tiles.p), (d_o_smem, b));
            add_other::<T, D, COLUMNS, COLUMN_TILES, F>(&mut dk, of_scores(tiles.ds), (q_smem, b));

            // dQ += dS K: of 16 or 32 rows, half or a quarter of the columns.
            let (rows_of_dq, part) =
                (warp_id / DQ_PARTS * const { DQ_F as u32 * ROWS }, warp_id % DQ_PARTS);
            let mut dq = [[[0.0f32; 4]; DQ_TILES]; DQ_F];
            // Transposed as it is loaded: keys are the terms.
            let a = fragment::b_origin::<Swizzled<COLUMNS>>(0);
            let a = Swizzled::<COLUMNS>::right(a, rows_of_dq);
            let b = Swizzled::<D>::right(fragment::a_origin::<Swizzled<D>>(0), 16 * part);
            unroll!(for STEP in 0..8 {
                if STEP < const { BC as usize / 16 } {
                    let key = 16 * STEP as u32;
                    let down = Swizzled::<COLUMNS>::down(a, key);
                    let mut ds = [[0; 4]; DQ_F];
                    unroll!(for FRAGMENT in 0..2 {
                        if FRAGMENT < DQ_F {
                            let right = Swizzled::<COLUMNS>::right(down, 16 * FRAGMENT as u32);
                            ds[FRAGMENT] = matrix::load_x4_transposed(tiles.ds, right);
                        }
                    });
                    add_output_step::<T, Ampere, Swizzled<D>, DQ_TILES, DQ_F, DQ_PARTS>(
                        &mut dq,
                        ds,
                        (tiles.k, b),
                        key,
                    );
                }
            });
            let own = Part { first_row, rows: BR, part: warp_id, place: place_in_order, keys: BC };
            // SAFETY: the rows are padded ones, and other blocks add atomically too; each block that has
            // keys for them does.
            unsafe {
                own.wait(args, &policy);
                let first_row = first_row + rows_of_dq;
                add_to_memory::<D, DQ_TILES, DQ_F, DQ_PARTS>(args, head, first_row, part, &dq);
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
    let (scale, first, half) = (forward.scores.scale, first_key + place.key, place.half);
    let (dk_tensor, dv_tensor) = (&args.gradients.dk, &args.gradients.dv);
    // SAFETY: dK and dV are `[B, Hkv, Nk, D]`; this warp alone has these columns of these rows.
    unsafe {
        let (keys, values) = (Columns::of_keys(), Columns::of_values());
        store::<T, COLUMN_TILES, F>(&dk, scale, (dk_tensor, keys), of_keys, first, half);
        let rescale = if Policy::drops() { forward.scores.dropout.rescale } else { 1.0 };
        store::<T, COLUMN_TILES, F>(&dv, rescale, (dv_tensor, values), of_keys, first, half);
    }
}

macro_rules! instances {
    ($(#[$meta:meta])* $table:ident, $d:tt, $br:expr, $end:literal, $ordered:literal) => {
        entries! {
            $(#[$meta])*
            pub static $table: BackwardArgs => "sm_80", threads THREADS, min_blocks 1;
            backward_mma: T in [f16, bf16], d D in $d, $end = backward_mma::<
                T,
                D,
                { keys(D) },
                { key_fragments(D) },
                { $br },
                { $br as usize },
                { ($br / HALVES / 8) as usize },
                { D / 8 / HALVES as usize },
                { dq_fragments(D, $br) },
                { D / 8 / dq_parts(D, $br) as usize },
                { dq_parts(D, $br) },
                $ordered,
            >;
        }
    };
}

instances! {
    /// Instances of [`backward_mma()`] that sum dQ in the order in which the blocks come.
    ENTRIES, [32, 64, 96, 128, 160, 192, 224, 256], BR, "", false
}

instances! {
    /// Instances of [`backward_mma()`] that sum dQ in a fixed order.
    ORDERED_ENTRIES, [32, 64, 96, 128, 160, 192, 224, 256], BR, "_ordered", true
}

instances! {
    /// As [`ENTRIES`], with [`TALL_BR`] rows of a tile.
    TALL_ENTRIES, [32, 64], TALL_BR, "_tall", false
}

instances! {
    /// As [`ORDERED_ENTRIES`], with [`TALL_BR`] rows of a tile.
    TALL_ORDERED_ENTRIES, [32, 64], TALL_BR, "_tall_ordered", true
}
