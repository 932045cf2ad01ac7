//! Launches: the clusters of a grid, side by side on all cores, or in an order that a seed
//! chooses.

use std::{
    cell::RefCell,
    sync::atomic::{AtomicU64, Ordering},
};

use rayon::prelude::*;

use super::{
    Fault, FaultKind, Launch, Options, Stats,
    global_memory::BetweenBlocks,
    lanes::{Engine, Step},
    record,
    recording::Gathered,
    schedule::Random,
    together::Together,
};

thread_local! {
    /// Block engines of this worker thread, with their pools of lanes: one, and as many as a
    /// launch with a seed runs in turn.
    static ENGINES: RefCell<Vec<Engine>> = const { RefCell::new(Vec::new()) };
}

/// The state that the clusters of a launch share.
pub(super) struct Run<'a> {
    pub launch: Launch,
    pub options: &'a Options,
    pub between: &'a BetweenBlocks,
    pub together: &'a Together,
    pub gathered: &'a Gathered,
    pub kernel: &'a (dyn Fn() + Sync),
}

/// Clusters that a launch with a seed has under way at a time.
const RESIDENT: usize = 3;
/// Steps of a cluster before another one's turn, at most.
const TURN: usize = 64;
/// Steps in a row, of clusters that chance chooses, in which none can go on: a deadlock.
const PATIENCE: usize = 1000;

/// Runs `kernel` once for every thread of the launch, with the default [`Options`].
///
/// # Errors
/// As [`launch_with`].
pub fn launch(launch: Launch, kernel: &(dyn Fn() + Sync)) -> Result<Stats, Fault> {
    launch_with(launch, &Options::default(), kernel)
}

/// Runs `kernel` once for every thread of the launch.
///
/// # Errors
/// The fault of the first block that had one, in grid order among those that ran, or in the
/// order of the seed; other blocks may not have run.
pub fn launch_with(
    launch: Launch,
    options: &Options,
    kernel: &(dyn Fn() + Sync),
) -> Result<Stats, Fault> {
    if let Some(reason) = launch.obstacle() {
        return Err(Fault::of_launch(FaultKind::Launch(reason)));
    }
    let clusters = launch.grid.count() / u64::from(launch.cluster);
    let recorder = options.recorder.as_deref();
    let (gathered, on) = (Gathered::default(), record::On::new(recorder));
    let (between, together) = (&BetweenBlocks::default(), &Together::default());
    let run = &Run { launch, options, between, together, gathered: &gathered, kernel };
    let result =
        if options.seed == 0 { side_by_side(run, clusters) } else { in_turn(run, clusters) };
    drop(on);
    if let (Ok(_), Some(recorder)) = (&result, recorder) {
        recorder.add(gathered.finish(options.name, launch));
    }
    result.map_err(|fault| *fault)
}

/// Runs clusters on all cores.
fn side_by_side(run: &Run<'_>, clusters: u64) -> Result<Stats, Box<Fault>> {
    // The least index of a cluster that failed; later clusters need not run.
    let failed = AtomicU64::new(u64::MAX);
    let (stats, fault) = (0..clusters)
        .into_par_iter()
        .map(|index| {
            if index > failed.load(Ordering::Relaxed) {
                return (Stats::default(), None);
            }
            if run.options.stopped() {
                failed.fetch_min(index, Ordering::Relaxed);
                let fault = Box::new(Fault::of_launch(FaultKind::Stopped));
                return (Stats::default(), Some((index, fault)));
            }
            let result = ENGINES.with(|engines| {
                let mut engines = engines.borrow_mut();
                if engines.is_empty() {
                    engines.push(Engine::new());
                }
                engines[0].run_block(run, index)
            });
            match result {
                Ok(stats) => (stats, None),
                Err(fault) => {
                    failed.fetch_min(index, Ordering::Relaxed);
                    (Stats::default(), Some((index, fault)))
                }
            }
        })
        .reduce(
            || (Stats::default(), None),
            |(mut stats, a), (more, b)| {
                stats += more;
                let first = match (a, b) {
                    (Some(a), Some(b)) => Some(if a.0 <= b.0 { a } else { b }),
                    (a, b) => a.or(b),
                };
                (stats, first)
            },
        );
    fault.map_or(Ok(stats), |(_, fault)| Err(fault))
}

/// Runs clusters on this core, a few at a time, in the order that the seed chooses.
fn in_turn(run: &Run<'_>, clusters: u64) -> Result<Stats, Box<Fault>> {
    let mut random = Random::new(run.options.seed, u64::MAX);
    let mut waiting: Vec<u64> = (0..clusters).collect();
    let mut idle = ENGINES.take();
    while idle.len() < RESIDENT.min(waiting.len()) {
        idle.push(Engine::new());
    }
    let mut running: Vec<Engine> = Vec::new();
    let (mut stats, mut waits) = (Stats::default(), 0);
    let mut all = || loop {
        while running.len() < RESIDENT
            && !waiting.is_empty()
            && let Some(mut engine) = idle.pop()
        {
            let index = waiting.swap_remove(random.below(waiting.len()));
            let started = engine.start(run, index);
            running.push(engine);
            started?;
        }
        if running.is_empty() {
            return Ok(());
        }
        let turn = random.below(running.len());
        for _ in 0..=random.below(TURN) {
            let step = running[turn].step(run)?;
            waits = if step == Step::Waits { waits + 1 } else { 0 };
            match step {
                Step::Went => {}
                Step::Waits if waits > PATIENCE => return Err(running[turn].deadlock()),
                Step::Waits => break,
                Step::Ended => {
                    stats += running[turn].stats();
                    idle.push(running.swap_remove(turn));
                    break;
                }
            }
        }
    };
    let result = all();
    // Lanes of a cluster that has not ended stand in the middle of the kernel.
    running.iter_mut().for_each(Engine::abandon);
    idle.append(&mut running);
    ENGINES.set(idle);
    result.map(|()| stats)
}
