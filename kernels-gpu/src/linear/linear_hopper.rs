//! Linear projections `y = x wᵀ + bias`, fourth rung: Hopper's copies and products (sm_90a).
//!
//! The idea: two neighbouring blocks, a *cluster*, multiply different rows of `x` with the same
//! rows of `w`. Each fetches half of them, and the copy engine puts that half into the shared
//! memory of both: with tiles of 256 columns, what comes from the L2 cache shrinks by a third.
//!
//! Change from linear_mma: a producer and two consumer warpgroups in place of four warps
//! that do everything, wgmma in place of mma.sync, TMA in place of cp.async, tiles of
//! 128 x 256 in place of 128 x 128; blocks stay, and while one tile is stored the slices of the
//! next arrive. From flash_hopper it has the roles and the ring of stages.
//!
//! ```text
//! producer:   for each tile of the cluster, for each slice of 64 input features:
//!                 own 128 rows of x                            to this block
//!                 half of the rows of w                        to both blocks
//!
//! consumer:   for each tile:
//!                 for each slice: acc += x wᵀ                  64 x BN, in registers
//!                 y = acc + bias, through shared memory
//! ```
//!
//! ```text
//!                   BN columns of y = rows of w
//!                +--------------+--------------+
//! block 0   64   | consumer 0                  |      of w, block 0 fetches the left half and
//!           64   | consumer 1                  |      block 1 the right one, for both
//!                +--------------+--------------+
//! block 1   64   | consumer 0                  |
//!           64   | consumer 1                  |
//!                +--------------+--------------+
//! ```
//!
//! Whose stage it is: a stage is full when a block's own `x` and both halves of `w` have landed,
//! which its own barrier counts; it is empty when the consumers of *both* blocks are done with
//! theirs, since either producer writes to both. So consumers arrive at two barriers, one of them
//! in the other block.
//!
//! | BN | shared bytes | registers of acc per thread | FLOP per byte from L2 |
//! |---|---|---|---|
//! | 256 | 229,440 | 128 of 232 | 128 (85 without clusters) |
//! | 192 | 196,672 | 96 of 232 | 110 (77 without clusters) |
//! | 128 | 163,904 | 64 of 232 | 85 (64 without clusters) |
//!
//! Which BN depends on how many tiles there are for how many multiprocessors ([`TileShape::best`]).
//!
//! The gradients ([`Dx`], [`Dw`]) have other tensors as operands A and B; x and w stand for A and B
//! above. An operand whose rows run along the result's rows or columns ([`MnMajor`]) comes as chunks
//! of 64 x 64, terms below each other, and wgmma transposes it. Of such a B each block fetches half of the
//! terms of every chunk, in place of half of the columns: shares of 192 columns would not be whole
//! chunks.
//!
//! One slice at a time: a consumer waits for its product before it asks for the next. The tensor
//! cores do not wait, since the other consumer's product is behind it.
//!
//! Measured: 0.197 ms, 696 TFLOP/s, where linear_mma took 0.355 ms (16,384 rows, 2048 features in
//! and out, f16, one H100 80GB HBM3); multicast buys 2 to 3 % of that. Limits: f16 and bf16;
//! rows of `x`, `w` and `y` that are multiples of 16 bytes (TMA's rule).
//!
//! Source: PTX ISA, "Cluster of Cooperative Thread Arrays" and "cp.async.bulk.tensor"
//! (multicast); NVIDIA, "CUTLASS: Efficient GEMM in CUDA", section on Hopper warp
//! specialisation.

use half::{bf16, f16};
use simt::{
    cluster,
    layout::{Swizzled, TileLayout},
    matrix,
    mbarrier::{self, Mbarrier},
    shared::Shared,
    thread, tma, unroll, warp, warpgroup,
    wgmma::{
        Accumulator, CHUNK_COLUMNS, CHUNK_ROW_BYTES, Descriptor, Major, Operand, SliceProduct,
        WaitGroup as _,
    },
};

use super::{Dw, Dx, LinearProduct, Y};
#[cfg(doc)]
use crate::parts::gemm::MnMajor;
use crate::{
    args::{LinearArgs, Maps, WithMaps},
    entries,
    parts::{
        gemm::MatrixMut,
        pipeline::{Ring, Stage, Stages},
        schedule,
    },
};

