//! The last step: dQ in the storage type, by rows, from sums in the order of registers.
//!
//! Memory: reads the sums and writes dQ once. No shared memory. Measured: not measured yet.

use half::{bf16, f16};
use simt::{thread, unroll, warp, warpgroup, wgmma::Operand};

use super::{Geometry, Hopper, consumer::part_of};
use crate::{
    args::BackwardArgs,
    entries,
    parts::{columns::Columns, head::Head},
};

/// Threads of a block.
pub const THREADS: u32 = warpgroup::THREADS;

/// `dQ = dq_acc * scale`.
///
/// # Layout
/// `dq: [B, H, Nq, D]`; `dq_acc: [B, H, Nq', D]`, of each head 64 x 64 elements of a consumer after
/// another: of those, 16 bytes of each thread for each 8 columns, as
/// [`wgmma`](simt::wgmma) has an accumulator's registers.
///
/// # Thread mapping
/// A block for each consumer's part; `x` counts them over a head, `y` and `z` heads.
///
/// # Safety
/// The buffers of `args` must have these shapes, and the main kernel must have run.
#[inline(always)]
pub unsafe fn convert<T: Operand, G: Geometry>(args: &BackwardArgs) {
    let Some(head) = Head::of_block_yz(&args.forward) else { return };
    let (tile, consumer) = (thread::block_idx_x() / 2, thread::block_idx_x() % 2);
    let (row, column) = G::TILES.dq_part(consumer);
    let lane = warp::lane_id();
    let i = tile * G::TILES.rows + row + thread::thread_idx_x() / warp::LANES * 16 + lane / 4;
    // SAFETY: the buffers have the shapes stated above.
    let (dq_acc, dq) =
        unsafe { (args.steps.dq_acc.view::<f32>(), args.gradients.dq.buffer.view_mut::<T>()) };
    let part = part_of::<G>(&head, tile, consumer);
    let scale = args.forward.scores.scale;
    unroll!(for GROUP in 0..8 {
        let place = (GROUP as u32 * THREADS + thread::thread_idx_x()) * 4;
        let values: [u32; 4] = dq_acc.read_as(part + place as u64);
        let values = values.map(|bits| f32::from_bits(bits) * scale);
        unroll!(for R in 0..2 {
            let i = i + 8 * R as u32;
            let column = column + 8 * GROUP as u32 + lane % 4 * 2;
            if i < head.seq_q && Columns::of_keys().has(column) {
                let to = head.query(&args.gradients.dq, i) + column as u64;
                dq.write_as(to, T::pack(values[2 * R], values[2 * R + 1]));
            }
        });
    });
}

entries! {
    /// Instances of [`convert()`].
    pub static ENTRIES: BackwardArgs => "sm_90a", threads THREADS, min_blocks 1;
    backward_hopper_convert: T in [f16, bf16], d D in [64, 128] = convert::<T, Hopper<{ D as u32 }>>;
}
