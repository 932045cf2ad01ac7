//! Tensor maps: what the copy engine (TMA) is told of a tensor.

use std::{ffi::c_void, ptr, sync::OnceLock};

use crate::{Failure, ResultCode, functions::call, library};

/// Element types of a tensor map, by their number in the driver API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TensorMapType {
    /// IEEE half precision.
    F16 = 6,
    /// IEEE single precision.
    F32 = 7,
    /// bfloat16.
    Bf16 = 9,
}

/// The layout of a tensor map: a strided view, and the box that one copy moves.
#[derive(Clone, Copy, Debug)]
pub struct TensorMapLayout<'a> {
    /// Device address of the first element, aligned to 16.
    pub address: u64,
    /// Element type.
    pub element: TensorMapType,
    /// Extent of each dimension in elements, fastest first; one to five.
    pub dims: &'a [u64],
    /// Bytes from one index to the next for each dimension but the first.
    pub strides_bytes: &'a [u64],
    /// Extent of the box in elements.
    pub box_dims: &'a [u32],
    /// Swizzle of the box's rows in bytes: 0, 32, 64 or 128.
    pub swizzle_bytes: u32,
}

#[repr(C, align(64))]
struct TensorMap([u8; 128]);

/// Encodes a tensor map (`cuTensorMapEncodeTiled`): elements outside the view read as
/// zero, lines are fetched to L2 by 128 bytes: more would fetch what other boxes ask for
/// again.
///
/// # Errors
/// The driver refuses the layout, or is older than CUDA 12.0 and lacks the function.
pub fn encode_tensor_map(layout: &TensorMapLayout<'_>) -> Result<[u8; 128], Failure> {
    const INTERLEAVE_NONE: u32 = 0;
    const L2_PROMOTION_128: u32 = 2;
    const FILL_ZERO: u32 = 0;
    const ELEMENT_STRIDES: [u32; 5] = [1; 5];
    let refused = Failure { function: "cuTensorMapEncodeTiled", code: ResultCode::INVALID_VALUE };
    let rank = layout.dims.len();
    let swizzle = match layout.swizzle_bytes {
        0 => 0,
        32 => 1,
        64 => 2,
        128 => 3,
        _ => return Err(refused),
    };
    if !(1..=5).contains(&rank)
        || layout.strides_bytes.len() != rank - 1
        || layout.box_dims.len() != rank
    {
        return Err(refused);
    }
    let mut map = TensorMap([0; 128]);
    // The map is writable and aligned to 64, and each array has `rank` entries (the strides
    // one less), as checked. The address is only written down.
    call!(cuTensorMapEncodeTiled(
        &raw mut map => *mut TensorMap,
        layout.element as u32 => u32,
        rank as u32 => u32,
        ptr::with_exposed_provenance_mut(layout.address as usize) => *mut c_void,
        layout.dims.as_ptr() => *const u64,
        layout.strides_bytes.as_ptr() => *const u64,
        layout.box_dims.as_ptr() => *const u32,
        ELEMENT_STRIDES.as_ptr() => *const u32,
        INTERLEAVE_NONE => u32,
        swizzle => u32,
        L2_PROMOTION_128 => u32,
        FILL_ZERO => u32,
    ))?;
    Ok(map.0)
}

/// Gives an encoded tensor map another address of the first element, aligned to 16
/// (`cuTensorMapReplaceAddress`).
///
/// # Errors
/// The driver refuses the address or the map, or is older than CUDA 12.0 and lacks the function.
pub fn replace_address(map: &mut [u8; 128], address: u64) -> Result<(), Failure> {
    let mut aligned = TensorMap(*map);
    // The map is writable and aligned to 64. The address is only written down.
    call!(cuTensorMapReplaceAddress(
        &raw mut aligned => *mut TensorMap,
        ptr::with_exposed_provenance_mut(address as usize) => *mut c_void,
    ))?;
    *map = aligned.0;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_that_disagree_with_themselves_are_refused() {
        let layout = TensorMapLayout {
            address: 0,
            element: TensorMapType::F16,
            dims: &[64, 128],
            strides_bytes: &[128],
            box_dims: &[64, 64],
            swizzle_bytes: 128,
        };
        for bad in [
            TensorMapLayout { dims: &[], ..layout },
            TensorMapLayout { dims: &[1; 6], ..layout },
            TensorMapLayout { strides_bytes: &[], ..layout },
            TensorMapLayout { box_dims: &[64], ..layout },
            TensorMapLayout { swizzle_bytes: 16, ..layout },
        ] {
            let failure = encode_tensor_map(&bad).unwrap_err();
            assert_eq!(failure.code, ResultCode::INVALID_VALUE, "{bad:?}");
        }
    }
}
