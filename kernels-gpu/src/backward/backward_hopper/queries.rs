//! dQ of head dims above 128: rows stay, and keys pass.
//!
//! The idea: a block keeps Q and dO of 128 rows while all tiles of K and V pass, so dQ stays in registers.
//! Scores are not transposed here: dS of 64 rows already lies in registers as the operand of dQ. S and dP are
//! computed again, which costs less than to add dQ to memory (`wide.rs`), and dQ needs no
//! order: nobody else adds to it.
//!
//! ```text
//! producer:   Q, dO; then for each tile of 64 keys:  K (two stages), V (one)     (TMA)
//!
//! consumer:   start S = Q Kᵀ of the first tile
//!             for each tile:
//!                 start dP = dO Vᵀ
//!                 wait for S and dP
//!                 dS = exp2(S - LSE) (dP - delta)                    the other consumer's products run
//!                 start dQ += dS K; start S of the next tile
//!                 wait for dQ                                        S still runs
//!             dQ * scale
//! ```
//!
//! | D | registers per thread of dQ, S, dP, dS | shared bytes |
//! |---|---|---|
//! | 192, values of 128 | 96, 32, 32, 16 of 240 | 147,520 |
//! | 192 | 96, 32, 32, 16 of 240 | 172,096 |
//! | 256 | 128, 32, 32, 16 of 240 | 229,440 |
//!
//! Measured (ncu, N 4096, one H200): 3,944 cycles per tile of 128 rows and 64 keys at D 256, of which the tensor cores
//! work 78 %; 2,798 and 73 % at D 192 with values of 128. ptxas had put the wait for dP in front of the exponentials then,
//! as it stands now. Tried: two stages of V (level), dO as an operand in registers (1 % faster). To be tried: a branch
//! that keeps the exponentials beside dP.

use core::marker::PhantomData;

use half::{bf16, f16};
use simt::{
    barrier,
    compiler::opaque,
    math,
    mbarrier::{self, Mbarrier},
    shared::Shared,
    thread, unroll, warp, warpgroup,
    wgmma::{
        Accumulator, CHUNK_COLUMNS, CHUNK_ROW_BYTES, Descriptor, Fragments, Operand, WaitGroup,
    },
};

use super::{
    CONSUMERS, Hopper, NamedBarrier, REGISTERS, Tiles,
    geometry::{Geometry, GradientTile},
    producer::copy_tile,
    rows::{Destination, store_rows},
    tile::ScoreTile as _,
    tiles::{CONSUMER_KEYS, WARP_KEYS},
};
use crate::{
    args::{BackwardArgs, Maps, WithMaps},
    entries,
    parts::{
        columns::Columns,
        gradient::Row,
        pipeline::{Depth as _, Ring, Stage, Stages},
        policy::Policy,
        ragged::MapRows,
        schedule,
    },
};

/// The tensor maps of q, k, v and d_o, and the arguments of every backward kernel.
pub type QueriesArgs = WithMaps<BackwardArgs, 4>;

/// Rows of a consumer, and of a box of Q.
const CONSUMER_ROWS: u32 = CHUNK_COLUMNS;
/// Rows of a block.
pub const ROWS: u32 = CONSUMERS * CONSUMER_ROWS;
/// Keys of a tile.
const KEYS: u32 = CONSUMER_KEYS;
/// Groups of 8 keys of a tile.
const GROUPS: usize = KEYS as usize / 8;

/// S and dP of a consumer, and dS in the storage type.
type Scores = Accumulator<GROUPS>;
type Weights = Fragments<{ GROUPS / 2 }>;
/// K is read again for dQ, when S of the next tile has been started.
type KStages = Stages<2>;
/// One: at head dim 256 there is no room for two, and below a second bought nothing.
type VStages = Stages<1>;

/// Where a block's tiles lie in shared memory: Q of each consumer, dO of each, the stages of K, V, the
/// mbarriers.
#[derive(Clone, Copy)]
struct Layout(Tiles);

