//! The launches of a kernel for a problem.

use kernels_gpu::{args::AttentionArgs, entry::Entry};
use simt::Dim3;

use super::{ALIGNMENT, Args, Encode, Region, context::encode_tensor_map};
use crate::{
    backend::{self, Device, KernelArgs, Launch},
    error::Error,
    problem::Problem,
    registry::{self, KernelSpec, QUEUE_BYTES, Step, Target},
};

/// One launch of a plan, its entry looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedStep {
    entry: &'static Entry,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
}

impl PlannedStep {
    pub(crate) fn new(step: Step) -> Result<Self, Error> {
        let Step { symbol, grid, block, shared_bytes } = step;
        let entry = kernels_gpu::find(&symbol).ok_or(Error::UnknownSymbol { symbol })?;
        Ok(Self { entry, grid, block, shared_bytes })
    }

    /// The launch of this step with its arguments.
    pub(crate) fn launch(&self, args: Vec<u8>) -> Launch {
        let Self { entry, grid, block, shared_bytes } = *self;
        Launch { entry, grid, block, shared_bytes, args }
    }

    pub(crate) const fn entry(&self) -> &'static Entry {
        self.entry
    }
}

/// The launches of a kernel for a problem: made once, used for any number of calls by any number
/// of threads.
///
/// ```
/// use flash_attention::{DType, Problem, raw::Plan, registry::{self, Target}};
///
/// let problem = Problem::builder(4, 12, 512, 64).dtype(DType::F16).build()?;
/// let target = Target::new((9, 0), 232_448, 132);
/// let kernel = registry::best_for(&problem, &target)?.kernel;
/// let plan = Plan::new(&problem, &target, kernel)?;
/// assert_eq!(plan.kernel().name, "flash_hopper");
/// assert!(plan.workspace_bytes() < 1 << 20);
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Plan {
    kernel: &'static KernelSpec,
    problem: Problem,
    steps: Vec<PlannedStep>,
    layout: WorkspaceLayout,
}

/// Where the parts of a workspace begin: the queue at 0, then the weights, then the LSE of a call
/// that does not give memory for it.
#[derive(Clone, Copy, Debug)]
struct WorkspaceLayout {
    queue_bytes: u64,
    weights_bytes: u64,
    lse_bytes: u64,
}

impl WorkspaceLayout {
    const fn weights(&self) -> u64 {
        self.queue_bytes.next_multiple_of(ALIGNMENT)
    }

    const fn lse(&self) -> u64 {
        (self.weights() + self.weights_bytes).next_multiple_of(ALIGNMENT)
    }
}

