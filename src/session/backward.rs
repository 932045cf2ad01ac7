//! The gradients of attention, ready for any number of runs.

use std::{fmt, sync::Arc};

use super::{
    Inputs, MemoryReport, Outputs, POISON, Session, Work, check_lengths, runner::Runner,
    sequences::Sequences, view,
};
use crate::{
    backend::{Device, DeviceBuffer, DeviceTensor, Memory, memory::expect_device},
    dtype::DType,
    error::Error,
    problem::Extras,
    raw::{Args, BackwardArgs, Plan},
    registry::{Backward, BackwardSpec},
    tensor::Tensor,
};

/// The inputs and outputs of a forward pass, in device memory. Its backward pass reads all of them.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// Queries.
    pub q: &'a DeviceTensor,
    /// Keys.
    pub k: &'a DeviceTensor,
    /// Values.
    pub v: &'a DeviceTensor,
    /// The problem's other tensors.
    pub extras: Extras<&'a DeviceBuffer>,
    /// The output.
    pub o: &'a DeviceTensor,
    /// The log-sum-exp: f32 `[B, H, Nq]`, natural log.
    pub lse: &'a DeviceTensor,
}

/// The gradients of Q, K and V, on the host.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Gradient of Q, of the problem's `q_shape` and storage type.
    pub dq: Tensor,
    /// Gradient of K, of the problem's `k_shape`.
    pub dk: Tensor,
    /// Gradient of V, of the problem's `v_shape`.
    pub dv: Tensor,
    /// Gradient of the bias, `[B or 1, H or 1, Nq, Nk]` in the storage type, if requested.
    pub d_bias: Option<Tensor>,
    /// Gradient of the sinks, f32 `[H]`, if requested.
    pub d_sinks: Option<Tensor>,
}

/// A kernel of the backward pass that is ready for one problem: the gradients and its workspace
/// stay in device memory, and every run reuses them.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{
///     CpuDevice, Error, Extras, Problem, Tensor, registry,
///     session::{Forward, Session},
/// };
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     let problem = Problem::builder(1, 2, 48, 64).causal(true).build()?;
///     let x = session.upload(&Tensor::random(problem.dtype(), &problem.q_shape(), 1, 0.0))?;
///     let d_o = session.upload(&Tensor::random(problem.dtype(), &problem.q_shape(), 2, 0.0))?;
///     let mut attention = session.attention(registry::find("flash_tiled")?, &problem)?;
///     attention.run(&x, &x, &x, None)?;
///     // O and the LSE stay on the device.
///     let (o, lse) = (attention.o(), attention.lse());
///     let forward = Forward { q: &x, k: &x, v: &x, extras: Extras::default(), o, lse };
///     let backward = registry::Backward::new(problem);
///     let kernel = registry::best_for(&backward, &session.target())?.kernel;
///     let mut gradients = session.backward(kernel, &backward)?;
///     gradients.run(forward, &d_o)?;
///     assert_eq!(gradients.dq().to_host()?.shape(), [1, 2, 48, 64]);
///     Ok(())
/// }
/// ```
pub struct AttentionBackward {
    runner: Runner<Backward>,
    dq: DeviceTensor,
    dk: DeviceTensor,
    dv: DeviceTensor,
    d_bias: Option<DeviceTensor>,
    d_sinks: Option<DeviceTensor>,
    sequences: Sequences,
}