impl Layout {
    /// Mbarriers: of two rings, of Q and of dO.
    const BARRIERS: u32 = Ring::<KStages>::BARRIERS + Ring::<VStages>::BARRIERS + 2;

    const fn of(tiles: Tiles) -> Self {
        assert!(tiles.rows == CONSUMER_ROWS && tiles.keys == KEYS, "the boxes of the maps");
        Self(tiles)
    }

    const fn d_o(self) -> u32 {
        CONSUMERS * self.0.q_bytes()
    }

    const fn k(self) -> u32 {
        self.d_o() + CONSUMERS * self.0.d_o_bytes()
    }

    const fn v(self) -> u32 {
        self.k() + KStages::STAGES * self.0.k_bytes()
    }

    const fn barriers(self) -> u32 {
        self.v() + self.0.v_bytes()
    }
}

/// Dynamic shared memory of a block of these tiles in bytes.
#[must_use]
pub const fn shared_bytes(tiles: Tiles) -> u32 {
    Layout::of(tiles).barriers() + Layout::BARRIERS * Mbarrier::BYTES
}

/// The rings of a block, and the mbarriers of Q and dO.
#[derive(Clone, Copy)]
struct Rings {
    k: Ring<KStages>,
    v: Ring<VStages>,
    /// Q, copied once.
    q: Mbarrier,
    /// dO, likewise.
    d_o: Mbarrier,
}

/// The rows of a block.
#[derive(Clone, Copy)]
struct Block {
    policy: Policy,
    first_row: u32,
}

impl Block {
    /// The first tile of keys that any row sees, and the end of the tiles.
    #[inline(always)]
    fn key_tiles(&self) -> core::ops::Range<u32> {
        self.policy.key_tiles(self.first_row, self.first_row + ROWS, KEYS)
    }
}

/// dQ.
///
/// # Layout
/// `q, d_o, dq: [B, H, Nq, D]`, `k, v: [B, Hkv, Nk, D]`, `minus_lse_log2, delta: [B, H, Nq']`. Maps of q, k,
/// v and d_o as [`backward_hopper`](super::backward_hopper()) has them.
///
/// # Thread mapping
/// One block of [`Tiles::THREADS`] per tile of [`ROWS`] rows of a head, along x. Warpgroup 0 is the producer.
///
/// # Shared memory
/// [`shared_bytes`] of it, dynamic: Q and dO of each consumer, the stages of K, V, the mbarriers.
///
/// # Safety
/// `args` must be the parameter of the running entry, its buffers and maps must have these shapes,
/// the launch the threads and shared memory stated here, and [`prepare`](crate::backward::prepare) must have run.
#[inline(always)]
pub unsafe fn queries<T, G>(args: &QueriesArgs)
where
    T: Operand,
    G: Geometry<Scores = Scores, Weights = Weights>,
{
    let layout = const { Layout::of(G::TILES) };
    // SAFETY: `args` is the parameter of the running entry, as stated above.
    let (maps, args) = unsafe { args.split() };

    // Who am I.
    let forward = &args.forward;
    let row_bytes = const { (G::TILES.d + G::TILES.d_v) as u64 * 2 };
    let tile = schedule::query_tile(forward, opaque(thread::block_idx_x()), ROWS, row_bytes);
    if tile.is_empty(forward) {
        return;
    }
    // SAFETY: mask, slopes and bias are as `args` says.
    let policy = unsafe { Policy::new(forward, tile.head(forward)) };
    let block = Block { policy, first_row: tile.first_row };
    let warpgroup = warpgroup::id();
    // SAFETY: the launch gives the shared memory stated above.
    let (smem, barriers) = unsafe {
        let barriers = Shared::<u64>::dynamic(layout.barriers(), Layout::BARRIERS);
        (Shared::<u8>::dynamic(0, 0).address(), barriers)
    };
    let of_rings = const { Ring::<KStages>::BARRIERS + Ring::<VStages>::BARRIERS };
    let rings = Rings {
        k: Ring::new(barriers, 0),
        v: Ring::new(barriers, Ring::<KStages>::BARRIERS),
        q: Mbarrier::at(barriers, of_rings),
        d_o: Mbarrier::at(barriers, of_rings + 1),
    };
    if thread::thread_idx_x() == 0 {
        rings.k.init(CONSUMERS);
        rings.v.init(CONSUMERS);
        rings.q.init(1);
        rings.d_o.init(1);
        mbarrier::fence_init();
    }
    // Hazard: threads and copies that did not make the barriers use them.
    thread::sync_threads();

    if warpgroup == 0 {
        warpgroup::decrease_registers::<{ REGISTERS[0] }>();
        if thread::thread_idx_x() == 0 {
            // SAFETY: the maps and the buffers have the shapes stated above.
            unsafe { produce::<G>(block, maps, smem, rings) };
        }
        return;
    }

    warpgroup::increase_registers::<{ REGISTERS[1] }>();
    let own = warpgroup - 1;
    // From a shuffle, since ptxas would read a special register again at each use.
    let thread = warp::shuffle_xor(thread::thread_idx_x(), 0) % warpgroup::THREADS;
    let warp_row = thread / warp::LANES * WARP_KEYS;
    let mut consumer = Consumer::<T, G> {
        args,
        block: Block { first_row: block.first_row + own * CONSUMER_ROWS, ..block },
        tiles: block.key_tiles(),
        own,
        warp_row,
        lane: thread % warp::LANES,
        elected: thread == 0,
        smem,
        rings,
        k_stage: Stage::FIRST,
        v_stage: Stage::FIRST,
        s: Scores::zero(),
        dp: Scores::zero(),
        dq: GradientTile::zero(),
        element: PhantomData,
    };
    // SAFETY: the whole warpgroup is here, the rings bring what is multiplied, and the buffers have
    // the shapes stated above.
    unsafe { consumer.work() };
}

