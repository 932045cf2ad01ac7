//! Runs a kernel on a problem: upload, allocate, launch, download, with every byte of
//! device memory accounted for.

mod attention;
mod backward;
mod decode;
mod kv_cache;
mod runner;
mod sequences;
pub mod work;

use std::sync::Arc;

use crate::{
    backend::{Device, DeviceBuffer, DeviceTensor, Memory},
    dtype::DType,
    error::Error,
    problem::{Extras, Problem, Sequence},
    raw::{Plan, View},
    registry::{KernelSpec, Target},
    tensor::Tensor,
};

pub use attention::Attention;
pub use backward::{AttentionBackward, Forward, Gradients, PreparedBackward};
pub use decode::{AttentionDecode, Cached, DecodeInputs, PreparedDecode};
pub use kv_cache::{Angles, CacheBatch, KvCache, KvCacheShape, SequenceId};
pub(crate) use runner::Runner;
pub use work::Work;

/// The byte that fills outputs and workspace before a launch. All bits set is NaN in every storage
/// type, so an element that no kernel wrote shows.
pub(crate) const POISON: u8 = 0xff;

/// The inputs of attention, on the host.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Queries, of the problem's `q_shape`.
    pub q: &'a Tensor,
    /// Keys, of the problem's `k_shape`.
    pub k: &'a Tensor,
    /// Values, of the problem's `v_shape`.
    pub v: &'a Tensor,
    /// Padding mask, `[B, Nk]`, 0 = hidden.
    pub mask: Option<&'a [u8]>,
    /// Slopes of ALiBi, f32 `[H]` or `[B, H]`.
    pub alibi_slopes: Option<&'a Tensor>,
    /// Additive bias, `[B or 1, H or 1, Nq, Nk]` in the storage type.
    pub bias: Option<&'a Tensor>,
    /// Sinks, f32 `[H]`.
    pub sinks: Option<&'a Tensor>,
    /// The start offsets of packed sequences in Q, and the end of the last: `[B + 1]`.
    pub cu_seqlens_q: Option<&'a [u32]>,
    /// The same in K and V.
    pub cu_seqlens_k: Option<&'a [u32]>,
}

impl<'a> Inputs<'a> {
    /// Queries, keys and values, without other tensors.
    #[must_use]
    pub const fn new(q: &'a Tensor, k: &'a Tensor, v: &'a Tensor) -> Self {
        Self {
            q,
            k,
            v,
            mask: None,
            alibi_slopes: None,
            bias: None,
            sinks: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
        }
    }

    /// The tensors other than Q, K and V, as bytes.
    #[must_use]
    pub fn extras(&self) -> Extras<&'a [u8]> {
        Extras {
            mask: self.mask,
            alibi_slopes: self.alibi_slopes.map(Tensor::as_bytes),
            bias: self.bias.map(Tensor::as_bytes),
            sinks: self.sinks.map(Tensor::as_bytes),
            cu_seqlens_q: self.cu_seqlens_q.map(bytemuck::cast_slice),
            cu_seqlens_k: self.cu_seqlens_k.map(bytemuck::cast_slice),
        }
    }

    /// Floating-point operations by the convention of [`Problem::flops`]; for packed sequences,
    /// with their own lengths.
    #[must_use]
    pub fn flops(&self, problem: &Problem) -> f64 {
        match self.cu_seqlens() {
            Some([q, k]) => problem.flops_of(Sequence::all(q, k)),
            None => problem.flops(),
        }
    }

    /// The start offsets of packed sequences in Q and in K.
    #[must_use]
    pub fn cu_seqlens(&self) -> Option<[&'a [u32]; 2]> {
        Some([self.cu_seqlens_q?, self.cu_seqlens_k?])
    }

    /// Compares the tensors with a problem.
    ///
    /// # Errors
    /// An error that names a tensor of a wrong type or shape, a missing one, or an unexpected one.
    pub fn check(&self, problem: &Problem) -> Result<(), Error> {
        self.q.expect("q", problem.dtype(), &problem.q_shape())?;
        self.k.expect("k", problem.dtype(), &problem.k_shape())?;
        self.v.expect("v", problem.dtype(), &problem.v_shape())?;
        self.check_beside(problem)
    }

    /// As [`check`](Self::check), for all tensors but Q, K and V.
    pub(crate) fn check_beside(&self, problem: &Problem) -> Result<(), Error> {
        check_lengths(problem, &self.extras())?;
        for (what, tensor, dtype, shape) in [
            ("alibi_slopes", self.alibi_slopes, DType::F32, problem.alibi_shape()),
            ("bias", self.bias, problem.dtype(), problem.bias_shape()),
            ("sinks", self.sinks, DType::F32, problem.sinks_shape()),
        ] {
            if let (Some(tensor), Some(shape)) = (tensor, shape) {
                tensor.expect(what, dtype, &shape)?;
            }
        }
        Ok(())
    }
}

