//! flash_tf32: f32 on the tensor cores, from sm_80 on.
//!
//! The idea: a tensor core multiplies tf32, 11 bits of an f32's 24. Two tf32 hold 22 to 24
//! of them, and three products of halves are a product that is as good as one in f32:
//!
//! ```text
//! x = high + low        high = x rounded to tf32, low = x - high, exactly
//! x y  =  low high + high low + high high      (low low is 2^-24 of it: left out)
//! ```
//!
//! Change from flash_pipelined: each operand is split when it comes to registers, and
//! a product is three (`Multiply<f32>` in `simt::mma`). Q, K and V stay f32 in shared
//! memory, P in registers: nothing is stored twice. V is read in another way, see below.
//! The rest is flash_pipelined's: copies ahead, scores and softmax.
//!
//! ```text
//! start to copy Q, and K, V of the first tile
//! for each tile of BC keys:
//!     wait for the copies; barrier                one per tile
//!     start to copy K, V of the next tile         into the other stage
//!     S = Q Kᵀ                                    ldmatrix, split, 3 products of 16 x 8 x 8
//!     hide; raise m where it was outgrown
//!     for each 8 keys: P = exp2(S * scale - m); l += rowsum(P); O += P V
//! O / l, LSE = m + log(l)
//! ```
//!
//! `ldmatrix` moves rows of 16 bytes, four f32: it brings Q and K where the product wants
//! them, but cannot transpose V, as it does for 16-bit elements. Instead, the order of what
//! is summed over and the order of O's columns are chosen so that ordinary loads of 16
//! bytes do:
//!
//! ```text
//! lane 4 g + t of a product of 8 keys    A wants P at the places t, t + 4 of row g; S left it
//!                                        at the keys 2 t, 2 t + 1: these take those places
//!                                        B wants the same keys of V in column g
//! load of 16 bytes per key               columns 4 g .. 4 g + 4 of 32: column 4 g + e goes
//!                                        to product e, and four products have their B
//! O                                      lane t has 8 t .. 8 t + 8 of 32 columns of a row:
//!                                        two stores of 16 bytes, nothing to exchange
//! ```
//!
//! | D | warps x fragments | BC | registers of S, O per thread | shared bytes |
//! |---|---|---|---|---|
//! | 32 | 4 x 2 | 32 | 32, 32 | 32,768 |
//! | 64 | 4 x 2 | 32 | 32, 64 | 65,536 |
//! | 96 | 4 x 1 | 32 | 16, 48 | 73,728 |
//! | 128 | 4 x 1 | 32 | 16, 64 | 98,304 |
//! | 160 | 4 x 1 | 16 | 8, 80 | 81,920 |
//! | 192 | 4 x 1 | 16 | 8, 96 | 98,304 |
//! | 224 | 2 x 1, twice | 16 | 8, 64 | 86,016 |
//! | 256 | 2 x 1, twice | 16 | 8, 64 | 98,304 |
//!
//! From D = 224 on O is too wide for a warp that has products under way: two warps have
//! the same rows, and 128 columns each. Both compute S, half as many products again.
//!
//! Where the time goes, by counting: a product of 16 x 8 x 8 is three instructions of the
//! tensor core, four additions that round, and six that split B; the twelve that split A
//! serve all tiles of a step, and with two fragments the operands of B serve both. At half the
//! rate of f16 and three for one, a sixth of flash_pipelined's speed is the most there is.
//!
//! Measured: 45 TFLOP/s at D 128 and 57 at D 64 (H100; 16k tokens, hidden 2048, N 8192), where
//! flash_tiled has 18 and standard 21 and 18. Limits: f32, a positive scale.
//!
//! Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
//! surpassing the FP32 theoretical peak performance", 2022; PTX ISA, "Matrix Fragments for
//! mma.m16n8k8".

use simt::{
    async_copy,
    compiler::opaque,
    layout::{CHUNK, Swizzled, TileLayout},
    matrix,
    mma::{Ampere, Multiply},
    shared::Shared,
    thread, unroll, warp,
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        columns::Columns,
        fragment::{self, Queries, SharedQueries},
        online::{self, RowState},
        policy::Policy,
        schedule::{self, QueryTile},
        softmax,
        tile::{self, KvStages},
        warp_rows::{WarpRows, warp_row},
    },
};

/// Threads of a block: four warps.
pub const THREADS: u32 = tile::FOUR_WARPS;

/// How a block works on its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tf32Shape {
    /// Fragments of 16 rows that a warp keeps.
    pub fragments: u32,
    /// Keys of a tile.
    pub keys: u32,
    /// Columns of O that a warp has. If that is not all, two warps have the same rows and
    /// both compute their scores; columns from both ends.
    pub columns: u32,
}