/// Brings Q and dO, and then the tiles of K and V, by one thread.
///
/// # Safety
/// As for [`queries`].
#[inline(always)]
unsafe fn produce<G: Geometry>(block: Block, maps: Maps<4>, smem: u32, rings: Rings) {
    let (tiles, layout) = const { (G::TILES, Layout::of(G::TILES)) };
    maps.prefetch();
    // SAFETY: the parameter holds the maps; the ring keeps readers away.
    let copy = |of, to, map, size, row, full| unsafe { copy_tile(of, to, map, size, row, full) };
    let (rows, keys) = (MapRows::queries(&block.policy.head), MapRows::keys(&block.policy.head));
    // Of both consumers.
    let copy_rows = |to: u32, map: u64, d: u32, full: Mbarrier| {
        full.arrive_expect_tx(ROWS * d * 2);
        for consumer in 0..CONSUMERS {
            let first_row = consumer * CONSUMER_ROWS;
            let (to, row) = (to + first_row * d * 2, block.first_row + first_row);
            copy(rows, to, map, (CONSUMER_ROWS, d), row, full);
        }
    };
    let (mut k_stage, mut v_stage) = (Stage::FIRST, Stage::FIRST);
    let key_tiles = block.key_tiles();
    if key_tiles.is_empty() {
        // Nobody waits for Q.
        return;
    }
    copy_rows(smem, maps.address::<0>(), tiles.d, rings.q);
    for key_tile in key_tiles.clone() {
        let first_key = key_tile * KEYS;
        let full = rings.k.acquire(k_stage, tiles.k_bytes());
        let to = smem + layout.k() + k_stage.index() * tiles.k_bytes();
        copy(keys, to, maps.address::<1>(), (KEYS, tiles.d), first_key, full);
        k_stage.advance();

        if key_tile == key_tiles.start {
            copy_rows(smem + layout.d_o(), maps.address::<3>(), tiles.d_v, rings.d_o);
        }
        let full = rings.v.acquire(v_stage, tiles.v_bytes());
        copy(keys, smem + layout.v(), maps.address::<2>(), (KEYS, tiles.d_v), first_key, full);
        v_stage.advance();
    }
}

