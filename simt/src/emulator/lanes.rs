//! The lanes of a block as pooled coroutines, and the loop that drives them.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Once,
};

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};

use super::{
    Launch, Stats,
    block::{Block, LaneState},
    current,
    fault::{Fault, FaultKind, Site},
};
use crate::Dim3;

/// Stack of a lane. Kernels keep their tiles in registers, hence here.
const STACK_BYTES: usize = 256 * 1024;

type Lane = Coroutine<(), (), (), DefaultStack>;

/// Suspends a lane; made valid by the coroutine that owns it.
pub(super) type LaneYielder = Yielder<(), ()>;

/// Payload of the unwinding that a fault starts in a lane.
pub(super) struct FaultPayload(pub FaultKind);

/// Runs blocks (or clusters of them) one after another, keeping lanes and memory for the next.
pub(super) struct Engine {
    lanes: Vec<Lane>,
    block: Box<Block>,
}

impl Engine {
    pub fn new() -> Self {
        quiet_panics();
        Self { lanes: Vec::new(), block: Box::new(Block::new()) }
    }

    /// Runs the cluster that begins with block `first_block` to its end.
    pub fn run_block(
        &mut self,
        launch: Launch,
        first_block: Dim3,
        kernel: &(dyn Fn() + Sync),
    ) -> Result<Stats, Box<Fault>> {
        let threads = launch.cluster_threads();
        while self.lanes.len() < threads {
            self.lanes.push(new_lane());
        }
        self.block.start(launch, first_block, kernel);
        let entered = current::Entered::new(&mut self.block);
        let result = self.drive(threads);
        drop(entered);
        match result {
            Ok(()) => Ok(self.block.stats),
            Err(kind) => {
                // Suspended lanes stand in the middle of the kernel: they are of no use.
                self.lanes.clear();
                Err(Box::new(Fault { kind, block: Some(first_block) }))
            }
        }
    }

    fn drive(&mut self, threads: usize) -> Result<(), FaultKind> {
        loop {
            let mut progress = false;
            for lane in 0..threads {
                if !matches!(self.block.lanes[lane].state, LaneState::Ready) {
                    continue;
                }
                progress = true;
                self.block.current = lane;
                let coroutine = &mut self.lanes[lane];
                match catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))) {
                    Ok(CoroutineResult::Yield(())) => {}
                    Ok(CoroutineResult::Return(())) => unreachable!("lanes loop for ever"),
                    Err(payload) => return Err(kind_of(payload, lane)),
                }
            }
            if self.block.all_done() {
                return self.block.finish();
            }
            if !progress && !self.block.land_one_async()? {
                return Err(self.block.deadlock());
            }
        }
    }
}

/// A lane that runs the current block's kernel each time it is resumed after the end.
fn new_lane() -> Lane {
    let stack = DefaultStack::new(STACK_BYTES).expect("memory for the stacks of emulated lanes");
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
