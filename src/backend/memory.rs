//! Exact accounting of device memory: every buffer is counted when it is allocated and
//! when it is dropped, so that the peak of a run is known to the byte.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use kernels_gpu::args::Buffer;

use crate::{backend::Device, error::Error};

/// Bytes counted so far.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    current: u64,
    peak: u64,
}

/// The memory of a device, with a count of what is in use and of the most that was.
///
/// Counted are the bytes asked for; what an allocator adds for alignment is not.
/// Independent counts over one device are possible: each `Memory` counts its own.
pub struct Memory {
    device: Arc<dyn Device>,
    count: Mutex<Count>,
}

impl Memory {
    /// A count that starts at zero.
    #[must_use]
    pub fn new(device: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { device, count: Mutex::default() })
    }

    /// The device whose memory this is.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        // The count is two numbers that are written together: it is never left half done.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use now.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.count().current
    }

    /// The most bytes in use at once since the start or the last [`Memory::reset_peak`].
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.count().peak
    }

    /// Lets the peak start again from what is in use now.
    pub fn reset_peak(&self) {
        let mut count = self.count();
        count.peak = count.current;
    }

    /// Allocates uninitialised memory; no bytes need no memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], after which the device stays usable.
    pub fn allocate(self: &Arc<Self>, bytes: u64) -> Result<DeviceBuffer, Error> {
        let address = if bytes == 0 { 0 } else { self.device.allocate(bytes)? };
        let mut count = self.count();
        count.current += bytes;
        count.peak = count.peak.max(count.current);
        drop(count);
        Ok(DeviceBuffer { memory: self.clone(), address, bytes })
    }

    /// Allocates memory and fills each byte with `value`.
    ///
    /// # Errors
    /// As [`Memory::allocate`], or what the device reports.
    pub fn filled(self: &Arc<Self>, bytes: u64, value: u8) -> Result<DeviceBuffer, Error> {
        let mut buffer = self.allocate(bytes)?;
        buffer.fill(value)?;
        Ok(buffer)
    }

    /// Allocates memory that holds a copy of `data`.
    ///
    /// # Errors
    /// As [`Memory::allocate`], or what the device reports.
    pub fn upload<T: Pod>(self: &Arc<Self>, data: &[T]) -> Result<DeviceBuffer, Error> {
        let mut buffer = self.allocate(size_of_val(data) as u64)?;
        buffer.write(data)?;
        Ok(buffer)
    }
}

/// Device memory that frees itself when dropped, counted by its [`Memory`].
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

    /// The region as kernels are given it.
    #[must_use]
    pub const fn as_arg(&self) -> Buffer {
        Buffer { address: self.address, bytes: self.bytes }
    }

    /// Copies `data` to the start of the buffer.
    ///
    /// # Errors
    /// [`Error::BadAddress`] when it does not fit, or what the device reports.
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
    /// [`Error::BadAddress`] when the buffer is shorter, or what the device reports.
    pub fn read<T: Pod>(&self, data: &mut [T]) -> Result<(), Error> {
        let data: &mut [u8] = bytemuck::cast_slice_mut(data);
        self.check(data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is inside this buffer, which nobody writes while it is borrowed.
        unsafe { self.memory.device.download(self.address, data) }
    }

    /// The whole buffer as elements; bytes of an incomplete last element are left out.
    ///
    /// # Errors
    /// What the device reports.
    pub fn to_vec<T: Pod>(&self) -> Result<Vec<T>, Error> {
        let mut data = vec![T::zeroed(); self.bytes as usize / size_of::<T>()];
        self.read(&mut data)?;
        Ok(data)
    }

    /// Fills every byte with `value`.
    ///
    /// # Errors
    /// What the device reports.
    pub fn fill(&mut self, value: u8) -> Result<(), Error> {
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range is this buffer, whose exclusive reference is held.
        unsafe { self.memory.device.fill(self.address, self.bytes, value) }
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
            self.memory.count().current -= self.bytes;
        }
    }
}
