//! Driver functions that cust's bindings do not have, or wrap in a way that loses
//! something.

use std::{
    ffi::{CStr, c_void},
    ptr,
};

use crate::{Failure, codes::ResultCode, forward, library, note_failure};

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

/// What a tensor map describes: a strided view, and the box that one copy moves.
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

type EncodeTiled = unsafe extern "C" fn(
    *mut TensorMap,
    u32,
    u32,
    *mut c_void,
    *const u64,
    *const u64,
    *const u32,
    *const u32,
    u32,
    u32,
    u32,
    u32,
) -> u32;

/// Encodes a tensor map (`cuTensorMapEncodeTiled`): elements outside the view read as
/// zero, lines are fetched to L2 by 128 bytes: more would fetch what other boxes ask for
/// again.
///
/// # Errors
/// The driver refuses the layout, or is older than CUDA 12.0 and lacks the function.
pub fn encode_tensor_map(layout: &TensorMapLayout<'_>) -> Result<[u8; 128], Failure> {
    const NAME: &str = "cuTensorMapEncodeTiled";
    const INTERLEAVE_NONE: u32 = 0;
    const L2_PROMOTION_128: u32 = 2;
    const FILL_ZERO: u32 = 0;
    let fail = |code| {
        note_failure(NAME, code);
        Failure { function: NAME, code }
    };
    let rank = layout.dims.len();
    let swizzle = match layout.swizzle_bytes {
        0 => 0,
        32 => 1,
        64 => 2,
        128 => 3,
        _ => return Err(fail(ResultCode::INVALID_VALUE)),
    };
    if !(1..=5).contains(&rank)
        || layout.strides_bytes.len() != rank - 1
        || layout.box_dims.len() != rank
    {
        return Err(fail(ResultCode::INVALID_VALUE));
    }
    let address = library::address(NAME).map_err(fail)?;
    // SAFETY: the driver's function of that name has this signature.
    let encode = unsafe { std::mem::transmute::<usize, EncodeTiled>(address) };
    let element_strides = [1u32; 5];
    let mut map = TensorMap([0; 128]);
    // SAFETY: the map is writable and aligned to 64, and each array has `rank`
    // entries (the strides one less), as checked. The address is only written down.
    let code = ResultCode(unsafe {
        encode(
            &raw mut map,
            layout.element as u32,
            rank as u32,
            ptr::with_exposed_provenance_mut(layout.address as usize),
            layout.dims.as_ptr(),
            layout.strides_bytes.as_ptr(),
            layout.box_dims.as_ptr(),
            element_strides.as_ptr(),
            INTERLEAVE_NONE,
            swizzle,
            L2_PROMOTION_128,
            FILL_ZERO,
        )
    });
    if code.is_success() { Ok(map.0) } else { Err(fail(code)) }
}

/// Compiles PTX in the current context once more to learn why it failed: the log of
/// the driver's compiler, empty if it says nothing.
#[must_use]
pub fn compile_log(ptx: &CStr) -> String {
    // The numbers of CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES.
    const ERROR_LOG: u32 = 5;
    const ERROR_LOG_BYTES: u32 = 6;
    const CAPACITY: usize = 16 << 10;
    let mut log = vec![0u8; CAPACITY];
    let mut options = [ERROR_LOG, ERROR_LOG_BYTES];
    // Options that fit a pointer are passed by value in its place.
    let mut values =
        [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut::<c_void>(CAPACITY)];
    let mut module = ptr::null_mut::<c_void>();
    // SAFETY: the text ends in a nul, the log has the capacity stated, and both
    // arrays have two entries.
    let code = unsafe {
        forward::cuModuleLoadDataEx(
            (&raw mut module).cast(),
            ptx.as_ptr().cast_mut().cast(),
            options.len() as u32,
            options.as_mut_ptr().cast(),
            values.as_mut_ptr().cast(),
        )
    };
    if code == 0 {
        // SAFETY: the module was loaded just now, and nothing else knows it.
        unsafe { forward::cuModuleUnload(module) };
    }
    let text = CStr::from_bytes_until_nul(&log).unwrap_or_default();
    text.to_string_lossy().trim().to_owned()
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