/// Consumer warpgroups of a block.
const CONSUMERS: u32 = 2;
/// Rows of the result that a consumer computes.
const CONSUMER_ROWS: u32 = 64;
/// Rows of the result that a block computes at a time.
pub const ROWS: u32 = CONSUMERS * CONSUMER_ROWS;
/// Blocks of a cluster.
pub const CLUSTER: u32 = 2;
/// Threads of a block.
pub const THREADS: u32 = (1 + CONSUMERS) * warpgroup::THREADS;
/// Registers of a thread of each warpgroup, the producer's first.
const REGISTERS: [u32; 1 + CONSUMERS as usize] = [40, 232, 232];
const _: () = assert!(
    warpgroup::registers_suffice(&REGISTERS),
    "consumers would wait for registers that nobody gives back"
);
/// Stages of the ring.
const STAGES: u32 = 4;
/// Terms of a slice: a row of a chunk of K-major operands, and as many rows of others.
const SLICE: u32 = CHUNK_COLUMNS;
/// Bytes of a slice of A.
const A_BYTES: u32 = ROWS * CHUNK_ROW_BYTES;
/// Bytes of a chunk of a slice.
const CHUNK_BYTES: u32 = SLICE * CHUNK_ROW_BYTES;
/// Terms of an MN-major B that each block of the cluster fetches.
const TERMS_SHARE: u32 = SLICE / CLUSTER;
/// Rows of the result that a warp stores.
const OUTPUT_ROWS: u32 = 16;
/// Elements of the buffer through which a warp stores 64 columns; it has two.
const OUTPUT_CHUNK: u32 = OUTPUT_ROWS * CHUNK_COLUMNS;
/// Tiles of columns per band. Clusters work through tiles band by band, so that tiles at
/// work at the same time share what they read of both operands.
const BAND: u32 = 8;

/// The tiles of a block, by their columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// Columns of the result.
    pub columns: u32,
}

impl TileShape {
    /// Bytes of a slice of B.
    const fn b_bytes(self) -> u32 {
        self.columns * CHUNK_ROW_BYTES
    }

    /// Columns of a K-major B that each block of the cluster fetches.
    const fn share(self) -> u32 {
        self.columns / CLUSTER
    }

    /// Offset of the stages of B; the stages of A come first.
    const fn b(self) -> u32 {
        STAGES * A_BYTES
    }

    /// Offset of the buffers through which the result is stored.
    const fn outputs(self) -> u32 {
        self.b() + STAGES * self.b_bytes()
    }

    const fn barriers(self) -> u32 {
        let warps = ROWS / OUTPUT_ROWS;
        self.outputs() + warps * 2 * OUTPUT_CHUNK * size_of::<f16>() as u32
    }

    /// Dynamic shared memory of a block in bytes.
    #[must_use]
    pub const fn shared_bytes(self) -> u32 {
        self.barriers() + Ring::<Stages<STAGES>>::BARRIERS * Mbarrier::BYTES
    }

    /// Tiles of clusters: along the rows, along the columns.
    #[inline(always)]
    #[must_use]
    pub const fn grid(self, rows: u32, columns: u32) -> (u32, u32) {
        (rows.div_ceil(CLUSTER * ROWS), columns.div_ceil(self.columns))
    }

    /// The tiles that there are kernels for, and what each takes of a cluster's time, by
    /// measuring: narrow ones fetch more for what they compute.
    const COSTS: [(Self, u64); 3] =
        [(Self { columns: 256 }, 100), (Self { columns: 192 }, 78), (Self { columns: 128 }, 57)];

    /// The tile for a result of `rows` and `columns` on `multiprocessors`: with it the last cluster is
    /// done first.
    #[must_use]
    pub fn best(rows: u32, columns: u32, multiprocessors: u32) -> Self {
        let clusters = u64::from((multiprocessors / CLUSTER).max(1));
        let time = |(tile, cost): (Self, u64)| {
            let (row_tiles, column_tiles) = tile.grid(rows, columns);
            (u64::from(row_tiles) * u64::from(column_tiles)).div_ceil(clusters) * cost
        };
        let [wide, others @ ..] = Self::COSTS;
        others.into_iter().fold(wide, |best, t| if time(t) < time(best) { t } else { best }).0
    }

    /// Extents of the boxes of the tensor maps of A and B as they are stored: `[columns, rows, 1, 1]`.
    /// Swizzle: 128 bytes.
    #[must_use]
    pub const fn boxes<P: LinearProduct>(self) -> [[u32; 4]; 2] {
        [
            if P::A::IS_MN { [CHUNK_COLUMNS, SLICE, 1, 1] } else { [SLICE, ROWS, 1, 1] },
            if P::B::IS_MN {
                [CHUNK_COLUMNS, TERMS_SHARE, 1, 1]
            } else {
                [SLICE, self.share(), 1, 1]
            },
        ]
    }
}

