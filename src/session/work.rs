//! Work that runs repeatedly, and its timing.

use crate::{
    backend::{Device, instruments},
    error::Error,
};

/// Work that is ready for any number of runs on a device.
pub trait Work {
    /// The device.
    fn device(&self) -> &dyn Device;

    /// Starts the work; does not wait.
    ///
    /// # Errors
    /// An error that the device reports.
    fn start(&mut self) -> Result<(), Error>;

    /// Runs the work and waits.
    ///
    /// # Errors
    /// The fault of a kernel that ran before.
    fn launch(&mut self) -> Result<(), Error> {
        self.start()?;
        self.device().synchronize()
    }
}

/// Milliseconds of each of `runs` launches, after `warm_up` untimed launches. Each starts with a
/// cold L2 cache.
///
/// # Errors
/// The fault of a kernel that ran before.
pub fn time_ms(
    device: &dyn Device,
    work: &mut dyn Work,
    warm_up: usize,
    runs: usize,
) -> Result<Vec<f64>, Error> {
    for _ in 0..warm_up {
        work.launch()?;
    }
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs {
        instruments::flush_l2(device)?;
        times.push(instruments::time_ms(device, &mut || work.start())?);
    }
    device.synchronize()?;
    Ok(times)
}

/// Milliseconds per launch among `runs` launches back to back, without a wait between them. This is
/// the time when launches cost nothing, with the L2 cache as the previous launch left it, and at
/// the clock that a GPU holds at its power limit.
///
/// # Errors
/// The fault of a kernel that ran before.
pub fn sustained_ms(device: &dyn Device, work: &mut dyn Work, runs: usize) -> Result<f64, Error> {
    let runs = runs.max(1);
    let all = instruments::time_ms(device, &mut || (0..runs).try_for_each(|_| work.start()))?;
    device.synchronize()?;
    Ok(all / runs as f64)
}

/// Milliseconds per launch of a graph of `together` launches, replayed back to back until there were
/// `runs` launches or more; `None` on a device without graphs. The time when a launch costs the host
/// nothing. The work must have run before.
///
/// # Errors
/// The fault of a kernel; work that cannot be captured, since it does more than start kernels.
pub fn replayed_ms(
    device: &dyn Device,
    work: &mut dyn Work,
    together: usize,
    runs: usize,
) -> Result<Option<f64>, Error> {
    let Some(instruments) = device.instruments() else { return Ok(None) };
    let together = together.max(1);
    let mut all = || (0..together).try_for_each(|_| work.start());
    let replay = instruments.replayed_ms(&mut all, runs.div_ceil(together))?;
    device.synchronize()?;
    Ok(replay.map(|ms| ms / together as f64))
}
