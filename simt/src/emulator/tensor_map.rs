//! Tensor maps as the emulator encodes them, with the rules that the CUDA driver has.

use crate::hardware::TensorMap;

/// Dimensions of a tensor map, at most.
const MAX_RANK: usize = 5;
/// Type of a tensor's elements. Copies move bits; reductions compute with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Element {
    F16,
    Bf16,
    F32,
}

impl Element {
    const ALL: [Self; 3] = [Self::F16, Self::Bf16, Self::F32];

    /// Size of an element.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// First bytes of an encoded map.
const MAGIC: u64 = 0x7061_6d2d_746d_6973;

/// A strided view of global memory that copies move boxes of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Address of the first element, aligned to 16.
    pub address: u64,
    /// Type of an element.
    pub element: Element,
    /// Extent of each dimension in elements, fastest first; at most five.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next, for each dimension but the first; multiples of 16.
    pub strides_bytes: Vec<u64>,
    /// Extent of the box that one copy moves, 1 to 256 each.
    pub box_dims: Vec<u32>,
    /// Swizzle of the box's rows in shared memory in bytes: 0 (none), 32, 64 or 128.
    pub swizzle_bytes: u32,
}

/// Why a tensor map cannot be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tensor map: {0}")]
pub struct TensorMapError(String);

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), TensorMapError> {
    if holds { Ok(()) } else { Err(TensorMapError(message())) }
}

impl TensorMap {
    /// Gives a map that was encoded for the emulator another address.
    ///
    /// # Errors
    /// An address that is not a multiple of 16, as the CUDA driver refuses it; bytes that are no map.
    pub fn replace_address(&mut self, address: u64) -> Result<(), TensorMapError> {
        let spec = TensorMapSpec::decode(self);
        let spec = spec.ok_or_else(|| TensorMapError("these bytes are none".into()))?;
        *self = TensorMapSpec { address, ..spec }.encode()?;
        Ok(())
    }
}

impl TensorMapSpec {
    /// Encodes the map for the emulator.
    ///
    /// # Errors
    /// When the CUDA driver would refuse it too; the text says which value is wrong.
    pub fn encode(&self) -> Result<TensorMap, TensorMapError> {
        let rank = self.dims.len();
        require((1..=MAX_RANK).contains(&rank), || {
            format!("{rank} dimensions: 1 to 5 are possible")
        })?;
        require(self.strides_bytes.len() == rank - 1 && self.box_dims.len() == rank, || {
            format!(
                "{rank} dimensions with {} strides and {} extents of the box: {} and {rank} are needed",
                self.strides_bytes.len(),
                self.box_dims.len(),
                rank - 1
            )
        })?;
        require(self.address % 16 == 0, || {
            format!("address {:#x} is not a multiple of 16", self.address)
        })?;
        for &stride in &self.strides_bytes {
            require(stride % 16 == 0 && stride < 1 << 40, || {
                format!("a stride of {stride} bytes: a multiple of 16 below 2^40 is needed")
            })?;
        }
        for &extent in &self.dims {
            require((1..=1 << 32).contains(&extent), || {
                format!("a dimension of {extent} elements: 1 to 2^32 are possible")
            })?;
        }
        for &extent in &self.box_dims {
            require((1..=256).contains(&extent), || {
                format!("a box of {extent} elements: 1 to 256 are possible")
            })?;
        }
        let row = self.box_dims[0] * self.element.bytes();
        require(row % 16 == 0, || format!("a box row of {row} bytes is not a multiple of 16"))?;
        let swizzle = self.swizzle_bytes;
        require(matches!(swizzle, 0 | 32 | 64 | 128), || {
            format!("a swizzle of {swizzle} bytes: 0, 32, 64 or 128 are possible")
        })?;
        require(swizzle == 0 || row <= swizzle, || {
            format!("a box row of {row} bytes does not fit a swizzle of {swizzle}")
        })?;

        let mut words = [0u64; TensorMap::BYTES / 8];
        words[0] = MAGIC;
        words[1] = self.address;
        words[2] = rank as u64 | (self.element as u64) << 8 | u64::from(swizzle) << 16;
        words[3..3 + rank].copy_from_slice(&self.dims);
        words[8..8 + rank - 1].copy_from_slice(&self.strides_bytes);
        for (i, &extent) in self.box_dims.iter().enumerate() {
            words[13 + i / 2] |= u64::from(extent) << (32 * (i % 2));
        }
        let mut map = TensorMap([0; TensorMap::BYTES]);
        for (bytes, word) in map.0.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Ok(map)
    }

