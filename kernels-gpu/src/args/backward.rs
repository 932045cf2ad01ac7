//! Arguments of the backward ladder.

use super::{AttentionArgs, Bias, Buffer, Tensor};

/// Arguments of every kernel of the backward pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct BackwardArgs {
    /// The gradient of O, and the gradients of Q, K and V.
    pub gradients: Gradients,
    /// Memory that the steps of a call hand on.
    pub steps: BackwardScratch,
    /// The call whose gradients are wanted. All of its tensors are read, O and the LSE too; its
    /// scratch is the backward pass's own: `weights` is P after dropout for the kernels that
    /// materialise it, `queue` the tickets and turns of [`order`](crate::backward::order), which the
    /// first step clears where the constant `ordered` is on.
    pub forward: AttentionArgs,
}

/// The gradient of the output, and the gradients of the inputs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Gradients {
    /// Gradient of O, `[B, H, Nq, Dv]`.
    pub d_o: Tensor,
    /// Gradient of Q, `[B, H, Nq, D]`.
    pub dq: Tensor,
    /// Gradient of K, `[B, Hkv, Nk, D]`: the sum over the heads of Q that share it.
    pub dk: Tensor,
    /// Gradient of V, `[B, Hkv, Nk, Dv]`, likewise.
    pub dv: Tensor,
    /// Gradient of the bias, seen as the bias is; empty unless it is asked for.
    pub d_bias: Bias,
    /// Gradient of the sinks, f32 `[H]`; empty unless it is asked for.
    pub d_sinks: Buffer,
}

/// Memory that the steps of a call hand on. Rows are padded, to `Nq'`: a multiple of
/// [`ROW_PADDING`](crate::backward::ROW_PADDING), of the longest of packed sequences.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct BackwardScratch {
    /// `rowsum(dO ∘ O)`, f32 `[B, H, Nq']`; 0 in rows past the last and in rows that see no key.
    pub delta: Buffer,
    /// Minus the LSE in units of log2(e), f32 `[B, H, Nq']`: a fused product adds it, and negates nothing.
    /// Rows past the last and rows that see no key have -inf, so that every weight `exp2(s - lse)` of
    /// theirs is 0.
    pub minus_lse_log2: Buffer,
    /// Gradient of Q without the softmax scale, f32 `[B, H, Nq', dq_columns]`, 0 after the first step;
    /// empty for kernels that do not sum dQ in memory.
    pub dq_acc: Buffer,
    /// Gradient of the scores, `[B, H, Nq, Nk]` in the storage type, for the kernels that
    /// materialise it; else empty.
    pub d_scores: Buffer,
    /// Columns of a row of `dq_acc`: as many as the kernel's tiles have, D or more.
    pub dq_columns: u32,
    /// Rows of K and V over all packed sequences, and beyond the last. Read if the constant `varlen` is
    /// on.
    pub total_k: u32,
}
