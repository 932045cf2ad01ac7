//! bias: the gradient of a bias, for calls that ask for it.
//!
//! ```text
//! dB[b, h, i, j] = P ∘ (dP - delta)        summed over the batch entries and heads that share an element
//! ```
//!
//! A bias joins the score after the cap, so its gradient is dS before the cap's slope. It has one
//! element per pair of row and key, for which a rung with P and dS on the chip has no place. So the
//! gradient is a step of its own beside any rung, with the arithmetic of `backward_naive`.
//!
//! Memory: reads Q, K, dO and V once per 16 rows or keys, writes the gradient once. Measured: not measured
//! yet.
//!
//! Source: the derivation in `docs/backward.md`.

use half::{bf16, f16};
use simt::scalar::Scalar;

use super::backward_naive::{TILE, place, products};
use crate::{
    args::BackwardArgs,
    entries,
    parts::{
        gradient::{self, Row},
        head::Head,
        policy::Policy,
        schedule::divide,
    },
};

/// The gradient of the bias.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `d_o: [B, H, Nq, Dv]`, `k: [B, Hkv, Nk, D]`, `v: [B, Hkv, Nk, Dv]`,
/// `d_bias: [B or 1, H or 1, Nq, Nk]`; a stride of 0 over entries or heads says that all share an element.
///
/// # Thread mapping
/// Blocks of 16 x 16 threads; `x` counts tiles of keys, and with each of them tiles of rows, `y` and `z`
/// the matrices of the bias.
///
/// # Safety
/// The buffers of `args` must have these shapes, and [`prepare`](super::prepare) must have run.
#[inline(always)]
pub unsafe fn bias<T: Scalar>(args: &BackwardArgs) {
    let (forward, to) = (&args.forward, &args.gradients.d_bias);
    let shape = &forward.shape;
    let own = |stride: u64, extent: u32| if stride == 0 { 1 } else { extent };
    let (entries, heads) = (own(to.stride_b, shape.batch), own(to.stride_h, shape.heads));
    let number = Head::number_of_block();
    let (i, j) = place(shape);
    if number >= entries * heads || i >= shape.seq_q || j >= shape.seq_k {
        return;
    }
    let (entry, own_head) = divide(number, heads);
    // Batch entries and heads that share the element: one, or all.
    let sharing_entries = divide(shape.batch, entries).0;
    let sharing_heads = divide(shape.heads, heads).0;
    let mut sum = 0.0;
    for b in entry..entry + sharing_entries {
        for h in own_head..own_head + sharing_heads {
            let head = Head::new(forward, b, h);
            // SAFETY: the buffers have the shapes stated above; row and key exist.
            let (policy, row, products) = unsafe {
                (
                    Policy::new(forward, head),
                    Row::read(args, head, i),
                    products::<T>(args, &head, (i, j)),
                )
            };
            let scale = forward.scores.scale;
            let (_, d_shaped) = gradient::of_shaped::<T>(&policy, scale, row, (i, j), products);
            sum += d_shaped;
        }
    }
    // SAFETY: the gradient has the shape stated above; this thread alone has this element.
    let view = unsafe { to.buffer.view_mut::<T>() };
    let first = entry as u64 * to.stride_b + own_head as u64 * to.stride_h;
    view.write(first + i as u64 * to.stride_q + j as u64 * to.stride_k, T::from_f32(sum));
}

entries! {
    /// Instances of [`bias()`].
    pub static ENTRIES: BackwardArgs => "sm_75", threads TILE * TILE, min_blocks 1;
    backward_bias: T in [f32, f16, bf16] = bias::<T>;
}
