//! Races on global memory, and blocks that go on for ever.

mod common;

use common::{Map, launch, view_mut};
use half::f16;
use simt::{
    Dim3, atomic,
    barrier::{self, Named},
    emulator::{self, Checks, Fault, FaultKind, Launch, Options, Stats},
    global::GlobalMut,
    mbarrier,
    memory::Memory,
    shared::Shared,
    thread, tma, turn, warp,
};

fn smem<T: Memory>(len: u32) -> Shared<T> {
    // SAFETY: tests launch with 4096 bytes and order their accesses.
    unsafe { Shared::dynamic(0, len) }
}

/// Launches blocks of 64 threads under some seeds; the results must agree in kind.
fn under_seeds(blocks: u32, kernel: impl Fn() + Sync) -> Result<Stats, Fault> {
    let launch = Launch { grid: blocks.into(), block: 64.into(), cluster: 1, shared_bytes: 4096 };
    let results = (0..6).map(|seed| emulator::launch_with(launch, &Options::seeded(seed), &kernel));
    results
        .reduce(|first, next| {
            assert_eq!(first.is_ok(), next.is_ok());
            first.and(next)
        })
        .expect("some seeds")
}

fn is_race(kind: &FaultKind, what: &str, other_what: &str, other_block: bool) -> bool {
    matches!(kind, FaultKind::GlobalRace { what: w, other_what: o, other_block: b, .. }
        if *w == what && *o == other_what && b.is_some() == other_block)
}

#[test]
fn threads_of_a_block_race_on_global_memory_as_on_shared() {
    let mut data = [0u32; 64];
    let to = view_mut(&mut data);
    let kernel = |barrier: bool, same: bool| {
        move || {
            let t = thread::thread_idx_x();
            to.write(t.into(), t);
            if barrier {
                // Hazard: the next element was written by another thread.
                thread::sync_threads();
            }
            let i = u64::from(t ^ 32);
            if same { to.write(i, t ^ 32) } else { _ = to.read(i) }
        }
    };
    for same in [false, true] {
        under_seeds(1, kernel(true, same)).unwrap_or_else(|fault| panic!("{fault}"));
    }
    let kind = under_seeds(1, kernel(false, false)).expect_err("the planted fault is found").kind;
    assert!(
        is_race(&kind, "read", "write", false) || is_race(&kind, "write", "read", false),
        "{kind}"
    );
    assert!(kind.to_string().contains("a barrier must come between"), "{kind}");
    // The same value from two threads is a race as well.
    let kind = under_seeds(1, kernel(false, true)).expect_err("the planted fault is found").kind;
    assert!(is_race(&kind, "write", "write", false), "{kind}");
}

