//! The single table of kernels. All code that lists, chooses, runs, tests or measures kernels reads
//! it. A kernel joins with one file in kernels-gpu and one entry in its ladder: `table.rs` for
//! attention, `backward.rs` for its gradients, `decode.rs` for caches, `linear.rs` for projections.
//!
//! A ladder is in order of speed: the best kernel for a problem is the last one that supports it.
//!
//! ```text
//! Problem + Target --Spec::plan--> Plan: sections of the workspace, steps
//! Plan + tensors   --launches----> Launch: entry, grid, block, shared memory, argument bytes
//! ```

pub(crate) mod append;
pub(crate) mod attention;
pub(crate) mod backward;
#[cfg(test)]
mod chapter;
pub(crate) mod decode;
pub(crate) mod linear;
pub(crate) mod merge;
pub(crate) mod plan;
mod table;
mod target;
pub(crate) mod tensors;

use std::fmt;

use crate::{
    dtype::DType,
    error::{Error, Unsupported},
    problem::Problem,
};

pub use append::{APPEND_KERNELS, Append, AppendSpec, Rotary};
pub use attention::{AttentionLimits, Features, HEAD_DIM_STEP, Sizes};
pub use backward::{BACKWARD_KERNELS, Backward, BackwardSpec};
pub use decode::{DECODE_KERNELS, Decode, DecodeSpec, MAX_SPLITS, Pages, SplitWork, splits};
pub use linear::{LINEAR_KERNELS, LinearProduct, Projection};
pub use merge::{MERGE_KERNELS, Merge, MergeSpec};
use plan::Plan;
pub use plan::{Call, Draft, Map, Section, Step, Usage};
pub use table::KERNELS;
pub(crate) use table::WEIGHTS;
pub use target::Target;
use tensors::{ALIGNMENT, Region};

/// An operation, described by the computation of one call: attention ([`Problem`]), its gradients
/// ([`Backward`]), attention over a cache ([`Decode`]), a projection ([`Projection`]).
pub trait Operation: Copy + fmt::Debug + Send + Sync + 'static {
    /// The tensors of a call.
    type Args: Copy + fmt::Debug + PartialEq;
    /// A kernel's limits beyond types and devices.
    type Limits: fmt::Debug + Send + Sync;

    /// Every kernel, in order of speed, the slowest first.
    fn kernels() -> &'static [Spec<Self>];

    /// Storage type of inputs and outputs.
    fn dtype(&self) -> DType;

    /// The reason that a kernel with these limits does not support the operation.
    fn obstacle(&self, limits: &Self::Limits) -> Option<String>;

    /// Compares the tensors of a call with the problem.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] names the tensor, the value, and what would be right.
    fn check(&self, args: &Self::Args) -> Result<(), Error>;

    /// Whether any kernel has the sizes of the problem, on any device.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] with the existing sizes.
    fn check_sizes(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Outputs that kernels always write: if a call gives no memory for such an output, a section
    /// of the workspace holds it.
    fn optional_outputs(&self) -> Vec<Section> {
        Vec::new()
    }

    /// The memory that the caller gives for a use.
    fn given(_args: &Self::Args, _usage: Usage) -> Option<Region> {
        None
    }

    /// The workspace of a call.
    fn workspace(_args: &Self::Args) -> Region {
        Region::default()
    }
}

/// One kernel: its description, its limits, its launches.
#[derive(Debug)]
pub struct Spec<P: Operation> {
    /// The name in the command line and in tables.
    pub name: &'static str,
    /// The description, in one line.
    pub summary: &'static str,
    /// The idea that it adds to the previous rung.
    pub idea: &'static str,
    /// Storage types with entries.
    pub dtypes: &'static [DType],
    /// The lowest compute capability, `(major, minor)`.
    pub capability: (u32, u32),
    /// Whether the kernel runs only on exactly that capability (PTX for an `a` architecture).
    pub exact_capability: bool,
    /// Further limits.
    pub limits: P::Limits,
    /// Memory and launches for a problem within the limits, or the reason that the kernel still
    /// does not support it. [`Spec::plan`] calls it.
    pub draft: fn(&P, &Target) -> Result<Draft<P>, String>,
}

