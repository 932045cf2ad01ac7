//! flash_swizzled: tiles without bank conflicts and without padding.
//!
//! The idea: what matters to a matrix load is that the eight rows it reads lie in eight
//! different groups of banks. Exchanging the 16-byte chunks of each row by the row's number
//! does that and costs nothing, while padding each row costs memory.
//!
//! Change from flash_mma: the type of the layout. The kernel is the same function.
//!
//! ```text
//! chunk c of row r of a tile with rows of 8 chunks stands at   c ^ (r % 8)
//!
//!              bank groups  0 1 2 3 4 5 6 7
//! row 0                     0 1 2 3 4 5 6 7
//! row 1                     1 0 3 2 5 4 7 6      chunk 0, for example, is in
//! row 2                     2 3 0 1 6 7 4 5      another group in every row
//! row 3                     3 2 1 0 7 6 5 4
//! ```
//!
//! | tile | passes of a matrix load | shared bytes at D = 64, 128 |
//! |---|---|---|
//! | plain rows | 8 for each matrix of 8 x 8 | 24,576, 49,152 |
//! | padded rows (flash_mma) | 1 | 27,648, 52,224 |
//! | swizzled rows | 1 | 24,576, 49,152 |
//!
//! The passes are counted by the emulator (`kernels-gpu/tests/layouts.rs`). A tile that begins
//! at a multiple of 128 bytes and has whole rows is also what cp.async, TMA and wgmma like
//! best: the rungs that follow need it.
//!
//! On sm_75 the same source runs with the older instruction, f16 only.
//!
//! Measured: 0.290 ms (H100; f16, batch 4, 12 heads, N 2048, D 64). Limits: as flash_mma, but
//! for the padding.
//!
//! Source: NVIDIA, "CUTLASS: Efficient GEMM in CUDA" (swizzled layouts); PTX ISA, "ldmatrix".

use half::{bf16, f16};
use simt::{
    layout::Swizzled,
    mma::{Ampere, Turing},
};

use crate::{
    args::AttentionArgs,
    entries,
    forward::flash_mma,
    parts::attend::{BC, BR, THREADS},
};

/// Dynamic shared memory of a block in bytes: Q, K and V.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    (BR + 2 * BC) * d as u32 * 2
}

entries! {
    /// Instances for sm_80 and later.
    pub static ENTRIES: AttentionArgs => "sm_80", threads THREADS, min_blocks 2;
    flash_swizzled: T in [f16, bf16], d D in [64, 128] =
        flash_mma::flash_mma::<T, Ampere, Swizzled<D>, D, { D / 8 }>;
}
entries! {
    /// Instances for sm_75.
    pub static TURING: AttentionArgs => "sm_75", threads THREADS, min_blocks 2;
    flash_turing: T in [f16], d D in [64, 128] =
        flash_mma::flash_mma::<T, Turing, Swizzled<D>, D, { D / 8 }>;
}
