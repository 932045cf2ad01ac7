//! How a consumer stores O and LSE.

use simt::{
    unroll, warp,
    wgmma::{Accumulator, Operand, RegisterProduct, WaitGroup},
};

use super::{
    Task,
    consumer::{Consumer, ROWS},
};
use crate::{online::transpose_quad, policy::Policy, softmax};

impl<
    T: Operand,
    P: Policy,
    const Q_STAGES: u32,
    const STAGES: u32,
    const S_GROUPS: usize,
    const O_GROUPS: usize,
    const KEY_STEPS: usize,
    const K_CHUNK: u32,
    const TURNS: bool,
> Consumer<'_, T, P, Q_STAGES, STAGES, S_GROUPS, O_GROUPS, KEY_STEPS, K_CHUNK, TURNS>
where
    Accumulator<S_GROUPS>: WaitGroup,
    Accumulator<O_GROUPS>: RegisterProduct<KEY_STEPS>,
{
    /// Stores LSE of a task whose sums are complete. Returns what its O is to be multiplied
    /// by.
    ///
    /// # Safety
    /// The buffers must have the shapes that [`flash_hopper`](super::flash_hopper()) states.
    #[inline(always)]
    pub(super) unsafe fn store_lse(&self, task: Task) -> [f32; ROWS] {
        let args = self.args;
        // SAFETY: the caller vouches for the buffer.
        let lse = unsafe { args.lse.view_mut::<f32>() };
        let policy = self.policy(task);
        let mut factors = [0.0; ROWS];
        unroll!(for R in 0..2 {
            // Each thread summed its own columns: a row's sum is over its four threads.
            let l_row = warp::reduce_add::<4>(self.l_i[R]);
            factors[R] = softmax::normaliser(l_row);
            if policy.drops() {
                factors[R] *= policy.dropout().rescale;
            }
            let i = task.first_row + self.own_row + 8 * R as u32;
            if i < args.seq_q && self.column == 0 {
                let lse_row = softmax::log_sum_exp(self.m_i[R], l_row);
                lse.write(args.row(task.b, task.h, i), lse_row);
            }
        });
        factors
    }

    /// Stores O of a task, its rows times `factors`.
    ///
    /// # Safety
    /// As for [`store_lse`](Self::store_lse).
    #[inline(always)]
    pub(super) unsafe fn store_output(&self, task: Task, factors: [f32; ROWS]) {
        let args = self.args;
        // SAFETY: the caller vouches for the buffer.
        let o = unsafe { args.o.buffer.view_mut::<T>() };
        let values = self.acc_o.values();
        unroll!(for R in 0..2 {
            let i = task.first_row + self.own_row + 8 * R as u32;
            let row = args.o.head(task.b, task.h) + i as u64 * args.o.stride_n;
            // 32 columns at a time: 8 of them to each of the row's four threads.
            unroll!(for QUAD in 0..8 {
                if QUAD < O_GROUPS / 4 {
                    let pack = |group: usize| {
                        let [left, right] = [2 * R, 2 * R + 1].map(|e| values[4 * QUAD + group][e]);
                        T::pack(left * factors[R], right * factors[R])
                    };
                    let chunk = transpose_quad([pack(0), pack(1), pack(2), pack(3)]);
                    if i < args.seq_q {
                        let column = (32 * QUAD) as u64 + 4 * self.column as u64;
                        o.write_as::<[u32; 4]>(row + column, chunk);
                    }
                }
            });
        });
    }

    /// The outputs of a task whose rows see no key: O is 0, LSE -inf.
    ///
    /// # Safety
    /// As for [`store_lse`](Self::store_lse).
    #[inline(always)]
    pub(super) unsafe fn store_nothing(&self, task: Task) {
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
                    lse.write(args.row(task.b, task.h, i), f32::NEG_INFINITY);
                }
            }
        });
    }
}