/// An attention kernel.
pub type KernelSpec = Spec<Problem>;
/// A linear kernel.
pub type LinearSpec = Spec<Projection>;

impl<P: Operation> Spec<P> {
    /// Memory and launches for a problem on a device.
    ///
    /// # Errors
    /// The first reason that the kernel does not support the problem on the device.
    pub fn plan(&'static self, problem: &P, target: &Target) -> Result<Plan<P>, Unsupported> {
        self.checked_draft(problem, target)
            .map(|draft| Plan::of(self, *problem, draft))
            .map_err(|reason| self.unsupported(reason))
    }

    fn checked_draft(&self, problem: &P, target: &Target) -> Result<Draft<P>, String> {
        let able = |obstacle: Option<String>| obstacle.map_or(Ok(()), Err);
        able(target.lacks(self.capability, self.exact_capability))?;
        let dtype = problem.dtype();
        if !self.dtypes.contains(&dtype) {
            return Err(format!("does not support {dtype}: it has {}", list(self.dtypes)));
        }
        able(problem.obstacle(&self.limits))?;
        let draft = (self.draft)(problem, target)?;
        for step in &draft.steps {
            able(target.refuses(step.grid, step.shared_bytes))?;
        }
        Ok(draft)
    }

    /// Whether the kernel supports this problem on this device.
    ///
    /// # Errors
    /// As [`Spec::plan`].
    pub fn supports(&'static self, problem: &P, target: &Target) -> Result<(), Unsupported> {
        self.plan(problem, target).map(drop)
    }

    /// Whether the kernel can run on this device at all.
    ///
    /// # Errors
    /// The feature that the device lacks.
    pub fn runs_on(&self, target: &Target) -> Result<(), Unsupported> {
        let lacks = target.lacks(self.capability, self.exact_capability);
        lacks.map_or(Ok(()), |reason| Err(self.unsupported(reason)))
    }

    fn unsupported(&self, reason: String) -> Unsupported {
        Unsupported { kernel: self.name, reason }
    }

    /// The kernel of that name.
    ///
    /// # Errors
    /// [`Error::UnknownKernel`], which lists the names.
    pub fn find(name: &str) -> Result<&'static Self, Error> {
        let kernels = P::kernels();
        kernels.iter().find(|k| k.name == name).ok_or_else(|| Error::UnknownKernel {
            given: name.into(),
            known: list(&kernels.iter().map(|k| k.name).collect::<Vec<_>>()),
        })
    }
}

/// The kernel of that name.
///
/// # Errors
/// [`Error::UnknownKernel`], which lists the names.
pub fn find(name: &str) -> Result<&'static KernelSpec, Error> {
    Spec::find(name)
}

/// The kernel of the backward pass with this name.
///
/// # Errors
/// [`Error::UnknownKernel`], which lists the names.
pub fn find_backward(name: &str) -> Result<&'static BackwardSpec, Error> {
    Spec::find(name)
}

/// The decode kernel with this name.
///
/// # Errors
/// [`Error::UnknownKernel`], which lists the names.
pub fn find_decode(name: &str) -> Result<&'static DecodeSpec, Error> {
    Spec::find(name)
}

/// The linear kernel with this name.
///
/// # Errors
/// [`Error::UnknownKernel`], which lists the names.
pub fn find_linear(name: &str) -> Result<&'static LinearSpec, Error> {
    Spec::find(name)
}

/// The kernel chosen for a problem, and the reasons against better kernels.
#[derive(Debug)]
pub struct Choice<P: Operation = Problem> {
    /// The best kernel that supports the problem.
    pub kernel: &'static Spec<P>,
    /// The kernel's plan for the problem.
    pub plan: Plan<P>,
    /// The better kernels that do not support it, each with the reason, best first.
    pub passed_over: Vec<Unsupported>,
}

/// The best kernel for a problem on a device.
///
/// # Errors
/// [`Error::InvalidValue`] for a head dim that no kernel has; otherwise [`Error::Unsupported`] when
/// no kernel supports the problem, with the reason of the most widely usable kernel.
pub fn best_for<P: Operation>(problem: &P, target: &Target) -> Result<Choice<P>, Error> {
    best_among(P::kernels(), problem, target)
}