impl Plan {
    /// Plans a problem on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot do the problem there.
    pub fn new(
        problem: &Problem,
        target: &Target,
        kernel: &'static KernelSpec,
    ) -> Result<Self, Error> {
        kernel.supports(problem, target)?;
        let plan = (kernel.plan)(problem, target);
        let steps = plan.steps.into_iter().map(PlannedStep::new).collect::<Result<_, _>>()?;
        let layout = WorkspaceLayout {
            queue_bytes: if kernel.queue { QUEUE_BYTES } else { 0 },
            weights_bytes: plan.workspace_bytes,
            lse_bytes: problem.rows() as u64 * 4,
        };
        Ok(Self { kernel, problem: *problem, steps, layout })
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

    /// Bytes of the workspace of a call that gives no memory for the LSE; aligned to
    /// [`ALIGNMENT`].
    #[must_use]
    pub const fn workspace_bytes(&self) -> u64 {
        self.layout.lse() + self.layout.lse_bytes
    }

    /// Bytes of the workspace of a call that gives memory for the LSE.
    #[must_use]
    pub const fn workspace_bytes_beside_lse(&self) -> u64 {
        self.layout.weights() + self.layout.weights_bytes
    }

    /// How many bytes at the start of a workspace must be zero before its first launch: see
    /// [the module](super#workspace).
    #[must_use]
    pub const fn zeroed_bytes(&self) -> u64 {
        self.layout.queue_bytes
    }

    /// The entries that a call launches, in order.
    pub fn entries(&self) -> impl Iterator<Item = &'static Entry> + '_ {
        self.steps.iter().map(PlannedStep::entry)
    }

    /// Compares the arguments of a call with the problem.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] names the tensor, the value, and what would be right.
    pub fn check(&self, args: &Args) -> Result<(), Error> {
        args.check(&self.problem)?;
        let needed = match args.lse {
            Some(_) => self.workspace_bytes_beside_lse(),
            None => self.workspace_bytes(),
        };
        args.workspace.check("workspace", needed, ALIGNMENT)
    }

    /// The launches of a call on a GPU, in order, for callers who load the PTX themselves: each
    /// entry takes one parameter, whose bytes are [`Launch::args`].
    ///
    /// # Errors
    /// As [`Plan::check`]; the driver's refusal to encode tensor maps, for which a
    /// context must be current on the calling thread.
    pub fn launches(&self, args: &Args) -> Result<Vec<Launch>, Error> {
        self.launches_with(args, &encode_tensor_map)
    }

    /// As [`Plan::launches`], on any device: the emulator encodes tensor maps in its own way.
    ///
    /// # Errors
    /// As [`Plan::check`]; a tensor map that the device cannot encode.
    pub fn launches_for(&self, device: &dyn Device, args: &Args) -> Result<Vec<Launch>, Error> {
        self.launches_with(args, &|map| device.encode_tensor_map(map))
    }

    pub(super) fn launches_with(
        &self,
        args: &Args,
        encode: Encode<'_>,
    ) -> Result<Vec<Launch>, Error> {
        self.check(args)?;
        let bytes = self.attention_bytes(args, encode)?;
        Ok(self.steps.iter().map(|step| step.launch(bytes.clone())).collect())
    }

    fn attention_bytes(&self, args: &Args, encode: Encode<'_>) -> Result<Vec<u8>, Error> {
        let plain = self.attention_args(args);
        Ok(match self.kernel.tensor_maps {
            None => plain.to_launch_bytes(),
            Some(maps) => {
                let maps = maps(&self.problem, &[plain.q, plain.k, plain.v, plain.o]);
                backend::with_maps(encode, &maps, plain)?.to_launch_bytes()
            }
        })
    }

    fn attention_args(&self, args: &Args) -> AttentionArgs {
        let (p, layout) = (&self.problem, &self.layout);
        let part = |offset, bytes| args.workspace.part(offset, bytes).arg();
        AttentionArgs {
            q: args.q.arg(),
            k: args.k.arg(),
            v: args.v.arg(),
            o: args.o.arg(),
            lse: args.lse.map_or_else(|| part(layout.lse(), layout.lse_bytes), Region::arg),
            mask: args.mask.unwrap_or_default().arg(),
            weights: part(layout.weights(), layout.weights_bytes),
            queue: part(0, layout.queue_bytes),
            batch: p.batch() as u32,
            heads: p.heads() as u32,
            seq_q: p.seq_q() as u32,
            seq_k: p.seq_k() as u32,
            scale_log2: (f64::from(p.scale()) * std::f64::consts::LOG2_E) as f32,
            causal: p.causal().into(),
            dropout: p.dropout_args(),
            head_dim: p.head_dim() as u32,
            scale: p.scale(),
        }
    }

    /// Where a call leaves the attention weights, of kernels that keep them.
    pub(crate) fn kept_weights(&self) -> Option<std::ops::Range<u64>> {
        let start = self.layout.weights();
        self.kernel.features.weights.then(|| start..start + self.problem.weights_bytes())
    }

    /// The launch that computes the attention weights of a call again, from its Q and K.
    ///
    /// # Errors
    /// As [`registry::weights_step`].
    pub(crate) fn weights_launch(&self, args: &Args, weights: Region) -> Result<Launch, Error> {
        let step = PlannedStep::new(registry::weights_step(&self.problem)?)?;
        let args = AttentionArgs { weights: weights.arg(), ..self.attention_args(args) };
        Ok(step.launch(args.to_launch_bytes()))
    }
}
