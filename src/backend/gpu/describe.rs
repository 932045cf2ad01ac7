//! What is known of each GPU.

use cust::{
    context::Context,
    device::{Device, DeviceAttribute},
    error::CudaResult,
    sys::{CUdevice_attribute, cuDeviceGetAttribute},
};

use super::failure;
use crate::error::Error;

/// A GPU, as far as kernels and readers of tables care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuDescription {
    /// Its number in CUDA's order.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Memory in total, in bytes.
    pub total_bytes: u64,
    /// Memory that was free when it was asked; `None` where the GPU is taken by
    /// another process.
    pub free_bytes: Option<u64>,
    /// Compute capability, `(major, minor)`.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// The most shared memory of a block that asks for more than 48 KiB, in bytes.
    pub max_shared_bytes: u32,
    /// L2 cache in bytes.
    pub l2_bytes: u32,
    /// The highest clock of the multiprocessors in MHz.
    pub clock_mhz: u32,
    /// The newest CUDA version that the driver supports, `(major, minor)`.
    pub cuda_version: (u32, u32),
    /// Version of NVIDIA's driver (`580.159.04`), where it can be found out.
    pub driver_version: Option<String>,
}

/// Describes every GPU that CUDA sees.
///
/// # Errors
/// [`Error::NoGpu`] when there is no driver or no GPU, with what to do about it.
pub fn describe_all() -> Result<Vec<GpuDescription>, Error> {
    let count = count()?;
    (0..count)
        .map(|index| {
            let (device, mut description) = device(index)?;
            description.free_bytes = Context::new(device)
                .and_then(|_context| cust::memory::mem_get_info())
                .ok()
                .map(|m| m.0 as u64);
            Ok(description)
        })
        .collect()
}

fn count() -> Result<u32, Error> {
    cuda_driver::status()
        .map_err(|error| Error::NoGpu { reason: error.reason(), remedy: error.remedy() })?;
    Device::num_devices().map_err(|error| failure::driver("any GPU", "counting GPUs", error))
}

/// The GPU of that number.
pub(super) fn device(index: u32) -> Result<(Device, GpuDescription), Error> {
    let driver = cuda_driver::status()
        .map_err(|error| Error::NoGpu { reason: error.reason(), remedy: error.remedy() })?;
    let count = count()?;
    if index >= count {
        return Err(Error::NoGpu {
            reason: format!("there is no GPU {index}, the driver lists {count}"),
            remedy: "choose a smaller number, or check CUDA_VISIBLE_DEVICES".to_owned(),
        });
    }
    let description = || -> CudaResult<_> {
        let device = Device::get_device(index)?;
        let get = |attribute| Ok(device.get_attribute(attribute)?.unsigned_abs());
        Ok((
            device,
            GpuDescription {
                index,
                name: device.name()?,
                total_bytes: device.total_memory()? as u64,
                free_bytes: None,
                compute_capability: (
                    get(DeviceAttribute::ComputeCapabilityMajor)?,
                    get(DeviceAttribute::ComputeCapabilityMinor)?,
                ),
                multiprocessors: get(DeviceAttribute::MultiprocessorCount)?,
                max_shared_bytes: max_shared_bytes(device)?,
                l2_bytes: get(DeviceAttribute::L2CacheSize)?,
                clock_mhz: get(DeviceAttribute::ClockRate)? / 1000,
                cuda_version: driver.cuda_version,
                driver_version: cuda_driver::driver_version(),
            },
        ))
    };
    description().map_err(|error| failure::driver(&format!("GPU {index}"), "describing", error))
}

/// An attribute that cust does not list.
fn max_shared_bytes(device: Device) -> CudaResult<u32> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let mut value = 0;
    // SAFETY: the pointer is valid for the write.
    failure::result(unsafe { cuDeviceGetAttribute(&raw mut value, attribute, device.as_raw()) })?;
    Ok(value.unsigned_abs())
}
