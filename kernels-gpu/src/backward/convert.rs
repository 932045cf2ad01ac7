//! convert: the last step of the rungs that sum dQ in f32 in memory.
//!
//! ```text
//! dQ = dq_acc * scale, in the storage type
//! ```
//!
//! Memory: reads the sums and writes dQ once. No shared memory. Measured: not measured yet.

use half::{bf16, f16};
use simt::thread;

use super::prepare::{ROW_THREADS, ROWS, THREADS};
use crate::{
    args::BackwardArgs,
    entries,
    parts::{
        chunk::{Chunk, MAX_ELEMENTS},
        head::Head,
    },
};

/// The last step of a backward pass.
///
/// # Layout
/// `dq_acc: [B, H, Nq', D]` by rows, `dq: [B, H, Nq, D]`.
///
/// # Thread mapping
/// As for [`prepare`](super::prepare::prepare); no block is needed for padded rows alone.
///
/// # Safety
/// As for [`prepare`](super::prepare::prepare).
#[inline(always)]
pub unsafe fn convert<T: Chunk>(args: &BackwardArgs) {
    let head = Head::of_block_z(&args.forward);
    let (lane, row) = (thread::thread_idx_x() % ROW_THREADS, thread::thread_idx_x() / ROW_THREADS);
    let i = thread::block_idx_x() * ROWS + row;
    if i >= head.seq_q {
        return;
    }
    let d = args.forward.shape.head_dim;
    // SAFETY: the buffers have the shapes stated above.
    let (dq_acc, dq) =
        unsafe { (args.steps.dq_acc.view::<f32>(), args.gradients.dq.buffer.view_mut::<T>()) };
    let (from, to) = (head.padded_row(i) * d as u64, head.query(&args.gradients.dq, i));
    for column in (lane * T::ELEMENTS..d).step_by((ROW_THREADS * T::ELEMENTS) as usize) {
        let mut values = [0.0; MAX_ELEMENTS];
        for quarter in 0..T::ELEMENTS as usize / 4 {
            let four: [u32; 4] = dq_acc.read_as(from + column as u64 + 4 * quarter as u64);
            for e in 0..4 {
                values[4 * quarter + e] = f32::from_bits(four[e]) * args.forward.scores.scale;
            }
        }
        dq.write_as(to + column as u64, T::pack(values));
    }
}

entries! {
    /// Instances of [`convert()`].
    pub static ENTRIES: BackwardArgs => "sm_80", threads THREADS, min_blocks 1;
    backward_convert: T in [f32, f16, bf16] = convert::<T>;
}
