//! The parts of an estimate of time: clocks for each thing that a warp, the copy engine and the tensor
//! cores do. Round figures of the size that microbenchmarks of Ampere and Hopper show; an order of events
//! with these costs explains what waits for what, and predicts no time.

use flash_attention::backend::cpu::emulator::{Action, Counts};

/// Clocks until the first word from global memory is there.
pub const GLOBAL_LATENCY: f64 = 500.0;
/// Clocks for each sector of 32 bytes after it.
pub const SECTOR: f64 = 1.0;
/// Clocks until a word from shared memory is there.
pub const SHARED_LATENCY: f64 = 25.0;
/// Clocks of a pass over shared memory.
pub const PASS: f64 = 1.0;
/// Clocks of an arithmetic instruction of a warp.
pub const ARITHMETIC: f64 = 1.0;
/// Clocks of a special function of a warp: four lanes per clock.
pub const SPECIAL: f64 = 8.0;
/// Clocks of an exchange of registers, a fence, an arrival, a barrier once all are there.
pub const EXCHANGE: f64 = 25.0;
/// Clocks that a warp needs to hand a copy or a product to its agent, or to arrive.
pub const ISSUE: f64 = 5.0;
/// FLOP of the tensor cores of one warp (`mma`) in a clock; wgmma has four warps'.
pub const TENSOR: f64 = 1024.0;
/// Clocks until a product of a warp is there.
pub const TENSOR_LATENCY: f64 = 20.0;
/// Bytes that the copy engine moves in a clock.
pub const COPY_BYTES: f64 = 64.0;

/// The costs, in lines for a reader.
pub const STATED: &str = "\
global memory 500 clocks and 1 for each sector; shared memory 25 and 1 for each pass; arithmetic 1, special \
functions 8 for each instruction of a warp; exchanges, barriers and fences 25; tensor cores 1024 FLOP per clock for \
each warp; the copy engine 500 clocks and 64 bytes per clock. Warps slow each other down only through agents and \
waits, and what a loop does again before the next synchronisation overlaps.";

/// Clocks that a warp is busy with an action, waiting apart.
#[must_use]
pub fn of(action: &Action, times: u64, counts: &Counts) -> f64 {
    let times = times as f64;
    let sectors = SECTOR * counts.global_sectors as f64;
    let passes = PASS * counts.shared_passes as f64;
    match action {
        Action::GlobalRead | Action::GlobalAtomic => GLOBAL_LATENCY + sectors,
        Action::GlobalWrite => ISSUE + sectors,
        Action::SharedRead => SHARED_LATENCY + passes,
        Action::SharedWrite => ISSUE + passes,
        Action::SharedAtomic => SHARED_LATENCY + 2.0 * passes,
        Action::Math => {
            ARITHMETIC * counts.flops as f64 / 64.0 + SPECIAL * counts.special as f64 / 32.0
        }
        Action::Mma => TENSOR_LATENCY + counts.tensor_flops as f64 / TENSOR,
        Action::Collective(_) => EXCHANGE * times,
        Action::WarpBarrier | Action::Fence | Action::Barrier(_) | Action::MbarrierWait(..) => {
            EXCHANGE
        }
        _ => ISSUE * times,
    }
    .max(1.0)
}
