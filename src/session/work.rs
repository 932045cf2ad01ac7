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
