//! Kernels on a GPU, through the CUDA driver.
//!
//! One stream carries everything in order: the order of calls is the order on the device. An
//! [`Owner`] has the context, the stream and the memory: the driver's own functions for
//! [`GpuDevice`], or another library that the program uses.
//!
//! A kernel that accesses invalid memory destroys the whole context: CUDA answers every later call
//! of the process with the same error. The error message says so. After running out of memory the
//! device stays usable.

mod describe;
mod owner;

use std::{
    ffi::c_void,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cuda_driver::Graph;
pub use cuda_driver::ResultCode;

use crate::{
    backend::{Counters, Device, Instruments, Launch, MemoryInfo, TensorMapSpec},
    error::Error,
    raw::{
        self,
        context::{Description, Entered},
        failure,
    },
};

pub use crate::raw::why_not;
pub use describe::{GpuDescription, describe_all};
pub use owner::{DriverEvent, DriverOwner, Owner};

/// A GPU on the driver's own functions, for a program that has no context yet.
pub type GpuDevice = Gpu<DriverOwner>;

/// A GPU whose context, stream and memory `O` owns, with the kernels loaded so far.
pub struct Gpu<O: Owner> {
    // The order is that in which they are dropped: what belongs to the context first.
    context: raw::Context,
    owner: O,
    flush: Mutex<Option<FlushBuffer>>,
    /// Entries launched since the device was last idle: the candidates for the cause of a fault.
    launched: Mutex<Vec<&'static str>>,
    description: GpuDescription,
}

/// Memory whose overwriting evicts all other data from the L2 cache.
struct FlushBuffer {
    address: u64,
    bytes: u64,
}

impl<O: Owner> Gpu<O> {
    /// Opens the GPU with this number, in CUDA's order (`CUDA_VISIBLE_DEVICES` applies).
    ///
    /// # Errors
    /// [`Error::NoGpu`] names the missing part and how to get it.
    pub fn open(index: u32) -> Result<Self, Error> {
        let description = describe::describe(index)?;
        let failed = |code| failure::driver(&description.name, "making a context", code);
        // An owner may leave its context current.
        let _before = Entered::as_it_is().map_err(|failure| failed(failure.code))?;
        let owner = O::open(index).map_err(failed)?;
        // SAFETY: the owner's context lives as long as the owner, which is dropped after this
        // value; `drop` waits for the launches before.
        let context = unsafe { raw::Context::from_handle(owner.context()) }?;
        Ok(Self {
            context,
            owner,
            flush: Mutex::default(),
            launched: Mutex::default(),
            description,
        })
    }

    /// The properties of this GPU. Its free memory is the value at the time of opening.
    #[must_use]
    pub const fn description(&self) -> &GpuDescription {
        &self.description
    }

    /// The context, for launches on the caller's own streams.
    #[must_use]
    pub const fn context(&self) -> &raw::Context {
        &self.context
    }

    /// The stream of all this device's work, a `CUstream`: for launches that come before or after
    /// the device's own launches.
    #[must_use]
    pub fn stream(&self) -> *mut c_void {
        self.owner.stream()
    }

    /// Runs calls of the owner with its context current on the calling thread.
    fn call<T>(
        &self,
        what: impl fmt::Display,
        calls: impl FnOnce(&O) -> Result<T, ResultCode>,
    ) -> Result<T, Error> {
        self.context
            .enter()
            .and_then(|_entered| calls(&self.owner))
            .map_err(|code| self.failed(what, code))
    }

    fn failed(&self, what: impl fmt::Display, code: ResultCode) -> Error {
        let suspects = lock(&self.launched);
        if failure::is_fault_of_a_kernel(code) && !suspects.is_empty() {
            return failure::kernel(&suspects.join(" or "), code);
        }
        failure::driver(&self.description.name, &what.to_string(), code)
    }

    /// Allocates; `None` when there is too little memory.
    fn try_allocate(&self, bytes: u64) -> Result<Option<u64>, Error> {
        self.call(format_args!("allocating {bytes} bytes"), |owner| match owner.allocate(bytes) {
            Ok(address) => Ok(Some(address)),
            Err(ResultCode::OUT_OF_MEMORY) => Ok(None),
            Err(code) => Err(code),
        })
    }

    /// Waits for the stream, then frees, so no launch outlives its memory.
    ///
    /// # Safety
    /// `address` is the address of a live allocation of the owner, which the caller gives up.
    unsafe fn free_after_work(&self, address: u64) -> Result<(), Error> {
        self.call("freeing memory", |owner| {
            match owner.synchronize() {
                Ok(()) => lock(&self.launched).clear(),
                // A lost context runs nothing any more.
                Err(code) if code.is_sticky() => {}
                // Something may still run: memory that is lost is better than memory that is
                // used twice.
                Err(code) => return Err(code),
            }
            // SAFETY: the caller gives the allocation up, and nothing that uses it runs.
            unsafe { owner.free(address) }
        })
    }

    /// Frees the flush buffer; `false` when there is none.
    fn give_back_flush_buffer(&self) -> bool {
        let buffer = lock(&self.flush).take();
        buffer.inspect(|buffer| self.free_flush_buffer(buffer)).is_some()
    }

    fn free_flush_buffer(&self, buffer: &FlushBuffer) {
        // It can fail only when the context is lost, and with it the memory.
        // SAFETY: the buffer was allocated here, and nothing else knows it.
        _ = unsafe { self.free_after_work(buffer.address) };
    }

    /// Memory to flush the cache with: as much of `wanted` as there is. Where kernels have taken
    /// nearly all memory, their own tensors are many times the cache, and a launch starts cold
    /// without a flush; this is no reason to report that memory ran out.
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
}

// SAFETY: the owner's allocations are disjoint, and its stream keeps the order of the calls;
// `free` waits for it; copies have ended when they return, as the owner promises.
unsafe impl<O: Owner> Device for Gpu<O> {
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
        let (free, total) = self.call("asking for free memory", O::memory)?;
        // The flush buffer makes way for an allocation.
        let flush = lock(&self.flush).as_ref().map_or(0, |buffer| buffer.bytes);
        Ok(MemoryInfo::new(free + flush, total))
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

    unsafe fn free(&self, address: u64, _bytes: u64) {
        // It can fail only when the context is lost, and with it the memory.
        // SAFETY: the caller got the address from `allocate`, and gives it up.
        _ = unsafe { self.free_after_work(address) };
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        self.call(format_args!("copying {} bytes to the GPU", data.len()), |owner| {
            // SAFETY: `Device::upload` asks what `Owner::upload` asks: one live allocation, no
            // other user.
            unsafe { owner.upload(address, data) }
        })
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        self.call(format_args!("copying {} bytes from the GPU", data.len()), |owner| {
            // SAFETY: `Device::download` asks what `Owner::download` asks: one live allocation, no
            // other user.
            unsafe { owner.download(address, data) }
        })
    }

    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), Error> {
        self.call(format_args!("filling {bytes} bytes"), |owner| {
            // SAFETY: the bytes lie in one live allocation, as `Device::fill` asks; `free` waits
            // for the stream.
            unsafe { owner.fill(address, bytes, value) }
        })
    }

    fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error> {
        self.context.encode_tensor_map(map)
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<(), Error> {
        // SAFETY: the owner's stream belongs to its context. `Device::launch` asks for the argument
        // struct, live buffers, and no other user of them; `free` waits for the launch.
        unsafe { self.context.start(launch, self.owner.stream()) }?
            .map_err(|code| self.failed(Description(launch), code))?;
        let mut launched = lock(&self.launched);
        if !launched.contains(&launch.entry.symbol) {
            launched.push(launch.entry.symbol);
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.call("waiting for kernels", O::synchronize)?;
        lock(&self.launched).clear();
        Ok(())
    }

    fn instruments(&self) -> Option<&dyn Instruments> {
        Some(self)
    }
}

impl<O: Owner> Instruments for Gpu<O> {
    fn time_ms(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        let start = self.call("recording the start", O::record)?;
        work()?;
        let milliseconds = self.call("waiting for kernels", |owner| {
            let end = owner.record()?;
            owner.elapsed_ms(&start, &end)
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
                self.free_flush_buffer(&small);
            }
            *flush = self.flush_buffer(wanted)?;
        }
        let Some(buffer) = &*flush else { return Ok(()) };
        self.call("overwriting the L2 cache", |owner| {
            // SAFETY: the buffer has that length, is used for nothing else, and is freed
            // after the stream is empty.
            unsafe { owner.fill(buffer.address, buffer.bytes, 0) }
        })
    }

    fn copy_rate(&self) -> Result<Option<f64>, Error> {
        // Many times what an L2 cache holds.
        const BYTES: u64 = 1 << 31;
        const COPIES: usize = 5;
        let Some(buffer) = self.flush_buffer(BYTES)? else { return Ok(None) };
        let half = buffer.bytes / 2;
        let copy = || {
            self.time_ms(&mut || {
                self.call("copying the GPU's memory", |owner| {
                    // SAFETY: the halves of a buffer of which nobody else knows;
                    // `free_flush_buffer` waits for the stream.
                    unsafe { owner.copy(buffer.address, buffer.address + half, half) }
                })
            })
        };
        let times: Result<Vec<f64>, Error> = (0..COPIES).map(|_| copy()).collect();
        self.free_flush_buffer(&buffer);
        let best = times?.into_iter().fold(f64::INFINITY, f64::min);
        Ok((best > 0.0).then(|| 2.0 * half as f64 / best * 1e-6))
    }

    fn replayed_ms(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
        replays: usize,
    ) -> Result<Option<f64>, Error> {
        // Current until the graph is gone.
        let _entered =
            self.context.enter().map_err(|code| self.failed("capturing launches", code))?;
        let stream = self.owner.stream();
        // SAFETY: the owner's stream belongs to its context, which is current.
        let graph = unsafe { Graph::capture(stream, work) }
            .map_err(|failure| self.failed("capturing launches", failure.code))??;
        let launch = || {
            // SAFETY: as above. What `work` borrows lives longer than this call, and memory that it gave
            // up itself is not free: freeing waits, which breaks a capture.
            unsafe { graph.launch(stream) }
                .map_err(|failure| self.failed("launching a graph", failure.code))
        };
        launch()?;
        let replays = replays.max(1);
        let all = self.time_ms(&mut || (0..replays).try_for_each(|_| launch()))?;
        Ok(Some(all / replays as f64))
    }

    fn l2_bytes(&self) -> Option<u64> {
        Some(self.description.l2_bytes.into())
    }

    fn take_counters(&self) -> Option<Counters> {
        None
    }
}

impl<O: Owner> fmt::Debug for Gpu<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("description", &self.description)
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}

impl<O: Owner> Drop for Gpu<O> {
    fn drop(&mut self) {
        // The kernels that are unloaded next must not be running. In a lost context none is.
        _ = self.call("waiting for kernels", O::synchronize);
        self.give_back_flush_buffer();
    }
}

/// Locks a mutex whose data is never left inconsistent, even after a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
