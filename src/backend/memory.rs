//! Exact accounting of device memory. Every allocation and every drop of a buffer counts, so the
//! peak of a run is known to the byte.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytemuck::Pod;

use crate::{
    backend::Device,
    dtype::DType,
    error::Error,
    raw::Region,
    tensor::{Tensor, bytes_of, expect_bytes, expect_tensor},
};

/// Bytes counted so far.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    current: u64,
    peak: u64,
}

/// The memory of a device, with a count of the bytes in use and of their peak.
///
/// The count includes the requested bytes, without an allocator's padding for alignment. Several
/// counts over one device are independent. A [part](Memory::part) counts the allocations made
/// through it, and the whole counts them too.
pub struct Memory {
    device: Arc<dyn Device>,
    whole: Option<Arc<Memory>>,
    count: Mutex<Count>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Count { current, peak } = *self.count();
        f.debug_struct("Memory")
            .field("device", &self.device.name())
            .field("current", &current)
            .field("peak", &peak)
            .finish_non_exhaustive()
    }
}

impl Memory {
    /// A count that starts at zero.
    #[must_use]
    pub fn new(device: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { device, whole: None, count: Mutex::default() })
    }

    /// A separate count, from zero, of the allocations made through it; `self` counts them too.
    #[must_use]
    pub fn part(self: &Arc<Self>) -> Arc<Self> {
        let (device, whole) = (self.device.clone(), Some(self.clone()));
        Arc::new(Self { device, whole, count: Mutex::default() })
    }

    /// The device that has this memory.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether both count memory of the same device.
    #[must_use]
    pub fn same_device(&self, other: &Self) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.device), Arc::as_ptr(&other.device))
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        // The count is two numbers that are written together: it is never left half done.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocated(&self, bytes: u64) {
        let mut count = self.count();
        count.current += bytes;
        count.peak = count.peak.max(count.current);
        drop(count);
        if let Some(whole) = &self.whole {
            whole.allocated(bytes);
        }
    }

    fn freed(&self, bytes: u64) {
        self.count().current -= bytes;
        if let Some(whole) = &self.whole {
            whole.freed(bytes);
        }
    }

    /// Bytes in use now.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.count().current
    }

    /// The most bytes in use at once since the start.
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.count().peak
    }

    /// Allocates uninitialised memory; zero bytes need no allocation.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], after which the device stays usable.
    pub fn allocate(self: &Arc<Self>, bytes: u64) -> Result<DeviceBuffer, Error> {
        let address = if bytes == 0 { 0 } else { self.device.allocate(bytes)? };
        self.allocated(bytes);
        Ok(DeviceBuffer { memory: self.clone(), address, bytes })
    }

    /// Allocates memory and fills each byte with `value`.
    ///
    /// # Errors
    /// As [`Memory::allocate`], or an error that the device reports.
    pub fn filled(self: &Arc<Self>, bytes: u64, value: u8) -> Result<DeviceBuffer, Error> {
        let mut buffer = self.allocate(bytes)?;
        buffer.fill(value)?;
        Ok(buffer)
    }

    /// Allocates memory that holds a copy of `data`.
    ///
    /// # Errors
    /// As [`Memory::allocate`], or an error that the device reports.
    pub fn upload<T: Pod>(self: &Arc<Self>, data: &[T]) -> Result<DeviceBuffer, Error> {
        let mut buffer = self.allocate(size_of_val(data) as u64)?;
        buffer.write(data)?;
        Ok(buffer)
    }
}

/// Device memory that frees itself when dropped, counted by its [`Memory`].
#[derive(Debug)]
pub struct DeviceBuffer {
    memory: Arc<Memory>,
    address: u64,
    bytes: u64,
}

impl DeviceBuffer {
    /// Device address of the first byte; 0 when the buffer is empty.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The whole buffer.
    #[must_use]
    pub const fn region(&self) -> Region {
        Region::new(self.address, self.bytes)
    }

    /// The count that this buffer belongs to.
    #[must_use]
    pub const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Copies `data` to the start of the buffer.
    ///
    /// # Errors
    /// [`Error::BadAddress`] when `data` does not fit, or an error that the device reports.
    pub fn write<T: Pod>(&mut self, data: &[T]) -> Result<(), Error> {
        let data: &[u8] = bytemuck::cast_slice(data);
        self.check(data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is inside this buffer, whose exclusive reference is held.
        unsafe { self.memory.device.upload(self.address, data) }
    }

    /// Copies the start of the buffer into `data`.
    ///
    /// # Errors
    /// [`Error::BadAddress`] when the buffer is shorter, or an error that the device reports.
    pub fn read<T: Pod>(&self, data: &mut [T]) -> Result<(), Error> {
        self.read_at(0, bytemuck::cast_slice_mut(data))
    }

    /// Copies the bytes from `offset` on into `data`.
    ///
    /// # Errors
    /// [`Error::BadAddress`] when the buffer ends before, or an error that the device reports.
    pub(crate) fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let end = offset.saturating_add(data.len() as u64);
        self.check(end)?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is inside this buffer, which nobody writes while it is borrowed.
        unsafe { self.memory.device.download(self.address + offset, data) }
    }

