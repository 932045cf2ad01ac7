//! THE table of kernels. Whatever lists, chooses, runs, tests or measures kernels reads
//! it here: a kernel joins with one file in kernels-gpu and one entry in `table.rs`.
//!
//! The table stands in the order of the ladder, which is the order of speed: the best
//! kernel for a problem is the last one that can do it.

#[cfg(test)]
mod chapter;
mod linear;
mod table;

use kernels_gpu::{entry::Entry, schedule::QUEUE_WORDS};
use simt::Dim3;

use crate::{
    backend::{Device, TensorMapSpec},
    dtype::DType,
    error::Error,
    problem::{Layout, Problem},
    raw::ALIGNMENT,
};

/// Argument structs, as tensor maps are made from.
pub use kernels_gpu::args;
pub use linear::{LINEAR_KERNELS, LinearMaps, LinearSpec, Projection, best_linear, find_linear};
pub use table::KERNELS;

/// The most blocks of a grid in its dimensions y and z (x: 2^31 - 1).
const MAX_GRID_YZ: u32 = 65_535;
const MAX_GRID_X: u32 = (1 << 31) - 1;
/// Shared memory that each block takes beyond its own, from compute capability 8.0 on.
const RESERVED_SHARED_BYTES: u32 = 1024;

/// One kernel: what it is, what it can do, how it is launched.
#[derive(Debug)]
pub struct KernelSpec {
    /// Name that the command line and tables use.
    pub name: &'static str,
    /// What it is, in one line.
    pub summary: &'static str,
    /// The idea that it adds to the rung before.
    pub idea: &'static str,
    /// Storage types that it has entries for.
    pub dtypes: &'static [DType],
    /// Head dims that it has entries for, ascending.
    pub head_dims: &'static [usize],
    /// The least compute capability, `(major, minor)`.
    pub capability: (u32, u32),
    /// Whether it runs on exactly that capability (PTX for an `a` architecture).
    pub exact_capability: bool,
    /// The sizes that it works in, for a storage type and a head dim.
    pub sizes: fn(DType, head_dim: usize) -> Sizes,
    /// What it can do beyond plain attention.
    pub features: Features,
    /// Memory and launches for a problem that it supports.
    pub plan: fn(&Problem, &Target) -> Plan,
    /// The tensor maps of a kernel that copies through TMA: its entries take them in front of
    /// the arguments.
    pub tensor_maps: Option<TensorMaps>,
    /// Whether its blocks stay and take task after task: from queues of
    /// [`QUEUE_BYTES`], zero between launches.
    pub queue: bool,
}

/// The sizes that a kernel works in: lengths beside them are edges, which the tests run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Numbers of query rows at which something else begins: of a tile first, then of its parts
    /// and of tiles of other shapes.
    pub rows: Vec<u32>,
    /// Numbers of keys, likewise: of a tile, of a segment, of a way to treat a row.
    pub keys: Vec<u32>,
}

/// Device memory of the queues of tasks: `AttentionArgs::queue`.
pub const QUEUE_BYTES: u64 = QUEUE_WORDS as u64 * 4;

/// Makes tensor maps from Q, K, V and O in device memory, in the order in which a kernel
/// expects them.
pub type TensorMaps = fn(&Problem, &[args::Tensor; 4]) -> [TensorMapSpec; 4];

/// What a kernel can do beyond plain attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Causal masks.
    pub causal: bool,
    /// Padding masks.
    pub mask: bool,
    /// Dropout.
    pub dropout: bool,
    /// It leaves the weights `[B, H, Nq, Nk]` in the storage type at the start of its
    /// workspace.
    pub weights: bool,
    /// `[B, N, H, D]` as well as `[B, H, N, D]`.
    pub tokens_first: bool,
}

/// What a device offers to kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Target {
    /// Compute capability, `(major, minor)`.
    pub capability: (u32, u32),
    /// The most dynamic shared memory of a block in bytes.
    pub max_shared_bytes: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

impl Target {
    /// A device of that compute capability `(major, minor)`, dynamic shared memory of a block in
    /// bytes, and number of multiprocessors.
    #[must_use]
    pub const fn new(capability: (u32, u32), max_shared_bytes: u32, multiprocessors: u32) -> Self {
        Self { capability, max_shared_bytes, multiprocessors }
    }