/// Checks that the tensors beside Q, K and V match the problem's, and their lengths.
fn check_lengths(problem: &Problem, extras: &Extras<&[u8]>) -> Result<(), Error> {
    extras.check(problem, |what, size, shape, bytes| {
        if bytes.len() == size * shape.iter().product::<usize>() {
            if matches!(what, "cu_seqlens_q" | "cu_seqlens_k") {
                return problem.check_cu_seqlens(what, &bytemuck::pod_collect_to_vec(bytes));
            }
            return Ok(());
        }
        let (expected, given) = (shape.into(), [bytes.len() / size].into());
        Err(Error::ShapeMismatch { what: what.into(), expected, given })
    })
}

/// The outputs of attention.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// Output, of the problem's `o_shape` and storage type.
    pub o: Tensor,
    /// Log-sum-exp of the scaled scores of each row, natural log: f32 `[B, H, Nq]`.
    pub lse: Tensor,
    /// Attention weights `[B, H, Nq, Nk]` after dropout, from kernels that keep them.
    pub weights: Option<Tensor>,
}

/// Device memory of a run, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Q, K, V and the other inputs.
    pub inputs: u64,
    /// O and the log-sum-exp.
    pub outputs: u64,
    /// Everything else.
    pub workspace: u64,
    /// The counted peak.
    pub peak: u64,
}

impl MemoryReport {
    /// The report of a run that alone uses `memory`, from its `inputs` and `workspace` bytes; the
    /// outputs are the rest.
    fn of(memory: &Memory, inputs: u64, workspace: u64) -> Self {
        let outputs = memory.current() - inputs - workspace;
        Self { inputs, outputs, workspace, peak: memory.peak() }
    }
}

/// A contiguous tensor with the given extents, `[B, H, N, D]` in the problem's layout.
fn view(p: &Problem, tensor: &DeviceTensor, [_, heads, rows, columns]: [usize; 4]) -> View {
    View::contiguous(tensor.region(), p.layout(), heads, rows, columns)
}

/// A device and the count of its memory.
#[derive(Clone, Debug)]
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

    /// The device's limits, as plans need them.
    #[must_use]
    pub fn target(&self) -> Target {
        Target::of(self.device())
    }

    /// Whether the memory of a plan's call is free now, without allocating it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the needed and the free bytes.
    pub fn check_fits(&self, plan: &Plan) -> Result<(), Error> {
        self.check_free(plan.peak_bytes())
    }

    pub(crate) fn check_free(&self, needed: u64) -> Result<(), Error> {
        let free = self.device().memory_info()?.free;
        if needed > free {
            return Err(Error::OutOfMemory { device: self.device().name(), needed, free });
        }
        Ok(())
    }

    /// A copy of a tensor in device memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or an error that the device reports.
    pub fn upload(&self, tensor: &Tensor) -> Result<DeviceTensor, Error> {
        DeviceTensor::upload(&self.memory, tensor)
    }

    /// Uploads the inputs and prepares the launches.
    ///
    /// # Errors
    /// A wrong value of the request; [`Error::OutOfMemory`] (where predictable, before any
    /// allocation), or an error that the device reports.
    pub fn prepare(
        &self,
        kernel: &'static KernelSpec,
        problem: &Problem,
        inputs: &Inputs<'_>,
    ) -> Result<Prepared, Error> {
        let plan = kernel.plan(problem, &self.target())?;
        inputs.check(problem)?;
        let tensors = [inputs.q, inputs.k, inputs.v].map(Tensor::as_bytes);
        self.prepare_with(plan, tensors, inputs.extras())
    }

    /// As [`Session::prepare`], with an existing plan
    /// ([`registry::best_for`](crate::registry::best_for) returns one). The elements of Q, K and V
    /// come as bytes, so the contents of a mapped file go to the device without a copy.
    ///
    /// # Errors
    /// As [`Session::prepare`]; [`Error::ShapeMismatch`] when the number of bytes differs from the
    /// problem's.
    pub fn prepare_bytes(
        &self,
        plan: Plan,
        qkv: [&[u8]; 3],
        mask: Option<&[u8]>,
    ) -> Result<Prepared, Error> {
        self.prepare_with(plan, qkv, Extras::mask(mask))
    }

    /// As [`Session::prepare_bytes`], with all tensors that a problem may have beside Q, K and V.
    ///
    /// # Errors
    /// As [`Session::prepare_bytes`].
    pub fn prepare_with(
        &self,
        plan: Plan,
        [q, k, v]: [&[u8]; 3],
        extras: Extras<&[u8]>,
    ) -> Result<Prepared, Error> {
        let problem = plan.problem();
        check_lengths(problem, &extras)?;
        self.check_fits(&plan)?;
        let memory = self.memory.part();
        let upload = |shape: [usize; 4], bytes| {
            DeviceTensor::from_bytes(&memory, problem.dtype(), &shape, bytes)
        };
        let inputs = [
            upload(problem.q_shape(), q)?,
            upload(problem.k_shape(), k)?,
            upload(problem.v_shape(), v)?,
        ];
        let mut extras = extras.try_map(|bytes| memory.upload(bytes))?;
        let input_bytes = memory.current();
        let mut attention = Attention::new(&memory, plan)?;
        attention.sequences = sequences::Sequences::take(&mut extras);
        let memory = MemoryReport::of(&memory, input_bytes, attention.workspace_bytes());
        Ok(Prepared { attention, inputs, extras, memory })
    }

    /// Runs a kernel once.
    ///
    /// # Errors
    /// As [`Session::prepare`], or the fault of the kernel.
    pub fn run(
        &self,
        kernel: &'static KernelSpec,
        problem: &Problem,
        inputs: &Inputs<'_>,
    ) -> Result<(Outputs, MemoryReport), Error> {
        let mut prepared = self.prepare(kernel, problem, inputs)?;
        prepared.launch()?;
        Ok((prepared.outputs()?, prepared.memory()))
    }
}

