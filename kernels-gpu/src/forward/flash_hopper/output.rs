//! How a consumer stores O and LSE.

use simt::{
    layout::{Swizzled, TileLayout},
    matrix, mbarrier, tma, unroll, warp,
    wgmma::{CHUNK_COLUMNS, Operand},
};

use super::{
    Task,
    consumer::Consumer,
    geometry::{Geometry, OutputTile},
    score_tile::ROWS,
    tiles::OUTPUT_CHUNK,
};
use crate::parts::{ragged::MapRows, softmax};

impl<T: Operand, G: Geometry> Consumer<'_, T, G> {
    /// Stores LSE of a task whose sums are complete. Returns what its O is to be multiplied
    /// by.
    ///
    /// # Safety
    /// The buffers must have the shapes that [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    pub(super) unsafe fn store_lse(
        &self,
        task: Task,
        m_i: [f32; ROWS],
        l_i: [f32; ROWS],
    ) -> [f32; ROWS] {
        let args = self.args;
        // SAFETY: `lse` is f32 `[B, H, Nq]`.
        let lse = unsafe { args.tensors.lse.view_mut::<f32>() };
        let policy = self.policy(task);
        let mut factors = [0.0; ROWS];
        // Each thread summed its own columns: a row's sum is over its four threads.
        let l_i = [warp::reduce_add::<4>(l_i[0]), warp::reduce_add::<4>(l_i[1])];
        // Three consumers have no registers left for the check: it costs 3 to 7 % at D 64, full
        // (H200, N 2048). Their rows are lost as rows without keys from scores of 2^28 on.
        let l_i = if G::TURNS {
            policy.checked_sums(task.first_row() + self.own_row, m_i, l_i)
        } else {
            l_i
        };
        unroll!(for R in 0..2 {
            let (m_row, l_row, factor) = policy.with_sink(m_i[R], l_i[R]);
            factors[R] = softmax::normaliser(l_row) * (factor * policy.rescale());
            let i = task.first_row() + self.own_row + 8 * R as u32;
            if i < policy.head.seq_q && self.column == 0 {
                let lse_row = softmax::log_sum_exp(m_row, l_row);
                lse.write(policy.head.row(i), lse_row);
            }
        });
        factors
    }

    /// Starts to store O of a task, its rows times `factors`: through shared memory, which
    /// each warp has some of to itself.
    ///
    /// # Safety
    /// As for [`store_lse`](Self::store_lse).
    #[inline(always)]
    pub(super) unsafe fn store_output(&self, task: Task, factors: [f32; ROWS]) {
        let (map, of) = (self.maps.address::<3>(), MapRows::queries(&self.policy(task).head));
        let values = self.acc_o.values();
        let lane = warp::lane_id();
        let first_row = task.first_row() + self.own_row - lane / 4;
        // Lane 8 m + r says where row r of matrix m goes, of four: the second is below the
        // first, the others to their right.
        let place = Swizzled::<{ CHUNK_COLUMNS as usize }>::index(lane % 16, lane / 16 * 8);
        // As many chunks at a time as there are buffers for.
        let groups = const {
            let groups = 8 * G::TILES.output_chunks as usize;
            assert!(G::Output::GROUPS <= 2 * groups, "two times");
            groups
        };
        unroll!(for HALF in 0..2 {
            if groups * HALF < G::Output::GROUPS {
                // Hazard: the copy engine may still read the bytes that are overwritten here.
                tma::wait_group_read::<0>();
                warp::sync_warp(warp::FULL_MASK);
                unroll!(for PAIR in 0..8 {
                    if 2 * PAIR < groups && groups * HALF + 2 * PAIR < G::Output::GROUPS {
                        let buffer =
                            self.output.slice(PAIR as u32 / 4 * OUTPUT_CHUNK, OUTPUT_CHUNK);
                        let pack = |group: usize, row: usize| {
                            let pair = values[groups * HALF + 2 * PAIR + group];
                            T::pack(pair[2 * row] * factors[row], pair[2 * row + 1] * factors[row])
                        };
                        let place = Swizzled::<{ CHUNK_COLUMNS as usize }>::right(
                            place,
                            16 * (PAIR as u32 % 4),
                        );
                        matrix::store_x4(
                            buffer,
                            place,
                            [pack(0, 0), pack(0, 1), pack(1, 0), pack(1, 1)],
                        );
                    }
                });
                // Hazard: the copy engine reads bytes that all lanes have written.
                mbarrier::fence_proxy_async();
                warp::sync_warp(warp::FULL_MASK);
                unroll!(for CHUNK in 0..2 {
                    if 8 * CHUNK < groups && groups * HALF + 8 * CHUNK < G::Output::GROUPS {
                        let buffer = self.output.slice(CHUNK as u32 * OUTPUT_CHUNK, OUTPUT_CHUNK);
                        let column = (groups / 8 * HALF + CHUNK) as u32 * CHUNK_COLUMNS;
                        // SAFETY: the parameter holds the map. It ends at the last row and
                        // column, and so does what is stored.
                        unsafe { of.store_if(lane == 0, map, column, first_row, buffer.address()) };
                    }
                });
                tma::commit_group();
            }
        });
    }

    /// The outputs of a task whose rows see no key: O is 0, LSE -inf.
    ///
    /// # Safety
    /// As for [`store_lse`](Self::store_lse).
    #[inline(always)]
    pub(super) unsafe fn store_nothing(&mut self, task: Task) {
        self.m_i = [f32::NEG_INFINITY; ROWS];
        self.l_i = [0.0; ROWS];
        self.acc_o = OutputTile::zero();
        // SAFETY: the buffers have their shapes, as stated above.
        unsafe {
            let factors = self.store_lse(task, self.m_i, self.l_i);
            self.store_output(task, factors);
        }
    }
}
