//! The last step: dQ in the storage type, by rows, from sums in the order of registers.
//!
//! Of the sums 64 neighbouring bytes are eight columns of two rows, so each thread reads 64 bytes and writes
//! 16 to each row. Eight neighbouring threads write 128 bytes of a row: writes of less than a sector (32
//! bytes) would read it first. All reads come before the first write, which the compiler may not move them
//! across.
//!
//! Memory: reads the sums and writes dQ once. No shared memory. Measured: 242 MB in
//! 51.5 µs (D 128, 16k tokens, hidden 2048, f16, one H200); reads and writes in turn took 160 µs.

use half::{bf16, f16};
use simt::{thread, unroll, warpgroup, wgmma::Operand};

use super::{Geometry, Hopper, consumer::part_of, tiles::DQ_ELEMENTS};
use crate::{
    args::BackwardArgs,
    entries,
    parts::{columns::Columns, head::Head},
};

/// Threads of a block.
pub const THREADS: u32 = warpgroup::THREADS;
/// Groups of eight columns of a consumer's part.
const GROUPS: u32 = 8;
/// Elements of a group: 16 bytes of each thread of the consumer.
const GROUP_ELEMENTS: u32 = warpgroup::THREADS * 4;
/// Pairs of rows that a thread converts, 8 columns of each.
const PASSES: usize = 2;

const _: () = assert!(DQ_ELEMENTS == PASSES as u32 * THREADS * 16);

/// `dQ = dq_acc * scale`.
///
/// # Layout
/// `dq: [B, H, Nq, D]`; `dq_acc: [B, H, Nq', D]`, of each head 64 x 64 elements of a tile's part after
/// another: of those, 16 bytes of each thread for each 8 columns, as
/// [`wgmma`](simt::wgmma) has an accumulator's registers.
///
/// # Thread mapping
/// A block for each part; `x` counts them over a head, `y` and `z` heads.
///
/// # Safety
/// The buffers of `args` must have these shapes, and the main kernel must have run.
#[inline(always)]
pub unsafe fn convert<T: Operand, G: Geometry>(args: &BackwardArgs) {
    let Some(head) = Head::of_block_yz(&args.forward) else { return };
    let (tile, part) = (
        thread::block_idx_x() / const { G::TILES.dq_parts() },
        thread::block_idx_x() % const { G::TILES.dq_parts() },
    );
    let (first_row, first_column) = G::TILES.dq_part(part);
    let column = first_column + thread::thread_idx_x() % GROUPS * 8;
    // SAFETY: the buffers have the shapes stated above.
    let (dq_acc, dq) =
        unsafe { (args.steps.dq_acc.view::<f32>(), args.gradients.dq.buffer.view_mut::<T>()) };
    let part = part_of::<G>(&head, tile, part);
    let group = part + (thread::thread_idx_x() % GROUPS * GROUP_ELEMENTS) as u64;
    // Row 8 of 16 is the pair of row 0.
    let pair = |pass: usize| thread::thread_idx_x() / GROUPS + pass as u32 * (THREADS / GROUPS);
    let mut sums = [[[0u32; 4]; 4]; PASSES];
    unroll!(for PASS in 0..2 {
        unroll!(for LANE in 0..4 {
            sums[PASS][LANE] = dq_acc.read_as(group + (pair(PASS) * 16 + LANE as u32 * 4) as u64);
        });
    });
    let scale = args.forward.scores.scale;
    unroll!(for PASS in 0..2 {
        let i = tile * G::TILES.rows + first_row + pair(PASS) / 8 * 16 + pair(PASS) % 8;
        unroll!(for R in 0..2 {
            let i = i + 8 * R as u32;
            if i < head.seq_q && Columns::of_keys().has(column) {
                let packed = sums[PASS].map(|four| {
                    let [left, right] = [0, 1].map(|e| f32::from_bits(four[2 * R + e]) * scale);
                    T::pack(left, right)
                });
                dq.write_as(head.query(&args.gradients.dq, i) + column as u64, packed);
            }
        });
    });
}

entries! {
    /// Instances of [`convert()`].
    pub static ENTRIES: BackwardArgs => "sm_90a", threads THREADS, min_blocks 1;
    backward_hopper_convert: T in [f16, bf16], d D in [64, 128] =
        convert::<T, Hopper<{ D as u32 }, { D as u32 }, false>>;
}