impl fmt::Debug for AttentionBackward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttentionBackward")
            .field("kernel", &self.plan().kernel().name)
            .field("problem", self.plan().problem())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Allocates gradients and workspace of a kernel of the backward pass, filled with NaN, so that
    /// an element that no kernel wrote shows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot do the problem; [`Error::OutOfMemory`].
    pub fn backward(
        &self,
        kernel: &'static BackwardSpec,
        backward: &Backward,
    ) -> Result<AttentionBackward, Error> {
        AttentionBackward::new(self.memory(), kernel.plan(backward, &self.target())?)
    }

    /// Uploads the inputs and outputs of a forward pass and the gradient of O, and prepares the
    /// launches.
    ///
    /// # Errors
    /// A wrong value of the request; [`Error::OutOfMemory`], or an error that the device reports.
    pub fn prepare_backward(
        &self,
        plan: Plan<Backward>,
        inputs: &Inputs<'_>,
        outputs: &Outputs,
        d_o: &Tensor,
    ) -> Result<PreparedBackward, Error> {
        let p = plan.problem().problem;
        inputs.check(&p)?;
        for (what, tensor) in [("o", &outputs.o), ("d_o", d_o)] {
            tensor.expect(what, p.dtype(), &p.o_shape())?;
        }
        outputs.lse.expect("lse", DType::F32, &p.lse_shape())?;
        let extras = inputs.extras();
        check_lengths(&p, &extras)?;
        self.check_free(plan.peak_bytes())?;
        let memory = self.memory().part();
        let upload = |tensor: &Tensor| DeviceTensor::upload(&memory, tensor);
        let [q, k, v, d_o] = [inputs.q, inputs.k, inputs.v, d_o].map(upload);
        let (o, lse) = (upload(&outputs.o)?, upload(&outputs.lse)?);
        let mut extras = extras.try_map(|bytes| memory.upload(bytes))?;
        let input_bytes = memory.current();
        let mut backward = AttentionBackward::new(&memory, plan)?;
        backward.sequences = Sequences::take(&mut extras);
        let workspace = backward.runner.workspace.bytes();
        let memory = MemoryReport::of(&memory, input_bytes, workspace);
        Ok(PreparedBackward { backward, inputs: [q?, k?, v?, o, lse, d_o?], extras, memory })
    }

    /// Computes the gradients once.
    ///
    /// # Errors
    /// As [`Session::prepare_backward`], or the fault of the kernel.
    pub fn run_backward(
        &self,
        kernel: &'static BackwardSpec,
        backward: &Backward,
        inputs: &Inputs<'_>,
        outputs: &Outputs,
        d_o: &Tensor,
    ) -> Result<(Gradients, MemoryReport), Error> {
        let plan = kernel.plan(backward, &self.target())?;
        let mut prepared = self.prepare_backward(plan, inputs, outputs, d_o)?;
        prepared.launch()?;
        Ok((prepared.gradients()?, prepared.memory()))
    }
}

impl AttentionBackward {
    pub(crate) fn new(memory: &Arc<Memory>, plan: Plan<Backward>) -> Result<Self, Error> {
        let p = plan.problem().problem;
        let filled = |shape: [usize; 4]| DeviceTensor::filled(memory, p.dtype(), &shape, POISON);
        let d_sinks = plan.problem().d_sinks_shape();
        let d_sinks = d_sinks.map(|s| DeviceTensor::filled(memory, DType::F32, &s, POISON));
        Ok(Self {
            dq: filled(p.q_shape())?,
            dk: filled(p.k_shape())?,
            dv: filled(p.v_shape())?,
            d_bias: plan.problem().d_bias_shape().map(filled).transpose()?,
            d_sinks: d_sinks.transpose()?,
            sequences: Sequences::default(),
            runner: {
                let bytes = plan.workspace_bytes();
                Runner::new(memory, plan, bytes)?
            },
        })
    }

    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan<Backward> {
        &self.runner.plan
    }

    /// Gradient of Q of the last run.
    #[must_use]
    pub const fn dq(&self) -> &DeviceTensor {
        &self.dq
    }

    /// Gradient of K of the last run.
    #[must_use]
    pub const fn dk(&self) -> &DeviceTensor {
        &self.dk
    }

    /// Gradient of V of the last run.
    #[must_use]
    pub const fn dv(&self) -> &DeviceTensor {
        &self.dv
    }

    /// Gradient of the bias of the last run, if requested.
    #[must_use]
    pub const fn d_bias(&self) -> Option<&DeviceTensor> {
        self.d_bias.as_ref()
    }

    /// Gradient of the sinks of the last run, if requested.
    #[must_use]
    pub const fn d_sinks(&self) -> Option<&DeviceTensor> {
        self.d_sinks.as_ref()
    }

    /// Sets the start offsets of packed sequences for the runs from now on: see
    /// [`Attention::set_sequences`](super::Attention::set_sequences).
    ///
    /// # Errors
    /// As there.
    pub fn set_sequences(
        &mut self,
        cu_seqlens_q: &[u32],
        cu_seqlens_k: &[u32],
    ) -> Result<(), Error> {
        let p = self.plan().problem().problem;
        self.sequences = Sequences::upload(&self.runner.memory, &p, cu_seqlens_q, cu_seqlens_k)?;
        Ok(())
    }

