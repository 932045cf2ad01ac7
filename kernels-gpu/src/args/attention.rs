//! The arguments of the forward attention kernels.

use super::{Buffer, Tensor};

/// The arguments of every attention kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionArgs {
    /// Inputs and outputs.
    pub tensors: Tensors,
    /// Where packed sequences begin.
    pub sequences: Sequences,
    /// Masks.
    pub keys: Keys,
    /// Memory beside inputs and outputs.
    pub scratch: Scratch,
    /// Changes to scores and weights.
    pub scores: Scores,
    /// Extents.
    pub shape: Shape,
}

/// Inputs and outputs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Tensors {
    /// Queries, `[B, H, Nq, D]`.
    pub q: Tensor,
    /// Keys, `[B, Hkv, Nk, D]`.
    pub k: Tensor,
    /// Values, `[B, Hkv, Nk, Dv]`.
    pub v: Tensor,
    /// Output, `[B, H, Nq, Dv]`.
    pub o: Tensor,
    /// Log-sum-exp of the scaled scores of each row, natural log: f32 `[B, H, Nq]`.
    pub lse: Buffer,
}

/// Sequences of lengths of their own, packed one after the other: batch entry `b` has the rows from
/// `cu_seqlens[b]` to before `cu_seqlens[b + 1]`. Read if the constant `varlen` is on. Then Q and O are
/// `[total_q, H, D]`, K and V `[total_k, Hkv, D]` with a stride of 0 from one batch entry to the next,
/// and the LSE is `[H, total_q]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequences {
    /// Of Q and O: u32 `[B + 1]`, ascending.
    pub cu_seqlens_q: Buffer,
    /// Of K and V, likewise.
    pub cu_seqlens_k: Buffer,
}

/// The masks, which hide keys from rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys {
    /// Padding mask, u8 `[B, Nk]`, 0 = hidden. Read if the constant `padding` is on.
    pub padding: Buffer,
    /// Keys before its own position that a row sees. Read if the constant `left` is on.
    pub left: u32,
    /// Keys after its own position that a row sees. Read if the constant `causal` is 2.
    pub right: u32,
}

/// Memory beside inputs and outputs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Scratch {
    /// Scratch or result of the kernels that materialise the weights, `[B, H, Nq, Nk]`.
    pub weights: Buffer,
    /// Queues of kernels whose blocks take task after task,
    /// [`QUEUE_WORDS`](crate::parts::queue::QUEUE_WORDS) u32; else empty. They count what was asked
    /// for: zero before a launch, and again after it.
    pub queue: Buffer,
}

/// Changes to scores, and to the weights that they become.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Scores {
    /// The softmax scale: for kernels that keep scores in natural units.
    pub scale: f32,
    /// The softmax scale times log2(e): scores go through exp2.
    pub scale_log2: f32,
    /// The cap of scores: `s` becomes `cap * tanh(s / cap)`. Read if the constant `softcap` is on.
    pub softcap: f32,
    /// `1 / softcap`.
    pub inverse_softcap: f32,
    /// Slopes of ALiBi, f32 `[B or 1, H]`: `-slope * |i + Nk - Nq - j|` joins a score. Read if the
    /// constant `alibi` is on.
    pub alibi: Slopes,
    /// A matrix added to the scores, `[B or 1, H or 1, Nq, Nk]` in the storage type. Read if the constant
    /// `bias` is on.
    pub bias: Bias,
    /// A score for each head that joins a row's sum and has no value, f32 `[H]`. Read if the
    /// constant `sinks` is on.
    pub sinks: Buffer,
    /// Dropout of weights. Read if the constant `dropout` is on.
    pub dropout: DropoutArgs,
}

/// A number for each head.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slopes {
    /// The memory, f32; the heads of a batch entry are neighbours.
    pub buffer: Buffer,
    /// Elements from one batch entry to the next; 0 if all have the same.
    pub stride_b: u64,
}

/// A matrix `[Nq, Nk]` for each head, seen through strides in elements; a stride of 0 repeats what is
/// there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bias {
    /// The memory behind it.
    pub buffer: Buffer,
    /// From one batch entry to the next.
    pub stride_b: u64,
    /// From one head to the next.
    pub stride_h: u64,
    /// From one row to the next.
    pub stride_q: u64,
    /// From one key to the next.
    pub stride_k: u64,
}

/// Dropout of attention weights, by Philox 4x32-10 (see `dropout.rs`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DropoutArgs {
    /// Key of the generator.
    pub seed: u64,
    /// An entry is dropped when its 32-bit draw is below this; 0 drops nothing.
    pub threshold: u32,
    /// The factor of kept weights: `1 / (1 - p)`.
    pub rescale: f32,
}

/// Extents of the tensors.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// Batch entries, B.
    pub batch: u32,
    /// Heads, H.
    pub heads: u32,
    /// Query rows of a head, Nq; with packed sequences, the rows of the longest.
    pub seq_q: u32,
    /// Key and value rows of a head, Nk, likewise.
    pub seq_k: u32,
    /// Query rows over all packed sequences. Read if the constant `varlen` is on.
    pub total_q: u32,
    /// Columns of Q and K, D: for kernels that are not made for one head dim.
    pub head_dim: u32,
    /// Columns of V and O, Dv, likewise.
    pub head_dim_v: u32,
}
