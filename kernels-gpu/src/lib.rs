//! Attention kernels, one file a rung. Read them in this order:
//!
//! | rung | file | the idea it adds |
//! |---|---|---|
//! | `naive` | `naive.rs` | attention as the textbook has it; the N x N matrix in memory |
//! | `standard` | `standard.rs` | the same three steps, done well: the fair baseline (sm_80) |
//! | `flash_tiled` | `flash_tiled.rs` | tiles in shared memory, online softmax, no N x N matrix |
//! | `flash_mma` | `flash_mma.rs` | both products on the tensor cores, weights stay in registers |
//! | `flash_swizzled` | `flash_swizzled.rs` | tiles without bank conflicts and without padding |
//! | `flash_async` | `flash_async.rs` | the next tile arrives while this one is computed with |
//! | `flash_pipelined` | `flash_pipelined.rs` | copies ahead, two fragments a warp, nothing done in vain (sm_80) |
//! | `flash_tf32` | `flash_tf32.rs` | f32 on the tensor cores: each product is three of tf32 (sm_80) |
//! | `flash_hopper` | `flash_hopper.rs` | copies, products and softmax at the same time (sm_90a) |
//!
//! Projections have a ladder of their own:
//!
//! | rung | file | the idea it adds |
//! |---|---|---|
//! | `linear_naive` | `linear.rs` | a thread per element |
//! | `linear_tiled` | `linear.rs` | tiles in shared memory, pieces in registers |
//! | `linear_mma` | `linear_mma.rs` | tensor cores, slices brought while others are used (sm_80) |
//! | `linear_hopper` | `linear_hopper.rs` | two blocks share what one of them fetches (sm_90a) |
//!
//! `weights.rs` computes the attention weights that a flash kernel did not keep; `probe.rs` is
//! there for tests.
//!
//! What several rungs share stands in a module of its own: [`args`] (what a kernel is
//! given), [`entry`] (how a generic kernel becomes entries), [`head`] (which rows a block works
//! on), [`policy`] (which keys a row sees), [`dropout`] (Philox), [`softmax`] (the arithmetic of the online softmax),
//! [`gemm`] (matrix products: what the projections and standard attention are made of),
//! [`pipeline`] (a ring of stages between a producer and consumers), [`schedule`] (which
//! block does which tile).

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, stdarch_nvptx))]

pub mod args;
pub mod chunk;
pub mod constants;
pub mod dropout;
pub mod entry;
pub mod flash_async;
pub mod flash_hopper;
pub mod flash_mma;
pub mod flash_pipelined;
pub mod flash_swizzled;
pub mod flash_tf32;
pub mod flash_tiled;
pub mod fragment;
pub mod gemm;
pub mod head;
pub mod linear;
pub mod linear_hopper;
pub mod linear_mma;
pub mod naive;
pub mod online;
pub mod pipeline;
pub mod policy;
pub mod probe;
pub mod queue;
pub mod schedule;
pub mod softmax;
pub mod standard;
pub mod tile;
pub mod weights;

simt::declare_dynamic_shared!();

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: stops the launch with an error, which is what a panic is here.
    unsafe { core::arch::nvptx::trap() }
}

/// The PTX of every entry, as text, compressed: one zstd stream. A line `// module sm_80`
/// stands before the text of each module.
#[cfg(feature = "ptx")]
pub static PTX: &[u8] = include_bytes!("../ptx/modules.ptx.zst");

/// The tables of all rungs.
#[cfg(not(target_arch = "nvptx64"))]
const TABLES: &[&[entry::Entry]] = &[
    naive::SCORES,
    naive::SOFTMAX,
    naive::OUTPUT,
    standard::PRODUCTS,
    standard::TILED_PRODUCTS,
    standard::softmax::ENTRIES,
    flash_tiled::ENTRIES,
    flash_mma::ENTRIES,
    flash_swizzled::ENTRIES,
    flash_swizzled::TURING,
    flash_async::ENTRIES,
    flash_pipelined::FOUR_WARPS,
    flash_pipelined::EIGHT_WARPS,
    flash_tf32::ENTRIES,
    linear::NAIVE,
    linear::TILED,
    linear_mma::ENTRIES,
    linear_hopper::ENTRIES,
    weights::ENTRIES,
    probe::ENTRIES,
    flash_hopper::THREE_CONSUMERS,
    flash_hopper::TWO_CONSUMERS,
];

/// Every entry that can be launched.
#[cfg(not(target_arch = "nvptx64"))]
pub fn entries() -> impl Iterator<Item = &'static entry::Entry> {
    TABLES.iter().copied().flatten()
}

/// The entry of that name.
#[cfg(not(target_arch = "nvptx64"))]
#[must_use]
pub fn find(symbol: &str) -> Option<&'static entry::Entry> {
    entries().find(|e| e.symbol == symbol)
}
