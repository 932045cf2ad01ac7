//! All-to-all among the ranks that divide the heads: each has some rows of all heads before, and all
//! rows of some heads after.
//!
//! Where heads come first, the rows of a head are contiguous in both tensors: ranks send them from
//! their place and receive them in their place. Where tokens come first, the heads of a rank are a
//! part of each row: the rank copies them to and from a contiguous staging buffer.

use flash_attention::raw::Region;

use super::memory::Shape;
use crate::{
    communicator::{Communicator, Transfer},
    engine::{Engine, Rows},
    error::Error,
    schedule::Grid,
};

/// A tensor on both sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor<'a> {
    /// The form that a rank holds: some rows of all heads.
    pub local: (Shape, u64),
    /// The form for computation: all rows of the group, some heads.
    pub gathered: u64,
    /// Where tokens come first: room for the local tensor, head by head.
    pub staging: u64,
    /// The number of rows of each rank of the group.
    pub rows: &'a [usize],
}

/// A rank among those that divide the heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub grid: Grid,
    pub rank: usize,
}

impl Group {
    /// Starts to gather local tensors, and has the lane of computation wait for the end.
    ///
    /// # Safety
    /// The tensors are live memory of the device, on both sides and in their staging.
    pub(super) unsafe fn gather<E: Engine, C: Communicator<E>>(
        self,
        engine: &E,
        communicator: &C,
        tensors: &[Tensor<'_>],
    ) -> Result<(), Error> {
        // SAFETY: the tensors and their staging are live, as stated above; `fork` puts the
        // transfers behind the copies.
        unsafe {
            self.stage(engine, tensors, false)?;
            engine.fork()?;
            communicator.exchange(engine, &self.transfers(tensors))?;
        }
        engine.join(&engine.mark()?)
    }

    /// Starts to give gathered tensors back, and has the lane of computation wait for the end.
    ///
    /// # Safety
    /// As for [`Group::gather`].
    pub(super) unsafe fn scatter<E: Engine, C: Communicator<E>>(
        self,
        engine: &E,
        communicator: &C,
        tensors: &[Tensor<'_>],
    ) -> Result<(), Error> {
        let transfers: Vec<_> =
            self.transfers(tensors).into_iter().map(Transfer::reversed).collect();
        engine.fork()?;
        // SAFETY: both sides are live, as stated above; `fork` puts the transfers behind the work
        // before.
        unsafe { communicator.exchange(engine, &transfers) }?;
        engine.join(&engine.mark()?)?;
        // SAFETY: the tensors and their staging are live, as stated above.
        unsafe { self.stage(engine, tensors, true) }
    }

    /// The transfers that gather tensors, in the same order on both sides.
    pub(super) fn transfers(self, tensors: &[Tensor<'_>]) -> Vec<Transfer> {
        let (_, c) = self.grid.place(self.rank);
        let mut transfers = Vec::new();
        for tensor in tensors {
            for peer in 0..self.grid.heads {
                let rank = self.grid.rank(peer, c);
                let sent = self.local_side(tensor, peer).into_iter();
                transfers.extend(sent.map(|region| Transfer::send(rank, region)));
            }
            for peer in 0..self.grid.heads {
                let rank = self.grid.rank(peer, c);
                let received = self.gathered_side(tensor, peer).into_iter();
                transfers.extend(received.map(|region| Transfer::receive(rank, region)));
            }
        }
        transfers.retain(|transfer| transfer.region.bytes > 0);
        transfers
    }

    /// The place of a rank's heads of this rank's rows.
    fn local_side(self, tensor: &Tensor<'_>, peer: usize) -> Vec<Region> {
        let (shape, address) = tensor.local;
        let heads = shape.heads / self.grid.heads;
        let row_bytes = shape.columns * shape.size;
        if shape.tokens_first {
            let bytes = (shape.rows * heads * row_bytes) as u64;
            let first = tensor.staging + (peer * shape.batch) as u64 * bytes;
            return (0..shape.batch as u64)
                .map(|b| Region::new(first + b * bytes, bytes))
                .collect();
        }
        let bytes = (shape.rows * row_bytes) as u64;
        let head = |b: usize, h: usize| (b * shape.heads + peer * heads + h) as u64;
        let of_batch =
            |b| (0..heads).map(move |h| Region::new(address + head(b, h) * bytes, bytes));
        (0..shape.batch).flat_map(of_batch).collect()
    }

    /// The place of another rank's rows of this rank's heads.
    fn gathered_side(self, tensor: &Tensor<'_>, peer: usize) -> Vec<Region> {
        let (shape, _) = tensor.local;
        let heads = shape.heads / self.grid.heads;
        let row_bytes = shape.columns * shape.size;
        let before: usize = tensor.rows[..peer].iter().sum();
        let all: usize = tensor.rows.iter().sum();
        // Bytes of rows that follow each other, and how many such runs there are.
        let (row_bytes, runs) = if shape.tokens_first {
            (row_bytes * heads, shape.batch)
        } else {
            (row_bytes, shape.batch * heads)
        };
        let place = |run: usize| tensor.gathered + ((run * all + before) * row_bytes) as u64;
        let bytes = (tensor.rows[peer] * row_bytes) as u64;
        (0..runs).map(|run| Region::new(place(run), bytes)).collect()
    }

    /// Copies local tensors head by head, or back from there, where tokens come first.
    ///
    /// # Safety
    /// As for [`Group::gather`].
    unsafe fn stage<E: Engine>(
        self,
        engine: &E,
        tensors: &[Tensor<'_>],
        back: bool,
    ) -> Result<(), Error> {
        for &Tensor { local: (shape, address), staging, .. } in tensors {
            if !shape.tokens_first {
                continue;
            }
            let bytes = (shape.heads / self.grid.heads * shape.columns * shape.size) as u64;
            let rows = (shape.batch * shape.rows) as u64;
            for peer in 0..self.grid.heads as u64 {
                let pitch = bytes * self.grid.heads as u64;
                let local = Rows { address: address + peer * bytes, pitch };
                let staged = Rows { address: staging + peer * rows * bytes, pitch: bytes };
                let (to, from) = if back { (local, staged) } else { (staged, local) };
                // SAFETY: the rows are inside the tensor and its staging, two live regions.
                unsafe { engine.copy_rows(to, from, rows, bytes) }?;
            }
        }
        Ok(())
    }
}
