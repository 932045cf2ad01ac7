//! Launches in the caller's memory, context and stream: for programs that own a GPU already.
//!
//! A [`Plan`] says what a kernel launches for a [`Problem`](crate::Problem). It is made once per
//! problem and used by any number of threads. [`Args`] name the tensors of one call: addresses,
//! lengths and strides. No type here comes from another CUDA library.
//!
//! | call | does |
//! |---|---|
//! | [`Plan::new`] | chooses entries, grids and the layout of the workspace; needs no GPU |
//! | [`Plan::workspace_bytes`], [`Plan::zeroed_bytes`] | say what memory the caller provides |
//! | [`Plan::check`] | compares arguments with the problem, and names what is wrong |
//! | [`Context::prepare`] | has the driver compile the entries before the first launch |
//! | [`Context::enqueue`] | launches on a stream of the caller |
//! | [`Plan::launches`] | the launches themselves, for callers who load the PTX ([`crate::ptx`]) |
//!
//! [`Context::enqueue`] allocates no device memory, waits for nothing, fills and uploads nothing:
//! a CUDA graph can capture it, and one captured launch carries its own tensor maps.
//!
//! # Workspace
//! Each call in flight needs a workspace of its own. The first [`Plan::zeroed_bytes`] bytes of it
//! count what the blocks of a launch take from a queue. They are zero before the first launch;
//! each launch that ends leaves them zero again. After a launch that did not end, by a fault or a
//! time limit, they are zeroed again before the workspace is used.

mod args;
pub mod context;
pub(crate) mod failure;
mod kernels;
mod linear;
mod maps;
mod plan;

pub use args::{Args, Region, View};
pub use context::Context;
pub use kernels::why_not;
pub use linear::{LinearArgs, LinearPlan};
pub use plan::Plan;

use crate::{backend::TensorMapSpec, error::Error};
use context::Description;

/// Encodes tensor maps for the device that runs the launches.
pub(crate) type Encode<'a> = &'a dyn Fn(&TensorMapSpec) -> Result<[u8; 128], Error>;

/// Addresses of tensors, and the step from row to row, are multiples of this many bytes: kernels
/// read and write 16 bytes at a time.
pub const ALIGNMENT: u64 = 16;

impl Context {
    /// Starts the launches of a plan on a stream of this context, in order; does not wait. Costs
    /// the host a few microseconds once the plan is prepared ([`Context::prepare`] with
    /// [`Plan::entries`]).
    ///
    /// `stream` is a `CUstream`: null and 1 are the legacy default stream, 2 the calling thread's
    /// default stream.
    ///
    /// ```no_run
    /// use flash_attention::{DType, Error, Problem, raw::{Args, Context, Plan, Region, View}, registry};
    ///
    /// /// Attention of tensors `[4, 12, 512, 64]` in f16 that another library owns.
    /// ///
    /// /// # Safety
    /// /// As for [`Context::enqueue`].
    /// unsafe fn attend(
    ///     context: &Context,
    ///     [q, k, v, o]: [u64; 4],
    ///     workspace: Region,
    ///     stream: *mut std::ffi::c_void,
    /// ) -> Result<(), Error> {
    ///     let problem = Problem::builder(4, 12, 512, 64).dtype(DType::F16).build()?;
    ///     let kernel = registry::best_for(&problem, &context.target())?.kernel;
    ///     // Plan once, and keep the plan.
    ///     let plan = Plan::new(&problem, &context.target(), kernel)?;
    ///     let view = |address| {
    ///         View::new(Region::new(address, 4 * 12 * 512 * 64 * 2), [12 * 512 * 64, 512 * 64, 64])
    ///     };
    ///     let args = Args::new(view(q), view(k), view(v), view(o)).workspace(workspace);
    ///     unsafe { context.enqueue(&plan, &args, stream) }
    /// }
    /// ```
    ///
    /// # Errors
    /// As [`Plan::check`]; an entry that this GPU cannot run; what the driver reports, possibly
    /// of work before.
    ///
    /// # Safety
    /// - `stream` is live and belongs to this context.
    /// - The regions of `args` are memory that this GPU can access, and stay so until the
    ///   launches have ended: after the caller has waited for the stream, or, captured in a graph,
    ///   as long as the graph is launched.
    /// - No element of O, the LSE or the workspace is an element of another tensor of the call.
    /// - From the launch to its end, no other work reads or writes O, the LSE and the workspace,
    ///   and none writes Q, K, V and the mask.
    /// - The first [`Plan::zeroed_bytes`] bytes of the workspace are zero (see [the module](self#workspace)).
    pub unsafe fn enqueue(
        &self,
        plan: &Plan,
        args: &Args,
        stream: *mut std::ffi::c_void,
    ) -> Result<(), Error> {
        let _entered = self.enter().map_err(|code| self.failed("launching", code))?;
        for launch in plan.launches_with(args, &|map| self.maps.encode(map))? {
            // SAFETY: the context is current; the plan made the launch for checked arguments; the
            // rest is passed on to the caller.
            unsafe { self.start_entered(&launch, stream) }?
                .map_err(|code| self.failed(Description(&launch), code))?;
        }
        Ok(())
    }

    /// Starts a projection on a stream of this context; does not wait.
    ///
    /// # Errors
    /// As [`LinearPlan::check`]; an entry that this GPU cannot run; an error that the driver reports.
    ///
    /// # Safety
    /// As for [`Context::enqueue`], for x, w, bias and y.
    pub unsafe fn enqueue_linear(
        &self,
        plan: &LinearPlan,
        args: &LinearArgs,
        stream: *mut std::ffi::c_void,
    ) -> Result<(), Error> {
        let _entered = self.enter().map_err(|code| self.failed("launching", code))?;
        let launch = plan.launch_with(args, &|map| self.maps.encode(map))?;
        // SAFETY: as for `enqueue`.
        unsafe { self.start_entered(&launch, stream) }?
            .map_err(|code| self.failed(Description(&launch), code))
    }
}
