//! Forward passes: the buffers of a pass, reused from call to call, and a pass with its input.

use std::sync::Arc;

use super::{MultiHeadAttention, Pass};
use crate::{
    backend::{Device, DeviceBuffer, DeviceTensor, Memory, memory::expect_device},
    error::Error,
    problem::{Extras, Problem},
    raw::{Args, LinearArgs, Plan, Region, View},
    registry::{KernelSpec, Projection},
    session::{Attention, POISON, Work},
    tensor::Tensor,
};

/// The outputs of a module.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModuleOutputs {
    /// `[B, N, hidden]`.
    pub y: Tensor,
    /// Attention weights `[B, H, N, N]` after dropout, if the caller asked for them.
    pub weights: Option<Tensor>,
}

/// Device memory of a forward pass, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModuleMemory {
    /// Weights and biases of the projections, which persist from pass to pass.
    pub parameters: u64,
    /// x and the padding mask.
    pub inputs: u64,
    /// y.
    pub outputs: u64,
    /// Everything else: q, k, v, o, the log-sum-exp and the kernel's workspace; the attention
    /// weights, once the caller has asked for them.
    pub workspace: u64,
    /// The counted peak.
    pub peak: u64,
}

impl ModuleMemory {
    /// Bytes of the parameters, of inputs and outputs, and the `peak` of all but the parameters.
    pub(super) const fn new(parameters: u64, inputs: u64, outputs: u64, peak: u64) -> Self {
        let workspace = peak - inputs - outputs;
        Self { parameters, inputs, outputs, workspace, peak: parameters + peak }
    }
}

/// The buffers of a forward pass over sequences of one shape: q, k, v, o, y and workspace. They
/// serve every module of that shape, layer after layer. Calls after the first allocate, fill and
/// upload nothing.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{
///     CpuDevice, DType, Error, Tensor,
///     module::{MultiHeadAttention, Pass, Weights},
///     registry,
///     session::Session,
/// };
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     let layer = |seed| -> Result<_, Error> {
///         MultiHeadAttention::new(&session, &Weights::random(DType::F16, 128, seed)?, 2)
///     };
///     let (first, second) = (layer(1)?, layer(2)?);
///     let kernel = registry::find("flash_mma")?;
///     let pass = Pass::default();
///     let x = session.upload(&Tensor::random(DType::F16, &[1, 48, 128], 3, 0.0))?;
///     // Two sets of buffers, since a layer reads the output of the one before.
///     let mut a = first.forward_buffers(kernel, &first.problem(1, 48, false, &pass)?)?;
///     let mut b = second.forward_buffers(kernel, &second.problem(1, 48, false, &pass)?)?;
///     let y = a.run(&first, &x, None)?;
///     let y = b.run(&second, y, None)?;
///     assert_eq!(y.to_host()?.shape(), [1, 48, 128]);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Forward {
    memory: Arc<Memory>,
    /// The projection of q, k and v, and that of the output.
    linear: [Plan<Projection>; 2],
    attention: Attention,
    qkv: DeviceBuffer,
    y: DeviceTensor,
}

impl Forward {
    pub(super) fn new(
        memory: &Arc<Memory>,
        plan: Plan,
        linear: [Plan<Projection>; 2],
    ) -> Result<Self, Error> {
        let problem = plan.problem();
        let x_bytes = (problem.q_elements() * problem.dtype().size()) as u64;
        let hidden = problem.heads() * problem.head_dim();
        let y = [problem.batch(), problem.seq_q(), hidden];
        Ok(Self {
            linear,
            qkv: memory.filled(3 * x_bytes, POISON)?,
            y: DeviceTensor::filled(memory, problem.dtype(), &y, POISON)?,
            attention: Attention::new(memory, plan)?,
            memory: memory.clone(),
        })
    }

    /// The attention problem between the projections.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        self.attention.problem()
    }

    /// The attention kernel with its outputs.
    #[must_use]
    pub const fn attention(&self) -> &Attention {
        &self.attention
    }

    /// The plans of the projections: one for q, k and v together, and one for the output.
    #[must_use]
    pub const fn linear(&self) -> &[Plan<Projection>; 2] {
        &self.linear
    }

    /// `[B, N, hidden]`, the output of the last run.
    #[must_use]
    pub const fn y(&self) -> &DeviceTensor {
        &self.y
    }

    /// Starts a pass of a module over `x: [B, N, hidden]` in device memory; does not wait.
    ///
    /// # Errors
    /// A module or an input of another shape, storage type or device; an error that the device reports.
    pub fn run(
        &mut self,
        module: &MultiHeadAttention,
        x: &DeviceTensor,
        mask: Option<&DeviceBuffer>,
    ) -> Result<&DeviceTensor, Error> {
        let p = *self.problem();
        x.expect("x", &self.memory, p.dtype(), self.y.shape())?;
        module.expect(&self.memory, &p)?;
        if let Some(mask) = mask {
            expect_device("mask", mask, &self.memory)?;
        }
        let [qkv, out] = module.parameters();
        self.project(0, x.region(), qkv, self.qkv.region())?;
        let args = self.attention_args(Extras::mask(mask.map(DeviceBuffer::region)));
        // SAFETY: q, k and v are parts of this value's buffer; the mask was checked above.
        unsafe { self.attention.run_on(args)? };
        self.project(1, self.attention.o().region(), out, self.y.region())?;
        Ok(&self.y)
    }

    /// One projection, from x to y.
    fn project(
        &self,
        which: usize,
        x: Region,
        [w, bias]: &[DeviceBuffer; 2],
        y: Region,
    ) -> Result<(), Error> {
        let device = &**self.memory.device();
        let args = LinearArgs { x, w: w.region(), bias: Some(bias.region()), y };
        // SAFETY: x is the caller's tensor or a buffer of this value, as y is, and the parameters
        // belong to the module: all on this device, and freeing one waits for the launch.
        unsafe { launch_linear(device, &self.linear[which], &args) }
    }

    /// The tensors of attention.
    pub(super) fn attention_args(&self, extras: Extras<Region>) -> Args {
        let p = self.problem();
        self.attention.args_of([0, 1, 2].map(|index| third(p, &self.qkv, index)), extras)
    }

    /// The attention weights of the last run: see [`Prepared::weights`](crate::session::Prepared::weights).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// The mask of the last run is still in memory.
    unsafe fn weights(&mut self) -> Result<Tensor, Error> {
        // SAFETY: q, k and v belong to this value; the mask is still in memory, as stated above.
        unsafe { self.attention.weights() }
    }
}

