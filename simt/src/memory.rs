//! The types that one instruction loads or stores, and how it is spelt.

use half::{bf16, f16};

/// A plain value that moves between registers and memory in one instruction.
///
/// Implemented for the scalar types, and for `[u32; 2]` and `[u32; 4]`: the 8- and
/// 16-byte vectors of `ld.v2.b32` and `ld.v4.b32`, which need that alignment.
pub trait Memory: Copy + Send + Sync + 'static {
    /// Bytes moved, and the alignment needed.
    const BYTES: u32 = size_of::<Self>() as u32;

    /// Loads from a global address.
    ///
    /// # Safety
    /// `address` must be a valid, aligned address of global memory.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn ld_global(address: u64) -> Self;
    /// Stores to a global address.
    ///
    /// # Safety
    /// As for `ld_global`, and the memory must be writable.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn st_global(address: u64, value: Self);
    /// Loads from a shared address (a 32-bit offset in the shared window).
    ///
    /// # Safety
    /// `address` must be a valid, aligned address of shared memory.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn ld_shared(address: u32) -> Self;
    /// Stores to a shared address.
    ///
    /// # Safety
    /// As for `ld_shared`.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn st_shared(address: u32, value: Self);
    /// Loads from an address in the shared window of the cluster.
    ///
    /// # Safety
    /// As for `ld_shared`; the block that has the memory must be running.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn ld_cluster(address: u32) -> Self;
    /// Stores to an address in the shared window of the cluster.
    ///
    /// # Safety
    /// As for `ld_cluster`.
    #[cfg(target_arch = "nvptx64")]
    unsafe fn st_cluster(address: u32, value: Self);
}

/// One implementation per register class: `$bits` is the integer in the register.
macro_rules! memory {
    ($type:ty, $suffix:literal, $class:ident, $bits:ty, $to_bits:expr, $from_bits:expr) => {
        impl Memory for $type {
            memory!(@load ld_global, u64, reg64, concat!("ld.global.", $suffix, " {0}, [{1}];"),
                $class, $bits, $from_bits);
            memory!(@load ld_shared, u32, reg32, concat!("ld.shared.", $suffix, " {0}, [{1}];"),
                $class, $bits, $from_bits);
            memory!(@load ld_cluster, u32, reg32, concat!("ld.shared::cluster.", $suffix, " {0}, [{1}];"),
                $class, $bits, $from_bits);
            memory!(@store st_global, u64, reg64, concat!("st.global.", $suffix, " [{0}], {1};"),
                $class, $bits, $to_bits);
            memory!(@store st_shared, u32, reg32, concat!("st.shared.", $suffix, " [{0}], {1};"),
                $class, $bits, $to_bits);
            memory!(@store st_cluster, u32, reg32, concat!("st.shared::cluster.", $suffix, " [{0}], {1};"),
                $class, $bits, $to_bits);
        }
    };
    (@load $name:ident, $address:ty, $address_class:ident, $text:expr, $class:ident, $bits:ty, $from_bits:expr) => {
        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn $name(address: $address) -> Self {
            let bits: $bits;
            // SAFETY: the address is one of this type in the space of the name, as the trait asks.
            unsafe {
                core::arch::asm!($text, out($class) bits, in($address_class) address,
                    options(pure, readonly, nostack));
            }
            $from_bits(bits)
        }
    };
    (@store $name:ident, $address:ty, $address_class:ident, $text:expr, $class:ident, $bits:ty, $to_bits:expr) => {
        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn $name(address: $address, value: Self) {
            let bits: $bits = $to_bits(value);
            // SAFETY: the address is one of this type in the space of the name, as the trait asks.
            unsafe {
                core::arch::asm!($text, in($address_class) address, in($class) bits, options(nostack));
            }
        }
    };
}

memory!(u8, "u8", reg32, u32, |v| v as u32, |b| b as u8);
memory!(u16, "b16", reg16, u16, |v| v, |b| b);
memory!(u32, "b32", reg32, u32, |v| v, |b| b);
memory!(i32, "b32", reg32, i32, |v| v, |b| b);
memory!(u64, "b64", reg64, u64, |v| v, |b| b);
memory!(f32, "b32", reg32, f32, |v| v, |b| b);
memory!(f16, "b16", reg16, u16, f16::to_bits, f16::from_bits);
memory!(bf16, "b16", reg16, u16, bf16::to_bits, bf16::from_bits);

/// Vectors: `$n` registers of 32 bits.
macro_rules! vector {
    ($n:literal, $regs:literal, $at_load:literal, $regs_store:literal, $($i:literal)*) => {
        impl Memory for [u32; $n] {
            vector!(@load ld_global, u64, reg64, concat!("ld.global.v", $n, ".b32 ", $regs, ", [", $at_load, "];"), $n, $($i)*);
            vector!(@load ld_shared, u32, reg32, concat!("ld.shared.v", $n, ".b32 ", $regs, ", [", $at_load, "];"), $n, $($i)*);
            vector!(@load ld_cluster, u32, reg32, concat!("ld.shared::cluster.v", $n, ".b32 ", $regs, ", [", $at_load, "];"), $n, $($i)*);
            vector!(@store st_global, u64, reg64, concat!("st.global.v", $n, ".b32 [{0}], ", $regs_store, ";"), $n, $($i)*);
            vector!(@store st_shared, u32, reg32, concat!("st.shared.v", $n, ".b32 [{0}], ", $regs_store, ";"), $n, $($i)*);
            vector!(@store st_cluster, u32, reg32, concat!("st.shared::cluster.v", $n, ".b32 [{0}], ", $regs_store, ";"), $n, $($i)*);
        }
    };
    (@load $name:ident, $address:ty, $class:ident, $text:expr, $n:literal, $($i:literal)*) => {
        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn $name(address: $address) -> Self {
            let mut v = [0u32; $n];
            // SAFETY: the address is one of this type in the space of the name, as the trait asks.
            unsafe {
                core::arch::asm!($text, $(out(reg32) v[$i],)* in($class) address,
                    options(pure, readonly, nostack));
            }
            v
        }
    };
    (@store $name:ident, $address:ty, $class:ident, $text:expr, $n:literal, $($i:literal)*) => {
        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn $name(address: $address, v: Self) {
            // SAFETY: the address is one of this type in the space of the name, as the trait asks.
            unsafe {
                core::arch::asm!($text, in($class) address, $(in(reg32) v[$i],)* options(nostack));
            }
        }
    };
}

vector!(2, "{{{0}, {1}}}", "{2}", "{{{1}, {2}}}", 0 1);
vector!(4, "{{{0}, {1}, {2}, {3}}}", "{4}", "{{{1}, {2}, {3}, {4}}}", 0 1 2 3);
