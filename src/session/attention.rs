//! A kernel with its own outputs and workspace, ready for any number of runs.

use std::{fmt, sync::Arc};

use super::{Outputs, POISON, Session, runner::Runner, sequences::Sequences, view};
use crate::{
    backend::{DeviceBuffer, DeviceTensor, Memory, memory::expect_device},
    dtype::DType,
    error::Error,
    problem::{Extras, Problem},
    raw::{Args, Plan, Region, View},
    registry::{self, KernelSpec, Target},
    tensor::Tensor,
};

/// A kernel that is ready for one problem: its outputs and workspace stay in device memory, and
/// every run reuses them.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{CpuDevice, DType, Error, Problem, Tensor, registry, session::Session};
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     let problem = Problem::builder(1, 2, 48, 64).dtype(DType::F16).causal(true).build()?;
///     let mut attention = session.attention(registry::find("flash_mma")?, &problem)?;
///     let x = session.upload(&Tensor::random(DType::F16, &problem.q_shape(), 1, 0.0))?;
///     // Two layers without the host between: O of the first is Q, K and V of the second.
///     let mut second = session.attention(registry::find("flash_mma")?, &problem)?;
///     attention.run(&x, &x, &x, None)?;
///     second.run(attention.o(), attention.o(), attention.o(), None)?;
///     assert_eq!(second.o().to_host()?.shape(), [1, 2, 48, 64]);
///     Ok(())
/// }
/// ```
pub struct Attention {
    runner: Runner<Problem>,
    o: DeviceTensor,
    lse: DeviceTensor,
    pub(super) sequences: Sequences,
}

impl fmt::Debug for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attention")
            .field("kernel", &self.kernel().name)
            .field("problem", self.problem())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Allocates outputs and workspace of a kernel for a problem, filled with NaN, so that an
    /// element that no kernel wrote shows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot do the problem; [`Error::OutOfMemory`].
    pub fn attention(
        &self,
        kernel: &'static KernelSpec,
        problem: &Problem,
    ) -> Result<Attention, Error> {
        Attention::new(self.memory(), kernel.plan(problem, &self.target())?)
    }
}

