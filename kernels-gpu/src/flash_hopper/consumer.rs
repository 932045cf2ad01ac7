//! What a consumer warpgroup does with its 64 rows: products, mask, softmax, output.

use simt::{
    math, unroll, warp,
    wgmma::{
        Accumulator, CHUNK_ROW_BYTES, Descriptor, Fragments, Operand, RegisterProduct,
        SharedProduct, WaitGroup,
    },
};

use super::{CONSUMER_ROWS, Policy, Rings, Task, visible_keys};
use crate::{args::AttentionArgs, dropout, pipeline::Stage, softmax};

/// Rows of S that a thread has.
pub(super) const ROWS: usize = 2;
/// Bytes of a chunk of Q: 64 columns of a consumer's rows.
const Q_CHUNK: u32 = CONSUMER_ROWS * CHUNK_ROW_BYTES;
/// Growth of a row's maximum, in log2 units, that O is not rescaled for.
const SLACK: f32 = 8.0;

/// A thread of a consumer warpgroup.
pub(super) struct Consumer<
    'a,
    T,
    M,
    const Q_STAGES: u32,
    const STAGES: u32,
    const S_GROUPS: usize,
    const O_GROUPS: usize,
    const KEY_STEPS: usize,
    const K_CHUNK: u32,
> {
    pub args: &'a AttentionArgs,
    /// The first of this thread's two rows, counted from the task's first; the other is 8
    /// further on.
    pub own_row: u32,
    /// The first row of its warpgroup, counted likewise.
    pub own_rows: u32,
    /// Its first column of every group of eight.
    pub column: u32,
    /// Whether it speaks for its warpgroup.
    pub elected: bool,
    pub q: Descriptor,
    pub k: Descriptor,
    pub v: Descriptor,
    /// Bytes of a stage of Q, and of one of K or V.
    pub q_bytes: u32,
    pub tile_bytes: u32,
    pub rings: Rings<Q_STAGES, STAGES>,
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
    pub types: core::marker::PhantomData<(T, M)>,
}

impl<
    T: Operand,
    M: Policy,
    const Q_STAGES: u32,
    const STAGES: u32,
    const S_GROUPS: usize,
    const O_GROUPS: usize,
    const KEY_STEPS: usize,
    const K_CHUNK: u32,