    /// Reads an encoded map back; `None` if these bytes are none.
    pub(super) fn decode(map: &TensorMap) -> Option<Self> {
        let mut words = [0u64; TensorMap::BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(map.0.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().ok()?);
        }
        let rank = (words[2] & 0xff) as usize;
        if words[0] != MAGIC || !(1..=MAX_RANK).contains(&rank) {
            return None;
        }
        Some(Self {
            address: words[1],
            element: *Element::ALL.get((words[2] >> 8 & 0xff) as usize)?,
            swizzle_bytes: (words[2] >> 16) as u32,
            dims: words[3..3 + rank].to_vec(),
            strides_bytes: words[8..8 + rank - 1].to_vec(),
            box_dims: (0..rank).map(|i| (words[13 + i / 2] >> (32 * (i % 2))) as u32).collect(),
        })
    }

    /// Bytes of a whole box.
    pub(super) fn box_bytes(&self) -> u32 {
        self.box_dims.iter().product::<u32>() * self.element.bytes()
    }

    /// Alignment that a box needs in shared memory.
    pub(super) fn alignment(&self) -> u32 {
        (8 * self.swizzle_bytes).max(128)
    }

    /// Where byte `offset` of the box goes relative to a base aligned to
    /// [`alignment`](Self::alignment): 16-byte units trade places within a row.
    pub(super) fn swizzled(&self, offset: u32) -> u32 {
        swizzle(offset, self.swizzle_bytes)
    }

    /// Calls `f(offset in the box, global address)` for each 16 bytes of the box at
    /// `coordinates`, with how many of its bytes lie within the tensor.
    pub(super) fn for_each_unit(&self, coordinates: &[u32], mut f: impl FnMut(u32, u64, u32)) {
        let element = self.element.bytes();
        let row_bytes = self.box_dims[0] * element;
        let rows: u32 = self.box_dims[1..].iter().product();
        // Addresses are computed modulo 2^64, as the copy engine computes them.
        for row in 0..rows {
            let mut address = self.address;
            let (mut rest, mut inside) = (row, true);
            for d in 1..self.dims.len() {
                let index = u64::from(rest % self.box_dims[d]) + u64::from(coordinates[d]);
                rest /= self.box_dims[d];
                inside &= index < self.dims[d];
                address = address.wrapping_add(index.wrapping_mul(self.strides_bytes[d - 1]));
            }
            for unit in (0..row_bytes).step_by(16) {
                let column = u64::from(coordinates[0]) + u64::from(unit / element);
                let left = self.dims[0].saturating_sub(column) * u64::from(element);
                let valid = if inside { left.min(16) as u32 } else { 0 };
                let address = address.wrapping_add(column * u64::from(element));
                f(row * row_bytes + unit, address, valid);
            }
        }
    }
}

/// Where the byte at `address` lies under a swizzle of `width` bytes: the number of its
/// row (of 128 bytes) is mixed into that of its 16-byte unit.
pub(super) fn swizzle(address: u32, width: u32) -> u32 {
    let mask = match width {
        32 => 1,
        64 => 3,
        128 => 7,
        _ => 0,
    };
    address ^ ((address >> 7 & mask) << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> TensorMapSpec {
        TensorMapSpec {
            address: 4096,
            element: Element::Bf16,
            dims: vec![96, 37, 3, 2],
            strides_bytes: vec![192, 37 * 192, 3 * 37 * 192],
            box_dims: vec![64, 16, 1, 1],
            swizzle_bytes: 128,
        }
    }

    #[test]
    fn what_is_encoded_comes_back() {
        let map = spec().encode().expect("the map is right");
        assert_eq!(TensorMapSpec::decode(&map), Some(spec()));
        assert_eq!(TensorMapSpec::decode(&TensorMap([0; 128])), None);
    }

    #[test]
    fn an_address_is_replaced_and_nothing_else() {
        let mut map = spec().encode().expect("the map is right");
        map.replace_address(8192).expect("a good address");
        assert_eq!(TensorMapSpec::decode(&map), Some(TensorMapSpec { address: 8192, ..spec() }));
        assert!(map.replace_address(8200).unwrap_err().to_string().contains("0x2008"));
        assert!(TensorMap([0; 128]).replace_address(0).is_err());
    }

    #[test]
    fn what_the_driver_refuses_is_refused() {
        type Change = fn(&mut TensorMapSpec);
        let wrong: [(&str, Change); 5] = [
            ("address", |s| s.address = 4098),
            ("stride", |s| s.strides_bytes[0] = 190),
            ("swizzle", |s| s.box_dims[0] = 96),
            ("257", |s| s.box_dims[1] = 257),
            ("strides", |s| s.strides_bytes.truncate(2)),
        ];
        for (what, change) in wrong {
            let mut spec = spec();
            change(&mut spec);
            let error = spec.encode().expect_err(what).to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn the_swizzle_is_its_own_inverse_and_stays_in_the_row() {
        for address in (0..2048).step_by(16) {
            let there = swizzle(address, 128);
            assert_eq!(swizzle(there, 128), address);
            assert_eq!(there / 128, address / 128);
        }
        // Row 3, unit 1 goes to unit 1 ^ 3 = 2.
        assert_eq!(swizzle(3 * 128 + 16, 128), 3 * 128 + 32);
    }
}
