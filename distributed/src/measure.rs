//! The cost of a pass in parts: its computation alone, its transfers alone.
//!
//! `hidden = (computation + transfers - all) / transfers` is the share of the transfers that computation
//! hides. The results of such a pass are of no use.

use std::time::Instant;

use flash_attention::{
    raw::{Plan, Region},
    registry::{Operation, Target},
};

use crate::{
    Attention,
    attention::{BackwardTensors, ForwardTensors},
    communicator::{Communicator, Transfer},
    engine::{Engine, Rows},
    error::Error,
    peers::Peers,
};

/// A communicator that transfers nothing.
#[derive(Debug)]
pub struct WithoutTransfers<'a, C>(pub &'a C);

impl<E: Engine, C: Communicator<E>> Communicator<E> for WithoutTransfers<'_, C> {
    fn peers(&self) -> &Peers {
        self.0.peers()
    }

    unsafe fn exchange(&self, _: &E, _: &[Transfer]) -> Result<(), Error> {
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        self.0.check()
    }

    fn abort(&self) {
        self.0.abort();
    }
}

/// An engine that computes nothing, nor copies within the device.
#[derive(Debug)]
pub struct WithoutComputation<'a, E>(pub &'a E);

/// The communicator of such an engine.
#[derive(Debug)]
pub struct Transfers<'a, C>(pub &'a C);

impl<'e, E: Engine, C: Communicator<E>> Communicator<WithoutComputation<'e, E>>
    for Transfers<'_, C>
{
    fn peers(&self) -> &Peers {
        self.0.peers()
    }

    unsafe fn exchange(
        &self,
        engine: &WithoutComputation<'e, E>,
        transfers: &[Transfer],
    ) -> Result<(), Error> {
        // SAFETY: the inner communicator asks the same of the same transfers.
        unsafe { self.0.exchange(engine.0, transfers) }
    }

    fn check(&self) -> Result<(), Error> {
        self.0.check()
    }

    fn abort(&self) {
        self.0.abort();
    }
}

// SAFETY: what it does is done by an engine; what it leaves out is seen by nobody.
unsafe impl<E: Engine> Engine for WithoutComputation<'_, E> {
    type Mark = E::Mark;
    type Parcel = E::Parcel;
    type Receipt = E::Receipt;

    fn target(&self) -> Target {
        self.0.target()
    }

    unsafe fn start<P: Operation>(&self, _: &Plan<P>, _: &P::Args) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn copy_rows(&self, _: Rows, _: Rows, _: u64, _: u64) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn fill(&self, _: Region, _: u8) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: the inner engine asks the same.
        unsafe { self.0.upload(address, bytes) }
    }

    fn fork(&self) -> Result<(), Error> {
        self.0.fork()
    }

    fn mark(&self) -> Result<E::Mark, Error> {
        self.0.mark()
    }

    fn join(&self, mark: &E::Mark) -> Result<(), Error> {
        self.0.join(mark)
    }

    fn is_idle(&self) -> Result<bool, Error> {
        self.0.is_idle()
    }

    unsafe fn offer(&self, region: Region) -> Result<E::Parcel, Error> {
        // SAFETY: the inner engine asks the same.
        unsafe { self.0.offer(region) }
    }

    unsafe fn accept(&self, parcel: &E::Parcel, to: Region) -> Result<E::Receipt, Error> {
        // SAFETY: the inner engine asks the same.
        unsafe { self.0.accept(parcel, to) }
    }

    fn settle(&self, receipt: E::Receipt) -> Result<(), Error> {
        self.0.settle(receipt)
    }
}

/// Milliseconds of a pass and of its parts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// Everything.
    pub all: f64,
    /// Kernels and copies within the device, without transfers.
    pub computation: f64,
    /// Transfers alone.
    pub transfers: f64,
}

impl Times {
    /// The share of the transfers that computation hides, from 0 to 1; 1 where there are none.
    #[must_use]
    pub fn hidden(&self) -> f64 {
        if self.transfers <= 0.0 {
            return 1.0;
        }
        ((self.computation + self.transfers - self.all) / self.transfers).clamp(0.0, 1.0)
    }
}

/// A pass with its tensors.
#[derive(Clone, Copy, Debug)]
pub enum Pass<'a> {
    /// The forward pass.
    Forward(&'a ForwardTensors),
    /// The backward pass.
    Backward(&'a BackwardTensors),
}

impl Pass<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// As [`Attention::forward`] and [`Attention::backward`].
    ///
    /// # Safety
    /// As for them.
    pub unsafe fn start<E: Engine, C: Communicator<E>>(
        self,
        attention: &Attention,
        engine: &E,
        communicator: &C,
        workspace: Region,
    ) -> Result<(), Error> {
        // SAFETY: the tensors and the workspace are as the pass asks, as stated above.
        unsafe {
            match self {
                Self::Forward(tensors) => {
                    attention.forward(engine, communicator, tensors, workspace)
                }
                Self::Backward(tensors) => {
                    attention.backward(engine, communicator, tensors, workspace)
                }
            }
        }
    }

    /// Its times on the slowest rank, each the median of `runs`, by the clock of the host. All ranks call
    /// it; what the outputs hold afterwards is of no use.
    ///
    /// # Errors
    /// As [`Attention::forward`] and [`Attention::backward`].
    ///
    /// # Safety
    /// As for them.
    pub unsafe fn times<E: Engine, C: Communicator<E>>(
        self,
        attention: &Attention,
        engine: &E,
        communicator: &C,
        workspace: Region,
        runs: usize,
    ) -> Result<Times, Error> {
        let time =
            |start: &dyn Fn() -> Result<(), Error>| median_ms(engine, communicator, runs, start);
        let (idle, transfers) = (WithoutComputation(engine), Transfers(communicator));
        let alone = WithoutTransfers(communicator);
        // SAFETY: each run has the tensors and the workspace that the pass asks for, as stated
        // above.
        unsafe {
            Ok(Times {
                all: time(&|| self.start(attention, engine, communicator, workspace))?,
                computation: time(&|| self.start(attention, engine, &alone, workspace))?,
                transfers: time(&|| self.start(attention, &idle, &transfers, workspace))?,
            })
        }
    }
}

/// Milliseconds of what is started, on the slowest rank: the median of `runs`, after one that is not
/// timed.
fn median_ms<E: Engine, C: Communicator<E>>(
    engine: &E,
    communicator: &C,
    runs: usize,
    start: &dyn Fn() -> Result<(), Error>,
) -> Result<f64, Error> {
    let peers = communicator.peers();
    let mut times = Vec::new();
    for _ in 0..=runs.max(1) {
        // All begin at the same time.
        peers.gather(&[])?;
        let begin = Instant::now();
        start()?;
        communicator.finish(engine)?;
        let own = begin.elapsed().as_secs_f64() * 1e3;
        let all = peers.gather(&own.to_le_bytes())?;
        let ms = |bytes: &Vec<u8>| <[u8; 8]>::try_from(&bytes[..]).map_or(own, f64::from_le_bytes);
        times.push(all.iter().map(ms).fold(0.0, f64::max));
    }
    times.remove(0);
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_what_all_does_not_take() {
        let times = |all| Times { all, computation: 10.0, transfers: 4.0 };
        assert_eq!([10.0, 12.0, 14.0, 15.0].map(|all| times(all).hidden()), [1.0, 0.5, 0.0, 0.0]);
    }
}
