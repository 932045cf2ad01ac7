//! The GPU programming model under one vocabulary, on two targets.
//!
//! A kernel is written once against this crate. Compiled for `nvptx64-nvidia-cuda`,
//! every name here is the PTX instruction of the same meaning. Compiled for the
//! host, the same names drive the [`emulator`]: each lane of a block is a coroutine,
//! barriers and warp collectives suspend it, and every access to shared or global memory
//! is checked (bounds, alignment), shared memory for races and uninitialised reads too.
//!
//! The names follow rust-cuda's `cuda_std` where it has them: a reader of The Rust
//! CUDA Guide finds [`thread::thread_idx_x`], [`thread::sync_threads`],
//! [`warp::lane_id`] and [`warp::sync_warp`] here.
//!
//! | module | contents |
//! |---|---|
//! | [`thread`] | indices of lane and block, block barrier |
//! | [`warp`] | lane id, warp barrier, shuffles, votes, reductions |
//! | [`shared`] | views of shared memory, dynamic and static |
//! | [`global`] | views of global memory |
//! | [`memory`] | the types that can be loaded and stored in one instruction |
//! | [`math`] | fma, exp2, log2, rcp, max with the same meaning on both targets |
//! | [`scalar`] | the storage types f32, f16 and bf16 |
//! | [`mma`] | products of small matrices on tensor cores |
//! | [`matrix`] | loads and stores of the tensor cores' fragments |
//! | [`layout`] | padded and swizzled tiles in shared memory |
//! | [`async_copy`] | copies from global to shared memory that run beside the threads |
//! | [`barrier`] | barriers of some of a block's warps |
//! | [`mod@unroll`] | loops that are gone before the compiler sees them |
//! | [`atomic`] | atomic operations on shared and global memory |
//! | [`turn`] | blocks that go one after another |
//! | [`mbarrier`] | barriers in shared memory that count arrivals and bytes; proxy fences |
//! | [`tma`] | bulk copies of tensor boxes, and their tensor maps |
//! | [`parameter`] | the address of an entry's parameter |
//! | [`specialise`] | numbers that a launch fixes before its entry is compiled |
//! | [`cluster`] | blocks that see each other's shared memory |
//! | [`warpgroup`] | four warps: their index, and moving registers between them |
//! | [`wgmma`] | tensor-core products of a warpgroup |
//!
//! # Safety of views
//! Making a view is `unsafe`: the maker promises that every index used later is in
//! bounds and that accesses are ordered. The emulator checks that promise on every
//! access; a GPU does not.

#![warn(missing_debug_implementations)]
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(
        stdarch_nvptx,
        asm_experimental_arch,
        core_intrinsics,
        link_llvm_intrinsics,
        abi_unadjusted
    )
)]

pub mod async_copy;
pub mod atomic;
pub mod barrier;
pub mod cluster;
pub mod compiler;
pub mod dim;
pub mod e4m3;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
pub mod global;
mod hardware;
pub mod layout;
pub mod math;
pub mod matrix;
pub mod mbarrier;
pub mod memory;
pub mod mma;
pub mod parameter;
pub mod scalar;
pub mod shared;
pub mod specialise;
pub mod thread;
pub mod tma;
pub mod turn;
pub mod unroll;
pub mod warp;
pub mod warpgroup;
pub mod wgmma;

pub use dim::Dim3;

/// States a kernel's launch bounds: threads of a block, blocks that must fit on
/// a multiprocessor at once, and the blocks of a [`cluster`] where it has more than one.
///
/// rustc has no attribute for them, so the bounds travel as a comment in the entry's
/// body, and the PTX builder turns it into `.maxntid`, `.minnctapersm` and
/// `.reqnctapercluster`.
#[macro_export]
macro_rules! launch_bounds {
    ($threads:expr, $min_blocks:expr) => {
        $crate::launch_bounds!($threads, $min_blocks, cluster 1)
    };
    ($threads:expr, $min_blocks:expr, cluster $blocks:expr) => {{
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: the text is a comment; no instruction is emitted.
        unsafe {
            core::arch::asm!(
                "// simt.launch_bounds {threads} {min_blocks} {blocks}",
                threads = const $threads,
                min_blocks = const $min_blocks,
                blocks = const $blocks,
                options(nostack, preserves_flags)
            );
        }
    }};
}
