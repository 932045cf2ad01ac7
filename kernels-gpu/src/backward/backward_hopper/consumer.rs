//! A consumer warpgroup and its 64 keys: the products, P and dS.

use simt::{
    barrier,
    compiler::opaque,
    mbarrier,
    shared::Shared,
    unroll, warp, warpgroup,
    wgmma::{Accumulator, CHUNK_ROW_BYTES, Descriptor, Operand, TransposedProduct, WaitGroup},
};

use super::{
    CONSUMERS, NamedBarrier, Rings,
    geometry::{Geometry, GradientTile},
    rows::{Destination, share_scores, store_rows},
    sums,
    tile::{Rows, ScoreTile},
    tiles::{CONSUMER_KEYS, DQ_ELEMENTS, STAGES},
};
use crate::{
    args::{BackwardArgs, Tensor},
    backward::order::Place,
    parts::{
        columns::Columns,
        head::Head,
        pipeline::{Stage, Stages},
        policy::Policy,
    },
};

/// A tile of rows of a head.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub head: Head,
    /// Index of the tile.
    pub tile: u32,
}

/// The tiles of rows that see a block's keys, of each head that shares them, one after another.
#[derive(Clone, Copy)]
pub(super) struct RowTiles<'a> {
    args: &'a BackwardArgs,
    place: Place,
    member: u32,
    /// The next tile of that head, the first of each, and where they end.
    tile: u32,
    first: u32,
    end: u32,
}

impl<'a> RowTiles<'a> {
    /// The tiles of this block.
    #[inline(always)]
    pub fn of_block<G: Geometry>(args: &'a BackwardArgs) -> Self {
        let place = G::place();
        let head = Head::of_group(&args.forward, place.number(), 0);
        // SAFETY: positions read no memory.
        let policy = unsafe { Policy::new(&args.forward, head) };
        let (rows, keys) = const { (G::TILES.rows, G::TILES.keys) };
        let first_key = place.key_tile() * keys;
        let mut tiles = policy.query_tiles(first_key, first_key + keys, rows);
        if head.keys_end_before(first_key) {
            tiles.end = tiles.start;
        }
        Self { args, place, member: 0, tile: tiles.start, first: tiles.start, end: tiles.end }
    }

    /// The next tile.
    #[inline(always)]
    pub fn next(&mut self) -> Option<At> {
        if self.tile >= self.end {
            self.member += 1;
            self.tile = self.first;
        }
        // Without any tile every head ends at its first.
        if self.tile >= self.end || self.member >= Head::group() {
            return None;
        }
        let head = Head::of_group(&self.args.forward, self.place.number(), self.member);
        self.tile += 1;
        Some(At { head, tile: self.tile - 1 })
    }
}

/// The place of a thread of a consumer warpgroup, and the memory that it works with.
#[derive(Clone, Copy)]
pub struct Setting<'a, T> {
    pub(super) args: &'a BackwardArgs,
    /// The keys of the block.
    pub(super) place: Place,
    /// Number of its warpgroup among the consumers.
    pub(super) own: u32,
    /// The first of this thread's two keys, counted from the block's first; the other is 8 further on.
    pub(super) own_key: u32,
    /// Its number in the block.
    pub(super) thread: u32,
    /// Whether it is the elected thread of its warpgroup.
    pub(super) elected: bool,
    /// Where shared memory begins.
    pub(super) smem: u32,
    /// The buffers of dS from its warp's first key on.
    pub(super) ds_buffers: Shared<T>,
    /// The stages of minus the LSE and of delta.
    pub(super) minus_lse: Shared<f32>,
    pub(super) delta: Shared<f32>,
    pub(super) rings: Rings,
}