/// A kernel with its inputs on the device, ready for any number of launches.
#[derive(Debug)]
pub struct Prepared {
    attention: Attention,
    inputs: [DeviceTensor; 3],
    extras: Extras<DeviceBuffer>,
    memory: MemoryReport,
}

impl Prepared {
    /// The kernel with its outputs.
    #[must_use]
    pub const fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Device memory of this run.
    #[must_use]
    pub const fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// Waits and downloads the outputs, including the weights where the kernel keeps them.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn outputs(&mut self) -> Result<Outputs, Error> {
        self.attention.outputs()
    }

    /// Waits and downloads only O and LSE.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn outputs_without_weights(&mut self) -> Result<Outputs, Error> {
        self.attention.outputs_without_weights()
    }

    /// The attention weights `[B, H, Nq, Nk]` after dropout, once the kernel has run: as the kernel
    /// left them in memory, or recomputed from Q and K by a separate launch, into
    /// [`Problem::weights_bytes`] of memory.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] before the first run; [`Error::OutOfMemory`]; a head dim for which
    /// weights cannot be computed; the fault of the kernel.
    pub fn weights(&mut self) -> Result<Tensor, Error> {
        // SAFETY: the inputs belong to this value.
        unsafe { self.attention.weights() }
    }
}

impl Work for Prepared {
    fn device(&self) -> &dyn Device {
        &**self.inputs[0].memory().device()
    }

    fn start(&mut self) -> Result<(), Error> {
        let [q, k, v] = &self.inputs;
        self.attention.run_with([q, k, v], self.extras.as_ref())
    }
}