fn best_among<P: Operation>(
    kernels: &'static [Spec<P>],
    problem: &P,
    target: &Target,
) -> Result<Choice<P>, Error> {
    let mut passed_over = Vec::new();
    for kernel in kernels.iter().rev() {
        match kernel.plan(problem, target) {
            Ok(plan) => return Ok(Choice { kernel, plan, passed_over }),
            Err(reason) => passed_over.push(reason),
        }
    }
    problem.check_sizes()?;
    Err(passed_over.pop().map_or_else(
        || Error::UnknownKernel { given: "best".into(), known: String::new() },
        Error::Unsupported,
    ))
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::{
        attention::Args, backward::BackwardArgs, decode::DecodeArgs, linear::LinearArgs,
        merge::MergeArgs, *,
    };
    use crate::{backend::CpuDevice, problem::Layout};

    fn emulator() -> Target {
        Target::of(&CpuDevice::new())
    }

    /// The tables, the plans and kernels-gpu agree, for every type and head dim.
    #[test]
    fn every_step_fits_its_entry() {
        fn check<P: Operation>(kernel: &'static Spec<P>, problem: &P, args: &P::Args) {
            let device = CpuDevice::new();
            let plan = kernel.plan(problem, &emulator()).unwrap();
            for launch in plan.launches_for(&device, args).unwrap() {
                let entry = launch.entry;
                assert_eq!(u64::from(entry.threads), launch.block.count(), "{}", entry.symbol);
                assert_eq!(launch.grid.x % entry.cluster, 0, "{}", entry.symbol);
                assert_eq!(launch.args.len(), entry.args_bytes, "{}", entry.symbol);
            }
        }
        let region = Region::new(1 << 40, 1 << 40);
        for kernel in KERNELS.iter().chain([&WEIGHTS]) {
            let head_dims = kernel.limits.head_dims;
            for (&dtype, &d) in
                kernel.dtypes.iter().flat_map(|t| head_dims.iter().map(move |d| (t, d)))
            {
                let problem = Problem::builder(2, 3, 70, d).dtype(dtype).build().unwrap();
                let view = tensors::View::contiguous(region, problem.layout(), 3, 70, d);
                let args = Args::new(view, view, view, view).workspace(region);
                check(kernel, &problem, &args);
            }
        }
        for kernel in BACKWARD_KERNELS {
            let head_dims = kernel.limits.head_dims;
            for (&dtype, &d) in
                kernel.dtypes.iter().flat_map(|t| head_dims.iter().map(move |d| (t, d)))
            {
                let problem = Problem::builder(2, 3, 70, d).dtype(dtype).build().unwrap();
                let view = tensors::View::contiguous(region, problem.layout(), 3, 70, d);
                let args = Args::new(view, view, view, view).lse(region).workspace(region);
                let args = BackwardArgs::new(args, view, [view; 3]);
                check(kernel, &Backward::new(problem), &args);
            }
        }
        for kernel in DECODE_KERNELS {
            let head_dims = kernel.limits.head_dims;
            for (&dtype, &d) in
                kernel.dtypes.iter().flat_map(|t| head_dims.iter().map(move |d| (t, d)))
            {
                let problem = Problem::builder(2, 3, 70, d).dtype(dtype).build().unwrap();
                let view = tensors::View::contiguous(region, problem.layout(), 3, 70, d);
                let args = DecodeArgs::new(Args::new(view, view, view, view).workspace(region));
                for splits in [1, 3].map(std::num::NonZeroU32::new) {
                    check(kernel, &Decode::new(problem).splits(splits), &args);
                }
            }
        }
        for kernel in MERGE_KERNELS {
            for &dtype in kernel.dtypes {
                let merge = Merge::new([2, 3, 70, 64], dtype).weighted(true).out(true);
                let view = tensors::View::contiguous(region, Layout::HeadsFirst, 3, 70, 64);
                let tensor = (view, region);
                let args = MergeArgs { part: tensor, sum: tensor, out: tensor, lse_stride: 70 };
                check(kernel, &merge, &args);
            }
        }
        for kernel in LINEAR_KERNELS {
            for &dtype in kernel.dtypes {
                for product in [LinearProduct::Y, LinearProduct::Dx, LinearProduct::Dw] {
                    let (rows, in_features, out_features) = (5, 8, 16);
                    let projection = Projection { dtype, rows, in_features, out_features, product };
                    let args = LinearArgs { x: region, w: region, bias: None, y: region };
                    check(kernel, &projection, &args);
                }
            }
        }
    }

    /// Zeroed sections come first, each section is aligned, and a call that gives memory for an
    /// output needs no section for it.
    #[test]
    fn sections_are_placed_one_after_the_other() {
        let problem = Problem::builder(1, 1, 3, 64).build().unwrap();
        let weights = Section::new(Usage::Weights, 36);
        let draft = Draft { sections: vec![weights, Section::QUEUE], steps: Vec::new() };
        let plan = Plan::of(find("naive").unwrap(), problem, draft);
        let queue = Section::QUEUE.bytes;
        assert_eq!(plan.zeroed_bytes(), queue);
        assert_eq!(plan.kept_weights(), Some(queue));
        assert_eq!(plan.workspace_bytes_beside_lse(), queue + 36);
        assert_eq!(plan.workspace_bytes(), queue + 48 + 3 * 4);
        assert_eq!(plan.peak_bytes(), 3 * (3 * 64 * 4) + (3 * 64 * 4 + 3 * 4) + queue + 36);
    }

    #[test]
    fn as_many_blocks_stay_as_registers_and_shared_memory_leave_room_for() {
        let pipelined = find("flash_pipelined").unwrap();
        let blocks = |n: usize, d: usize, target: &Target| {
            let problem = Problem::builder(4, 32, n, d).dtype(DType::F16).build().unwrap();
            (pipelined.draft)(&problem, target).unwrap().steps[0].grid.x
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

    /// A choice and a run of it ask a kernel for its draft once, a run by name once too.
    #[test]
    fn a_kernel_is_asked_once_for_its_draft() {
        use std::sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        };

        use crate::{
            Tensor,
            session::{Inputs, Session},
        };

        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let &Spec { name, summary, idea, dtypes, capability, exact_capability, limits, .. } =
            find("flash_pipelined").unwrap();
        let kernel: &'static KernelSpec = Box::leak(Box::new(Spec {
            name,
            summary,
            idea,
            dtypes,
            capability,
            exact_capability,
            limits,
            draft: |p, target| {
                ASKED.fetch_add(1, Relaxed);
                (find("flash_pipelined").unwrap().draft)(p, target)
            },
        }));
        let problem = Problem::builder(1, 2, 20, 64).dtype(DType::F16).build().unwrap();
        let x = Tensor::zeros(DType::F16, &problem.q_shape());
        let session = Session::new(Arc::new(CpuDevice::new()));
        let inputs = Inputs::new(&x, &x, &x);
        session.run(kernel, &problem, &inputs).unwrap();
        assert_eq!(ASKED.swap(0, Relaxed), 1, "by name");
        let plan = best_among(std::slice::from_ref(kernel), &problem, &session.target());
        let bytes = [x.as_bytes(); 3];
        session.prepare_bytes(plan.unwrap().plan, bytes, None).unwrap();
        assert_eq!(ASKED.load(Relaxed), 1, "by choice");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = find("flash_typo").unwrap_err().to_string();
        assert!(message.contains("flash_typo") && message.contains("naive, "), "{message}");
    }

    #[test]
    fn reasons_name_the_value_and_what_is_possible() {
        let naive = find("naive").unwrap();
        for (d, d_v, wrong) in [(44, 48, "44"), (136, 64, "136"), (48, 20, "20 of the values")] {
            let problem = Problem::builder(1, 1, 8, d).head_dim_v(d_v).build().unwrap();
            let message = naive.supports(&problem, &emulator()).unwrap_err().to_string();
            let expected = format!(
                "kernel naive does not support head dim {wrong}: it has multiples of 8 up to 128"
            );
            assert_eq!(message, expected);
        }
        let old = Target { capability: (6, 1), ..emulator() };
        let message = naive.runs_on(&old).unwrap_err().to_string();
        assert!(message.contains("needs compute capability 7.5 or later, this GPU has 6.1"));
        let problem = Problem::builder(1 << 30, 4, 8, 64).build().unwrap();
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
