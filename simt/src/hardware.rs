//! Facts about the hardware that the public modules and the emulator share. The public modules
//! call the emulator; the emulator takes these facts from here, and from none of them.

/// All lanes of a warp.
pub const FULL_MASK: u32 = u32::MAX;

/// Lanes of a warp.
pub const LANES: u32 = 32;

/// Threads of a warpgroup.
pub const WARPGROUP_THREADS: u32 = 128;

/// Registers of a multiprocessor.
const REGISTERS: u32 = 1 << 16;

/// Registers that each thread of a block of `threads` threads has when it begins, with a
/// multiprocessor to itself: what [`increase_registers`] takes must have been given back, so
/// that the sum over all threads stays within `threads` times that. A multiple of 8.
///
/// [`increase_registers`]: crate::warpgroup::increase_registers
#[must_use]
pub const fn registers_at_launch(threads: u32) -> u32 {
    let fair = REGISTERS / threads;
    let most = 255;
    (if fair < most { fair } else { most }) / 8 * 8
}

/// Bytes of an mbarrier.
pub const MBARRIER_BYTES: u32 = 8;

/// A tensor map: 128 bytes that the CUDA driver encodes for a GPU, and
/// [`TensorMapSpec::encode`] for the emulator. Copies are given its address, which may lie in
/// an entry's parameter ([`parameter`](crate::parameter)) or in global memory. What the host
/// wrote before the launch needs no fence. Aligned to 64 bytes; rustc compiles no entry for a
/// GPU whose parameter is aligned to more than 16, so that there the PTX builder says so.
///
/// [`TensorMapSpec::encode`]: crate::tma::TensorMapSpec::encode
#[cfg_attr(not(target_arch = "nvptx64"), repr(C, align(64)))]
#[cfg_attr(target_arch = "nvptx64", repr(C))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u8; TensorMap::BYTES]);

impl TensorMap {
    /// Size of a tensor map.
    pub const BYTES: usize = 128;
}

/// The most constants of a crate of kernels.
#[cfg(not(target_arch = "nvptx64"))]
pub const MAX_CONSTANTS: usize = 16;

/// The f32 of an f16's bits, as a shift and a product. `half` asks at each conversion what the
/// processor can, and then calls a function: half of the time of an emulated `mma.sync`.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
pub(crate) fn widen_f16(bits: u16) -> f32 {
    /// The difference of the exponents' biases. The product is exact, also of a subnormal.
    const TWO_TO_THE_112: f32 = f32::from_bits((127 + 112) << 23);
    let (sign, magnitude) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let finite = (f32::from_bits(magnitude << 13) * TWO_TO_THE_112).to_bits();
    let exponent = if magnitude >= 0x7c00 { 0xff << 23 } else { 0 };
    f32::from_bits(sign | exponent | finite)
}

#[cfg(all(test, not(target_arch = "nvptx64")))]
mod tests {
    use std::{fs, path::Path};

    use super::widen_f16;

    /// Otherwise the two sides would need each other.
    #[test]
    fn the_emulator_takes_nothing_from_the_modules_that_call_it() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/emulator");
        for file in fs::read_dir(folder).expect("the emulator's folder") {
            let path = file.expect("a file").path();
            let text = fs::read_to_string(&path).expect("a source file");
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            for rest in code.flat_map(|line| line.split("crate::").skip(1)) {
                let shared = ["Dim3", "hardware", "emulator"].iter().any(|m| rest.starts_with(m));
                assert!(shared, "{}: crate::{rest}", path.display());
            }
        }
    }

    #[test]
    fn every_f16_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (wide, expected) = (widen_f16(bits), half::f16::from_bits(bits).to_f32());
            assert_eq!(wide.is_nan(), expected.is_nan(), "{bits:#x}");
            assert!(wide.is_nan() || wide.to_bits() == expected.to_bits(), "{bits:#x}");
        }
    }
}