    /// Starts to compute the gradients; does not wait. The start offsets of packed sequences are not among
    /// the extras: [`set_sequences`](Self::set_sequences) sets them before, and checks the numbers.
    ///
    /// # Errors
    /// A tensor of another shape, storage type or device; an error that the device reports.
    pub fn run(&mut self, forward: Forward<'_>, d_o: &DeviceTensor) -> Result<(), Error> {
        let args = self.args(forward, d_o)?;
        // SAFETY: `args` checked that the inputs are tensors of this device, and freeing one waits
        // for the launches before; gradients and workspace belong to this value.
        unsafe { self.runner.run(args) }
    }

    /// The inputs, checked, and the gradients.
    fn args(&self, forward: Forward<'_>, d_o: &DeviceTensor) -> Result<BackwardArgs, Error> {
        let Forward { q, k, v, extras, o, lse } = forward;
        let (p, memory) = (&self.plan().problem().problem, &self.runner.memory);
        for (what, tensor, shape) in [
            ("q", q, p.q_shape()),
            ("k", k, p.k_shape()),
            ("v", v, p.v_shape()),
            ("o", o, p.o_shape()),
            ("d_o", d_o, p.o_shape()),
        ] {
            tensor.expect(what, memory, p.dtype(), &shape)?;
        }
        lse.expect("lse", memory, DType::F32, &p.lse_shape())?;
        let extras = self.sequences.within(extras)?;
        extras.check(p, |what, _, _, buffer| expect_device(what, buffer, memory))?;
        let extras = extras.try_map(|buffer| Ok::<_, Error>(buffer.region()))?;
        let [q, dq] = [q, &self.dq].map(|tensor| view(p, tensor, p.q_extents()));
        let [o, d_o] = [o, d_o].map(|tensor| view(p, tensor, p.o_extents()));
        let [k, dk] = [k, &self.dk].map(|tensor| view(p, tensor, p.k_extents()));
        let [v, dv] = [v, &self.dv].map(|tensor| view(p, tensor, p.v_extents()));
        let forward = Args::new(q, k, v, o).lse(lse.region()).extras(p, extras);
        let forward = forward.workspace(self.runner.region());
        let mut args = BackwardArgs::new(forward, d_o, [dq, dk, dv]);
        if let Some(tensor) = &self.d_bias {
            args = args.d_bias(tensor.region());
        }
        if let Some(tensor) = &self.d_sinks {
            args = args.d_sinks(tensor.region());
        }
        Ok(args)
    }

    /// Waits and downloads the gradients.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn gradients(&mut self) -> Result<Gradients, Error> {
        self.runner.synchronize()?;
        let [dq, dk, dv] = [&self.dq, &self.dk, &self.dv].map(DeviceTensor::to_host);
        let [d_bias, d_sinks] = [&self.d_bias, &self.d_sinks]
            .map(|tensor| tensor.as_ref().map(DeviceTensor::to_host).transpose());
        Ok(Gradients { dq: dq?, dk: dk?, dv: dv?, d_bias: d_bias?, d_sinks: d_sinks? })
    }
}

/// A kernel of the backward pass with its inputs on the device, ready for any number of launches.
#[derive(Debug)]
pub struct PreparedBackward {
    backward: AttentionBackward,
    /// Q, K, V, O, the LSE and dO.
    inputs: [DeviceTensor; 6],
    extras: Extras<DeviceBuffer>,
    memory: MemoryReport,
}

impl PreparedBackward {
    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan<Backward> {
        self.backward.plan()
    }

    /// Device memory of this run. All tensors that the kernel reads count as input, including O and
    /// the LSE.
    #[must_use]
    pub const fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// Waits and downloads the gradients.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn gradients(&mut self) -> Result<Gradients, Error> {
        self.backward.gradients()
    }
}

impl Work for PreparedBackward {
    fn device(&self) -> &dyn Device {
        &**self.inputs[0].memory().device()
    }

    fn start(&mut self) -> Result<(), Error> {
        let [q, k, v, o, lse, d_o] = &self.inputs;
        let forward = Forward { q, k, v, extras: self.extras.as_ref(), o, lse };
        self.backward.run(forward, d_o)
    }
}