    /// The whole buffer as elements, without the bytes of an incomplete last element.
    ///
    /// # Errors
    /// An error that the device reports.
    pub fn to_vec<T: Pod>(&self) -> Result<Vec<T>, Error> {
        let mut data = vec![T::zeroed(); self.bytes as usize / size_of::<T>()];
        self.read(&mut data)?;
        Ok(data)
    }

    /// Fills the first `bytes` bytes with `value`.
    ///
    /// # Errors
    /// [`Error::BadAddress`] when the buffer is shorter, or an error that the device reports.
    pub fn fill_start(&mut self, bytes: u64, value: u8) -> Result<(), Error> {
        self.check(bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is inside this buffer, whose exclusive reference is held.
        unsafe { self.memory.device.fill(self.address, bytes, value) }
    }

    /// Fills every byte with `value`.
    ///
    /// # Errors
    /// An error that the device reports.
    pub fn fill(&mut self, value: u8) -> Result<(), Error> {
        self.fill_start(self.bytes, value)
    }

    fn check(&self, bytes: u64) -> Result<(), Error> {
        if bytes > self.bytes {
            return Err(Error::BadAddress { address: self.address, bytes });
        }
        Ok(())
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes != 0 {
            // SAFETY: `Memory::allocate` got the address and the length, and this is the one
            // place that gives them back.
            unsafe { self.memory.device.free(self.address, self.bytes) };
            self.memory.freed(self.bytes);
        }
    }
}

/// A row-major tensor in device memory.
#[derive(Debug)]
pub struct DeviceTensor {
    buffer: DeviceBuffer,
    dtype: DType,
    shape: Vec<usize>,
}

impl DeviceTensor {
    /// A tensor whose bytes are all `value`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::TooLarge`] for a size beyond 2^64 bytes.
    pub fn filled(
        memory: &Arc<Memory>,
        dtype: DType,
        shape: &[usize],
        value: u8,
    ) -> Result<Self, Error> {
        let buffer = memory.filled(bytes_of(dtype, shape)?, value)?;
        Ok(Self { buffer, dtype, shape: shape.to_vec() })
    }

    /// A copy of a tensor on the host.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or an error that the device reports.
    pub fn upload(memory: &Arc<Memory>, tensor: &Tensor) -> Result<Self, Error> {
        Self::from_bytes(memory, tensor.dtype(), tensor.shape(), tensor.as_bytes())
    }

    /// A tensor with these elements, in the machine's (little-endian) byte order.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the number of bytes differs from the shape's;
    /// [`Error::OutOfMemory`].
    pub fn from_bytes(
        memory: &Arc<Memory>,
        dtype: DType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<Self, Error> {
        expect_bytes(dtype, shape, bytes.len())?;
        Ok(Self { buffer: memory.upload(bytes)?, dtype, shape: shape.to_vec() })
    }

    /// Overwrites the elements.
    ///
    /// # Errors
    /// Another storage type or shape; an error that the device reports.
    pub fn write(&mut self, tensor: &Tensor) -> Result<(), Error> {
        tensor.expect("to write", self.dtype, &self.shape)?;
        self.buffer.write(tensor.as_bytes())
    }

    /// Waits for earlier work, and copies the tensor to the host.
    ///
    /// # Errors
    /// The fault of a kernel that ran before.
    pub fn to_host(&self) -> Result<Tensor, Error> {
        self.buffer.memory.device.synchronize()?;
        let mut tensor = Tensor::zeros(self.dtype, &self.shape);
        self.buffer.read(tensor.as_bytes_mut())?;
        Ok(tensor)
    }

    /// Storage type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extent of each dimension, slowest first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.buffer.bytes
    }

    /// The count that the tensor's memory belongs to.
    #[must_use]
    pub const fn memory(&self) -> &Arc<Memory> {
        self.buffer.memory()
    }

    /// Its memory.
    #[must_use]
    pub const fn region(&self) -> Region {
        self.buffer.region()
    }

    /// Checks the storage type, the shape and the device.
    ///
    /// # Errors
    /// An error that names the wrong one.
    pub fn expect(
        &self,
        what: &str,
        memory: &Memory,
        dtype: DType,
        shape: &[usize],
    ) -> Result<(), Error> {
        expect_tensor(what, (self.dtype, dtype), (&self.shape, shape))?;
        expect_device(what, &self.buffer, memory)
    }
}

/// Checks that a buffer is on the device of `memory`.
pub(crate) fn expect_device(
    what: &str,
    buffer: &DeviceBuffer,
    memory: &Memory,
) -> Result<(), Error> {
    if buffer.memory.same_device(memory) {
        return Ok(());
    }
    Err(Error::DeviceLacks {
        device: memory.device.name(),
        what: format!("use {what}"),
        remedy: format!("it is in memory of {}", buffer.memory.device.name()),
    })
}
