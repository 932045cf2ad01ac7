//! The forward pass of a rank.

use flash_attention::{
    raw::{Args, MergeArgs, Region},
    registry::Merge,
};

use super::{
    Attention, Planned, check_region,
    heads::Tensor,
    memory::{Arena, Shape},
    start,
};
use crate::{
    communicator::{Communicator, Transfer},
    engine::Engine,
    error::Error,
    schedule::Joins,
};

/// A rank's share of the tensors of a forward pass: contiguous, in the problem's layout, with the
/// rows of [`Share::q_rows`](crate::Share::q_rows) and [`Share::k_rows`](crate::Share::k_rows).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardTensors {
    /// Queries, `[B, H, n, D]`.
    pub q: Region,
    /// Keys, `[B, Hkv, m, D]`.
    pub k: Region,
    /// Values, `[B, Hkv, m, Dv]`.
    pub v: Region,
    /// Output, `[B, H, n, Dv]`.
    pub o: Region,
    /// Log-sum-exp, f32 `[B, H, n]`.
    pub lse: Region,
}

impl ForwardTensors {
    /// All, in the order of [`Attention::local_shapes`].
    pub(super) const fn all(&self) -> [Region; 5] {
        [self.q, self.k, self.v, self.o, self.lse]
    }
}

/// The places of the sections of a workspace.
#[derive(Debug, Default)]
pub(super) struct Sections {
    /// Q, K, V, O and the LSE of the group's rows, where heads are divided, and room to sort heads in.
    pub gathered: [[u64; 2]; 5],
    /// Received blocks of K and V.
    pub blocks: [[u64; 2]; 2],
    /// O and the LSE of a part.
    part: [u64; 2],
    /// The sums.
    sum: [u64; 2],
    /// The kernel's own.
    kernel: u64,
    pub end: u64,
}

impl Sections {
    pub(super) fn of(of: &Attention) -> Self {
        let mut arena = Arena::after(of.lists_end);
        let gathered = of.take_gathered(of.local_shapes(), of.member_shapes(), &mut arena);
        let mut this = Self { gathered, ..Self::default() };
        let [_, _, _, o, lse] = of.member_shapes();
        if of.has_ring() {
            this.blocks = of.take_blocks(&mut arena);
            let rows = of.parts().map(|part| part.part.rows.len()).max().unwrap_or_default();
            this.part = [o, lse].map(|shape| arena.take(shape.with_rows(rows).bytes()));
            this.sum = [o.in_f32(), lse].map(|shape| arena.take(shape.bytes()));
        }
        let kernel = of.parts().map(|part| part.forward.workspace_bytes()).max();
        this.kernel = arena.take(kernel.unwrap_or_default());
        this.end = arena.end();
        this
    }
}

impl Attention {
    /// Whether ranks divide the context.
    pub(super) const fn has_ring(&self) -> bool {
        self.share.grid().context > 1
    }

    /// Places tensors of the group's rows and their staging, where heads are divided.
    pub(super) fn take_gathered<const N: usize>(
        &self,
        local: [Shape; N],
        member: [Shape; N],
        arena: &mut Arena,
    ) -> [[u64; 2]; N] {
        let mut places = [[0; 2]; N];
        if self.share.grid().heads > 1 {
            for ((place, local), member) in places.iter_mut().zip(local).zip(member) {
                let staging = if local.tokens_first { local.bytes() } else { 0 };
                *place = [arena.take(member.bytes()), arena.take(staging)];
            }
        }
        places
    }

    /// Places two blocks of K and V, for the most keys that there are.
    pub(super) fn take_blocks(&self, arena: &mut Arena) -> [[u64; 2]; 2] {
        let shapes = self.member_shapes_k(self.most_keys());
        [(); 2].map(|()| shapes.map(|shape| arena.take(shape.bytes())))
    }

    /// Tensors on both sides of the all-to-all.
    pub(super) fn tensors<const N: usize>(
        &self,
        which: [(Shape, u64, [u64; 2], usize); N],
        workspace: Region,
    ) -> [Tensor<'_>; N] {
        which.map(|(shape, address, [gathered, staging], rows)| Tensor {
            local: (shape, address),
            gathered: workspace.address + gathered,
            staging: workspace.address + staging,
            rows: &self.group_rows[rows],
        })
    }

