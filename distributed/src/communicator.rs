//! How ranks exchange memory of their devices.

mod nccl;
mod threads;

use flash_attention::raw::Region;

use crate::{engine::Engine, error::Error, peers::Peers};

pub use nccl::NcclCommunicator;
pub use threads::ThreadCommunicator;

/// Where the bytes of a transfer go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From this rank.
    Send,
    /// To this rank.
    Receive,
}

/// One side of a transfer between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The other rank.
    pub peer: usize,
    /// This rank's memory.
    pub region: Region,
    /// Whether it is sent or received.
    pub direction: Direction,
}

impl Transfer {
    /// Memory that is sent to a rank.
    #[must_use]
    pub const fn send(peer: usize, region: Region) -> Self {
        Self { peer, region, direction: Direction::Send }
    }

    /// Memory that a rank's is received in.
    #[must_use]
    pub const fn receive(peer: usize, region: Region) -> Self {
        Self { peer, region, direction: Direction::Receive }
    }

    /// The same memory the other way.
    #[must_use]
    pub const fn reversed(self) -> Self {
        let direction = match self.direction {
            Direction::Send => Direction::Receive,
            Direction::Receive => Direction::Send,
        };
        Self { direction, ..self }
    }
}

/// One rank of several that exchange memory.
pub trait Communicator<E: Engine> {
    /// The line to the other ranks on the host.
    fn peers(&self) -> &Peers;

    /// Starts transfers on the lane of communication of `engine`. Between two ranks they match in order,
    /// each with as many bytes on both sides; those of one call run at the same time, and all ranks call
    /// it in the same order.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Late`] names a rank that does not come; what the device or NCCL report.
    ///
    /// # Safety
    /// - The regions are live memory of the engine's device until the lane has passed the transfers.
    /// - Until then nothing else writes them, nor reads those that are received, but what follows by
    ///   [`Engine::join`].
    /// - The other ranks call it with the transfers that match.
    unsafe fn exchange(&self, engine: &E, transfers: &[Transfer]) -> Result<(), Error>;

    /// Whether transfers that were started go well.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn check(&self) -> Result<(), Error> {
        self.peers().check()
    }

    /// Ends transfers that cannot come to their end: after this, the lane gets empty.
    fn abort(&self) {}

    /// Waits until the device has done everything that was started.
    ///
    /// # Errors
    /// What went wrong on the device; [`Error::Lost`] or [`Error::Late`] names a rank without which it
    /// does not end. Transfers are then aborted, and the communicator is of no further use.
    fn finish(&self, engine: &E) -> Result<(), Error> {
        let begin = std::time::Instant::now();
        let wait = || loop {
            if engine.is_idle()? {
                return self.check_done();
            }
            self.check()?;
            if begin.elapsed() > self.peers().limit() {
                return Err(self.peers().late());
            }
            // Short against a step, long against a look at the stream.
            std::thread::sleep(std::time::Duration::from_micros(20));
        };
        wait().inspect_err(|error| {
            self.abort();
            self.peers().give_up(&error.to_string());
        })
    }

    /// Whether transfers that have ended went well.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn check_done(&self) -> Result<(), Error> {
        Ok(())
    }
}
