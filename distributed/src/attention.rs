//! The work of a rank: its computation, its exchanges, and their memory.
//!
//! ```text
//! heads:    all-to-all: rows of all heads -> all rows of some heads; the kernel; all-to-all back
//! context:  for each step { pass K and V on; parts of the keys that are here; join them to the sum }
//! both:     all-to-all among ranks that share a part of the context, the ring among those that share heads
//! ```
//!
//! Every wait is an event between the two lanes of the device. The host waits only for other ranks,
//! and only until they have started their side of a transfer.

mod backward;
mod forward;
mod heads;
mod memory;

use std::sync::{Arc, Mutex, PoisonError};

use flash_attention::{
    raw::{MergeArgs, Plan, Region},
    registry::{self, Backward, BackwardSpec, KernelSpec, Merge, Operation, Target},
};

use crate::{
    communicator::{Communicator, Direction},
    engine::Engine,
    error::Error,
    schedule::{Merges, Part, chunk, source},
    share::Share,
};
use heads::{Group, Tensor};
use memory::{Arena, Shape};

pub use backward::BackwardTensors;
pub use forward::ForwardTensors;

/// The choice of kernels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The forward kernel; the best unless given.
    pub kernel: Option<&'static KernelSpec>,
    /// The kernel of the backward pass; the best unless given.
    pub backward: Option<&'static BackwardSpec>,
    /// Whether gradients have the same bits in each run.
    pub deterministic: bool,
}

/// A part with its plans.
#[derive(Debug)]
struct Planned {
    part: Part,
    forward: Plan,
    /// Where the lists of packed sequences lie in the workspace, and the lists.
    lists: Option<[(u64, Vec<u32>); 2]>,
}

/// A step of the ring.
#[derive(Debug)]
struct Step {
    /// Keys of the current block.
    keys: usize,
    parts: Vec<Planned>,
}

/// Attention of one rank of several. It is made once and serves any number of calls.
#[derive(Debug)]
pub struct Attention {
    share: Share,
    options: Options,
    target: Target,
    rank: usize,
    steps: Vec<Step>,
    /// How the parts join, in the order of the steps.
    merges: Merges,
    /// The plans of merges so far.
    merge_plans: Mutex<Vec<Arc<Plan<Merge>>>>,
    /// Rows of Q and of K that the ranks of this rank's group for heads hold.
    group_rows: [Vec<usize>; 2],
    forward: forward::Sections,
    backward: Option<(backward::Sections, Vec<Plan<Backward>>)>,
    /// The end of the lists of packed sequences, which a workspace begins with.
    lists_end: u64,
}

impl Attention {
    /// The work of rank `rank` on a device with the given limits.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank beyond the last; [`Error::Attention`] for a part that no
    /// kernel supports.
    pub fn new(share: &Share, rank: usize, target: &Target) -> Result<Self, Error> {
        Self::with(share, rank, target, Options::default())
    }

    /// As [`Attention::new`], with options.
    ///
    /// # Errors
    /// As [`Attention::new`]; [`Error::Attention`] for a part that the kernel of the options does
    /// not support.
    pub fn with(
        share: &Share,
        rank: usize,
        target: &Target,
        options: Options,
    ) -> Result<Self, Error> {
        let grid = share.grid();
        if rank >= grid.ranks() {
            let remedy = format!("with {} ranks it is below {0}", grid.ranks());
            return Err(Error::Invalid { what: "rank", given: rank.to_string(), remedy });
        }
        let (_, c) = grid.place(rank);
        let mut lists = Arena::default();
        let mut steps = Vec::new();
        for step in 0..grid.context {
            let s = source(grid.context, c, step);
            let mut parts = Vec::new();
            for assignment in share.parts(c, s) {
                let problem = share.problem_of(c, s, &assignment)?;
                let forward = plan(options.kernel, &problem, target)?;
                let lists = assignment.packed.map(|[i, j]| {
                    let list = |list: &Vec<u32>| (lists.take(4 * list.len() as u64), list.clone());
                    [&share.member(c, 0).cu_seqlens[i], &share.member(s, 1).cu_seqlens[j]].map(list)
                });
                parts.push(Planned { part: assignment.part, forward, lists });
            }
            steps.push(Step { keys: share.member(s, 1).rows(), parts });
        }
        let of_parts: Vec<_> =
            steps.iter().flat_map(|step| &step.parts).map(|p| p.part.rows.clone()).collect();
        let merges = Merges::of(share.member(c, 0).rows(), &of_parts);
        let group_rows = [0, 1].map(|tensor| {
            let rows = share.member(c, tensor).rows();
            (0..grid.heads).map(|h| chunk(rows, grid.heads, h).len()).collect()
        });
        let mut this = Self {
            share: share.clone(),
            options,
            target: *target,
            rank,
            steps,
            merges,
            merge_plans: Mutex::default(),
            group_rows,
            forward: forward::Sections::default(),
            backward: None,
            lists_end: lists.end(),
        };
        this.forward = forward::Sections::of(&this);
        Ok(this)
    }

