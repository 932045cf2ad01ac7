//! Kernels on a GPU, through cust and the CUDA driver.
//!
//! One stream carries everything in order. Copies and fills go through the default
//! stream, which waits for it and which it waits for, so that the order of calls is
//! the order on the device.
//!
//! A kernel that accesses memory it may not takes the whole context with it: CUDA
//! answers every later call of the process with the same error. Such an error says
//! so. Running out of memory is not of that kind: the device stays usable.

mod describe;
mod failure;
mod kernels;

use std::{
    ffi::c_void,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cuda_driver::{TensorMapLayout, TensorMapType};
use cust::{
    context::{Context, CurrentContext},
    error::{CudaError, CudaResult},
    event::{Event, EventFlags},
    memory::{CopyDestination, DevicePointer, DeviceSlice},
    stream::{Stream, StreamFlags},
};

use crate::{
    backend::{Counters, Device, Instruments, Launch, MemoryInfo, TensorMapSpec},
    dtype::DType,
    error::Error,
};
use kernels::{Kernels, check_launch};

pub use describe::{GpuDescription, describe_all};
pub use kernels::why_not;

/// A GPU, with its context and the kernels loaded so far.
pub struct GpuDevice {
    // The order is that in which they are dropped: what belongs to the context first.
    kernels: Kernels,
    stream: Stream,
    flush: Mutex<Option<FlushBuffer>>,
    /// Entries launched since the device was last seen idle: the suspects of a fault.
    launched: Mutex<Vec<&'static str>>,
    description: GpuDescription,
    context: Context,
}

/// Memory that is written to push everything else out of the L2 cache.
struct FlushBuffer {
    address: u64,
    bytes: u64,
}

impl GpuDevice {
    /// Opens the GPU of that number, counted as CUDA does (`CUDA_VISIBLE_DEVICES`
    /// applies).
    ///
    /// # Errors
    /// [`Error::NoGpu`] says what is missing and how to get it.
    pub fn open(index: u32) -> Result<Self, Error> {
        let (device, description) = describe::device(index)?;
        let failed = |call: &str, error| failure::driver(&description.name, call, error);
        let context = Context::new(device).map_err(|e| failed("making a context", e))?;
        let stream =
            Stream::new(StreamFlags::DEFAULT, None).map_err(|e| failed("making a stream", e))?;
        Ok(Self {
            kernels: Kernels::default(),
            stream,
            flush: Mutex::default(),
            launched: Mutex::default(),
            description,
            context,
        })
    }

    /// What is known of this GPU. Its free memory is that of the time it was opened.
    #[must_use]
    pub const fn description(&self) -> &GpuDescription {
        &self.description
    }

    /// Runs driver calls with this GPU's context current on the calling thread.
    fn call<T>(
        &self,
        what: impl fmt::Display,
        calls: impl FnOnce() -> CudaResult<T>,
    ) -> Result<T, Error> {
        CurrentContext::set_current(&self.context)
            .and_then(|()| calls())
            .map_err(|error| self.failed(what, error))
    }

    fn failed(&self, what: impl fmt::Display, error: CudaError) -> Error {
        let code = failure::code(error);
        let suspects = lock(&self.launched);
        if failure::is_fault_of_a_kernel(code) && !suspects.is_empty() {
            return failure::kernel(&suspects.join(" or "), code);
        }
        failure::driver(&self.description.name, &what.to_string(), error)
    }

    /// Allocates; `None` when memory does not suffice.
    fn try_allocate(&self, bytes: u64) -> Result<Option<u64>, Error> {
        self.call(format_args!("allocating {bytes} bytes"), || {
            // SAFETY: the memory is freed by `free` only, and read by whoever wrote it.
            match unsafe { cust::memory::cuda_malloc::<u8>(bytes as usize) } {
                Ok(pointer) => Ok(Some(pointer.as_raw())),
                Err(CudaError::OutOfMemory) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    /// Frees the flush buffer; `false` when there is none.
    fn give_back_flush_buffer(&self) -> bool {
        let buffer = lock(&self.flush).take();
        if let Some(buffer) = &buffer {
            // SAFETY: the buffer was allocated here, and nothing else knows it.
            unsafe { self.free(buffer.address, buffer.bytes) };
        }
        buffer.is_some()
    }

    /// Memory to flush the cache with: as much of `wanted` as there is. Where kernels
    /// have taken nearly all, their own tensors are many times the cache, and a launch
    /// starts cold without a flush: no reason to call them out of memory.
    fn flush_buffer(&self, wanted: u64) -> Result<Option<FlushBuffer>, Error> {
        const LEAST: u64 = 64 << 10;
        let mut bytes = wanted;
        while bytes >= LEAST {
            match self.try_allocate(bytes)? {
                Some(address) => return Ok(Some(FlushBuffer { address, bytes })),
                None => bytes /= 2,
            }
        }
        Ok(None)
    }

    fn launch_checked(&self, launch: &Launch) -> Result<(), Error> {
        let kernel = self.kernels.get(launch.entry, &self.description)?;
        check_launch(launch, &self.description)?;
        let (grid, block) = (launch.grid, launch.block);
        let shared_bytes = launch.shared_bytes;
        // Made into text only if the launch fails.
        let what = format_args!(
            "launching {} on {}x{}x{} blocks of {} threads with {shared_bytes} bytes of shared memory",
            launch.entry.symbol,
            grid.x,
            grid.y,
            grid.z,
            block.count(),
        );
        // The driver copies the arguments during the call, and writes nothing to them.
        let mut params = [launch.args.as_ptr().cast_mut().cast::<c_void>()];
        self.call(what, || {
            kernel.allow_shared_bytes(shared_bytes)?;
            // SAFETY: the entry takes one parameter, of the size that was checked; the
            // kernel keeps the module that its function belongs to.
            let code = unsafe {
                cust::sys::cuLaunchKernel(
                    kernel.function(),
                    grid.x,
                    grid.y,
                    grid.z,
                    block.x,
                    block.y,
                    block.z,
                    shared_bytes,
                    self.stream.as_inner(),
                    params.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            failure::result(code)
        })?;
        let mut launched = lock(&self.launched);
        if !launched.contains(&launch.entry.symbol) {
            launched.push(launch.entry.symbol);
        }
        Ok(())
    }
}

// SAFETY: the driver's allocations are disjoint; its free waits for the work before it, and
// copies from and to pageable memory end before they return.
unsafe impl Device for GpuDevice {
    fn name(&self) -> String {
        self.description.name.clone()
    }

    fn is_emulated(&self) -> bool {
        false
    }

    fn compute_capability(&self) -> (u32, u32) {
        self.description.compute_capability
    }

    fn max_shared_bytes(&self) -> u32 {
        self.description.max_shared_bytes
    }

    fn multiprocessors(&self) -> u32 {
        self.description.multiprocessors
    }

    fn memory_info(&self) -> Result<MemoryInfo, Error> {
        let (free, total) = self.call("asking for free memory", cust::memory::mem_get_info)?;
        // The flush buffer makes way for an allocation.
        let flush = lock(&self.flush).as_ref().map_or(0, |buffer| buffer.bytes);
        Ok(MemoryInfo::new(free as u64 + flush, total as u64))
    }

    fn allocate(&self, bytes: u64) -> Result<u64, Error> {
        let mut address = self.try_allocate(bytes)?;
        if address.is_none() && self.give_back_flush_buffer() {
            address = self.try_allocate(bytes)?;
        }
        match address {
            Some(address) => Ok(address),
            None => Err(Error::OutOfMemory {
                device: self.name(),
                needed: bytes,
                free: self.memory_info()?.free,
            }),
        }
    }

    unsafe fn free(&self, address: u64, bytes: u64) {
        // It can fail only when the context is lost, and with it the memory.
        _ = self.call(format_args!("freeing {bytes} bytes"), || {
            // SAFETY: the caller got the address from `allocate`, and gives it up.
            unsafe { cust::memory::cuda_free(DevicePointer::<u8>::from_raw(address)) }
        });
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        self.call(format_args!("copying {} bytes to the GPU", data.len()), || {
            // SAFETY: the caller vouches for the device memory.
            unsafe { slice(address, data.len()) }.copy_from(data)
        })
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        self.call(format_args!("copying {} bytes from the GPU", data.len()), || {
            // SAFETY: the caller vouches for the device memory.
            unsafe { slice(address, data.len()) }.copy_to(data)
        })
    }

    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), Error> {
        self.call(format_args!("filling {bytes} bytes"), || {
            // SAFETY: the caller vouches for the device memory.
            unsafe { slice(address, bytes as usize) }.set_8(value)
        })
    }

    fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error> {
        let layout = TensorMapLayout {
            address: map.address,
            element: match map.dtype {
                DType::F32 => TensorMapType::F32,
                DType::F16 => TensorMapType::F16,
                DType::BF16 => TensorMapType::Bf16,
            },
            dims: &map.dims,
            strides_bytes: &map.strides_bytes,
            box_dims: &map.box_dims,
            swizzle_bytes: map.swizzle_bytes,
        };
        cuda_driver::encode_tensor_map(&layout).map_err(|failure| Error::Driver {
            call: failure.function.to_owned(),
            message: format!("{} for {map:?}", failure.code),
        })
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<(), Error> {
        CurrentContext::set_current(&self.context)
            .map_err(|error| self.failed("making the context current", error))?;
        self.launch_checked(launch)
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.call("waiting for kernels", || self.stream.synchronize())?;
        lock(&self.launched).clear();
        Ok(())
    }

    fn instruments(&self) -> Option<&dyn Instruments> {
        Some(self)
    }
}

impl Instruments for GpuDevice {
    fn time_ms(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        let start = self.call("recording the start", || {
            let event = Event::new(EventFlags::DEFAULT)?;
            event.record(&self.stream)?;
            Ok(event)
        })?;
        work()?;
        let milliseconds = self.call("waiting for kernels", || {
            let end = Event::new(EventFlags::DEFAULT)?;
            end.record(&self.stream)?;
            end.synchronize()?;
            end.elapsed_time_f32(&start)
        })?;
        lock(&self.launched).clear();
        Ok(milliseconds.into())
    }

    fn flush_l2(&self) -> Result<(), Error> {
        // Twice the cache, so that nothing of what was there is left.
        let wanted = 2 * u64::from(self.description.l2_bytes);
        let mut flush = lock(&self.flush);
        if flush.as_ref().is_none_or(|buffer| buffer.bytes < wanted) {
            if let Some(small) = flush.take() {
                // SAFETY: the buffer was allocated here, and nothing else knows it.
                unsafe { self.free(small.address, small.bytes) };
            }
            *flush = self.flush_buffer(wanted)?;
        }
        let Some(buffer) = &*flush else { return Ok(()) };
        self.call("overwriting the L2 cache", || {
            // SAFETY: the buffer has that length, is used for nothing else, and lives
            // as long as the stream.
            unsafe { slice(buffer.address, buffer.bytes as usize).set_8_async(0, &self.stream) }
        })
    }

    fn take_counters(&self) -> Option<Counters> {
        None
    }
}

impl Drop for GpuDevice {
    fn drop(&mut self) {
        self.give_back_flush_buffer();
        // What is dropped next belongs to this context. Without it (a lost context)
        // there is nothing left to release.
        _ = CurrentContext::set_current(&self.context);
    }
}

/// Device memory as cust sees it.
///
/// # Safety
/// `bytes` bytes at `address` must be device memory that nothing else refers to.
unsafe fn slice(address: u64, bytes: usize) -> DeviceSlice<u8> {
    // SAFETY: passed on to the caller.
    unsafe { DeviceSlice::from_raw_parts_mut(DevicePointer::from_raw(address), bytes) }
}

/// Locks what is never left half done, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
