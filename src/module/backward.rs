//! The backward pass of a module: its buffers, reused from call to call, and a pass with its
//! inputs.
//!
//! ```text
//! d_o              = dy Wo             dWo, dbo = dyᵀ o, column sums of dy
//! dq | dk | dv     = the gradients of attention, of d_o
//! dx               = (dq | dk | dv) W  dW, db   = (dq | dk | dv)ᵀ x, their column sums
//! ```

use std::sync::Arc;

use super::{
    Forward, Linear, ModuleMemory, MultiHeadAttention, Pass, Weights, expect_bytes,
    forward::{launch_linear, third},
    training_bytes,
};
use crate::{
    backend::{Device, DeviceBuffer, DeviceTensor, Memory, memory::expect_device},
    error::Error,
    problem::{Extras, Problem},
    raw::{BackwardArgs, LinearArgs, Plan, Region, View},
    registry::{self, BackwardSpec, KernelSpec, Projection, Target},
    session::{POISON, Runner, Work},
    tensor::Tensor,
};

/// The attention kernels of a forward pass and of the backward pass after it.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Of the forward pass.
    pub forward: &'static KernelSpec,
    /// Of the backward pass.
    pub backward: &'static BackwardSpec,
}

impl Kernels {
    /// The best kernels for a problem on a device.
    ///
    /// # Errors
    /// As [`registry::best_for`].
    pub fn best(problem: &registry::Backward, target: &Target) -> Result<Self, Error> {
        Ok(Self {
            forward: registry::best_for(&problem.problem, target)?.kernel,
            backward: registry::best_for(problem, target)?.kernel,
        })
    }
}

/// The gradients of a module.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModuleGradients {
    /// Of x, `[B, N, hidden]`.
    pub dx: Tensor,
    /// Of each weight and bias, under its name.
    pub weights: Weights,
}

impl ModuleGradients {
    /// Names of the gradients: x's name, and the parameters' names as in a `state_dict`.
    pub const NAMES: [&str; 9] = [
        "dx",
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.weight",
        "k_proj.bias",
        "v_proj.weight",
        "v_proj.bias",
        "out_proj.weight",
        "out_proj.bias",
    ];

    /// The gradients in the order of [`NAMES`](Self::NAMES).
    #[must_use]
    pub fn into_tensors(self) -> [Tensor; 9] {
        let [q, k, v, out] = self.weights.into_projections();
        [self.dx, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, out.weight, out.bias]
    }
}

/// The buffers of a backward pass over sequences of one shape: the gradients of x, of the
/// parameters and of the intermediate tensors, and workspace. Like [`Forward`], they serve every
/// module of that shape.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{
///     CpuDevice, DType, Error, Tensor,
///     module::{Kernels, MultiHeadAttention, Pass, Weights},
///     registry,
///     session::Session,
/// };
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     let module = MultiHeadAttention::new(&session, &Weights::random(DType::F16, 128, 1)?, 2)?;
///     let problem = module.problem(1, 48, false, &Pass::default())?;
///     let gradients = registry::Backward::new(problem);
///     let kernels = Kernels::best(&gradients, &session.target())?;
///     let mut forward = module.forward_buffers(kernels.forward, &problem)?;
///     let mut backward = module.backward_buffers(kernels.backward, &gradients)?;
///     let upload = |seed| session.upload(&Tensor::random(DType::F16, &[1, 48, 128], seed, 0.0));
///     let (x, dy) = (upload(2)?, upload(3)?);
///     forward.run(&module, &x, None)?;
///     let dx = backward.run(&module, &forward, &x, None, &dy)?;
///     assert_eq!(dx.to_host()?.shape(), [1, 48, 128]);
///     assert_eq!(backward.gradients()?.weights.hidden(), 128);
///     Ok(())
/// }
/// ```
pub struct Backward {
    memory: Arc<Memory>,
    /// For the joint projection of q, k and v, and for the output projection: the gradients of its
    /// input, and of its parameters.
    linear: [[Plan<Projection>; 2]; 2],
    attention: Runner<registry::Backward>,
    d_o: DeviceBuffer,
    d_qkv: DeviceBuffer,
    dx: DeviceTensor,
    /// Weight and bias of q, k and v together, and of the output.
    parameters: [[DeviceBuffer; 2]; 2],
}