    /// The same, with the plans of the backward pass.
    ///
    /// # Errors
    /// [`Error::Attention`] for a part whose gradients no kernel supports.
    pub fn with_backward(mut self) -> Result<Self, Error> {
        let of_part = |part: &Planned| {
            let problem = Backward::new(*part.forward.problem());
            let problem = problem.deterministic(self.options.deterministic);
            plan(self.options.backward, &problem, &self.target)
        };
        let plans: Vec<_> = self.parts().map(of_part).collect::<Result<_, _>>()?;
        self.backward = Some((backward::Sections::of(&self, &plans), plans));
        Ok(self)
    }

    /// The problem and its ranks.
    #[must_use]
    pub const fn share(&self) -> &Share {
        &self.share
    }

    /// This rank.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// Rows of Q and O, and of K and V, that this rank holds.
    #[must_use]
    pub fn local_rows(&self) -> [usize; 2] {
        let (h, _) = self.share.grid().place(self.rank);
        [self.group_rows[0][h], self.group_rows[1][h]]
    }

    /// Bytes of the workspace of a call, forward or backward; aligned to 256.
    #[must_use]
    pub fn workspace_bytes(&self) -> u64 {
        self.forward.end.max(self.backward.as_ref().map_or(0, |(sections, _)| sections.end))
    }

    /// Bytes that this rank sends to other ranks in a forward pass.
    #[must_use]
    pub fn forward_bytes_sent(&self) -> u64 {
        let [q, k, v, o, lse] = self.local_shapes();
        let gathered = self.group_bytes(&[(q, 0), (k, 1), (v, 1)], Direction::Send);
        let returned = self.group_bytes(&[(o, 0), (lse, 0)], Direction::Receive);
        gathered + returned + self.blocks_bytes()
    }

    /// The same in a backward pass.
    #[must_use]
    pub fn backward_bytes_sent(&self) -> u64 {
        let [q, k, v, o, lse] = self.local_shapes();
        let inputs = [(q, 0), (k, 1), (v, 1), (o, 0), (lse, 0), (o, 0)];
        let gathered = self.group_bytes(&inputs, Direction::Send);
        let returned = self.group_bytes(&[(q, 0), (k, 1), (v, 1)], Direction::Receive);
        let sums = |step: &Step| {
            self.member_shapes_k(step.keys).map(|shape| shape.in_f32().bytes()).iter().sum::<u64>()
        };
        let sums = if self.has_ring() { self.steps.iter().map(sums).sum() } else { 0 };
        gathered + returned + self.blocks_bytes() + sums
    }

    /// Bytes of blocks of K and V that are passed on.
    fn blocks_bytes(&self) -> u64 {
        let passed_on = &self.steps[..self.steps.len() - 1];
        let of =
            |step: &Step| self.member_shapes_k(step.keys).map(Shape::bytes).iter().sum::<u64>();
        passed_on.iter().map(of).sum()
    }

    /// Bytes of the all-to-all of tensors in one direction, without the bytes that stay.
    fn group_bytes(&self, tensors: &[(Shape, usize)], direction: Direction) -> u64 {
        if self.share.grid().heads == 1 {
            return 0;
        }
        let tensor = |&(shape, rows): &(Shape, usize)| Tensor {
            local: (shape, 0),
            gathered: 0,
            staging: 0,
            rows: &self.group_rows[rows],
        };
        let tensors: Vec<_> = tensors.iter().map(tensor).collect();
        let transfers = self.group().transfers(&tensors).into_iter();
        let others = transfers.filter(|t| t.peer != self.rank && t.direction == direction);
        others.map(|transfer| transfer.region.bytes).sum()
    }

    /// This rank in the group that divides the heads.
    const fn group(&self) -> Group {
        Group { grid: self.share.grid(), rank: self.rank }
    }

    fn parts(&self) -> impl Iterator<Item = &Planned> {
        self.steps.iter().flat_map(|step| &step.parts)
    }

    /// Q, K, V, O and the LSE in the form that a rank holds.
    fn local_shapes(&self) -> [Shape; 5] {
        let p = self.share.problem();
        self.shapes(p.heads(), p.kv_heads(), self.local_rows())
    }

    /// The same in the form for computation: the rank's heads of all rows of the group.
    fn member_shapes(&self) -> [Shape; 5] {
        let (p, heads) = (self.share.problem(), self.share.grid().heads);
        let rows = [0, 1].map(|tensor| self.group_rows[tensor].iter().sum());
        self.shapes(p.heads() / heads, p.kv_heads() / heads, rows)
    }

    /// K and V of a block with the given number of keys.
    fn member_shapes_k(&self, keys: usize) -> [Shape; 2] {
        let [_, k, v, ..] = self.member_shapes();
        [Shape { rows: keys, ..k }, Shape { rows: keys, ..v }]
    }