/// A thread of a consumer warpgroup: it has two rows, the second 8 below the first, and two of every 8 keys of
/// a tile.
struct Consumer<'a, T, G: Geometry> {
    args: &'a BackwardArgs,
    /// The rows of its warpgroup.
    block: Block,
    /// The block's tiles of keys.
    tiles: core::ops::Range<u32>,
    /// Number of its warpgroup among the consumers.
    own: u32,
    /// The first row of its warp in its warpgroup.
    warp_row: u32,
    lane: u32,
    /// Whether it is the elected thread of its warpgroup.
    elected: bool,
    /// Where shared memory begins.
    smem: u32,
    rings: Rings,
    k_stage: Stage<KStages>,
    v_stage: Stage<VStages>,
    s: Scores,
    dp: Scores,
    dq: G::KeyGradient,
    element: PhantomData<T>,
}

impl<T, G> Consumer<'_, T, G>
where
    T: Operand,
    G: Geometry<Scores = Scores, Weights = Weights>,
{
    /// dQ of this warpgroup's rows.
    ///
    /// # Safety
    /// As for [`queries`]; the whole warpgroup calls it.
    #[inline(always)]
    unsafe fn work(&mut self) {
        let i = self.block.first_row + self.warp_row + self.lane / 4;
        let mut key_tile = self.tiles.start;
        // SAFETY: all warps of the warpgroup are here, the rings bring the tiles, and the buffers
        // have their shapes, as stated above.
        unsafe {
            let rows = [i, i + 8].map(|i| Row::read(self.args, self.block.policy.head, i));
            if key_tile < self.tiles.end {
                // Hazard: Q may not have landed.
                self.rings.q.wait(0);
                self.start_scores();
                // Hazard: dO may not have landed.
                self.rings.d_o.wait(0);
                loop {
                    let ds = self.tile(key_tile, i, rows);
                    self.start_dq(&ds);
                    let done = self.k_stage;
                    key_tile += 1;
                    if key_tile >= self.tiles.end {
                        break;
                    }
                    self.k_stage.advance();
                    self.start_scores();
                    // dQ is complete, the last that reads K; S of the next tile may still run.
                    self.dq.wait_group::<1>();
                    if self.elected {
                        self.rings.k.release(done);
                    }
                }
                self.dq.wait_group::<0>();
            }
            self.store();
        }
    }

    /// An address in shared memory. Opaque: each use makes its descriptor, and no register keeps it.
    #[inline(always)]
    fn address(&self, offset: u32) -> u32 {
        opaque(self.smem) + offset
    }

    /// This stage of K.
    #[inline(always)]
    fn k(&self) -> u32 {
        let layout = const { Layout::of(G::TILES) };
        self.address(layout.k()) + self.k_stage.index() * const { G::TILES.k_bytes() }
    }

    /// Starts S = Q Kᵀ of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn start_scores(&mut self) {
        self.rings.k.wait(self.k_stage);
        let q = Descriptor::k_major(self.address(0) + self.own * const { G::TILES.q_bytes() });
        let k = Descriptor::k_major(self.k());
        // SAFETY: all four warps are here, and the stage is released only after dQ.
        unsafe { G::start_scores::<T>(&mut self.s, q, k) };
    }

    /// Starts dQ += dS K of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn start_dq(&mut self, ds: &Weights) {
        let k = Descriptor::n_major(self.k(), KEYS * CHUNK_ROW_BYTES);
        // SAFETY: all four warps are here, and the stage of K is released only after dQ.
        unsafe { self.dq.start::<T>(ds, k) };
    }

    /// dS of a tile of keys whose scores have been started.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn tile(&mut self, key_tile: u32, i: u32, rows: [Row; 2]) -> Weights {
        let (layout, policy) = (const { Layout::of(G::TILES) }, self.block.policy);
        self.rings.v.wait(self.v_stage);
        let d_o = self.address(layout.d_o()) + self.own * const { G::TILES.d_o_bytes() };
        let v = self.address(layout.v());
        // SAFETY: all four warps are here, and V is released only after dP.
        unsafe {
            G::start_dp::<T>(&mut self.dp, Descriptor::k_major(d_o), Descriptor::k_major(v));
        }
        // Both are complete; dP alone reads V.
        self.s.wait_group::<0>();
        self.dp.wait_group::<0>();
        if self.elected {
            self.rings.v.release(self.v_stage);
        }
        self.v_stage.advance();
        let j = key_tile * KEYS + self.lane % 4 * 2;
        let slopes: Weights = self.s.slopes::<T>(&policy);
        let is_cut = self.is_cut(key_tile * KEYS);
        let s = self.s.values_mut();
        policy.shape_scores::<T, GROUPS, 1>(core::array::from_mut(s), i, j);
        if is_cut {
            policy.hide(core::array::from_mut(s), i, j);
        }
        let scale_log2 = policy.scale_log2();
        unroll!(for G in 0..8 {
            unroll!(for E in 0..4 {
                let minus_lse = rows[E / 2].minus_lse_log2;
                s[G][E] = math::exp2(math::fma(s[G][E], scale_log2, minus_lse));
            });
        });
        let kept = policy.kept_weights::<GROUPS>(i, j);
        let dp = self.dp.values_mut();
        unroll!(for G in 0..8 {
            Policy::drop_weights(&mut dp[G], kept, G);
            unroll!(for E in 0..4 {
                let delta = rows[E / 2].delta;
                let dp = if Policy::drops() { dp[G][E] * policy.rescale() } else { dp[G][E] };
                s[G][E] *= dp - delta;
            });
        });
        self.s.apply_slopes::<T>(slopes);
        self.s.pack::<T>([u32::MAX; 2])
    }

    /// Whether some row of this warpgroup does not see all keys of the tile from `first_key` on.
    #[inline(always)]
    fn is_cut(&self, first_key: u32) -> bool {
        let Block { policy, first_row } = &self.block;
        policy.whole_keys(*first_row) < first_key + KEYS
            || Policy::is_left_bounded()
                && policy.whole_from(first_row + const { CONSUMER_ROWS - 1 }) > first_key
    }

    /// Stores dQ. It passes through Q of this warpgroup.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn store(&self) {
        // Hazard: products of this warpgroup's other warps may still read Q.
        barrier::sync(NamedBarrier::Store(self.own), warpgroup::THREADS);
        let Block { policy, first_row } = self.block;
        let to = &self.args.gradients.dq;
        let first_row = first_row + self.warp_row;
        let to = Destination {
            to,
            first: policy.head.query(to, first_row),
            rows: policy.head.seq_q.saturating_sub(first_row),
            columns: Columns::of_keys(),
            factor: self.args.forward.scores.scale,
        };
        let before = self.warp_row * CHUNK_ROW_BYTES;
        // SAFETY: the launch gives the shared memory, these rows are the warp's, and dQ has the shape of Q.
        unsafe {
            let bytes = const { G::TILES.q_bytes() };
            let first = self.own * bytes + before;
            let rows = Shared::<T>::dynamic(first, (bytes - before) / T::BYTES);
            store_rows::<T>(rows, CONSUMER_ROWS, self.lane, &to, self.dq.values());
        }
    }
}

entries! {
    /// Instances of [`queries()`].
    pub static ENTRIES: QueriesArgs => "sm_90a", threads Tiles::THREADS, min_blocks 1;
    backward_hopper_queries: T in [f16, bf16], d D in [192, 256] =
        queries::<T, Hopper<{ D as u32 }, { D as u32 }, false>>;
}

entries! {
    /// Instances of [`queries()`] for values of head dim 128.
    pub static VALUES_OF_128: QueriesArgs => "sm_90a", threads Tiles::THREADS, min_blocks 1;
    backward_hopper_queries: T in [f16, bf16], d D in [192], "_v128" =
        queries::<T, Hopper<{ D as u32 }, 128, false>>;
}
