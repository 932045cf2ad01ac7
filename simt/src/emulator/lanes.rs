//! The lanes of a block as pooled coroutines, and the steps that drive them.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Once,
};

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};

use super::{
    Stats,
    block::Block,
    current,
    fault::{Fault, FaultKind, Site},
    launch::Run,
    recording::Recording,
    schedule::{Next, Schedule},
};
use crate::Dim3;

/// Stack of a lane. Kernels keep their tiles in registers, hence here.
const STACK_BYTES: usize = 256 * 1024;

type Lane = Coroutine<(), (), (), DefaultStack>;

/// Suspends a lane; made valid by the coroutine that owns it.
pub(super) type LaneYielder = Yielder<(), ()>;

/// Payload of the unwinding that a fault starts in a lane.
pub(super) struct FaultPayload(pub FaultKind);

/// The result of a step of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A lane ran, or a load landed.
    Went,
    /// Every lane that has not returned waits, some of them for other blocks.
    Waits,
    /// The cluster has ended; its stats are there.
    Ended,
}

/// Runs blocks (or clusters of them) one after another, keeping lanes and memory for the next.
pub(super) struct Engine {
    lanes: Vec<Lane>,
    block: Box<Block>,
    schedule: Schedule,
    first_block: Dim3,
    /// Of the cluster.
    index: u64,
    seed: u64,
}

impl Engine {
    pub fn new() -> Self {
        quiet_panics();
        Self {
            lanes: Vec::new(),
            block: Box::new(Block::new()),
            schedule: Schedule::new(0, 0),
            first_block: Dim3::new(0, 0, 0),
            index: 0,
            seed: 0,
        }
    }

    /// Runs cluster `index` to its end.
    pub fn run_block(&mut self, run: &Run<'_>, index: u64) -> Result<Stats, Box<Fault>> {
        self.start(run, index)?;
        let mut companion = run.together.join();
        loop {
            match self.step(run)? {
                Step::Went => companion.goes_on(),
                Step::Waits if companion.pauses() => return Err(self.deadlock()),
                Step::Waits => {}
                Step::Ended => return Ok(self.block.stats),
            }
        }
    }

    /// Gets ready to run cluster `index`, which [`step`](Self::step) then does. The kernel must
    /// outlive the last step.
    pub fn start(&mut self, run: &Run<'_>, index: u64) -> Result<(), Box<Fault>> {
        let &Run { launch, options, kernel, .. } = run;
        (self.index, self.seed) = (index, options.seed);
        self.first_block = launch.grid.unravel(index * u64::from(launch.cluster));
        self.schedule = Schedule::new(options.seed, index);
        let threads = launch.cluster_threads();
        while self.lanes.len() < threads {
            match DefaultStack::new(STACK_BYTES) {
                Ok(stack) => self.lanes.push(new_lane(stack)),
                Err(error) => {
                    // Others may need the memory of these stacks.
                    self.lanes.clear();
                    return Err(self.fault(FaultKind::Memory(format!(
                        "the stacks of a block of {threads} emulated threads, {} KiB each: {error}",
                        STACK_BYTES / 1024
                    ))));
                }
            }
        }
        self.block.start(launch, options, self.first_block, kernel);
        self.block.recording = options
            .recorder
            .as_deref()
            .map(|recorder| Box::new(Recording::new(recorder, &launch, index)));
        Ok(())
    }

    /// One choice of the schedule.
    pub fn step(&mut self, run: &Run<'_>) -> Result<Step, Box<Fault>> {
        let entered = current::Entered::new(&mut self.block);
        let stopped = run.options.stopped();
        let mut result = if stopped { Err(FaultKind::Stopped) } else { self.take_step() };
        drop(entered);
        if let Ok(Step::Ended) = result
            && run.options.checks.global_races
            && self.block.blocks() as u64 != run.launch.grid.count()
        {
            let block = self.index * u64::from(run.launch.cluster);
            let added = run.between.add(&self.block.global, block, run.launch.grid);
            result = added.map(|()| Step::Ended);
        }
        if let Ok(Step::Ended) = result
            && let Some(recording) = self.block.recording.take()
        {
            run.gathered.add(*recording);
        }
        result.map_err(|kind| {
            // Suspended lanes stand in the middle of the kernel: they are of no use.
            self.lanes.clear();
            self.fault(kind)
        })
    }

    /// Gives up a cluster that has not ended, if there is one.
    pub fn abandon(&mut self) {
        self.lanes.clear();
    }

    /// The counts so far.
    pub fn stats(&self) -> Stats {
        self.block.stats
    }

    /// Gives up a cluster that waits for others, which do not go on either.
    pub fn deadlock(&mut self) -> Box<Fault> {
        let kind = self.block.deadlock();
        // Suspended lanes stand in the middle of the kernel.
        self.abandon();
        self.fault(kind)
    }

    fn fault(&self, kind: FaultKind) -> Box<Fault> {
        Box::new(Fault { kind, block: Some(self.first_block), seed: self.seed })
    }

    fn take_step(&mut self) -> Result<Step, FaultKind> {
        self.block.look_at_turns();
        let loads = self.block.loads_on_their_way();
        match self.schedule.next(&self.block.ready, loads > 0) {
            Next::Warp { warp, first, backwards } => self.run_warp(warp, first, backwards)?,
            Next::Load | Next::Nothing if self.block.all_done() => {
                self.block.finish()?;
                return Ok(Step::Ended);
            }
            Next::Load => {
                let load = self.schedule.load(loads);
                self.block.land_load(load)?;
            }
            Next::Nothing if !self.block.turns.is_empty() => return Ok(Step::Waits),
            Next::Nothing => return Err(self.block.deadlock()),
        }
        Ok(Step::Went)
    }

    /// Runs each ready lane of a warp until it waits.
    fn run_warp(&mut self, warp: usize, first: u32, backwards: bool) -> Result<(), FaultKind> {
        for i in 0..32 {
            let lane = (if backwards { first + 32 - i } else { first + i }) % 32;
            // Asked each time: a lane that has run may have woken this one.
            if self.block.ready[warp] >> lane & 1 == 1 {
                self.resume(warp * 32 + lane as usize)?;
            }
        }
        Ok(())
    }

    fn resume(&mut self, lane: usize) -> Result<(), FaultKind> {
        self.block.current = lane;
        self.block.count_step(None)?;
        let coroutine = &mut self.lanes[lane];
        match catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))) {
            Ok(CoroutineResult::Yield(())) => Ok(()),
            Ok(CoroutineResult::Return(())) => unreachable!("lanes loop for ever"),
            Err(payload) => Err(kind_of(payload, lane)),
        }
    }
}

/// A lane that runs the current block's kernel each time it is resumed after the end.
fn new_lane(stack: DefaultStack) -> Lane {
    Coroutine::with_stack(stack, |yielder: &LaneYielder, ()| {
        loop {
            current::run_current_lane(yielder);
            yielder.suspend(());
        }
    })
}

fn kind_of(payload: Box<dyn Any + Send>, lane: usize) -> FaultKind {
    let payload = match payload.downcast::<FaultPayload>() {
        Ok(fault) => return fault.0,
        Err(payload) => payload,
    };
    let message = payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown".to_owned());
    FaultKind::Panic {
        message,
        this: Site { lane: lane as u32, location: current::take_panic_location() },
    }
}

/// Panics of a kernel become faults; the hook that would print them keeps their place.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if current::is_inside() {
                current::set_panic_location(info.location());
            } else {
                previous(info);
            }
        }));
    });
}