impl Attention {
    pub(crate) fn new(memory: &Arc<Memory>, plan: Plan) -> Result<Self, Error> {
        let problem = *plan.problem();
        let filled = |dtype, shape: &[usize]| DeviceTensor::filled(memory, dtype, shape, POISON);
        Ok(Self {
            o: filled(problem.dtype(), &problem.o_shape())?,
            lse: filled(DType::F32, &problem.lse_shape())?,
            runner: {
                let bytes = plan.workspace_bytes_beside_lse();
                Runner::new(memory, plan, bytes)?
            },
            sequences: Sequences::default(),
        })
    }

    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.runner.plan
    }

    /// The kernel.
    #[must_use]
    pub const fn kernel(&self) -> &'static KernelSpec {
        self.runner.plan.kernel()
    }

    /// The problem.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        self.runner.plan.problem()
    }

    /// The output of the last run.
    #[must_use]
    pub const fn o(&self) -> &DeviceTensor {
        &self.o
    }

    /// The log-sum-exp of the last run: f32 `[B, H, Nq]`, natural log.
    #[must_use]
    pub const fn lse(&self) -> &DeviceTensor {
        &self.lse
    }

    /// Bytes beyond inputs and outputs.
    #[must_use]
    pub const fn workspace_bytes(&self) -> u64 {
        self.runner.workspace.bytes()
    }

    /// Sets the start offsets of packed sequences for the runs from now on: see [`Varlen`](crate::Varlen).
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for numbers that do not match the problem;
    /// [`Error::UnexpectedTensor`] where its sequences are not packed; [`Error::OutOfMemory`].
    pub fn set_sequences(
        &mut self,
        cu_seqlens_q: &[u32],
        cu_seqlens_k: &[u32],
    ) -> Result<(), Error> {
        let p = *self.problem();
        self.sequences = Sequences::upload(&self.runner.memory, &p, cu_seqlens_q, cu_seqlens_k)?;
        Ok(())
    }

    /// Starts the kernel on inputs in device memory; does not wait.
    ///
    /// # Errors
    /// An input of another shape, storage type or device; an error that the device reports.
    pub fn run(
        &mut self,
        q: &DeviceTensor,
        k: &DeviceTensor,
        v: &DeviceTensor,
        mask: Option<&DeviceBuffer>,
    ) -> Result<(), Error> {
        self.run_with([q, k, v], Extras::mask(mask))
    }

    /// As [`Attention::run`], with all tensors that a problem may have beside Q, K and V, except
    /// the start offsets of packed sequences: [`set_sequences`](Self::set_sequences) checks those numbers,
    /// which the device would follow to any address.
    ///
    /// # Errors
    /// As [`Attention::run`].
    pub fn run_with(
        &mut self,
        qkv: [&DeviceTensor; 3],
        extras: Extras<&DeviceBuffer>,
    ) -> Result<(), Error> {
        let args = self.args(qkv, extras)?;
        // SAFETY: `args` checked that the inputs are tensors of this device; freeing one waits
        // for the launches before.
        unsafe { self.run_on(args) }
    }

    /// The inputs, checked, and the outputs.
    fn args(
        &self,
        [q, k, v]: [&DeviceTensor; 3],
        extras: Extras<&DeviceBuffer>,
    ) -> Result<Args, Error> {
        let p = self.problem();
        for (what, tensor, shape) in
            [("q", q, p.q_shape()), ("k", k, p.k_shape()), ("v", v, p.v_shape())]
        {
            tensor.expect(what, &self.runner.memory, p.dtype(), &shape)?;
        }
        let extras = self.sequences.within(extras)?;
        extras.check(p, |what, _, _, buffer| expect_device(what, buffer, &self.runner.memory))?;
        let inputs =
            [view(p, q, p.q_extents()), view(p, k, p.k_extents()), view(p, v, p.v_extents())];
        let region = |buffer: &DeviceBuffer| Ok::<_, Error>(buffer.region());
        Ok(self.args_of(inputs, extras.try_map(region)?))
    }

    /// Inputs at these places, and the outputs of this value. A bias is contiguous.
    pub(crate) fn args_of(&self, [q, k, v]: [View; 3], extras: Extras<Region>) -> Args {
        let p = self.problem();
        let o = view(p, &self.o, p.o_extents());
        let args = Args::new(q, k, v, o).lse(self.lse.region()).workspace(self.runner.region());
        args.extras(p, extras)
    }

    /// Starts the kernel.
    ///
    /// # Safety
    /// The inputs in `args` are live memory of this device, whose owners are freed through the
    /// device; all other fields of `args` come from [`Attention::args_of`] of this value.
    pub(crate) unsafe fn run_on(&mut self, args: Args) -> Result<(), Error> {
        // SAFETY: the inputs are live, as stated above; outputs and workspace belong to this value,
        // which nobody else can use meanwhile.
        unsafe { self.runner.run(args) }
    }

    /// Waits and downloads O and LSE, and the weights where the kernel keeps them.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn outputs(&mut self) -> Result<Outputs, Error> {
        let weights = self.kept_weights()?;
        Ok(Outputs { weights, ..self.outputs_without_weights()? })
    }

    /// Waits and downloads only O and LSE: at a long sequence the weights are many times as large.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn outputs_without_weights(&mut self) -> Result<Outputs, Error> {
        self.synchronize()?;
        Ok(Outputs { o: self.o.to_host()?, lse: self.lse.to_host()?, weights: None })
    }

    /// Waits for the last run. After a fault the queue is zeroed before it is used again.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn synchronize(&mut self) -> Result<(), Error> {
        self.runner.synchronize()
    }

    /// The attention weights `[B, H, Nq, Nk]` of the last run, for kernels that keep them.
    fn kept_weights(&mut self) -> Result<Option<Tensor>, Error> {
        let Some(offset) = self.runner.plan.kept_weights() else { return Ok(None) };
        self.synchronize()?;
        let p = self.problem();
        let mut weights = Tensor::zeros(p.dtype(), &p.weights_shape());
        self.runner.workspace.read_at(offset, weights.as_bytes_mut())?;
        Ok(Some(weights))
    }

    /// The attention weights `[B, H, Nq, Nk]` after dropout, of the last run: as the kernel left
    /// them, or recomputed by a separate launch into
    /// [`Problem::weights_bytes`](crate::Problem::weights_bytes) of memory.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] before the first run; [`Error::OutOfMemory`]; a head dim for which
    /// weights cannot be computed; the fault of the kernel.
    ///
    /// # Safety
    /// The inputs of the last run are still in memory.
    pub(crate) unsafe fn weights(&mut self) -> Result<Tensor, Error> {
        if let Some(weights) = self.kept_weights()? {
            return Ok(weights);
        }
        let Some((args, _)) = &self.runner.ready else {
            return Err(Error::InvalidValue {
                what: "runs before the weights are asked for",
                given: "0".into(),
                remedy: "run the kernel first".into(),
            });
        };
        let (p, device) = (*self.problem(), &**self.runner.memory.device());
        let plan = registry::WEIGHTS.plan(&p, &Target::of(device))?;
        // All of that kernel's workspace.
        let weights =
            DeviceTensor::filled(&self.runner.memory, p.dtype(), &p.weights_shape(), POISON)?;
        for launch in plan.launches_for(device, &args.workspace(weights.region()))? {
            // SAFETY: as for `run_on`; the weights are the tensor above.
            unsafe { device.launch(&launch)? };
        }
        weights.to_host()
    }

    /// Leaves numbers in the queue, as a stopped launch does.
    #[cfg(test)]
    pub(crate) fn spoil_queue(&mut self) {
        self.runner.workspace.fill_start(self.runner.plan.zeroed_bytes(), 1).unwrap();
    }

    /// The launches of the last run, for inspection.
    #[cfg(test)]
    pub(crate) fn launches(&self) -> &[crate::backend::Launch] {
        self.runner.ready.as_ref().map_or(&[], |(_, launches)| launches)
    }
}
