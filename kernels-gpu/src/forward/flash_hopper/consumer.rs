//! What a consumer warpgroup does with its 64 rows: products, mask, softmax.

use simt::{
    math,
    shared::Shared,
    tma, unroll, warp,
    wgmma::{
        Accumulator, CHUNK_ROW_BYTES, Descriptor, Fragments, Operand, RegisterProduct,
        SharedProduct, WaitGroup,
    },
};

use super::{CONSUMER_ROWS, HopperMaps, Inbox, Task, turn::Own};
use crate::{
    args::AttentionArgs,
    parts::{
        pipeline::{Ring, Stage},
        policy::Policy,
        softmax::{self, SLACK},
    },
};

/// Rows of S that a thread has.
pub(super) const ROWS: usize = 2;
/// Bytes of a chunk of Q: 64 columns of a consumer's rows.
const Q_CHUNK: u32 = CONSUMER_ROWS * CHUNK_ROW_BYTES;

/// A thread of a consumer warpgroup.
pub(super) struct Consumer<
    'a,
    T: Operand,
    const Q_STAGES: u32,
    const STAGES: u32,
    const S_GROUPS: usize,
    const O_GROUPS: usize,
    const KEY_STEPS: usize,
    const K_CHUNK: u32,
    const TURNS: bool,
> {
    pub args: &'a AttentionArgs,
    pub maps: HopperMaps,
    /// The first of this thread's two rows, counted from the task's first; the other is 8
    /// further on.
    pub own_row: u32,
    /// The first row of its warpgroup, counted likewise.
    pub own_rows: u32,
    /// Its first column of every group of eight.
    pub column: u32,
    /// Whether it speaks for its warpgroup.
    pub elected: bool,
    /// From where its warp's O is stored.
    pub output: Shared<T>,
    pub q: Descriptor,
    pub k: Descriptor,
    pub v: Descriptor,
    /// Bytes of a stage of Q, and of one of K or V.
    pub q_bytes: u32,
    pub tile_bytes: u32,
    pub inbox: Inbox<Q_STAGES>,
    pub k_ring: Ring<STAGES>,
    pub v_ring: Ring<STAGES>,
    pub q_stage: Stage<Q_STAGES>,
    pub k_stage: Stage<STAGES>,
    pub v_stage: Stage<STAGES>,
    /// What is subtracted from the scaled scores: the running maximum, or up to
    /// [`SLACK`] less.
    pub m_i: [f32; ROWS],
    /// Running sum of this thread's columns.
    pub l_i: [f32; ROWS],
    pub s: Accumulator<S_GROUPS>,
    pub p: Fragments<KEY_STEPS>,
    pub acc_o: Accumulator<O_GROUPS>,
    pub element: core::marker::PhantomData<T>,
}

impl<
    T: Operand,
    const Q_STAGES: u32,
    const STAGES: u32,
    const S_GROUPS: usize,
    const O_GROUPS: usize,
    const KEY_STEPS: usize,
    const K_CHUNK: u32,
    const TURNS: bool,