/// The shape for head dim `d`. The wider O is, the less is left for S and for a second
/// fragment, and in the end O is too wide for one warp.
#[must_use]
pub const fn shape(d: usize) -> Tf32Shape {
    let (fragments, keys, columns) = match d {
        0..=64 => (2, 32, d),
        65..=128 => (1, 32, d),
        129..=192 => (1, 16, d),
        _ => (1, 16, 128),
    };
    Tf32Shape { fragments, keys, columns: columns as u32 }
}

impl Tf32Shape {
    /// Query rows of a block for head dim `d`.
    #[must_use]
    pub const fn rows(&self, d: usize) -> u32 {
        let warps = THREADS / warp::LANES / (d as u32).div_ceil(self.columns);
        warps * self.fragments * fragment::ROWS
    }
}

/// Dynamic shared memory of a block in bytes: the stages of K and V, and Q.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    let shape = shape(d);
    (tile::STAGES * 2 * shape.keys + shape.rows(d)) * d as u32 * 4
}

/// Halves after which the order of a swizzled row repeats.
const SWIZZLE_PERIOD: u32 = 64;

/// The unit of tiles: an f32 counts as two.
type Half = u16;

/// Flash attention forward in f32, each product three of tf32.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`, with `D = HALVES / 2`.
///
/// # Thread mapping
/// `B * H * ceil(Nq / BR)` blocks along x, four warps each. A warp has FRAGMENTS fragments
/// of 16 rows below each other.
///
/// # Shared memory
/// [`shared_bytes`], dynamic: two stages of K and V, then Q.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are
/// multiples of 16 bytes, and the launch the threads and shared memory stated here.
#[inline(always)]
pub unsafe fn flash_tf32<
    const HALVES: usize,
    const COLUMN_TILES: usize,
    const FRAGMENTS: usize,
    const BR: u32,
    const BC: u32,
    const KEY_TILES: usize,
>(
    args: &AttentionArgs,
) {
    const {
        let shape = shape(HALVES / 2);
        assert!(BR == shape.rows(HALVES / 2) && FRAGMENTS as u32 == shape.fragments);
        assert!(COLUMN_TILES as u32 == shape.columns / 8 && HALVES / 2 <= 2 * 8 * COLUMN_TILES);
        assert!(BC == shape.keys && BC as usize == 8 * KEY_TILES);
    }

    // Who am I.
    let Place { tile, warp_row, part } = place::<HALVES, COLUMN_TILES, BR, FRAGMENTS>(args);
    let (head, first_row) = (tile.head(args), tile.first_row);
    if head.ends_before(first_row) {
        return;
    }
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    let (policy, q, kv, q_smem) = unsafe {
        let kv = KvStages::<Half, HALVES, BC, THREADS>::new(
            head.keys(&args.tensors.k.halves()).of_columns(Columns::of_keys().halves()),
            head.keys(&args.tensors.v.halves()).of_columns(Columns::of_values().halves()),
        );
        let q_offset = KvStages::<Half, HALVES, BC, THREADS>::BYTES;
        (
            Policy::new(args, head),
            head.queries::<Half>(&args.tensors.q.halves()).of_columns(Columns::of_keys().halves()),
            kv,
            Shared::<Half>::dynamic(q_offset, const { BR * HALVES as u32 }),
        )
    };
    let queries = || SharedQueries::<Half, Swizzled<HALVES>>::new(q_smem, warp_row);

    let mut state =
        WarpRows::<f32, KEY_TILES, COLUMN_TILES, FRAGMENTS>::new(policy, first_row + warp_row);
    let kv_tiles = policy.key_tiles(first_row, first_row + BR, BC);
    if !kv_tiles.is_empty() {
        // Load Q, and the first tile of K and V.
        tile::load_async::<Half, Swizzled<HALVES>, HALVES, BR, THREADS>(&q, first_row, q_smem);
        kv.start(kv_tiles.start, 0);
        async_copy::commit();
    }
    let mut stage = 0;
    for kv_tile in kv_tiles.clone() {
        // Hazard: this thread's copies of the tile may not have landed.
        async_copy::wait::<0>();
        // Hazards: tiles (Q too, at first) are read by threads that did not copy them; and
        // the other stage, which is overwritten next, may still be read for the tile before.
        thread::sync_threads();
        if kv_tile + 1 < kv_tiles.end {
            kv.start(kv_tile + 1, stage ^ 1);
        }
        async_copy::commit();
        let (k_smem, v_smem) = kv.tiles(stage);
        attend::<Swizzled<HALVES>, HALVES, KEY_TILES, COLUMN_TILES, FRAGMENTS>(
            &mut state,
            queries(),
            (k_smem, v_smem),
            kv_tile * BC,
            part,
        );
        stage ^= 1;
    }

    // Normalise, store O and LSE. Where to is computed again: it would take registers of
    // the loop.
    let Place { tile, warp_row, part } = place::<HALVES, COLUMN_TILES, BR, FRAGMENTS>(args);
    // SAFETY: the mask has the shape that `args` says.
    let policy = unsafe { Policy::new(args, tile.head(args)) };
    unroll!(for FRAGMENT in 0..2 {
        if FRAGMENT < FRAGMENTS {
            let first_row = tile.first_row + warp_row + FRAGMENT as u32 * fragment::ROWS;
            let (acc_o, rows) = (state.acc_o[FRAGMENT], &state.rows[FRAGMENT]);
            // SAFETY: the buffers have the shapes that `args` says.
            unsafe {
                store::<HALVES, COLUMN_TILES>(args, &policy, (first_row, part), acc_o, rows);
            }
        }
    });
}

