//! The backward pass of a rank.
//!
//! A row's weights come back from its LSE over all keys, so the gradients of a part of the keys are
//! right by themselves, and the ranks add them. dQ stays. The sums of dK and dV, in f32, follow
//! their block around the ring: a rank sends them once it has added its part, and after the last
//! step they are back at the rank that holds the block.

use flash_attention::{
    raw::{Args, BackwardArgs, MergeArgs, Plan, Region},
    registry::{Backward, Merge},
};

use super::{
    Attention, ForwardTensors, Planned, check_region,
    memory::{Arena, Shape},
    start,
};
use crate::{
    communicator::Communicator,
    engine::{Engine, Rows},
    error::Error,
};

/// A rank's share of the tensors of a backward pass, as [`ForwardTensors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardTensors {
    /// Inputs and outputs of the forward pass.
    pub forward: ForwardTensors,
    /// The gradient of O.
    pub d_o: Region,
    /// Memory for the gradient of Q.
    pub dq: Region,
    /// Memory for the gradient of K.
    pub dk: Region,
    /// Memory for the gradient of V.
    pub dv: Region,
}

/// The places of the sections of a workspace.
#[derive(Debug)]
pub(super) struct Sections {
    /// Q, K, V, O, the LSE, dO, dQ, dK and dV of the group's rows, and room to sort heads in.
    gathered: [[u64; 2]; 9],
    /// Received blocks of K and V.
    blocks: [[u64; 2]; 2],
    /// dQ, dK and dV of a part, and the LSE of its rows.
    part: [u64; 4],
    /// The sum of dQ.
    dq: u64,
    /// Sums of dK and dV, and the sums in flight.
    sums: [[u64; 2]; 2],
    kernel: u64,
    pub end: u64,
}

impl Sections {
    pub(super) fn of(of: &Attention, plans: &[Plan<Backward>]) -> Self {
        let mut arena = Arena::after(of.lists_end);
        let with_gradients = |[q, k, v, o, lse]: [Shape; 5]| [q, k, v, o, lse, o, q, k, v];
        let (local, member) = (with_gradients(of.local_shapes()), of.member_shapes());
        let gathered = of.take_gathered(local, with_gradients(member), &mut arena);
        let mut this = Self {
            gathered,
            blocks: Default::default(),
            part: Default::default(),
            dq: 0,
            sums: Default::default(),
            kernel: 0,
            end: 0,
        };
        let [q, _, _, _, lse] = member;
        if of.has_ring() {
            this.blocks = of.take_blocks(&mut arena);
            let most = |of: fn(&Planned) -> usize, parts: &Attention| {
                parts.parts().map(of).max().unwrap_or_default()
            };
            let rows = most(|part| part.part.rows.len(), of);
            let [k_part, v_part] = of.member_shapes_k(most(|part| part.part.keys.len(), of));
            let parts = [q.with_rows(rows), k_part, v_part, lse.with_rows(rows)];
            this.part = parts.map(|shape| arena.take(shape.bytes()));
            this.dq = arena.take(q.in_f32().bytes());
            let blocks = of.member_shapes_k(of.most_keys());
            this.sums = [(); 2].map(|()| blocks.map(|shape| arena.take(shape.in_f32().bytes())));
        }
        let kernel = plans.iter().map(Plan::workspace_bytes).max();
        this.kernel = arena.take(kernel.unwrap_or_default());
        this.end = arena.end();
        this
    }
}

