//! The devices that run kernels: a GPU through the CUDA driver, or the emulator on the CPU.
//!
//! Both offer the same few operations ([`Device`]), so the layers above (the session that runs a
//! problem, benchmarks, verification) exist once.

#[cfg(feature = "emulator")]
pub mod cpu;
pub mod gpu;
pub mod instruments;
pub mod memory;

use crate::error::Error;
use kernels_gpu::args::{
    AppendArgs, AttentionArgs, BackwardArgs, DecodeArgs, LinearArgs, MergeArgs, WithMaps,
};
use simt::tma::TensorMap;

#[cfg(feature = "emulator")]
pub use cpu::CpuDevice;
pub use gpu::GpuDevice;
pub use instruments::{Counters, Instruments};
pub use memory::{DeviceBuffer, DeviceTensor, Memory};

/// The values that a launch fixes before the driver compiles its entry.
pub use kernels_gpu::constants::Constants;
/// An entry of the kernels' PTX, under the name that launches use.
pub use kernels_gpu::entry::Entry;
/// Grid or block extent.
pub use simt::Dim3;

/// An entry with its specialisation constants, for the driver to compile.
#[derive(Clone, Copy, Debug)]
pub struct Specialised {
    /// The entry.
    pub entry: &'static Entry,
    /// The numbers in place of its constants' symbols.
    pub constants: Constants,
}

/// One launch of one entry.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The entry.
    pub entry: &'static Entry,
    /// The numbers in place of its constants' symbols.
    pub constants: Constants,
    /// Blocks of the grid.
    pub grid: Dim3,
    /// Threads of a block.
    pub block: Dim3,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The argument struct, as bytes in the layout of `kernels_gpu::args`.
    pub args: Vec<u8>,
}

impl Launch {
    /// The entry with its constants.
    #[must_use]
    pub const fn specialised(&self) -> Specialised {
        Specialised { entry: self.entry, constants: self.constants }
    }
}

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryInfo {
    /// Free now, by the device's own account.
    pub free: u64,
    /// In total.
    pub total: u64,
}

impl MemoryInfo {
    /// `free` of `total` bytes.
    #[must_use]
    pub const fn new(free: u64, total: u64) -> Self {
        Self { free, total }
    }
}

/// A machine that runs kernels. All addresses are the device's own.
///
/// Operations take effect in the order of the calls. For memory with an owner use [`Memory`], which
/// builds on the raw operations here.
///
/// # Safety
/// Safe code relies on these facts:
/// - `allocate` returns memory that overlaps no other live allocation.
/// - `free` gives memory back only after all earlier launches, copies and fills have ended, so no
///   operation outlives its memory.
/// - `download` returns after the bytes have arrived; `upload` has read its source when it returns.
pub unsafe trait Device: Send + Sync {
    /// A name to print: the GPU's or the emulator's.
    fn name(&self) -> String;
    /// Whether kernels run under the emulator: then times show the algorithm only.
    fn is_emulated(&self) -> bool;
    /// Compute capability `(major, minor)` whose instructions kernels may use.
    fn compute_capability(&self) -> (u32, u32);
    /// The most dynamic shared memory a block may have, in bytes.
    fn max_shared_bytes(&self) -> u32;
    /// Multiprocessors, from which a persistent kernel takes its number of blocks.
    fn multiprocessors(&self) -> u32;
    /// Free and total memory.
    ///
    /// # Errors
    /// An error that the device reports.
    fn memory_info(&self) -> Result<MemoryInfo, Error>;
    /// Allocates `bytes` bytes at an address aligned to 256, uninitialised.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], after which the device stays usable.
    fn allocate(&self, bytes: u64) -> Result<u64, Error>;
    /// Frees what `allocate` returned, once everything started before has ended.
    ///
    /// # Safety
    /// One `allocate` of this device gave `address` and `bytes`, not freed since.
    unsafe fn free(&self, address: u64, bytes: u64);
    /// Copies from the host to device memory.
    ///
    /// # Safety
    /// `data.len()` bytes at `address` lie in one live allocation of this device, and no other
    /// thread uses them meanwhile.
    ///
    /// # Errors
    /// An error that the device reports.
    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error>;
    /// Copies from device memory to the host.
    ///
    /// # Safety
    /// As for [`Device::upload`].
    ///
    /// # Errors
    /// An error that the device reports.
    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error>;
    /// Fills device memory with a byte.
    ///
    /// # Safety
    /// As for [`Device::upload`].
    ///
    /// # Errors
    /// An error that the device reports.
    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), Error>;
    /// Encodes a tensor map for TMA, for the kernel's parameter (`WithMaps`).
    ///
    /// # Errors
    /// A layout that the copy engine cannot describe.
    fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error>;
    /// Starts a launch; later operations wait for it.
    ///
    /// # Safety
    /// - `launch.args` holds the entry's argument struct.
    /// - Every buffer in it lies in a live allocation of this device, and stays allocated until
    ///   the launch has ended ([`Device::free`] waits for that).
    /// - Until then, no other thread writes those buffers, and none reads the buffers that the
    ///   kernel writes.
    ///
    /// # Errors
    /// A launch that does not fit its entry; an error that the device reports.
    unsafe fn launch(&self, launch: &Launch) -> Result<(), Error>;
    /// Waits for all earlier work, and reports its faults.
    ///
    /// # Errors
    /// The fault of a kernel that ran before.
    fn synchronize(&self) -> Result<(), Error>;
    /// The device's measuring instruments, where it has any.
    fn instruments(&self) -> Option<&dyn Instruments> {
        None
    }
}