impl<T: Operand> Setting<'_, T> {
    /// The address `offset` bytes into shared memory. Opaque: each use makes its descriptor, and no
    /// register keeps it.
    #[inline(always)]
    pub(super) fn address(&self, offset: u32) -> u32 {
        opaque(self.smem) + offset
    }

    /// Number of this thread in its warpgroup. Opaque, as [`address`](Self::address) is.
    #[inline(always)]
    pub(super) fn thread_id(&self) -> u32 {
        opaque(self.thread) % warpgroup::THREADS
    }

    /// Number of this thread in its warp.
    #[inline(always)]
    pub(super) fn lane_id(&self) -> u32 {
        opaque(self.thread) % warp::LANES
    }

    /// The first row of this thread in every group of eight.
    #[inline(always)]
    pub(super) fn column(&self) -> u32 {
        opaque(self.thread) % 4 * 2
    }

    /// The first of the heads that share the block's keys. Found anew: ptxas would keep the quotients of the
    /// first time in registers that the products need.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(super) fn head(&self) -> Head {
        let mut forward = self.args.forward;
        forward.shape.heads = warp::uniform(forward.shape.heads);
        Head::of_group(&forward, self.place.number(), 0)
    }

    /// Whether some row of a tile does not see all 64 keys of the block from `own_keys` on.
    #[inline(always)]
    pub(super) fn is_cut<G: Geometry>(&self, policy: &Policy, at: At, own_keys: u32) -> bool {
        let first_row = at.tile * const { G::TILES.rows };
        let first_key = self.place.key_tile() * const { G::TILES.keys } + own_keys;
        policy.whole_keys(first_row) < first_key + CONSUMER_KEYS
            || Policy::is_left_bounded()
                && policy.whole_from(first_row + const { G::TILES.rows - 1 }) > first_key
    }

    /// Stores a warp's 16 keys of dK or dV, times `factor`. They pass through shared memory, laid out as K is, from
    /// byte `through` on.
    ///
    /// # Safety
    /// `to` must be `[B, Hkv, Nk, D]`. Nobody may read or write the rows of the warp's keys in that shared memory any
    /// more.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(super) unsafe fn store_keys<G: Geometry>(
        &self,
        through: u32,
        head: Head,
        (to, columns, factor): (&Tensor, Columns, f32),
        values: &[[f32; 4]],
    ) {
        let keys = const { G::TILES.keys };
        let lane = self.lane_id();
        // The warp's first key in the block.
        let first = self.own_key - lane / 4;
        let first_key = self.place.key_tile() * keys + first;
        let to = Destination {
            to,
            first: head.key(to, first_key),
            rows: head.seq_k.saturating_sub(first_key),
            columns,
            factor,
        };
        // SAFETY: the launch gives the shared memory, and these rows are the warp's.
        unsafe {
            let bytes = keys * 16 * values.len() as u32 - first * CHUNK_ROW_BYTES;
            let rows = Shared::<T>::dynamic(through + first * CHUNK_ROW_BYTES, bytes / T::BYTES);
            store_rows::<T>(rows, keys, lane, &to, values);
        }
    }
}

/// dK and dV of a block's keys, and its part of dQ, where each consumer has keys of its own.
///
/// # Safety
/// As for [`Geometry::consume`].
#[inline(always)]
pub(super) unsafe fn work<T: Operand, G: Geometry>(setting: Setting<'_, T>) {
    // SAFETY: passed on to the caller.
    unsafe { Consumer::<T, G>::new(setting).work() };
}

/// A thread of a consumer warpgroup that has keys of its own.
struct Consumer<'a, T, G: Geometry> {
    setting: Setting<'a, T>,
    stage: Stage<Stages<STAGES>>,
    s: G::Scores,
    dp: G::Scores,
    dk: G::KeyGradient,
    dv: G::ValueGradient,
    /// Minus the LSE of the rows whose scores have been started.
    minus_lse: Rows,
}

impl<'a, T: Operand, G: Geometry> Consumer<'a, T, G> {
    /// Before the first tile.
    #[inline(always)]
    pub fn new(setting: Setting<'a, T>) -> Self {
        Self {
            setting,
            stage: Stage::FIRST,
            s: ScoreTile::zero(),
            dp: ScoreTile::zero(),
            dk: GradientTile::zero(),
            dv: GradientTile::zero(),
            minus_lse: Rows::later(setting.minus_lse, 0),
        }
    }

    /// dK and dV of a block, and its part of dQ.
    ///
    /// # Safety
    /// As for [`Geometry::consume`].
    #[inline(always)]
    pub unsafe fn work(&mut self) {
        let mut work = RowTiles::of_block::<G>(self.setting.args);
        // SAFETY: all warps of the warpgroup are here, the rings bring the tiles, and the buffers
        // have their shapes, as stated above.
        unsafe {
            if let Some(mut at) = work.next() {
                // Hazard: K may not have landed.
                self.setting.rings.k.wait(0);
                self.start_scores();
                // Hazard: V may not have landed.
                self.setting.rings.v.wait(0);
                loop {
                    let (p, ds) = self.tile(at);
                    if const { !G::TILES.starts_dv_early() } {
                        self.start_dv(&p);
                    }
                    let mut dq = self.start_dq();
                    // dV is complete, the last that reads dO; dQ may still run.
                    self.dv.wait_group::<1>();
                    if self.setting.elected {
                        self.setting.rings.d_o.release(self.stage);
                    }
                    self.start_dk(&ds);
                    // dQ is complete; dK may still run.
                    dq.wait_group::<1>();
                    self.hand_over(&dq);
                    let done = self.stage;
                    let Some(next) = work.next() else { break };
                    self.stage.advance();
                    self.start_scores();
                    // dK is complete, the last that reads Q; Sᵀ of the next tile may still run.
                    self.dk.wait_group::<1>();
                    if self.setting.elected {
                        self.setting.rings.q.release(done);
                    }
                    at = next;
                }
                self.dk.wait_group::<0>();
            }
            self.store();
        }
    }