/// Where a warp's rows are, and which part of their columns of O it has. All of it is the same
/// for the whole warp.
struct Place {
    /// The block's tile.
    tile: QueryTile,
    /// The warp's first row, counted from the block's.
    warp_row: u32,
    /// 0: columns from the left; 1: up to the right end.
    part: u32,
}

/// The place of this warp.
#[inline(always)]
fn place<const HALVES: usize, const O: usize, const BR: u32, const F: usize>(
    args: &AttentionArgs,
) -> Place {
    // Asked for twice, and opaque so that nothing is kept from one time to the other.
    let block = opaque(thread::block_idx_x());
    // A row of K and one of V.
    let row_bytes = const { 2 * 2 * HALVES as u64 };
    let tile = schedule::query_tile(args, block, BR, row_bytes);
    let warp_row = warp_row::<F>();
    if const { right_part::<HALVES, O>() == 0 } {
        return Place { tile, warp_row, part: 0 };
    }
    let rows = const { F as u32 * fragment::ROWS };
    let warp = warp_row / rows;
    Place { tile, warp_row: warp / 2 * rows, part: warp % 2 }
}

/// The first column of part 1: what one warp with O tiles of 8 leaves over. 0 if nothing.
const fn right_part<const HALVES: usize, const O: usize>() -> u32 {
    let columns = HALVES as u32 / 2 - 8 * O as u32;
    assert!(columns % 32 == 0, "whole loads of V");
    columns
}

/// Takes in a tile of keys.
#[inline(always)]
fn attend<L: TileLayout, const HALVES: usize, const N: usize, const O: usize, const F: usize>(
    state: &mut WarpRows<f32, N, O, F>,
    queries: impl Queries<F>,
    (k_smem, v_smem): (Shared<Half>, Shared<Half>),
    first_key: u32,
    part: u32,
) {
    if state.sees_nothing(first_key) {
        return;
    }
    // S = Q Kᵀ. A loop: unrolled it would be most of the code, and ptxas would load so far
    // ahead that nothing is left for O.
    let mut s = [[[0.0f32; 4]; N]; F];
    for period in 0..opaque(HALVES as u32 / SWIZZLE_PERIOD) {
        let k = fragment::b_origin::<L>(0);
        unroll!(for STEP in 0..4 {
            let step = 4 * period as usize + STEP;
            let k = (k_smem, L::right(k, step as u32 * 16));
            fragment::add_scores_step::<f32, Ampere, L, N, F>(&mut s, queries.step(step), k);
        });
    }
    state.shape_and_hide(&mut s, first_key);
    state.raise(&s);
    let kept = state.kept_weights(first_key);
    let v = v_origins::<L>(part * const { 2 * right_part::<HALVES, O>() });

    // P, and O += P V, 8 keys at a time.
    unroll!(for TILE in 0..8 {
        if TILE < N {
            let mut p = [split::<Ampere>([0.0; 4]); F];
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    let weights = state.weigh(FRAGMENT, s[FRAGMENT][TILE], kept[FRAGMENT], TILE);
                    p[FRAGMENT] = split::<Ampere>(weights);
                }
            });
            let key = 8 * TILE as u32;
            add_output::<Ampere, L, O, F>(&mut state.acc_o, p, (v_smem, v), key);
        }
    });
}

/// Weights as A: the keys `2 t` and `2 t + 1` of this lane at the places `t` and `t + 4`.
#[inline(always)]
fn split<C: Multiply<f32>>(p: [f32; 4]) -> [C::Operand; 4] {
    let bits = [p[0].to_bits(), p[2].to_bits(), p[1].to_bits(), p[3].to_bits()];
    fragment::operands::<f32, C>(bits)
}

