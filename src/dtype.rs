//! The storage types of tensors. Arithmetic always accumulates in f32.

use std::{fmt, str::FromStr};

use half::{bf16, f16};
use simt::e4m3;

use crate::error::Error;

/// Storage type of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE 754 single precision: 24 bits of significand.
    #[default]
    F32,
    /// IEEE 754 half precision: 11 bits of significand, largest value 65504.
    F16,
    /// bfloat16: 8 bits of significand, the range of f32.
    BF16,
    /// Eight bits, for the cache of a [`Decode`](crate::registry::Decode) alone: see [`E4m3`].
    E4M3,
}

impl DType {
    /// The storage types of a problem, in the order in which tables list them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The name in the command line and in kernel symbols.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::E4M3 => "e4m3",
        }
    }

    /// Bytes of an element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::E4M3 => 1,
        }
    }

    /// Half a unit in the last place of 1.0: the largest relative error of one
    /// rounding to this type.
    #[must_use]
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => 1.0 / (1u64 << 24) as f64,
            Self::F16 => 1.0 / (1u64 << 11) as f64,
            Self::BF16 => 1.0 / (1u64 << 8) as f64,
            Self::E4M3 => 1.0 / (1u64 << 4) as f64,
        }
    }

    /// The value of this type nearest to `value`, ties to even; for e4m3, at most 448.
    #[must_use]
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::F32 => f64::from(value as f32),
            Self::F16 => f16::from_f64(value).to_f64(),
            Self::BF16 => bf16::from_f64(value).to_f64(),
            Self::E4M3 => E4m3::from_f64(value).to_f64(),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    /// Accepts the short names and PyTorch's (`float16`, `half`, `bfloat16`, …), in any
    /// case.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text.to_ascii_lowercase().as_str() {
            "f32" | "float32" | "float" => Ok(Self::F32),
            "f16" | "float16" | "half" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::BF16),
            "e4m3" | "float8_e4m3fn" | "f8_e4m3" => Ok(Self::E4M3),
            _ => Err(Error::UnknownDType { given: text.to_owned() }),
        }
    }
}

/// A number of eight bits: a sign, four bits of exponent with a bias of 7, three of mantissa.
///
/// The largest is 448, the smallest 2^-9. There is no infinity, and 0x7f and 0xff are NaN.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct E4m3(u8);

// SAFETY: a byte, and every byte is a number.
unsafe impl bytemuck::Zeroable for E4m3 {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for E4m3 {}

impl E4m3 {
    /// The number with these bits.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Its bits.
    #[must_use]
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// The value, exactly.
    #[must_use]
    pub fn to_f32(self) -> f32 {
        e4m3::to_f32(self.0)
    }
}

/// A Rust type that is one of the storage types.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The storage type.
    const DTYPE: DType;
    /// The value, exactly.
    fn to_f64(self) -> f64;
    /// The nearest value of this type, ties to even.
    fn from_f64(value: f64) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    fn to_f64(self) -> f64 {
        f16::to_f64(self)
    }
    fn from_f64(value: f64) -> Self {
        f16::from_f64(value)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    fn to_f64(self) -> f64 {
        bf16::to_f64(self)
    }
    fn from_f64(value: f64) -> Self {
        bf16::from_f64(value)
    }
}

impl Element for E4m3 {
    const DTYPE: DType = DType::E4M3;
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
    /// The nearest value, ties to even; values beyond the largest become the largest.
    fn from_f64(value: f64) -> Self {
        /// Bits of an f64's mantissa, and the bias of its exponent.
        const MANTISSA: u32 = 52;
        const BIAS: i32 = 1023;
        /// The least exponent of a number with a leading 1.
        const LEAST: i32 = -6;
        let magnitude = value.abs().min(e4m3::MAX.into());
        let exponent = (magnitude.to_bits() >> MANTISSA) as i32 - BIAS;
        let unit = 2f64.powi(exponent.max(LEAST) - 3);
        let nearest = ((magnitude / unit).round_ties_even() * unit).copysign(value);
        // A code's value, or NaN, which `min` left out.
        Self(e4m3::from_f32(if value.is_nan() { f32::NAN } else { nearest as f32 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for dtype in DType::ALL.into_iter().chain([DType::E4M3]) {
            assert_eq!(dtype.name().parse::<DType>().unwrap(), dtype);
        }
        assert_eq!("BFloat16".parse::<DType>().unwrap(), DType::BF16);
        assert!("f8".parse::<DType>().unwrap_err().is_usage());
    }

    #[test]
    fn codes_of_eight_bits_are_rounded_once() {
        for bits in 0..=u8::MAX {
            let code = E4m3::from_bits(bits);
            let back = E4m3::from_f64(code.to_f64());
            assert!(back == code || code.to_f64().is_nan() && back.to_f64().is_nan());
        }
        // Beside a tie, where f32 has no number between.
        assert_eq!(DType::E4M3.round(17.0), 16.0);
        assert_eq!(DType::E4M3.round(17.0 + 1e-12), 18.0);
        assert_eq!(DType::E4M3.round(-19.0 + 1e-12), -18.0);
        assert_eq!(DType::E4M3.round(1e300), 448.0);
        assert_eq!(DType::E4M3.round(1.0 / 1024.0), 0.0);
        assert_eq!(DType::E4M3.round(1.0 / 1024.0 + 1e-12), 1.0 / 512.0);
    }

    #[test]
    fn rounding_stays_within_the_unit_roundoff() {
        for dtype in DType::ALL.into_iter().chain([DType::E4M3]) {
            let value = 1.0 + 0.9 * dtype.unit_roundoff();
            assert_eq!(dtype.round(value), 1.0);
            assert_eq!(
                dtype.round(1.0 + 2.0 * dtype.unit_roundoff()),
                1.0 + 2.0 * dtype.unit_roundoff()
            );
        }
    }
}
