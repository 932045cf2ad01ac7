//! The consumers of head dims above 128: one has dV of the block's keys, the other dK.
//!
//! The accumulators of 64 keys would be 2 D registers of a thread, more than it has. So each consumer
//! has one of them, and the products that it needs. [`queries`](super::queries) has dQ.
//!
//! ```text
//! values                                  keys
//!     start Sᵀ = K Qᵀ                         start dPᵀ = V dOᵀ
//!     for each tile:                          for each tile:
//!         wait for Sᵀ; Pᵀ = exp2(Sᵀ - LSE)        wait for dPᵀ
//!         Pᵀ to shared memory  ── Weights ──>     dSᵀ = Pᵀ (dPᵀ - delta)
//!         start dV += Pᵀ dO                       start dK += dSᵀ Q
//!         start Sᵀ of the next tile               start dPᵀ of the next tile
//!         wait for dV                             wait for dK
//! dV                                      dK * scale
//! ```
//!
//! While one computes P the other's products run, and the other way round. A thread of one has the keys and
//! rows of the same thread of the other, so that P goes from registers to the same registers, 16 bytes a
//! thread at a time. It is rounded to the storage type on the way, with the slope of a cap in it.
//!
//! | D | registers per thread of dV or dK, S or dP, P or dS, LSE or delta | shared bytes |
//! |---|---|---|
//! | 192, values of 128 | 64 or 96, 32, 16, 16 of 240 | 132,184 |
//! | 192 | 96, 32, 16, 16 of 240 | 156,760 |
//! | 256 | 128, 32, 16, 16 of 240 | 205,912 |
//!
//! dQ could be a fifth product here, as up to head dim 128. But a tile adds 64 rows of it to memory for 64 keys:
//! 48 or 64 KB, which take 3,200 or 4,300 cycles when all multiprocessors add (32 KB: 2,150 measured). At D 256
//! the four products take 2,048 cycles, and `queries` 1,536 for the same scores.
//!
//! Measured (ncu, N 4096, one H200): 2,697 cycles per tile at D 256, of which the tensor cores work 76 %; 1,853 and
//! 69 % at D 192 with values of 128. Tried: K and V as operands in registers (4 % faster at D 192, 1 % with values
//! of 128, level at 256: not worth a product of its own); Sᵀ before dV, so that the exponentials run beside dV
//! (26 % more cycles); both waits at the end (level).

use simt::{
    barrier,
    compiler::opaque,
    shared::Shared,
    unroll, warpgroup,
    wgmma::{CHUNK_ROW_BYTES, Descriptor, Operand, WaitGroup},
};

use super::{
    CONSUMERS, NamedBarrier,
    consumer::{At, RowTiles, Setting},
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

/// Threads at the barriers of P.
const THREADS: u32 = CONSUMERS * warpgroup::THREADS;

/// dV or dK of a block's keys.
///
/// # Safety
/// As for [`Geometry::consume`](super::Geometry::consume).
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
    /// Minus the LSE, or delta, of the rows whose S or dP has been started.
    numbers: Rows,
    /// dV, or dK.
    sum: S,
}

