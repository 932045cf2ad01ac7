//! The consumers of head dims above 128: one has dV of the block's keys, the other dK.
//!
//! The accumulators of 64 keys would be 2 D registers of a thread, more than it has. So each consumer
//! has one of them, and the products that it needs.
//!
//! ```text
//! values                                  keys
//!     start Sᵀ = K Qᵀ                         start dPᵀ = V dOᵀ
//!     for each tile:                          for each tile:
//!         wait for Sᵀ; Pᵀ = exp2(Sᵀ - LSE)        wait for dPᵀ
//!         Pᵀ to shared memory  ── Weights ──>     dSᵀ = Pᵀ (dPᵀ - delta)
//!         start dV += Pᵀ dO                       dSᵀ to shared memory
//!         start Sᵀ of the next tile
//!                     <── Consumers: dS is there ──>
//!                                                 start dK += dSᵀ Q, and dPᵀ of the next tile
//!         dQ = dS K, of its columns; add          dQ = dS K, of its columns; add
//! dV                                      dK * scale
//! ```
//!
//! While one computes P the other's products run, and the other way round. A thread of one has the keys and
//! rows of the same thread of the other, so that P goes from registers to the same registers, 16 bytes a
//! thread at a time. It is rounded to the storage type on the way, with the slope of a cap in it.
//!
//! | D | registers of dV or dK, S or dP, P or dS, dQ a thread | chunks of dQ | shared bytes |
//! |---|---|---|---|
//! | 192, values of 128 | 64 or 96, 32, 16, 32 of 240 | 1 and 2 | 140,376 |
//! | 192 | 96, 32, 16, 32 of 240 | 1 and 2 | 164,952 |
//! | 256 | 128, 32, 16, 32 of 240 | 2 and 2 | 214,104 |

use simt::{
    barrier,
    compiler::opaque,
    mbarrier,
    shared::Shared,
    thread, unroll, warpgroup,
    wgmma::{
        Accumulator, CHUNK_COLUMNS, CHUNK_ROW_BYTES, Descriptor, Operand, TransposedProduct,
        WaitGroup,
    },
};

use super::{
    CONSUMERS, NamedBarrier,
    consumer::{At, RowTiles, Setting, add_part, share_scores, store_rows},
    geometry::{Geometry, GradientTile},
    tile::{Rows, ScoreTile},
    tiles::STAGES,
};
use crate::parts::{
    columns::Columns,
    pipeline::{Stage, Stages},
    policy::Policy,
};

/// Steps of 16 rows in a tile.
const STEPS: usize = 4;

/// dV or dK of a block's keys, and this consumer's part of dQ.
///
/// # Safety
/// As for [`Geometry::consume`].
#[inline(always)]
pub(super) unsafe fn work<T: Operand, G: Geometry>(setting: Setting<'_, T>) {
    // SAFETY: passed on to the caller.
    unsafe {
        if setting.own == 0 {
            Wide::<T, G, G::ValueGradient>::new(setting).values();
        } else {
            Wide::<T, G, G::KeyGradient>::new(setting).keys();
        }
    }
}

/// A thread of one of the two.
struct Wide<'a, T, G: Geometry, S> {
    setting: Setting<'a, T>,
    stage: Stage<Stages<STAGES>>,
    /// S, then P; or dP, then dS.
    scores: G::Scores,
    /// dV, or dK.
    sum: S,
}

impl<'a, T: Operand, G: Geometry, S: GradientTile<G::Weights>> Wide<'a, T, G, S> {
    /// Before the first tile.
    #[inline(always)]
    fn new(setting: Setting<'a, T>) -> Self {
        const { assert!(G::TILES.is_wide() && G::TILES.rows as usize == 16 * STEPS) };
        let (scores, sum) = (ScoreTile::zero(), GradientTile::zero());
        Self { setting, stage: Stage::FIRST, scores, sum }
    }

