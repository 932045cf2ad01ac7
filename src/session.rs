//! Runs a kernel on a problem: upload, allocate, launch, download, with every byte of
//! device memory accounted for.

use std::sync::Arc;

use kernels_gpu::args::{self, AttentionArgs};

use crate::{
    backend::{self, Device, DeviceBuffer, KernelArgs, Launch, Memory, instruments},
    dtype::DType,
    error::Error,
    problem::Problem,
    registry::{self, KernelSpec, QUEUE_BYTES, Step, Target},
    tensor::Tensor,
};

/// Outputs and workspace are filled with this before a launch: all bits set is NaN in
/// every storage type, so that an element that no kernel wrote shows.
pub(crate) const POISON: u8 = 0xff;

/// The tensors that attention is computed from, on the host.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Queries, of the problem's `q_shape`.
    pub q: &'a Tensor,
    /// Keys, of the problem's `k_shape`.
    pub k: &'a Tensor,
    /// Values, of the problem's `k_shape`.
    pub v: &'a Tensor,
    /// Padding mask, `[B, Nk]`, 0 = hidden.
    pub mask: Option<&'a [u8]>,
}

impl Inputs<'_> {
    /// Checks that the tensors are those of the problem.
    ///
    /// # Errors
    /// Which tensor is of the wrong type or shape, missing, or not expected.
    pub fn check(&self, problem: &Problem) -> Result<(), Error> {
        self.q.expect("q", problem.dtype(), &problem.q_shape())?;
        self.k.expect("k", problem.dtype(), &problem.k_shape())?;
        self.v.expect("v", problem.dtype(), &problem.k_shape())?;
        match self.mask {
            None if problem.has_mask() => Err(Error::MissingTensor {
                what: "mask".into(),
                context: ": the problem has a padding mask".into(),
            }),
            Some(_) if !problem.has_mask() => Err(Error::UnexpectedTensor { what: "mask".into() }),
            Some(mask) if mask.len() != problem.batch() * problem.seq_k() => {
                Err(Error::ShapeMismatch {
                    what: "mask".into(),
                    expected: [problem.batch(), problem.seq_k()].into(),
                    given: [mask.len()].into(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// What attention gives.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// Output, of the problem's `q_shape` and storage type.
    pub o: Tensor,
    /// Log-sum-exp of the scaled scores of each row, natural log: f32 `[B, H, Nq]`.
    pub lse: Tensor,
    /// Attention weights `[B, H, Nq, Nk]` after dropout, from kernels that keep them.
    pub weights: Option<Tensor>,
}

/// Device memory of a run, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Q, K, V and the padding mask.
    pub inputs: u64,
    /// O and the log-sum-exp.
    pub outputs: u64,
    /// Everything else.
    pub workspace: u64,
    /// The most in use at once, as counted.
    pub peak: u64,
}

/// A device and the count of its memory.
#[derive(Clone)]
pub struct Session {
    memory: Arc<Memory>,
}

impl Session {
    /// A session with a count that starts at zero.
    #[must_use]
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { memory: Memory::new(device) }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &dyn Device {
        &**self.memory.device()
    }

    /// The device's memory.
    #[must_use]
    pub const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// What the device offers to kernels.
    #[must_use]
    pub fn target(&self) -> Target {
        Target::of(self.device())
    }

    /// Whether a kernel's memory for a problem is free now, without allocating it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with what is needed and what is free.
    pub fn check_fits(&self, kernel: &KernelSpec, problem: &Problem) -> Result<(), Error> {
        let needed = kernel.peak_bytes(problem, &self.target());
        let free = self.device().memory_info()?.free;
        if needed > free {
            return Err(Error::OutOfMemory { device: self.device().name(), needed, free });
        }
        Ok(())
    }

    /// Uploads the inputs and gets everything ready to launch.
    ///
    /// # Errors
    /// What is wrong with the request, [`Error::OutOfMemory`] (before anything is
    /// allocated where that can be foreseen), or what the device reports.
    pub fn prepare(
        &self,
        kernel: &'static KernelSpec,
        problem: &Problem,
        inputs: &Inputs<'_>,
    ) -> Result<Prepared, Error> {
        kernel.supports(problem, &self.target())?;
        inputs.check(problem)?;
        self.check_fits(kernel, problem)?;
        self.memory.reset_peak();
        let before = self.memory.current();
        let upload = |tensor: &Tensor| self.memory.upload(tensor.bytes());
        let q = upload(inputs.q)?;
        let k = upload(inputs.k)?;
        let v = upload(inputs.v)?;
        let mask = self.memory.upload(inputs.mask.unwrap_or_default())?;
        let device_inputs = DeviceInputs {
            q: problem.q_arg(q.as_arg()),
            k: problem.k_arg(k.as_arg()),
            v: problem.k_arg(v.as_arg()),
            mask: mask.as_arg(),
        };
        let attention = Attention::new(&self.memory, kernel, problem, &device_inputs)?;
        let memory = MemoryReport {
            inputs: q.bytes() + k.bytes() + v.bytes() + mask.bytes(),
            outputs: attention.o.bytes() + attention.lse.bytes(),
            workspace: attention.workspace_bytes(),
            peak: self.memory.peak() - before,
        };
        Ok(Prepared { attention, memory, _inputs: [q, k, v, mask] })
    }

    /// Runs a kernel once.
    ///
    /// # Errors
    /// As [`Session::prepare`], or what went wrong while the kernel ran.
    pub fn run(
        &self,
        kernel: &'static KernelSpec,
        problem: &Problem,
        inputs: &Inputs<'_>,
    ) -> Result<(Outputs, MemoryReport), Error> {
        let prepared = self.prepare(kernel, problem, inputs)?;
        prepared.launch()?;
        Ok((prepared.outputs()?, prepared.memory()))
    }
}

/// Inputs in device memory, each with the strides that it has: not necessarily those of the
/// problem's layout.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceInputs {
    /// Queries.
    pub q: args::Tensor,
    /// Keys.
    pub k: args::Tensor,
    /// Values.
    pub v: args::Tensor,
    /// Padding mask; empty when there is none.
    pub mask: args::Buffer,
}

/// A kernel ready to run on inputs that are in device memory already. Whoever makes it
/// keeps them alive.
pub struct Attention {
    memory: Arc<Memory>,
    kernel: &'static KernelSpec,
    problem: Problem,
    args: AttentionArgs,
    launches: Vec<Launch>,
    o: DeviceBuffer,
    lse: DeviceBuffer,
    workspace: DeviceBuffer,
    queue: DeviceBuffer,
}

impl Attention {
    /// Allocates outputs and workspace, poisoned with NaN.
    ///
    /// # Errors
    /// As [`Session::prepare`].
    pub fn new(
        memory: &Arc<Memory>,
        kernel: &'static KernelSpec,
        problem: &Problem,
        inputs: &DeviceInputs,
    ) -> Result<Self, Error> {
        let device = &**memory.device();
        let target = Target::of(device);
        kernel.supports(problem, &target)?;
        let plan = (kernel.plan)(problem, &target);
        let o =
            memory.filled(problem.q_elements() as u64 * problem.dtype().size() as u64, POISON)?;
        let lse = memory.filled(problem.rows() as u64 * size_of::<f32>() as u64, POISON)?;
        let workspace = memory.filled(plan.workspace_bytes, POISON)?;
        let o_arg = problem.q_arg(o.as_arg());
        let tensors = [inputs.q, inputs.k, inputs.v, o_arg];
        let queue = memory.filled(if kernel.queue { QUEUE_BYTES } else { 0 }, 0)?;
        let args = AttentionArgs {
            q: inputs.q,
            k: inputs.k,
            v: inputs.v,
            o: o_arg,
            lse: lse.as_arg(),
            mask: inputs.mask,
            weights: workspace.as_arg(),
            queue: queue.as_arg(),
            batch: problem.batch() as u32,
            heads: problem.heads() as u32,
            seq_q: problem.seq_q() as u32,
            seq_k: problem.seq_k() as u32,
            scale_log2: (f64::from(problem.scale()) * std::f64::consts::LOG2_E) as f32,
            causal: problem.causal().into(),
            dropout: problem.dropout_args(),
            head_dim: problem.head_dim() as u32,
            scale: problem.scale(),
        };
        let steps = plan.steps.into_iter();
        let launches = match kernel.tensor_maps {
            None => steps.map(|step| step.launch(&args)).collect::<Result<_, _>>()?,
            Some(maps) => {
                let args = backend::with_maps(device, &maps(problem, &tensors), args)?;
                steps.map(|step| step.launch(&args)).collect::<Result<_, _>>()?
            }
        };
        Ok(Self {
            memory: memory.clone(),
            kernel,
            problem: *problem,
            args,
            launches,
            o,
            lse,
            workspace,
            queue,
        })
    }

    /// The kernel.
    #[must_use]
    pub const fn kernel(&self) -> &'static KernelSpec {
        self.kernel
    }

    /// The problem.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The output in device memory.
    #[must_use]
    pub const fn o(&self) -> &DeviceBuffer {
        &self.o
    }

    /// Bytes beyond inputs and outputs.
    #[must_use]
    pub const fn workspace_bytes(&self) -> u64 {
        self.workspace.bytes() + self.queue.bytes()
    }

    /// The launches, for whoever records or repeats them.
    #[must_use]
    pub fn launches(&self) -> &[Launch] {
        &self.launches
    }

    /// Starts every step; does not wait.
    ///
    /// # Errors
    /// What the device reports.
    pub fn start(&self) -> Result<(), Error> {
        let device = self.memory.device();
        // SAFETY: outputs and workspace belong to this value; whoever made it keeps the inputs.
        self.launches.iter().try_for_each(|launch| unsafe { device.launch(launch) })
    }

    /// Waits and downloads.
    ///
    /// # Errors
    /// What went wrong while the kernel ran.
    pub fn outputs(&self) -> Result<Outputs, Error> {
        let mut outputs = self.outputs_without_weights()?;
        if self.kernel.features.weights {
            outputs.weights = Some(self.weights()?);
        }
        Ok(outputs)
    }

    /// The attention weights `[B, H, Nq, Nk]` after dropout, once the kernel has run: as it
    /// left them in memory, or computed again from Q, K and LSE by a launch of their own,
    /// into [`Problem::weights_bytes`] of memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; a head dim that weights cannot be computed for; or what went
    /// wrong while the kernel ran.
    pub fn weights(&self) -> Result<Tensor, Error> {
        let device = self.memory.device();
        let mut weights = Tensor::zeros(self.problem.dtype(), &self.problem.weights_shape());
        if self.kernel.features.weights {
            device.synchronize()?;
            self.workspace.read(weights.bytes_mut())?;
            return Ok(weights);
        }
        let step = registry::weights_step(&self.problem)?;
        let buffer = self.memory.filled(self.problem.weights_bytes(), POISON)?;
        let launch = step.launch(&AttentionArgs { weights: buffer.as_arg(), ..self.args })?;
        // SAFETY: as for `start`; the weights are the buffer above.
        unsafe { device.launch(&launch)? };
        device.synchronize()?;
        buffer.read(weights.bytes_mut())?;
        Ok(weights)
    }

    /// Waits and downloads O and LSE only: at a long sequence the weights are many times
    /// as large.
    ///
    /// # Errors
    /// What went wrong while the kernel ran.
    pub fn outputs_without_weights(&self) -> Result<Outputs, Error> {
        self.memory.device().synchronize()?;
        let p = &self.problem;
        let mut o = Tensor::zeros(p.dtype(), &p.q_shape());
        self.o.read(o.bytes_mut())?;
        let mut lse = Tensor::zeros(DType::F32, &p.lse_shape());
        self.lse.read(lse.bytes_mut())?;
        Ok(Outputs { o, lse, weights: None })
    }
}

impl Step {
    /// The launch of this step with its arguments.
    pub(crate) fn launch(self, args: &impl KernelArgs) -> Result<Launch, Error> {
        let Self { symbol, grid, block, shared_bytes } = self;
        let entry = kernels_gpu::find(&symbol).ok_or(Error::UnknownSymbol { symbol })?;
        Ok(Launch { entry, grid, block, shared_bytes, args: args.to_launch_bytes() })
    }
}

/// Something that is ready to run on a device, as often as wanted.
pub trait Work {
    /// The device.
    fn device(&self) -> &dyn Device;

    /// Starts it; does not wait.
    ///
    /// # Errors
    /// What the device reports.
    fn start(&self) -> Result<(), Error>;

    /// Runs it and waits.
    ///
    /// # Errors
    /// What went wrong while a kernel ran.
    fn launch(&self) -> Result<(), Error> {
        self.start()?;
        self.device().synchronize()
    }

    /// Milliseconds of each of `runs` launches, after `warm_up` that are not timed. Each
    /// starts with a cold L2 cache.
    ///
    /// # Errors
    /// What went wrong while a kernel ran.
    fn time_ms(&self, warm_up: usize, runs: usize) -> Result<Vec<f64>, Error> {
        let device = self.device();
        for _ in 0..warm_up {
            self.launch()?;
        }
        let mut times = Vec::with_capacity(runs);
        for _ in 0..runs {
            instruments::flush_l2(device)?;
            times.push(instruments::time_ms(device, &mut || self.start())?);
        }
        device.synchronize()?;
        Ok(times)
    }

    /// Milliseconds that a launch takes among `runs` back to back, none waited for: what is
    /// left when launches cost nothing, the L2 cache is as the launch before left it, and a
    /// GPU at its power limit runs slower than in a burst.
    ///
    /// # Errors
    /// What went wrong while a kernel ran.
    fn sustained_ms(&self, runs: usize) -> Result<f64, Error> {
        let runs = runs.max(1);
        let device = self.device();
        let all = instruments::time_ms(device, &mut || (0..runs).try_for_each(|_| self.start()))?;
        device.synchronize()?;
        Ok(all / runs as f64)
    }
}

/// A kernel with its inputs on the device, to be launched as often as wanted.
pub struct Prepared {
    attention: Attention,
    memory: MemoryReport,
    /// Kept alive for the kernel.
    _inputs: [DeviceBuffer; 4],
}

impl Prepared {
    /// The kernel and its buffers.
    #[must_use]
    pub const fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Device memory of this run.
    #[must_use]
    pub const fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// Waits and downloads the outputs.
    ///
    /// # Errors
    /// What went wrong while the kernel ran.
    pub fn outputs(&self) -> Result<Outputs, Error> {
        self.attention.outputs()
    }
}

impl Work for Prepared {
    fn device(&self) -> &dyn Device {
        &**self.attention.memory.device()
    }

    fn start(&self) -> Result<(), Error> {
        self.attention.start()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::CpuDevice, registry::KERNELS};

    fn tensors(p: &Problem) -> [Tensor; 3] {
        let random = |shape: [usize; 4], seed| Tensor::random(p.dtype(), &shape, seed, 0.0);
        [random(p.q_shape(), 1), random(p.k_shape(), 2), random(p.k_shape(), 3)]
    }

    #[test]
    fn memory_is_as_the_registry_predicts() {
        let problem = Problem::builder(2, 1, 40, 32).mask(true).build().unwrap();
        let [q, k, v] = &tensors(&problem);
        let mask = vec![1; 80];
        for kernel in KERNELS.iter().filter(|k| k.dtypes.contains(&DType::F32)) {
            let session = Session::new(Arc::new(CpuDevice::new()));
            let inputs = Inputs { q, k, v, mask: Some(&mask) };
            let (outputs, memory) = session.run(kernel, &problem, &inputs).unwrap();
            assert_eq!(memory.peak, kernel.peak_bytes(&problem, &session.target()));
            assert_eq!(memory.peak, memory.inputs + memory.outputs + memory.workspace);
            assert_eq!(memory.inputs, problem.input_bytes());
            assert!(outputs.o.to_f64().iter().all(|x| x.is_finite()), "{}", kernel.name);
            assert_eq!(outputs.weights.is_some(), kernel.features.weights);
            assert_eq!(session.memory().current(), 0);
        }
    }

    #[test]
    fn what_does_not_fit_is_not_tried() {
        let problem = Problem::builder(1, 1, 64, 32).build().unwrap();
        let [q, k, v] = &tensors(&problem);
        let kernel = crate::registry::find("naive").unwrap();
        let session = Session::new(Arc::new(CpuDevice::with_memory_limit(40_000)));
        let inputs = Inputs { q, k, v, mask: None };
        let error = session.run(kernel, &problem, &inputs).err().unwrap();
        assert!(
            matches!(error, Error::OutOfMemory { needed: 49_408, free: 40_000, .. }),
            "{error}"
        );
        let kernel = crate::registry::find("flash_tiled").unwrap();
        assert!(session.run(kernel, &problem, &inputs).is_ok());
    }

    #[test]
    fn wrong_tensors_are_named() {
        let problem = Problem::builder(1, 1, 8, 32).mask(true).build().unwrap();
        let [q, k, v] = &tensors(&problem);
        let short = Tensor::zeros(DType::F32, &[1, 1, 7, 32]);
        let message = |inputs: Inputs<'_>| inputs.check(&problem).unwrap_err().to_string();
        let good = Inputs { q, k, v, mask: None };
        assert!(message(good).contains("mask is missing"));
        assert!(message(Inputs { k: &short, ..good }).contains("k has shape [1, 1, 7, 32]"));
        let half = v.cast(DType::F16);
        assert!(message(Inputs { v: &half, ..good }).contains("v is f16, expected f32"));
        assert!(message(Inputs { mask: Some(&[1; 7]), ..good }).contains("mask has shape [7]"));
    }
}
