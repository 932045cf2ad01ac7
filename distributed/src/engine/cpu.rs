//! A rank on the emulator. Every operation has ended when its call returns, but for what is received:
//! that shows when the lane of computation joins it, and is NaN until then, so that a rank that does not
//! wait computes nonsense here too.

use std::{
    cell::{Cell, RefCell},
    sync::Arc,
};

use flash_attention::{
    CpuDevice, Device,
    backend::Memory,
    raw::{Plan, Region},
    registry::{Operation, Target},
};

use super::{Engine, Rows};
use crate::error::Error;

/// Every bit set is NaN in every storage type.
const POISON: u8 = 0xff;

/// A rank whose kernels run under the emulator.
#[derive(Debug)]
pub struct CpuEngine {
    memory: Arc<Memory>,
    /// Parcels received and not joined yet, in order.
    arrived: RefCell<Vec<(u64, u64, Vec<u8>)>>,
    marks: Cell<u64>,
}

/// Bytes on their way.
#[derive(Clone, Debug)]
pub struct CpuParcel(Arc<Vec<u8>>);

impl CpuEngine {
    /// An emulator of its own.
    #[must_use]
    pub fn new(device: CpuDevice) -> Self {
        let memory = Memory::new(Arc::new(device));
        Self { memory, arrived: RefCell::default(), marks: Cell::new(0) }
    }

    /// Its memory.
    #[must_use]
    pub const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn device(&self) -> &dyn Device {
        &**self.memory.device()
    }

    /// The bytes of a region as the lane of communication has them.
    ///
    /// # Safety
    /// As for [`Engine::offer`].
    unsafe fn bytes(&self, region: Region) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; region.bytes as usize];
        // SAFETY: the region is live memory of this device, as stated above.
        unsafe { self.device().download(region.address, &mut bytes) }?;
        for (_, address, data) in self.arrived.borrow().iter() {
            let from = region.address.max(*address);
            let to = (region.address + region.bytes).min(address + data.len() as u64);
            if from < to {
                let (at, of) = ((from - region.address) as usize, (from - address) as usize);
                let length = (to - from) as usize;
                bytes[at..at + length].copy_from_slice(&data[of..of + length]);
            }
        }
        Ok(bytes)
    }
}

// SAFETY: an operation has ended when its call returns; what is received is kept in order until it
// is joined, and read from there by what the lane of communication sends.
unsafe impl Engine for CpuEngine {
    type Mark = u64;
    type Parcel = CpuParcel;
    type Receipt = ();

    fn target(&self) -> Target {
        Target::of(self.device())
    }

    unsafe fn start<P: Operation>(&self, plan: &Plan<P>, args: &P::Args) -> Result<(), Error> {
        for launch in plan.launches_for(self.device(), args)? {
            // SAFETY: the plan checked the arguments; the buffers are live and have no other user,
            // as `Engine::start` asks.
            unsafe { self.device().launch(&launch) }?;
        }
        Ok(self.device().synchronize()?)
    }

    unsafe fn copy_rows(&self, to: Rows, from: Rows, rows: u64, bytes: u64) -> Result<(), Error> {
        let mut row = vec![0; bytes as usize];
        for at in 0..rows {
            // SAFETY: both sides are live and do not overlap, as `Engine::copy_rows` asks.
            unsafe {
                self.device().download(from.address + at * from.pitch, &mut row)?;
                self.device().upload(to.address + at * to.pitch, &row)?;
            }
        }
        Ok(())
    }

    unsafe fn fill(&self, region: Region, value: u8) -> Result<(), Error> {
        if region.bytes > 0 {
            // SAFETY: the region is live, as `Engine::fill` asks.
            unsafe { self.device().fill(region.address, region.bytes, value) }?;
        }
        Ok(())
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: the bytes at `address` are live and unused, as `Engine::upload` asks.
        Ok(unsafe { self.device().upload(address, bytes) }?)
    }

    fn fork(&self) -> Result<(), Error> {
        Ok(())
    }

    fn mark(&self) -> Result<u64, Error> {
        self.marks.set(self.marks.get() + 1);
        Ok(self.marks.get())
    }

    fn join(&self, &mark: &u64) -> Result<(), Error> {
        let mut arrived = self.arrived.borrow_mut();
        let later = arrived.iter().position(|(at, ..)| *at >= mark).unwrap_or(arrived.len());
        for (_, address, bytes) in arrived.drain(..later) {
            // SAFETY: the memory is live until what it receives is joined, as `accept` asks.
            unsafe { self.device().upload(address, &bytes) }?;
        }
        Ok(())
    }

    fn is_idle(&self) -> Result<bool, Error> {
        self.device().synchronize()?;
        Ok(true)
    }

    unsafe fn offer(&self, region: Region) -> Result<CpuParcel, Error> {
        // SAFETY: the region is live until the receipt is settled, as `Engine::offer` asks.
        unsafe { self.bytes(region) }.map(|bytes| CpuParcel(Arc::new(bytes)))
    }

    unsafe fn accept(&self, parcel: &CpuParcel, to: Region) -> Result<(), Error> {
        // SAFETY: the region is live until the copy has ended, as `Engine::accept` asks.
        unsafe { self.device().fill(to.address, to.bytes, POISON) }?;
        self.arrived.borrow_mut().push((self.marks.get(), to.address, parcel.0.to_vec()));
        Ok(())
    }

    fn settle(&self, (): ()) -> Result<(), Error> {
        Ok(())
    }
}
