//! flash_mma: both products on the tensor cores.
//!
//! The idea: a warp multiplies 16 x 16 by 16 x 8 in one instruction. Scores and output live
//! in the instruction's own fragments, and the weights go from the first product into
//! the second without leaving their registers.
//!
//! Change from flash_tiled: tiles stay in the storage type; each warp has 16 rows of
//! its own, all keys and all columns, so that P is never shared and needs no memory;
//! `ldmatrix` brings the operands.
//!
//! ```text
//! load Q                                   BR x D, once
//! m = -inf, l = 0, acc_o = 0
//! for each tile of BC keys:
//!     load K, V                            BC x D each
//!     S = Q Kᵀ                             16 x BC per warp: D/16 * BC/8 instructions
//!     hide; m_new = max(m, rowmax(S)); alpha = exp2(m - m_new)
//!     P = exp2(S - m_new); l = l * alpha + rowsum(P)
//!     acc_o = acc_o * alpha + P V          as many instructions again
//! O = acc_o / l; LSE = m + log(l)
//! ```
//!
//! ```text
//!             BC keys                  warp w: rows 16 w .. 16 w + 16
//!          +-----------+               lane 4 g + t: rows g, g + 8; of every 8 keys
//!  warp 0  | 16 x BC   |               and columns 2 t, 2 t + 1
//!  warp 1  |           |
//!    ...   +-----------+
//! ```
//!
//! Memory: Q, K and V tiles of 16-bit elements, rows padded by 16 bytes so that eight rows
//! of a matrix load meet eight groups of banks. D = 64: 27,648 bytes, D = 128: 52,224.
//! A warp loads 256 bytes of shared memory for each instruction, 16 FLOP per byte: 16 rows
//! are few.
//!
//! Measured: 0.291 ms, flash_turing 0.320 (H100; f16, batch 4, 12 heads, N 2048, D 64).
//! Limits: loads and arithmetic take turns, with two barriers per tile; every score goes through
//! a mask; padding costs memory (see flash_swizzled).
//!
//! Source: Dao, "FlashAttention-2", 2023, section 3.3 (rows split between warps, not keys);
//! NVIDIA, PTX ISA, "Matrix Fragments for mma.m16n8k16".

use half::{bf16, f16};
use simt::{
    layout::{Padded, TileLayout},
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, warp,
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        attend::{FragmentRows, SharedTiles},
        columns::Columns,
        fragment::{self, SharedQueries},
        head::Head,
        online,
        policy::Policy,
        tile,
    },
};

pub use crate::parts::attend::{BC, BR, THREADS};

/// Dynamic shared memory of a block in bytes: Q, K and V.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    (BR + 2 * BC) * (d as u32 + 8) * 2
}

/// Flash attention forward on tensor cores `C`, tiles laid out as `L`.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// A block per tile of BR rows, head and batch entry, along `x`; within it as in the file's
/// header.
///
/// # Shared memory
/// Three tiles, dynamic: Q, K, V.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are
/// multiples of 16 bytes, and the launch the threads and shared memory stated here.
#[inline(always)]
pub unsafe fn flash_mma<
    T: Scalar,
    C: TensorCore<T>,
    L: TileLayout,
    const D: usize,
    const COLUMN_TILES: usize,
>(
    args: &AttentionArgs,
) {
    const { assert!(D % 32 == 0 && D == 8 * COLUMN_TILES) };

    // Who am I.
    let (head, q_tile) = Head::of_block(args, args.shape.seq_q.div_ceil(BR));
    let first_row = q_tile * BR;
    if head.ends_before(first_row) {
        return;
    }
    let warp_row = warp::warp_id() * fragment::ROWS;
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    let (policy, q, k, v, q_smem, k_smem, v_smem) = unsafe {
        (
            Policy::new(args, head),
            head.queries::<T>(&args.tensors.q).of_columns(Columns::of_keys()),
            head.keys::<T>(&args.tensors.k).of_columns(Columns::of_keys()),
            head.keys::<T>(&args.tensors.v).of_columns(Columns::of_values()),
            Shared::<T>::dynamic(0, L::len(BR)),
            Shared::<T>::dynamic(L::len(BR) * 2, L::len(BC)),
            Shared::<T>::dynamic(L::len(BR + BC) * 2, L::len(BC)),
        )
    };
    let queries = SharedQueries::<T, L>::new(q_smem, warp_row);

    // Load Q.
    tile::load::<T, L, D, BR, THREADS>(&q, first_row, q_smem);

    let mut warp = FragmentRows::<COLUMN_TILES>::new(first_row + warp_row);
    for kv_tile in policy.key_tiles(first_row, first_row + BR, BC) {
        let first_key = kv_tile * BC;
        // Hazard: the tile before may still be read while this one is written.
        thread::sync_threads();
        tile::load::<T, L, D, BC, THREADS>(&k, first_key, k_smem);
        tile::load::<T, L, D, BC, THREADS>(&v, first_key, v_smem);
        // Hazard: tiles are read by threads that did not write them (Q too, at first).
        thread::sync_threads();
        let tiles = SharedTiles { q: queries, k: k_smem, v: v_smem, first_key };
        warp.attend::<T, C, L, D>(&policy, tiles);
    }

    // Normalise, store O and LSE.
    let first_row = warp.first_row;
    // SAFETY: the buffers have the shapes that `args` says.
    unsafe {
        online::store::<T, C, COLUMN_TILES>(args, &policy, first_row, warp.acc_o, &warp.rows);
    };
}

entries! {
    /// Instances of [`flash_mma`] for sm_80 and later.
    pub static ENTRIES: AttentionArgs => "sm_80", threads THREADS, min_blocks 2;
    flash_mma: T in [f16, bf16], d D in [64, 128] =
        flash_mma::<T, Ampere, Padded<D>, D, { D / 8 }>;
}