/// The tiles of a cluster, one after another: tile `index` of the whole, and how many clusters
/// on the next one is.
#[derive(Clone, Copy)]
struct ClusterTiles {
    row_tiles: u32,
    column_tiles: u32,
    columns: u32,
    index: u32,
    clusters: u32,
}

impl ClusterTiles {
    #[inline(always)]
    fn of_this_cluster(rows: u32, columns: u32, tile: TileShape) -> Self {
        let (row_tiles, column_tiles) = tile.grid(rows, columns);
        Self {
            row_tiles,
            column_tiles,
            columns: tile.columns,
            index: thread::block_idx_x() / CLUSTER,
            clusters: thread::grid_dim_x() / CLUSTER,
        }
    }

    /// First row, of this block, and first column of the next tile.
    #[inline(always)]
    fn next(&mut self) -> Option<(u32, u32)> {
        if self.index >= self.row_tiles * self.column_tiles {
            return None;
        }
        let (band, in_band) = schedule::divide(self.index, self.row_tiles * BAND);
        // The last band may be narrower.
        let width = BAND.min(self.column_tiles - band * BAND);
        let (row_tile, column_tile) = schedule::divide(in_band, width);
        self.index += self.clusters;
        let row = (row_tile * CLUSTER + cluster::block_rank()) * ROWS;
        Some((row, (band * BAND + column_tile) * self.columns))
    }
}

/// The tensor maps of A and B, and what every linear kernel is given.
pub type LinearHopperArgs = WithMaps<LinearArgs, 2>;
type LinearMaps = Maps<2>;

/// A product of a projection by clusters of two blocks.
///
/// # Layout
/// `x: [rows, in]`, `w: [out, in]`, `bias: [out]` or empty, `y: [rows, out]`; maps of the operands A
/// and B of `P`, in this order, boxes as [`TileShape::boxes`] says. The bias is aligned to 4 bytes.
///
/// # Thread mapping
/// At most as many clusters along x as there are tiles ([`TileShape::grid`]), which they share; at
/// best one block a multiprocessor. [`THREADS`] each. Warpgroup 0 is the producer.
///
/// # Shared memory
/// Dynamic, [`TileShape::shared_bytes`]: the stages of A, the stages of B, the staging buffers of the
/// result, the mbarriers.
///
/// # Safety
/// `args` must be the parameter of the running entry, its buffers and maps must have these
/// shapes, and the launch the threads, the clusters and the shared memory stated here.
#[inline(always)]
pub unsafe fn linear_hopper<T: Operand, P: LinearProduct, const BN: u32, const GROUPS: usize>(
    args: &LinearHopperArgs,
) where
    Accumulator<GROUPS>: SliceProduct,
{
    let tile = const { TileShape { columns: BN } };
    const { assert!(GROUPS as u32 * 8 == BN) };

    // SAFETY: `args` is the parameter of the running entry, as stated above.
    let (maps, args) = unsafe { args.split() };

    // Who am I.
    let warpgroup = warpgroup::id();
    // SAFETY: the launch gives the shared memory stated above.
    let (smem, ring) = unsafe {
        let barriers = Shared::<u64>::dynamic(tile.barriers(), Ring::<Stages<STAGES>>::BARRIERS);
        (Shared::<u8>::dynamic(0, 0).address(), Ring::<Stages<STAGES>>::new(barriers, 0))
    };
    if thread::thread_idx_x() == 0 {
        // The consumers of both blocks.
        ring.init(CLUSTER * CONSUMERS);
        mbarrier::fence_init();
    }
    // Hazard: the barriers are used by threads and copies of the other block, too.
    cluster::sync();

    let [rows, columns, terms] = P::extents(args);
    let slices = terms.div_ceil(SLICE);
    let tiles = ClusterTiles::of_this_cluster(rows, columns, tile);
    if warpgroup == 0 {
        warpgroup::decrease_registers::<{ REGISTERS[0] }>();
        if thread::thread_idx_x() == 0 {
            // SAFETY: the maps have the shapes stated above.
            unsafe { produce::<P>(slices, maps, tile, tiles, smem, ring) };
        }
        return;
    }
    warpgroup::increase_registers::<{ REGISTERS[1] }>();
    let own_rows = (warpgroup - 1) * CONSUMER_ROWS;
    // A consumer's rows are a chunk, whichever way they run.
    let a = descriptor::<P::A>(smem + own_rows * CHUNK_ROW_BYTES);
    let b = descriptor::<P::B>(smem + tile.b());
    let warp_rows = own_rows + warpgroup::thread_id() / warp::LANES * OUTPUT_ROWS;
    // SAFETY: the launch gives the shared memory stated above.
    let output = unsafe {
        let first = tile.outputs() + warp_rows / OUTPUT_ROWS * 2 * OUTPUT_CHUNK * T::BYTES;
        Shared::<T>::dynamic(first, 2 * OUTPUT_CHUNK)
    };
    // SAFETY: the buffers have the shapes stated above.
    let product = unsafe { P::product::<T>(args) };

    let mut stage = Stage::FIRST;
    let mut tiles = tiles;
    while let Some((row, column)) = tiles.next() {
        // SAFETY: the bias is empty or `[out]`. It is there long before it is needed.
        let bias = unsafe { bias_of::<P, GROUPS>(args, column) };
        let mut acc = Accumulator::<GROUPS>::zero();
        for _ in 0..slices {
            ring.wait(stage);
            let index = stage.index();
            let (a, b) = (a.offset(index * A_BYTES), b.offset(index * tile.b_bytes()));
            // SAFETY: the whole warpgroup is here, and the ring keeps what is multiplied.
            unsafe { acc.accumulate_slice::<T, P::A, P::B>(a, b) };
            // The other consumer's products run while this one's end is waited for.
            acc.wait_group::<0>();
            if warpgroup::thread_id() < CLUSTER {
                ring.release_at(stage, warpgroup::thread_id());
            }
            stage.advance();
        }
        store(&product.c, output, acc.values(), &bias, row + warp_rows, column);
    }
}

