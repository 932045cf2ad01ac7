//! The emulator as a device: kernels run on the CPU, on host memory, and the emulator checks every
//! access. It serves to compute without a GPU and to find mistakes in kernels. Its times do not
//! predict a GPU's.

use std::{
    alloc::{self, Layout},
    collections::BTreeMap,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use kernels_gpu::entry::ArgsCopy;
/// The options of a launch under the emulator, and its counts.
pub use simt::emulator;
use simt::tma;

use crate::{
    backend::{Counters, Device, Instruments, Launch, MemoryInfo, TensorMapSpec},
    dtype::DType,
    error::Error,
};

/// Alignment of allocations, as the CUDA driver's.
const ALIGNMENT: usize = 256;
/// Reported as total memory without a limit: the range of an address.
const UNLIMITED: u64 = 1 << 47;

#[derive(Debug, Default)]
struct State {
    /// Length of each allocation by its address.
    allocations: BTreeMap<u64, u64>,
    allocated: u64,
    counters: Counters,
    options: emulator::Options,
}

/// The emulator.
#[derive(Debug, Default)]
pub struct CpuDevice {
    limit: Option<u64>,
    /// Timed launches skip the check for races on global memory.
    timing: AtomicBool,
    stop: Arc<AtomicBool>,
    state: Mutex<State>,
}

impl CpuDevice {
    /// An emulator with as much memory as the machine has.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An emulator with a memory limit of `bytes`.
    #[must_use]
    pub fn with_memory_limit(bytes: u64) -> Self {
        let mut device = Self::new();
        device.limit = Some(bytes);
        device
    }

    /// The same emulator, whose launches end soon with [`Error::Stopped`] once `stop` is true.
    #[must_use]
    pub fn stopped_by(mut self, stop: Arc<AtomicBool>) -> Self {
        self.stop = stop;
        self
    }

    /// Sets how launches run from now on: their seed, checks, budget, a change of one
    /// synchronisation, and the recorder. The launch supplies the constants and the name, and
    /// [`stopped_by`](Self::stopped_by) supplies the stop flag; `options`' values for these are
    /// ignored.
    pub fn set_options(&self, options: emulator::Options) {
        self.state().options = options;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host pointer to `bytes` bytes at `address`, if they are inside one allocation.
    fn pointer(state: &State, address: u64, bytes: usize) -> Result<*mut u8, Error> {
        let bytes = bytes as u64;
        let inside = state.allocations.range(..=address).next_back().is_some_and(|(start, len)| {
            address.checked_add(bytes).is_some_and(|end| end <= start + len)
        });
        if !inside {
            return Err(Error::BadAddress { address, bytes });
        }
        Ok(std::ptr::with_exposed_provenance_mut(address as usize))
    }
}

// SAFETY: allocations come from the host's allocator and are disjoint; every operation has
// ended when its call returns.
unsafe impl Device for CpuDevice {
    fn name(&self) -> String {
        let threads = rayon::current_num_threads();
        format!("CPU emulator ({threads} thread{})", if threads == 1 { "" } else { "s" })
    }

    fn is_emulated(&self) -> bool {
        true
    }

    /// The compute capability of Hopper, the newest GPU whose instructions the emulator has.
    fn compute_capability(&self) -> (u32, u32) {
        (9, 0)
    }

    fn max_shared_bytes(&self) -> u32 {
        emulator::MAX_SHARED_BYTES
    }

    /// Few, so that each block of a persistent kernel has several tiles, as on a GPU.
    fn multiprocessors(&self) -> u32 {
        2
    }

    fn memory_info(&self) -> Result<MemoryInfo, Error> {
        let total = self.limit.unwrap_or(UNLIMITED);
        Ok(MemoryInfo::new(total.saturating_sub(self.state().allocated), total))
    }

    fn allocate(&self, bytes: u64) -> Result<u64, Error> {
        let mut state = self.state();
        let free = self.limit.unwrap_or(UNLIMITED).saturating_sub(state.allocated);
        let out_of_memory = || Error::OutOfMemory { device: self.name(), needed: bytes, free };
        if bytes > free {
            return Err(out_of_memory());
        }
        let layout = layout(bytes).ok_or_else(out_of_memory)?;
        // SAFETY: the layout has at least one byte. Zeroed, because a download of bytes that
        // were never written would be undefined behaviour otherwise.
        let memory =
            NonNull::new(unsafe { alloc::alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        let address = memory.as_ptr().expose_provenance() as u64;
        state.allocations.insert(address, bytes);
        state.allocated += bytes;
        Ok(address)
    }

    unsafe fn free(&self, address: u64, _bytes: u64) {
        let mut state = self.state();
        let Some(bytes) = state.allocations.remove(&address) else { return };
        state.allocated -= bytes;
        if let Some(layout) = layout(bytes) {
            // SAFETY: the table says that `allocate` made this address with this layout,
            // and it is no longer in the table.
            unsafe {
                alloc::dealloc(std::ptr::with_exposed_provenance_mut(address as usize), layout)
            }
        }
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        let state = self.state();
        let target = Self::pointer(&state, address, data.len())?;
        // SAFETY: the range is inside a live allocation, which no Rust reference leads to.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len()) };
        Ok(())
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        let state = self.state();
        let source = Self::pointer(&state, address, data.len())?;
        // SAFETY: as for `upload`; every byte was initialised by `allocate`.
        unsafe { std::ptr::copy_nonoverlapping(source, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), Error> {
        let state = self.state();
        let target = Self::pointer(&state, address, bytes as usize)?;
        // SAFETY: as for `upload`.
        unsafe { std::ptr::write_bytes(target, value, bytes as usize) };
        Ok(())
    }

    fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error> {
        let spec = tma::TensorMapSpec {
            address: map.address,
            element: match map.dtype {
                DType::F32 => tma::Element::F32,
                DType::F16 => tma::Element::F16,
                DType::BF16 => tma::Element::Bf16,
                DType::E4M3 => {
                    let reason = "no kernel copies e4m3 through one".into();
                    return Err(Error::TensorMap { reason });
                }
            },
            dims: map.dims.clone(),
            strides_bytes: map.strides_bytes.clone(),
            box_dims: map.box_dims.clone(),
            swizzle_bytes: map.swizzle_bytes,
        };
        match spec.encode() {
            Ok(encoded) => Ok(encoded.0),
            Err(error) => Err(Error::TensorMap { reason: error.to_string() }),
        }
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<(), Error> {
        let entry = launch.entry;
        let symbol = || entry.symbol.to_owned();
        for (what, given, expected) in [
            ("size of the arguments", launch.args.len() as u64, entry.args_bytes as u64),
            ("threads of a block", launch.block.count(), u64::from(entry.threads)),
        ] {
            if given != expected {
                return Err(Error::BadLaunch { symbol: symbol(), what, given, expected });
            }
        }
        // The bytes of a `Vec<u8>` need not be aligned for the struct.
        let args = ArgsCopy::new(&launch.args);
        let run = entry.run;
        // SAFETY: the bytes are the entry's argument struct, as its maker and the size
        // checked above say; buffers in it live until the launch ends, since whoever
        // holds them is waiting for it.
        let kernel = || unsafe { run(args.as_ptr()) };
        let extent = emulator::Launch {
            grid: launch.grid,
            block: launch.block,
            cluster: entry.cluster,
            shared_bytes: launch.shared_bytes,
        };
        let mut options = self.state().options.clone();
        (options.constants, options.stop) = (launch.constants.values(), Some(self.stop.clone()));
        options.name = entry.symbol;
        // The record of global memory doubles the time, and tells nothing of a repeated run.
        options.checks.global_races &= !self.timing.load(Ordering::Relaxed);
        let stats =
            emulator::launch_with(extent, &options, &kernel).map_err(|fault| match fault.kind {
                emulator::FaultKind::Stopped => Error::Stopped,
                _ => Error::Kernel { symbol: symbol(), fault: Box::new(fault) },
            })?;
        let counters = &mut self.state().counters;
        counters.global_bytes_read += stats.global_bytes_read;
        counters.global_bytes_written += stats.global_bytes_written;
        counters.bank_conflicts += stats.bank_conflicts;
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }

    fn instruments(&self) -> Option<&dyn Instruments> {
        Some(self)
    }
}

impl Instruments for CpuDevice {
    fn time_ms(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f64, Error> {
        self.timing.store(true, Ordering::Relaxed);
        let start = Instant::now();
        let done = work();
        let elapsed = start.elapsed();
        self.timing.store(false, Ordering::Relaxed);
        done.map(|()| elapsed.as_secs_f64() * 1e3)
    }

    fn flush_l2(&self) -> Result<(), Error> {
        Ok(())
    }

    fn copy_rate(&self) -> Result<Option<f64>, Error> {
        Ok(None)
    }

    fn take_counters(&self) -> Option<Counters> {
        Some(std::mem::take(&mut self.state().counters))
    }
}

impl Drop for CpuDevice {
    fn drop(&mut self) {
        let addresses: Vec<u64> = self.state().allocations.keys().copied().collect();
        for address in addresses {
            // SAFETY: the table lists live allocations, and nobody else can use the device now.
            unsafe { self.free(address, 0) };
        }
    }
}

fn layout(bytes: u64) -> Option<Layout> {
    Layout::from_size_align(usize::try_from(bytes.max(1)).ok()?, ALIGNMENT).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        backend::{Constants, Memory},
        session::Work,
    };

    #[test]
    fn memory_is_counted_to_the_byte_and_limited() {
        let device = Arc::new(CpuDevice::with_memory_limit(1000));
        let memory = Memory::new(device.clone());
        let a = memory.upload(&[1.0f32, 2.0]).unwrap();
        assert_eq!(a.address() % 256, 0);
        let b = memory.filled(900, 7).unwrap();
        assert_eq!((memory.current(), memory.peak()), (908, 908));
        drop(b);
        assert_eq!((memory.current(), memory.peak()), (8, 908));
        let part = memory.part();
        drop(part.filled(100, 7).unwrap());
        assert_eq!((part.current(), part.peak(), memory.peak()), (0, 100, 908));
        assert!(memory.allocate(993).err().unwrap().is_out_of_memory());
        assert_eq!(a.to_vec::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(device.memory_info().unwrap(), MemoryInfo { free: 992, total: 1000 });
        assert!(memory.allocate(0).is_ok());
    }

    #[test]
    fn addresses_outside_of_an_allocation_are_refused() {
        let device = CpuDevice::new();
        let address = device.allocate(16).unwrap();
        // SAFETY: one thread; ranges outside of the allocation are refused, as is shown here.
        unsafe {
            assert!(device.upload(address + 8, &[0; 8]).is_ok());
            assert!(matches!(device.upload(address + 9, &[0; 8]), Err(Error::BadAddress { .. })));
            assert!(device.download(address - 1, &mut [0]).is_err());
            device.free(address, 16);
            assert!(device.fill(address, 1, 0).is_err());
        }
    }

    #[test]
    fn a_launch_must_fit_its_entry() {
        let entry = kernels_gpu::find("naive_scores_f32_d32").unwrap();
        let launch = Launch {
            entry,
            constants: Constants::default(),
            grid: 1.into(),
            block: 1.into(),
            shared_bytes: 0,
            args: Vec::new(),
        };
        // SAFETY: refused before anything runs, as is shown here.
        let error = unsafe { CpuDevice::new().launch(&launch) }.unwrap_err();
        assert!(error.to_string().contains("size of the arguments is 0, expected"), "{error}");
    }

    #[test]
    fn a_fault_of_a_kernel_is_an_error_with_its_source_line() {
        let device: Arc<dyn Device> = Arc::new(CpuDevice::new());
        let problem = crate::Problem::builder(1, 1, 40, 32).build().unwrap();
        let t = crate::Tensor::random(problem.dtype(), &problem.q_shape(), 1, 0.0);
        let inputs = crate::session::Inputs::new(&t, &t, &t);
        let kernel = crate::registry::find("flash_tiled").unwrap();
        let session = crate::session::Session::new(device.clone());
        let mut prepared = session.prepare(kernel, &problem, &inputs).unwrap();
        prepared.launch().unwrap();
        let mut launch = prepared.attention().launches()[0].clone();
        launch.shared_bytes /= 2;
        // SAFETY: `prepared` has the arguments, and its buffers live; the emulator stops
        // at the first access outside of shared memory.
        let error = unsafe { device.launch(&launch) }.unwrap_err();
        assert!(!error.is_usage());
        let message = error.to_string();
        assert!(message.contains("flash_tiled_f32_d32"), "{message}");
        assert!(message.contains("flash_tiled.rs:"), "{message}");
    }
}