    /// This warpgroup's rows of K, or of V if that is `offset` bytes into shared memory.
    #[inline(always)]
    fn own_rows(&self, offset: u32) -> Descriptor {
        Descriptor::k_major(
            self.setting.address(offset) + self.setting.own * (CONSUMER_KEYS * CHUNK_ROW_BYTES),
        )
    }

    /// This stage of Q, or of dO if that is `offset` bytes into shared memory, to be summed over its rows.
    #[inline(always)]
    fn rows(&self, offset: u32) -> Descriptor {
        let chunk = const { G::TILES.rows * CHUNK_ROW_BYTES };
        Descriptor::n_major(self.setting.address(offset) + self.q_offset(), chunk)
    }

    /// The same, to be summed over its columns.
    #[inline(always)]
    fn columns(&self, offset: u32) -> Descriptor {
        Descriptor::k_major(self.setting.address(offset) + self.q_offset())
    }

    /// Starts Sᵀ = K Qᵀ of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn start_scores(&mut self) {
        self.setting.rings.q.wait(self.stage);
        let (k, q) = (self.own_rows(0), self.columns(const { G::TILES.q() }));
        // SAFETY: all four warps are here, and the stage is released only after the scores.
        unsafe { G::start_scores::<T>(&mut self.s, k, q) };
        // They came with Q, and are there when the scores are.
        self.minus_lse = self.rows_now::<8>(self.setting.minus_lse);
    }

    /// The values of this stage's rows: reads the first `GROUPS` groups of 8 rows now, and leaves the others until
    /// they are used.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn rows_now<const GROUPS: usize>(&self, stages: Shared<f32>) -> Rows {
        let rows = const { G::TILES.rows };
        Rows::now::<GROUPS>(stages.slice(self.stage.index() * rows, rows), self.setting.column())
    }

    /// Starts dQ = dS K of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn start_dq(&mut self) -> Accumulator<8> {
        let mut dq = Accumulator::zero();
        let buffer = self.stage.index() * const { G::TILES.ds_bytes() };
        let ds = self.setting.address(const { G::TILES.ds() }) + buffer;
        let ds = Descriptor::n_major(ds + self.setting.own * const { G::TILES.dq_row_chunk() }, 0);
        let k = self.setting.address(0) + self.setting.own * const { G::TILES.dq_column_chunk() };
        let k = Descriptor::n_major(k, 0);
        // SAFETY: all four warps are here, and dS and K stay until dQ is waited for.
        unsafe { TransposedProduct::<8>::product_transposed::<T>(&mut dq, ds, k) };
        dq
    }

    /// Hands this warpgroup's part of dQ over to the warp that adds it to memory.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn hand_over(&self, dq: &Accumulator<8>) {
        // Opaque: each use finds what follows from it, and no register keeps that.
        let own = opaque(self.setting.own);
        // Hazard: the part before may not have been read.
        barrier::sync(NamedBarrier::DqEmpty(own), sums::THREADS);
        // SAFETY: the launch gives the shared memory.
        let to = unsafe {
            let parts = CONSUMERS * DQ_ELEMENTS;
            let all = Shared::<f32>::dynamic(const { G::TILES.dq() }, parts);
            Shared::<f32>::from_raw(opaque(all.address()), parts)
        };
        let first = own * DQ_ELEMENTS + self.setting.thread_id() * 4;
        let values = dq.values();
        unroll!(for G in 0..8 {
            let index = first + G as u32 * warpgroup::THREADS * 4;
            to.write_as(index, values[G].map(f32::to_bits));
        });
        // Hazard: the copy engine reads what threads have written.
        mbarrier::fence_proxy_async();
        barrier::arrive(NamedBarrier::DqFull(own), sums::THREADS);
    }

    /// Starts dV += Pᵀ dO of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn start_dv(&mut self, p: &G::Weights) {
        let d_o = self.rows(const { G::TILES.d_o() });
        // SAFETY: all four warps are here, and the stage of dO is released only after dV.
        unsafe { self.dv.start::<T>(p, d_o) };
    }

    /// Starts dK += dSᵀ Q of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn start_dk(&mut self, ds: &G::Weights) {
        let q = self.rows(const { G::TILES.q() });
        // SAFETY: all four warps are here, and the stage of Q is released only after dK.
        unsafe { self.dk.start::<T>(ds, q) };
    }

    /// Bytes from the first stage of Q, and of dO, which has as many columns here, to this one.
    #[inline(always)]
    fn q_offset(&self) -> u32 {
        self.stage.index() * const { G::TILES.q_bytes() }
    }

    /// P and dS of a tile of rows whose scores have been started.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn tile(&mut self, at: At) -> (G::Weights, G::Weights) {
        let (rows, stage) = (const { G::TILES.rows }, self.stage);
        // SAFETY: mask, slopes and bias are as `args` says.
        let policy = unsafe { Policy::new(&self.setting.args.forward, at.head) };
        let i = at.tile * rows + self.setting.column();
        let j = self.setting.place.key_tile() * const { G::TILES.keys } + self.setting.own_key;

        self.setting.rings.d_o.wait(stage);
        let (v, d_o) =
            (self.own_rows(const { G::TILES.v() }), self.columns(const { G::TILES.d_o() }));
        // SAFETY: all four warps are here, and the stage of dO is released only after dV.
        unsafe { G::start_dp::<T>(&mut self.dp, v, d_o) };
        // Sᵀ is complete; dPᵀ may still run.
        self.s.wait_group::<1>();
        let slopes = self.s.shape::<T>(&policy, i, j);
        if self.setting.is_cut::<G>(&policy, at, self.setting.own * CONSUMER_KEYS) {
            self.s.hide(&policy, i, j);
        }
        self.s.weigh(policy.scale_log2(), self.minus_lse);
        let kept = G::Scores::kept(&policy, i, j);
        let (p, delta);
        if const { G::TILES.starts_dv_early() } {
            p = self.s.pack::<T>(kept);
            // SAFETY: passed on to the caller.
            unsafe { self.start_dv(&p) };
            delta = self.rows_now::<4>(self.setting.delta);
            // dPᵀ is complete; dV may still run.
            self.dp.wait_group::<1>();
        } else {
            delta = self.rows_now::<4>(self.setting.delta);
            // dPᵀ is complete.
            self.dp.wait_group::<0>();
            p = self.s.pack::<T>(kept);
        }
        self.s.differentiate::<T>(&self.dp, kept, policy.rescale(), delta, slopes);
        let ds = self.s.pack::<T>([u32::MAX; 2]);
        self.share(&ds);
        (p, ds)
    }

    /// Gives dSᵀ of this warpgroup to both, for dQ.
    #[inline(always)]
    fn share(&self, ds: &G::Weights) {
        let buffer = self.stage.index() * const { G::TILES.ds_bytes() } / T::BYTES;
        // No hazard here. Each consumer has waited for its products that read this buffer two tiles
        // ago before it came to the barrier of the tile before.
        let buffers = self.setting.ds_buffers;
        let buffer = buffers.slice(buffer, buffers.len() - buffer);
        share_scores::<T>(buffer, const { G::TILES.keys }, self.setting.lane_id(), ds.as_ref());
        // Hazard: the tensor cores read what threads have written.
        mbarrier::fence_proxy_async();
        // Hazard: each consumer multiplies the dS that both have written.
        barrier::sync(NamedBarrier::Consumers, CONSUMERS * warpgroup::THREADS);
    }

    /// Stores dK and dV.
    ///
    /// # Safety
    /// As for [`work`](Self::work).
    #[inline(always)]
    unsafe fn store(&self) {
        let (forward, gradients) = (&self.setting.args.forward, &self.setting.args.gradients);
        // Hazard: products of this warpgroup's other warps may still read its rows of V.
        barrier::sync(NamedBarrier::Store(self.setting.own), warpgroup::THREADS);
        let head = self.setting.head();
        // SAFETY: mask, slopes and bias are as `args` says.
        let rescale = unsafe { Policy::new(forward, head) }.rescale();
        // SAFETY: dK and dV have the shapes of K and V, and each key is one thread's.
        unsafe {
            let (dk, dv) = (
                (&gradients.dk, Columns::of_keys(), forward.scores.scale),
                (&gradients.dv, Columns::of_values(), rescale),
            );
            let v = const { G::TILES.v() };
            self.setting.store_keys::<G>(v, head, dv, self.dv.values());
            self.setting.store_keys::<G>(v, head, dk, self.dk.values());
        }
    }
}

/// Where a part of dQ of a tile begins.
#[inline(always)]
pub(super) const fn part_of<G: Geometry>(head: &Head, tile: u32, part: u32) -> u64 {
    let parts = (tile * G::TILES.dq_parts() + part) as u64;
    head.padded_row(0) * G::TILES.d as u64 + parts * DQ_ELEMENTS as u64
}