impl std::fmt::Debug for Backward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backward")
            .field("kernel", &self.plan().kernel().name)
            .field("problem", self.problem())
            .finish_non_exhaustive()
    }
}

impl Backward {
    pub(super) fn new(
        memory: &Arc<Memory>,
        plan: Plan<registry::Backward>,
        linear: [[Plan<Projection>; 2]; 2],
    ) -> Result<Self, Error> {
        let problem = plan.problem().problem;
        let (hidden, size) = (problem.heads() * problem.head_dim(), problem.dtype().size());
        let x_bytes = (problem.q_elements() * size) as u64;
        let parameters = |projections: usize| -> Result<_, Error> {
            let out = projections * hidden * size;
            Ok([memory.filled((out * hidden) as u64, POISON)?, memory.filled(out as u64, POISON)?])
        };
        let workspace = plan.workspace_bytes();
        let shape = [problem.batch(), problem.seq_q(), hidden];
        Ok(Self {
            linear,
            d_o: memory.filled(x_bytes, POISON)?,
            d_qkv: memory.filled(3 * x_bytes, POISON)?,
            dx: DeviceTensor::filled(memory, problem.dtype(), &shape, POISON)?,
            parameters: [parameters(3)?, parameters(1)?],
            attention: Runner::new(memory, plan, workspace)?,
            memory: memory.clone(),
        })
    }

    /// The plan of the gradients of attention.
    #[must_use]
    pub const fn plan(&self) -> &Plan<registry::Backward> {
        &self.attention.plan
    }

    /// The attention problem between the projections.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        &self.plan().problem().problem
    }

    /// The plans of the projections' gradients, for q, k and v together, and for the output: one
    /// plan for the input, and the plans for weight and bias.
    #[must_use]
    pub const fn linear(&self) -> &[[Plan<Projection>; 2]; 2] {
        &self.linear
    }

    /// `[B, N, hidden]`, the gradient of x of the last run.
    #[must_use]
    pub const fn dx(&self) -> &DeviceTensor {
        &self.dx
    }

    /// Starts the backward pass of `forward`'s last run, which must be of this module on this x and
    /// mask; does not wait. `dy: [B, N, hidden]` is the gradient of y.
    ///
    /// # Errors
    /// A module, a forward pass or an input of another shape, storage type or device; an error that the
    /// device reports.
    pub fn run(
        &mut self,
        module: &MultiHeadAttention,
        forward: &Forward,
        x: &DeviceTensor,
        mask: Option<&DeviceBuffer>,
        dy: &DeviceTensor,
    ) -> Result<&DeviceTensor, Error> {
        let p = *self.problem();
        for (what, tensor) in [("x", x), ("dy", dy), ("y of the forward pass", forward.y())] {
            tensor.expect(what, &self.memory, p.dtype(), self.dx.shape())?;
        }
        if *forward.problem() != p {
            return Err(Error::InvalidValue {
                what: "problem of the forward pass",
                given: format!("{:?}", forward.problem()),
                remedy: format!("the backward pass is made for {p:?}"),
            });
        }
        module.expect(&self.memory, &p)?;
        if let Some(mask) = mask {
            expect_device("mask", mask, &self.memory)?;
        }
        let [[qkv, _], [out, _]] = module.parameters();
        let [d_qkv, d_out] =
            self.parameters.each_ref().map(|pair| pair.each_ref().map(|b| b.region()));
        let device = &**self.memory.device();
        let (o, y, d_o) = (forward.attention().o().region(), dy.region(), self.d_o.region());
        // The gradients of a projection y = x Wᵀ + b, from that of y.
        let start_linear = |[of_x, of_parameters]: &[Plan<Projection>; 2],
                            (x, dx): (Region, Region),
                            (w, [dw, db]): (Region, [Region; 2]),
                            y: Region| {
            // SAFETY: x and dy are tensors of this device, the parameters belong to the module and the
            // rest to `forward` and this value; freeing one waits for the launches.
            unsafe {
                launch_linear(device, of_x, &LinearArgs { x: dx, w, bias: None, y })?;
                launch_linear(device, of_parameters, &LinearArgs { x, w: dw, bias: Some(db), y })
            }
        };
        start_linear(&self.linear[1], (o, d_o), (out.region(), d_out), y)?;

        let thirds = [0, 1, 2].map(|index| third(&p, &self.d_qkv, index));
        let extras = Extras::mask(mask.map(DeviceBuffer::region));
        let args = forward.attention_args(extras).workspace(self.attention.region());
        let d_o = View::contiguous(d_o, p.layout(), p.heads(), p.seq_q(), p.head_dim());
        // SAFETY: as in `start_linear`; the gradients and the workspace are this value's.
        unsafe { self.attention.run(BackwardArgs::new(args, d_o, thirds))? };

        let (x, dx) = (x.region(), self.dx.region());
        start_linear(&self.linear[0], (x, dx), (qkv.region(), d_qkv), self.d_qkv.region())?;
        Ok(&self.dx)
    }

    /// Waits and downloads the gradients of the last run.
    ///
    /// # Errors
    /// The fault of a kernel, if there was one.
    pub fn gradients(&mut self) -> Result<ModuleGradients, Error> {
        self.attention.synchronize()?;
        let (dtype, hidden) = (self.problem().dtype(), self.dx.shape()[2]);
        let [qkv, out] = self.parameters.each_ref().map(|[weight, bias]| -> Result<_, Error> {
            let (weight, bias) = (weight.to_vec::<u8>()?, bias.to_vec::<u8>()?);
            let row = hidden * dtype.size();
            let linear = |(weight, bias): (&[u8], &[u8])| -> Result<_, Error> {
                Ok(Linear {
                    weight: Tensor::from_bytes(dtype, &[hidden, hidden], weight)?,
                    bias: Tensor::from_bytes(dtype, &[hidden], bias)?,
                })
            };
            weight.chunks_exact(row * hidden).zip(bias.chunks_exact(row)).map(linear).collect()
        });
        let mut all: Vec<Linear> = qkv?;
        all.extend(out?);
        let projections = all.try_into().expect("three projections, and that of the output");
        Ok(ModuleGradients { dx: self.dx.to_host()?, weights: Weights::new(projections)? })
    }
}

