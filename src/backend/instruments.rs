//! Measuring instruments: times, a cold cache, counts of the kernels' work.

use std::time::Instant;

use super::Device;
use crate::error::Error;

/// Counts of the emulator while kernels ran; a GPU has no counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that kernels asked to read from global memory.
    pub global_bytes_read: u64,
    /// Bytes that kernels asked to write to global memory.
    pub global_bytes_written: u64,
    /// Extra shared-memory passes caused by bank conflicts, for the counted kinds of access.
    pub bank_conflicts: u64,
}

/// The measuring instruments of a device.
pub trait Instruments {
    /// Milliseconds that `work` keeps the device busy: events on a GPU, the clock under the
    /// emulator.
    ///
    /// # Errors
    /// The error of `work`, or the fault of a kernel.
    fn time_ms(&self, work: &mut dyn FnMut() -> Result<(), Error>) -> Result<f64, Error>;
    /// Overwrites the L2 cache, so that the next launch starts cold; does nothing under the
    /// emulator.
    ///
    /// # Errors
    /// An error that the device reports.
    fn flush_l2(&self) -> Result<(), Error>;
    /// The memory's copy rate: gigabytes that the device reads and writes per second while it
    /// copies its own memory, the best of several copies. `None` under the emulator, or without
    /// memory for the copy.
    ///
    /// # Errors
    /// An error that the device reports.
    fn copy_rate(&self) -> Result<Option<f64>, Error>;
    /// Milliseconds of all that `work` starts, replayed: a graph of its launches is captured, which
    /// runs nothing, and started `replays` times back to back, after one start without a measure.
    /// `work` has run before, so that only kernels are left to start: what allocates, waits or
    /// compiles breaks a capture. `None` under the emulator, which has no graphs.
    ///
    /// # Errors
    /// The error of `work`, what broke the capture, or the fault of a kernel.
    fn replayed_ms(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
        replays: usize,
    ) -> Result<Option<f64>, Error> {
        _ = (work, replays);
        Ok(None)
    }
    /// Bytes of the L2 cache; `None` under the emulator.
    fn l2_bytes(&self) -> Option<u64> {
        None
    }
    /// The counts since the last call; `None` on a GPU.
    fn take_counters(&self) -> Option<Counters>;
}

/// Milliseconds that `work` keeps a device busy: by its instruments, or by the clock from an
/// idle device to an idle device.
///
/// # Errors
/// The error of `work`, or the fault of a kernel.
pub fn time_ms(
    device: &dyn Device,
    work: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<f64, Error> {
    if let Some(instruments) = device.instruments() {
        return instruments.time_ms(work);
    }
    device.synchronize()?;
    let start = Instant::now();
    work()?;
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Overwrites the L2 cache of a device that has the instrument for it.
///
/// # Errors
/// An error that the device reports.
pub fn flush_l2(device: &dyn Device) -> Result<(), Error> {
    device.instruments().map_or(Ok(()), Instruments::flush_l2)
}

/// The counts of a device since the last call, where the device counts.
#[allow(clippy::must_use_candidate, reason = "taking sets the counters back")]
pub fn take_counters(device: &dyn Device) -> Option<Counters> {
    device.instruments().and_then(Instruments::take_counters)
}