    /// dV.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn values(&mut self) {
        let mut work = RowTiles::of_block::<G>(self.setting.args);
        // SAFETY: passed on to the caller.
        unsafe {
            if let Some(mut before) = work.next() {
                // Hazard: K may not have landed.
                self.setting.rings.k.wait(0);
                self.start_scores();
                self.scores.wait_group::<0>();
                while let Some(at) = work.next() {
                    self.weigh(before);
                    let done = self.stage;
                    self.stage.advance();
                    self.start_scores();
                    self.both();
                    self.add_dq::<0>(before);
                    self.release(done);
                    before = at;
                }
                self.weigh(before);
                self.both();
                self.add_dq::<1>(before);
            }
            let policy = self.policy();
            let dv = (&self.setting.args.gradients.dv, Columns::of_values(), policy.rescale());
            // No hazard: the other consumer has met this one after its last product with V.
            let v = const { G::TILES.v() };
            store_rows::<T, G>(&self.setting, v, policy.head, dv, self.sum.values());
        }
    }

    /// dK.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn keys(&mut self) {
        let args = self.setting.args;
        let mut work = RowTiles::of_block::<G>(args);
        // SAFETY: passed on to the caller.
        unsafe {
            if let Some(mut before) = work.next() {
                // Hazard: V may not have landed.
                self.setting.rings.v.wait(0);
                self.start_gradients();
                self.scores.wait_group::<0>();
                while let Some(at) = work.next() {
                    let ds = self.differentiate(before);
                    self.start_dk(&ds);
                    let done = self.stage;
                    self.stage.advance();
                    self.start_gradients();
                    self.add_dq::<2>(before);
                    self.release(done);
                    before = at;
                }
                let ds = self.differentiate(before);
                self.start_dk(&ds);
                self.add_dq::<3>(before);
            }
            let dk = (&args.gradients.dk, Columns::of_keys(), args.forward.scores.scale);
            let head = self.policy().head;
            // Hazard: products of this warpgroup's other warps may still read Q. The other consumer has met this
            // one after its last product with Q.
            barrier::sync(NamedBarrier::Store(1), warpgroup::THREADS);
            let q = const { G::TILES.q() };
            store_rows::<T, G>(&self.setting, q, head, dk, self.sum.values());
        }
    }

    /// The policy of the block's first head.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn policy(&self) -> Policy {
        let head = self.setting.head();
        // SAFETY: mask, slopes and bias are as `args` says.
        unsafe { Policy::new(&self.setting.args.forward, head) }
    }

    /// Waits for the other consumer: dS is there, and what both read of the tile, but for products, has
    /// been read.
    #[inline(always)]
    fn both(&self) {
        // Hazard: each consumer multiplies dS, which one has written; P is overwritten next.
        barrier::sync(NamedBarrier::Consumers, CONSUMERS * warpgroup::THREADS);
    }

    /// Gives Q and dO of a stage back, when this consumer's products with them are complete.
    #[inline(always)]
    fn release(&self, stage: Stage<Stages<STAGES>>) {
        if self.setting.elected {
            self.setting.rings.q.release(stage);
            self.setting.rings.d_o.release(stage);
        }
    }

    /// Address of this stage of Q.
    #[inline(always)]
    fn q(&self) -> u32 {
        self.setting.address(const { G::TILES.q() })
            + self.stage.index() * const { G::TILES.q_bytes() }
    }

    /// Address of this stage of dO.
    #[inline(always)]
    fn d_o(&self) -> u32 {
        self.setting.address(const { G::TILES.d_o() })
            + self.stage.index() * const { G::TILES.d_o_bytes() }
    }

    /// Starts Sᵀ = K Qᵀ of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn start_scores(&mut self) {
        self.setting.rings.q.wait(self.stage);
        let k = Descriptor::k_major(self.setting.address(0));
        let q = Descriptor::k_major(self.q());
        // SAFETY: passed on to the caller.
        unsafe { G::start_scores::<T>(&mut self.scores, k, q) };
    }

    /// Starts dPᵀ = V dOᵀ of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn start_gradients(&mut self) {
        self.setting.rings.d_o.wait(self.stage);
        let v = Descriptor::k_major(self.setting.address(const { G::TILES.v() }));
        let d_o = Descriptor::k_major(self.d_o());
        // SAFETY: passed on to the caller.
        unsafe { G::start_dp::<T>(&mut self.scores, v, d_o) };
    }

    /// The first row and key of this thread in a tile.
    #[inline(always)]
    fn first(&self, at: At) -> (u32, u32) {
        let i = at.tile * const { G::TILES.rows } + self.setting.column();
        let j = self.setting.place.key_tile() * const { G::TILES.keys } + self.setting.own_key;
        (i, j)
    }

    /// P of a tile from its scores, for the other consumer; starts dV += Pᵀ dO.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn weigh(&mut self, at: At) {
        let (rows, stage) = (const { G::TILES.rows }, self.stage);
        // SAFETY: mask, slopes and bias are as `args` says.
        let policy = unsafe { Policy::new(&self.setting.args.forward, at.head) };
        let (i, j) = self.first(at);
        let slopes = self.scores.shape::<T>(&policy, i, j);
        if self.setting.is_cut::<G>(&policy, at, 0) {
            self.scores.hide(&policy, i, j);
        }
        let minus_lse = self.setting.minus_lse.slice(stage.index() * rows, rows);
        self.scores.weigh(policy.scale_log2(), Rows::later(minus_lse, self.setting.column()));
        let handed = self.scores.pack_shaped::<T>(slopes);
        self.hand_over(&handed);
        // Hazard: the other consumer reads P; it has read the P before when both have met for dS.
        barrier::arrive(NamedBarrier::Weights, CONSUMERS * warpgroup::THREADS);
        let kept = G::Scores::kept(&policy, i, j);
        let p = self.scores.pack::<T>(kept);
        self.setting.rings.d_o.wait(stage);
        let d_o = Descriptor::n_major(self.d_o(), const { G::TILES.rows * CHUNK_ROW_BYTES });
        // SAFETY: passed on to the caller.
        unsafe { self.sum.start::<T>(&p, d_o) };
    }

    /// The buffer of P: 16 bytes of each thread for each step, in elements of 4 bytes.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn weights(&self) -> Shared<u32> {
        // SAFETY: the launch gives the shared memory; the named barriers order its use.
        unsafe {
            let words = STEPS as u32 * warpgroup::THREADS * 4;
            let all = Shared::<u32>::dynamic(const { G::TILES.weights() }, words);
            Shared::from_raw(opaque(all.address()), words)
        }
    }

    /// Writes P, in registers as a product takes it, for the same thread of the other consumer.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn hand_over(&self, p: &G::Weights) {
        let (to, p) = (self.weights(), p.as_ref());
        let first = self.setting.thread_id() * 4;
        unroll!(for STEP in 0..4 {
            to.write_as(first + STEP as u32 * warpgroup::THREADS * 4, p[STEP]);
        });
    }

    /// dS of a tile from its dP, for both.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn differentiate(&mut self, at: At) -> G::Weights {
        let (rows, stage) = (const { G::TILES.rows }, self.stage);
        // SAFETY: mask, slopes and bias are as `args` says.
        let policy = unsafe { Policy::new(&self.setting.args.forward, at.head) };
        let (i, j) = self.first(at);
        let kept = G::Scores::kept(&policy, i, j);
        // Hazard: the other consumer has yet to write P.
        barrier::sync(NamedBarrier::Weights, CONSUMERS * warpgroup::THREADS);
        let from = self.weights();
        let first = self.setting.thread_id() * 4;
        let delta = self.setting.delta.slice(stage.index() * rows, rows);
        let delta = Rows::later(delta, self.setting.column());
        unroll!(for STEP in 0..4 {
            let p = from.read_as::<[u32; 4]>(first + STEP as u32 * warpgroup::THREADS * 4);
            self.scores.differentiate_step::<T>(STEP, p, kept, policy.rescale(), delta);
        });
        let ds = self.scores.pack::<T>([u32::MAX; 2]);
        // Hazard: none that needs a wait. The products that read dS of the tile before were waited for by
        // this consumer, and by the other before it announced P.
        share_scores::<T>(
            self.setting.ds_buffers,
            const { G::TILES.keys },
            self.setting.lane_id(),
            ds.as_ref(),
        );
        // Hazard: the tensor cores read what threads have written.
        mbarrier::fence_proxy_async();
        self.both();
        ds
    }

    /// Starts dK += dSᵀ Q of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn start_dk(&mut self, ds: &G::Weights) {
        // The other consumer has found Q there before it gave P: this never waits.
        self.setting.rings.q.wait(self.stage);
        let q = Descriptor::n_major(self.q(), const { G::TILES.rows * CHUNK_ROW_BYTES });
        // SAFETY: passed on to the caller.
        unsafe { self.sum.start::<T>(ds, q) };
    }

    /// dQ = dS K of a tile, this consumer's chunks of columns, added to memory. Everything that was started
    /// before is complete then.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn add_dq<const PLACE: u32>(&mut self, at: At) {
        // Places 0 and 1 are those of the consumer of dV, which computes P and has fewer of three chunks.
        let (chunks, of_values) = const {
            let chunks = G::TILES.d / CHUNK_COLUMNS;
            (chunks, chunks / 2)
        };
        let (first, end) = if PLACE < 2 { (0, of_values) } else { (of_values, chunks) };
        unroll!(for C in 0..2 {
            let chunk = first + C as u32;
            // A branch that ptxas cannot decide: it would start the second product before it adds the
            // first, and spill. Every grid has blocks.
            if chunk < end && (C == 0 || opaque(thread::grid_dim_x()) != 0) {
                let mut dq = Accumulator::<8>::zero();
                let ds = Descriptor::n_major(self.setting.address(const { G::TILES.ds() }), 0);
                let k = self.setting.address(chunk * const { G::TILES.keys * CHUNK_ROW_BYTES });
                let k = Descriptor::n_major(k, 0);
                // SAFETY: passed on to the caller.
                unsafe {
                    TransposedProduct::<STEPS>::product_transposed::<T, PLACE>(&mut dq, ds, k);
                    dq.wait_group::<0>();
                    if C == 0 {
                        self.sum.wait_group::<0>();
                        self.scores.wait_group::<0>();
                    }
                    add_part::<G>(&self.setting, at, chunk, &dq);
                }
            }
        });
    }
}
