//! Tensor maps, encoded as the emulator's copies read them.

use simt::tma::{Element, TensorMap, TensorMapSpec};

use crate::{
    P, call, code,
    state::{check_context, state},
    write,
};

/// A tensor map's type of elements by its number in the driver API.
const fn element_of(number: u32) -> Option<Element> {
    match number {
        6 => Some(Element::F16),
        7 => Some(Element::F32),
        9 => Some(Element::Bf16),
        _ => None,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuTensorMapEncodeTiled(
    map: P,
    element: u32,
    rank: u32,
    address: P,
    dims: *const u64,
    strides_bytes: *const u64,
    box_dims: *const u32,
    element_strides: *const u32,
    _interleave: u32,
    swizzle: u32,
    _l2_promotion: u32,
    _fill: u32,
) -> u32 {
    call(|| {
        // The driver computes nothing on the GPU here, and asks for a context all the same.
        check_context()?;
        let rank = rank as usize;
        let swizzle_bytes = [0, 32, 64, 128].get(swizzle as usize);
        let (Some(element), Some(&swizzle_bytes), 1..=5) =
            (element_of(element), swizzle_bytes, rank)
        else {
            return Err(code::INVALID_VALUE);
        };
        if !map.cast::<TensorMap>().is_aligned() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the driver API's contract: arrays of `rank` entries, the strides one less.
        let (dims, strides, boxes, steps) = unsafe {
            (
                std::slice::from_raw_parts(dims, rank),
                std::slice::from_raw_parts(strides_bytes, rank - 1),
                std::slice::from_raw_parts(box_dims, rank),
                std::slice::from_raw_parts(element_strides, rank),
            )
        };
        let spec = TensorMapSpec {
            address: address as u64,
            element,
            dims: dims.to_vec(),
            strides_bytes: strides.to_vec(),
            box_dims: boxes.to_vec(),
            swizzle_bytes,
        };
        state().maps_encoded += 1;
        match spec.encode() {
            Ok(encoded) if steps.iter().all(|&s| s == 1) => write(map, encoded),
            _ => Err(code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuTensorMapReplaceAddress(map: P, address: P) -> u32 {
    call(|| {
        check_context()?;
        let map = map.cast::<TensorMap>();
        if map.is_null() || !map.is_aligned() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the driver API's contract: the map is one that was encoded before.
        let map = unsafe { &mut *map };
        map.replace_address(address as u64).map_err(|_| code::INVALID_VALUE)
    })
}