    /// That of a device.
    #[must_use]
    pub fn of(device: &dyn Device) -> Self {
        Self {
            capability: device.compute_capability(),
            max_shared_bytes: device.max_shared_bytes(),
            multiprocessors: device.multiprocessors(),
        }
    }

    /// Blocks of an entry that the device holds at once. By its launch bounds an entry takes so
    /// many registers that a multiprocessor has room for `min_blocks`; shared memory may leave
    /// room for fewer.
    fn blocks_at_once(&self, entry: &Entry, shared_bytes: u32) -> u32 {
        // One block may have all of a multiprocessor's shared memory but what is reserved.
        let by_shared_memory = (self.max_shared_bytes + RESERVED_SHARED_BYTES)
            / (shared_bytes + RESERVED_SHARED_BYTES);
        self.multiprocessors * entry.min_blocks.min(by_shared_memory).max(1)
    }
}

/// Memory and launches for one problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes beyond inputs and outputs, given to the kernels as `args.weights`.
    pub workspace_bytes: u64,
    /// Launches, in order.
    pub steps: Vec<Step>,
}

/// One launch of a plan. Every step is given the same arguments: `AttentionArgs`, behind the
/// tensor maps where the kernel has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Name of the entry.
    pub symbol: String,
    /// Blocks of the grid.
    pub grid: Dim3,
    /// Threads of a block.
    pub block: Dim3,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
}

impl KernelSpec {
    /// Whether the kernel can do this problem on this device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first reason why not.
    pub fn supports(&self, problem: &Problem, target: &Target) -> Result<(), Error> {
        unless(self.name, self.obstacle(problem, target))
    }

    /// Whether the kernel can run on this device at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what the device lacks.
    pub fn runs_on(&self, target: &Target) -> Result<(), Error> {
        unless(self.name, lacking(self.capability, self.exact_capability, target))
    }

    fn obstacle(&self, problem: &Problem, target: &Target) -> Option<String> {
        if let Some(reason) = lacking(self.capability, self.exact_capability, target) {
            return Some(reason);
        }
        if let Some(reason) = dtype_obstacle(self.dtypes, problem.dtype()) {
            return Some(reason);
        }
        if !self.head_dims.contains(&problem.head_dim()) {
            return Some(format!(
                "does not support head dim {}: it has {}",
                problem.head_dim(),
                and_nearest(self.head_dims, problem.head_dim())
            ));
        }
        for (wanted, able, what) in [
            (problem.causal(), self.features.causal, "causal masks"),
            (problem.has_mask(), self.features.mask, "padding masks"),
            (problem.dropout().is_some(), self.features.dropout, "dropout"),
            (
                problem.layout() == Layout::TokensFirst,
                self.features.tokens_first,
                "the layout [B, N, H, D]",
            ),
        ] {
            if wanted && !able {
                return Some(format!("does not support {what}"));
            }
        }
        (self.plan)(problem, target).steps.iter().find_map(|step| step.obstacle(target))
    }

    /// Bytes beyond inputs and outputs: the plan's workspace and the queues.
    #[must_use]
    pub fn workspace_bytes(&self, problem: &Problem, target: &Target) -> u64 {
        let queue = if self.queue { QUEUE_BYTES } else { 0 };
        queue.next_multiple_of(ALIGNMENT) + (self.plan)(problem, target).workspace_bytes
    }

    /// Device memory that a run will need, known before anything is allocated.
    #[must_use]
    pub fn peak_bytes(&self, problem: &Problem, target: &Target) -> u64 {
        problem.input_bytes() + problem.output_bytes() + self.workspace_bytes(problem, target)
    }
}

/// The kernel of that name.
///
/// # Errors
/// [`Error::UnknownKernel`], which lists the names.
pub fn find(name: &str) -> Result<&'static KernelSpec, Error> {
    KERNELS.iter().find(|k| k.name == name).ok_or_else(|| Error::UnknownKernel {
        given: name.into(),
        known: KERNELS.iter().map(|k| k.name).collect::<Vec<_>>().join(", "),
    })
}