impl Attention {
    /// Starts a backward pass: the lane of computation has dQ, dK and dV at its end. All ranks call it.
    ///
    /// # Errors
    /// [`Error::Invalid`] names a region that is too short, and when there are no
    /// [plans](Attention::with_backward) for it; as [`Attention::forward`].
    ///
    /// # Safety
    /// As for [`Attention::forward`]; the outputs are the gradients.
    pub unsafe fn backward<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        tensors: &BackwardTensors,
        workspace: Region,
    ) -> Result<(), Error> {
        let Some((sections, _)) = &self.backward else {
            let remedy = "make the value with Attention::with_backward".into();
            return Err(Error::Invalid {
                what: "plans of gradients",
                given: "none".into(),
                remedy,
            });
        };
        let [q, k, v, o, lse] = self.local_shapes();
        let local = [q, k, v, o, lse, o, q, k, v];
        let BackwardTensors { forward, d_o, dq, dk, dv } = *tensors;
        self.check_tensors(&forward, workspace)?;
        for (what, region, shape) in [("d_o", d_o, o), ("dq", dq, q), ("dk", dk, k), ("dv", dv, v)]
        {
            check_region(what, region, shape.bytes(), 16)?;
        }
        let [q, k, v, o, lse] = forward.all();
        let own = [q, k, v, o, lse, d_o, dq, dk, dv].map(|region| region.address);
        // SAFETY: the sections are inside the workspace, as checked; tensors and workspace are live
        // and have no other user, as stated above.
        unsafe {
            if self.share.grid().heads == 1 {
                return self.ring_back(engine, communicator, own, workspace);
            }
            let tensor = |i: usize, rows: usize| (local[i], own[i], sections.gathered[i], rows);
            let (inputs, group) = (
                [
                    tensor(0, 0),
                    tensor(1, 1),
                    tensor(2, 1),
                    tensor(3, 0),
                    tensor(4, 0),
                    tensor(5, 0),
                ],
                self.group(),
            );
            group.gather(engine, communicator, &self.tensors(inputs, workspace))?;
            let member = sections.gathered.map(|[gathered, _]| workspace.address + gathered);
            self.ring_back(engine, communicator, member, workspace)?;
            let outputs = [tensor(6, 0), tensor(7, 1), tensor(8, 1)];
            group.scatter(engine, communicator, &self.tensors(outputs, workspace))
        }
    }

    /// The gradients of the member's rows and keys. `tensors` are Q, K, V, O, the LSE, dO, dQ, dK, dV.
    ///
    /// # Safety
    /// - `tensors` are addresses of live memory with the shapes of a member, without another user.
    /// - `workspace` is as [`Attention::backward`] asks.
    unsafe fn ring_back<E: Engine, C: Communicator<E>>(
        &self,
        engine: &E,
        communicator: &C,
        tensors @ [_, k, v, ..]: [u64; 9],
        workspace: Region,
    ) -> Result<(), Error> {
        let Some((sections, plans)) = &self.backward else { return Ok(()) };
        let [.., dq, dk, dv] = tensors;
        let mut plans = plans.iter();
        if !self.has_ring() {
            let [q_shape, k_shape, v_shape, ..] = self.member_shapes();
            let to = [q_shape.whole(dq), k_shape.whole(dk), v_shape.whole(dv)];
            return self.parts().zip(plans).try_for_each(|(part, plan)| {
                let of = (part, self.steps[0].keys);
                // SAFETY: the gradients are whole tensors, live, as stated above.
                unsafe { self.part_back(engine, tensors, [k, v], of, plan, to, workspace) }
            });
        }
        let at = |section: u64| workspace.address + section;
        let [q_shape, ..] = self.member_shapes();
        let sums = |step: usize| sections.sums[step % 2].map(at);
        let in_f32 = |keys: usize| self.member_shapes_k(keys).map(Shape::in_f32);
        // SAFETY: the section of dQ is inside the live workspace.
        unsafe { engine.fill(q_shape.in_f32().region(at(sections.dq)), 0) }?;
        for (shape, address) in in_f32(self.steps[0].keys).into_iter().zip(sums(0)) {
            // SAFETY: the sections of the sums are inside the live workspace, taken for the most
            // keys.
            unsafe { engine.fill(shape.region(address), 0) }?;
        }
        let mut sums_here: Option<E::Mark> = None;
        for (number, step) in self.steps.iter().enumerate() {
            let block = |at| self.block([k, v], sections.blocks, at, workspace);
            let here = block(number);
            // SAFETY: K and V are live, and so are the blocks in the workspace, taken for the most
            // keys.
            let mark =
                unsafe { self.pass_on(engine, communicator, number, [here, block(number + 1)]) }?;
            for (part, plan) in step.parts.iter().zip(&mut plans) {
                let [dq_part, dk_part, dv_part, _] = sections.part.map(at);
                let (rows, keys) = (&part.part.rows, &part.part.keys);
                let [k_part, v_part] = self.member_shapes_k(keys.len());
                let q_part = q_shape.with_rows(rows.len());
                let to = [q_part.whole(dq_part), k_part.whole(dk_part), v_part.whole(dv_part)];
                let [k_sum, v_sum] = in_f32(step.keys);
                // SAFETY: the parts and the sums are sections of the live workspace; the part's
                // rows and keys are inside the tensors and the block.
                unsafe {
                    let of = (part, step.keys);
                    self.part_back(engine, tensors, here, of, plan, to, workspace)?;
                    if let Some(mark) = sums_here.take() {
                        engine.join(&mark)?;
                    }
                    let [dk_sum, dv_sum] = sums(number);
                    let dq_sum = at(sections.dq);
                    self.add(engine, (q_part, dq_part), (q_shape.in_f32(), dq_sum), rows)?;
                    self.add(engine, (k_part, dk_part), (k_sum, dk_sum), keys)?;
                    self.add(engine, (v_part, dv_part), (v_sum, dv_sum), keys)?;
                }
            }
            // A block without a part passes through.
            if let Some(mark) = sums_here.take() {
                engine.join(&mark)?;
            }
            // The next block's sums come as this one's go; the last come home.
            let next = self.steps.get(number + 1).map_or(self.steps[0].keys, |next| next.keys);
            let passed = [(in_f32(step.keys), sums(number)), (in_f32(next), sums(number + 1))];
            // SAFETY: the sums are sections of the live workspace, taken for the most keys.
            sums_here = Some(unsafe { self.pass(engine, communicator, passed) }?);
            if let Some(mark) = mark {
                engine.join(&mark)?;
            }
        }
        if let Some(mark) = sums_here {
            engine.join(&mark)?;
        }
        let [dk_sum, dv_sum] = sums(self.steps.len());
        let [_, k_shape, v_shape, ..] = self.member_shapes();
        for (shape, sum, to) in
            [(q_shape, at(sections.dq), dq), (k_shape, dk_sum, dk), (v_shape, dv_sum, dv)]
        {
            // SAFETY: the sums are in the workspace, and the gradients are whole tensors, all live.
            unsafe { self.round(engine, shape, sum, to) }?;
        }
        Ok(())
    }

    /// The gradients of a part.
    ///
    /// # Safety
    /// - The tensors and the workspace are as for [`Attention::ring_back`].
    /// - `k` and `v` are live, with the part's keys among `keys`.
    /// - `to` is live memory of the part's shapes.
    #[allow(clippy::too_many_arguments, reason = "the tensors of a call")]
    unsafe fn part_back<E: Engine>(
        &self,
        engine: &E,
        [q, _, _, o, lse, d_o, ..]: [u64; 9],
        [k, v]: [u64; 2],
        (part, keys): (&Planned, usize),
        plan: &Plan<Backward>,
        to: [flash_attention::raw::View; 3],
        workspace: Region,
    ) -> Result<(), Error> {
        let Some((sections, _)) = &self.backward else { return Ok(()) };
        let [q_shape, _, _, o_shape, lse_shape] = self.member_shapes();
        let [k_shape, v_shape] = self.member_shapes_k(keys);
        let (rows, keys) = (&part.part.rows, &part.part.keys);
        let at = |section: u64| workspace.address + section;
        let mut lse_of_rows = lse_shape.region(lse);
        if *rows != (0..lse_shape.rows) {
            // The kernels have rows of the LSE one after the other.
            let of_part = lse_shape.with_rows(rows.len());
            lse_of_rows = of_part.region(at(sections.part[3]));
            let row_bytes = |shape: Shape| (shape.rows * shape.size) as u64;
            let to = Rows { address: lse_of_rows.address, pitch: row_bytes(of_part) };
            let first = lse + (rows.start * lse_shape.size) as u64;
            let from = Rows { address: first, pitch: row_bytes(lse_shape) };
            let matrices = (lse_shape.batch * lse_shape.heads) as u64;
            // SAFETY: the rows are inside the LSE, and the section is inside the workspace: they do
            // not overlap.
            unsafe { engine.copy_rows(to, from, matrices, row_bytes(of_part)) }?;
        }
        let own = Region::new(at(sections.kernel), plan.workspace_bytes());
        let args = Args::new(
            q_shape.view(q, rows),
            k_shape.view(k, keys),
            v_shape.view(v, keys),
            o_shape.view(o, rows),
        );
        let args = part.with_lists(args.lse(lse_of_rows).workspace(own), workspace);
        let args = BackwardArgs::new(args, o_shape.view(d_o, rows), to);
        // SAFETY: the views are inside live tensors, and the kernel's section inside the workspace.
        unsafe { start(engine, plan, &args, own) }
    }

    /// Adds a part of a gradient to rows of its sum.
    ///
    /// # Safety
    /// `from` and `to` are live memory of these shapes, and `sum` has the rows.
    unsafe fn add<E: Engine>(
        &self,
        engine: &E,
        (part, from): (Shape, u64),
        (sum, to): (Shape, u64),
        rows: &std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let merge = Merge::new(sum.extents(rows), self.share.problem().dtype());
        let args = MergeArgs {
            part: (part.whole(from), Region::default()),
            sum: (sum.view(to, rows), Region::default()),
            ..MergeArgs::default()
        };
        // SAFETY: part and sum are live and have the rows, as stated above.
        unsafe { self.merge(engine, merge, args) }
    }

    /// Rounds a sum to the storage type.
    ///
    /// # Safety
    /// `sum` is live memory of the shape in f32, and `to` in the storage type.
    unsafe fn round<E: Engine>(
        &self,
        engine: &E,
        shape: Shape,
        sum: u64,
        to: u64,
    ) -> Result<(), Error> {
        if shape.rows == 0 {
            return Ok(());
        }
        let merge = Merge::new(shape.extents(&(0..shape.rows)), self.share.problem().dtype());
        let args = MergeArgs {
            sum: (shape.in_f32().whole(sum), Region::default()),
            out: (shape.whole(to), Region::default()),
            ..MergeArgs::default()
        };
        // SAFETY: sum and gradient are live and have the shape, as stated above.
        unsafe { self.merge(engine, merge.of(true, false).out(true), args) }
    }
}