    /// Starts a forward pass: the lane of computation has O and the LSE at its end. All ranks call it.
    ///
    /// # Errors
    /// [`Error::Invalid`] names a region that is too short; [`Error::Lost`] and [`Error::Late`]
    /// name a rank that does not come; an error of the device or of NCCL.
    ///
    /// # Safety
    /// - The regions and the workspace are live memory of the engine's device, until it has done the
    ///   work, and no two of them overlap.
    /// - Until then no other work writes them, nor reads O, the LSE and the workspace.
    /// - The workspace was [prepared](Attention::prepare) with this value.
    pub unsafe fn forward<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        tensors: &ForwardTensors,
        workspace: Region,
    ) -> Result<(), Error> {
        self.check_tensors(tensors, workspace)?;
        let own = tensors.all().map(|region| region.address);
        let (local, places) = (self.local_shapes(), self.forward.gathered);
        // SAFETY: the sections are inside the workspace, as checked; tensors and workspace are live
        // and have no other user, as stated above.
        unsafe {
            if self.share.grid().heads == 1 {
                return self.ring(engine, communicator, own, workspace);
            }
            let tensor = |i: usize, rows: usize| (local[i], own[i], places[i], rows);
            let inputs = [tensor(0, 0), tensor(1, 1), tensor(2, 1)];
            let group = self.group();
            group.gather(engine, communicator, &self.tensors(inputs, workspace))?;
            let member = places.map(|[gathered, _]| workspace.address + gathered);
            self.ring(engine, communicator, member, workspace)?;
            let outputs = [tensor(3, 0), tensor(4, 0)];
            group.scatter(engine, communicator, &self.tensors(outputs, workspace))
        }
    }

    pub(super) fn check_tensors(
        &self,
        tensors: &ForwardTensors,
        workspace: Region,
    ) -> Result<(), Error> {
        let names = ["q", "k", "v", "o", "lse"];
        for ((what, region), shape) in names.into_iter().zip(tensors.all()).zip(self.local_shapes())
        {
            check_region(what, region, shape.bytes(), 16)?;
        }
        check_region("workspace", workspace, self.workspace_bytes(), 256)
    }

    /// The addresses of the current block of K and V in a step.
    pub(super) fn block(
        &self,
        own: [u64; 2],
        blocks: [[u64; 2]; 2],
        step: usize,
        workspace: Region,
    ) -> [u64; 2] {
        match step {
            0 => own,
            _ => blocks[(step - 1) % 2].map(|place| workspace.address + place),
        }
    }

    /// Starts to pass on the block of a step and to receive the next step's block, if there is one.
    /// The transfer may overwrite blocks that the lane of computation has already read.
    ///
    /// # Safety
    /// The blocks are live memory of the device, long enough for the most keys.
    pub(super) unsafe fn pass_on<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        step: usize,
        [here, next]: [[u64; 2]; 2],
    ) -> Result<Option<E::Mark>, Error> {
        let Some(following) = self.steps.get(step + 1) else { return Ok(None) };
        let sent = self.member_shapes_k(self.steps[step].keys);
        let received = self.member_shapes_k(following.keys);
        // SAFETY: the blocks are live and hold the most keys, as stated above.
        unsafe { self.pass(engine, communicator, [(sent, here), (received, next)]) }.map(Some)
    }

    /// Starts to send a tensor for K and one for V to the next rank of the ring, and to receive the
    /// tensors of the previous rank; the mark is the end of these transfers.
    ///
    /// # Safety
    /// The tensors are live memory of the device.
    pub(super) unsafe fn pass<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        [(sent, from_here), (received, to_here)]: [([Shape; 2], [u64; 2]); 2],
    ) -> Result<E::Mark, Error> {
        let [to, from] = self.neighbours();
        let mut transfers: Vec<_> = (0..2)
            .flat_map(|i| {
                let send = Transfer::send(to, sent[i].region(from_here[i]));
                [send, Transfer::receive(from, received[i].region(to_here[i]))]
            })
            .collect();
        transfers.retain(|transfer| transfer.region.bytes > 0);
        engine.fork()?;
        // SAFETY: the tensors are live; `fork` puts the transfers behind the work that uses them.
        unsafe { communicator.exchange(engine, &transfers) }?;
        engine.mark()
    }

    /// O and the LSE of the member's rows, from all keys. `tensors` are Q, K, V, O and the LSE.
    ///
    /// # Safety
    /// - `tensors` are addresses of live memory with the shapes of a member, without another user.
    /// - `workspace` is as [`Attention::forward`] asks.
    unsafe fn ring<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        tensors @ [_, k, v, ..]: [u64; 5],
        workspace: Region,
    ) -> Result<(), Error> {
        if self.has_ring() && self.merges.begin_empty {
            let rows = 0..self.member_shapes()[3].rows;
            // SAFETY: O has these rows, and the sections are inside the live workspace.
            unsafe { self.join_part(engine, tensors, workspace, &rows, [false, false], false) }?;
        }
        let mut joins = self.merges.joins.iter();
        for (at, step) in self.steps.iter().enumerate() {
            let block = |at| self.block([k, v], self.forward.blocks, at, workspace);
            let here = block(at);
            // SAFETY: K and V are live, and so are the blocks in the workspace, taken for the most
            // keys.
            let mark = unsafe { self.pass_on(engine, communicator, at, [here, block(at + 1)]) }?;
            for (part, joins) in step.parts.iter().zip(&mut joins) {
                // SAFETY: the part's rows and keys are inside the tensors and the block, all live.
                unsafe { self.part(engine, tensors, here, (part, step.keys), *joins, workspace) }?;
            }
            if let Some(mark) = mark {
                engine.join(&mark)?;
            }
        }
        if self.has_ring() {
            for rows in &self.merges.finish {
                // SAFETY: the rows are inside O, and the sums inside the workspace, both live.
                unsafe { self.join_part(engine, tensors, workspace, rows, [true, false], true) }?;
            }
        }
        Ok(())
    }

    /// Attention of a part, which joins the sum where there is one.
    ///
    /// # Safety
    /// As for [`Attention::ring`]; `k` and `v` are live, with the part's keys among `keys`.
    unsafe fn part<E: Engine>(
        &self,
        engine: &E,
        tensors @ [q, _, _, o, lse]: [u64; 5],
        [k, v]: [u64; 2],
        (part, keys): (&Planned, usize),
        joins: Joins,
        workspace: Region,
    ) -> Result<(), Error> {
        let [q_shape, _, _, o_shape, lse_shape] = self.member_shapes();
        let [k_shape, v_shape] = self.member_shapes_k(keys);
        let (rows, keys) = (&part.part.rows, &part.part.keys);
        let at = |section: u64| workspace.address + section;
        let (to, to_lse) = if self.has_ring() {
            let [part_o, part_lse] = self.forward.part.map(at);
            (
                o_shape.with_rows(rows.len()).whole(part_o),
                lse_shape.with_rows(rows.len()).region(part_lse),
            )
        } else {
            (o_shape.whole(o), lse_shape.region(lse))
        };
        let own = Region::new(at(self.forward.kernel), part.forward.workspace_bytes());
        let args =
            Args::new(q_shape.view(q, rows), k_shape.view(k, keys), v_shape.view(v, keys), to);
        let args = part.with_lists(args.lse(to_lse).workspace(own), workspace);
        // SAFETY: the views are inside live tensors, and the kernel's section inside the workspace.
        unsafe {
            start(engine, &part.forward, &args, own)?;
            if self.has_ring() {
                let is_there = [!joins.first, true];
                self.join_part(engine, tensors, workspace, rows, is_there, joins.last)?;
            }
        }
        Ok(())
    }

    /// Joins the last computed part to the sum of its rows, or turns the sum into O: `sum` and
    /// `part` say which of the two exist.
    ///
    /// # Safety
    /// As for [`Attention::ring`]; `rows` are rows of the member.
    unsafe fn join_part<E: Engine>(
        &self,
        engine: &E,
        [_, _, _, o, lse]: [u64; 5],
        workspace: Region,
        rows: &std::ops::Range<usize>,
        [sum, part]: [bool; 2],
        out: bool,
    ) -> Result<(), Error> {
        let [_, _, _, o_shape, lse_shape] = self.member_shapes();
        let at = |section: u64| workspace.address + section;
        let ([part_o, part_lse], [sum_o, sum_lse]) =
            (self.forward.part.map(at), self.forward.sum.map(at));
        let lse_rows = |address: u64| lse_shape.view(address, rows).region;
        let merge = Merge::new(o_shape.extents(rows), self.share.problem().dtype());
        let merge = merge.weighted(true).of(sum, part).out(out);
        let args = MergeArgs {
            part: (
                o_shape.with_rows(rows.len()).whole(part_o),
                lse_shape.with_rows(rows.len()).region(part_lse),
            ),
            sum: (o_shape.in_f32().view(sum_o, rows), lse_rows(sum_lse)),
            out: (o_shape.view(o, rows), lse_rows(lse)),
            lse_stride: lse_shape.rows as u64,
        };
        // SAFETY: the views are inside O, the LSE and the workspace, all live, with the rows of
        // `merge`.
        unsafe { self.merge(engine, merge, args) }
    }
}

impl Planned {
    /// With the lists of packed sequences, where there are any.
    pub(super) fn with_lists(&self, args: Args, workspace: Region) -> Args {
        let Some(lists) = &self.lists else { return args };
        let list = |i: usize| {
            let (at, list) = &lists[i];
            Region::new(workspace.address + at, 4 * list.len() as u64)
        };
        args.cu_seqlens(list(0), list(1))
    }
}
