//! Launches in the caller's memory, context and stream, for programs that already own a GPU.
//!
//! A [`Plan`] describes a kernel's launches for a [`Problem`](crate::Problem). Make it once per
//! problem; any number of threads may use it. [`Args`] name the tensors of one call: addresses,
//! lengths and strides. [`BackwardArgs`] do so for a [`Backward`](crate::registry::Backward) pass,
//! [`DecodeArgs`] for a [`Decode`](crate::registry::Decode), [`AppendArgs`] for an
//! [`Append`](crate::registry::Append), [`LinearArgs`] for a
//! [`Projection`](crate::registry::Projection), and [`MergeArgs`] for a
//! [`Merge`](crate::registry::Merge). No type here comes from another CUDA library.
//!
//! | call | effect |
//! |---|---|
//! | [`Plan::new`] | chooses entries, grids and the layout of the workspace; needs no GPU |
//! | [`Plan::workspace_bytes`], [`Plan::zeroed_bytes`] | say what memory the caller provides |
//! | [`Plan::check`] | compares arguments with the problem, and names the wrong value |
//! | [`Context::prepare`] | compiles the entries before the first launch |
//! | [`Context::enqueue`] | launches on a stream of the caller |
//! | [`Plan::launches`] | the launches themselves, for callers who load the PTX ([`crate::ptx`]) |
//!
//! [`Context::enqueue`] allocates no device memory, does not wait, and fills and uploads nothing.
//! So a CUDA graph can capture it, and a captured launch carries its own tensor maps.
//!
//! # Workspace
//! Each call in flight needs its own workspace. The first [`Plan::zeroed_bytes`] bytes of the
//! workspace count the tasks that the blocks of a launch take from a queue. The caller zeroes these
//! bytes before the first launch; each launch that ends leaves them zero again. After a launch that
//! did not end, because of a fault or a time limit, the caller zeroes them again before using the
//! workspace.

pub mod context;
pub(crate) mod failure;
mod kernels;
mod maps;

pub use crate::registry::{
    append::AppendArgs,
    attention::Args,
    backward::BackwardArgs,
    decode::DecodeArgs,
    linear::LinearArgs,
    merge::MergeArgs,
    plan::Plan,
    tensors::{ALIGNMENT, BiasView, Region, View},
};
pub use context::Context;
pub use kernels::why_not;

use crate::{backend::Launch, error::Error, registry::Operation};
use context::{Description, encode_tensor_map};

impl<P: Operation> Plan<P> {
    /// The launches of a call on a GPU, in order, for callers who load the PTX themselves: each
    /// entry takes one parameter, whose bytes are [`Launch::args`].
    ///
    /// # Errors
    /// As [`Plan::check`]; the driver's refusal to encode tensor maps, for which a
    /// context must be current on the calling thread.
    pub fn launches(&self, args: &P::Args) -> Result<Vec<Launch>, Error> {
        self.launches_with(args, &encode_tensor_map)
    }
}

impl Context {
    /// Starts the launches of a plan on a stream of this context, in order; does not wait. Costs
    /// the host a few microseconds once the plan is prepared ([`Context::prepare`] with
    /// [`Plan::entries`]).
    ///
    /// `stream` is a `CUstream`: null and 1 are the legacy default stream, 2 the calling thread's
    /// default stream.
    ///
    /// ```no_run
    /// use flash_attention::{DType, Error, Problem, raw::{Args, Context, Region, View}, registry};
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
    ///     // Plan once, and keep the plan.
    ///     let plan = registry::best_for(&problem, &context.target())?.plan;
    ///     let view = |address| {
    ///         View::new(Region::new(address, 4 * 12 * 512 * 64 * 2), [12 * 512 * 64, 512 * 64, 64])
    ///     };
    ///     let args = Args::new(view(q), view(k), view(v), view(o)).workspace(workspace);
    ///     unsafe { context.enqueue(&plan, &args, stream) }
    /// }
    /// ```
    ///
    /// # Errors
    /// As [`Plan::check`]; an entry that this GPU cannot run; an error of the driver, possibly from
    /// earlier work.
    ///
    /// # Safety
    /// - `stream` is live and belongs to this context.
    /// - The regions of `args` are memory that this GPU can access, and stay so until the
    ///   launches have ended: after the caller has waited for the stream, or, captured in a graph,
    ///   as long as the graph is launched.
    /// - No element of an output (O and the LSE; dQ, dK and dV of a backward pass; y of a
    ///   projection) or of the workspace is an element of another tensor of the call.
    /// - From the launch to its end, no other work reads or writes the outputs and the workspace,
    ///   and none writes the inputs.
    /// - The first [`Plan::zeroed_bytes`] bytes of the workspace are zero (see [the module](self#workspace)).
    pub unsafe fn enqueue<P: Operation>(
        &self,
        plan: &Plan<P>,
        args: &P::Args,
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
}
