//! Atomic operations on shared and global memory, relaxed and of block or GPU scope as
//! `atom` is by default: they do not order other accesses.
//!
//! Under the emulator lanes of a block run one at a time, and blocks side by side:
//! atomics on shared memory are plain accesses, atomics on global memory are real.

#[cfg(not(target_arch = "nvptx64"))]
use std::{
    panic::Location,
    sync::atomic::{AtomicU32, Ordering},
};

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{current, global_memory::GlobalAccess};
use crate::{global::GlobalMut, shared::Shared};

macro_rules! atomic {
    ($($(#[$doc:meta])* $shared:ident, $global:ident, $type:ty, $op:literal, $apply:expr;)*) => {$(
        $(#[$doc])*
        /// On shared memory; returns the old value.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $shared(view: Shared<$type>, index: u32, value: $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            {
                let old: $type;
                // SAFETY: `Shared::dynamic` asks that every index is in bounds.
                unsafe {
                    core::arch::asm!(concat!("atom.shared.", $op, " {0}, [{1}], {2};"),
                        out(reg32) old, in(reg32) view.address_of(index), in(reg32) value,
                        options(nostack));
                }
                old
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let at = Location::caller();
                current::checked(|b| {
                    let word = b.shared_atomic(view.address_of(index), 4, at)?.cast::<$type>();
                    // SAFETY: `shared_atomic` checked bounds and alignment.
                    let old = unsafe { word.read() };
                    // SAFETY: as above.
                    unsafe { word.write($apply(old, value)) };
                    Ok(old)
                })
            }
        }

        $(#[$doc])*
        /// On global memory; returns the old value.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $global(view: GlobalMut<$type>, index: u64, value: $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            {
                let old: $type;
                // SAFETY: `GlobalMut::new` asks that every index is in bounds.
                unsafe {
                    core::arch::asm!(concat!("atom.global.", $op, " {0}, [{1}], {2};"),
                        out(reg32) old, in(reg64) view.address_of(index), in(reg32) value,
                        options(nostack));
                }
                old
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let word = view.as_global().check::<$type>(
                    index, GlobalAccess::Atomic, Location::caller());
                // SAFETY: the address is checked, and other blocks access it atomically too.
                let word = unsafe { AtomicU32::from_ptr(word as *mut u32) };
                let apply = |old: u32| $apply(<$type>::from_ne_bytes(old.to_ne_bytes()), value);
                let old = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                    Some(u32::from_ne_bytes(apply(old).to_ne_bytes()))
                });
                <$type>::from_ne_bytes(old.unwrap_or_else(|old| old).to_ne_bytes())
            }
        }
    )*};
}

atomic! {
    /// Adds `value`.
    add_shared_u32, add_global_u32, u32, "add.u32", |a: u32, b: u32| a.wrapping_add(b);
    /// Adds `value`.
    add_shared_f32, add_global_f32, f32, "add.f32", |a: f32, b: f32| a + b;
    /// Keeps the larger of the old value and `value`.
    max_shared_u32, max_global_u32, u32, "max.u32", |a: u32, b: u32| a.max(b);
    /// Keeps the smaller of the old value and `value`.
    min_shared_u32, min_global_u32, u32, "min.u32", |a: u32, b: u32| a.min(b);
    /// Adds 1, or stores 0 where the old value is `value` or more.
    increment_shared_u32, increment_global_u32, u32, "inc.u32", |a: u32, b: u32| if a >= b { 0 } else { a + 1 };
    /// Stores `value`.
    exchange_shared_u32, exchange_global_u32, u32, "exch.b32", |_: u32, b: u32| b;
}

/// Adds four neighbouring values in global memory, each as by an atomic operation: in no order between
/// threads, so that sums of rounded numbers differ from run to run. `index` is that of the first, a
/// multiple of four; nothing is returned, so that nothing waits. From sm_90 on.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn reduce_add_x4_global(view: GlobalMut<f32>, index: u64, values: [f32; 4]) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: `GlobalMut::new` asks that every index is in bounds.
    unsafe {
        core::arch::asm!("red.relaxed.gpu.global.add.v4.f32 [{0}], {{{1}, {2}, {3}, {4}}};",
            in(reg64) view.address_of(index), in(reg32) values[0], in(reg32) values[1],
            in(reg32) values[2], in(reg32) values[3], options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        let first = view.as_global().check::<[u32; 4]>(index, GlobalAccess::Atomic, at);
        for (word, value) in values.into_iter().enumerate() {
            // SAFETY: the address is checked, and other blocks access it atomically too.
            let word = unsafe { AtomicU32::from_ptr((first as *mut u32).add(word)) };
            let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                Some((f32::from_bits(old) + value).to_bits())
            });
        }
    }
}
