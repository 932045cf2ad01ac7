//! How a consumer starts its products, in turn, and gives back what they have read.

use simt::{warp, wgmma::Operand};

use super::{Task, consumer::Consumer, geometry::Geometry, turn::NamedBarrier};

impl<T: Operand, G: Geometry> Consumer<'_, T, G> {
    /// Gives Q back with its task, once all scores are complete: by one thread of each warp,
    /// since every warp has read the task.
    #[inline(always)]
    pub(super) fn release_q(&mut self) {
        // Hazard: the producer writes the next task where all lanes must have read this one.
        warp::sync_warp(warp::FULL_MASK);
        if warp::lane_id() == 0 {
            self.inbox.ring.release(self.q_stage);
        }
    }

    /// Gives back the operands of a tile's scores: K, and after the last tile Q.
    #[inline(always)]
    pub(super) fn scores_done(&mut self, task: Task, tile: u32) {
        self.release_k();
        if G::TILES.q_stages == 1 && tile == task.first_tile {
            self.release_q();
        }
    }

    /// Asks for the next K while P is packed: the answer takes some 30 cycles, which would otherwise
    /// pass between two products.
    #[inline(always)]
    pub(super) fn look_for_k(&mut self) {
        if G::ASKS_AHEAD {
            self.k_is_there = self.k_ring.is_full(self.k_stage);
        }
    }

    /// Starts S = Q Kᵀ [64, BC] with the next tile of the ring.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn start_scores(&mut self) {
        if !self.k_is_there {
            self.k_ring.wait(self.k_stage);
        }
        let q = self.q.offset(self.q_stage.index() * const { G::TILES.q_bytes() });
        let k = self.k.offset(self.k_stage.index() * const { G::TILES.k_bytes() });
        // SAFETY: Q and K have landed, and K is released only when S was waited for.
        unsafe { G::start_scores::<T>(&mut self.s, q, k) };
    }

    /// Starts O += P V [64, D] with the next tile of the ring.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn start_output(&mut self) {
        self.v_ring.wait(self.v_stage);
        let v = self.v.offset(self.v_stage.index() * const { G::TILES.v_bytes() });
        // SAFETY: V has landed, and is released only when O was waited for.
        unsafe { G::start_output::<T>(&mut self.acc_o, &self.p, v) };
    }

    /// Starts S = Q Kᵀ of the next tile and O += P V of the one before.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn start_products(&mut self) {
        // SAFETY: all four warps are here, as stated above.
        self.in_turn(|this| unsafe {
            this.start_scores();
            this.start_output();
        });
    }

    /// Starts products when it is this consumer's turn.
    #[inline(always)]
    pub(super) fn in_turn(&mut self, start: impl FnOnce(&mut Self)) {
        // Products of both consumers that start together end together, and then nothing runs
        // beside the softmax. In turn, each one's runs beside the other's products. The barrier
        // also gathers this consumer's warps, which `pass_tiles` relies on.
        if G::TURNS {
            NamedBarrier::of(self.own_rows).await_other();
        }
        start(self);
        if G::TURNS {
            NamedBarrier::of(self.own_rows).pass();
        }
    }

    #[inline(always)]
    pub(super) fn release_k(&mut self) {
        if self.elected {
            self.k_ring.release(self.k_stage);
        }
        self.k_stage.advance();
    }

    #[inline(always)]
    pub(super) fn release_v(&mut self) {
        if self.elected {
            self.v_ring.release(self.v_stage);
        }
        self.v_stage.advance();
    }
}