/// The passes of a [`PreparedBackward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// The forward pass.
    Forward,
    /// The backward pass of an earlier forward pass.
    Backward,
    /// One after the other.
    Both,
}

/// A forward and a backward pass with their inputs in device memory, ready for any number of runs.
#[derive(Debug)]
pub struct PreparedBackward<'a> {
    module: &'a MultiHeadAttention,
    forward: Forward,
    backward: Backward,
    memory: Arc<Memory>,
    x: DeviceTensor,
    dy: DeviceTensor,
    mask: Option<DeviceBuffer>,
    passes: Passes,
}

impl PreparedBackward<'_> {
    /// The forward pass's buffers, with the output.
    #[must_use]
    pub const fn forward(&self) -> &Forward {
        &self.forward
    }

    /// The backward pass's buffers, with the gradients.
    #[must_use]
    pub const fn backward(&self) -> &Backward {
        &self.backward
    }

    /// Sets the passes of a run from now on. Before the backward pass alone, the forward pass must
    /// have run.
    pub const fn set_passes(&mut self, passes: Passes) {
        self.passes = passes;
    }

    /// Waits and downloads the gradients.
    ///
    /// # Errors
    /// The fault of a kernel that ran before.
    pub fn gradients(&mut self) -> Result<ModuleGradients, Error> {
        self.backward.gradients()
    }

    /// Device memory of both passes, and of the module's parameters. Outputs are y, dx and the
    /// gradients of the parameters; the tensors that the forward pass keeps for the backward pass
    /// count as workspace.
    #[must_use]
    pub fn memory(&self) -> ModuleMemory {
        let parameters = self.module.parameter_bytes();
        let mask = self.mask.as_ref().map_or(0, DeviceBuffer::bytes);
        let inputs = self.x.bytes() + self.dy.bytes() + mask;
        let outputs = self.forward.y().bytes() + self.backward.dx.bytes() + parameters;
        ModuleMemory::new(parameters, inputs, outputs, self.memory.peak())
    }
}

impl Work for PreparedBackward<'_> {
    fn device(&self) -> &dyn Device {
        &**self.module.memory.device()
    }

    fn start(&mut self) -> Result<(), Error> {
        let mask = self.mask.as_ref();
        if self.passes != Passes::Backward {
            self.forward.run(self.module, &self.x, mask)?;
        }
        if self.passes != Passes::Forward {
            self.backward.run(self.module, &self.forward, &self.x, mask, &self.dy)?;
        }
        Ok(())
    }
}

