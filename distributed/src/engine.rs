//! A rank's device: memory, launches, and two lanes.
//!
//! Kernels go to the lane of computation, transfers to the lane of communication. Each lane keeps its
//! order; between them there is none but by [`Engine::fork`] and [`Engine::join`].

#[cfg(feature = "emulator")]
mod cpu;
mod gpu;

use flash_attention::{
    raw::{Plan, Region},
    registry::{Operation, Target},
};

use crate::error::Error;

#[cfg(feature = "emulator")]
pub use cpu::{CpuEngine, CpuParcel};
pub use gpu::{Event, GpuEngine, GpuParcel};

/// Rows of equal length, `pitch` bytes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Address of the first.
    pub address: u64,
    /// Bytes from one to the next.
    pub pitch: u64,
}

/// A rank's device.
///
/// # Safety
/// Callers rely on these facts: each lane keeps the order of the calls, and an operation of one lane that
/// follows another's by [`Engine::fork`] or [`Engine::join`] sees what it wrote.
pub unsafe trait Engine {
    /// A point in the lane of communication.
    type Mark;
    /// Memory that is offered to another rank of the process.
    type Parcel: Clone + Send + 'static;
    /// That a parcel was taken.
    type Receipt: Send + 'static;

    /// The device's limits, as plans need them.
    fn target(&self) -> Target;

    /// Starts the launches of a plan on the lane of computation.
    ///
    /// # Errors
    /// As [`Context::enqueue`](flash_attention::raw::Context::enqueue).
    ///
    /// # Safety
    /// As for [`Context::enqueue`](flash_attention::raw::Context::enqueue), on this device.
    unsafe fn start<P: Operation>(&self, plan: &Plan<P>, args: &P::Args) -> Result<(), Error>;

    /// Copies `rows` rows of `bytes` bytes on the lane of computation.
    ///
    /// # Errors
    /// An error of the device.
    ///
    /// # Safety
    /// Both sides are live memory of this device until the copy has ended, and do not overlap.
    unsafe fn copy_rows(&self, to: Rows, from: Rows, rows: u64, bytes: u64) -> Result<(), Error>;

    /// Fills memory with a byte on the lane of computation.
    ///
    /// # Errors
    /// An error of the device.
    ///
    /// # Safety
    /// The region is live memory of this device until the fill has ended.
    unsafe fn fill(&self, region: Region, value: u8) -> Result<(), Error>;

    /// Copies bytes to the device, and returns when they are there. Not for use inside a step.
    ///
    /// # Errors
    /// An error of the device.
    ///
    /// # Safety
    /// As many bytes at `address` are live memory of this device that nothing uses meanwhile.
    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Later work on the lane of communication comes after the current work on the lane of computation.
    ///
    /// # Errors
    /// An error of the device.
    fn fork(&self) -> Result<(), Error>;

    /// The end of what the lane of communication has now.
    ///
    /// # Errors
    /// An error of the device.
    fn mark(&self) -> Result<Self::Mark, Error>;

    /// Later work on the lane of computation comes after the mark.
    ///
    /// # Errors
    /// An error of the device.
    fn join(&self, mark: &Self::Mark) -> Result<(), Error>;

    /// Whether both lanes are empty.
    ///
    /// # Errors
    /// A fault of the device.
    fn is_idle(&self) -> Result<bool, Error>;

    /// Offers memory to another rank of this process, as the lane of communication will have it.
    ///
    /// # Errors
    /// An error of the device.
    ///
    /// # Safety
    /// The region is live memory of this device until the parcel's receipt is settled.
    unsafe fn offer(&self, region: Region) -> Result<Self::Parcel, Error>;

    /// Copies a parcel to this rank's memory, on the lane of communication.
    ///
    /// # Errors
    /// An error of the device.
    ///
    /// # Safety
    /// The region is live memory of this device, as long as the parcel, until the copy has ended.
    unsafe fn accept(&self, parcel: &Self::Parcel, to: Region) -> Result<Self::Receipt, Error>;

    /// All later work of the lane of communication comes after the copy of a parcel that this rank
    /// offered.
    ///
    /// # Errors
    /// An error of the device.
    fn settle(&self, receipt: Self::Receipt) -> Result<(), Error>;
}
