//! Exchanges of device memory between ranks.

mod nccl;
mod threads;

use flash_attention::raw::Region;

use crate::{engine::Engine, error::Error, peers::Peers};

pub use nccl::NcclCommunicator;
pub use threads::ThreadCommunicator;

/// The direction of a transfer.
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
    /// Memory to send to a rank.
    #[must_use]
    pub const fn send(peer: usize, region: Region) -> Self {
        Self { peer, region, direction: Direction::Send }
    }

    /// Memory that receives a rank's bytes.
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

    /// Starts transfers on the lane of communication of `engine`. Between two ranks the transfers
    /// match in order, each with the same number of bytes on both sides. The transfers of one call
    /// run at the same time, and all ranks make the calls in the same order.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Late`] names a rank that does not come; an error of the device
    /// or of NCCL.
    ///
    /// # Safety
    /// - The regions are live memory of the engine's device until the lane has passed the transfers.
    /// - Until then no other work writes them or reads the received regions, except work that
    ///   follows by [`Engine::join`].
    /// - The other ranks call it with the transfers that match.
    unsafe fn exchange(&self, engine: &E, transfers: &[Transfer]) -> Result<(), Error>;

    /// Checks that started transfers have no error.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn check(&self) -> Result<(), Error> {
        self.peers().check()
    }

    /// Aborts transfers that cannot finish, so that the lane drains.
    fn abort(&self) {}

    /// Waits until the device has finished all started work.
    ///
    /// # Errors
    /// A fault of the device; [`Error::Lost`] or [`Error::Late`] names a rank without which the
    /// work does not end. The transfers are then aborted, and the communicator is unusable.
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

    /// Checks that finished transfers have no error.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn check_done(&self) -> Result<(), Error> {
        Ok(())
    }
}
