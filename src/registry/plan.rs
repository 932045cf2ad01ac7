//! A kernel's plan for a problem: memory and launches.

use std::fmt;

use kernels_gpu::{
    entry::{Entry, Instances},
    parts::queue::QUEUE_WORDS,
};
use simt::{Dim3, tma::TensorMap};

use super::{ALIGNMENT, Operation, Region, Spec, Target};
use crate::{
    backend::{Constants, Device, Launch, Specialised, TensorMapSpec},
    dtype::DType,
    error::{Error, Unsupported},
    problem::Problem,
};

/// Encodes tensor maps for the device that runs the launches.
pub(crate) type Encode<'a> = &'a dyn Fn(&TensorMapSpec) -> Result<[u8; 128], Error>;

/// The use of a section of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Usage {
    /// Queues from which the blocks of a launch take tasks.
    Queue,
    /// Attention weights `[B, H, Nq, Nk]` in the storage type, which stay after the launches.
    Weights,
    /// The log-sum-exp of a call that gives no memory for it.
    Lse,
    /// `rowsum(dO ∘ O)` of the rows of a backward pass.
    Delta,
    /// The LSE in log2 units, of the rows of a backward pass.
    MinusLseLog2,
    /// Sums of dQ in f32.
    DqAcc,
    /// Tickets and turns of the blocks that add to dQ in a fixed order.
    Turns,
    /// Gradients of the scores `[B, H, Nq, Nk]` in the storage type.
    DScores,
    /// O of each part of a decode, f32 `[splits, B, H, Nq, Dv]`.
    Parts,
    /// Maximum and sum of each row and part of a decode, f32 `[splits, B, H, Nq, 2]`.
    PartSums,
}

/// A section of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its use.
    pub usage: Usage,
    /// Its length.
    pub bytes: u64,
    /// Whether it must be zero before the first launch; the launches of a call leave it zero.
    pub zeroed: bool,
}

impl Section {
    /// `bytes` bytes with no initial value.
    #[must_use]
    pub const fn new(usage: Usage, bytes: u64) -> Self {
        Self { usage, bytes, zeroed: false }
    }

    /// The queues of a kernel with persistent blocks.
    pub(super) const QUEUE: Self =
        Self { usage: Usage::Queue, bytes: QUEUE_WORDS as u64 * 4, zeroed: true };
}

/// A kernel's needs for a problem: the sections of its workspace, and its launches in order.
#[derive(Clone, Debug)]
pub struct Draft<P: Operation> {
    /// Memory beyond inputs and outputs.
    pub sections: Vec<Section>,
    /// Launches, in order.
    pub steps: Vec<Step<P>>,
}

/// One launch without a workspace, as most flash kernels have.
impl<P: Operation> From<Step<P>> for Draft<P> {
    fn from(step: Step<P>) -> Self {
        Self { sections: Vec::new(), steps: vec![step] }
    }
}