#[test]
fn a_read_must_come_before_anothers_write() {
    let mut data = [0u32; 64];
    let to = view_mut(&mut data);
    let kernel = |barrier: bool| {
        move || {
            let t = thread::thread_idx_x();
            let sum: u32 = (0..64).map(|i| to.read(i)).sum();
            if barrier {
                // Hazard: other threads have yet to read what is overwritten.
                thread::sync_threads();
            }
            to.write(t.into(), sum);
        }
    };
    under_seeds(1, kernel(true)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = under_seeds(1, kernel(false)).expect_err("the planted fault is found").kind;
    assert!(
        is_race(&kind, "write", "read", false) || is_race(&kind, "read", "write", false),
        "{kind}"
    );
}

#[test]
fn neighbouring_elements_are_told_apart() {
    let mut halves = [0u16; 256];
    let to = view_mut(&mut halves);
    under_seeds(2, || {
        let i = u64::from(thread::index_1d());
        to.write(2 * i, 1);
        to.write(2 * i + 1, 2);
        let _ = to.as_global().read_as::<u32>(2 * i);
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(std::hint::black_box(&mut halves)[..4], [1, 2, 1, 2]);
}

#[test]
fn blocks_may_not_meet_but_in_atomic_operations() {
    let mut data = [0u32; 4];
    let to = view_mut(&mut data);
    type Accesses = fn(GlobalMut<u32>, u32);
    let run = |accesses: Accesses| {
        under_seeds(5, || {
            if thread::thread_idx_x() == 0 {
                accesses(to, thread::block_idx_x());
            }
        })
    };
    let race = |accesses: Accesses| run(accesses).expect_err("the planted fault is found").kind;
    // Reads of the same, atomics of the same, writes of one's own.
    run(|to, _| _ = to.read(0)).unwrap_or_else(|fault| panic!("{fault}"));
    run(|to, _| _ = atomic::add_global_u32(to, 0, 1)).unwrap_or_else(|fault| panic!("{fault}"));
    run(|to, block| to.write((block % 4).into(), if block < 4 { block } else { return }))
        .unwrap_or_else(|fault| panic!("{fault}"));
    let kind = race(|to, _| to.write(1, 7));
    assert!(is_race(&kind, "write", "write", true), "{kind}");
    assert!(kind.to_string().contains("of block ("), "{kind}");
    let kind = race(|to, block| if block == 3 { to.write(2, 7) } else { _ = to.read(2) });
    assert!(
        is_race(&kind, "write", "read", true) || is_race(&kind, "read", "write", true),
        "{kind}"
    );
    let kind = race(
        |to, block| {
            if block == 1 { _ = to.read(3) } else { _ = atomic::add_global_u32(to, 3, 1) }
        },
    );
    assert!(
        is_race(&kind, "atomic", "read", true) || is_race(&kind, "read", "atomic", true),
        "{kind}"
    );
    let kind = race(
        |to, block| {
            if block == 1 { to.write(3, 1) } else { _ = atomic::add_global_u32(to, 3, 1) }
        },
    );
    assert!(
        is_race(&kind, "atomic", "write", true) || is_race(&kind, "write", "atomic", true),
        "{kind}"
    );
}

#[test]
fn bulk_copies_are_accesses_too() {
    let mut data = vec![f16::ZERO; 8 * 64];
    let map = Map::new(&data, 8, 64, 4);
    let to = view_mut(&mut data);
    // Blocks store four rows each; block 1 stores the rows of block 0 if `own` is not set.
    let kernel = |own: bool, reads: bool| {
        let map = &map;
        move || {
            let t = thread::thread_idx_x();
            let block = thread::block_idx_x();
            for i in 0..4 {
                smem::<f16>(4 * 64).write(4 * t + i, f16::ONE);
            }
            mbarrier::fence_proxy_async();
            // Hazard: the copy reads what all threads have written.
            thread::sync_threads();
            if t == 0 {
                let row = if own { 4 * block } else { 0 };
                // SAFETY: the matrix outlives the launch.
                unsafe { tma::store_4d(map.address(), [0, row, 0, 0], 0) };
                tma::commit_group();
                tma::wait_group_read::<0>();
            }
            if reads && t == 1 {
                let _ = to.read(u64::from(4 * block) * 64 + 9);
            }
        }
    };
    under_seeds(2, kernel(true, false)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = under_seeds(2, kernel(false, false)).expect_err("the planted fault is found").kind;
    assert!(is_race(&kind, "write", "write", true), "{kind}");
    let kind = under_seeds(2, kernel(true, true)).expect_err("the planted fault is found").kind;
    assert!(kind.to_string().contains("a bulk store of warpgroup 0"), "{kind}");
}

#[test]
fn the_check_can_be_switched_off() {
    let mut data = [0u32; 4];
    let to = view_mut(&mut data);
    let checks = Checks { global_races: false, ..Checks::default() };
    let options = Options { checks, ..Options::default() };
    let launch = Launch { grid: 4.into(), block: 64.into(), cluster: 1, shared_bytes: 0 };
    emulator::launch_with(launch, &options, &|| to.write(0, 1)).expect("nobody looks");
}

/// A launch that may do little without progress.
fn livelock(blocks: u32, kernel: impl Fn() + Sync) -> Vec<FaultKind> {
    let launch = Launch { grid: blocks.into(), block: 64.into(), cluster: 1, shared_bytes: 4096 };
    let run = |seed| {
        let options = Options { budget: 100_000, ..Options::seeded(seed) };
        emulator::launch_with(launch, &options, &kernel).expect_err("the launch never ends").kind
    };
    (0..4).map(run).collect()
}

#[test]
fn a_queue_that_wraps_is_a_fault_that_says_who_goes_round() {
    let mut data = [0u32; 64];
    let to = view_mut(&mut data);
    let mut queue = [0u32; 1];
    let queue = view_mut(&mut queue);
    let kernel = |last: u32| {
        move || {
            let t = thread::thread_idx_x();
            let task = smem::<u32>(1);
            loop {
                if t == 0 {
                    task.write(0, atomic::increment_global_u32(queue, 0, last));
                }
                // Hazard: the task is read by threads that did not write it.
                thread::sync_threads();
                let mine = task.read(0);
                // Hazard: the task is overwritten by the next one.
                thread::sync_threads();
                if mine >= 8 {
                    return;
                }
                if t < 8 {
                    to.write((8 * mine + t).into(), mine);
                }
            }
        }
    };
    launch(1, 64, kernel(8));
    // One task too few until the count starts again: nobody is ever refused.
    for kind in livelock(1, kernel(7)) {
        let FaultKind::Livelock { steps: 100_000, busiest, .. } = &kind else { panic!("{kind}") };
        assert!(busiest.contains("thread 0 at simt/tests/global.rs:"), "{kind}");
    }
}

#[derive(Clone, Copy)]
struct Pair;

impl Named for Pair {
    fn id(self) -> u32 {
        1
    }
}

#[test]
fn a_thread_that_spins_is_a_fault_that_says_on_what() {
    let mut flag = [0u32; 1];
    let flag = view_mut(&mut flag);
    // On global memory, by an operation that is atomic and by one that is not; on shared memory.
    let line = line!() + 3;
    for kind in livelock(1, || {
        if thread::thread_idx_x() == 5 {
            while atomic::add_global_u32(flag, 0, 0) == 0 {}
        }
    }) {
        let text = kind.to_string();
        assert!(text.contains(&format!("thread 5 at simt/tests/global.rs:{line}")), "{text}");
    }
    for kind in livelock(1, || {
        if thread::thread_idx_x() == 5 {
            while flag.read(0) == 0 {}
        }
    }) {
        assert!(kind.to_string().contains("thread 5 at simt/tests/global.rs"), "{kind}");
    }
    for kind in livelock(1, || {
        let word = smem::<u32>(1);
        if thread::thread_idx_x() == 0 {
            word.write(0, 0);
        }
        thread::sync_threads();
        if thread::thread_idx_x() == 40 {
            while word.read(0) == 0 {}
        }
    }) {
        assert!(kind.to_string().contains("thread 40 at simt/tests/global.rs"), "{kind}");
    }
    // Barriers that go on and on, without any access.
    for kind in livelock(1, || {
        loop {
            barrier::sync(Pair, 64);
            warp::sync_warp(warp::FULL_MASK);
        }
    }) {
        assert!(matches!(kind, FaultKind::Livelock { .. }), "{kind}");
    }
}

#[test]
fn work_that_makes_progress_may_take_as_long_as_it_likes() {
    let data = vec![1u32; 1 << 20];
    let from = common::view(&data);
    let options = Options { budget: 10_000, ..Options::default() };
    let launch = Launch { grid: 1.into(), block: 64.into(), cluster: 1, shared_bytes: 0 };
    emulator::launch_with(launch, &options, &|| {
        let t = u64::from(thread::thread_idx_x());
        let sum: u32 = (0..1 << 14).map(|i| from.read(i * 64 + t)).sum();
        assert_eq!(sum, 1 << 14);
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
}

const IN_TURN: Launch =
    Launch { grid: Dim3::new(7, 1, 1), block: Dim3::new(64, 1, 1), cluster: 1, shared_bytes: 0 };

/// Blocks that draw tickets, and write what the one before wrote in turn. Whether the order held.
fn goes_in_order(seed: u64, waits: bool) -> bool {
    // Tickets, the turn, the last that came, those that did not come after the one before.
    let mut words = [0u32; 4];
    let view = view_mut(&mut words);
    let kernel = || {
        let draws = thread::thread_idx_x() == 0;
        let ticket = if draws { atomic::add_global_u32(view, 0, 1) } else { 0 };
        // Hazard: none; other blocks may run meanwhile.
        thread::sync_threads();
        if draws {
            if waits {
                turn::wait(view, 1, ticket);
            }
            let before = atomic::exchange_global_u32(view, 2, ticket + 1);
            let _ = atomic::add_global_u32(view, 3, u32::from(before != ticket));
            turn::pass(view, 1);
        }
    };
    emulator::launch_with(IN_TURN, &Options::seeded(seed), &kernel)
        .unwrap_or_else(|fault| panic!("{fault}"));
    let [tickets, turns, _, wrong] = std::hint::black_box(words);
    assert_eq!((tickets, turns), (7, 7));
    wrong == 0
}

#[test]
fn blocks_go_in_turn() {
    assert!((0..20).all(|seed| goes_in_order(seed, true)));
    assert!(!(1..20).all(|seed| goes_in_order(seed, false)), "a turn that none awaits is found");
}

#[test]
fn a_turn_that_never_comes_is_a_deadlock() {
    let mut words = [0u32; 1];
    let view = view_mut(&mut words);
    let kernel = || {
        if thread::thread_idx_x() == 0 {
            turn::wait(view, 0, thread::block_idx_x());
            // Block 2 keeps its turn.
            if thread::block_idx_x() % 4 != 2 {
                turn::pass(view, 0);
            }
        }
    };
    for seed in 0..6 {
        std::hint::black_box(&mut words).fill(0);
        let fault = emulator::launch_with(IN_TURN, &Options::seeded(seed), &kernel);
        let FaultKind::Divergence(report) = fault.expect_err("nobody passes turn 2 on").kind else {
            panic!("a deadlock was expected")
        };
        assert!(report.contains("1 thread(s) (0 to 0) wait at"), "{report}");
        assert!(report.contains("of the count at"), "{report}");
    }
}
