//! Operations of the 32 lanes of a warp together: barrier, shuffles, votes, reductions.
//!
//! Shuffles, votes and reductions exchange registers; they do not order memory
//! accesses. Only [`sync_warp`] does (and the barriers of the block).

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{
    SyncKind,
    collectives::{self, WarpCall},
    current,
};
pub use crate::hardware::{FULL_MASK, LANES};
use crate::thread;

/// Index of this lane in its warp, 0 to 31.
#[inline(always)]
#[must_use]
pub fn lane_id() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let id: u32;
        // SAFETY: reads a special register.
        unsafe {
            core::arch::asm!("mov.u32 {0}, %laneid;", out(reg32) id, options(pure, nomem, nostack));
        }
        id
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        thread::index_in_block() % LANES
    }
}

/// Index of this warp in its block.
#[inline(always)]
#[must_use]
pub fn warp_id() -> u32 {
    thread::index_in_block() / LANES
}

/// Waits for the lanes of `mask` and orders their memory accesses.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_warp(mask: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier has no precondition but that the lanes of the mask reach it.
    unsafe {
        core::arch::asm!("bar.warp.sync {0};", in(reg32) mask, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        if current::left_out(SyncKind::WarpBarrier, at) {
            return;
        }
        let _: [u32; 0] =
            collectives::collective("sync_warp", mask, [], at, |mut call: WarpCall<'_>| {
                call.synchronise();
                Ok(())
            });
    }
}

/// Shuffles: each lane gives `value` and gets that of another lane. Every lane of the
/// warp must take part.
macro_rules! shuffle {
    ($($(#[$doc:meta])* $name_u32:ident, $name_f32:ident, $mode:literal, $clamp:literal, $source:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[must_use]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name_u32(value: u32, b: u32) -> u32 {
            #[cfg(target_arch = "nvptx64")]
            {
                let result: u32;
                // SAFETY: exchanges registers of the warp.
                unsafe {
                    core::arch::asm!(
                        concat!("shfl.sync.", $mode, ".b32 {0}, {1}, {2}, ", $clamp, ", 0xffffffff;"),
                        out(reg32) result, in(reg32) value, in(reg32) b,
                        options(nomem, nostack)
                    );
                }
                result
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let [result] = collectives::collective(
                    stringify!($name_u32), FULL_MASK, [value, b], Location::caller(),
                    |call: WarpCall<'_>| {
                        for lane in call.lanes() {
                            let source: u32 = $source(lane as u32, call.input[lane][1]);
                            let source = if call.mask >> (source % 32) & 1 == 1 && source < 32 {
                                source as usize
                            } else {
                                lane
                            };
                            call.output[lane][0] = call.input[source][0];
                        }
                        Ok(())
                    });
                result
            }
        }

        $(#[$doc])*
        #[inline(always)]
        #[must_use]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name_f32(value: f32, b: u32) -> f32 {
            f32::from_bits($name_u32(value.to_bits(), b))
        }
    )*};
}

shuffle! {
    /// The value of lane `lane_id ^ b`.
    shuffle_xor, shuffle_xor_f32, "bfly", "0x1f", |lane: u32, b: u32| lane ^ b;
    /// The value of lane `b`.
    shuffle_idx, shuffle_idx_f32, "idx", "0x1f", |_: u32, b: u32| b % 32;
    /// The value of lane `lane_id + b`; lanes without such a lane keep their own.
    shuffle_down, shuffle_down_f32, "down", "0x1f", |lane: u32, b: u32| lane + b;
    /// The value of lane `lane_id - b`; lanes without such a lane keep their own.
    shuffle_up, shuffle_up_f32, "up", "0x0", |lane: u32, b: u32| lane.wrapping_sub(b);
}

/// The value of lane 0, in all lanes: the compiler then knows that branches on it are
/// uniform over the warp.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn uniform(value: u32) -> u32 {
    shuffle_idx(value, 0)
}

/// The mask of lanes whose `predicate` holds.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn ballot(predicate: bool) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let mask: u32;
        // SAFETY: exchanges registers of the warp.
        unsafe {
            core::arch::asm!(
                "{{ .reg .pred p; setp.ne.u32 p, {1}, 0; vote.sync.ballot.b32 {0}, p, 0xffffffff; }}",
                out(reg32) mask, in(reg32) u32::from(predicate), options(nomem, nostack)
            );
        }
        mask
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let [mask] = collectives::collective(
            "ballot",
            FULL_MASK,
            [u32::from(predicate)],
            Location::caller(),
            |call: WarpCall<'_>| {
                let votes = call.lanes().fold(0, |m, l| m | call.input[l][0] << l);
                for lane in call.lanes() {
                    call.output[lane][0] = votes;
                }
                Ok(())
            },
        );
        mask
    }
}

/// Whether `predicate` holds in any lane of the warp.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn any(predicate: bool) -> bool {
    ballot(predicate) != 0
}

/// Whether `predicate` holds in every lane of the warp.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn all(predicate: bool) -> bool {
    ballot(!predicate) == 0
}

/// Reductions over groups of `LANES` neighbouring lanes (a power of two up to 32); every
/// lane of a group gets the result. On a GPU log2(LANES) shuffles; one collective under
/// the emulator, combined in the same order, so that both round alike.
macro_rules! reduce {
    ($($(#[$doc:meta])* $name:ident, $combine:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[must_use]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name<const LANES: u32>(value: f32) -> f32 {
            const { assert!(LANES.is_power_of_two() && LANES <= 32) };
            #[cfg(target_arch = "nvptx64")]
            {
                let mut value = value;
                let mut distance = LANES / 2;
                while distance > 0 {
                    value = $combine(value, shuffle_xor_f32(value, distance));
                    distance /= 2;
                }
                value
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let [result] = collectives::collective(
                    stringify!($name), FULL_MASK, [value.to_bits()], Location::caller(),
                    |call: WarpCall<'_>| {
                        let mut values: [f32; 32] = std::array::from_fn(|l| f32::from_bits(call.input[l][0]));
                        let mut distance = LANES as usize / 2;
                        while distance > 0 {
                            let old = values;
                            for lane in call.lanes() {
                                let other = lane ^ distance;
                                if call.mask >> other & 1 == 1 {
                                    values[lane] = $combine(old[lane], old[other]);
                                }
                            }
                            distance /= 2;
                        }
                        for lane in call.lanes() {
                            call.output[lane][0] = values[lane].to_bits();
                        }
                        Ok(())
                    });
                f32::from_bits(result)
            }
        }
    )*};
}

reduce! {
    /// The largest value of each group of `LANES` lanes.
    reduce_max, |a: f32, b: f32| crate::math::max(a, b);
    /// The sum over each group of `LANES` lanes.
    reduce_add, |a: f32, b: f32| a + b;
}