/// Starts the launches of a projection.
///
/// # Safety
/// The tensors in `args` are live memory of the device, whose owners are freed through the device.
/// No other work uses the written tensors.
pub(super) unsafe fn launch_linear(
    device: &dyn Device,
    plan: &Plan<Projection>,
    args: &LinearArgs,
) -> Result<(), Error> {
    for launch in plan.launches_for(device, args)? {
        // SAFETY: the plan checked the lengths; the tensors are live and have no other user, as
        // stated above.
        unsafe { device.launch(&launch)? };
    }
    Ok(())
}

/// Q, K or V, or the gradient of one of them: a third of each token's row, `[B, N, 3, H, D]` at
/// `third`.
pub(super) fn third(p: &Problem, all: &DeviceBuffer, third: u64) -> View {
    let offset = third * (p.heads() * p.head_dim() * p.dtype().size()) as u64;
    let region = all.region().part(offset, all.bytes() - offset);
    let View { strides: [b, h, n], .. } =
        View::contiguous(region, p.layout(), p.heads(), p.seq_q(), p.head_dim());
    View::new(region, [3 * b, h, 3 * n])
}

/// A pass with its input in device memory, ready for any number of runs.
#[derive(Debug)]
pub struct PreparedForward<'a> {
    module: &'a MultiHeadAttention,
    forward: Forward,
    x: DeviceTensor,
    mask: Option<DeviceBuffer>,
}

impl<'a> PreparedForward<'a> {
    pub(super) fn new(
        module: &'a MultiHeadAttention,
        plan: Plan,
        linear: [Plan<Projection>; 2],
        x: &[u8],
        mask: Option<&[u8]>,
    ) -> Result<Self, Error> {
        let problem = plan.problem();
        // A count of its own: other passes and sessions do not show in it.
        let memory = module.memory.part();
        let shape = [problem.batch(), problem.seq_q(), module.hidden()];
        Ok(Self {
            x: DeviceTensor::from_bytes(&memory, problem.dtype(), &shape, x)?,
            mask: mask.map(|mask| memory.upload(mask)).transpose()?,
            forward: Forward::new(&memory, plan, linear)?,
            module,
        })
    }

    /// The attention problem between the projections.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        self.forward.problem()
    }

    /// The buffers, with the output.
    #[must_use]
    pub const fn forward(&self) -> &Forward {
        &self.forward
    }

    /// Waits and downloads y.
    ///
    /// # Errors
    /// The fault of a kernel that ran before.
    pub fn y(&self) -> Result<Tensor, Error> {
        self.forward.y.to_host()
    }

    /// The attention weights, once the pass has run; see
    /// [`Prepared::weights`](crate::session::Prepared::weights).
    ///
    /// # Errors
    /// As there.
    pub fn weights(&mut self) -> Result<Tensor, Error> {
        // SAFETY: the mask belongs to this value.
        unsafe { self.forward.weights() }
    }

    /// Device memory of this pass so far, and of the module's parameters.
    #[must_use]
    pub fn memory(&self) -> ModuleMemory {
        let parameters = self.module.parameter_bytes();
        let inputs = self.x.bytes() + self.mask.as_ref().map_or(0, DeviceBuffer::bytes);
        let outputs = self.forward.y.bytes();
        ModuleMemory::new(parameters, inputs, outputs, self.forward.memory.peak())
    }
}

impl Work for PreparedForward<'_> {
    fn device(&self) -> &dyn Device {
        &**self.module.memory.device()
    }

    fn start(&mut self) -> Result<(), Error> {
        self.forward.run(self.module, &self.x, self.mask.as_ref()).map(drop)
    }
}

impl MultiHeadAttention {
    /// Runs a pass once, from the host and back.
    ///
    /// # Errors
    /// As [`MultiHeadAttention::prepare`], or the fault of a kernel.
    pub fn forward(
        &self,
        kernel: &'static KernelSpec,
        x: &Tensor,
        mask: Option<&[u8]>,
        pass: &Pass,
    ) -> Result<(ModuleOutputs, ModuleMemory), Error> {
        let mut forward = self.prepare(kernel, x, mask, pass)?;
        forward.launch()?;
        let weights = pass.weights.then(|| forward.weights()).transpose()?;
        Ok((ModuleOutputs { y: forward.y()?, weights }, forward.memory()))
    }
}
