//! The backward ladder: the gradients of attention, one file per rung. Read them in this order:
//!
//! | rung | the idea it adds |
//! |---|---|
//! | [`backward_naive`] | the formulas; P and dS in memory |
//! | [`backward_standard`] | the same products on the best GEMMs (sm_80): the fair baseline |
//! | [`backward_tiled`] | P computed again from the LSE, one tile at a time; no N x N matrix |
//! | [`backward_mma`] | all five products on the tensor cores, each computed once (sm_80) |
//! | [`backward_hopper`] | transposed scores, copies and products at the same time (sm_90a) |
//!
//! [`prepare`] is the first step of every rung, [`convert`] the last step of the rungs that sum dQ in memory.
//! [`bias`] and [`sinks`] are steps of calls that ask for these gradients. [`order`] is for calls that want the same bits
//! each time.
//!
//! With `P = exp(S - LSE)`, the weights before dropout, and `Z` what dropout multiplies them by (0 or
//! `1 / (1 - p)`), the gradients are
//!
//! ```text
//! delta = rowsum(dO ∘ O)
//! dV    = (P ∘ Z)ᵀ dO
//! dP    = dO Vᵀ ∘ Z
//! dS    = P ∘ (dP - delta)              times 1 - tanh² under a cap
//! dQ    = dS K * scale
//! dK    = dSᵀ Q * scale                 summed over the heads that share K
//! ```
//!
//! Source: Dao et al., "FlashAttention", 2022, appendix B.2 and algorithm 4; Dao,
//! "FlashAttention-2", 2023, section 3.1.2.

pub mod backward_hopper;
pub mod backward_mma;
pub mod backward_naive;
pub mod backward_standard;
pub mod backward_tiled;
pub mod bias;
pub mod convert;
pub mod order;
pub mod prepare;
pub mod sinks;

/// Rows of a head in scratch memory are padded to a multiple of this: no rung's tile of queries is
/// longer.
pub const ROW_PADDING: u32 = 128;

/// Rows of a head in scratch memory, for `seq_q` rows.
#[inline(always)]
#[must_use]
pub const fn padded(seq_q: u32) -> u32 {
    seq_q.next_multiple_of(ROW_PADDING)
}
