//! Where kernels run: a GPU through the CUDA driver, or the emulator on the CPU.
//!
//! Both offer the same few operations ([`Device`]), so that everything above them
//! (the session that runs a problem, benchmarks, verification) is written once.

pub mod cpu;
pub mod gpu;
pub mod memory;

use crate::error::Error;
use kernels_gpu::args::{AttentionArgs, LinearArgs, ProbeArgs};

pub use cpu::CpuDevice;
pub use gpu::GpuDevice;
pub use memory::{DeviceBuffer, Memory};

/// Grid or block extent.
pub use simt::Dim3;

/// One launch of one entry.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Name of the `.entry`.
    pub symbol: String,
    /// Blocks of the grid.
    pub grid: Dim3,
    /// Threads of a block.
    pub block: Dim3,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The argument struct, as bytes in the layout of `kernels_gpu::args`.
    pub args: Vec<u8>,
}

/// Memory of a device in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free now, by the device's own account.
    pub free: u64,
    /// In total.
    pub total: u64,
}

/// What the emulator counted while kernels ran; a GPU counts nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that kernels asked to read from global memory.
    pub global_bytes_read: u64,
    /// Bytes that kernels asked to write to global memory.
    pub global_bytes_written: u64,
    /// Extra shared-memory passes caused by bank conflicts, where they are counted.
    pub bank_conflicts: u64,
}

/// A machine that runs kernels. All addresses are the device's own.
pub trait Device: Send + Sync {
    /// A name to print: the GPU's, or that of the emulator.
    fn name(&self) -> String;
    /// Whether kernels run under the emulator: then times show the algorithm only.
    fn is_emulated(&self) -> bool;
    /// Compute capability `(major, minor)` whose instructions kernels may use.
    fn compute_capability(&self) -> (u32, u32);
    /// The most dynamic shared memory a block may have, in bytes.
    fn max_shared_bytes(&self) -> u32;
    /// Multiprocessors: how many blocks a kernel that stays on the GPU launches.
    fn multiprocessors(&self) -> u32;
    /// Free and total memory.
    fn memory_info(&self) -> Result<MemoryInfo, Error>;
    /// Allocates `bytes` bytes at an address aligned to 256, uninitialised.
    /// Out of memory is [`Error::OutOfMemory`], and the device stays usable.
    fn allocate(&self, bytes: u64) -> Result<u64, Error>;
    /// Frees what `allocate` returned.
    fn free(&self, address: u64, bytes: u64);
    /// Copies from the host to device memory.
    fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error>;
    /// Copies from device memory to the host.
    fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error>;
    /// Fills device memory with a byte.
    fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), Error>;
    /// Encodes tensor maps for TMA: 128 bytes each, to be uploaded where the kernel
    /// expects them.
    fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error>;
    /// Starts a launch; later operations wait for it.
    fn launch(&self, launch: &Launch) -> Result<(), Error>;
    /// Waits for everything started, and reports what went wrong on the way.
    fn synchronize(&self) -> Result<(), Error>;
    /// Milliseconds that `work` keeps the device busy: events on a GPU, the clock
    /// under the emulator.
    fn time_ms(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f64, Error>;
    /// Overwrites the L2 cache, so that the next launch starts cold; nothing under
    /// the emulator.
    fn flush_l2(&self) -> Result<(), Error>;
    /// The counters since they were last taken; `None` on a GPU.
    fn take_counters(&self) -> Option<Counters>;
}

/// A tensor map to encode: a strided view that TMA copies boxes of.
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

// Four tensors, five buffers, eight 32-bit numbers, dropout: nothing left for padding.
const _: () = assert!(size_of::<AttentionArgs>() == 4 * 40 + 5 * 16 + 8 * 4 + 16);
// SAFETY: the assertion above leaves no room for padding.
unsafe impl KernelArgs for AttentionArgs {
    const FIELD_BYTES: usize = size_of::<Self>();
}

// SAFETY: a buffer is two numbers of 64 bits.
unsafe impl KernelArgs for ProbeArgs {
    const FIELD_BYTES: usize = size_of::<Self>();
}

// Five buffers and three 32-bit numbers; four bytes of padding at the end.
const _: () = assert!(std::mem::offset_of!(LinearArgs, out_features) == 5 * 16 + 2 * 4);
// SAFETY: the assertion above leaves no room for padding before the last field.
unsafe impl KernelArgs for LinearArgs {
    const FIELD_BYTES: usize = 5 * 16 + 3 * 4;
}