#[cfg(test)]
pub(crate) mod counting;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, backend::CpuDevice, registry::KERNELS};

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
            let inputs = Inputs { mask: Some(&mask), ..Inputs::new(q, k, v) };
            let (outputs, memory) = session.run(kernel, &problem, &inputs).unwrap();
            let plan = kernel.plan(&problem, &session.target()).unwrap();
            assert_eq!(memory.peak, plan.peak_bytes());
            assert_eq!(memory.peak, memory.inputs + memory.outputs + memory.workspace);
            assert_eq!(memory.inputs, problem.input_bytes());
            assert!(outputs.o.to_f64().iter().all(|x| x.is_finite()), "{}", kernel.name);
            assert_eq!(outputs.weights.is_some(), kernel.limits.features.weights);
            assert_eq!(session.memory().current(), 0);
        }
    }

    #[test]
    fn what_does_not_fit_is_not_tried() {
        let problem = Problem::builder(1, 1, 64, 32).build().unwrap();
        let [q, k, v] = &tensors(&problem);
        let kernel = crate::registry::find("naive").unwrap();
        let session = Session::new(Arc::new(CpuDevice::with_memory_limit(40_000)));
        let inputs = Inputs::new(q, k, v);
        let error = session.run(kernel, &problem, &inputs).err().unwrap();
        assert!(
            matches!(error, Error::OutOfMemory { needed: 49_408, free: 40_000, .. }),
            "{error}"
        );
        let kernel = crate::registry::find("flash_tiled").unwrap();
        assert!(session.run(kernel, &problem, &inputs).is_ok());
    }

    /// Two prepared runs and a session that others share: each reports its own memory.
    #[test]
    fn a_report_counts_its_own_run_alone() {
        let problem = Problem::builder(1, 1, 64, 32).build().unwrap();
        let [q, k, v] = &tensors(&problem);
        let inputs = Inputs::new(q, k, v);
        let session = Session::new(Arc::new(CpuDevice::new()));
        let _other = session.upload(q).unwrap();
        let naive = crate::registry::find("naive").unwrap();
        let first = session.prepare(naive, &problem, &inputs).unwrap();
        let second = session.prepare(naive, &problem, &inputs).unwrap();
        let expected = first.attention().plan().peak_bytes();
        assert_eq!((first.memory().peak, second.memory().peak), (expected, expected));
        assert_eq!(session.memory().current(), 2 * expected + 64 * 32 * 4);
    }

    #[test]
    fn a_tensor_of_another_device_is_refused() {
        let problem = Problem::builder(1, 1, 8, 32).build().unwrap();
        let [here, elsewhere] = [(); 2].map(|()| Session::new(Arc::new(CpuDevice::new())));
        let kernel = crate::registry::find("flash_tiled").unwrap();
        let mut attention = here.attention(kernel, &problem).unwrap();
        let [q, k, v] = &tensors(&problem);
        let [q, k] = [q, k].map(|t| here.upload(t).unwrap());
        let v = elsewhere.upload(v).unwrap();
        let message = attention.run(&q, &k, &v, None).unwrap_err().to_string();
        assert!(message.contains("cannot use v"), "{message}");
    }

    /// A run's requests to the device, counted.
    #[test]
    fn a_run_again_allocates_fills_and_uploads_nothing() {
        let device = Arc::new(counting::Counting::default());
        let session = Session::new(device.clone());
        for name in ["flash_hopper", "flash_pipelined", "standard"] {
            let kernel = crate::registry::find(name).unwrap();
            let problem = Problem::builder(1, 2, 70, 64).dtype(DType::F16).build().unwrap();
            let [q, k, v] = tensors(&problem).map(|t| session.upload(&t).unwrap());
            let mut attention = session.attention(kernel, &problem).unwrap();
            attention.run(&q, &k, &v, None).unwrap();
            let first = attention.outputs_without_weights().unwrap();
            device.reset();
            attention.run(&q, &k, &v, None).unwrap();
            let steps = attention.plan().entries().count();
            assert_eq!(device.calls(), counting::Calls { launch: steps, ..Default::default() });
            assert_eq!(attention.outputs_without_weights().unwrap().o, first.o, "{name}");
            // Other inputs need other tensor maps, and no more.
            device.reset();
            attention.run(&k, &q, &v, None).unwrap();
            let encode = attention.plan().tensor_maps();
            let expected = counting::Calls { launch: steps, encode, ..Default::default() };
            assert_eq!(device.calls(), expected, "{name}");
        }
    }

    /// A launch that does not end leaves numbers in the queue, so the next run zeroes it first.
    #[test]
    fn after_a_fault_the_queue_is_zeroed() {
        let device = Arc::new(counting::Counting::default());
        let session = Session::new(device.clone());
        let kernel = crate::registry::find("flash_pipelined").unwrap();
        let problem = Problem::builder(1, 2, 300, 64).dtype(DType::F16).build().unwrap();
        let [q, k, v] = tensors(&problem).map(|t| session.upload(&t).unwrap());
        let mut attention = session.attention(kernel, &problem).unwrap();
        attention.run(&q, &k, &v, None).unwrap();
        let expected = attention.outputs_without_weights().unwrap().o;
        device.fail_next_launch();
        // The failing device leaves numbers in the workspace, as a stopped launch does.
        assert!(attention.run(&q, &k, &v, None).is_err());
        attention.spoil_queue();
        device.reset();
        attention.run(&q, &k, &v, None).unwrap();
        assert_eq!(device.calls().fill, 1);
        assert_eq!(attention.outputs_without_weights().unwrap().o, expected);
    }

    #[test]
    fn wrong_tensors_are_named() {
        let problem = Problem::builder(1, 1, 8, 32).mask(true).build().unwrap();
        let [q, k, v] = &tensors(&problem);
        let short = Tensor::zeros(DType::F32, &[1, 1, 7, 32]);
        let message = |inputs: Inputs<'_>| inputs.check(&problem).unwrap_err().to_string();
        let good = Inputs::new(q, k, v);
        assert!(message(good).contains("mask is missing"));
        assert!(message(Inputs { k: &short, ..good }).contains("k has shape [1, 1, 7, 32]"));
        let half = v.cast(DType::F16);
        assert!(message(Inputs { v: &half, ..good }).contains("v is f16, expected f32"));
        assert!(message(Inputs { mask: Some(&[1; 7]), ..good }).contains("mask has shape [7]"));
    }
}