> Consumer<'_, T, Q_STAGES, STAGES, S_GROUPS, O_GROUPS, KEY_STEPS, K_CHUNK, TURNS>
where
    Accumulator<S_GROUPS>: WaitGroup,
    Accumulator<O_GROUPS>: RegisterProduct<KEY_STEPS>,
{
    /// Keys of a tile.
    const TILE_KEYS: u32 = S_GROUPS as u32 * 8;

    /// Works through the tasks, until there is no further one.
    ///
    /// # Safety
    /// The whole warpgroup calls it, the rings bring what is multiplied, and the buffers
    /// must have the shapes that [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    pub unsafe fn work<const D_STEPS: usize>(&mut self)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        if TURNS && self.own_rows > 0 {
            // The other one begins.
            Own::of(self.own_rows).pass();
        }
        let mut next = self.inbox.receive(self.q_stage);
        // SAFETY: passed on to the caller.
        unsafe {
            while let Some(mut task) = next {
                let own_tiles = self.own_tiles(task);
                if own_tiles == 0 {
                    self.store_nothing(task);
                    // First, so that the next task's Q may come while the tiles pass.
                    self.release_q();
                    self.q_stage.advance();
                    self.pass_tiles(task.num_kv_tiles);
                    next = self.inbox.receive(self.q_stage);
                    continue;
                }
                if !TURNS {
                    self.pass_tiles(task.num_kv_tiles - own_tiles);
                    task.num_kv_tiles = own_tiles;
                }
                self.first_tile::<D_STEPS>(task);
                loop {
                    self.further_tiles::<D_STEPS>(task);
                    // Where two consumers take turns, registers suffice to go from task to
                    // task without a gap: this one's last product then comes with the next
                    // one's first.
                    if TURNS && Q_STAGES > 1 {
                        next = self.inbox.receive(self.q_stage);
                        if let Some(following) = next
                            && self.own_tiles(following) > 0
                        {
                            self.change_task::<D_STEPS>(task, following);
                            task = following;
                            continue;
                        }
                    }
                    self.start_output();
                    let factors = self.store_lse(task, self.m_i, self.l_i);
                    self.acc_o.wait_group::<0>();
                    self.release_v();
                    if TURNS && Q_STAGES == 1 {
                        // The next task's Q comes only now.
                        next = self.inbox.receive(self.q_stage);
                        if let Some(following) = next
                            && self.own_tiles(following) > 0
                        {
                            self.store_and_begin::<D_STEPS>(task, factors, following);
                            task = following;
                            continue;
                        }
                    }
                    self.store_output(task, factors);
                    break;
                }
                if !TURNS {
                    next = self.inbox.receive(self.q_stage);
                }
            }
        }
        // Hazard: O is stored from shared memory that the block gives up.
        tma::wait_group_read::<0>();
        if TURNS && self.own_rows == 0 {
            // The turn that nobody takes any more.
            Own::of(self.own_rows).await_other();
        }
    }

    /// Tiles of a task, from the first key on, that this consumer's rows see any key of.
    #[inline(always)]
    fn own_tiles(&self, task: Task) -> u32 {
        let first_row = task.first_row() + self.own_rows;
        let policy = self.policy(task);
        if first_row >= policy.head.seq_q {
            0
        } else if TURNS {
            // Both go through the same tiles in turn.
            task.num_kv_tiles
        } else {
            policy.end_of_tile(first_row + CONSUMER_ROWS).div_ceil(Self::TILE_KEYS)
        }
    }

    /// Lets tiles pass that this consumer's rows see nothing of.
    #[inline(always)]
    fn pass_tiles(&mut self, count: u32) {
        for _ in 0..count {
            // A stage is given back once for each time that it was filled: not before.
            self.k_ring.wait(self.k_stage);
            self.v_ring.wait(self.v_stage);
            // Hazard: a warp that came here only after the next copies have landed in these
            // stages too would find the parity of the phase before, and wait for ever.
            // Elsewhere products gather the warps between the wait and the release.
            if TURNS {
                self.in_turn(|_| {});
            } else {
                Own::of(self.own_rows).gather();
            }
            self.release_k();
            self.release_v();
        }
    }

    /// Keys that each of this warpgroup's rows sees.
    #[inline(always)]
    fn whole_keys(&self, task: Task) -> u32 {
        self.policy(task).whole_keys(task.first_row() + self.own_rows)
    }

    /// S = Q Kᵀ and P of the first tile visited, which is the last one in the order of keys,
    /// when nothing of another task is unfinished.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn first_tile<const D_STEPS: usize>(&mut self, task: Task)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        self.acc_o = Accumulator::zero();
        // SAFETY: passed on to the caller.
        self.in_turn(|this| unsafe { this.start_scores::<D_STEPS>() });
        self.first_softmax(task);
    }

    /// The outputs of a task, whose last product has been started, over the first scores of the
    /// next.
    ///
    /// # Safety
    /// As for [`change_task`](Self::change_task).
    #[inline(always)]
    unsafe fn store_and_begin<const D_STEPS: usize>(
        &mut self,
        before: Task,
        factors: [f32; ROWS],
        task: Task,
    ) where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        // SAFETY: passed on to the caller.
        unsafe {
            self.in_turn(|this| this.start_scores::<D_STEPS>());
            self.store_output(before, factors);
        }
        self.acc_o = Accumulator::zero();
        self.first_softmax(task);
    }

    /// P of the first tile, when nothing but its scores runs.
    #[inline(always)]
    fn first_softmax(&mut self, task: Task) {
        self.s.wait_group::<0>();
        self.scores_done(task.num_kv_tiles - 1);
        self.first_weights(task);
        self.pack(task, task.num_kv_tiles - 1);
    }

    /// The first tile of the next task over the last product of the one before, whose
    /// outputs are then stored.
    ///
    /// # Safety
    /// The whole warpgroup calls it, and the buffers must have the shapes that
    /// [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    unsafe fn change_task<const D_STEPS: usize>(&mut self, before: Task, task: Task)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        // SAFETY: passed on to the caller.
        unsafe {
            self.start_products::<D_STEPS>();
            let (m_i, l_i) = (self.m_i, self.l_i);
            self.s.wait_group::<1>();
            self.scores_done(task.num_kv_tiles - 1);
            // A branch again, so that the exponentials come before the wait.
            if self.first_weights(task) {
                self.acc_o.wait_group_in::<0, 1>();
            } else {
                self.acc_o.wait_group_in::<0, 2>();
            }
            let factors = self.store_lse(before, m_i, l_i);
            self.release_v();
            self.pack(task, task.num_kv_tiles - 1);
            self.store_output(before, factors);
        }
        self.acc_o = Accumulator::zero();
    }

    /// Every tile of a task but the first; then Q is given back.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the first tile.
    #[inline(always)]
    unsafe fn further_tiles<const D_STEPS: usize>(&mut self, task: Task)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        let mut tile = task.num_kv_tiles - 1;
        // Tiles below this one are seen whole by every row of this consumer.
        let whole_tiles = self.whole_keys(task) / Self::TILE_KEYS;
        if Policy::is_padded() || Policy::is_causal() {
            while tile > whole_tiles {
                tile -= 1;
                // SAFETY: passed on to the caller.
                unsafe { self.next_tile::<D_STEPS, true>(task, tile) };
            }
        }
        while tile > 0 {
            tile -= 1;
            // SAFETY: passed on to the caller.
            unsafe { self.next_tile::<D_STEPS, false>(task, tile) };
        }
        if Q_STAGES > 1 {
            self.release_q();
        }
        self.q_stage.advance();
    }

    /// P of the first tile of a task from its scores. Whether any row of the warp sees a key.
    #[inline(always)]
    fn first_weights(&mut self, task: Task) -> bool {
        let tile = task.num_kv_tiles - 1;
        // The first tile visited may hang over the last key, or lie on the diagonal.
        if (tile + 1) * Self::TILE_KEYS > self.whole_keys(task) {
            self.mask(task, tile);
        }
        // Nothing came before: no O to rescale.
        let maxima = self.maxima();
        self.m_i = maxima.map(|m| math::max(f32::NEG_INFINITY, m));
        self.l_i = self.weights(self.m_i.map(softmax::safe_max));
        warp::any(maxima.iter().any(|&m| m != f32::NEG_INFINITY))
    }

    /// S = Q Kᵀ of `tile` over the softmax and P V of the tile before.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the first tile.
    #[inline(always)]
    unsafe fn next_tile<const D_STEPS: usize, const CUT: bool>(&mut self, task: Task, tile: u32)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.start_products::<D_STEPS>() };
        // S is complete; O += P V may still run.
        self.s.wait_group::<1>();
        self.scores_done(tile);
        if CUT {
            self.mask(task, tile);
        }
        let (growth, sums) = self.softmax(CUT);
        // The exponentials first: see `WaitGroup::wait_group_in`.
        if let Some([factor_0, factor_1]) = growth {
            self.acc_o.wait_group_in::<0, 1>();
            self.l_i = [
                math::fma(self.l_i[0], factor_0, sums[0]),
                math::fma(self.l_i[1], factor_1, sums[1]),
            ];
            let acc_o = self.acc_o.values_mut();
            unroll!(for G in 0..32 {
                if G < O_GROUPS {
                    acc_o[G][0] *= factor_0;
                    acc_o[G][1] *= factor_0;
                    acc_o[G][2] *= factor_1;
                    acc_o[G][3] *= factor_1;
                }
            });
        } else {
            self.acc_o.wait_group_in::<0, 2>();
            self.l_i = [self.l_i[0] + sums[0], self.l_i[1] + sums[1]];
        }
        self.release_v();
        self.pack(task, tile);
    }

    /// Gives Q back with its task, once all scores are complete: by one thread of each warp,
    /// since every warp has read the task.
    #[inline(always)]
    fn release_q(&mut self) {
        // Hazard: the producer writes the next task where all lanes must have read this one.
        warp::sync_warp(warp::FULL_MASK);
        if warp::lane_id() == 0 {
            self.inbox.ring.release(self.q_stage);
        }
    }

    /// Gives back what a tile's scores were computed from: K, and after the last tile Q.
    #[inline(always)]
    fn scores_done(&mut self, tile: u32) {
        self.release_k();
        if Q_STAGES == 1 && tile == 0 {
            self.release_q();
        }
    }

    /// Starts S = Q Kᵀ [64, BC] with the next tile of the ring.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn start_scores<const D_STEPS: usize>(&mut self)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        self.k_ring.wait(self.k_stage);
        let q = self.q.offset(self.q_stage.index() * self.q_bytes);
        let k = self.k.offset(self.k_stage.index() * self.tile_bytes);
        // SAFETY: Q and K have landed, and K is released only when S was waited for.
        unsafe { self.s.product_shared::<T, Q_CHUNK, K_CHUNK>(q, k) };
    }

    /// Starts O += P V [64, D] with the next tile of the ring.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn start_output(&mut self) {
        self.v_ring.wait(self.v_stage);
        let v = self.v.offset(self.v_stage.index() * self.tile_bytes);
        // SAFETY: V has landed, and is released only when O was waited for.
        unsafe { self.acc_o.product_registers::<T>(&self.p, v) };
    }

    /// Starts S = Q Kᵀ of the next tile and O += P V of the one before.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn start_products<const D_STEPS: usize>(&mut self)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        // SAFETY: passed on to the caller.
        self.in_turn(|this| unsafe {
            this.start_scores::<D_STEPS>();
            this.start_output();
        });
    }

    /// Starts products when it is this consumer's turn.
    #[inline(always)]
    fn in_turn(&mut self, start: impl FnOnce(&mut Self)) {
        // Products of both consumers that start together end together, and then nothing runs
        // beside the softmax. In turn, each one's runs beside the other's products. The barrier
        // also gathers this consumer's warps, which `pass_tiles` relies on.
        if TURNS {
            Own::of(self.own_rows).await_other();
        }
        start(self);
        if TURNS {
            Own::of(self.own_rows).pass();
        }
    }

    #[inline(always)]
    fn release_k(&mut self) {
        if self.elected {
            self.k_ring.release(self.k_stage);
        }
        self.k_stage.advance();
    }

    #[inline(always)]
    fn release_v(&mut self) {
        if self.elected {
            self.v_ring.release(self.v_stage);
        }
        self.v_stage.advance();
    }

    /// The policy for a task's head.
    #[inline(always)]
    pub(super) fn policy(&self, task: Task) -> Policy {
        // SAFETY: the mask has the shape that `args` says.
        unsafe { Policy::new(self.args, task.tile.head(self.args)) }
    }

    /// Row and key of this thread's first score of a tile.
    #[inline(always)]
    fn first_score(&self, task: Task, tile: u32) -> (u32, u32) {
        (task.first_row() + self.own_row, tile * Self::TILE_KEYS + self.column)
    }

    /// Hides what this thread's rows do not see: scores become -inf.
    #[inline(always)]
    fn mask(&mut self, task: Task, tile: u32) {
        let (i, j) = self.first_score(task, tile);
        let policy = self.policy(task);
        policy.hide(core::array::from_mut(self.s.values_mut()), i, j);
    }

    /// Online softmax of a tile that is not the first: P replaces S. Returns what O and l must
    /// be multiplied by, if anything, and the sums of this thread's weights.
    #[inline(always)]
    fn softmax(&mut self, masked: bool) -> (Option<[f32; ROWS]>, [f32; ROWS]) {
        let (before, maxima) = (self.m_i, self.maxima());
        let grown = warp::any(maxima[0] > before[0] + SLACK || maxima[1] > before[1] + SLACK);
        let mut used = before;
        unroll!(for R in 0..2 {
            self.m_i[R] = if grown { math::max(before[R], maxima[R]) } else { before[R] };
            used[R] = if masked { softmax::safe_max(self.m_i[R]) } else { self.m_i[R] };
        });
        let sums = self.weights(used);
        let growth = if grown {
            Some([math::exp2(before[0] - used[0]), math::exp2(before[1] - used[1])])
        } else {
            None
        };
        (growth, sums)
    }

    /// The maxima of this thread's rows in a tile, in log2 units.
    #[inline(always)]
    fn maxima(&self) -> [f32; ROWS] {
        let s = self.s.values();
        // Four chains, here and in the sums, so that they do not wait for each other.
        let mut max = s[0];
        unroll!(for G in 0..16 {
            if G + 1 < S_GROUPS {
                unroll!(for E in 0..4 {
                    max[E] = math::max(max[E], s[G + 1][E]);
                });
            }
        });
        let scale_log2 = self.args.scores.scale_log2;
        [
            warp::reduce_max::<4>(math::max(max[0], max[1])) * scale_log2,
            warp::reduce_max::<4>(math::max(max[2], max[3])) * scale_log2,
        ]
    }

    /// P replaces S: exp2 of the scaled scores less `m`. Returns the sums of this thread's.
    #[inline(always)]
    fn weights(&mut self, m: [f32; ROWS]) -> [f32; ROWS] {
        let scale_log2 = self.args.scores.scale_log2;
        let s = self.s.values_mut();
        let mut sum = [0.0f32; 4];
        unroll!(for G in 0..16 {
            if G < S_GROUPS {
                unroll!(for E in 0..4 {
                    s[G][E] = math::exp2(math::fma(s[G][E], scale_log2, -m[E / 2]));
                    sum[E] += s[G][E];
                });
            }
        });
        [sum[0] + sum[1], sum[2] + sum[3]]
    }

    /// Dropout; then P is rounded to the storage type, in the order that the product takes.
    #[inline(always)]
    fn pack(&mut self, task: Task, tile: u32) {
        let (i, j) = self.first_score(task, tile);
        let kept = self.policy(task).kept_weights::<S_GROUPS>(i, j);
        // The sum keeps what is dropped here.
        let s = self.s.values_mut();
        unroll!(for G in 0..16 {
            if G < S_GROUPS {
                Policy::drop_weights(&mut s[G], kept, G);
            }
        });
        let s = self.s.values();
        unroll!(for K in 0..8 {
            if K < KEY_STEPS {
                self.p[K] = [
                    T::pack(s[2 * K][0], s[2 * K][1]),
                    T::pack(s[2 * K][2], s[2 * K][3]),
                    T::pack(s[2 * K + 1][0], s[2 * K + 1][1]),
                    T::pack(s[2 * K + 1][2], s[2 * K + 1][3]),
                ];
            }
        });
    }
}
