//! The storage types of tensors: f32, f16 and bf16. Arithmetic is always in f32.

use half::{bf16, f16};

#[cfg(not(target_arch = "nvptx64"))]
use crate::hardware::widen_f16;
use crate::memory::Memory;

/// A type that tensors are stored in.
pub trait Scalar: Memory {
    /// The value as f32, exactly.
    fn to_f32(self) -> f32;
    /// The nearest value of this type; ties go to even.
    fn from_f32(value: f32) -> Self;
}

impl Scalar for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

/// `half`'s own conversions are dozens of integer instructions on nvptx; the GPU has
/// one for each.
macro_rules! scalar {
    ($type:ident, $widen:literal, $narrow:literal) => {
        impl Scalar for $type {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                #[cfg(target_arch = "nvptx64")]
                {
                    let wide: f32;
                    // SAFETY: a conversion between registers.
                    unsafe {
                        core::arch::asm!($widen, out(reg32) wide, in(reg16) self.to_bits(),
                            options(pure, nomem, nostack));
                    }
                    wide
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    widen_f16(self.to_bits())
                }
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                #[cfg(target_arch = "nvptx64")]
                {
                    let bits: u16;
                    // SAFETY: a conversion between registers.
                    unsafe {
                        core::arch::asm!($narrow, out(reg16) bits, in(reg32) value,
                            options(pure, nomem, nostack));
                    }
                    $type::from_bits(bits)
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    $type::from_f32(value)
                }
            }
        }
    };
}

scalar!(f16, "cvt.f32.f16 {0}, {1};", "cvt.rn.f16.f32 {0}, {1};");
// bf16 is the upper half of an f32. `cvt.rn.bf16.f32` exists from sm_80 on; this serves
// sm_75 too, with the same rounding in integer instructions.
impl Scalar for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        {
            let bits = value.to_bits();
            if value.is_nan() {
                return bf16::from_bits(((bits >> 16) | 0x40) as u16);
            }
            bf16::from_bits((bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            bf16::from_f32(value)
        }
    }
}
