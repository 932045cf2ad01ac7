//! A consumer's online softmax: scores of a tile become weights, O and the sums are rescaled where a
//! maximum has moved far.

use simt::{
    math, unroll, warp,
    wgmma::{Operand, WaitGroup},
};

use super::{
    Task,
    consumer::Consumer,
    geometry::{Geometry, OutputTile},
    score_tile::{ROWS, ScoreTile},
};
use crate::parts::{
    policy::Policy,
    softmax::{self, SLACK},
};

impl<T: Operand, G: Geometry> Consumer<'_, T, G> {
    /// P of the first tile of a task from its scores. Whether any row of the warp sees a key.
    #[inline(always)]
    pub(super) fn first_weights(&mut self, task: Task) -> bool {
        let tile = task.end_tile - 1;
        self.shape(task, tile);
        // The first tile visited may hang over the last key, or lie on the diagonal.
        if self.is_cut(task, tile) {
            self.mask(task, tile);
        }
        // Nothing came before: no O to rescale.
        let maxima = self.s.maxima(self.scale_log2());
        self.m_i = maxima.map(|m| math::max(f32::NEG_INFINITY, m));
        self.l_i = self.s.weigh(self.scale_log2(), self.m_i.map(softmax::safe_max));
        warp::any(maxima.iter().any(|&m| m != f32::NEG_INFINITY))
    }

    /// S = Q Kᵀ of `tile` over the softmax and P V of the tile before.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the first tile.
    #[inline(always)]
    pub(super) unsafe fn next_tile<const CUT: bool>(&mut self, task: Task, tile: u32) {
        // SAFETY: all four warps are here, as stated above.
        unsafe { self.start_products() };
        // S is complete; O += P V may still run.
        self.s.wait_group::<1>();
        self.scores_done(task, tile);
        self.shape(task, tile);
        if CUT && (!Policy::is_left_bounded() || self.is_cut(task, tile)) {
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
            self.acc_o.scale_rows([factor_0, factor_1]);
        } else {
            self.acc_o.wait_group_in::<0, 2>();
            self.l_i = [self.l_i[0] + sums[0], self.l_i[1] + sums[1]];
        }
        self.release_v();
        self.look_for_k();
        self.pack(task, tile);
    }

    /// Row and key of this thread's first score of a tile.
    #[inline(always)]
    fn first_score(&self, task: Task, tile: u32) -> (u32, u32) {
        (task.first_row() + self.own_row, tile * G::TILES.keys + self.column)
    }

    /// The factor that turns a score into log2 units.
    #[inline(always)]
    fn scale_log2(&self) -> f32 {
        Policy::scale_log2_of(&self.args.scores)
    }

    /// Softcap, ALiBi and bias of this thread's scores.
    #[inline(always)]
    fn shape(&mut self, task: Task, tile: u32) {
        // Three consumers have no registers for it.
        if G::TURNS && Policy::shapes_scores() {
            let (i, j) = self.first_score(task, tile);
            let policy = self.policy(task);
            self.s.shape::<T>(&policy, i, j);
        }
    }

    /// Hides what this thread's rows do not see: scores become -inf.
    #[inline(always)]
    fn mask(&mut self, task: Task, tile: u32) {
        let (i, j) = self.first_score(task, tile);
        let policy = self.policy(task);
        self.s.hide(&policy, i, j);
    }

    /// Online softmax of a tile that is not the first: P replaces S. Returns what O and l must
    /// be multiplied by, if anything, and the sums of this thread's weights.
    #[inline(always)]
    fn softmax(&mut self, masked: bool) -> (Option<[f32; ROWS]>, [f32; ROWS]) {
        let (before, maxima) = (self.m_i, self.s.maxima(self.scale_log2()));
        let grown = warp::any(maxima[0] > before[0] + SLACK || maxima[1] > before[1] + SLACK);
        let mut used = before;
        unroll!(for R in 0..2 {
            self.m_i[R] = if grown { math::max(before[R], maxima[R]) } else { before[R] };
            used[R] = if masked { softmax::safe_max(self.m_i[R]) } else { self.m_i[R] };
        });
        let sums = self.s.weigh(self.scale_log2(), used);
        let growth = if grown {
            Some([math::exp2(before[0] - used[0]), math::exp2(before[1] - used[1])])
        } else {
            None
        };
        (growth, sums)
    }

    /// Dropout; then P is rounded to the storage type, in the order that the product takes.
    #[inline(always)]
    pub(super) fn pack(&mut self, task: Task, tile: u32) {
        let (i, j) = self.first_score(task, tile);
        let policy = self.policy(task);
        self.p = self.s.drop_and_pack::<T>(&policy, i, j);
    }
}
