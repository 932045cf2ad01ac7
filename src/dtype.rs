//! The storage types of tensors. Arithmetic always accumulates in f32.

use std::{fmt, str::FromStr};

use half::{bf16, f16};

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
}

impl DType {
    /// Every storage type, in the order in which tables list them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The name in the command line and in kernel symbols.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Bytes of an element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
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
        }
    }

    /// The value of this type nearest to `value`, ties to even.
    #[must_use]
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::F32 => f64::from(value as f32),
            Self::F16 => f16::from_f64(value).to_f64(),
            Self::BF16 => bf16::from_f64(value).to_f64(),
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
            _ => Err(Error::UnknownDType { given: text.to_owned() }),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse::<DType>().unwrap(), dtype);
        }
        assert_eq!("BFloat16".parse::<DType>().unwrap(), DType::BF16);
        assert!("f8".parse::<DType>().unwrap_err().is_usage());
    }

    #[test]
    fn rounding_stays_within_the_unit_roundoff() {
        for dtype in DType::ALL {
            let value = 1.0 + 0.9 * dtype.unit_roundoff();
            assert_eq!(dtype.round(value), 1.0);
            assert_eq!(
                dtype.round(1.0 + 2.0 * dtype.unit_roundoff()),
                1.0 + 2.0 * dtype.unit_roundoff()
            );
        }
    }
}
