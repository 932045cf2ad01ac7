//! The work of a consumer warpgroup on its 64 rows: products, mask, softmax.

use simt::{
    shared::Shared,
    tma,
    wgmma::{Descriptor, Operand, WaitGroup},
};

use super::{
    CONSUMER_ROWS, HopperMaps, Inbox, Task,
    geometry::{Geometry, OutputTile},
    score_tile::ROWS,
    turn::NamedBarrier,
};
use crate::{
    args::AttentionArgs,
    parts::{
        pipeline::{Ring, Stage},
        policy::Policy,
    },
};

/// A thread of a consumer warpgroup.
pub(super) struct Consumer<'a, T, G: Geometry> {
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
    pub inbox: Inbox<G::QStages>,
    pub k_ring: Ring<G::KvStages>,
    pub v_ring: Ring<G::KvStages>,
    pub q_stage: Stage<G::QStages>,
    pub k_stage: Stage<G::KvStages>,
    pub v_stage: Stage<G::KvStages>,
    /// Whether the K of `k_stage` is known to be there.
    pub k_is_there: bool,
    /// The number subtracted from the scaled scores: the running maximum, or up to
    /// [`SLACK`] less.
    pub m_i: [f32; ROWS],
    /// Running sum of this thread's columns.
    pub l_i: [f32; ROWS],
    pub s: G::Scores,
    pub p: G::Weights,
    pub acc_o: G::Output,
    pub element: core::marker::PhantomData<T>,
}

