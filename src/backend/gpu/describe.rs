//! The properties of each GPU.

use cuda_driver::{
    Failure,
    functions::{self, attribute},
};

use super::owner::Primary;
use crate::{
    error::Error,
    raw::{
        context::{Entered, driver, target},
        failure,
    },
};

/// The properties of a GPU that kernels and tables use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuDescription {
    /// Its number in CUDA's order.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Memory in total, in bytes.
    pub total_bytes: u64,
    /// Free memory at the time of the query; `None` where another process holds the GPU.
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
    /// Version of NVIDIA's driver (`580.159.04`), where it is known.
    pub driver_version: Option<String>,
}

/// Describes every GPU that CUDA sees.
///
/// # Errors
/// [`Error::NoGpu`] when there is no driver or no GPU, with the remedy.
pub fn describe_all() -> Result<Vec<GpuDescription>, Error> {
    (0..count()?)
        .map(|index| {
            let mut description = describe(index)?;
            description.free_bytes = free_bytes(index).ok();
            Ok(description)
        })
        .collect()
}

/// Free memory, which only a context can report.
fn free_bytes(index: u32) -> Result<u64, Failure> {
    let primary = Primary::retain(functions::device(index as i32)?)?;
    let _entered = Entered::new(primary.context)?;
    functions::mem_info().map(|(free, _)| free)
}

fn count() -> Result<u32, Error> {
    driver()?;
    functions::device_count()
        .map(i32::unsigned_abs)
        .map_err(|failure| failure::driver("any GPU", "counting GPUs", failure.code))
}

/// The GPU with this number.
pub(super) fn describe(index: u32) -> Result<GpuDescription, Error> {
    let driver = driver()?;
    let count = count()?;
    if index >= count {
        return Err(Error::NoGpu {
            reason: format!("there is no GPU {index}, the driver lists {count}"),
            remedy: "choose a smaller number, or check CUDA_VISIBLE_DEVICES".to_owned(),
        });
    }
    let describe = || {
        let device = functions::device(index as i32)?;
        let target = target(device)?;
        let get = |number| functions::device_attribute(number, device).map(i32::unsigned_abs);
        Ok(GpuDescription {
            index,
            name: functions::device_name(device)?,
            total_bytes: functions::device_total_bytes(device)? as u64,
            free_bytes: None,
            compute_capability: target.capability,
            multiprocessors: target.multiprocessors,
            max_shared_bytes: target.max_shared_bytes,
            l2_bytes: get(attribute::L2_BYTES)?,
            clock_mhz: get(attribute::CLOCK_KHZ)? / 1000,
            cuda_version: driver.cuda_version,
            driver_version: cuda_driver::driver_version(),
        })
    };
    describe().map_err(|failure: Failure| {
        failure::driver(&format!("GPU {index}"), "describing", failure.code)
    })
}
