//! A forward pass that is ready to run, and what it gives.

use super::MultiHeadAttention;
use crate::{
    backend::{Device, DeviceBuffer, Launch},
    error::Error,
    problem::Problem,
    session::{Attention, Work},
    tensor::Tensor,
};

/// What a module gives.
#[derive(Clone, Debug)]
pub struct ModuleOutputs {
    /// `[B, N, hidden]`.
    pub y: Tensor,
    /// Attention weights `[B, H, N, N]` after dropout, where they were asked for.
    pub weights: Option<Tensor>,
}

/// Device memory of a forward pass, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleMemory {
    /// Weights and biases of the projections, which stay from pass to pass.
    pub parameters: u64,
    /// x and the padding mask.
    pub inputs: u64,
    /// y.
    pub outputs: u64,
    /// Everything else: q, k, v, o, the log-sum-exp and what the kernel needs; the attention
    /// weights, once they were asked for.
    pub workspace: u64,
    /// The most in use at once, as counted.
    pub peak: u64,
}

/// A pass with its input in device memory, to be run as often as wanted.
pub struct Forward<'a> {
    pub(super) module: &'a MultiHeadAttention,
    /// The projection of q, k and v.
    pub(super) before: Launch,
    pub(super) attention: Attention,
    /// The projection of the output.
    pub(super) after: Launch,
    pub(super) x: DeviceBuffer,
    pub(super) mask: DeviceBuffer,
    /// Q, K and V, kept alive for the kernels.
    pub(super) _qkv: DeviceBuffer,
    pub(super) y: DeviceBuffer,
    /// Bytes that were in use beside the module when the pass was prepared.
    pub(super) others: u64,
}

impl Forward<'_> {
    /// The attention problem between the projections.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        self.attention.problem()
    }

    /// Waits and downloads y.
    ///
    /// # Errors
    /// What went wrong while a kernel ran.
    pub fn y(&self) -> Result<Tensor, Error> {
        self.module.memory.device().synchronize()?;
        let p = self.problem();
        let mut y = Tensor::zeros(p.dtype(), &[p.batch(), p.seq_q(), self.module.hidden()]);
        self.y.read(y.bytes_mut())?;
        Ok(y)
    }

    /// The attention weights, once the pass has run; see [`Attention::weights`].
    ///
    /// # Errors
    /// As [`Attention::weights`].
    pub fn weights(&self) -> Result<Tensor, Error> {
        self.attention.weights()
    }

    /// Device memory of this pass so far.
    #[must_use]
    pub fn memory(&self) -> ModuleMemory {
        let peak = self.module.memory.peak() - self.others;
        let parameters = self.module.parameter_bytes();
        let inputs = self.x.bytes() + self.mask.bytes();
        let outputs = self.y.bytes();
        ModuleMemory {
            parameters,
            inputs,
            outputs,
            workspace: peak - parameters - inputs - outputs,
            peak,
        }
    }
}

impl Work for Forward<'_> {
    fn device(&self) -> &dyn Device {
        &**self.module.memory.device()
    }

    fn start(&self) -> Result<(), Error> {
        let device = self.device();
        // SAFETY: the parameters belong to the module, every other buffer to this value.
        unsafe { device.launch(&self.before)? };
        self.attention.start()?;
        // SAFETY: as above.
        unsafe { device.launch(&self.after) }
    }
}
