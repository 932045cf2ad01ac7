//! A device that counts its requests.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    backend::{CpuDevice, Device, Launch, MemoryInfo, TensorMapSpec},
    error::Error,
};

/// The number of requests for each operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(crate) allocate: usize,
    pub(crate) upload: usize,
    pub(crate) fill: usize,
    pub(crate) encode: usize,
    pub(crate) launch: usize,
    pub(crate) synchronize: usize,
}

/// The emulator, counted.
#[derive(Default)]
pub(crate) struct Counting {
    device: CpuDevice,
    calls: Mutex<Calls>,
    fail: AtomicBool,
}

impl Counting {
    pub(crate) fn calls(&self) -> Calls {
        *self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reset(&self) {
        self.count(|calls| *calls = Calls::default());
    }

    /// The next launch fails before it begins.
    pub(crate) fn fail_next_launch(&self) {
        self.fail.store(true, Ordering::Relaxed);
    }

    fn count(&self, change: impl FnOnce(&mut Calls)) {
        change(&mut self.calls.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

// SAFETY: everything is done by the emulator, which keeps to the contract.
unsafe impl Device for Counting {
    fn name(&self) -> String {
        self.device.name()
    }
    fn is_emulated(&self) -> bool {
        true
    }
    fn compute_capability(&self) -> (u32, u32) {
        self.device.compute_capability()
    }
    fn max_shared_bytes(&self) -> u32 {
        self.device.max_shared_bytes()
    }
    fn multiprocessors(&self) -> u32 {
        self.device.multiprocessors()
    }
    fn memory_info(&self) -> Result<MemoryInfo, Error> {
        self.device.memory_info()
    }
    fn allocate(&self, bytes: u64) -> Result<u64, Error> {
        self.count(|calls| calls.allocate += 1);
        self.device.allocate(bytes)
    }
    unsafe fn free(&self, address: u64, bytes: u64) {
        // SAFETY: the counted device asks the same.
        unsafe { self.device.free(address, bytes) }
    }
    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
        self.count(|calls| calls.upload += 1);
        // SAFETY: the counted device asks the same.
        unsafe { self.device.upload(address, data) }
    }
    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the counted device asks the same.
        unsafe { self.device.download(address, data) }
    }
    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), Error> {
        self.count(|calls| calls.fill += 1);
        // SAFETY: the counted device asks the same.
        unsafe { self.device.fill(address, bytes, value) }
    }
    fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error> {
        self.count(|calls| calls.encode += 1);
        self.device.encode_tensor_map(map)
    }
    unsafe fn launch(&self, launch: &Launch) -> Result<(), Error> {
        self.count(|calls| calls.launch += 1);
        if self.fail.swap(false, Ordering::Relaxed) {
            let (symbol, fault) = (launch.entry.symbol.to_owned(), "asked to fail".into());
            return Err(Error::Kernel { symbol, fault });
        }
        // SAFETY: the counted device asks the same.
        unsafe { self.device.launch(launch) }
    }
    fn synchronize(&self) -> Result<(), Error> {
        self.count(|calls| calls.synchronize += 1);
        self.device.synchronize()
    }
}