/// The kernel chosen for a problem, and why not a better one.
#[derive(Debug)]
pub struct Choice {
    /// The best kernel that can do the problem.
    pub kernel: &'static KernelSpec,
    /// The better kernels that cannot, each with the reason, best first.
    pub passed_over: Vec<Error>,
}

/// The best kernel for a problem on a device.
///
/// # Errors
/// [`Error::InvalidValue`] for a head dim that no kernel has; [`Error::Unsupported`] when no
/// kernel can do it otherwise, with the reason of the most widely usable one.
pub fn best_for(problem: &Problem, target: &Target) -> Result<Choice, Error> {
    let mut passed_over = Vec::new();
    for kernel in KERNELS.iter().rev() {
        match kernel.supports(problem, target) {
            Ok(()) => return Ok(Choice { kernel, passed_over }),
            Err(reason) => passed_over.push(reason),
        }
    }
    check_head_dim(problem.head_dim())?;
    Err(passed_over
        .pop()
        .unwrap_or_else(|| Error::UnknownKernel { given: "best".into(), known: String::new() }))
}

/// Whether there is a kernel with that head dim.
///
/// # Errors
/// [`Error::InvalidValue`] with the head dims that there are.
pub fn check_head_dim(head_dim: usize) -> Result<(), Error> {
    let mut all: Vec<usize> = KERNELS.iter().flat_map(|kernel| kernel.head_dims).copied().collect();
    all.sort_unstable();
    all.dedup();
    if all.contains(&head_dim) {
        return Ok(());
    }
    let remedy = format!("kernels have {}", and_nearest(&all, head_dim));
    Err(Error::InvalidValue { what: "head dim", given: head_dim.to_string(), remedy })
}

/// The launch that computes the weights of a problem again, from Q and K: as every
/// step, it is given the problem's `AttentionArgs`.
///
/// # Errors
/// [`Error::Unsupported`] for a head dim that it has no entry for, or a grid that no GPU has.
pub fn weights_step(problem: &Problem) -> Result<Step, Error> {
    let step = table::weights(problem);
    let reason = match kernels_gpu::find(&step.symbol) {
        Some(_) => grid_obstacle(step.grid),
        None => Some(format!(
            "does not support head dim {}: it has multiples of 32",
            problem.head_dim()
        )),
    };
    match reason {
        None => Ok(step),
        Some(reason) => Err(Error::Unsupported { kernel: "weights".into(), reason }),
    }
}

/// What a device lacks to run a kernel of that compute capability.
fn lacking(capability: (u32, u32), exact: bool, target: &Target) -> Option<String> {
    let ((major, minor), (has_major, has_minor)) = (capability, target.capability);
    let has = format!("this GPU has {has_major}.{has_minor}");
    if exact && target.capability != capability {
        return Some(format!("needs compute capability {major}.{minor} exactly, {has}"));
    }
    if target.capability < capability {
        return Some(format!("needs compute capability {major}.{minor} or later, {has}"));
    }
    None
}

/// [`Error::Unsupported`] where there is an obstacle.
fn unless(kernel: &str, obstacle: Option<String>) -> Result<(), Error> {
    match obstacle {
        None => Ok(()),
        Some(reason) => Err(Error::Unsupported { kernel: kernel.into(), reason }),
    }
}

/// Why a kernel that has these storage types cannot do another.
fn dtype_obstacle(has: &[DType], wanted: DType) -> Option<String> {
    (!has.contains(&wanted)).then(|| format!("does not support {wanted}: it has {}", list(has)))
}

impl Step {
    /// Why a device cannot launch it.
    fn obstacle(&self, target: &Target) -> Option<String> {
        if self.shared_bytes > target.max_shared_bytes {
            return Some(format!(
                "needs {} bytes of shared memory for a block, this GPU has {}",
                self.shared_bytes, target.max_shared_bytes
            ));
        }
        grid_obstacle(self.grid)
    }
}

/// Why no GPU has a grid.
fn grid_obstacle(Dim3 { x, y, z }: Dim3) -> Option<String> {
    (x > MAX_GRID_X || y > MAX_GRID_YZ || z > MAX_GRID_YZ).then(|| {
        format!(
            "needs a grid of {x} x {y} x {z} blocks, a GPU has {MAX_GRID_X} x {MAX_GRID_YZ} x \
             {MAX_GRID_YZ}: use a smaller batch or sequence"
        )
    })
}