/// A tensor map to encode: a strided view whose boxes TMA copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Device address of the first element, aligned to 16.
    pub address: u64,
    /// Element type.
    pub dtype: crate::dtype::DType,
    /// Extent of each dimension in elements, fastest first; at most five.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next for each dimension but the first.
    pub strides_bytes: Vec<u64>,
    /// Extent of the box that one copy moves.
    pub box_dims: Vec<u32>,
    /// Swizzle of the box's rows in shared memory, in bytes: 0 (none), 32, 64 or 128.
    pub swizzle_bytes: u32,
}

/// An argument struct that can be sent to a device as bytes.
///
/// # Safety
/// The first [`KernelArgs::FIELD_BYTES`] bytes of the type must be fields without
/// padding between them, so that they are initialised.
pub unsafe trait KernelArgs: Copy {
    /// Bytes up to the end of the last field.
    const FIELD_BYTES: usize;

    /// The struct as [`Launch::args`] holds it; padding at the end is zero.
    fn to_launch_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; size_of::<Self>()];
        // SAFETY: the trait promises that these bytes are initialised.
        let fields = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(self).cast::<u8>(), Self::FIELD_BYTES)
        };
        bytes[..Self::FIELD_BYTES].copy_from_slice(fields);
        bytes
    }
}

// Four tensors of 40 bytes, nine buffers of 16, six 64-bit numbers, eight of 32, and six more
// before the last; four bytes of padding at the end.
const _: () = assert!(
    std::mem::offset_of!(AttentionArgs, shape.head_dim_v)
        == 4 * 40 + 9 * 16 + 6 * 8 + 8 * 4 + 6 * 4
);
// SAFETY: the assertion above leaves no room for padding before the last field.
unsafe impl KernelArgs for AttentionArgs {
    const FIELD_BYTES: usize = std::mem::offset_of!(AttentionArgs, shape.head_dim_v) + 4;
}

// Four tensors of 40 bytes, a bias of 48, five buffers and two numbers of 32 bits before the forward's
// arguments.
const _: () = assert!(std::mem::offset_of!(BackwardArgs, forward) == 4 * 40 + 48 + 5 * 16 + 2 * 4);
// SAFETY: the assertion above leaves no room for padding before the forward's arguments.
unsafe impl KernelArgs for BackwardArgs {
    const FIELD_BYTES: usize =
        std::mem::offset_of!(BackwardArgs, forward) + AttentionArgs::FIELD_BYTES;
}

// Six buffers and four 32-bit numbers before the forward's arguments.
const _: () = assert!(std::mem::offset_of!(DecodeArgs, forward) == 6 * 16 + 4 * 4);
// SAFETY: the assertion above leaves no room for padding before the forward's arguments.
unsafe impl KernelArgs for DecodeArgs {
    const FIELD_BYTES: usize =
        std::mem::offset_of!(DecodeArgs, forward) + AttentionArgs::FIELD_BYTES;
}

// Six tensors of 40 bytes, the cache's 40, four buffers, and ten 32-bit numbers.
const _: () = assert!(size_of::<AppendArgs>() == 6 * 40 + 40 + 4 * 16 + 10 * 4);
// SAFETY: the assertion above leaves no room for padding.
unsafe impl KernelArgs for AppendArgs {
    const FIELD_BYTES: usize = size_of::<AppendArgs>();
}

// Four buffers and three 32-bit numbers; four bytes of padding at the end.
const _: () = assert!(std::mem::offset_of!(LinearArgs, out_features) == 4 * 16 + 2 * 4);
// SAFETY: the assertion above leaves no room for padding before the last field.
unsafe impl KernelArgs for LinearArgs {
    const FIELD_BYTES: usize = 4 * 16 + 3 * 4;
}

// Three tensors of 40 bytes, three buffers, a number of 64 bits and six of 32.
const _: () = assert!(size_of::<MergeArgs>() == 3 * 40 + 3 * 16 + 8 + 6 * 4);
// SAFETY: the assertion above leaves no room for padding.
unsafe impl KernelArgs for MergeArgs {
    const FIELD_BYTES: usize = size_of::<MergeArgs>();
}

// SAFETY: there is no byte.
unsafe impl KernelArgs for () {
    const FIELD_BYTES: usize = 0;
}

// SAFETY: maps are bytes, and the other arguments begin where they end, since no argument
// struct is aligned to more than a map.
unsafe impl<A: KernelArgs, const N: usize> KernelArgs for WithMaps<A, N> {
    const FIELD_BYTES: usize = {
        assert!(align_of::<A>() <= align_of::<TensorMap>());
        N * TensorMap::BYTES + A::FIELD_BYTES
    };
}