impl<'a, T: Operand, G: Geometry, S: GradientTile<G::Weights>> Wide<'a, T, G, S> {
    /// Before the first tile.
    #[inline(always)]
    fn new(setting: Setting<'a, T>) -> Self {
        const { assert!(G::TILES.is_wide() && G::TILES.rows as usize == 16 * STEPS) };
        let (scores, sum) = (ScoreTile::zero(), GradientTile::zero());
        let numbers = Rows::later(setting.delta, 0);
        Self { setting, stage: Stage::FIRST, scores, numbers, sum }
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
            if let Some(mut at) = work.next() {
                // Hazard: K may not have landed.
                self.setting.rings.k.wait(0);
                self.start_scores();
                loop {
                    // Sᵀ is complete.
                    self.scores.wait_group::<0>();
                    let p = self.weigh(at);
                    self.start_dv(&p);
                    let done = self.stage;
                    let Some(next) = work.next() else { break };
                    self.stage.advance();
                    self.start_scores();
                    // dV is complete; Sᵀ of the next tile may still run.
                    self.sum.wait_group::<1>();
                    self.release(done);
                    at = next;
                }
                self.sum.wait_group::<0>();
            }
            let policy = self.policy();
            let dv = (&self.setting.args.gradients.dv, Columns::of_values(), policy.rescale());
            // Hazard: products of this warpgroup's other warps may still read K. The other consumer has none with it.
            self.meet();
            self.setting.store_keys::<G>(0, policy.head, dv, self.sum.values());
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
            if let Some(mut at) = work.next() {
                barrier::arrive(NamedBarrier::WeightsEmpty, THREADS);
                // Hazard: V may not have landed.
                self.setting.rings.v.wait(0);
                self.start_gradients();
                loop {
                    // dPᵀ is complete.
                    self.scores.wait_group::<0>();
                    let next = work.next();
                    let ds = self.differentiate(at, next.is_some());
                    self.start_dk(&ds);
                    let done = self.stage;
                    let Some(next) = next else { break };
                    self.stage.advance();
                    self.start_gradients();
                    // dK is complete; dPᵀ of the next tile may still run.
                    self.sum.wait_group::<1>();
                    self.release(done);
                    at = next;
                }
                self.sum.wait_group::<0>();
            }
            let dk = (&args.gradients.dk, Columns::of_keys(), args.forward.scores.scale);
            let head = self.policy().head;
            // Hazard: products of this warpgroup's other warps may still read Q. The other consumer's last product
            // with it was complete before the last P was there.
            self.meet();
            let q = const { G::TILES.q() };
            self.setting.store_keys::<G>(q, head, dk, self.sum.values());
        }
    }

    /// Waits for the warps of this consumer.
    #[inline(always)]
    fn meet(&self) {
        barrier::sync(NamedBarrier::Store(self.setting.own), warpgroup::THREADS);
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

    /// This stage of minus the LSE or of delta, read now.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn rows(&self, stages: Shared<f32>) -> Rows {
        let rows = const { G::TILES.rows };
        Rows::now::<8>(stages.slice(self.stage.index() * rows, rows), self.setting.column())
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
        self.numbers = self.rows(self.setting.minus_lse);
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
        self.numbers = self.rows(self.setting.delta);
    }

    /// The first row and key of this thread in a tile.
    #[inline(always)]
    fn first(&self, at: At) -> (u32, u32) {
        let i = at.tile * const { G::TILES.rows } + self.setting.column();
        let j = self.setting.place.key_tile() * const { G::TILES.keys } + self.setting.own_key;
        (i, j)
    }

    /// P of a tile from its scores, for the other consumer, and with dropout for dV.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn weigh(&mut self, at: At) -> G::Weights {
        // SAFETY: mask, slopes and bias are as `args` says.
        let policy = unsafe { Policy::new(&self.setting.args.forward, at.head) };
        let (i, j) = self.first(at);
        let slopes = self.scores.shape::<T>(&policy, i, j);
        if self.setting.is_cut::<G>(&policy, at, 0) {
            self.scores.hide(&policy, i, j);
        }
        self.scores.weigh(policy.scale_log2(), self.numbers);
        let handed = self.scores.pack_shaped::<T>(slopes);
        // Hazard: the other consumer may not have read the P before.
        barrier::sync(NamedBarrier::WeightsEmpty, THREADS);
        self.hand_over(&handed);
        barrier::arrive(NamedBarrier::WeightsFull, THREADS);
        let kept = G::Scores::kept(&policy, i, j);
        self.scores.pack::<T>(kept)
    }

    /// Starts dV += Pᵀ dO of this stage's tile.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn start_dv(&mut self, p: &G::Weights) {
        self.setting.rings.d_o.wait(self.stage);
        let d_o = Descriptor::n_major(self.d_o(), const { G::TILES.rows * CHUNK_ROW_BYTES });
        // SAFETY: passed on to the caller.
        unsafe { self.sum.start::<T>(p, d_o) };
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

    /// dS of a tile from its dP. `goes_on`: whether another tile follows.
    ///
    /// # Safety
    /// As for [`work`].
    #[inline(always)]
    unsafe fn differentiate(&mut self, at: At, goes_on: bool) -> G::Weights {
        // SAFETY: mask, slopes and bias are as `args` says.
        let policy = unsafe { Policy::new(&self.setting.args.forward, at.head) };
        let (i, j) = self.first(at);
        let kept = G::Scores::kept(&policy, i, j);
        // Hazard: the other consumer has yet to write P.
        barrier::sync(NamedBarrier::WeightsFull, THREADS);
        let from = self.weights();
        let first = self.setting.thread_id() * 4;
        let mut p = [[0; 4]; STEPS];
        unroll!(for STEP in 0..4 {
            p[STEP] = from.read_as(first + STEP as u32 * warpgroup::THREADS * 4);
        });
        if goes_on {
            barrier::arrive(NamedBarrier::WeightsEmpty, THREADS);
        }
        unroll!(for STEP in 0..4 {
            self.scores.differentiate_step::<T>(
                STEP,
                p[STEP],
                kept,
                policy.rescale(),
                self.numbers,
            );
        });
        self.scores.pack::<T>([u32::MAX; 2])
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
}