/// One launch of a plan.
#[derive(Clone, Debug)]
pub struct Step<P: Operation> {
    /// The entry.
    pub entry: &'static Entry,
    /// The specialisation constants.
    pub constants: Constants,
    /// Blocks of the grid.
    pub grid: Dim3,
    /// Threads of a block.
    pub block: Dim3,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The tensor maps before the arguments, in the entry's order.
    pub maps: Vec<Map<P>>,
    /// The entry's argument struct for a call, as bytes.
    pub args: fn(&Call<'_, P>) -> Vec<u8>,
}

impl<P: Operation> Step<P> {
    /// One block of the threads of a kernel's entry for a type and a size (0 where it has none),
    /// in a row, without shared memory, all constants 0.
    ///
    /// # Errors
    /// The kernel has no such entry.
    pub fn new(
        entries: Instances,
        dtype: DType,
        size: usize,
        args: fn(&Call<'_, P>) -> Vec<u8>,
    ) -> Result<Self, String> {
        let entry = entries.find(dtype.name(), size);
        let entry = entry.ok_or_else(|| format!("has no entry for {dtype} and size {size}"))?;
        Ok(Self {
            entry,
            constants: Constants::default(),
            grid: 1.into(),
            block: entry.threads.into(),
            shared_bytes: 0,
            maps: Vec::new(),
            args,
        })
    }

    fn launch(&self, call: &Call<'_, P>, encode: Encode<'_>) -> Result<Launch, Error> {
        let mut args = (self.args)(call);
        for (index, map) in self.maps.iter().enumerate() {
            let at = index * TensorMap::BYTES;
            args.splice(at..at, encode(&(map.spec)(call, map.box_dims))?);
        }
        if !self.maps.is_empty() {
            // The struct is aligned as its maps are.
            args.resize(args.len().next_multiple_of(align_of::<TensorMap>()), 0);
        }
        let Self { entry, constants, grid, block, shared_bytes, .. } = *self;
        Ok(Launch { entry, constants, grid, block, shared_bytes, args })
    }
}

/// A tensor map of a step.
#[derive(Clone, Copy, Debug)]
pub struct Map<P: Operation> {
    /// Extent of the box that one copy moves, fastest dimension first.
    pub box_dims: [u32; 4],
    /// The map of a call with that box.
    pub spec: fn(&Call<'_, P>, [u32; 4]) -> TensorMapSpec,
}

/// A call from the view of its steps.
#[derive(Debug)]
pub struct Call<'a, P: Operation> {
    /// The problem.
    pub problem: &'a P,
    /// The tensors.
    pub args: &'a P::Args,
    pub(super) sections: &'a [Placed],
}

impl<P: Operation> Call<'_, P> {
    /// The memory that this call has for a use: the caller's memory, or else a section of the
    /// workspace; empty if there is neither.
    #[must_use]
    pub fn region(&self, usage: Usage) -> Region {
        P::given(self.args, usage).unwrap_or_else(|| {
            let placed = self.sections.iter().find(|placed| placed.section.usage == usage);
            placed.map_or_else(Region::default, |&Placed { section, offset }| {
                P::workspace(self.args).part(offset, section.bytes)
            })
        })
    }
}

/// A section with its place in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    section: Section,
    offset: u64,
}

impl Placed {
    const fn end(&self) -> u64 {
        self.offset + self.section.bytes
    }
}

/// The launches of a kernel for a problem. A plan is made once and serves any number of calls on
/// any number of threads.
///
/// ```
/// use flash_attention::{DType, Problem, raw::Plan, registry::{self, Target}};
///
/// let problem = Problem::builder(4, 12, 512, 64).dtype(DType::F16).build()?;
/// let target = Target::new((9, 0), 232_448, 132);
/// let plan = Plan::new(&problem, &target, registry::find("flash_hopper")?)?;
/// assert_eq!(plan.entries().count(), 1);
/// assert!(plan.workspace_bytes() < 1 << 20);
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone)]
pub struct Plan<P: Operation = Problem> {
    kernel: &'static Spec<P>,
    problem: P,
    steps: Vec<Step<P>>,
    /// Zeroed sections come first; then the kernel's own, then the sections that a caller may
    /// provide.
    sections: Vec<Placed>,
}

impl<P: Operation> Plan<P> {
    /// Plans a problem on a device: see [`Spec::plan`].
    ///
    /// # Errors
    /// The reason that the kernel does not support the problem on the device.
    pub fn new(
        problem: &P,
        target: &Target,
        kernel: &'static Spec<P>,
    ) -> Result<Self, Unsupported> {
        kernel.plan(problem, target)
    }

    /// Places the sections one after the other.
    pub(super) fn of(kernel: &'static Spec<P>, problem: P, draft: Draft<P>) -> Self {
        let Draft { mut sections, steps } = draft;
        sections.sort_by_key(|section| !section.zeroed);
        sections.extend(problem.optional_outputs());
        let mut end = 0u64;
        let place = |section: Section| {
            let placed = Placed { section, offset: end.next_multiple_of(ALIGNMENT) };
            end = placed.end();
            placed
        };
        Self { kernel, problem, steps, sections: sections.into_iter().map(place).collect() }
    }

