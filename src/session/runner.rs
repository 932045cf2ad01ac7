//! A plan with its own workspace.

use std::sync::Arc;

use super::POISON;
use crate::{
    backend::{DeviceBuffer, Launch, Memory},
    error::Error,
    raw::{Plan, Region},
    registry::Operation,
};

/// A plan with its own workspace, which every run reuses.
pub(crate) struct Runner<P: Operation> {
    pub(crate) memory: Arc<Memory>,
    pub(crate) plan: Plan<P>,
    pub(crate) workspace: DeviceBuffer,
    /// The launches of the previous run: tensors at the same addresses reuse them.
    pub(crate) ready: Option<(P::Args, Vec<Launch>)>,
    /// Whether the queue is known to be zero; false after a failed launch.
    queue_is_zero: bool,
}

impl<P: Operation> Runner<P> {
    /// Allocates a workspace of `bytes` bytes, filled with NaN.
    pub(crate) fn new(memory: &Arc<Memory>, plan: Plan<P>, bytes: u64) -> Result<Self, Error> {
        let workspace = memory.filled(bytes, POISON)?;
        Ok(Self { memory: memory.clone(), plan, workspace, ready: None, queue_is_zero: false })
    }

    pub(crate) fn region(&self) -> Region {
        self.workspace.region()
    }

    /// Starts the launches of a call.
    ///
    /// # Safety
    /// - The inputs in `args` are live memory of this device, whose owners are freed through the
    ///   device.
    /// - Its outputs belong to the owner of this value, and no other work can use them meanwhile.
    /// - Its workspace is this value's workspace.
    pub(crate) unsafe fn run(&mut self, args: P::Args) -> Result<(), Error> {
        let device = &**self.memory.device();
        let ready = self.ready.take().filter(|(before, _)| *before == args);
        let (_, launches) = match ready {
            Some(ready) => self.ready.insert(ready),
            None => {
                let launches = self.plan.launches_for(device, &args)?;
                self.ready.insert((args, launches))
            }
        };
        if !self.queue_is_zero {
            self.workspace.fill_start(self.plan.zeroed_bytes(), 0)?;
        }
        self.queue_is_zero = false;
        for launch in launches.iter() {
            // SAFETY: the plan checked the arguments; inputs are live, outputs and workspace have
            // no other user, as stated above.
            unsafe { device.launch(launch)? };
        }
        self.queue_is_zero = true;
        Ok(())
    }

    /// Waits for the last run. After a fault the queue is zeroed before it is used again.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub(crate) fn synchronize(&mut self) -> Result<(), Error> {
        let done = self.memory.device().synchronize();
        self.queue_is_zero &= done.is_ok();
        done
    }
}