> Consumer<'_, T, M, Q_STAGES, STAGES, S_GROUPS, O_GROUPS, KEY_STEPS, K_CHUNK>
where
    Accumulator<S_GROUPS>: WaitGroup,
    Accumulator<O_GROUPS>: RegisterProduct<KEY_STEPS>,
{
    /// Keys of a tile.
    const TILE_KEYS: u32 = S_GROUPS as u32 * 8;

    /// The next task that has anything to compute, with its Q there. Tasks whose rows see no
    /// key are done on the way.
    ///
    /// # Safety
    /// As for [`change_task`](Self::change_task).
    #[inline(always)]
    pub unsafe fn take_task(&mut self) -> Option<Task> {
        loop {
            let task = self.rings.receive(self.q_stage)?;
            if task.num_kv_tiles > 0 {
                return Some(task);
            }
            // SAFETY: passed on to the caller.
            unsafe { self.store_nothing(task) };
            self.release_q();
        }
    }

    /// Keys that each of this warpgroup's rows sees by its position.
    #[inline(always)]
    fn keys_all_rows_see(&self, task: Task) -> u32 {
        visible_keys::<M>(self.args, task.first_row + self.own_rows)
    }

    /// S = Q Kᵀ and P of the first tile visited, which is the last one in the order of keys,
    /// when nothing of another task is unfinished.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub unsafe fn first_tile<const D_STEPS: usize>(&mut self, task: Task)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        (self.m_i, self.l_i) = ([f32::NEG_INFINITY; ROWS], [0.0; ROWS]);
        self.acc_o = Accumulator::zero();
        // SAFETY: passed on to the caller.
        unsafe { self.start_scores::<D_STEPS>() };
        self.s.wait_group::<0>();
        self.release_k();
        self.first_weights(task);
        self.pack();
    }

    /// The first tile of the next task over the last product of the one before, whose
    /// outputs are then stored.
    ///
    /// # Safety
    /// The whole warpgroup calls it, and the buffers must have the shapes that
    /// [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    pub unsafe fn change_task<const D_STEPS: usize>(&mut self, before: Task, task: Task)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        let (m_before, l_before) = (self.m_i, self.l_i);
        (self.m_i, self.l_i) = ([f32::NEG_INFINITY; ROWS], [0.0; ROWS]);
        // SAFETY: passed on to the caller.
        unsafe {
            self.start_scores::<D_STEPS>();
            self.start_output();
            self.s.wait_group::<1>();
            self.release_k();
            self.first_weights(task);
            self.acc_o.wait_group::<0>();
            self.release_v();
            self.pack();
            self.store(before, m_before, l_before);
        }
        self.acc_o = Accumulator::zero();
    }

    /// Every tile of a task but the first; then Q is given back.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the first tile.
    #[inline(always)]
    pub unsafe fn further_tiles<const D_STEPS: usize>(&mut self, task: Task)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        // Tiles below this one are seen whole by every row of this consumer.
        let whole_tiles =
            if M::GENERAL { 0 } else { self.keys_all_rows_see(task) / Self::TILE_KEYS };
        let mut tile = task.num_kv_tiles - 1;
        while tile > 0 {
            tile -= 1;
            // SAFETY: passed on to the caller.
            unsafe { self.next_tile::<D_STEPS>(task, tile, tile >= whole_tiles) };
        }
        self.release_q();
    }

    /// P of the first tile of a task from its scores.
    #[inline(always)]
    fn first_weights(&mut self, task: Task) {
        let tile = task.num_kv_tiles - 1;
        // The first tile visited may hang over the last key, or lie on the diagonal.
        if M::GENERAL || (tile + 1) * Self::TILE_KEYS > self.keys_all_rows_see(task) {
            self.mask(task, tile);
        }
        let _ = self.softmax(task, tile, true);
    }

    /// S = Q Kᵀ of `tile` over the softmax and P V of the tile before.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the first tile.
    #[inline(always)]
    unsafe fn next_tile<const D_STEPS: usize>(&mut self, task: Task, tile: u32, cut: bool)
    where
        Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    {
        // SAFETY: passed on to the caller.
        unsafe {
            self.start_scores::<D_STEPS>();
            self.start_output();
        }
        // S is complete; O += P V may still run.
        self.s.wait_group::<1>();
        self.release_k();
        if M::GENERAL || (M::CAUSAL && cut) {
            self.mask(task, tile);
        }
        let alpha = self.softmax(task, tile, M::CAUSAL || M::GENERAL);
        self.acc_o.wait_group::<0>();
        self.release_v();
        if let Some([alpha_0, alpha_1]) = alpha {
            let acc_o = self.acc_o.values_mut();
            unroll!(for G in 0..32 {
                if G < O_GROUPS {
                    acc_o[G][0] *= alpha_0;
                    acc_o[G][1] *= alpha_0;
                    acc_o[G][2] *= alpha_1;
                    acc_o[G][3] *= alpha_1;
                }
            });
        }
        self.pack();
    }

    /// The last product of a task, and its outputs.
    ///
    /// # Safety
    /// As for [`change_task`](Self::change_task).
    #[inline(always)]
    pub unsafe fn finish(&mut self, task: Task) {
        // SAFETY: passed on to the caller.
        unsafe {
            self.start_output();
            self.acc_o.wait_group::<0>();
            self.release_v();
            self.store(task, self.m_i, self.l_i);
        }
    }

    /// Gives Q back with its task, once all scores are complete: by one thread of each warp,
    /// since every warp has read the task.
    #[inline(always)]
    fn release_q(&mut self) {
        // Hazard: the producer writes the next task where all lanes must have read this one.
        warp::sync_warp(warp::FULL_MASK);
        if warp::lane_id() == 0 {
            self.rings.q.release(self.q_stage);
        }
        self.q_stage.advance();
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
        self.rings.k.wait(self.k_stage);
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
        self.rings.v.wait(self.v_stage);
        let v = self.v.offset(self.v_stage.index() * self.tile_bytes);
        // SAFETY: V has landed, and is released only when O was waited for.
        unsafe { self.acc_o.product_registers::<T>(&self.p, v) };
    }

    #[inline(always)]
    fn release_k(&mut self) {
        if self.elected {
            self.rings.k.release(self.k_stage);
        }
        self.k_stage.advance();
    }

    #[inline(always)]
    fn release_v(&mut self) {
        if self.elected {
            self.rings.v.release(self.v_stage);
        }
        self.v_stage.advance();
    }

    /// Hides what this thread's rows do not see: scores become -inf.
    #[inline(always)]
    fn mask(&mut self, task: Task, tile: u32) {
        let first_key = tile * Self::TILE_KEYS;
        // Keys of the tile that a row sees, counted from this thread's first column.
        let limit =
            |row: u32| visible_keys::<M>(self.args, row) as i32 - (first_key + self.column) as i32;
        let first_row = task.first_row + self.own_row;
        let limits = [limit(first_row), limit(first_row + 8)];
        let shown = if M::GENERAL { self.padding_mask(task, first_key) } else { [u32::MAX; 4] };
        let s = self.s.values_mut();
        unroll!(for G in 0..16 {
            if G < S_GROUPS {
                unroll!(for E in 0..4 {
                    let column = (8 * G + E % 2) as u32;
                    let padded = M::GENERAL && shown[G / 4] >> (column % 32) & 1 == 0;
                    if column as i32 >= limits[E / 2] || padded {
                        s[G][E] = f32::NEG_INFINITY;
                    }
                });
            }
        });
    }

    /// The padding mask of a tile: bit `c` of word `w` for key `32 w + c` from this
    /// thread's first column on.
    #[inline(always)]
    fn padding_mask(&self, task: Task, first_key: u32) -> [u32; 4] {
        let mut words = [u32::MAX; 4];
        if !self.args.mask.is_empty() {
            // SAFETY: whoever launches vouches for the mask, `[B, Nk]`.
            let mask = unsafe { self.args.mask.view::<u8>() };
            let row = task.b as u64 * self.args.seq_k as u64;
            unroll!(for W in 0..4 {
                if W * 4 < S_GROUPS {
                    let key = first_key + W as u32 * warp::LANES + warp::lane_id();
                    let shown = key < self.args.seq_k && mask.read(row + key as u64) != 0;
                    words[W] = warp::ballot(shown) >> self.column;
                }
            });
        }
        words
    }

    /// Online softmax: P replaces S. Returns what O must be multiplied by, if anything.
    #[inline(always)]
    fn softmax(&mut self, task: Task, tile: u32, masked: bool) -> Option<[f32; ROWS]> {
        let scale_log2 = self.args.scale_log2;
        let s = self.s.values_mut();
        // Four chains of maxima and of sums, so that they do not wait for each other.
        let mut max = s[0];
        unroll!(for G in 0..16 {
            if G + 1 < S_GROUPS {
                unroll!(for E in 0..4 {
                    max[E] = math::max(max[E], s[G + 1][E]);
                });
            }
        });
        let m_new = [
            warp::reduce_max::<4>(math::max(max[0], max[1])) * scale_log2,
            warp::reduce_max::<4>(math::max(max[2], max[3])) * scale_log2,
        ];
        let grown = m_new[0] > self.m_i[0] + SLACK || m_new[1] > self.m_i[1] + SLACK;
        let mut alpha = None;
        if warp::any(grown) {
            let mut factors = [0.0; ROWS];
            unroll!(for R in 0..2 {
                let m = math::max(self.m_i[R], m_new[R]);
                factors[R] =
                    math::exp2(self.m_i[R] - if masked { softmax::safe_max(m) } else { m });
                self.m_i[R] = m;
                self.l_i[R] *= factors[R];
            });
            alpha = Some(factors);
        }
        let [m_0, m_1] = self.m_i;
        let used = if masked { [softmax::safe_max(m_0), softmax::safe_max(m_1)] } else { self.m_i };
        let mut sum = [0.0f32; 4];
        unroll!(for G in 0..16 {
            if G < S_GROUPS {
                unroll!(for E in 0..4 {
                    s[G][E] = math::exp2(math::fma(s[G][E], scale_log2, -used[E / 2]));
                    sum[E] += s[G][E];
                });
            }
        });
        self.l_i[0] += sum[0] + sum[1];
        self.l_i[1] += sum[2] + sum[3];
        if M::GENERAL && self.args.dropout.threshold != 0 {
            self.drop(task, tile);
        }
        alpha
    }

    /// Dropout: weights that are dropped become 0. The sum keeps them.
    #[inline(always)]
    fn drop(&mut self, task: Task, tile: u32) {
        let first_key = tile * Self::TILE_KEYS;
        let first_row = task.first_row + self.own_row;
        let kept =
            [self.kept(task, first_row, first_key), self.kept(task, first_row + 8, first_key)];
        let s = self.s.values_mut();
        unroll!(for G in 0..16 {
            if G < S_GROUPS {
                unroll!(for E in 0..4 {
                    if kept[E / 2] >> (2 * G + E % 2) & 1 == 0 {
                        s[G][E] = 0.0;
                    }
                });
            }
        });
    }

    /// Which of this thread's weights of a row are kept: bit `2 g + e` for group `g`. A
    /// loop that stays one: ten rounds of Philox a group.
    #[inline(always)]
    fn kept(&self, task: Task, row: u32, first_key: u32) -> u32 {
        let dropout = &self.args.dropout;
        let mut bits = 0;
        for g in 0..S_GROUPS as u32 {
            let key = first_key + 8 * g + self.column;
            let draws = dropout::draws(dropout.seed, task.b, task.h, row, key / 4);
            let pair = if key % 4 == 0 { [draws[0], draws[1]] } else { [draws[2], draws[3]] };
            bits |= u32::from(pair[0] >= dropout.threshold) << (2 * g);
            bits |= u32::from(pair[1] >= dropout.threshold) << (2 * g + 1);
        }
        bits
    }

    /// Rounds P to the storage type, in the order that the product takes.
    #[inline(always)]
    fn pack(&mut self) {
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

    /// Normalises and stores O and LSE of a task.
    ///
    /// # Safety
    /// The buffers must have the shapes that [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    unsafe fn store(&self, task: Task, m_i: [f32; ROWS], l_i: [f32; ROWS]) {
        let args = self.args;
        // SAFETY: the caller vouches for the buffers.
        let (o, lse) = unsafe { (args.o.buffer.view_mut::<T>(), args.lse.view_mut::<f32>()) };
        let values = self.acc_o.values();
        unroll!(for R in 0..2 {
            // Each thread summed its own columns: a row's sum is over its four threads.
            let l_row = warp::reduce_add::<4>(l_i[R]);
            let i = task.first_row + self.own_row + 8 * R as u32;
            if i < args.seq_q {
                let mut normaliser = softmax::normaliser(l_row);
                if M::GENERAL && args.dropout.threshold != 0 {
                    normaliser *= args.dropout.rescale;
                }
                let first =
                    args.o.head(task.b, task.h) + i as u64 * args.o.stride_n + self.column as u64;
                unroll!(for G in 0..32 {
                    if G < O_GROUPS {
                        let (left, right) = (values[G][2 * R], values[G][2 * R + 1]);
                        let pair = T::pack(left * normaliser, right * normaliser);
                        o.write_as::<u32>(first + 8 * G as u64, pair);
                    }
                });
                if self.column == 0 {
                    let head = task.b as u64 * args.heads as u64 + task.h as u64;
                    let lse_row = softmax::log_sum_exp(m_i[R], l_row);
                    lse.write(head * args.seq_q as u64 + i as u64, lse_row);
                }
            }
        });
    }

    /// The outputs of a task whose rows see no key: O is 0, LSE -inf.
    ///
    /// # Safety
    /// As for [`change_task`](Self::change_task).
    #[inline(always)]
    pub unsafe fn store_nothing(&self, task: Task) {
        let args = self.args;
        // SAFETY: the caller vouches for the buffers.
        let (o, lse) = unsafe { (args.o.buffer.view_mut::<T>(), args.lse.view_mut::<f32>()) };
        unroll!(for R in 0..2 {
            let i = task.first_row + self.own_row + 8 * R as u32;
            if i < args.seq_q {
                let first =
                    args.o.head(task.b, task.h) + i as u64 * args.o.stride_n + self.column as u64;
                for group in 0..O_GROUPS as u64 {
                    o.write_as::<u32>(first + 8 * group, 0);
                }
                if self.column == 0 {
                    let head = task.b as u64 * args.heads as u64 + task.h as u64;
                    lse.write(head * args.seq_q as u64 + i as u64, f32::NEG_INFINITY);
                }
            }
        });
    }
}