    /// The kernel.
    #[must_use]
    pub const fn kernel(&self) -> &'static Spec<P> {
        self.kernel
    }

    /// The problem.
    #[must_use]
    pub const fn problem(&self) -> &P {
        &self.problem
    }

    /// Bytes of the workspace of a call that gives memory for inputs and the main output alone;
    /// aligned to [`ALIGNMENT`].
    #[must_use]
    pub fn workspace_bytes(&self) -> u64 {
        self.sections.last().map_or(0, Placed::end)
    }

    /// The number of bytes at the start of a workspace that must be zero before its first launch:
    /// see [the workspace](crate::raw#workspace).
    #[must_use]
    pub fn zeroed_bytes(&self) -> u64 {
        let zeroed = self.sections.iter().rfind(|placed| placed.section.zeroed);
        zeroed.map_or(0, Placed::end)
    }

    /// The entries that a call launches, in order.
    pub fn entries(&self) -> impl Iterator<Item = Specialised> + '_ {
        self.steps.iter().map(|step| Specialised { entry: step.entry, constants: step.constants })
    }

    /// The launches of a call, in order.
    pub(super) fn steps(&self) -> &[Step<P>] {
        &self.steps
    }

    /// The number of tensor maps that a call encodes.
    #[must_use]
    pub fn tensor_maps(&self) -> usize {
        self.steps.iter().map(|step| step.maps.len()).sum()
    }

    /// Compares the arguments of a call with the problem.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] names the tensor, the value, and what would be right.
    pub fn check(&self, args: &P::Args) -> Result<(), Error> {
        self.problem.check(args)?;
        let needed = self.bytes_without(|usage| P::given(args, usage).is_some());
        P::workspace(args).check("workspace", needed, ALIGNMENT)
    }

    /// As [`Plan::launches`], on any device: the emulator encodes tensor maps in its own way.
    ///
    /// # Errors
    /// As [`Plan::check`]; a tensor map that the device cannot encode.
    pub fn launches_for(&self, device: &dyn Device, args: &P::Args) -> Result<Vec<Launch>, Error> {
        self.launches_with(args, &|map| device.encode_tensor_map(map))
    }

    pub(crate) fn launches_with(
        &self,
        args: &P::Args,
        encode: Encode<'_>,
    ) -> Result<Vec<Launch>, Error> {
        self.check(args)?;
        let call = Call { problem: &self.problem, args, sections: &self.sections };
        self.steps.iter().map(|step| step.launch(&call, encode)).collect()
    }

    /// Bytes of the workspace of a call that gives memory for some uses.
    pub(super) fn bytes_without(&self, given: impl Fn(Usage) -> bool) -> u64 {
        self.sections.iter().rfind(|placed| !given(placed.section.usage)).map_or(0, Placed::end)
    }
}

impl Plan {
    /// Bytes of the workspace of a call that gives memory for the LSE.
    #[must_use]
    pub fn workspace_bytes_beside_lse(&self) -> u64 {
        self.bytes_without(|usage| usage == Usage::Lse)
    }

    /// Device memory that a call needs, inputs and outputs included.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        let p = &self.problem;
        p.input_bytes() + p.output_bytes() + self.workspace_bytes_beside_lse()
    }

    /// The place in the workspace where a call leaves the attention weights, for kernels that keep
    /// them.
    pub(crate) fn kept_weights(&self) -> Option<u64> {
        let weights = self.sections.iter().find(|placed| placed.section.usage == Usage::Weights);
        weights.map(|placed| placed.offset)
    }
}

impl<P: Operation> fmt::Debug for Plan<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("kernel", &self.kernel.name)
            .field("problem", &self.problem)
            .field("sections", &self.sections)
            .field("steps", &self.steps)
            .finish()
    }
}