impl MultiHeadAttention {
    /// The plans of the gradients of a problem's projections, on the best kernel that supports
    /// them, unless the caller named a kernel. See [`Backward::linear`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason.
    pub fn linear_backward(&self, problem: &Problem) -> Result<[[Plan<Projection>; 2]; 2], Error> {
        super::linear_backward(problem, &Target::of(&**self.memory.device()), self.linear)
    }

    /// The buffers of backward passes over a problem of this module
    /// ([`MultiHeadAttention::problem`]), filled with NaN.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason; [`Error::OutOfMemory`].
    pub fn backward_buffers(
        &self,
        kernel: &'static BackwardSpec,
        backward: &registry::Backward,
    ) -> Result<Backward, Error> {
        self.expect(&self.memory, &backward.problem)?;
        let plan = kernel.plan(backward, &Target::of(&**self.memory.device()))?;
        Backward::new(&self.memory.part(), plan, self.linear_backward(&backward.problem)?)
    }

    /// Prepares a forward and a backward pass, from the elements of x and of dy, `[B, N, hidden]`,
    /// as bytes, and a mask that is empty where the problem has no mask. See
    /// [`MultiHeadAttention::prepare_bytes`].
    ///
    /// # Errors
    /// The errors of `prepare_bytes`; [`Error::InvalidValue`] for plans of two problems.
    pub fn prepare_backward(
        &self,
        (forward, backward): (Plan, Plan<registry::Backward>),
        x: &[u8],
        dy: &[u8],
        mask: &[u8],
    ) -> Result<PreparedBackward<'_>, Error> {
        let problem = *forward.problem();
        if backward.problem().problem != problem {
            return Err(Error::InvalidValue {
                what: "problem of the backward pass",
                given: format!("{:?}", backward.problem().problem),
                remedy: format!("the forward pass is planned for {problem:?}"),
            });
        }
        let (linear, of_gradients) = (self.linear(&problem)?, self.linear_backward(&problem)?);
        expect_bytes("dy", problem.q_elements() * self.dtype.size(), dy.len())?;
        let mask = self.expect_inputs(&problem, x, mask, training_bytes(&forward, &backward))?;
        // A count of its own: other passes and sessions do not show in it.
        let memory = self.memory.part();
        let shape = [problem.batch(), problem.seq_q(), self.hidden()];
        let upload = |bytes| DeviceTensor::from_bytes(&memory, problem.dtype(), &shape, bytes);
        Ok(PreparedBackward {
            module: self,
            x: upload(x)?,
            dy: upload(dy)?,
            mask: mask.map(|mask| memory.upload(mask)).transpose()?,
            forward: Forward::new(&memory, forward, linear)?,
            backward: Backward::new(&memory, backward, of_gradients)?,
            memory,
            passes: Passes::Both,
        })
    }

    /// Runs a forward pass and its backward pass once, from the host and back: the gradients of x
    /// and of the parameters, given `dy: [B, N, hidden]`.
    ///
    /// # Errors
    /// An error that names the wrong x, dy, mask or kernel; [`Error::OutOfMemory`] (where
    /// predictable, before any allocation), or the fault of a kernel.
    pub fn backward(
        &self,
        kernels: Kernels,
        x: &Tensor,
        dy: &Tensor,
        mask: Option<&[u8]>,
        pass: &Pass,
    ) -> Result<(ModuleGradients, ModuleMemory), Error> {
        let problem = self.problem_of(x, mask, pass)?;
        dy.expect("dy", self.dtype, x.shape())?;
        let target = Target::of(&**self.memory.device());
        let backward = registry::Backward::new(problem).deterministic(pass.deterministic);
        let plans =
            (kernels.forward.plan(&problem, &target)?, kernels.backward.plan(&backward, &target)?);
        let (x, dy, mask) = (x.as_bytes(), dy.as_bytes(), mask.unwrap_or_default());
        let mut prepared = self.prepare_backward(plans, x, dy, mask)?;
        prepared.launch()?;
        Ok((prepared.gradients()?, prepared.memory()))
    }
}