/// The slice of an operand at `address`.
#[inline(always)]
fn descriptor<M: Major>(address: u32) -> Descriptor {
    if M::IS_MN { Descriptor::n_major(address, CHUNK_BYTES) } else { Descriptor::k_major(address) }
}

/// The producer of a block: one thread that starts every copy, as far ahead as the ring has
/// room.
///
/// # Safety
/// As for [`linear_hopper`].
#[inline(always)]
unsafe fn produce<P: LinearProduct>(
    slices: u32,
    maps: LinearMaps,
    tile: TileShape,
    mut tiles: ClusterTiles,
    smem: u32,
    ring: Ring<Stages<STAGES>>,
) {
    const ALL_BLOCKS: u16 = (1 << CLUSTER) - 1;
    let (map_a, map_b) = (maps.address::<0>(), maps.address::<1>());
    maps.prefetch();
    let rank = cluster::block_rank();
    let mut stage = Stage::FIRST;
    while let Some((row, column)) = tiles.next() {
        for slice in 0..slices {
            let full = ring.acquire(stage, A_BYTES + tile.b_bytes());
            let to_a = smem + stage.index() * A_BYTES;
            let to_b = smem + tile.b() + stage.index() * tile.b_bytes();
            let term = slice * SLICE;
            // SAFETY: the parameter holds the maps; the ring keeps readers away.
            unsafe {
                if P::A::IS_MN {
                    unroll!(for CHUNK in 0..2 {
                        let at = [row + CHUNK as u32 * CHUNK_COLUMNS, term, 0, 0];
                        tma::load_4d(to_a + CHUNK as u32 * CHUNK_BYTES, map_a, at, full);
                    });
                } else {
                    tma::load_4d(to_a, map_a, [term, row, 0, 0], full);
                }
                if P::B::IS_MN {
                    let own = rank * TERMS_SHARE;
                    unroll!(for CHUNK in 0..4 {
                        if (CHUNK as u32 * CHUNK_COLUMNS) < tile.columns {
                            let to = to_b + CHUNK as u32 * CHUNK_BYTES + own * CHUNK_ROW_BYTES;
                            let at = [column + CHUNK as u32 * CHUNK_COLUMNS, term + own, 0, 0];
                            tma::load_4d_multicast(to, map_b, at, full, ALL_BLOCKS);
                        }
                    });
                } else {
                    let own = rank * tile.share();
                    let to = to_b + own * CHUNK_ROW_BYTES;
                    tma::load_4d_multicast(to, map_b, [term, column + own, 0, 0], full, ALL_BLOCKS);
                }
            }
            stage.advance();
        }
    }
    // Hazard: consumers of the other block arrive at this block's barriers until they are done,
    // and the block must not end before.
    for _ in 0..STAGES {
        ring.wait_empty(stage);
        stage.advance();
    }
}

