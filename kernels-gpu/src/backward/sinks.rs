//! sinks: the gradient of the sinks, for calls that ask for it.
//!
//! ```text
//! dsink[h] = - sum over b and i of exp(sink[h] - LSE[b, h, i]) delta[b, h, i]
//! ```
//!
//! A sink is a key whose score is given and whose value is 0: its dP is 0, and its weight is
//! `exp(sink - LSE)`. So its gradient needs only the two numbers that `prepare` leaves per row.
//!
//! Memory: reads two numbers per row. Shared memory: one number per warp. Measured: not measured yet.
//!
//! Source: the derivation in `docs/backward.md`.

use core::f32::consts::LOG2_E;

use simt::{math, shared::Shared, thread, warp};

use crate::{args::BackwardArgs, entries, parts::head::Head};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Dynamic shared memory of a block in bytes.
pub const SHARED_BYTES: u32 = THREADS / warp::LANES * size_of::<f32>() as u32;

/// The gradient of the sinks: the same bits each time.
///
/// # Layout
/// `delta, minus_lse_log2: [B, H, Nq']`, `sinks, d_sinks: f32 [H]`.
///
/// # Thread mapping
/// One block of [`THREADS`] threads per head along x; a thread takes every [`THREADS`]-th row.
///
/// # Shared memory
/// [`SHARED_BYTES`], dynamic.
///
/// # Safety
/// The buffers of `args` must have these shapes, and [`prepare`](super::prepare) must have run.
#[inline(always)]
pub unsafe fn sinks(args: &BackwardArgs) {
    let (forward, h) = (&args.forward, thread::block_idx_x());
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    let (delta, minus_lse_log2, sinks, d_sinks, of_warps) = unsafe {
        (
            args.steps.delta.view::<f32>(),
            args.steps.minus_lse_log2.view::<f32>(),
            forward.scores.sinks.view::<f32>(),
            args.gradients.d_sinks.view_mut::<f32>(),
            Shared::<f32>::dynamic(0, const { THREADS / warp::LANES }),
        )
    };
    let sink = sinks.read(h as u64) * LOG2_E;
    let mut sum = 0.0;
    for b in 0..forward.shape.batch {
        let head = Head::new(forward, b, h);
        for i in (thread::thread_idx_x()..head.seq_q).step_by(THREADS as usize) {
            let row = head.padded_row(i);
            // A row that sees nothing, the sink neither, has an LSE of +inf and a weight of 0.
            let weight = math::exp2(sink + minus_lse_log2.read(row));
            sum = math::fma(-weight, delta.read(row), sum);
        }
    }
    let sum = warp::reduce_add::<32>(sum);
    if warp::lane_id() == 0 {
        of_warps.write(warp::warp_id(), sum);
    }
    // Hazard: the first thread reads what other warps have written.
    thread::sync_threads();
    if thread::thread_idx_x() == 0 {
        let mut total = 0.0;
        for index in 0..THREADS / warp::LANES {
            total += of_warps.read(index);
        }
        d_sinks.write(h as u64, total);
    }
}

entries! {
    /// Instances of [`sinks()`].
    pub static ENTRIES: BackwardArgs => "sm_75", threads THREADS, min_blocks 1;
    backward_sinks: T in [f32] = sinks;
}
