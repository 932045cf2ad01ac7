//! Attention kernels, one file per rung.
//!
//! | folder | contents |
//! |---|---|
//! | [`forward`] | the ladder of attention, from naive to Hopper: start here |
//! | [`backward`] | the ladder of attention's gradients |
//! | [`decode`] | a few queries against a cache of keys and values |
//! | [`linear`] | the ladder of projections |
//! | [`merge`] | parts of attention and of gradients become one |
//! | [`parts`] | what several rungs share |
//! | [`args`] | the arguments of kernels |
//!
//! [`entry`] says how a generic kernel becomes entries, [`constants`] what a launch fixes before
//! its entry is compiled. [`probe`] is there for tests.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, stdarch_nvptx))]

pub mod args;
pub mod backward;
pub mod constants;
pub mod decode;
pub mod entry;
pub mod forward;
pub mod linear;
pub mod merge;
pub mod parts;
pub mod probe;

simt::declare_dynamic_shared!();

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: stops the launch with an error, which is what a panic is here.
    unsafe { core::arch::nvptx::trap() }
}

/// The PTX of every entry, as text, compressed: a zstd frame per entry. The first frame is the
/// index, a line for each frame after it with the frame's name and bytes: `module sm_80 133` for
/// what precedes a module's entries, then `entry flash_mma_f16_d64 9876` for each of them.
#[cfg(feature = "ptx")]
pub static PTX: &[u8] = include_bytes!("../ptx/modules.ptx.zst");

#[cfg(not(target_arch = "nvptx64"))]
use {
    backward::{
        backward_hopper, backward_mma, backward_naive, backward_standard, backward_tiled, bias,
        convert, prepare, sinks,
    },
    decode::{decode_append, decode_combine, decode_e4m3, decode_split},
    forward::{
        flash_async, flash_hopper, flash_mma, flash_pipelined, flash_swizzled, flash_tf32,
        flash_tiled, naive, standard, weights,
    },
    linear::{linear_bias, linear_hopper, linear_mma, linear_naive, linear_tiled},
};

/// The tables of all rungs.
#[cfg(not(target_arch = "nvptx64"))]
const TABLES: &[entry::Instances] = &[
    naive::SCORES,
    naive::SOFTMAX,
    naive::OUTPUT,
    standard::SCORES,
    standard::OUTPUT,
    standard::TILED_SCORES,
    standard::TILED_OUTPUT,
    standard::softmax::OF_WARP,
    standard::softmax::OF_BLOCK,
    flash_tiled::ENTRIES,
    flash_mma::ENTRIES,
    flash_swizzled::ENTRIES,
    flash_swizzled::TURING,
    flash_async::ENTRIES,
    flash_pipelined::ENTRIES,
    flash_tf32::ENTRIES,
    prepare::ENTRIES,
    convert::ENTRIES,
    bias::ENTRIES,
    sinks::ENTRIES,
    backward_naive::SCORES,
    backward_naive::QUERIES,
    backward_naive::KEYS,
    backward_standard::SCORES,
    backward_standard::QUERIES,
    backward_standard::KEYS,
    backward_standard::VALUES,
    backward_standard::TILED_SCORES,
    backward_standard::TILED_QUERIES,
    backward_standard::TILED_KEYS,
    backward_standard::TILED_VALUES,
    backward_tiled::KEYS,
    backward_tiled::QUERIES,
    backward_mma::ENTRIES,
    backward_mma::ORDERED_ENTRIES,
    backward_mma::TALL_ENTRIES,
    backward_mma::TALL_ORDERED_ENTRIES,
    backward_hopper::ENTRIES,
    backward_hopper::ORDERED_ENTRIES,
    backward_hopper::VALUES_OF_128,
    backward_hopper::convert::ENTRIES,
    backward_hopper::queries::ENTRIES,
    backward_hopper::queries::VALUES_OF_128,
    decode_split::ENTRIES,
    decode_e4m3::ENTRIES,
    decode_e4m3::HOPPER,
    decode_combine::ENTRIES,
    decode_append::ENTRIES,
    decode_append::E4M3,
    linear_naive::ENTRIES,
    linear_naive::DX,
    linear_naive::DW,
    linear_tiled::ENTRIES,
    linear_tiled::DX,
    linear_tiled::DW,
    linear_mma::ENTRIES,
    linear_mma::DX,
    linear_mma::DW,
    linear_hopper::ENTRIES,
    linear_hopper::DX,
    linear_hopper::DW,
    linear_bias::ENTRIES,
    merge::ENTRIES,
    weights::ENTRIES,
    probe::ENTRIES,
    flash_hopper::THREE_CONSUMERS,
    flash_hopper::TWO_CONSUMERS,
    flash_hopper::VALUES_OF_128,
];

/// Every entry that can be launched.
#[cfg(not(target_arch = "nvptx64"))]
pub fn entries() -> impl Iterator<Item = &'static entry::Entry> {
    TABLES.iter().flat_map(|table| table.iter())
}

/// The entry of that name.
#[cfg(not(target_arch = "nvptx64"))]
#[must_use]
pub fn find(symbol: &str) -> Option<&'static entry::Entry> {
    entries().find(|e| e.symbol == symbol)
}
