//! Sixteen bytes of a tensor as f32 values, for kernels that read and write rows in the
//! largest accesses there are. Packing 16-bit types needs sm_80.

use half::{bf16, f16};
use simt::{
    mma::{Ampere, TensorCore},
    scalar::Scalar,
};

/// The most values of a chunk: 16-bit types have as many, f32 has four and leaves the rest.
pub const MAX_ELEMENTS: usize = 8;

/// A storage type whose values come in chunks of 16 bytes.
pub trait Chunk: Scalar {
    /// Values of a chunk.
    const ELEMENTS: u32 = 16 / Self::BYTES;

    /// The values of a chunk.
    fn unpack(chunk: [u32; 4]) -> [f32; MAX_ELEMENTS];
    /// The chunk of these values, each rounded.
    fn pack(values: [f32; MAX_ELEMENTS]) -> [u32; 4];
}

impl Chunk for f32 {
    #[inline(always)]
    fn unpack(chunk: [u32; 4]) -> [f32; MAX_ELEMENTS] {
        let [a, b, c, d] = chunk.map(f32::from_bits);
        [a, b, c, d, 0.0, 0.0, 0.0, 0.0]
    }
    #[inline(always)]
    fn pack(values: [f32; MAX_ELEMENTS]) -> [u32; 4] {
        [values[0], values[1], values[2], values[3]].map(f32::to_bits)
    }
}

macro_rules! chunk {
    ($type:ident) => {
        impl Chunk for $type {
            #[inline(always)]
            fn unpack(chunk: [u32; 4]) -> [f32; MAX_ELEMENTS] {
                let value = |bits: u32| Scalar::to_f32($type::from_bits(bits as u16));
                let [a, b, c, d] = chunk.map(|pair| [value(pair), value(pair >> 16)]);
                [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
            }
            #[inline(always)]
            fn pack(v: [f32; MAX_ELEMENTS]) -> [u32; 4] {
                let pair = |low, high| <Ampere as TensorCore<$type>>::pack(low, high);
                [pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7])]
            }
        }
    };
}

chunk!(f16);
chunk!(bf16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_rounds_each_value_where_it_stands() {
        let values = [1.0, -2.5, 1.0 / 3.0, 65_504.0, 0.0, -0.1, 7.0, f32::NEG_INFINITY];
        let rounded = values.map(|x| f16::from_f32(x).to_f32());
        assert_eq!(f16::unpack(f16::pack(values)), rounded);
        let rounded = values.map(|x| bf16::from_f32(x).to_f32());
        assert_eq!(bf16::unpack(bf16::pack(values)), rounded);
        assert_eq!(f16::pack(values)[0], 0xc100_3c00);
        assert_eq!(f32::unpack(f32::pack(values))[..4], values[..4]);
    }
}