/// Where this lane's chunks of V are: columns `4 g` to `4 g + 4` of the keys `2 t` and
/// `2 t + 1` of a tile. Eight lanes read two chunks of four rows, whose numbers differ in
/// the bits that the swizzle exchanges: eight groups of banks. All that from `first` halves
/// of a row on, a multiple of 64.
#[inline(always)]
fn v_origins<L: TileLayout>(first: u32) -> [u32; 2] {
    let (g, key) = fragment::row_and_column();
    [L::index(key, g * CHUNK) + first, L::index(key + 1, g * CHUNK) + first]
}

/// `O += P V` for the 8 keys from `key` of the tile on. Of each 32 columns, product `e` of
/// four has the columns `4 g + e`.
#[inline(always)]
fn add_output<C: Multiply<f32>, L: TileLayout, const O: usize, const F: usize>(
    acc_o: &mut [[[f32; 4]; O]; F],
    p: [[C::Operand; 4]; F],
    (v_smem, v): (Shared<Half>, [u32; 2]),
    key: u32,
) {
    unroll!(for QUAD in 0..8 {
        if QUAD < O / 4 {
            let chunk = |origin| {
                let right = L::right(origin, 64 * QUAD as u32);
                matrix::load_chunk(v_smem, L::down(right, key))
            };
            let (even, odd) = (chunk(v[0]), chunk(v[1]));
            unroll!(for E in 0..4 {
                let b = [C::operand(even[E]), C::operand(odd[E])];
                unroll!(for FRAGMENT in 0..2 {
                    if FRAGMENT < F {
                        C::multiply(&mut acc_o[FRAGMENT][4 * QUAD + E], p[FRAGMENT], b);
                    }
                });
            });
        }
    });
}

/// Normalises the 16 rows from `first_row` on and stores them, with their LSE. Lane `t` of a row has columns
/// `8 t` to `8 t + 8` of each 32: column `8 t + 4 c + e` in product `e`, at `c` of its two.
/// Part 0 stores the columns that both parts have, and the LSE.
///
/// # Safety
/// `args.tensors.o` must be `[B, H, Nq, Dv]`, its address and strides multiples of 16 bytes,
/// `args.tensors.lse` `[B, H, Nq]`.
#[inline(always)]
unsafe fn store<const HALVES: usize, const O: usize>(
    args: &AttentionArgs,
    policy: &Policy,
    (first_row, part): (u32, u32),
    mut acc_o: [[f32; 4]; O],
    rows: &RowState,
) {
    let head = policy.head;
    // SAFETY: the buffers have the shapes that `args` says.
    let (o, lse) =
        unsafe { (args.tensors.o.buffer.view_mut::<f32>(), args.tensors.lse.view_mut::<f32>()) };
    let (g, column) = fragment::row_and_column();
    let (m_i, l_i) = online::normalise(&mut acc_o, rows, policy, first_row + g);
    unroll!(for R in 0..2 {
        let i = first_row + g + 8 * R as u32;
        if i < head.seq_q {
            let o_row = head.query(&args.tensors.o, i);
            let right = const { right_part::<HALVES, O>() };
            let first = part * right + column * 4;
            unroll!(for QUAD in 0..8 {
                let of_both = right > 0 && 32 * QUAD as u32 + right < 8 * O as u32;
                if QUAD < O / 4 && !(of_both && part == 1) {
                    unroll!(for C in 0..2 {
                        let value = |e: usize| acc_o[4 * QUAD + e][2 * R + C].to_bits();
                        let chunk = [value(0), value(1), value(2), value(3)];
                        let first = first + 32 * QUAD as u32 + 4 * C as u32;
                        if Columns::of_values().has(first) {
                            o.write_as::<[u32; 4]>(o_row + first as u64, chunk);
                        }
                    });
                }
            });
            if column == 0 && part == 0 {
                let value = softmax::log_sum_exp(m_i[R], l_i[R]);
                lse.write(head.row(i), value);
            }
        }
    });
}

/// Blocks that ptxas is told to leave room for; 0: it is told nothing. Shared memory has room for
/// two. Told so, ptxas spends all 255 registers on loads ahead, a quarter faster at D 128. It then
/// spills 8 bytes with masks or a cap there, and more at other head dims.
const fn blocks(d: usize) -> u32 {
    if d == 128 { 2 } else { 0 }
}

entries! {
    /// Instances of [`flash_tf32`].
    pub static ENTRIES: AttentionArgs => "sm_80", threads THREADS, min_blocks blocks(D);
    flash_tf32: T in [f32], d D in [32, 64, 96, 128, 160, 192, 224, 256] = flash_tf32::<
        { 2 * D },
        { shape(D).columns as usize / 8 },
        { shape(D).fragments as usize },
        { shape(D).rows(D) },
        { shape(D).keys },
        { shape(D).keys as usize / 8 },
    >;
}
