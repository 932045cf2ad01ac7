//! convert: the last step of the rungs that sum dQ in f32 in memory.
//!
//! ```text
//! dQ = dq_acc * scale, in the storage type
//! ```
//!
//! The sums lie in the order in which mma.sync leaves them in registers.
//!
//! Memory: reads the sums and writes dQ once. No shared memory. Measured: not measured yet.

use half::{bf16, f16};
use simt::thread;

use super::prepare::{ROW_THREADS, ROWS, THREADS};
use crate::{
    args::BackwardArgs,
    entries,
    parts::{chunk::Chunk, head::Head},
};

/// The last step of a backward pass.
///
/// # Layout
/// `dq: [B, H, Nq, D]`; `dq_acc: [B, H, Nq', dq_columns]` in the order of registers: 16 rows and 8 columns are 128
/// neighbours, of which lane `4 g + t` has the four at `32 e` and its number: rows `g` and `g + 8`, `e`
/// below 2 and above, columns `2 t` and `2 t + 1`, `e` even and odd. D is a multiple of 8.
///
/// # Thread mapping
/// As for [`prepare`](super::prepare::prepare), without blocks for padded rows alone.
///
/// # Safety
/// As for [`prepare`](super::prepare::prepare).
#[inline(always)]
pub unsafe fn convert<T: Chunk>(args: &BackwardArgs) {
    const { assert!(T::ELEMENTS == 8, "a chunk is a row of a fragment") };
    let Some(head) = Head::of_block_yz(&args.forward) else { return };
    let (lane, row) = (thread::thread_idx_x() % ROW_THREADS, thread::thread_idx_x() / ROW_THREADS);
    let i = thread::block_idx_x() * ROWS + row;
    if i >= head.seq_q {
        return;
    }
    let d = args.forward.shape.head_dim;
    // SAFETY: the buffers have the shapes stated above.
    let (dq_acc, dq) =
        unsafe { (args.steps.dq_acc.view::<f32>(), args.gradients.dq.buffer.view_mut::<T>()) };
    let to = head.query(&args.gradients.dq, i);
    let (first_row, g, lower) = (i - i % 16, i % 8, i % 16 / 8);
    let from =
        head.padded_row(first_row) * args.steps.dq_columns as u64 + (64 * lower + 4 * g) as u64;
    let scale = args.forward.scores.scale;
    for column in (lane * T::ELEMENTS..d).step_by((ROW_THREADS * T::ELEMENTS) as usize) {
        let fragment = from + column as u64 / 8 * 128;
        let [even, odd] = [0, 32]
            .map(|e| dq_acc.read_as::<[u32; 4]>(fragment + e).map(|x| f32::from_bits(x) * scale));
        let values = [even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]];
        dq.write_as(to + column as u64, T::pack(values));
    }
}

entries! {
    /// Instances of [`convert()`].
    pub static ENTRIES: BackwardArgs => "sm_80", threads THREADS, min_blocks 1;
    backward_convert: T in [f16, bf16] = convert::<T>;
}