impl<T: Operand, G: Geometry> Consumer<'_, T, G> {
    /// Works through the tasks, until there is no further one.
    ///
    /// # Safety
    /// The whole warpgroup calls it, the rings bring what is multiplied, and the buffers
    /// must have the shapes that [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    pub unsafe fn work(&mut self) {
        if G::TURNS && self.own_rows > 0 {
            // The other one begins.
            NamedBarrier::of(self.own_rows).pass();
        }
        let mut next = self.inbox.receive(self.q_stage);
        // SAFETY: all four warps are here, the rings bring the tiles, and the buffers have their
        // shapes, as stated above.
        unsafe {
            while let Some(mut task) = next {
                let own_end = self.own_end(task);
                if own_end == 0 {
                    self.store_nothing(task);
                    // First, so that the next task's Q may come while the tiles pass.
                    self.release_q();
                    self.q_stage.advance();
                    self.pass_tiles(task.num_tiles());
                    next = self.inbox.receive(self.q_stage);
                    continue;
                }
                if !G::TURNS {
                    self.pass_tiles(task.end_tile - own_end);
                    task.end_tile = own_end;
                }
                self.first_tile(task);
                loop {
                    self.further_tiles(task);
                    // Where two consumers take turns, registers suffice to go from task to
                    // task without a gap: this one's last product then comes with the next
                    // one's first.
                    if G::TURNS && G::TILES.q_stages > 1 {
                        next = self.inbox.receive(self.q_stage);
                        if let Some(following) = next
                            && self.own_end(following) > 0
                        {
                            self.change_task(task, following);
                            task = following;
                            continue;
                        }
                    }
                    self.start_output();
                    let factors = self.store_lse(task, self.m_i, self.l_i);
                    self.acc_o.wait_group::<0>();
                    self.release_v();
                    if G::TURNS && G::TILES.q_stages == 1 {
                        // The next task's Q comes only now.
                        next = self.inbox.receive(self.q_stage);
                        if let Some(following) = next
                            && self.own_end(following) > 0
                        {
                            self.store_and_begin(task, factors, following);
                            task = following;
                            continue;
                        }
                    }
                    self.store_output(task, factors);
                    break;
                }
                if !G::TURNS {
                    next = self.inbox.receive(self.q_stage);
                }
            }
        }
        // Hazard: O is stored from shared memory that the block gives up.
        tma::wait_group_read::<0>();
        if G::TURNS && self.own_rows == 0 {
            // The turn that no consumer takes any more.
            NamedBarrier::of(self.own_rows).await_other();
        }
    }

    /// The end of a task's tiles that this consumer's rows see any key of; 0 if there are none.
    #[inline(always)]
    fn own_end(&self, task: Task) -> u32 {
        let first_row = task.first_row() + self.own_rows;
        let policy = self.policy(task);
        if first_row >= policy.head.seq_q {
            0
        } else if G::TURNS {
            // Both go through the same tiles in turn.
            task.end_tile
        } else {
            policy.end_of_tile(first_row + CONSUMER_ROWS).div_ceil(G::TILES.keys)
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
            if G::TURNS {
                self.in_turn(|_| {});
            } else {
                NamedBarrier::of(self.own_rows).gather();
            }
            self.release_k();
            self.release_v();
        }
        self.k_is_there = false;
    }

    /// The tiles of a task that each of this warpgroup's rows sees whole: the first and the end.
    #[inline(always)]
    fn whole_tiles(&self, task: Task) -> [u32; 2] {
        let policy = self.policy(task);
        let first_row = task.first_row() + self.own_rows;
        let whole_end = policy.whole_keys(first_row) / G::TILES.keys;
        if !Policy::is_left_bounded() {
            return [0, whole_end];
        }
        let last_row = first_row + const { CONSUMER_ROWS - 1 };
        [policy.whole_from(last_row).div_ceil(G::TILES.keys), whole_end]
    }

    /// Whether some row of this warpgroup does not see all of a tile.
    #[inline(always)]
    pub(super) fn is_cut(&self, task: Task, tile: u32) -> bool {
        let [whole_from, whole_end] = self.whole_tiles(task);
        tile >= whole_end || Policy::is_left_bounded() && tile < whole_from
    }

    /// S = Q Kᵀ and P of the first tile visited, which is the last one in the order of keys,
    /// when nothing of another task is unfinished.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn first_tile(&mut self, task: Task) {
        self.acc_o = OutputTile::zero();
        // SAFETY: all four warps are here, as stated above.
        self.in_turn(|this| unsafe { this.start_scores() });
        self.first_softmax(task);
    }

    /// The outputs of a task, whose last product has been started, over the first scores of the
    /// next.
    ///
    /// # Safety
    /// As for [`change_task`](Self::change_task).
    #[inline(always)]
    unsafe fn store_and_begin(&mut self, before: Task, factors: [f32; ROWS], task: Task) {
        // SAFETY: all four warps are here, and the buffers have their shapes, as stated above.
        unsafe {
            self.in_turn(|this| this.start_scores());
            self.store_output(before, factors);
        }
        self.acc_o = OutputTile::zero();
        self.first_softmax(task);
    }

    /// P of the first tile, when nothing but its scores runs.
    #[inline(always)]
    fn first_softmax(&mut self, task: Task) {
        self.s.wait_group::<0>();
        self.scores_done(task, task.end_tile - 1);
        self.first_weights(task);
        self.look_for_k();
        self.pack(task, task.end_tile - 1);
    }

    /// The first tile of the next task over the last product of the one before, whose
    /// outputs are then stored.
    ///
    /// # Safety
    /// The whole warpgroup calls it, and the buffers must have the shapes that
    /// [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    unsafe fn change_task(&mut self, before: Task, task: Task) {
        // SAFETY: all four warps are here, and the buffers have their shapes, as stated above.
        unsafe {
            self.start_products();
            let (m_i, l_i) = (self.m_i, self.l_i);
            self.s.wait_group::<1>();
            self.scores_done(task, task.end_tile - 1);
            // A branch again, so that the exponentials come before the wait.
            if self.first_weights(task) {
                self.acc_o.wait_group_in::<0, 1>();
            } else {
                self.acc_o.wait_group_in::<0, 2>();
            }
            let factors = self.store_lse(before, m_i, l_i);
            self.release_v();
            self.look_for_k();
            self.pack(task, task.end_tile - 1);
            self.store_output(before, factors);
        }
        self.acc_o = OutputTile::zero();
    }

    /// Every tile of a task but the first; then Q is given back.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the first tile.
    #[inline(always)]
    unsafe fn further_tiles(&mut self, task: Task) {
        let mut tile = task.end_tile - 1;
        // Tiles below this one need no mask. In a window any may: it is asked for each.
        let whole_end =
            if Policy::is_left_bounded() { task.first_tile } else { self.whole_tiles(task)[1] };
        if Policy::hides() {
            while tile > whole_end {
                tile -= 1;
                // SAFETY: all four warps are here, after the first tile, as stated above.
                unsafe { self.next_tile::<true>(task, tile) };
            }
        }
        if !Policy::is_left_bounded() {
            while tile > 0 {
                tile -= 1;
                // SAFETY: all four warps are here, after the first tile, as stated above.
                unsafe { self.next_tile::<false>(task, tile) };
            }
        }
        if G::TILES.q_stages > 1 {
            self.release_q();
        }
        self.q_stage.advance();
    }

    /// The policy for a task's head.
    #[inline(always)]
    pub(super) fn policy(&self, task: Task) -> Policy {
        // SAFETY: the mask has the shape that `args` says.
        unsafe { Policy::new(self.args, task.tile.head(self.args)) }
    }
}
