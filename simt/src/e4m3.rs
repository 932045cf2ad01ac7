//! Numbers of eight bits: e4m3, a sign, four bits of exponent with a bias of 7, and three of mantissa.
//!
//! ```text
//! s eeee mmm     e > 0: ±2^(e - 7) (1 + m / 8)     largest 448: e = 15, m = 6
//!                e = 0: ±2^-6 m / 8                smallest 2^-9
//!                e = 15, m = 7: NaN                there is no infinity
//! ```
//!
//! f16 holds all of them: its exponent has a bit more, its mantissa seven. So a code moves to f16 by a shift,
//! and what differs is the bias, a factor of 2^8 for all values, subnormal ones included.

use half::f16;

/// The largest value.
pub const MAX: f32 = 448.0;

/// A way from four codes, in the bytes of a register, to f16.
pub trait Widen: 'static {
    /// The factor of the f16 values.
    const FACTOR: f32;

    /// Codes 0 and 2, then codes 1 and 3, as two f16 each; the code of the lower number in the lower half.
    fn widen(codes: u32) -> [u32; 2];
}

/// By integer instructions, which every GPU has: the exponents keep their bias.
#[derive(Clone, Copy, Debug)]
pub struct ByShifts;

impl Widen for ByShifts {
    const FACTOR: f32 = 256.0;

    #[inline(always)]
    fn widen(codes: u32) -> [u32; 2] {
        const SIGNS: u32 = 0x8080_8080;
        let magnitudes = codes & !SIGNS;
        // One more than 127, NaN, is 128. That bit is where f16's highest bit of exponent will be: an
        // exponent of 15, a code's largest, becomes 31, which makes a NaN of any mantissa but 0.
        let marked = magnitudes | (magnitudes + 0x0101_0101) & SIGNS;
        [
            (marked << 7) & 0x7f80_7f80 | (codes << 8) & 0x8000_8000,
            (marked >> 1) & 0x7f80_7f80 | codes & 0x8000_8000,
        ]
    }
}

/// By the conversion that GPUs have from sm_89 on.
#[derive(Clone, Copy, Debug)]
pub struct ByConversion;

impl Widen for ByConversion {
    const FACTOR: f32 = 1.0;

    #[inline(always)]
    fn widen(codes: u32) -> [u32; 2] {
        #[cfg(target_arch = "nvptx64")]
        {
            let (even, odd): (u32, u32);
            // SAFETY: conversions between registers.
            unsafe {
                core::arch::asm!(
                    "{{ .reg .b32 pairs; .reg .b16 even, odd; prmt.b32 pairs, {2}, 0, 0x3120; \
                     mov.b32 {{even, odd}}, pairs; cvt.rn.f16x2.e4m3x2 {0}, even; \
                     cvt.rn.f16x2.e4m3x2 {1}, odd; }}",
                    out(reg32) even, out(reg32) odd, in(reg32) codes,
                    options(pure, nomem, nostack)
                );
            }
            [even, odd]
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let bytes = codes.to_le_bytes();
            let pair = |low: usize, high: usize| {
                let bits = |at: usize| u32::from(f16::from_f32(to_f32(bytes[at])).to_bits());
                bits(low) | bits(high) << 16
            };
            [pair(0, 2), pair(1, 3)]
        }
    }
}

/// The value of a code.
#[inline(always)]
#[must_use]
pub fn to_f32(code: u8) -> f32 {
    let [bits, _] = ByShifts::widen(code.into());
    crate::scalar::Scalar::to_f32(f16::from_bits(bits as u16)) * ByShifts::FACTOR
}

/// The code of the nearest value, ties to even; values beyond the largest become the largest.
#[inline(always)]
#[must_use]
pub fn from_f32(value: f32) -> u8 {
    /// The smallest number with a leading 1, 2^-6.
    const NORMAL: f32 = 1.0 / 64.0;
    /// The unit in its last place is 2^-9, a subnormal's unit: an addition rounds to it.
    const ROUNDER: f32 = 16_384.0;
    /// Bits of an f32's mantissa beyond three.
    const BEYOND: u32 = 20;
    /// The difference of the biases, before a mantissa of three bits.
    const BIAS: u32 = (127 - 7) << 3;
    let (bits, magnitude) = (value.to_bits(), value.abs());
    let sign = (bits >> 24) & 0x80;
    if value.is_nan() {
        return (sign | 0x7f) as u8;
    }
    let code = if magnitude < NORMAL {
        (magnitude + ROUNDER).to_bits() - ROUNDER.to_bits()
    } else {
        let bits = if magnitude < MAX { magnitude } else { MAX }.to_bits();
        let odd = (bits >> BEYOND) & 1;
        ((bits + ((1 << (BEYOND - 1)) - 1) + odd) >> BEYOND) - BIAS
    };
    (sign | code) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition.
    fn value(code: u8) -> f64 {
        let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
        match (e, m) {
            (15, 7.0) => f64::NAN,
            (0, m) => sign * 2f64.powi(-6) * m / 8.0,
            (e, m) => sign * 2f64.powi(e - 7) * (1.0 + m / 8.0),
        }
    }

    #[test]
    fn every_code_is_its_value_in_every_byte_of_a_register() {
        fn check<W: Widen>() {
            for code in 0..=u8::MAX {
                for (at, other) in (0..4).flat_map(|at| [(at, 0), (at, 0x7f), (at, 0xff)]) {
                    let mut bytes = [other; 4];
                    bytes[at] = code;
                    let pair = W::widen(u32::from_le_bytes(bytes))[at % 2];
                    let half = f16::from_bits((pair >> (at / 2 * 16)) as u16);
                    let (found, expected) = (half.to_f64() * f64::from(W::FACTOR), value(code));
                    let same = found.to_bits() == expected.to_bits();
                    assert!(same || found.is_nan() && expected.is_nan(), "{code:#x}: {found}");
                }
            }
        }
        check::<ByShifts>();
        check::<ByConversion>();
    }

    #[test]
    fn the_nearest_code_is_found_and_ties_go_to_even() {
        for code in 0..=u8::MAX {
            let found = from_f32(value(code) as f32);
            assert!(found == code || value(code).is_nan() && found & 0x7f == 0x7f, "{code:#x}");
            assert_eq!(value(code).is_nan(), to_f32(code).is_nan());
        }
        for sign in [0u8, 0x80] {
            for code in 0..0x7e {
                let (low, high) = (value(sign | code), value(sign | (code + 1)));
                let between = (low + high) / 2.0;
                let even = sign | (code + code % 2);
                assert_eq!(from_f32(between as f32), even, "between {low} and {high}");
                let beside = (between as f32).to_bits();
                assert_eq!(from_f32(f32::from_bits(beside - 1)), sign | code);
                assert_eq!(from_f32(f32::from_bits(beside + 1)), sign | (code + 1));
            }
            for large in [448.0, 464.0, 480.0, 1e30, f32::INFINITY] {
                let large = if sign == 0 { large } else { -large };
                assert_eq!(from_f32(large), sign | 0x7e, "{large}");
            }
        }
        assert_eq!((from_f32(1e-30), from_f32(-1e-30)), (0, 0x80));
    }
}