    fn shapes(&self, heads: usize, kv_heads: usize, [q_rows, k_rows]: [usize; 2]) -> [Shape; 5] {
        let p = self.share.problem();
        let (batch, tokens_first) = (self.share.batch(), self.share.tokens_first());
        let of = |heads, rows, columns| Shape {
            batch,
            heads,
            rows,
            columns,
            size: p.dtype().size(),
            tokens_first,
        };
        let o = of(heads, q_rows, p.head_dim_v());
        [
            of(heads, q_rows, p.head_dim()),
            of(kv_heads, k_rows, p.head_dim()),
            of(kv_heads, k_rows, p.head_dim_v()),
            o,
            Shape { columns: 1, size: 4, tokens_first: false, ..o },
        ]
    }

    /// The maximum number of keys of a block.
    fn most_keys(&self) -> usize {
        self.steps.iter().map(|step| step.keys).max().unwrap_or_default()
    }

    /// The ranks to which this rank sends its block and from which it receives the next.
    fn neighbours(&self) -> [usize; 2] {
        let grid = self.share.grid();
        let (h, c) = grid.place(self.rank);
        [(c + 1) % grid.context, (c + grid.context - 1) % grid.context].map(|c| grid.rank(h, c))
    }

    /// Compares this rank's problem with the others', and prepares a workspace: once per workspace,
    /// before the first call with it. All ranks call it.
    ///
    /// # Errors
    /// [`Error::Differs`] names the value and the rank that has another; [`Error::Lost`] and
    /// [`Error::Late`] name a rank that does not come; [`Error::Invalid`] for a workspace that is
    /// too small.
    ///
    /// # Safety
    /// The workspace is live memory of the engine's device, and no other work uses it meanwhile.
    pub unsafe fn prepare<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        workspace: Region,
    ) -> Result<(), Error> {
        let peers = communicator.peers();
        for (what, given, expected) in [
            ("rank of the communicator", peers.rank(), self.rank),
            ("ranks of the communicator", peers.world(), self.share.grid().ranks()),
        ] {
            if given != expected {
                let (given, remedy) = (given.to_string(), format!("the problem has {expected}"));
                return Err(Error::Invalid { what, given, remedy });
            }
        }
        peers.agree(&self.share.header())?;
        check_region("workspace", workspace, self.workspace_bytes(), 256)?;
        for (at, list) in self.parts().filter_map(|part| part.lists.as_ref()).flatten() {
            let bytes: Vec<u8> = list.iter().flat_map(|n| n.to_le_bytes()).collect();
            // SAFETY: the place is inside the workspace, as checked; the workspace is live and
            // unused, as stated above.
            unsafe { engine.upload(workspace.address + at, &bytes) }?;
        }
        Ok(())
    }

    /// Merges rows of a part into a sum.
    ///
    /// # Safety
    /// The views are live memory of the device, of the shape and the rows of `merge`.
    unsafe fn merge<E: Engine>(
        &self,
        engine: &E,
        merge: Merge,
        args: MergeArgs,
    ) -> Result<(), Error> {
        let plan = self.merge_plan(merge)?;
        // SAFETY: the views are live and have the merge's shape, as stated above.
        unsafe { engine.start(&plan, &args) }
    }

    /// The plan of a merge, made in the first call that needs it.
    fn merge_plan(&self, merge: Merge) -> Result<Arc<Plan<Merge>>, Error> {
        let mut plans = self.merge_plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = plans.iter().find(|plan| *plan.problem() == merge) {
            return Ok(known.clone());
        }
        let plan = Arc::new(plan(None, &merge, &self.target)?);
        plans.push(plan.clone());
        Ok(plan)
    }
}

/// The plan of a kernel, of the best unless one is given.
fn plan<P: Operation>(
    kernel: Option<&'static registry::Spec<P>>,
    problem: &P,
    target: &Target,
) -> Result<Plan<P>, Error> {
    match kernel {
        Some(kernel) => {
            Ok(kernel.plan(problem, target).map_err(flash_attention::Error::Unsupported)?)
        }
        None => Ok(registry::best_for(problem, target)?.plan),
    }
}

/// Starts a plan whose workspace is `workspace`, with its queue zeroed.
///
/// # Safety
/// As for [`Engine::start`]; `args` have that workspace.
unsafe fn start<E: Engine, P: Operation>(
    engine: &E,
    plan: &Plan<P>,
    args: &P::Args,
    workspace: Region,
) -> Result<(), Error> {
    // Other plans leave other things there.
    let zeroed = Region::new(workspace.address, plan.zeroed_bytes());
    // SAFETY: the zeroed bytes are the begin of the workspace in `args`, as stated above.
    unsafe {
        engine.fill(zeroed, 0)?;
        engine.start(plan, args)
    }
}

fn check_region(
    what: &'static str,
    region: Region,
    needed: u64,
    alignment: u64,
) -> Result<(), Error> {
    let wrong = |given, remedy| Err(Error::Invalid { what, given, remedy });
    if region.bytes < needed {
        return wrong(format!("{} bytes", region.bytes), format!("{needed} bytes are needed"));
    }
    if needed > 0 && (region.address == 0 || !region.address.is_multiple_of(alignment)) {
        let given = format!("address {:#x}", region.address);
        return wrong(given, format!("it must be a multiple of {alignment}, and not 0"));
    }
    Ok(())
}