/// The bias of the columns that this thread has, pairs packed, from column `column` of the
/// tile on; 0 without a bias and for gradients.
///
/// # Safety
/// As for [`linear_hopper`].
#[inline(always)]
unsafe fn bias_of<P: LinearProduct, const GROUPS: usize>(
    args: &LinearArgs,
    column: u32,
) -> [u32; GROUPS] {
    let mut pairs = [0; GROUPS];
    if P::BIASED && !args.bias.is_empty() {
        // SAFETY: the bias is `[out]`, aligned to 4 bytes.
        let bias = unsafe { args.bias.view::<u32>() };
        // Columns past the last are not stored: any value does.
        let last = args.out_features / 2 - 1;
        let first = column / 2 + warp::lane_id() % 4;
        unroll!(for GROUP in 0..32 {
            if GROUP < GROUPS {
                pairs[GROUP] = bias.read((first + 4 * GROUP as u32).min(last).into());
            }
        });
    }
    pairs
}

/// Stores a warp's 16 rows of a tile, from row `row` and column `column` on: through shared
/// memory, so that neighbouring lanes write neighbouring bytes, 64 columns at a time.
#[inline(always)]
fn store<T: Operand, const GROUPS: usize>(
    to: &MatrixMut<T>,
    output: Shared<T>,
    values: &[[f32; 4]; GROUPS],
    bias: &[u32; GROUPS],
    row: u32,
    column: u32,
) {
    type Buffer = Swizzled<{ CHUNK_COLUMNS as usize }>;
    let lane = warp::lane_id();
    // Lane 8 m + r says where row r of matrix m goes, of four: the second is below the first, the
    // others to their right.
    let place = Buffer::index(lane % 16, lane / 16 * 8);
    // Hazard: of an odd number of chunks, the last of the tile before was read from where the
    // first of this one is written.
    warp::sync_warp(warp::FULL_MASK);
    unroll!(for CHUNK in 0..4 {
        if 8 * CHUNK < GROUPS {
            // Two buffers in turn: the overwritten one was read before the last warp barrier.
            let buffer = output.slice(CHUNK as u32 % 2 * OUTPUT_CHUNK, OUTPUT_CHUNK);
            unroll!(for PAIR in 0..4 {
                let pack = |group: usize, row: usize| {
                    let group = 8 * CHUNK + 2 * PAIR + group;
                    let (left, right) = T::unpack(bias[group]);
                    T::pack(values[group][2 * row] + left, values[group][2 * row + 1] + right)
                };
                let packed = [pack(0, 0), pack(0, 1), pack(1, 0), pack(1, 1)];
                matrix::store_x4(buffer, Buffer::right(place, 16 * PAIR as u32), packed);
            });
            // Hazard: lanes store what others have written.
            warp::sync_warp(warp::FULL_MASK);
            unroll!(for QUARTER in 0..4 {
                let (r, c) = (4 * QUARTER as u32 + lane / 8, lane % 8 * 8);
                let chunk = buffer.read_as::<[u32; 4]>(Buffer::index(r, c));
                to.write_chunk_if_inside(row + r, column + CHUNK as u32 * CHUNK_COLUMNS + c, chunk);
            });
        }
    });
}

entries! {
    /// Instances of [`linear_hopper`] for [`Y`], by the columns of a tile.
    pub static ENTRIES: LinearHopperArgs => "sm_90a", threads THREADS, min_blocks 1, cluster CLUSTER;
    linear_hopper: T in [f16, bf16], n BN in [256, 192, 128] =
        linear_hopper::<T, Y, { BN as u32 }, { BN / 8 }>;
}
entries! {
    /// Instances of [`linear_hopper`] for [`Dx`], by the columns of a tile.
    pub static DX: LinearHopperArgs => "sm_90a", threads THREADS, min_blocks 1, cluster CLUSTER;
    linear_hopper: T in [f16, bf16], n BN in [256, 192, 128], "_dx" =
        linear_hopper::<T, Dx, { BN as u32 }, { BN / 8 }>;
}
entries! {
    /// Instances of [`linear_hopper`] for [`Dw`], by the columns of a tile.
    pub static DW: LinearHopperArgs => "sm_90a", threads THREADS, min_blocks 1, cluster CLUSTER;
    linear_hopper: T in [f16, bf16], n BN in [256, 192, 128], "_dw" =
        linear_hopper::<T, Dw, { BN as u32 }, { BN / 8 }>;
}