/// The head dims that there are, and the nearest to one that there is not.
fn and_nearest(head_dims: &[usize], wanted: usize) -> String {
    let nearest = head_dims.iter().min_by_key(|head_dim| head_dim.abs_diff(wanted));
    let nearest = nearest.map_or_else(String::new, |nearest| format!(" (nearest: {nearest})"));
    format!("{}{nearest}", list(head_dims))
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CpuDevice;

    fn emulator() -> Target {
        Target::of(&CpuDevice::new())
    }

    /// The table, the plans and kernels-gpu agree, for every type and head dim.
    #[test]
    fn every_step_names_an_entry_with_its_threads() {
        for kernel in KERNELS {
            for (&dtype, &d) in
                kernel.dtypes.iter().flat_map(|t| kernel.head_dims.iter().map(move |d| (t, d)))
            {
                let problem = Problem::builder(2, 3, 70, d).dtype(dtype).build().unwrap();
                kernel.supports(&problem, &emulator()).unwrap();
                for step in (kernel.plan)(&problem, &emulator()).steps {
                    let entry = kernels_gpu::find(&step.symbol)
                        .unwrap_or_else(|| panic!("{} has no entry", step.symbol));
                    assert_eq!(u64::from(entry.threads), step.block.count(), "{}", step.symbol);
                    let args_bytes = match kernel.tensor_maps {
                        None => size_of::<args::AttentionArgs>(),
                        Some(_) => size_of::<kernels_gpu::flash_hopper::HopperArgs>(),
                    };
                    assert_eq!(entry.args_bytes, args_bytes, "{}", step.symbol);
                }
            }
        }
    }

    #[test]
    fn as_many_blocks_stay_as_registers_and_shared_memory_leave_room_for() {
        let pipelined = find("flash_pipelined").unwrap();
        let blocks = |n: usize, d: usize, target: &Target| {
            let problem = Problem::builder(4, 32, n, d).dtype(DType::F16).build().unwrap();
            (pipelined.plan)(&problem, target).steps[0].grid.x
        };
        let h100 = Target { multiprocessors: 132, max_shared_bytes: 232_448, ..emulator() };
        assert_eq!(blocks(4096, 64, &h100), 2 * 132);
        // Eight warps of 255 registers: one block.
        assert_eq!(blocks(4096, 256, &h100), 132);
        // 80 KiB: one of the blocks that registers leave room for.
        let small = Target { max_shared_bytes: 101_376, ..h100 };
        assert_eq!(blocks(4096, 64, &small), 2 * 132);
        assert_eq!(blocks(4096, 128, &small), 132);
        // No more blocks than tasks.
        assert_eq!(blocks(100, 64, &h100), 4 * 32);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = find("flash_typo").unwrap_err().to_string();
        assert!(message.contains("flash_typo") && message.contains("naive, "), "{message}");
    }

    #[test]
    fn reasons_name_the_value_and_what_is_possible() {
        let naive = find("naive").unwrap();
        let problem = Problem::builder(1, 1, 8, 48).build().unwrap();
        let message = naive.supports(&problem, &emulator()).unwrap_err().to_string();
        assert_eq!(
            message,
            "kernel naive does not support head dim 48: it has 32, 64, 96, 128 (nearest: 32)"
        );
        let old = Target { capability: (6, 1), ..emulator() };
        let message = naive.runs_on(&old).unwrap_err().to_string();
        assert!(message.contains("needs compute capability 7.5 or later, this GPU has 6.1"));
        let problem = Problem::builder(70_000, 1, 8, 64).build().unwrap();
        let message = naive.supports(&problem, &emulator()).unwrap_err().to_string();
        assert!(message.contains("smaller batch"), "{message}");
    }

    #[test]
    fn the_best_kernel_is_the_last_that_can() {
        let problem = Problem::builder(1, 2, 64, 64).build().unwrap();
        let choice = best_for(&problem, &emulator()).unwrap();
        assert!(choice.kernel.supports(&problem, &emulator()).is_ok());
        let turing = Target { capability: (7, 5), max_shared_bytes: 65_536, ..emulator() };
        let choice = best_for(&problem, &turing).unwrap();
        assert!(choice.kernel.capability <= (7, 5));
    }
}
